"A training that is killed goes on to the same bytes; and a run tells nobody about itself."
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

from projects import copy_project
from defect_detect.core.bundle import sha256
from defect_detect.data.demo import write_synth
from defect_detect.learn.checkpoint import checkpoint_path, epochs_done

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("defect-detect")
SMALL = {"prepare.valid": 0.3, "prepare.test": 0.3, "train.height": 64, "train.width": 64, "train.epochs": 3, "train.batch": 4, "train.weights": "none", "train.frozen": 0, "train.threads": 1, "evaluate.draws": 10}
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
from defect_detect.learn.model import make_model, save_model
from defect_detect.learn.train import Checkpoints, history, make_deterministic, train

home, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
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

t0 = time.monotonic()
assert run(home/"whole", False)[0]==0
span, rng, out = (time.monotonic()-t0)/4, random.Random(seed), []
for i in range(rounds+1):
    if i==rounds: # the fault that is planted: the generator of the draws is not brought back
        was = checkpoint._generators
        checkpoint._generators = lambda dls: was(dls)[1:]
    to, kill = home/f"k{i}", (1+i%2 if rounds<=2 or i==rounds else rng.randrange(0, 4), rng.uniform(0, span/4))
    status, said = run(to, False, kill)
    done = checkpoint.epochs_done(checkpoint.checkpoint_path(to))
    status2, said2 = run(to, True)
    equal = status2==0 and all((to/f).read_bytes()==(home/"whole"/f).read_bytes() for f in ("weights.safetensors", "history.csv"))
    out.append(dict(killed=status==9, done=done, shown=said.count("epoch "), began=said2.splitlines()[0], trained=said2.count("/4 "), equal=equal, left=[p.name for p in home.glob(f".k{i}.*")]))
