"""What a leaky split claims: `python benchmarks/leak_gap.py <folder> [--folds 4] [--epochs 10] [--size 224] [--record FILE]`.

The same test pictures, the same recipe, the same number of training pictures of each kind and the same number of steps, twice. "By part": no
training picture shows a part of the test. "By picture": some training pictures are taken out at random and the other photographs of the test
parts put in, as a random split by picture would. Grouped folds, every part tested once with half of its pictures; intervals are drawn over parts,
the difference is paired. Each training writes its own file, so a stopped run goes on.
"""
import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader

from defect_detect.core.bundle import BundleCard, OperatingPoint, write_bundle
from defect_detect.core.image import InputSpec
from defect_detect.core.metrics import auroc, average_precision, overkill_at
from defect_detect.core.predictor import Predictor
from defect_detect.data.groups import find_groups
from defect_detect.data.read import classes_of, read_data
from defect_detect.data.split import split_by_group
from defect_detect.judge.report import text_table
from defect_detect.judge.score import interval, paired_difference, pooled_iou, score_pictures
from defect_detect.learn.export import to_onnx
from defect_detect.learn.loaders import BalancedDL, Pictures, draw_weights
from defect_detect.learn.model import make_model
from defect_detect.learn.train import make_deterministic, train


def arms(table:pd.DataFrame, fold:str, seed:int)->tuple[pd.DataFrame, dict[str, pd.DataFrame]]: # test pictures; arm -> training pictures
    "Half of each test part's pictures is tested; the other half is what a careless split would train on."
    rng, mine = np.random.default_rng([seed, int(fold)]), table.fold==fold
    order = pd.Series(rng.random(len(table)), table.index)
    place, size = order[mine].groupby(table.group[mine]).rank(), table[mine].groupby("group").image.transform("size")
    test = table[mine][place<=(size+1)//2]
    siblings, others = table[mine].drop(test.index), table[~mine]
    drop = [i for kind, n in siblings.label.value_counts().items() for i in order[others.index[others.label==kind]].sort_values().index[:n]]
    leaky = pd.concat([others.drop(drop), siblings]).sort_values("image")
    return test, {"by part": others, "by picture": leaky}


def fit(root, train_part, test, classes, spec, epochs, seed):
    make_deterministic(seed, torch.get_num_threads())
    draws, changes = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    a = BalancedDL(Pictures(root, train_part, classes, spec, changes), draw_weights(train_part), draws, bs=8, num_workers=0)
    b = DataLoader(Pictures(root, test.head(8), classes, spec), bs=8, num_workers=0, shuffle=False) # shown, never used to choose
    return train(DataLoaders(a, b), make_model(len(classes)), epochs).model


def score(net, root, test, classes, spec):
    with tempfile.TemporaryDirectory() as tmp:
        card = BundleCard(name="leak-gap", classes=classes, input=spec, operating_point=OperatingPoint())
        return score_pictures(Predictor.load(write_bundle(Path(tmp)/"b", card, to_onnx(net, spec)), torch.get_num_threads()), root, test)


STATS = {"image AUROC": lambda t: auroc(t.score, t.bad), "average precision": lambda t: average_precision(t.score, t.bad), "overkill at 5 % escape": lambda t: overkill_at(t.score, t.bad) if t.bad.any() else float("nan"),
         "pooled IoU, defective": lambda t: pooled_iou(t[t.bad]), "region recall": lambda t: t.found.sum()/t.true.sum() if t.true.sum() else float("nan")}


def measure(rows:dict[str, pd.DataFrame])->dict[str, dict[str, list[float]]]: # statistic -> split by part, by picture, gap -> value, low, high
    a, b = rows["by part"], rows["by picture"]
    own = lambda t, f: [f(t), *interval(t, f)]
    return {k: {n: [round(float(x), 4) for x in v] for n, v in (("by part", own(a, f)), ("by picture", own(b, f)), ("gap", paired_difference(a, b, f)))} for k, f in STATS.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.split(":")[0])
    p.add_argument("data")
    for name, default in dict(folds=4, epochs=10, size=224, seed=0).items(): p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--out", type=Path, default=Path("runs/leak_gap"), help="where each training writes its scores")
    p.add_argument("--record", type=Path, help="JSON file for the result; judge.survey.show_gap draws it")
    a = p.parse_args()
    table, spec = read_data(a.data), InputSpec(height=a.size, width=a.size)
    table["group"], _ = find_groups(a.data, table)
    table["fold"] = split_by_group(table, {str(i): 1/a.folds for i in range(a.folds)}, a.seed)
    classes, rows = classes_of(table), {"by part": [], "by picture": []}
    a.out.mkdir(parents=True, exist_ok=True)
    for f in sorted(set(table.fold)):
        test, parts = arms(table, f, a.seed)
        for arm, part in parts.items():
            file = a.out/f"{arm.replace(' ', '_')}-{f}of{a.folds}-{a.size}px-{a.epochs}epochs-seed{a.seed}.csv"
            if not file.exists():
                print(f"fold {f}, {arm}: {len(part)} training pictures, {len(set(part.group)&set(test.group))} of {test.group.nunique()} test parts among them; {len(test)} test pictures", flush=True)
                r = score(fit(a.data, part, test, classes, spec, a.epochs, a.seed), a.data, test, classes, spec)
                r.drop(columns="confusion").to_csv(file.with_suffix(".tmp"), index=False)
                file.with_suffix(".tmp").replace(file)
            rows[arm].append(pd.read_csv(file))
    rows = {k: pd.concat(v, ignore_index=True) for k, v in rows.items()}
    t, m = rows["by part"], measure(rows)
    print(f"\n{len(t)} test pictures of {t.group.nunique()} parts, {t.bad.sum()} of {t[t.bad].group.nunique()} defective; 95 % intervals over parts\n")
    span = lambda v: "{:.3f} [{:.3f}, {:.3f}]".format(*v)
    print(text_table([(k, span(v["by part"]), span(v["by picture"]), span(v["gap"])) for k, v in m.items()], ("what", "split by part", "split by picture", "the leak gap, paired")))
    if a.record: a.record.write_text(json.dumps(dict(test_pictures=len(t), test_parts=t.group.nunique(), defective_pictures=int(t.bad.sum()), defective_parts=t[t.bad].group.nunique(),
                                                     folds=a.folds, epochs=a.epochs, size=a.size, seed=a.seed, measured=m), indent=1)+"\n")


if __name__=="__main__": main()
