"""Bags of visual words against the dense formula, the queue, the head, the divergence, and the watch."""

import math

import pytest
import torch
import torch.nn.functional as F

from preceptor.errors import UserError
from preceptor.methods.obow import visual_words
from preceptor.methods.obow.visual_words import (
    DynamicHead,
    VisualWords,
    Vocabularies,
    VocabularyWatch,
    bag_divergence,
    perplexities,
)


def features(count: int = 5, width: int = 3, side: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, width, side, side, generator=torch.Generator().manual_seed(seed))


def dense(maps: torch.Tensor, words: torch.Tensor, scale: float, pooling: str, assignment: str) -> torch.Tensor:
    """The paper's formula with loops over images and positions."""
    bags = []
    for image in maps.double():
        codes = []
        for row in range(1, image.shape[1] - 1):
            for column in range(1, image.shape[2] - 1):
                far = ((image[:, row, column] - words.double()) ** 2).sum(1)
                hard = F.one_hot(far.argmin(), len(words)).double()
                codes.append(hard if assignment == "hard" else torch.softmax(-scale * far, 0))
        stacked = torch.stack(codes)
        bag = stacked.max(0).values if pooling == "max" else stacked.mean(0)
        bags.append(bag / bag.sum())
    return torch.stack(bags)


def smallest(maps: torch.Tensor, words: torch.Tensor) -> float:
    inner = maps[:, :, 1:-1, 1:-1].flatten(2).transpose(1, 2)
    return float(torch.cdist(inner.double(), words.double().expand(len(maps), -1, -1)).square().min(-1).values.mean())


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize(("chunk", "kept"), [(1 << 22, 1 << 28), (1, 1 << 28), (1, 0), (2000, 3000)])
def test_bags_equal_the_dense_formula_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch, assignment: str, pooling: str, chunk: int, kept: int
) -> None:
    monkeypatch.setattr(visual_words, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(visual_words, "HELD_BYTES", kept)
    torch.manual_seed(0)
    level = VisualWords(11, 3, inv_delta=7.0, assignment=assignment, pooling=pooling)  # type: ignore[arg-type]
    for seed in range(3):
        maps, before, scale = features(seed=seed), level.words.clone(), float(level.distance)
        bags = level(maps)
        moved = 0.99 * scale + 0.01 * smallest(maps, before)
        assert float(level.distance) == pytest.approx(moved, rel=1e-5)
        # Distances to the words as they were, codes with the scale as it is now, and only then other words.
        torch.testing.assert_close(
            bags.double(), dense(maps, before, 7.0 / moved, pooling, assignment), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(bags.sum(1), torch.ones(5))
        assert not torch.equal(level.words, before)


def test_the_first_scale_is_half_and_the_first_words_are_not_negative() -> None:
    level = VisualWords(100, 8)
    assert float(level.distance) == 0.5
    assert int(level.oldest) == 0
    assert float(level.words.min()) == 0.0
    assert 0.3 < float((level.words == 0).float().mean()) < 0.7


def test_the_oldest_words_go_and_the_queue_wraps_around() -> None:
    torch.manual_seed(0)
    level = VisualWords(10, 3)
    pointers, kept = [], level.words.clone()
    for step in range(4):
        maps = features(4, seed=step)
        level(maps)
        pointers.append(int(level.oldest))
        places = [(4 * step + i) % 10 for i in range(4)]
        changed = (level.words != kept).any(1).nonzero().flatten().tolist()
        assert sorted(changed) == sorted(places)
        averages = F.avg_pool2d(maps[:, :, 1:-1, 1:-1], 3, stride=1).flatten(2)
        for image, place in enumerate(places):
            assert ((averages[image] - level.words[place].unsqueeze(1)).abs().amax(0) < 1e-6).any()
        kept = level.words.clone()
    assert pointers == [4, 8, 2, 6]


def test_a_batch_larger_than_the_vocabulary_leaves_its_last_images() -> None:
    level = VisualWords(3, 2)
    constant = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 5, 5)
    level(constant)
    torch.testing.assert_close(level.words[:, 0].sort().values, torch.tensor([2.0, 3.0, 4.0]))


def test_nothing_moves_in_evaluation_and_a_frozen_vocabulary_keeps_its_words() -> None:
    frozen, level = VisualWords(6, 3, renewed=False), VisualWords(6, 3).eval()
    for words in (frozen, level):
        before = words.words.clone()
        words(features())
        assert torch.equal(words.words, before)
        assert int(words.oldest) == 0
    assert float(level.distance) == 0.5
    assert float(frozen.distance) != 0.5


def test_what_does_not_fit_is_said() -> None:
    level = VisualWords(6, 3)
    with pytest.raises(UserError, match="4x7 is too small.*5x5"):
        level(torch.rand(2, 3, 4, 7))
    with pytest.raises(UserError, match="4 channels and the words 3"):
        level(torch.rand(2, 4, 5, 5))
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="inv_delta is"):
            VisualWords(6, 3, inv_delta=value)
    with pytest.raises(UserError, match="at least 2"):
        VisualWords(1, 3)
    with pytest.raises(UserError, match="kappa is 0"):
        DynamicHead([3], 4, kappa=0)


