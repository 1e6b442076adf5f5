"""What the fused divergence core costs, accepts, refuses and falls back to."""

import math
import shutil

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SampledTargets, SoftTargets, TopKTargets
from preceptor.losses import kernel
from preceptor.losses.divergences import divergence

ROWS, WIDTH, VOCABULARY = 9, 16, 67
OPTIONS = {"temperature": 1.7, "weight": 0.6, "chunk_bytes": 3 * 4 * VOCABULARY}


def make_head(vocabulary: int = VOCABULARY, width: int = WIDTH) -> Head:
    return Head(torch.randn(vocabulary, width) * 0.5, torch.randn(vocabulary), 0.7, 5.0)


def make_teacher(name: str, *, rows=ROWS, width=WIDTH, vocabulary=VOCABULARY, k=8) -> SoftTargets:
    if name == "hidden":
        return HiddenTargets(torch.randn(rows, width), make_head(vocabulary, width))
    if name == "logits":
        return LogitTargets(torch.randn(rows, vocabulary))
    if name == "sampled":
        return SampledTargets(torch.randint(vocabulary, (rows, k)), torch.full((rows, k), 1 / k))
    values, ids = torch.log_softmax(torch.randn(rows, vocabulary), -1).topk(k)
    return TopKTargets(ids, values)


def case(name: str) -> tuple[Tensor, Head, SoftTargets]:
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH), make_head(), make_teacher(name)


