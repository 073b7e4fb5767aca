"Say what an installation will need and check it, with nothing but the standard library."
from __future__ import annotations # an older Python must get as far as being told so

import shutil
import sys
from pathlib import Path

LOW, HIGH = (3, 11), (3, 14)
NEED = {"lock.txt": (8, "4 GB to download; 3 to 15 minutes"), "lock-cpu.txt": (3, "0.6 GB to download; 2 to 6 minutes")}


def problem(lock:str, index:str, version:tuple=sys.version_info[:2], free:float|None=None)->str: # "" where all is well
    "The first thing that would go wrong, with its remedy."
    if lock not in NEED: return f"there is no lock {lock}; allowed: {', '.join(NEED)}"
    if not LOW<=version<HIGH:
        return f"this is Python {'.'.join(map(str, version))}; allowed: 3.11 to 3.13. Name another: make run PYTHON=python3.12"
    if sys.platform not in ("linux", "darwin"): return f"this is {sys.platform}; Linux and macOS are supported"
    if lock=="lock-cpu.txt" and not index: return "TORCH=cpu needs INDEX=<url>: the package index that has the CPU builds of torch"
    if lock=="lock-cpu.txt" and sys.platform!="linux": return "TORCH=cpu is for Linux; elsewhere the default has no CUDA in it"
    try: import venv, ensurepip # noqa: E401, F401
    except ImportError: return "this Python lacks the venv module; on Debian and Ubuntu: apt install python3-venv"
    free = shutil.disk_usage(".").free/1e9 if free is None else free
    if free<NEED[lock][0]: return f"{free:.1f} GB are free here; {NEED[lock][0]} GB are needed"
    return ""


if __name__=="__main__":
    lock, index = (sys.argv[1:]+["", ""])[:2]
    said = problem(lock, index)
    if said: sys.exit(f"error: {said}")
    gb, time = NEED[lock]
    print(f"Python {sys.version.split()[0]}; .venv from {lock}: needs {gb} GB of {shutil.disk_usage('.').free/1e9:.0f} GB free here, {time}, once.")
    print("Then `make run` takes about 5 minutes on two cores; a second time, seconds.", flush=True)
    if Path(".venv").exists(): print("The .venv that is here is of another lock or version and is replaced.", flush=True)
