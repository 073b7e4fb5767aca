"""What a bundle may hold: anything that was changed, added, or smuggled in is refused before an engine sees it, and nothing is unpickled."""
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from defect_detect.core.bundle import INT8, BundleError, Parity, example_bundle, read_bundle, sha256, write_bundle
from defect_detect.core.predictor import Predictor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A bundle with every file that there can be."
    tmp = tmp_path_factory.mktemp("good")
    b = read_bundle(example_bundle(tmp/"plain"))
    held = Parity(engine="onnxruntime", precision="int8", pictures=1, max_difference=0, iou_drop=0, band=0, flips=0)
    return write_bundle(tmp/"bundle", b.card.model_copy(update=dict(evaluated=(held,))), b.model, '{"good": [0.1]}', "nothing of others\n", b.model)


@pytest.fixture
def bundle(good, tmp_path): return Path(shutil.copytree(good, tmp_path/"bundle"))


def sums(folder):
    "What whoever changed a bundle on purpose would do: write the hashes anew."
    (folder/"SHA256SUMS").write_text("".join(f"{sha256(p.read_bytes())}  {p.name}\n" for p in sorted(folder.iterdir()) if p.name!="SHA256SUMS"))


# A process of its own: what it has loaded tells whether an engine was reached.
FLIPS = """
import json, sys
from pathlib import Path
import numpy as np
from defect_detect.core.bundle import BundleError
from defect_detect.core.predictor import Predictor
folder, rng, refused, tried = Path(sys.argv[1]), np.random.default_rng(0), 0, 0
content = {p: p.read_bytes() for p in sorted(folder.iterdir())}
if len(sys.argv)>2: # planted: a reader that trusts what it finds
    import defect_detect.core.bundle as planted
    planted.sha256 = lambda data: next((line[:64] for line in content[folder/"SHA256SUMS"].decode().splitlines() for p in content if p.name!="SHA256SUMS" and line[66:]==p.name and len(data)==len(content[p])), "")
while tried<1000:
    p = list(content)[tried%len(content)] # every file gets its share
    b = bytearray(content[p])
    b[rng.integers(len(b))] ^= 1<<rng.integers(8)
    p.write_bytes(b)
    try: Predictor.load(folder)
    except BundleError: refused += 1
    except Exception as e: print(type(e), p.name, file=sys.stderr)
    p.write_bytes(content[p])
    tried += 1
reached = sorted({"onnxruntime", "openvino"}&set(sys.modules))
Predictor.load(folder)
print(json.dumps(dict(tried=tried, refused=refused, reached=reached, after=sorted({"onnxruntime"}&set(sys.modules)))))
"""


def flips(bundle, *planted):
    r = subprocess.run([sys.executable, "-c", FLIPS, str(bundle), *planted], capture_output=True, text=True, timeout=300)
    assert r.returncode==0, r.stderr
    return json.loads(r.stdout.splitlines()[-1]), r.stderr


def test_a_thousand_flipped_bits(bundle):
    got, err = flips(bundle)
    assert got==dict(tried=1000, refused=1000, reached=[], after=["onnxruntime"]) and not err


def test_flipped_bits_see_a_fault(bundle):
    got, _ = flips(bundle, "planted")
    assert got["refused"]<1000 and got["reached"]==["onnxruntime"]


def add(b): (b/"more.txt").write_text("x")
def add_pickle(b): (b/"weights.pkl").write_bytes(pickle.dumps([1]))
def add_hidden(b): (b/".hidden").write_text("x")
def add_folder(b): (b/"more").mkdir()
def add_listed(b): sums(add_pickle(b) or b)
def drop(b): (b/"reference.json").unlink()
def drop_int8(b): (b/INT8).unlink()
def drop_int8_listed(b): sums(drop_int8(b) or b)
def drop_sums(b): (b/"SHA256SUMS").unlink()
def rename(b): (b/"model.onnx").rename(b/"Model.onnx")
def swap(b): (b/"NOTICE").write_bytes((b/"reference.json").read_bytes())
def double(b): (b/"SHA256SUMS").write_text((b/"SHA256SUMS").read_text()*2)
def note(b): (b/"SHA256SUMS").write_text("# checked\n"+(b/"SHA256SUMS").read_text())


def link(b):
    (b/"NOTICE").rename(b.parent/"N")
    (b/"NOTICE").symlink_to(b.parent/"N")


def link_model(b):
    (b/"model.onnx").rename(b.parent/"m")
    (b/"model.onnx").symlink_to("../m")


def pipe(b):
    (b/"NOTICE").unlink()
    os.mkfifo(b/"NOTICE")


