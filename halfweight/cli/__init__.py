"""The command line: the only part of halfweight that prints.

Data goes to stdout, log and progress to stderr. A command is a function in one file of this
folder; heavy imports happen inside it, so that `halfweight plan` starts at once.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from halfweight import __version__
from halfweight.cli.output import fail
from halfweight.errors import HalfweightError, InterruptedConversionError

ClickException: Any = typer.BadParameter.__mro__[2]
"""The root of usage errors, which typer does not export and no longer takes from click."""

app = typer.Typer(
    name="halfweight",
    help="Run a language model in half its memory: group-wise INT8 weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"halfweight {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log choices made.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code DESIGN names for the outcome."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        result = app(arguments, standalone_mode=False)
    except HalfweightError as error:
        if "--debug" in arguments:
            raise
        sys.exit(fail(error))
    except typer.Abort:
        sys.exit(InterruptedConversionError.exit_code)
    except ClickException as error:
        error.show(sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(InterruptedConversionError.exit_code)
    except OSError as error:
        if "--debug" in arguments:
            raise
        sys.exit(fail(_refused_by_the_system(error)))
    sys.exit(result if isinstance(result, int) else 0)


def _refused_by_the_system(error: OSError) -> HalfweightError:
    """What the system refused and no command has words for: rights, a full disk or stdout."""
    with suppress(OSError):
        sys.stdout.flush()
    where = f"{error.filename}: " if error.filename else ""
    return HalfweightError(
        f"{where}{error.strerror or error}",
        hint="look for free space and for rights there, also where the output goes; "
        "--debug shows what was done",
    )


from halfweight.cli import (  # noqa: E402, F401  commands register themselves on `app`
    backends,
    bench,
    bench_models,
    bench_serve,
    convert,
    demo,
    evaluate,
    export,
    measure,
    plan,
    run,
    serve,
)
