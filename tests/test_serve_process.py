"Processes: stopped, killed, exchanged under load; what they measure adds up."
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter

import httpx
import psutil
import pytest

from defect_detect.core.bundle import example_bundle
from defect_detect.core.image import InputSpec
from defect_detect.serve import process as ours
from defect_detect.serve.server import listen, shut
from serving import SERVE, WEB, encode, metric, plate, post, process, records, slow_bundle, wait_for

GOOD = encode(plate(holes=((100, 60),)))


def bundle_of(folder, side): return example_bundle(folder, InputSpec(height=side, width=side))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return bundle_of(tmp_path_factory.mktemp("process")/"bundle", 64)


class Load:
    "Clients that send pictures one after the other, half of them over a connection that is kept; each notes what became of its requests."
    def __init__(self, url, clients=4, pause=.002):
        self.url, self.pause, self.stopped, self.seen, self.lock, self.n = url, pause, threading.Event(), [], threading.Lock(), 0
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(clients)]

    def run(self, i):
        limits = httpx.Limits(max_keepalive_connections=1 if i%2 else 0)
        with httpx.Client(verify=False, trust_env=False, timeout=30, limits=limits) as c:
            n = 0
            while not self.stopped.is_set():
                n += 1
                rid, t = f"c{i}-{n}", time.monotonic()
                try:
                    r = c.post(f"{self.url}/v1/predict", content=GOOD, headers={"content-type": "image/png", "x-request-id": rid})
                    what = (r.status_code, r.json().get("model", {}).get("version"), r.json().get("score"))
                except httpx.ConnectError: what = ("no connection", None, None)
                except httpx.TransportError as e: what = (type(e).__name__, None, None)
                self.seen.append((rid, t, time.monotonic()-t, *what))
                time.sleep(self.pause if what[0] != "no connection" else .02)

    def __enter__(self):
        for t in self.threads: t.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for t in self.threads: t.join()

    def fates(self): return Counter(o[3] for o in self.seen)


def stopped(words, sig=signal.SIGTERM, after=.3, drain=.3):
    "Stop a service under load: its exit code, how long it took, requests that it had taken and did not answer, whether it was not ready first."
    with process(*words, drain=drain) as (p, u, log):
        with Load(u) as load:
            wait_for(lambda: len(load.seen)>5)
            time.sleep(after)
            t = time.monotonic()
            p.send_signal(sig)
            ready = wait_for(lambda: _status(f"{u}/healthz/ready") == 503, drain*.9, .01) if drain else None
            code = p.wait(30)
            spent = time.monotonic()-t
        taken = {o["id"]: o["status"] for o in records(log) if o["message"] == "request"}
    lost = [o for o in load.seen if o[3] not in (200, "no connection") and o[0] in taken and taken[o[0]] != 503]
    odd = [o for o in load.seen if o[3] not in (200, 503, "no connection") and o[0] not in taken]
    return dict(code=code, seconds=spent, lost=lost, cut=odd, ready=ready, answered=load.fates()[200])


def _status(url):
    try: return WEB.get(url).status_code
    except httpx.TransportError: return 0


@pytest.mark.parametrize("workers", [1, 2])
def test_graceful_stop(bundle, workers, many):
    rounds = [stopped([bundle, "--workers", workers], after=.05*i) for i in range(many(2, 50))]
    print(f"{sum(r['answered'] for r in rounds)} answered; longest stop {max(r['seconds'] for r in rounds):.1f} s; connections cut before a request was taken: {sum(len(r['cut']) for r in rounds)}")
    for r in rounds: assert r["code"] == 0 and r["seconds"]<=30 and r["lost"] == [] and r["ready"] and r["answered"]>5, r
    assert sys.platform != "linux" or not any(r["cut"] for r in rounds)


def ends(shut, rounds=10):
    "Clients that connect without pause while a listening socket is shut, emptied and, a moment later, closed: what became of those who were connected."
    seen = Counter()
    def client(address):
        while True:
            with socket.socket() as s:
                s.settimeout(.5)
                try: s.connect(address)
                except OSError: return
                try: s.sendall(b"?"), seen.update(["answered" if s.recv(1) else "cut"])
                except OSError: seen.update(["cut"])
    for _ in range(rounds):
        sock, _ = listen("127.0.0.1", 0)
        sock.setblocking(False)
        threads = [threading.Thread(target=client, args=(sock.getsockname(),)) for _ in range(4)]
        for t in threads: t.start()
        def empty(seconds):
            end = time.monotonic()+seconds
            while True:
                try:
                    with sock.accept()[0] as c:
                        c.setblocking(True)
                        c.sendall(b"!"*len(c.recv(1)))
                except BlockingIOError:
                    if time.monotonic()>end: return
        empty(.05)
        shut(sock)
        empty(.01)
        time.sleep(.005)
        sock.close()
        for t in threads: t.join()
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="the door is Linux's")
def test_no_connection_is_cut():
    seen = ends(shut)
    assert seen["answered"]>100 and not seen["cut"], seen
    assert ends(lambda sock: None)["cut"], "the planted fault"


