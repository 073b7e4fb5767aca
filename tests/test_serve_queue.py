"The queue over real connections: exact places, deadlines, batches that nobody notices, clients that vanish. Numbers are those of the bar for services."
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from defect_detect.core.bundle import example_bundle
from defect_detect.core.image import InputSpec, decode
from defect_detect.core.predictor import Predictor
from defect_detect.serve import batcher
from defect_detect.serve.api import background
from defect_detect.serve.batcher import Batcher
from defect_detect.serve.settings import Settings
from serving import WEB, address, assert_problem, encode, head, metric, metrics, plate, poison_bundle, post, slow_bundle, wait_for


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return example_bundle(tmp_path_factory.mktemp("queue")/"bundle", InputSpec(height=64, width=64), batches=(1, 2, 4, 8))


@pytest.fixture(scope="module")
def slow(tmp_path_factory): return slow_bundle(tmp_path_factory.mktemp("queue")/"slow", 512)


class Gate:
    "Holds the network's thread from outside, so that what waits is counted and not guessed."
    def __init__(self, monkeypatch):
        self.open, real = threading.Event(), Batcher._predict
        self.open.set()
        def predict(b, jobs):
            self.open.wait(60)
            return real(b, jobs)
        monkeypatch.setattr(Batcher, "_predict", predict)


def queue_exact(bundle, rounds, monkeypatch, places=8, more=5, patience=20):
    "Send places+more at once while the network is held: how many were refused, round by round."
    gate, body, out = Gate(monkeypatch), encode(plate()), []
    with background(Settings(bundle=bundle, threads=1, max_batch=4, max_waiting=places, decoders=2)) as u, ThreadPoolExecutor(places+more) as pool, httpx.Client(base_url=u, timeout=60, limits=httpx.Limits(max_connections=99)) as c:
        def ask(_): return c.post("/v1/predict", content=body, headers={"content-type": "image/png"})
        c.get("/healthz/ready").raise_for_status()
        for _ in range(rounds):
            gate.open.clear()
            jobs = [pool.submit(ask, i) for i in range(places+more)]
            wait_for(lambda: sum(j.done() for j in jobs)>=more and metric(u, "places")==places, patience)
            refused = [j.result() for j in jobs if j.done()]
            gate.open.set()
            got = [j.result() for j in jobs]
            for r in refused: assert_problem(r, 503, "busy")
            out.append((len(refused), sum(r.status_code==200 for r in got), metric(u, "places")))
    return out


def test_queue_exact(bundle, monkeypatch, many):
    assert queue_exact(bundle, many(10, 100), monkeypatch) == [(5, 8, 0)]*many(10, 100)


def test_queue_exact_sees_a_fault(bundle, monkeypatch):
    "A queue that counts only what it has not begun lets more in."
    def loose(self, n=1):
        if len(self.queue)+n>self.most: raise batcher.ProblemError("busy", "full", retry_after=1)
    monkeypatch.setattr(Batcher, "admit", loose)
    assert queue_exact(bundle, 1, monkeypatch, patience=2) != [(5, 8, 0)]


def deadlines(slow, n, monkeypatch):
    "Requests with 150 ms behind a network that is held: how they ended, how late, and how many pictures were run."
    gate = Gate(monkeypatch)
    with background(Settings(bundle=slow, threads=1, max_waiting=n+8)) as u, ThreadPoolExecutor(64) as pool:
        body = encode(plate(64, 64))
        before = metric(u, 'pictures_total{fate="executed"}')
        gate.open.clear()
        def ask(i):
            t = time.perf_counter()
            r = post(u, body, headers={"x-request-timeout": "150"})
            return r, time.perf_counter()-t
        got = list(pool.map(ask, range(n)))
        gate.open.set()
        assert post(u, body).status_code == 200
        m = metrics(u)
    return got, float(m['defect_detect_pictures_total{fate="executed"}'])-before-1, float(m.get('defect_detect_pictures_total{fate="expired"}', 0))


def test_deadline_no_waste(slow, monkeypatch):
    got, executed, expired = deadlines(slow, 500, monkeypatch)
    for r, _ in got: assert_problem(r, 504, "expired")
    assert executed <= 1 and expired+executed >= 500, "the first was taken before its time was over, and held"
    print(f"latest answer {1000*max(s for _, s in got):.0f} ms after it was asked")
    assert max(s for _, s in got)<5


