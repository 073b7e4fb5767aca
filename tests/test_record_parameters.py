"Names, values and paths meant to run code: each is refused before a kernel starts, or arrives as what it is, data."
import json
import random
import re
import shutil
import sys
from contextlib import chdir
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from defect_detect.cli.base import call
from defect_detect.run.notebook import run_notebook
from defect_detect.run.schema import ParameterError, read_schema

ROOT = Path(__file__).resolve().parents[1]
CODE = "open('ran', 'w').close()"
EVIL = ["{a.__class__}", "{a.__init__.__globals__}", "{0}", "{{}}", f"n = 1\n{CODE}", f"n=1\r{CODE}\nx", f"'; {CODE} #", f'"; {CODE} #', f'"""\n{CODE}\n"""', f"\\'; {CODE} #", f"\\\\\"\n{CODE}", f"n\n{CODE}\nm", f"n; {CODE}; m",
        "!touch ran", "%system touch ran", "%%bash\ntouch ran", "$(touch ran)", "`touch ran`", "; touch ran", "| touch ran", "${root}", "${__import__('os').system('touch ran')}", "../../x", "..", "/etc/passwd", "~", "-", "--help", "a\x00b",
        "http://127.0.0.1:9/a.ipynb", "https://me:pw@127.0.0.1/a", "s3://bucket/a.ipynb", "file:///etc/passwd", "x"*100_000, "ｎ", "n\u2028", "n\u202e", "\ud800", "\x1b[31m", "\x07", "%s%n", "!!python/object/apply:os.system [touch ran]", "[" * 5000,
        "9"*5000, "{? {? a: b}: c}", "&a [*a]", "__import__", "__class__", "lambda: 0", "import os", "n: int", "𝓷", "n.real", "n[0]", "*n", "n:=1"]
words = st.one_of(st.sampled_from(EVIL), st.text(max_size=60), st.builds(lambda a, e, b: a+e+b, st.text(max_size=8), st.sampled_from(EVIL[:32]), st.text(max_size=8)))
# cells: the canary is the file `ran`, whoever writes it
CELL = "n: int = 1 # a number\nlr: float = 0.1\nkind: Literal['fpn', 'unet'] = 'fpn'\nquick: bool = False\nbounded: Annotated[int, Field(ge=1, le=9)] = 1\nmany: list[str] = []\ns: str = ''"
HEAD = "from typing import Annotated, Literal\nfrom pydantic import Field"
quick = settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

started = []
sys.addaudithook(lambda event, args: started.append(args[0] if args else event) if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system", "os.fork") else None)


def make(folder):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(HEAD), nbformat.v4.new_code_cell(CELL, metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("import json; open('got.json', 'w').write(json.dumps([s, many]))")])
    nbformat.write(nb, folder/"a.ipynb")
    return folder/"a.ipynb"


@pytest.fixture(scope="module")
def nb(tmp_path_factory): return make(tmp_path_factory.mktemp("inject"))


def refused(folder, *args, codes=(2,)):
    "One line, the right code, no process, no file."
    before, n = sorted(folder.rglob("*")), len(started)
    with chdir(folder): code, out, err = call(*args)
    assert code in codes and out=="" and err.startswith("error: ") and err.count("\n")==1 and len(err)<600 and "Traceback" not in err and "bug of ours" not in err, (str(args)[:300], code, err[:600])
    assert err[:-1].isprintable(), ascii(err)
    assert len(started)==n, f"{args} started {started[n:]}"
    assert sorted(folder.rglob("*"))==before


def argument(s): return "\x00" not in s


@quick
@given(words)
def test_names(nb, name):
    "On the command line and in a file."
    if name.split("=")[0] not in read_schema(nb).parameters and argument(name): refused(nb.parent, "run", nb, "-o", "o.ipynb", "-p", f"{name}=1")
    if name in read_schema(nb).parameters: return
    with pytest.raises(ParameterError): read_schema(nb).check({name: 1})
    with pytest.raises(ParameterError): run_notebook(nb, nb.parent/"o.ipynb", {name: 1})


@quick
@given(st.sampled_from(["n", "lr", "kind", "quick", "bounded", "many", "s"]), words)
def test_values(nb, name, value):
    "What fits is of the right type and nothing else; what does not is refused."
    schema = read_schema(nb)
    try: got = schema.parse([f"{name}={value}"])[name]
    except ParameterError: return refused(nb.parent, "run", nb, "-o", "o.ipynb", "-p", f"{name}={value}") if argument(value) else None
    assert type(got) in dict(n=(int,), lr=(float, int), kind=(str,), quick=(bool,), bounded=(int,), many=(list,), s=(str,))[name]
    if name=="kind": assert got in ("fpn", "unet")
    if name=="bounded": assert 1<=got<=9
    if name=="s": assert got==value


