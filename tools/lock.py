"Renew the locks: lock.txt (training), docker/serve.lock (service) and, given an index that has CPU builds, lock-cpu.txt."
import re
import subprocess
import sys
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = re.compile(r"(nvidia-|cuda-|triton)")
CPU = ("torch", "torchvision")


def blocks(lock:str)->dict[str, str]: # package -> its lines
    "Take a lock apart."
    return {re.match(r"[\w.-]+", b)[0].lower(): b for b in re.split(r"(?m)^(?=[A-Za-z0-9])", lock) if b.strip() and not b.startswith("#")}


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = {}
    def handle_starttag(self, tag, attrs):
        m = re.search(r"([^/]+\.whl)#sha256=([0-9a-f]{64})$", dict(attrs).get("href") or "") if tag=="a" else None
        if m: self.found[m[1].replace("%2B", "+").replace("%2b", "+")] = m[2]


def cpu_lock(lock:str, # text of lock.txt
             index:str, # address of a simple index with the CPU builds
)->str:
    "`lock` with the CPU builds of torch and torchvision for Linux, without CUDA."
    out = {k: b for k, b in blocks(lock).items() if not CUDA.match(k)}
    for name in CPU:
        version = re.search(r"==([\d.]+)", out[name])[1]
        try:
            with urllib.request.urlopen(f"{index.rstrip('/')}/{name}/", timeout=60) as r: page = r.read().decode()
        except (OSError, ValueError) as e: raise SystemExit(f"error: {index} cannot be read as a package index: {e}") from None
        links = _Links()
        links.feed(page)
        wheel = re.compile(rf"{name}-{re.escape(version)}\+cpu-cp31[123]-cp31[123]-manylinux_\w+_(x86_64|aarch64)\.whl")
        hashes = sorted(h for f, h in links.found.items() if wheel.fullmatch(f))
        if not hashes: raise SystemExit(f"error: {index} has no {name} {version}+cpu for Python 3.11 to 3.13")
        out[name] = f"{name}=={version}+cpu \\\n"+" \\\n".join(f"    --hash=sha256:{h}" for h in hashes)+"\n"
    return "".join(out[k] for k in sorted(out))


def compile_lock(target:str, *extras:str, upgrade:bool=False):
    "Resolve for Python 3.11 to 3.13, Linux and macOS; what the lock has stays, unless it is to be upgraded."
    cmd = [Path(sys.executable).parent/"uv", "pip", "compile", "setup.py", "-c", "constraints.txt", "--universal", "--python-version", "3.11", "--generate-hashes", "--refresh", "--no-header", "--no-annotate", "-q", "-o", target]
    subprocess.run([*cmd, *(w for e in extras for w in ("--extra", e)), *(["--upgrade"] if upgrade else [])], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def write_cpu(index:str):
    (ROOT/"lock-cpu.txt").write_text(cpu_lock((ROOT/"lock.txt").read_text(), index))
    print("lock-cpu.txt was written with the hashes that the index gives; commit it, so that the next installation is held to them")


def main(*words:str):
    "`[--cpu] [--upgrade] [INDEX]`; with --cpu only lock-cpu.txt, for which the standard library is enough; --upgrade: to the newest that constraints.txt allows."
    if odd := [w for w in words if w.startswith("-") and w not in ("--cpu", "--upgrade")]: raise SystemExit(f"error: {odd[0]}; allowed: --cpu, --upgrade and the address of an index")
    only, index = "--cpu" in words, next((w for w in words if not w.startswith("-")), "")
    if not only:
        compile_lock("lock.txt", "serve", "openvino", "learn", "dev", upgrade="--upgrade" in words)
        compile_lock("docker/serve.lock", "serve", upgrade="--upgrade" in words)
    if index: write_cpu(index)
    elif only: raise SystemExit("error: TORCH=cpu needs INDEX=<url>: the package index that has the CPU builds of torch")
    else: print("lock-cpu.txt was left alone; to renew it: make lock INDEX=<url of the index with the CPU builds>")


if __name__=="__main__": main(*sys.argv[1:])
