"A leaky split from end to end, and what the audit finds on real pictures where DEFECT_DATA names them, else on drawn ones."
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from defect_detect.core.files import write_whole
from defect_detect.data.conflicts import agreement_by_kind, find_conflicts, mask_agreement
from defect_detect.data.demo import write_synth
from defect_detect.data.groups import find_groups
from defect_detect.data.read import read_data, read_table, write_table
from defect_detect.data.split import LEAKY, is_leaky, leaks, split_by_group
from defect_detect.judge.page import write_page
from defect_detect.serve.api import Settings, background

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("defect-detect")


def stage(name, out, *params, book=None):
    words = [w for p in params for w in ("-p", p)]
    return subprocess.run([TOOL, "run", ROOT/f"nbs/pipeline/{name}.ipynb", "-o", book or out/f"notebooks/{name}.ipynb", *words], cwd=out, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run whose split by picture was asked for."
    d = tmp_path_factory.mktemp("leaky")
    write_synth(d/"data", tiles=14, exposures=3, seed=4, bad=.6)
    said = {}
    for name, *params in (("1_prepare", "by=picture", "leaky=true", "out=prepare"),
                          ("2_train", "table=prepare/table.csv", "out=train", "epochs=1", "height=64", "width=64", "weights=none"),
                          ("3_export", "table=prepare/table.csv", "train=train", "out=export", "name=tiles"),
                          ("4_evaluate", "table=prepare/table.csv", "bundle=export/bundle", "out=evaluate", "draws=10")):
        r = stage(name, d, "data=data", *params)
        assert r.returncode==0, r.stdout+r.stderr
        said[name] = r.stdout
    return d, said


def test_a_leaky_split_is_refused_before_anything_is_written(tmp_path):
    write_synth(tmp_path/"data", tiles=14, exposures=3, seed=4, bad=.6)
    r = stage("1_prepare", tmp_path, "data=data", "by=picture", "out=prepare")
    assert r.returncode==1 and "the split leaks in" in r.stderr and "leaky=True" in r.stderr and r.stderr.count("\n")==1, r.stderr
    assert not (tmp_path/"prepare").exists()


def test_a_clean_split_is_not_marked_and_keeps_its_sides(tmp_path):
    "`leaky` allows, it does not claim; parts.csv beside the pictures says who stays where, whatever the seed."
    data = write_synth(tmp_path/"data", tiles=20, exposures=2, seed=1, bad=.6)
    t = read_data(data).merge(pd.read_csv(data/"truth.csv")[["image", "tile"]]).assign(group=lambda t: "t"+t.tile.astype(str))
    t["split"] = split_by_group(t, {"train": .4, "valid": .3, "test": .3}, 5)
    t[["image", "group", "split"]].iloc[:30].to_csv(data/"parts.csv", index=False) # the last ten pictures are new
    r = stage("1_prepare", tmp_path, "data=data", "leaky=true", "valid=0.3", "test=0.3", "seed=7", "out=prepare")
    assert r.returncode==0 and "30 pictures stay on their side" in r.stdout, r.stdout+r.stderr
    got = read_table(tmp_path/"prepare/table.csv")
    assert not is_leaky(got) and not json.loads((tmp_path/"prepare/checks.json").read_text())["leaky_split"] and leaks(got)==[]
    assert got.set_index("image").split[t.image[:30]].tolist()==t.split[:30].tolist()
    assert pd.read_csv(tmp_path/"prepare/parts.csv").image.tolist()==got.image.tolist()


@pytest.mark.parametrize("name,hide,params", [("2_train", "pair", ["out=x"]), ("3_export", "group", ["train=train", "out=x"]), ("4_evaluate", "pair", ["bundle=export/bundle", "out=x"])])
def test_a_table_that_lost_its_mark_is_refused(run, tmp_path, name, params, hide):
    "Whether the groups tell, or only the verified pairs beside the table."
    d, _ = run
    t = read_table(d/"prepare/table.csv").drop(columns="leaky_split")
    write_table(t if hide=="group" else t.assign(group=t.image), tmp_path/"table.csv")
    shutil.copy(d/"prepare/pairs.csv", tmp_path)
    r = stage(name, d, "data=data", f"table={tmp_path/'table.csv'}", *params, book=tmp_path/"o.ipynb")
    assert r.returncode==1 and "the split leaks in" in r.stderr and ("the pixels show one part" in r.stderr)==(hide=="pair"), r.stderr
    assert not (d/"x").exists()


def test_the_table_and_the_checks_say_it(run):
    d, said = run
    t = read_table(d/"prepare/table.csv")
    assert is_leaky(t) and t.leaky_split.all() and leaks(t)
    c = json.loads((d/"prepare/checks.json").read_text())
    assert c["leaky_split"] and next(s for s in c["siblings"] if s["side"]=="test")["with_sibling"]>0
    assert LEAKY.upper() in said["1_prepare"]


def test_training_says_it(run):
    d, said = run
    assert LEAKY.upper() in said["2_train"] and f"validation ({LEAKY})" in said["2_train"]
    assert pd.read_csv(d/"train/history.csv").leaky_split.all() and json.loads((d/"train/model.json").read_text())["leaky_split"]


def test_the_bundle_says_it(run):
    d, said = run
    card = json.loads((d/"export/bundle/bundle.json").read_text())
    assert card["operating_point"]["chosen_for"].startswith(LEAKY) and json.loads((d/"export/bundle/reference.json").read_text())["leaky_split"]
    assert json.loads((d/"export/export.json").read_text())["operating_point"]["chosen_for"].startswith(LEAKY) and LEAKY in said["3_export"]
    r = subprocess.run([TOOL, "bundle", "show", d/"export/bundle"], capture_output=True, text=True, timeout=60)
    assert LEAKY in r.stdout, r.stdout+r.stderr


def test_the_service_says_it(run):
    with background(Settings(bundle=run[0]/"export/bundle", threads=1)) as url:
        assert httpx.get(f"{url}/v1/model", timeout=60).json()["operating_point"]["chosen_for"].startswith(LEAKY)


def test_metrics_tables_and_card_say_it(run):
    d, said = run
    assert json.loads((d/"evaluate/metrics.json").read_text())["leaky_split"] is True
    with open(d/"evaluate/predictions.csv", newline="", encoding="utf-8") as f: assert {r["leaky_split"] for r in csv.DictReader(f)}=={"True"}
    card = (d/"evaluate/card.md").read_text()
    assert card.splitlines()[0].endswith(f"({LEAKY})") and "No picture of these parts" not in card
    for name in ("image AUROC", "pooled IoU", "overkill", "escape"): assert f"{name} ({LEAKY})" in said["4_evaluate"] and f"{name} ({LEAKY})" in card
    book = (d/"notebooks/4_evaluate.ipynb").read_text()
    m = json.loads((d/"evaluate/metrics.json").read_text())
    for name in (*m["by_kind"], *m["by_part"]["ways"]): assert f"{name} ({LEAKY})" in said["4_evaluate"], name
    for name in ("kind_and_exposure", "kind_confusion", "sizes_found", "spread", "votes", "reliability"): assert f"name_sheet(show_{name}(" in book, name


def test_the_end_of_a_run_says_it(run, capsys):
    from defect_detect.cli.run import _report
    _report(run[0], {})
    out = capsys.readouterr().out
    assert LEAKY.upper() in out and f"image AUROC ({LEAKY})" in out and f"pooled IoU ({LEAKY})" in out


def test_a_marked_bundle_marks_numbers_on_a_clean_table(run, tmp_path):
    "Training saw photographs of the tested parts: a clean-looking table does not undo that."
    d, _ = run
    t = read_table(d/"prepare/table.csv").drop(columns="leaky_split")
    write_table(t.assign(split="test"), tmp_path/"table.csv")
    r = stage("4_evaluate", d, "data=data", f"table={tmp_path/'table.csv'}", "bundle=export/bundle", f"out={tmp_path/'out'}", "draws=10", book=tmp_path/"o.ipynb")
    assert r.returncode==0 and json.loads((tmp_path/"out/metrics.json").read_text())["leaky_split"] is True, r.stderr


def test_the_page_says_it(run):
    d, _ = run
    write_whole(d/"params.yaml", "root: .\n")
    text = write_page(d).read_text()
    assert text.count(LEAKY)>15 and "neither training nor the threshold" not in text


def plant(data, to):
    "Copy drawn pictures and plant: a defective one filed as good, and three emptied masks."
    shutil.copytree(data, to)
    t = read_data(to)
    hidden = t[t.label=="blowhole"].iloc[1]
    new = f"MT_Free/Imgs/{Path(hidden.image).name}"
    (to/hidden.image).rename(to/new)
    (to/hidden["mask"]).unlink()
    Image.fromarray(np.zeros((hidden.height, hidden.width), np.uint8)).save((to/new).with_suffix(".png"))
    empty = t[t.label=="uneven"].iloc[:3]
    for r in empty.itertuples(): Image.fromarray(np.zeros((r.height, r.width), np.uint8)).save(to/r.mask)
    with open(to/"truth.csv", newline="", encoding="utf-8") as f: tile = {r["image"]: r["tile"] for r in csv.DictReader(f)}
    beside = next(i for i in t.image[t.label=="blowhole"] if tile[i]==tile[hidden.image] and i!=hidden.image)
    return (new, beside), list(empty.image)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    "Folder, grouped table, pairs; what must be found: (filed as good, beside), empty masks."
    if os.environ.get("DEFECT_DATA"):
        data = Path(os.environ["DEFECT_DATA"])
        want = ("MT_Free/Imgs/exp4_num_346361.jpg", "MT_Blowhole/Imgs/exp3_num_346347.jpg"), [f"MT_Uneven/Imgs/{n}.jpg" for n in ("exp3_num_45042", "exp4_num_45057", "exp4_num_124690")]
    else:
        tmp = tmp_path_factory.mktemp("planted")
        data = tmp/"bad"
        want = plant(write_synth(tmp/"d", tiles=30, seed=6, bad=.4), data)
    t = read_data(data)
    t["group"], pairs = find_groups(data, t)
    return data, t, pairs, want


def test_conflicts_are_found_without_being_told(grouped):
    data, t, pairs, ((hidden, beside), empty) = grouped
    agree = mask_agreement(data, t, pairs)
    found = find_conflicts(data, t, pairs, agree).set_index("image")
    assert {hidden, beside, *empty}<=set(found.index)
    assert found.group[hidden]==found.group[beside] and "the label is good" in found.disagrees[hidden]
    assert all("marks nothing" in found.disagrees[i] for i in empty)
    if os.environ.get("DEFECT_DATA"): # the reference values of the data set, two of which leave out nearly empty masks or cut regions
        for kind, iou in dict(blowhole=.72, crack=.55, **{"break": .89}).items(): assert abs(agreement_by_kind(agree)[kind]["iou"]-iou)<.1, (kind, agreement_by_kind(agree))


def test_nothing_is_invented_on_a_clean_set(tmp_path):
    data = write_synth(tmp_path/"d", tiles=30, seed=6, bad=.4)
    t = read_data(data)
    t["group"], pairs = find_groups(data, t)
    agree = mask_agreement(data, t, pairs)
    assert len(agree)>50 and len(find_conflicts(data, t, pairs, agree))==0
    assert leaks(t.assign(split=split_by_group(t, pairs=pairs)), pairs)==[]


def test_a_published_split_by_picture_leaks(grouped, tmp_path):
    "Real or drawn: nearly every test picture has a sibling in train; by part none has, and the table of the pipeline passes."
    data, t, pairs, _ = grouped
    for name, group in (("picture", t.image), ("part", t.group)):
        pd.DataFrame(dict(name=t.image.map(lambda i: Path(i).name), set=split_by_group(t.assign(group=group), {"train": .7, "test": .3}, 0, pairs=pairs if name=="part" else None))).to_csv(tmp_path/f"{name}.csv", index=False)
        r = subprocess.run([TOOL, "data", "leaks", tmp_path/f"{name}.csv", "--data", data, "--json"], capture_output=True, text=True, timeout=900)
        said = json.loads(r.stdout)
        share = next(s["share"] for s in said["labels"] if s["label"]=="all")
        assert (r.returncode, said["leaky"])==((1, True) if name=="picture" else (0, False)), r.stderr
        assert share>(.95 if os.environ.get("DEFECT_DATA") else .8) if name=="picture" else share==0, share
