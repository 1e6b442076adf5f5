"""The study that encoders are compared in: its texts are apart, its exam tells a good reader from a bad one."""

from __future__ import annotations

import pytest
import torch

from preceptor.data.sequences import collate
from preceptor.methods.minilm.sentence_study import embed, make_study


@pytest.fixture(scope="module")
def study():
    return make_study("minilm-l6", lessons=60, max_length=12, examined=200, probed=700)


def test_lessons_are_never_examined(study):
    lessons = {one.ids for one in study.texts.lessons}
    assert len(study.texts.lessons) == 60
    assert len(study.texts.exam) == len(study.exam.vectors) == 200
    assert not lessons & {one.ids for one in study.texts.exam if len(one.ids) < 12}
    assert len(set(study.exam.labels)) == 5
    assert len(study.exam.labelled) == len(study.exam.labels) > 150


def test_the_exam_gives_the_teacher_full_marks_and_noise_none(study):
    def teacher(ids, mask):
        return study.body(input_ids=ids, attention_mask=mask).last_hidden_state

    def noise(ids, mask):
        return torch.randn(*ids.shape, 8, generator=source)

    source = torch.Generator().manual_seed(0)
    known, guessed = study.exam.figures(teacher), study.exam.figures(noise)
    assert known["rank agreement"] == pytest.approx(1)
    assert abs(guessed["rank agreement"]) < 0.2
    assert guessed["probe"] < known["probe"] - 20


def test_the_control_answers_with_another_sentence_of_the_same_length(study):
    batch = collate(study.texts.lessons[:20], study.texts.pad)
    told, confused = study.teacher(batch), study.control(batch)
    assert told.query.shape == confused.query.shape
    assert not torch.allclose(told.query, confused.query, atol=0.1)
    vectors = embed(
        lambda ids, mask: study.body(input_ids=ids, attention_mask=mask).last_hidden_state, study.texts.exam[:70]
    )
    assert torch.allclose(vectors, study.exam.vectors[:70], atol=1e-5)
