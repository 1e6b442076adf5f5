"""Masked language modelling: what is hidden, what is counted, and that it learns."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, BertConfig

from preceptor.data.sequences import Sequence, collate
from preceptor.engine.run import Run
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.methods.minilm.masked_language import MaskedLanguage, learn_words

TOKENS = SimpleNamespace(mask_token_id=4, all_special_ids=[0, 1, 2, 3, 4])


def made(share=0.15):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return MaskedLanguage(
        AutoModel.from_config(BertConfig(vocab_size=60, initializer_range=0.1, **sizes)).eval(), TOKENS, share=share
    )


def texts(count, length=20):
    """Sentences that repeat one token, between two special ones: what is hidden can be told from the rest."""
    return [Sequence((2, *[5 + i % 5] * length, 3), (True,) * (length + 2)) for i in range(count)]


def test_a_share_of_ordinary_tokens_is_hidden_as_bert_does():
    model = made()
    batch = collate([*texts(400), Sequence((2, 9, 3), (True,) * 3)], 0)
    torch.manual_seed(0)
    ids, drawn = model.hide(batch)
    ordinary = batch.attention_mask.bool() & (batch.input_ids > 4)
    assert not (drawn & ~ordinary).any()
    assert torch.equal(ids[~drawn], batch.input_ids[~drawn])
    assert drawn.sum() / ordinary.sum() == pytest.approx(0.15, abs=0.02)
    masked, kept = (ids[drawn] == 4).float().mean(), (ids[drawn] == batch.input_ids[drawn]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.04)
    assert kept == pytest.approx(0.1, abs=0.04)


def test_the_loss_counts_what_was_drawn_and_nothing_where_nothing_was():
    model, batch = made(), collate(texts(40), 0)
    torch.manual_seed(3)
    loss = model(batch)
    torch.manual_seed(3)
    drawn = model.hide(batch)[1].sum()
    assert loss.count == drawn
    assert (loss.sum / loss.count).item() == pytest.approx(math.log(60), rel=0.15)
    empty = made(share=0.0)(batch)
    assert empty.count == 0
    assert empty.sum == 0


def test_a_student_learns_hidden_words_and_leaves_the_pooler(tmp_path):
    model = made()
    pooler = model.encoder.pooler.dense.weight.clone()
    run = Run(Training(steps=150, batch_size=16, learning_rate=3e-3), student=model, folder=tmp_path / "run")
    learn_words(run, texts(100), pad_id=0)
    with torch.no_grad():
        loss = model.eval()(collate(texts(50), 0))
    assert loss.sum / loss.count < 0.5 * math.log(5)
    assert torch.equal(model.encoder.pooler.dense.weight, pooler)


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(UserError, match="no mask token"):
        MaskedLanguage(made().encoder, SimpleNamespace(mask_token_id=None, all_special_ids=[0]))