@quick
@given(words)
@example("http://127.0.0.1:9/a.ipynb")
def test_paths(nb, path):
    "As notebook: there is none, or it is no plain path. As output: addresses, braces and control characters."
    if not argument(path) or path.startswith("-"): return
    if not path.endswith(".ipynb"): path += ".ipynb"
    refused(nb.parent, "run", path, "-o", "o.ipynb", codes=(1, 2))
    if "://" in path or set("{}")&set(path) or not path.isprintable(): refused(nb.parent, "run", nb, "-o", path)


def test_files(nb, tmp_path):
    "Whatever a YAML file holds."
    for text in ("[1, 2]", "a: b: c", "&a [*a]", "!!python/object/apply:os.system [touch ran]", "["*100_000, "n: 2020-13-45", "n: "+"9"*5000, "\x00", "{n: {a: 1}}", "? [n]\n: 1", "1: 2", f"{json.dumps('n'+chr(10)+CODE)}: 1"):
        (nb.parent/"p.yaml").write_text(text)
        refused(nb.parent, "run", nb, "-o", "o.ipynb", "-f", "p.yaml")
    (nb.parent/"p.yaml").write_bytes(b"\xff\xfe\x00")
    refused(nb.parent, "run", nb, "-o", "o.ipynb", "-f", "p.yaml")
    (nb.parent/"p.yaml").write_text("a: {n: 2}\n")
    refused(nb.parent, "run", nb, "-o", "o.ipynb", "-f", "p.yaml", "-s", "b")
    (nb.parent/"p.yaml").unlink()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    to = tmp_path_factory.mktemp("inject")/"project"
    shutil.copytree(ROOT/"nbs/pipeline", to/"nbs/pipeline", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for f in ("dvc.yaml", "params.yaml", "lock.txt"): shutil.copy(ROOT/f, to)
    (to/"pictures").mkdir()
    return to


@quick
@given(words, st.sampled_from(["name", "stage", "parameter", "value"]))
def test_pipelines(project, word, where):
    "Names of runs, stages and parameters, and values of numbers."
    if not argument(word) or (where=="name" and (word.startswith("-") or re.fullmatch(r"[a-z0-9][a-z0-9._-]*", word) or word.endswith(".ipynb"))) or (where=="value" and re.fullmatch(r"\s*[\d_.:+-]+\s*", word)): return
    args = dict(name=[word], stage=["x", "-p", f"{word}.lr=0.1"], parameter=["x", "-p", f"train.{word}=1"], value=["x", "-p", f"train.epochs={word}"])[where]
    refused(project, "run", "pipeline", *args, "--data", project/"pictures")


def test_what_fits_arrives_as_data(nb):
    "200 texts through one kernel, none of which runs."
    rng = random.Random(0)
    fits = [w for w in EVIL if not any(c in w for c in ("\ud800", "https://me:pw@"))]
    many = [rng.choice(fits)[:2000]+rng.choice(["", "'", '"', "\\", "\n"])+rng.choice(fits)[:2000] for _ in range(200)]
    values = read_schema(nb).check(dict(s=f"'; {CODE} #\n\"\"\"{{s}}", many=many))
    run_notebook(nb, nb.parent/"o.ipynb", values, cwd=nb.parent, say=lambda s: None)
    assert json.loads((nb.parent/"got.json").read_text())==[values["s"], many] and not (nb.parent/"ran").exists()


def test_the_fault_is_seen(tmp_path):
    "papermill alone runs the code in a parameter's name: the canary is alive, and a started kernel is noticed."
    import papermill
    n = len(started)
    papermill.execute_notebook(str(make(tmp_path)), str(tmp_path/"o.ipynb"), parameters={f"n = 1\n{CODE}\nx": 1}, cwd=str(tmp_path), kernel_name="python3", language="python", progress_bar=False)
    assert (tmp_path/"ran").exists() and len(started)>n


def test_the_help_is_for_people():
    "Choices and ranges in words, for every stage."
    for p in sorted((ROOT/"nbs/pipeline").glob("*.ipynb")):
        text = read_schema(p).help()
        assert "Annotated" not in text and "Literal" not in text and "Field" not in text, p.name
    assert "fpn | unet" in call("run", ROOT/"nbs/pipeline/2_train.ipynb", "--help")[1] and "int from 64 to 2048 in steps of 32" in text+call("run", ROOT/"nbs/pipeline/2_train.ipynb", "--help")[1]
