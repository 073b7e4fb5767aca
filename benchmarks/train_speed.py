"""Pictures a second in training, beside the usual way: `python benchmarks/train_speed.py <folder> [--rounds 5] [--steps 12] [--threads 2]`.

Ours as the pipeline trains: `make_loaders` and `train` on crops of 256 px at the scale of 320x320. Beside it fastai's tutorial way: `SegmentationDataLoaders` with its
standard augmentation and `unet_learner(resnet34)` at 224x224. The same pictures, batch size and threads, no validation; turn by turn in
one process, whole steps with everything in them (drawing, decoding where it is not kept, augmenting, both passes, the optimizer). Each
round's ratio stands beside the median. Times are of the clock; the processor's beside them, which others on the machine change less.
"""
import argparse
import time
from pathlib import Path
from statistics import median

import torch
from fastai.callback.core import Callback
from fastai.learner import CancelFitException
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import SegmentationDataLoaders
from fastai.vision.learner import unet_learner
from torchvision.models import resnet34

from defect_detect.core.image import InputSpec
from defect_detect.data.read import classes_of, load_mask, read_data
from defect_detect.data.split import split_by_group
from defect_detect.learn.loaders import Changes, make_loaders
from defect_detect.learn.model import make_model
from defect_detect.learn.train import make_deterministic, train


class Count(Callback):
    "Times `steps` steps after two that do not count, then ends the fit."
    order = 99
    def __init__(self, steps): self.steps, self.n = steps, 0

    def before_batch(self):
        if self.n==2: self.start = time.perf_counter(), time.process_time()

    def after_batch(self):
        self.n += 1
        if self.n<self.steps+2: return
        self.spent = time.perf_counter()-self.start[0], time.process_time()-self.start[1]
        raise CancelFitException


def main():
    a = argparse.ArgumentParser(description=__doc__.split(":")[0])
    a.add_argument("data")
    for k, v in dict(rounds=5, steps=12, threads=2, batch=16, size=320, crop=256, frozen=0).items(): a.add_argument(f"--{k}", type=int, default=v)
    o = a.parse_args()
    t = read_data(o.data)
    t["group"] = t.sha256
    t["split"] = split_by_group(t, dict(train=.9, valid=.1), 0)
    root, classes = Path(o.data), classes_of(t)
    make_deterministic(0, o.threads)
    dls = make_loaders(root, t, classes, InputSpec(height=o.size, width=o.size), o.batch, changes=Changes(crop=o.crop), device="cpu")
    net = make_model(len(classes), frozen=o.frozen)
    torch.use_deterministic_algorithms(False) # the peer's way does not ask for it
    rows = {r.image: r for r in t.itertuples()}
    mask = lambda p: load_mask(root, rows[Path(p).relative_to(root).as_posix()], classes)
    files = [root/i for i in t.image]
    usual = SegmentationDataLoaders.from_label_func(root, files, mask, codes=classes, bs=o.batch, num_workers=0, item_tfms=Resize(224), batch_tfms=aug_transforms(), device=torch.device("cpu"))
    peer = unet_learner(usual, resnet34, pretrained=False)

    def ours():
        make_deterministic(0, o.threads)
        c = Count(o.steps)
        train(dls, net, 1, cbs=[c])
        torch.use_deterministic_algorithms(False)
        return c.spent

    def theirs():
        c = Count(o.steps)
        with peer.no_bar(), peer.no_logging(): peer.fit_one_cycle(1, 1e-3, cbs=[c])
        return c.spent

    pairs = [(ours(), theirs()) for _ in range(o.rounds)]
    n = o.steps*o.batch
    for name, i in (("by the clock", 0), ("by processor time", 1)):
        x, y = [n/p[0][i] for p in pairs], [n/p[1][i] for p in pairs]
        print(f"{name}: ours {median(x):.2f} pictures a second on crops of {o.crop} px, fastai's unet_learner(resnet34) {median(y):.2f} at 224 px: {median([p/q for p, q in zip(x, y)]):.1f} x (each round: {', '.join(f'{p/q:.1f}' for p, q in zip(x, y))})")


if __name__=="__main__": main()
