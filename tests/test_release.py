"From a run to production and back with real models: what the gate sees, and that each of its lines can be red."
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from projects import copy_project
from defect_detect.data.demo import write_synth
from defect_detect.release.bounds import Bounds, red
from defect_detect.release.contest import unseen
from defect_detect.release.gate import check_leaks, check_parity, check_receipt, check_target, check_tests, gate
from defect_detect.release.model import read_model
from defect_detect.release.notes import keep_note, record_key
from defect_detect.release.regressions import add_regression

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("defect-detect")
QUICK = [w for p in ("prepare.valid=0.3", "prepare.test=0.4", "train.height=64", "train.width=64", "train.crop=64", "train.epochs=1", "train.batch=4", "train.weights=none", "train.frozen=0", "evaluate.draws=10") for w in ("-p", p)]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


def git(cwd, *words): return subprocess.run(["git", *map(str, words)], cwd=cwd, check=True, capture_output=True, text=True, env=ENV).stdout


def call(project, *words):
    r = subprocess.run([str(TOOL), *map(str, words)], cwd=project, env=ENV, capture_output=True, text=True, timeout=600)
    return r.returncode, r.stdout, r.stderr


def said(project, *words): return json.loads(call(project, "release", *words, "--json")[1])


def commit(project, why):
    git(project, "add", "-A")
    git(project, "commit", "-qm", why)
    git(project, "push", "-q", "origin", "HEAD")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A repository with a bare remote and two real models: `first`, and `worse`, which lets most defects pass."
    at = tmp_path_factory.mktemp("release")
    to = copy_project(at/"project")
    (to/"tools").mkdir()
    for f in ("tools/test.py", "ruff.toml"): shutil.copy(ROOT/f, to/f)
    (to/"models").mkdir()
    (to/"models/gate.yaml").write_text("# a small set, on a machine that does other things\nparts: 3\ntests: [style]\nlatency_ms: 5000\n")
    git(at, "init", "-q", "--bare", "far.git")
    git(to, "init", "-q")
    for k, v in (("user.name", "Ann"), ("user.email", "ann@example.org")): git(to, "config", k, v)
    git(to, "remote", "add", "origin", "../far.git")
    commit(to, "first")
    write_synth(at/"pictures", tiles=24, exposures=2, bad=.6)
    for name, more in (("first", ()), ("worse", ("-p", "export.escape=0.9"))):
        rc, out, err = call(to, "run", "pipeline", name, "--data", at/"pictures", *QUICK, *more)
        assert rc==0, out+err
    return to


def on_record(project, run):
    rc, out, err = call(project, "run", "record", run, "--as", "tiles", "--replace")
    assert rc==0, err
    commit(project, f"{run} on record")


def test_a_life(project):
    "Red without evidence; green with it, to prod; a worse one is red, forced, taken back; each step says why in the tag."
    on_record(project, "first")
    o = said(project, "register", "tiles")
    assert not o["made"] and o["red"]==["repeatable", "tests"] and git(project, "ls-remote", "--tags", "origin")==""
    r = subprocess.run([sys.executable, "tools/test.py", "style", "--note"], cwd=project, env=ENV, capture_output=True, text=True)
    assert r.returncode==0 and "noted for code" in r.stdout, r.stdout+r.stderr
    assert "failed 0, stages {'style'" in call(project, "release", "evidence", "tiles", "--push")[1]
    o = said(project, "register", "tiles")
    assert not o["made"] and o["red"]==["repeatable"] and call(project, "release", "register", "tiles", "--because", "x")[0]==2
    words = ("--because", "repeated on another day", "--by", "Ann")
    assert said(project, "register", "tiles", *words)["ref"]=="tiles@v0.1.0" and said(project, "promote", "dev", *words)["ref"]=="tiles#dev#1" and said(project, "promote", "prod", *words)["ref"]=="tiles#prod#2"
    assert call(project, "release", "check", "tiles#prod#2")[0]==0 and said(project, "promote", "prod")["made"] is False
    on_record(project, "worse")
    o = said(project, "register", "tiles")
    assert {"repeatable", "escape against serving"}<=set(o["red"]) and o["before"]=="v0.1.0" and not o["made"]
    for w in (("register", "tiles"), ("promote", "dev"), ("promote", "prod")): assert said(project, *w, "--because", "the line stands still", "--by", "Bo")["made"]
    o = said(project, "rollback", "prod", "--because", "misses", "--by", "Cy")
    assert (o["version"], o["before"], o["took_back"], o["ref"])==("v0.1.0", "v0.2.0", ["v0.2.0"], "tiles#prod#5")
    d = said(project, "show")["tiles"]
    assert (d["latest"]["version"], d["dev"]["version"], d["prod"]["version"])==("v0.2.0", "v0.2.0", "v0.1.0")
    text = next(e for e in said(project, "history") if e["ref"]=="tiles#prod#4")["message"]
    assert "RED  escape against serving: " in text and text.endswith("Because: the line stands still\nBy: Bo") and git(project, "tag")==""
    rc, out, err = call(project, "release", "bundle", "tiles#prod#5", project.parent/"bundle", "--json")
    assert rc==0 and json.loads(out)["bundle"]==d["prod"]["bundle"], err
    assert call(project, "release", "check", "tiles#prod#4", "--no-gate")[0]==1, "it is not current any more"


