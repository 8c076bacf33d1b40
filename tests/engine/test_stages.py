"""Stages on several devices give what one device gives: on CPUs to the bit."""

from dataclasses import replace

import pytest
import torch
import tp_models
from stage_steps import LIMITS, logits_of, short_steps, staged, stages_at

import halfweight
from halfweight.checkpoint.headers import read_headers
from halfweight.engine.pipeline.start import _load, find_places, place_on, plan_stages, start
from halfweight.engine.runners import make_runner
from halfweight.engine.runners.cpu import CpuRunner
from halfweight.engine.runners.gpu import GpuRunner
from halfweight.errors import DoesNotFitError, UsageError
from halfweight.memory.architecture import architecture
from halfweight.memory.devices import processor_device
from halfweight.memory.pipeline import Place
from halfweight.memory.plan import Model
from halfweight.memory.presets import preset
from halfweight.model.stage import enters, leaves
from halfweight.quantization.scheme import Recipe, Scheme

LAYERS = 4
DEEP = {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}
CHANGES = {
    "llama": {"num_hidden_layers": LAYERS},
    "qwen2": DEEP,
    "qwen3": DEEP,
    "mixtral": {"num_hidden_layers": LAYERS},
    "qwen3_moe": DEEP | {"mlp_only_layers": [2]},
}
KINDS = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models of four layers by kind, made when asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tp_models.make(kind, tmp_path_factory.mktemp(kind), **CHANGES[kind])
        return made[kind]

    return of


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The same of two layers."""
    return lambda kind: tp_models.make(kind, tmp_path_factory.mktemp(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_on_cpus_are_one_cpu_to_the_bit(models, kind, dtype):
    folder = models(kind)
    whole = make_runner(halfweight.load(folder, dtype=dtype), **LIMITS)
    expected = logits_of(whole)
    assert expected.argmax(dim=1).unique().numel() > 10
    assert isinstance(whole, CpuRunner) == (kind in ("llama", "qwen2", "qwen3"))
    for ends in ((2, 4), (1, 3, 4)):
        runner = staged(folder, stages_at(*ends), dtype)
        assert {type(stage.runner) for stage in runner.stages} == {type(whole)}
        assert torch.equal(logits_of(runner), expected), ends


@pytest.mark.parametrize(("kind", "kv_cache"), [("llama", "16bit"), ("qwen3", "int8")])
def test_stages_on_gpus_are_one_gpu_to_the_bit(shallow, kind, kv_cache):
    """By the GPU's runner, interpreted."""
    folder, dtype, limits = shallow(kind), torch.bfloat16, LIMITS | {"kv_cache": kv_cache}
    expected = logits_of(GpuRunner(halfweight.load(folder, dtype=dtype), **limits), short_steps)
    runner = staged(folder, stages_at(1, 2), dtype, [GpuRunner] * 2, kv_cache=kv_cache)
    assert torch.equal(logits_of(runner, short_steps), expected)


