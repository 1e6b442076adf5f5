"""The detector on power laws made by hand, with and without a departure, and the reference label on made courses."""

import math
import random

import pytest

from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.power_law import (
    NEEDED,
    PowerLawVerdict,
    WatchBounds,
    Watcher,
    constant_part,
    find_departure,
    fit_line,
    law_r_squared,
    readable,
)


def law(count, exponent=0.5, scale=2.0, noise=0.0, seed=0, every=10):
    draws = random.Random(seed)
    steps = [every * (place + 1) for place in range(count)]
    return [(step, scale * step**-exponent * math.exp(draws.gauss(0, noise))) for step in steps]


def bent(points, place, growth):
    """From a place on, every checkpoint lies higher by a further factor."""
    return [(s, v * growth ** max(0, k - place + 1)) for k, (s, v) in enumerate(points)]


def test_a_power_law_is_found_exactly():
    verdict = find_departure(law(30, exponent=0.7, scale=3.0))
    assert math.isclose(verdict.exponent, 0.7, rel_tol=1e-9)
    assert math.isclose(math.exp(verdict.intercept), 3.0, rel_tol=1e-9)
    assert math.isclose(verdict.r_squared, 1.0)
    assert math.isclose(verdict.expected(1000), 3.0 * 1000**-0.7, rel_tol=1e-9)
    assert verdict.flagged is None
    assert (verdict.fitted, verdict.judged) == (12, 18)


def test_the_fit_is_that_of_numpy():
    import numpy as np

    x, y = [0.0, 1.0, 2.5, 3.0, 4.0, 7.0], [1.0, 0.8, 0.9, 0.1, -0.4, -2.0]
    line = fit_line(x, y)
    slope, intercept = np.polyfit(x, y, 1)
    assert math.isclose(line.slope, slope, rel_tol=1e-9)
    assert math.isclose(line.intercept, intercept, rel_tol=1e-9)
    assert math.isclose(line.r_squared, np.corrcoef(x, y)[0, 1] ** 2, rel_tol=1e-9)
    left = np.asarray(y) - np.polyval([slope, intercept], x)
    assert math.isclose(line.deviation, math.sqrt((left**2).sum() / 4), rel_tol=1e-9)
    spread = ((np.asarray(x) - np.mean(x)) ** 2).sum()
    assert math.isclose(line.error(9.0), line.deviation * math.sqrt(1 + 1 / 6 + (9 - np.mean(x)) ** 2 / spread))


@pytest.mark.parametrize("growth", [1.05, 1.3, 1 / 1.05])
def test_what_leaves_the_law_is_flagged_where_it_leaves(growth):
    points = bent(law(40, noise=0.002), 25, growth)
    verdict = find_departure(points)
    assert verdict.flagged is not None
    assert points[25][0] <= verdict.flagged <= points[27][0]


def test_noise_alone_is_rarely_flagged():
    flagged = [find_departure(law(40, noise=0.05, seed=seed)).flagged is not None for seed in range(100)]
    assert sum(flagged) <= 3


def test_two_checkpoints_aside_are_no_departure():
    points = law(30, noise=0.001)
    for place in (20, 21, 25, 26):
        points[place] = (points[place][0], 2 * points[place][1])
    assert find_departure(points).flagged is None
    points[22] = (points[22][0], 2 * points[22][1])
    assert find_departure(points).flagged == points[20][0]


def test_a_certain_departure_counts_from_a_least_size_on():
    """A healthy run with little noise curves slightly: the fit is certain of it, and it does not matter."""
    points = [(step, value * (1 + step / 5000)) for step, value in law(40, noise=0.001)]
    assert find_departure(points, WatchBounds(relative=0.0)).flagged is not None
    assert find_departure(points).flagged is None
    assert find_departure(bent(points, 25, 1.1)).flagged == points[25][0]


