"""The relation losses: hand values, a slow loop written from the equations, limits, gradients and errors."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.losses.attention_relations import (
    Projections,
    attention_value_loss,
    check_relation_heads,
    relation_heads_loss,
    uniform_reference,
)


def made(heads: int, width: int, *, groups: int = 0, batch: int = 3, length: int = 6, seed: int = 0) -> Projections:
    source = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, length, width) for count in (heads, groups or heads, groups or heads)]
    parts = [torch.randn(shape, generator=source, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return Projections(*parts)


def padded(batch: int = 3, length: int = 6) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1, 4:] = 0
    mask[2, 1:] = 0
    return mask[:, :length]


def slow(x: Tensor, y: Tensor, tx: Tensor, ty: Tensor, mask: Tensor, causal: bool, average: str) -> float:
    """One relation's loss, row by row from the equation: x, y of the student, tx, ty of the teacher, (B, H, T, d)."""
    total = 0.0
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[2]) if mask[b, t]]
        for a in range(x.shape[1]):
            for t in real:
                keys = [s for s in real if s <= t or not causal]
                q = torch.stack([x[b, a, t] @ y[b, a, s] for s in keys]) / math.sqrt(x.shape[3])
                p = torch.stack([tx[b, a, t] @ ty[b, a, s] for s in keys]) / math.sqrt(tx.shape[3])
                p, q = p.softmax(0), q.softmax(0)
                row = float((p * (p.log() - q.log())).sum().detach())
                total += row / x.shape[1] / (len(real) if average == "sequence" else 1)
    return total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 25])
