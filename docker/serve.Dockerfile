# The service, and nothing that trains. Build from the root of the repository, after `pip wheel --no-deps -w dist .`:
#   docker build -f docker/serve.Dockerfile -t defect-detect-serve .
# A tag can change under us: for production, pin the base by digest (python:3.11-slim@sha256:...).
FROM python:3.11-slim AS build
COPY docker/serve.lock /tmp/serve.lock
COPY dist/defect_detect-*.whl /tmp/
# Every package has its hash in the lock. The wheel is ours and comes without dependencies, so nothing is resolved here.
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r /tmp/serve.lock \
 && /venv/bin/pip install --no-cache-dir --no-deps --no-index /tmp/defect_detect-*.whl \
 && /venv/bin/pip uninstall --yes pip

FROM python:3.11-slim
COPY --from=build /venv /venv
# The service writes nothing: run it with a read-only root. No .pyc files are attempted either.
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
# Numeric, so that Kubernetes can see that it is not root.
USER 10001:10001
# A bundle is mounted at /bundle, or comes with an image of your own: FROM this one, `COPY mybundle /bundle`.
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready means: a picture would be answered now. urlopen raises on a status of 400 or more.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/healthz/ready', timeout=2)"]
# Inside a container loopback would reach nobody; which addresses the world sees is decided where it is started.
CMD ["defect-detect", "serve", "/bundle", "--host", "0.0.0.0", "--port", "8000"]