def test_deadline_sees_a_fault(slow, monkeypatch):
    monkeypatch.setattr(Batcher, "drop", lambda self, j, why: None)
    real = Batcher._take
    def never_late(self):
        for j in self.queue: j.deadline = float("inf")
        return real(self)
    monkeypatch.setattr(Batcher, "_take", never_late)
    assert deadlines(slow, 20, monkeypatch)[1]>1


def test_a_deadline_that_is_none(bundle):
    with background(Settings(bundle=bundle, threads=1, deadline_ms=1)) as u:
        assert_problem(post(u, encode(plate(900, 900))), 504, "expired")
        for bad in ("0", "-1", "soon", "1.5", ""): assert_problem(post(u, encode(plate()), headers={"x-request-timeout": bad}), 422, "bad_parameter")
        r = WEB.post(f"{u}/v1/predict:batch", files=[("a", encode(plate(900, 900))), ("a", encode(plate(900, 900)))])
        assert r.status_code == 200 and {o["problem"]["type"].rpartition(":")[2] for o in r.json()["items"] if o["problem"]} == {"expired"}


def isolation(folder, n, poison=.01, seed=0, together=8):
    "Unique pictures at random moments: those whose answer is another's or differs from that of the predictor alone, and what became of the poison."
    rng, alone = np.random.default_rng(seed), Predictor.load(folder, threads=1)
    kinds = rng.choice(["good", "network", "bytes"], n, p=[1-poison, poison/2, poison/2])
    def picture(i):
        r = np.random.default_rng([seed, i])
        a = plate(int(r.integers(40, 90)), int(r.integers(40, 90)), [(int(r.integers(5, 25)), int(r.integers(5, 25)))] if r.random()<.5 else (), seed=i)
        a[:4, :4] = 255 if kinds[i] == "network" else 100
        return encode(a)[:-30 if kinds[i] == "bytes" else None]
    wrong, worst, seen = [], 0., []
    with background(Settings(bundle=folder, threads=1, max_batch=together, max_waiting=200, batch_wait_ms=5)) as u, httpx.Client(base_url=u, timeout=60, limits=httpx.Limits(max_connections=64)) as c, ThreadPoolExecutor(24) as pool:
        def ask(i):
            time.sleep(float(np.random.default_rng([seed, i, 1]).exponential(.003)))
            return c.post("/v1/predict", content=picture(i), headers={"content-type": "image/png", "x-request-id": f"n{i}"})
        for i, r in enumerate(pool.map(ask, range(n))):
            d = r.json()
            if kinds[i] != "good":
                if r.status_code != dict(network=500, bytes=422)[kinds[i]]: wrong.append((i, "poison", r.text))
                continue
            if r.status_code != 200 or d["request_id"] != f"n{i}":
                wrong.append((i, "status", r.text))
                continue
            want = alone.predict([decode(picture(i))])[0]
            seen.append(d["timing"]["together"])
            worst = max(worst, abs(d["score"]-want.score))
            if d["verdict"] != want.verdict or abs(d["score"]-want.score)>1e-5 or [tuple(o["box"]) for o in d["regions"]] != [o.box for o in want.regions]: wrong.append((i, "answer", d["verdict"], want.verdict))
    return wrong, worst, seen


def test_batch_isolation(tmp_path, many):
    wrong, worst, seen = isolation(poison_bundle(tmp_path/"poison"), many(400, 10_000), many(.05, .01))
    assert wrong == [] and max(seen)>1, "nothing ran together: the test has seen nothing"
    print(f"together: {sorted({k: seen.count(k) for k in set(seen)}.items())}, largest difference of a score {worst:.1e}")


def test_batch_isolation_sees_a_fault(tmp_path, monkeypatch):
    real = Batcher._predict
    monkeypatch.setattr(Batcher, "_predict", lambda self, jobs: real(self, jobs)[::-1]) # answers exchanged within a batch
    assert any(o[1] in ("answer", "poison") for o in isolation(poison_bundle(tmp_path/"poison"), 200, .05)[0])


