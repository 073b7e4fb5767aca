"What strangers send: too much, in odd ways, names that are paths or addresses, tokens that are wrong."
import base64
import gzip
import json
import os
import socket
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from pydantic import SecretStr

import hostile
from defect_detect.core.bundle import example_bundle
from defect_detect.core.image import InputSpec, Limits
from defect_detect.serve.api import background, create_app
from defect_detect.serve.envelope import Envelope
from defect_detect.serve.settings import Settings, SettingsError, refuse_open
from serving import WEB, address, assert_problem, encode, head, metrics, plate, post, process, raw, records, wait_for

GOOD = encode(plate())
MANY = list(range(10_000))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return example_bundle(tmp_path_factory.mktemp("strangers")/"bundle", InputSpec(height=64, width=64))


@pytest.fixture(scope="module")
def url(bundle):
    with background(Settings(bundle=bundle, threads=1, max_pictures=3, limits=Limits(max_bytes=2**20, max_pixels=2_000_000))) as u: yield u


# --- body limits

LIMIT = 2**20
def padded(n): return GOOD+b"\0"*(n-len(GOOD)) # a picture of n bytes
def form(*files, name="a"): return b"".join(b'--x\r\nContent-Disposition: form-data; name="a"; filename="'+name.encode()+b'"\r\n\r\n'+f+b"\r\n" for f in files)+b"--x--\r\n"
def chunked(data, n): return [f"{len(data[i:i+n]):x}\r\n".encode()+data[i:i+n]+b"\r\n" for i in range(0, len(data), n)]+[b"0\r\n\r\n"]
def infer(data): return json.dumps(dict(inputs=[dict(name="image", shape=[1], datatype="BYTES", data=data)])).encode()


KIND, FORM, V2 = "Content-Type: image/png", "Content-Type: multipart/form-data; boundary=x", "/v2/models/example-spot/infer"
def whole(body, *lines, path="/v1/predict"): return head(f"Content-Length: {len(body)}", "Connection: close", *lines, path=path), [body]
def pieces(body, n, *lines, path="/v1/predict"): return head("Transfer-Encoding: chunked", "Connection: close", *lines, path=path), chunked(body, n)


BODIES = {
    **{f"length {d:+d}": (lambda d=d: whole(padded(LIMIT+d), KIND), 413 if d>0 else 200) for d in (-1, 0, 1)},
    **{f"chunked {d:+d}": (lambda d=d: pieces(padded(LIMIT+d), 65536, KIND), 413 if d>0 else 200) for d in (-1, 0, 1)},
    **{f"form {d:+d}": (lambda d=d: whole(form(padded(LIMIT+d)), FORM), 413 if d>0 else 200) for d in (-1, 0, 1)},
    **{f"several {n} files": (lambda n=n: whole(form(*[GOOD]*n), FORM, path="/v1/predict:batch"), 413 if n>3 else 200) for n in (1, 3, 4)},
    **{f"base64 {d:+d}": (lambda d=d: whole(infer([base64.b64encode(padded(LIMIT+d)).decode()]), path=V2), 413 if d>0 else 200) for d in (-1, 0, 1)},
    "much too long": (lambda: (head("Content-Length: 100000000", KIND), [b"x"*65536]*200), 413),
    "chunks without an end": (lambda: (head("Transfer-Encoding: chunked", KIND), [b"10000\r\n"+b"x"*65536+b"\r\n"]*200), 413),
    "65,537 chunks": (lambda: pieces(padded(65_537), 1, KIND), 200),
    "a chunk that lies": (lambda: (head("Transfer-Encoding: chunked", KIND), [b"zz\r\nx\r\n"]), 400),
    "gzip": (lambda: whole(gzip.compress(GOOD), KIND, "Content-Encoding: gzip"), 415),
    "gzip bomb": (lambda: whole(gzip.compress(b"\0"*10**8), KIND, "Content-Encoding: gzip"), 415),
    "depth 250,000": (lambda: whole(b'{"inputs":'+b"["*250_000, path=V2), 400),
    "depth 250,000, closed": (lambda: whole(b'{"inputs":[{"name":"image","shape":[1],"datatype":"BYTES","data":'+b"["*250_000+b"]"*250_000+b"}]}", path=V2), 400),
    "a number of a million digits": (lambda: whole(b'{"inputs":[{"name":"image","shape":['+b"9"*1_000_000+b']}]}', path=V2), 400),
    "10,000 parts": (lambda: whole(form(*[b"x"]*10_000), FORM), 400),
    "10,000 parts, several": (lambda: whole(form(*[b"x"]*10_000), FORM, path="/v1/predict:batch"), 400),
    "10,000 headers in a part": (lambda: whole(form(b"x").replace(b"\r\n\r\n", b"\r\n"+b"a: b\r\n"*10_000+b"\r\n"), FORM), 400),
    "10,000 headers": (lambda: (head(*[f"a{i}: b" for i in MANY]), [b""]), 431),
    "a header of 20,000 bytes": (lambda: (head("a: "+"b"*20_000), [b""]), 431),
    "a boundary of 5,000 letters": (lambda: whole(form(GOOD), FORM+"y"*5000), 400),
    "two lengths": (lambda: (head("Content-Length: 5", "Content-Length: 6"), [b"hello"]), 400),
    "length and chunks": (lambda: (head("Content-Length: 5", "Transfer-Encoding: chunked"), [b"0\r\n\r\n"]), (400, 415)),
    "an empty body": (lambda: whole(b"", KIND), 400),
}