@pytest.mark.parametrize("makers", [(GpuRunner, CpuRunner), (CpuRunner, GpuRunner)])
def test_a_gpu_and_a_cpu_are_near_one_device(shallow, makers):
    """Pages of 64 tokens here and 32 there, states in the model's dtype and in float32."""
    folder, dtype = shallow("qwen2"), torch.float32
    whole = CpuRunner(halfweight.load(folder, dtype=dtype), **LIMITS)
    expected = logits_of(whole, short_steps)
    runner = staged(folder, stages_at(1, 2), dtype, makers)
    assert (runner.page_tokens, runner.num_pages) == (64, 4)
    error = (logits_of(runner, short_steps) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


OPTIONS = {"max_new_tokens": 12, "stop_tokens": ()}
PROMPTS = [[5, 9, 33, 70, 11, 200, 3], [100, 2, 77, 41], [5, 9, 33, 70, 12] * 20]
DRAWN = {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.2}
ENGINE = {"max_context": 128, "max_sequences": 4}


def test_an_engine_over_stages_answers_as_one(models):
    folder = models("qwen2")
    with halfweight.Engine(folder, device="cpu", **ENGINE) as engine:
        expected = engine.generate(PROMPTS * 3, num_logprobs=2, temperature=0, **OPTIONS)
        drawn = engine.generate(PROMPTS, **OPTIONS, **DRAWN)
    with halfweight.Engine(folder, devices=["cpu", "cpu"], **ENGINE) as engine:
        assert "stages on cpu, cpu" in engine.description
        assert engine.generate(PROMPTS * 3, num_logprobs=2, temperature=0, **OPTIONS) == expected
        assert engine.generate(PROMPTS, **OPTIONS, **DRAWN) == drawn


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("kv_cache", ["16bit", "int8"])
def test_each_stage_holds_what_its_plan_says(models, kind, kv_cache):
    """To the byte: weights, pages, states that enter; tied, untied, with experts."""
    limits = ENGINE | {"cache_tokens": 512, "kv_cache": kv_cache}
    devices = ["cpu"] * 3
    plan = plan_stages(models(kind), devices, limits)
    running = start(models(kind), devices, {}, limits)
    assert [stage.end - stage.begin for stage in plan.stages] == [1, 2, 1]
    for stage, part in zip(running.runner.stages, plan.parts, strict=True):
        tensors = {p.data_ptr(): p for p in stage.model.parameters()}.values()
        assert sum(tensor.nbytes for tensor in tensors) == part.footprint.weight_bytes
        own = stage.runner
        assert own.cache_bytes == part.cache_token * own.page_tokens * own.num_pages
        assert own.num_pages * own.page_tokens - 512 <= 2 * own.page_tokens
        hidden = stage.model.config.hidden_size
        entering = enters(stage.model)
        rows = 0 if entering is None else len(entering.table)
        assert rows == (0 if entering is None else plan.step_tokens)
        sides = (entering is not None) + leaves(stage.model)
        assert part.states == sides * plan.step_tokens * hidden * 4
    running.runner.close()


def test_nothing_is_read_where_the_devices_are_too_small(models, monkeypatch):
    small = processor_device()
    small = replace(small, free_bytes=100_000)
    monkeypatch.setattr("halfweight.engine.pipeline.start.processor_device", lambda: small)
    monkeypatch.setattr("halfweight.engine.pipeline.start.load_stage", None)
    with pytest.raises(DoesNotFitError, match="4 layers, each beside 128 tokens of KV cache, do "):
        halfweight.Engine(models("llama"), devices=["cpu", "cpu"], **ENGINE)


def test_what_reads_a_text_again_as_it_grows_is_refused(tmp_path):
    ropes = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tp_models.make("llama", tmp_path, rope_parameters=ropes, max_position_embeddings=64)
    with pytest.raises(UsageError, match="reads a text again as it grows, which stages cannot"):
        halfweight.Engine(folder, devices=["cpu", "cpu"], **ENGINE)


def test_a_model_that_is_loaded_is_not_loaded_again(models):
    loaded = halfweight.load(models("llama"))
    with pytest.raises(UsageError, match="several devices load a model by themselves"):
        halfweight.Engine(loaded, devices=["cpu", "cpu"])


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    rooms = {"cuda:0": 10 << 30, "cuda:1": 20 << 30}
    monkeypatch.setattr(
        "halfweight.engine.pipeline.start.available_bytes", lambda device: rooms.get(str(device))
    )
    found = find_places(["auto"])
    assert [(place.name, place.kind) for place in found] == [
        ("cuda:0", "cuda"),
        ("cuda:1", "cuda"),
        ("cpu", "cpu"),
    ]
    assert found[1].num_bytes - found[0].num_bytes == 10 << 30
    assert [place.name for place in find_places(["cuda", "cpu"])] == ["cuda:1", "cpu"]
    twice = find_places(["cuda:0", "cuda:0"])
    assert [place.num_bytes for place in twice] == [found[0].num_bytes // 2] * 2
    with pytest.raises(UsageError, match="there is no cuda:2: this machine has 2 GPUs"):
        find_places(["cuda:0", "cuda:2"])


def test_progress_is_told_of_all_stages(models, monkeypatch):
    """Each tells of its own part; on a CPU, whose weights are mapped, nobody does."""
    told, loaded = [], []

    def load(part, stage, step_tokens, *, progress):
        progress(part.num_bytes // 2, part.num_bytes)
        progress(part.num_bytes, part.num_bytes)
        loaded.append(part.num_bytes)

    monkeypatch.setattr("halfweight.engine.pipeline.start.load_stage", load)
    folder = models("llama")
    plan = plan_stages(folder, ["cpu", "cpu"], ENGINE)
    _load(read_headers(folder), plan, {"progress": lambda *both: told.append(both)})
    first, second = loaded
    assert {total for _, total in told} == {first + second}
    done = [first // 2, first, first + second // 2, first + second]
    assert [number for number, _ in told] == done


def test_what_is_kept_in_16_bits_may_part_the_runners(tmp_path):
    """The first stage then runs by transformers in pages of 16 tokens, the second in 32."""
    keep = ("*embed*", "*.0.self_attn.o_proj*")
    folder = tp_models.make("llama", tmp_path, Recipe(Scheme(32), keep=keep))
    whole = make_runner(halfweight.load(folder, dtype=torch.float32), **LIMITS)
    expected = logits_of(whole)
    running = start(folder, ["cpu", "cpu"], {"dtype": torch.float32}, LIMITS)
    assert [stage.runner.page_tokens for stage in running.runner.stages] == [16, 32]
    assert (running.runner.num_pages - 1) * running.runner.page_tokens == LIMITS["cache_tokens"]
    error = (logits_of(running.runner) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


def test_a_model_in_16_bits_lies_on_stages_too(models):
    folder = models("qwen2").parent / "source"
    whole = make_runner(halfweight.load(folder), **LIMITS)
    running = start(folder, ["cpu", "cpu", "cpu"], {}, LIMITS)
    assert torch.equal(logits_of(running.runner), logits_of(whole))


def test_gpus_that_hold_all_run_as_many_sequences_as_gpus_do(monkeypatch):
    places = [Place(f"cuda:{i}", "cuda", 22 << 30) for i in range(4)]
    cpu = Place("cpu", "cpu", 60 << 30)
    monkeypatch.setattr("halfweight.engine.pipeline.start.find_places", lambda names: names)
    seventy = Model.from_recipe(architecture(preset("llama-3-70b")))
    gpus, both, few = (
        place_on(seventy, "int8", some, {}) for some in (places, [*places, cpu], [*places[:2], cpu])
    )
    assert both == gpus
    assert (gpus.max_sequences, few.max_sequences) == (256, 32)
