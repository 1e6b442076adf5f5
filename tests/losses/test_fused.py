"""What theory and the method card say of the divergences, bad input, and that no tokens x vocabulary matrix lives."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SampledTargets, TopKTargets
from preceptor.losses import kernel
from preceptor.losses.divergences import cross_entropy, divergence, forward_kl, jensen_shannon, reverse_kl

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation")
P, Q = (0.6, 0.3, 0.1), (0.2, 0.5, 0.3)
PATHS = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "pytorch"])


def identity(classes: int, dtype: torch.dtype = torch.float32) -> Head:
    """A head whose logits are the hidden states."""
    return Head(torch.eye(classes, dtype=dtype))


def of_logits(student: Tensor, teacher: Tensor, **options) -> Tensor:
    return divergence(student, identity(student.shape[-1], student.dtype), LogitTargets(teacher), **options).sum


def test_cross_entropy_and_entropies_of_the_card():
    student, teacher = torch.tensor([Q]).log(), torch.tensor([P]).log()
    sampled = SampledTargets(torch.tensor([[0, 1, 2]]), torch.tensor([P]))
    assert divergence(student, identity(3), sampled).sum.item() == pytest.approx(1.2940041, abs=1e-6)
    parts = forward_kl(student, identity(3), LogitTargets(teacher)).parts
    assert parts["teacher_entropy"].item() == pytest.approx(0.8979457, abs=1e-6)
    assert parts["student_entropy"].item() == pytest.approx(-sum(q * math.log(q) for q in Q), abs=1e-6)
    assert parts["agreement"].item() == 0
    jeffreys = forward_kl(student, identity(3), LogitTargets(teacher)).sum
    jeffreys = jeffreys + reverse_kl(student, identity(3), LogitTargets(teacher)).sum
    assert jeffreys.item() == pytest.approx(0.7613325, abs=1e-6)


@PATHS
def test_top_k_targets_and_a_certain_student(compiled):
    """The student's mass outside the listed tokens underflows; the tail's pull must neither vanish nor blow up."""
    student = torch.tensor([[200.0, 0.0, -1.0, -2.0]], requires_grad=True)
    exact = student.detach().double().requires_grad_()
    targets = TopKTargets(torch.tensor([[0]]), torch.tensor([[math.log(0.7)]]))
    values = [of_top_k(x, targets, compiled) for x in (student, exact)]
    grads = [torch.autograd.grad(v, x)[0].double() for v, x in zip(values, (student, exact))]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    assert grads[1][0, 1:].sum().item() == pytest.approx(-0.3, abs=1e-6)


def of_top_k(student: Tensor, targets: TopKTargets, compiled: bool) -> Tensor:
    return divergence(student, identity(4, student.dtype), targets, compiled=compiled).sum


@PATHS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_that_are_no_numbers_are_not_hidden(bad, side, compiled):
    logits = {"student": torch.zeros(2, 5), "teacher": torch.ones(2, 5)}
    logits[side][1, 3] = bad
    for kind in KINDS:
        assert not torch.isfinite(of_logits(**logits, kind=kind, compiled=compiled)), kind


@PATHS
def test_masked_rows_cost_and_change_nothing(compiled):
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 8, 6).transpose(0, 1), Head(torch.randn(40, 6))
    said = HiddenTargets(torch.randn(8, 3, 5), Head(torch.randn(40, 5)))
    mask = torch.rand(8, 3) < 0.5
    dirty = torch.where(mask.unsqueeze(-1), hidden, torch.full((), math.nan)).requires_grad_()
    clean = hidden[mask].requires_grad_()
    packed = HiddenTargets(said.hidden[mask], said.head)
    first = jensen_shannon(dirty, head, said, mask=mask)
    again = jensen_shannon(dirty, head, packed, mask=mask)
    alone = divergence(clean, head, packed, kind="jensen_shannon", compiled=compiled)
    first.sum.backward()
    alone.sum.backward()
    assert first.sum.item() == again.sum.item() == pytest.approx(alone.sum.item(), rel=1e-6)
    assert first.count.item() == alone.count.item() == int(mask.sum())
    torch.testing.assert_close(dirty.grad[mask], clean.grad)
    assert (dirty.grad[~mask] == 0).all()


def test_an_empty_mask_gives_zero_with_a_warning_and_a_graph():
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    said = LogitTargets(torch.randn(2, 3, 7))
    with pytest.warns(UserWarning, match="No position"):
        loss = forward_kl(hidden, Head(weight), said, mask=torch.zeros(2, 3, dtype=torch.bool))
    loss.sum.backward()
    assert loss.sum.item() == 0
    assert loss.count.item() == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_frozen_inputs_get_no_gradient_and_evaluation_none_at_all():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    said = LogitTargets(torch.randn(3, 7))
    forward_kl(hidden, Head(weight), said).sum.backward()
    assert weight.grad is None
    assert hidden.grad is not None
    trained = weight.clone().requires_grad_()
    forward_kl(hidden.detach(), Head(trained), said).sum.backward()
    assert trained.grad is not None
    assert not forward_kl(hidden.detach(), Head(weight), said).sum.requires_grad
    with torch.no_grad():
        assert not forward_kl(hidden, Head(trained), said).sum.requires_grad


def test_backward_scales_by_what_comes_from_above_and_once():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    said = LogitTargets(torch.randn(3, 7))
    plain = torch.autograd.grad(forward_kl(hidden, Head(weight), said).sum, (hidden, weight))
    loss = forward_kl(hidden, Head(weight), said).sum
    scaled = torch.autograd.grad(loss * -2.5, (hidden, weight), retain_graph=True)
    for g, s in zip(plain, scaled):
        torch.testing.assert_close(s, -2.5 * g)
    with pytest.raises(RuntimeError, match="already"):
        loss.backward()


def test_chunks_and_threads_change_nothing_but_rounding():
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 8), torch.randn(90, 8)
    said = HiddenTargets(torch.randn(50, 6), Head(torch.randn(90, 6)))

    def once(threads: int, chunk_bytes: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = divergence(h, Head(w), said, kind="skew_kl", chunk_bytes=chunk_bytes)
            return [loss.sum.detach(), *torch.autograd.grad(loss.sum, (h, w))]
        finally:
            torch.set_num_threads(before)

    whole = once(1, 2**26)
    for a, b in zip(whole, once(1, 2**26)):
        assert torch.equal(a, b)
    for other in (once(1, 1), once(1, 20 * 90 * 8), once(2, 2**26)):
        for a, b in zip(whole, other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_products_are_as_exact_as_the_plain_formula_on_bfloat16_logits():
    """What 8 bits a logit cost, about 2 % of the gradient's norm here, is the same as without chunks and kernel."""
    torch.manual_seed(0)
    hidden, weight, far, far_weight = (torch.randn(n, 16).bfloat16().float() for n in (40, 300, 40, 300))
    said = HiddenTargets(far, Head(far_weight))

    def gradient(autocast: bool, dtype: torch.dtype, **options) -> list[Tensor]:
        h, w = (x.to(dtype).detach().clone().requires_grad_() for x in (hidden, weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = divergence(h, Head(w), said, kind="jensen_shannon", chunk_bytes=16 * 300 * 4, **options)
        assert loss.sum.dtype == torch.float32
        loss.sum.backward()
        assert h.grad.dtype == w.grad.dtype == dtype
        return [h.grad.float(), w.grad.float()]

    exact = gradient(False, torch.float32)
    h, w = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    s = torch.log_softmax((h @ w.t()).float(), -1)
    t = torch.log_softmax((far.bfloat16() @ far_weight.bfloat16().t()).float(), -1)
    m = torch.logaddexp(s, t) - math.log(2)
    plain = torch.autograd.grad(0.5 * (t.exp() * (t - m) + s.exp() * (s - m)).sum(), (h, w))
    for case in ((True, torch.float32), (False, torch.bfloat16)):
        for options in ({}, {"compiled": False}, {"float32_gradient": True}):
            for got, usual, want in zip(gradient(*case, **options), plain, exact):
                assert (got - want).norm() < 1.05 * (usual.float() - want).norm() < 0.03 * want.norm()


def test_labels_alone_equal_cross_entropy_and_minus_100_drops_a_row():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(11, 4)
    labels = torch.randint(11, (2, 5))
    labels[0, :2] = -100
    loss = cross_entropy(hidden, Head(weight), labels)
    want = torch.nn.functional.cross_entropy((hidden @ weight.t()).view(-1, 11), labels.view(-1), reduction="sum")
    assert loss.sum.item() == pytest.approx(want.item(), rel=1e-6)
    assert loss.count.item() == 8
    assert loss.parts["cross_entropy"].item() == pytest.approx(want.item(), rel=1e-6)


def test_a_bucket_never_exceeds_the_full_divergence():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 30), torch.log_softmax(2 * torch.randn(6, 30), -1)
    values, ids = teacher.topk(5)
    for kind in KINDS:
        bucket = divergence(student, identity(30), TopKTargets(ids, values), kind=kind).sum
        assert 0 < bucket < of_logits(student, teacher, kind=kind)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@PATHS
@pytest.mark.parametrize("tail", ["bucket", "uniform", "hidden"])
def test_no_tokens_by_vocabulary_matrix_is_ever_alive(tail, compiled):
    rows, vocabulary, width = 640, 1000, 4
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    ids = torch.arange(5).repeat(rows, 1)
    said = TopKTargets(ids, torch.full(ids.shape, math.log(0.1)))
    if tail == "hidden":
        said = HiddenTargets(torch.randn(rows, width), Head(torch.randn(vocabulary, width)))
    budget = 64 * vocabulary * 4
    options = {"tail": "uniform" if tail == "uniform" else "bucket", "chunk_bytes": budget, "compiled": compiled}
    with Largest() as seen:
        loss = divergence(hidden, Head(weight), said, **options)
        loss.sum.backward()
    assert vocabulary * width <= seen.numbers <= budget // 4
    assert seen.numbers * 10 <= rows * vocabulary


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "above 0"),
        ({"temperature": math.nan}, "temperature"),
        ({"beta": 2.0}, r"beta is 2.0; it must lie in \[0, 1\]"),
        ({"alpha": -0.1}, r"alpha is -0.1; it must lie in \[0, 1\]"),
        ({"kind": "kl"}, "no divergence 'kl'"),
        ({"tail": "none"}, "bucket"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\)"),
        ({"mask": torch.ones(2, 3)}, "boolean"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "labels has shape"),
        ({"labels": torch.full((2, 3), 7)}, "hold 7, outside the vocabulary"),
        ({"labels": torch.full((2, 3), -1)}, "hold -1, outside the vocabulary"),
        ({"labels": torch.zeros(2, 3)}, "int64"),
        ({"teacher": LogitTargets(torch.randn(2, 3, 8))}, "8 entries and the student's 7"),
        ({"teacher": LogitTargets(torch.randn(2, 4, 7))}, "give the teacher's targets for every position"),
        ({"teacher": HiddenTargets(torch.randn(2, 3, 5), Head(torch.randn(7, 6)))}, "5 wide and its head reads 6"),
        ({"teacher": TopKTargets(torch.full((2, 3, 1), 9), torch.zeros(2, 3, 1))}, "hold 9"),
        ({"teacher": TopKTargets(torch.zeros(2, 3, 1, dtype=torch.int64), torch.zeros(2, 3, 2))}, "must be the same"),
        ({"head": Head(torch.randn(7, 5))}, "4 wide and its head reads 5"),
        ({"teacher": None}, "neither a teacher nor labels"),
    ],
)
def test_bad_input_is_named_before_any_work(change, words):
    good = {
        "hidden": torch.randn(2, 3, 4),
        "head": Head(torch.randn(7, 4)),
        "teacher": LogitTargets(torch.randn(2, 3, 7)),
    }
    with pytest.raises(UserError, match=words):
        divergence(**(good | change))


def test_sampled_targets_refuse_what_they_cannot_estimate():
    said = SampledTargets(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    for change in ({"kind": "reverse_kl"}, {"temperature": 2.0}):
        with pytest.raises(UserError, match="forward_kl"):
            divergence(torch.randn(2, 4), Head(torch.randn(7, 4)), said, **change)


def test_without_a_compiler_the_pytorch_form_takes_over(monkeypatch):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)
    with_kernel = of_logits(student, teacher).item()
    kernel._library.cache_clear()
    monkeypatch.setattr(kernel.shutil, "which", lambda _: None)
    try:
        assert "no C compiler" in kernel.status()
        assert of_logits(student, teacher).item() == pytest.approx(with_kernel, rel=1e-6)
    finally:
        kernel._library.cache_clear()
