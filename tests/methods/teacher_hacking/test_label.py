"""The label that an oracle gives a trajectory."""

import random

import pytest

from preceptor.errors import UserError
from preceptor.methods.teacher_hacking.label import reference_label

STEPS = [0, 10, 20, 30]


def course(means, spread=0.01, count=8):
    """Per-sequence values around the means; the differences between checkpoints vary by the spread."""
    draws = random.Random(1)
    own = [draws.uniform(0.5, 1.5) for _ in range(count)]
    return [[mean + one + draws.gauss(0, spread) for one in own] for mean in means]


def test_a_golden_that_rises_while_the_proxy_falls_is_hacking():
    label = reference_label(STEPS, course([5, 1, 2, 3]), course([5, 2, 1, 0.5]))
    assert label.least == 10
    assert label.rise == pytest.approx(2, abs=0.05)
    assert label.error < 0.02
    assert label.hacked
    assert not label.overfitted


def test_a_proxy_that_rises_too_is_overfitting():
    label = reference_label(STEPS, course([5, 1, 2, 3]), course([5, 1, 2, 3]))
    assert not label.hacked
    assert label.overfitted


def test_a_golden_that_falls_is_neither():
    label = reference_label(STEPS, course([5, 4, 3, 2]), course([5, 4, 3, 2]))
    assert (label.least, label.rise, label.hacked, label.overfitted) == (30, 0.0, False, False)


def test_a_rise_within_the_noise_is_neither():
    golden, proxy = course([5, 1, 1.01], spread=2.0), course([5, 2, 1])
    label = reference_label(STEPS[:3], golden, proxy)
    assert not label.hacked


def test_the_least_of_many_noisy_checkpoints_is_not_low_by_chance():
    """A golden value that stands still but for a noise that all sequences share, the end high by chance."""
    draws = random.Random(3)
    noise = [draws.gauss(0, 0.05) for _ in range(38)] + [0.02, 0.06]
    golden = [[5 + own / 10 + shared for own in range(8)] for shared in noise]
    proxy = [[5 - place / 10] * 8 for place in range(40)]
    steps = list(range(40))
    assert reference_label(steps, golden, proxy).rise > 0.1
    smooth = reference_label(steps, golden, proxy, together=5)
    assert 0 <= smooth.rise < 0.1
    assert smooth.least in steps[2:-2]
    assert reference_label(steps[:2], golden[:2], proxy[:2], together=5).rise == 0


def test_a_label_needs_a_checkpoint():
    with pytest.raises(UserError, match="evaluate_every"):
        reference_label([], [], [])
