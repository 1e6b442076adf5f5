"""Bodies without a head: made fresh in the teacher's image, given plain text, saved and loaded."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, Qwen3Config

from preceptor.errors import UserError
from preceptor.methods.minilm.encoders import load_body, make_body, save_body
from preceptor.methods.minilm.texts import encode_texts, padding_id, read_texts, split_texts


@pytest.fixture(scope="module")
def tokenizer():
    return load_body("minilm-l6")[1]


def like(config):
    return AutoModel.from_config(config)


SMALL = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}


def test_a_fresh_body_has_the_sizes_asked_for_and_the_teachers_proportions(tokenizer):
    made = make_body("fresh:layers=2,hidden=16", like(BertConfig(**SMALL)), tokenizer, dropout=0.25, seed=0)
    config = made.config
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert sizes == (2, 16, 4, 32)
    assert (config.vocab_size, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (90, 0.25, 0.25)


def test_grouped_and_fused_kinds_are_made_too(tokenizer):
    llama = like(LlamaConfig(**SMALL, num_key_value_heads=2))
    made = make_body("fresh:layers=2,hidden=24,heads=6,kv_heads=3", llama, tokenizer, dropout=0, seed=0)
    assert made.layers[1].self_attn.k_proj.weight.shape == (12, 24)
    qwen = like(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16))
    made = make_body("fresh:layers=3,hidden=24,heads=2", qwen, tokenizer, dropout=0, seed=0)
    assert made.config.head_dim == 12
    assert len(made.config.layer_types) == 3
    gpt2 = like(GPT2Config(vocab_size=90, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0))
    made = make_body("fresh:layers=2,hidden=16", gpt2, tokenizer, dropout=0, seed=0)
    assert made.h[1].mlp.c_fc.weight.shape == (16, 64)
    for model in (llama, qwen, gpt2, made):
        assert model(torch.ones(1, 3, dtype=torch.int64)).last_hidden_state.isfinite().all()


def test_the_seed_decides_the_weights_and_torchs_own_generator_is_left(tokenizer):
    teacher = like(BertConfig(**SMALL))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, third = (
        make_body("fresh:layers=1,hidden=8", teacher, tokenizer, dropout=0, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.get_input_embeddings().weight for model in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("fresh:", "its settings are layers, hidden"),
        ("fresh:layers=2", "without layers or hidden"),
        ("fresh:layers=2,hidden=x", "hidden width is x; it must be a whole number"),
        ("fresh:layers=2,hidden=16,depth=3", "its settings are layers, hidden"),
        ("fresh:layers=2,hidden=18", "multiple of the 4 heads"),
        ("fresh:layers=0,hidden=16", "layers is 0; it must be a whole number of at least 1"),
    ],
)
def test_a_specification_that_does_not_fit_is_refused(spec, sentence, tokenizer):
    with pytest.raises(UserError, match=sentence):
        make_body(spec, like(BertConfig(**SMALL)), tokenizer, dropout=0, seed=0)


def test_rotary_heads_of_an_odd_width_are_refused(tokenizer):
    with pytest.raises(UserError, match="even width, and theirs is 3"):
        make_body("fresh:layers=1,hidden=12", like(LlamaConfig(**SMALL)), tokenizer, dropout=0, seed=0)


def test_texts_are_distinct_cut_and_split_the_same_each_time(tmp_path, tokenizer):
    rows = [{"text": f"Sentence number {i % 30} of some."} for i in range(60)]
    rows.append(
        {"messages": [{"role": "user", "content": "A question."}, {"role": "assistant", "content": "An answer."}]}
    )
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = read_texts(str(path))
    assert len(listed) == len(set(listed)) == 31
    assert "A question.\nAn answer." in listed
    assert read_texts(str(path)) == listed
    assert read_texts(str(path), limit=7) == listed[:7]
    texts = split_texts(listed, tokenizer, max_length=5, held_out=11)
    assert (len(texts.lessons), len(texts.exam), texts.pad) == (20, 11, tokenizer.pad_token_id)
    assert all(len(one.ids) == 5 and one.ids[0] == tokenizer.cls_token_id for one in texts.exam)
    assert not {one.ids for one in texts.exam} & {
        one.ids for one in encode_texts(listed[11:], tokenizer, max_length=64)
    }
    with pytest.raises(UserError, match="31 of 31 texts are held out"):
        split_texts(listed, tokenizer, max_length=5, held_out=31)


def test_a_saved_body_loads_as_it_was(tmp_path, tokenizer):
    model = like(BertConfig(**{**SMALL, "vocab_size": 30522})).eval()
    save_body(tmp_path / "student", model, tokenizer, {"teacher": "minilm-l6"})
    again, theirs = load_body(str(tmp_path / "student"))
    ids = torch.tensor([encode_texts(["A sentence."], tokenizer, max_length=8)[0].ids])
    assert torch.equal(model(ids).last_hidden_state, again(ids).last_hidden_state)
    assert padding_id(theirs) == padding_id(tokenizer)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "| teacher | minilm-l6 |" in card
    assert "feature-extraction" in card
