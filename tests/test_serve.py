"""The service over real connections: what a notebook cell cannot see, above all what strangers send."""
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

import hostile
from serving import SERVE, WEB, address, assert_problem, encode, head, plate, post, process, raw, records
from defect_detect.client import Client, ServiceError
from defect_detect.core.bundle import example_bundle
from defect_detect.core.formats import MEDIA_TYPES
from defect_detect.core.image import InputSpec, Limits, decode
from defect_detect.core.predictor import Predictor
from defect_detect.serve.api import background
from defect_detect.serve.messages import PREFIX, Answer
from defect_detect.serve.settings import Settings

@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return example_bundle(tmp_path_factory.mktemp("serve")/"bundle")


@pytest.fixture(scope="module")
def url(bundle):
    with background(Settings(bundle=bundle, threads=1, limits=Limits(max_bytes=300_000, max_pixels=2_000_000), body_seconds=1)) as u: yield u


@pytest.mark.parametrize("holes", [(), ((100, 60),), ((10, 10), (150, 100))])
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_answer_is_the_predictors(url, bundle, holes, fmt):
    data = encode(plate(holes=holes), fmt)
    want = Predictor.load(bundle, threads=1).predict([decode(data)])[0]
    answers = [post(url, data, "image/jpeg", params={"mask": "png"}), post(url, data, "application/octet-stream", params={"mask": "png"}),
               WEB.post(f"{url}/v1/predict?mask=png", files={"image": ("a b.png", data)}, data={"note": "x"})]
    for r in answers:
        a = Answer.model_validate(r.raise_for_status().json())
        assert (a.verdict, a.regions_total, a.width, a.height) == (want.verdict, len(want.regions), 200, 150)
        assert a.verdict == ("defect" if holes else "ok") and abs(a.score-want.score)<1e-6
        assert [(o.cls, o.box, o.area) for o in a.regions] == [(o.cls, o.box, o.area) for o in want.regions]
    with Client(url) as c: mask = c.predict(data, mask=True).mask
    assert (np.asarray(Image.open(io.BytesIO(mask))) == want.mask).all()


def test_refusals(url):
    good = encode(plate())
    assert_problem(post(url, b""), 400, "empty")
    assert_problem(post(url, b"hello"), 415, "unknown_format")
    assert_problem(post(url, encode(plate(), "GIF")), 415, "unknown_format")
    assert_problem(post(url, good[:300]), 422, "broken")
    assert_problem(post(url, encode(plate(4, 300))), 422, "bad_size")
    assert_problem(post(url, encode(np.ones((20, 20), np.float32), "TIFF"), "image/tiff"), 415, "unsupported_mode")
    assert_problem(post(url, good+b"\0"*300_000), 413, "too_many_bytes")
    assert_problem(post(url, good, "text/html"), 415, "unknown_content_type")
    assert_problem(post(url, good, "multipart/form-data"), 400, "bad_multipart")
    assert_problem(WEB.post(f"{url}/v1/predict", files=[("a", good), ("b", good)]), 400, "bad_multipart")
    assert_problem(WEB.post(f"{url}/v1/predict", files={"a": b""}), 400, "empty")
    assert_problem(post(url, good, params={"mask": "jpg"}), 422, "bad_parameter")
    assert_problem(WEB.get(f"{url}/v1/predict"), 405, "method_not_allowed")
    for path in ("/docs", "/redoc", "/v1/predict/", "/v2/", "/page", "/page.py", "/..%2f..%2fetc/passwd", "/%00"): assert_problem(WEB.get(url+path), 404, "not_found")
    assert "POST" in WEB.get(f"{url}/v1/predict").headers["allow"]


def test_too_large_is_not_read_to_its_end(url):
    for said in ("Content-Length: 1000000000", "Content-Length: 1000000000\r\nExpect: 100-continue"):
        sent, status, got = raw(url, head(said))
        assert status == 413 and b"too_many_bytes" in got and b"connection: close" in got.lower()
    piece = b"10000\r\n"+b"x"*65536+b"\r\n"
    sent, status, got = raw(url, head("Transfer-Encoding: chunked"), (piece for _ in range(2000)))
    assert status == 413 and sent<20e6, "what was sent is in the buffers of the system, not of the service"
    form = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'+b"x"*299_999+b"xx\r\n--x--"
    assert_problem(post(url, form, "multipart/form-data; boundary=x"), 413, "too_many_bytes")
    assert_problem(post(url, form.replace(b"xx\r\n", b"x\r\n"), "multipart/form-data; boundary=x"), 415, "unknown_format")