def test_a_large_deviation_that_noise_explains_does_not_count():
    points = bent(law(30, noise=0.1), 20, 1.08)
    assert find_departure(points, WatchBounds(relative=0.4)).flagged is not None
    assert find_departure(points, WatchBounds(residual=50.0, relative=0.4)).flagged is None


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_too_few_checkpoints_give_no_verdict(count):
    verdict = find_departure(law(count))
    assert not verdict.sufficient
    assert verdict.reason.startswith("insufficient data")
    assert verdict.flagged is None
    with pytest.raises(ValueError, match="insufficient"):
        verdict.expected(10)


def test_nine_checkpoints_are_enough():
    assert find_departure(law(9)).sufficient


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_value_without_logarithm_gives_no_verdict(value):
    points = law(20)
    points[7] = (points[7][0], value)
    verdict = find_departure(points)
    assert verdict.reason.startswith("insufficient data")
    assert str(points[7][0]) in verdict.reason
    assert law_r_squared(points) is None


def test_step_0_and_doubled_steps_give_no_verdict():
    points = law(12)
    assert not find_departure([(0, 1.0), *points]).sufficient
    assert not find_departure([points[0], *points]).sufficient


def test_a_flat_proxy_is_a_law_with_exponent_0():
    verdict = find_departure([(step, 0.5) for step in range(1, 20)])
    assert verdict.exponent == pytest.approx(0, abs=1e-12)
    assert verdict.flagged is None


def test_r_squared_of_a_whole_course():
    assert law_r_squared(law(20)) == pytest.approx(1.0)
    assert law_r_squared(bent(law(20), 5, 1.3)) < 0.7
    assert law_r_squared(law(5)) is None


def test_only_the_constant_part_is_read():
    points = [(step, 1.0) for step in (0, 5, 10, 11, 50)]
    assert constant_part(points, Training(schedule="constant", warmup=10.0), 100) == points[3:]
    assert constant_part(points, Training(schedule="constant", warmup=0.1), 100) == points[3:]
    assert constant_part(points, Training(schedule="linear"), 100) == []
    assert not find_departure(constant_part(law(30), Training(schedule="cosine"), 300)).sufficient


def test_a_verdict_says_itself_in_a_sentence():
    assert (
        str(PowerLawVerdict(reason="insufficient data: 2 checkpoints"))
        == "No verdict: insufficient data: 2 checkpoints."
    )
    assert "keeps" in str(find_departure(law(20)))
    assert "from step 110 on, and lies above it" in str(find_departure(bent(law(20), 10, 1.5)))
    assert "from step 110 on, and lies below it" in str(find_departure(bent(law(20), 10, 0.7)))


def test_a_watch_that_is_taken_up_again_has_its_verdict():
    training = Training(schedule="constant", warmup=0.1)
    watcher, again = Watcher(training), Watcher(training)
    for step, proxy in bent(law(20), 12, 1.5):
        watcher.see(step, proxy, total=200)
    again.load_state_dict(watcher.state_dict())
    assert watcher.verdict.flagged is not None
    assert again.verdict == watcher.verdict


@pytest.mark.parametrize(
    ("settings", "total", "count"),
    [({}, 90, 9), ({}, 89, 9), ({}, 80, 8), ({"warmup": 0.5}, 90, 5), ({"warmup": 30.0}, 90, 6)],
)
def test_the_checkpoints_that_a_run_will_have_are_counted(settings, total, count):
    training = Training(schedule="constant", evaluate_every=10, **settings)
    assert readable(training, total) == count
    points = [(step, step**-0.5) for step in {*range(10, total, 10), total}]
    enough = find_departure(constant_part(sorted(points), training, total)).sufficient
    assert enough == (count >= NEEDED)


@pytest.mark.parametrize("settings", [{"window": 0.0}, {"window": 1.0}, {"residual": 0.0}, {"relative": -0.1}])
def test_a_watch_without_meaning_is_refused(settings):
    with pytest.raises(UserError):
        WatchBounds(**settings)
