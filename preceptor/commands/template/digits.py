"""The data and the two networks: scikit-learn's 1,797 images of handwritten digits, read by perceptrons."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Digits(NamedTuple):
    """Images (rows, 64) with values in [0, 1] and their labels (rows,), in two parts."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def read_digits(seed: int) -> Digits:
    """The digits in a random order; the last third is held out."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return Digits(x[:1200], y[:1200], x[1200:], y[1200:])


def perceptron(width: int, seed: int) -> nn.Module:
    """Two hidden layers of ``width`` units, and one logit for each digit."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(width, 10))


def fit_teacher(digits: Digits, width: int, seed: int) -> nn.Module:
    """A perceptron trained on the labels of all digits: 200 steps of AdamW on 64 images each."""
    teacher, rows = perceptron(width, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
    for _ in range(200):
        batch = torch.randint(len(digits.labels), (64,), generator=rows)
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(teacher(digits.images[batch]), digits.labels[batch]))
        optimizer.step()
    return teacher.eval().requires_grad_(False)


def accuracy(network: nn.Module, digits: Digits, digit: int | None = None) -> float:
    """The share of held-out images, in per cent, that the network names correctly; of one digit if it is given."""
    chosen = digits.held_out_labels >= 0 if digit is None else digits.held_out_labels == digit
    with torch.no_grad():
        answers = network(digits.held_out_images[chosen]).argmax(-1)
    return 100 * float((answers == digits.held_out_labels[chosen]).double().mean())