def test_graceful_stop_sees_a_fault(tmp_path):
    "kill -9 loses what is in work."
    slow = slow_bundle(tmp_path/"slow", 512)
    r = stopped([slow], signal.SIGKILL, drain=0)
    assert r["code"] == -9 and r["cut"]


@pytest.mark.nightly
@pytest.mark.parametrize("after", [i/20 for i in range(0, 40, 2)])
def test_stop_while_loading(bundle, after):
    with process(bundle, "--workers", 2, wait=False) as (p, _, log):
        time.sleep(after)
        p.terminate()
        code = p.wait(30)
    assert code in (0, -signal.SIGTERM), log # before it could listen to signals, the system's own way
    assert not [c for c in psutil.process_iter(["cmdline"]) if str(bundle) in " ".join(c.info["cmdline"] or ()) and SERVE in (c.info["cmdline"] or ())]


def workers_of(p): return psutil.Process(p.pid).children()


def killed(bundle, rounds, workers=2):
    "Kill a worker again and again under load: requests that hung, that ended otherwise than they may, and the longest time without an answer."
    with process(bundle, "--workers", workers) as (p, u, log), Load(u, 4) as load:
        wait_for(lambda: len(load.seen)>5)
        for _ in range(rounds):
            wait_for(lambda: metric(u, "ready")>=workers, 30, .1)
            before = {w.pid for w in workers_of(p)}
            workers_of(p)[0].kill()
            wait_for(lambda: len(workers_of(p))==workers and {w.pid for w in workers_of(p)} != before, 30)
        wait_for(lambda: metric(u, "ready")>=workers, 30, .1)
        time.sleep(.3)
    died = [o for o in records(log) if o["message"] == "a worker died"]
    good = sorted(o[1]+o[2] for o in load.seen if o[3] == 200)
    odd = [o for o in load.seen if o[3] not in (200, 503, "no connection", "RemoteProtocolError", "ReadError", "WriteError")]
    return dict(died=len(died), odd=odd, ended=sum(o[3] != 200 for o in load.seen), slowest=max(o[2] for o in load.seen), gap=max(b-a for a, b in zip(good, good[1:])))


def test_worker_kill(bundle, many):
    n = many(2, 50)
    r = killed(bundle, n)
    print(f"{r['died']} killed, {r['ended']} requests ended with them, longest time without an answer {r['gap']:.2f} s")
    assert r["died"] == n and r["odd"] == [] and r["slowest"]<20 and r["gap"]<=3 and r["ended"]<=4*n


def test_one_worker_is_restarted(bundle):
    "Also the only one; a connection that came meanwhile is answered by the next."
    with process("--watch", bundle.parent) as (p, u, log):
        t = time.monotonic()
        workers_of(p)[0].kill()
        assert wait_for(lambda: _status(f"{u}/healthz/ready") == 200, 20)
        print(f"ready again after {time.monotonic()-t:.2f} s")
        assert post(u, GOOD).status_code == 200


def test_worker_kill_sees_a_fault(bundle, monkeypatch, tmp_path):
    "A parent that starts no new worker."
    (tmp_path/"sitecustomize.py").write_text("import defect_detect.serve.process as p\nasync def nothing(self, old): pass\np.Parent.replace = nothing\n")
    with process(bundle, "--workers", 2, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}) as (p, u, log):
        workers_of(p)[0].kill()
        assert wait_for(lambda: len(workers_of(p)) == 1) and not wait_for(lambda: len(workers_of(p)) == 2, 3)


def swapped(folder, rounds, bad_every=5, workers=1):
    "Put bundles into a watched folder under load; what the versions said, and what was refused."
    sides, scores, tags = (64, 96), {}, {}
    first = bundle_of(folder/"b0", 64)
    for s in sides:
        from defect_detect.core.image import decode
        from defect_detect.core.predictor import Predictor
        p = Predictor.load(bundle_of(folder.parent/f"ref{s}", s), 1)
        scores[p.bundle.version], tags[s] = p.predict([decode(GOOD)])[0].score, p.bundle.version
    assert first
    with process("--watch", folder, "--workers", workers) as (p, u, log), Load(u, 4) as load:
        def now(): return WEB.get(f"{u}/healthz/ready").json()
        wait_for(lambda: len(load.seen)>5)
        refused = taken = 0
        for i in range(1, rounds+1):
            side, bad = sides[i%2], i%bad_every == 0
            made = bundle_of(folder/f".b{i}", side)
            if bad: (made/"NOTICE").write_text("changed")
            was = now()["model"]
            made.rename(folder/f"b{i}")
            if bad:
                assert wait_for(lambda i=i: f"b{i}" in now().get("refused", ""), 60, .05) and now()["model"] == was
                refused += 1
            else:
                assert wait_for(lambda s=side: now()["model"].endswith(tags[s]) and "refused" not in now(), 60, .05), (i, now(), log[-3:])
                taken += 1
        n = metric(u, "bundles_refused_total")
    wrong = [o for o in load.seen if o[3] == 200 and abs(scores[o[4]]-o[5])>1e-6]
    return dict(fates=load.fates(), wrong=wrong, refused=refused, counted=n, taken=taken, versions={o[4] for o in load.seen if o[3] == 200})


