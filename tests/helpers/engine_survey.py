"""Which runner takes each causal architecture of the installed transformers, as a Markdown table.

`python tests/helpers/engine_survey.py [KIND ...]`: a tiny random model of each is given to the
runners' own trials. "not built" is a config that the small sizes do not suit, and
says nothing about the runners. Exit code 0 always: it is a survey, the tests hold the claims.
"""

import signal
import sys
from collections import Counter
from contextlib import contextmanager

import torch
import transformers
from engine_architectures import tiny
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from halfweight.engine.runners import UnfitError
from halfweight.engine.runners.static import StaticRunner
from halfweight.engine.runners.transformers_paged import TransformersRunner
from halfweight.errors import UsageError

SECONDS = 60
SIZES = {"max_sequences": 4, "max_context": 64}


@contextmanager
def time_limit():
    """TimeoutError where one architecture takes too long (some have no small form)."""

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def first_line(error):
    """The error's class and first line, short."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:110].replace("|", "/")


def judge(kind):
    """(runner, why) of one architecture."""
    try:
        with time_limit():
            model = tiny(kind)
    except Exception as error:
        return "not built", first_line(error)
    try:
        with time_limit():
            TransformersRunner(model, **SIZES)
        return "paged", ""
    except UnfitError as error:
        why = error.message
    except Exception as error:
        why = first_line(error)
    try:
        with time_limit():
            return "static", f"{StaticRunner(model, **SIZES).reading}; {why}"
    except UsageError as error:
        return "refused", error.message[:160].replace("|", "/")
    except TimeoutError as error:
        return "refused", str(error)


def main(kinds):
    """Print the table and the counts."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    counts = Counter()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| architecture | runner | why not over pages |\n|---|---|---|")
    for kind in kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        runner, why = judge(kind)
        counts[runner] += 1
        print(f"| {kind} | {runner} | {why} |", flush=True)
    print("\n" + ", ".join(f"{runner}: {count}" for runner, count in counts.most_common()))


if __name__ == "__main__":
    main(sys.argv[1:])
