"A root of its own for a process, as a container has: nothing in it but the system's programs, this Python and what is put there."
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/run", "/dev", sys.base_prefix) # read-only in there
SUDO = () if os.geteuid()==0 else ("sudo", "-n")
ENTER = """set -eu
root=$1 mode=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
for d in SYSTEM; do [ -d "$d" ] || continue; mkdir -p "$root$d"; mount --bind "$d" "$root$d"; mount -o remount,bind,ro "$root$d"; done
mkdir -p "$root/proc"; mount --rbind /proc "$root/proc"
[ "$mode" = rw ] || mount -o remount,bind,ro "$root"
exec chroot "$root" "$@"
"""


def inside(root:Path, # its folder
           words:Sequence, # the command
           env:Mapping[str, str], # all of its environment
           uid:int|None=None, # who runs it, without any capability; None: root
           writable:bool=False,
)->list[str]:
    "The command that runs `words` in there; it ends as the same process, so that signals arrive."
    who = [] if uid is None else ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    return [*SUDO, "unshare", "--mount", "sh", "-c", ENTER.replace("SYSTEM", " ".join(SYSTEM)), "sh", str(root), "rw" if writable else "ro", *who, "env", "-i", *(f"{k}={v}" for k, v in env.items()), *map(str, words)]


def pip_env(root:Path)->dict[str, str]:
    "How pip is set up here, for in there."
    env = {k: v for k, v in os.environ.items() if k.upper().startswith("PIP_") and k!="PIP_FIND_LINKS" or k.lower() in ("http_proxy", "https_proxy", "no_proxy")}
    for f in (".config/pip/pip.conf", ".pip/pip.conf"):
        if (own := Path.home()/f).is_file(): env["PIP_CONFIG_FILE"] = "/"+shutil.copy(own, root/"pip.conf").name
    return {**env, "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin", "HOME": "/nowhere", "PIP_NO_CACHE_DIR": "1"}


def remove(root:Path): subprocess.run([*SUDO, "rm", "-rf", str(root)], check=True)
