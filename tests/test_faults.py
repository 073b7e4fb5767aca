"Every fault that a person meets, really provoked: one clear line, the right exit code, nothing half-written, and the next call goes on."
import ast
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from projects import copy_project
from defect_detect.core.bundle import example_bundle
from defect_detect.data.demo import write_synth

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.executable).with_name("defect-detect")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
QUICK = [w for p in ("prepare.valid=0.3", "prepare.test=0.3", "train.height=64", "train.width=64", "train.epochs=1", "train.batch=4", "train.weights=none", "train.frozen=0", "evaluate.draws=10") for w in ("-p", p)]
linux = pytest.mark.skipif(sys.platform!="linux", reason="needs Linux: name spaces and tmpfs")


def call(*words, cwd, before=()):
    "Exit code, standard output, standard error of a command."
    r = subprocess.run([*map(str, before), str(TOOL), *map(str, words)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)
    return r.returncode, r.stdout, r.stderr


def one_line(got, code, pattern):
    "A fault's answer, which is also printed: pytest -s shows the table."
    rc, _, err = got
    print(f"{rc}  {err.strip()}")
    assert rc==code and err.count("\n")==1 and re.search(pattern, err) and "Traceback" not in err, got


def left_over(folder): return [p for p in folder.rglob("*") if p.name.endswith(".tmp") or (p.name.startswith(".") and p.is_dir() and p.name not in (".dvc", ".cache", ".site"))]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory): return write_synth(tmp_path_factory.mktemp("data")/"pictures", tiles=18, exposures=2, bad=.6)


@pytest.fixture
def data(pictures, tmp_path): return Path(shutil.copytree(pictures, tmp_path/"data"))


@pytest.fixture
def project(tmp_path):
    "What a run needs of the project, in a folder of its own."
    return copy_project(tmp_path/"project")


# --- data

def cut(d):
    p = sorted(d.glob("MT_Crack/Imgs/*.jpg"))[0]
    p.write_bytes(p.read_bytes()[:3000])
def no_picture(d): sorted(d.glob("MT_Free/Imgs/*.jpg"))[0].write_bytes(b"<html>not found</html>")
def cut_mask(d):
    p = sorted(d.glob("MT_Crack/Imgs/*.png"))[0]
    p.write_bytes(p.read_bytes()[:60])
def other_size(d): Image.fromarray(np.zeros((50, 60), np.uint8)).save(sorted(d.glob("MT_Crack/Imgs/*.png"))[0])
def no_mask(d): sorted(d.glob("MT_Crack/Imgs/*.png"))[0].unlink()
def empty(d): [shutil.rmtree(p) for p in d.glob("MT_*")]
def only_good(d): [shutil.rmtree(p) for p in d.glob("MT_*") if p.name!="MT_Free"]
def only_bad(d): shutil.rmtree(d/"MT_Free")
def gone(d): shutil.rmtree(d)


@pytest.mark.parametrize("fault,pattern", [
    (cut, r"damaged or cut short: MT_Crack/Imgs/\S+\.jpg; copy them again"), (no_picture, r"cannot be read: MT_Free/Imgs/\S+\.jpg; replace"), (cut_mask, r"the mask cannot be read: MT_Crack/Imgs/\S+\.jpg; .*\.png"),
    (other_size, r"is 60x50 px, its picture \d+x\d+"), (no_mask, "defective, but without a mask"), (empty, "no known layout|no picture"), (only_good, "no defective picture"), (only_bad, "no good picture"), (gone, "no such folder")])
def test_data(data, tmp_path, fault, pattern):
    fault(data)
    got = call("run", ROOT/"nbs/pipeline/1_prepare.ipynb", "-o", tmp_path/"o.ipynb", "-p", f"data={data}", "-p", f"out={tmp_path/'prepare'}", cwd=tmp_path)
    one_line(got, 1, pattern)
    assert not (tmp_path/"prepare").exists() and not (tmp_path/"o.ipynb").exists() and not left_over(tmp_path)


