import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from preceptor.data.sequences import sequence_key
from preceptor.distillation import teachers as teachers
from preceptor.distillation.momentum import MomentumTeacher
from preceptor.distillation.teachers import AdapterOff, CachedTeacher, Ensemble, FrozenTeacher
from preceptor.errors import UserError
from preceptor.knowledge import HiddenTargets, LogitTargets, SampledTargets, TopKTargets
from preceptor.models.language_model import project
from preceptor.models.student import make_student
from tests.byte_models import WIDTHS, batch_of, tiny


def probabilities(targets, batch):
    logits = project(targets.hidden, targets.head) if isinstance(targets, HiddenTargets) else targets.logits
    logits = logits[batch.predicts] if logits.dim() == 3 else logits
    return logits.float().softmax(-1)


def test_a_frozen_teacher_gives_its_own_distribution_without_a_graph_or_a_change():
    model = tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = batch_of(8, 5)
    targets = FrozenTeacher(model)(batch)
    assert targets.hidden.shape == (2, 8, model.width)
    assert not targets.hidden.requires_grad
    assert not targets.head.weight.requires_grad
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not model.training
    with torch.no_grad():
        expected = model.model(batch.input_ids).logits[batch.predicts].softmax(-1)
    torch.testing.assert_close(probabilities(targets, batch), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_frozen_teacher_keeps_its_own_precision():
    targets = FrozenTeacher(tiny().bfloat16())(batch_of(6))
    assert targets.hidden.dtype == targets.head.weight.dtype == torch.bfloat16


def test_a_teacher_that_the_student_shares_is_refused():
    model = tiny()
    teacher = FrozenTeacher(model)
    model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(UserError, match="must not share a model"):
        teacher(batch_of(4))


def test_the_base_under_an_adapter_teaches_and_the_adapter_goes_on_learning():
    base = tiny()
    student = make_student("lora:rank=2,alpha=8", base, seed=0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = batch_of(7, 4)
    trainable = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    targets = AdapterOff(student)(batch)
    torch.testing.assert_close(targets.hidden, FrozenTeacher(base)(batch).hidden)
    with torch.no_grad():
        assert (student(batch) - targets.hidden).abs().max() > 0.05
    assert [name for name, parameter in student.named_parameters() if parameter.requires_grad] == trainable
    assert student.training
    student(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)


def test_a_student_without_an_adapter_has_none_to_switch_off():
    with pytest.raises(UserError, match="make it with `lora:rank"):
        AdapterOff(tiny())


class Store:
    """Targets by the content of a sequence, as a cache keeps them."""

    def __init__(self, teacher, batch):
        targets = teacher(batch)
        ids = project(targets.hidden, targets.head).topk(3).indices
        self.kept = {}
        for row, sequence in enumerate(batch.sequences()):
            self.kept[sequence_key(sequence)] = ids[row][batch.predicts[row]]

    def rows(self, sequences):
        ids = torch.cat([self.kept[sequence_key(sequence)] for sequence in sequences])
        return TopKTargets(ids=ids, log_probs=torch.full(ids.shape, -math.log(4)))


def test_a_cached_teacher_finds_rows_by_content_however_sequences_are_batched():
    teacher, batch = FrozenTeacher(tiny()), batch_of(9, 5, 7)
    cached = CachedTeacher(Store(teacher, batch))
    targets = teacher(batch)
    expected = project(targets.hidden, targets.head).topk(3).indices
    order = [2, 0, 1]
    shuffled = type(batch)(batch.input_ids[order], batch.attention_mask[order], batch.response[order])
    assert torch.equal(cached(batch).ids, expected[batch.predicts])
    assert torch.equal(cached(shuffled).ids, expected[order][shuffled.predicts])


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 12, 1 << 26])
def test_an_ensemble_is_the_weighted_mean_of_probabilities_however_chunked(chunk_bytes, monkeypatch):
    monkeypatch.setattr(teachers, "CHUNK_BYTES", chunk_bytes)
    one, two, batch = FrozenTeacher(tiny(seed=1)), FrozenTeacher(tiny(seed=2, rows=272)), batch_of(8, 5)

    def dense(batch):
        targets = two(batch)
        return LogitTargets(project(targets.hidden, targets.head))

    mean = Ensemble([one, dense], weights=[3, 1])(batch)
    assert mean.logits.shape == (int(batch.predicts.sum()), 260)
    expected = 0.75 * probabilities(one(batch), batch) + 0.25 * probabilities(two(batch), batch)
    torch.testing.assert_close(mean.logits.exp(), expected, rtol=1e-5, atol=1e-8)
    alone = Ensemble([one])(batch).logits.exp()
    torch.testing.assert_close(alone, probabilities(one(batch), batch), rtol=1e-5, atol=1e-8)


