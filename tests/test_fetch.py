"Downloads over a network that cuts, lies and changes its mind; git's hash against git; kills half way."
import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from defect_detect.data import fetch as module
from defect_detect.data.archive import Caps
from defect_detect.data.demo import write_synth
from defect_detect.data.fetch import SOURCES, Unreachable, download, fetch, tree_hash
from defect_detect.data.layouts import LISTS, DataError

TOOL = Path(sys.executable).with_name("defect-detect")
BITS = random.Random(0).randbytes(300_000)


class Host(BaseHTTPRequestHandler):
    "Hands out `server.data` as the other attributes of the server say."
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass

    def do_GET(self):
        s = self.server
        s.asked.append((self.path, dict(self.headers)))
        if s.first:
            status, headers = s.first.pop(0)
            self.send_response(status)
            for k, v in {"Content-Length": "0", **headers}.items(): self.send_header(k, v)
            return self.end_headers()
        m = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", s.tag or s.date) in (s.tag, s.date) or s.careless
        at = int(m[1]) if m and s.ranges and same else 0
        if m and s.ranges and at>=len(s.data): self.send_response(416); self.send_header("Content-Length", "0"); return self.end_headers()
        body = s.data[at:at+s.slice if at and s.slice else None]
        self.send_response(206 if at else 200)
        if at: self.send_header("Content-Range", s.range or f"bytes {at}-{at+len(body)-1}/{len(s.data)}")
        if s.tag: self.send_header("ETag", s.tag)
        if s.date: self.send_header("Last-Modified", s.date)
        if s.packed: body = gzip.compress(body); self.send_header("Content-Encoding", "gzip")
        if s.framing=="length": self.send_header("Content-Length", str(len(body)))
        if s.framing=="chunks": self.send_header("Transfer-Encoding", "chunked")
        if s.framing=="close": self.send_header("Connection", "close")
        self.end_headers()
        cut = s.cuts.pop(0) if s.cuts else len(body)
        with contextlib.suppress(OSError):
            for i in range(0, min(cut, len(body)), 8192):
                b = body[i:min(i+8192, cut)]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(b), b) if s.framing=="chunks" else b)
                self.wfile.flush()
                time.sleep(s.pace)
            if s.framing=="chunks" and cut>=len(body): self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


@pytest.fixture
def host():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    s.daemon_threads = True
    s.data, s.tag, s.date, s.ranges, s.range, s.careless, s.packed, s.framing, s.pace, s.slice = BITS, '"1"', "", True, "", False, False, "length", 0, 0
    s.cuts, s.first, s.asked = [], [], []
    s.url = f"http://127.0.0.1:{s.server_port}/set.zip"
    threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def got(host, tmp, **kw): return download(host.url, tmp/"part", wait=0, **kw).path.read_bytes()
def starts(host): return [int(h["Range"][6:-1]) if "Range" in h else 0 for _, h in host.asked]


# --- cuts

def test_cuts_are_gone_on_with(host, tmp_path):
    host.cuts = [100_000, 50_000, 0, 1, 70_001]
    assert got(host, tmp_path)==BITS and starts(host)==[0, 100_000, 150_000, 150_000, 150_001, 220_002]
    assert all(h["If-Range"]=='"1"' for _, h in host.asked[1:]) and all(h["Accept-Encoding"]=="identity" for _, h in host.asked)


def test_less_than_was_asked_for(host, tmp_path):
    "A server may answer a part of the range; that is not the end."
    host.cuts, host.slice = [100_000], 90_000
    assert got(host, tmp_path)==BITS and starts(host)==[0, 100_000, 190_000, 280_000]


@pytest.mark.parametrize("change", [dict(ranges=False), dict(tag=""), dict(tag='W/"1"'), dict(framing="chunks", ranges=False, tag='W/"x"')])
def test_a_server_without_ranges_begins_again(host, tmp_path, change):
    for k, v in change.items(): setattr(host, k, v)
    host.cuts = [100_000, 200_000]
    assert got(host, tmp_path)==BITS and len(host.asked)==3


def test_a_date_will_do(host, tmp_path):
    host.tag, host.date, host.cuts = "", "Wed, 21 Oct 2015 07:28:00 GMT", [100_000]
    assert got(host, tmp_path)==BITS and starts(host)==[0, 100_000] and host.asked[1][1]["If-Range"]==host.date


