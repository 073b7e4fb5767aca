"The whole third phase, played by the command that `make rehearse` calls; each of its rules is shown a fault in nbs/5b_release.rehearsal.ipynb."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("defect-detect")
ENV = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.nightly
def test_rehearse(tmp_path):
    r = subprocess.run([TOOL, "release", "rehearse", "--in", tmp_path/"play"], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=3600)
    assert r.returncode==0, r.stdout[-3000:]+r.stderr
    steps = json.loads((tmp_path/"play/steps.json").read_text())
    assert len(steps)>=20 and not any(s["wrong"] for s in steps) and steps[-1]["name"]=="what stands where"
    print(f"{sum(s['seconds'] for s in steps):.0f} s")


def test_a_play_begins_with_nothing(tmp_path):
    r = subprocess.run([TOOL, "release", "rehearse", "--in", tmp_path], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert r.returncode==1 and r.stderr.count("\n")==1 and "begins with nothing" in r.stderr, r.stdout+r.stderr
