"Somebody else's pictures: zips that want more than to be unpacked, kills half way, and the command line around them."
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from evil_zips import evil

from defect_detect.data.archive import Caps, keep_unpacked, unpack
from defect_detect.data.convert import convert_data
from defect_detect.data.demo import write_synth
from defect_detect.data.layouts import DataError
from defect_detect.data.read import classes_of, load_mask, read_data, recognise

TOOL = Path(sys.executable).with_name("defect-detect")
CAPS = Caps(size=8*2**20, free=2**20)
NAMES = sorted(evil(Path("x")))


def tree(root):
    "Every name below `root` with its kind and content."
    out = {}
    for p in sorted(root.rglob("*")):
        m = p.lstat().st_mode
        out[p.relative_to(root).as_posix()] = (stat.S_IFMT(m), hashlib.sha256(p.read_bytes()).hexdigest() if stat.S_ISREG(m) else os.readlink(p) if stat.S_ISLNK(m) else "")
    return out


def written():
    "Bytes that this process has passed to write so far."
    io = Path("/proc/self/io")
    return int(dict(s.split(": ") for s in io.read_text().splitlines())["wchar"]) if io.exists() else 0


def faults(tmp, name, unpacker):
    "What is wrong with `unpacker` when it gets the evil zip `name`: nothing, if it is ours."
    tmp = tmp/"box" # what slips further is still below pytest's folder
    (tmp/"outside").mkdir(parents=True)
    (tmp/"outside/secret.png").write_bytes(b"secret")
    (tmp/"x.zip").write_bytes(evil(tmp/"outside")[name]())
    (tmp/"work").mkdir()
    before, start, out = tree(tmp), written(), []
    try: unpacker(tmp/"x.zip", tmp/"work/target")
    except DataError as e: out += ["more than one line"] if "\n" in str(e) or not str(e) else []
    except Exception as e: out.append(f"died: {type(e).__name__}")
    else: out.append("accepted")
    if written()-start>CAPS.size+2**16: out.append("more than the cap written")
    after = tree(tmp)
    if {k: v for k, v in after.items() if not k.startswith("work")}!={k: v for k, v in before.items() if not k.startswith("work")}: out.append("outside changed")
    if after.keys()-before.keys(): out.append("something left")
    return out


def test_there_are_forty(): assert len(NAMES)>=40


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("whole", [False, True])
def test_an_evil_zip_is_refused(tmp_path, name, whole): assert faults(tmp_path, name, lambda z, t: unpack(z, t, CAPS, whole=whole))==[]


THROUGH = [{"a": ".", "b": "a/.."}, {"d/a": "..", "b": "d/a/.."}, {"a": "d/e", "b": "a/../../.."}] # each harmless by its text, or nearly


def linked(tmp, seed):
    "A zip with a picture and links that point through each other, or anywhere."
    rng = random.Random(seed)
    some = lambda: "/".join(rng.choice(["..", "..", ".", "a", "b", "d", "e", "x.png"]) for _ in range(rng.randint(1, 3)))
    links = THROUGH[seed] if seed<len(THROUGH) else {n: some() for n in rng.sample(["a", "b", "d/a", "d/b", "d/e/a", "d/e/b"], rng.randint(1, 3))}
    with zipfile.ZipFile(tmp/"l.zip", "w") as z:
        z.writestr("d/e/x.png", b"x")
        for n, to in links.items():
            i = zipfile.ZipInfo(n)
            i.external_attr = (stat.S_IFLNK | 0o777)<<16
            z.writestr(i, to)
    return tmp/"l.zip"


def test_links_never_lead_outside(tmp_path):
    "300 zips of links to links: what is accepted stays inside, however the links are followed."
    accepted = 0
    for seed in range(300):
        try: d = unpack(linked(tmp_path, seed), tmp_path/"t", durable=False, whole=True)
        except DataError as e: assert "may lead outside" in str(e) or "as a folder" in str(e); continue
        accepted += 1
        assert all(Path(os.path.realpath(p)).is_relative_to(d.resolve()) for p in d.rglob("*") if p.is_symlink())
        shutil.rmtree(d)
    assert 30<accepted<270


@pytest.mark.parametrize("careless", ["ends inside by its text", "does not begin with more .. than it may"])
def test_planted_careless_rules_for_links_are_red(tmp_path, monkeypatch, careless):
    def link(name, data):
        to = data.decode()
        out = os.path.normpath(os.path.join(os.path.dirname(name), to)).startswith("..") if careless.startswith("ends") else to.split("/").count("..")>name.count("/")+1
        if out: raise DataError("may lead outside")
        return to
    monkeypatch.setattr("defect_detect.data.archive._link", link)
    with pytest.raises((AssertionError, OSError)): test_links_never_lead_outside(tmp_path)