def test_attention_and_value_equal_a_slow_loop(causal, average, groups, chunk_bytes):
    student, teacher, mask = made(4, 3, groups=groups), made(4, 5, groups=groups, seed=1), padded()
    options = {"causal": causal, "average": average, "chunk_bytes": chunk_bytes}
    loss = attention_value_loss(student, teacher, mask, weights=(0.7, 1.3), **options)
    keys = [model.key.repeat_interleave(4 // groups, 1) for model in (student, teacher)]
    attention = slow(student.query, keys[0], teacher.query, keys[1], mask, causal, average)
    value = slow(student.value, student.value, teacher.value, teacher.value, mask, causal, average)
    assert loss.parts["attention"].item() == pytest.approx(attention, rel=1e-9)
    assert loss.parts["value"].item() == pytest.approx(value, rel=1e-9)
    assert loss.sum.item() == pytest.approx(0.7 * attention + 1.3 * value, rel=1e-9)
    assert loss.count.item() == (3 if average == "sequence" else 11)


@pytest.mark.parametrize("causal", [False, True])
def test_relation_heads_equal_a_slow_loop(causal):
    student, teacher, mask = made(2, 6, groups=1), made(3, 8, groups=3, seed=1), padded()

    def cut(x: Tensor) -> Tensor:
        joined = torch.cat(list(x.unbind(1)), dim=-1)
        return torch.stack(joined.split(joined.shape[-1] // 3, dim=-1), dim=1)

    loss = relation_heads_loss(student, teacher, mask, relation_heads=3, causal=causal, weights=(1, 2, 3))
    for name in ("query", "key", "value"):
        mine, theirs = cut(getattr(student, name)), cut(getattr(teacher, name))
        expected = slow(mine, mine, theirs, theirs, mask, causal, "sequence")
        assert loss.parts[name].item() == pytest.approx(expected, rel=1e-9)
    weighted = sum(weight * loss.parts[name] for weight, name in zip((1, 2, 3), ("query", "key", "value"), strict=True))
    assert loss.sum.item() == pytest.approx(weighted.item(), rel=1e-12)


def test_a_value_relation_worked_by_hand():
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)[None, None]
    mask = torch.ones(1, 3)
    rows = torch.tensor(
        [[0.401112, 0.197776, 0.401112], [0.197776, 0.401112, 0.401112], [0.248255, 0.248255, 0.503490]]
    )
    entropy = -(rows * rows.log()).sum(1).mean().item()
    reference = uniform_reference(values, values, mask).item()
    assert reference == pytest.approx(0.0506112, abs=1e-7)
    assert reference == pytest.approx(math.log(3) - entropy, abs=1e-5)
    teacher, student = Projections(values, values, values), Projections(values, values, torch.zeros_like(values))
    assert attention_value_loss(student, teacher, mask).parts["value"].item() == pytest.approx(0.0506112, abs=1e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_a_student_without_scores_loses_what_the_uniform_reference_says(causal):
    teacher, student, mask = made(4, 5), made(4, 3, seed=1), padded()
    student = Projections(student.query * 1e-9, student.key, student.value)
    loss = attention_value_loss(student, teacher, mask, causal=causal)
    reference = uniform_reference(teacher.query, teacher.key, mask, causal=causal)
    assert loss.parts["attention"].item() == pytest.approx(reference.sum().item(), rel=1e-7)


def test_a_copy_of_the_teacher_has_no_loss():
    teacher, mask = made(4, 5), padded()
    assert attention_value_loss(teacher, teacher, mask).sum.abs() < 1e-12
    assert relation_heads_loss(teacher, teacher, mask, relation_heads=10).sum.abs() < 1e-12


def test_the_scale_is_each_models_own():
    """Twice the values change the loss; a student of another width, scaled by its own width, has none."""
    teacher, mask = made(2, 4), padded()
    doubled = Projections(teacher.query, teacher.key, 2 * teacher.value)
    assert attention_value_loss(doubled, teacher, mask).parts["value"] > 1e-3
    wide = [torch.cat([part] * 4, dim=-1) / math.sqrt(2) for part in (teacher.query, teacher.key, teacher.value)]
    assert attention_value_loss(Projections(*wide), teacher, mask).sum.abs() < 1e-12


def test_padding_and_order_do_not_matter():
    student, teacher, mask = made(4, 3), made(4, 5, seed=1), padded()

    def pad(model: Projections) -> Projections:
        parts = (model.query, model.key, model.value)
        return Projections(*[torch.cat([part, torch.full_like(part[:, :, :2], 7.0)], dim=2) for part in parts])

    def turn(model: Projections) -> Projections:
        return Projections(*[part.flip(0) for part in (model.query, model.key, model.value)])

    longer = torch.cat([mask, torch.zeros_like(mask[:, :2])], dim=1)
    for options in ({}, {"causal": True}):
        plain = attention_value_loss(student, teacher, mask, **options).sum
        assert attention_value_loss(pad(student), pad(teacher), longer, **options).sum.item() == pytest.approx(
            plain.item()
        )
        turned = attention_value_loss(turn(student), turn(teacher), mask.flip(0), **options).sum
        assert turned.item() == pytest.approx(plain.item())
        whole = relation_heads_loss(student, teacher, mask, relation_heads=1, **options).sum
        padded_whole = relation_heads_loss(pad(student), pad(teacher), longer, relation_heads=1, **options).sum
        assert padded_whole.item() == pytest.approx(whole.item())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 25])
def test_gradients_equal_finite_differences(causal, chunk_bytes):
    teacher, mask = made(2, 4, groups=1, seed=1), padded(length=5)
    teacher = Projections(*[part[:, :, :5] for part in (teacher.query, teacher.key, teacher.value)])
    student = made(2, 3, groups=1, length=5)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {"causal": causal, "weights": (0.5, 2.0), "chunk_bytes": chunk_bytes}
        return attention_value_loss(Projections(query, key, value), teacher, mask, **options).sum

    assert torch.autograd.gradcheck(loss, (student.query, student.key, student.value))


def test_the_teacher_gets_no_gradient_and_low_precision_is_computed_in_float32():
    student, teacher, mask = made(4, 3), made(4, 5, seed=1), padded()
    attention_value_loss(student, teacher, mask).sum.backward()
    assert teacher.query.grad is None
    assert student.query.grad is not None
    assert student.value.grad is not None
    huge = Projections(*[(300 * torch.ones(3, 4, 6, 4)).half().requires_grad_() for _ in range(3)])
    loss = attention_value_loss(huge, huge, mask)
    assert loss.sum.dtype == torch.float32
    assert loss.sum.isfinite()
    assert loss.sum.abs() < 1e-6


def test_a_term_of_weight_zero_is_measured_and_not_learned():
    student, teacher, mask = made(4, 3), made(4, 5, seed=1), padded()
    loss = attention_value_loss(student, teacher, mask, weights=(1, 0))
    loss.sum.backward()
    assert student.query.grad.abs().sum() > 0
    assert student.value.grad is None
    assert loss.parts["value"] > 0
    assert loss.sum.item() == pytest.approx(loss.parts["attention"].item())


def test_rows_of_padding_only_are_skipped_and_a_batch_of_them_gives_a_connected_zero():
    student, teacher, mask = made(4, 3), made(4, 5, seed=1), padded()
    mask[1] = 0
    kept = [
        Projections(*[part[[0, 2]] for part in (model.query, model.key, model.value)]) for model in (student, teacher)
    ]
    loss, alone = attention_value_loss(student, teacher, mask), attention_value_loss(*kept, mask[[0, 2]])
    assert loss.count == alone.count == 2
    assert loss.sum.item() == pytest.approx(alone.sum.item())
    with pytest.warns(UserWarning, match="two tokens"):
        empty = attention_value_loss(student, teacher, torch.zeros_like(mask))
    empty.sum.backward()
    assert empty.sum == 0
    assert empty.count == 0
    assert student.query.grad.abs().sum() == 0


def test_single_tokens_are_allowed_with_a_warning():
    student, teacher = made(4, 3, length=1), made(4, 5, length=1, seed=1)
    with pytest.warns(UserWarning, match="two tokens"):
        assert attention_value_loss(student, teacher, torch.ones(3, 1)).sum == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_value_loss(made(4, 3), made(4, 5), padded())


def test_what_does_not_fit_is_refused_with_what_to_do():
    mask = padded()
    with pytest.raises(UserError, match=r"student has 6 attention heads and the teacher 12.*relation_heads"):
        attention_value_loss(made(6, 4), made(12, 4), mask)
    with pytest.raises(UserError, match=r"The student has 2 key and value heads and the teacher 4"):
        attention_value_loss(made(4, 4, groups=2), made(4, 4), mask)
    with pytest.raises(UserError, match=r"\(3, 4, 5, 3\).*\(3, 4, 6, 3\)"):
        attention_value_loss(made(4, 3, length=5), made(4, 3), mask)
    with pytest.raises(UserError, match=r"3 terms.*3 weights"):
        relation_heads_loss(made(4, 3), made(4, 3), mask, relation_heads=2, weights=(1, 1))
    with pytest.raises(UserError, match=r"at least 0"):
        attention_value_loss(made(4, 3), made(4, 3), mask, weights=(1, -1))
    with pytest.raises(UserError, match="average"):
        attention_value_loss(made(4, 3), made(4, 3), mask, average="row")
    with pytest.raises(UserError, match=r"5 relation heads .*12, 18.*: choose one of 1, 2, 3, 6\."):
        relation_heads_loss(made(6, 3), made(3, 4), mask, relation_heads=5)
    with pytest.raises(UserError, match="choose one of 1, 2, 4"):
        check_relation_heads(0, [4, 8])
