"""Texts of the accuracy benchmark, from Debian packages: modern prose and novels.

    apt-get download debian-handbook r-cran-janeaustenr
    for deb in *.deb; do dpkg-deb -x $deb unpacked; done
    python benchmarks/texts.py unpacked texts

writes handbook.txt and austen.txt to measure on, and two to calibrate on: emma.txt, another novel,
and mixed.txt, pieces of it and of the handbook's last third in turns. No text is part of this
repository: the handbook is under its authors' licence, and all are a package away.
"""

from __future__ import annotations

import struct
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "td", "div"}
SKIPPED = {"script", "style", "head"}
NUM_PIECES, PIECE = 6, 9000
"""Of the mixed text: from each source, and characters of one."""
STRING_HEADER = b"\x00\x04\x00\x09"


class _Prose(HTMLParser):
    """Text of a page, one line a block element."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in SKIPPED
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in SKIPPED

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data.replace("\n", " "))


def page_text(html: str) -> str:
    """A page as lines of prose; lines of navigation (under 40 characters) are dropped."""
    parser = _Prose()
    parser.feed(html)
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if len(line) >= 40)


def handbook(unpacked: Path) -> str:
    """The Debian Administrator's Handbook, its pages in the order of their names."""
    (folder,) = unpacked.glob("usr/share/doc/debian-handbook/html/en-US")
    return "\n\n".join(page_text(page.read_text()) for page in sorted(folder.glob("*.html")))


def r_strings(record: bytes) -> list[str]:
    """The strings of a character vector serialized by R (XDR: type word, length, bytes)."""
    strings, at = [], record.find(STRING_HEADER)
    while at >= 0:
        (length,) = struct.unpack(">i", record[at + 4 : at + 8])
        strings.append(record[at + 8 : at + 8 + length].decode())
        at = record.find(STRING_HEADER, at + 8 + length)
    return strings


def novel(unpacked: Path, title: str) -> str:
    """A novel from an R data base: zlib streams, each after its length."""
    (path,) = unpacked.glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    raw, at = path.read_bytes(), 0
    while at < len(raw):
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(raw[at + 4 :]))
        if lines[0] == title:
            return "\n".join(lines)
        at = len(raw) - len(stream.unused_data)
    raise SystemExit(f"{path}: holds no {title}")


def mixed(*texts: str) -> str:
    """Pieces from all over each text, in turns."""
    starts = range(1, NUM_PIECES + 1)
    pieces = [(text, len(text) // (NUM_PIECES + 2) * n) for n in starts for text in texts]
    return "\n".join(text[start : start + PIECE] for text, start in pieces)


def main() -> None:
    """Write the texts to the folder named second."""
    unpacked, out = map(Path, sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    manual, emma = handbook(unpacked), novel(unpacked, "EMMA")
    texts = {
        "handbook": manual,
        "austen": novel(unpacked, "PRIDE AND PREJUDICE"),
        "emma": emma,
        "mixed": mixed(emma, manual[len(manual) * 2 // 3 :]),
    }
    for name, text in texts.items():
        (out / f"{name}.txt").write_text(text)
        print(f"{name}: {len(text)} characters")


if __name__ == "__main__":
    main()
