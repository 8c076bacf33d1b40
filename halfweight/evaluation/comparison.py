"""Compare a quantized model with its source on a text; they are never in memory together.

A causal language model is a body, from token ids to one state a token, and a head, from a state to
the logits of the whole vocabulary. The reference runs first, and of it only the states that predict
a scored token go to disk, in its own dtype: 8 kB a token for Llama-3-8B, where its logits take
256 kB. Then its body is dropped. While the other model runs, the reference's head turns the states
back into logits, the exact ones: the same states through the same head. `Job.states_bytes` tells
the size of that file before the run.

Both files, states and scores, only grow, a batch of windows at a time, and are named by a hash of
all they depend on. So a run that was killed goes on where it was, and a second model compared with
the same reference finds its states there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from halfweight.cache_folder import cache_folder
from halfweight.checkpoint.gguf_header import file_dtype, gguf_files
from halfweight.checkpoint.headers import own_dtype, read_headers, resolve
from halfweight.errors import CheckpointError, DiskFullError, UsageError, VerificationError
from halfweight.evaluation.scoring import (
    Evaluation,
    Head,
    Sample,
    Text,
    TokenScores,
    Window,
    sample,
    score,
    summarize,
)

Progress = Callable[[str, int, int], None]
"""Called with what runs ("reference" or "model"), tokens scored, and tokens in all."""


def evaluate(
    model: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    context: int = 1024,
    stride: int | None = None,
    tokens: int | None = None,
    batch_size: int = 1,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    work: str | os.PathLike[str] | None = None,
    ready: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of `model` on a text file, and its distance from `reference`.

    Either is a folder (quantized or not), a .gguf file or a Hub id. The text is cut into windows of
    `context` tokens, `stride` apart (default: the context), each with the tokenizer's BOS if it has
    one; `tokens` takes the first tokens of the text only.
    `dtype` is that of activations, by default the model's own, as it generates. `work` is a folder
    for the files of the run; by default they are in the user's cache, and go when it is complete.
    `ready` is called before work starts with the job, which knows its size on disk.

    Raises UsageError for sizes out of range, CheckpointError for a text or model that cannot be
    read, DiskFullError if the reference's states do not fit on the disk.
    """
    path = resolve(model)
    source = None if reference is None else resolve(reference)
    run = sample(
        tokenize(source or path, Path(text)),
        context=context,
        stride=stride,
        tokens=tokens,
        batch_size=batch_size,
    )
    job = Job(
        model=path,
        reference=source,
        sample=run,
        device=device,
        dtype=dtype,
        folder=Path(work) if work else cache_folder() / "evaluate",
        keeps_files=work is not None,
        states_bytes=0 if source is None else run.num_scored * _state_bytes(source, dtype),
    )
    if ready is not None:
        ready(job)
    return job.run(progress)


