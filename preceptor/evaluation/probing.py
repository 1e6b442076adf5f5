"""What sentence vectors are good for: they rank pairs as a teacher's do, and a linear map reads a label off them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from preceptor.errors import UserError


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the hidden states (B, T, D) at real positions, mask (B, T): one vector a sequence, (B, D)."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def rank_agreement(ours: Tensor, theirs: Tensor, pairs: Tensor) -> float:
    """Spearman's correlation of two models' cosine similarities over the same pairs of sequences.

    Args:
        ours: one model's vectors, (N, D).
        theirs: the other's, (N, D'); widths may differ.
        pairs: (P, 2) int64, row numbers.

    Raises:
        UserError: different numbers of vectors, or fewer than three pairs.
    """
    from scipy.stats import spearmanr

    if len(ours) != len(theirs) or len(pairs) < 3:
        raise UserError(
            f"Rank agreement needs vectors of the same sequences and at least 3 pairs, and got {len(ours)} and "
            f"{len(theirs)} vectors and {len(pairs)} pairs."
        )
    first, second = (
        torch.cosine_similarity(vectors[pairs[:, 0]], vectors[pairs[:, 1]], dim=-1).float().numpy()
        for vectors in (ours, theirs)
    )
    return float(spearmanr(first, second).statistic)


def random_pairs(count: int, among: int, seed: int = 0) -> Tensor:
    """``count`` pairs of two different row numbers below ``among``, drawn uniformly: (count, 2) int64."""
    draw = np.random.default_rng(seed)
    first = draw.integers(0, among, count)
    return torch.from_numpy(np.stack([first, (first + draw.integers(1, among, count)) % among], axis=1))


def probe_accuracy(known: Tensor, labels: list[str], asked: Tensor, answers: list[str]) -> float:
    """Share of ``asked`` vectors (M, D) whose label a logistic regression on ``known`` vectors (N, D) tells.

    Vectors are standardised by the mean and spread of the known ones; the penalty is L2 with C = 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(known.float().numpy(), labels)
    return float(probe.score(asked.float().numpy(), answers))
