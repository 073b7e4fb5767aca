"""Picture files from cameras and from people who mean harm: made by hand where a library would not write them, the same ones each time."""
import io
import json
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

H, W = 40, 56
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY = np.linspace(0, 255, H*W).reshape(H, W).round().astype(np.uint8)
DEEP = np.linspace(0, 65535, H*W).reshape(H, W).round().astype(np.uint16)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], 2)
RGBA = np.dstack([RGB, 255-GREY[::-1]])


# writers
def exif(o, e="<", kind=3):
    "The smallest EXIF block that says orientation `o`."
    return (b"II" if e == "<" else b"MM")+struct.pack(e+"HLHHHL", 42, 8, 1, 0x112, kind, 1)+(struct.pack(e+"HH", o, 0) if kind == 3 else struct.pack(e+"L", o))+b"\0"*4


def chunk(kind, body): return struct.pack(">L", len(body))+kind+body+struct.pack(">L", zlib.crc32(kind+body))


def rows(a, bits):
    "The lines of `a` as a PNG holds them, not filtered."
    a = np.asarray(a)
    if bits == 16: lines = a.astype(">u2").reshape(len(a), -1).view(np.uint8)
    elif bits == 8: lines = a.astype(np.uint8).reshape(len(a), -1)
    else: lines = np.packbits(np.unpackbits(a.astype(np.uint8)[..., None], 2)[..., 8-bits:].reshape(len(a), -1), 1)
    return np.pad(lines, ((0, 0), (1, 0))).tobytes()


def png(a=GREY, bits=8, colour=0, extra=b"", size=None, data=None, tail=b"", interlace=0):
    "`extra` stands before the pixels, `tail` behind them; `size` and `data` may lie."
    w, h = size or (a.shape[1], a.shape[0])
    data = zlib.compress(rows(a, bits)) if data is None else data
    return SIGNATURE+chunk(b"IHDR", struct.pack(">LLBBBBB", w, h, bits, colour, 0, 0, interlace))+extra+chunk(b"IDAT", data)+tail+chunk(b"IEND", b"")


def tiff(a=GREY, bits=8, colour=1, e="<", data=None, packed=1, first=False, more=(), next=0):
    "One strip; `more` are tags (a number, or type and raw value); `first` puts the directory before the pixels."
    a = np.asarray(a)
    h, w, n = (*a.shape, 1)[:3]
    if data is None: data = a.astype(e+{8: "u1", 16: "u2", 32: "u4"}[bits]).tobytes() if a.dtype.kind == "u" else a.astype(a.dtype.newbyteorder(e)).tobytes()
    if packed == 8: data = zlib.compress(data)
    tags = {256: w, 257: h, 258: (3, struct.pack(e+f"{n}H", *[bits]*n)), 259: packed, 262: colour, 273: 0, 277: n, 278: h, 279: len(data)}|dict(more)
    tags = {t: v for t, v in sorted(tags.items()) if v is not None}
    values = {t: v if isinstance(v, tuple) else (4, struct.pack(e+"L", v&0xffffffff)) for t, v in tags.items()}
    outside = sum(len(v)+len(v)%2 for _, v in values.values() if len(v)>4)
    ifd = 8 if first else 8+len(data)+len(data)%2
    at, behind, entries = ifd+2+12*len(values)+4, b"", b""
    for t, (kind, v) in values.items():
        if t == 273 and not isinstance(tags[t], tuple) and not tags[t]: v = struct.pack(e+"L", at+outside if first else 8)
        count = len(v)//{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 11: 4, 12: 8}[kind]
        entries += struct.pack(e+"HHL", t, kind, count)+(v.ljust(4, b"\0") if len(v)<=4 else struct.pack(e+"L", at+len(behind)))
        if len(v)>4: behind += v+b"\0"*(len(v)%2)
    directory = struct.pack(e+"H", len(values))+entries+struct.pack(e+"L", next)+behind
    head = (b"II" if e == "<" else b"MM")+struct.pack(e+"HL", 42, ifd)
    return head+(directory+data if first else data+b"\0"*(len(data)%2)+directory)


