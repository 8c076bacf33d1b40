"""The folder that benchmarks/vllm_plugin.py serves is the file for vLLM of its model."""

import json

import pytest
import vllm_plugin


@pytest.mark.parametrize("name", ["tiny", "llama-3-8b", "llama-3-70b"])
def test_the_served_config_is_that_of_the_file_for_vllm(tmp_path, name):
    vllm_plugin.write_config(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    found = config["quantization_config"]
    assert found["ignore"] == ["model.embed_tokens"]
    (group,) = found["config_groups"].values()
    assert group["weights"]["group_size"] == 128
    assert "re:(.*\\.)?lm_head$" in group["targets"]
    assert len(group["targets"]) == 8
