"""Exit codes and messages of the command line itself."""

import json

from command_line import run


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("halfweight ")


def test_usage_errors_exit_2(capsys):
    code, _, err = run(capsys, "nonsense")
    assert code == 2
    assert "nonsense" in err


def test_backends_lists_the_reference(capsys):
    code, out, _ = run(capsys, "backends", "--json")
    assert code == 0
    assert json.loads(out)["reference"]["cpu"] is None
