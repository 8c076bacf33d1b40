"""The planner against checkpoints, loaded models, and the bytes alive in real forward passes."""

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, save_family
from halfweight.engine.decoder import Decoder
from live_memory import LiveMemory

import halfweight
from halfweight.engine import decoder as decoding
from halfweight.engine import gpu_step
from halfweight.errors import CheckpointError, DoesNotFitError, UsageError
from halfweight.kernels.hopper import backend as hopper
from halfweight.memory import architecture as architectures
from halfweight.memory import plan, transient
from halfweight.memory.architecture import architecture
from halfweight.memory.cards import GIB, parse_bytes, parse_gpus
from halfweight.memory.named_model import planned_model
from halfweight.memory.plan import Model, footprint, kv_parts, legal_ranks
from halfweight.memory.presets import preset
from halfweight.memory.what_fits import advice, notes, require_fit, solve
from halfweight.memory.workload import ASSUMED_OVERHEAD, ENGINE_OVERHEAD, MIB, Range, Workload
from halfweight.model import llama_like
from halfweight.quantization.scheme import Recipe, Scheme, TensorInfo

CPU = torch.device("cpu")
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


def test_what_generation_and_its_kernels_allocate_by():
    assert transient.CHUNK_TOKENS == decoding.CHUNK_TOKENS
    assert transient.SPLIT_TOKENS == gpu_step.SPLIT_TOKENS
    assert transient.PROGRAMS_A_PROCESSOR == gpu_step.PROGRAMS_A_PROCESSOR


def test_the_partial_sums_are_those_of_the_hopper_kernels(monkeypatch):
    meta = torch.device("meta")
    monkeypatch.setattr(hopper, "_num_multiprocessors", lambda _: transient.MULTIPROCESSORS)
    monkeypatch.setattr(torch, "device", lambda *_: meta)
    sums, flags = hopper._workspace.__wrapped__(0, 0)
    assert sums.nbytes == 4 * transient.MULTIPROCESSORS * transient.PARTIAL_SUMS
    assert flags.nbytes < 1 << 10


def test_the_tokens_of_prompts_are_counted_as_the_decoder_holds_them():
    decoder = Decoder(small_model()[0], 4, 96)
    ids, mask = decoding._pad_left([[1] * 96] * 4, CPU)
    positions = mask.cumsum(dim=1)
    held = sum(tensor.nbytes for tensor in (ids, mask, positions, decoder._mask))
    assert held == transient.TOKEN_BYTES * 4 * 96
    work = Workload(96, 4)
    of_model = LLAMA_8B.architecture
    assert transient.prefill_bytes(of_model, work) == (
        transient.prefill_moments(of_model, work).peak + held
    )


def kv_bytes(found, work):
    return sum(part.num_bytes for part in kv_parts(found, work))


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


def prefill_peak(model, batch, context, kv_cache="16bit", chunks=1):
    """Most bytes of tensors alive in a real prefill of some chunks, cache included."""
    decoder = Decoder(model, batch, context, kv_cache=kv_cache)
    with LiveMemory() as memory:
        length = min(context - 8, chunks * (transient.CHUNK_TOKENS // batch))
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
    return worst, seen[worst] + kv_bytes(found, work)


@pytest.mark.parametrize(
    ("batch", "context", "worst"),
    [(1, 1024, "mlp"), (1, 3000, "mlp"), (4, 3000, "attention"), (16, 1024, "attention")],
)
def test_prefill_is_predicted_from_the_ops_that_run(batch, context, worst):
    model, found = small_model()
    moment, predicted = visible(found, Workload(context, batch))
    assert moment == worst
    assert prefill_peak(model, batch, context) == pytest.approx(predicted, rel=0.02)


SLIDING = {"sliding_window": 512}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "batch", "changes"),
    [
        ("qwen3", 8, {}),
        ("gemma3_text", 1, MIXED),
        ("mistral", 1, SLIDING),
        ("mixtral", 1, {}),
        ("phi3", 8, {}),
    ],
    ids=["qwen3", "gemma3", "mistral", "mixtral", "phi3"],
)
def test_prefill_of_other_architectures(kind, batch, changes):
    """Head norms, two masks, a window in all layers, experts, fused projections. The second
    chunk, which sees the window of the first, is the worst.
    """
    model, found = small_model(kind, num_attention_heads=4, num_key_value_heads=1, **changes)
    context = 2 * transient.CHUNK_TOKENS // batch + 40
    _, predicted = visible(found, Workload(context, batch, "int8"))
    peak = prefill_peak(model, batch, context, "int8", chunks=2)
    assert peak == pytest.approx(predicted, rel=0.03)


