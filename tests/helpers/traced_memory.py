"""What Python and numpy hold at most while something runs."""

import tracemalloc


def peak_bytes(run):
    """Bytes traced at most during `run()`; what it needs only once is to be warm before."""
    tracemalloc.start()
    run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak
