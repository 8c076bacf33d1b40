"""The command line as a function: exit code, stdout and stderr."""

import pytest

from halfweight.cli import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err
