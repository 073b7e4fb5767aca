"What is unlike the good pictures: said by export, parity, service, client, command line and table alike, and never left to the score alone."
import json
from pathlib import Path

import numpy as np
import pytest
from serving import WEB, encode, plate, post
from tritonclient import http as triton
from test_faults import call

from defect_detect.client import Client
from defect_detect.core.bundle import BundleError, example_bundle, read_bundle
from defect_detect.core.predictor import Predictor, start_engine
from defect_detect.data.demo import small_set
from defect_detect.data.read import classes_of, load_image, read_table
from defect_detect.judge.card import check_card
from defect_detect.learn.model import make_model, save_model
from defect_detect.run.notebook import run_notebook
from defect_detect.run.score import read_rows, score
from defect_detect.serve.api import background
from defect_detect.serve.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
WORN = encode((plate()+(np.indices((150, 200)).sum(0)//8%2*32)).clip(0, 255).astype(np.uint8)) # stripes all over: no spot
GOOD, BAD = encode(plate()), encode(plate(holes=((100, 60),)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return example_bundle(tmp_path_factory.mktemp("novelty")/"bundle", novelty=True)


def test_everyone_says_it(bundle, tmp_path):
    "The same novelty, and who decided, wherever an answer is read; a bundle without it says so."
    for name, data in dict(worn=WORN, good=GOOD, bad=BAD).items(): (tmp_path/f"{name}.png").write_bytes(data)
    want = {"worn": ("review", "novelty"), "good": ("ok", "score"), "bad": ("defect", "score")}
    with background(Settings(bundle=bundle, threads=1)) as url, Client(url) as c:
        got = {k: c.predict(tmp_path/f"{k}.png") for k in want}
        said = post(url, WORN).raise_for_status().json()
        t = triton.InferenceServerClient(url.removeprefix("http://"))
        x = triton.InferInput("image", [3], "BYTES").set_data_from_numpy(np.array([WORN, GOOD, BAD], object))
        v2 = t.infer("example-spot", [x], outputs=[triton.InferRequestedOutput(k) for k in ("verdict", "novelty", "decided_by")])
        schema = WEB.get(url+"/openapi.json").json()["components"]["schemas"]["Answer"]
    assert {k: (a.verdict, a.decided_by) for k, a in got.items()}==want and got["worn"].novelty>=1>got["good"].novelty
    assert (said["verdict"], said["decided_by"], said["novelty"])==(got["worn"].verdict, got["worn"].decided_by, got["worn"].novelty)
    assert [(a.decode(), b.decode()) for a, b in zip(v2.as_numpy("verdict"), v2.as_numpy("decided_by"))]==list(want.values())
    assert np.allclose(v2.as_numpy("novelty"), [a.novelty for a in got.values()], atol=1e-6)
    assert {"novelty", "decided_by"}<=set(schema["required"])
    score(tmp_path, bundle, tmp_path/"out.parquet")
    rows = {Path(r["image"]).stem: r for r in read_rows(tmp_path/"out.parquet")}
    lines = [json.loads(l) for l in call("predict", bundle, *(f"{k}.png" for k in want), "--json", cwd=tmp_path)[1].splitlines()]
    for k, line in zip(want, lines):
        assert (rows[k]["verdict"], rows[k]["decided_by"])==(line["verdict"], line["decided_by"])==want[k]
        assert abs(rows[k]["novelty"]-got[k].novelty)<2e-6 and abs(line["novelty"]-got[k].novelty)<2e-6
    plain = example_bundle(tmp_path/"plain")
    a = Predictor.load(plain).predict([np.repeat(plate()[..., None], 3, 2)])[0]
    assert (a.novelty, a.decided_by)==(None, "score") and "novelty" not in call("predict", plain, "good.png", cwd=tmp_path)[1]


def test_what_the_card_promises(bundle, tmp_path):
    "Planted: a card that hides the second output, and one that promises it in vain."
    for name, other in (("hidden", None), ("vain", json.loads((bundle/"bundle.json").read_text())["novelty"])):
        folder = example_bundle(tmp_path/name, novelty=name=="hidden")
        card = json.loads((folder/"bundle.json").read_text())
        (folder/"bundle.json").write_text(json.dumps(card|dict(novelty=other)))
        with pytest.raises(BundleError): Predictor.load(folder)


def network(tmp, t):
    "Encoder of the package, decoder of chance."
    classes = classes_of(t)
    return save_model(make_model(len(classes)), tmp/"train", classes=classes, decoder="fpn", score_pixels=20, input=dict(height=96, width=96), notice="", made_from={})


def test_from_notebook_to_card(tmp_path):
    "Export fits it and ships it in the same graph, every engine says it as torch does, and the evaluation counts it."
    data, table = small_set(tmp_path, tiles=24)
    t = read_table(table)
    train = network(tmp_path, t)
    run_notebook(ROOT/"nbs/pipeline/3_export.ipynb", tmp_path/"3.ipynb", dict(data=str(data), table=str(table), train=str(train), out=str(tmp_path/"export"), novelty="bank", calibration=8), cwd=ROOT, say=lambda s: None)
    b = read_bundle(tmp_path/"export/bundle")
    assert (b.card.novelty.kind, b.card.novelty.places)==("bank", 256) and b.card.novelty.reached<=.05*b.card.novelty.pictures
    pictures = [load_image(data, r) for r in t.head(6).itertuples()]
    want = [p.novelty for p in Predictor(b, start_engine(b, "onnxruntime", "fp32")).predict(pictures)]
    assert len({round(v, 3) for v in want})>1
    assert np.allclose([p.novelty for p in Predictor(b, start_engine(b, "openvino", "fp32")).predict(pictures)], want, atol=1e-3)
    run_notebook(ROOT/"nbs/pipeline/4_evaluate.ipynb", tmp_path/"4.ipynb", dict(data=str(data), table=str(table), bundle=str(tmp_path/"export/bundle"), out=str(tmp_path/"evaluate"), draws=20), cwd=ROOT, say=lambda s: None)
    m, card = json.loads((tmp_path/"evaluate/metrics.json").read_text()), (tmp_path/"evaluate/card.md").read_text()
    assert set(m["novelty"])=={"auroc", "held", "reviewed"} and "image AUROC of the novelty" in card and check_card(card, m)==[]
    assert check_card(card.replace("image AUROC of the novelty | ", "image AUROC of the novelty | 9"), m)!=[] # planted


def test_only_good_pictures_have_a_say(tmp_path):
    "A set without good pictures in training is refused in one line, and nothing is written."
    data, table = small_set(tmp_path, tiles=24)
    t = read_table(table)
    t.assign(split=t.split.where((t.label!="good") | (t.split!="train"), "test")).to_csv(tmp_path/"other.csv", index=False)
    train = network(tmp_path, t)
    with pytest.raises(Exception, match="the training part has none"):
        run_notebook(ROOT/"nbs/pipeline/3_export.ipynb", tmp_path/"3.ipynb", dict(data=str(data), table=str(tmp_path/"other.csv"), train=str(train), out=str(tmp_path/"export"), novelty="bank"), cwd=ROOT, say=lambda s: None)
    assert not (tmp_path/"export").exists()
