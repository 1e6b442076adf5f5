"""Drawing one class of many."""

import pytest
import torch

from preceptor.models.sampling import BLOCK, Sampling, draw


@pytest.mark.parametrize("classes", [1, 3, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_classes_are_drawn_as_often_as_they_are_likely(classes: int) -> None:
    torch.manual_seed(0)
    p = torch.rand(classes).pow(3)
    p[: classes // 4] = 0.0
    p /= p.sum()
    count = 200_000
    found = torch.bincount(draw(p.expand(count, -1)), minlength=classes)
    assert len(found) == classes
    assert not found[p == 0].any()
    expected = count * p.double()
    seen = expected >= 5
    excess = ((found - expected).square() / expected)[seen].sum()
    freedom = int(seen.sum()) - 1
    assert excess <= freedom + 4 * (2 * freedom) ** 0.5 + 1e-9  # Pearson's statistic: mean and deviation of chi squared


def test_rows_have_their_own_classes_and_the_seed_decides() -> None:
    p = torch.zeros(4, 600)
    p[0, 599] = p[1, 0] = p[2, 256] = 1.0
    p[3, 5] = p[3, 400] = 0.5
    torch.manual_seed(3)
    first = torch.stack([draw(p) for _ in range(40)])
    assert (first[:, :3] == torch.tensor([599, 0, 256])).all()
    assert set(first[:, 3].tolist()) == {5, 400}
    torch.manual_seed(3)
    assert torch.equal(first, torch.stack([draw(p) for _ in range(40)]))


@pytest.mark.parametrize(("number", "drawn"), [(torch.zeros_like, [7, 3]), (torch.ones_like, [290, 3])])
def test_the_ends_of_the_interval_draw_classes_with_a_weight(monkeypatch, number, drawn) -> None:
    """0 may be drawn, and a number just below 1 may round up to the whole."""
    monkeypatch.setattr(torch, "rand_like", number)
    p = torch.zeros(2, 300)
    p[0, 7], p[0, 290], p[1, 3] = 0.25, 0.75, 1.0
    assert draw(p).tolist() == drawn


def test_temperature_and_nucleus_shape_what_is_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(50_000, -1)
    cold = torch.bincount(Sampling(1, temperature=0.5).choose(logits), minlength=4) / 50_000
    sharp = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(cold, sharp / sharp.sum(), atol=0.01, rtol=0)
    nucleus = torch.bincount(Sampling(1, top_p=0.7).choose(logits), minlength=4) / 50_000
    torch.testing.assert_close(nucleus, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.01, rtol=0)
