"""How a cache encodes: the coder is exact, and every kind stays within its stated error."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings, strategies as st

from preceptor.cache import Wanted
from preceptor.cache.choice import choose, fit, measure
from preceptor.cache.codecs import decode, encode
from preceptor.cache.decoding_error import LogProbs, kl_to_hidden
from preceptor.cache.hidden import HiddenCodec
from preceptor.cache.rans import Decoder, RansEncoder, Tables, quantise_frequencies
from preceptor.cache.soft import kl_to_topk, level_of, log_p_of, sampled_rows, sampled_targets, topk_rows, topk_targets
from preceptor.cache.sparse import SparseRows, fit_sparse
from preceptor.data.sequences import Sequence
from preceptor.knowledge import Head, HiddenTargets
from preceptor.models.language_model import LanguageModel
from tests.cache_models import KINDS, VOCABULARY, exact


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 30))
def test_streams_give_back_what_was_pushed(seed: int, lanes: int, steps: int) -> None:
    draw = np.random.default_rng(seed)
    tables = Tables.of(quantise_frequencies(draw.dirichlet(np.full(20, 0.2), size=4) + 1e-9))
    model, symbol = draw.integers(0, 4, (steps, lanes)), draw.integers(0, 20, (steps, lanes))
    bits = draw.integers(0, 17, (steps, lanes))
    raw = draw.integers(0, 1 << 16, (steps, lanes)) & ((1 << bits) - 1)
    encoder = RansEncoder(lanes, 4)
    for step in reversed(range(steps)):
        encoder.push_raw(raw[step], bits[step])
        encoder.push(tables, model[step], symbol[step])
    words, lengths = encoder.finish()
    decoder = Decoder(words, lengths)
    for step in range(steps):
        assert (decoder.pull(tables, model[step]) == symbol[step]).all()
        assert (decoder.pull_raw(bits[step]) == raw[step]).all()


def test_streams_are_within_two_words_of_the_entropy() -> None:
    draw = np.random.default_rng(0)
    tables = Tables.of(quantise_frequencies(draw.dirichlet(np.full(30, 0.3), size=1) + 1e-9))
    p = tables.frequencies[0] / tables.frequencies[0].sum()
    symbol = draw.choice(30, size=(400, 50), p=p)
    encoder = RansEncoder(50, 4)
    for row in symbol[::-1]:
        encoder.push(tables, np.zeros(50, np.int64), row)
    _, lengths = encoder.finish()
    assert (16 * lengths - tables.bits()[0, symbol].sum(0)).max() < 32


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 500]))
def test_sparse_rows_come_back_as_sets(seed: int, limit: int) -> None:
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 30, 25)
    ids = np.stack([draw.permutation(997)[:30] for _ in counts])
    levels = draw.integers(0, 500, ids.shape)
    rows = SparseRows(ids, levels, counts, draw.integers(0, 90, 25))
    codec = fit_sparse(rows, draw.random(997), limit=limit)
    back = codec.decode(*codec.encode(rows))
    assert (back.counts == counts).all()
    assert (back.extra == rows.extra).all()
    for row, count in enumerate(counts):
        assert dict(zip(back.ids[row, :count], back.levels[row, :count])) == dict(
            zip(ids[row, :count], levels[row, :count])
        )


def test_levels_round_within_their_width() -> None:
    log_p = -torch.rand(5000) * 20
    error = (log_p_of(level_of(log_p)) - log_p).abs()
    assert (error <= 0.5 * torch.clamp(0.05 * torch.exp(-log_p / 2), max=0.5) * 1.3 + 1e-4).all()


def test_topk_keeps_the_smallest_set_and_exact_masses() -> None:
    torch.manual_seed(0)
    log_p = (torch.randn(200, VOCABULARY) * 3).log_softmax(-1)
    rows = topk_rows(LogProbs.from_logits(log_p), k=50, mass=0.9, floor=0.0)
    ordered = log_p.exp().sort(descending=True).values.cumsum(-1)
    least = (ordered < 0.9).sum(-1) + 1
    assert (torch.from_numpy(rows.counts) == least.clamp_max(50)).all()
    targets = topk_targets(rows)
    listed = targets.log_probs.exp().sum(-1)
    truth = torch.stack([log_p[row, targets.ids[row, : rows.counts[row]]].exp().sum() for row in range(200)])
    # The tail's mass is rounded to a level; the listed tokens hold the rest exactly.
    tail = log_p_of(torch.from_numpy(rows.extra)).exp()
    assert torch.allclose(listed + tail, torch.ones(200), atol=1e-6)
    assert ((1 - truth).log() - tail.log()).abs().max() < 0.3
    assert (
        topk_rows(LogProbs.from_logits(log_p), k=50, mass=1.0, floor=0.01).counts
        == (log_p.exp() >= 0.01).sum(-1).numpy()
    ).all()


def test_kl_to_topk_is_that_of_the_dense_distribution() -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(40, 16), Head(torch.randn(VOCABULARY, 16))
    teacher = LogProbs.of(hidden, head)
    targets = topk_targets(topk_rows(teacher, k=12, mass=1.0, floor=1e-4))
    dense = torch.zeros(40, VOCABULARY, dtype=torch.float64)
    for row in range(40):
        used = targets.log_probs[row] > -torch.inf
        p = targets.log_probs[row, used].double().exp()
        dense[row] = (1 - p.sum()) / (VOCABULARY - used.sum())
        dense[row, targets.ids[row, used]] = p
    log_p = teacher.logits.double().log_softmax(-1)
    assert torch.allclose(
        kl_to_topk(teacher, targets).double(), (log_p.exp() * (log_p - dense.log())).sum(-1), atol=1e-4
    )


def test_samples_are_unbiased_and_sum_to_one() -> None:
    torch.manual_seed(2)
    p = (torch.randn(1, 60) * 2).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws, runs = 16, 4000
    every = sampled_targets(sampled_rows(p.expand(runs, -1), draws, torch.rand(runs, generator=generator)), draws)
    assert torch.allclose(every.weights.sum(-1), torch.ones(runs))
    dense = torch.zeros(runs, 60).scatter_add_(1, every.ids, every.weights)
    total, square = dense.mean(0), dense.var(0)
    # Six standard errors, for each of 60 tokens; and far less variance than independent draws have.
    assert ((total - p[0]).abs() <= 6 * (square / runs).sqrt() + 1e-6).all()
    assert square.sum() < 0.5 * (p[0] * (1 - p[0]) / draws).sum()


def test_hidden_rows_stay_within_the_tolerance() -> None:
    torch.manual_seed(3)
    head = Head(torch.randn(VOCABULARY, 24) * 0.6, bias=torch.randn(VOCABULARY), scale=0.7, softcap=20.0)
    states = torch.randn(1200, 24) @ torch.diag(torch.logspace(0.5, -1.5, 24)) @ torch.randn(24, 24)
    codec = fit("hidden", states[:1000], head, Wanted(20, 64, tolerance=0.003))
    assert isinstance(codec, HiddenCodec)
    encoded = encode(codec, states[1000:], head, torch.zeros(200))
    read = decode(codec, encoded.words, encoded.lengths, head)
    assert isinstance(read, HiddenTargets)
    kl = kl_to_hidden(LogProbs.of(states[1000:], head), torch.arange(200), read.hidden, head)
    assert kl.max() <= 0.003 * 1.01
    assert kl.mean() > 0.0005
    assert torch.allclose(kl, encoded.kl, atol=1e-6)
    p, q = (
        ((torch.tanh(0.7 * (h @ head.weight.T + head.bias) / 20) * 20).double().log_softmax(-1))
        for h in (states[1000:], read.hidden)
    )
    assert torch.allclose(kl.double(), (p.exp() * (p - q)).sum(-1), atol=1e-5)


def test_hidden_states_far_from_the_sample_come_back() -> None:
    torch.manual_seed(4)
    head = Head(torch.randn(VOCABULARY, 16))
    codec = fit("hidden", torch.randn(800, 16) * 0.01, head, Wanted(20, 64, tolerance=0.01))
    far = torch.randn(50, 16) * 3
    encoded = encode(codec, far, head, torch.zeros(50))
    assert encoded.kl.max() <= 0.0101
    read = decode(codec, encoded.words, encoded.lengths, head)
    assert torch.allclose(
        kl_to_hidden(LogProbs.of(far, head), torch.arange(50), read.hidden, head), encoded.kl, atol=1e-5
    )


def test_more_bytes_are_nearer(teacher: LanguageModel, sequences: list[Sequence]) -> None:
    states, head = exact(teacher, sequences), teacher.head.__class__(teacher.head.weight.detach())
    for kind in KINDS:
        small, large = (measure(fit(kind, states, head, Wanted(size, 128)), states, head) for size in (12, 36))
        assert small.bytes < 1.3 * 12
        assert large.bytes < 1.3 * 36
        assert large.kl < small.kl


def test_the_choice_is_the_nearest_and_says_why(teacher: LanguageModel, sequences: list[Sequence]) -> None:
    states, head = exact(teacher, sequences), Head(teacher.head.weight.detach())
    codec, sentence = choose(states, head, Wanted(40, 64))
    assert isinstance(codec, HiddenCodec)
    assert sentence.startswith("Chosen: hidden")
    assert "top_k" in sentence
    # Two hundred directions that all matter do not fit in ten bytes, a few likely tokens do.
    wide = Head(torch.randn(VOCABULARY, 200) * 0.25)
    assert not isinstance(choose(torch.randn(900, 200), wide, Wanted(10, 64))[0], HiddenCodec)
