"""Light where it runs: what the service loads. That it answers with nothing else installed is in test_image.py."""
import json
import os
import subprocess
import sys

import pytest

from defect_detect.core.bundle import example_bundle

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