def pickled_model(b):
    (b/"model.onnx").write_bytes(pickle.dumps({"weights": [1]}))
    sums(b)


def older(b):
    d = json.loads((b/"bundle.json").read_text())
    (b/"bundle.json").write_text(json.dumps({**d, "schema_version": 1}))
    sums(b)


def unknown_word(b):
    d = json.loads((b/"bundle.json").read_text())
    (b/"bundle.json").write_text(json.dumps({**d, "load_with": "pickle"}))
    sums(b)


def unevaluated(b):
    d = json.loads((b/"bundle.json").read_text())
    (b/"bundle.json").write_text(json.dumps({**d, "engine": "openvino", "precision": "bf16"}))
    sums(b)


def change(f, name="model.onnx"):
    "A model changed by `f`, with hashes that fit."
    def spoil(b):
        m = onnx.load_from_string((b/name).read_bytes())
        f(m)
        (b/name).write_bytes(m.SerializeToString())
        sums(b)
    spoil.__name__ = f"{f.__name__}_in_{name}"
    return spoil


def external_data(m):
    t = m.graph.initializer[0]
    t.ClearField("raw_data")
    t.ClearField("float_data")
    t.data_location = TensorProto.EXTERNAL
    for k, v in (("location", "../secret"), ("offset", "0"), ("length", "12")): t.external_data.add(key=k, value=v)


def external_constant(m):
    t = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.])
    t.external_data.add(key="location", value="/etc/passwd")
    m.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=t))


def custom_domain(m): m.graph.node[0].domain = "com.evil"
def custom_import(m): m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
def a_function(m): m.functions.add(name="f", domain="com.evil")
def a_branch(m): m.graph.node[0].attribute.append(helper.make_attribute("then_branch", helper.make_graph([], "g", [], [])))
def settings_inside(m): m.metadata_props.add(key="ort_config", value='{"session_options": {}}')
def another_format(m): m.producer_name = "ORTM"


SPOILED = [add, add_pickle, add_hidden, add_folder, add_listed, drop, drop_int8, drop_int8_listed, drop_sums, rename, swap, double, note, link, link_model, pipe, pickled_model, older, unknown_word, unevaluated,
           *(change(f) for f in (external_data, external_constant, custom_domain, custom_import, a_function, a_branch, settings_inside, another_format)), change(external_data, INT8), change(custom_domain, INT8)]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda f: f.__name__)
def test_spoiled_bundles(bundle, spoil):
    (bundle.parent/"secret").write_bytes(b"\0"*12)
    Predictor.load(bundle)
    spoil(bundle)
    with pytest.raises(BundleError) as e: read_bundle(bundle) # which starts no engine
    with pytest.raises(BundleError): Predictor.load(bundle)
    assert "\n" not in str(e.value) and str(bundle) in str(e.value)


def test_an_engine_would_have_followed(bundle):
    "Why the model is looked into: given the file alone, onnxruntime reads what it names."
    import onnxruntime
    change(external_data)(bundle)
    (bundle/"../secret").resolve().write_bytes(b"\0"*12)
    where = bundle/"model.onnx"
    try: onnxruntime.InferenceSession(str(where), providers=["CPUExecutionProvider"])
    except Exception as e: assert "external" in str(e).lower() or "secret" in str(e), "it no longer looks for the file at all: this check sees nothing"


# Nothing is unpickled: Python raises an audit event when an unpickler looks for a class.
SERVE = """
import json, sys
seen = []
def hook(event, args):
    if event=="pickle.find_class":
        seen.append(args)
        raise RuntimeError(f"unpickled {args}")
sys.addaudithook(hook)
bundle, planted = sys.argv[1], sys.argv[2:]
import numpy as np
from defect_detect.core.predictor import Predictor
pred = Predictor.load(bundle)
answer = pred.predict([np.full((60, 80, 3), 120, np.uint8)])[0]
import io, httpx
from PIL import Image
from defect_detect.serve.api import Settings, background
f = io.BytesIO()
Image.fromarray(np.full((60, 80), 120, np.uint8)).save(f, "PNG")
with background(Settings(bundle=bundle, threads=1)) as url: said = httpx.post(url+"/v1/predict", content=f.getvalue(), headers={"content-type": "image/png"}, timeout=60).json()
if planted:
    import pickle, pathlib
    try: pickle.loads(pickle.dumps(pathlib.PurePath("x")))
    except RuntimeError: pass
print(json.dumps(dict(verdict=said["verdict"], same=said["verdict"]==answer.verdict, runs=pred.runs, seen=len(seen), loaded=sorted({m.split(".")[0] for m in sys.modules if sys.modules[m]}))))
"""
HEAVY = {"torch", "torchvision", "fastai", "fastcore", "nbdev", "joblib", "cloudpickle", "dill", "sklearn", "onnx", "openvino_telemetry", "pandas"}


