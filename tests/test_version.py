"A set of pictures as a DVC output: stored, lost and brought back; the same pictures, the same hash; and what git sees of it."
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from defect_detect.data.demo import write_synth
from defect_detect.data.layouts import DataError
from defect_detect.data.lists import add_to_list
from defect_detect.data.read import read_data
from defect_detect.data.version import dvc, read_version, write_version
from defect_detect.run.pipeline import make_run, repro, run_params

ROOT, TOOL = Path(__file__).parents[1], Path(sys.executable).with_name("defect-detect")


def bytes_of(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def mine(tmp_path): return write_synth(tmp_path/"data/mine", tiles=4, exposures=2, bad=.5)


def test_pushed_lost_and_pulled(mine, tmp_path):
    "Two lines set up a store; a clone that has only the .dvc file and the config gets the same bytes."
    v, before, table = write_version(mine), bytes_of(mine), read_data(mine)
    dvc("remote", "add", "-d", "store", str(tmp_path/"store"), cwd=mine.parent)
    dvc("push", cwd=mine.parent)
    for p in (mine, mine.parent/".dvc/cache"): shutil.rmtree(p)
    dvc("pull", "mine.dvc", cwd=mine.parent)
    assert bytes_of(mine)==before and read_data(mine).equals(table) and write_version(mine)==v
    clone = tmp_path/"clone/data"
    (clone/".dvc").mkdir(parents=True)
    shutil.copy(mine.parent/"mine.dvc", clone)
    (clone/".dvc/config").write_text((mine.parent/".dvc/config").read_text().replace(os.path.relpath(tmp_path/"store", mine.parent/".dvc"), str(tmp_path/"store")))
    dvc("pull", cwd=clone)
    assert bytes_of(clone/"mine")==before and write_version(clone/"mine")==v


def test_an_earlier_version_comes_back(mine):
    old, kept, before = write_version(mine), (mine.parent/"mine.dvc").read_bytes(), bytes_of(mine)
    p = next(mine.glob("MT_*/Imgs/*.jpg"))
    p.write_bytes(p.read_bytes()+b" ")
    assert write_version(mine).hash!=old.hash
    (mine.parent/"mine.dvc").write_bytes(kept)
    dvc("checkout", "mine.dvc", cwd=mine.parent)
    assert bytes_of(mine)==before and write_version(mine)==old


CHANGES = dict(a_byte=lambda d: (p := next(d.glob("MT_*/Imgs/*.jpg"))).write_bytes(p.read_bytes()[:-1]+b"x"), a_name=lambda d: (p := next(d.glob("MT_*/Imgs/*.jpg"))).rename(p.with_name("exp9_num_9.jpg")), one_less=lambda d: next(d.glob("MT_*/Imgs/*.png")).unlink(),
               a_place=lambda d: (p := next(d.glob("MT_Free/Imgs/*.jpg"))).rename(d/"MT_Blowhole/Imgs"/p.name),
               a_decision=lambda d: add_to_list(d, "quarantine", [dict(image=read_data(d).image[0], why="x", who="kim", when="2026-01-31")]))


@pytest.mark.parametrize("change", CHANGES)
def test_another_set_another_hash(mine, change):
    v = write_version(mine)
    CHANGES[change](mine)
    assert write_version(mine).hash!=v.hash


def test_the_same_set_the_same_hash(mine, tmp_path):
    "Elsewhere, under another name, with other times and rights, drawn anew, written in another order."
    v = write_version(mine)
    copy = Path(shutil.copytree(mine, tmp_path/"there/other"))
    for p in copy.rglob("*.jpg"):
        os.utime(p, (1, 1))
        p.chmod(0o600)
    again, back = write_synth(tmp_path/"again/x", tiles=4, exposures=2, bad=.5), tmp_path/"back/y"
    for p in sorted(mine.rglob("*"), reverse=True):
        if p.is_file():
            (back/p.relative_to(mine)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, back/p.relative_to(mine))
    assert write_version(copy)==write_version(again)==write_version(back)==v


def test_the_receipt_of_a_run_names_the_version(mine, tmp_path):
    (tmp_path/"nbs/pipeline").mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("n: int = 1", metadata=dict(tags=["parameters"]))]), tmp_path/"nbs/pipeline/1_count.ipynb")
    (tmp_path/"params.yaml").write_text("count: {n: 2}\ndemo: {}\n")
    (tmp_path/"dvc.yaml").write_text(yaml.safe_dump(dict(stages=dict(count=dict(cmd="ls data > names.txt # 1_count.ipynb", deps=["data", "${root}/nbs/pipeline/1_count.ipynb"], params=["count"], outs=["names.txt"])))))
    v = write_version(mine)
    run = make_run("first", mine, run_params(tmp_path), tmp_path)
    repro(run, say=lambda s: None)
    named = next(d["md5"] for d in yaml.safe_load((run/"dvc.lock").read_text())["stages"]["count"]["deps"] if d["path"]=="data")
    assert named==v.hash+".dir"