def bmp(a=RGB, bits=24, palette=b"", packed=0, size=None, masks=b"", used=None, down=False, head=40):
    "`a` holds the samples in the file's order: blue first."
    a = np.asarray(a)
    w, h = size or (a.shape[1], a.shape[0])
    lines = a.reshape(len(a), -1) if bits>=8 else np.packbits(np.unpackbits(a.astype(np.uint8)[..., None], 2)[..., 8-bits:].reshape(len(a), -1), 1)
    lines = np.ascontiguousarray(lines).view(np.uint8)
    lines = np.pad(lines, ((0, 0), (0, -lines.shape[1]%4)))[::1 if down else -1].tobytes()
    start = 14+head+len(palette)+(len(masks) if head == 40 else 0)
    info = struct.pack("<LllHHLLllLL", head, w, -h if down else h, 1, bits, packed, 0, 0, 0, len(palette)//4 if used is None else used, 0)
    return b"BM"+struct.pack("<LLL", start+len(lines), 0, start)+info+masks.ljust(max(head-40, len(masks)), b"\0")+palette+lines


def saved(a, fmt, mode=None, **kw):
    "What Pillow writes."
    b = io.BytesIO()
    (a if isinstance(a, Image.Image) else Image.fromarray(a, mode)).save(b, fmt, **kw)
    return b.getvalue()


def jpeg(a=RGB, mode=None, **kw): return saved(a, "JPEG", mode, **dict(quality=95)|kw)
def webp(a=RGB, **kw): return saved(a, "WEBP", **dict(lossless=True, exact=True)|kw)
def segment(mark, body): return b"\xff"+bytes([mark])+struct.pack(">H", len(body)+2)+body
def into_jpeg(data, extra): return data[:2]+extra+data[2:]
def riff(*chunks): return b"RIFF"+struct.pack("<L", 4+sum(8+len(b)+len(b)%2 for _, b in chunks))+b"WEBP"+b"".join(k+struct.pack("<L", len(b))+b+b"\0"*(len(b)%2) for k, b in chunks)
def vp8x(w, h, flags=0): return b"VP8X", bytes([flags, 0, 0, 0])+(w-1).to_bytes(3, "little")+(h-1).to_bytes(3, "little")


def turned(a, o):
    "What a camera stores so that orientation `o` makes `a` upright: where the first row and column stand, by the table of the EXIF standard."
    h, w = a.shape[:2]
    r, c = np.indices((w, h) if o>4 else (h, w))
    y, x = {1: (r, c), 2: (r, w-1-c), 3: (h-1-r, w-1-c), 4: (h-1-r, c), 5: (c, r), 6: (c, w-1-r), 7: (h-1-c, w-1-r), 8: (h-1-c, r)}[o]
    return np.ascontiguousarray(a[y, x])


# good files
PALETTE = (np.arange(768)*37%256).astype(np.uint8).tobytes()
COLORMAP = (3, (np.frombuffer(PALETTE, np.uint8).reshape(256, 3).T.astype("<u2")*257).tobytes())
EXTRA = (3, b"\2\0")


def seeds():
    "Name -> a good file; all the formats and the ways to hold pixels."
    cmyk = Image.fromarray(RGBA, "CMYK")
    return {
        "jpeg/rgb": jpeg(), "jpeg/grey": jpeg(GREY), "jpeg/progressive": jpeg(progressive=True), "jpeg/cmyk-adobe": jpeg(cmyk), "jpeg/420": jpeg(subsampling=2, quality=60),
        "jpeg/restarts": jpeg(restart_marker_blocks=1), "jpeg/exif": jpeg(exif=b"Exif\0\0"+exif(6)), "png/1": png(GREY>>7, 1), "png/2": png(GREY>>6, 2), "png/4": png(GREY>>4, 4), "png/8": png(),
        "png/16": png(DEEP, 16), "png/rgb": png(RGB, 8, 2), "png/rgb16": png(np.dstack([DEEP]*3), 16, 2), "png/la": png(RGBA[..., 2:], 8, 4), "png/la16": png(np.dstack([DEEP]*2), 16, 4),
        "png/rgba": png(RGBA, 8, 6), "png/rgba16": png(np.dstack([DEEP]*4), 16, 6), "png/palette": png(GREY, 8, 3, chunk(b"PLTE", PALETTE)),
        "png/palette4-alpha": png(GREY>>4, 4, 3, chunk(b"PLTE", PALETTE[:48])+chunk(b"tRNS", bytes(range(0, 256, 17)))), "png/key": png(RGB, 8, 2, chunk(b"tRNS", b"\0\7\0\7\0\7")),
        "tiff/1": tiff(GREY, data=np.packbits(GREY>>7, 1).tobytes(), more={258: 1}), "tiff/8": tiff(), "tiff/8-first": tiff(first=True), "tiff/inverted": tiff(colour=0), "tiff/16": tiff(DEEP, 16), "tiff/16-mm": tiff(DEEP, 16, e=">"),
        "tiff/16-inverted": tiff(DEEP, 16, 0), "tiff/16-deflate": tiff(DEEP, 16, packed=8), "tiff/rgb": tiff(RGB, colour=2), "tiff/rgb16-mm": tiff(np.dstack([DEEP]*3), 16, 2, ">"), "tiff/rgba": tiff(RGBA, colour=2, more={338: EXTRA}),
        "tiff/cmyk": tiff(RGBA, colour=5), "tiff/palette": tiff(GREY, colour=3, more={320: COLORMAP}), "tiff/lzw": saved(RGB, "TIFF", compression="tiff_lzw"), "tiff/jpeg": saved(RGB, "TIFF", compression="jpeg"),
        "tiff/packbits": saved(GREY, "TIFF", compression="packbits"), "tiff/g4": saved(GREY>99, "TIFF", compression="group4"), "tiff/ycbcr": saved(Image.fromarray(RGB).convert("YCbCr"), "TIFF"),
        "bmp/1": bmp(GREY>>7, 1, b"\0\0\0\0\xff\xff\xff\0"), "bmp/4": bmp(GREY>>4, 4, bytes(range(64))), "bmp/8": bmp(GREY, 8, bytes(range(256))*4), "bmp/8-two": bmp(GREY>>7, 8, b"\0\0\0\0\xff\xff\xff\0"),
        "bmp/16": bmp(DEEP, 16), "bmp/24": bmp(), "bmp/24-down": bmp(down=True), "bmp/32": bmp(RGBA, 32), "bmp/565": bmp(DEEP, 16, packed=3, masks=struct.pack("<3L", 0xf800, 0x7e0, 0x1f)),
        "bmp/alpha": bmp(RGBA, 32, packed=3, head=124, masks=struct.pack("<4L", 0xff0000, 0xff00, 0xff, 0xff000000)),
        "webp/rgb": webp(), "webp/rgba": webp(RGBA), "webp/lossy": webp(lossless=False, exact=False), "webp/lossy-alpha": webp(RGBA, lossless=False, exact=False), "webp/exif": webp(exif=b"Exif\0\0"+exif(6)),
    }


# files from people who mean harm
BIG = (2**31-1, 1), (50_000, 50_000), (10**6, 10**6)


def bombs():
    "Name -> a small file that announces a picture which nobody has the memory for."
    j, lossless, lossy = jpeg(), webp(), webp(lossless=False, exact=False)
    sof = j.index(b"\xff\xc0")
    for w, h in BIG:
        yield f"png-{w}x{h}", png(size=(w, h), colour=2, data=b"")
        yield f"bmp-{w}x{h}", bmp(size=(w, h))
        yield f"tiff-{w}x{h}", tiff(more={256: w, 257: h})
    yield "png-text", png(size=(50_000, 50_000), extra=chunk(b"iTXt", b"a\0\1\0\0\0"+zlib.compress(b"x"*10**7)))
    yield "png-profile", png(size=(50_000, 50_000), extra=chunk(b"iCCP", b"a\0\0"+zlib.compress(b"x"*10**7)))
    yield "png-pixels", png(size=(50_000, 50_000), data=zlib.compress(b"\0"*10**7))
    yield "png-16", png(size=(50_000, 50_000), bits=16, colour=6)
    yield "jpeg", j[:sof+5]+struct.pack(">HH", 65500, 65500)+j[sof+9:]
    yield "jpeg-progressive", (p := jpeg(progressive=True))[:(s := p.index(b"\xff\xc2"))+5]+struct.pack(">HH", 50_000, 50_000)+p[s+9:]
    yield "webp-canvas", riff(vp8x(2**24, 2**24), (b"VP8L", lossless[20:]))
    yield "webp-lossless", lossless[:21]+struct.pack("<L", 2**28-1)+lossless[25:]
    yield "webp-lossy", lossy[:26]+struct.pack("<HH", 16383, 16383)+lossy[30:]
    yield "tiff-tiles", tiff(more={256: 50_000, 257: 50_000, 273: None, 278: None, 279: None, 322: 50_000, 323: 50_000, 324: 8, 325: 100}, packed=8)
    yield "tiff-mm", tiff(e=">", more={256: 50_000, 257: 50_000})
    yield "tiff-sheet", tiff(colour=2, bits=16, more={256: 2**32-1, 257: 2**32-1}, a=np.dstack([DEEP]*3))
    yield "bmp-down", bmp(size=(50_000, 50_000), down=True)


def small_and_wrong():
    "Nothing, beginnings, and what is no picture."
    for name, data in {"nothing": b"", "jpeg": b"\xff\xd8\xff", "png": SIGNATURE, "tiff-ii": b"II*\0", "tiff-mm": b"MM\0*", "bmp": b"BM", "webp": b"RIFF\0\0\0\0WEBP", "riff": b"RIFF\xff\xff\xff\xffWEBPVP8 "}.items():
        yield f"beginning/{name}", data, ("broken",) if data else ("empty",)
    others = {"gif": saved(GREY, "GIF"), "gif-animated": saved(GREY, "GIF", save_all=True, append_images=[Image.fromarray(255-GREY)]), "ppm": saved(RGB, "PPM"), "pdf": b"%PDF-1.7\n", "ps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
              "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "xml": b"<?xml version='1.0'?>", "html": b"<html><script>alert(1)</script>", "zip": b"PK\3\4"*99, "pickle": b"\x80\x04\x95.", "heic": b"\0\0\0\x18ftypheic", "jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
              "bigtiff": b"II+\0\x08\0\0\0"+bytes(20), "fits": b"SIMPLE  =                    T", "ico": b"\0\0\1\0\1\0", "psd": b"8BPS\0\1", "zeros": bytes(5000), "text": b"hello", "wav": b"RIFF\0\0\0\0WAVEfmt "}
    for name, data in others.items(): yield f"foreign/{name}", data, ("unknown_format",)
    signatures = {"jpeg": b"\xff\xd8\xff\xe0", "png": SIGNATURE, "tiff": b"II*\0", "bmp": b"BM", "webp": b"RIFF\0\0\0\0WEBP"}
    bodies = {"jpeg": jpeg(), "png": png(), "tiff": tiff(), "bmp": bmp(), "webp": webp()}
    for a, s in signatures.items():
        for b, body in bodies.items():
            if a != b: yield f"wrong-magic/{b}-as-{a}", s+body[len(s):], ("unknown_format" if a == "bmp" else "broken",)


def cuts():
    "Twenty cuts of each format."
    for name in ("jpeg/rgb", "jpeg/progressive", "png/rgb", "tiff/rgb", "tiff/8-first", "tiff/lzw", "bmp/24", "webp/rgb", "webp/lossy"):
        data = seeds()[name]
        for n in np.linspace(12, len(data)-(2 if name.startswith("tiff") else 1), 20).astype(int): yield f"truncated/{name.replace('/', '-')}-{n}", data[:n], ("broken",)


def metadata():
    "Orientation, profiles, text, comments: made to be turned, or to be ignored."
    for o in (*range(10), 255, 65535):
        e = "<>"[o%2]
        yield f"exif/jpeg-{o}", jpeg(exif=b"Exif\0\0"+exif(o, e)), ("ok",)
        yield f"exif/png-{o}", png(extra=chunk(b"eXIf", exif(o, e))), ("ok",)
        yield f"exif/webp-{o}", webp(exif=b"Exif\0\0"+exif(o, e)), ("ok",)
        yield f"exif/tiff-{o}", tiff(e=e, more={274: (3, struct.pack(e+"H", o))}), ("ok",)
    odd = {"ff": b"II*\0"+b"\xff"*400, "loop": b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\1\0\0\0\x08\0\0\0", "many": b"II*\0\x08\0\0\0\xff\xff", "far": b"MM\0*\xff\xff\xff\xff", "count": exif(6)[:14]+b"\xff"*4+exif(6)[18:], "long": exif(6, kind=4), "text": exif(6, kind=2), "short": b"II", "cut": exif(6)[:15]}
    for name, x in odd.items():
        yield f"bad-exif/jpeg-{name}", jpeg(exif=b"Exif\0\0"+x), ("ok",)
        yield f"bad-exif/png-{name}", png(extra=chunk(b"eXIf", x)), ("ok",)
        yield f"bad-exif/webp-{name}", webp(exif=b"Exif\0\0"+x), ("ok",)
    for name, p in {"zeros": bytes(3144), "ff": b"\xff"*70_000, "short": b"\0"}.items():
        yield f"icc/jpeg-{name}", jpeg(icc_profile=p), ("ok",)
        yield f"icc/png-{name}", png(extra=chunk(b"iCCP", b"a\0\0"+zlib.compress(p))), ("ok",)
        yield f"icc/tiff-{name}", tiff(more={34675: (7, p.ljust(8, b"\0"))}), ("ok",)
        yield f"icc/webp-{name}", webp(icc_profile=p), ("ok",)
    yield "icc/jpeg-lost-parts", into_jpeg(jpeg(), segment(0xe2, b"ICC_PROFILE\0\7\xff"+bytes(99))*50), ("ok",)
    yield "icc/png-bomb", png(extra=chunk(b"iCCP", b"a\0\0"+zlib.compress(b"x"*10**8))), ("ok",)
    ten = zlib.compress(b"x"*10**7)
    yield "text/png-plain", png(extra=chunk(b"tEXt", b"a\0"+b"x"*10**7)), ("ok",)
    yield "text/png-bombs", png(extra=(chunk(b"iTXt", b"a\0\1\0\0\0"+ten)+chunk(b"zTXt", b"a\0\0"+ten))*100), ("ok",)
    yield "text/png-behind", png(tail=chunk(b"iTXt", b"a\0\1\0\0\0"+ten)*100), ("ok",)
    yield "text/png-many", png(extra=chunk(b"tEXt", b"")*90_000), ("ok",)
    yield "text/png-too-many", png(extra=chunk(b"tEXt", b"")*10**6), ("broken",)
    yield "text/jpeg-comments", into_jpeg(jpeg(), segment(0xfe, b"x"*65_000)*200), ("ok",)
    yield "text/jpeg-too-many", into_jpeg(jpeg(), segment(0xfe, b"")*10**6), ("broken",)
    yield "text/webp-xmp", webp(xmp=b"x"*10**7), ("ok",)
    yield "text/tiff-xmp", tiff(more={700: (1, b"x"*10**7)}), ("ok",)


def structure():
    "Files whose parts do not fit together."
    whole, j, body = zlib.compress(rows(GREY, 8)), jpeg(), b"\0"+bytes(W)
    sof, sos = j.index(b"\xff\xc0"), j.index(b"\xff\xda")
    for name, data, want in (
        ("no-pixels", png(data=b""), "broken"), ("too-few", png(data=zlib.compress(rows(GREY[:9], 8))), "broken"), ("too-many", png(data=zlib.compress(rows(GREY, 8)+b"\0"*10**7)), "ok"), ("not-deflated", png(data=rows(GREY, 8)), "broken"),
        ("filter-9", png(data=zlib.compress((b"\x09"+body[1:])*H)), "broken"), ("mode-7-9", png(bits=7, colour=9), "broken"), ("interlaced-short", png(interlace=1), "broken"), ("no-palette", png(GREY, 8, 3), "ok"),
        ("two-headers", png(extra=chunk(b"IHDR", struct.pack(">LLBBBBB", 9, 9, 8, 0, 0, 0, 0))), "broken"), ("no-header", SIGNATURE+png()[33:], "broken"), ("short-header", SIGNATURE+chunk(b"IHDR", b"\0"*9)+png()[33:], "broken"),
        ("wrong-sum", png().replace(b"IDATx", b"IDATy"), "broken"), ("wrong-text-sum", png(extra=b"\0\0\0\1tEXtx????"), "ok"), ("split", SIGNATURE+png()[8:33]+b"".join(chunk(b"IDAT", whole[i:i+1]) for i in range(len(whole)))+chunk(b"IEND", b""), "ok"),
        ("huge-chunk", png(extra=b"\x7f\xff\xff\xfftEXt"), "broken"), ("palette-with-alpha-99", png(GREY, 8, 3, chunk(b"PLTE", PALETTE)+chunk(b"tRNS", bytes(256))), "ok"), ("odd-palette", png(GREY, 8, 3, chunk(b"PLTE", bytes(7))), "any"),
        ("bad-key", png(extra=chunk(b"tRNS", b"\0")), "broken")): yield f"png-structure/{name}", data, ("ok", "broken") if want == "any" else (want,)
    for name, data, want in (
        ("restarts", jpeg(np.zeros((1600, 1600), np.uint8), restart_marker_blocks=1), "ok"), ("dri-only", j[:sof]+segment(0xdd, b"\0\1")+j[sof:], "ok"), ("fill", j[:2]+b"\xff"*10**6+j[2:], "ok"), ("junk", j[:sof]+b"junk"*10**6+j[sof:], "ok"),
        ("escaped", j[:sof]+b"\xff\0"*10**6+j[sof:], "ok"), ("scans", j[:-2]+j[sos:-2]*150+j[-2:], "broken"), ("tables", j[:sof]+segment(0xdb, bytes(65)*900)*20+j[sof:], "broken"), ("no-tables", j[:2]+j[sof:], "broken"), ("two-frames", j[:sof]+j[sof:sos]*2+j[sos:], "broken"),
        ("12-bit", j[:sof+4]+b"\x0c"+j[sof+5:], "unsupported_mode"), ("lossless", j[:sof+1]+b"\xc3"+j[sof+2:], "unsupported_mode"), ("arithmetic", j[:sof+1]+b"\xc9"+j[sof+2:], "unsupported_mode"), ("5-colours", j[:sof+9]+b"\5"+j[sof+10:], "unsupported_mode"),
        ("no-scan", j[:sos]+b"\xff\xd9", "broken"), ("early-end", j[:sos+200]+b"\xff\xd9", "any"), ("zero-height", j[:sof+5]+b"\0\0"+j[sof+7:], "bad_size"), ("grey-fill", j[:sos+20]+bytes(len(j)-sos-22)+j[-2:], "any")):
        yield f"jpeg-structure/{name}", data, ("ok", "broken") if want == "any" else (want,)
    lots = (4, struct.pack("<L", 8)*10**6)
    for name, data, want in (
        ("million-strips", tiff(more={273: lots, 279: lots, 278: 1}), "broken"), ("million-equal-tags", tiff()[:4]+struct.pack("<L", 8)+b"\xff\xff"+struct.pack("<HHLL", 256, 4, 1, 9)*65535+bytes(4), "broken"), ("rows-0", tiff(more={278: 0}), "broken"),
        ("rows-max", tiff(more={278: 2**32-1}), "ok"), ("no-rows", tiff(more={278: None}), "ok"), ("no-strips", tiff(more={273: None}), "broken"), ("strip-behind", tiff(more={273: 10**6}), "broken"), ("strip-max", tiff(more={273: 2**32-1}), "broken"),
        ("tile-huge", tiff(packed=8, more={273: None, 278: None, 279: None, 322: 65536, 323: 65536, 324: 8, 325: 100}), "broken"), ("tile-odd", tiff(more={273: None, 278: None, 279: None, 322: 17, 323: 17, 324: 8, 325: 100}), "broken"),
        ("tile-none", tiff(more={273: None, 279: None, 324: 8, 325: 100}), "broken"), ("samples-max", tiff(more={277: 65535}), "unsupported_mode"), ("bits-0", tiff(more={258: 0}), "unsupported_mode"), ("bits-max", tiff(more={258: 2**32-1}), "unsupported_mode"),
        ("no-width", tiff(more={256: None}), "broken"), ("no-colour", tiff(more={262: None}), "broken"), ("float-width", tiff(more={256: (11, struct.pack("<f", 56))}), "broken"), ("two-widths", tiff(more={256: (4, bytes(8))}), "broken"),
        ("deflate-junk", tiff(more={259: 8}), "broken"), ("deflate-short", tiff(data=zlib.compress(bytes(99)), more={259: 8}), "broken"), ("lzw-junk", tiff(more={259: 5}), "broken"), ("jpeg-junk", tiff(more={259: 7}), "broken"), ("g4-junk", tiff(GREY, data=bytes(99), more={258: 1, 259: 4}), "any"), ("packbits-junk", tiff(more={259: 32773}), "any"),
        ("deflate-bomb", tiff(data=zlib.compress(bytes(10**8)), more={259: 8}), "any"), ("no-lengths", tiff(packed=8, more={279: None}), "broken"), ("palette-short", tiff(colour=3, more={320: (3, bytes(30))}), "broken"), ("page-far", tiff(next=2**31), "broken")):
        yield f"tiff-structure/{name}", data, ("ok", "broken") if want == "any" else (want,)
    w, b8 = webp(), bmp(GREY, 8, bytes(1024))
    for name, data, want in (
        ("webp-no-picture", riff(vp8x(56, 40)), "broken"), ("webp-canvas-lies", riff(vp8x(99, 99), (b"VP8L", w[20:])), "broken"), ("webp-chunks", riff(*[(b"JUNK", b"")]*99), "broken"), ("webp-many", riff((b"VP8L", w[20:]), *[(b"JUNK", b"")]*10**5), "broken"),
        ("webp-first-picture", riff((b"VP8L", w[20:]), (b"VP8L", w[20:])), "any"), ("webp-long", w[:4]+b"\xff\xff\xff\x7f"+w[8:], "broken"), ("webp-zero", w[:4]+bytes(4)+w[8:], "broken"), ("webp-alpha-junk", riff(vp8x(56, 40, 16), (b"ALPH", b"\xff"*99), (b"VP8 ", webp(lossless=False, exact=False)[20:])), "any"),
        ("bmp-rle", b8[:30]+b"\1"+b8[31:], "unsupported_mode"), ("bmp-png", b8[:30]+b"\5"+b8[31:], "unsupported_mode"), ("bmp-colours", bmp(GREY, 8, bytes(1024), used=2**31), "broken"), ("bmp-7-bit", b8[:28]+b"\7"+b8[29:], "unsupported_mode"),
        ("bmp-offset", b8[:10]+b"\xff\xff\xff\xff"+b8[14:], "broken"), ("bmp-header", b8[:14]+b"\x29"+b8[15:], "unknown_format"), ("bmp-masks", bmp(DEEP, 16, packed=3, masks=struct.pack("<3L", 0xf801, 2, 0)), "unsupported_mode"), ("bmp-lowest", b8[:22]+struct.pack("<l", -2**31)+b8[26:], "bad_size"),
        ("bmp-negative-width", b8[:18]+struct.pack("<l", -56)+b8[22:], "bad_size")): yield f"odd/{name}", data, ("ok", "broken") if want == "any" else (want,)


def refused_by_name():
    "What has no stated meaning, or more than one picture."
    nan, f = np.full((H, W), np.nan, np.float32), GREY.astype(np.float32)
    lab = tiff(RGB, colour=8)
    for name, data in {"float": tiff(f, 32, more={339: 3}), "nan": tiff(nan, 32, more={339: 3}), "inf": tiff(np.full_like(f, np.inf), 32, more={339: 3}), "nan-mm": tiff(nan, 32, e=">", more={339: 3}), "double": tiff(f.astype(float), 64, more={339: 3}),
                       "half": tiff(f.astype(np.float16), 16, more={339: 3}), "signed-8": tiff(more={339: 2}), "signed-16": tiff(DEEP, 16, more={339: 2}), "32-bit": tiff(DEEP.astype("<u4"), 32), "lab": lab, "planes-16": tiff(np.dstack([DEEP]*3), 16, 2, more={284: 2}),
                       "ycbcr-half": tiff(RGB, colour=6), "old-jpeg": tiff(more={259: 6}), "lzma": tiff(more={259: 34925}), "webp": tiff(more={259: 50001}), "cfa": tiff(colour=32803), "five": tiff(np.dstack([RGBA, GREY]), colour=2, more={338: (3, bytes(4))})}.items():
        yield f"no-meaning/tiff-{name}", data, ("unsupported_mode",)
    yield "no-meaning/png-key-16", png(np.dstack([DEEP]*3), 16, 2, chunk(b"tRNS", bytes(6))), ("unsupported_mode",)
    others = [Image.fromarray(255-RGB), Image.fromarray(RGB//2)]
    for n in (1, 2): yield f"animated/png-{n}", saved(RGB, "PNG", save_all=True, append_images=others[:n]), ("several_frames",)
    for n in (1, 2): yield f"animated/webp-{n}", saved(RGB, "WEBP", save_all=True, append_images=others[:n]), ("several_frames",)
    for n in (1, 2): yield f"animated/tiff-{n}", saved(RGB, "TIFF", save_all=True, append_images=others[:n]), ("several_frames",)
    yield "animated/tiff-loop", tiff(next=8+H*W), ("several_frames",)
    yield "animated/png-billion", png(extra=chunk(b"acTL", b"\xff"*8)), ("several_frames",)
    yield "animated/png-one", png(extra=chunk(b"acTL", b"\0\0\0\1"*2)), ("ok",)
    yield "animated/mpo", saved(RGB, "MPO", save_all=True, append_images=others), ("ok",) # the first of them; the others stand behind its end


def sizes():
    "Within the file's means, but not ours; and the largest that are allowed."
    for w, h in ((1, 1), (1, 10**6), (10**6, 1), (0, 0), (7, 8), (8, 7), (16385, 8), (8, 16385), (5000, 4000)):
        yield f"size/png-{w}x{h}", png(size=(w, h), data=zlib.compress(bytes((w+1)*h))), ("bad_size",)
        yield f"size/bmp-{w}x{h}", bmp(size=(w, h)), ("bad_size",)
        yield f"size/tiff-{w}x{h}", tiff(more={256: w, 257: h}), ("bad_size",)
    for w, h in ((1, 1), (5000, 4000), (1, 16000)): yield f"size/webp-{w}x{h}", webp(np.zeros((h, w, 3), np.uint8)), ("bad_size",)
    for w, h in ((1, 1), (5000, 4000), (1, 65500)): yield f"size/jpeg-{w}x{h}", jpeg(np.zeros((h, w), np.uint8)), ("bad_size",)
    big = np.zeros((4000, 4000), np.uint8)
    yield "largest/png", png(big), ("ok",)
    yield "largest/png-rgba16", png(size=(4000, 4000), bits=16, colour=6, data=zlib.compress(bytes(4000*32001))), ("ok",)
    yield "largest/png-palette-alpha", png(big, 8, 3, chunk(b"PLTE", PALETTE)+chunk(b"tRNS", bytes(range(256)))), ("ok",)
    yield "largest/tiff-rgb16", tiff(np.zeros((16, 4000, 3), np.uint16), 16, 2, data=zlib.compress(bytes(4000*4000*6)), more={257: 4000, 278: 4000, 259: 8}), ("ok",)
    j = jpeg(np.repeat(big[..., None], 3, 2), progressive=True, subsampling=0)
    yield "largest/jpeg-progressive", j, ("ok",)
    yield "largest/jpeg-50-scans", j[:-2]+j[j.rindex(b"\xff\xda"):-2]*40+j[-2:], ("ok",)
    yield "largest/webp", webp(np.repeat(big[..., None], 4, 2), method=0), ("ok",)
    yield "largest/bmp-palette", bmp(big, 8, bytes(range(256))*4), ("ok",)
    yield "largest/bmp-16", bmp(np.zeros((2000, 4000), np.uint16), 16), ("ok",)
    yield "largest/thin", png(np.zeros((16384, 8), np.uint8)), ("ok",)


def two_in_one():
    "Files that are also something else: they are what they begin with."
    p, j, zipped = png(), jpeg(), b"PK\3\4"+b"\0"*500+b"PK\5\6"+bytes(18)
    for name, data in {"png+zip": p+zipped, "png+jpeg": p+j, "jpeg+png": j+p, "jpeg+jpeg": j+j, "jpeg+zip": j+zipped, "tiff+pdf": tiff()+b"%PDF-1.7", "bmp+html": bmp()+b"<script>alert(1)</script>", "webp+zip": webp()+zipped,
                       "html-in-png": png(extra=chunk(b"tEXt", b"a\0<script>alert(1)</script>")), "pdf-in-jpeg": into_jpeg(j, segment(0xfe, b"%PDF-1.7\n")), "php-in-jpeg": into_jpeg(j, segment(0xe1, b"Exif\0\0<?php")), "jpeg-in-png": png(tail=chunk(b"teXt", j))}.items():
        yield f"polyglot/{name}", data, ("ok",)
    for name, data in {"gif+png": b"GIF89a"+p, "pdf+jpeg": b"%PDF"+j, "zip+png": zipped+p, "newline+png": b"\n"+p}.items(): yield f"polyglot/{name}", data, ("unknown_format",)


def corpus():
    "Yield name (its kind before the slash), file, and what is allowed to become of it with the service's limits: ok, or codes of `DecodeError`."
    for name, data in seeds().items(): yield f"mode/{name.replace('/', '-')}", data, ("ok",)
    for name, data in bombs(): yield f"bomb/{name}", data, ("bad_size",)
    for part in (small_and_wrong, cuts, metadata, structure, refused_by_name, sizes, two_in_one): yield from part()
    yield "bytes/too-many", png()+bytes(16*2**20), ("too_many_bytes",)


def mutated(n, start=0):
    "Yield `n` good files with something changed, each by its own number."
    good = list(seeds().values())
    for i in range(start, start+n):
        rng = np.random.default_rng(i)
        b = bytearray(good[i%len(good)])
        for _ in range(rng.integers(1, 5)):
            at, n_bytes, kind = int(rng.integers(len(b)) if rng.random()<.5 else rng.integers(min(len(b), 200))), int(rng.integers(1, 30)), rng.integers(7)
            if kind == 0: b[at] ^= 1<<int(rng.integers(8))
            elif kind == 1: b[at:at+n_bytes] = rng.bytes(n_bytes)
            elif kind == 2: del b[at:at+n_bytes]
            elif kind == 3: b[at:at] = b[at:at+n_bytes]*int(rng.integers(1, 200))
            elif kind == 4: b[at:at+4] = (0, 1, 0x7fffffff, 0xffffffff, 0x80000000, 65536)[rng.integers(6)].to_bytes(4, ("little", "big")[rng.integers(2)])
            elif kind == 5: b[at:at+n_bytes] = good[rng.integers(len(good))][at:at+n_bytes]
            else: del b[max(at, 12):]
            b = b or bytearray(1)
        yield mended(bytes(b)) if rng.random()<.7 else bytes(b)


def mended(data):
    "A PNG's checksums put right, so that the change reaches what they protect."
    if not data.startswith(SIGNATURE): return data
    out, at = data[:8], 8
    while at+12<=len(data):
        n = int.from_bytes(data[at:at+4], "big")
        if at+12+n>len(data): break
        out, at = out+chunk(data[at+4:at+8], data[at+8:at+8+n]), at+12+n
    return out+data[at:]


# what becomes of them, in a process of its own: python tests/hostile.py <folder or number>:<count> <decoder>
def peak(reset=False):
    "The most memory this process has had since the last reset, in MB."
    if sys.platform != "linux": # never falls there; one that is too high can only fail
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    if reset: Path("/proc/self/clear_refs").write_text("5")
    return int(next(o for o in Path("/proc/self/status").read_text().splitlines() if o.startswith("VmHWM")).split()[1])/1024


def naive(data, limits): return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def slow(data, limits):
    t = time.process_time()
    while time.process_time()-t<2.1: pass
    return np.zeros((H, W, 3), np.uint8)


def fat(data, limits):
    np.ones(300*2**20, np.uint8)
    return np.zeros((H, W, 3), np.uint8)


def main(what, decoder):
    "Print for each file what became of it, the CPU seconds and the MB."
    from defect_detect.core.image import DecodeError, decode
    from defect_detect.serve.settings import Settings
    limits, f = Settings(bundle="-").limits, {"decode": decode}.get(decoder) or globals()[decoder]
    if decoder == "decode":
        for data in seeds().values(): decode(data) # what is loaded at first use
    number, _, count = what.partition(":")
    for name, data in (((str(i), d) for i, d in enumerate(mutated(int(count), int(number)), int(number))) if count else ((p.name, p.read_bytes()) for p in sorted(Path(what).iterdir()))):
        print(json.dumps(name), end=" ", flush=True) # a crash is known by its name
        before, t, text = peak(reset=True), time.process_time(), ""
        try:
            a = f(data, limits)
            got = "ok" if a.dtype == np.uint8 and a.ndim == 3 and a.shape[2] == 3 and 8<=min(a.shape[:2]) and a.shape[0]*a.shape[1]<=limits.max_pixels else f"{a.dtype} {a.shape}"
        except DecodeError as e: got, text = e.code, str(e)
        except BaseException as e: got = repr(e)[:200]
        a = None
        print(json.dumps(dict(got=got if text.isprintable() and len(text)<300 else "text: "+text, seconds=time.process_time()-t, mb=peak()-before)), flush=True)


if __name__ == "__main__": main(*sys.argv[1:])
