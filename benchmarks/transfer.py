"""How far drawn pictures carry: the demo run's bundle on real pictures it never saw, none held back: `python benchmarks/transfer.py <folder>`.

The folder's kinds of defect must be those of the demo set. Needs `make run` before.
"""
import sys

from defect_detect.core.predictor import Predictor
from defect_detect.data.groups import find_groups
from defect_detect.data.read import read_data
from defect_detect.judge.report import kind_rows, metric_rows, text_table
from defect_detect.judge.score import score_pictures, summarise


def main(data:str, bundle:str="runs/demo/export/bundle"):
    pred, table = Predictor.load(bundle, 2), read_data(data)
    table["group"], _ = find_groups(data, table)
    rows = score_pictures(pred, data, table, lambda i, n: print(f"\r{i} of {n}", end="" if i<n else "\n", file=sys.stderr, flush=True))
    m = summarise(rows, pred.card.classes, pred.card.operating_point.score_threshold)
    print(f"{pred.tag} on {len(table)} pictures of {table.group.nunique()} parts")
    print(text_table(metric_rows(m))+"\n\n"+text_table(kind_rows(m)))


if __name__=="__main__":
    if len(sys.argv)<2: sys.exit("error: name the folder of real pictures")
    main(*sys.argv[1:3])
