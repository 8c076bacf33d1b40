"""Several ranks run several models: started once for all cases, because a rank takes seconds.

    python rank_program.py RANK PORT FOLDER

FOLDER/cases.json lists the cases. Rank 0 of a case writes the logits of its steps to
FOLDER/<name>.pt, and every rank what it holds to FOLDER/<name>-<rank>.json.
"""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

LENGTHS = (13, 6)
"""Tokens of the two texts, which run side by side."""


def texts(vocab_size):
    """Token ids of two texts."""
    return [
        [(7 * i * i + 3 * i + 11 * t + 1) % vocab_size for i in range(n)]
        for t, n in enumerate(LENGTHS)
    ]


def steps(page_tokens):
    """A prompt in two chunks, the second beside another prompt, then both decode."""
    from halfweight.engine.step import Chunk

    def chunk(slot, start, num):
        return Chunk(slot, start, num, num, [1 + 2 * slot, 2 + 2 * slot])

    assert 2 * page_tokens > max(LENGTHS)
    yield [chunk(0, 0, 8)]
    yield [chunk(0, 8, 3), chunk(1, 0, 4)]
    yield [chunk(0, 11, 1), chunk(1, 4, 1)]
    yield [chunk(0, 12, 1), chunk(1, 5, 1)]


def run_all(cases, folder, num_ranks):
    """Run the cases on so many ranks; name -> (logits of each text in order, what ranks hold)."""
    import torch

    from halfweight.engine.parallel.job import local_store

    (folder / "cases.json").write_text(json.dumps(cases))
    store = local_store()
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with (folder / "said.txt").open("w+") as said:
        where = {"env": env, "stdout": said, "stderr": said}
        command = [sys.executable, __file__]
        ranks = [
            subprocess.Popen([*command, str(rank), str(store.port), str(folder)], **where)
            for rank in range(num_ranks)
        ]
        codes = [None]
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [rank.poll() for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.wait()
        said.seek(0)
        assert not any(codes), said.read()
    found = {}
    for case in cases:
        held = [
            json.loads((folder / f"{case['name']}-{rank}.json").read_text())
            for rank in range(case["ranks"])
        ]
        found[case["name"]] = torch.load(folder / f"{case['name']}.pt"), held
    return found


def run_case(case, rank, store, folder):
    import torch
    from torch import distributed as dist

    from halfweight.checkpoint.headers import read_headers
    from halfweight.engine.parallel import link as links
    from halfweight.model.share import described, load_part, own_part

    device, ranks, path = torch.device("cpu"), case["ranks"], Path(case["model"])
    mine = dist.PrefixStore(case["name"], store)
    links.CONNECTING = timedelta(seconds=240)  # others may be busy with an earlier case
    link = links.make_link(mine, rank, ranks, device, backend="gloo", is_local=True)
    link.set_timeout(links.CONNECTING)
    checkpoint = read_headers(path)
    options = {"dtype": getattr(torch, case["dtype"]), "backend": case.get("backend")}
    model = load_part(checkpoint, rank, ranks, link, **options)
    runner = make_runner(case, model)
    for slot, ids in enumerate(texts(runner.vocab_size)):
        if rank == 0:  # the others have other ids in their tables
            runner.table[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    logits = [[], []]
    for step in steps(runner.page_tokens):
        rows = runner.run(step).float().clone()
        for chunk, part in zip(step, rows.split([c.num_logits for c in step]), strict=True):
            logits[chunk.slot].append(part)
    part = own_part(checkpoint, described(path), rank, ranks)
    held = sum(t.nbytes for t in {t.data_ptr(): t for t in model.parameters()}.values())
    said = {
        "held": held,
        "read": part.num_bytes,
        "cache": runner.cache_bytes / runner.num_pages,
        "runner": type(runner).__name__,
    }
    (folder / f"{case['name']}-{rank}.json").write_text(json.dumps(said))
    if rank == 0:
        torch.save([torch.cat(rows) for rows in logits], folder / f"{case['name']}.pt")
    link.close()


def make_runner(case, model):
    if case["runner"] == "gpu":
        from halfweight.engine.runners.gpu import GpuRunner

        return GpuRunner(
            model,
            max_sequences=2,
            max_context=128,
            max_step_tokens=256,
            cache_tokens=512,
            kv_cache=case.get("kv_cache", "16bit"),
        )
    from halfweight.engine.runners import make_runner

    return make_runner(model, max_sequences=2, max_context=128)


def main(rank, port, folder):
    if any(case["runner"] == "gpu" for case in json.loads((folder / "cases.json").read_text())):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    for case in json.loads((folder / "cases.json").read_text()):
        if rank < case["ranks"]:
            begin = time.monotonic()
            run_case(case, rank, store, folder)
            print(case["name"], rank, round(time.monotonic() - begin, 2), flush=True)


if __name__ == "__main__":
    code = 1
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
