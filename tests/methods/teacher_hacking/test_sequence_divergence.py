"""Golden and proxy: exact identities, a slow loop over every answer there is, and the size of the standard error."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from preceptor.errors import UserError
from preceptor.knowledge import TopKTargets
from preceptor.methods.teacher_hacking.markov_sources import log_probs, make_source
from preceptor.methods.teacher_hacking.sequence_divergence import DivergenceExam, own_divergence
from preceptor.methods.teacher_hacking.text_models import LanguageAuthor, SourceAuthor, answered, symbol_model
from preceptor.models.language_model import LanguageModel, project
from preceptor.statistics import mean_of

CPU = torch.device("cpu")


@pytest.fixture
def oracle():
    return SourceAuthor(make_source("hmm:states=3,vocabulary=4", seed=0))


@pytest.fixture
def student():
    return louder(symbol_model(4, longest=8, seed=1))


def louder(model: LanguageModel) -> LanguageModel:
    """Weights far from those of an untrained model, whose distributions are all nearly uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0) if parameter.dim() > 1 else None
    return model.eval()


def log_q(model, ids):
    """What a model says after each token of one sequence, from its whole logits."""
    with torch.no_grad():
        logits = model.causal(input_ids=torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)


def answers(author, count, length=4, seed=0):
    torch.manual_seed(seed)
    prompts = [(place % 4, place // 4 % 4) for place in range(count)]
    return author.answer(prompts, length)


def test_it_is_the_sum_over_tokens_and_vocabulary(oracle, student):
    sequences = answers(oracle, 6)
    exam = DivergenceExam(oracle, sequences, pad_id=0, device=CPU, batch_size=4)
    for sequence, found in zip(sequences, exam.divergence(student).tolist()):
        said, told, expected = (
            log_probs(oracle.source, torch.tensor([sequence.ids]))[0],
            log_q(student, sequence.ids),
            0.0,
        )
        for place in range(1, 5):
            for symbol in range(4):
                p, q = float(said[place + 1, symbol]), float(told[place, symbol])
                expected += math.exp(p) * (p - q)
        assert found == pytest.approx(expected, rel=1e-5)
    assert exam.tokens.tolist() == [4.0] * 6


def test_its_mean_over_all_answers_is_the_divergence_of_answers(oracle, student):
    """The chain rule: Σ_y μ(y) log μ(y) / q(y) over all 64 answers is the expected sum over tokens."""
    prompt, whole, chained = (1, 2), 0.0, 0.0
    for answer in itertools.product(range(4), repeat=3):
        ids = (*prompt, *answer)
        said, told = log_probs(oracle.source, torch.tensor([ids]))[0], log_q(student, ids)
        p = math.fsum(float(said[place + 2, symbol]) for place, symbol in enumerate(answer))
        q = math.fsum(float(told[place + 1, symbol]) for place, symbol in enumerate(answer))
        whole += math.exp(p) * (p - q)
        exam = DivergenceExam(oracle, [answered(prompt, answer)], pad_id=0, device=CPU)
        chained += math.exp(p) * float(exam.divergence(student))
    assert chained == pytest.approx(whole, rel=1e-4)


def test_a_student_that_is_the_teacher_is_at_distance_0(oracle, student):
    teacher = LanguageAuthor(student)
    sequences = answers(teacher, 8)
    assert DivergenceExam(teacher, sequences, pad_id=0, device=CPU).divergence(student).abs().max() == 0
    golden = DivergenceExam(oracle, answers(oracle, 8), pad_id=0, device=CPU)
    assert torch.equal(golden.divergence(student), golden.divergence(teacher.model))
    assert own_divergence(student, teacher, sequences).abs().max() == 0


def test_a_teacher_that_is_the_oracle_sits_the_same_exam(oracle, student):
    golden = DivergenceExam(oracle, answers(oracle, 8, seed=3), pad_id=0, device=CPU)
    proxy = DivergenceExam(oracle, answers(oracle, 8, seed=3), pad_id=0, device=CPU)
    assert torch.equal(golden.divergence(student), proxy.divergence(student))


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_negative(oracle, seed):
    student = louder(symbol_model(4, longest=8, seed=seed))
    sequences = answers(oracle, 16, seed=seed)
    assert DivergenceExam(oracle, sequences, pad_id=0, device=CPU).divergence(student).min() >= 0
    own = answers(LanguageAuthor(student), 16, seed=seed)
    assert own_divergence(student, oracle, own).min() >= 0


def test_the_standard_error_shrinks_with_the_root_of_the_number(oracle, student):
    values = (
        DivergenceExam(oracle, answers(oracle, 1600), pad_id=0, device=CPU, batch_size=400).divergence(student).tolist()
    )
    few = [mean_of(values[start : start + 100]).error for start in range(0, 1600, 100)]
    assert math.fsum(few) / 16 / mean_of(values).error == pytest.approx(4.0, rel=0.1)


def test_batches_and_padding_change_nothing(oracle, student):
    sequences = [*answers(oracle, 5), *answers(oracle, 4, length=2), *answers(oracle, 3, length=6)]
    one = DivergenceExam(oracle, sequences, pad_id=0, device=CPU, batch_size=1).divergence(student)
    many = DivergenceExam(oracle, sequences, pad_id=3, device=CPU, batch_size=64).divergence(student)
    assert torch.allclose(one, many, rtol=1e-5)


def test_the_other_direction(oracle, student):
    sequences = answers(LanguageAuthor(student), 3)
    for sequence, found in zip(sequences, own_divergence(student, oracle, sequences).tolist()):
        said, told = log_probs(oracle.source, torch.tensor([sequence.ids]))[0], log_q(student, sequence.ids)
        expected = math.fsum(
            float(told[place, symbol].exp() * (told[place, symbol] - said[place + 1, symbol]))
            for place in range(1, 5)
            for symbol in range(4)
        )
        assert found == pytest.approx(expected, rel=1e-5)


def test_hidden_states_and_logits_say_the_same(student):
    teacher, other = LanguageAuthor(student), louder(symbol_model(4, longest=8, seed=9))
    sequences = answers(teacher, 8)

    class Said:
        def __call__(self, batch):
            from preceptor.knowledge import LogitTargets

            told = teacher(batch)
            return LogitTargets(project(told.hidden, told.head))

        def answer(self, prompts, length):
            return teacher.answer(prompts, length)

    hidden = DivergenceExam(teacher, sequences, pad_id=0, device=CPU).divergence(other)
    assert torch.allclose(hidden, DivergenceExam(Said(), sequences, pad_id=0, device=CPU).divergence(other), rtol=1e-6)


def test_an_exam_refuses_what_it_cannot_measure(oracle, student):
    with pytest.raises(UserError, match="response"):
        DivergenceExam(oracle, [], pad_id=0, device=CPU)
    with pytest.raises(UserError, match="response"):
        DivergenceExam(oracle, [answered((1, 2), ())], pad_id=0, device=CPU)
    wider = SourceAuthor(make_source("hmm:states=3,vocabulary=6", seed=0))
    with pytest.raises(UserError, match="6 tokens and the student 4"):
        DivergenceExam(wider, [answered((1, 2), (3,))], pad_id=0, device=CPU).divergence(student)

    class Thrifty:
        def __call__(self, batch):
            return TopKTargets(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))

        def answer(self, prompts, length):
            return []

    with pytest.raises(UserError, match="dense"):
        DivergenceExam(Thrifty(), [answered((1,), (2,))], pad_id=0, device=CPU)


def test_an_empty_answer_can_be_told(student, monkeypatch):
    """An answer that is the end of turn alone has no response token."""
    monkeypatch.setattr(type(student), "stop_ids", frozenset({0}))
    monkeypatch.setattr(type(student), "generate", lambda self, prompts, **_: [(0,), (2, 0), (3,)])
    written = LanguageAuthor(student).answer([(1,), (1, 1), (2,)], 4)
    assert [any(sequence.response) for sequence in written] == [False, True, True]
    assert written[1] == replace(written[1], ids=(1, 1, 2, 0), response=(False, False, True, True))
