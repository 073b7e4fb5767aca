"Sweeps as processes: what a kill, a Ctrl-C or a second machine does to them."
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from defect_detect.run.receipt import read_receipt
from defect_detect.run.sweep import STORAGE, open_storage, read_sweep

TOOL = Path(sys.executable).with_name("defect-detect")
FIT = """
import math, pathlib, time, yaml
p, rows = yaml.safe_load(open("params.yaml"))["train"], ["epoch,picture_auroc"]
for e in (1, 2):
    time.sleep(p["nap"])
    v = max(0, .9-.2*abs(math.log10(p["lr"])+2))*e/2
    print(f"epoch {e}/2  picture_auroc {v:.4f}", flush=True)
    rows.append(f"{e},{v:.6f}")
pathlib.Path("train").mkdir()
pathlib.Path("train/history.csv").write_text("\\n".join(rows)+"\\n")
"""


def project(to):
    "A project whose training is a formula."
    (to/"nbs/pipeline").mkdir(parents=True)
    (to/"pictures").mkdir()
    (to/"pictures/a.txt").write_text("1")
    (to/"fit.py").write_text(FIT)
    cell = "lr: Annotated[float, Field(gt=0, le=1)] = .003\nnap: float = 0.\n"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell, metadata=dict(tags=["parameters"]))]), to/"nbs/pipeline/2_train.ipynb")
    shutil.copy(Path(__file__).parents[1]/"nbs/pipeline/sweep.ipynb", to/"nbs/pipeline")
    (to/"params.yaml").write_text("train: {nap: 0.4}\ndemo: {}\n")
    stage = dict(cmd=f"{sys.executable} ${{root}}/fit.py # 2_train.ipynb", deps=["data", "${root}/fit.py"], params=["train"], outs=["train"])
    (to/"dvc.yaml").write_text(yaml.safe_dump(dict(stages=dict(train=stage))))
    (to/"space.yaml").write_text("train.lr: {low: 1e-4, high: 1, log: true}\n")
    return to