def test_ensembles_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="0 teachers"):
        Ensemble([])
    one = FrozenTeacher(tiny())
    with pytest.raises(UserError, match="positive weights"):
        Ensemble([one, one], weights=[1, -1])
    few = FrozenTeacher(tiny())
    few.model.vocabulary = 200
    with pytest.raises(UserError, match="260 and 200 tokens"):
        Ensemble([one, few])(batch_of(4))
    sampled = SampledTargets(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    with pytest.raises(UserError, match="not SampledTargets"):
        Ensemble([lambda batch: sampled])(batch_of(4))


def test_a_momentum_teacher_is_the_running_average_of_its_student():
    student = tiny(LlamaConfig(**WIDTHS, num_hidden_layers=1, tie_word_embeddings=True)).train()
    teacher = MomentumTeacher(student, 0.9)
    slow = [parameter.detach().clone() for parameter in student.parameters()]
    torch.manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        teacher.follow(student)
        slow = [0.9 * mean + 0.1 * parameter.detach() for mean, parameter in zip(slow, student.parameters())]
    for mine, expected in zip(teacher.model.parameters(), slow):
        torch.testing.assert_close(mine, expected)
        assert not mine.requires_grad
    assert teacher.model.causal.get_output_embeddings().weight is teacher.model.causal.get_input_embeddings().weight
    assert teacher(batch_of(5)).hidden.shape == (1, 5, 32)
    assert student.training


def test_momentum_limits_buffers_and_precision():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16().train()
    still, twin = MomentumTeacher(student, 1.0), MomentumTeacher(student, 0.0)
    before = still.model[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1.0)
    student(torch.randn(8, 3, dtype=torch.bfloat16))
    for teacher in (still, twin):
        teacher.follow(student)
        assert teacher.model[0].weight.dtype == torch.float32
        assert torch.equal(teacher.model[1].running_mean, student[1].running_mean.float())
        assert int(teacher.model[1].num_batches_tracked) == 1
    assert torch.equal(still.model[0].weight, before)
    assert torch.equal(twin.model[0].weight, student[0].weight.float())
    still.follow(student, momentum=0.0)
    assert torch.equal(still.model[0].weight, student[0].weight.float())
    for momentum in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"it must lie in \[0, 1\]"):
            MomentumTeacher(student, momentum)


def test_a_momentum_teacher_is_taken_up_again_from_its_state():
    from safetensors.torch import load as read, save as write

    student = tiny(LlamaConfig(**WIDTHS, num_hidden_layers=1, tie_word_embeddings=True))
    teacher, again = MomentumTeacher(student, 0.5), MomentumTeacher(tiny(seed=9), 0.5)
    again = MomentumTeacher(tiny(LlamaConfig(**WIDTHS, num_hidden_layers=1, tie_word_embeddings=True), seed=9), 0.5)
    again.load_state_dict(read(write(teacher.state_dict())))
    assert torch.equal(again(batch_of(6)).hidden, teacher(batch_of(6)).hidden)