@pytest.mark.parametrize("careless", [False, True])
def test_two_files_are_never_mixed(host, tmp_path, careless):
    "The file changes between two calls; a careless server sends the rest of the new one all the same."
    host.cuts, host.careless = [100_000]+[0]*9, careless
    with pytest.raises(Unreachable, match="tried 5 times without getting further than 100000 bytes, which are kept"): got(host, tmp_path)
    host.data, host.tag, host.cuts = BITS[::-1], '"2"', []
    assert got(host, tmp_path)==BITS[::-1]


@pytest.mark.parametrize("range_", ["bytes 0-1/300000", "bytes 99999-299999/300000", "items 1-2/3", "x"])
def test_a_range_that_was_not_asked_for(host, tmp_path, range_):
    host.cuts, host.range = [100_000], range_
    assert got(host, tmp_path)==BITS and starts(host)==[0, 100_000, 0]


def test_more_than_there_is(host, tmp_path):
    "416: what is kept is longer than the file."
    host.cuts = [200_000]+[0]*9
    with pytest.raises(Unreachable): got(host, tmp_path)
    host.data, host.cuts = BITS[:1000], []
    assert got(host, tmp_path)==BITS[:1000]


def test_no_end_in_sight(host, tmp_path):
    "Without a length and without chunks nobody can tell a cut; the zip tells it."
    host.framing, host.cuts, host.data = "close", [5000], zip_of(tmp_path, [("a.png", 0, BITS)])
    with pytest.raises(DataError, match=r"set\.zip is damaged or cut short"): fetch(host.url, tmp_path/"set", wait=0)
    assert fetch(host.url, tmp_path/"set", wait=0) and names(tmp_path)==["set"]


# --- answers

def test_failures_that_pass(host, tmp_path):
    host.first = [(500, {}), (503, {"Retry-After": "1"}), (429, {"Retry-After": "soon"}), (408, {})]
    assert got(host, tmp_path)==BITS and len(host.asked)==5


@pytest.mark.parametrize("status,asked", [(404, 1), (403, 1), (410, 1), (204, 1), (304, 1), (500, 5), (503, 5), (429, 5)])
def test_failures_that_stay_are_one_line(host, tmp_path, status, asked):
    host.first = [(status, {})]*20
    with pytest.raises(DataError) as e: fetch(host.url, tmp_path/"set", wait=0)
    assert len(host.asked)==asked and str(status) in str(e.value) and "\n" not in str(e.value) and names(tmp_path)==[]


def test_waits_are_doubled(host, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=slept.append))
    host.first = [(500, {})]*3+[(503, {"Retry-After": "30"})]
    download(host.url, tmp_path/"part", wait=1)
    assert slept==[1, 2, 4, 30]


def test_nobody_there(tmp_path):
    with pytest.raises(Unreachable, match="tried 3 times"): fetch("http://127.0.0.1:9/x.zip", tmp_path/"set", wait=0)
    assert names(tmp_path)==[]


@pytest.mark.parametrize("to,say", [("/other.zip", None), ("http://localhost:{port}/other.zip", None), ("http://h.invalid/x.zip", "not https"), ("file:///etc/passwd", "cannot be fetched"), ("ftp://127.0.0.1/x", "cannot be fetched"), ("http://u:p@127.0.0.1:{port}/", "name or a password"), ("/set.zip", "again and again"), ("http://127.0.0.1:99999/", "cannot be fetched")])
def test_sent_on(host, tmp_path, to, say):
    "By 301, 302, 303, 307 and 308, to places that are allowed and not."
    for status in (301, 302, 303, 307, 308):
        host.first = [(status, {"Location": to.format(port=host.server_port)})]*(20 if to=="/set.zip" else 1)
        if say is None: assert got(host, tmp_path)==BITS; shutil.rmtree(tmp_path); tmp_path.mkdir()
        else:
            with pytest.raises(DataError, match=say): got(host, tmp_path)
    assert all(p in ("/set.zip", "/other.zip") for p, _ in host.asked)


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_too_large(host, tmp_path, framing):
    host.framing = framing
    with pytest.raises(DataError, match="at most 100000 are allowed"): fetch(host.url, tmp_path/"set", caps=Caps(size=100_000), wait=0)
    assert names(tmp_path)==[] and len(host.asked)==1


def test_packed_a_second_time(host, tmp_path):
    host.packed = True
    with pytest.raises(DataError, match="packed a second time"): fetch(host.url, tmp_path/"set", wait=0)


