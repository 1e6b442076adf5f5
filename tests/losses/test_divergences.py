"""The fused divergence core against the dense formulas in float64, and against the values that theory gives."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SampledTargets, SoftTargets, TopKTargets
from preceptor.losses.divergences import (
    cross_entropy,
    divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation")
TEACHERS = ("hidden", "logits", "bucket", "uniform")
PATHS = ("compiled", "pytorch", "float64")
EXACT = {"compiled": 1e-5, "pytorch": 1e-5, "float64": 1e-11}
BFLOAT16 = 0.03  # of the value and of the gradients' norms: a bfloat16 logit of 4 is off by up to 0.008
ROWS, WIDTH, VOCABULARY = 9, 16, 67
OTHERS = {"bias": True, "scale": 0.7, "softcap": 5.0, "temperature": 1.7, "weight": 0.6, "label_weight": 0.3}


def dense(kind: str, beta: float, alpha: float, s: Tensor, t: Tensor) -> Tensor:
    """The formulas of the module's table, from log-probabilities."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).masked_fill(a == -math.inf, 0.0).sum(-1)

    def mixture(share: float) -> Tensor:
        if share in (0.0, 1.0):
            return t if share else s
        return torch.logaddexp(t + math.log(share), s + math.log1p(-share))

    if kind == "total_variation":
        return 0.5 * (s.exp() - t.exp()).abs().sum(-1)
    if kind == "jensen_shannon" and beta not in (0.0, 1.0):
        return beta * kl(t, mixture(beta)) + (1 - beta) * kl(s, mixture(beta))
    if kind == "skew_kl":
        return kl(t, mixture(alpha))
    if kind == "skew_reverse_kl":
        return kl(s, mixture(1 - alpha))
    forward = kind == "forward_kl" or (kind == "jensen_shannon" and beta == 0.0)
    return kl(t, s) if forward else kl(s, t)


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    z = hidden @ head.weight.t()
    z = head.scale * (z if head.bias is None else z + head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def top_k_dense(targets: TopKTargets, vocabulary: int) -> Tensor:
    """Full log-probabilities with a flat tail, slot by slot."""
    out = torch.zeros(targets.ids.shape[0], vocabulary, dtype=torch.float64)
    for row, (ids, values) in enumerate(zip(targets.ids.tolist(), targets.log_probs.double().tolist())):
        listed = {i: v for i, v in zip(ids, values) if v > -math.inf}
        mass = max(1 - sum(math.exp(v) for v in listed.values()), 0.0)
        if len(listed) < vocabulary:
            out[row] = math.log(mass / (vocabulary - len(listed)))
        for i, v in listed.items():
            out[row, i] = v
    return out


def bucket_classes(log_probs: Tensor, targets: TopKTargets) -> Tensor:
    """Dense log-probabilities as the listed classes and one for all the rest; unused slots are empty classes."""
    listed = torch.zeros_like(log_probs, dtype=torch.bool)
    used = targets.log_probs > -math.inf
    for row in range(len(used)):
        listed[row, targets.ids[row][used[row]]] = True
    kept = log_probs.gather(-1, targets.ids).masked_fill(~used, -math.inf)
    return torch.cat((kept, log_probs.masked_fill(listed, -math.inf).logsumexp(-1, keepdim=True)), -1)


def reference(hidden: Tensor, head: Head, teacher: SoftTargets | None, **options) -> Tensor:
    """What `divergence` should return: all in float64, dense, differentiable by autograd."""
    heat, labels, tail = options.get("temperature", 1.0), options.get("labels"), options.get("tail", "bucket")
    mask = options.get("mask")
    keep = torch.ones(hidden.shape[0], dtype=torch.bool) if mask is None else mask
    if mask is None and labels is not None:
        keep = labels != -100
    z = logits_of(hidden, head)
    s = torch.log_softmax(z / heat, -1)
    if isinstance(teacher, HiddenTargets):
        far = Head(*(None if x is None else x.double() for x in (teacher.head.weight, teacher.head.bias)))
        far = Head(far.weight, far.bias, teacher.head.scale, teacher.head.softcap)
        t = torch.log_softmax(logits_of(teacher.hidden.double(), far) / heat, -1)
    elif isinstance(teacher, LogitTargets):
        t = torch.log_softmax(teacher.logits.double() / heat, -1)
    elif isinstance(teacher, TopKTargets):
        t = torch.log_softmax(top_k_dense(teacher, z.shape[-1]) / heat, -1)
        if tail == "bucket":
            s, t = bucket_classes(s, teacher), bucket_classes(t, teacher)
    total = torch.zeros((), dtype=torch.float64)
    if isinstance(teacher, SampledTargets):
        each = -(teacher.weights.double() * s.gather(-1, teacher.ids)).sum(-1)
        total = total + options.get("weight", 1.0) * each[keep].sum()
    elif teacher is not None:
        each = dense(options["kind"], options.get("beta", 0.5), options.get("alpha", 0.1), s, t)
        total = total + options.get("weight", 1.0) * heat**2 * each[keep].sum()
    if labels is not None:
        chosen = torch.nn.functional.cross_entropy(z, labels, reduction="none", ignore_index=-100)
        total = total + options.get("label_weight", 0.0) * chosen[keep].sum()
    return total


def make_head(vocabulary: int, width: int, *, bias=False, scale=1.0, softcap=None) -> Head:
    return Head(torch.randn(vocabulary, width) * 0.5, torch.randn(vocabulary) if bias else None, scale, softcap)


def make_teacher(name: str, *, rows=ROWS, width=WIDTH, vocabulary=VOCABULARY, k=8, head=None) -> SoftTargets | None:
    if name == "none":
        return None
    head = head or make_head(vocabulary, width)
    hidden = torch.randn(rows, head.weight.shape[1])
    logits = logits_of(hidden, head)
    if name == "hidden":
        return HiddenTargets(hidden, head)
    if name == "logits":
        return LogitTargets(logits)
    if name == "sampled":
        weights = torch.rand(rows, k) + 0.1
        return SampledTargets(torch.randint(vocabulary, (rows, k)), weights / weights.sum(-1, keepdim=True))
    values, ids = torch.log_softmax(logits, -1).topk(k)
    values[::3, k // 2 :] = -math.inf
    ids[::3, k // 2 :] = ids[::3, :1]
    return TopKTargets(ids, values)


def gradients(total: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(total, [x for x in inputs if x is not None])]


def check(hidden: Tensor, head: Head, teacher: SoftTargets | None, tolerance: float, autocast=False, **options) -> None:
    """Value and gradients of hidden states, weight and bias against the dense formula."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in (hidden, head.weight, head.bias)]
    wide = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = divergence(inputs[0], Head(inputs[1], inputs[2], head.scale, head.softcap), teacher, **options)
    asked = {name: value for name, value in options.items() if name not in ("compiled", "chunk_bytes")}
    want = reference(wide[0], Head(wide[1], wide[2], head.scale, head.softcap), teacher, **asked)
    floor = 0.0 if hidden.dtype == torch.float64 else 1e-7 * len(hidden)  # float32 knows a sum over q to 1e-7
    assert got.sum.item() == pytest.approx(want.item(), rel=tolerance, abs=floor)
    for g, w in zip(gradients(got.sum, *inputs), gradients(want, *wide)):
        assert torch.linalg.vector_norm(g - w) <= tolerance * torch.linalg.vector_norm(w) + floor


def cases(kind: str, name: str, everything: bool, seed: int = 0):
    torch.manual_seed(seed)
    some = {n: OTHERS[n] for n in ("bias", "scale", "softcap")} if everything else {}
    head, hidden = make_head(VOCABULARY, WIDTH, **some), torch.randn(ROWS, WIDTH)
    teacher = make_teacher(name, head=make_head(VOCABULARY, 12, **some) if everything else None)
    options = {"kind": kind, "tail": "uniform" if name == "uniform" else "bucket"}
    if everything:
        options |= {n: OTHERS[n] for n in ("temperature", "weight", "label_weight")}
        options |= {"chunk_bytes": 3 * 4 * VOCABULARY, "beta": 0.2, "alpha": 0.3}
        options |= {"mask": torch.rand(ROWS) < 0.7, "labels": torch.randint(VOCABULARY, (ROWS,))}
        options["labels"][::4] = -100
    if name == "sampled":
        options["temperature"] = 1.0
    if name == "none":
        options["labels"] = torch.randint(VOCABULARY, (ROWS,))
        options["label_weight"] = 0.8
    return hidden, head, teacher, options


GRID = [(kind, name) for kind in KINDS for name in TEACHERS] + [("forward_kl", "sampled"), ("forward_kl", "none")]


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "name"), GRID)
def test_value_and_gradients_equal_the_dense_formula(kind, name, path, everything):
    hidden, head, teacher, options = cases(kind, name, everything)
    if path == "float64":
        hidden = hidden.double()
        head = Head(head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap)
    check(hidden, head, teacher, EXACT[path], compiled=path == "compiled", **options)


@pytest.mark.parametrize(("kind", "name"), GRID[:5])
def test_labels_add_to_it_at_temperature_one(kind, name):
    hidden, head, teacher, options = cases(kind, name, everything=False)
    check(hidden, head, teacher, 1e-5, **options, labels=torch.arange(ROWS), label_weight=0.5)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("kind", "name"), GRID)
def test_bfloat16_stays_within_its_stated_distance(kind, name, compiled):
    hidden, head, teacher, options = cases(kind, name, everything=True, seed=2)
    check(hidden, head, teacher, BFLOAT16, autocast=True, compiled=compiled, **options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_combination_equals_the_dense_formula(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    kind, name = draw(*GRID)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    # 2,100 entries are more than one block of the products and more than two of the kernel's sums.
    rows, width, vocabulary = draw(1, 2, 17, 40), draw(4, 33), draw(19, 130, 2100)
    shape = {"bias": draw(True, False), "scale": draw(1.0, 0.3), "softcap": draw(None, 4.0)}
    head, hidden = make_head(vocabulary, width, **shape), torch.randn(rows, width)
    teacher = make_teacher(name, rows=rows, vocabulary=vocabulary, head=make_head(vocabulary, draw(4, 20), **shape))
    options = {"kind": kind, "tail": "uniform" if name == "uniform" else "bucket"}
    options |= {"beta": draw(0.0, 0.1, 0.5, 0.9, 1.0), "alpha": draw(0.0, 0.1, 0.7), "weight": draw(1.0, 2.5)}
    options["temperature"] = 1.0 if name == "sampled" else draw(1.0, 0.5, 3.0)
    if name == "none" or draw(True, False):
        options |= {"labels": torch.randint(vocabulary, (rows,)), "label_weight": 0.4}
    if rows > 1 and draw(True, False):
        options["mask"] = torch.arange(rows) % 3 != 1
    check(hidden, head, teacher, 1e-5, compiled=draw(True, False), chunk_bytes=draw(1, 10**5, 10**8), **options)


@pytest.mark.parametrize("compiled", [True, False])
def test_parts_are_the_entropies_and_the_agreement(compiled):
    hidden, head, teacher, _ = cases("forward_kl", "hidden", everything=False)
    s = torch.log_softmax(logits_of(hidden, head).double(), -1)
    t = torch.log_softmax(logits_of(teacher.hidden, teacher.head).double(), -1)
    parts = divergence(hidden, head, teacher, compiled=compiled).parts
    assert parts["student_entropy"].item() == pytest.approx(-(s.exp() * s).sum().item(), rel=1e-5)
    assert parts["teacher_entropy"].item() == pytest.approx(-(t.exp() * t).sum().item(), rel=1e-5)
    assert parts["agreement"] == (s.argmax(-1) == t.argmax(-1)).sum()
    assert not any(part.requires_grad for part in parts.values())


P, Q = (0.6, 0.3, 0.1), (0.2, 0.5, 0.3)


def between(p, q, kind, *, double=False, compiled=True, **options) -> float:
    """A divergence of two distributions given as probabilities: an identity as head makes hidden states logits."""
    dtype = torch.float64 if double else torch.float32
    p, q = (torch.log(torch.as_tensor(x, dtype=torch.float64)).to(dtype).unsqueeze(0) for x in (p, q))
    z = Head(torch.eye(p.shape[-1], dtype=dtype))
    bias = q.squeeze(0)
    student = Head(z.weight, bias)
    return divergence(torch.zeros_like(p), student, LogitTargets(p), kind=kind, compiled=compiled, **options).sum.item()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "value"),
    [
        ("forward_kl", {}, 0.3960585),
        ("reverse_kl", {}, 0.3652740),
        ("total_variation", {}, 0.4),
        ("jensen_shannon", {"beta": 0.0}, 0.3960585),
        ("jensen_shannon", {"beta": 0.1}, 0.0347612),
        ("jensen_shannon", {"beta": 0.5}, 0.0911208),
        ("jensen_shannon", {"beta": 0.9}, 0.0326325),
        ("jensen_shannon", {"beta": 1.0}, 0.3652740),
        ("skew_kl", {"alpha": 0.1}, 0.3058114),
        ("skew_kl", {"alpha": 0.5}, 0.0876597),
        ("skew_kl", {"alpha": 0.0}, 0.3960585),
        ("skew_kl", {"alpha": 1.0}, 0.0),
        ("skew_reverse_kl", {"alpha": 0.1}, 0.2921069),
        ("skew_reverse_kl", {"alpha": 0.5}, 0.0945819),
        ("skew_reverse_kl", {"alpha": 0.0}, 0.3652740),
        ("skew_reverse_kl", {"alpha": 1.0}, 0.0),
    ],
)
def test_reference_values(kind, options, value, compiled, double):
    assert between(P, Q, kind, compiled=compiled, double=double, **options) == pytest.approx(value, abs=1.5e-7)


def test_limits_of_jensen_shannon():
    near = between(P, Q, "jensen_shannon", double=True, beta=1e-4) / 1e-4
    assert near == pytest.approx(0.3960078, abs=1e-7)
    far = between(P, Q, "jensen_shannon", double=True, beta=1 - 1e-7) / 1e-7
    assert far == pytest.approx(0.3652740, abs=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_properties_of_random_pairs(compiled):
    torch.manual_seed(0)
    for spread in (0.1, 1.0, 8.0):
        p, q = torch.softmax(spread * torch.randn(2, 50, dtype=torch.float64), -1)
        found = {kind: between(p, q, kind, compiled=compiled) for kind in KINDS}
        assert all(value > 0 for value in found.values())
        assert all(abs(between(p, p, kind, compiled=compiled)) < 1e-6 for kind in KINDS)
        assert found["jensen_shannon"] == pytest.approx(between(q, p, "jensen_shannon", compiled=compiled), rel=1e-4)
        assert found["jensen_shannon"] <= math.log(2)
        assert found["total_variation"] <= min(1.0, math.sqrt(found["forward_kl"] / 2))
        backward = between(q, p, "forward_kl", compiled=compiled)
        assert found["reverse_kl"] == pytest.approx(backward, rel=1e-5, abs=5e-7)
        for kind in KINDS:
            assert between(p * 64, q / 32, kind, compiled=compiled) == pytest.approx(found[kind], rel=1e-5, abs=5e-7)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_ten_thousand_stay_finite(kind, compiled):
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0], [-1e4, -1e4, 1e4, 1e4]], requires_grad=True)
    teacher = LogitTargets(logits.detach().flip(-1))
    loss = divergence(logits, Head(torch.eye(4)), teacher, kind=kind, compiled=compiled).sum
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    if kind == "forward_kl":
        assert loss.item() == pytest.approx(9995.0 + 2e4, rel=1e-4)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_infinity_is_reported_and_skewed_kinds_stay_finite(compiled, double):
    options = {"compiled": compiled, "double": double}
    assert between(P, (0.4, 0.6, 0.0), "forward_kl", **options) == math.inf
    assert between((0.4, 0.6, 0.0), Q, "reverse_kl", **options) == math.inf
    assert between((0.4, 0.6, 0.0), Q, "forward_kl", **options) == pytest.approx(
        0.4 * math.log(2) + 0.6 * math.log(1.2), rel=1e-6
    )
    for kind in ("jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"):
        assert 0 < between(P, (0.4, 0.6, 0.0), kind, **options) < 2.4
        assert 0 < between((0.4, 0.6, 0.0), Q, kind, **options) < 2.4
    assert math.isfinite(between((0.5, 0.5, 0.0), (0.1, 0.9, 0.0), "forward_kl", **options))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_masked(kind, compiled):
    logits = torch.randn(3, 5)
    logits[1, 2] = math.nan
    for student, teacher in ((logits, torch.randn(3, 5)), (torch.randn(3, 5), logits)):
        loss = divergence(student, Head(torch.eye(5)), LogitTargets(teacher), kind=kind, compiled=compiled)
        assert loss.sum.isnan()


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_agree(kind, name):
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (6, 4), (6,))]
    teacher = make_teacher(name, rows=3, width=4, vocabulary=6, k=3)
    options = {"labels": torch.tensor([0, -100, 5]), "mask": torch.ones(3, dtype=torch.bool), "label_weight": 0.5}
    options |= {"tail": "uniform" if name == "uniform" else "bucket", "temperature": 1.3, "chunk_bytes": 1}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return divergence(hidden, Head(weight, bias, 0.9, 3.0), teacher, kind=kind, **options).sum

    for at, gradient in enumerate(gradients(loss(*inputs), *inputs)):
        step = torch.zeros_like(gradient)
        for entry in range(gradient.numel()):
            step.view(-1)[entry] = 1e-5
            up, down = ([x + step if i == at else x for i, x in enumerate(inputs)] for step in (step, -step))
            slope = (loss(*up) - loss(*down)).item() / 2e-5
            assert slope == pytest.approx(gradient.view(-1)[entry].item(), rel=1e-6, abs=1e-8)
            step.zero_()


def test_named_functions_are_the_kinds():
    hidden, head, teacher, _ = cases("forward_kl", "logits", everything=False)
    for function in (forward_kl, reverse_kl, jensen_shannon, skew_kl, skew_reverse_kl, total_variation):
        want = divergence(hidden, head, teacher, kind=function.__name__, temperature=2.0).sum
        assert torch.equal(function(hidden, head, teacher, temperature=2.0).sum, want)
    assert torch.equal(
        jensen_shannon(hidden, head, teacher, 0.2).sum,
        divergence(hidden, head, teacher, kind="jensen_shannon", beta=0.2).sum,
    )
    labels = torch.randint(VOCABULARY, (ROWS,))
    want = torch.nn.functional.cross_entropy(logits_of(hidden, head), labels, reduction="sum").item()
    assert cross_entropy(hidden, head, labels).sum.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_samples_estimate_the_gradient_of_forward_kl(compiled):
    torch.manual_seed(0)
    logits, teacher = torch.randn(1, 7, requires_grad=True), torch.randn(1, 7)
    p = torch.softmax(teacher, -1)
    drawn = SampledTargets(torch.multinomial(p, 200_000, replacement=True), torch.full((1, 200_000), 1 / 200_000))
    head = Head(torch.eye(7))
    sampled = divergence(logits, head, drawn, compiled=compiled).sum
    exact = divergence(logits, head, LogitTargets(teacher), compiled=compiled).sum
    (rough,), (fine,) = gradients(sampled, logits), gradients(exact, logits)
    assert (rough - fine).abs().max() < 0.005
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    assert sampled.item() - entropy.item() == pytest.approx(exact.item(), abs=0.01)


@pytest.mark.parametrize("compiled", [True, False])
def test_all_tokens_listed_is_the_dense_divergence(compiled):
    torch.manual_seed(0)
    logits, teacher = torch.randn(4, 9), torch.randn(4, 9)
    listed = TopKTargets(*torch.log_softmax(teacher, -1).sort(-1)[::-1])
    for kind in KINDS:
        want = divergence(logits, Head(torch.eye(9)), LogitTargets(teacher), kind=kind, compiled=compiled).sum.item()
        for tail in ("bucket", "uniform"):
            got = divergence(logits, Head(torch.eye(9)), listed, kind=kind, tail=tail, compiled=compiled).sum.item()
            assert got == pytest.approx(want, rel=1e-5)