def test_decode_is_predicted_from_the_ops_that_run():
    """With an int8 cache, one layer's keys and values are dequantized at a time."""
    model, found = small_model()
    decoder = Decoder(model, 8, 2048, kv_cache="int8")
    logits = decoder.prefill([[1] * 64] * 8)
    with LiveMemory() as memory:
        decoder.advance(logits.argmax(-1))
    work = Workload(2048, 8, kv_dtype="int8")
    step = transient.forward_moments(found, 1, work)
    assert memory.peak_bytes == pytest.approx(step.attention - step.inside_attention, rel=0.02)


@pytest.mark.parametrize(
    ("batch", "context", "kv_cache"),
    [(1, 512, "16bit"), (8, 2048, "int8"), (64, 128, "16bit")],
    ids=["split cache", "int8 cache", "logits"],
)
def test_our_own_step_is_predicted_from_what_it_allocates(
    quantized_model, monkeypatch, batch, context, kv_cache
):
    """engine/gpu_step.py itself, its launches left out: what remains is what it allocates."""
    processors = SimpleNamespace(num_processors=transient.MULTIPROCESSORS)
    monkeypatch.setattr(gpu_step, "launch", lambda *_, **__: None)
    monkeypatch.setattr(gpu_step, "device_info", lambda _: processors)
    model, found = quantized_model
    decoder = Decoder(model, batch, context, kv_cache=kv_cache)
    decoder.prefill([[1] * 8] * batch)
    step = decoder._gpu_step()
    assert isinstance(step, gpu_step.GpuStep)
    step()
    with LiveMemory() as memory:
        step()
    work = Workload(context, batch, kv_cache)
    assert memory.peak_bytes == pytest.approx(transient.step_bytes(found, work), rel=0.01)
    tables = step._cos.nbytes + step._sin.nbytes
    decode = transient.decode_bytes(found, work, "int8", own_step=True)
    partial_sums = 4 * transient.MULTIPROCESSORS * transient.PARTIAL_SUMS
    assert decode == tables + partial_sums + transient.step_bytes(found, work)


@pytest.mark.parametrize("context", [96, 6000])
def test_our_own_prefill_is_predicted_from_what_it_allocates(quantized_model, monkeypatch, context):
    """The same for the prompt of a sequence alone, in chunks."""
    monkeypatch.setattr(gpu_step, "launch", lambda *_, **__: None)
    model, found = quantized_model
    decoder = Decoder(model, 1, context, step="kernel")
    step = decoder._gpu_step()
    monkeypatch.setattr(decoder, "_prompt_reader", lambda: step)
    monkeypatch.setattr(gpu_step, "scaled_dot_product_attention", attended)
    monkeypatch.setattr(gpu_step, "causal_lower_right", lambda *_: None)
    with LiveMemory() as memory:
        decoder.prefill([[1] * context])
    work = Workload(context)
    predicted = transient.prefill_bytes(found, work, own_step=True)
    tables, mask = transient.step_tables_bytes(found, work), decoder._mask.nbytes
    logits = transient.logits_bytes(found, 1)
    assert memory.peak_bytes == pytest.approx(predicted - tables - mask, rel=0.05, abs=logits)
    theirs = transient.prefill_bytes(found, work)
    assert predicted < theirs


def attended(queries, keys, values, **_):
    """What flash attention returns, its layout too."""
    return torch.empty_like(queries)


@pytest.fixture(scope="module")
def quantized_model(tmp_path_factory):
    """`small_model` in INT8, and its architecture."""
    place = tmp_path_factory.mktemp("step")
    model, found = small_model()
    model.save_pretrained(place / "source")
    halfweight.quantize(place / "source", place / "int8")
    return halfweight.load(place / "int8"), found


