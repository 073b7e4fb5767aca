"A registry for tests: a bare remote behind a server of git's own, clones of it, and one step of a release as a process of its own."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

from defect_detect.core.bundle import sha256

ROOT = Path(__file__).resolve().parents[1]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GIT_CONFIG_GLOBAL": os.devnull}
# The gate of these tests reads the records of both sides, and says that it was asked; what the real one looks at is tested elsewhere.
STEP = """
import json, sys
from defect_detect.release.bounds import Line
from defect_detect.release.promotion import promote, rollback
from defect_detect.run.record import read_recorded
action, root, version, log = sys.argv[1:]
def ask(name, commit, serving):
    for c in filter(None, (commit, serving)): read_recorded(c, name, root)
    with open(log, "a") as f: f.write(json.dumps([version, serving])+"\\n")
    return [Line("record", True, "whole", "whole")]
say = lambda s: print(s, file=sys.stderr)
o = promote("dev", "m", version, root, ask, say=say) if action=="promote" else rollback("dev", "m", None, root, say=say)
print(json.dumps(o.json()))
"""


def git(cwd, *words): return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *map(str, words)], cwd=cwd, check=True, capture_output=True, text=True, env=ENV).stdout


def write_record(root, text):
    "A whole record of nothing, committed."
    (root/"models/m").mkdir(parents=True, exist_ok=True)
    for f in ("params.yaml", "metrics.json", "card.md", "dvc.lock"): (root/"models/m"/f).write_text(text)
    (root/"models/m/run.json").write_text(json.dumps(dict(dvc_lock=sha256(text.encode()))))
    git(root, "add", ".")
    git(root, "commit", "-qm", text)


@contextmanager
def served(at, versions=3):
    "The remote, served on loopback, with so many versions registered; yields its folder and its address."
    far = at/"far/m.git"
    git(at, "init", "-q", "--bare", far)
    git(at, "clone", "-q", far, "seed")
    for i in range(versions):
        write_record(at/"seed", f"model {i}")
        git(at/"seed", "tag", "-a", f"m@v0.{i+1}.0", "-m", "x")
    git(at/"seed", "push", "-q", "--tags", "origin", "HEAD")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    daemon = Path(git(at, "--exec-path").strip())/"git-daemon"
    p = subprocess.Popen([str(daemon), "--listen=127.0.0.1", f"--port={port}", "--base-path="+str(at/"far"), "--export-all", "--enable=receive-pack", "--reuseaddr"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port))==0: break
            time.sleep(.05)
        yield far, f"git://127.0.0.1:{port}/m.git", p
    finally:
        p.terminate()
        p.wait()


def clone(at, url, name):
    git(at, "clone", "-q", url, name)
    git(at/name, "config", "user.name", name)
    git(at/name, "config", "user.email", f"{name}@example.org")
    for t in git(at/name, "tag").split(): git(at/name, "tag", "-d", t) # it has to ask
    return at/name


def step(action, root, version, log, **more): return subprocess.Popen([sys.executable, "-c", STEP, action, str(root), version, str(log)], env=ENV | more.pop("env", {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **more)


def quiet(daemon):
    "Wait until the server has done what it was asked."
    for _ in range(200):
        if not psutil.Process(daemon.pid).children(recursive=True): return
        time.sleep(.02)


def state(far):
    "Stages on the remote: tag -> commit; every one whole."
    refs = dict(r.split() for r in git(far, "for-each-ref", "--format=%(refname:strip=2) %(*objectname)", "refs/tags/m#*").splitlines())
    for c in refs.values(): assert json.loads(git(far, "cat-file", "blob", f"{c}:models/m/run.json"))["dvc_lock"]==sha256(git(far, "cat-file", "blob", f"{c}:models/m/dvc.lock").encode())
    return refs


def befores(far):
    "What each tag says that it took the place of, in the order of the counters."
    from defect_detect.release.registry import parse_tag
    rows = [(parse_tag(r).counter, git(far, "cat-file", "tag", f"refs/tags/{r}")) for r in state(far)]
    said = lambda text, key: next((s.split(": ")[1] for s in text.splitlines() if s.startswith(key+": ")), None)
    return [(n, said(t, "Before"), said(t, "Version")) for n, t in sorted(rows)]


def locks(root): return [p for p in (root/".git").rglob("*.lock")]


def shim(at, nth, rule, log):
    "A folder with a `git` whose `nth` call is stopped by `rule`, as strace writes it; 0: every call is listed in `log`."
    real = shutil.which("git")
    (at/"bin").mkdir(parents=True, exist_ok=True)
    traced = f'exec strace -f -qq -e signal=none -e trace=execve,openat,write,fsync,rename,renameat2,link,linkat,unlink,connect -o "{log}.$n" ' if not nth else f'if [ "$n" != {nth} ]; then exec {real} "$@"; fi\nexec strace -f -qq -e inject={rule} -o "{log}.$n" '
    (at/"bin/git").write_text(f'#!/bin/sh\nn=$(( $(cat "{at}/n" 2>/dev/null || echo 0) + 1 )); echo $n > "{at}/n"\n{traced}{real} "$@"\n')
    (at/"bin/git").chmod(0o755)
    (at/"n").unlink(missing_ok=True)
    return {"PATH": f"{at/'bin'}{os.pathsep}{os.environ['PATH']}"}