def start(root, trials, *words, **env):
    every = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([TOOL, "sweep", "space.yaml", "--name", "s", "--data", "pictures", "--trials", str(trials), "--warmup", "9", *words], cwd=root, env=every, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def until(what, seconds=120):
    end = time.monotonic()+seconds
    while not what():
        assert time.monotonic()<end, "waited in vain"
        time.sleep(.05)


def study(root, url=""):
    import optuna
    return optuna.load_study(study_name="s", storage=open_storage(root/"runs/s", url)).get_trials(deepcopy=False)


def training(root): return any("fit.py" in " ".join(p.info["cmdline"] or []) and Path(p.info["cwd"] or "/").is_relative_to(root) for p in psutil.process_iter(["cmdline", "cwd"]))


def whole(found, root, n):
    "`n` trials, each with its receipt, each of other values; numbers as the runs say."
    assert [t["state"] for t in found.trials]==["complete"]*n
    for t in found.trials:
        assert read_receipt(root/"runs"/t["run"])["params"]["train"]["lr"]==t["params"]["train.lr"]
    assert len({t["params"]["train.lr"] for t in found.trials})==n


def test_a_stopped_sweep_goes_on(tmp_path):
    "First SIGKILL to the command alone, then SIGINT to all of them as a terminal does; the third call ends with as many trials as asked for."
    root = project(tmp_path)
    for sig in (signal.SIGKILL, signal.SIGINT):
        p = start(root, 3, "--workers", "2")
        until(lambda: training(root))
        family = psutil.Process(p.pid).children(recursive=True)
        os.killpg(p.pid, sig) if sig==signal.SIGINT else p.send_signal(sig)
        _, err = p.communicate(timeout=60)
        until(lambda: not [k for k in family if k.is_running() and k.status()!=psutil.STATUS_ZOMBIE], 30)
        if sig==signal.SIGINT: assert (p.returncode, err)==(130, "stopped; nothing half-written was kept\n")
    out, err = (p := start(root, 3, "--workers", "2", "--json")).communicate(timeout=240)
    assert p.returncode==0, err
    found = read_sweep("s", root)
    whole(found, root, 3)
    lost = [t for t in study(root) if t.state.name=="FAIL"]
    assert len(lost)>=2 and all("why" not in t.user_attrs for t in lost)
    said = json.loads(out)
    page = (root/"runs/s/sweep.html").read_text()
    assert all(t["run"] in page for t in found.trials) and page.count("<img ")==1 and "The chosen point" in page
    assert said["best"]["run"]==found.best["run"] and f"-p train.lr={found.best['params']['train.lr']}" in said["command"]


def test_a_killed_worker_loses_only_its_trial(tmp_path):
    p = start(root := project(tmp_path), 3, "--workers", "2")
    until(lambda: training(root))
    second = start(root, 3) # two calls at once on one sweep
    worker = next(c for c in psutil.Process(p.pid).children() if "sweep import work" in " ".join(c.cmdline()))
    until(lambda: worker.children())
    worker.kill()
    assert second.communicate(timeout=60)[1].count("\n")==1 and second.returncode==1
    out, err = p.communicate(timeout=240)
    assert p.returncode==0, out+err
    whole(read_sweep("s", root), root, 3)
    assert sum(t.state.name=="FAIL" for t in study(root))==1
    table = out[out.index("run "):] # the lines of the workers come before
    assert f"defect-detect run pipeline s-best --data pictures -p train.lr={read_sweep('s', root).best['params']['train.lr']}" in table


def test_a_training_that_fails_is_told_once(tmp_path):
    root = project(tmp_path)
    (root/"fit.py").write_text("raise SystemExit('error: no good')\n")
    out, err = (p := start(root, 9)).communicate(timeout=240)
    assert p.returncode==1 and "three trials in a row" in err and err.count("\n")==1
    assert [t["state"] for t in read_sweep("s", root).trials]==["fail"]*3 # planted: what does not train is not tried nine times


def test_half_a_line_of_a_killed_writer(tmp_path):
    "The journal as Optuna locks it cannot be read after; with our lock it can."
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage
    for ours in (False, True):
        (folder := tmp_path/str(ours)).mkdir()
        open_ = (lambda: open_storage(folder)) if ours else (lambda: JournalStorage(JournalFileBackend(str(folder/"journal.jsonl"))))
        optuna.create_study(study_name="s", storage=open_())
        with open(folder/"journal.jsonl", "ab") as f: f.write(b'{"op_code": 4, "wor')
        with contextlib.nullcontext() if ours else pytest.raises((ValueError, AttributeError)):
            optuna.load_study(study_name="s", storage=open_()).ask()
            assert len(optuna.load_study(study_name="s", storage=open_()).trials)==1


def test_the_command_line_loads_no_optuna():
    for line, there in (("", False), ("; import optuna", True)): # planted
        code = f"import sys; from defect_detect.cli.base import load; load(){line}; print(sorted({{'optuna', 'sqlalchemy', 'torch'}}&set(sys.modules)))"
        assert ("optuna" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout)==there


SECRET = "Canary5eCretWord"


@pytest.fixture(scope="module")
def postgres():
    "A database server of our own on a loopback port; yields an URL with its password."
    bins = [p.parent for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)] or [Path(p).parent for p in [shutil.which("initdb")] if p]
    if not bins: pytest.skip("no PostgreSQL server is installed: sweeps over several machines were not tested")
    who = {"user": "postgres", "group": pwd.getpwnam("postgres").pw_gid, "extra_groups": []} if os.getuid()==0 else {}
    with tempfile.TemporaryDirectory(prefix="pg-") as room, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        word = Path(room)/"word"
        word.write_text(SECRET)
        if who:
            for p in (Path(room), word): shutil.chown(p, "postgres")
        subprocess.run([bins[0]/"initdb", "-D", f"{room}/data", "-U", "me", "-A", "scram-sha-256", f"--pwfile={word}", "-E", "UTF8", "--locale=C"], check=True, capture_output=True, timeout=120, cwd=room, **who)
        word.unlink()
        server = subprocess.Popen([bins[0]/"postgres", "-D", f"{room}/data", "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"], cwd=room, stderr=subprocess.DEVNULL, **who)
        try:
            until(lambda: server.poll() is not None or socket.socket().connect_ex(("127.0.0.1", port))==0, 60)
            time.sleep(1)
            yield f"postgresql://me:{SECRET}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def told(*roots): return [str(p) for r in roots for p in r.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_two_machines_on_one_database(tmp_path, postgres):
    "Two projects take part in one sweep; together they run as many trials as asked for, and nobody writes the password down."
    roots = [project(tmp_path/n) for n in "ab"]
    calls = [start(r, 5, **{STORAGE: postgres}) for r in roots]
    until(lambda: any(training(r) for r in roots))
    commands = " ".join(" ".join(c) for p in psutil.process_iter(["cmdline"]) if (c := p.info["cmdline"]))
    said = [p.communicate(timeout=240) for p in calls]
    assert [p.returncode for p in calls]==[0, 0], said
    found = read_sweep("s", roots[0], postgres)
    assert [t["state"] for t in found.trials]==["complete"]*5
    at = [[read_receipt(r/"runs"/t["run"]) is not None for r in roots] for t in found.trials]
    assert all(sum(a)==1 for a in at) and {a.index(True) for a in at}=={0, 1} # each trial on one machine, both took part
    assert SECRET not in str(said)+commands and not told(*roots)
    (roots[0]/"runs/planted").write_text(postgres)
    assert told(*roots)==[str(roots[0]/"runs/planted")]
    wrong = postgres.replace(SECRET, f"{SECRET}x")
    _, err = (p := start(roots[1], 9, **{STORAGE: wrong})).communicate(timeout=120)
    assert p.returncode==1 and err.count("\n")==1 and "does not answer" in err and SECRET not in err
