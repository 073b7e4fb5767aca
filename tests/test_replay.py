"A model on record is rebuilt from its commit; what would prove nothing is refused; nothing stays behind."
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from projects import copy_project
from defect_detect.core.bundle import sha256
from defect_detect.data.demo import write_synth
from defect_detect.run.record import read_recorded
from defect_detect.run.replay import _differs
from defect_detect.run.verify import dvc_hash

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("defect-detect")
QUICK = [w for p in ("prepare.valid=0.3", "prepare.test=0.3", "train.height=64", "train.width=64", "train.epochs=1", "train.batch=4", "train.weights=none", "train.frozen=0", "evaluate.draws=10") for w in ("-p", p)]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def git(cwd, *words): return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], cwd=cwd, check=True, capture_output=True, text=True, env=ENV).stdout


def call(project, *words, library=ROOT):
    "Exit code and all that was said; `library` is the one of whoever types."
    r = subprocess.run([str(TOOL), *map(str, words)], cwd=project, env={**ENV, "PYTHONPATH": str(library)}, capture_output=True, text=True, timeout=600)
    return r.returncode, r.stdout, r.stderr


def worktrees(project): return [p for p in (project/"runs/.replay").iterdir() if p.is_dir()], len(git(project, "worktree", "list").splitlines())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A model on record at tag v1; its library writes a word into the card that no other library writes."
    to = copy_project(tmp_path_factory.mktemp("replay")/"project")
    page = to/"defect_detect/judge/card.py"
    assert page.read_text().count("It assists a person")==1
    page.write_text(page.read_text().replace("It assists a person", "It assists a person of then"))
    git(to, "init", "-q")
    git(to, "add", ".")
    git(to, "commit", "-qm", "first")
    write_synth(to.parent/"pictures", tiles=18, exposures=2, bad=.6)
    rc, out, err = call(to, "run", "pipeline", "first", "--data", to.parent/"pictures", *QUICK, library=to)
    assert rc==0, out+err
    (to/"data/.dvc").mkdir(parents=True)
    (to/"data/.dvc/config").write_text('[core]\n    remote = store\n[\'remote "store"\']\n    url = ../../../far\n')
    rc, out, err = call(to, "run", "record", "first", "--as", "tiles")
    assert rc==0 and "outputs pushed to the remote store" in out, out+err
    git(to, "add", "models")
    git(to, "commit", "-qm", "tiles on record")
    git(to, "tag", "v1")
    # since then: other code, other defaults, and the run itself is gone
    page.write_text(page.read_text().replace("of then", "of now"))
    (to/"params.yaml").write_text((to/"params.yaml").read_text().replace("decoder: fpn", "decoder: unet"))
    git(to, "commit", "-qam", "later")
    shutil.rmtree(to/"runs")
    return to


def test_push_and_fetch(project):
    "Every output of the record is in the remote, and comes back."
    from defect_detect.run.store import cached_files, fetch
    _, files, receipt = read_recorded("v1", "tiles", project)
    lock = yaml.safe_load(files["dvc.lock"])
    assert cached_files(lock, "train", project) is None and fetch(files["dvc.lock"], project)=="store"
    for s in lock["stages"].values():
        for o in s["outs"]: assert len(cached_files(lock, o["path"], project))==o["nfiles"]
    assert cached_files(lock, "evaluate", project)["card.md"].read_bytes()==files["card.md"]
    shutil.rmtree(project/"runs/.cache")


def test_replay(project, many):
    "Rebuilt at the tag, or where the record only lies, with the code of its run: every byte, every time."
    for i in range(n := many(1, 10)):
        ref = ("v1", "HEAD")[i%2]
        rc, out, err = call(project, "run", "replay", ref, "tiles", "--data", project.parent/"pictures")
        assert rc==0 and "4 of 4 outputs equal" in out and all(f"== {s} (" in out for s in ("prepare", "train", "export", "evaluate")) and "from the cache" not in out, out+err
        assert worktrees(project)==([], 1)
    print(f"replayed {n} of {n}")


def test_a_difference_is_seen(project, tmp_path):
    "Against a record of other bytes: which file, and where in it; also when only its hash is known."
    _, files, receipt = read_recorded("v1", "tiles", project)
    lock = yaml.safe_load(files["dvc.lock"])
    md5 = next(o["md5"] for o in lock["stages"]["evaluate"]["outs"])
    shutil.copytree(ROOT/"nbs/pipeline", tmp_path/"evaluate/x") # not what was recorded
    (tmp_path/"evaluate/metrics.json").write_text(json.dumps({**json.loads(files["metrics.json"]), "pictures": -1}))
    found = _differs(tmp_path, "evaluate", md5, lock, receipt, files, project)
    assert found["metrics.json"].startswith("pictures: ") and found["card.md"]=="missing in the replay" and found["x/2_train.ipynb"]=="only in the replay"
    (project.parent/"far").rename(project.parent/"lost")
    shutil.rmtree(project/"runs/.cache")
    try: assert _differs(tmp_path, "evaluate", md5, lock, receipt, files, project)=={"metrics.json": found["metrics.json"]}
    finally: (project.parent/"lost").rename(project.parent/"far")
    assert _differs(tmp_path, "evaluate", dvc_hash(tmp_path/"evaluate"), lock, receipt, files, project)["metrics.json"]==""


