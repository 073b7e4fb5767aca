"Every test of the project, stage by stage, with counts. A stage that ran nothing has failed."
import argparse
import configparser
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# one thread a process, and idle threads asleep: two processes share two cores without fighting for them
# without CI: where it is set, pytest writes differences out in full, which for two files takes for ever
ENV = {**{k: v for k, v in os.environ.items() if k not in ("CI", "BUILD_NUMBER")}, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DVC_NO_ANALYTICS": "1",
       "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
ENV.pop("IN_TEST", None) # nbdev_export does nothing where it is set


def sh(*cmd, cwd:Path=ROOT, **env)->tuple[int, str]:
    "Run a command; its exit code and all it said."
    r = subprocess.run([str(c) for c in cmd], cwd=cwd, env={**ENV, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return r.returncode, r.stdout


def files(folder:Path, *endings:str)->set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in endings and not {".ipynb_checkpoints", "__pycache__"}&set(p.parts)}


_STRAY = re.compile(r'^ +"name": "stderr",$|site-packages', re.M)


def drift():
    "A rebuild of the library from nothing gives the bytes that are here."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/"copy"
        copy.mkdir()
        for f in ("settings.ini", "setup.py"): shutil.copy(ROOT/f, copy)
        for d in ("nbs", "defect_detect"): shutil.copytree(ROOT/d, copy/d, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for p in files(copy/"defect_detect", ".py"): (copy/"defect_detect"/p).unlink()
        for cmd in ("nbdev_clean", "nbdev_export"):
            code, out = sh(BIN/cmd, cwd=copy)
            if code: yield cmd, out[-2000:]
        for d, ending, remedy in (("defect_detect", ".py", "it is not what the notebooks export: make prepare"), ("nbs", ".ipynb", "it is not clean: make prepare")):
            a, b = files(ROOT/d, ending), files(copy/d, ending)
            for f in sorted(a|b): yield f"{d}/{f}", "" if f in a&b and filecmp.cmp(ROOT/d/f, copy/d/f, shallow=False) else remedy
        for p in sorted((ROOT/"nbs").rglob("*.ipynb")):
            if ".ipynb_checkpoints" not in p.parts: yield f"outputs of {p.relative_to(ROOT)}", "a saved output is a complaint (stderr) or names a path of a machine: mend its cause, or clear it" if _STRAY.search(p.read_text()) else ""


def readme():
    "README.md is made from nbs/index.ipynb."
    code, out = sh(sys.executable, "tools/readme.py", "--check")
    yield "README.md", out.strip() if code else ""


def stages():
    "Each pipeline notebook has its schema; each stage of dvc.yaml lists what its notebook reaches; the training workflow asks for what there is."
    import nbformat
    from defect_detect.run.inputs import check_workflow
    from defect_detect.run.pipeline import check_stages
    from defect_detect.run.schema import ParameterError, SchemaError, read_schema
    for p in sorted((ROOT/"nbs/pipeline").glob("*.ipynb")):
        try: read_schema(p)
        except SchemaError as e: yield p.name, str(e)
        else: yield p.name, "a def belongs in a library notebook" if any(re.search(r"(?m)^\s*(def|class) ", c.source) for c in nbformat.read(p, 4).cells if c.cell_type=="code") else ""
    try: found = check_stages(ROOT)
    except SchemaError as e: found = [str(e)]
    yield "dvc.yaml", "; ".join(found)+("; run: defect-detect run update-stages" if found else "")
    try: yield "train.yml", check_workflow(ROOT)
    except (ParameterError, SchemaError) as e: yield "train.yml", str(e)


def imports():
    "The rooms import only what they may."
    code, out = sh(BIN/"lint-imports")
    kept = re.search(r"Contracts: (\d+) kept, (\d+) broken", out)
    n = int(kept[1]) if kept else 0
    for i in range(n): yield f"contract {i+1}", ""
    if code: yield "import-linter", out[-2500:]


def style():
    "ruff over the exported library, the tools and the tests."
    for d in sorted(d for d in ("defect_detect", "tools", "tests", "benchmarks") if (ROOT/d).is_dir()):
        code, out = sh(BIN/"ruff", "check", "-q", d)
        yield d, out[-2500:] if code else ""


def supply():
    "What builds and ships this is pinned, asks for little, and runs nobody else's code."
    from supply_chain import parts
    for name, part in parts().items(): yield name, "; ".join(": ".join(f) for f in part())


def library():
    "Every library notebook runs from top to bottom."
    want = sorted(p.name for p in (ROOT/"nbs").glob("[0-9]*.ipynb"))
    code, out = sh(BIN/"nbdev_test", "--path", "nbs", "--file_glob", "[0-9]*.ipynb", "--skip_folder_re", "^[_.]|pipeline|tutorials", "--n_workers", "2", "--do_print", "--timing", IN_TEST="1")
    done, bad = set(re.findall(r"- Completed \S*?([\w.]+\.ipynb)", out)), out.partition("Tests Failed On")[2]
    for n in want: yield n, "" if n in done and n not in bad else "did not run to its end"
    if code: yield "nbdev_test", out[-6000:]


def tutorials():
    "Every tutorial prints what is saved in it, numbers cut after two decimals."
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as f:
        cfg = configparser.RawConfigParser()
        cfg["decimals"] = dict(regex=r"(\d+\.\d\d)\d+", replace=r"\1")
        cfg.write(f)
        f.flush()
        code, out = sh(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-sanitize-with", f.name, "-n", "2", "--dist", "loadfile", "nbs/tutorials", "--color=no")
    n = re.search(r"(\d+) passed", out)
    for i in range(int(n[1]) if n else 0): yield f"cell {i+1}", ""
    if code not in (0, 5): yield "nbval", out[-6000:]


def pipeline():
    "The pipeline notebooks with their defaults, by papermill."
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(2) as pool:
        def one(p): return p.name, sh(BIN/"defect-detect", "run", p, "-o", Path(tmp)/p.name, cwd=tmp)
        for name, (code, out) in pool.map(one, sorted((ROOT/"nbs/pipeline").glob("*.ipynb"))): yield name, out[-3000:] if code else ""


def pytests():
    "What a notebook cell cannot see."
    served = sorted((ROOT/"tests").glob("test_serve*.py")) # load and time out: these have both cores to themselves
    others = sorted(set((ROOT/"tests").glob("test_*.py"))-set(served))
    for what, some, how in (("beside each other", others, ("-n", "2", "--dist", "loadfile")), ("alone", served, ())): # a file's tests share what its fixtures made
        with tempfile.TemporaryDirectory() as tmp: code, out = sh(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", f"--basetemp={tmp}/t", "--durations=5", *how, *some)
        print("\n".join("    "+s for s in out.splitlines() if re.match(r"\d+\.\d+s (call|setup)", s)))
        n = re.search(r"(\d+) passed", out)
        for i in range(int(n[1]) if n else 0): yield f"{what} {i+1}", ""
        bad = re.search(r"(\d+) skipped", out)
        if bad: yield f"skipped, {what}", f"{bad[1]} tests did not run"
        if code not in (0, 5) or not n: yield f"pytest, {what}", out[-6000:]


def clean_tree():
    "On CI nothing is left behind in git's eyes."
    code, out = sh("git", "status", "--porcelain")
    yield "git status", out if code or out.strip() else ""


STAGES = dict(drift=drift, readme=readme, stages=stages, imports=imports, style=style, supply=supply, library=library, tutorials=tutorials, pipeline=pipeline, pytest=pytests)


def begin_note()->str:
    "The hash of the code that is about to be tested."
    from defect_detect.release.notes import code_key, refuse_dirty
    try: refuse_dirty(ROOT)
    except RuntimeError as e: sys.exit(f"error: {e}")
    return code_key(ROOT)


def end_note(counts, key):
    from defect_detect.release.evidence import note_tests
    try: note_tests(counts, key, ROOT)
    except RuntimeError as e: sys.exit(f"error: {e}")
    print(f"noted for code {key[:12]}; defect-detect release evidence --push sends it")


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("stage", nargs="*", help=f"of {', '.join(STAGES)}; none: all")
    a.add_argument("--note", action="store_true", help="note the counts with the code's hash, for the release gate; the code must be committed")
    chosen, note = (args := a.parse_args()).stage, args.note
    unknown = [s for s in chosen if s not in STAGES]
    if unknown: a.error(f"unknown stage {unknown[0]}; allowed: {', '.join(STAGES)}")
    todo = {k: v for k, v in STAGES.items() if not chosen or k in chosen}
    if os.environ.get("CI") and not chosen: todo["clean tree"] = clean_tree
    key, counts = begin_note() if note else "", {}
    passed = failed = 0
    for name, stage in todo.items():
        t, results = time.monotonic(), []
        print(f"== {name}: {stage.__doc__}", flush=True)
        for what, problem in stage():
            results.append(problem)
            if problem: print(f"  FAILED {what}: {problem}", flush=True)
        if not results:
            results = ["nothing"]
            print("  FAILED: the stage ran nothing", flush=True)
        bad = sum(map(bool, results))
        print(f"   {len(results)-bad} passed, {bad} failed, {time.monotonic()-t:.0f} s", flush=True)
        passed, failed, counts[name] = passed+len(results)-bad, failed+bad, (len(results)-bad, bad)
    if note: end_note(counts, key)
    print(f"{passed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__=="__main__": main()
