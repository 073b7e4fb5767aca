"""How well and how fast pictures of one part are found, from the pixels alone: `python benchmarks/grouping.py --synthetic --real <folder> --scale 1000 20000`.

Nothing was chosen on what is tested here: threshold, cosine and number of partners come from drawn tiles of seed 11; tested are 21 and 22.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from defect_detect.data.demo import write_synth
from defect_detect.core.progress import cores
from defect_detect.data.groups import find_groups, group_pictures, join, name_links
from defect_detect.data.read import load_image, read_data
from defect_detect.data.register import fit, locate, textures, turned
from defect_detect.data.split import split_by_group
from defect_detect.data.synth import KINDS, tile_pictures

CHOSEN, TESTED, THRESHOLD = 11, (21, 22), .3


def table(rows:list[dict]):
    "Print `rows` in columns."
    text = [[str(k) for k in rows[0]], *([str(v) for v in r.values()] for r in rows)]
    wide = [max(map(len, c)) for c in zip(*text)]
    print("\n".join("  ".join(c.ljust(w) for c, w in zip(r, wide)).rstrip() for r in text), flush=True)


def scores(found, truth, among=None)->tuple[float, float]: # recall, precision
    "Of the pairs in one part of `truth`, how many are in one of `found`, and the other way round; recall `among` some pairs only."
    f, t = (pd.factorize(np.asarray(v))[0] for v in (found, truth))
    at = np.triu_indices(len(f), 1)
    a, b = (f[:, None]==f)[at], (t[:, None]==t)[at]
    m = np.ones_like(a) if among is None else among[at]
    return (a&b&m).sum()/max(1, (b&m).sum()), (a&b).sum()/max(1, a.sum())


def draw(folder:Path, seed:int, tiles:int)->np.ndarray: # tile of each picture, in the order of their names
    "Six pictures of each tile, cropped anew by up to 12 px a side besides what the generator does; four tiles in a row share size and shading."
    (folder/"MT_Free/Imgs").mkdir(parents=True)
    rng, kinds = np.random.default_rng([seed, 2]), ("good",)*4+KINDS
    names = rng.permutation(6*tiles) # so that names say nothing
    of = np.zeros(6*tiles, int)
    for t in range(tiles):
        for e, p in enumerate(tile_pictures(np.random.default_rng([seed, 0, t]), kinds[t%9], 6, look=np.random.default_rng([seed, 1, t//4]))):
            y0, y1, x0, x1 = rng.integers(0, 13, 4)
            Image.fromarray(p.image[y0:p.image.shape[0]-y1, x0:p.image.shape[1]-x1, 0]).save(folder/f"MT_Free/Imgs/{names[6*t+e]:05d}.jpg", quality=92)
            of[names[6*t+e]] = t
    return of


def synthetic(tiles:int, seeds=TESTED):
    "Drawn tiles whose truth is known."
    rows = []
    for seed in (CHOSEN, *seeds):
        with tempfile.TemporaryDirectory() as tmp:
            n = min(tiles, 100) if seed==CHOSEN else tiles
            truth = draw(Path(tmp)/"d", seed, n)
            t = read_data(Path(tmp)/"d")
            for th in (.1, .2, .3, .4, .5) if seed==CHOSEN else (THRESHOLD,):
                g, p = find_groups(Path(tmp)/"d", t, th, False, Path(tmp)/"cache")
                of = dict(zip(t.image, truth))
                recall, precision = scores(g, truth)
                rows.append(dict(seed=f"{seed} {'chosen on' if seed==CHOSEN else 'tested'}", tiles=n, pictures=len(t), threshold=th, parts=g.nunique(), recall=f"{recall:.4f}", precision=f"{precision:.4f}",
                                 linked_directly=f"{len(p)/(15*n):.4f}", false_links=int((p.a.map(of).values!=p.b.map(of).values).sum())))
    table(rows)


def shown(root, rows, a, b)->Image.Image: # what both pictures show, side by side, stretched
    pics = [load_image(root, rows.loc[n]) for n in (a, b)]
    f = locate(*pics)
    p, q = pics[0][..., 0].astype(np.float32), turned(pics[1][..., 0].astype(np.float32), f.turn)
    y0, y1, x0, x1 = max(0, f.dy), min(p.shape[0], q.shape[0]+f.dy), max(0, f.dx), min(p.shape[1], q.shape[1]+f.dx)
    both = [p[y0:y1, x0:x1], q[y0-f.dy:y1-f.dy, x0-f.dx:x1-f.dx]]
    flat = [np.clip((c-np.percentile(c, 1))/(np.ptp(np.percentile(c, [1, 99]))+1)*255, 0, 255).astype(np.uint8) for c in both]
    return Image.fromarray(np.hstack(flat))


def sheets(root, t, pairs, folder:Path):
    "Every pair of `pairs` with its pictures, 24 a page."
    folder.mkdir(parents=True, exist_ok=True)
    pairs.to_csv(folder/"outside.csv", index=False)
    rows = t.set_index("image", drop=False)
    for page in range(0, len(pairs), 24):
        sheet = Image.new("L", (4*330, 6*190), 255)
        for k, r in enumerate(pairs[page:page+24].itertuples()):
            im = shown(root, rows, r.a, r.b)
            im.thumbnail((324, 160))
            at = (k%4*330, k//4*190)
            sheet.paste(im, (at[0], at[1]+24))
            for i, s in enumerate((r.a, f"{r.b}  {r.correlation:.2f}")): ImageDraw.Draw(sheet).text((at[0], at[1]+11*i), s.replace("MT_", "").replace("/Imgs", ""), fill=0)
        sheet.save(folder/f"outside-{page//24+1:02d}.png")


def real(root:str, folder:str|None):
    "Real tiles against the rule of their names."
    t = read_data(root)
    rule = join(len(t), name_links(t))
    with tempfile.TemporaryDirectory() as cache:
        times = []
        for _ in range(2):
            start = time.monotonic()
            g = group_pictures(root, t, THRESHOLD, False, cache)
            times.append(time.monotonic()-start)
        both = group_pictures(root, t, THRESHOLD, True, cache)
    h, w = t.height.values, t.width.values
    near = (abs(h[:, None]-h)<=6) & (abs(w[:, None]-w)<=6)
    close, every = scores(g.group, rule, near)[0], scores(g.group, rule)[0]
    at = dict(zip(t.image, rule))
    tiles = [tuple(sorted((at[a], at[b]))) for a, b in zip(g.pairs.a, g.pairs.b)]
    out = g.pairs.assign(tiles=tiles)[[a!=b for a, b in tiles]]
    out = out.assign(first=~out.tiles.duplicated()).sort_values(["first", "correlation"], ascending=False).drop(columns=["first"])
    table([dict(pictures=len(t), seconds=f"{times[0]:.1f}", again=f"{times[1]:.1f}", parts=g.group.nunique(), parts_with_names=both.group.nunique(), recall_within_6px=f"{close:.4f}", recall_all=f"{every:.4f}", outside=len(out), of_tiles=out.tiles.nunique(), refused=len(g.refused))])
    crossing, twins = 0, 0
    for seed in range(20):
        side = dict(zip(t.image, split_by_group(t.assign(group=both.group), {"train": .6, "valid": .15, "test": .25}, seed)))
        crossing += sum(side[a]!=side[b] for a, b in zip(both.pairs.a, both.pairs.b))
        chance = np.random.default_rng(seed).permutation(np.array(["train"]*6+["valid"]*2+["test"]*2)[np.arange(len(t))%10])
        by = pd.DataFrame(dict(g=both.group.values, s=chance))
        twins += (by[by.s=="test"].g.isin(by.g[by.s=="train"])).mean()/20
    print(f"verified pairs on two sides, over 20 splits by part: {crossing}; with a sibling in train when pictures are dealt at random: {twins:.0%} of the test pictures")
    print("\nfound outside the rule of the names, the best pair of each two tiles:")
    table([dict(a=r.a, b=r.b, correlation=r.correlation, turn=r.turn, pairs=int((out.tiles==r.tiles).sum())) for r in out.drop_duplicates("tiles").itertuples()])
    print("\nnames and pixels disagree where the names join:")
    table([dict(a=r.a, b=r.b, correlation=r.correlation) for r in both.doubts[both.doubts.why.str.startswith("names")].itertuples()] or [dict(a="nowhere")])
    if folder: sheets(root, t, out.drop(columns=["tiles"]), Path(folder))


def one(root:str, n:int, cache:str)->dict:
    "Group the first `n` pictures of `root`, in a process of its own."
    t, truth = read_data(root).iloc[:n], pd.read_csv(Path(root)/"truth.csv").set_index("image").tile
    out = dict(pictures=len(t))
    for what in ("first", "again"):
        start, cpu = time.monotonic(), time.process_time()
        g, p = find_groups(root, t, THRESHOLD, False, cache)
        out |= {f"{what} s": round(time.monotonic()-start, 1), f"{what} cpu s": round(time.process_time()-cpu, 1)}
        out.setdefault("peak MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss>>10)
    of = t.image.map(truth).values
    size, both, right = (sum(n*(n-1)//2 for n in pd.Series(list(k)).value_counts()) for k in (of, g, zip(of, g)))
    rng = np.random.default_rng(0)
    some = [textures(load_image(root, t.iloc[i]), 2) for i in rng.choice(len(t), 60, replace=False)]
    start = time.process_time()
    for i in range(200): fit(some[i%60], some[(i*7+1+i//60)%60])
    per = (time.process_time()-start)/200
    return {**out, "recall": f"{right/size:.4f}", "precision": f"{right/both:.4f}", "ms a pair": round(per*1e3, 2), "all pairs cpu h": round(per*len(t)*(len(t)-1)/2/3600, 2)}


def scale(sizes:list[int], work:Path):
    "Time and memory by number of pictures."
    rows = []
    for n in sizes:
        data = work/str(n)
        if not data.exists(): write_synth(data, tiles=-(-n//6), seed=n)
        with tempfile.TemporaryDirectory(dir=work) as cache:
            r = subprocess.run([sys.executable, __file__, "--one", str(data), str(n), cache], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(r.stdout))
    for r in rows: r["times the first"] = f"{r['first s']/rows[0]['first s']:.1f} ({r['first cpu s']/rows[0]['first cpu s']:.1f} cpu)"
    table(rows)


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--synthetic", action="store_true", help="drawn tiles whose truth is known")
    a.add_argument("--tiles", type=int, default=300, help="how many of them, six pictures each")
    a.add_argument("--real", metavar="FOLDER", help="the magnetic tiles")
    a.add_argument("--sheets", metavar="FOLDER", help="where to draw the pairs that --real finds outside the rule of the names")
    a.add_argument("--scale", type=int, nargs="+", metavar="N", help="numbers of pictures to time")
    a.add_argument("--work", type=Path, default=Path(tempfile.gettempdir())/"grouping", help="where --scale keeps the pictures it draws")
    a.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    o = a.parse_args()
    if o.one: return print(json.dumps(one(o.one[0], int(o.one[1]), o.one[2])))
    if not (o.synthetic or o.real or o.scale): a.error("nothing to do; allowed: --synthetic, --real FOLDER, --scale N ...")
    print("python benchmarks/grouping.py", *sys.argv[1:], f"# {cores()} threads, load {os.getloadavg()[0]:.1f}")
    if o.synthetic: synthetic(o.tiles)
    if o.real: real(o.real, o.sheets)
    if o.scale: scale(o.scale, o.work)


if __name__=="__main__": main()
