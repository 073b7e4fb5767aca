"Build `defect_detect` from the keys of settings.ini, the one place that names versions and requirements."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {k: cfg[f"{k}_requirements"].split() for k in ("serve", "openvino", "learn", "dev")}
readme = here/"README.md"

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], license="Apache-2.0",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    packages=find_packages(include=["defect_detect", "defect_detect.*"]), include_package_data=True,
    python_requires=f">={cfg['min_python']}", install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers",
                 "Intended Audience :: Science/Research", "Topic :: Scientific/Engineering :: Image Recognition",
                 *(f"Programming Language :: Python :: 3.{v}" for v in (11, 12, 13))],
    zip_safe=False,
    package_data={"defect_detect": ["judge/*.html", "serve/page.*"]},
)