def require(
    model: Path,
    *,
    reference: str | os.PathLike[str],
    text: Path,
    max_kl: float,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate, and raise VerificationError if the mean divergence is above `max_kl` nats."""
    found = evaluate(model, reference=reference, text=text, progress=progress)
    assert found.comparison is not None
    divergence = found.comparison.kl_mean.value
    if not divergence <= max_kl:
        raise VerificationError(
            f"KL divergence from the source is {divergence:.6f} nats on {found.num_tokens} tokens "
            f"of {text}, expected at most {max_kl:g}",
            hint="try a smaller group size; what is finished is kept, and the same command without "
            "--check publishes it",
        )
    return found


@dataclass(frozen=True)
class Job:
    """An evaluation ready to run. `states_bytes` is what the reference will take in `folder`."""

    model: Path
    reference: Path | None
    sample: Sample
    device: str
    dtype: torch.dtype | None
    folder: Path
    keeps_files: bool
    states_bytes: int

    def run(self, progress: Progress | None = None) -> Evaluation:
        """Do it, or what is left of it."""
        self._check_space()
        self.folder.mkdir(parents=True, exist_ok=True)
        path, reference = self.model, self.reference
        scores = compare(
            lambda: split(load_model(path, self.device, self.dtype)),
            None
            if reference is None
            else lambda: split(load_model(reference, self.device, self.dtype)),
            self.sample,
            self._states_path,
            self._scores_path,
            progress,
        )
        if not self.keeps_files:
            for file in (self._states_path, self._scores_path):
                file.unlink(missing_ok=True)
        return summarize(scores)

    @property
    def _states_path(self) -> Path:
        return self.folder / f"reference-{self._key(self.reference)}.states"

    @property
    def _scores_path(self) -> Path:
        return self.folder / f"model-{self._key(self.reference, self.model)}.scores"

    def _key(self, *models: Path | None) -> str:
        """A hash of the models' files, the tokens, and how they are run."""
        facts = [
            [_fingerprint(path) for path in models if path is not None],
            hashlib.sha256(self.sample.ids.numpy().tobytes()).hexdigest(),
            self.sample.start.tolist(),
            repr((self.sample.windows, self.sample.batch_size, self.device, self.dtype)),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _check_space(self) -> None:
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if self.states_bytes > free:
            raise DiskFullError(
                f"{self.folder}: the reference's states take {self.states_bytes} bytes, "
                f"{free} are free",
                hint="evaluate fewer tokens, or choose another folder for the files of the run",
            )


def tokenize(model: Path, text: Path) -> Text:
    """The tokens of a text file, by the tokenizer of a model, and how that begins a text."""
    from halfweight.model.tokenizer import open_tokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{text}: cannot be read as UTF-8 text ({error})", hint="give a file of plain text"
        ) from error
    tokenizer = open_tokenizer(model)
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return Text(torch.tensor(ids, dtype=torch.long), torch.tensor(_start(tokenizer)).long())


def _start(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before any text; what it puts after one (an EOS) is no text's start."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(places, 0)]


def load_model(path: Path, device: str, dtype: torch.dtype | None) -> Any:
    """A causal language model ready to run; in INT8 where its weights are.

    Raises CheckpointError where a weight of the model is missing.
    """
    from halfweight.model.from_gguf import load_gguf
    from halfweight.model.loading import load

    return (load if path.is_dir() else load_gguf)(path, device=device, dtype=dtype)


def _transformers_source(path: Path) -> tuple[Path, dict[str, str]]:
    """A model as transformers takes it: its folder, and the .gguf file in it if it is one."""
    if path.is_dir():
        return path, {}
    return path.parent, {"gguf_file": gguf_files(path)[0].name}


def _state_bytes(path: Path, dtype: torch.dtype | None) -> int:
    """Bytes of one state of a model that runs in `dtype`, or its own if None."""
    from transformers import AutoConfig

    folder, options = _transformers_source(path)
    config = AutoConfig.from_pretrained(folder, **options).get_text_config()
    width: int = config.hidden_size
    return width * (dtype or _own_dtype(path)).itemsize


def _own_dtype(path: Path) -> torch.dtype:
    name = own_dtype(read_headers(path)) if path.is_dir() else file_dtype(path)
    found: torch.dtype = getattr(torch, name)
    return found


def _fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of a model."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


@dataclass(frozen=True)
class SplitModel:
    """A causal language model in two: ids [B, C] -> states [B, C, H], states [T, H] -> logits."""

    body: Callable[[Tensor], Tensor]
    head: Head


Loader = Callable[[], SplitModel]
"""Makes a model when it is needed and not before."""


class _Replay(nn.Module):
    """Stands in for a model's body: its answer is the states it is given as embeddings."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def split(model: Any) -> SplitModel:
    """Split a transformers causal language model; `model` itself becomes the head.

    The body is taken out of `model`, whose own code then does all that comes after it (the output
    head, soft caps, logit scales), so every architecture that transformers has is covered.
    """
    prefix = model.base_model_prefix
    body = getattr(model, prefix, None)
    if not isinstance(body, nn.Module):
        raise UsageError(
            f"{type(model).__name__} has no body named {prefix!r} to take apart",
            hint="evaluate a causal language model of transformers",
        )
    device = next(body.parameters()).device
    setattr(model, prefix, _Replay())

    def states(ids: Tensor) -> Tensor:
        result: Tensor = body(input_ids=ids.to(device), use_cache=False).last_hidden_state
        return result

    def head(states: Tensor) -> Tensor:
        logits: Tensor = model(inputs_embeds=states.unsqueeze(0), use_cache=False).logits[0]
        return logits

    return SplitModel(states, head)


def compare(
    load_model: Loader,
    load_reference: Loader | None,
    run: Sample,
    states_path: Path,
    scores_path: Path,
    progress: Progress | None = None,
) -> NDArray[Any]:
    """TokenScores of every scored token of `run`; goes on from what the two files hold.

    The reference is loaded first, and its body dropped before the model is loaded.
    """
    report = progress or (lambda *_: None)
    reference = None
    if load_reference is not None:
        reference = _Reference.record(load_reference(), run, states_path, report)
    model = load_model()

    def scores(batch: tuple[Window, ...], begin: int, end: int) -> NDArray[Any]:
        other = None if reference is None else (reference.states(begin, end), reference.head)
        return score(run.scored_states(model.body, batch), model.head, run.targets(batch), other)

    with torch.inference_mode():
        _extend(scores_path, TokenScores.itemsize, run, scores, partial(report, "model"))
    return np.fromfile(scores_path, TokenScores)


@dataclass(frozen=True)
class _Reference:
    """The states of a reference on disk, and its head, in memory."""

    head: Head
    path: Path
    width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def record(cls, model: SplitModel, run: Sample, path: Path, report: Progress) -> _Reference:
        """Run the body over all of `run`, unless the file at `path` has it."""

        def states(batch: tuple[Window, ...], begin: int, end: int) -> NDArray[Any]:
            found = run.scored_states(model.body, batch)
            return found.contiguous().view(torch.uint8).cpu().numpy()

        with torch.inference_mode():
            one = model.body(run.ids[None, :1])[0]
            record_bytes = one.shape[-1] * one.dtype.itemsize
            _extend(path, record_bytes, run, states, partial(report, "reference"))
        return cls(model.head, path, one.shape[-1], one.dtype, one.device)

    def states(self, begin: int, end: int) -> Tensor:
        """States [end - begin, H] on the reference's device."""
        row = self.width * self.dtype.itemsize
        raw = np.fromfile(self.path, np.uint8, (end - begin) * row, offset=begin * row)
        return torch.from_numpy(raw).view(self.dtype).reshape(-1, self.width).to(self.device)


def _extend(
    path: Path,
    record_bytes: int,
    run: Sample,
    produce: Callable[[tuple[Window, ...], int, int], NDArray[Any]],
    report: Callable[[int, int], None],
) -> None:
    """Append produce(batch, begin, end) for every batch of `run` that the file does not hold.

    A token has one record; begin and end count scored tokens. Half a batch, of a run that was
    killed, is cut off.
    """
    present = path.stat().st_size // record_bytes if path.exists() else 0
    begin = 0
    with open(path, "ab") as file:
        for batch in run.batches():
            end = begin + sum(window.num_scored for window in batch)
            if end > present:
                file.truncate(begin * record_bytes)
                file.write(produce(batch, begin, end).data)
                file.flush()
            begin = end
            report(end, run.num_scored)
