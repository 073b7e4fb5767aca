"What is said about the service is what it does: the examples of /openapi.json, and the commands of README."
import json
import os
import re
import subprocess
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from defect_detect.core.bundle import BundleCard, Calibration, OperatingPoint, example_model, write_bundle
from defect_detect.core.image import InputSpec
from defect_detect.serve import api
from defect_detect.serve.api import background, create_app
from defect_detect.serve.messages import EXAMPLE, PREFIX, PROBLEMS
from defect_detect.serve.settings import Settings
from serving import WEB, encode, plate, post, slow_bundle

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "only-for-this-test-0123456789"
PLATE = np.full((150, 200), 130, np.uint8) # the picture of the example: even, with a hole
PLATE[60:72, 100:112] = 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "The example's network, with a map from scores to chances, which the example answer shows."
    spec = InputSpec(height=128, width=128)
    chances = Calibration(slope=.6, shift=-.1, share=.5, pictures=100, parts=20)
    card = BundleCard(name="example-spot", classes=("background", "spot"), input=spec, operating_point=OperatingPoint(score_pixels=8, calibration=chances))
    return write_bundle(tmp_path_factory.mktemp("said")/"bundle", card, example_model(spec))


@pytest.fixture(scope="module")
def url(bundle):
    with background(Settings(bundle=bundle, threads=1)) as u: yield u


def told(d, example):
    "Where `d` is not the example, numbers to the digits that the example has; what differs each time must only have the same type."
    each = ("request_id", "timing", "version")
    if isinstance(example, dict):
        return ([f"keys {sorted(set(d)^set(example))}"] if set(d) != set(example) else [])+[f"{k}: {o}" for k in example if k in d for o in ([] if k in each and type(d[k]) is type(example[k]) else told(d[k], example[k]))]
    if isinstance(example, list): return [o for a, b in zip(d, example, strict=True) for o in told(a, b)]
    if isinstance(example, float): return [] if round(d, len(str(example).partition(".")[2])) == example else [f"{d} instead of {example}"]
    return [] if d == example else [f"{d!r} instead of {example!r}"]


def test_the_example_answer_is_true(url):
    d = WEB.get(f"{url}/openapi.json").json()
    said = d["components"]["schemas"]["Answer"]["example"]
    got = post(url, encode(PLATE)).json()
    assert told(got, said) == [] and said == EXAMPLE, told(got, said)
    assert told({**got, "score": .5}, said) and told({**got, "more": 1}, said) and told({**got, "regions": [{**got["regions"][0], "area": 1}]}, said), "a fault is seen"


def provoked(bundle, url, tmp_path):
    "Code -> the answer that has it, as the examples word it."
    good, v2 = encode(PLATE), f"{url}/v2/models/example-spot/infer"
    yield "empty", post(url, b"")
    yield "unknown_format", post(url, b"hello")
    yield "bad_size", post(url, encode(plate(4, 300)))
    yield "bad_multipart", WEB.post(f"{url}/v1/predict", files=[("a", good), ("b", good)])
    yield "bad_parameter", post(url, good, params={"mask": "jpg"})
    yield "foreign_origin", post(url, good, headers={"origin": "https://example.org"})
    yield "expired", post(url, encode(plate(1500, 1500)), headers={"x-request-timeout": "1"})
    yield "unknown_model", WEB.post(f"{url}/v2/models/other/infer", content=b"{}")
    yield "bad_tensor", WEB.post(v2, json=dict(inputs=[dict(name="image", shape=[1], datatype="FP32", data=[1.0])]))
    with background(Settings(bundle=bundle, threads=1, token=TOKEN)) as u: yield "unauthorized", post(u, good)
    app = create_app(Settings(bundle=slow_bundle(tmp_path/"slow")))
    with pytest.raises(api.ProblemError) as e: app.state.service.ready()
    yield "not_ready", e.value
    app.state.service.batcher.close()