def test_git_sees_the_version_and_not_the_pictures(mine, tmp_path):
    "With the project's .gitignore: the .dvc file and the config of the store, nothing else of data/."
    write_version(mine)
    shutil.copy(ROOT/".gitignore", tmp_path)
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True, env=env)
    seen = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=tmp_path, check=True, env=env, capture_output=True, text=True).stdout.split("\n")
    assert {s[3:] for s in seen if s}=={".gitignore", "data/mine.dvc", "data/.dvc/config"}


def test_nobody_is_told(mine):
    "Analytics and the question for updates are off in the project itself, for whoever calls dvc by hand."
    write_version(mine)
    for name in ("core.analytics", "core.check_update"): assert dvc("config", name, cwd=mine.parent).strip().lower()=="false"


def test_killed_half_way(mine):
    "kill -9 at several moments, the last part of them while DVC works: no version is written that is none, and the next call goes on."
    want, t0 = write_version(mine), time.monotonic()
    subprocess.run([TOOL, "data", "version", mine], check=True, capture_output=True)
    whole = time.monotonic()-t0
    for part in (.5, .7, .8, .9):
        for p in (mine.parent/"mine.dvc", mine.parent/".dvc/cache"): shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)
        p = subprocess.Popen([TOOL, "data", "version", mine], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try: p.wait(part*whole)
        except subprocess.TimeoutExpired: os.killpg(p.pid, 9)
        p.communicate()
        assert read_version(mine) in (None, want) and write_version(mine)==want


def held_by(mine, cmd):
    "DVC's note of who works on `mine`: this process, which lives."
    (mine.parent/".dvc/tmp/rwlock").write_text(json.dumps(dict(write={str(mine): dict(pid=os.getpid(), cmd=cmd)}, read={str(mine.parent): [dict(pid=os.getpid(), cmd=cmd)]})))


def test_what_a_killed_one_held_is_let_go(mine):
    "The killed one is not buried yet, or left half a note; another command of DVC is named."
    want = write_version(mine)
    held_by(mine, "-c add mine")
    assert write_version(mine)==want
    (mine.parent/".dvc/tmp/rwlock").write_text('{"read": {')
    assert write_version(mine)==want
    held_by(mine, "dvc gc -w")
    with pytest.raises(DataError, match="is busy.*dvc gc -w"): write_version(mine)


def test_the_file_is_replaced_whole(mine):
    "Who has the old file open reads the old text to its end: it is never written in place, where a kill would leave half."
    write_version(mine)
    with open(mine.parent/"mine.dvc") as old:
        next(mine.glob("MT_*/Imgs/*.png")).unlink()
        v, text = write_version(mine), old.read()
    assert v.hash not in text and v.hash in (mine.parent/"mine.dvc").read_text() and text.count("\n")==6


def test_two_at_once(mine):
    "They wait for each other and say the same."
    both = [subprocess.Popen([TOOL, "data", "version", mine], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [(p.communicate(), p.returncode) for p in both]
    assert said[0]==said[1] and said[0][1]==0
