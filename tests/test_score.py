"Batch scoring: a kill at any moment, parts on several machines, broken pictures, a full disk, two at once: always the same rows, or one clear line."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import wait_for
from test_faults import call, linux, one_line, small_disk

from defect_detect.core.bundle import example_bundle, read_bundle, write_bundle
from defect_detect.run import score as module
from defect_detect.run.score import join_parts, part_name, read_rows, score

N = 600


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "600 small pictures, three of them broken, a bundle, and the rows that nobody disturbed."
    here, rng = tmp_path_factory.mktemp("score"), np.random.default_rng(0)
    for i in range(N):
        v = rng.integers(110, 140, (24, 32)).astype(np.uint8)
        if i%3==0: v[5:12, 6:15] = 20
        (here/"p"/f"{i%7}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(v).save(here/"p"/f"{i%7}"/f"{i}.png")
    for i, bad in ((10, b""), (400, b"GIF89a"), (599, (here/"p/0/0.png").read_bytes()[:60])): (here/"p"/f"{i%7}"/f"{i}.png").write_bytes(bad)
    example_bundle(here/"b")
    score(here/"p", here/"b", here/"whole.parquet")
    return here


# What a planted fault changes, as code that runs in the process that is killed.
FAULTS = dict(none="", half="w = m.write_whole; m.write_whole = lambda p, t: p.write_text(t[:len(t)//2]) if p.name=='00000001.jsonl' else w(p, t)",
              double="old = m.score_stream; m.score_stream = lambda p, *a: old(p if len(p)==600 else [p[0], *p], *a)")
KILLED = "import sys, time; import defect_detect.run.score as m; {fault}\nold_stream = m.score_stream\ndef slow(*a):\n for r in old_stream(*a): time.sleep(.004); yield r\nm.score_stream = slow; m.score(*sys.argv[1:4]); print('done')"


def killed_until_done(place, out, fault, rng, most):
    "Kill `score` at random moments, at most `most` times, then let it end."
    kills = 0
    while True:
        p = subprocess.Popen([sys.executable, "-c", KILLED.format(fault=FAULTS[fault]), place/"p", place/"b", out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/")
        try:
            if kills<most:
                wait_for(lambda: (out.with_name(f".{out.name}.parts")/"plan.json").exists() or p.poll() is not None)
                p.wait(timeout=rng.uniform(0, .9)) # the first time at least, it has more than a second's work before it
            else: p.wait(timeout=120)
        except subprocess.TimeoutExpired: p.send_signal(signal.SIGKILL)
        err = p.communicate()[1].decode()
        if p.returncode==0: return kills
        assert p.returncode==-9, err
        assert not out.exists() or list(read_rows(out))==list(read_rows(place/"whole.parquet")) # only ever whole
        kills += 1


def test_killed_at_random_moments(place, tmp_path, many):
    rng, kills = random.Random(0), 0
    for i in range(many(1, 12)):
        kills += killed_until_done(place, tmp_path/f"{i}.parquet", "none", rng, most=3)
        assert (tmp_path/f"{i}.parquet").read_bytes()==(place/"whole.parquet").read_bytes()
    assert kills and sorted(p.suffix for p in tmp_path.iterdir())==[".parquet"]*many(1, 12), "nothing but the output is left"


def begun(place, out, fault):
    "What a call leaves that ends after its second file of rows."
    stop = "old_write = m.write_whole\ndef stop(p, t):\n old_write(p, t)\n if p.name=='00000001.jsonl': __import__('os')._exit(9)\nm.write_whole = stop"
    r = subprocess.run([sys.executable, "-c", KILLED.format(fault=FAULTS[fault]+"\n"+stop), place/"p", place/"b", out], cwd="/", capture_output=True)
    assert r.returncode==9, r.stderr


@pytest.mark.parametrize("fault", ["half", "double"])
def test_a_kill_sees_a_fault(place, tmp_path, fault):
    "A writer that leaves halves under the real name, and a resume that judges one picture twice."
    out = tmp_path/"o.parquet"
    begun(place, out, fault)
    r = subprocess.run([sys.executable, "-c", KILLED.format(fault=FAULTS[fault]), place/"p", place/"b", out], cwd="/", capture_output=True)
    assert r.returncode or out.read_bytes()!=(place/"whole.parquet").read_bytes()


def test_what_was_judged_is_not_judged_again(place, tmp_path, monkeypatch):
    out = tmp_path/"o.parquet"
    begun(place, out, "none")
    seen, old = [], module.score_picture
    monkeypatch.setattr(module, "score_picture", lambda name, *a: seen.append(name) or old(name, *a))
    score(place/"p", place/"b", out)
    assert len(seen)==N-512 and out.read_bytes()==(place/"whole.parquet").read_bytes()


def test_other_pictures_or_another_bundle_are_refused(place, tmp_path):
    out = tmp_path/"o.parquet"
    begun(place, out, "none")
    b = read_bundle(place/"b")
    write_bundle(tmp_path/"other", b.card.model_copy(update=dict(name="other")), b.model)
    (tmp_path/"p").mkdir()
    shutil.copy(place/"p/0/0.png", tmp_path/"p")
    for source, bundle, why in ((place/"p", tmp_path/"other", "other bundle"), (tmp_path/"p", place/"b", "other pictures")):
        with pytest.raises(module.DataError, match=why): score(source, bundle, out)


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_parts_are_the_whole(place, tmp_path, form):
    for n in (2, 3):
        for i in range(1, n+1): score(place/"p", place/"b", tmp_path/f"{n}.{form}", (i, n))
        join_parts(tmp_path/f"{n}.{form}")
    rows = list(read_rows(place/"whole.parquet"))
    assert list(read_rows(tmp_path/f"2.{form}"))==list(read_rows(tmp_path/f"3.{form}"))==rows and len(rows)==N
    if form=="parquet": assert (tmp_path/"3.parquet").read_bytes()==(place/"whole.parquet").read_bytes()


def test_parts_see_a_fault(place, tmp_path, monkeypatch):
    "Python's own hash is another one in every process."
    monkeypatch.setattr(module, "part_of", lambda name, n: hash((name, os.urandom(4)))%n+1)
    for i in (1, 2): score(place/"p", place/"b", tmp_path/"o.jsonl", (i, 2))
    monkeypatch.undo()
    with pytest.raises(module.DataError, match="belongs to part"): join_parts(tmp_path/"o.jsonl")


def test_broken_pictures_are_rows(place):
    bad = [r for r in read_rows(place/"whole.parquet") if r["error"]]
    assert sorted(r["image"] for r in bad)==["1/400.png", "3/10.png", "4/599.png"] and all(r["verdict"] is None and r["score"] is None and r["regions"] is None for r in bad)
    assert sorted(r["error"].split()[1] for r in bad)==["GIF", "PNG", "picture"]


def test_unreadable_files_are_rows(place, tmp_path, monkeypatch):
    shutil.copytree(place/"p/0", tmp_path/"p")
    (tmp_path/"p/0.png").unlink()
    os.symlink(tmp_path/"p", tmp_path/"p/loop.png") # a folder by another name
    old = module._begin
    monkeypatch.setattr(module, "_begin", lambda *a: (old(*a), (tmp_path/"p/7.png").unlink())) # vanishes after the listing
    out, count = score(tmp_path/"p", place/"b", tmp_path/"o.jsonl")
    assert count["error"]==1 and next(r["error"] for r in read_rows(out) if r["image"]=="7.png")=="no such file or directory"


def pack(folder, to, more=()):
    with zipfile.ZipFile(to, "w") as z:
        for p in sorted(folder.rglob("*.png")): z.write(p, p.relative_to(folder).as_posix())
        for name, data in more: z.writestr(name, data)
    return to


def test_a_zip_is_the_folder(place, tmp_path):
    score(pack(place/"p", tmp_path/"p.zip"), place/"b", tmp_path/"o.parquet")
    assert (tmp_path/"o.parquet").read_bytes()==(place/"whole.parquet").read_bytes() and sorted(p.name for p in tmp_path.iterdir())==["o.parquet", "p.zip"]


def test_a_zip_that_leads_outside_is_refused(place, tmp_path):
    (tmp_path/"in").mkdir()
    got = call("score", pack(place/"p/1", tmp_path/"in/p.zip", [("../../evil.png", b"x")]), "--bundle", place/"b", "--out", tmp_path/"in/o.csv", cwd=tmp_path)
    one_line(got, 1, "nothing was unpacked")
    assert not list(tmp_path.rglob("evil.png")) and not (tmp_path/"in/o.csv").exists()


@linux
def test_a_full_disk_and_on(place):
    with small_disk(150) as (disk, enter, resize):
        words = ("score", place/"p", "--bundle", place/"b", "--out", "/mnt/o.parquet")
        one_line(call(*words, cwd="/", before=enter), 1, "(?i)no space left")
        assert not (disk/"o.parquet").exists() and not list(disk.rglob("*.tmp"))
        done = sorted(p.name for p in (disk/".o.parquet.parts").glob("0*"))
        assert done and all(len((disk/".o.parquet.parts"/p).read_text().splitlines())==256 for p in done)
        resize(8192)
        rc, out, err = call(*words, cwd="/", before=enter)
        assert rc==0, err
        assert (disk/"o.parquet").read_bytes()==(place/"whole.parquet").read_bytes()


def test_two_at_once(place, tmp_path):
    words = [sys.executable, "-c", KILLED.format(fault=""), place/"p", place/"b", tmp_path/"o.parquet"]
    a = subprocess.Popen(words, cwd="/")
    while not (tmp_path/".o.parquet.parts/plan.json").exists(): time.sleep(.02); assert a.poll() is None
    one_line(call("score", place/"p", "--bundle", place/"b", "--out", tmp_path/"o.parquet", cwd="/"), 1, "another process")
    assert a.wait(timeout=120)==0 and (tmp_path/"o.parquet").read_bytes()==(place/"whole.parquet").read_bytes()
    one_line(call("score", place/"p", "--bundle", place/"b", "--out", tmp_path/"o.parquet", cwd="/"), 1, "exists")


def test_light():
    "The command loads neither the training stack nor, for CSV, pyarrow."
    code = "import sys, json; import defect_detect.run.score, defect_detect.cli.score; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    got = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout))
    assert not got&{"torch", "fastai", "fastcore", "pandas", "pyarrow", "papermill", "dvc", "nbdev", "optuna", "filelock"}, got


def test_without_pyarrow(place, tmp_path):
    code = "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n=='pyarrow' else f(n, *a); sys.modules['pyarrow'] = None; from defect_detect.run.score import score; print(score(*sys.argv[1:])[0])"
    run = lambda form: subprocess.run([sys.executable, "-c", code, place/"p/1", place/"b", tmp_path/f"o.{form}"], capture_output=True, text=True, cwd="/")
    assert run("csv").returncode==0 and "needs pyarrow" in run("parquet").stderr


def test_part_names(): assert part_name("a/s.csv", (2, 3))==Path("a/s.2-of-3.csv") and part_name("s.csv", (1, 1))==Path("s.csv")