def test_the_example_problems_are_true(bundle, url, tmp_path):
    said, seen = api.SAID, set()
    for code, r in provoked(bundle, url, tmp_path):
        detail = r.detail if isinstance(r, Exception) else r.json()["detail"]
        want = re.sub("0123456789ab", r"[0-9a-f]{12}", re.escape(said[code]))
        assert re.fullmatch(want, detail), (code, detail, said[code])
        if not isinstance(r, Exception): assert (r.status_code, r.json()["type"], r.json()["title"]) == (PROBLEMS[code][0], PREFIX+code, PROBLEMS[code][1])
        seen.add(code)
    assert seen == set(said)


def test_answers_keep_to_the_schema(url):
    "Every answer of a round over all paths is what /openapi.json declares for its status."
    d = WEB.get(f"{url}/openapi.json").json()
    good, n = encode(PLATE), 0
    one = dict(inputs=[dict(name="image", shape=[1], datatype="BYTES", data=["aGVsbG8="])])
    tries = [("/v1/predict", "post", p, c) for p in ({}, {"mask": "png", "contour": "true"}, {"mask": "rle"}, {"mask": "?"}) for c in (good, b"", b"x")]+[("/v1/model", "get", {}, None), ("/healthz/ready", "get", {}, None), ("/v2/models/{name}/infer", "post", {}, json.dumps(one).encode()), ("/v2/models/{name}", "get", {}, None)]
    for path, method, params, content in tries:
        r = WEB.request(method, url+path.replace("{name}", "example-spot"), params=params, **({"content": content, "headers": {"content-type": "image/png"}} if content is not None else {}))
        declared = d["paths"][path][method]["responses"].get(str(r.status_code))
        assert declared, (path, r.status_code)
        schema = next(iter(declared["content"].values())).get("schema", {})
        jsonschema.validate(r.json(), {**schema, "components": d["components"]})
        n += 1
    r = WEB.post(f"{url}/v1/predict:batch", files=[("a", ("a", good)), ("a", ("b", b"x"))])
    jsonschema.validate(r.json(), {"$ref": "#/components/schemas/Answers", "components": d["components"]})
    assert n == 16 and [o["problem"] is None for o in r.json()["items"]] == [True, False]
    with pytest.raises(jsonschema.ValidationError): jsonschema.validate({**r.json(), "answered": "one"}, {"$ref": "#/components/schemas/Answers", "components": d["components"]})


def commands(text):
    "The curl commands of README's section about the service."
    section = text.partition("## Ask the service")[2].partition("\n## ")[0]
    return [line.partition("   #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", section, re.S) for line in block.splitlines() if "curl " in line]


def run(command, port, folder):
    (folder/".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    env = {**{k: v for k, v in os.environ.items() if "proxy" not in k.lower()}, "CURL_HOME": str(folder), "DEFECT_TOKEN": TOKEN}
    return subprocess.run(["sh", "-c", command.replace(":8000", f":{port}")], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_commands_of_readme(tmp_path):
    "Each as it stands there, but for the port, in a folder with the pictures it names."
    spec = InputSpec(height=64, width=64)
    card = BundleCard(name="tiles", classes=("background", "spot"), input=spec, operating_point=OperatingPoint(score_pixels=8))
    b = write_bundle(tmp_path/"bundle", card, example_model(spec, window=15))
    for n in ("part", "other"): (tmp_path/f"{n}.jpg").write_bytes(encode(plate(holes=((100, 60),)), "JPEG"))
    todo = commands((Path(os.environ.get("DEFECT_README") or ROOT/"README.md")).read_text())
    assert todo, "README shows no command"
    with background(Settings(bundle=b, threads=1, token=TOKEN)) as locked, background(Settings(bundle=b, threads=1, max_batch=1)) as u:
        for c in todo:
            r = run(c, (locked if "DEFECT_TOKEN" in c else u).rpartition(":")[2], tmp_path)
            assert r.returncode == 0 and (r.stdout or list(tmp_path.glob("*.png"))), (c, r.stdout, r.stderr)
            print(c, "->", r.stdout[:90].replace("\n", " "))
        assert run("curl http://127.0.0.1:8000/v1/nothing", u.rpartition(":")[2], tmp_path).returncode, "a command that fails is seen"
