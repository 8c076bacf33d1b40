"""vLLM on a CPU with the plug-in writes what halfweight writes, from the same files.

Both in float32, where greedy choices do not hang on how sums are rounded. Log-probabilities may
differ by what attention and norms of two engines round differently: the largest difference of
these models was 8.4e-6 (SmolLM2), 1e-4 is allowed; in bfloat16 it is 1e-1.
"""

import pytest

vllm = pytest.importorskip("vllm", reason="run by `make test-vllm`")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config  # noqa: E402
from vllm import envs  # noqa: E402
from vllm.config.utils import hash_factors  # noqa: E402
from vllm_run import VllmDiedError, run_vllm  # noqa: E402

import halfweight  # noqa: E402
from halfweight.quantization.scheme import Recipe, Scheme  # noqa: E402
from halfweight.vllm import plugin  # noqa: E402

LOGPROB_TOLERANCE = 1e-4
VOCABULARY = 323
"""No multiple of 64, so that vLLM pads embedding and head."""
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}
SPREAD = 3.0
"""Random weights are made so much larger that one token stands out."""


def make(folder, config, scheme):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            parameter.data *= SPREAD
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    halfweight.quantize(folder / "source", folder / "int8", Recipe(scheme))
    return folder / "int8"


def prompts(vocabulary=VOCABULARY):
    """One shorter than a tile of the matrix unit, one longer."""
    torch.manual_seed(1)
    return [torch.randint(0, vocabulary, (n,)).tolist() for n in (10, 70)]


def ours(folder, asked, new_tokens=12):
    """Greedy tokens and log-probabilities of `halfweight.load`'s model, as vllm_child.py gives."""
    model = halfweight.load(folder, dtype=torch.float32)
    found = []
    for ids in asked:
        row = torch.tensor([ids])
        for _ in range(new_tokens):
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
        logprobs = model(row).logits[0].log_softmax(-1)
        at = logprobs[:-1].gather(1, row[0, 1:, None])[:, 0].tolist()
        split = len(ids) - 1
        found.append(
            {
                "ids": row[0, len(ids) :].tolist(),
                "prompt_logprobs": at[:split],
                "logprobs": at[split:],
            }
        )
    return found


def assert_same(theirs, mine):
    for answer, expected in zip(theirs, mine, strict=True):
        assert answer["ids"] == expected["ids"]
        for kind in ("logprobs", "prompt_logprobs"):
            assert answer[kind] == pytest.approx(expected[kind], abs=LOGPROB_TOLERANCE)


def test_an_untied_llama_with_scales_off_the_grid(tmp_path):
    """llama.py builds its embedding without a name; float32 scales keep all their bits."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    folder = make(tmp_path, config, Scheme(64, "float32", "absmax"))
    answers, log = run_vllm(folder, prompts())
    assert "Using HalfweightLinearKernel" in log
    assert_same(answers, ours(folder, prompts()))


def test_an_untied_qwen3_under_torch_compile(tmp_path):
    folder = make(tmp_path, Qwen3Config(**SIZES, tie_word_embeddings=False), Scheme())
    answers, _ = run_vllm(folder, prompts(), enforce_eager=False)
    assert_same(answers, ours(folder, prompts()))


@pytest.mark.parametrize(
    ("kind", "tied"), [(Qwen3Config, True), (LlamaConfig, False)], ids=["tied-qwen3", "llama"]
)
def test_two_processes_share_a_model(tmp_path, kind, tied):
    """Shards of linears by rows and by columns, of the embedding, and of the head, tied or not."""
    folder = make(tmp_path, kind(**SIZES, tie_word_embeddings=tied), Scheme(32))
    answers, _ = run_vllm(folder, prompts(), tensor_parallel_size=2)
    assert_same(answers, ours(folder, prompts()))


def test_smollm2_from_its_default_file(smollm2):
    """A real model, tied: its text, and the log-probability of every token of a page."""
    folder, tokenizer = smollm2
    asked = [tokenizer(text)["input_ids"] for text in ("The capital of France is", PAGE)]
    answers, _ = run_vllm(folder, asked, new_tokens=16)
    assert_same(answers, ours(folder, asked, new_tokens=16))
    assert tokenizer.decode(answers[0]["ids"]).startswith(" Paris")


def test_switched_off_vllm_is_as_it_was(tmp_path):
    """HALFWEIGHT_VLLM=0: on a CPU vLLM has no kernel for INT8 in groups, and says so."""
    folder = make(tmp_path, Qwen3Config(**SIZES, tie_word_embeddings=False), Scheme())
    with pytest.raises(VllmDiedError, match="Failed to find a kernel"):
        run_vllm(folder, prompts(), environment={"HALFWEIGHT_VLLM": "0"})


def test_what_vllm_compiled_without_the_plug_in_is_not_used_with_it(monkeypatch):
    """vLLM keeps compiled models under a hash of factors; a cached graph names its kernels."""
    monkeypatch.delitem(envs.environment_variables, "HALFWEIGHT_VLLM", raising=False)
    without = hash_factors(envs.compile_factors())
    plugin.install()
    assert hash_factors(envs.compile_factors()) != without
    assert envs.compile_factors()["HALFWEIGHT_VLLM"] == halfweight.__version__


PAGE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be on "
    "his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered as the rightful property of some one or other of "
    "their daughters."
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M quantized as `halfweight quantize` does by default, and its tokenizer."""
    from transformers import AutoTokenizer

    from halfweight.cli.demo import _save_source

    folder = tmp_path_factory.mktemp("smollm2")
    _save_source(folder / "source")
    halfweight.quantize(folder / "source", folder / "int8")
    return folder / "int8", AutoTokenizer.from_pretrained(folder / "source")
