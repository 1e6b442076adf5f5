"""What is minimised, against the divergence it stands for; the settings that it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.objective import LABELS, Objective
from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets


@pytest.fixture
def batch():
    return collate([Sequence(ids=(1, 2, 3, 4), response=(False, False, True, True))], pad_id=0)


def test_labels_alone_ask_no_teacher(batch):
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 4, 8), Head(torch.randn(6, 8))
    loss = LABELS.against(None, batch)(hidden, head)
    logits = hidden[0] @ head.weight.T
    expected = torch.nn.functional.cross_entropy(logits[1:3], torch.tensor([3, 4]), reduction="sum")
    assert float(loss.sum) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss.count) == 2


def test_the_temperature_scales_the_divergence(batch):
    torch.manual_seed(0)
    hidden, head, teacher = torch.randn(1, 4, 8), Head(torch.randn(6, 8)), torch.randn(1, 4, 8)
    targets = HiddenTargets(teacher[0, 1:3], head)
    loss = Objective(temperature=2.0, weight=3.0).against(targets, batch)(hidden, head)
    p, q = ((states[0, 1:3] @ head.weight.T / 2).log_softmax(-1) for states in (teacher, hidden))
    assert float(loss.sum) == pytest.approx(float(3 * 4 * (p.exp() * (p - q)).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"beta": 1.5}, r"objective\.beta is 1\.5"),
        ({"alpha": -0.1}, r"objective\.alpha is -0\.1"),
        ({"temperature": 0.0}, "above 0"),
        ({"weight": 0.0}, "one of them above 0"),
        ({"weight": -1.0, "label_weight": 2.0}, "0 or more"),
        ({"weight": math.nan}, "0 or more"),
        ({"label_weight": math.inf}, "0 or more"),
        ({"temperature": math.nan}, "finite temperature above 0"),
        ({"temperature": math.inf}, "finite temperature above 0"),
        ({"alpha": math.nan}, r"objective\.alpha is nan"),
    ],
)
def test_what_no_divergence_can_take_is_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        Objective(**wrong)
