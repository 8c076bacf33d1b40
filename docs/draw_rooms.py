"""Draws docs/images/rooms.svg, the rooms of the package and what they import, from the imports.

    python docs/draw_rooms.py

A room is a folder of halfweight/; its words are the first line of its docstring. Every import
counts, those inside functions and for types too, once for each pair of modules. A room stands in
the first layer above all rooms that it imports, so the picture has a form only while no import runs
back up: a circle is an error that names it. Text in, text out: the same imports give the same
bytes, and tests/test_rooms_picture.py holds the picture to the imports.
"""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

import grimp

PACKAGE = "halfweight"
ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs/images/rooms.svg"

MARGIN, LEFT = 24, 24
ROW, GAP, LAYER_GAP = 56, 8, 20
BOX_WIDTH, WORDS_A_LINE = 404, 66
LANE, FIRST_LANE = 45, 44
ARROW = 7
COLOURS = (
    "#4c78d0",
    "#c2568f",
    "#3a9a6b",
    "#c27a2c",
    "#8a63d2",
    "#2f95a8",
    "#c9504a",
    "#7d8c2e",
    "#5d7390",
)
"""Of lanes, from the highest imported room down; middling tones, for either background."""
STYLE = """
  text { font-family: ui-sans-serif, system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif }
  .card { fill: #fbfbfc; stroke: #d9dde3 }
  .box { fill: #ffffff; stroke: #cdd3db }
  .name { font-size: 15px; font-weight: 600; fill: #1d232b }
  .words, .legend { font-size: 11.5px; fill: #59636f }
  .out { stroke: #b3bbc6; stroke-width: 1.5; fill: none }
  .lane { stroke-width: 2; fill: none }
  .count { font-size: 10.5px; font-weight: 600; fill: #ffffff; text-anchor: middle }
  @media (prefers-color-scheme: dark) {
    .card { fill: #12161c; stroke: #2b323c }
    .box { fill: #1b212a; stroke: #39424e }
    .name { fill: #eef1f5 }
    .words, .legend { fill: #a4afbc }
    .out { stroke: #57626f }
  }
"""

Arrows = Counter[tuple[str, str]]
"""(room, room that it imports) -> how many pairs of modules."""


def rooms() -> dict[str, str]:
    """Room -> what it says of itself in one line."""
    folders = sorted(path.parent for path in (ROOT / PACKAGE).glob("*/__init__.py"))
    return {folder.name: _first_line(folder / "__init__.py") for folder in folders}


def arrows() -> Arrows:
    """Every import between two parts of the package, by the first name under it."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    pairs = (
        (_part(module), _part(imported))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    )
    return Counter(pair for pair in pairs if pair[0] != pair[1])


def layers(found: Arrows) -> list[list[str]]:
    """Rooms from the lowest layer up, each above all that it imports.

    Raises graphlib.CycleError, which names the rooms, where imports go round.
    """
    below: dict[str, set[str]] = {room: set() for pair in found for room in pair}
    for room, imported in found:
        below[room].add(imported)
    height: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        height[room] = max((height[lower] + 1 for lower in below[room]), default=0)
    tallest = max(height.values())
    return [sorted(r for r in height if height[r] == level) for level in range(tallest + 1)]


def draw(words: dict[str, str], imports: Arrows) -> str:
    """The picture of these rooms and imports as SVG."""
    between = Counter({pair: n for pair, n in imports.items() if set(pair) <= words.keys()})
    tops, bottom = _tops(layers(between))
    order = list(tops)
    lanes = [room for room in order if any(imported == room for _, imported in between)]
    lane_at = {room: LEFT + BOX_WIDTH + FIRST_LANE + LANE * i for i, room in enumerate(lanes)}
    colour_of = {room: COLOURS[i % len(COLOURS)] for i, room in enumerate(lanes)}
    width = LEFT + BOX_WIDTH + FIRST_LANE + LANE * len(lanes)
    shapes = [
        *(_way_out(room, tops[room], between, lane_at) for room in order),
        *(_lane(room, tops, between, lane_at[room], colour_of[room]) for room in lanes),
        *(_box(room, words[room], tops[room], colour_of.get(room)) for room in order),
        *(
            _dot(lane_at[imported], _out(tops[room]), number, colour_of[imported])
            for (room, imported), number in sorted(between.items())
        ),
        _legend(words, imports, bottom),
    ]
    height = bottom + 76
    told = "; ".join(_told(room, between) for room in order)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title told">',
        f'<title id="title">The rooms of {PACKAGE}, and what they import</title>',
        f'<desc id="told">{escape(told)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="12"/>',
        *(shape for shape in shapes if shape),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _tops(floors: list[list[str]]) -> tuple[dict[str, int], int]:
    """Where each room's box begins, from the highest layer down, and where the last one ends."""
    tops: dict[str, int] = {}
    y = MARGIN
    for floor in reversed(floors):
        for room in floor:
            tops[room] = y
            y += ROW + GAP
        y += LAYER_GAP - GAP
    return tops, y - LAYER_GAP