def test_the_peak_holds_prefill_or_the_decode_step_never_both():
    """What prefill took is given back before the step is recorded."""
    for weights in ("16bit", "int8"):
        for context, more in ((4096, "prefill"), (16, "decode")):
            work = Workload(context)
            found = footprint(LLAMA_8B, work, weights)
            own = weights == "int8"
            prefill = transient.prefill_bytes(LLAMA_8B.architecture, work, own)
            decode = transient.decode_bytes(LLAMA_8B.architecture, work, weights, own)
            assert ("prefill" if prefill > decode else "decode") == more
            assert found.bytes_of("prefill activations") == prefill
            both = found.bytes_of("prefill activations", "decode step")
            assert both == max(prefill, decode)
    assert found.allocated == found.weight_bytes + found.kv_bytes + found.bytes_of(
        *plan.PASSING_PARTS
    )


def test_a_step_of_our_own_needs_no_cublas_and_dequantizes_no_cache():
    """Through transformers each layer's cache is dequantized, and the graph has a workspace."""
    a, work = LLAMA_8B.architecture, Workload(8192, 16, "int8")
    ours, theirs = (transient.decode_bytes(a, work, "int8", own_step=o) for o in (True, False))
    layer = 2 * 2 * 16 * 8192 * a.kv_heads * a.head_dim
    assert theirs - ours > layer + transient.CUBLAS_WORKSPACE_BYTES - 16 * MIB
    sixteen = transient.decode_bytes(a, Workload(), "16bit", own_step=False)
    assert sixteen > transient.CUBLAS_WORKSPACE_BYTES


def test_the_workspaces_of_products():
    """cuBLAS's for any weights, our partial sums for INT8, none on a CPU."""
    found = {w: footprint(LLAMA_8B, Workload(), w).bytes_of("kernel workspace") for w in WEIGHTS}
    assert found == {"16bit": 32 * MIB, "int8": 32 * MIB + 132 * 128 * 256 * 4}
    assert footprint(LLAMA_8B, Workload(device="cpu"), "int8").bytes_of("kernel", "decode") == 0


def test_which_models_take_our_own_step():
    """As engine/gpu_step.py decides of the loaded model."""
    classes = {f"{kind.capitalize()}ForCausalLM" for kind in plan.OWN_STEP_KINDS}
    assert classes == set(llama_like.FAMILY)
    assert plan.LEAST_OWN_HEAD == gpu_step.LEAST_HEAD_SIZE
    for name in ("llama-3-8b", "smollm2-135m", "qwen3-0.6b"):
        assert Model.from_recipe(architecture(preset(name))).has_own_step, name
    for name in ("gemma-3-1b", "mixtral-8x7b", "mistral-7b-v0.1"):
        assert not Model.from_recipe(architecture(preset(name))).has_own_step, name
    odd = architecture({**preset("llama-3-8b"), "head_dim": 80})
    assert not Model.from_recipe(odd).has_own_step
    llama = LLAMA_8B.architecture
    for keep, expected in (("lm_head*", True), ("*layers.3.mlp.up_proj*", False)):
        assert Model.from_recipe(llama, Recipe(keep=(keep,))).has_own_step == expected


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


def test_halfweight_itself_runs_on_one_gpu():
    with pytest.raises(UsageError, match="halfweight runs on one GPU, found 4"):
        plan.plan(LLAMA_70B, Workload(ranks=4))
    assert Workload().on_ranks(4).runtime == "vllm"


def test_every_rank_together_holds_the_model():
    """Sharded parts times ranks, plus what each holds once, are the whole file's bytes."""
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
    assert e.value.hint == "legal tensor-parallel sizes: 1"
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


def test_int8_cache_layers_with_windows_stay_in_16_bits():
    model = Model.from_recipe(architecture(preset("gemma-3-1b")))
    one = model.architecture.cache_layers
    full = sum(layer.window is None for layer in one)
    found = kv_bytes(model.architecture, Workload(2048, kv_dtype="int8"))
    assert found == full * 2048 * 2 * (256 + 2) + (26 - full) * 512 * 2 * 256 * 2


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
    elsewhere = footprint(LLAMA_8B, measured.on_ranks(4), "int8")
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
