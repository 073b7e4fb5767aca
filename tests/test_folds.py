"Folds: trained once each, gone on with where they stopped, the same bytes again; a file that is not what was written is refused."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from projects import copy_project
from defect_detect.data.demo import write_synth

TOOL = Path(sys.executable).with_name("defect-detect")
SMALL = [w for p in ("prepare.valid=0.3", "prepare.test=0.3", "train.height=64", "train.width=64", "train.crop=0", "train.epochs=6", "train.batch=4", "train.weights=none", "train.frozen=0", "train.threads=1") for w in ("-p", p)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    room = tmp_path_factory.mktemp("folds")
    write_synth(room/"data", tiles=24, exposures=2, bad=.6, seed=0)
    return copy_project(room/"project")


def words(*more): return [str(TOOL), "run", "folds", "tiles", "--data", "../data", "--folds", "2", *SMALL, *more]


def folds(project, *more, code=0):
    r = subprocess.run(words(*more), cwd=project, env={**os.environ, "PYTHONPATH": str(project)}, capture_output=True, text=True)
    assert r.returncode==code, r.stdout+r.stderr
    return r.stdout+r.stderr


def said(out): return [line for line in out.splitlines() if line.startswith("== fold")]


def test_one_after_the_other(project):
    out = folds(project, "--only", "0")
    kept = project/"models/tiles-folds"
    assert said(out)==["== fold 0 of 2: no file yet"] and "still to be trained: 1" in out
    first, took = (kept/"fold_0.json").read_bytes(), json.loads((kept/"receipt_0.json").read_text())
    assert took["seconds"]>0 and took["machine"]["cores"] and took["versions"]["torch"]
    out = folds(project)
    assert said(out)==["== fold 0 of 2: nothing changed", "== fold 1 of 2: no file yet"] and "still to be" not in out
    assert (kept/"fold_0.json").read_bytes()==first
    rows = [json.loads(p.read_text())["rows"] for p in sorted(kept.glob("fold_*.json"))]
    assert len({r["image"] for f in rows for r in f})==sum(map(len, rows))==48 # every picture once
    assert not {r["group"] for r in rows[0]} & {r["group"] for r in rows[1]} # and no part on both sides


def test_corrected_labels_stand_beside(project):
    rows = json.loads((project/"models/tiles-folds/fold_0.json").read_text())["rows"]
    bad = next(r for r in rows if r["label"]!="good")
    listed = project/"corrections.csv"
    listed.write_text(f"image,given,label,mask,why\n{bad['image']},{bad['label']},good,,no mark to be seen\n")
    out = folds(project, "--corrections", "corrections.csv")
    assert said(out)==[f"== fold {k} of 2: nothing changed" for k in (0, 1)] and "labels as given" in out and "no mark to be seen" in out
    m = json.loads(subprocess.run(words("--corrections", "corrections.csv", "--json"), cwd=project, env={**os.environ, "PYTHONPATH": str(project)}, capture_output=True, text=True).stdout)
    assert m["corrected"]["defective_pictures"]==m["defective_pictures"]-1 and m["corrections"][0]["image"]==bad["image"]
    listed.write_text(listed.read_text().replace(f",{bad['label']},", ",stain,"))
    assert f"{bad['image']} was given as {bad['label']}; the list says stain" in folds(project, "--corrections", "corrections.csv", code=1)
    out = folds(project, "--corrections", "none.csv", "--force", code=1)
    assert "none.csv" in out and not said(out) # before anything is trained


def test_the_same_bytes_after_a_kill(project):
    kept = project/"models/tiles-folds/fold_0.json"
    before = kept.read_bytes()
    run = subprocess.Popen(words("--only", "0", "--force"), cwd=project, env={**os.environ, "PYTHONPATH": str(project)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    for line in run.stdout:
        if "epoch 1/6" in line: break
    else: pytest.fail("no epoch was seen")
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    time.sleep(1) # the kernel is a group of its own; it ends when its parent is gone
    assert kept.read_bytes()==before # what was there stands until the new one is whole
    kept.unlink()
    assert "going on after epoch" in folds(project, "--only", "0")
    assert kept.read_bytes()==before


def test_refusals(project):
    kept = project/"models/tiles-folds/fold_1.json"
    whole = kept.read_text()
    try:
        kept.write_text(whole.replace('"score": 0.', '"score": 1.', 1))
        assert "not those that were written" in folds(project, code=1)
        kept.write_text(whole[:len(whole)//2])
        assert "is no file of a fold" in folds(project, code=1)
        assert "by force" in folds(project, "--only", "1", "--force") and kept.read_text()==whole # the way out
    finally: kept.write_text(whole)
    assert "there is no fold 7; folds are 0..1" in folds(project, "--only", "7", code=1)
    assert said(folds(project, "--only", "1", "-p", "train.epochs=1", code=1))==["== fold 1 of 2: other params"] # and the two no longer agree
