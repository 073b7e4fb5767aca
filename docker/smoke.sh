#!/bin/sh
# Start an image as it will run, send it a picture, stop it; from the root of the repository:
#   docker/smoke.sh ghcr.io/me/defect-detect@sha256:...
set -eu
[ $# -eq 1 ] || { echo "error: $# words; allowed: IMAGE" >&2; exit 2; }
DEFECT_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export DEFECT_TOKEN
id=$(docker run -d --read-only --cap-drop ALL --security-opt no-new-privileges --memory 2g --pids-limit 128 -e DEFECT_TOKEN -p 127.0.0.1::8000 "$1")
trap 'docker logs "$id" >&2; docker rm -f "$id" >/dev/null' EXIT
end=$(($(date +%s)+90))
until [ "$(docker inspect -f '{{.State.Health.Status}}' "$id")" = healthy ]; do
  [ "$(date +%s)" -lt $end ] || { echo "error: it is not healthy after 90 s" >&2; exit 1; }
  sleep 1
done
url=http://$(docker port "$id" 8000/tcp | head -n1)
"${PYTHON:-.venv/bin/python}" - "$url" <<'PY'
import io, os, sys
from PIL import Image
from defect_detect.client import Client
b = io.BytesIO()
Image.new("L", (320, 240), 130).save(b, "PNG")
with Client(sys.argv[1], token=os.environ["DEFECT_TOKEN"]) as c: print(c.predict(b.getvalue()))
PY
docker stop -t 30 "$id" >/dev/null
code=$(docker inspect -f '{{.State.ExitCode}}' "$id")
[ "$code" = 0 ] || { echo "error: asked to stop, it ended with $code" >&2; exit 1; }
