"""What the image is made by and how it runs, without an engine for containers: its script into an empty root, then its command
there, read-only and as nobody. Only a release builds the image itself."""
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from defect_detect.client import Client
from defect_detect.core.bundle import example_bundle
from defect_detect.core.image import decode
from defect_detect.core.predictor import Predictor
from jail import SUDO, inside, pip_env, remove
from serving import ENV, WEB, address, encode, head, plate, process, wait_for
from test_light import HEAVY

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT/"docker/serve.Dockerfile").read_text()
COMMAND = json.loads(re.search(r"(?m)^CMD (\[.*\])$", TEXT)[1])
CHECK = json.loads(re.search(r"HEALTHCHECK .*\\\n +CMD (\[.*\])", TEXT)[1])
NOBODY = int(re.search(r"(?m)^USER (\d+):\d+$", TEXT)[1])
IMAGE_ENV = dict(w.split("=", 1) for w in shlex.split(re.search(r"(?m)^ENV (.*)$", TEXT)[1]))|{"PATH": "/venv/bin:/usr/bin:/bin"}
TOKEN = "a-token-of-the-test"
PICTURE = encode(plate(holes=((100, 60),)))
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a root of its own is Linux's")


def wheel(to):
    "Our wheel, from a copy: the build leaves files beside its sources."
    src = to/"src"
    src.mkdir(parents=True)
    for f in ("setup.py", "settings.ini", "README.md"): shutil.copy(ROOT/f, src)
    shutil.copytree(ROOT/"defect_detect", src/"defect_detect", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(to/"dist"), str(src)], check=True, timeout=300)
    return next((to/"dist").glob("*.whl"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "An empty root, after the script of the image ran in it; and a bundle."
    tmp = tmp_path_factory.mktemp("image")
    root = tmp/"root"
    root.mkdir()
    root.chmod(0o755)
    (root/"open").mkdir()
    (root/"open").chmod(0o777)
    files = [shutil.copy(f, root) for f in (ROOT/"docker/install.sh", ROOT/"docker/serve.lock", wheel(tmp))]
    r = subprocess.run(inside(root, ["/install.sh", "/serve.lock", "/"+Path(files[2]).name, "/venv"], pip_env(root), writable=True), capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stdout[-3000:]+r.stderr[-3000:]
    example_bundle(root/"bundle")
    yield root
    remove(root)


def service(root, drain=.5):
    "The command of the image, on loopback and any port."
    swap = {"0.0.0.0": "127.0.0.1", "8000": "0"}
    words = [swap.get(w, w) for w in COMMAND]
    assert words[:2] == ["defect-detect", "serve"] and set(swap)<set(COMMAND)
    return process(*words[2:], drain=drain, command=inside(root, words[:1], {**IMAGE_ENV, "DEFECT_TOKEN": TOKEN}, NOBODY))


def state(root): return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for d in ("venv", "bundle", "open") for p in (root/d).rglob("*")}


def test_it_answers_read_only_and_as_nobody(root):
    before = state(root)
    with service(root) as (p, url, log):
        me = psutil.Process(p.pid) if not SUDO else psutil.Process(p.pid).children(recursive=True)[-1]
        said = dict(s.split(":\t", 1) for s in Path(f"/proc/{me.pid}/status").read_text().splitlines() if ":\t" in s)
        assert me.uids().real == me.uids().effective == NOBODY == 65534 and int(said["CapEff"], 16) == int(said["CapBnd"], 16) == 0 and said["NoNewPrivs"] == "1"
        with Client(url, token=TOKEN) as c: got = c.predict(PICTURE, mask=True)
        assert WEB.post(url+"/v1/predict", content=PICTURE, headers={"content-type": "image/png"}).status_code == 401
        check = [w.replace("8000", str(address(url)[1])) for w in CHECK]
        assert subprocess.run(inside(root, check, IMAGE_ENV, NOBODY), timeout=60).returncode == 0
        p.terminate()
        assert p.wait(30) == 0
    assert subprocess.run(inside(root, check, IMAGE_ENV, NOBODY), capture_output=True, timeout=60).returncode, "the health check of a service that is gone"
    want = Predictor.load(root/"bundle").predict([decode(PICTURE)])[0]
    assert (got.verdict, got.model) == (want.verdict, want.bundle) == ("defect", want.bundle)
    assert abs(got.score-want.score)<1e-5 and [r.box for r in got.regions] == [r.box for r in want.regions]
    assert (decode(got.mask)[..., 0].astype(bool) == np.asarray(want.mask, bool)).all()
    assert state(root) == before, "it wrote something"


def touches(root, writable): return subprocess.run(inside(root, ["touch", "/open/x"], IMAGE_ENV, NOBODY, writable), capture_output=True, text=True, timeout=60)


def test_read_only_is_seen(root):
    assert "Read-only file system" in touches(root, False).stderr
    assert touches(root, True).returncode == 0, "the planted fault: a root that can be written"
    subprocess.run([*SUDO, "rm", str(root/"open/x")], check=True)


def half(root, how):
    "Send a stop while half of a picture has arrived; the rest comes when it is no longer ready. What became of the picture, and the exit code."
    with service(root, drain=2) as (p, url, log), socket.create_connection(address(url), timeout=20) as s:
        s.sendall(head("Content-Type: image/png", f"Content-Length: {len(PICTURE)}", f"Authorization: Bearer {TOKEN}", "Connection: close")+PICTURE[:100])
        wait_for(lambda: b'defect_detect_held_bytes 0.0' not in WEB.get(url+"/metrics", headers={"authorization": f"Bearer {TOKEN}"}).content, 5)
        how(p)
        try:
            if p.poll() is None: assert wait_for(lambda: WEB.get(url+"/healthz/ready").status_code == 503, 5) or p.poll() is not None
            s.sendall(PICTURE[100:])
            got = b"".join(iter(lambda: s.recv(65536), b""))
        except OSError: got = b""
        except Exception as e: got = str(e).encode() # the service is gone
        return got.split(b"\r\n")[0], p.wait(30)


def test_it_drains(root):
    assert half(root, lambda p: p.terminate()) == (b"HTTP/1.1 200 OK", 0)
    assert half(root, lambda p: (p.kill(), p.wait()))[0] != b"HTTP/1.1 200 OK", "the planted fault"


def test_nothing_heavy_is_installed(root):
    site = next((root/"venv").glob("lib/python3*/site-packages"))
    there = {p.name for p in site.iterdir()}
    assert "onnxruntime" in there and not there&{*HEAVY, "pip", "setuptools"}
    size = sum(f.stat().st_size for f in site.rglob("*") if f.is_file())/1e6
    print(f"{size:.0f} MB")
    assert size<300


@pytest.mark.parametrize("fault,says", [("words", "allowed: LOCK WHEEL FOLDER"), ("missing", "there is no file"), ("there", "is there already"), ("hash", "DO NOT MATCH THE HASHES")])
def test_the_script_refuses(tmp_path, fault, says):
    lock, own, to = tmp_path/"lock", tmp_path/"a.whl", tmp_path/"venv"
    own.touch()
    lock.write_text(f"h11==0.16.0 --hash=sha256:{0:064x}\n")
    if fault == "there": to.mkdir()
    words = [lock] if fault == "words" else [tmp_path/"none" if fault == "missing" else lock, own, to]
    r = subprocess.run([ROOT/"docker/install.sh", *words], capture_output=True, text=True, timeout=120, env=ENV)
    assert r.returncode and says in r.stderr, r.stdout+r.stderr


def test_the_image_installs_by_the_script():
    assert re.search(r"(?m)^RUN (?:\w+=\S+ )*/tmp/install\.sh /tmp/serve\.lock /tmp/defect_detect-\*\.whl /venv$", TEXT) and len(re.findall(r"(?m)^RUN ", TEXT)) == 1
