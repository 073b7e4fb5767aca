"A training that is killed goes on to the same bytes; and a run tells nobody about itself."
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from defect_detect.core.bundle import sha256
from defect_detect.data.demo import write_synth
from defect_detect.learn.checkpoint import epochs_done

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("defect-detect")
SMALL = {"prepare.valid": 0.3, "prepare.test": 0.3, "train.height": 64, "train.width": 64, "train.epochs": 3, "train.batch": 4, "train.weights": "none", "train.threads": 1, "evaluate.draws": 10}
QUICK = [w for k, v in SMALL.items() for w in ("-p", f"{k}={v}")]

# trains in forks, so that what is imported once serves every kill; says the epochs through a pipe
TRAINER = '''
import contextlib, json, os, random, select, shutil, signal, sys, time
from pathlib import Path
from defect_detect.core.image import InputSpec
from defect_detect.data.demo import small_set
from defect_detect.data.read import classes_of
from defect_detect.data.split import read_split
from defect_detect.learn import checkpoint
from defect_detect.learn.loaders import make_loaders
from defect_detect.learn.model import make_model
from defect_detect.learn.train import Checkpoints, history, make_deterministic, save_model, train

home, rounds, seed, fault = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
data, table = small_set(home)

def fit(out, resume):
    make_deterministic(3, 1)
    t = read_split(table)
    t = t[t.split!="test"].groupby("split").head(12)
    classes, net = classes_of(t), None
    dls = make_loaders(data, t, classes, InputSpec(height=64, width=64), 4, 3, device="cpu")
    net = make_model(len(classes), "none")
    keep = Checkpoints(checkpoint.checkpoint_path(out), checkpoint.training_inputs(dls, net, epochs=4), resume)
    learn = train(dls, net, 4, cbs=[keep])
    save_model(learn.model, out, history(learn))
    keep.done()

def child(out, resume):
    "Its process id and the reading end of what it prints."
    r, w = os.pipe()
    pid = os.fork()
    if pid: return os.close(w) or (pid, r)
    os.dup2(w, 1)
    code = 1
    try: fit(out, resume); code = 0
    finally: os._exit(code)

def run(out, resume, kill=None):
    "The exit status and all that was said; `kill`: seconds after the epoch of that number."
    pid, r = child(out, resume)
    said, end = "", None
    while True:
        if kill and end is None and said.count("epoch ")>=kill[0]: end = time.monotonic()+kill[1]
        if end and time.monotonic()>=end: os.kill(pid, signal.SIGKILL); break
        if select.select([r], [], [], .002)[0]:
            b = os.read(r, 4096)
            if not b: break
            said += b.decode()
    os.close(r)
    return os.waitpid(pid, 0)[1], said

if fault=="draws": # planted: the generator of the draws is not brought back
    was = checkpoint._generators
    checkpoint._generators = lambda dls: was(dls)[1:]
t0 = time.monotonic()
assert run(home/"whole", False)[0]==0
span, rng, out = (time.monotonic()-t0)/4, random.Random(seed), []
for i in range(rounds):
    to, kill, status = home/f"k{i}", (rng.randrange(0, 4) if rounds>2 else i+1, rng.uniform(0, span)), 1
    status, said = run(to, False, kill)
    done = checkpoint.epochs_done(checkpoint.checkpoint_path(to))
    seemed = status!=0 and (to/"weights.safetensors").exists() and not checkpoint.checkpoint_path(to).exists()
    status2, said2 = run(to, True)
    equal = status2==0 and all((to/f).read_bytes()==(home/"whole"/f).read_bytes() for f in ("weights.safetensors", "history.csv"))
    out.append(dict(killed=status==9, done=done, shown=said.count("epoch "), began=said2.splitlines()[0], trained=said2.count("/4 "), equal=equal, left=[p.name for p in home.glob(f".k{i}.*")]))
print(json.dumps(out))
'''


def trained(tmp_path, rounds, seed, fault="none"):
    r = subprocess.run([sys.executable, "-c", TRAINER, str(tmp_path), str(rounds), str(seed), fault], capture_output=True, text=True, timeout=3600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert r.returncode==0, r.stdout+r.stderr
    return json.loads(r.stdout.splitlines()[-1])


@pytest.mark.scaled
def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path, many):
    "50 random kills by night; a kill that came after the end says so by itself."
    n = many(2, 50)
    got = trained(tmp_path, n, random.randrange(10**6) if n>2 else 0)
    print(got)
    assert len(got)==n and sum(g["killed"] for g in got)>=n//2
    for g in got:
        assert g["equal"] and g["left"]==[], g
        if g["killed"] and g["done"]: assert g["began"]==f"going on after epoch {g['done']}" and g["trained"]==4-g["done"], g


def test_a_generator_that_is_not_brought_back_is_seen(tmp_path):
    assert not trained(tmp_path, 1, 0, fault="draws")[0]["equal"]