def test_one_part_of_a_kind_is_a_warning(data, tmp_path):
    keep = sorted(data.glob("MT_Crack/Imgs/*.jpg"))[0].stem
    for p in data.glob("MT_Crack/Imgs/*"):
        if p.stem!=keep: p.unlink()
    rc, out, err = call("data", "check", data, cwd=tmp_path)
    assert rc==0 and not err
    rc, out, err = call("run", ROOT/"nbs/pipeline/1_prepare.ipynb", "-o", tmp_path/"o.ipynb", "-p", f"data={data}", "-p", f"out={tmp_path/'prepare'}", "-p", "valid=0.3", "-p", "test=0.3", cwd=tmp_path)
    assert rc==0, err
    assert "only 1 part shows 'crack'" in (tmp_path/"prepare/checks.json").read_text()


def test_too_few_parts_for_three_sides(tmp_path):
    data = write_synth(tmp_path/"few", tiles=4, exposures=2, bad=.5)
    got = call("run", ROOT/"nbs/pipeline/1_prepare.ipynb", "-o", tmp_path/"o.ipynb", "-p", f"data={data}", "-p", f"out={tmp_path/'prepare'}", cwd=tmp_path)
    one_line(got, 1, "part is left for the valid side|every side needs both")


# --- words, places, neighbours

def test_words(project, data):
    for words, pattern in ((["-p", "train.lr=2"], "lr"), (["-p", "train.epoch=2"], "did you mean 'epochs'"), (["-p", "fit.lr=1"], "no stage 'fit'"), (["-p", "lr=1"], "stage.name=value"), (["--data", data/"none"], "no such folder"), (["A b"], "no name for a run")):
        name = [] if words[0]=="A b" else ["x"]
        one_line(call("run", "pipeline", *name, *(["--data", data] if "--data" not in words else []), *words, cwd=project), 2, pattern)
    assert not list((project/"runs").glob("*/dvc.lock")) if (project/"runs").exists() else True


def test_port_in_use(tmp_path):
    example_bundle(tmp_path/"b")
    with socket.create_server(("127.0.0.1", 0)) as s: one_line(call("serve", tmp_path/"b", "--port", s.getsockname()[1], cwd=tmp_path), 1, "Address already in use; choose another port")


@linux
def test_no_write_permission(project, data, tmp_path):
    "In a user name space even root is bound by the modes of files."
    example_bundle(tmp_path/"b")
    (tmp_path/"closed").mkdir()
    picture = sorted(data.glob("MT_Crack/Imgs/*.jpg"))[0]
    (project/"runs").mkdir()
    for p in (tmp_path/"closed", project/"runs"): p.chmod(0o555)
    one_line(call("predict", tmp_path/"b", picture, "--overlay", tmp_path/"closed/out", cwd=tmp_path, before=["unshare", "-U"]), 1, "permission denied")
    one_line(call("data", "demo", tmp_path/"closed/demo", "--tiles", 2, cwd=tmp_path, before=["unshare", "-U"]), 1, "permission denied")
    one_line(call("run", "pipeline", "x", "--data", data, cwd=project, before=["unshare", "-U"]), 1, "permission denied")
    assert not list((tmp_path/"closed").iterdir()) and not list((project/"runs").iterdir())
    for p in (tmp_path/"closed", project/"runs"): p.chmod(0o755)


def test_changed_bundle(tmp_path, data):
    b = example_bundle(tmp_path/"b")
    with open(b/"model.onnx", "ab") as f: f.write(b"\0")
    for words in (("predict", b, sorted(data.glob("MT_Crack/Imgs/*.jpg"))[0]), ("serve", b, "--port", 0), ("bundle", "show", b)): one_line(call(*words, cwd=tmp_path), 1, "changed|hash")


