"""A kind of defect that no one was taught: `python benchmarks/novelty.py <folder> [--epochs 4] [--size 320] [--crop 256] [--record FILE]`.

Each kind in turn is kept from training: every part that shows it, good pictures of the part included, goes to the test. What remains is trained and
validated on as ever. Then all pictures of that kind stand against the good pictures of the test part, four times: by the score of the network, which
was taught the other kinds, by the distance from one Gaussian and from a bank of good places in the features of the same network, and by such a bank in
the features as they were before training. Intervals are drawn over parts; the gain over the score is paired. Each kind writes its own file, so a
stopped run goes on.
"""
import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") # before torch: spinning threads ruin a shared machine

import pandas as pd

from defect_detect.core.bundle import BundleCard, NoveltyLevel, OperatingPoint, write_bundle
from defect_detect.core.image import InputSpec
from defect_detect.core.metrics import auroc
from defect_detect.core.predictor import Predictor
from defect_detect.data.groups import find_groups
from defect_detect.data.read import classes_of, load_image, read_data
from defect_detect.data.split import split_by_group
from defect_detect.judge.report import text_table
from defect_detect.judge.score import interval
from defect_detect.learn.export import to_onnx
from defect_detect.learn.loaders import Changes, make_loaders
from defect_detect.learn.model import make_model
from defect_detect.learn.novelty import fit_novelty, novelty_scores
from defect_detect.learn.train import make_deterministic, train

WAYS = dict(score="score, taught the other kinds", gauss="novelty, one Gaussian", bank="novelty, bank of good places", untrained="the same bank before training")


def leave_out(table:pd.DataFrame, kind:str)->pd.DataFrame: # the table whose train and valid parts know nothing of `kind`
    "Send every part that shows `kind` to the test."
    shows = set(table.group[table.label==kind])
    return table.assign(split=table.split.where(~table.group.isin(shows), "test"))


def score(root, table, kind, spec, a)->pd.DataFrame: # image, label, group, and a column for each way
    t = leave_out(table, kind)
    taught = t[t.split!="test"]
    assert kind not in set(taught.label)
    classes = classes_of(taught)
    test = pd.concat([t[t.label==kind], t[(t.split=="test") & (t.label=="good") & ~t.group.isin(t.group[t.label==kind])]]).sort_values("image")
    print(f"{kind}: {(t.split=='train').sum()} pictures to train on, {(t.split=='valid').sum()} to validate; {len(test)} to test, {(test.label==kind).sum()} show it", flush=True)
    make_deterministic(a.seed, a.threads)
    before = make_model(len(classes))
    untrained = novelty_scores(before, fit_novelty(before, root, t, spec, "bank", seed=a.seed), root, test, spec)
    make_deterministic(a.seed, a.threads)
    net = train(make_loaders(root, taught, classes, spec, a.batch, a.seed, changes=Changes(crop=a.crop), device="cpu"), make_model(len(classes)), a.epochs, a.lr, average=a.average).model
    gauss, bank = (fit_novelty(net, root, t, spec, k, seed=a.seed) for k in ("gauss", "bank"))
    with tempfile.TemporaryDirectory() as tmp: # score and bank as they ship: one graph, one pass
        card = BundleCard(name="left-out", classes=classes, input=spec, operating_point=OperatingPoint(score_pixels=100), threads=a.threads, novelty=NoveltyLevel(kind="bank", places=bank.near.out_channels, pictures=1, reached=0))
        pred = Predictor.load(write_bundle(Path(tmp)/"b", card, to_onnx(net, spec, bank)))
        said = [pred.predict([load_image(root, r)])[0] for r in test.itertuples()]
    return test[["image", "label", "group"]].assign(left_out=kind, bad=test.label==kind, score=[p.score for p in said], gauss=novelty_scores(net, gauss, root, test, spec), bank=[p.novelty for p in said], untrained=untrained)


def mean_auroc(way:str): # over the kinds that were left out
    def of(t):
        each = [auroc(k[way].to_numpy(), k.bad.to_numpy()) for _, k in t.groupby("left_out") if k.bad.any() and not k.bad.all()]
        return sum(each)/len(each) if each else float("nan")
    return of


def measure(rows:pd.DataFrame)->dict[str, dict[str, list[float]]]: # way -> kind, mean, gain -> value, low, high
    own = lambda f, t: [round(float(x), 4) for x in (f(t), *interval(t, f))]
    return {w: {**{k: own(mean_auroc(w), rows[rows.left_out==k]) for k in sorted(set(rows.left_out))}, "mean": own(mean_auroc(w), rows),
                **({} if w=="score" else {"gain": own(lambda t, w=w: mean_auroc(w)(t)-mean_auroc("score")(t), rows)})} for w in WAYS}


def main():
    p = argparse.ArgumentParser(description=__doc__.split(":")[0])
    p.add_argument("data")
    for name, default in dict(epochs=4, size=320, crop=256, batch=16, seed=0, threads=2).items(): p.add_argument(f"--{name}", type=int, default=default)
    for name, default in dict(lr=.002, average=.98).items(): p.add_argument(f"--{name}", type=float, default=default)
    p.add_argument("--out", type=Path, default=Path("runs/novelty"), help="where each kind writes its scores")
    p.add_argument("--record", type=Path, help="JSON file for the result")
    a = p.parse_args()
    table, spec, rows = read_data(a.data), InputSpec(height=a.size, width=a.size), []
    table["group"], pairs = find_groups(a.data, table)
    table["split"] = split_by_group(table, dict(train=.6, valid=.15, test=.25), a.seed, pairs=pairs)
    a.out.mkdir(parents=True, exist_ok=True)
    told = {k: v for k, v in vars(a).items() if k not in ("data", "out", "record")}
    for kind in sorted(set(table.label)-{"good"}):
        file = a.out/f"{kind}-{'-'.join(f'{k}{v}' for k, v in told.items())}.csv"
        if not file.exists():
            score(a.data, table, kind, spec, a).to_csv(file.with_suffix(".tmp"), index=False)
            file.with_suffix(".tmp").replace(file)
        rows.append(pd.read_csv(file))
    m, span = measure(pd.concat(rows, ignore_index=True)), lambda v: "{:.3f} [{:.3f}, {:.3f}]".format(*v)
    names = list(m["score"])
    print("\nimage AUROC of the kind that was left out, with 95 % intervals over parts; the gain is over the score, paired\n")
    print(text_table([(name, *(span(v[k]) if k in v else "" for k in (*names, "gain"))) for w, name in WAYS.items() for v in [m[w]]], ("", *names, "gain")))
    if a.record: a.record.write_text(json.dumps(dict(told, measured=m), indent=1)+"\n")


if __name__=="__main__": main()
