"README.md is nbs/index.ipynb: its prose, its code, and the text its code printed."
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]


def readme(notebook:Path)->str:
    "The Markdown of `notebook`."
    parts = []
    for c in nbformat.read(notebook, 4).cells:
        if c.cell_type=="markdown": parts.append(c.source)
        elif c.cell_type=="code" and not c.source.startswith("#| hide"):
            parts.append(f"```python\n{c.source}\n```")
            said = "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in c.outputs).rstrip()
            if said: parts.append(f"```\n{said}\n```")
    return "<!-- made from nbs/index.ipynb by tools/readme.py; change that one -->\n\n"+"\n\n".join(parts)+"\n"


if __name__=="__main__":
    want, file = readme(ROOT/"nbs/index.ipynb"), ROOT/"README.md"
    if "--check" in sys.argv:
        if not file.exists() or file.read_text()!=want: sys.exit("error: README.md is not what nbs/index.ipynb says; run: make prepare")
    else: file.write_text(want)
