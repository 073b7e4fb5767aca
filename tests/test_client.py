"The client against the real service, and the five lines of Python in README."
import asyncio
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defect_detect.client import Answer, AsyncClient, Client, ServiceError, draw
from defect_detect.core.bundle import example_bundle
from defect_detect.core.image import decode
from defect_detect.core.predictor import Predictor
from defect_detect.serve.api import Settings, background

README = (Path(__file__).resolve().parents[1]/"README.md").read_text()


def plate(holes=((100, 60),)):
    a = (130+np.random.default_rng(len(holes)).normal(0, 4, (150, 200))).clip(0, 255).astype(np.uint8)
    for x, y in holes: a[y:y+12, x:x+12] = 30
    b = io.BytesIO()
    Image.fromarray(a).save(b, "PNG")
    return b.getvalue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return example_bundle(tmp_path_factory.mktemp("client")/"bundle")


@pytest.fixture(scope="module")
def url(bundle):
    with background(Settings(bundle=bundle, threads=1)) as u: yield u


def same(a, want):
    assert (a.verdict, a.model)==(want.verdict, want.bundle) and abs(a.score-want.score)<1e-5 and [(r.cls, r.box, r.area) for r in a.regions]==[(r.cls, r.box, r.area) for r in want.regions]


def test_both_clients_say_what_the_predictor_says(url, bundle):
    pictures = [plate(()), plate(), plate(((10, 10), (150, 100)))]
    want = Predictor.load(bundle).predict([decode(p) for p in pictures])
    async def many():
        async with AsyncClient(url) as c: return await asyncio.gather(*(c.predict(p, mask=True) for p in pictures)), await c.model(), await c.ready()
    answers, card, ready = asyncio.run(many())
    with Client(url) as c:
        assert ready and c.ready() and card==c.model() and card["name"]=="example-spot"
        for a, b, w in zip(answers, [c.predict(p, mask=True) for p in pictures], want):
            same(a, w)
            same(b, w)
            assert a.mask==b.mask and (np.asarray(Image.open(io.BytesIO(a.mask)))==w.mask).all() and a.timing and a.novelty is None
            assert draw(a, pictures[0]).size[0]==200
    for broken in (b"", b"hello", plate()[:60]):
        with Client(url) as c, pytest.raises(ServiceError) as e: c.predict(broken)
        assert 400<=e.value.status<500 and e.value.type.startswith("urn:defect-detect:problem:")


def test_many_at_once(url, bundle, tmp_path):
    (tmp_path/"a b.png").write_bytes(plate())
    pictures = [plate(()), b"not a picture", tmp_path/"a b.png", *[plate(((10, 10),))]*18]
    with Client(url) as c: got = c.predict_many(pictures, contour=True)
    async def many():
        async with AsyncClient(url) as c: return await c.predict_many(pictures, together=5)
    assert len(got)==len(pictures)
    for answers in (got, asyncio.run(many())):
        assert [o.verdict if isinstance(o, Answer) else o.type.rsplit(":", 1)[-1] for o in answers]==["ok", "unknown_format", "defect", *["defect"]*18]
    same(got[2], Predictor.load(bundle).predict([decode(plate())])[0])
    xs, ys = zip(*got[2].regions[0].contour)
    assert (min(xs), min(ys), max(xs), max(ys))==got[2].regions[0].box
    red = (np.asarray(draw(got[2], plate()))==(235, 30, 40)).all(2)
    assert red[55:77, 95:117].sum()>20


def test_deadlines_and_tokens(bundle):
    "The deadline travels: what cannot be answered in time is refused by the service, and the client has not asked twice."
    from pydantic import SecretStr
    with background(Settings(bundle=bundle, threads=1, token=SecretStr("a-long-enough-token"))) as u:
        with Client(u) as c, pytest.raises(ServiceError) as e: c.predict(plate())
        assert e.value.status==401
        with Client(u, token="a-long-enough-token") as c:
            assert c.predict(plate()).verdict=="defect"
            r = c.http.post("/v1/predict", content=plate(), headers={"content-type": "image/png", "x-request-timeout": "1"})
            assert r.status_code in (200, 504)
        with Client(u, token="another-long-token") as c, pytest.raises(ServiceError) as e: c.predict_many([plate()])
        assert e.value.status==401


def examples(language):
    "Blocks of README in `language` that ask a service."
    return [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.S) if ":8000" in b]


@pytest.fixture
def parts(tmp_path):
    "A folder with the picture that the example names."
    Image.open(io.BytesIO(plate())).save(tmp_path/"part.jpg", quality=95)
    return tmp_path


def test_the_python_of_the_readme_runs(url, parts):
    found = [b for b in examples("python") if "Client(" in b]
    assert len(found)==1 and len(found[0].strip().splitlines())<=6, "README has one example of the client, of about five lines"
    r = subprocess.run([sys.executable, "-c", found[0].replace("http://127.0.0.1:8000", url)], cwd=parts, capture_output=True, text=True, timeout=120)
    assert r.returncode==0 and "defect" in r.stdout, r.stderr
    if "draw(" in found[0]: assert Image.open(parts/"seen.png").size[0]==200


def test_a_stopped_service_is_one_error(bundle):
    with background(Settings(bundle=bundle, threads=1)) as u: pass
    with Client(u, retries=1) as c, pytest.raises(ServiceError, match="unreachable"): c.predict(plate())