def test_several_levels_are_kept_by_name_and_come_back_from_their_state() -> None:
    torch.manual_seed(0)
    both, again = Vocabularies({"a": 3, "b": 2}, 6), Vocabularies({"a": 3, "b": 2}, 6)
    maps = {"a": features(), "b": features(width=2), "c": torch.zeros(1)}
    both(maps)
    again.load_state_dict(both.state_dict())
    torch.manual_seed(1)
    first = both(maps)
    torch.manual_seed(1)
    second = again(maps)
    assert list(first) == ["a", "b"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(one, other) for one, other in zip(both.now(), again.now()))
    assert set(both.of("a").state_dict()) == {"words", "oldest", "distance"}


def test_the_head_is_generated_from_the_words() -> None:
    torch.manual_seed(0)
    head = DynamicHead([3, 2], 4, kappa=5.0)
    words = [torch.rand(7, 3), torch.rand(7, 2)]
    some = [torch.randn(6, 4), torch.randn(2, 4)]
    logits = head(some, words)
    assert [[tuple(one.shape) for one in kind] for kind in logits] == [[(6, 7)] * 2, [(2, 7)] * 2]
    for level, (generate, vocabulary) in enumerate(zip(head.generators, words)):
        first, norm, _, last = generate
        hidden = (vocabulary / vocabulary.norm(dim=1, keepdim=True)) @ first.weight.T
        # The batch of this batch norm is the K words.
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
        weight = torch.relu(hidden) @ last.weight.T + last.bias
        weight = weight / weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(logits[0][level], 5.0 * some[0] @ weight.T, rtol=1e-4, atol=1e-5)
    double = head([2 * some[0]], words)[0][0]
    torch.testing.assert_close(double, 2 * logits[0][0])  # the feature is not normalised
    assert first.bias is None


def test_the_divergence_equals_a_loop_and_its_gradient_autograd() -> None:
    torch.manual_seed(0)
    bags = torch.rand(3, 5, dtype=torch.float64)
    bags[0, :3] = 0.0
    bags = bags / bags.sum(1, keepdim=True)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    told = bag_divergence(bags, logits)
    slow = []
    for image in range(3):
        total = torch.zeros((), dtype=torch.float64)
        for view in range(2):
            log_p = torch.log_softmax(logits[2 * image + view], 0)
            for word in range(5):
                y = bags[image, word]
                if y > 0:
                    total = total + y * (y.log() - log_p[word]) / 2
        slow.append(total)
    torch.testing.assert_close(told, torch.stack(slow))
    mine = torch.autograd.grad(told.sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(torch.stack(slow).sum(), logits)[0])
    full = bags[1:]
    assert float(bag_divergence(full, full.log().repeat_interleave(3, 0)).abs().max()) < 1e-12


def test_predictions_that_do_not_fit_the_images_are_refused() -> None:
    bags = torch.full((3, 5), 0.2)
    for shape in ((4, 5), (3, 4), (0, 5)):
        with pytest.raises(UserError, match="do not fit bags"):
            bag_divergence(bags, torch.zeros(shape))


def test_perplexities_count_words() -> None:
    uniform, single = torch.full((4, 8), 1 / 8), F.one_hot(torch.arange(4), 8).float()
    assert perplexities(uniform) == pytest.approx((8.0, 8.0))
    assert perplexities(single) == pytest.approx((4.0, 1.0))
    assert perplexities(single[:1].repeat(4, 1)) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(("batch", "image", "word"), [(1.2, 1.1, "collapsed"), (99.0, 95.0, "uniform")])
def test_a_run_that_lost_its_meaning_is_stopped_after_patience(batch: float, image: float, word: str) -> None:
    watch, first = VocabularyWatch(100, 10), 10
    for _ in range(first + VocabularyWatch.PATIENCE - 1):
        watch.see("block4", batch, image, 0.3)
    watch.see("block2", 60.0, 20.0, 0.3)
    again = VocabularyWatch(100, 10)
    again.load_state_dict(watch.state_dict())
    again.see("block4", 60.0, 20.0, 0.3)  # one good step, and the count begins anew
    again.see("block4", batch, image, 0.3)
    with pytest.raises(UserError, match=rf"block4.*{word}|{word}.*block4") as told:
        watch.see("block4", batch, image, 0.3)
    assert "m 0.3" in str(told.value)
    assert "raise inv_delta" in str(told.value)
