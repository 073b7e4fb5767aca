"Each check of the repository, with a fault planted that must turn it red."
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tools"))
PARTS = ("nbs", ".github", "defect_detect", "tools", "docker", "settings.ini", "setup.py", "params.yaml", "dvc.yaml", "conftest.py", ".importlinter", "ruff.toml", "README.md", "lock.txt", "constraints.txt", "Makefile")


@pytest.fixture
def copy(tmp_path):
    "The project, to be spoilt."
    to = tmp_path/"p"
    to.mkdir()
    for p in PARTS:
        if (ROOT/p).is_dir(): shutil.copytree(ROOT/p, to/p, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else: shutil.copy(ROOT/p, to/p)
    return to


def check(copy, stage):
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "CI")} | {"PYTHONPATH": str(copy)}
    r = subprocess.run([sys.executable, "tools/test.py", stage], cwd=copy, env=env, capture_output=True, text=True, timeout=300)
    return r.returncode, r.stdout+r.stderr


def edit(path, change):
    nb = nbformat.read(path, 4)
    change(nb.cells)
    nbformat.write(nb, path)


def hand_edit(p): (p/"defect_detect/core/image.py").open("a").write("\n# by hand\n")
def orphan(p): (p/"defect_detect/core/lost.py").write_text("x = 1\n")
def unclean(p): edit(p/"nbs/00_core.image.ipynb", lambda cells: next(c for c in cells if c.cell_type=="code").update(execution_count=3))
def stray_output(p): edit(p/"nbs/00_core.image.ipynb", lambda cells: next(c for c in cells if c.cell_type=="code").update(outputs=[nbformat.v4.new_output("stream", name="stderr", text="a warning")]))
def lost_tag(p): edit(p/"nbs/pipeline/2_train.ipynb", lambda cells: [c.metadata.pop("tags", None) for c in cells])
def a_def(p): edit(p/"nbs/pipeline/2_train.ipynb", lambda cells: cells.append(nbformat.v4.new_code_cell("def f(): pass")))
def higher_room(p): (p/"defect_detect/core/image.py").open("a").write("\ndef f():\n    from ..judge import score\n")
def heavy_service(p): (p/"defect_detect/serve/body.py").open("a").write("\nimport pandas\n")
def wrong_readme(p): (p/"README.md").open("a").write("more\n")
def unused(p): (p/"defect_detect/core/image.py").open("a").write("\nimport json\n")
def failing(p): edit(p/"nbs/00_core.image.ipynb", lambda cells: cells.append(nbformat.v4.new_code_cell("1/0")))


def missing_module(p):
    d = yaml.safe_load((p/"dvc.yaml").read_text())
    d["stages"]["train"]["deps"].remove("${root}/defect_detect/learn/model.py")
    (p/"dvc.yaml").write_text(yaml.safe_dump(d))


def unknown_parameter(p): (p/"params.yaml").write_text((p/"params.yaml").read_text().replace("  epochs:", "  epohcs:", 1))


def stale_form(p): edit(p/"nbs/pipeline/2_train.ipynb", lambda cells: next(c for c in cells if "parameters" in c.metadata.get("tags", [])).update(source=next(c for c in cells if "parameters" in c.metadata.get("tags", [])).source+"\nextra: int = 1 # of a new kind"))


def wrong_output(p):
    f = p/"nbs/tutorials/explore.ipynb"
    text = f.read_text()
    assert "pictures show 24 parts" in text
    f.write_text(text.replace("pictures show 24 parts", "pictures show 25 parts"))
    for other in f.parent.glob("*.ipynb"): # the stage runs as many as there are
        if other!=f: other.unlink()


FAULTS = [("drift", hand_edit, "core/image.py"), ("drift", orphan, "lost.py"), ("drift", unclean, "00_core.image.ipynb"), ("drift", stray_output, "is a complaint"), ("readme", wrong_readme, "README.md"),
          ("stages", lost_tag, "0 cells tagged"), ("stages", a_def, "a def belongs"), ("stages", missing_module, "stage train does not list"), ("stages", unknown_parameter, "epohcs"), ("stages", stale_form, "run update-workflow"),
          ("imports", higher_room, "BROKEN"), ("imports", heavy_service, "BROKEN"), ("style", unused, "F401"), ("tutorials", wrong_output, "pictures show 2")]