def naive(z, target):
    (target/"pictures").mkdir(parents=True)
    with zipfile.ZipFile(z) as f:
        for i in f.infolist():
            (target/i.filename).parent.mkdir(parents=True, exist_ok=True)
            (target/i.filename).write_bytes(f.read(i))


def extractall(z, target): zipfile.ZipFile(z).extractall(target)


@pytest.mark.parametrize("name", ["slip up", "absolute", "slip up deep"])
def test_planted_a_naive_unpacker_is_seen_outside(tmp_path, name):
    assert "outside changed" in faults(tmp_path, name, naive)


@pytest.mark.parametrize("name", [n for n in NAMES if "million" not in n and n!="long name"])
def test_planted_extractall_is_red(tmp_path, name): assert faults(tmp_path, name, extractall)


def test_planted_extractall_writes_more_than_the_cap(tmp_path): assert "more than the cap written" in faults(tmp_path, "ratio", extractall)


def good_zip(path, tiles=3):
    shutil.make_archive(str(path.with_suffix("")), "zip", write_synth(path.parent/"drawn", tiles=tiles, exposures=2, bad=.7))
    return path


def test_a_damaged_zip_is_refused_or_whole(tmp_path):
    "Each of 400 mutations: bytes changed, cut or doubled."
    data, rng = good_zip(tmp_path/"good.zip", 1).read_bytes(), random.Random(0)
    spots = [*range(200), *range(len(data)-700, len(data))]
    for n in range(400):
        b = bytearray(data)
        for _ in range(rng.randint(1, 4)): b[rng.choice(spots) if rng.random()<.8 else rng.randrange(len(b))] = rng.randrange(256)
        if n%10==0: del b[rng.randrange(len(b)):]
        if n%10==1: b += b[rng.randrange(len(b)):]
        (tmp_path/"bad.zip").write_bytes(b)
        try: unpack(tmp_path/"bad.zip", tmp_path/"out/target", durable=False)
        except DataError as e: assert "\n" not in str(e) and not list((tmp_path/"out").iterdir() if (tmp_path/"out").exists() else ())
        else: shutil.rmtree(tmp_path/"out")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name!="out")==["bad.zip", "drawn", "good.zip"]


def test_half_unpacked_is_never_taken_for_whole(tmp_path):
    "kill -9 at ten points of unpacking; what has the name is whole, and the next try gets it."
    z = good_zip(tmp_path/"good.zip", 12)
    want, code = tree(tmp_path/"drawn"), f"from defect_detect.data.archive import keep_unpacked; print(flush=True); keep_unpacked({str(z)!r}, {str(tmp_path/'home')!r})"
    killed = 0
    for i in range(10):
        shutil.rmtree(tmp_path/"home", ignore_errors=True)
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        p.stdout.readline()
        end = time.monotonic()+20
        while p.poll() is None and len(list((tmp_path/"home").rglob("*.jpg")) if (tmp_path/"home").exists() else ())<2*i and time.monotonic()<end: pass
        p.kill()
        p.communicate()
        killed += p.returncode==-signal.SIGKILL
        whole = [d for d in (tmp_path/"home").glob("[!.]*")] if (tmp_path/"home").exists() else []
        assert all(tree(d)==want for d in whole)
        assert tree(keep_unpacked(z, tmp_path/"home"))==want
    assert killed>=5


def source(tmp):
    "The real tiles, or drawn ones."
    return Path(os.environ["DEFECT_DATA"]) if os.environ.get("DEFECT_DATA") else write_synth(tmp/"tiles", tiles=10, exposures=2, bad=.8)


def as_mvtec(root, t, to):
    for i, r in enumerate(t.itertuples()):
        d = to/(f"train/{r.label}" if r.label=="good" and i%2 else f"test/{r.label}")
        d.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/r.image, d/Path(r.image).name)
        if r.label=="good": continue
        (to/"ground_truth"/r.label).mkdir(parents=True, exist_ok=True)
        shutil.copy(root/r.mask, to/"ground_truth"/r.label/f"{Path(r.image).stem}_mask.png")


def test_the_tiles_as_mvtec_and_back(tmp_path):
    root = source(tmp_path)
    t = read_data(root)
    as_mvtec(root, t, tmp_path/"mv")
    c = convert_data(tmp_path/"mv", tmp_path/"masks", "masks")
    assert (recognise(root).name, recognise(tmp_path/"mv").name, recognise(c.folder).name)==("magnetic tiles", "MVTec AD", "images and masks")
    back = read_data(c.folder)
    key = lambda x: x.assign(key=x.image.str.rsplit("/", n=1).str[-1]+x.label).sort_values("key", ignore_index=True)
    assert key(back)[["key", "sha256", "exposure", "number"]].equals(key(t)[["key", "sha256", "exposure", "number"]])
    for a, b in zip(key(t).itertuples(), key(back).itertuples()): assert np.array_equal(load_mask(root, a, classes_of(t)), load_mask(c.folder, b, classes_of(back)))


