"""What the reduced precisions gain and cost, on one core: `python benchmarks/engines.py runs/demo --data data/demo` or any bundle.

Every engine and precision that the bundle was evaluated with takes its turn in every round, pinned to one core, one thread each; medians, and
ratios to onnxruntime in fp32 of the same round, once by the clock and once by the time the processor worked, which says more on a busy machine. With a run and its pictures, the test part is scored once by each: IoU, AUROC, and verdicts that
differ from fp32's. Without a bundle a network of the real architecture with random weights is made, which is enough for speed: `python benchmarks/engines.py`.
"""
import argparse
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from defect_detect.core.bundle import Bundle, BundleCard, OperatingPoint, Parity, read_bundle
from defect_detect.core.image import InputSpec
from defect_detect.core.plan import candidates
from defect_detect.core.predictor import Predictor, start_engine


def one_core()->str: # which
    "Stay on one core from now on."
    if not hasattr(os, "sched_setaffinity"): return "no pinning on this system"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return f"core {min(os.sched_getaffinity(0))} alone"


def made(side:int)->Bundle:
    "The real architecture, random weights, int8 from random pictures."
    import torch
    from defect_detect.learn.export import quantise, to_onnx
    from defect_detect.learn.model import make_model
    torch.manual_seed(0)
    spec, rng = InputSpec(height=side, width=side), np.random.default_rng(0)
    model = to_onnx(make_model(6, "none"), spec)
    pairs = (("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8"), ("openvino", "bf16"))
    every = tuple(Parity(engine=e, precision=p, pictures=1, max_difference=0, iou_drop=0, band=0, flips=0) for e, p in pairs)
    card = BundleCard(name="random", classes=("background", *"abcde"), input=spec, operating_point=OperatingPoint(), evaluated=every)
    return Bundle(card, model, b"", "", "", quantise(model, [rng.normal(size=(1, 3, side, side)).astype(np.float32) for _ in range(4)]))


def speed(engines:dict, spec:InputSpec, rounds:int):
    "Print medians and ratios of one picture."
    x = np.random.default_rng(0).normal(size=(1, 3, spec.height, spec.width)).astype(np.float32)
    for e in engines.values(): e.run(x)
    wall, work = ({k: [] for k in engines} for _ in range(2))
    for _ in range(rounds):
        for k, e in engines.items():
            t, c = time.perf_counter(), time.process_time()
            e.run(x)
            wall[k].append(1000*(time.perf_counter()-t))
            work[k].append(1000*(time.process_time()-c))
    print(f"one picture of {spec.width}x{spec.height} px, one thread, {rounds} rounds, {one_core()}; ratios to fp32 in onnxruntime, round by round")
    for k in engines:
        r, q = (np.array(ms["onnxruntime", "fp32"])/np.array(ms[k]) for ms in (wall, work))
        print(f"  {' '.join(k):18} {np.median(wall[k]):7.1f} ms, {np.median(r):5.2f} x   of the processor {np.median(work[k]):7.1f} ms, {np.median(q):5.2f} x (middle half {np.percentile(q, 25):.2f} to {np.percentile(q, 75):.2f})")


def cost(bundle:Bundle, engines:dict, data:str, table:str, part:str):
    "Print what each says of one part of the pictures."
    from defect_detect.core.metrics import auroc
    from defect_detect.data.read import read_table
    from defect_detect.judge.operating import look
    from defect_detect.learn.parity import overlap
    t, op = read_table(table), bundle.card.operating_point
    seen = {k: look(Predictor(bundle, e), data, t[t.split==part]) for k, e in engines.items()}
    want = seen["onnxruntime", "fp32"][0].score.to_numpy()
    print(f"{part} part: {len(want)} pictures; a threshold of {op.score_threshold:.3f}")
    for k, (rows, hist) in seen.items():
        s = rows.score.to_numpy()
        flips = int(((s>=op.score_threshold)!=(want>=op.score_threshold)).sum())
        print(f"  {' '.join(k):18} IoU {overlap(hist, op.pixel_threshold):.4f}   AUROC {auroc(s, rows.bad):.4f}   {flips} verdicts differ from fp32's, scores by {np.abs(s-want).max():.4f} at most")


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("run", nargs="?", type=Path, help="a run or a bundle; none: random weights at 320x320")
    a.add_argument("--data", help="the pictures of the run: score its test part, too")
    a.add_argument("--part", default="test", choices=("test", "valid"))
    a.add_argument("--rounds", type=int, default=40)
    w = a.parse_args()
    if w.run and not w.run.is_dir(): sys.exit(f"error: there is no run or bundle at {w.run}; make run writes one")
    bundle = read_bundle(w.run/"export/bundle" if (w.run/"export").is_dir() else w.run) if w.run else made(320)
    pairs, left_out = candidates(bundle)
    one_core()
    engines = {p: start_engine(bundle, *p) for p in pairs}
    print(f"{bundle.card.name}@{bundle.version or 'none'}")
    for k, why in left_out.items(): print(f"  left out: {' '.join(k)}: {why}")
    speed(engines, bundle.card.input, w.rounds)
    if w.data: cost(bundle, engines, w.data, str(w.run/"prepare/table.csv"), w.part)


if __name__=="__main__": main()