@pytest.mark.parametrize("stage,fault,says", FAULTS, ids=[f.__name__ for _, f, _ in FAULTS])
def test_a_planted_fault_is_red(copy, stage, fault, says):
    fault(copy)
    code, out = check(copy, stage)
    assert code==1 and says in out and not out.rstrip().endswith(" 0 failed"), out[-2000:]


def test_a_failing_notebook_is_red(copy):
    for p in (copy/"nbs").glob("[0-9]*.ipynb"):
        if p.name!="00_core.image.ipynb": p.unlink()
    assert check(copy, "library")[0]==0
    failing(copy)
    code, out = check(copy, "library")
    assert code==1 and "ZeroDivisionError" in out


@pytest.mark.parametrize("stage,where", [("tutorials", "nbs/tutorials"), ("library", "nbs"), ("pipeline", "nbs/pipeline")])
def test_a_stage_that_runs_nothing_is_red(copy, stage, where):
    for p in (copy/where).glob("*.ipynb"): p.unlink()
    code, out = check(copy, stage)
    assert code==1 and "ran nothing" in out


def test_an_unspoilt_copy_is_green(copy):
    for stage in ("drift", "readme", "stages", "imports", "style"):
        code, out = check(copy, stage)
        assert code==0, out[-2000:]


@pytest.mark.parametrize("spoil,night", [("", ["long", "rounds"]), ('"many" in', ["long"])])
def test_the_night_has_what_asks_for_many_rounds(tmp_path, spoil, night):
    "By day all but the long ones, at night the long ones and those with more rounds; a rule that forgets `many` is seen."
    text = (ROOT/"conftest.py").read_text()
    assert spoil in text
    (tmp_path/"conftest.py").write_text(text.replace(spoil, '"nobody" in') if spoil else text)
    (tmp_path/"test_x.py").write_text("import pytest\n@pytest.mark.nightly\ndef test_long(): pass\ndef test_rounds(many): pass\ndef test_short(): pass\n")
    def chosen(*words): return re.findall(r"::test_(\w+)", subprocess.run([sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout)
    assert chosen("--nightly", "1/1")==night and chosen()==["rounds", "short"]


def test_an_unknown_stage_is_one_line(): assert check(ROOT, "nosuch")[0]==2


def test_preflight():
    from preflight import problem
    assert problem("lock.txt", "", (3, 11), 100)==""
    assert "3.11 to 3.13" in problem("lock.txt", "", (3, 10), 100) and "3.11 to 3.13" in problem("lock.txt", "", (3, 14), 100)
    assert "GB are free" in problem("lock.txt", "", (3, 12), 1)
    assert "INDEX" in problem("lock-cpu.txt", "", (3, 12), 100)


def test_cpu_lock(tmp_path):
    "The CPU lock takes its hashes from the index that is named, and leaves CUDA out."
    from lock import blocks, cpu_lock
    lock = (ROOT/"lock.txt").read_text()
    names = blocks(lock)
    for n in ("torch", "torchvision"):
        version = names[n].split("==")[1].split()[0]
        (tmp_path/n).mkdir()
        links = [f'<a href="/whl/{n}-{version}%2Bcpu-cp{py}-cp{py}-manylinux_2_28_{m}.whl#sha256={i:064x}">x</a>' for i, (py, m) in enumerate([(310, "x86_64"), (311, "x86_64"), (313, "aarch64")])]
        (tmp_path/n/"index.html").write_text("<html>"+"\n".join(links))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        got = blocks(cpu_lock(lock, f"http://127.0.0.1:{s.server_port}"))
        with pytest.raises(SystemExit, match="cannot be read"): cpu_lock(lock, f"http://127.0.0.1:{s.server_port}/none")
        (tmp_path/"torch/index.html").write_text("<html>")
        with pytest.raises(SystemExit, match="has no torch"): cpu_lock(lock, f"http://127.0.0.1:{s.server_port}")
        s.shutdown()
    gone = set(names)-set(got)
    assert gone and all(n.startswith(("nvidia-", "cuda-", "triton")) for n in gone)
    assert "+cpu" in got["torch"] and f"{1:064x}" in got["torch"] and f"{2:064x}" in got["torchvision"] and f"{0:064x}" not in got["torch"]
    assert all(names[n]==got[n] for n in set(got)-{"torch", "torchvision"})


def test_every_pin_has_a_hash():
    from lock import blocks
    for f in ("lock.txt", "docker/serve.lock"):
        b = blocks((ROOT/f).read_text())
        assert len(b)>10 and all("--hash=sha256:" in v for v in b.values())


def git(where, *words, check=True):
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org"}
    env = {k: v for k, v in env.items() if k not in ("IN_TEST", "CI")}
    r = subprocess.run(["git", *words], cwd=where, env=env, capture_output=True, text=True, timeout=120)
    assert not check or r.returncode==0, r.stdout+r.stderr
    return r


@pytest.fixture
def clone(copy):
    "The project as a repository with `make hooks` done, and a colleague's branch."
    for f in (".gitattributes", ".gitconfig", ".gitignore"): shutil.copy(ROOT/f, copy)
    (copy/".venv/bin").mkdir(parents=True)
    for tool in ("python", "nbdev_merge", "nbdev_export", "nbdev_clean"): # the environment of this test, under the name that the hooks use
        (copy/".venv/bin"/tool).write_text(f"#!/bin/sh\nPYTHONPATH={copy} exec {Path(sys.executable).with_name(tool)} \"$@\"\n")
        (copy/".venv/bin"/tool).chmod(0o755)
    git(copy, "init", "-q", "-b", "main")
    git(copy, "config", "--local", "include.path", "../.gitconfig")
    git(copy, "add", "-A")
    git(copy, "commit", "-qm", "first")
    git(copy, "branch", "colleague")
    return copy


def change(where, n, text, export=True):
    "Add `text` to the n-th export cell of a notebook, export, commit."
    nb = where/"nbs/07_core.files.ipynb"
    edit(nb, lambda cells: [c for c in cells if c.source.startswith("#| export")][n].update(source=[c for c in cells if c.source.startswith("#| export")][n].source+text))
    if export: subprocess.run([where/".venv/bin/nbdev_export"], cwd=where, check=True, env={k: v for k, v in os.environ.items() if k!="IN_TEST"})
    return git(where, "commit", "-qam", "change", check=export)


def test_the_commit_hook(clone):
    r = change(clone, 1, "\n# not exported", export=False)
    assert r.returncode and "make prepare" in r.stdout+r.stderr and git(clone, "log", "--oneline").stdout.count("\n")==1


def test_two_change_different_cells(clone):
    change(clone, 1, "\n# mine")
    git(clone, "switch", "-q", "colleague")
    change(clone, 2, "\n# theirs")
    git(clone, "switch", "-q", "main")
    git(clone, "merge", "-q", "--no-edit", "colleague")
    text = (clone/"defect_detect/core/files.py").read_text()
    assert "# mine" in text and "# theirs" in text and "<<<<" not in text # exported by the hook
    git(clone, "commit", "-qam", "the library follows") if git(clone, "status", "--porcelain", "-uno").stdout else None
    assert check(clone, "drift")[0]==0


def test_two_change_one_cell(clone):
    "The path that README describes."
    change(clone, 1, "\n# mine")
    git(clone, "switch", "-q", "colleague")
    change(clone, 1, "\n# theirs")
    git(clone, "switch", "-q", "main")
    assert git(clone, "merge", "--no-edit", "colleague", check=False).returncode
    nb = nbformat.read(clone/"nbs/07_core.files.ipynb", 4) # it still opens
    nbformat.validate(nb)
    marks = [c for c in nb.cells if any(m in c.source for m in ("<<<<<<<", "=======", ">>>>>>>"))]
    both = [c for c in nb.cells if c.source.endswith(("# mine", "# theirs"))]
    assert len(both)==2 and len(marks)>=2
    nb.cells = [c for c in nb.cells if c not in marks and not c.source.endswith("# theirs")]
    nbformat.write(nb, clone/"nbs/07_core.files.ipynb")
    for tool in ("nbdev_clean", "nbdev_export"): subprocess.run([clone/".venv/bin"/tool], cwd=clone, check=True, env={k: v for k, v in os.environ.items() if k!="IN_TEST"})
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "merged")
    text = (clone/"defect_detect/core/files.py").read_text()
    assert "# mine" in text and "# theirs" not in text and check(clone, "drift")[0]==0
