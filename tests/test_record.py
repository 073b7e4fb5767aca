"What a run leaves behind: its receipt, and that no secret is in it."
import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from projects import copy_project
from defect_detect.core.bundle import sha256
from defect_detect.data.demo import write_synth
from defect_detect.run.receipt import read_receipt, read_record

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("defect-detect")
QUICK = [w for p in ("prepare.valid=0.3", "prepare.test=0.3", "train.height=64", "train.width=64", "train.epochs=1", "train.batch=4", "train.weights=none", "train.frozen=0", "evaluate.draws=10") for w in ("-p", p)]


def canary(where): return f"CANARY{sha256(where.encode())[:12]}"


# variables that hold secrets on real machines, and two that are on the list of those that are recorded
PLANTED = {"AWS_SECRET_ACCESS_KEY": "{}", "GITHUB_TOKEN": "ghp_{}", "HF_TOKEN": "hf_{}", "DATABASE_URL": "postgresql://me:{}@127.0.0.1/x", "HTTPS_PROXY": "http://me:{}@127.0.0.1:9", "PIP_INDEX_URL": "https://me:{}@127.0.0.1/simple",
           "DEFECT_DETECT_ADMIN_TOKEN": "{}", "ONEDNN_MAX_CPU_ISA": "https://me:{}@host/"}
OTHERS = ("netrc", "remote", "git config", "dirty", "untracked", "parameter", "commit message")
WORDS = {k: canary(k) for k in (*PLANTED, *OTHERS)}


def hits(*folders, text=""):
    "Which canaries are in the files, names or `text`; plainly or in base64 at any offset."
    forms = {k: {w.encode(), *(base64.b64encode(b"x"*i+w.encode())[4:-4] for i in range(3))} for k, w in WORDS.items()}
    seen = [text.encode()]+[os.fsencode(p.name)+b"\n"+(p.read_bytes() if p.is_file() else b"") for f in folders for p in f.rglob("*")]
    return sorted(k for k, fs in forms.items() if any(f in s for f in fs for s in seen))


def git(cwd, *words): subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], cwd=cwd, check=True, capture_output=True, env={k: v for k, v in os.environ.items() if not k.startswith("GIT_")})


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "What a run needs of the project, in a repository with secrets all around."
    to = copy_project(tmp_path_factory.mktemp("record")/"project")
    git(to, "init", "-q")
    git(to, "add", ".")
    git(to, "commit", "-qm", f"first {WORDS['commit message']}")
    git(to, "remote", "add", "origin", f"https://me:{WORDS['remote']}@example.org/x.git")
    git(to, "config", "http.extraheader", f"Authorization: {WORDS['git config']}")
    with open(to/"params.yaml", "a") as f: f.write(f"# {WORDS['dirty']}\n")
    (to/"nbs/.env").write_text(f"KEY={WORDS['untracked']}\n")
    home = to.parent/"home"
    home.mkdir()
    (home/".netrc").write_text(f"machine example.org login me password {WORDS['netrc']}\n")
    write_synth(to.parent/"pictures", tiles=18, exposures=2, bad=.6)
    return to


def call(project, *words, **env):
    "Exit code, standard output, standard error; with the canaries in the environment."
    planted = {k: v.format(WORDS[k]) for k, v in PLANTED.items()}
    every = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HOME": str(project.parent/"home"), **planted, **env}
    r = subprocess.run([str(TOOL), *map(str, words)], cwd=project, env=every, capture_output=True, text=True, timeout=600)
    return r.returncode, r.stdout, r.stderr


@pytest.fixture(scope="module")
def first(project):
    "A run, and all that was said meanwhile."
    rc, out, err = call(project, "run", "pipeline", "first", "--data", project.parent/"pictures", "--ask", *QUICK)
    assert rc==0, out+err
    return project/"runs/first", out+err