def test_a_tag_is_compared(project):
    "The run is gone; its predictions come from the remote, else its numbers stand alone."
    words = ("run", "compare", "v1", "v1:tiles", "--draws", 10, "--json")
    rc, out, err = call(project, *words)
    d = json.loads(out)
    assert rc==0 and d["missing"]==[] and d["tested"]["common"]>0 and d["params"]=={} and d["metrics"]["auroc"]["difference"]["value"]==0, err
    shutil.rmtree(project/"runs/.cache")
    (project.parent/"far").rename(project.parent/"lost")
    try: d = json.loads(call(project, *words)[1])
    finally: (project.parent/"lost").rename(project.parent/"far")
    assert d["missing"]==["v1", "v1:tiles"] and d["metrics"]["auroc"]["a"] and d["metrics"]["auroc"]["difference"]["value"] is None


def refused(project, ref, why, *words):
    rc, out, err = call(project, "run", "replay", ref, "tiles", *words)
    assert rc in (1, 2) and why in err and err.count("\n")==1 and out=="", out+err
    assert worktrees(project)==([], 1)


def test_refusals(project):
    pictures = project.parent/"pictures"
    one = sorted(pictures.rglob("*.jpg"))[3]
    whole = one.read_bytes()
    one.write_bytes(whole[:-1]+bytes([whole[-1]^1])) # one bit of one picture
    refused(project, "v1", "holds other pictures than the record was made with", "--data", pictures)
    one.write_bytes(whole)
    refused(project, "v1", "are neither here nor in a remote; give their folder with --data")
    refused(project, "v1", "there is no such folder", "--data", project/"no")
    git(project, "checkout", "-q", "-b", "forged", "v1")
    place = project/"models/tiles"
    receipt = json.loads((place/"run.json").read_text())
    for what, change, why in (("versions", lambda r: r["versions"].update(torch="2.0.0", numpy="1.0"), "then 1.0; torch"), ("code", lambda r: r.update(git="no git"), "made with code that is neither")):
        r = json.loads(json.dumps(receipt))
        change(r)
        (place/"run.json").write_text(json.dumps(r))
        if what=="code": (project/"defect_detect/judge/report.py").write_text("broken")
        git(project, "commit", "-qam", what)
        refused(project, "forged", why, "--data", pictures)
    (place/"dvc.lock").write_bytes((place/"dvc.lock").read_bytes()+b"\n")
    git(project, "commit", "-qam", "lock")
    refused(project, "forged", "not whole: its run.json is of another dvc.lock", "--data", pictures)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_stays(project, how):
    "Stopped in the middle: no process goes on; Ctrl-C takes the worktree away, after a kill the next call does."
    p = subprocess.Popen([str(TOOL), "run", "replay", "v1", "tiles", "--data", str(project.parent/"pictures")], cwd=project, env={**ENV, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) # a shell may have it ignored
    for line in p.stdout:
        if "== prepare" in line: break
    else: pytest.fail(p.stderr.read())
    below = psutil.Process(p.pid).children(recursive=True)
    assert below and worktrees(project)[1]==2
    p.send_signal(how)
    p.communicate(timeout=60)
    gone, alive = psutil.wait_procs(below, timeout=30)
    assert not alive
    if how==signal.SIGINT: assert p.returncode==130 and worktrees(project)==([], 1)
    else:
        assert worktrees(project)[1]==2
        refused(project, "v1", "there is no such folder", "--data", project/"no")


@pytest.mark.nightly
def test_two_at_once_and_a_forged_record(project):
    "Two replays do not meet; a record with a hash of other weights is found out."
    words = [str(TOOL), "run", "replay", "v1", "tiles", "--data", str(project.parent/"pictures")]
    both = [subprocess.Popen(words, cwd=project, env={**ENV, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for p in both:
        out, err = p.communicate(timeout=900)
        assert p.returncode==0 and "4 of 4 outputs equal" in out, out+err
    git(project, "checkout", "-q", "-B", "false", "v1")
    place = project/"models/tiles"
    lock = yaml.safe_load((place/"dvc.lock").read_text())
    lock["stages"]["evaluate"]["outs"][0]["md5"] = "0"*32+".dir"
    (place/"dvc.lock").write_text(yaml.safe_dump(lock))
    (place/"run.json").write_text(json.dumps({**json.loads((place/"run.json").read_text()), "dvc_lock": sha256((place/"dvc.lock").read_bytes())}))
    git(project, "commit", "-qam", "false")
    rc, out, err = call(project, "run", "replay", "false", "tiles", "--data", project.parent/"pictures")
    assert rc==1 and "3 of 4 outputs equal" in out and "another hash" in out and worktrees(project)==([], 1), out+err