def run(*words, **kw): return subprocess.run([TOOL, *map(str, words)], capture_output=True, text=True, timeout=120, **kw)


def test_the_command_line_leaves_nothing_beside_a_zip(tmp_path):
    for d in ("share", "tmp"): (tmp_path/d).mkdir()
    z = good_zip(tmp_path/"share/good.zip")
    before, env = tree(tmp_path), {**os.environ, "TMPDIR": str(tmp_path/"tmp")}
    for c in ("list", "check"):
        a, b = run("data", c, z, env=env), run("data", c, tmp_path/"share/drawn", env=env)
        assert (a.returncode, a.stdout, a.stderr)==(b.returncode, b.stdout, b.stderr) and a.stdout
    assert tree(tmp_path)==before
    r = run("data", "convert", z, tmp_path/"coco", "--to", "coco", "--polygons", "--json", env=env)
    assert r.returncode==0 and json.loads(r.stdout)["changed"]==0
    shutil.rmtree(tmp_path/"coco")
    assert tree(tmp_path)==before
    z.write_bytes(z.read_bytes()[:-100])
    for c in (("list", z), ("check", z), ("convert", z, tmp_path/"coco", "--to", "coco")):
        r = run("data", *c, env=env)
        assert (r.returncode, r.stdout, r.stderr.count("\n"))==(1, "", 1) and "damaged" in r.stderr
    assert not (tmp_path/"coco").exists() and not list((tmp_path/"tmp").iterdir())


def test_a_pipeline_takes_a_zip(tmp_path):
    "The run points at the unpacked folder, which the second run finds again; a zip that is none stops before anything is made."
    good_zip(tmp_path/"Good Ones.zip")
    (tmp_path/"nbs/pipeline").mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell("data: str = ''", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("from defect_detect.data.read import read_data\nraise ValueError(f'{len(read_data(data))} pictures')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/"nbs/pipeline/1_prepare.ipynb")
    (tmp_path/"params.yaml").write_text("demo: {}\n")
    (tmp_path/"dvc.yaml").write_text("stages:\n  prepare:\n    cmd: defect-detect run ${root}/nbs/pipeline/1_prepare.ipynb -o notebooks/1_prepare.ipynb -p data=data\n    deps: [data]\n    outs: [prepare]\n")
    (tmp_path/"no.zip").write_bytes(b"no zip")
    r = run("run", "pipeline", "x", "--data", "no.zip", cwd=tmp_path)
    assert (r.returncode, r.stderr.count("\n")) == (1, 1) and "not a zip" in r.stderr and not (tmp_path/"runs").exists()
    for _ in range(2):
        r = run("run", "pipeline", "x", "--data", "Good Ones.zip", cwd=tmp_path)
        assert r.returncode==1 and "6 pictures" in r.stderr, r.stderr
        (kept,) = (tmp_path/"data").iterdir()
        assert kept.name.startswith("good-ones-") and len(kept.name)==10+12 and (tmp_path/"runs/x/data").resolve()==kept and tree(kept)==tree(tmp_path/"drawn")


def test_masks_are_the_same_in_threads_and_forked_loaders(tmp_path):
    "One COCO file, read by a loader's workers, by threads, and after it changed."
    from concurrent.futures import ThreadPoolExecutor

    from torch.utils.data import DataLoader
    root = convert_data(write_synth(tmp_path/"tiles", tiles=6, exposures=2, bad=.8), tmp_path/"coco", "coco").folder
    t = read_data(root)
    rows, classes = list(t.itertuples()), classes_of(t)
    one = lambda i: hashlib.sha256(load_mask(root, rows[i], classes).tobytes()).hexdigest()
    class Set:
        def __len__(self): return len(rows)
        def __getitem__(self, i): return one(i)
    want = [one(i) for i in range(len(rows))]
    with ThreadPoolExecutor(4) as ex: assert list(ex.map(one, range(len(rows))))==want
    assert [h for (h,) in DataLoader(Set(), num_workers=2, multiprocessing_context="fork", timeout=60)]==want
    doc = json.loads((root/"annotations.json").read_text())
    (root/"annotations.json").write_text(json.dumps({**doc, "annotations": doc["annotations"][1:]}))
    with pytest.raises(DataError, match="has changed"): one(0)