def test_receipt(project, first):
    run, _ = first
    r = read_receipt(run)
    params = yaml.safe_load((run/"params.yaml").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True).stdout.strip()
    assert r["git"]["commit"]==head and r["git"]["dirty"] and len(r["git"]["diff"])==64
    assert r["lock"]==sha256((project/"lock.txt").read_bytes()) and r["params"]["train"]==params["train"] and r["seeds"]["train"]==0 and r["threads"]["train"]==2
    assert r["data"]["files"]==len([p for p in (run/"data").rglob("*") if p.is_file()]) and r["data"]["table"]==sha256((run/"prepare/table.csv").read_bytes())
    assert r["versions"]["torch"] and r["machine"]["cpu"] and r["environment"]["OMP_NUM_THREADS"]=="1" and r["environment"]["PYTHONHASHSEED"]=="0"
    for name, s in r["stages"].items(): assert s["how"]=="ran" and s["seconds"]>0 and s["peak_memory_mb"]>50 and not s["differs"], name
    assert r["peak_memory_mb"]==max(s["peak_memory_mb"] for s in r["stages"].values())
    assert str(project.parent) not in (run/"run.json").read_text(), "no folder of this machine"
    assert not any("run.json" in str(o) for s in yaml.safe_load((run/"dvc.lock").read_text())["stages"].values() for o in s["outs"])
    assert all(read_record(p) for p in run.glob("notebooks/?_*.ipynb")) and len(list(run.glob("notebooks/*.run.json")))==4


def test_no_secret_leak(project, first):
    run, said = first
    (project/"token.ipynb").write_text((project/"nbs/pipeline/1_prepare.ipynb").read_text().replace('"seed: int = 0', '"token: str = \\"\\"\\n",\n    "seed: int = 0'))
    logs = said
    for words in (["run", "nbs/pipeline/1_prepare.ipynb", "-o", "runs/o.ipynb", "-p", f"data=https://me:{WORDS['parameter']}@host/x"], ["run", "token.ipynb", "-o", "runs/o.ipynb", "-p", f"token={WORDS['parameter']}"],
                  ["run", "pipeline", "p", "-p", f"train.weights=https://{WORDS['parameter']}@host/x"]):
        rc, out, err = call(project, *words)
        assert rc==2 and err.count("\n")==1, err
        logs += out+err
    assert len(WORDS)>=12 and hits(project/"runs", text=logs)==[]


def test_a_leak_is_seen(project, first, tmp_path):
    "The whole environment in a receipt, or the text of the difference, is what the check is for."
    run = shutil.copytree(first[0], tmp_path/"runs/first", symlinks=True)
    code = "import os, sys; from defect_detect.run import receipt as r; r.ENVIRONMENT = tuple(os.environ); r._WORD = r.re.compile('.*'); r.write_receipt(sys.argv[1], {}, r.circumstances(sys.argv[1]), r.now())"
    planted = {k: v.format(WORDS[k]) for k, v in PLANTED.items()}
    subprocess.run([sys.executable, "-c", code, run], check=True, timeout=120, env={**os.environ, **planted})
    assert hits(tmp_path)==sorted(PLANTED)
    (tmp_path/"diff.b64").write_bytes(base64.b64encode(b"# "+WORDS["dirty"].encode()+b"\n"))
    assert "dirty" in hits(tmp_path)


def test_verify(project, first):
    "The same bytes again from nothing; then every way in which a repetition would prove nothing is refused."
    run = first[0]
    rc, out, err = call(project, "run", "verify", "first")
    print(out)
    assert rc==0 and "4 of 4 outputs equal" in out and out.startswith("as it was: machine") and all(f"== {s} (" in out for s in ("prepare", "train", "export", "evaluate")) and "from the cache" not in out, out+err
    assert [p.name for p in (project/"runs").iterdir() if not p.name.startswith(".")]==["first"] and hits(project/"runs", text=out+err)==[]
    picture = sorted((project.parent/"pictures").rglob("*.jpg"))[0]
    for path, why in ((run/"evaluate/metrics.json", "evaluate was changed after the run"), (picture, "its inputs changed since: data; run the pipeline again"), (project/"defect_detect/core/image.py", "defect_detect/core/image.py; check out the commit")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1]+bytes([whole[-1]^1])) # one bit
        rc, out, err = call(project, "run", "verify", "first")
        assert rc==1 and why in err and err.count("\n")==1 and out=="", out+err
        path.write_bytes(whole)


