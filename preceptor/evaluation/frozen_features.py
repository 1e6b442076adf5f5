"""What frozen image features are good for: a linear probe with few labels, few-shot episodes, nearest neighbours."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preceptor.errors import UserError
from preceptor.evaluation.probing import probe_accuracy
from preceptor.statistics import Value, mean_of
from preceptor.vision.backbones import pooled
from preceptor.vision.images import Images

BATCH = 256


EPISODES = 200  # as OBoW's few-shot evaluation


WAYS = 50  # classes of an episode, or all where there are fewer


NEIGHBOURS = 20


LABELS = (10, 100)  # a class, that a linear probe gets


@torch.no_grad()
def embed(backbone: nn.Module, images: Images, view: Callable[[Tensor], Tensor] = lambda images: images) -> Tensor:
    """The backbone's pooled features of all images, in evaluation mode: (N, D) float32 on the CPU.

    ``view`` is what the backbone is shown of images (B, C, side, side). The backbone's mode is left as it was.
    """
    mode, device = backbone.training, next(backbone.parameters()).device
    backbone.eval()
    found = []
    for start in range(0, len(images), BATCH):
        shown = view(images.take(range(start, min(start + BATCH, len(images)))))
        found.append(pooled(backbone, shown.to(device)).float().cpu())
    backbone.train(mode)
    return torch.cat(found)


@torch.no_grad()
def warmed_up(
    backbone: nn.Module, images: Images, view: Callable[[Tensor], Tensor] = lambda images: images, *, batches: int = 40
) -> nn.Module:
    """A copy whose batch norms hold the mean statistics of ``batches`` batches of images, its weights unchanged."""
    warm = copy.deepcopy(backbone).train()
    for module in warm.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    device = next(warm.parameters()).device
    for start in range(0, min(len(images), batches * BATCH), BATCH):
        warm(view(images.take(range(start, min(start + BATCH, len(images))))).to(device))
    return warm.eval()


def few_labels(labels: Tensor, each: int, seed: int) -> Tensor:
    """Row numbers of ``each`` examples of every class, drawn at random.

    Raises:
        UserError: a class has fewer.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for label in sorted(set(labels.tolist())):
        there = (labels == label).nonzero().flatten()
        if len(there) < each:
            raise UserError(f"Class {label} has {len(there)} examples and {each} are asked for: ask for fewer.")
        rows.append(there[torch.randperm(len(there), generator=draw)[:each]])
    return torch.cat(rows)


def linear_probe(known: Tensor, labels: Tensor, asked: Tensor, answers: Tensor, *, each: int, seed: int) -> float:
    """Share of features asked (M, D) whose label a logistic regression tells that knows ``each`` of every class.

    Args:
        known: features (N, D) to draw the labelled ones from.
        labels: theirs (N,).
        asked: features (M, D) of other images.
        answers: their labels (M,).
        each: labelled examples a class; 0 takes all.
        seed: of the draw.
    """
    rows = few_labels(labels, each, seed) if each else torch.arange(len(labels))
    names, truth = [str(int(label)) for label in labels[rows]], [str(int(label)) for label in answers]
    return probe_accuracy(known[rows], names, asked, truth)


def few_shot(features: Tensor, labels: Tensor, *, shots: int, seed: int, episodes: int = EPISODES) -> Value:
    """Accuracy of classes' mean features in random episodes, with its standard error over them.

    An episode draws up to 50 classes, ``shots`` examples and one question of each; all features are L2-normalised, a
    class is the normalised mean of its examples, and the nearest by cosine answers (OBoW's protocol).

    Raises:
        UserError: fewer than two classes with so many examples.
    """
    draw = torch.Generator().manual_seed(seed)
    features = F.normalize(features, dim=1)
    places = [(labels == label).nonzero().flatten() for label in sorted(set(labels.tolist()))]
    places = [there for there in places if len(there) > shots]
    if len(places) < 2:
        raise UserError(f"Few-shot episodes need two classes of {shots + 1} examples or more.")
    right = []
    for _ in range(episodes):
        chosen = torch.randperm(len(places), generator=draw)[:WAYS].tolist()
        rows = torch.stack([places[i][torch.randperm(len(places[i]), generator=draw)[: shots + 1]] for i in chosen])
        means = F.normalize(features[rows[:, 1:]].mean(1), dim=1)
        predicted = (features[rows[:, 0]] @ means.T).argmax(1)
        right.append(float((predicted == torch.arange(len(chosen))).float().mean()))
    return mean_of(right)


def neighbours(known: Tensor, labels: Tensor, asked: Tensor, answers: Tensor, *, count: int = NEIGHBOURS) -> float:
    """Share of features asked whose label the nearest known ones tell, by cosine, each vote weighted by it."""
    from sklearn.neighbors import KNeighborsClassifier

    vote = KNeighborsClassifier(min(count, len(known)), weights=lambda far: 1 - far, metric="cosine")
    vote.fit(known.numpy(), labels.numpy())
    return float(vote.score(asked.numpy(), answers.numpy()))


def figures(known: Tensor, lessons: Images, asked: Tensor, exam: Images, *, seed: int) -> dict[str, float]:
    """Accuracies in % of frozen features: linear probes, few-shot episodes, and the nearest of 5,000 neighbours.

    Args:
        known: features (N, D) of the images ``lessons``.
        lessons: whose labels are drawn from.
        asked: features (M, D) of the images ``exam``.
        exam: whose labels are predicted.
        seed: of the draws.
    """
    found = {}
    least = int(torch.bincount(lessons.labels).min())
    for each in (each for each in LABELS if each <= least):
        accuracy = linear_probe(known, lessons.labels, asked, exam.labels, each=each, seed=seed)
        found[f"probe, {each} labels a class"] = 100 * accuracy
    enough = torch.bincount(exam.labels)  # images of each class
    for shots in (shots for shots in (1, 5) if int((enough > shots).sum()) >= 2):
        found[f"few-shot, {shots} a class"] = 100 * few_shot(asked, exam.labels, shots=shots, seed=seed).mean
    near = slice(0, 5000)
    found["nearest neighbours"] = 100 * neighbours(known[near], lessons.labels[near], asked, exam.labels)
    return found
