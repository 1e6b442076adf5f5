"""The similarity of layers as a picture for a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from preceptor.methods.echoatt.similarity import Similarity
from preceptor.report.figures import INK, bare, blank, save


def draw_similarity(folder: Path, similarity: Similarity, followers: Sequence[int]) -> None:
    """Write the map of S, the layers' means over their floor, and a caption; nothing without matplotlib.

    Args:
        folder: the run's ``pictures``; it is made.
        similarity: what was measured.
        followers: the layers that share, each marked at the layer that it copies from.
    """
    from preceptor.models.shared_attention.config import leaders_of

    if (figure := blank(8.4, 3.8)) is None:
        return
    layers, leaders = range(len(similarity.cosines)), leaders_of(followers)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    image = left.imshow(similarity.cosines, vmin=0, vmax=1, cmap="viridis", origin="lower")
    scale = figure.colorbar(image, ax=left, shrink=0.85)
    left.scatter(list(leaders.values()), list(leaders), s=9, color="white", edgecolors=INK, linewidths=0.5)
    left.set_xlabel("layer", fontsize=8, color=INK)
    left.set_ylabel("layer", fontsize=8, color=INK)
    right.bar(layers, similarity.means, color=["#9ecae1" if layer in leaders else "#08519c" for layer in layers])
    right.plot(layers, similarity.floor, color="#d95f0e", linewidth=1.2)
    right.set_xlabel("layer", fontsize=8, color=INK)
    right.set_ylim(0, 1)
    for axes in (left, right, scale.ax):
        bare(axes)
    caption = (
        "Cosine of the layers' attention matrices (left; a white point marks the layer that a follower copies from), "
        "and each layer's mean with all others (right; light: followers). The line is the cosine with a matrix that "
        f"spreads attention evenly. Mean over {similarity.texts} texts."
    )
    save(figure, folder / "similarity.png", caption)
