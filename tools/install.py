"Build .venv from a lock: every file by its hash, then this package, editable. Standard library only."
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

STEP = "Collecting ", "Downloading ", "Installing collected", "Successfully"


def pip(*words:str):
    "Run pip with one line of progress a package, and its whole output in .venv/install.log."
    env = {**os.environ, "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off", "PYTHONUNBUFFERED": "1"}
    with open(".venv/install.log", "a") as log, subprocess.Popen([".venv/bin/python", "-m", "pip", *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as p:
        n, tail = 0, []
        for line in p.stdout:
            log.write(line)
            tail = [*tail[-15:], line]
            if not line.startswith(STEP): continue
            n += line.startswith("Collecting ")
            if line.startswith("Collecting ") and n%25==0: print(f"  {n} packages found", flush=True)
            elif line.startswith("Installing collected"): print(f"  installing {line.count(',')+1} packages", flush=True)
            elif line.startswith("Downloading ") and ("GB" in line or (" MB)" in line and float(line.rsplit("(", 1)[1].split()[0])>100)): print("  "+line.split("/")[-1].strip(), flush=True)
    if p.returncode: sys.exit("".join(tail)+"error: pip could not install; the whole of it is in .venv/install.log. The next `make` begins again.")


def main(lock:str, index:str=""):
    shutil.rmtree(".venv", ignore_errors=True)
    venv.create(".venv", with_pip=True)
    Path(".venv/.gitignore").write_text("*\n")
    pip("install", "--no-deps", "--require-hashes", "-r", lock, *(["--extra-index-url", index] if index else [])) # the lock is whole; pips of 2023 take an extra of a pinned package for another, unpinned one
    pip("install", "--no-deps", "--no-build-isolation", "-e", ".")
    pip("check")


if __name__=="__main__": main(*sys.argv[1:])
