"""Means over held-out text, beside a loop that is written out."""

import pytest
import torch
from torch import nn

from preceptor.distillation.held_out import held_out_means
from preceptor.losses import Loss


class Line(nn.Module):
    """y = w x, and whether it was called in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        return self.weight * x


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_mean_is_the_sum_over_all_batches_by_the_count_over_all_batches(batch_size):
    model = Line().train()

    def losses(examples):
        out = model(torch.tensor(examples))
        assert not out.requires_grad
        for value in out:
            yield "all", Loss(value, torch.tensor(2), {})
            if value > 4:
                yield "large", Loss(value, torch.tensor(1), {})
        yield "never", Loss(torch.tensor(0.0), torch.tensor(0), {})

    found = held_out_means(model, [1.0, 2.0, 3.0, 4.0, 5.0], losses, batch_size=batch_size)
    assert found == {"all": 3.0, "large": 8.0}
    assert not any(model.modes)
    assert model.training