def _out(top: int) -> int:
    """Where lines leave a box; they come in above, so that the two never cross."""
    return top + ROW - 17


def _in(top: int) -> int:
    return top + 16


def _box(room: str, words: str, top: int, colour: str | None) -> str:
    lines = _wrapped(words)
    first = top + 21 + (7 if len(lines) == 1 else 0)
    told = "".join(
        f'<text class="words" x="{LEFT + 16}" y="{first + 15 + 13 * i}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    bar = f'x="{LEFT}" y="{top + 10}" width="4" height="{ROW - 20}" rx="2"'
    return (
        f'<rect class="box" x="{LEFT}" y="{top}" width="{BOX_WIDTH}" height="{ROW}" rx="8"/>'
        + (f'<rect {bar} fill="{colour}"/>' if colour else "")
        + f'<text class="name" x="{LEFT + 16}" y="{first}">{room}</text>{told}'
    )


def _wrapped(words: str) -> list[str]:
    """Lines of about equal length, as few as will hold the words."""
    fewest = len(textwrap.wrap(words, WORDS_A_LINE))
    widths = range(len(words) // fewest, WORDS_A_LINE + 1)
    return next(lines for w in widths if len(lines := textwrap.wrap(words, w)) == fewest)


def _way_out(room: str, top: int, between: Arrows, lane_at: dict[str, int]) -> str:
    """From a room to the right, as far as the last lane that it joins."""
    ends = [lane_at[imported] for importer, imported in between if importer == room]
    start = LEFT + BOX_WIDTH
    return f'<path class="out" d="M{start} {_out(top)}H{max(ends)}"/>' if ends else ""


def _lane(room: str, tops: dict[str, int], between: Arrows, x: int, colour: str) -> str:
    """Down from the highest room that imports `room`, and left into its box."""
    first = min(_out(tops[importer]) for importer, imported in between if imported == room)
    y, end = _in(tops[room]), LEFT + BOX_WIDTH
    return (
        f'<path class="lane" stroke="{colour}" d="M{x} {first}V{y - 8}q0 8 -8 8H{end + ARROW}"/>'
        f'<path fill="{colour}" d="M{end + 1} {y}l{ARROW + 2} -5v10z"/>'
    )


def _dot(x: int, y: int, number: int, colour: str) -> str:
    return (
        f'<circle cx="{x}" cy="{y}" r="{9 + min(number, 20) / 5:g}" fill="{colour}"/>'
        f'<text class="count" x="{x}" y="{y + 3.7}">{number}</text>'
    )


def _legend(words: dict[str, str], imports: Arrows, y: int) -> str:
    single = sorted({imported for _, imported in imports} - words.keys() - {"__init__"})
    files = " and ".join(f"{name}.py" for name in single)
    lines = (
        "A line leaves a room to the right. At each dot it turns down into a room that it imports;",
        "the number says how many imports those are. "
        f"Not drawn: {files}, below all rooms and open to all.",
    )
    return "".join(
        f'<text class="legend" x="{LEFT}" y="{y + 32 + 17 * i}">{line}</text>'
        for i, line in enumerate(lines)
    )


def _told(room: str, between: Arrows) -> str:
    found = sorted((lower, n) for (importer, lower), n in between.items() if importer == room)
    return f"{room} imports {', '.join(f'{lower} {n}' for lower, n in found) or 'no other room'}"


def _part(module: str) -> str:
    """The folder or file of the package that a module is in."""
    return [*module.split("."), "__init__"][1]


def _first_line(file: Path) -> str:
    told = ast.get_docstring(ast.parse(file.read_text()))
    assert told, f"{file}: no docstring"
    return told.splitlines()[0].replace("`", "")


if __name__ == "__main__":
    PICTURE.write_text(draw(rooms(), arrows()))
