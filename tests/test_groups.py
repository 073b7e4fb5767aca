"""Which pictures show one part: reach on drawn and real tiles, the same again, and what a kill or a spoilt cache does to it."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from defect_detect.data import descriptors, groups
from defect_detect.data.demo import write_synth
from defect_detect.data.groups import Link, cluster, find_groups, group_pictures, join, name_links
from defect_detect.data.read import load_image, read_data
from defect_detect.data.split import split_by_group
from defect_detect.data.synth import KINDS, tile_pictures


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "40 tiles, six pictures each, four tiles in a row of one size and shading; names that say nothing. Folder, table, true tile, kept textures."
    root = tmp_path_factory.mktemp("drawn")
    (root/"d/MT_Free/Imgs").mkdir(parents=True)
    rng = np.random.default_rng(31)
    names, tile = rng.permutation(240), {}
    for t in range(40):
        for e, p in enumerate(tile_pictures(np.random.default_rng([31, t]), (*KINDS, "good")[t%6], 6, look=np.random.default_rng([32, t//4]))):
            y0, y1, x0, x1 = rng.integers(0, 13, 4)
            name = f"MT_Free/Imgs/{names[6*t+e]:03d}.jpg"
            Image.fromarray(p.image[y0:p.image.shape[0]-y1, x0:p.image.shape[1]-x1]).save(root/"d"/name, quality=92)
            tile[name] = t
    t = read_data(root/"d")
    return root/"d", t, t.image.map(tile).values, root/"cache"


def pairs_in(parts, among=None):
    g = pd.factorize(np.asarray(parts))[0]
    same = np.triu(g[:, None]==g, 1)
    return same if among is None else same&among


def complaints(found, truth):
    f, t = pairs_in(found), pairs_in(truth)
    recall, precision = (f&t).sum()/t.sum(), (f&t).sum()/max(1, f.sum())
    return [s for s, bad in ((f"recall {recall:.3f}", recall<.99), (f"precision {precision:.3f}", precision<.97)) if bad]


def test_drawn_tiles_are_found(drawn):
    root, t, tile, cache = drawn
    found, pairs = find_groups(root, t, cache=cache)
    assert complaints(found, tile)==[]
    of = dict(zip(t.image, tile))
    assert (pairs.a.map(of).values==pairs.b.map(of).values).all() and len(pairs)>.9*15*40


def test_a_threshold_of_nothing_is_seen(drawn, monkeypatch):
    "Two walls: where strangers become candidates, registration still parts them; where it parts nobody, they are seen."
    root, t, tile, cache = drawn
    monkeypatch.setattr(groups, "candidates", lambda v: descriptors.candidates(v, least=.05))
    assert complaints(find_groups(root, t, cache=cache)[0], tile)==[]
    assert any("precision" in c for c in complaints(find_groups(root, t, .005, cache=cache)[0], tile))


def test_look_alikes_would_fool_plain_correlation(drawn):
    "Shrunk pictures, correlated: what the pictures here must be hard for."
    root, t, tile, _ = drawn
    small = np.stack([np.asarray(Image.fromarray(load_image(root, r)).convert("L").resize((16, 16), Image.Resampling.BOX), float).ravel() for r in t.itertuples()])
    alike = np.corrcoef(small)
    assert any("precision" in c for c in complaints(join(len(t), np.argwhere(np.triu(alike>.9, 1)).tolist()), tile))


def test_a_false_link_makes_no_chain(drawn):
    "Tiles chained by one false link each stay apart; without the rule they become one."
    root, t, tile, cache = drawn
    g = group_pictures(root, t, cache=cache)
    at = {n: i for i, n in enumerate(t.image)}
    links = [Link(r.correlation, at[r.a], at[r.b], 0, 0) for r in g.pairs.itertuples()]
    false = [Link(.45, int(np.flatnonzero(tile==k)[0]), int(np.flatnonzero(tile==k+1)[0]), 0, 0) for k in range(39)]
    known = {(k.a, k.b): k.correlation for k in links+false}
    weigh = lambda i, j, _: known.get((i, j), known.get((j, i), .05))
    top, refused = cluster(len(t), links+false, weigh, .3)
    assert complaints(top, tile)==[] and {k for k, _ in refused}>=set(false)
    assert len(set(cluster(len(t), links+false, weigh, .3, share=0)[0].tolist()))==1


def spoil(cache, how):
    files = sorted(p for p in cache.rglob("*") if p.is_file())
    for p in files:
        data = p.read_bytes()
        p.write_bytes(data[:len(data)//2] if how=="cut" else data[:40]+bytes(b^85 for b in data[40:]))
    return len(files)


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_spoilt_cache_is_not_believed(drawn, tmp_path, how, monkeypatch):
    root, t, _, _ = drawn
    t = t.iloc[:40]
    found, pairs = find_groups(root, t, cache=tmp_path)
    assert spoil(tmp_path, how)>40
    again, same = find_groups(root, t, cache=tmp_path)
    assert again.equals(found) and same.equals(pairs)
    spoil(tmp_path, how)
    monkeypatch.setattr(descriptors.Store, "get", lambda self, name: self.path(name).read_bytes()[16:] if self.path(name).exists() else None) # believes everything
    try: bad, other = find_groups(root, t, cache=tmp_path)
    except Exception: return
    assert not (bad.equals(found) and other.equals(pairs))


SCRIPT = """
import itertools, os, sys, time
from defect_detect.data.groups import find_groups
from defect_detect.data.read import read_data
root, cache, out, seed = sys.argv[1:]
count, wait_at = itertools.count(1), int(os.environ.get("WAIT_AT", 0))
def bar(it):
    for i, x in enumerate(it):
        print(i, flush=True)
        if next(count)==wait_at: time.sleep(60) # for the signal
        yield x
