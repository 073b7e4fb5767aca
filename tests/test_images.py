"""Pictures from cameras and from strangers: what becomes of each file, in how much time and memory, in training and in the service alike."""
import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image

import hostile
from defect_detect.client import Client
from defect_detect.core import image
from defect_detect.core.bundle import example_bundle
from defect_detect.core.formats import ENDINGS, FORMATS, MEDIA_TYPES
from defect_detect.core.image import DecodeError, decode, decode_grey, decode_levels
from defect_detect.core.predictor import Predictor
from defect_detect.data.read import DataError, load_image
from defect_detect.serve.api import background
from defect_detect.serve.body import DECLARED, picture_of
from defect_detect.serve.settings import Settings

FUZZ = int(os.environ.get("DEFECT_FUZZ", 2000)) # mutated files; 20000 at night


def outcome(what, decoder="decode"):
    "Decode in a process of its own, warnings as errors: name -> what became of it."
    cmd = [sys.executable, "-W", "error", hostile.__file__, str(what), decoder]
    p = subprocess.run(cmd, capture_output=True, text=True, timeout=120+FUZZ/5, env={**os.environ, "PYTHONPATH": str(Path(image.__file__).parents[2])})
    assert (p.returncode, p.stderr) == (0, ""), f"died after {p.stdout[-200:]}: {p.stderr[-2000:]}"
    parsed = (line.rpartition('" {') for line in p.stdout.splitlines())
    return {json.loads(name+'"'): json.loads("{"+rest) for name, _, rest in parsed}


def wrong(results, wants, seconds=2., mb=256.):
    "What is not as it should be."
    bad = [f"{k}: {r['got']} instead of {wants(k)}" for k, r in results.items() if r["got"] not in wants(k)]
    return bad+[f"{k}: {r['seconds']:.2f} s" for k, r in results.items() if r["seconds"]>seconds]+[f"{k}: {r['mb']:.0f} MB" for k, r in results.items() if r["mb"]>mb]


def write(folder, files):
    "Write (name, file, allowed) and return name -> allowed."
    wants = {}
    for name, data, want in files:
        key = name.replace("/", "@")
        assert key not in wants
        wants[key] = want
        (folder/key).write_bytes(data)
    return wants


def test_hostile_corpus(tmp_path):
    wants = write(tmp_path, hostile.corpus())
    assert len(wants)>=300 and len({k.split("@")[0] for k in wants})>=15
    results = outcome(tmp_path)
    assert results.keys() == wants.keys() and wrong(results, wants.get) == []
    print(f"{len(wants)} files, {max(r['seconds'] for r in results.values()):.2f} s, {max(r['mb'] for r in results.values()):.0f} MB")


@pytest.mark.parametrize("decoder,says", [("naive", "UnidentifiedImageError"), ("slow", "2.1"), ("fat", "300 MB")])
def test_hostile_corpus_sees_a_fault(tmp_path, decoder, says):
    few = [(n, d, w) for n, d, w in hostile.corpus() if n in ("mode/png-8", "foreign/text", "animated/png-1", "png-structure/too-few", "no-meaning/tiff-nan")]
    wants = write(tmp_path, few[:1] if decoder != "naive" else few)
    found = wrong(outcome(tmp_path, decoder), wants.get)
    assert any(says in o for o in found) and (decoder != "naive" or len(found) == 4), found


def test_decode_fuzz():
    results, allowed = outcome(f"0:{FUZZ}"), {"ok", *DecodeError.codes}
    got = [r["got"] for r in results.values()]
    assert len(got) == FUZZ and wrong(results, lambda _: allowed) == []
    assert {"ok", "broken", "bad_size", "unsupported_mode", "unknown_format"} <= set(got) and .05*FUZZ<got.count("ok")<.9*FUZZ, "the changes must reach more than the first check"
    print({c: got.count(c) for c in sorted(set(got))}, f"{max(r['seconds'] for r in results.values()):.2f} s")


def test_decode_fuzz_sees_a_fault():
    assert wrong(outcome("0:40", "naive"), lambda _: {"ok", *DecodeError.codes})


def test_bomb_headers(tmp_path):
    wants = write(tmp_path, ((n, d, ("bad_size",)) for n, d in hostile.bombs()))
    assert len(wants)>=20
    assert wrong(outcome(tmp_path), wants.get, seconds=.5, mb=10) == [] # 50 ms is the aim
    assert sum("MB" in o for o in wrong(outcome(tmp_path, "fat"), wants.get, mb=10)) == len(wants)