def test_every_line_can_be_red(project):
    "One planted fault a line, and no other line."
    on_record(project, "first")
    m = read_model("tiles", root=project)
    table, bounds = m.table, Bounds(parts=1, tests=("style",))
    one = table.group[table.split=="test"].iloc[0]
    leaky = table.assign(group=table.group.where(table.split!="train", one))
    class Leaky(type(m)):
        table = property(lambda self: leaky)
    assert check_leaks(m).ok and not check_leaks(Leaky(**m.__dict__)).ok and not check_leaks(replace(m, metrics={**m.metrics, "leaky_split": True})).ok
    assert all(s.ok for s in check_target(m, bounds)) and red(check_target(replace(m, metrics={**m.metrics, "escape": dict(value=.3, low=.1, high=.5)}), bounds))==["target of escape"]
    b = m.lay_out(project.parent/"parity")
    assert check_parity(b, bounds).ok and not check_parity(b, bounds.model_copy(update=dict(max_difference=1e-12))).ok
    kept = json.loads(b.reference)
    for k in ("onnxruntime fp32",): kept["validation"]["engines"][k]["scores"] = [1-s for s in kept["validation"]["engines"][k]["scores"]]
    assert "differ" in check_parity(replace(b, reference=json.dumps(kept).encode()), bounds).figure
    # repetitions: none, a bad one, a good one; the last counts
    key = record_key(project, "tiles")
    note = dict(kind="replay", outputs=4, differ=[], surroundings=[], cpu="x")
    seen = [red(check_receipt(m, bounds))]
    for when, equal in (("1", False), ("2", True)):
        keep_note(project, "replays", key, dict(note, when=when, equal=equal, differ=[] if equal else ["train"]))
        seen.append(red(check_receipt(m, bounds)))
    assert seen==[["repeatable"], ["repeatable"], []]
    gpu = replace(m, receipt={**m.receipt, "machine": {**m.receipt["machine"], "gpus": ["a card"]}})
    v = m.metrics["auroc"]["value"]
    for when, values in (("3", [v]*4), ("4", [v, v, v, v, v+.2]), ("5", [v, v+.01, v-.01, v, v])):
        keep_note(project, "replays", key, dict(kind="seeds", when=when, metric="auroc", values=dict(enumerate(values))))
        assert ("repeatable" in red(check_receipt(gpu, bounds)))==(when!="5"), when
    # code: a file that is another one at this commit and at that of the run
    lib = project/"defect_detect/core/image.py"
    lib.write_text(lib.read_text()+"\n# other\n")
    commit(project, "other code")
    other = read_model("tiles", root=project)
    assert "code" not in red(check_receipt(other, bounds)) and red(check_receipt(replace(other, receipt={**other.receipt, "git": "no git"}), bounds))[0]=="code"
    assert not check_tests(other, bounds).ok, "the note was about other code"
    git(project, "reset", "-q", "--hard", "HEAD~1")
    git(project, "push", "-qf", "origin", "HEAD")
    # pictures: a reported miss that is not here, too few parts, an answer that takes too long, nothing left to compare on
    picture = project.parent/"miss.png"
    from PIL import Image
    Image.new("L", (64, 64), 90).save(picture)
    add_regression(picture, "crack", "seen by the customer", "Ann", project)
    commit(project, "reported")
    lines = {s.name: s for s in gate(read_model("tiles", root=project), m, Bounds(parts=99, tests=("style",), latency_ms=1e-3, draws=10))}
    assert all(not lines[k].ok for k in ("regressions", "tested on", "latency")) and all(lines[f"{k} against serving"].ok for k in bounds.margin), [str(s) for s in lines.values()]
    assert len(unseen(table, table.assign(split="train"))[0])==0


def test_report(project, tmp_path):
    "Of two runs, of a run without a predecessor, and of one that failed."
    rc, out, err = call(project, "release", "report", "first", "worse", "--draws", 20, "--out", tmp_path/"two", "--link", "notebooks=https://example.org/1")
    text, page = (tmp_path/"two/report.md").read_text(), (tmp_path/"two/report.html").read_text()
    assert rc==0 and text.startswith("<!-- defect-detect report -->\n") and "`export.escape` | `0.05` | `0.9`" in text and "pictures changed verdict" in text and "[notebooks](https://example.org/1)" in text, err
    assert "data:image/png;base64," in page and "<script" not in page and "These parts" in text
    assert call(project, "release", "report", "-", "first", "--out", tmp_path/"one")[0]==0 and "nothing to compare" in (tmp_path/"one/report.md").read_text()
    rc, out, err = call(project, "run", "pipeline", "worse", "--data", project.parent/"pictures", *QUICK, "-p", "export.max_difference=1e-30")
    assert rc==1
    rc, out, err = call(project, "release", "report", "first", "worse", "--out", tmp_path/"failed", "--json")
    assert rc==0 and json.loads(out)["failed"] and "3\\_export.ipynb, cell " in (tmp_path/"failed/report.md").read_text() and "does not answer as torch does" in (tmp_path/"failed/report.md").read_text(), out+err


@pytest.mark.nightly
def test_proved(project):
    "A repetition of a real model is noted, and opens the gate without a word."
    on_record(project, "first")
    git(project, "rm", "-rqf", "--ignore-unmatch", "models/regressions")
    (project/"models/tiles/note.md").write_text("another tree, without notes\n")
    commit(project, "no reports")
    rc, out, err = call(project, "release", "prove", "tiles", "--data", project.parent/"pictures", "--json")
    assert rc==0 and json.loads(out)["equal"], out+err
    assert subprocess.run([sys.executable, "tools/test.py", "style", "--note"], cwd=project, env=ENV).returncode==0
    o = said(project, "check", "tiles")
    assert o["ok"] and "repeatable" not in o["red"], o