print(json.dumps(out))
'''


def trained(tmp_path, rounds, seed):
    r = subprocess.run([sys.executable, "-c", TRAINER, str(tmp_path), str(rounds), str(seed)], capture_output=True, text=True, timeout=3600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert r.returncode==0, r.stdout+r.stderr
    return json.loads(r.stdout.splitlines()[-1])


def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path, many):
    "50 random kills by night; a kill that came after the end says so by itself."
    n = many(2, 50)
    *got, spoilt = trained(tmp_path, n, random.randrange(10**6) if n>2 else 0)
    print(got)
    assert spoilt["done"] and not spoilt["equal"] # planted: one generator is not brought back
    assert len(got)==n and sum(g["killed"] for g in got)>=n//2
    for g in got:
        assert g["equal"] and g["left"]==[], g
        if g["killed"] and g["done"]: assert g["began"]==f"going on after epoch {g['done']}" and g["trained"]==4-g["done"], g


# seen by every Python process: connects and look-ups of names; strace sees those of native code too, where it is there
HOOK = """
import os, sys
def _guard(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"):
        if event.startswith(("socket.connect", "socket.send")) and not isinstance(args[1], tuple): return # a Unix socket
        host = args[1][0] if event.startswith(("socket.connect", "socket.send")) else args[0][0] if isinstance(args[0], tuple) else args[0]
        if str(host).startswith("127.") or host in ("localhost", "::1", None, ""): return
        with open(os.environ["GUARD_LOG"], "a") as f: f.write(f"{event} {host} {sys.argv[:2]}\\n")
sys.addaudithook(_guard)
with open(os.environ["GUARD_LOG"]+".pids", "a") as f: f.write(f"{os.getpid()}\\n")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "What a run needs of the project, in git, with a home of its own and a guard in every process."
    to = copy_project(tmp_path_factory.mktemp("resume")/"project")
    for w in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "first"]): subprocess.run(["git", *w], cwd=to, check=True)
    for d in ("guard", "home"): (to.parent/d).mkdir()
    (to.parent/"guard/sitecustomize.py").write_text(HOOK)
    write_synth(to.parent/"pictures", tiles=18, exposures=2, bad=.6)
    return to


def guarded(project, *words, log="log"):
    "Starts a command under the guard; what it says comes through a pipe."
    at = project.parent/"guard"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HOME": str(project.parent/"home"), "XDG_CACHE_HOME": "", "GUARD_LOG": str(at/log), "PYTHONPATH": os.pathsep.join([str(at), str(project)])}
    env.pop("XDG_CACHE_HOME")
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg", "-e", "signal=none", "-A", "-o", str(at/f"{log}.strace")] if shutil.which("strace") else []
    return subprocess.Popen([*strace, str(TOOL), *map(str, words)], cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def abroad(project, log="log"):
    "Connects and look-ups that left this machine, one a line; and how many processes were watched."
    at = project.parent/"guard"
    lines = (at/log).read_text().splitlines() if (at/log).exists() else []
    trace = (at/f"{log}.strace").read_text(errors="replace").splitlines() if (at/f"{log}.strace").exists() else []
    native = [s for s in trace if "sa_family=AF_INET" in s and ('htons(53)' in s or not ('inet_addr("127.' in s or '"::1"' in s))]
    return lines+native, len(set((at/f"{log}.pids").read_text().split()))


def test_a_killed_pipeline_goes_on_and_nobody_hears_of_it(project, tmp_path):
    "Killed in its second epoch and resumed; its training equals one that was never killed. All processes of both runs stay on this machine and leave home alone."
    p = guarded(project, "run", "pipeline", "x", "--data", "../pictures", *QUICK)
    for line in p.stdout:
        if "epoch 1/3" in line: break
    family = psutil.Process(p.pid).children(recursive=True)
    command = family[0] if shutil.which("strace") else psutil.Process(p.pid)
    command.kill()
    said = p.communicate(timeout=60)[0]
    psutil.wait_procs(family, timeout=30)
    run = project/"runs/x"
    n = epochs_done(checkpoint_path(run/"train"))
    assert n in (1, 2) and not (run/"run.json").exists(), said
    p = guarded(project, "run", "pipeline", "x", "--data", "../pictures", "--resume", *QUICK)
    said = p.communicate(timeout=600)[0]
    assert p.returncode==0 and f"going on after epoch {n}" in said, said
    assert not list(run.glob(".*checkpoint*")) and (run/"run.json").exists()
    found, watched = abroad(project)
    assert found==[] and watched>10, found # the command, DVC, a shell's child and a kernel for each stage
    assert [f for f in (project.parent/"home").rglob("*") if f.is_file() and not set(f.relative_to(project.parent/"home").parts)&{"matplotlib", ".ipython", "fontconfig"}]==[]
    assert subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True).stdout==""
    assert (run/"dvc.yaml").read_bytes()==(ROOT/"dvc.yaml").read_bytes() and (run/"curves/plots/metrics/valid_loss.tsv").read_text().count("\n")==4
    words = [w for k, v in {"data": run/"data", "table": run/"prepare/table.csv", "out": tmp_path/"whole", **{k[6:]: v for k, v in SMALL.items() if k.startswith("train.")}}.items() for w in ("-p", f"{k}={v}")]
    # the run's own parameters, so that model.json is the same as well
    r = subprocess.run([str(TOOL), "run", str(project/"nbs/pipeline/2_train.ipynb"), "-o", str(tmp_path/"2.ipynb"), "-f", str(run/"params.yaml"), "-s", "train", *words], cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(project)})
    assert r.returncode==0, r.stdout+r.stderr
    assert {f.name: sha256(f.read_bytes()) for f in (run/"train").iterdir()}=={f.name: sha256(f.read_bytes()) for f in (tmp_path/"whole").iterdir()}


def test_the_guard_sees_who_calls_home(project, tmp_path):
    "A notebook that connects, one way in Python, one in C, and asks for a name."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("n: int = 1", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(
        "import ctypes, socket, struct\ns = socket.socket(); s.settimeout(.2)\ntry: s.connect(('192.0.2.1', 9))\nexcept OSError: pass\n"
        "try: socket.getaddrinfo('name.invalid', 80)\nexcept OSError: pass\n"
        "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nto = struct.pack('=HH4s8x', socket.AF_INET, socket.htons(9), bytes([192, 0, 2, 2]))\nctypes.CDLL(None).connect(u.fileno(), to, 16)")])
    nbformat.write(nb, project/"nbs/calls.ipynb")
    p = guarded(project, "run", "nbs/calls.ipynb", "-o", tmp_path/"o.ipynb", log="planted")
    assert p.communicate(timeout=120) and p.returncode==0
    (project/"nbs/calls.ipynb").unlink()
    found, _ = abroad(project, "planted")
    assert any("192.0.2.1" in s for s in found) and any("name.invalid" in s for s in found)
    if shutil.which("strace"): assert any("192.0.2.2" in s for s in found)
