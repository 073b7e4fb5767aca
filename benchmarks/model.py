"""One picture through the network, beside its encoder alone on 320 x 320 px: `taskset -c 0 python benchmarks/model.py [--height 256 --width 416]`.

Both as ONNX in onnxruntime with one thread, in this process, turn by turn; medians of the rounds, by the clock and by processor time. The
weights are random: they do not change the time.
"""
import argparse
import io
import time
from statistics import median

import numpy as np
import torch

from defect_detect.core.image import InputSpec
from defect_detect.core.predictor import OrtEngine
from defect_detect.learn.export import to_onnx
from defect_detect.learn.model import make_model


class Last(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x): return self.encoder(x)[-1]


def main():
    a = argparse.ArgumentParser(description=__doc__.split(":")[0])
    for k, v in dict(size=320, height=256, width=416, rounds=60).items(): a.add_argument(f"--{k}", type=int, default=v)
    o = a.parse_args()
    some = lambda *hw: np.random.default_rng(0).normal(size=(1, 3, *hw)).astype(np.float32)
    x = some(o.size, o.size)

    def bare(net):
        f = io.BytesIO()
        torch.onnx.export(Last(net.encoder).eval(), (torch.from_numpy(x),), f, opset_version=17, dynamo=False)
        return OrtEngine(f.getvalue())
    nets = {k: make_model(6, "none", k).eval() for k in ("fpn", "unet")}
    ways = {"encoder alone": (bare(nets["fpn"]), x), **{k: (OrtEngine(to_onnx(n, InputSpec(height=o.height, width=o.width))), some(o.height, o.width)) for k, n in nets.items()}}
    took = {k: [] for k in ways}
    for _ in range(o.rounds):
        for k, (e, x) in ways.items():
            t, c = time.perf_counter(), time.process_time()
            e.run(x)
            took[k].append((time.perf_counter()-t, time.process_time()-c))
    first = [median(v) for v in zip(*took["encoder alone"][3:])]
    for k, v in took.items():
        m = [median(q) for q in zip(*v[3:])]
        print(f"{k:14} {1000*m[0]:.1f} ms, {m[0]/first[0]:.2f} x; {1000*m[1]:.1f} ms of the processor, {m[1]/first[1]:.2f} x")


if __name__=="__main__": main()
