"""Time of one picture through the shipped bundle, beside the same network in torch: `python benchmarks/predict.py runs/demo`.

Both get the same picture at the network's size, two threads each, turn by turn; medians and their ratio are printed.
"""
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from defect_detect.core.predictor import Predictor
from defect_detect.learn.model import load_model


def timed(f)->float: # ms
    t = time.perf_counter()
    f()
    return 1000*(time.perf_counter()-t)


def main(run:str="runs/demo", rounds:int=60, threads:int=2):
    run = Path(run)
    if not (run/"export/bundle").is_dir(): sys.exit(f"error: there is no bundle in {run}; make run writes one")
    torch.set_num_threads(threads)
    pred, (net, _) = Predictor.load(run/"export/bundle", threads), load_model(run/"train")
    spec = pred.card.input
    x = np.random.default_rng(0).normal(size=(1, 3, spec.height, spec.width)).astype(np.float32)
    xt, net = torch.from_numpy(x), net.eval()
    picture = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)

    def eager():
        with torch.inference_mode(): net(xt).softmax(1)
    kinds = {"bundle, onnxruntime": lambda: pred.engine.run(x), "torch, eager": eager, "picture to verdict": lambda: pred.predict([picture])}
    for f in kinds.values(): f()
    ms = {k: [] for k in kinds}
    for _ in range(rounds):
        for k, f in kinds.items(): ms[k].append(timed(f))
    mid = {k: statistics.median(v) for k, v in ms.items()}
    for k, v in mid.items(): print(f"{k:22}{v:8.1f} ms  (middle half {np.percentile(ms[k], 25):.1f} to {np.percentile(ms[k], 75):.1f})")
    print(f"torch / bundle at {spec.width}x{spec.height}: {mid['torch, eager']/mid['bundle, onnxruntime']:.2f}")


if __name__=="__main__": main(*sys.argv[1:2])