def test_list_and_compare(project, first):
    "Only export and evaluation run again: the rest comes from the shared cache."
    for name, *words in (("second", "export.escape=0.4", "export.min_area=40"), ("all", "evaluate.part=all")):
        rc, out, err = call(project, "run", "pipeline", name, "--data", project.parent/"pictures", *QUICK, *(w for p in words for w in ("-p", p)))
        assert rc==0, out+err
    rc, out, err = call(project, "run", "list", "--sort", "name", "--json")
    got = json.loads(out)
    assert [r["name"] for r in got["runs"]]==["all", "first", "second"] and got["unfinished"]==[]
    metrics = {n: json.loads((project/f"runs/{n}/evaluate/metrics.json").read_text()) for n in ("first", "second", "all")}
    assert got["runs"][1]["auroc"]==metrics["first"]["auroc"]
    assert call(project, "run", "list")[1].splitlines()[1].startswith("all"), "newest first"

    def compare(*words):
        rc, out, err = call(project, "run", "compare", *words, "--draws", 10, "--json")
        assert rc==0, err
        return json.loads(out)
    d = compare("first", "second")
    assert set(d["params"])=={"export.escape", "export.min_area"} and not d["data"] and d["tested"]==dict(common=metrics["first"]["pictures"], only_a=0, only_b=0, parts=metrics["first"]["parts"])
    for k, m in d["metrics"].items():
        for side, name in (("a", "first"), ("b", "second")): assert m[side]["value"]==pytest.approx(metrics[name][k]["value"], abs=1e-4), (k, name)
    assert d["metrics"]["auroc"]["difference"]["value"]==0, "the same weights, the same scores"
    rc, out, err = call(project, "run", "compare", "first", "second", "--draws", 10, "--notebook", "runs/changed.ipynb", "--json")
    book = json.loads((project/"runs/changed.ipynb").read_text())
    said = "".join("".join(o.get("text", [])) for c in book["cells"] for o in c.get("outputs", []))
    n = len(json.loads(out)["verdicts"])
    assert rc==0 and f"{n} pictures changed verdict" in said and any("image/png" in o.get("data", {}) for c in book["cells"] for o in c.get("outputs", []))==(n>0) and read_record(project/"runs/changed.ipynb"), err
    d = compare("first", "all")
    assert d["tested"]["only_a"]==0 and d["tested"]["only_b"]==metrics["all"]["pictures"]-metrics["first"]["pictures"]>0 and d["metrics"]["iou"]["difference"]["value"]==0 and d["verdicts"]==[]
    rc, out, err = call(project, "run", "compare", "first", "secnd")
    assert rc==2 and err=="error: there is no run 'secnd'; did you mean 'second'?\n"


def test_record(project, first):
    "What goes into git: whole, free of secrets and of folders of this machine."
    rc, out, err = call(project, "run", "record", "first", "--as", "tiles")
    place = project/"models/tiles"
    assert rc==0 and sorted(p.name for p in place.iterdir())==["card.md", "dvc.lock", "metrics.json", "params.yaml", "run.json"], err
    assert (place/"dvc.lock").read_bytes()==(first[0]/"dvc.lock").read_bytes() and hits(project/"models", text=out)==[]
    assert not [p for p in place.iterdir() if str(project.parent) in p.read_text()]
    rc, out, err = call(project, "run", "record", "first", "--as", "../x")
    assert rc==2 and err.count("\n")==1 and not (project/"x").exists()


def test_a_run_that_did_not_end_has_no_receipt(project, first):
    run = first[0]
    before = json.loads((run/"run.json").read_text())
    rc, _, err = call(project, "run", "pipeline", "first", "--data", project.parent/"pictures", *QUICK, "-p", "export.max_difference=1e-30")
    assert rc==1 and "stage" not in err and not (run/"run.json").exists(), err
    rc, out, err = call(project, "run", "pipeline", "first", "--data", project.parent/"pictures", *QUICK)
    assert rc==0, out+err
    again = read_receipt(run)
    assert again["dvc_lock"]==before["dvc_lock"] and {k: s["how"] for k, s in again["stages"].items()}==dict(prepare="unchanged", train="unchanged", export="cached", evaluate="unchanged")
    assert again["stages"]["train"]["seconds"]==before["stages"]["train"]["seconds"] and again["stages"]["export"]["seconds"] is None
    assert not list(run.glob("notebooks/3_export*")), "the cache gave the outputs: what lies there would tell of others"