def test_slow_and_vanished_clients(url, bundle):
    t = time.perf_counter()
    assert raw(url, head("Content-Length: 1000")+b"x"*10)[1] == 408 and time.perf_counter()-t<5
    with background(Settings(bundle=bundle, threads=1, max_body_mb=1, body_seconds=30)) as u:
        with socket.create_connection(address(u)) as s:
            s.sendall(head("Content-Length: 2000000")+b"x"*700_000)
            time.sleep(.3)
            r = post(u, encode(plate())+b"x"*400_000)
            assert_problem(r, 503, "busy")
            assert r.headers["retry-after"] == "1"
            assert post(u, encode(plate())).status_code == 200, "there is room for a small one"
        time.sleep(.3)
        assert post(u, encode(plate())+b"x"*400_000).status_code == 200, "what a client held that went away is free again"


def test_overload_is_refused_at_once_and_health_answers(bundle):
    big = encode(plate(2500, 2500))
    with background(Settings(bundle=bundle, threads=1, max_waiting=2)) as u, ThreadPoolExecutor(8) as pool:
        def timed(_):
            t = time.perf_counter()
            return post(u, big), time.perf_counter()-t
        jobs = [pool.submit(timed, i) for i in range(8)]
        lives = []
        while not all(j.done() for j in jobs):
            t = time.perf_counter()
            assert WEB.get(f"{u}/healthz/live").status_code == 200 and WEB.get(f"{u}/healthz/ready").status_code == 200
            lives.append(time.perf_counter()-t)
        answers = [j.result() for j in jobs]
        busy = [(r, s) for r, s in answers if r.status_code != 200]
        assert len(busy) == 6 and max(lives)<3
        for r, _ in busy:
            assert_problem(r, 503, "busy")
            assert r.headers["retry-after"] == "1"
        assert max(s for _, s in busy)<max(s for r, s in answers if r.status_code == 200)
        with Client(u) as c: assert c.predict(big).verdict == "ok"


def test_hostile_bodies_never_fail_the_service(bundle):
    "The corpus, as a body and as a file of a form: the answer, or the problem that names what is wrong."
    seen, tried = set(), 0
    with background(Settings(bundle=bundle, threads=1)) as u, httpx.Client(base_url=u, timeout=60) as c:
        for i, (name, data, want) in enumerate(hostile.corpus()):
            ways = [{"content": data, "headers": {"content-type": "image/png"}}]
            if i%10 == 0: ways += [{"files": {"f": data}}, {"content": data, "headers": {"content-type": "multipart/form-data; boundary=PNG"}}]
            for n, kw in enumerate(ways):
                r = c.post("/v1/predict", **kw)
                code = "ok" if r.status_code == 200 else r.json()["type"].removeprefix(PREFIX)
                assert code in want or n == 2 and code == "bad_multipart", (name, n, r.text)
                if code != "ok":
                    assert_problem(r, r.status_code, code)
                    assert 400<=r.status_code<500
                seen.add(r.status_code)
                tried += 1
        assert c.post("/v1/predict", content=encode(plate()), headers={"content-type": "image/png"}).json()["verdict"] == "ok"
    assert tried>=600 and {200, 400, 413, 415, 422} <= seen, "the bodies must reach more than the first check"


def test_hostile_bodies_see_a_fault(bundle, monkeypatch):
    monkeypatch.setattr("defect_detect.serve.api.decode", hostile.naive)
    few = {n: d for n, d, _ in hostile.corpus() if n in ("foreign/text", "animated/png-1")}
    with background(Settings(bundle=bundle, threads=1)) as u: assert [post(u, d).status_code for d in few.values()] == [500, 200]


def test_odd_headers(url):
    good = encode(plate())
    for kind in ("", "image/", "image/png; a=\xff", "multipart/form-data; boundary=\"\"", "multipart/form-data; boundary*=utf-8''%ff", "x"*5000, "image/png\x0b"):
        try: r = WEB.post(f"{url}/v1/predict", content=good, headers={"content-type": kind.encode("latin-1")})
        except httpx.LocalProtocolError: continue
        assert r.status_code in (200, 400, 415), (kind, r.text)
    assert raw(url, head("Content-Length: -1"))[1] == 400
    assert raw(url, head("Content-Length: 1", "Content-Length: 2"))[1] == 400
    assert raw(url, b"\0\1\2\r\n\r\n")[1] == 400
    for given in ("a"*500, "a b", "\u001b[0m".encode().decode("latin-1")):
        try: r = WEB.get(f"{url}/healthz/live", headers={"x-request-id": given})
        except httpx.LocalProtocolError: continue
        assert len(r.headers["x-request-id"]) == 32


