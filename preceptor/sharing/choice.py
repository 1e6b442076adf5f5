"""Which layers share: a setting's words, and what they mean for a model."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable

from preceptor.errors import UserError
from preceptor.sharing.config import leaders_of
from preceptor.sharing.similarity import Similarity

FORMS = (
    "similar=12 (so many, by similarity), gap=4 (groups of 4 in the region that the largest gap shows), blocks=4 or "
    "blocks=4,skip=2 (groups of 4 after 2 skipped layers), or the followers themselves, 2,5,4,3,7"
)


def choose_followers(spec: str, layers: int, similarity: Callable[[], Similarity]) -> tuple[list[int], int]:
    """The followers that a setting asks for, in the order chosen, and how many layers b are skipped before the first.

    Args:
        spec: one of the forms in `FORMS`.
        layers: of the model.
        similarity: measures it; called only where the choice rests on it.

    Raises:
        UserError: the setting has none of the forms, or asks for more than the model has.
    """
    spec = spec.replace(" ", "")
    if re.fullmatch(r"\d+(,\d+)*", spec):
        chosen = [int(number) for number in spec.split(",")]
        return chosen, min(chosen) - 1
    match = re.fullmatch(r"(similar|gap|blocks)=(\d+)(?:,skip=(\d+))?", spec)
    if match is None or (match[3] and match[1] != "blocks"):
        raise UserError(f'"{spec}" does not say which layers share: give {FORMS}.')
    kind, number = match[1], int(match[2])
    if kind == "similar":
        chosen = most_similar(similarity(), number)
        return chosen, min(chosen, default=1) - 1
    first, last = shared_region(similarity()) if kind == "gap" else (int(match[3] or 0), layers - 1)
    if first >= layers:
        raise UserError(f"skip is {first}, but the model has {layers} layers: skip fewer.")
    if number < 2:
        warnings.warn(f"Groups of {number} share nothing: give 2 layers or more a group.", stacklevel=2)
        return [], first
    return in_blocks(first, last, number), first


def in_blocks(first: int, last: int, size: int) -> list[int]:
    """The followers when layers first..last are grouped by ``size`` and the lowest of a group computes for it."""
    return [layer for layer in range(first, last + 1) if (layer - first) % size]


def shared_region(similarity: Similarity) -> tuple[int, int]:
    """The first and last layer of the region to share: sorted s_i are cut at their largest gap.

    Layers below the cut compute their own attention where they are the model's first or last ones without a break;
    one that stands alone among similar layers is shared with them.
    """
    means = similarity.means
    ranked = sorted(means)
    gaps = [high - low for low, high in zip(ranked, ranked[1:])]
    cut = ranked[gaps.index(max(gaps))] if gaps else -math.inf
    low = [mean <= cut for mean in means]
    return low.index(False), len(low) - 1 - low[::-1].index(False)


def most_similar(similarity: Similarity, count: int) -> list[int]:
    """The ``count`` followers whose similarities to the layers they copy from have the largest sum.

    A follower copies from the nearest computing layer below, so a choice cuts the layers into groups whose lowest
    computes. The best of all cuts is found exactly: best(g, e) = max over s of best(g - 1, s) + the sum of S of layers
    s + 1..e - 1 with layer s.

    Raises:
        UserError: the model has not so many layers.
    """
    cosines, layers = similarity.cosines, len(similarity.cosines)
    if not 0 <= count < layers:
        raise UserError(f"{count} followers do not fit a model of {layers} layers: choose 0 to {layers - 1}.")
    best: list[tuple[float, tuple[int, ...]]] = [(-math.inf, ())] * (layers + 1)
    best[0] = (0.0, ())
    for _ in range(layers - count):
        longer: list[tuple[float, tuple[int, ...]]] = [(-math.inf, ())] * (layers + 1)
        for end in range(1, layers + 1):
            for start in range(end):
                gain = math.fsum(cosines[layer][start] for layer in range(start + 1, end))
                longer[end] = max(longer[end], (best[start][0] + gain, (*best[start][1], start)))
        best = longer
    return [layer for layer in range(layers) if layer not in best[layers][1]]


def block_ends(followers: list[int]) -> tuple[int, ...]:
    """The last layer of each group of layers that share a matrix."""
    leaders = leaders_of(followers)
    return tuple(sorted({leader: layer for layer, leader in sorted(leaders.items())}.values()))