@pytest.mark.parametrize("version,ok", [((3, 9, 2), False), ((3, 10, 14), False), ((3, 11, 0), True), ((3, 14, 0), False)])
def test_wrong_python(version, ok):
    "The file is read by a Python that says it is another one; its grammar is old enough for any Python 3 that is still met."
    ast.parse((ROOT/"tools/preflight.py").read_text(), feature_version=(3, 7))
    code = f"import sys, collections; V = collections.namedtuple('V', 'major minor micro releaselevel serial'); sys.version_info = V(*{version}, 'final', 0); sys.argv = ['preflight.py', 'lock.txt', '']; exec(compile(open('tools/preflight.py').read(), 'preflight.py', 'exec'))"
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if ok: assert r.returncode==0, r.stderr
    else: one_line((r.returncode, r.stdout, r.stderr), r.returncode or 1, r"3\.11")


# --- kills

def family(p): return [k for k in psutil.Process(p.pid).children(recursive=True)]


def gone_soon(processes, seconds=15):
    end = time.monotonic()+seconds
    while time.monotonic()<end:
        if not [k for k in processes if k.is_running() and k.status()!=psutil.STATUS_ZOMBIE]: return True
        time.sleep(.1)
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pictures):
    "A project with a run that nobody stopped."
    to = copy_project(tmp_path_factory.mktemp("whole")/"project")
    rc, out, err = call("run", "pipeline", "x", "--data", pictures, *QUICK, cwd=to)
    assert rc==0, out+err
    assert (to/"runs/x/index.html").exists()
    return to


@pytest.fixture(scope="module")
def undisturbed(whole):
    "Its receipt of all stages."
    return (whole/"runs/x/dvc.lock").read_bytes()


