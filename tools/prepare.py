"Before a commit: clean, export, stages, README, and the tests of what changed."
import subprocess
import sys
from pathlib import Path

from test import BIN, ENV, ROOT


def run(*cmd, **env):
    "Run a command or end with its exit code."
    code = subprocess.run([str(c) for c in cmd], cwd=ROOT, env={**ENV, **env}).returncode
    if code: sys.exit(code)


def changed()->list[Path]:
    "Files that differ from the last commit; every library notebook where there is no git."
    r = subprocess.run(["git", "status", "--porcelain", "-z", "-uall", "--no-renames"], cwd=ROOT, capture_output=True, text=True)
    if r.returncode: return sorted((ROOT/"nbs").rglob("*.ipynb"))
    return sorted(ROOT/s[3:] for s in r.stdout.split("\0") if s and (ROOT/s[3:]).is_file())


def main():
    for cmd in (["nbdev_clean"], ["nbdev_export"], ["defect-detect", "run", "update-stages"], ["defect-detect", "run", "update-workflow"]): run(BIN/cmd[0], *cmd[1:])
    run(sys.executable, "tools/readme.py")
    run(sys.executable, "tools/test.py", "readme", "stages", "imports", "style")
    new = changed()
    books = [p for p in new if p.suffix==".ipynb" and p.parent==ROOT/"nbs" and p.name[0].isdigit()]
    tests = [p for p in new if p.parent==ROOT/"tests" and p.name.startswith("test_")]
    for p in books:
        print(f"nbdev_test {p.name}", flush=True)
        run(BIN/"nbdev_test", "--path", p, IN_TEST="1")
    if tests: run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    print(f"{len(books)} notebooks and {len(tests)} test files changed and passed; `make test` runs everything")


if __name__=="__main__": main()
