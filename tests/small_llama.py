"""A Llama of a few hundred thousand weights that reads SmolLM2's tokens, for tests that need no knowledge."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(seed: int, layers: int = 2, **sizes: Any) -> LlamaForCausalLM:
    """Random weights from the seed; ``sizes`` are further settings of `LlamaConfig`."""
    torch.manual_seed(seed)
    usual = {
        "vocab_size": 49152,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{**usual, **sizes}))
