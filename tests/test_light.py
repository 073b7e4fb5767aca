"""Light where it runs: what the service loads, and that its extra alone is enough to answer."""
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defect_detect.client import Client
from defect_detect.core.bundle import example_bundle
from defect_detect.core.image import decode
from defect_detect.core.predictor import Predictor

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "torchvision", "fastai", "fastcore", "nbdev", "papermill", "dvc", "pandas", "matplotlib", "timm", "segmentation_models_pytorch", "IPython"}


def loaded(module, path=()):
    "The top-level packages that a fresh interpreter has loaded after `import module`."
    code = f"import sys, json, {module}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, path)))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=env, cwd="/")
    return set(json.loads(out.stdout))


@pytest.mark.parametrize("module", ["defect_detect.serve.api", "defect_detect.client", "defect_detect.core.predictor"])
def test_import_is_light(module):
    got = loaded(module)
    assert "defect_detect" in got and not got&HEAVY
    assert not got&{"onnxruntime", "cc3d"}, "these are loaded with a bundle, not before"


def test_client_needs_httpx_only(): assert not loaded("defect_detect.client")&{"numpy", "PIL", "fastapi", "pydantic", "uvicorn"}


def test_a_heavy_import_is_seen(tmp_path):
    (tmp_path/"planted.py").write_text("import defect_detect.serve.api\nimport pandas\n")
    assert "pandas" in loaded("planted", [tmp_path])&HEAVY


def test_nobody_is_told(tmp_path):
    "onnxruntime writes a device id into the home as soon as it is imported, unless it is told before not to report."
    bundle = example_bundle(tmp_path/"bundle")
    for home, code in (("a", "import sys; from defect_detect.core.predictor import Predictor; Predictor.load(sys.argv[1])"), ("planted", "import onnxruntime")):
        (tmp_path/home).mkdir()
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path/home)}  # nothing else: under a variable such as CI it keeps still by itself
        subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, timeout=120, env=env)
    assert not list((tmp_path/"a").rglob("*")), "a prediction wrote into the home"
    assert list((tmp_path/"planted").rglob("deviceid")), "onnxruntime no longer writes its id: this check sees nothing"


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    "A fresh environment with the serving lock and our wheel, nothing else."
    tmp = tmp_path_factory.mktemp("light")
    src, env = tmp/"src", tmp/"env"
    src.mkdir()
    for f in ("setup.py", "settings.ini"): shutil.copy(ROOT/f, src)
    shutil.copytree(ROOT/"defect_detect", src/"defect_detect", ignore=shutil.ignore_patterns("__pycache__"))
    python = env/"bin"/"python"
    with open(tmp/"log", "w") as log:
        def run(*cmd):
            r = subprocess.run([str(c) for c in cmd], stdout=log, stderr=log, timeout=600, cwd=tmp)
            assert r.returncode == 0, (tmp/"log").read_text()[-3000:]
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp/"dist", src)
        run(sys.executable, "-m", "venv", env)
        run(python, "-m", "pip", "install", "-q", "--require-hashes", "-r", ROOT/"docker"/"serve.lock")
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", *(tmp/"dist").glob("*.whl"))
        run(python, "-m", "pip", "check")
    return env


def test_the_serve_extra_alone_answers(venv, tmp_path):
    bundle = example_bundle(tmp_path/"bundle")
    a = (130+np.random.default_rng(0).normal(0, 4, (150, 200))).clip(0, 255).astype(np.uint8)
    a[60:72, 100:112] = 30
    b = io.BytesIO()
    Image.fromarray(a).save(b, "PNG")
    cmd = [venv/"bin"/"defect-detect", "serve", bundle, "--port", "0"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    p = subprocess.Popen([str(c) for c in cmd], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    try:
        line = p.stdout.readline()
        assert line.startswith("serving example-spot@"), p.communicate(timeout=10)[1]
        with Client(line.split()[-1]) as c: got = c.predict(b.getvalue(), mask=True)
        p.terminate()
        assert p.wait(30) == 0
    finally:
        p.kill()
        p.communicate()
    want = Predictor.load(bundle).predict([decode(b.getvalue())])[0]
    assert (got.verdict, got.model) == (want.verdict, want.bundle) == ("defect", want.bundle)
    assert abs(got.score-want.score)<1e-5 and [r.box for r in got.regions] == [r.box for r in want.regions]
    assert (np.asarray(Image.open(io.BytesIO(got.mask))) == want.mask).all()


def test_nothing_heavy_is_installed(venv):
    there = {p.name for p in venv.glob("lib/python3*/site-packages/*")}
    assert "onnxruntime" in there and not there&HEAVY
    site = next(venv.glob("lib/python3*/site-packages"))
    size = sum(f.stat().st_size for f in site.rglob("*") if f.is_file() and not f.relative_to(site).parts[0].startswith("pip"))/1e6
    print(f"{size:.0f} MB")
    assert size<300