t = read_data(root).sample(frac=1, random_state=int(seed))
g, p = find_groups(root, t, cache=cache, bar=bar)
open(out, "w").write(g.sort_index().to_csv()+p.to_csv())
"""


def run(drawn, cache, out, seed=0, **env):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(drawn[0]), str(cache), str(out), str(seed)], env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_stopped_anywhere_the_next_call_goes_on(drawn, tmp_path):
    "Killed or interrupted while preparing and while registering, with one cache; the last call gives what an undisturbed one gives."
    g, p = find_groups(drawn[0], drawn[1])
    for lines, how in ((20, signal.SIGKILL), (60, signal.SIGINT), (150, signal.SIGKILL), (300, signal.SIGINT), (330, signal.SIGKILL)):
        r = run(drawn, tmp_path/"cache", tmp_path/"out", WAIT_AT=str(lines))
        for _ in range(lines): assert r.stdout.readline(), r.stderr.read()
        r.send_signal(how)
        start = time.monotonic()
        r.stdout.read()
        assert r.wait(60)!=0 and time.monotonic()-start<30 and not (tmp_path/"out").exists()
    r = run(drawn, tmp_path/"cache", tmp_path/"out")
    _, err = r.communicate(timeout=300)
    assert r.returncode==0, err
    assert (tmp_path/"out").read_text()==g.to_csv()+p.to_csv()


def test_the_same_again_in_any_order_and_with_any_threads(drawn, tmp_path):
    "Other order of the rows, other hash seed, one thread or two of each kind."
    got = []
    for i, env in enumerate((dict(PYTHONHASHSEED="1", OMP_NUM_THREADS="1"), dict(PYTHONHASHSEED="2", OMP_NUM_THREADS="2"))):
        r = run(drawn, tmp_path/str(i), tmp_path/f"out{i}", seed=i, **env)
        if i==0 and hasattr(os, "sched_setaffinity"): os.sched_setaffinity(r.pid, {min(os.sched_getaffinity(0))})
        _, err = r.communicate(timeout=300)
        assert r.returncode==0, err
        got.append((tmp_path/f"out{i}").read_text())
    assert got[0]==got[1] and got[0].count("\n")>600


def test_importing_is_cheap():
    code = "import sys, defect_detect.data.groups; print(sorted({'faiss', 'torch', 'scipy', 'cv2'} & set(sys.modules)))"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert r.stdout.strip()=="[]", r.stdout+r.stderr


def test_tiles_against_the_rule_of_their_names(tmp_path):
    "From the pixels alone, on the real pictures where DEFECT_DATA names them, else on drawn ones."
    data = os.environ.get("DEFECT_DATA") or write_synth(tmp_path/"d", tiles=40, seed=5)
    print("real pictures" if os.environ.get("DEFECT_DATA") else "DEFECT_DATA names no folder: drawn pictures, the real ones did not run")
    t = read_data(data)
    g = group_pictures(data, t, names=False, cache=tmp_path/"cache")
    rule = join(len(t), name_links(t))
    near = (abs(np.subtract.outer(t.height.values, t.height.values))<=6) & (abs(np.subtract.outer(t.width.values, t.width.values))<=6)
    found, close, every = pairs_in(g.group), pairs_in(rule, near), pairs_in(rule)
    assert (found&close).sum()>=.97*close.sum()>0 and (found&every).sum()>=.95*every.sum()
    assert np.bincount(pd.factorize(g.group)[0]).max()<=18, "no tile was photographed that often"
    for seed in range(3):
        side = dict(zip(t.image, split_by_group(t.assign(group=g.group), {"train": .6, "valid": .15, "test": .25}, seed)))
        assert all(side[a]==side[b] for a, b in zip(g.pairs.a, g.pairs.b))
    by_stem = {Path(n).stem: k for n, k in zip(t.image, g.group)}
    if "exp4_num_346361" in by_stem: assert by_stem["exp4_num_346361"]==by_stem["exp3_num_346347"] # filed as good, and the same tile's hole is marked
