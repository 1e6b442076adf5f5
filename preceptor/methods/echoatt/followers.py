"""Which layers share: a setting's words, and what they mean for a model."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence

from preceptor.errors import UserError
from preceptor.methods.echoatt.similarity import Similarity

FORMS = (
    "similar=12 (so many, by similarity), gap=4 (groups of 4 in the region that the largest gap shows), blocks=4 or "
    "blocks=4,skip=2 (groups of 4 after 2 skipped layers), or the followers themselves, 2,5,4,3,7"
)


Windows = Sequence[int | None]


"""Of each layer of a model how many keys back it sees, None: all. A follower must see what its leader sees."""


def check_spec(spec: str) -> re.Match[str]:
    """Raise a UserError where a setting has none of the forms in `FORMS`; else its form and its number."""
    match = re.fullmatch(r"(similar|gap|blocks)=(\d+)(?:,skip=(\d+))?|\d+(,\d+)*", spec.replace(" ", ""))
    if match is None or (match[3] and match[1] != "blocks"):
        raise UserError(f'"{spec}" does not say which layers share: give {FORMS}.')
    return match


def choose_followers(spec: str, windows: Windows, similarity: Callable[[], Similarity]) -> list[int]:
    """The followers that a setting asks for, in the order chosen.

    Args:
        spec: one of the forms in `FORMS`.
        windows: of all layers; followers that are chosen here see what their leaders see.
        similarity: measures it; called only where the choice rests on it.

    Raises:
        UserError: the setting has none of the forms, or asks for more than the model has.
    """
    match = check_spec(spec)
    if match[1] is None:
        return [int(number) for number in match[0].split(",")]
    kind, number = match[1], int(match[2])
    if kind == "similar":
        found = most_similar(similarity(), number, windows)
    else:
        first, last = shared_region(similarity()) if kind == "gap" else (int(match[3] or 0), len(windows) - 1)
        if first >= len(windows):
            raise UserError(f"skip is {first}, but the model has {len(windows)} layers: skip fewer.")
        found = in_blocks(first, last, number, windows)
    if not found:
        warnings.warn(f'With "{spec}" no layer shares: the student is the whole teacher.', stacklevel=2)
    return found


def in_blocks(first: int, last: int, size: int, windows: Windows) -> list[int]:
    """The followers when layers first..last are grouped by ``size`` and the lowest of a group computes for it.

    A layer that sees another window than its group begins a new one.
    """
    found, leader = [], first
    for layer in range(first + 1, last + 1):
        if layer - leader < size and windows[layer] == windows[leader]:
            found.append(layer)
        else:
            leader = layer
    return found


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


def most_similar(similarity: Similarity, count: int, windows: Windows) -> list[int]:
    """The ``count`` followers whose similarities to the layers they copy from have the largest sum.

    A follower copies from the nearest computing layer below, so a choice cuts the layers into groups whose lowest
    computes. The best of all cuts is found exactly: best(g, e) = max over s of best(g - 1, s) + the sum of S of layers
    s + 1..e - 1 with layer s, which must all see the same window.

    Raises:
        UserError: the model has not so many layers, or not so many that see what a layer below them sees.
    """
    cosines, layers = similarity.cosines, len(similarity.cosines)
    if not 0 <= count < layers:
        raise UserError(f"{count} followers do not fit a model of {layers} layers: choose 0 to {layers - 1}.")
    best: list[tuple[float, tuple[int, ...]]] = [(-math.inf, ())] * (layers + 1)
    best[0] = (0.0, ())
    for _ in range(layers - count):
        longer: list[tuple[float, tuple[int, ...]]] = [(-math.inf, ())] * (layers + 1)
        for end in range(1, layers + 1):
            # From the layer below upwards, for as long as all see the same.
            for start in range(end - 1, -1, -1):
                if windows[start] != windows[end - 1]:
                    break
                gain = math.fsum(cosines[layer][start] for layer in range(start + 1, end))
                longer[end] = max(longer[end], (best[start][0] + gain, (*best[start][1], start)))
        best = longer
    if best[layers][0] == -math.inf:
        groups = 1 + sum(one != other for one, other in zip(windows, windows[1:]))
        raise UserError(
            f"{count} followers do not fit: the model's windows change from layer to layer so that at most "
            f"{layers - groups} of its {layers} layers can follow; choose fewer."
        )
    return [layer for layer in range(layers) if layer not in best[layers][1]]


def block_ends(followers: list[int]) -> tuple[int, ...]:
    """The last layer of each group of layers that share a matrix."""
    from preceptor.models.shared_attention.config import leaders_of

    leaders = leaders_of(followers)
    return tuple(sorted({leader: layer for layer, leader in sorted(leaders.items())}.values()))
