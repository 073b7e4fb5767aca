"Zips that nobody should unpack, each by a function that writes one; `python tests/evil_zips.py FOLDER` writes all."
import io
import os
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

PNG = b"\x89PNG\r\n\x1a\n"+bytes(60)


def _info(name, mode=0, method=zipfile.ZIP_DEFLATED):
    i = zipfile.ZipInfo("x", (2026, 1, 1, 0, 0, 0))
    i.filename, i.external_attr, i.compress_type, i.create_system = name, mode<<16, method, 3
    return i


def _zip(*entries):
    "Entries are (name, bytes) or (ZipInfo, bytes)."
    b = io.BytesIO()
    with zipfile.ZipFile(b, "w", zipfile.ZIP_DEFLATED) as z:
        for n, data in entries: z.writestr(n if isinstance(n, zipfile.ZipInfo) else _info(n), data)
    return b.getvalue()


def _raw(entries, count=None):
    "A zip made by hand of (name bytes, stored bytes, claimed size, flags, method); an entry without bytes points at the first."
    body, head, first = b"", [], 0
    for name, data, claimed, flags, method in entries:
        at, sizes = len(body) if data is not None else first, (zlib.crc32(data or PNG), len(data or PNG), claimed if claimed is not None else len(data or PNG))
        if data is not None: body += struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, flags, method, 0, 33, *sizes, len(name), 0)+name+data
        head.append(struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, flags, method, 0, 33, *sizes, len(name), 0, 0, 0, 0, 0, at)+name)
    cd = b"".join(head)
    return body+cd+struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *(2*[min(65535, count or len(entries))]), len(cd), len(body), 0)


def _million(count): return _raw([(b"a.png", PNG, None, 0, 0), *((b"%06x.png" % i, None, None, 0, 0) for i in range(10**6))], count)


def _lie():
    "200 MB that claim to be 10 bytes."
    c = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = b"".join(c.compress(bytes(10**6)) for _ in range(200))+c.flush()
    return _raw([(b"a.png", data, 10, 0, 8)])


def _tar(mode):
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode=mode) as t:
        i = tarfile.TarInfo("../a.png")
        i.size = len(PNG)
        t.addfile(i, io.BytesIO(PNG))
    return b.getvalue()


def _patched(find, put, at=-1):
    "A good zip with the last (or first) `find` replaced."
    b = _zip(("a.png", PNG))
    i = b.rfind(find) if at<0 else b.find(find)
    return b[:i]+put+b[i+len(put):]


def evil(outside:Path, # an existing folder that the zips aim at, from two or three folders below the one that holds it
)->dict[str, Callable[[], bytes]]: # name -> makes the bytes
    "Forty zips, and what is wrong with each in its name."
    link = lambda name, to: (_info(name, stat.S_IFLNK | 0o777), os.fsencode(to))
    one = lambda name: lambda: _zip((name, PNG))
    return {
        "slip up": lambda: _zip(*((f"{'../'*n}outside/a.png", PNG) for n in (2, 3))), "slip up deep": lambda: _zip(*((f"pictures/{'../'*n}outside/a.png", PNG) for n in (3, 4))), "slip to the parent": one(".."), "slip at the end": one("pictures/.."), "slip as a folder": lambda: _zip(("../../outside/new/", b""), ("../../../outside/new/", b""), ("a.png", PNG)),
        "absolute": one(f"{outside}/a.png"), "absolute twice": one("//a.png"), "drive": one("C:/a.png"), "drive without a slash": one("c:a.png"), "backslash up": one("..\\..\\outside\\a.png"), "backslash": one("pictures\\a.png"), "share": one("\\\\host\\a.png"),
        "dot": one("./a.png"), "empty part": one("a//a.png"), "NUL": lambda: _raw([(b"a.png\0.txt", PNG, None, 0, 0)]), "newline": one("a\nb.png"), "escape": one("a\x1b[2J.png"), "long name": one("x"*300+".png"), "long path": one("x/"*600+"a.png"), "junk that slips": lambda: _zip(("__MACOSX/../../../outside/a.png", PNG), ("__MACOSX/../../../../outside/a.png", PNG), ("a.png", PNG)),
        "link": lambda: _zip(link("a.png", outside/"secret.png")), "link as a folder": lambda: _zip(link("pictures", outside), ("pictures/a.png", PNG)), "device": lambda: _zip((_info("a.png", stat.S_IFCHR | 0o666), b"")), "pipe": lambda: _zip((_info("a.png", stat.S_IFIFO | 0o666), b"")),
        "ratio": lambda: _zip(("a.png", bytes(30_000_000))), "ratio in many": lambda: _zip(*((f"{i}.png", bytes(900_000)) for i in range(30))), "size that lies": _lie, "overlap": lambda: _raw([(b"a.png", bytes(500_000), None, 0, 0), *((b"%d.png" % i, None, None, 0, 0) for i in range(200))]),
        "too big": lambda: _zip(*((_info(f"{i}.png", method=0), os.urandom(10**6)) for i in range(12))), "a million entries": lambda: _million(None), "a million entries that say one": lambda: _million(1),
        "same name": lambda: _raw([(b"a.png", PNG, None, 0, 0), (b"a.png", PNG[:9], None, 0, 0)]), "same name but for case": lambda: _zip(("a/B.png", PNG), ("A/b.png", PNG)), "same name but for accents": lambda: _zip(("\u00fc.png", PNG), ("u\u0308.png", PNG)), "file and folder": lambda: _zip(("a.png", PNG), ("a.png/b.png", PNG)),
        "tar": lambda: _tar("w"), "tar.gz": lambda: _tar("w:gz"), "tar with a zip in it": lambda: _tar("w")+_zip(("a.png", PNG)), "program before the zip": lambda: b"MZ"+bytes(200)+_zip(("a.png", PNG)), "empty file": lambda: b"",
        "encrypted": lambda: _raw([(b"a.png", PNG, None, 1, 0)]), "strongly encrypted": lambda: _raw([(b"a.png", PNG, None, 0x41, 0)]), "lzma": lambda: _zip((_info("a.png", method=zipfile.ZIP_LZMA), PNG)), "unknown method": lambda: _raw([(b"a.png", PNG, None, 0, 99)]),
        "other name inside": lambda: _patched(b"a.png", b"b.png", 0), "cut short": lambda: _zip(("a.png", PNG))[:-30], "wrong sum": lambda: _raw([(b"a.png", PNG, None, 0, 0)]).replace(PNG, PNG[:-1]+b"x"), "nothing but junk": lambda: _zip(("__MACOSX/._a.png", PNG), ("run.exe", PNG), ("more.zip", _zip(("a.png", PNG)))),
    }


if __name__=="__main__":
    folder = Path(sys.argv[1])
    for k, make in evil(folder.resolve()).items(): (folder/f"{k.replace(' ', '-')}.zip").write_bytes(make())
