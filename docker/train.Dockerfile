# The training, for a runner with an NVIDIA GPU. The CUDA libraries come with torch from the lock; the driver comes from the host,
# through its container toolkit. Build from the root of the repository:
#   docker build -f docker/train.Dockerfile -t defect-detect-train .
#   docker run --gpus all --user "$(id -u)" -v "$PWD:/work" defect-detect-train defect-detect run pipeline mine --data data/mine
# The digest is the one that several public repositories pin for this tag: verify in CI (docker buildx imagetools inspect).
FROM python:3.11-slim-bookworm@sha256:b18992999dbe963a45a8a4da40ac2b1975be1a776d939d098c647482bcad5cba
# A run writes the commit it was made at into its receipt; the folder of the repository may belong to somebody else.
# Debian keeps no older versions of a package, so a pinned one would be gone at the next update of the release.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends git \
 && rm -rf /var/lib/apt/lists/* \
 && git config --system --add safe.directory /work
COPY lock.txt /tmp/lock.txt
# Every package has its hash in the lock, so nothing is resolved here.
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/lock.txt
COPY settings.ini setup.py README.md LICENSE /src/
COPY defect_detect /src/defect_detect
RUN /venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation /src
# The repository is mounted at /work, and its library goes before the one that is installed: a replay needs that of its commit.
ENV PATH=/venv/bin:$PATH PYTHONPATH=/work HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility CUBLAS_WORKSPACE_CONFIG=:4096:8 DVC_NO_ANALYTICS=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /work
USER 10001:10001
CMD ["defect-detect", "run", "pipeline", "--help"]
