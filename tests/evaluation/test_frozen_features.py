"""What features are good for: easy ones tell everything, noise tells nothing, and draws are those of the seed."""

import pytest
import torch

from preceptor.errors import UserError
from preceptor.evaluation.frozen_features import (
    embed,
    few_labels,
    few_shot,
    figures,
    linear_probe,
    neighbours,
    warmed_up,
)
from preceptor.vision.backbones import make_backbone, pooled
from preceptor.vision.images import held, read_images


def clouds(each: int = 40, classes: int = 4, spread: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(classes).repeat(each)
    return torch.eye(classes)[labels] * 3 + spread * torch.randn(each * classes, classes), labels


def test_clear_features_tell_everything_and_noise_nothing() -> None:
    known, labels = clouds()
    noise = torch.randn(400, 4)
    answers = torch.arange(4).repeat(100)
    assert linear_probe(known, labels, known, labels, each=5, seed=0) == 1.0
    assert linear_probe(known, labels, known, labels, each=0, seed=0) == 1.0
    assert neighbours(known, labels, known, labels) == 1.0
    assert few_shot(known, labels, shots=1, seed=0).mean == 1.0
    assert linear_probe(noise, answers, torch.randn(400, 4), answers, each=10, seed=0) < 0.4
    assert neighbours(noise, answers, torch.randn(400, 4), answers) < 0.4
    told = few_shot(noise, answers, shots=5, seed=0)
    assert told.error is not None
    assert abs(told.mean - 0.25) < 4 * told.error


def test_few_shot_equals_a_slow_loop_of_one_episode() -> None:
    known, labels = clouds(each=3, spread=2.0)
    draw = torch.Generator().manual_seed(7)
    order = torch.randperm(4, generator=draw).tolist()
    rows = [(labels == label).nonzero().flatten() for label in order]
    rows = [there[torch.randperm(len(there), generator=draw)] for there in rows]
    right = 0
    for place, there in enumerate(rows):
        near = []
        for other in rows:
            mean = torch.nn.functional.normalize(known[other[1:]], dim=1).mean(0)
            near.append(float(torch.cosine_similarity(known[there[0]], mean, dim=0)))
        right += near.index(max(near)) == place
    assert few_shot(known, labels, shots=2, seed=7, episodes=1).mean == pytest.approx(right / 4)


def test_labels_are_drawn_from_every_class_by_the_seed() -> None:
    labels = torch.tensor([0, 1, 2] * 10)
    rows = few_labels(labels, 4, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [4, 4, 4]
    assert torch.equal(rows, few_labels(labels, 4, seed=0))
    assert not torch.equal(rows, few_labels(labels, 4, seed=1))
    with pytest.raises(UserError, match="Class 0 has 10 examples and 11"):
        few_labels(labels, 11, seed=0)
    with pytest.raises(UserError, match="two classes of 11 examples"):
        few_shot(torch.rand(30, 2), labels, shots=10, seed=0)


def test_features_are_the_pooled_last_level_in_evaluation_mode() -> None:
    images, _ = read_images("digits", 28, limit=300)
    backbone = make_backbone("conv:width=4", 1, seed=0).train()
    found = embed(backbone, images)
    assert found.shape == (300, 16)
    assert backbone.training
    torch.testing.assert_close(found[290:], pooled(backbone.eval(), images.take(range(290, 300))))
    shown = embed(backbone, images, lambda some: some[..., 4:24, 4:24])
    assert not torch.allclose(shown, found)


def test_batch_norms_are_warmed_up_in_a_copy() -> None:
    images, _ = read_images("digits", 28, limit=256)
    backbone = make_backbone("conv:width=4", 1, seed=0)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    warm = warmed_up(backbone, images)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(torch.equal(one, other) for one, other in zip(warm.parameters(), backbone.parameters()))
    assert not warm.training
    first = warm.blocks[0]  # type: ignore[index]
    torch.testing.assert_close(first[1].running_mean, first[0](images.take(range(256))).mean((0, 2, 3)))


def test_all_figures_of_one_set() -> None:
    known, labels = clouds(each=20)
    pixels = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    images = held(pixels, labels)
    found = figures(known, images, known, images, seed=0)
    assert list(found) == [
        "probe, 10 labels a class",
        "few-shot, 1 a class",
        "few-shot, 5 a class",
        "nearest neighbours",
    ]
    assert set(found.values()) == {100.0}
    few = [*range(4), *range(20, 24), *range(40, 44)]  # four of each class
    assert "few-shot, 5 a class" not in figures(known, images, known[few], images.only(few), seed=0)
