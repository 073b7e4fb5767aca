"""Pictures per second of `defect-detect score`, beside the bare engine, and its memory: `python benchmarks/score.py runs/demo/export/bundle 20000`.

The bare engine is fed one ready picture again and again, nothing decoded: with all cores in one session, and with one session a core
in threads; the faster counts. It runs in bursts, every 2,048 pictures, while `score` waits: so both meet the same other load. Every picture is
drawn anew from a few hundred parts with its own noise, so no file repeats.
"""
import os
import queue
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
from PIL import Image

from defect_detect.core.progress import cores
from defect_detect.core.predictor import Predictor
from defect_detect.run.score import read_rows, score


def draw(folder:Path, n:int):
    "`n` grey JPEG pictures of 320x240 px, in folders of a thousand."
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 6, (1024, 1024))
    for i in range(n):
        y, x = rng.integers(0, 700, 2)
        v = 130+noise[y:y+240, x:x+320]
        if i%4==0: v[60+i%100:75+i%100, 90:110] = 30
        to = folder/f"{i//1000:03}"
        to.mkdir(parents=True, exist_ok=True)
        Image.fromarray(v.clip(0, 255).astype(np.uint8)).save(to/f"{i:06}.jpg", quality=85)


class Bare:
    "The engine alone: one session a core, each in a thread, or one session of all cores."
    def __init__(self, bundle, workers:int, threads:int):
        self.preds = [Predictor.load(bundle, threads) for _ in range(workers)]
        s = self.preds[0].card.input
        self.x = np.random.default_rng(0).normal(size=(1, 3, s.height, s.width)).astype(np.float32)
        self.n, self.seconds = 0, 0.

    def burst(self, seconds:float=3):
        t0, done = time.perf_counter(), queue.Queue()

        def loop(p):
            n = 0
            while time.perf_counter()<t0+seconds: p.engine.run(self.x); n += 1
            done.put(n)
        ts = [threading.Thread(target=loop, args=(p,)) for p in self.preds]
        for t in ts: t.start()
        for t in ts: t.join()
        self.n, self.seconds = self.n+sum(done.get() for _ in ts), self.seconds+time.perf_counter()-t0

    @property
    def rate(self): return self.n/self.seconds


def main(bundle:str="runs/demo/export/bundle", count:str="20000"):
    n, c, me, memory, spent = int(count), cores(), psutil.Process(), [], 0.
    with tempfile.TemporaryDirectory() as tmp:
        draw(Path(tmp)/"p", n)
        ways = {f"{c} sessions of 1 thread": Bare(bundle, c, 1), f"1 session of {c} threads": Bare(bundle, 1, c)}
        t0 = time.perf_counter()

        def say(done, of):
            nonlocal spent
            memory.append((done, me.memory_info().rss/1e6))
            if (done//256)%8 and done!=of: return
            print(f"{done:6} of {of}  {memory[-1][1]:.0f} MB  {time.perf_counter()-t0:.0f} s", flush=True)
            t = time.perf_counter()
            for w in ways.values(): w.burst()
            spent += time.perf_counter()-t
        out, _ = score(Path(tmp)/"p", bundle, Path(tmp)/"scores.parquet", say=say)
        took, rows = time.perf_counter()-t0-spent, sum(1 for _ in read_rows(out))
        for k, w in ways.items(): print(f"bare engine, {k}: {w.rate:.1f} pictures/s")
        best = max(w.rate for w in ways.values())
        print(f"score: {rows} rows, {n/took:.1f} pictures/s, everything counted; {n/took/best:.2f} of the faster bare engine")
        later = [m for d, m in memory if 1000<=d]
        if later: print(f"memory from the first thousand on: {min(later):.0f} to {max(later):.0f} MB, {later[0]:.0f} at first and {later[-1]:.0f} at last")


if __name__=="__main__": main(*sys.argv[1:3])
