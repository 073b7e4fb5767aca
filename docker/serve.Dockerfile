# The service with its model, and nothing that trains. docker/build.sh builds it; what it needs from the repository stands in
# serve.Dockerfile.dockerignore. Only a release builds it on GitHub; `make test` checks the script that installs, and the process.
# The digest is the one that several public repositories pin for this tag: verify in CI (docker buildx imagetools inspect).
FROM python:3.11-slim-bookworm@sha256:b18992999dbe963a45a8a4da40ac2b1975be1a776d939d098c647482bcad5cba AS build
COPY docker/install.sh docker/serve.lock /tmp/
COPY dist/defect_detect-*.whl /tmp/
RUN PIP_NO_CACHE_DIR=1 /tmp/install.sh /tmp/serve.lock /tmp/defect_detect-*.whl /venv

FROM python:3.11-slim-bookworm@sha256:b18992999dbe963a45a8a4da40ac2b1975be1a776d939d098c647482bcad5cba
ARG BUNDLE=bundle
ARG BUNDLE_VERSION
ARG COMMIT
LABEL org.opencontainers.image.title="defect-detect" org.opencontainers.image.revision="$COMMIT" org.opencontainers.image.version="$BUNDLE_VERSION" defect-detect.bundle="$BUNDLE_VERSION"
COPY --from=build /venv /venv
COPY ${BUNDLE} /bundle
# The service writes nothing: its root is read-only, and no .pyc files are attempted.
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
# Numeric, so that Kubernetes can see that it is not root.
USER 65534:65534
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready means: a picture would be answered now. urlopen raises on a status of 400 or more.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/healthz/ready', timeout=2)"]
# Inside a container loopback would reach nobody; it asks everybody for DEFECT_TOKEN, and does not start without one.
CMD ["defect-detect", "serve", "/bundle", "--host", "0.0.0.0", "--port", "8000"]
