"""The planner against checkpoints, loaded models, and the bytes alive in real forward passes."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, save_family
from live_memory import LiveMemory

import halfweight
from halfweight.engine.runners import gpu, gpu_attention, gpu_layers, gpu_memory
from halfweight.engine.runners.cpu import CpuRunner
from halfweight.engine.runners.gpu import GpuRunner
from halfweight.engine.runners.transformers_paged import TransformersRunner
from halfweight.engine.step import Chunk
from halfweight.errors import CheckpointError, DoesNotFitError, UsageError
from halfweight.evaluation.speed.static_decoder import StaticDecoder
from halfweight.kernels.cpu.llvm_vectors import LANES
from halfweight.kernels.hopper import backend as hopper
from halfweight.memory import architecture as architectures
from halfweight.memory import engine_memory, plan, transient
from halfweight.memory.architecture import architecture
from halfweight.memory.cache_bytes import page_slots
from halfweight.memory.cards import GIB, parse_bytes, parse_gpus
from halfweight.memory.named_model import planned_model
from halfweight.memory.plan import Model, footprint, kv_parts, legal_ranks
from halfweight.memory.presets import preset
from halfweight.memory.what_fits import advice, notes, require_fit, solve
from halfweight.memory.workload import (
    ASSUMED_OVERHEAD,
    COMMUNICATION_OVERHEAD,
    ENGINE_OVERHEAD,
    MIB,
    Range,
    Workload,
)
from halfweight.model import llama_like
from halfweight.quantization.scheme import Recipe, Scheme, TensorInfo

LLAMA_70B = Model.from_recipe(architecture(preset("llama-3-70b")))
LLAMA_8B = Model.from_recipe(architecture(preset("llama-3-8b")))
WEIGHTS = ("16bit", "int8")


def packed_bytes(folder):
    from halfweight.checkpoint.headers import read_headers

    return read_headers(folder).num_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_weights_are_bytes_on_disk_and_in_memory(family, tmp_path):
    source, out = save_family(family, tmp_path / "src"), tmp_path / "out"
    halfweight.quantize(source, out)
    before, after = planned_model(str(source)), planned_model(str(out))
    assert before.disk_bytes == after.disk_bytes == packed_bytes(out)
    assert before.resident_bytes == after.resident_bytes
    if family in architectures.FAMILIES:
        by_formula = planned_model(str(source / "config.json"))
        assert by_formula.disk_bytes == before.disk_bytes
        assert by_formula.resident_bytes == before.resident_bytes
    loaded = halfweight.load(out)
    distinct = {p.data_ptr(): p.nbytes for p in loaded.parameters()}
    assert before.resident_bytes == sum(distinct.values())


def test_sizes_of_the_design():
    """-49.6 % takes one-byte scales and the embedding and head in INT8."""
    assert round(LLAMA_8B.resident_bytes / 1e9, 3) == 8.095
    assert round(LLAMA_70B.resident_bytes / 1e9, 3) == 71.113
    for model in (LLAMA_8B, LLAMA_70B):
        assert round(100 * (model.resident_bytes / model.sixteen_bit_bytes - 1), 1) == -49.6


def test_the_partial_sums_are_those_of_the_hopper_kernels(monkeypatch):
    monkeypatch.setattr(hopper.driver, "num_multiprocessors", lambda _: transient.MULTIPROCESSORS)
    monkeypatch.setattr(hopper.driver, "workspace", lambda *sizes: sizes[2:])
    num_floats, num_flags = hopper._workspace(0, 0)
    assert num_floats == transient.MULTIPROCESSORS * transient.PARTIAL_SUMS
    assert num_flags == transient.MULTIPROCESSORS


def kv_bytes(model, work, weights="int8"):
    return sum(part.num_bytes for part in kv_parts(model, work, weights))


def small_model(kind="llama", **changes):
    """A random model of two layers, and its architecture from the checkpoint's own tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    parsed = AutoConfig.for_model(
        kind,
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=896,
        head_dim=32,
        vocab_size=4096,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        **({"num_local_experts": 4} if kind == "mixtral" else {}),
        **{"num_attention_heads": 8, "num_key_value_heads": 2, **changes},
    )
    model = AutoModelForCausalLM.from_config(parsed, dtype=torch.bfloat16).eval()
    tensors = [TensorInfo(n, "BF16", tuple(p.shape)) for n, p in model.named_parameters()]
    return model, architecture(parsed.to_dict(), kind, tensors)


