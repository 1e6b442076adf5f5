"""Sentence vectors: pooling, rank agreement and the probe against figures that are known."""

from __future__ import annotations

import pytest
import torch

from preceptor.errors import UserError
from preceptor.evaluation.probing import mean_pool, probe_accuracy, random_pairs, rank_agreement


def test_pooling_averages_real_positions_only():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]], [[5.0, 6.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(mean_pool(hidden, mask), torch.tensor([[2.0, 3.0], [5.0, 6.0]]))
    assert torch.equal(mean_pool(hidden, torch.zeros(2, 3)), torch.zeros(2, 2))


def test_rank_agreement_is_one_for_the_same_order_and_minus_one_for_the_opposite():
    angles = torch.tensor([0.0, 0.1, 0.3, 0.7])
    ours = torch.stack([angles.cos(), angles.sin()], dim=1)
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3]])
    assert rank_agreement(ours, 5 * ours, pairs) == pytest.approx(1)
    turned = torch.stack(
        [torch.cat([angles[:1], 1 - angles[1:]]).cos(), torch.cat([angles[:1], 1 - angles[1:]]).sin()], dim=1
    )
    assert rank_agreement(ours, turned, pairs) == pytest.approx(-1)
    mixed = ours[[0, 2, 1, 3]]
    assert rank_agreement(ours, mixed, pairs) == pytest.approx(0.5)


def test_rank_agreement_refuses_vectors_of_other_sequences_and_too_few_pairs():
    with pytest.raises(UserError, match="4 and 3 vectors"):
        rank_agreement(torch.randn(4, 2), torch.randn(3, 2), torch.tensor([[0, 1]] * 3))
    with pytest.raises(UserError, match="2 pairs"):
        rank_agreement(torch.randn(4, 2), torch.randn(4, 2), torch.tensor([[0, 1]] * 2))


def test_random_pairs_are_of_two_different_rows_and_the_same_each_time():
    pairs = random_pairs(500, 7)
    assert pairs.shape == (500, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert set(pairs.flatten().tolist()) == set(range(7))
    assert torch.equal(pairs, random_pairs(500, 7))
    assert not torch.equal(pairs, random_pairs(500, 7, seed=1))


def test_the_probe_reads_a_linear_label_and_no_label_that_is_not_there():
    source = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 5, generator=source)
    labels = ["up" if value > 0 else "down" for value in vectors[:, 2]]
    assert probe_accuracy(vectors[:200], labels[:200], vectors[200:], labels[200:]) > 0.95
    noise = ["up" if value > 0.5 else "down" for value in torch.rand(400, generator=source)]
    assert 0.35 < probe_accuracy(vectors[:200], noise[:200], vectors[200:], noise[200:]) < 0.65
