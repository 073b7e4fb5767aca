#!/bin/sh
# Install the service where nothing is yet. The build of the image runs this script, and so does a test (tests/test_image.py):
#   docker/install.sh docker/serve.lock dist/defect_detect-0.1.0-py3-none-any.whl /venv
set -eu
[ $# -eq 3 ] || { echo "error: $# words; allowed: LOCK WHEEL FOLDER" >&2; exit 2; }
lock=$1 wheel=$2 to=$3
for f in "$lock" "$wheel"; do [ -f "$f" ] || { echo "error: there is no file $f" >&2; exit 2; }; done
[ ! -e "$to" ] || { echo "error: $to is there already; a new folder is needed" >&2; exit 2; }
# Every package has its hash in the lock and comes built. The wheel is ours and brings none along, so nothing is resolved here.
python3 -m venv "$to"
"$to/bin/pip" install --require-hashes --only-binary :all: -r "$lock"
"$to/bin/pip" install --no-deps --no-index "$wheel"
"$to/bin/pip" check
# What installs packages has no business beside a service.
"$to/bin/pip" uninstall --yes setuptools pip