def upright():
    "The pictures as they should come out, and how each is stored: name -> (array, tolerance, encoder of the turned array and an orientation)."
    rng = np.random.default_rng(1)
    deep, grey = rng.integers(0, 65536, (40, 56, 4), dtype=np.uint16), rng.integers(0, 16, (40, 56), dtype=np.uint8)
    smooth = np.stack([np.add.outer(np.arange(40)*a, np.arange(56)*b) for a, b in ((1, 3), (4, 1), (2, 2))], 2).astype(np.uint8)
    cmyk, eight = np.dstack([smooth//2, smooth[..., 0]//3]), (deep>>8).astype(np.uint8)
    over = lambda c, a: np.floor(c.astype(float)*a/255+.5).astype(np.uint8)
    palette, alpha = np.frombuffer(hostile.PALETTE[:48], np.uint8).reshape(16, 3), np.arange(0, 256, 17)
    plte = hostile.chunk(b"PLTE", hostile.PALETTE[:48])+hostile.chunk(b"tRNS", bytes(alpha.tolist()))
    ex = lambda o: hostile.chunk(b"eXIf", hostile.exif(o))
    tag = lambda e, o: {274: (3, np.array([o], e+"u2").tobytes())}
    app = lambda o: b"Exif\0\0"+hostile.exif(o, ">")
    c = cmyk.astype(float)
    return {
        "jpeg-rgb-8": (smooth, 4, smooth, lambda a, o: hostile.jpeg(a, quality=100, subsampling=0, exif=app(o))),
        "jpeg-cmyk-8": (np.round((255-c[..., :3])*(255-c[..., 3:])/255), 5, cmyk, lambda a, o: hostile.jpeg(Image.fromarray(a, "CMYK"), quality=100, exif=app(o))),
        "png-grey-16": (eight[..., :1].repeat(3, 2), 0, deep[..., 0], lambda a, o: hostile.png(a, 16, 0, ex(o))),
        "png-rgba-16": (over(eight[..., :3], eight[..., 3:]), 0, deep, lambda a, o: hostile.png(a, 16, 6, ex(o))),
        "png-palette-4": (over(palette[grey], alpha[grey][..., None]), 0, grey, lambda a, o: hostile.png(a, 4, 3, plte+ex(o))),
        "tiff-grey-16": (((65535-deep[..., :1])>>8).repeat(3, 2), 0, deep[..., 0], lambda a, o: hostile.tiff(a, 16, 0, ">", more=tag(">", o))),
        "tiff-rgb-16": (eight[..., :3], 0, deep[..., :3], lambda a, o: hostile.tiff(a, 16, 2, packed=8, more=tag("<", o))),
        "webp-rgba-8": (over(eight[..., :3], eight[..., 3:]), 0, eight, lambda a, o: hostile.webp(a, exif=app(o))),
    }


def combinations():
    "Yield name, file, the true array and the tolerance of the 64 combinations."
    for name, (truth, tolerance, stored, encode) in upright().items():
        for o in range(1, 9): yield f"{name}-{o}", encode(hostile.turned(stored, o), o), truth, tolerance


def untrue(decode):
    "The combinations that `decode` gets wrong."
    return [n for n, data, truth, tolerance in combinations() if (a := decode(data)).shape != truth.shape or np.abs(a.astype(float)-truth).max()>tolerance]


def from_folder(root, name, data):
    "As training reads it."
    (root/name).write_bytes(data)
    return load_image(root, SimpleNamespace(image=name, sha256=hashlib.sha256(data).hexdigest()))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return example_bundle(tmp_path_factory.mktemp("images")/"bundle")


def test_decode_parity(bundle, tmp_path):
    predictor, n = Predictor.load(bundle, threads=1), 0
    settings = Settings(bundle=bundle, threads=1)
    with background(settings) as url, Client(url) as client:
        for name, data, truth, tolerance in combinations():
            trained = from_folder(tmp_path, name, data)
            served = decode(picture_of(data, "application/octet-stream"), settings.limits)
            assert trained.dtype == np.uint8 and (trained == served).all() and trained.shape == truth.shape == served.shape
            assert np.abs(trained.astype(float)-truth).max()<=tolerance, name
            answer, want = client.predict(data, mask=True), predictor.predict([trained])[0]
            assert (answer.height, answer.width) == truth.shape[:2] and abs(answer.score-want.score)<1e-6
            assert (decode(answer.mask)[..., 0] == want.mask).all()
            n += 1
        assert n == 64
        refused = [(n, d, w) for n, d, w in hostile.corpus() if n.split("/")[0] in ("no-meaning", "animated", "foreign") and w != ("ok",)]
        for name, data, (code,) in refused:
            with pytest.raises(DataError) as e: from_folder(tmp_path, name.replace("/", "@"), data)
            r = httpx.post(f"{url}/v1/predict", content=data, headers={"content-type": "image/tiff"})
            assert r.json()["type"].endswith(":"+code) and str(e.value).endswith(r.json()["detail"]) and e.value.__cause__.code == code
    assert len(refused)>30


def clips(data):
    "Pillow's own conversion; nothing where it has none."
    try: return hostile.naive(data, None)
    except OSError: return np.zeros((1, 1, 3), np.uint8)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_decode_parity_sees_a_fault(monkeypatch):
    assert not untrue(decode)
    assert {n.rpartition("-")[0] for n in untrue(clips)} >= {"png-grey-16", "png-rgba-16", "tiff-grey-16"}
    monkeypatch.setattr(image, "_TURN", {})
    assert len(untrue(decode)) == 56, "all but the upright ones"
    monkeypatch.undo()
    monkeypatch.setattr(image, "_TURN", image._TURN|{5: (6,), 7: (5,)})
    assert len(untrue(decode)) == 16, "the two diagonals exchanged"


def test_grey_and_levels():
    "What is stored, by hand, for masks; and what Pillow gets wrong in silence."
    g, deep = hostile.GREY, hostile.DEEP
    for bits in (1, 2, 4, 8):
        v = g>>8-bits
        looks = v*(255//((1<<bits)-1))
        for data in (hostile.png(v, bits), hostile.png(v, bits, 3, hostile.chunk(b"PLTE", np.repeat(np.arange(1<<bits)*(255//((1<<bits)-1)), 3).astype(np.uint8).tobytes())),
                     hostile.tiff(v, data=np.packbits(np.unpackbits(v[..., None], 2)[..., 8-bits:].reshape(len(v), -1), 1).tobytes(), more={258: bits})):
            assert (decode_levels(data) == v).all() and (decode_grey(data) == looks).all()
        key = 1<<bits-1
        assert (decode_grey(hostile.png(v, bits, 0, hostile.chunk(b"tRNS", bytes([0, key])))) == np.where(v == key, 0, looks)).all(), "a see-through grey"
    for data in (hostile.png(deep, 16), hostile.tiff(deep, 16), hostile.tiff(65535-deep, 16, 0), hostile.tiff(deep, 16, e=">", packed=8)): assert (decode_levels(data) == deep).all() and (decode_grey(data) == deep>>8).all()
    two = hostile.bmp(g>>7, 8, b"\0\0\0\0\xff\xff\xff\0")
    assert (decode_levels(two) == g>>7).all() and (decode_grey(two) == (g>>7)*255).all() and (clips(two)[..., 0] != (g>>7)*255).any()
    for o in range(1, 9): assert (decode_levels(hostile.png(hostile.turned(g>>4, o), 4, 3, hostile.chunk(b"PLTE", hostile.PALETTE[:48])+hostile.chunk(b"eXIf", hostile.exif(o)))) == g>>4).all()
    twelve = (deep>>4).astype(np.uint16)
    packed = np.packbits(np.unpackbits(twelve.astype(">u2").view(np.uint8).reshape(40, 56, 2), 2)[..., 4:].reshape(40, -1), 1)
    assert (decode_levels(hostile.tiff(twelve, 16, data=packed.tobytes(), more={258: 12})) == twelve).all() and (decode_grey(hostile.tiff(twelve, 16, data=packed.tobytes(), more={258: 12})) == deep>>8).all()
    for data in (hostile.jpeg(g), hostile.png(hostile.RGB, 8, 2), hostile.png(hostile.RGBA, 8, 6), hostile.tiff(hostile.RGBA, colour=5)):
        with pytest.raises(DecodeError): decode_levels(data)


@pytest.mark.parametrize("error,code", [(MemoryError, "bad_size"), *((e, "broken") for e in (RecursionError, OverflowError, SyntaxError, SystemError, ImportError, struct.error, zlib.error, OSError, EOFError))])
def test_only_decode_errors_leave(monkeypatch, error, code):
    "Whatever a decoder raises, at any place."
    def fails(*_): raise error("what a decoder says")
    monkeypatch.setattr(image.Image.Image, "transpose", fails)
    for f in (decode, decode_grey, decode_levels):
        with pytest.raises(DecodeError) as e: f(hostile.png(extra=hostile.chunk(b"eXIf", hostile.exif(6))))
        assert e.value.code == code
    monkeypatch.undo()
    monkeypatch.setattr(image.Image.Image, "convert", fails)
    with pytest.raises(DecodeError) as e: decode(hostile.png())
    assert e.value.code == code


def test_every_limit_and_format_is_named_once():
    assert len(FORMATS) == len(MEDIA_TYPES) == 5 and set(DECLARED)-set(MEDIA_TYPES) == {"application/octet-stream", "multipart/form-data"} and {".tif", ".webp", ".bmp"} <= set(ENDINGS)
    with pytest.raises(DecodeError, match="allowed: "+", ".join(FORMATS)): decode(b"text")
