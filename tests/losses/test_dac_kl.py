"""DAC-KL against loops written from its equations, its bounds, its limits, and what f_sub learns."""

import math

import pytest
import torch

from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, LogitTargets, TopKTargets
from preceptor.losses.dac_kl import (
    Classes,
    Clipping,
    Quantiles,
    clipped_kl,
    clipped_rows,
    considered,
    gates,
    quantile_loss,
)
from preceptor.losses.divergences import forward_kl

V, WIDTH, LEAD = 23, 7, (2, 6)
P = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)


def made(seed=0, dtype=torch.float64, **head):
    torch.manual_seed(seed)
    hidden = torch.randn(*LEAD, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, WIDTH, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    teacher = LogitTargets(2 * torch.randn(*LEAD, V, dtype=dtype))
    mask = torch.rand(LEAD) > 0.3
    targets = torch.randint(V, LEAD)
    return hidden, Head(weight, bias, **head), teacher, mask, targets


def loop(p, q, target, lower, upper, top, softness=None):
    """One position, from the module's equations, with Python's floats: value, kept mass, gates by class."""
    order = sorted(range(len(p)), key=lambda v: -p[v])[:top]
    kept, before = {}, 0.0
    for v in order:
        after = before + p[v]
        if softness is None:
            kept[v] = float(before < upper and after > lower)
        else:
            kept[v] = 1 / (1 + math.exp(-(upper - before) / softness)) / (1 + math.exp(-(after - lower) / softness))
        before = after
    kept[target] = 1.0
    inside = sum(w * p[v] * math.log(p[v] / q[v]) for v, w in kept.items())
    tail_p = 1 - sum(w * p[v] for v, w in kept.items())
    tail_q = 1 - sum(w * q[v] for v, w in kept.items())
    tail = tail_p * math.log(tail_p / tail_q) if tail_p > 1e-12 else 0.0
    return inside + tail, 1 - tail_p, kept


def listed(log_p, log_q):
    """All classes of rows of distributions, the likeliest as the target."""
    order = log_p.argsort(-1, descending=True)
    p, q = log_p.gather(-1, order), log_q.gather(-1, order)
    nothing = torch.full_like(p[:, :1], -torch.inf)
    target = torch.zeros(len(p), p.shape[1] + 1, dtype=torch.bool)
    target[:, 0] = True
    zero = torch.zeros(len(p), dtype=p.dtype)
    return Classes(torch.cat([p, nothing], -1), torch.cat([q, nothing], -1), target, zero, zero)


def test_the_tail_class_keeps_the_loss_between_0_and_the_whole_divergence():
    """The card's five values; only the last is ours, the others show what is wrong with sums that have no tail."""
    q = torch.full((5,), 0.2, dtype=torch.float64)
    terms = P * (P / q).log()
    top = P[:3] / P[:3].sum()
    assert float(terms.sum()) == pytest.approx(0.3404, abs=5e-5)
    assert float((top * (top / (1 / 3)).log()).sum()) == pytest.approx(0.1176, abs=5e-5)
    assert float(terms[:3].sum()) == pytest.approx(0.4708, abs=5e-5)
    assert float(terms[2:].sum()) == pytest.approx(-0.1736, abs=5e-5)
    classes = listed(P.log().unsqueeze(0), q.log().unsqueeze(0))
    whole = clipped_rows(classes, gates(classes, torch.zeros(1), torch.ones(1), Clipping(mode="off")))[0]
    assert float(whole) == pytest.approx(0.3404, abs=5e-5)
    three = gates(classes, torch.tensor([0.0]), torch.tensor([0.8]), Clipping(mode="fixed"))
    assert three.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert float(clipped_rows(classes, three)[0]) == pytest.approx(0.3321, abs=5e-5)


def test_fixed_quantiles_keep_what_lies_between_them_and_the_target():
    classes = listed(P.log().unsqueeze(0), P.flip(0).log().unsqueeze(0))
    kept = gates(classes, torch.tensor([0.5]), torch.tensor([0.9]), Clipping(mode="fixed"))
    # C = .5 .75 .9 .97 1: the first is no more than l and stays as the target; before the fourth C is u.
    assert kept.tolist() == [[1, 1, 1, 0, 0, 0]]
    few = gates(classes, torch.tensor([0.5]), torch.tensor([0.7]), Clipping(mode="fixed", quantile="classes"))
    assert few.tolist() == [[1, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("head", [{}, {"scale": 1.5, "softcap": 3.0}])
@pytest.mark.parametrize("mode", ["fixed", "learned", "off"])
def test_value_and_gradient_are_those_of_the_equation(mode, head):
    hidden, made_head, teacher, mask, targets = made(**head)
    clipping = Clipping(mode=mode, top=6, lower=0.2, upper=0.7)
    f_sub = Quantiles(clipping, classes=V, seed=0)
    loss, classes = clipped_kl(
        hidden, made_head, teacher, clipping, mask=mask, targets=targets, quantiles=f_sub, chunk_bytes=4 * V * 3
    )
    z = torch.nn.functional.linear(hidden, made_head.weight, made_head.bias) * made_head.scale
    z = z if made_head.softcap is None else made_head.softcap * torch.tanh(z / made_head.softcap)
    log_q, log_p = z.log_softmax(-1)[mask], teacher.logits.log_softmax(-1)[mask]
    lower, upper = (ends.detach() for ends in f_sub(classes.features))
    expected, mass, dense = 0.0, 0.0, torch.zeros((), dtype=torch.float64)
    for row, target in enumerate(targets[mask].tolist()):
        p, q = log_p[row].exp(), log_q[row].exp()
        ends = (float(lower[row]), float(upper[row])) if mode == "learned" else (0.2, 0.7)
        ends = (-1.0, 2.0) if mode == "off" else ends
        value, kept_mass, kept = loop(
            p.tolist(), q.tolist(), target, *ends, 6, clipping.softness if mode == "learned" else None
        )
        expected, mass = expected + value, mass + kept_mass
        w = torch.tensor([kept.get(v, 0.0) for v in range(V)], dtype=torch.float64)
        tail_p, tail_q = 1 - (w * p).sum(), 1 - (w * q).sum()
        dense = dense + (w * p * (p.log() - log_q[row])).sum() + tail_p * (tail_p / tail_q).log()
    assert float(loss.sum.detach()) == pytest.approx(expected, abs=1e-6)
    assert float(loss.parts["kept_mass"]) == pytest.approx(mass, abs=1e-6)
    assert int(loss.count) == int(mask.sum())
    wanted = (hidden, made_head.weight, made_head.bias)
    for ours, theirs in zip(torch.autograd.grad(loss.sum, wanted), torch.autograd.grad(dense, wanted)):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_labels_and_weights_add_up_in_one_pass():
    hidden, head, teacher, mask, targets = made()
    labels = targets.masked_fill(torch.rand(LEAD) > 0.5, -100)
    clipping = Clipping(mode="fixed", lower=0.1, upper=0.8)
    alone, _ = clipped_kl(hidden, head, teacher, clipping, mask=mask, targets=targets)
    both, _ = clipped_kl(
        hidden, head, teacher, clipping, mask=mask, targets=targets, labels=labels, weight=0.5, label_weight=2.0
    )
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)[mask]
    entropy = torch.nn.functional.cross_entropy(logits, labels[mask], reduction="sum")
    assert float(both.sum) == pytest.approx(float(0.5 * alone.sum + 2 * entropy), rel=1e-9)
    assert float(both.parts["cross_entropy"]) == pytest.approx(float(entropy), rel=1e-9)
    slope = torch.autograd.grad(both.sum, hidden)[0]
    parts = (torch.autograd.grad(loss, hidden)[0] for loss in (alone.sum, entropy))
    assert torch.allclose(slope, sum(w * part for w, part in zip((0.5, 2.0), parts)), atol=1e-9)


def test_gates_of_one_over_the_whole_vocabulary_are_the_forward_divergence():
    hidden, head, teacher, mask, targets = made()
    loss, _ = clipped_kl(hidden, head, teacher, Clipping(mode="off", top=V), mask=mask, targets=targets)
    whole = forward_kl(hidden, head, teacher, mask=mask)
    assert float(loss.sum) == pytest.approx(float(whole.sum), abs=1e-9)
    assert float(loss.parts["kl"]) == pytest.approx(float(whole.sum), abs=1e-9)
    ours, theirs = (torch.autograd.grad(value.sum, hidden)[0] for value in (loss, whole))
    assert torch.allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("mode", ["fixed", "learned", "off"])
def test_equal_distributions_have_no_loss_and_no_gradient(mode):
    hidden, head, _, mask, targets = made()
    teacher = HiddenTargets(hidden.detach(), Head(head.weight.detach(), head.bias.detach()))
    clipping = Clipping(mode=mode, top=5)
    f_sub = Quantiles(clipping, classes=V, seed=0)
    loss, _ = clipped_kl(hidden, head, teacher, clipping, mask=mask, targets=targets, quantiles=f_sub)
    assert abs(float(loss.sum)) < 1e-9
    assert float(torch.autograd.grad(loss.sum, hidden)[0].abs().max()) < 1e-9


@pytest.mark.parametrize("mode", ["fixed", "learned", "off"])
@pytest.mark.parametrize("seed", range(8))
def test_it_lies_between_0_and_the_divergence(mode, seed):
    torch.manual_seed(seed)
    log_p, log_q = (torch.randn(50, V, dtype=torch.float64).mul(4).log_softmax(-1) for _ in range(2))
    classes = listed(log_p, log_q)
    lower, upper = torch.rand(2, 50).sort(0).values
    value = clipped_rows(classes, gates(classes, lower, upper, Clipping(mode=mode)))[0]
    whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert bool((value >= -1e-12).all())
    assert bool((value <= whole + 1e-9).all())


def test_it_starts_at_the_quantiles_that_are_given():
    f_sub = Quantiles(Clipping(), classes=V, seed=0)
    lower, upper = f_sub(torch.randn(100, 2 * V))
    assert torch.allclose(lower, torch.tensor(0.01), atol=1e-3)
    assert torch.allclose(upper, torch.tensor(0.99), atol=1e-3)
    assert torch.equal(Quantiles(Clipping(), classes=V, seed=0).first.weight, f_sub.first.weight)


def test_f_sub_is_shown_numbers_of_the_size_that_a_network_starts_from():
    """Log-probabilities of a vocabulary lie at -10 and below; an Adam step at 1e-3 may not turn the quantiles over."""
    torch.manual_seed(0)
    log_p, log_q = (torch.randn(64, 20000).mul(2).log_softmax(-1) for _ in range(2))
    _, classes = considered(log_p, log_q, log_p.argmax(-1), 256)
    assert float(classes.features.min()) >= -1
    assert float(classes.features.max()) <= 0
    clipping = Clipping()
    f_sub = Quantiles(clipping, classes=20000, seed=0)
    optimizer = torch.optim.Adam(f_sub.parameters(), clipping.learning_rate)
    for _ in range(5):
        optimizer.zero_grad()
        quantile_loss(classes, f_sub, clipping).sum.div(64).backward()
        optimizer.step()
    lower, upper = f_sub(classes.features)
    assert float(lower.detach().median()) > 0.003
    assert float(upper.detach().median()) > 0.95


def test_what_is_not_a_number_is_a_loss_that_is_none():
    """So that the run's own guard speaks, with its step."""
    hidden, head, teacher, mask, targets = made(dtype=torch.float32)
    with torch.no_grad():
        hidden[0, :, 0] = torch.nan
    clipping = Clipping()
    f_sub = Quantiles(clipping, classes=V, seed=0)
    loss, classes = clipped_kl(hidden, head, teacher, clipping, mask=mask, targets=targets, quantiles=f_sub)
    assert math.isnan(float(loss.sum.detach()))
    assert math.isnan(float(quantile_loss(classes, f_sub, clipping).sum.detach()))


def test_a_lower_quantile_above_its_upper_one_is_found_out():
    classes = listed(P.float().log().unsqueeze(0), P.float().log().unsqueeze(0))
    with pytest.raises(AssertionError, match="above its upper"):
        quantile_loss(classes, lambda features: (torch.tensor([0.6]), torch.tensor([0.5])), Clipping())


def test_f_sub_learns_from_the_loss_and_the_student_is_not_reached():
    hidden, head, teacher, mask, targets = made(dtype=torch.float32)
    clipping = Clipping(lower=0.3, upper=0.6, guard=0.0)
    f_sub = Quantiles(clipping, classes=V, seed=0)
    _, classes = clipped_kl(hidden, head, teacher, clipping, mask=mask, targets=targets, quantiles=f_sub)
    guide = quantile_loss(classes, f_sub, clipping)
    guide.sum.backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in f_sub.parameters())
    assert hidden.grad is None
    again = quantile_loss(classes, f_sub, clipping)
    with torch.no_grad():
        for parameter in f_sub.parameters():
            parameter -= 1e-3 * parameter.grad
    assert float(quantile_loss(classes, f_sub, clipping).sum) < float(again.sum)


def test_without_its_guard_f_sub_lets_everything_fall_into_the_tail():
    torch.manual_seed(0)
    classes = listed(*(torch.randn(200, V).mul(2).log_softmax(-1) for _ in range(2)))
    mass = {}
    for guard in (0.0, 1000.0):
        clipping = Clipping(guard=guard)
        f_sub = Quantiles(clipping, classes=V, seed=0)
        optimizer = torch.optim.Adam(f_sub.parameters(), 1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            quantile_loss(classes, f_sub, clipping).sum.div(200).backward()
            optimizer.step()
        kept = gates(classes, *(ends.detach() for ends in f_sub(classes.features)), clipping)
        mass[guard] = float((kept * classes.p.exp()).sum(-1).mean())
    assert mass[0.0] < 0.75
    assert mass[1000.0] > 0.89


def test_the_guard_is_the_square_of_the_mass_that_lacks():
    classes = listed(P.float().log().unsqueeze(0), P.float().log().unsqueeze(0))

    def quarter(features):
        return torch.full((len(features),), 1e-9), torch.full((len(features),), 1e-6)

    clipping = Clipping(guard=2.0, softness=1e-4)
    loss = quantile_loss(classes, quarter, clipping)
    assert float(loss.sum) == pytest.approx(2 * (0.9 - 0.5) ** 2, rel=1e-3)


def test_a_mask_without_a_position_is_an_exact_0_in_the_graph():
    hidden, head, teacher, mask, targets = made()
    with pytest.warns(UserWarning, match="exactly 0"):
        loss, classes = clipped_kl(
            hidden, head, teacher, Clipping(mode="fixed"), mask=torch.zeros_like(mask), targets=targets
        )
    assert float(loss.sum) == 0.0
    assert float(torch.autograd.grad(loss.sum, hidden)[0].abs().max()) == 0.0
    assert float(quantile_loss(classes, Quantiles(Clipping(), classes=V, seed=0), Clipping()).sum.detach()) == 0.0


def test_in_half_precision_it_is_the_same_within_rounding():
    hidden, head, teacher, mask, targets = made(dtype=torch.float32)
    clipping = Clipping(mode="fixed", upper=0.8)
    exact, _ = clipped_kl(hidden, head, teacher, clipping, mask=mask, targets=targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = clipped_kl(hidden, head, teacher, clipping, mask=mask, targets=targets)
    assert rough.sum.dtype == torch.float32
    assert float(rough.sum) == pytest.approx(float(exact.sum), rel=2e-2)
    ours, theirs = (torch.autograd.grad(loss.sum, head.weight)[0] for loss in (rough, exact))
    assert float((ours - theirs).norm() / theirs.norm()) < 3e-2


def test_extreme_logits_stay_finite():
    hidden, head, _, mask, targets = made(dtype=torch.float32)
    teacher = LogitTargets(1e4 * torch.randn(*LEAD, V))
    clipping = Clipping()
    f_sub = Quantiles(clipping, classes=V, seed=0)
    loss, classes = clipped_kl(hidden, head, teacher, clipping, mask=mask, targets=targets, quantiles=f_sub)
    guide = quantile_loss(classes, f_sub, clipping)
    guide.sum.backward()
    assert math.isfinite(float(loss.sum))
    assert all(bool(torch.isfinite(part).all()) for part in torch.autograd.grad(loss.sum, (hidden, head.weight)))
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in f_sub.parameters())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lower": 0.5, "upper": 0.4}, "lower < upper"),
        ({"upper": 1.0}, "upper < 1"),
        ({"top": 0}, "at least 1"),
        ({"softness": 0.0}, "above 0"),
        ({"least_mass": 1.2}, r"\[0, 1\]"),
        ({"guard": -1.0}, "0 or more"),
        ({"guard": math.nan}, "finite"),
        ({"softness": math.inf}, "finite"),
        ({"lower": math.nan}, "finite"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        Clipping(**wrong)


def test_what_does_not_fit_is_refused():
    hidden, head, teacher, mask, targets = made()
    fixed = Clipping(mode="fixed")
    with pytest.raises(UserError, match=f"has {V + 1} entries and the student's {V}"):
        clipped_kl(hidden, head, LogitTargets(torch.randn(*LEAD, V + 1)), fixed, mask=mask, targets=targets)
    few = TopKTargets(torch.zeros(*LEAD, 2).long(), torch.zeros(*LEAD, 2))
    with pytest.raises(UserError, match="whole distribution, not TopKTargets"):
        clipped_kl(hidden, head, few, fixed, mask=mask, targets=targets)
    with pytest.raises(UserError, match="need f_sub"):
        clipped_kl(hidden, head, teacher, Clipping(), mask=mask, targets=targets)
    with pytest.raises(UserError, match="positions of shape"):
        clipped_kl(hidden, head, LogitTargets(torch.randn(3, V)), fixed, mask=mask, targets=targets)
