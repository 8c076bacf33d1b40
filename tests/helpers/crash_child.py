"""Converts in forked children that die by SIGKILL at a chosen step; run by test_crash.py.

Its argument is a source, converted once before the forks so that all is imported and compiled; a
second one is a form, to export the source to instead. Reads lines of JSON [source, out, overwrite,
kill_at] and answers each with the number of steps the child made, or null where it was killed. A
step is a call that changes the disk: open for writing, write, fsync, rename, remove, mkdir,
truncate.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


class Steps:
    def __init__(self, kill_at):
        self.count = 0
        self.kill_at = kill_at

    def take(self):
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def audit(self, event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa")
        if event in CHANGES or writes:
            self.take()

    def install(self):
        sys.addaudithook(self.audit)
        for name in ("fsync", "pwrite"):
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function):
        def call(*arguments):
            self.take()
            return function(*arguments)

        return call


def work(source, out, overwrite=False):
    from halfweight.conversion import convert, export

    if len(sys.argv) > 2:
        export.export(source, out, sys.argv[2], jobs=1, overwrite=overwrite)
    else:
        convert.quantize(source, out, jobs=1, overwrite=overwrite)


def child(source, out, overwrite, kill_at, answer):
    steps = Steps(kill_at)
    steps.install()
    work(source, out, overwrite)
    answer.write(str(steps.count))
    answer.flush()
    os._exit(0)


def main():
    import transformers

    from halfweight.checkpoint import layout

    assert transformers.__version__  # imported, so that conversions check the model in this process
    layout.MAX_SHARD_BYTES = 30_000
    with tempfile.TemporaryDirectory() as folder:
        work(sys.argv[1], Path(folder) / "out")
    for line in sys.stdin:
        source, out, overwrite, kill_at = json.loads(line)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            with open(write_end, "w") as answer:
                child(source, out, overwrite, kill_at, answer)
        os.close(write_end)
        with open(read_end) as answer:
            count = answer.read()
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0), status
        print(json.dumps(None if killed else int(count)), flush=True)


if __name__ == "__main__":
    main()