def test_poison_takes_the_others_with_it_sees_a_fault(tmp_path, monkeypatch):
    def whole(self, jobs):
        try: return self.predictor.predict([j.image for j in jobs], len(jobs))
        except Exception: return [batcher.ProblemError("internal", "x")]*len(jobs)
    monkeypatch.setattr(Batcher, "_predict", whole)
    assert any(o[1] == "status" for o in isolation(poison_bundle(tmp_path/"poison"), 300, .2)[0])


def vanish(u, n, seed=0):
    "Clients that leave at a random point of their request; those in the middle of the answer, too."
    body, rng = encode(plate(300, 300)), np.random.default_rng(seed)
    whole = head(f"Content-Length: {len(body)}", "Content-Type: image/png")+body
    def one(i):
        r = np.random.default_rng([seed, i])
        with socket.create_connection(address(u), timeout=20) as s:
            s.sendall(whole[:int(r.integers(0, len(whole)+1)) if r.random()<.6 else len(whole)])
            if r.random()<.3: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0") # a reset instead of an end
            time.sleep(float(r.exponential(.02)))
    with ThreadPoolExecutor(32) as pool: list(pool.map(one, rng.permutation(n)))


def left_behind(u, seconds=2.):
    "What is not back to nothing after `seconds`."
    def now(): return {k: v for k, v in metrics(u).items() if k in ("defect_detect_places", "defect_detect_held_bytes") and float(v)}
    end = time.monotonic()+seconds
    while (left := now()) and time.monotonic()<end: time.sleep(.05)
    return left


def test_disconnect_cleanup(slow):
    with background(Settings(bundle=slow, threads=1, max_waiting=600, body_seconds=5)) as u:
        post(u, encode(plate())).raise_for_status()
        before = len(os.listdir("/dev/fd"))
        vanish(u, 500)
        assert left_behind(u) == {}
        gone = metric(u, 'pictures_total{fate="gone"}')
        assert gone>20, "few vanished while they waited: the test has seen little"
        assert wait_for(lambda: len(os.listdir("/dev/fd"))<=before+1, 10), "descriptors"
        assert post(u, encode(plate())).status_code == 200


def test_disconnect_cleanup_sees_a_fault(slow, monkeypatch):
    async def deaf(request): await batcher.asyncio.sleep(3600)
    monkeypatch.setattr("defect_detect.serve.api._left", deaf)
    with background(Settings(bundle=slow, threads=1, max_waiting=600)) as u:
        vanish(u, 150)
        assert left_behind(u, 1.)


def test_health_is_true(slow, monkeypatch):
    "Live and ready while the queue is full; not ready when it is being stopped is in the tests of processes."
    gate = Gate(monkeypatch)
    with background(Settings(bundle=slow, threads=1, max_waiting=4)) as u, ThreadPoolExecutor(16) as pool:
        gate.open.clear()
        jobs = [pool.submit(post, u, encode(plate(1500, 1500))) for _ in range(12)]
        spent = []
        for _ in range(100):
            t = time.perf_counter()
            assert WEB.get(f"{u}/healthz/live").status_code == WEB.get(f"{u}/v2/health/ready").status_code == WEB.get(f"{u}/metrics").status_code == 200
            spent.append(time.perf_counter()-t)
        gate.open.set()
        assert sorted(j.result().status_code for j in jobs) == [200]*4+[503]*8
    print(f"three health checks of a full service: median {1000*np.median(spent):.1f} ms, 99 % {1000*np.quantile(spent, .99):.1f} ms")
    assert max(spent)<5


def test_health_sees_a_fault(slow, monkeypatch):
    "A service that works in its event loop does not answer meanwhile."
    gate, begun = threading.Event(), threading.Event()
    async def blocking(self, jobs, gone=None):
        begun.set()
        gate.wait(20)
        return [j.finish(self.predictor.predict([j.decode()])[0], j) for j in jobs]
    monkeypatch.setattr(Batcher, "submit", blocking)
    with background(Settings(bundle=slow, threads=1)) as u, ThreadPoolExecutor(1) as pool:
        job = pool.submit(post, u, encode(plate(150, 150)))
        assert begun.wait(20)
        with pytest.raises(httpx.ReadTimeout): httpx.get(f"{u}/healthz/live", timeout=.5)
        gate.set()
        assert job.result().status_code == 200