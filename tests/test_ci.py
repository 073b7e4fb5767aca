"What ci.yml says, typed into a fresh clone. `make test` itself is left out: it is what runs this."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") and k!="CI"} | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
BY_NIGHT = ("make install", "tools/test.py pipeline", "tests/test_image.py") # minutes each; `make test` runs the last two by day


def git(cwd, *words): return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], cwd=cwd, check=True, capture_output=True, text=True, env=ENV).stdout


def lines(text:str)->list[tuple[str, str]]: # job, command
    "Every `run:` of a workflow, and nothing that needs GitHub."
    out = []
    for job, j in yaml.safe_load(text)["jobs"].items():
        for s in j["steps"]:
            if "run" in s and s["run"].strip() not in (".ci/run", "make test"): out.append((job, "\n".join(r for r in s["run"].splitlines() if not r.startswith("gh "))))
    return out


def clone(to, ci:str):
    "A clone with a remote of its own, whose ci.yml is `ci`."
    git(to, "clone", "-q", "--bare", ROOT, "far.git")
    git(to, "clone", "-q", to/"far.git", "p")
    p = to/"p"
    if (p/".github/workflows/ci.yml").read_text()!=ci:
        (p/".github/workflows/ci.yml").write_text(ci)
        git(p, "commit", "-qnam", "another ci.yml")
    return p


def typed(p, ci:str, night:bool):
    "The first line that fails, and its end; or nothing."
    if not night:
        (p/".venv").symlink_to(Path(sys.executable).parents[1])
        (p/".git/info/exclude").write_text(".venv\n") # .gitignore names the folder; this is a link
    env = {**ENV, "HOME": str(p.parent), "GIT_CONFIG_NOSYSTEM": "1", **({} if night else {"PYTHONPATH": str(p)})} # a runner's git knows nobody
    for _, command in lines(ci):
        if not night and any(k in command for k in BY_NIGHT): continue
        if "git bundle" in command: # what `.ci/run` with --note has left, of the smallest stage
            subprocess.run([p/".venv/bin/python", "tools/test.py", "imports", "--note"], cwd=p, env=env, check=True, capture_output=True)
        if "dist/tests.bundle" in command: # what the artifact carries from job to job
            (p/"dist").mkdir(exist_ok=True)
            shutil.copy(p/"tests.bundle", p/"dist")
        r = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", command], cwd=p, env=env, capture_output=True, text=True)
        if r.returncode: return command, (r.stdout+r.stderr)[-2000:]


def test_ci_lines(tmp_path, many):
    ci = (ROOT/".github/workflows/ci.yml").read_text()
    assert len(lines(ci))>=8 and {j for j, _ in lines(ci)}=={"quick", "test", "evidence"}
    p = clone(tmp_path, ci)
    assert typed(p, ci, many(False, True)) is None
    assert git(tmp_path/"far.git", "notes", "--ref", "tests", "list").strip(), "the evidence did not arrive"


@pytest.mark.parametrize("was,now", [("tools/test.py supply", "tools/test.py suply"), ("run: git bundle create tests.bundle", "run: git bundle make tests.bundle")], ids=["stage", "git"])
def test_ci_lines_see_a_fault(tmp_path, was, now):
    ci = (ROOT/".github/workflows/ci.yml").read_text()
    assert ci.count(was)==1
    ci = ci.replace(was, now).replace("tools/test.py drift readme stages imports style", "tools/test.py imports")
    got = typed(clone(tmp_path, ci), ci, False)
    assert got and got[0] in now.replace("run: ", "")+" refs/notes/tests .venv/bin/python tools/test.py suply", got
