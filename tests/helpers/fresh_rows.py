"""Generators that tests run in a process of their own; imports nothing heavy."""

import os
import threading
import time


def count_to(number, pause=0.0):
    for i in range(number):
        yield os.getpid(), i
        time.sleep(pause)


def fail_after_one():
    yield 1
    raise ValueError("the second\nfailed")


def slow_to_end():
    """One row, then a thread that python would wait for."""
    yield 1
    threading.Thread(target=time.sleep, args=(60,)).start()


def die():
    yield 1
    os._exit(9)


def here(rows, *arguments, deadline):
    """from_fresh_process without the process."""
    try:
        yield from rows(*arguments)
    except Exception as error:
        raise RuntimeError(str(error)) from error
