"""Students of an environment: small and fresh, with and without an image encoder, or with an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.methods.data_env.recipe import teach
from preceptor.methods.data_env.small_models import (
    PATCH,
    ImagePrefixModel,
    cut_patches,
    load_task_model,
    small_student,
)
from preceptor.methods.data_env.student import TaskStudent
from preceptor.tasks.arithmetic import Arithmetic
from preceptor.tasks.figures import Figures

TASK = Arithmetic(only=("units/mass",))
DATA = [TASK.datum(item) for item in TASK.items(24, seed=1)]
SHORT = Training(steps=3, batch_size=8, learning_rate=1e-3)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def student(training: Training = SHORT, adapter: str = "") -> TaskStudent:
    first = small_student(seed=0)
    return TaskStudent(first, TASK, training, teach, adapter=adapter, answer_length=8)


def test_the_small_student_learns_what_it_is_shown() -> None:
    learner = student(Training(steps=60, batch_size=24, learning_rate=3e-3, warmup=0.1))
    items = TASK.items(24, seed=1)
    assert sum(TASK.score(items, learner.answer(items))) < 4
    learner.learn(DATA, Path("lesson"))
    assert sum(TASK.score(items, learner.answer(items))) > 20


@pytest.mark.parametrize("adapter", ["", "lora:rank=2"])
def test_every_lesson_starts_from_the_first_weights(adapter: str) -> None:
    learner, other = student(adapter=adapter), student(adapter=adapter)
    start = weights(learner.first)
    learner.learn(DATA[:12], Path("a"))
    learner.learn(DATA, Path("b"))
    other.learn(DATA, Path("c"))
    assert torch.equal(weights(learner.model), weights(other.model))
    assert torch.equal(weights(learner.first), start)
    learner.restart()
    assert learner.model is learner.first


def test_a_lesson_with_an_adapter_leaves_the_base_as_it_was() -> None:
    learner = student(adapter="lora:rank=2")
    learner.learn(DATA, Path("a"))
    learns = [name for name, parameter in learner.model.named_parameters() if parameter.requires_grad]
    assert learns
    assert all("lora" in name for name in learns)


def test_a_finished_lesson_is_taken_up_and_another_one_refused() -> None:
    learner = student()
    learner.learn(DATA, Path("lesson"))
    taught = weights(learner.model)
    again = student()
    again.learn(DATA, Path("lesson"))
    assert torch.equal(weights(again.model), taught)
    with pytest.raises(UserError, match="holds another run"):
        again.learn(DATA[:-1], Path("lesson"))


def test_no_data_is_an_error() -> None:
    with pytest.raises(UserError, match="no example to learn from"):
        student().learn([], Path("lesson"))


def test_students_share_nothing() -> None:
    first, second = student(), student()
    first.answer(TASK.items(2, seed=5))
    assert second._read == {}


SIGHT = Figures(only=("counting/colour", "naming"))


def test_a_student_that_sees_is_moved_by_the_image() -> None:
    torch.manual_seed(0)
    learner = TaskStudent(small_student(seed=0, sees=True), SIGHT, SHORT, teach, answer_length=4)
    assert isinstance(learner.first, ImagePrefixModel)
    items = SIGHT.items(12, seed=1)
    data = [SIGHT.datum(item) for item in items]
    learner.learn(data, Path("lesson"))
    batch = learner._collate(data[:2])
    one = learner.model(batch, lambda hidden, head: hidden)
    batch.patches[0] += 1.0
    other = learner.model(batch, lambda hidden, head: hidden)
    assert not torch.allclose(one[0], other[0])
    assert torch.allclose(one[1], other[1])
    assert one.shape[:2] == batch.input_ids.shape


def test_a_student_that_sees_is_saved_with_its_image_encoder() -> None:
    learner = TaskStudent(small_student(seed=0, sees=True), SIGHT, SHORT, teach, answer_length=4)
    items = SIGHT.items(10, seed=2)
    learner.learn([SIGHT.datum(item) for item in items], Path("lesson"))
    learner.save(Path("student"), card={"method": "test"})
    loaded = TaskStudent(load_task_model(Path("student")), SIGHT, SHORT, teach, answer_length=4)
    assert loaded.answer(items) == learner.answer(items)
    assert torch.equal(weights(loaded.model), weights(learner.model))
    Path("student/image_encoder.safetensors").rename("student/eyes.safetensors")  # as it was called before
    assert torch.equal(weights(load_task_model(Path("student"))), weights(learner.model))


def test_answers_of_questions_of_many_lengths_come_in_their_order() -> None:
    learner = TaskStudent(small_student(seed=3, sees=True), SIGHT, SHORT, teach, answer_length=3)
    items = SIGHT.items(9, seed=2)
    alone = [learner.answer([item])[0] for item in items]
    assert learner.answer(items) == alone


def test_patches_are_cut_row_by_row() -> None:
    image = np.zeros((2 * PATCH, 3 * PATCH, 3), np.uint8)
    image[PATCH:, :PATCH] = 255
    patches = cut_patches(image)
    assert patches.shape == (6, 3 * PATCH * PATCH)
    assert patches[3].abs().max() == 0.0
    assert patches[[0, 1, 2, 4, 5]].min() == 2.0
    for wrong, told in ((None, "no image"), (np.zeros((9, 8, 3), np.uint8), "shape")):
        with pytest.raises(UserError, match=told):
            cut_patches(wrong)


def test_unknown_characters_are_read_as_question_marks() -> None:
    tokenizer = small_student(seed=0).tokenizer  # type: ignore[union-attr]
    assert tokenizer.decode(tokenizer("a + ü\n7", add_special_tokens=False)["input_ids"]) == "a + ?\n7"
