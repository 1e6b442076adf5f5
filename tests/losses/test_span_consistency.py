"""Span consistency against loops written from its equation, and its limits."""

import math

import pytest
import torch

from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, LogitTargets
from preceptor.losses.span_consistency import span_consistency

V, WIDTH, LEAD = 19, 5, (2, 8)
PAIRS = torch.tensor([0, 1, 4, 5, 6, 9])


def made(dtype=torch.float64, **head):
    torch.manual_seed(3)
    hidden = torch.randn(*LEAD, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, WIDTH, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    mask = torch.ones(LEAD, dtype=torch.bool)
    mask[0, :2], mask[1, 6:] = False, False
    return hidden, Head(weight, bias, **head), LogitTargets(2 * torch.randn(*LEAD, V, dtype=dtype)), mask


def test_the_hand_values():
    """p = (.7, .2, .1), (.1, .8, .1) and q = (.6, .3, .1), (.2, .6, .2): products (.07, .16, .01), (.12, .18, .02)."""
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.6, 0.2]], dtype=torch.float64)
    assert torch.allclose(p[0] * p[1], torch.tensor([0.07, 0.16, 0.01], dtype=torch.float64))
    assert torch.allclose(q[0] * q[1], torch.tensor([0.12, 0.18, 0.02], dtype=torch.float64))
    head = Head(torch.eye(3, dtype=torch.float64))
    mask = torch.ones(2, dtype=torch.bool)
    for squared, expected in ((False, 0.0547723), (True, 0.003)):
        loss = span_consistency(q.log(), head, LogitTargets(p.log()), torch.tensor([0]), mask=mask, squared=squared)
        assert float(loss.sum) == pytest.approx(expected, abs=1e-7)
        assert int(loss.count) == 1


@pytest.mark.parametrize("rows", [2, 3, 100])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("head", [{}, {"scale": 1.5, "softcap": 3.0}])
def test_value_and_gradient_are_those_of_the_equation(rows, squared, head):
    """Whatever the chunks: a pair that lies across two of them counts once."""
    hidden, made_head, teacher, mask = made(**head)
    loss = span_consistency(
        hidden, made_head, teacher, PAIRS, mask=mask, weight=0.7, squared=squared, chunk_bytes=4 * V * rows
    )
    z = torch.nn.functional.linear(hidden, made_head.weight, made_head.bias) * made_head.scale
    z = z if made_head.softcap is None else made_head.softcap * torch.tanh(z / made_head.softcap)
    q, p = z.softmax(-1)[mask], teacher.logits.softmax(-1)[mask]
    sizes = []
    for i in PAIRS.tolist():
        terms = [(p[i, v] * p[i + 1, v] - q[i, v] * q[i + 1, v]) ** 2 for v in range(V)]
        sizes.append(sum(terms) if squared else torch.sqrt(sum(terms)))
    dense = 0.7 * sum(sizes)
    assert float(loss.sum.detach()) == pytest.approx(float(dense.detach()), rel=1e-9)
    assert float(loss.parts["span"]) == pytest.approx(float(dense.detach()) / 0.7, rel=1e-9)
    assert int(loss.count) == len(PAIRS)
    wanted = (hidden, made_head.weight, made_head.bias)
    for ours, theirs in zip(torch.autograd.grad(loss.sum, wanted), torch.autograd.grad(dense, wanted)):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_equal_distributions_have_no_loss_and_a_finite_gradient():
    hidden, head, _, mask = made()
    same = HiddenTargets(hidden.detach(), Head(head.weight.detach(), head.bias.detach()))
    loss = span_consistency(hidden, head, same, PAIRS, mask=mask)
    assert float(loss.sum.detach()) == 0.0
    assert float(torch.autograd.grad(loss.sum, hidden)[0].abs().max()) == 0.0


def test_a_pair_is_at_most_the_square_root_of_two():
    sure = LogitTargets(torch.tensor([[50.0, 0, 0], [50.0, 0, 0]]))
    loss = span_consistency(
        torch.tensor([[0, 50.0, 0], [0, 50.0, 0]]),
        Head(torch.eye(3)),
        sure,
        torch.tensor([0]),
        mask=torch.ones(2, dtype=torch.bool),
    )
    assert float(loss.sum) == pytest.approx(math.sqrt(2), rel=1e-6)


def test_no_pair_is_an_exact_0_in_the_graph():
    hidden, head, teacher, mask = made()
    loss = span_consistency(hidden, head, teacher, PAIRS[:0], mask=mask)
    assert float(loss.sum.detach()) == 0.0
    assert int(loss.count) == 0
    assert float(torch.autograd.grad(loss.sum, hidden)[0].abs().max()) == 0.0


def test_rows_without_a_pair_get_no_gradient():
    hidden, head, teacher, mask = made()
    loss = span_consistency(hidden, head, teacher, torch.tensor([1]), mask=mask)
    slope = torch.autograd.grad(loss.sum, hidden)[0][mask].abs().sum(-1)
    assert slope.nonzero().flatten().tolist() == [1, 2]


def test_a_pair_beyond_the_rows_is_refused():
    hidden, head, teacher, mask = made()
    with pytest.raises(UserError, match="begins at row 11, and there are 12 rows"):
        span_consistency(hidden, head, teacher, torch.tensor([11]), mask=mask)
