"""The page about CPUs says what was measured; the benchmark's small parts."""

import json

import cpu
import cpu_table
import pytest


def test_the_page_is_that_of_the_results():
    assert cpu_table.PAGE.read_text() == cpu_table.page()


def test_results_of_every_part_carry_their_command_and_commit():
    parts = json.loads((cpu_table.RESULTS / "cpu.json").read_text())["results"]
    assert set(parts) == set(cpu.PARTS)
    for name, part in parts.items():
        program, *rest = part["command"].removeprefix("python ").split()
        assert program == "benchmarks/cpu.py"
        assert "--only" not in rest or rest[rest.index("--only") + 1] == name  # else a whole run
        assert part["commit"]
        assert part["ceiling"]["read_gb_per_second"] > 1


def test_a_fraction_is_that_of_the_speeds_beside_it():
    row = {"shape": [8, 64]}
    for which, kernel in (("median", 9.0), ("best", 12.0)):
        speed = {"kernel": kernel, "call": 5.0, "read": 10.0, "read of its size": 6.0}
        row[which] = {
            "gb_per_second": speed,
            "fraction_of_read": kernel / 10,
            "fraction_of_read_of_its_size": kernel / 6,
        }
    line = cpu_table.kernels_table([row]).splitlines()[-1]
    assert line == "| 8 x 64 | 9.0 | 5.0 | 10.0 | 6.0 | 0.90 (1.20) | 1.50 |"


@pytest.mark.parametrize("base", cpu.BASELINES)
def test_a_baseline_is_a_rival(base):
    assert base in cpu.RIVALS
