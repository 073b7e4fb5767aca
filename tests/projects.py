"A project for tests: what a run needs of this one, somewhere else."
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_project(to:Path)->Path: # `to`
    "Copy notebooks, library, stages, parameters and lock."
    for d in ("nbs/pipeline", "defect_detect"): shutil.copytree(ROOT/d, to/d, ignore=shutil.ignore_patterns("__pycache__"))
    for f in ("dvc.yaml", "params.yaml", "lock.txt", ".gitignore"): shutil.copy(ROOT/f, to)
    return to
