"""Generators that tests run in a process of their own; imports nothing heavy."""

import os
import time


def count_to(number, pause=0.0):
    for i in range(number):
        yield os.getpid(), i
        time.sleep(pause)


def fail_after_one():
    yield 1
    raise ValueError("the second\nfailed")


def die():
    yield 1
    os._exit(9)