@pytest.fixture(scope="module")
def quantized_model(tmp_path_factory):
    """`small_model` in INT8, and the plan's model of it."""
    place = tmp_path_factory.mktemp("step")
    small_model()[0].save_pretrained(place / "source")
    halfweight.quantize(place / "source", place / "int8")
    return halfweight.load(place / "int8"), planned_model(str(place / "int8"))


def runner_of(kind, model, work):
    """The engine's runner for a workload on this CPU, its pages those of the plan."""
    make = {"gpu": GpuRunner, "cpu": CpuRunner, "transformers": TransformersRunner}[kind]
    size = engine_memory.PAGE_TOKENS[kind]
    return make(
        model,
        max_context=work.context,
        max_sequences=work.batch,
        cache_tokens=page_slots(work, kind) - size,
        kv_cache=work.kv_dtype,
    )


@pytest.mark.parametrize("kv_dtype", ["16bit", "int8"])
@pytest.mark.parametrize("kind", engine_memory.PAGE_TOKENS)
def test_pages_are_those_that_the_runner_allocates(quantized_model, kind, kv_dtype):
    """To the byte, page 0 included."""
    model, found = quantized_model
    work = Workload(100, 3, kv_dtype, device="cuda" if kind == "gpu" else "cpu")
    weights = "16bit" if kind == "transformers" else "int8"
    assert found.runner(work, weights) == kind
    runner = runner_of(kind, model, work)
    assert runner.cache_bytes == kv_bytes(found, work, weights)
    assert runner.num_pages == 1 + 3 * -(-100 // runner.page_tokens)


class Steps:
    """Prompts of a workload in a runner, and the most bytes alive in a step."""

    def __init__(self, runner):
        self.runner = runner
        runner.table.fill_(1)

    def peak(self, *chunks):
        """Of a step of (slot, start, tokens)."""
        each = (self.runner.num_pages - 1) // self.runner.max_sequences
        step = [
            Chunk(slot, start, count, 1, range(1 + slot * each, 1 + (slot + 1) * each))
            for slot, start, count in chunks
        ]
        with LiveMemory() as memory:
            self.runner.run(step)
        return memory.peak_bytes


@pytest.fixture
def gpu_launches(monkeypatch):
    """The GPU runner on a CPU, its launches left out: what remains is what it allocates."""
    for module in (gpu, gpu_attention, gpu_layers):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)