def test_no_password_is_sent(host, tmp_path, monkeypatch):
    "Neither from ~/.netrc nor from the address; and no proxy for a loopback address."
    (tmp_path/"netrc").write_text("machine 127.0.0.1 login canary password canary\ndefault login canary password canary\n")
    for k, v in dict(NETRC=tmp_path/"netrc", HOME=tmp_path, HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9", ALL_PROXY="http://127.0.0.1:9").items(): monkeypatch.setenv(k, str(v))
    (tmp_path/".netrc").write_text((tmp_path/"netrc").read_text())
    assert got(host, tmp_path)==BITS
    assert not any("canary" in json.dumps(h) or "Authorization" in h or "Cookie" in h for _, h in host.asked)
    with pytest.raises(DataError, match="name or a password"): download(host.url.replace("//", "//kim:canary@"), tmp_path/"p")


def test_secrets_in_an_address_stay_there(host, tmp_path):
    host.first = [(404, {})]
    with pytest.raises(DataError) as e: fetch(host.url+"?token=canary", tmp_path/"set", wait=0)
    assert "canary" not in str(e.value)
    host.cuts = [100_000]+[0]*9
    with pytest.raises(Unreachable) as e: fetch(host.url+"?token=canary", tmp_path/"set", wait=0)
    assert "canary" not in str(e.value) and not any(b"canary" in p.read_bytes() for p in tmp_path.iterdir())


# --- git's hash

def git(*words, cwd, **env): return subprocess.run(["git", *words], cwd=cwd, check=True, capture_output=True, text=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", **{f"GIT_{w}_{k}": "x@x" if k=="EMAIL" else "x" for w in ("AUTHOR", "COMMITTER") for k in ("NAME", "EMAIL")}, **env}).stdout.strip()


def write_tree(folder, tmp):
    "What git itself says, with a repository beside `folder`."
    repo = tmp/f"repo{time.monotonic_ns()}"
    env = dict(GIT_DIR=str(repo), GIT_WORK_TREE=str(folder))
    git("init", "-q", cwd=folder, **env)
    git("add", "-A", "-f", cwd=folder, **env)
    return git("write-tree", cwd=folder, **env)


def messy(folder, rng):
    "A folder with everything that git sorts, modes and names in its own way."
    parts = ["a", "a.b", "a-b", "a0", "A", "ä", "a b", "z" * 60, "-x", "lib", "lib.c", "lib-c", "lib0", ".hidden"]
    for _ in range(60):
        p = folder.joinpath(*rng.sample(parts, rng.randint(1, 4)))
        with contextlib.suppress(OSError): # a file stands where a folder would be
            p.parent.mkdir(parents=True, exist_ok=True)
            if rng.random()<.15: p.symlink_to(rng.choice(["a", "../x", "lib.c"]))
            else:
                p.write_bytes(rng.randbytes(rng.choice([0, 1, 100, 3_000_000 if rng.random()<.02 else 5])))
                p.chmod(rng.choice([0o644, 0o755, 0o600, 0o700, 0o654]))
    (folder/"empty/er").mkdir(parents=True, exist_ok=True)
    return folder


def test_the_hash_is_gits(tmp_path):
    for seed in range(12):
        d = messy(tmp_path/f"d{seed}", random.Random(seed))
        assert tree_hash(d)==write_tree(d, tmp_path), seed


@pytest.mark.parametrize("fault", ["names sorted plainly", "no executable bit", "links as files", "empty folders counted"])
def test_planted_hashes_are_red(tmp_path, monkeypatch, fault):
    source = Path(module.__file__).read_text()
    old, new = {"names sorted plainly": ('(name+b"/", b"40000"', '(name, b"40000"'), "no executable bit": ("mode & 0o100", "False"), "links as files": ('(name, b"120000", name', '(name, b"100644", name'),
                "empty folders counted": ("return _sha1(b\"tree\", sum(map(len, rows)), rows) if rows else None", "return _sha1(b\"tree\", sum(map(len, rows)), rows)")}[fault]
    assert source.count(old)==1
    scope = {"__name__": "defect_detect.data.planted", "__package__": "defect_detect.data"}
    exec(compile(source.replace(old, new), "planted", "exec"), scope)
    wrong = 0
    for seed in range(12):
        d = messy(tmp_path/f"d{seed}", random.Random(seed))
        wrong += scope["tree_hash"](d)!=write_tree(d, tmp_path)
    assert wrong


def test_the_tiles(tmp_path):
    "The real folder, or a drawn one, is hashed as git does it; it is a part of the public set and so not that set."
    d = Path(os.environ["DEFECT_DATA"]) if os.environ.get("DEFECT_DATA") else write_synth(tmp_path/"tiles", tiles=6)
    assert tree_hash(d)==write_tree(d, tmp_path)!=SOURCES["magnetic-tiles"].tree
    assert SOURCES["magnetic-tiles"].url.endswith("/abin24/Magnetic-tile-defect-datasets./archive/cc4eb530b57b9cb7225bf76023873043ffd50655.zip")


# --- whole or not there

def names(folder): return sorted(p.name for p in folder.iterdir())


def zip_of(tmp, entries, prefix="set-cc4eb53/"):
    b = io.BytesIO()
    with zipfile.ZipFile(b, "w", zipfile.ZIP_DEFLATED) as z:
        for n, mode, data in entries:
            i = zipfile.ZipInfo(prefix+n)
            i.external_attr = mode<<16
            z.writestr(i, data)
    return b.getvalue()


@pytest.fixture
def repo(tmp_path):
    "A commit, its archive as git makes it, and its tree."
    d = write_synth(tmp_path/"repo", tiles=3, exposures=2, bad=.7)
    (d/"README.md").write_text("# tiles\n")
    (d/"tool.sh").write_text("#!/bin/sh\n")
    (d/"tool.sh").chmod(0o755)
    (d/"latest").symlink_to("MT_Free")
    (d/".gitattributes").write_text("*.md -diff\n")
    git("init", "-q", cwd=d)
    git("add", "-A", cwd=d)
    git("commit", "-qm", "x", cwd=d)
    git("archive", "--format=zip", "--prefix=tiles.-cc4eb53/", "-o", str(tmp_path/"tiles.zip"), "HEAD", cwd=d)
    return (tmp_path/"tiles.zip").read_bytes(), git("rev-parse", "HEAD^{tree}", cwd=d)


def test_an_archive_of_gits(host, repo, tmp_path):
    host.data, tree = repo
    host.cuts, home = [5000, 20_000], tmp_path/"home"
    assert fetch(host.url, home/"set", tree=tree, wait=0) and names(home)==["set"]
    assert tree_hash(home/"set")==tree and (home/"set/latest").is_symlink() and os.access(home/"set/tool.sh", os.X_OK) and (home/"set/README.md").exists()
    n = len(host.asked)
    for l in LISTS: (home/f"set/{l}.csv").write_text("image\n")
    assert fetch(host.url, home/"set", tree=tree)=="" and len(host.asked)==n # recognised, lists or not
    next((home/"set").glob("MT_*/Imgs/*.jpg")).write_bytes(b"x")
    with pytest.raises(DataError, match="holds other content"): fetch(host.url, home/"set", tree=tree)


def changed(data, change):
    "The archive with its entries changed by `change`, a function of (name, mode, bytes)."
    out = []
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        for i in z.infolist():
            if not i.is_dir(): out += change(i.filename.split("/", 1)[1], i.external_attr>>16, z.read(i))
    return out


WRONG = {"a byte": lambda n, m, b: [(n, m, b[:-1]+bytes([b[-1]^1]) if n.endswith(".jpg") else b)], "a name": lambda n, m, b: [(n.replace("README", "LICENSE"), m, b)], "one less": lambda n, m, b: [] if n=="README.md" else [(n, m, b)],
         "one more": lambda n, m, b: [(n, m, b)]+[("MT_Free/Imgs/more.jpg", 0, b)]*(n=="README.md"), "a mode": lambda n, m, b: [(n, 0 if n=="tool.sh" else m, b)], "a link that is a file": lambda n, m, b: [(n, 0 if n=="latest" else m, b)],
         "a list of decisions": lambda n, m, b: [(n, m, b)]+[("overrides.csv", 0, "image,label\nMT_Free/Imgs/a.jpg,crack\n")]*(n=="README.md")}


@pytest.mark.parametrize("what", WRONG)
def test_other_content_is_refused(host, repo, tmp_path, what):
    data, tree = repo
    same = zip_of(tmp_path, changed(data, lambda n, m, b: [(n, m, b)]))
    host.data, home = same, tmp_path/"home"
    assert same!=data and fetch(host.url, home/"same", tree=tree, wait=0) # another zip, the same content
    host.data = zip_of(tmp_path, changed(data, WRONG[what]))
    with pytest.raises(DataError, match=f"holds the tree [0-9a-f]{{40}}; expected is {tree}"): fetch(host.url, home/"set", tree=tree, wait=0)
    assert names(home)==["same"]
    host.data = same
    assert fetch(host.url, home/"set", tree=tree, wait=0)


def test_planted_without_the_check_other_content_passes(host, repo, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_is_tree", lambda tree: lambda work: None)
    with pytest.raises(pytest.fail.Exception): test_other_content_is_refused(host, repo, tmp_path, "a byte")


def test_planted_without_a_condition_files_are_mixed(host, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_strong", lambda r: '"1"')
    with pytest.raises(AssertionError): test_two_files_are_never_mixed(host, tmp_path, True)


# --- the command, killed and doubled

def start(*words, cwd): return subprocess.Popen([TOOL, *map(str, words)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(test, p, seconds=30):
    end = time.monotonic()+seconds
    while not test() and p.poll() is None and time.monotonic()<end: time.sleep(.002)


def test_killed_in_the_download(host, repo, tmp_path):
    "kill -9 at four points: what came is kept, the next call asks for the rest and is done."
    data, tree = repo
    host.data, home = data, tmp_path/"home"
    home.mkdir()
    for i in range(4):
        host.pace, host.asked[:] = .02, []
        part, goal = home/".set.part", len(data)*(i+1)//5
        p = start("data", "fetch", host.url, "set", "--tree", tree, cwd=home)
        until(lambda: part.exists() and part.stat().st_size>=goal, p)
        p.kill()
        assert p.wait()==-signal.SIGKILL and not (home/"set").exists() and part.stat().st_size>=goal
        kept = part.stat().st_size
    host.pace, host.asked[:] = 0, []
    p = start("data", "fetch", host.url, "set", "--tree", tree, cwd=home)
    out, err = p.communicate(timeout=60)
    assert (p.returncode, err)==(0, "") and "its content is the tree" in out and starts(host)==[kept] and names(home)==["set"] and tree_hash(home/"set")==tree


def test_killed_while_unpacking(host, tmp_path):
    "kill -9 at five points of unpacking: nothing whole-looking that is not, nothing left over after the next call, nothing loaded twice."
    d = write_synth(tmp_path/"drawn", tiles=10)
    host.data, tree, killed = zip_of(tmp_path, [(p.relative_to(d).as_posix(), 0, p.read_bytes()) for p in sorted(d.rglob("*")) if p.is_file()]), tree_hash(d), 0
    for i in range(5):
        home = tmp_path/f"home{i}"
        home.mkdir()
        p = start("data", "fetch", host.url, "set", "--tree", tree, cwd=home)
        until(lambda: sum(1 for _ in home.rglob("*.jpg"))>=10*i+1, p)
        p.kill()
        p.wait()
        killed += p.returncode==-signal.SIGKILL
        if (home/"set").exists(): assert tree_hash(home/"set")==tree
        host.asked.clear()
        assert fetch(host.url, home/"set", tree=tree, wait=0) is not None and names(home)==["set"] and tree_hash(home/"set")==tree and not host.asked
    assert killed>=3


def test_two_at_once(host, repo, tmp_path):
    host.data, tree = repo
    host.pace, home = .05, tmp_path/"home"
    home.mkdir()
    p = start("data", "fetch", host.url, "set", "--tree", tree, cwd=home)
    until(lambda: (home/".set.part").exists() and (home/".set.part").stat().st_size, p)
    with pytest.raises(DataError, match="by another process"): fetch(host.url, home/"set", tree=tree)
    host.pace = 0
    assert p.wait(timeout=60)==0 and names(home)==["set"] and tree_hash(home/"set")==tree


def test_one_line_and_what_to_do(tmp_path):
    "No network (here: nobody listens): where to get the zip, and how to give it."
    p = start("data", "fetch", "http://127.0.0.1:9/set.zip?key=canary", cwd=tmp_path)
    out, err = p.communicate(timeout=60)
    assert p.returncode==1 and out=="" and err.count("\n")==1 and "canary" not in err
    assert "download http://127.0.0.1:9/set.zip elsewhere, then call: defect-detect data fetch http://127.0.0.1:9/set.zip data/set --zip <file>" in err


def test_umask_and_modes(host, repo, tmp_path):
    "The executable bit is the owner's, whatever the umask says of others."
    host.data, tree = repo
    old = os.umask(0o077)
    try: fetch(host.url, tmp_path/"set", tree=tree, wait=0)
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path/"set/README.md").stat().st_mode)==0o600 and tree_hash(tmp_path/"set")==tree