def serve(bundle, *planted):
    r = subprocess.run([sys.executable, "-c", SERVE, str(bundle), *planted], capture_output=True, text=True, timeout=300)
    assert r.returncode==0, r.stderr[-2000:]
    return json.loads(r.stdout.splitlines()[-1])


def openvino_of(good, tmp_path):
    b = read_bundle(good)
    held = tuple(Parity(engine="openvino", precision=p, pictures=1, max_difference=0, iou_drop=0, band=0, flips=0) for p in ("fp32", "int8"))
    return write_bundle(tmp_path/"ov", b.card.model_copy(update=dict(engine="openvino", evaluated=held)), b.model, int8=b.model)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_nothing_is_unpickled_while_serving(good, tmp_path, engine):
    got = serve(good if engine=="onnxruntime" else openvino_of(good, tmp_path))
    assert got["same"] and got["runs"].startswith(engine) and got["seen"]==0 and not set(got["loaded"])&HEAVY, set(got["loaded"])&HEAVY


def test_unpickling_would_be_seen(good): assert serve(good, "planted")["seen"]==1


def test_no_module_that_serves_names_pickle():
    for room in ("core", "serve"):
        for p in sorted((ROOT/"defect_detect"/room).glob("*.py")):
            assert not any(w in p.read_text() for w in ("import pickle", "allow_pickle=True", "joblib", "load_learner", "torch.load")), p


def test_openvino_tells_nobody(good, tmp_path):
    "Imported without care, it writes an id into the home, and sends it."
    bundle = openvino_of(good, tmp_path)
    for home, code in (("a", "import sys; from defect_detect.core.predictor import Predictor; Predictor.load(sys.argv[1])"), ("planted", "import openvino")):
        (tmp_path/home).mkdir()
        subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, timeout=120, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path/home), "PYTHONPATH": str(ROOT)}, cwd=tmp_path/home)
    assert not list((tmp_path/"a").rglob("*")), "a prediction wrote into the home"
    assert list((tmp_path/"planted").rglob("*ga_cid*")), "openvino no longer writes its id: this check sees nothing"


def test_a_signal_after_openvino(good, tmp_path):
    "Two engines have come and gone; a signal is still only a signal. The planted fault: each has a core of its own."
    code = """import gc, os, signal, sys
from defect_detect.core import predictor
two = []
for _ in range(2):
    if sys.argv[2]=="fault": predictor._openvino.cache_clear()
    two.append(predictor.Predictor.load(sys.argv[1]))
if sys.argv[2]=="fault": predictor._openvino.cache_clear()
while two: two.pop(0); gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("heard", flush=True))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    bundle = str(openvino_of(good, tmp_path))
    right, fault = (subprocess.run([sys.executable, "-c", code, bundle, w], capture_output=True, text=True, timeout=120) for w in ("right", "fault"))
    assert (right.returncode, right.stdout)==(0, "heard\n"), right.stderr
    if sys.platform=="linux": assert fault.returncode==-signal.SIGSEGV, "openvino puts back the right stack now: the core need not be the only one"


def test_without_openvino_one_line_names_the_extra(good, tmp_path):
    bundle = openvino_of(good, tmp_path)
    code = "import sys; sys.modules['openvino'] = None; from defect_detect.cli.base import main; main(['predict', sys.argv[1], sys.argv[2]])"
    (tmp_path/"p.png").write_bytes(b"x")
    r = subprocess.run([sys.executable, "-c", code, str(bundle), str(tmp_path/"p.png")], capture_output=True, text=True, timeout=120)
    assert (r.returncode, r.stdout, r.stderr.count("\n"))==(1, "", 1) and "pip install 'defect_detect[openvino]'" in r.stderr


def test_batches_do_not_change_answers(good, tmp_path):
    "In any order and any company, with either engine."
    rng = np.random.default_rng(0)
    pictures = [rng.integers(60, 200, (int(h), int(w), 3), dtype=np.uint8) for h, w in rng.integers(40, 200, (24, 2))]
    for b in (good, openvino_of(good, tmp_path)):
        p = Predictor.load(b)
        alone = [p.predict([im])[0] for im in pictures]
        for size in (2, 5, 24):
            order = rng.permutation(len(pictures))
            for i, a in zip(order, p.predict([pictures[i] for i in order], batch=size)):
                assert a.verdict==alone[i].verdict and np.abs(a.defect_prob-alone[i].defect_prob).max()<=1e-5 and a.regions==alone[i].regions
