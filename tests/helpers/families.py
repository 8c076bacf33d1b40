"""Small random checkpoints of seven architectures, as transformers saves them."""

import torch

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "mixtral")


def save_family(kind, folder):
    """A 16-bit folder of the architecture; returns it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=96,
        vocab_size=512,
        tie_word_embeddings=kind in ("gemma3_text", "qwen2"),
        **({"num_local_experts": 4} if kind == "mixtral" else {}),
        **({"pad_token_id": 0} if kind == "phi3" else {}),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
