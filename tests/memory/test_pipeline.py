"""Where layers lie on several devices: each once, within what is free, GPUs first."""

from dataclasses import replace

import pytest

from halfweight.errors import DoesNotFitError, UsageError
from halfweight.memory.architecture import architecture
from halfweight.memory.pipeline import Limits, Place, place_layers, stage_model
from halfweight.memory.plan import Model
from halfweight.memory.presets import preset
from halfweight.memory.workload import GIB

LLAMA_70B = Model.from_recipe(architecture(preset("llama-3-70b")))
LLAMA_8B = Model.from_recipe(architecture(preset("llama-3-8b")))
MIXTRAL = Model.from_recipe(architecture(preset("mixtral-8x7b")))
FEW = Limits(8, 8192)


def gpu(number, gib):
    return Place(f"cuda:{number}", "cuda", int(gib * GIB))


def cpu(gib):
    return Place("cpu", "cpu", int(gib * GIB))


def test_gpus_hold_what_they_can_and_a_cpu_the_rest():
    places = [gpu(0, 22), gpu(1, 11), cpu(60)]
    found = place_layers(LLAMA_70B, places, FEW, "int8")
    assert [stage.device for stage in found.stages] == ["cuda:0", "cuda:1", "cpu"]
    assert [stage.begin for stage in found.stages] == [0, *(s.end for s in found.stages[:-1])]
    assert found.stages[-1].end == 80
    first, second, last = (stage.end - stage.begin for stage in found.stages)
    assert first > 1.7 * second > 0
    for stage, part, place in zip(found.stages, found.parts, places, strict=True):
        taken = part.num_bytes(found.cache_tokens)
        assert taken <= place.num_bytes
        if stage.kind == "cuda":  # one layer more would not have fitted
            layer = LLAMA_70B.resident_bytes / 82
            assert part.num_bytes(8192) + layer > place.num_bytes
    assert found.cache_tokens >= 8192
    assert [part.runner for part in found.parts] == ["gpu", "gpu", "cpu"]
    assert found.step_tokens == 64 + 8
    norms = 2 * 2 * LLAMA_70B.architecture.hidden
    held = sum(part.footprint.weight_bytes for part in found.parts)
    assert held == LLAMA_70B.resident_bytes + norms  # the last norm, in every stage
    embedding = next(d for d in LLAMA_70B.decisions if "embed_tokens" in d.tensor.name)
    assert sum(part.read for part in found.parts) == held - embedding.resident_bytes
    speed = found.seconds({"cuda:0": 1e12, "cuda:1": 5e11, "cpu": 5e10})
    assert speed == pytest.approx(
        sum(part.read / rate for part, rate in zip(found.parts, (1e12, 5e11, 5e10), strict=True))
    )
    assert 0.5 < speed / (last / 80 * LLAMA_70B.resident_bytes / 5e10) < 2
    assert found.lines()[0].startswith(f"cuda:0: embedding, layers 0 to {first - 1}, ")
    assert found.lines()[2].startswith(f"cpu: layers {first + second} to 79, head, ")


def test_devices_that_are_not_needed_hold_nothing():
    found = place_layers(LLAMA_8B, [gpu(0, 20), cpu(100)], FEW, "int8")
    assert [(s.device, s.is_first, s.is_last) for s in found.stages] == [("cuda:0", True, True)]


def test_equal_gpus_share_alike_and_fill_their_room_with_cache():
    found = place_layers(LLAMA_70B, [gpu(i, 22) for i in range(4)], Limits(16), "int8")
    counts = [stage.end - stage.begin for stage in found.stages]
    assert max(counts) - min(counts) <= 2  # the head takes a layer's room
    assert found.max_context == LLAMA_70B.architecture.max_context
    rooms = [22 * GIB - part.num_bytes(found.cache_tokens) for part in found.parts]
    assert 128 <= min(rooms) / max(part.cache_token for part in found.parts) < 3 * 64 + 1
    assert found.cache_tokens % 64 == 0
    assert found.step_tokens == 8192
    both = place_layers(LLAMA_70B, [*(gpu(i, 22) for i in range(4)), cpu(60)], Limits(16), "int8")
    assert both == found  # a CPU that is not needed shortens no step


def test_a_head_that_does_not_fit_beside_all_layers_goes_on():
    """The first device has room for all layers and not for the head, which is the second's."""
    alone = replace(FEW, cache_tokens=8192)
    whole = place_layers(LLAMA_8B, [gpu(0, 40)], alone, "int8").parts[0]
    room = whole.num_bytes(8192) - whole.states - (200 << 20)
    found = place_layers(LLAMA_8B, [Place("cuda:0", "cuda", room), cpu(30)], alone, "int8")
    assert [stage.end - stage.begin for stage in found.stages] == [31, 1]


def test_too_little_memory_is_one_line_that_says_what_each_holds():
    with pytest.raises(DoesNotFitError) as caught:
        place_layers(LLAMA_70B, [gpu(0, 22), cpu(20)], FEW, "int8")
    words = str(caught.value)
    assert words.startswith("80 layers, each beside 8192 tokens of KV cache, do not fit: cuda:0 ")
    assert "(22.00 GiB free), cpu holds " in words
    assert "\n" not in words
    assert "shorter context" in caught.value.hint
    with pytest.raises(DoesNotFitError, match="cpu holds 0 "):
        place_layers(LLAMA_70B, [cpu(-1)], FEW, "int8")


def test_of_experts_a_token_reads_some():
    found = place_layers(MIXTRAL, [cpu(40), cpu(40)], Limits(1, 2048), "int8")
    read = sum(part.read for part in found.parts)
    assert 0.2 < read / MIXTRAL.resident_bytes < 0.35  # two of eight
    assert {part.runner for part in found.parts} == {"transformers"}


def test_a_tied_matrix_lies_in_the_first_stage_and_in_the_last():
    tied = Model.from_recipe(architecture(preset("qwen2.5-0.5b")))
    found = place_layers(tied, [cpu(4), cpu(4)], Limits(1, 2048), "int8")
    for stage in found.stages:
        names = [d.tensor.name for d in stage_model(tied, stage).decisions]
        assert sum("embed_tokens" in name for name in names) == 1
    assert found.parts[1].read == found.parts[1].footprint.weight_bytes


def test_models_of_other_kinds_are_refused():
    gemma = Model.from_recipe(architecture(preset("gemma-3-1b")))
    with pytest.raises(UsageError, match="which runs on one device"):
        place_layers(gemma, [cpu(40), cpu(40)], FEW, "int8")
