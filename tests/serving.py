"Running services for the tests, and clients that a library would not be."
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
from PIL import Image

from defect_detect.core.bundle import BundleCard, OperatingPoint, example_model, write_bundle
from defect_detect.core.image import InputSpec
from defect_detect.serve.messages import PREFIX

SERVE = "import sys; from defect_detect.cli.base import main; main(sys.argv[1:])"
WEB = httpx.Client(verify=False, trust_env=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0, max_connections=None)) # a connection a request, without loading certificates for each
ENV = {k: v for k, v in os.environ.items() if not k.startswith("DEFECT_")}


def encode(a, fmt="PNG", **kw):
    b = io.BytesIO()
    Image.fromarray(a).save(b, fmt, **kw)
    return b.getvalue()


def plate(h=150, w=200, holes=(), seed=0):
    a = (130+np.random.default_rng(seed).normal(0, 4, (h, w))).clip(0, 255).astype(np.uint8)
    for x, y in holes: a[y:y+12, x:x+12] = 30
    return a


@contextmanager
def process(*words, drain=.2, env=(), wait=True, command=(sys.executable, "-c", SERVE)):
    "`defect-detect serve` as a process; yields it, its URL, and the list that its log lines go into."
    cmd = [*command, "serve", *map(str, words), *([] if "--port" in words else ["--port", "0"]), *([] if "--threads" in words else ["--threads", "1"]), "-p", f"drain_seconds={drain}"]
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**ENV, **dict(env)}, cwd="/")
    log = []
    reader = threading.Thread(target=lambda: log.extend(iter(p.stderr.readline, "")), daemon=True)
    reader.start()
    try:
        line = p.stdout.readline() if wait else ""
        assert line.startswith("serving ") or not wait, (p.wait(10), log)
        yield p, line.split()[-1] if wait else "", log
    finally:
        if p.poll() is None: p.terminate()
        try: p.wait(60)
        finally:
            if p.poll() is None: p.kill()
            p.wait()
            reader.join(5)
            p.stdout.close()
            p.stderr.close()


def records(log): return [json.loads(line) for line in log]


def post(url, body, kind="image/png", path="/v1/predict", **kw):
    return WEB.post(url+path, content=body, headers={"content-type": kind, **kw.pop("headers", {})}, **kw)


def assert_problem(r, status, code):
    d = r.json()
    assert (r.status_code, r.headers["content-type"], d["type"], d["status"]) == (status, "application/problem+json", PREFIX+code, status), r.text
    assert d["request_id"] == r.headers["x-request-id"] and d["title"] and d["detail"] and r.headers["x-content-type-options"] == "nosniff"


def address(url): return httpx.URL(url).host, httpx.URL(url).port


def raw(url, data, pieces=()):
    "Send bytes as they are; returns how many went out, and the answer's status and body."
    with socket.create_connection(address(url), timeout=10) as s:
        sent = 0
        try:
            for part in (data, *pieces):
                s.sendall(part)
                sent += len(part)
        except OSError: pass # the service has closed: it has answered before
        got = b""
        try:
            while part := s.recv(65536): got += part
        except OSError: pass
    return sent, int(got.split(b" ", 2)[1]) if got else 0, got


def head(*lines, path="/v1/predict"): return "\r\n".join((f"POST {path} HTTP/1.1", "Host: x", *lines, "", "")).encode()


def metrics(url, **kw): return dict(re.findall(r"(?m)^([a-z_]+(?:\{[^}]*\})?) (\S+)$", WEB.get(f"{url}/metrics", **kw).text))


def metric(url, name, **kw): return float(metrics(url, **kw).get("defect_detect_"+name, 0))


def wait_for(f, seconds=30, every=.02):
    "The first true value of `f()`, or its last."
    end = time.monotonic()+seconds
    while not (v := f()) and time.monotonic()<end: time.sleep(every)
    return v


def slow_bundle(folder, side=1024):
    "A bundle whose network takes its time: large and with many operations."
    from onnx import helper as h, load_model_from_string, numpy_helper as nh
    spec = InputSpec(height=side, width=side)
    m = load_model_from_string(example_model(spec))
    m.graph.initializer.append(nh.from_array(np.full((3, 3, 9, 9), 0, np.float32), "idle_w"))
    last = "image"
    for i in range(3):
        m.graph.node.insert(i, h.make_node("Conv", [last, "idle_w"], [f"idle{i}"], pads=[4]*4))
        last = f"idle{i}"
    m.graph.node.insert(3, h.make_node("Add", ["image", last], ["seen"]))
    for n in m.graph.node[4:]:
        for i, name in enumerate(n.input): n.input[i] = "seen" if name == "image" else name
    card = BundleCard(name="example-slow", classes=("background", "spot"), input=spec, operating_point=OperatingPoint(score_pixels=8))
    return write_bundle(folder, card, m.SerializeToString(deterministic=True))


def poison_bundle(folder):
    "A bundle whose network fails on a picture with a white pixel: it looks up a row that there is not."
    from onnx import TensorProto as T, helper as h, load_model_from_string, numpy_helper as nh
    spec = InputSpec(height=64, width=64)
    m = load_model_from_string(example_model(spec, window=15))
    m.graph.initializer.extend([nh.from_array(np.array(.995, np.float32), "white"), nh.from_array(np.zeros((1, 1), np.float32), "rows"), nh.from_array(np.array([0], np.int64), "first")])
    new = [h.make_node("ReduceMin", ["image"], ["darkest"], axes=[1]), h.make_node("Greater", ["darkest", "white"], ["is_white"]), h.make_node("Cast", ["is_white"], ["index"], to=T.INT64), h.make_node("ReduceMax", ["index"], ["row"], keepdims=0),
           h.make_node("Gather", ["rows", "row"], ["nothing"]), h.make_node("ReduceSum", ["nothing", "first"], ["zero_more"], keepdims=0), h.make_node("Add", ["image", "zero_more"], ["seen"])]
    for i, n in enumerate(new): m.graph.node.insert(i, n)
    for n in m.graph.node[len(new):]:
        for i, name in enumerate(n.input): n.input[i] = "seen" if name == "image" else name
    card = BundleCard(name="example-poison", classes=("background", "spot"), input=spec, batches=(1, 2, 4, 8), operating_point=OperatingPoint(score_pixels=8))
    return write_bundle(folder, card, m.SerializeToString(deterministic=True))
