"Each thing that can be wrong with a set, planted into a copy of the demo set and found; none invented on the clean one."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from defect_detect.data import check as module
from defect_detect.data.check import FAULTS, check_data, check_parts, refuse_errors
from defect_detect.data.demo import write_synth
from defect_detect.data.layouts import DataError
from defect_detect.data.lists import add_to_list
from defect_detect.data.read import read_data

TOOL = Path(sys.executable).with_name("defect-detect")
WHO = dict(who="kim", when="2026-01-31", why="planted")


@pytest.fixture(scope="module")
def clean(tmp_path_factory): return write_synth(tmp_path_factory.mktemp("check")/"set", tiles=16, exposures=3, bad=.7)


@pytest.fixture
def data(clean, tmp_path): return Path(shutil.copytree(clean, tmp_path/"set"))


def first(d, kind, n=0): return sorted(d.glob(f"MT_{kind}/Imgs/*.jpg"))[n]
def save(path, a, form=None, **kw): Image.fromarray(a).save(path, form or {".jpg": "JPEG", ".png": "PNG"}[path.suffix], **kw)


# --- one planter a fault: it changes the folder and returns the pictures that must be named

def cut(d): p = first(d, "Crack"); p.write_bytes(p.read_bytes()[:-400]); return [p]
def bad_sum(d):
    "A PNG with one bit turned over."
    p = first(d, "Free")
    Image.open(p).save(p, "PNG")
    b = bytearray(p.read_bytes())
    b[len(b)//2] ^= 1
    p.write_bytes(b)
    return [p]
def page(d): p = first(d, "Free"); p.write_bytes(b"<html>not found</html>"); return [p]
def nothing(d): p = first(d, "Free"); p.write_bytes(b""); return [p]
def film(d):
    p = first(d, "Free")
    Image.open(p).save(p, "TIFF", save_all=True, append_images=[Image.open(p)])
    return [p]
def seven(d): p = first(d, "Free"); save(p, np.full((7, 90), 120, np.uint8)); p.with_suffix(".png").unlink(); return [p]
def lost_mask(d): p = first(d, "Crack"); p.with_suffix(".png").unlink(); return [p]
def cut_mask(d): p = first(d, "Crack"); m = p.with_suffix(".png"); m.write_bytes(m.read_bytes()[:-20]); return [p]
def no_mask_file(d): p = first(d, "Crack"); p.with_suffix(".png").write_text("see other folder"); return [p]
def turned(d): p = first(d, "Crack"); save(p.with_suffix(".png"), np.asarray(Image.open(p.with_suffix(".png"))).T); return [p]
def other_kind(d):
    p, q = first(d, "Crack"), d/"MT_Fray/Imgs/exp1_num_9.jpg"
    for e in (".jpg", ".png"): shutil.copy(p.with_suffix(e), q.with_suffix(e))
    return [p, q]
def again(d):
    p, q = first(d, "Crack"), d/"MT_Crack/Imgs/exp9_num_9.jpg"
    for e in (".jpg", ".png"): shutil.copy(p.with_suffix(e), q.with_suffix(e))
    return [p, q]
def packed_anew(d):
    "The same pixels in another file: the second is a PNG by content, which is a finding of its own."
    p, q = first(d, "Crack"), d/"MT_Crack/Imgs/exp9_num_9.jpg"
    save(q, np.asarray(Image.open(p)), "PNG")
    shutil.copy(p.with_suffix(".png"), q.with_suffix(".png"))
    return [p, q]
def png(d): p = first(d, "Free"); Image.open(p).save(p, "PNG"); return [p]
def jpeg_mask(d): p = first(d, "Crack"); Image.open(p.with_suffix(".png")).save(p.with_suffix(".png"), "JPEG", quality=100); return [p]
def deep(d): p = first(d, "Free"); save(p, np.asarray(Image.open(p)).astype(np.uint16)*256+7, "PNG"); return [p]
def thumbnail(d): p = first(d, "Free"); save(p, np.asarray(Image.open(p))[:31, :90]); p.with_suffix(".png").unlink(); return [p]
def strip(d): p = first(d, "Free"); save(p, np.tile(np.asarray(Image.open(p))[:40, :150], 2)); p.with_suffix(".png").unlink(); return [p]
def soft(d): p = first(d, "Crack"); m = p.with_suffix(".png"); save(m, (np.asarray(Image.open(m))//255*200).astype(np.uint8)); return [p]
def ones(d): p = first(d, "Crack"); m = p.with_suffix(".png"); save(m, np.asarray(Image.open(m))//255); return [p]
def unmarked(d): p = first(d, "Crack"); m = p.with_suffix(".png"); save(m, np.asarray(Image.open(m))*0); return [p]
def marked(d): p = first(d, "Free"); m = p.with_suffix(".png"); a = np.asarray(Image.open(m)).copy(); a[3:9, 3:9] = 255; save(m, a); return [p]
def astray(d): q = d/"MT_Crack"/first(d, "Crack").name; shutil.copy(first(d, "Free", 1), q); return [q]
def mask_alone(d): q = d/"MT_Crack/Imgs/exp9_num_9.png"; shutil.copy(first(d, "Crack").with_suffix(".png"), q); return [q]
def deleted(d): p = first(d, "Free"); add_to_list(d, "quarantine", [dict(image=p.relative_to(d).as_posix(), **WHO)]); p.unlink(); p.with_suffix(".png").unlink(); return [p]
def only_bad(d): shutil.rmtree(d/"MT_Free"); return []
def only_good(d): [shutil.rmtree(p) for p in d.glob("MT_*") if p.name!="MT_Free"]; return []


PLANTED = [("damaged", cut, ()), ("damaged", bad_sum, ()), ("unreadable", page, ()), ("unreadable", nothing, ()), ("unreadable", film, ()), ("size", seven, ()), ("no mask", lost_mask, ()), ("mask unreadable", cut_mask, ()), ("mask unreadable", no_mask_file, ()),
           ("mask size", turned, ()), ("twins differ", other_kind, ()), ("twins", again, ()), ("twins", packed_anew, ("ending",)), ("ending", png, ()), ("mask ending", jpeg_mask, ("mask grey",)), ("deep", deep, ("ending",)), ("small", thumbnail, ()), ("shape", strip, ()),
           ("mask grey", soft, ()), ("mask grey", ones, ("mask empty",)), ("mask empty", unmarked, ()), ("mask on good", marked, ()), ("unused", astray, ()), ("unused", mask_alone, ()), ("not there", deleted, ()), ("no good", only_bad, ()), ("no defect", only_good, ())]
NAMES = {what: key for key, (_, what, _) in FAULTS.items()}


def found(d): return {NAMES[f.what]: f for f in check_data(d, read_data(d))}


def test_the_clean_set_has_none(clean): assert check_data(clean, read_data(clean))==[]


def test_every_fault_is_planted(): assert {k for k, _, _ in PLANTED}|{"changed", "mask kinds"}==set(FAULTS)


@pytest.mark.parametrize("key,plant,also", PLANTED, ids=lambda v: v.__name__ if callable(v) else None)
def test_planted_and_found(data, key, plant, also):
    want = tuple(sorted(p.relative_to(data).as_posix() for p in plant(data)))
    got = found(data)
    assert set(got)=={key, *also}
    f = got[key]
    assert (f.severity, f.images)==(FAULTS[key][0], want) and f.remedy.startswith(FAULTS[key][2]) and "\n" not in f.remedy
    if f.severity=="error":
        with pytest.raises(DataError, match=f.what): refuse_errors(got.values())
    else: refuse_errors(got.values())


@pytest.mark.parametrize("key", [k for k in FAULTS if k not in ("changed", "mask kinds")])
def test_planted_a_check_that_looks_away_is_red(data, key, monkeypatch):
    "Without this one fault in the list, the test above fails."
    monkeypatch.setattr(module, "FAULTS", {k: v for k, v in FAULTS.items() if k!=key})
    plant, also = next((p, a) for k, p, a in PLANTED if k==key)
    with pytest.raises((AssertionError, KeyError)): test_planted_and_found(data, key, plant, also)


def test_the_kinds_of_a_class_map(tmp_path):
    for d in ("images", "masks"): (tmp_path/d).mkdir()
    rng, m = np.random.default_rng(0), np.zeros((40, 50), np.uint8)
    m[4:9, 4:9] = 1
    for n in "abc":
        save(tmp_path/f"images/{n}.png", rng.integers(90, 160, (40, 50), dtype=np.uint8))
        save(tmp_path/f"masks/{n}.png", m)
    (tmp_path/"classes.csv").write_text("value,name\n1,fray\n")
    (tmp_path/"labels.csv").write_text("image,label\na.png,fray\nb.png,crack\nc.png,good\n")
    assert {k: f.images for k, f in found(tmp_path).items()}=={"mask kinds": ("images/b.png",), "mask on good": ("images/c.png",)}


def test_a_picture_that_changes_between_list_and_check(data):
    t = read_data(data)
    p, q = first(data, "Free"), first(data, "Crack")
    p.write_bytes(p.read_bytes()+b" ")
    q.unlink()
    (f,) = [f for f in check_data(data, t) if f.severity=="error"]
    assert f.images==tuple(sorted(x.relative_to(data).as_posix() for x in (p, q))) and NAMES[f.what]=="changed"


def test_too_few_parts(clean):
    t = read_data(clean)
    one = t[t.label=="crack"].iloc[:1].image.item()
    few = pd.concat([t[t.label!="crack"], t[t.image==one]])
    assert [(f.severity, f.what, f.images) for f in check_parts(few)]==[("warning", "only 1 part shows 'crack'", (one,))] and check_parts(t)==[]


def test_a_full_set_at_once_and_out(data):
    "Twenty faults in one set are all found; what the errors name goes into quarantine, and the rest can be used."
    keys = set()
    for n, (key, plant, also) in enumerate(p for p in PLANTED if p[1] not in (only_bad, only_good, deleted, other_kind, again, packed_anew, astray, mask_alone)):
        d = data.with_name(f"c{n}")
        shutil.copytree(data, d)
        keys |= {key, *also}
        for p in plant(d):
            q = data/f"MT_{p.parts[-3][3:]}/Imgs/exp1_num_{9000+n}.jpg"
            shutil.copy(p, q)
            if p.with_suffix(".png").exists(): shutil.copy(p.with_suffix(".png"), q.with_suffix(".png"))
        shutil.rmtree(d)
    got = found(data)
    assert set(got)-{"twins"}==keys # copies of one picture with several wrong masks are identical too
    bad = sorted({i for f in got.values() if f.severity=="error" for i in f.images})
    r = run("data", "check", data)
    assert r.returncode==1 and not r.stderr
    assert run("data", "quarantine", data, *bad, "--why", "see check", "--who", "kim").returncode==0
    assert not [f for f in found(data).values() if f.severity=="error"] and run("data", "check", data).returncode==0
    assert not set(bad)&set(read_data(data).image) and all((data/i).exists() for i in bad)
    assert run("data", "quarantine", data, "--back", bad[0]).returncode==0 and run("data", "check", data).returncode==1


def run(*words): return subprocess.run([TOOL, *map(str, words)], capture_output=True, text=True, timeout=120)


def test_for_programs(data):
    p = cut(data)[0].relative_to(data).as_posix()
    r = run("data", "check", data, "--json")
    (f,) = json.loads(r.stdout)
    assert (r.returncode, r.stderr, f["severity"], f["images"])==(1, "", "error", [p]) and set(f)=={"severity", "what", "images", "remedy"}


def test_the_order_of_the_threads_is_not_seen(data):
    for plant in (cut, page, astray, marked, other_kind): plant(data)
    t = read_data(data)
    want = check_data(data, t)
    assert all(check_data(data, t.sample(frac=1, random_state=n))==want for n in range(4))


def test_the_tiles():
    "What must be found on the real set; without it the drawn ones have nothing of the kind, which the first test says."
    d = os.environ.get("DEFECT_DATA")
    if not d: print("DEFECT_DATA names no real pictures: not looked for on them"); return
    got = found(Path(d))
    assert got["mask empty"].images==tuple(f"MT_Uneven/Imgs/{n}.jpg" for n in ("exp3_num_45042", "exp4_num_124690", "exp4_num_45057"))
    assert set(got)<={"mask empty", "mask grey"}
