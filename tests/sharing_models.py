"""Small models of every family whose attention can be shared, with random weights."""

import copy

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOCAL = ["sliding_attention"] * 4 + ["full_attention"] * 2


def llama(**more: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "attention_bias": True, **more}))


def mistral() -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=7))


def qwen2() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}))


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL))


def gemma3() -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, layer_types=LOCAL, sliding_window=7, query_pre_attn_scalar=9))


FAMILIES = [llama, mistral, qwen2, qwen3, gemma3]


def made(make: object, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = make().eval()  # type: ignore[operator]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def some_ids(rows: int = 2, length: int = 23) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def maps(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager(input_ids=ids, output_attentions=True).attentions
