"""Exact sources against brute force: tables looked up, paths of hidden states enumerated, frequencies of draws."""

import itertools
import math

import pytest
import torch

from preceptor.errors import UserError
from preceptor.methods.teacher_hacking.markov_sources import (
    HiddenMarkovSource,
    MarkovSource,
    draw,
    log_probs,
    make_source,
)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_markov_source_is_its_table(order):
    source = MarkovSource(order=order, vocabulary=3, concentration=0.7, seed=1)
    ids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    told = log_probs(source, ids)
    assert told.shape == (81, 5, 3)
    for row, sequence in enumerate(ids.tolist()):
        for place in range(5):
            for symbol in range(3):
                if place < order:
                    expected = 1 / 3
                else:
                    context = 0
                    for earlier in sequence[place - order : place]:
                        context = 3 * context + earlier
                    expected = float(source.table[context, symbol].exp())
                assert math.isclose(float(told[row, place, symbol].exp()), expected, rel_tol=1e-12)


def test_the_forward_algorithm_is_the_sum_over_all_paths():
    source = HiddenMarkovSource(states=3, vocabulary=4, concentration=0.5, seed=2)
    start, walk, emit = source.initial[0].tolist(), source.walk.tolist(), source.emit.tolist()

    def probability(symbols):
        total = 0.0
        for path in itertools.product(range(3), repeat=len(symbols)):
            one = 1.0
            for place, (state, symbol) in enumerate(zip(path, symbols)):
                one *= (start[state] if place == 0 else walk[path[place - 1]][state]) * emit[state][symbol]
            total += one
        return total

    for sequence in ([], [0], [3, 1], [2, 2, 0], [1, 3, 0, 2]):
        told = log_probs(source, torch.tensor([sequence], dtype=torch.int64).reshape(1, len(sequence)))[0, -1].exp()
        for symbol in range(4):
            expected = probability([*sequence, symbol]) / probability(sequence)
            assert math.isclose(float(told[symbol]), expected, rel_tol=1e-10)


def test_a_sticky_state_stays_unless_it_is_drawn_anew():
    plain, sticky = (make_source(f"hmm:states=3,vocabulary=4,stickiness={kappa}", seed=6) for kappa in (0, 0.75))
    assert torch.allclose(sticky.walk, 0.75 * torch.eye(3, dtype=torch.float64) + 0.25 * plain.walk)
    assert torch.equal(sticky.emit, plain.emit)
    assert torch.equal(sticky.initial, plain.initial)


@pytest.mark.parametrize("spec", ["markov:order=2,vocabulary=5", "hmm:states=4,vocabulary=5"])
def test_every_prefix_has_a_distribution(spec):
    source = make_source(spec, seed=3)
    told = log_probs(source, draw(source, torch.empty(7, 0, dtype=torch.int64), 9))
    assert told.dtype == torch.float64
    assert torch.allclose(told.exp().sum(-1), torch.ones(7, 10, dtype=torch.float64), atol=1e-12)
    assert torch.isfinite(told).all()


@pytest.mark.parametrize("spec", ["markov:order=1,vocabulary=3", "hmm:states=2,vocabulary=3"])
def test_draws_have_the_probabilities_that_are_told(spec):
    source, count = make_source(spec, seed=4), 20_000
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([[0, 1]]).expand(count, 2)
    drawn = draw(source, prompts, 2, generator)
    for first, second in itertools.product(range(3), repeat=2):
        told = log_probs(source, torch.tensor([[0, 1, first]]))[0]
        expected = float((told[2, first] + told[3, second]).exp())
        seen = float(((drawn[:, 0] == first) & (drawn[:, 1] == second)).double().mean())
        assert abs(seen - expected) < 5 * math.sqrt(expected * (1 - expected) / count) + 1e-9


def test_a_seed_decides_the_source_and_the_draws():
    one, same, other = (make_source("hmm:states=3,vocabulary=6", seed=seed) for seed in (5, 5, 6))
    empty = torch.empty(4, 0, dtype=torch.int64)
    draws = [draw(source, empty, 8, torch.Generator().manual_seed(1)) for source in (one, same)]
    assert torch.equal(*draws)
    assert not torch.equal(one.emit, other.emit)


def test_a_tiny_concentration_stays_finite():
    source = MarkovSource(order=1, vocabulary=8, concentration=1e-3, seed=0)
    assert torch.isfinite(source.table).all()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("markov:order=-1", "order"),
        ("markov:order=9,vocabulary=64", "probabilities"),
        ("hmm:states=0", "states"),
        ("hmm:vocabulary=1", "symbols"),
        ("hmm:concentration=0", "concentration"),
        ("hmm:stickiness=1", "stickiness"),
        ("hmm:stickiness=-0.1", "stickiness"),
        ("markov:stickiness=0.5", "not a source"),
        ("hmm:order=2", "not a source"),
        ("markov:order=two", "not a source"),
        ("table:size=3", "not a source"),
    ],
)
def test_what_is_no_source_is_refused(spec, said):
    with pytest.raises(UserError, match=said):
        make_source(spec, seed=0)


def test_a_foreign_symbol_is_refused():
    with pytest.raises(UserError, match="id 5"):
        log_probs(make_source("hmm:states=2,vocabulary=5", seed=0), torch.tensor([[1, 5]]))
