"""Changed files are read or refused by an error of ours; the fuzzer sees what it should see."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import run as fuzzer
from seeds import make_seeds

from halfweight.checkpoint.json_files import ModelConfig, check_types, read_json
from halfweight.checkpoint.manifest import read_manifest
from halfweight.errors import CheckpointError, HalfweightError
from halfweight.memory.architecture import architecture

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 320}
KEYS = (
    *SIZES, *ModelConfig.__struct_fields__, "rope_parameters", "rope_scaling", "sliding_window",
    "per_layer_config", "num_key_value_heads", "head_dim", "attn_config", "dtype", "no_rope_layers",
    "state_size", "kv_lora_rank", "linear_num_value_heads", "intermediate_size", "max_seq_len",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("fuzz"))


def test_a_message_is_one_line_whatever_a_file_names():
    """A tensor may be called anything: line ends, terminals' commands, half characters."""
    error = CheckpointError("tensor a\nb\x1b[2J\udce9 µ", hint="keep a\tb")
    assert error.message == str(error) == r"tensor a\nb\x1b[2J\udce9 µ"
    assert error.hint == r"keep a\tb"


def test_a_thousand_changed_files_are_read_or_refused(folders):
    found = {fuzzer.one_input(seed, folders)[1] for seed in range(1000)}
    assert found == {None}


def test_an_error_that_is_not_ours_is_counted(folders, monkeypatch):
    def careless(folder):
        return json.loads((folder / "config.json").read_text())["hidden_size"] + 1

    target = fuzzer.TARGETS[0]
    careless_target = type(target)("careless", target.file, target.change, careless, 1)
    monkeypatch.setattr(fuzzer, "TARGETS", (careless_target,))
    faults = [fuzzer.one_input(seed, folders)[1] for seed in range(300)]
    assert any(fault and "in test_fuzz.py" in fault for fault in faults)
    again = [fuzzer.one_input(seed, folders)[1] for seed in range(300)]
    assert faults == again, "a seed makes its input again"


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_a_config_of_any_values_has_an_architecture_or_an_error_of_ours(changes):
    config = {"model_type": "llama"} | SIZES | changes
    with contextlib.suppress(HalfweightError):
        check_types(Path("config.json"), config, ModelConfig)
        architecture(config).kv_bytes(64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"job": []}', r"halfweight.json: Expected `object`, got `array` - at `\$.job`"),
        (b'{"a": "\\ud800"}', r"halfweight.json: cannot be read as JSON \('utf-8' codec"),
        (b'{"a": "\xff"}', r"halfweight.json: cannot be read as JSON \('utf-8' codec"),
        (b"[" * 100_000, r"halfweight.json: cannot be read as JSON"),
        (b"[1]", r"halfweight.json: expected a JSON object, found list"),
    ],
)
def test_what_is_wrong_in_a_json_file_is_said_with_its_place(tmp_path, text, message):
    (tmp_path / "halfweight.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "x.json") == {"a": "\N{GRINNING FACE}"}
