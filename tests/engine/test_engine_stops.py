"""Where texts end, how a model wants to be sampled, how long its texts may be."""

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from halfweight.engine.request import Sampling
from halfweight.engine.stops import (
    context_tokens,
    default_sampling,
    end_of_text_tokens,
    end_of_turn_token,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def make_tokenizer(template=None, special=("<|im_start|>", "<|im_end|>", "</s>"), eos="</s>"):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def test_texts_end_where_any_of_the_files_says():
    tokenizer = make_tokenizer(CHATML)
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    generation = GenerationConfig(eos_token_id=[20, 21])
    config = LlamaConfig(eos_token_id=22)
    assert end_of_text_tokens(generation, config, tokenizer) == {20, 21, 22, end, eos}
    assert end_of_text_tokens(None, None, None) == frozenset()
    silent = LlamaConfig(eos_token_id=None)
    assert end_of_text_tokens(GenerationConfig(eos_token_id=5), silent, None) == {5}


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}[{{ m['content'] }}] </s>{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] }} </s>{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m['content'] }}\n### {% endfor %}", None),
        ("{{ raise_exception('only with tools') }}", None),
        (None, None),
    ],
)
def test_the_token_after_an_answer_ends_a_turn(template, token):
    tokenizer = make_tokenizer(template)
    wanted = None if token is None else tokenizer.convert_tokens_to_ids(token)
    assert end_of_turn_token(tokenizer) == wanted


def test_of_two_tokens_that_begin_alike_the_longer_is_meant():
    template = "{% for m in messages %}{{ m['content'] }}<end><of>{% endfor %}"
    tokenizer = make_tokenizer(template, special=("<end>", "<end><of>"), eos="<end>")
    assert end_of_turn_token(tokenizer) == tokenizer.convert_tokens_to_ids("<end><of>")


def test_an_added_token_that_is_not_special_ends_nothing():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}</think>{% endfor %}")
    tokenizer.add_tokens(["</think>"])
    assert end_of_turn_token(tokenizer) is None


def test_sampling_is_greedy_unless_the_model_says_do_sample():
    assert default_sampling(GenerationConfig()) == Sampling()
    assert default_sampling(None) == Sampling()
    assert default_sampling(GenerationConfig(temperature=0.7, top_p=0.5)) == Sampling()


def test_sampling_is_as_the_model_says():
    qwen = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
    )
    assert default_sampling(qwen) == Sampling(0.7, 20, 0.8, repetition_penalty=1.05)
    assert default_sampling(GenerationConfig(do_sample=True)) == Sampling(temperature=1.0)
    penalized = GenerationConfig(repetition_penalty=1.2)
    assert default_sampling(penalized) == Sampling(repetition_penalty=1.2)


@pytest.mark.parametrize(
    ("stated", "rope", "tokens"),
    [
        (2048, None, 2048),
        # Qwen2.5, by its card: max_position_embeddings is left as it was
        (
            32768,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            131072,
        ),
        # Qwen3: the config has room for an answer on top
        (
            40960,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            131072,
        ),
        # DeepSeek-V2: already the length after scaling
        (
            163840,
            {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            163840,
        ),
        (
            2048,
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048},
            4096,
        ),
        # nothing says which length is meant
        (4096, {"rope_type": "linear", "factor": 4.0}, 4096),
        # Llama 3.1: its factor does not say the length
        (
            131072,
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            131072,
        ),
    ],
)
def test_the_context_after_rotary_scaling(stated, rope, tokens):
    rope = rope and {"rope_theta": 10000.0, **rope}
    config = LlamaConfig(max_position_embeddings=stated, rope_parameters=rope)
    assert context_tokens(config) == tokens


def test_the_context_of_layers_with_rotary_parameters_of_their_own():
    from transformers import Gemma3TextConfig

    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    ropes = {"full_attention": linear, "sliding_attention": plain}
    config = Gemma3TextConfig(max_position_embeddings=131072, rope_parameters=ropes)
    assert context_tokens(config) == 131072


def test_a_model_without_positions_has_no_limit():
    from transformers import MambaConfig

    assert context_tokens(MambaConfig()) is None
