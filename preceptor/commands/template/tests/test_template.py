"""The loss against a slow loop, its limit case, the run, and the claim."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preceptor.errors import UserError

from ..recipe import Config, main, soft_targets, tiny
from ..reproduction import ALL, ARMS, UNSEEN, reproduce


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_the_loss_is_that_of_the_equation(temperature: float) -> None:
    """T² · Σ p log(p / q), number by number."""
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = 0.0
    for z, v in zip(student.tolist(), teacher.tolist()):
        p = [math.exp(x / temperature) for x in v]
        q = [math.exp(x / temperature) for x in z]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
    loss = soft_targets(student, teacher, temperature)
    assert loss.sum.item() == pytest.approx(expected, rel=1e-12)
    assert loss.count.item() == 5


def test_a_student_like_its_teacher_has_no_loss() -> None:
    """Equal logits: value and gradient are 0."""
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    loss = soft_targets(logits, logits.detach(), 8.0).sum
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max().item() < 1e-12


def test_the_tiny_run_ends_the_same_each_time(tmp_path: Path) -> None:
    """Two runs with one seed save the same student, and a page."""
    for name in ("one", "two"):
        main(replace(tiny, output=str(tmp_path / name)))
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "one" / "report.html").is_file()


def test_settings_that_cannot_be_meant_are_refused() -> None:
    """One sentence each."""
    with pytest.raises(UserError, match="temperature is 0"):
        Config(temperature=0)
    with pytest.raises(UserError, match="unseen is 10"):
        Config(unseen=10)


def test_the_claim_shows_with_one_seed(tmp_path: Path) -> None:
    """Soft targets teach the unseen digit; the baseline and the control do not."""
    table = reproduce(1, tmp_path, full=False)
    shown = {arm: {column: cell["mean"] for column, cell in table.json()["rows"][arm].items()} for arm in ARMS}
    assert shown["soft targets"][UNSEEN] > 50
    assert shown["hard targets"][UNSEEN] < 20
    assert shown["hard targets"][ALL] > 50
    assert shown["shuffled targets"][ALL] < 30