@pytest.mark.parametrize("kv_dtype", ["16bit", "int8"])
@pytest.mark.parametrize(("batch", "context"), [(1, 1024), (4, 4096)])
def test_the_gpus_largest_step_is_predicted_from_what_it_allocates(
    quantized_model, gpu_launches, batch, context, kv_dtype
):
    model, found = quantized_model
    work = Workload(context, batch, kv_dtype)
    steps = Steps(runner_of("gpu", model, work))
    tokens = min(steps.runner.max_step_tokens, batch * context)
    chunks = [(slot, 0, tokens // batch) for slot in range(batch)]
    peak = steps.peak(*chunks)
    sizes = gpu_memory.sizes_of(model)
    assert peak == pytest.approx(engine_memory.activation_bytes(sizes, tokens), rel=0.02)
    planned = footprint(found, work, "int8")
    assert peak <= planned.bytes_of("step activations")


@pytest.mark.parametrize("batch", [1, 24])
def test_a_decode_step_is_no_more_than_predicted(quantized_model, gpu_launches, batch):
    model, found = quantized_model
    work = Workload(256, batch)
    steps = Steps(runner_of("gpu", model, work))
    peak = steps.peak(*((slot, 200, 1) for slot in range(batch)))
    planned = footprint(found, work, "int8")
    logits = steps.runner._logits.nbytes
    assert peak <= planned.bytes_of("recorded steps", "logits") - logits
    rows = engine_memory.recorded_rows(batch)
    assert logits == 2 * rows * model.config.vocab_size


@pytest.mark.parametrize("kv_dtype", ["16bit", "int8"])
def test_tables_and_scratch_are_those_that_the_gpu_runner_allocates(
    quantized_model, gpu_launches, kv_dtype
):
    model, found = quantized_model
    work = Workload(1000, 3, kv_dtype)
    runner = runner_of("gpu", model, work)
    attention, tables = runner._parts.attention, runner._page_tables.device_table
    held = (runner.table, tables, attention._cos, attention._sin)
    planned = footprint(found, work, "int8")
    assert planned.bytes_of("tables") == sum(tensor.nbytes for tensor in held)
    scratch = attention._scratch
    pages = 0 if scratch is None else scratch.keys.nbytes + scratch.values.nbytes
    assert planned.bytes_of("scratch pages") == pages


def test_sizes_of_a_loaded_model_are_those_of_its_plan(quantized_model):
    """So that the runner sizes its pool by the very numbers that the planner counts."""
    model, found = quantized_model
    assert gpu_memory.sizes_of(model) == plan.sizes_of(found.architecture)


def test_the_cpus_step_is_predicted_from_what_it_allocates(quantized_model):
    model, found = quantized_model
    work = Workload(200, 5, device="cpu")
    runner = runner_of("cpu", model, work)
    runner._step.rotary.reach(work.context)
    planned = footprint(found, work, "int8")
    rows = runner._step.max_tokens
    widths = (found.architecture.hidden, 12 * 32, 8 * 32, found.architecture.intermediate)
    buffers = [
        t for t in runner._step._kept if getattr(t, "shape", None) in [(rows, w) for w in widths]
    ]
    assert planned.bytes_of("step activations") == sum(t.nbytes for t in buffers)
    assert planned.bytes_of("logits") == runner._logits.nbytes
    rotary = runner._step.rotary
    at_most = runner.table.nbytes + rotary.cos.nbytes + rotary.sin.nbytes
    assert planned.bytes_of("tables") <= at_most < planned.bytes_of("tables") * 1.4


SLIDING = {"sliding_window": 512}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma3_text", MIXED),
        ("mistral", SLIDING),
        ("mixtral", {}),
        ("phi3", {}),
    ],
    ids=["llama", "qwen3", "gemma3", "mistral", "mixtral", "phi3"],
)
@pytest.mark.parametrize("kv_dtype", ["16bit", "int8"])
def test_a_step_by_transformers_is_predicted_from_the_ops_that_run(kind, changes, kv_dtype):
    """Head norms, windows, experts, fused projections; a prompt's second chunk is the worst."""
    model, found = small_model(kind, **changes)
    work = Workload(4096, 1, kv_dtype, device="cpu")
    runner = runner_of("transformers", model, work)
    tokens = runner.max_step_tokens
    steps = Steps(runner)
    steps.peak((0, 0, tokens))
    peak = steps.peak((0, tokens, tokens))
    predicted = transient.row_bytes(found, tokens, work)
    assert peak == pytest.approx(predicted, rel=0.05)