def test_hot_swap(tmp_path, many):
    (tmp_path/"watched").mkdir()
    r = swapped(tmp_path/"watched", many(4, 50), many(3, 5))
    print(r)
    assert set(r["fates"]) == {200} and r["wrong"] == [] and r["refused"]>0 and r["counted"] == r["refused"] and len(r["versions"]) == 2


def test_hot_swap_sees_a_fault(tmp_path):
    "Workers that are killed instead of drained lose requests; a tag that is not the model's is seen by its scores."
    (tmp_path/"sitecustomize.py").write_text("import defect_detect.serve.process as p\nreal = p.Child.tell\ndef tell(self, **o):\n    return self.kill() if 'drain' in o else real(self, **o)\np.Child.tell = tell\n")
    (tmp_path/"watched").mkdir()
    slow = slow_bundle(tmp_path/"watched/a", 512)
    with process("--watch", slow.parent, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}) as (p, u, log), Load(u, 4) as load:
        wait_for(lambda: len(load.seen)>3)
        shutil.copytree(slow, tmp_path/"watched/.b")
        bundle_of(tmp_path/"watched/.c", 64).rename(tmp_path/"watched/c")
        def changed(): # the question itself may meet a worker that is killed
            try: return "example-spot" in WEB.get(f"{u}/healthz/ready").json().get("model", "")
            except httpx.TransportError: return False
        wait_for(changed, 30)
        time.sleep(.3)
    assert set(load.fates())-{200}


@pytest.mark.nightly
def test_cold_start(bundle):
    "From nothing to ready, killed a hundred times."
    spent = []
    for _ in range(100):
        t = time.monotonic()
        with process(bundle) as (p, u, log):
            assert _status(f"{u}/healthz/ready") == 200
            spent.append(time.monotonic()-t)
            p.kill()
            p.wait()
    print(f"median {sorted(spent)[50]:.2f} s, longest {max(spent):.2f} s")
    assert max(spent)<=5


def test_workers_add_up(bundle):
    "One scrape tells of all workers, also of one that has died."
    with process(bundle, "--workers", 2) as (p, u, log):
        wait_for(lambda: metric(u, "ready") == 2)
        with Load(u, 4) as load: wait_for(lambda: len(load.seen)>=60)
        said = lambda: metric(u, 'verdicts_total{verdict="defect"}')
        assert load.fates() == {200: len(load.seen)} and said() == len(load.seen)
        by = Counter(o["pid"] for o in records(log) if o["message"] == "request" and o.get("verdict"))
        assert len(by) == 2 and min(by.values())>=5, f"one worker took nearly all: {by}"
        workers_of(p)[0].kill()
        wait_for(lambda: metric(u, "ready") == 2 and len(workers_of(p)) == 2)
        assert said() == len(load.seen) and metric(u, "places") == 0
        assert wait_for(lambda: re.search(r'defect_detect_bundle\{name="example-spot",version="\w{12}"\} 2\.0', WEB.get(f"{u}/metrics").text))
    left = [d for d in os.listdir("/dev/shm") if d.startswith("defect-detect-")] if os.path.isdir("/dev/shm") else []
    assert not [d for d in left if psutil.Process().create_time()<os.stat(f"/dev/shm/{d}").st_ctime and not os.listdir(f"/dev/shm/{d}")]


def test_nobody_is_left_when_the_parent_is_killed(bundle):
    with process(bundle, "--workers", 2) as (p, u, log):
        kids = workers_of(p)
        p.kill()
        p.wait()
        assert wait_for(lambda: not [k for k in kids if k.is_running() and k.status() != psutil.STATUS_ZOMBIE], 20)


def test_newest_is_what_appeared_last(tmp_path):
    for n in ("a", "b", "c"): bundle_of(tmp_path/n, 64)
    (tmp_path/"b").rename(tmp_path/"d")
    (tmp_path/".hidden").mkdir()
    (tmp_path/"file").write_text("x")
    assert ours.newest(tmp_path)[0].name == "d"
