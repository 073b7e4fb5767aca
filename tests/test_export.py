"""Test 37, export_parity: what ships answers as what was trained, on 500 pictures, in every engine and precision that a bundle names."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from defect_detect.core.bundle import INT8, Bundle, BundleCard, BundleError, OperatingPoint, read_bundle
from defect_detect.core.image import InputSpec
from defect_detect.core.metrics import confusion, iou
from defect_detect.core.predictor import Predictor, can_run, start_engine, verdict_of
from defect_detect.data.demo import small_set
from defect_detect.data.read import classes_of, load_image, load_mask, read_data, read_table
from defect_detect.judge.operating import choose, look
from defect_detect.learn.export import quantise, to_onnx, training_batches
from defect_detect.learn.loaders import make_loaders
from defect_detect.learn.model import make_model, save_model
from defect_detect.learn.parity import PAIRS, Seen, TorchEngine, engines_of, parity, settle
from defect_detect.learn.train import make_deterministic, train

ROOT, N, FP32, DROP, BAND = Path(__file__).resolve().parents[1], 500, 1e-4, .005, .02


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A small network that has learned something, and 500 pictures that it has not seen: real ones where DEFECT_DATA names them."
    tmp, spec = tmp_path_factory.mktemp("export"), InputSpec(height=96, width=96)
    make_deterministic(0, 1)
    data, table = small_set(tmp, tiles=24, exposures=3)
    t = read_table(table)
    net = train(make_loaders(data, t, classes_of(t), spec, batch=4), make_model(len(classes_of(t))), epochs=12).model
    if os.environ.get("DEFECT_DATA"): root, seen = Path(os.environ["DEFECT_DATA"]), read_data(os.environ["DEFECT_DATA"])
    else:
        (tmp/"other").mkdir()
        root, other = small_set(tmp/"other", tiles=84, exposures=6, seed=1)
        seen = read_table(other)
    seen = seen.iloc[np.linspace(0, len(seen)-1, N).round().astype(int)].assign(group=lambda d: d.image)
    model = to_onnx(net, spec)
    card = BundleCard(name="parity", classes=classes_of(t), input=spec, operating_point=OperatingPoint())
    bundle = Bundle(card, model, b"", "", "", quantise(model, training_batches(data, t, spec, 48)))
    return net, bundle, root, seen


def say(net, bundle, root, table):
    "What torch and every engine say."
    engines, missing = engines_of(bundle, wanted="openvino") # tests need both
    batches = [np.random.default_rng(i).normal(size=(4, 3, 96, 96)).astype(np.float32) for i in range(3)]
    want = Seen(*look(Predictor(bundle, TorchEngine(net)), root, table), 0.)
    return want, {k: Seen(*look(Predictor(bundle, e), root, table), parity(net, e, batches)) for k, e in engines.items()}, engines, missing


def test_export_parity(trained):
    net, bundle, root, table = trained
    want, seen, engines, missing = say(*trained)
    plan, op, held, bad = settle(("onnxruntime", "int8"), seen, want, lambda s: choose(s.rows, s.hist, .05, 20))
    assert set(seen)|set(missing)==set(PAIRS) and all(not can_run(p) for _, p in missing) and {k for k in bad if k[1]=="fp32"}==set()
    assert plan==(("onnxruntime", "fp32") if ("onnxruntime", "int8") in {**bad, **missing} else ("onnxruntime", "int8"))
    # once more by another way: whole predictions, at the pictures' own size
    card = bundle.card.model_copy(update=dict(operating_point=op))
    images = [load_image(root, r) for r in table.itertuples()]
    truth = [load_mask(root, r, bundle.card.classes)>0 for r in table.itertuples()]
    judge = lambda e: Predictor(Bundle(card, b"", b"", "", ""), e).predict(images, batch=4)
    overlap = lambda answers: iou(sum(confusion(t, a.mask>0, 2) for t, a in zip(truth, answers) if t.any()))[1]
    torch_said = judge(TorchEngine(net))
    for p in held:
        said = judge(engines[p.engine, p.precision])
        worst = max(np.abs(a.defect_prob-b.defect_prob).max() for a, b in zip(torch_said, said))
        far = [a for a, b in zip(torch_said, said) if a.verdict!=b.verdict and abs(a.score-op.score_threshold)>(FP32 if p.precision=="fp32" else BAND)]
        drop = overlap(torch_said)-overlap(said)
        print(f"{p.engine} {p.precision}: {len(said)} pictures, probabilities within {worst:.1e}, IoU {-drop:+.4f}, {p.flips} flips inside the band, {len(far)} outside")
        assert len(said)==N and not far and p.band==(FP32 if p.precision=="fp32" else BAND)
        assert worst<=FP32 if p.precision=="fp32" else drop<=DROP+.001 # the record counts pixels by whole hundredths of probability, before small regions go
    for k, why in bad.items(): print(f"{' '.join(k)} is left out: {why}")


def test_a_changed_network_is_noticed(trained):
    net, bundle, root, table = trained
    few = table.iloc[::25]
    with torch.no_grad(): net.segmentation_head[0].bias[0] -= 1
    try: want, seen, *_ = say(net, bundle, root, few)
    finally:
        with torch.no_grad(): net.segmentation_head[0].bias[0] += 1
    with pytest.raises(BundleError, match="onnxruntime fp32 does not answer as torch does: a probability differs"):
        settle(("onnxruntime", "fp32"), seen, want, lambda s: OperatingPoint())


def test_a_bad_int8_is_left_out(trained):
    "The integers are of a network that thinks little of the background."
    net, bundle, root, table = trained
    with torch.no_grad(): net.segmentation_head[0].bias[0] -= 8
    try: other = to_onnx(net, bundle.card.input)
    finally:
        with torch.no_grad(): net.segmentation_head[0].bias[0] += 8
    bad8 = Bundle(bundle.card, bundle.model, b"", "", "", quantise(other, [np.random.default_rng(0).normal(size=(4, 3, 96, 96)).astype(np.float32)]))
    want, seen, _, missing = say(net, bad8, root, table.iloc[::10])
    if not can_run("int8"): seen["onnxruntime", "int8"] = Seen(*look(Predictor(bad8, start_engine(bad8, "onnxruntime", "int8")), root, table.iloc[::10]), 0.) # slower here, and wrong all the same
    plan, op, held, bad = settle(("onnxruntime", "int8"), seen, want, lambda s: choose(s.rows, s.hist, .05, 20))
    assert plan==("onnxruntime", "fp32") and ("onnxruntime", "int8") in bad and not any(p.precision=="int8" for p in held), bad


def export(out, *pairs):
    words = [w for p in (f"out={out}", *pairs) for w in ("-p", p)]
    return subprocess.run([str(Path(sys.executable).parent/"defect-detect"), "run", str(ROOT/"nbs/pipeline/3_export.ipynb"), "-o", f"{out}.ipynb", *words], capture_output=True, text=True, timeout=600)


def test_the_stage_obeys_and_says_what_it_leaves_out(trained, tmp_path):
    "int8 is asked for: once with limits that it keeps, once with limits that nothing keeps that has learned something."
    data, table = small_set(tmp_path/"set", tiles=24, exposures=3)
    about = dict(classes=classes_of(read_table(table)), decoder="fpn", score_pixels=20, input=InputSpec(height=96, width=96).model_dump(mode="json"), notice="", made_from={})
    learned = save_model(trained[0], tmp_path/"train", **about)
    with ThreadPoolExecutor(2) as pool:
        kept, left = pool.map(lambda a: (a[0], export(*a)), ((tmp_path/"kept", "precision=int8", "band=0.49", "max_drop=0.9", "plan_batches=[1, 2]", "calibration=8"),
                                                           (tmp_path/"left", f"data={data}", f"table={table}", f"train={learned}", "precision=int8", "band=1e-12", "max_drop=0", "calibration=1")))
    for _, r in (kept, left): assert r.returncode==0, r.stdout[-2000:]+r.stderr[-2000:]
    b = read_bundle(kept[0]/"bundle")
    if can_run("int8"): assert (b.card.precision, b.card.threads, b.card.batches)==("int8", 1, (1, 2)) and b.int8 and Predictor.load(kept[0]/"bundle", flags=frozenset()).runs.startswith("onnxruntime fp32")
    else: assert b.card.precision=="fp32" and b.int8 is None and "not in the bundle: onnxruntime int8: this CPU has no instructions for it" in kept[1].stdout
    b = read_bundle(left[0]/"bundle")
    assert b.card.precision=="fp32" and b.int8 is None and not (left[0]/"bundle"/INT8).exists()
    assert "not in the bundle: onnxruntime int8: " in left[1].stdout and "the plan was onnxruntime int8; the bundle runs onnxruntime fp32" in left[1].stdout
    assert not can_run("int8") or "onnxruntime int8" in json.loads((left[0]/"export.json").read_text())["left_out"]


def test_verdicts_do_not_depend_on_the_batch(trained):
    net, bundle, root, table = trained
    op = OperatingPoint()
    images = [load_image(root, r) for r in table.iloc[::12].itertuples()]
    for pair, engine in engines_of(bundle, wanted="openvino")[0].items():
        p = Predictor(bundle, engine)
        alone, rng = p.predict(images, batch=1), np.random.default_rng(0)
        for size in (2, 3, 8):
            order = rng.permutation(len(images))
            for i, a in zip(order, p.predict([images[i] for i in order], batch=size)):
                assert verdict_of(a.score, op)==verdict_of(alone[i].score, op) and np.abs(a.defect_prob-alone[i].defect_prob).max()<=1e-5, pair