def prefill_peak(model, batch, context):
    """Most bytes of tensors alive in transformers' own prefill of a chunk, cache included."""
    decoder = StaticDecoder(model, batch, context)
    with LiveMemory() as memory:
        length = min(context - 8, transient.CHUNK_TOKENS // batch)
        decoder.prefill([[1] * length] * batch)
    return memory.peak_bytes


def visible(found, work):
    """The plan for the same: all but what the attention kernel makes inside itself."""
    moments = transient.prefill_moments(found, work)
    seen = {
        "mlp": moments.mlp,
        "norm": moments.norm,
        "attention": moments.attention - moments.inside_attention,
    }
    worst = max(seen, key=seen.get)
    cache = sum(2 * layer.numbers * layer.tokens(work.context) for layer in found.cache_layers)
    return worst, seen[worst] + work.batch * cache


@pytest.mark.parametrize(
    ("batch", "context", "worst"),
    [(1, 1024, "mlp"), (1, 3000, "mlp"), (4, 3000, "attention"), (16, 1024, "attention")],
)
def test_prefill_with_masks_is_predicted_from_the_ops_that_run(batch, context, worst):
    """As transformers' tensor parallelism reads prompts."""
    model, found = small_model()
    moment, predicted = visible(found, Workload(context, batch, runtime="transformers-tp"))
    assert moment == worst
    assert prefill_peak(model, batch, context) == pytest.approx(predicted, rel=0.02)


def test_what_is_allocated_is_the_sum_of_the_parts():
    found = footprint(LLAMA_8B, Workload(4096, 8, "int8"), "int8")
    passing = found.bytes_of(*plan.PASSING_PARTS)
    assert found.allocated == found.weight_bytes + found.kv_bytes + passing
    assert all(found.bytes_of(name) > 0 for name in plan.PASSING_PARTS)


def test_the_runner_leaves_room_for_all_that_the_plan_counts():
    """Of what is free, pages take what the plan's own parts and an allowance leave."""
    sizes = plan.sizes_of(LLAMA_8B.architecture)
    limits = engine_memory.Limits(8192, 64, 8192, "16bit", transient.MULTIPROCESSORS)
    pages = gpu_memory.pages_that_fit(sizes, limits, 24 * GIB)
    page = engine_memory.page_bytes(sizes, "16bit") * sizes.layers
    work = Workload(8192, 64)
    passing = footprint(LLAMA_8B, work, "int8").bytes_of(*plan.PASSING_PARTS)
    assert pages * page + passing < 24 * GIB - 256 * MIB
    assert (pages + 1) * page + gpu_memory.step_bytes(sizes, limits) > 24 * GIB
    with pytest.raises(DoesNotFitError, match=r"8192 tokens needs 1\.01 GiB"):
        gpu_memory.pages_that_fit(sizes, limits, 3 * GIB)


def test_a_context_that_is_not_given_is_what_fits():
    sizes = plan.sizes_of(LLAMA_8B.architecture)
    limits = engine_memory.Limits(131072, 256, 8192, "16bit", transient.MULTIPROCESSORS)
    assert gpu_memory.longest_context(sizes, limits, 60 * GIB) == 131072
    context = gpu_memory.longest_context(sizes, limits, 10 * GIB)
    assert context % 64 == 0
    for tokens, fits in ((context, True), (context + 64, False)):
        some = replace(limits, max_context=tokens)
        needed = gpu_memory.step_bytes(sizes, some) + (tokens // 64 + 1) * 8 * MIB
        assert (needed <= 10 * GIB) == fits


def test_the_workspaces_of_products():
    """cuBLAS's for any weights, our partial sums for INT8, none on a CPU."""
    found = {w: footprint(LLAMA_8B, Workload(), w).bytes_of("kernel workspace") for w in WEIGHTS}
    assert found == {"16bit": 32 * MIB, "int8": 32 * MIB + 132 * 128 * 256 * 4}
    assert footprint(LLAMA_8B, Workload(device="cpu"), "int8").bytes_of("kernel", "recorded") == 0


def test_which_runner_takes_which_model():
    """As runners/gpu.py and runners/cpu.py decide of the loaded model."""
    classes = {f"{kind.capitalize()}ForCausalLM" for kind in plan.OWN_STEP_KINDS}
    assert classes == set(llama_like.FAMILY)
    assert (plan.LEAST_OWN_HEAD, plan.CPU_LANES) == (gpu.LEAST_HEAD_SIZE, LANES)

    def runners(found, recipe=None):
        model = Model.from_recipe(found, recipe)
        return [model.runner(Workload(device=kind), "int8") for kind in ("cuda", "cpu")]

    for name in ("llama-3-8b", "smollm2-135m", "qwen3-0.6b"):
        assert runners(architecture(preset(name))) == ["gpu", "cpu"], name
    for name in ("gemma-3-1b", "mixtral-8x7b", "mistral-7b-v0.1"):
        assert runners(architecture(preset(name))) == ["transformers", "transformers"], name
    odd = architecture({**preset("llama-3-8b"), "head_dim": 80})
    assert runners(odd) == ["transformers", "cpu"]
    llama = LLAMA_8B.architecture
    assert runners(llama, Recipe(keep=("lm_head*",))) == ["gpu", "transformers"]
    assert runners(llama, Recipe(keep=("*layers.3.mlp.up_proj*",))) == ["transformers"] * 2
    assert LLAMA_8B.runner(Workload(), "16bit") == "transformers"
    assert LLAMA_8B.runner(Workload(ranks=4, runtime="vllm"), "int8") is None


def test_the_allocators_slack_is_a_fifth_of_what_comes_and_goes():
    found = footprint(LLAMA_8B, Workload(32768, 2), "int8")
    assert found.slack == found.bytes_of(*plan.PASSING_PARTS) // 5 > 100 * MIB
    low, likely, high = (getattr(found.overhead, b) for b in ("low", "likely", "high"))
    process = ASSUMED_OVERHEAD["cuda"]
    assert (low, likely, high) == (
        process.low,
        process.likely + found.slack,
        process.high + found.slack,
    )
    for other in (Workload(device="cpu"), Workload(ranks=4, runtime="vllm")):
        assert footprint(LLAMA_8B, other, "int8").slack == 0


def test_the_published_example_of_70b_on_four_cards():
    """Linears in INT8 with 16-bit scales, all divided by four: 17.2 GiB a GPU against 32.9, and
    with 1, 2 and 3 GiB of 23.5 reserved about 70,000, 57,000 and 44,000 tokens of cache.
    """
    linears = Recipe(Scheme(scale_format="bfloat16"), ("*embed_tokens*", "lm_head*"))
    model = Model.from_recipe(architecture(preset("llama-3-70b")), linears)
    work = Workload(1, 1, ranks=4, runtime="vllm")
    found = footprint(model, work, "int8")
    assert found.kv_bytes == 80 * 1024
    plain = footprint(model, work, "16bit").weight_bytes
    assert (round(plain / GIB, 1), round(found.weight_bytes / GIB, 1)) == (32.9, 17.2)
    room = [(23.5 - reserved) * GIB - found.weight_bytes for reserved in (1, 2, 3)]
    assert [round(b / found.kv_bytes, -3) for b in room] == [70_000, 57_000, 44_000]


def test_transformers_leaves_embedding_and_head_on_every_rank():
    divided = footprint(LLAMA_70B, Workload(ranks=4, runtime="vllm"), "int8")
    found = footprint(LLAMA_70B, Workload(ranks=4, runtime="transformers-tp"), "int8")
    both = 2 * 128256 * 8192
    replicated = sum(p.replicated for p in found.parts if p.name == "int8 data")
    assert replicated == both
    assert found.bytes_of("int8 data") - divided.bytes_of("int8 data") == both * 3 / 4


def test_families_that_halfweight_cannot_divide_run_on_one_gpu():
    gemma = Model.from_recipe(architecture(preset("gemma-3-4b")))
    with pytest.raises(UsageError, match="halfweight runs a gemma3_text on one GPU, found 2"):
        plan.plan(gemma, Workload(ranks=2))
    assert plan.on_ranks(gemma, Workload(), 2).runtime == "vllm"
    assert plan.on_ranks(LLAMA_70B, Workload(), 2) == Workload(ranks=2)


def test_70b_runs_on_four_cards_of_24_gb_by_the_same_engine():
    budget, work = parse_gpus("24GB").num_bytes, Workload(8192, 4, ranks=4)
    found = plan.plan(LLAMA_70B, work, budget)
    assert found.verdict == "fits"
    assert found.sixteen_bit_verdict == "does not fit"
    one = footprint(LLAMA_70B, replace(work, ranks=1), "int8")
    parts, whole = ({p.name: p for p in f.parts} for f in (found.int8, one))
    for name in ("int8 data", "KV cache"):
        assert parts[name].num_bytes == pytest.approx(whole[name].num_bytes / 4, rel=1e-6)
    assert parts["int8 data"].replicated == 0
    assert parts["tables"] == whole["tables"]
    exponents = 80 * 2 * 8192  # of the rows of o and down, whose columns are divided
    assert parts["scales"].replicated == exponents
    rows = 64  # of recorded steps
    assert parts["logits"].num_bytes - whole["logits"].num_bytes == 2 * rows * 128256 * 9 // 4
    assert found.int8.process.high == one.process.high + COMMUNICATION_OVERHEAD.high


def test_ranks_that_outnumber_the_heads_of_keys_and_values_hold_the_same_ones():
    model = Model.from_recipe(architecture(preset("qwen2.5-3b")), Recipe(Scheme(32)))
    two, four = (footprint(model, Workload(ranks=n), "int8") for n in (2, 4))
    assert two.kv_bytes == four.kv_bytes
    heads = 2 * 36 * 128 * 2048  # a key and a value head of each layer
    data = [found.bytes_of("int8 data") for found in (two, four)]
    assert data[0] - 2 * data[1] == heads - 2 * heads


def test_every_rank_together_holds_the_model():
    """Sharded parts times ranks, plus what each holds once, are the whole file's bytes."""
    found = footprint(LLAMA_70B, Workload(ranks=4), "int8")
    weights = [p for p in found.parts if p.name in plan.WEIGHT_PARTS]
    assert sum(4 * p.sharded + p.replicated for p in weights) == LLAMA_70B.resident_bytes
    for runtime in ("vllm", "transformers-tp"):
        found = footprint(LLAMA_70B, Workload(ranks=4, runtime=runtime), "int8")
        weights = [p for p in found.parts if p.name in plan.WEIGHT_PARTS]
        whole = sum(4 * p.sharded + p.replicated for p in weights)
        shape_records = 16 * sum(d.scheme is not None for d in LLAMA_70B.decisions)
        assert whole == LLAMA_70B.disk_bytes - shape_records


def test_legal_sizes_are_whole_groups():
    assert legal_ranks(LLAMA_70B, 16) == [1, 2, 4, 8, 16]
    with pytest.raises(UsageError, match="3 GPUs do not divide 64 heads"):
        plan.check_ranks(LLAMA_70B, 3)
    narrow = architecture(preset("qwen2.5-0.5b"))
    by_group = {
        g: legal_ranks(Model.from_recipe(narrow, Recipe(Scheme(group_size=g))), 8)
        for g in (64, 128)
    }
    assert by_group == {64: [1, 2], 128: [1]}, "half of 896 columns is 7 groups of 64, 3.5 of 128"
    cut = Model.from_recipe(narrow, Recipe(Scheme(group_size=128)))
    with pytest.raises(UsageError, match=r"2 GPUs cut .*o_proj\.weight inside a group of 128") as e:
        plan.check_ranks(cut, 2)
    command = "`halfweight quantize --tensor-parallel 2 --group-size 128`"
    added = f"{command} of the source makes groups that allow it"
    sizes = "1; in smaller groups (--tensor-parallel) also 2"
    assert e.value.hint == f"legal tensor-parallel sizes: {sizes}; {added}"
    for ranks, what in ((32, "32 GPUs do not divide 14 heads"), (7, "7 GPUs do not divide 4864")):
        with pytest.raises(UsageError, match=what):
            plan.check_ranks(cut, ranks)


@pytest.mark.parametrize("quantity", ["batch", "context"])
def test_solve_finds_the_last_that_fits(quantity):
    budget = 24 * GIB
    found = solve(LLAMA_8B, Workload(2048, 2), budget, quantity)

    def verdict(value):
        return footprint(LLAMA_8B, Workload(**{**base, quantity: value}), "int8").judge(budget)

    base = {"context": 2048, "batch": 2}
    assert verdict(found) == "fits"
    if quantity == "batch":
        assert verdict(found + 1) != "fits"
    else:
        assert found == 8192


def test_solve_gpus_and_group_size():
    card = parse_gpus("24GB").num_bytes
    assert solve(LLAMA_70B, Workload(8192), card, "gpus") == 4
    assert solve(LLAMA_8B, Workload(4096), card, "group-size") == 32
    assert solve(LLAMA_70B, Workload(8192), card, "batch") is None


def test_refusal_names_what_would_fit():
    require_fit(LLAMA_8B, Workload(4096), 12 * GIB)
    with pytest.raises(DoesNotFitError, match=r"batch 64 of 4096 tokens needs .* 12\.00 GiB") as e:
        require_fit(LLAMA_8B, Workload(4096, 64), 12 * GIB)
    assert "batch" in e.value.hint
    with pytest.raises(DoesNotFitError) as e:
        require_fit(LLAMA_70B, Workload(4096), 12 * GIB)
    assert "no batch fits" in e.value.hint


def test_windows_limit_another_engines_cache_and_not_the_engines_pages():
    model = Model.from_recipe(architecture(preset("gemma-3-1b")))
    one = model.architecture.cache_layers
    full = sum(layer.window is None for layer in one)
    elsewhere = Workload(2048, kv_dtype="int8", runtime="transformers-tp")
    found = kv_bytes(model, elsewhere)
    assert found == full * 2048 * 2 * (256 + 2) + (26 - full) * 512 * 2 * 256 * 2
    assert kv_bytes(model, Workload(2048, kv_dtype="int8")) == 26 * 2064 * 2 * (256 + 2)


def test_sizes_and_cards():
    assert parse_gpus("4x24GB").num_bytes == parse_gpus("rtx-4090").num_bytes == int(23.5 * GIB)
    assert (parse_gpus("2xH100").count, parse_bytes("22GiB")) == (2, 22 * GIB)
    for text in ("banana", "4x", "12parsec"):
        with pytest.raises(UsageError, match="is no size and no card"):
            parse_gpus(text)
    with pytest.raises(UsageError, match="has no GPU"):
        parse_gpus("0x24GB")
    with pytest.raises(UsageError, match="batch is 0"):
        Workload(batch=0)


def test_advice_says_what_to_change_and_by_how_much():
    budget = parse_gpus("24GB").num_bytes
    assert advice(plan.plan(LLAMA_8B, Workload(4096), budget)) == []
    tight = plan.plan(LLAMA_8B, Workload(8192, 32), budget)
    lines = advice(tight)
    assert lines[0].startswith(f"{(tight.int8.total.high - budget) / GIB:.2f} GiB")
    batch = solve(LLAMA_8B, Workload(8192, 32), budget, "batch")
    assert f"batch {batch} instead of 32 fits" in lines
    assert any("--kv-dtype int8 saves" in line for line in lines)


def test_a_measured_overhead_replaces_the_assumption():
    measured = Workload(4096, overhead=Range(10, 20, 30))
    found, assumed = (footprint(LLAMA_8B, w, "int8") for w in (measured, Workload(4096)))
    slack = found.slack
    assert found.total == Range(*(found.allocated + n for n in (10, 20 + slack, 30 + slack)))
    assert assumed.process == ASSUMED_OVERHEAD["cuda"]
    gemma = Model.from_recipe(architecture(preset("gemma-3-4b")))
    elsewhere = footprint(gemma, plan.on_ranks(gemma, measured, 2), "int8")
    assert elsewhere.overhead == ENGINE_OVERHEAD, "what was measured is not another engine's"


def test_no_such_model():
    with pytest.raises(CheckpointError, match="no such file, folder or preset"):
        planned_model("llama-9")


def test_a_context_beyond_the_models_own_is_said_and_solved_for_all_the_same():
    budget = parse_gpus("24GB").num_bytes
    work = Workload(131072)
    found = plan.plan(LLAMA_8B, work, budget)
    assert notes(found) == ["llama has positions for 8,192 tokens, not for 131,072"]
    context = solve(LLAMA_8B, work, budget, "context")
    assert context > 8192
    assert plan.plan(LLAMA_8B, Workload(context), budget).verdict == "fits"
    assert plan.plan(LLAMA_8B, Workload(context + 1), budget).verdict != "fits"
    assert f"context {context} instead of 131072 fits" in advice(found)
    assert solve(LLAMA_8B, Workload(4096), budget, "context") == 8192
    assert notes(plan.plan(LLAMA_8B, Workload(8192), budget)) == []


def test_more_gpus_than_one_are_advised_with_who_runs_on_them():
    budget = parse_gpus("24GB").num_bytes
    lines = advice(plan.plan(LLAMA_70B, Workload(4096), budget))
    assert "GPUs 4 instead of 1 fits" in lines
    gemma = Model.from_recipe(architecture(preset("gemma-3-4b")))
    lines = advice(plan.plan(gemma, Workload(4096), parse_gpus("4GB").num_bytes))
    assert "GPUs 4 instead of 1 fits, with --runtime vllm" in lines
    lines = advice(plan.plan(LLAMA_70B, Workload(4096, ranks=2, runtime="vllm"), budget))
    assert "GPUs 4 instead of 2 fits" in lines


@pytest.mark.parametrize("name", ["v100", "v100-32gb", "2xv100-16gb", "p100"])
def test_cards_that_no_kernel_runs_on_are_refused(name):
    with pytest.raises(UsageError, match=r"compute capability [67].*, the INT8 kernels need 7.5"):
        parse_gpus(name)


def test_an_encoder_is_planned_without_a_cache():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 99}
    tensor = TensorInfo("encoder.layer.0.attention.self.query.weight", "F32", (64, 64))
    found = architecture(sizes | {"model_type": "bert"}, "minilm", [tensor])
    made = plan.plan(plan.Model.from_recipe(found), Workload(512), parse_gpus("24GB").num_bytes)
    assert made.int8.kv_bytes == 0
    assert notes(made) == ["minilm reads and does not write: it keeps no KV cache"]