class Watch(TorchDispatchMode):
    """The largest result of any operation, and the rows that go through products."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        if any(name in str(function) for name in ("mm", "_linear_pointwise")):
            self.products.append(args[-2].shape if "addmm" in str(function) else args[0].shape)
        return out


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["hidden", "bucket", "uniform", "sampled"])
def test_no_matrix_of_rows_by_vocabulary_is_ever_alive(name, compiled):
    rows, vocabulary = 4096, 512
    head, hidden = make_head(vocabulary, 8), torch.randn(rows, 8, requires_grad=True)
    head.weight.requires_grad_()
    teacher = make_teacher(name, rows=rows, width=8, vocabulary=vocabulary)
    with Watch() as watch:
        options = {"compiled": compiled, "chunk_bytes": 64 * vocabulary * 4}
        divergence(hidden, head, teacher, tail="uniform" if name == "uniform" else "bucket", **options).sum.backward()
    assert watch.products
    assert watch.largest <= max(64 * vocabulary, rows * 9)


@pytest.mark.parametrize("compiled", [True, False])
def test_masked_rows_and_a_frozen_head_cost_no_products(compiled):
    hidden, head = torch.randn(64, 8, requires_grad=True), make_head(40, 8)
    teacher, mask = make_teacher("hidden", rows=64, width=8, vocabulary=40), torch.arange(64) % 4 == 0
    seen = []
    for frozen, chosen in ((True, None), (True, mask), (False, mask)):
        head.weight.requires_grad_(not frozen)
        with Watch() as watch:
            divergence(hidden, head, teacher, mask=chosen, compiled=compiled).sum.backward()
        seen.append([tuple(shape) for shape in watch.products])
    assert [shape[0] for shape in seen[0]] == [64, 64, 64]
    assert [shape[0] for shape in seen[1]] == [16, 16, 16]
    assert len(seen[2]) == 4
    assert (40, 16) in seen[2]


def test_no_gradient_is_made_where_none_is_asked():
    hidden, head, teacher = case("hidden")
    with Watch() as watch:
        loss = divergence(hidden, head, teacher)
    assert len(watch.products) == 2
    assert not loss.sum.requires_grad


@pytest.mark.parametrize("compiled", [True, False])
def test_leading_shapes_and_packed_targets_say_the_same(compiled):
    torch.manual_seed(0)
    hidden, head, teacher = torch.randn(2, 5, WIDTH), make_head(), make_teacher("logits", rows=10)
    mask, labels = torch.rand(2, 5) < 0.6, torch.randint(VOCABULARY, (2, 5))
    options = {"mask": mask, "labels": labels, "label_weight": 0.5, "compiled": compiled}
    shaped = divergence(hidden, head, LogitTargets(teacher.logits.view(2, 5, -1)), **options)
    packed = divergence(hidden, head, LogitTargets(teacher.logits[mask.view(-1)]), **options)
    assert torch.equal(shaped.sum, packed.sum)
    assert shaped.count == mask.sum()
    assert shaped.sum.item() == pytest.approx((shaped.parts["divergence"] + 0.5 * shaped.parts["cross_entropy"]).item())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_unused_slots_are_harmless_whatever_they_name(tail, compiled):
    torch.manual_seed(0)
    logits, head = torch.randn(1, 9, requires_grad=True), Head(torch.eye(9))
    kept = torch.tensor([[0.5, 0.2]]).log()
    short = TopKTargets(torch.tensor([[3, 1]]), kept)
    padded = torch.cat((kept, torch.full((1, 3), -math.inf)), -1)
    want = divergence(logits, head, short, tail=tail, compiled=compiled).sum
    (slope,) = torch.autograd.grad(want, logits)
    for ids in ([3, 1, 0, 0, 0], [3, 1, 3, 1, 8]):
        got = divergence(logits, head, TopKTargets(torch.tensor([ids]), padded), tail=tail, compiled=compiled).sum
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        assert torch.allclose(torch.autograd.grad(got, logits)[0], slope)


@pytest.mark.parametrize("name", ["hidden", "bucket", "sampled"])
def test_threads_change_nothing(name):
    hidden, head, teacher = case(name)
    options = OPTIONS | ({"temperature": 1.0} if name == "sampled" else {})
    before = torch.get_num_threads()
    try:
        sums = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            x = hidden.clone().requires_grad_()
            loss = divergence(x, head, teacher, **options).sum
            sums.append((loss, *torch.autograd.grad(loss, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*sums))


def test_backward_scales_and_runs_once():
    hidden, head, teacher = case("logits")
    hidden.requires_grad_()
    (one,) = torch.autograd.grad(divergence(hidden, head, teacher).sum, hidden)
    scaled = divergence(hidden, head, teacher).sum / 4
    (quarter,) = torch.autograd.grad(scaled, hidden, retain_graph=True)
    assert torch.allclose(quarter, one / 4)
    with pytest.raises(RuntimeError, match="differentiated already"):
        scaled.backward()


def test_an_empty_mask_is_zero_with_a_warning_and_connected():
    hidden, head, teacher = case("hidden")
    hidden.requires_grad_()
    head.weight.requires_grad_()
    with pytest.warns(UserWarning, match="No position is selected"):
        loss = divergence(hidden, head, teacher, mask=torch.zeros(ROWS, dtype=torch.bool))
    loss.sum.backward()
    assert loss.sum.item() == 0
    assert loss.count == 0
    assert hidden.grad.abs().max() == 0
    assert head.weight.grad.abs().max() == 0


def _wrong():
    torch.manual_seed(0)
    logits, labels = LogitTargets(torch.randn(ROWS, VOCABULARY)), torch.zeros(ROWS, dtype=torch.int64)
    yield LogitTargets(torch.randn(ROWS, 70)), {}, "70 entries and the student's 67"
    yield make_teacher("hidden", vocabulary=80), {}, "80 entries and the student's 67"
    yield LogitTargets(torch.randn(ROWS - 1, VOCABULARY)), {}, r"\(8,\) and the student has 9"
    yield HiddenTargets(torch.randn(ROWS, 5), make_head(VOCABULARY, 6)), {}, "5 wide and its head reads 6"
    yield TopKTargets(torch.zeros(ROWS, 2, dtype=torch.int64), torch.zeros(ROWS, 3)), {}, r"\(9, 2\).*\(9, 3\)"
    yield TopKTargets(torch.full((ROWS, 2), 67), torch.full((ROWS, 2), -1.0)), {}, r"hold 67, outside.*\[0, 67\)"
    yield make_teacher("sampled"), {"kind": "reverse_kl"}, "Sampled targets estimate the forward KL"
    for value in (0.0, -1.0, math.nan, math.inf):
        yield logits, {"temperature": value}, "temperature is .* above 0"
    for name, value in (("beta", 2.0), ("beta", -0.1), ("alpha", 1.5), ("alpha", math.nan)):
        yield logits, {name: value}, rf"{name} is {value}; it must lie in \[0, 1\]"
    yield logits, {"kind": "kl"}, "no divergence 'kl'; choose one of forward_kl"
    yield logits, {"tail": "zero"}, "'bucket' or 'uniform'"
    yield logits, {"chunk_bytes": 0}, "chunk_bytes is 0"
    yield logits, {"mask": torch.ones(ROWS + 1, dtype=torch.bool)}, r"mask has shape \(10,\).*\(9,\)"
    yield logits, {"mask": torch.ones(ROWS)}, "make it boolean"
    yield logits, {"labels": labels[1:]}, r"labels has shape \(8,\)"
    yield logits, {"labels": labels + 67}, r"labels hold 67, outside the vocabulary \[0, 67\)"
    yield logits, {"labels": labels - 1}, "labels hold -1"
    yield logits, {"labels": labels.float()}, "must be int64"
    yield None, {}, "neither a teacher nor labels"


@pytest.mark.parametrize(("teacher", "options", "sentence"), list(_wrong()))
def test_errors_say_what_does_not_fit(teacher, options, sentence):
    with pytest.raises(UserError, match=sentence):
        divergence(torch.randn(ROWS, WIDTH), make_head(VOCABULARY, WIDTH), teacher, **options)


def test_a_head_of_another_width_is_refused():
    with pytest.raises(UserError, match="16 wide and its head reads 12"):
        divergence(torch.randn(ROWS, WIDTH), make_head(VOCABULARY, 12), make_teacher("logits"))


@pytest.fixture
def fresh_kernel(monkeypatch, tmp_path):
    """The kernel as in a new process with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel._library.cache_clear()
    yield tmp_path
    kernel._library.cache_clear()