def limits_kept(url, pid, cases=BODIES):
    "The cases that were answered otherwise, or cost more than 32 MB of memory, or left the service dead."
    p, bad = psutil.Process(pid), []
    for name, (make, want) in cases.items():
        before = p.memory_info().rss
        data, parts = make()
        sent, status, got = raw(url, data, parts)
        grown = (p.memory_info().rss-before)/2**20
        if status not in (want if isinstance(want, tuple) else (want,)): bad.append(f"{name}: {status} instead of {want}; {got[-200:]}")
        if status>=400 and b"application/problem+json" not in got: bad.append(f"{name}: no problem document")
        if status == 413 and sent>LIMIT*7+2**22: bad.append(f"{name}: {sent} bytes went out")
        if grown>32: bad.append(f"{name}: {grown:.0f} MB")
        if WEB.get(f"{url}/healthz/live").status_code != 200: bad.append(f"{name}: not alive")
    return bad


def test_body_limits(bundle):
    with process(bundle, "-p", "max_pictures=3", "-p", f"limits.max_bytes={LIMIT}") as (p, u, _):
        limits_kept(u, p.pid, {k: BODIES[k] for k in ("chunked +0", "form +0", "base64 +0", "several 3 files")}) # what allocates once
        assert limits_kept(u, p.pid) == []


def test_body_limits_see_a_fault(bundle, monkeypatch):
    async def trusting(request, limit, seconds, held=None): return await request.body()
    monkeypatch.setattr("defect_detect.serve.api.read_body", trusting)
    few = {k: BODIES[k] for k in ("chunks without an end", "length +1", "length -1")}
    with background(Settings(bundle=bundle, threads=1, limits=Limits(max_bytes=2**30, max_pixels=2_000_000))) as u: assert len([o for o in limits_kept(u, os.getpid(), few) if "instead of 413" in o]) == 2


# --- paths and addresses

def payloads():
    "Two hundred ways to write a path that leads elsewhere."
    tails = ("etc/passwd", "etc/passwd%00.png", "proc/self/environ", "defect_detect/serve/api.py", "windows/win.ini")
    ups = ("../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%252f", "%252e%252e%252f", "..\\", "..%5c", "..%c0%af", "..%ef%bc%8f", ".../", "..;/", "%u002e%u002e/", "..//", "/..")
    for t in tails:
        for u in ups:
            for n in (1, 8): yield u*n+t
    for t in tails: yield from ("/"+t, "//"+t, "file:///"+t, "%2f"+t, "~/"+t, "#/"+t, "?/"+t, "\u2024\u2024/"+t, "a/../../"+t, "./"+t)


def addresses():
    "Inputs that look like something to fetch."
    hosts = ("http://192.0.2.1/a.png", "https://example.org/a.png", "ftp://192.0.2.1/x", "//192.0.2.1/a", "http://[2001:db8::1]/", "http://169.254.169.254/latest/meta-data", "gopher://192.0.2.1:70/", "s3://bucket/key", "ldap://192.0.2.1/a", "jar:http://192.0.2.1!/")
    for h in hosts: yield from (("body", h.encode()), ("name", h), ("text", h))


class Watch:
    "What the process opens and connects to while it is on; hooks cannot be removed, so there is one."
    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.on and threading.current_thread() is not threading.main_thread() and event in ("open", "socket.connect", "socket.getaddrinfo", "os.listdir", "subprocess.Popen", "os.system", "shutil.copyfile"): self.seen.append((event, str(args[1] if event == "socket.connect" else args[0])))

    def __enter__(self):
        self.seen, self.on = [], True
        return self.seen

    def __exit__(self, *_): self.on = False


