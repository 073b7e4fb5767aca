"The Open Inference Protocol as a client sees it that others wrote: NVIDIA's, for Triton."
import base64
import json

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from defect_detect.core.bundle import example_bundle
from defect_detect.core.image import decode
from defect_detect.core.predictor import Predictor
from defect_detect.serve import oip
from defect_detect.serve.api import background
from defect_detect.serve.settings import Settings
from serving import WEB, encode, plate

TOKEN = "only-for-this-test-0123456789"
GOOD, BAD = encode(plate()), encode(plate(holes=((100, 60),)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return example_bundle(tmp_path_factory.mktemp("oip")/"bundle")


@pytest.fixture(scope="module")
def want(bundle):
    p = Predictor.load(bundle, threads=1)
    return {data: p.predict([decode(data)])[0] for data in (GOOD, BAD)}|{"tag": p.bundle.version}


@pytest.fixture(scope="module")
def client(bundle):
    with background(Settings(bundle=bundle, threads=1, max_pictures=4)) as u:
        c = triton.InferenceServerClient(u.removeprefix("http://"))
        yield c
        c.close()


def image(*pictures, binary=True, name="image", dtype="BYTES", shape=None):
    a = np.array([p if binary else base64.b64encode(p) for p in pictures], dtype=object)
    t = triton.InferInput(name, shape or [len(pictures)], dtype)
    if dtype == "BYTES" and shape is None: return t.set_data_from_numpy(a, binary_data=binary)
    t._raw_data = b"".join(len(p).to_bytes(4, "little")+p for p in pictures) # what the client would not let us send
    t._parameters["binary_data_size"] = len(t._raw_data)
    return t


def out(name, binary=True): return triton.InferRequestedOutput(name, binary_data=binary)
def ask(c, *pictures, name="example-spot", version="", outputs=None, binary=True, **kw): return c.infer(name, [image(*pictures, binary=binary)], version, outputs, **kw)
def verdicts(r): return [v.decode() if isinstance(v, bytes) else v for v in r.as_numpy("verdict").tolist()]


def same(r, *expected):
    scores, regions = r.as_numpy("score"), [json.loads(v) for v in r.as_numpy("regions")]
    return verdicts(r) == [e.verdict for e in expected] and np.abs(scores-[e.score for e in expected]).max()<1e-6 and [[tuple(o["box"]) for o in g] for g in regions] == [[o.box for o in e.regions] for e in expected]


def refused(f, status, says):
    try: f()
    except InferenceServerException as e: return e.status() == str(status) and says in e.message()
    return False


def has_mask(c, binary):
    r = ask(c, BAD, outputs=[out("mask", binary), out("verdict")])
    m = r.as_numpy("mask")[0]
    return decode(m if binary else base64.b64decode(m))[..., 0].shape == (150, 200) and decode(m if binary else base64.b64decode(m)).any()


F32 = np.zeros((1, 3, 8, 8), np.float32)
CASES = {
    "server live": lambda c, w: c.is_server_live(),
    "server ready": lambda c, w: c.is_server_ready(),
    "server metadata": lambda c, w: c.get_server_metadata()["name"] == "defect_detect" and "binary_tensor_data" in c.get_server_metadata()["extensions"],
    "model ready": lambda c, w: c.is_model_ready("example-spot"),
    "model ready, version": lambda c, w: c.is_model_ready("example-spot", w["tag"]),
    "other model not ready": lambda c, w: not c.is_model_ready("other"),
    "other version not ready": lambda c, w: not c.is_model_ready("example-spot", "1"),
    "model metadata": lambda c, w: c.get_model_metadata("example-spot")["inputs"] == [dict(name="image", datatype="BYTES", shape=[-1])],
    "model metadata, version": lambda c, w: c.get_model_metadata("example-spot", w["tag"])["versions"] == [w["tag"]],
    "outputs have names and types": lambda c, w: {o["name"]: o["datatype"] for o in c.get_model_metadata("example-spot")["outputs"]} == oip.OUTPUTS,
    "unknown model": lambda c, w: refused(lambda: c.get_model_metadata("other"), 404, "served is 'example-spot'"),
    "unknown model, asked to infer": lambda c, w: refused(lambda: ask(c, GOOD, name="other"), 404, "served is"),
    "unknown version": lambda c, w: refused(lambda: ask(c, GOOD, version="7"), 404, "of version '7'"),
    "a name that is a path": lambda c, w: refused(lambda: ask(c, GOOD, name="../example-spot"), 404, ""),
    "binary in, binary out": lambda c, w: same(ask(c, BAD), w[BAD]),
    "JSON in, binary out": lambda c, w: same(ask(c, BAD, binary=False), w[BAD]),
    "binary in, JSON out": lambda c, w: same(ask(c, BAD, outputs=[out(k, False) for k in oip.USUAL]), w[BAD]),
    "JSON in, JSON out": lambda c, w: same(ask(c, GOOD, binary=False, outputs=[out(k, False) for k in oip.USUAL]), w[GOOD]),
    "some outputs in JSON, some not": lambda c, w: same(ask(c, BAD, outputs=[out("verdict", False), out("score"), out("regions", False)]), w[BAD]),
    "several pictures": lambda c, w: same(ask(c, BAD, GOOD, BAD), w[BAD], w[GOOD], w[BAD]),
    "several pictures in a column": lambda c, w: same(c.infer("example-spot", [image(GOOD, BAD, shape=[2, 1])]), w[GOOD], w[BAD]),
    "one output": lambda c, w: [o["name"] for o in ask(c, GOOD, outputs=[out("score")]).get_response()["outputs"]] == ["score"],
    "mask, binary and in JSON": lambda c, w: has_mask(c, True) and has_mask(c, False),
    "novelty is not a number when the bundle has none": lambda c, w: np.isnan(ask(c, GOOD, outputs=[out("novelty")]).as_numpy("novelty")).all(),
    "request id and version come back": lambda c, w: (lambda r: (r["id"], r["model_name"], r["model_version"]) == ("mine", "example-spot", w["tag"]))(ask(c, GOOD, request_id="mine").get_response()),
    "asynchronous": lambda c, w: all(same(j.get_result(), w[d]) for j, d in [(c.async_infer("example-spot", [image(d)]), d) for d in (GOOD, BAD)]),
    "floats": lambda c, w: refused(lambda: c.infer("example-spot", [triton.InferInput("image", [1, 3, 8, 8], "FP32").set_data_from_numpy(F32)]), 400, "only BYTES"),
    "wrong shapes": lambda c, w: all(refused(lambda s=s: c.infer("example-spot", [image(GOOD, shape=s)]), 400, "shape") for s in ([2], [1, 2], [0], [1, 1, 1])),
    "wrong names": lambda c, w: refused(lambda: c.infer("example-spot", [image(GOOD, name="picture")]), 400, "'image'") and refused(lambda: ask(c, GOOD, outputs=[out("boxes")]), 400, "allowed: verdict"),
    "pictures that are none, or too many": lambda c, w: refused(lambda: ask(c, GOOD, b"text"), 415, "picture 1:") and refused(lambda: ask(c, GOOD[:200]), 422, "damaged") and refused(lambda: ask(c, *[GOOD]*5), 413, "at most 4"),
    "a deadline": lambda c, w: refused(lambda: ask(c, GOOD, timeout=1), 504, "within"),
    "compressed": lambda c, w: refused(lambda: ask(c, GOOD, request_compression_algorithm="gzip"), 415, "compressed"),
}


@pytest.mark.parametrize("case", CASES)
def test_independent_client(client, want, case): assert CASES[case](client, want)


def test_there_are_thirty(): assert len(CASES)>=30


def test_independent_client_sees_a_fault(client, want, monkeypatch):
    "Bytes in the wrong order, a float as a double, a model that answers to any name."
    real = oip.struct.pack
    monkeypatch.setattr(oip.struct, "pack", lambda f, *v: real(f.replace("<", ">"), *v))
    with pytest.raises(Exception): assert CASES["binary in, binary out"](client, want) # noqa: B017
    monkeypatch.undo()
    monkeypatch.setattr("defect_detect.serve.api.check_model", lambda *_: None)
    assert not CASES["unknown model"](client, want) and not CASES["other model not ready"](client, want)


def test_a_token_is_asked_for(bundle):
    with background(Settings(bundle=bundle, threads=1, token=TOKEN)) as u:
        c = triton.InferenceServerClient(u.removeprefix("http://"))
        assert c.is_server_live() and refused(lambda: ask(c, GOOD), 401, "Authorization")
        assert verdicts(ask(c, GOOD, headers={"Authorization": f"Bearer {TOKEN}"})) == ["ok"]
        c.close()


def test_the_problem_is_one_of_ours_too(client, bundle):
    with background(Settings(bundle=bundle, threads=1)) as u:
        r = WEB.post(f"{u}/v2/models/example-spot/infer", json={"inputs": []})
        assert r.status_code == 400 and r.json()["error"] == r.json()["detail"] and r.json()["type"].endswith(":bad_tensor") and r.headers["content-type"] == "application/problem+json"
        assert WEB.get(f"{u}/v2/nothing").json()["error"]