def test_without_a_compiler_the_pytorch_form_is_used(fresh_kernel, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "there is no C compiler" in kernel.status()
    hidden, head, teacher = case("hidden")
    assert torch.equal(
        divergence(hidden, head, teacher, kind="jensen_shannon", **OPTIONS).sum,
        divergence(hidden, head, teacher, kind="jensen_shannon", compiled=False, **OPTIONS).sum,
    )


COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler to build the kernel with"
)


@COMPILER
def test_status_names_the_build_which_is_kept(fresh_kernel):
    assert kernel.status() == f"Divergences run in a compiled CPU kernel ({next(fresh_kernel.rglob('rows-*.so'))})."
    assert kernel.usable(torch.zeros(1, 1))
    assert not kernel.usable(torch.zeros(1, 1, dtype=torch.float64))


@COMPILER
@pytest.mark.parametrize("mend", [("x->a[*label] -= ", "x->a[*label] += "), ("x->a[ids[j]] += a[j]", "(void)best")])
def test_a_build_that_computes_something_else_is_not_used(fresh_kernel, monkeypatch, mend):
    source = kernel.Path(kernel.__file__).with_name("rows.c").read_text()
    assert mend[0] in source
    wrong = fresh_kernel / "rows.c"
    wrong.write_text(source.replace(*mend))
    build = kernel._build
    monkeypatch.setattr(kernel, "_build", lambda compiler, _: build(compiler, wrong))
    assert "computes something else" in kernel.status()
    assert not kernel.usable(torch.zeros(1, 1))


@COMPILER
def test_a_source_that_does_not_compile_is_named(fresh_kernel, monkeypatch):
    wrong = fresh_kernel / "rows.c"
    wrong.write_text("not C")
    build = kernel._build
    monkeypatch.setattr(kernel, "_build", lambda compiler, _: build(compiler, wrong))
    assert "could not be built" in kernel.status()
