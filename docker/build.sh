#!/bin/sh
# Build the image of a bundle, here or in a release; from the root of the repository:
#   docker/build.sh runs/demo/export/bundle defect-detect-serve            into the local engine
#   docker/build.sh bundle ghcr.io/me/defect-detect --push                 to a registry, with SBOM and provenance; prints the digest
# Nothing is taken from a cache. The digests are those that public repositories pin: verify in CI.
set -eu
[ $# -ge 2 ] && [ $# -le 3 ] && [ "${3:---push}" = --push ] || { echo "error: $*; allowed: BUNDLE IMAGE [--push]" >&2; exit 2; }
bundle=$1 image=$2 push=${3:-}
[ -f "$bundle/SHA256SUMS" ] || { echo "error: $bundle is no bundle: it has no SHA256SUMS" >&2; exit 2; }
buildkit=moby/buildkit:buildx-stable-1@sha256:2f5adac4ecd194d9f8c10b7b5d7bceb5186853db1b26e5abd3a657af0b7e26ec
scanner=docker/buildkit-syft-scanner:stable-1@sha256:79e7b013cbec16bbb436f312819a49a4a57752b2270c1a9332ae1a10fcc82a68
version=$(sha256sum "$bundle/SHA256SUMS" | cut -c1-12)
rm -rf dist
"${PYTHON:-.venv/bin/python}" -m pip wheel -q --no-deps --no-build-isolation -w dist . >&2
set -- --no-cache -f docker/serve.Dockerfile --build-arg "BUNDLE=$bundle" --build-arg "BUNDLE_VERSION=$version" --build-arg "COMMIT=$(git rev-parse HEAD)" .
if [ -z "$push" ]; then exec docker buildx build --load -t "$image" "$@"; fi
builder=$(docker buildx create --driver docker-container --driver-opt "image=$buildkit")
meta=$(mktemp)
trap 'docker buildx rm "$builder" >/dev/null; rm -f "$meta"' EXIT
docker buildx build --builder "$builder" --provenance=mode=max --sbom="generator=$scanner" --output "type=image,name=$image,push-by-digest=true,push=true" --metadata-file "$meta" "$@" >&2
sed -n 's/.*"containerimage.digest": *"\(sha256:[0-9a-f]\{64\}\)".*/\1/p' "$meta"
