"""What the GPU runner works out on the host: work lists, page tables, sizes; and what compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from halfweight.engine.runners.gpu_inputs import PageTables, Queries, Sections, cut, tiles
from halfweight.memory.engine_memory import bucket

CPU = torch.device("cpu")


def queries(pages, count=None, first=None):
    pages = np.array(pages, np.int32)
    count = np.ones_like(pages) if count is None else np.array(count, np.int32)
    first = np.cumsum(count, dtype=np.int32) - count if first is None else first
    return Queries(first, count, pages * 64, np.arange(len(pages), dtype=np.int32) * 100, pages)


@pytest.mark.parametrize("at_once", [1, 7, 49])
@pytest.mark.parametrize(
    "pages", [[0], [1], [1024], [0, 3, 900], [10] * 64, [9] * 40, [1000, *[2] * 30], [5, 6, 7, 8]]
)
def test_items_read_every_page_once(pages, at_once):
    work = cut(queries(pages), len(pages), at_once)
    assert len(work.items) <= len(pages) + at_once
    read = {tile: [] for tile in range(len(pages))}
    for first, count, position, table, begin, end, _ in work.items.tolist():
        assert (count, position, table) == (1, pages[first] * 64, first * 100)
        read[first] += range(begin, end)
    assert all(found == list(range(pages[tile])) for tile, found in read.items())


def test_long_sequences_are_cut_and_short_ones_are_not():
    work = cut(queries([1000, 10, 10]), 3, 51)
    sizes = work.items[:, 5] - work.items[:, 4]
    assert (work.items[:, 0] > 0).sum() == 2
    assert sizes.max() <= 20
    assert work.items[-2:, 6].tolist() == [-1, -1]


def test_nothing_is_cut_for_none_at_once():
    work = cut(queries([1000, 0, 10], count=[8, 0, 1]), 9, 0)
    assert work.items[:, 4:].tolist() == [[0, 1000, -1], [0, 0, -1], [0, 10, -1]]
    assert work.num_parts == 0


def test_parts_are_numbered_and_found_by_each_query():
    work = cut(queries([40, 1, 40], count=[3, 1, 2]), 6, 4)
    assert work.row_parts[:, 2].tolist() == [0, 1, 2, 0, 0, 1]
    for first, count, *_, part in work.items.tolist():
        for base, num, _ in work.row_parts[first : first + count].tolist():
            assert part == -1 if num == 1 else base <= part < base + num
    parts = sorted(part for part in work.items[:, 6].tolist() if part >= 0)
    assert parts == list(range(work.num_parts))
    assert work.num_parts >= 4


def test_tiles_cover_the_chunks_and_the_longest_come_first():
    first, count, start = np.array([[0, 70, 71], [70, 1, 129], [10, 64, 0]], np.int32)
    found = tiles(first, count, start, np.array([0, 100, 200], np.int32), 32, 64)
    assert (np.diff(found.pages) <= 0).all()
    rows = {}
    for row, many, position, table, pages in zip(
        found.first, found.count, found.position, found.table, found.pages, strict=True
    ):
        assert pages == -(-(position + many) // 64)
        rows |= {row + i: (table, position + i) for i in range(many)}
    chunks = zip(first, count, start, (0, 100, 200), strict=True)
    expected = {a + i: (t, s + i) for a, n, s, t in chunks for i in range(n)}
    assert rows == expected


def test_page_tables_send_only_what_is_new():
    tables, pages = PageTables(3, 8, CPU), [5, 6]
    assert tables.updates(1, pages) == [(8, 5), (9, 6)]
    assert tables.updates(1, pages) == []
    pages.append(7)
    assert tables.updates(1, pages) == [(10, 7)]
    assert tables.updates(1, [5, 6]) == [(8, 5), (9, 6)]  # an earlier state: sent again, right
    pages[0] = 4  # the list of another sequence by now
    assert tables.updates(1, pages) == [(8, 4), (9, 6), (10, 7)]
    assert tables.updates(2, [5]) == [(16, 5)]


def test_sections_begin_at_whole_vectors():
    sections = Sections(ids=3, work=7, rows=1)
    array = np.arange(sections.total)
    assert sections.of(array, "ids").tolist() == [0, 1, 2]
    assert sections.of(array, "work").tolist() == list(range(4, 11))
    assert sections.of(array, "rows").tolist() == [12]


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 250)] == [
        *(1, 2, 4, 4, 8, 8, 16, 16, 24, 256),
    ]


def test_kernels_compile_for_gpus_that_are_not_here():
    """Without spills, and in the shared memory that a program has there."""
    room = {"80": 163 << 10, "86": 99 << 10, "90": 227 << 10}
    child = Path(__file__).parents[1] / "helpers/compile_paged.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, child, "bf16", *room]
    result = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    for capability, kernels in json.loads(result.stdout).items():
        for shared, stack in kernels.values():
            assert shared <= room[capability]
            assert stack == 0
