"""Teachers of a laboratory, with their targets kept in memory."""

from dataclasses import replace

import pytest
import torch

from preceptor.data.sequences import collate
from preceptor.distillation import teachers as teachers
from preceptor.distillation.teachers import MemoisedTeacher
from preceptor.knowledge import HiddenTargets, LogitTargets
from preceptor.methods.teacher_hacking.text_models import answered, symbol_model


@pytest.mark.parametrize("limit", [1 << 20, 300, 0])
def test_a_memoised_teacher_gives_what_the_teacher_gives(limit):
    model = symbol_model(8, longest=8, seed=0)
    asked = []

    def teacher(batch):
        asked.append(len(batch))
        hidden = model(batch).detach()
        return HiddenTargets(hidden, replace(model.head, weight=model.head.weight.detach()))

    again = [answered((1, 2), (3, place)) for place in range(6)]
    memoised, other = MemoisedTeacher(teacher, again, limit=limit), answered((7, 7), (7, 7))
    for _ in range(3):
        batch = collate([*again[:3], other], 0)
        assert torch.allclose(memoised(batch).hidden, model(batch)[batch.predicts], atol=1e-6)
        batch = collate(again[2:5], 0)
        assert torch.allclose(memoised(batch).hidden, model(batch)[batch.predicts], atol=1e-6)
    assert asked == ([4, 3, 4, 4] if limit == 1 << 20 else [4, 3] * 3)


def test_a_memoised_teacher_of_exact_probabilities():
    rows = torch.randn(4, 5)
    again = [answered((1,), (2, 3)), answered((2,), (2, 3))]
    memoised = MemoisedTeacher(lambda batch: LogitTargets(rows), again)
    batch = collate(again, 0)
    assert torch.equal(memoised(batch).logits, rows)
    swapped = collate(again[::-1], 0)
    assert torch.equal(memoised(swapped).logits, rows[[2, 3, 0, 1]])