WATCH = Watch()


def traverse(url):
    "Send every payload as every name that the service takes; the answers that are no refusal."
    port, odd, n = address(url)[1], [], 0
    for p in payloads():
        target = p if p.isascii() else "".join(c if c.isascii() else "".join(f"%{b:02x}" for b in c.encode()) for c in p)
        target = target.replace(" ", "%20").replace("\\", "%5c")
        for path in (f"/{target}", f"/v2/models/{target}", f"/v2/models/example-spot/versions/{target}", f"/v2/models/{target}/ready"):
            _, status, got = raw(f"http://127.0.0.1:{port}", f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            if not 400<=status<500 and not (status == 200 and path.split("#")[0].split("?")[0] in ("/", "/v2/models/example-spot", "/v2/models/example-spot/")): odd.append((path, status))
            if b"root:" in got or b"import " in got: odd.append((path, "content"))
            n += 1
        r = WEB.post(f"{url}/v1/predict:batch", files=[("images", (p.replace("\0", ""), GOOD))], headers={"x-request-id": target[:60]})
        if r.status_code != 200: odd.append((p, "a file name", r.status_code))
        n += 1
    return odd, n


def test_path_traversal(url):
    assert len(list(payloads()))>=200
    for path in ("/", "/page.css", "/v2", "/v2/models/x/ready"): WEB.get(url+path) # the framework reads the source of a function when it is first asked for
    WEB.post(f"{url}/v1/predict:batch", files=[("images", ("a", GOOD))])
    with WATCH as seen: odd, n = traverse(url)
    assert odd == [] and n>=1000 and [o for o in seen if o[0] != "socket.connect"] == [], (odd[:5], seen[:5])


def test_path_traversal_sees_a_fault(bundle, monkeypatch):
    "A page that is looked up by its name."
    def naive(app):
        from fastapi import Response
        async def part(name:str): return Response(open(os.path.join("/", name)).read())
        app.add_api_route("/{name:path}", part, include_in_schema=False)
    monkeypatch.setattr("defect_detect.serve.api.add_page", naive)
    with background(Settings(bundle=bundle, threads=1)) as u, WATCH as seen: odd, _ = traverse(u)
    assert odd and [o for o in seen if o[0] == "open"]


def test_no_outbound(bundle, monkeypatch):
    "Also with the variables set that make the web framework send traces."
    for k in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY"): monkeypatch.setenv(k, "http://192.0.2.1:4318")
    n = 0
    with WATCH as seen, background(Settings(bundle=bundle, threads=1)) as u:
        for kind, v in addresses():
            if kind == "body": assert post(u, v).status_code == 415 and post(u, infer([v.decode()]), "application/json", V2).status_code == 400
            elif kind == "name": assert WEB.post(f"{u}/v1/predict:batch", files=[("images", (v, GOOD))], headers={"referer": v, "x-forwarded-for": v, "x-forwarded-host": "192.0.2.1"}).status_code == 200
            else: assert post(u, hostile.png(extra=hostile.chunk(b"tEXt", b"XML:com.adobe.xmp\0"+v.encode())), headers={"x-request-id": "a"}).status_code == 200
            n += 1
        for data in hostile.seeds().values(): post(u, data)
    outside = [o for o in seen if o[0] in ("socket.connect", "socket.getaddrinfo") and "127.0.0.1" not in o[1]]
    assert n>=30 and outside == [], outside[:5]


def test_no_outbound_sees_a_fault():
    def call():
        with socket.socket() as s:
            s.settimeout(.01)
            try: s.connect(("192.0.2.1", 9))
            except OSError: pass
    with WATCH as seen:
        t = threading.Thread(target=call)
        t.start()
        t.join()
    assert seen and "192.0.2.1" in seen[0][1]


# --- metrics and logs

def scrape(url, n):
    "Series before and after `n` random requests, and the time of a scrape."
    rng = np.random.default_rng(0)
    def word(): return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz0123456789"), 12))
    def send(c, path, method="GET", extra=""): c.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{extra}\r\n".encode())
    def drain(c):
        got = b""
        while b"\r\n\r\n" not in got: got += c.recv(65536)
        h, _, rest = got.partition(b"\r\n\r\n")
        left = int(next(line for line in h.split(b"\r\n") if line.lower().startswith(b"content-length")).split()[1])-len(rest)
        while left>0: left -= len(c.recv(65536))
    def some(k):
        with socket.create_connection(address(url), timeout=30) as c:
            for i in range(k):
                kind = i%5
                if kind == 0: send(c, f"/{word()}")
                elif kind == 1: send(c, f"/v2/models/{word()}/versions/{word()}")
                elif kind == 2: send(c, f"/v1/model?{word()}={word()}", extra=f"X-Request-Id: {word()}\r\nUser-Agent: {word()}\r\n")
                elif kind == 3: send(c, "/healthz/live", word().upper(), extra=f"{word()}: {word()}\r\n")
                else: send(c, f"/v1/predict?mask={word()}", "POST", "Content-Length: 0\r\n")
                drain(c)
    some(50)
    post(url, GOOD)
    metrics(url)
    before = len(metrics(url))
    some(n)
    post(url, GOOD)
    t = time.perf_counter()
    text = WEB.get(f"{url}/metrics").text
    spent = time.perf_counter()-t
    return before, len(metrics(url)), spent, text


def test_metrics_cardinality(bundle, many):
    with background(Settings(bundle=bundle, threads=1)) as u: before, after, spent, text = scrape(u, many(2000, 10_000))
    print(f"{after} series, {1000*spent:.1f} ms a scrape")
    assert before == after<=200 and 'version="' in text and spent<1, "50 ms is the aim"


def test_metrics_cardinality_sees_a_fault(bundle, monkeypatch):
    monkeypatch.setattr(Envelope, "__call__", _by_path(Envelope.__call__))
    with background(Settings(bundle=bundle, threads=1)) as u:
        before, after, _, _ = scrape(u, 100)
        assert after>before+20


def _by_path(real):
    async def call(self, scope, receive, send):
        seen = self.seen
        if scope["type"] != "http": return await real(self, scope, receive, send)
        other = Envelope(self.app, lambda route, status, s: seen(scope["path"], status, s), self.closing, self.max_head)
        await real(other, scope, receive, send)
    return call


def log_of(bundle, requests):
    "The lines that `requests`, raw bytes each, leave in the log."
    with process(bundle) as (p, u, log):
        wait_for(lambda: log, 5)
        begun = len(log)
        for r in requests: raw(u, r)
        wait_for(lambda: len(log)-begun>=len(requests), 5)
    return [line for line in log[begun:]]


def one_each(lines, n):
    bad = [] if len(lines) == n else [f"{len(lines)} lines for {n} requests"]
    for line in lines:
        try: ok = json.loads(line)["message"] == "request"
        except (ValueError, KeyError): ok = False
        if not ok or len(line)>8192 or not line.rstrip("\n").isascii() or not line.rstrip("\n").isprintable(): bad.append(line[:100])
    return bad


EVIL = st.text(st.sampled_from([*"\r\n\x1b[31m\0\"\\{}%\u2028\u202e\u009b\ud83d\ude00 aZ".replace("\ud83d\ude00", "😀")]), max_size=60)


def nasty(n, seed=0):
    "Requests with names made to break a line of a log."
    found = []
    @hypothesis_settings(max_examples=n, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(EVIL, EVIL, st.sampled_from((1, 1, 1, 20_000)))
    def collect(a, b, times):
        quoted = "".join(f"%{c:02x}" for c in (a*min(times, 50)).encode("utf-8", "replace"))[:6000]
        name = (b*times).replace('"', "").replace("\0", "").encode("utf-8", "replace")[:2**20]
        found.append(f"GET /{quoted} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: {quoted[:90]}\r\n\r\n".encode())
        body = b'--x\r\nContent-Disposition: form-data; name="a"; filename="'+name+b'"\r\n\r\n'+GOOD+b"\r\n--x--\r\n"
        found.append(head(f"Content-Length: {len(body)}", FORM, "Connection: close", path="/v1/predict:batch")+body)
    collect()
    return found


def test_log_integrity(bundle, many):
    requests = nasty(many(60, 500))+[head("Content-Length: 1", "Connection: close", f"Content-Type: {k}")+b"x" for k in ("a/\t"+"b"*9000, "image/png; x=\x7f")]+[b"GET /%1b%5b31m HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]
    assert one_each(log_of(bundle, requests), len(requests)) == []


def test_log_integrity_sees_a_fault(): assert len(one_each(['{"message": "request"}\n', "forged\n", '{"message": "request", "path": "\x1b[31m"}\n', '{"message": "request", "x": "'+"a"*9000+'"}\n'], 3)) == 4


# --- who may do what

PREDICT, SCRAPE = "p"*24, "m"*24
KEYS = dict(none={}, wrong={"authorization": "Bearer "+"w"*24}, predict={"authorization": f"Bearer {PREDICT}"}, metrics={"authorization": f"Bearer {SCRAPE}"})
ALLOWED = dict(open={"none", "wrong", "predict", "metrics"}, predict={"predict"}, metrics={"predict", "metrics"})


def routes(app):
    "Path, methods and declared scope of everything that answers, out of the router itself."
    for r in app.routes:
        if hasattr(r, "original_router"): yield from routes(r.original_router)
        else:
            scopes = [s for d in getattr(getattr(r, "dependant", None), "dependencies", ()) if (s := getattr(d.call, "scope", None))]
            yield r.path, sorted(r.methods or ()), scopes[-1] if scopes else None


def undeclared(app): return [(p, m) for p, m, s in routes(app) if s not in ALLOWED]


def matrix(app, url):
    "Where an answer is not what was declared, for every route, method and key."
    bad, n = [], 0
    for path, methods, scope in routes(app):
        at = path.replace("{name}", "example-spot").replace("{version}", "x").replace("{name:path}", "x")
        for m in methods:
            for who, key in KEYS.items():
                r = WEB.request(m, url+at, headers=key, **({"content": GOOD} if m == "POST" else {}))
                want = "may" if who in ALLOWED.get(scope, ()) else 403 if who == "metrics" else 401
                got = r.status_code if r.status_code in (401, 403) else "may"
                if got != want or r.status_code>=500: bad.append((m, path, who, r.status_code, want))
                if got == 401 and "bearer" not in r.headers.get("www-authenticate", "").lower(): bad.append((path, "does not say what it asks for"))
                n += 1
    return bad, n


@pytest.fixture
def kept(monkeypatch):
    "The application that `background` makes."
    made = []
    real = create_app
    def make(*a):
        made.append(real(*a))
        return made[-1]
    monkeypatch.setattr("defect_detect.serve.api.create_app", make)
    return made


def test_authz_matrix(bundle, kept):
    with background(Settings(bundle=bundle, threads=1, token=PREDICT, metrics_token=SCRAPE)) as u:
        assert undeclared(kept[0]) == []
        bad, n = matrix(kept[0], u)
        every = {p for p, _, _ in routes(kept[0])}
        assert bad == [] and n>=60 and every >= {"/", "/v1/predict", "/v1/predict:batch", "/v1/model", "/metrics", "/v2/models/{name}/infer", "/healthz/live", "/openapi.json"}, (bad, n, every)
        for origin in ("http://example.org", "null", "http://127.0.0.1:1"): assert_problem(post(u, GOOD, headers=KEYS["predict"]|{"origin": origin}), 403, "foreign_origin")
        assert post(u, GOOD, headers=KEYS["predict"]|{"origin": u}).status_code == 200
        r = WEB.options(f"{u}/v1/predict", headers={"origin": "http://example.org", "access-control-request-method": "POST"})
        assert r.status_code == 405 and not [k for k in r.headers if k.startswith("access-control")]


def test_authz_matrix_sees_a_fault(bundle, kept, monkeypatch):
    from defect_detect.serve import api
    real = api.add_health
    def leaky(desk):
        r = real(desk)
        @r.get("/v1/secret")
        async def secret(): return "for nobody"
        return r
    monkeypatch.setattr(api, "add_health", leaky)
    with background(Settings(bundle=bundle, threads=1, token=PREDICT)) as u: assert undeclared(kept[0]) == [("/v1/secret", ["GET"])] and [b[1] for b in matrix(kept[0], u)[0]].count("/v1/secret")>=2


def test_only_this_machine_by_default(bundle):
    assert Settings(bundle=bundle).host == "127.0.0.1"
    with pytest.raises(SettingsError, match="token"): refuse_open(Settings(bundle=bundle, host="0.0.0.0"))
    with process(bundle) as (p, u, _): assert {c.laddr.ip for c in psutil.Process(p.pid).net_connections("inet") if c.status == "LISTEN"} == {"127.0.0.1"}


def test_a_token_leaks_nowhere(bundle):
    with process(bundle, env={"DEFECT_TOKEN": PREDICT, "DEFECT_METRICS_TOKEN": SCRAPE}) as (p, u, log):
        texts = [WEB.get(u+path, headers=KEYS["predict"]).text for path in ("/metrics", "/v1/model", "/openapi.json", "/healthz/ready", "/v2", "/")]
        post(u, GOOD, headers=KEYS["wrong"])
        texts.append(" ".join(psutil.Process(p.pid).cmdline()))
    assert not [t for t in [*texts, *log] if PREDICT in t or SCRAPE in t or "w"*24 in t] and SecretStr(PREDICT) and records(log)
