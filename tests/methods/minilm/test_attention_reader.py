"""Projections read from a layer: the attention they give equals the model's own, and nothing above gets a gradient."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
from torch import Tensor

from preceptor.errors import UserError
from preceptor.losses.attention_relations import attention_value_loss
from preceptor.methods.minilm.attention_reader import SelfAttention

SIZE = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SIZE, "num_key_value_heads": 2}
CONFIGS = {
    "bert": hf.BertConfig(**SIZE),
    "roberta": hf.RobertaConfig(**SIZE),
    "electra": hf.ElectraConfig(**SIZE, embedding_size=16),
    "llama": hf.LlamaConfig(**GROUPED),
    "llama, one key head": hf.LlamaConfig(**{**GROUPED, "num_key_value_heads": 1}),
    "mistral": hf.MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": hf.Qwen2Config(**GROUPED),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=16),
    "gemma": hf.GemmaConfig(**GROUPED, head_dim=16),
    "gemma3": hf.Gemma3TextConfig(**GROUPED, head_dim=16, query_pre_attn_scalar=24),
    "gpt2": hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0),
}


def made(config: hf.PretrainedConfig, seed: int = 0) -> hf.PreTrainedModel:
    torch.manual_seed(seed)
    return hf.AutoModel.from_config(config, attn_implementation="eager").eval()


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_projections_give_the_models_own_attention_maps(name, layer):
    model, (ids, mask) = made(CONFIGS[name]), tokens()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        told = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        reader = SelfAttention(model, layer)
        read = reader(ids, mask)
        key = read.key.repeat_interleave(read.query.shape[1] // read.key.shape[1], dim=1)
        scores = read.query @ key.transpose(-1, -2) / math.sqrt(read.query.shape[-1])
        seen = mask.bool()[:, None, None, :]
        if reader.causal:
            seen = seen & torch.ones(7, 7, dtype=torch.bool).tril()
        maps = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        assert torch.equal(reader.below(ids, mask), told.hidden_states[layer - 1])
    rows = mask.bool()[:, None, :, None]
    own = told.attentions[layer - 1]
    assert own.std() > 0.01
    torch.testing.assert_close((maps * rows), (own * rows), atol=2e-6, rtol=1e-4)
    heads, groups, width = reader.widths
    assert read.query.shape == (2, heads, 7, width)
    assert read.value.shape == (2, groups, 7, width)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_unscored_queries_and_keys_are_free_of_positions(name):
    reader = SelfAttention(made(CONFIGS[name]), 1)
    ids, mask = torch.full((1, 5), 9), torch.ones(1, 5, dtype=torch.int64)
    free, scored = reader(ids, mask, scored=False), reader(ids, mask)
    assert torch.allclose(free.query[:, :, 0], free.query[:, :, 4], atol=1e-6)
    assert not torch.allclose(scored.query[:, :, 0], scored.query[:, :, 4], atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_exactly_the_reached_parameters_learn(name):
    """Everything frozen would have got no gradient: shown on a copy whose parameters all ask for one."""
    model, (ids, mask) = made(CONFIGS[name]), tokens()
    teacher = SelfAttention(made(CONFIGS[name], seed=1))(ids, mask)
    reader = SelfAttention(model, 2)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    model.requires_grad_(True)
    attention_value_loss(reader(ids, mask), teacher, mask, causal=reader.causal).sum.backward()
    unreached = {key for key, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0}
    assert unreached == frozen
    for part in ("layer.0.", "layers.0.", "h.0.", "embed", "wte"):
        assert not any(part in key for key in frozen)
    above = [
        key for key, _ in model.named_parameters() if any(part in key for part in ("layer.2.", "layers.2.", "h.2."))
    ]
    assert above
    assert set(above) <= frozen


def test_the_last_layers_zero_gradient_list_of_a_bert():
    model = made(CONFIGS["bert"])
    SelfAttention(model)
    frozen = {
        key.removesuffix(".weight").removesuffix(".bias") for key, x in model.named_parameters() if not x.requires_grad
    }
    last = {f"encoder.layer.2.{part}" for part in ("attention.output.dense", "attention.output.LayerNorm")}
    last |= {f"encoder.layer.2.{part}" for part in ("intermediate.dense", "output.dense", "output.LayerNorm")}
    assert frozen == last | {"pooler.dense"}


def test_reading_leaves_the_model_whole():
    model, (ids, mask) = made(CONFIGS["bert"]), tokens()
    before = model(ids, attention_mask=mask).pooler_output
    names = list(model.state_dict())
    SelfAttention(model, 2)(ids, mask)
    assert torch.equal(model(ids, attention_mask=mask).pooler_output, before)
    assert list(model.state_dict()) == names


def test_a_model_with_a_head_is_read_below_it():
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert SelfAttention(model).model is model.model


def test_unknown_architectures_layers_and_short_windows_are_refused():
    unknown = hf.AutoModel.from_config(hf.BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match='"bloom".*bert.*llama'):
        SelfAttention(unknown)
    with pytest.raises(UserError, match="Layer 4 .* 3: choose 1 to 3"):
        SelfAttention(made(CONFIGS["bert"]), 4)
    short = SelfAttention(made(hf.MistralConfig(**GROUPED, sliding_window=4)))
    with pytest.raises(UserError, match="window of 4 tokens .* 7"):
        short(*tokens())
