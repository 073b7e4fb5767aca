"""The service under load, beside the bare loop and other servers: `python benchmarks/serve.py runs/demo/export/bundle --pictures <folder>`.

One core serves, another one asks. The bare loop (decode, network, answer; no server) runs on the serving core, turn by turn with
the service. Open load is Poisson; latency counts from the moment a request should have been sent. Peers need a Python of their
own with their package, onnxruntime and Pillow: `--litserve <python> --bentoml <python>`; fastai's is this one.
"""
import argparse
import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

SERVER, CLIENT = 0, min(1, (os.cpu_count() or 1)-1)
PEERS = Path(__file__).parent/"peers.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def pinned(): os.sched_setaffinity(0, {SERVER})


def pictures(folder, n=24)->list[bytes]:
    "Files of a folder, or drawn ones of the same kind."
    if folder: return [p.read_bytes() for p in sorted(Path(folder).rglob("*.jpg"))[::max(1, len(sorted(Path(folder).rglob("*.jpg")))//n)][:n]]
    import io
    from PIL import Image
    out = []
    for i in range(n):
        rng, b = np.random.default_rng(i), io.BytesIO()
        a = (130+rng.normal(0, 12, (300, 220))).clip(0, 255).astype(np.uint8)
        a[60:72, 100:112] = 30
        Image.fromarray(a).save(b, "JPEG", quality=92)
        out.append(b.getvalue())
    return out


BARE = """
import sys, time, json, os
from defect_detect.core.image import decode
from defect_detect.core.predictor import Predictor
from defect_detect.serve.messages import Timing, answer_of
p = Predictor.load(sys.argv[1], 1)
files = [open(f, "rb").read() for f in sys.argv[2:]]
def one(d): return answer_of(p.predict([decode(d)])[0], p.bundle, "x", Timing(waiting=0, decoding=0, predicting=0)).model_dump_json(by_alias=True)
for d in files[:8]: one(d)
for line in sys.stdin:
    end, times, i = time.perf_counter()+float(line), [], 0
    while time.perf_counter()<end:
        t = time.perf_counter(); one(files[i%len(files)]); times.append(time.perf_counter()-t); i += 1
    print(json.dumps(times), flush=True)
"""


class Bare:
    "decode -> network -> answer in a process of its own, for as long as it is asked to."
    def __init__(self, bundle, folder):
        self.p = subprocess.Popen([sys.executable, "-c", BARE, str(bundle), *map(str, sorted(Path(folder).iterdir()))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV, preexec_fn=pinned)

    def run(self, seconds)->list[float]: # s of each picture
        self.p.stdin.write(f"{seconds}\n")
        self.p.stdin.flush()
        return json.loads(self.p.stdout.readline())


# --- load

class Client:
    "Connections that are kept and used again, as few as possible between the clock and the socket."
    def __init__(self, port, path, files, kind="image/jpeg", more=""):
        self.port, self.free = port, []
        self.requests = [f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\nContent-Length: {len(d)}\r\n{more}\r\n".encode()+d for d in files]

    async def ask(self, i)->int: # status
        r, w = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", self.port)
        w.write(self.requests[i%len(self.requests)])
        head = await r.readuntil(b"\r\n\r\n")
        low = head.lower()
        if b"content-length:" in low: await r.readexactly(int(low.split(b"content-length:")[1].split(b"\r\n")[0]))
        else:
            while n := int((await r.readline()).strip() or b"0", 16): await r.readexactly(n+2)
            await r.readline()
        if b"connection: close" in low: w.close()
        else: self.free.append((r, w))
        return int(head.split(b" ", 2)[1])

    async def closed(self, seconds, clients)->float: # answers a second
        end, n, self.all, self.cut = time.perf_counter()+seconds, 0, 0, 0
        async def one(i):
            nonlocal n
            while time.perf_counter()<end:
                i += 1
                try: status = await self.ask(i)
                except (OSError, asyncio.IncompleteReadError): # closed under us: no answer, and the next one opens anew
                    status, self.cut = 0, self.cut+1
                    await asyncio.sleep(.01)
                self.all += status == 200
                n += status == 200 and time.perf_counter()<end
        await asyncio.gather(*(one(i) for i in range(clients)))
        return n/seconds

    async def opened(self, arrivals)->list[tuple[float, int, float]]: # when it was due, status, latency from then
        t0, out = time.perf_counter()+.05, []
        async def one(i, at):
            try: status = await self.ask(i)
            except (OSError, asyncio.IncompleteReadError): status = 0
            out.append((at, status, time.perf_counter()-t0-at))
        tasks = []
        for i, at in enumerate(arrivals):
            await asyncio.sleep(max(0, t0+at-time.perf_counter()))
            tasks.append(asyncio.create_task(one(i, at)))
        await asyncio.gather(*tasks)
        return out

    def close(self): [w.close() for _, w in self.free]


def arrivals(rate, seconds, seed=0): return np.cumsum(np.random.default_rng(seed).exponential(1/rate, int(rate*seconds)))


def simulated(at, service)->np.ndarray: # latencies
    "A single server that takes one after the other, with these service times."
    free, out = 0., []
    for i, a in enumerate(at):
        free = max(free, a)+service[i%len(service)]
        out.append(free-a)
    return np.array(out)


# --- servers

class Running:
    "A server's process, on the serving core; `ready` once its port answers a picture."
    def __init__(self, words, port, path, body, kind="image/jpeg", more="", env=(), wait=90):
        t = time.monotonic()
        self.log = tempfile.TemporaryFile("w+")
        self.p = subprocess.Popen([str(w) for w in words], stdout=self.log, stderr=self.log, env={**ENV, **dict(env)}, preexec_fn=pinned, start_new_session=True, cwd=tempfile.gettempdir())
        self.seconds = None
        while time.monotonic()<t+wait and self.p.poll() is None:
            try:
                if asyncio.run(Client(port, path, [body], kind, more).ask(0)) == 200:
                    self.seconds = time.monotonic()-t
                    break
            except (OSError, asyncio.IncompleteReadError): pass
            time.sleep(.01)
        if self.seconds is None:
            self.log.seek(0)
            text = self.log.read()[-2000:]
            self.stop()
            raise SystemExit(f"error: {' '.join(map(str, words))[:200]} did not answer: {text}")

    def mb(self):
        me = psutil.Process(self.p.pid)
        return sum(q.memory_info().rss for q in (me, *me.children(recursive=True)))/1e6

    def stop(self):
        try: os.killpg(self.p.pid, signal.SIGTERM)
        except ProcessLookupError: return
        try: self.p.wait(10)
        except subprocess.TimeoutExpired: pass
        try: os.killpg(self.p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.p.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


def ours(bundle, files, *more):
    port = free_port()
    return port, Running([sys.executable, "-c", "from defect_detect.cli.base import main; main()", "serve", Path(bundle).resolve(), "--port", port, "--threads", 1, *more], port, "/v1/predict", files[0], env={"PYTHONPATH": os.getcwd()})


def cpu(pid): return sum(psutil.Process(pid).cpu_times()[:2]) # s


def ms(v): return f"{1000*v:.1f} ms"
def verdict(ok): return "holds" if ok else "DOES NOT HOLD"


def steady(client, bare, s, mean, seconds):
    "Half of saturation, Poisson, beside a simulated single server."
    at = arrivals(s/2, seconds)
    got = asyncio.run(client.opened(at))
    lat = np.array([o[2] for o in got if o[1] == 200])
    sim = simulated(at, bare)
    p, q = np.quantile(lat, .99), np.quantile(sim, .99)
    print(f"half saturation, {len(at)} arrivals: p50 {ms(np.median(lat))}, p99 {ms(p)}; simulated single server: p50 {ms(np.median(sim))}, p99 {ms(q)}; ratio {p/q:.2f}, at most 1.25: {verdict(p/q<=1.25)}; {len(got)-len(lat)} errors")


def overload(client, s, seconds):
    "Three times saturation."
    got = asyncio.run(client.opened(arrivals(3*s, seconds, 1)))
    good, no = [o for o in got if o[1] == 200], [o for o in got if o[1] in (429, 503)]
    last = max(o[0]+o[2] for o in good)
    rate = len(good)/max(seconds, last)/s
    late = np.quantile([o[2] for o in no], .99) if no else 0
    print(f"3 x saturation, {len(got)} arrivals: goodput {rate:.2f} of saturation, at least 0.85: {verdict(rate>=.85)}; {len(no)} refused, 99 % of them within {ms(late)}, at most 100: {verdict(late<=.1)}; {len(got)-len(good)-len(no)} otherwise")


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("bundle")
    a.add_argument("--pictures", help="a folder of JPEG files")
    a.add_argument("--seconds", type=float, default=10)
    a.add_argument("--rounds", type=int, default=3)
    for peer in ("litserve", "bentoml"): a.add_argument(f"--{peer}", help="a Python that has it")
    a.add_argument("--fastai", action="store_true", help="also the way of a FastAPI handler around Learner.predict")
    o = a.parse_args()
    os.sched_setaffinity(0, {CLIENT})
    files = pictures(o.pictures)
    with tempfile.TemporaryDirectory() as tmp:
        for i, d in enumerate(files): (Path(tmp)/f"{i:03}.jpg").write_bytes(d)
        bare = Bare(o.bundle, tmp)
        port, server = ours(o.bundle, files)
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {len(files)} pictures of {int(np.mean([len(d) for d in files]))/1000:.0f} kB")
        try: _figures(o, files, bare, port, server)
        finally: # a peer that does not start must not leave ours behind
            server.stop()
            bare.p.kill()


def _figures(o, files, bare, port, server):
    "Ours beside the bare loop, then the peers beside ours."
    print(f"cold start to the first answer {server.seconds:.2f} s, at most 2: {verdict(server.seconds<=2)}; {server.mb():.0f} MB resident, at most 300: {verdict(server.mb()<=300)}")
    client, ratios, times, rates, work = Client(port, "/v1/predict", files), [], [], [], []
    asyncio.run(one_loop(client, 1))
    bare.run(1)
    for _ in range(o.rounds):
        a, b = cpu(bare.p.pid), cpu(server.p.pid)
        t = bare.run(o.seconds/2)
        rate, n = saturation(port, files, o.seconds/2)
        rates.append(rate)
        times += t
        ratios.append(rate*np.mean(t))
        work.append((cpu(bare.p.pid)-a)/len(t)/((cpu(server.p.pid)-b)/n))
    s, mean = float(np.median(rates)), float(np.mean(times))
    r = float(np.median(ratios))
    print(f"saturation {s:.1f} a second, the bare loop {1/mean:.1f}; ratio {r:.2f} (each round: {', '.join(f'{v:.2f}' for v in ratios)}), at least 0.90: {verdict(r>=.9)}")
    print(f"by processor time, which others on the machine do not change: ratio {np.median(work):.2f}")
    client = Client(port, "/v1/predict", files)
    steady(client, times, s, mean, o.seconds)
    client = Client(port, "/v1/predict", files)
    overload(client, s, o.seconds)
    print(f"{server.mb():.0f} MB resident afterwards")
    peers(o, files, port, bare)


async def one_loop(client, seconds):
    await client.closed(seconds, 4)
    client.close()


def saturation(port, files, seconds, path="/v1/predict", kind="image/jpeg", more="", clients=8):
    async def run():
        c = Client(port, path, files, kind, more)
        await c.closed(min(1, seconds/4), clients)
        warm = c.all
        n = await c.closed(seconds, clients)
        if c.cut: print(f"  {c.cut} connections to {path} were closed without an answer")
        c.close()
        return n, warm+c.all
    return asyncio.run(run())


def peers(o, files, port, bare):
    "Each beside ours, turn by turn."
    todo = []
    if o.fastai: todo.append(("fastai Learner.predict behind FastAPI, 224x224", sys.executable, "fastai", "/predict"))
    if o.litserve: todo.append(("LitServe, the same ONNX", o.litserve, "litserve", "/predict"))
    if o.bentoml: todo.append(("BentoML, the same ONNX", o.bentoml, "bentoml", "/predict"))
    for name, python, kind, path in todo:
        other = free_port()
        form = lambda d: b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'+d+b"\r\n--x--\r\n"
        ways = dict(bentoml=(form, "multipart/form-data; boundary=x"), litserve=(lambda d: json.dumps(dict(image=base64.b64encode(d).decode())).encode(), "application/json")) # the way each one's users send a picture
        write, ct = ways.get(kind, (bytes, "image/jpeg"))
        body = [write(d) for d in files]
        p = Running([python, PEERS.resolve(), kind, Path(o.bundle).resolve()/"model.onnx", other], other, path, body[0], ct)
        pairs = [(saturation(port, files, o.seconds/2)[0], saturation(other, body, o.seconds/2, path, ct)[0]) for _ in range(o.rounds)]
        ratio = float(np.median([a/b for a, b in pairs]))
        print(f"{name}: {np.median([b for _, b in pairs]):.1f} a second, ours beside it {np.median([a for a, _ in pairs]):.1f}: {ratio:.1f} x; {p.mb():.0f} MB, first answer after {p.seconds:.1f} s")
        p.stop()


if __name__ == "__main__": main()