def test_live_before_ready(tmp_path):
    slow = example_bundle(tmp_path/"slow", InputSpec(height=1024, width=1024))
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    with process(slow, "--port", port, wait=False) as (p, _, log):
        seen, u, end = [], f"http://127.0.0.1:{port}", time.monotonic()+60
        while not (seen and seen[-1] == 200) and time.monotonic()<end:
            try: live, ready = WEB.get(f"{u}/healthz/live", timeout=30), WEB.get(f"{u}/v2/health/ready", timeout=30)
            except httpx.TransportError:
                time.sleep(.02)
                continue
            assert live.status_code == 200
            if ready.status_code != 200:
                assert_problem(ready, 503, "not_ready")
                r = post(u, encode(plate()))
                if r.status_code != 200: assert_problem(r, 503, "not_ready")
                else: assert WEB.get(f"{u}/healthz/ready").status_code == 200, "it has become ready in between, or should not have answered"
            seen.append(ready.status_code)
            time.sleep(.02)
        assert seen[0] == 503 and seen[-1] == 200 and p.stdout.readline().startswith("serving example-spot@")


def test_stops_cleanly_with_work_in_hand(bundle):
    with process(bundle) as (p, u, log), ThreadPoolExecutor(1) as pool:
        job = pool.submit(post, u, encode(plate(2500, 2500)))
        time.sleep(.3) # the picture is on its way or in work; both must be answered
        p.send_signal(signal.SIGTERM)
        assert job.result(30).status_code == 200
        assert p.wait(30) == 0
    assert all(o["level"] == "info" for o in records(log))


def test_log_lines_cannot_be_forged(bundle):
    with process(bundle) as (p, u, log):
        raw(u, b"GET /%0d%0a%7b%22forged%22:1%7d%1b[31m HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        raw(u, b"GET /"+b"%F0%9F%98%80"*600+b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: a\"b\r\n\r\n")
        WEB.get(f"{u}/healthz/live", headers={"x-request-id": "last"})
        p.send_signal(signal.SIGINT)
        assert p.wait(30) == 0
    lines = [o.rstrip("\n") for o in log if json.loads(o)["message"] == "request"]
    assert len(lines) == 3 and all(len(o)<=8000 and o.isascii() and o.isprintable() for o in lines)
    assert [json.loads(o)["status"] for o in lines] == [404, 404, 200] and json.loads(lines[-1])["id"] == "last"


def test_start_fails_with_one_line(bundle, tmp_path):
    def run(folder, port): return subprocess.run([sys.executable, "-c", SERVE, "serve", str(folder), "--port", str(port)], capture_output=True, text=True, timeout=60)
    with socket.create_server(("127.0.0.1", 0)) as s:
        p = run(bundle, s.getsockname()[1])
        assert (p.returncode, p.stdout, len(p.stderr.splitlines())) == (1, "", 1) and "Address already in use" in p.stderr
    p = run(tmp_path/"none", 0)
    assert (p.returncode, p.stdout, len(p.stderr.splitlines())) == (1, "", 1) and "no such folder" in p.stderr
    bad = example_bundle(tmp_path/"bad")
    (bad/"model.onnx").write_bytes(b"changed")
    p = run(bad, 0)
    assert (p.returncode, p.stdout, len(p.stderr.splitlines())) == (1, "", 1) and "was changed" in p.stderr


def test_two_services_in_one_process(bundle):
    a, b = Settings(bundle=bundle, threads=1), Settings(bundle=bundle, threads=1, limits=Limits(max_side=100))
    with background(a) as ua, background(b) as ub:
        assert post(ua, encode(plate())).status_code == 200
        assert_problem(post(ub, encode(plate())), 422, "bad_size")
        with Client(ub) as c, pytest.raises(ServiceError, match="200x150"): c.predict(encode(plate()))


def test_the_description_is_true(url):
    d = WEB.get(f"{url}/openapi.json").json()
    assert sorted(d["paths"]) == ["/healthz/live", "/healthz/ready", "/metrics", "/v1/model", "/v1/predict", "/v1/predict:batch", "/v2", "/v2/health/live", "/v2/health/ready",
        *sorted("/v2/models/{name}"+v+e for v in ("", "/versions/{version}") for e in ("", "/infer", "/ready"))]
    op = d["paths"]["/v1/predict"]["post"]
    assert sorted(op["requestBody"]["content"]) == sorted((*MEDIA_TYPES, "application/octet-stream", "multipart/form-data"))
    for s, r in op["responses"].items(): assert list(r["content"]) == (["application/json"] if s == "200" else ["application/problem+json"])
    Answer.model_validate(d["components"]["schemas"]["Answer"]["example"])
    assert "HTTPValidationError" not in json.dumps(d)


def test_nothing_leaks(bundle):
    "Threads and file descriptors are where they were after services came and went."
    def count(): return len(os.listdir("/dev/fd")), threading.active_count()
    with background(Settings(bundle=bundle, threads=1)): pass
    before = count()
    for _ in range(3):
        with background(Settings(bundle=bundle, threads=1)) as u: assert post(u, encode(plate())).status_code == 200
    end = time.monotonic()+10 # a thread that was told to end may take its time on a busy machine
    while not all(a<=b for a, b in zip(count(), before)) and time.monotonic()<end: time.sleep(.05)
    assert all(a<=b for a, b in zip(count(), before)), (count(), before)