def test_stopped_in_every_stage(project, pictures, undisturbed, many):
    "kill -9 of the command, Ctrl-C from a terminal: nobody is left, no stage counts as done, the next call goes on, the end is the same."
    run, words = project/"runs/x", [TOOL, "run", "pipeline", "x", "--data", pictures, *QUICK]
    kill, stop = (signal.SIGKILL,), (signal.SIGINT,)
    for stage, *by_day in (("prepare", stop), ("train", kill), ("export", kill), ("evaluate", stop)):
        for sig in many(*by_day, kill+stop):
            p = subprocess.Popen(words, cwd=project, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
            here = False
            for line in p.stdout:
                here = here or line.startswith(f"== {stage} ")
                if here and re.match(r"cell ([7-9]|\d\d)/", line): break # its work has begun
            else: pytest.fail(f"{stage} did not run: {p.stderr.read()}")
            others = family(p)
            assert len(others)>=3
            if stage=="train" and sig==signal.SIGKILL:
                before = (run/"params.yaml").read_text()
                for k in others: k.suspend() # so that it is still there when the second call gives up
                one_line(call("run", "pipeline", "x", "--data", pictures, "-p", "train.epochs=3", cwd=project), 1, "being run by another process")
                for k in others: k.resume()
                assert (run/"params.yaml").read_text()==before
            os.killpg(p.pid, sig) if sig==signal.SIGINT else p.send_signal(sig)
            _, err = p.communicate(timeout=30)
            assert gone_soon(others), [k.cmdline() for k in others if k.is_running()]
            if sig==signal.SIGINT: one_line((p.returncode, "", err), 130, "nothing half-written")
            done = yaml.safe_load((run/"dvc.lock").read_text())["stages"] if (run/"dvc.lock").exists() else {}
            assert stage not in done and not (run/"index.html").exists() and not list((run/"notebooks").glob(f"?_{stage}.ipynb"))
    rc, out, err = call(*words[1:], cwd=project)
    assert rc==0, out+err
    assert (run/"dvc.lock").read_bytes()==undisturbed and (run/"index.html").exists() and not left_over(run)


@pytest.mark.parametrize("half", ["rwlock", "dvc.lock", "dvc.lock in a word"])
def test_what_a_killed_dvc_leaves_half(whole, pictures, undisturbed, half):
    "DVC writes its lock files in place: one cut by a kill is no obstacle, and the end is the same."
    run, text = whole/"runs/x", undisturbed.decode()
    if half=="rwlock": (run/".dvc/tmp/rwlock").write_text("")
    else: (run/"dvc.lock").write_text(text[:text.index("\n  train:")+8] if half=="dvc.lock" else text[:len(text)//2]+"\n- ]")
    rc, out, err = call("run", "pipeline", "x", "--data", pictures, *QUICK, cwd=whole)
    assert rc==0, out+err
    assert (run/"dvc.lock").read_bytes()==undisturbed


def test_a_killed_kernel(tmp_path):
    "What running out of memory looks like."
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("n: int = 1", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("import os; os.kill(os.getpid(), 9)")])
    nbformat.write(nb, tmp_path/"a.ipynb")
    one_line(call("run", tmp_path/"a.ipynb", "-o", tmp_path/"o.ipynb", cwd=tmp_path), 1, "kernel was killed")
    assert not (tmp_path/"o.ipynb").exists() and not left_over(tmp_path)


# --- a full disk

@contextlib.contextmanager
def small_disk(size):
    "A name space that stays open, with a disk of `size` kB in it; yields its folder as seen from outside, the words that lead into it, and a way to enlarge it."
    hold = subprocess.Popen(["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=4k disk /mnt && echo ready && exec sleep 600"], stdout=subprocess.PIPE, text=True)
    try:
        assert hold.stdout.readline()=="ready\n"
        enter = ["nsenter", "-U", "--preserve-credentials", "-m", "-t", str(hold.pid), "sh", "-c", 'cd "$0" && exec "$@"', "/mnt"]
        def resize(kb): subprocess.run(["nsenter", "-U", "--preserve-credentials", "-m", "-t", str(hold.pid), "mount", "-o", f"remount,size={kb}k", "/mnt"], check=True)
        resize(size)
        yield Path(f"/proc/{hold.pid}/root/mnt"), enter, resize
    finally:
        hold.kill()
        hold.communicate()


@pytest.mark.nightly
@linux
def test_a_disk_that_fills_anywhere(project, pictures, undisturbed):
    "The disk grows a little after each failure: every call ends with one line about space and the next one goes on, to the same end."
    used = sum(p.stat().st_size+4096 for p in project.rglob("*"))//1024+200
    with small_disk(used) as (disk, enter, resize):
        shutil.copytree(project, disk/"project")
        failed, step = [], 128
        for _ in range(9):
            rc, out, err = call("run", "pipeline", "x", "--data", pictures, *QUICK, cwd="/", before=[*enter[:-1], "/mnt/project"])
            if rc==0: break
            failed.append(err)
            one_line((rc, out, err), 1, "(?i)no space left|disk")
            used, step = used+step, step*3
            resize(used)
        assert rc==0, err
        assert len(failed)>=3 and (disk/"project/runs/x/dvc.lock").read_bytes()==undisturbed
        assert not left_over(disk/"project/runs")


@linux
def test_small_writes_on_a_full_disk(tmp_path, data):
    example_bundle(tmp_path/"b")
    picture = sorted(data.glob("MT_Crack/Imgs/*.jpg"))[0]
    with small_disk(28) as (disk, enter, resize):
        one_line(call("predict", tmp_path/"b", picture, "--overlay", "/mnt/out", cwd="/", before=enter), 1, "(?i)no space left")
        one_line(call("data", "demo", "/mnt/demo", "--tiles", 2, cwd="/", before=enter), 1, "(?i)no space left")
        assert [p for p in disk.rglob("*") if p.is_file()]==[]
        resize(4096)
        assert call("predict", tmp_path/"b", picture, "--overlay", "/mnt/out", cwd="/", before=enter)[0]==0
        assert call("data", "demo", "/mnt/demo", "--tiles", 2, cwd="/", before=enter)[0]==0
