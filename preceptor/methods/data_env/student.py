"""Students that answer a task's items and are taught on training items: a local model with LoRA, or a small fresh one.

``TaskStudent`` wraps either. Teaching always starts from the first weights (a new adapter, or a fresh copy) and takes
all the items there are, as DataEnvGym's trainer does: no lesson builds on weights that an earlier lesson left.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence as Listed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from preceptor.data.encoding import encode, encode_prompt
from preceptor.data.readers import Example
from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.engine.run import Run
from preceptor.engine.settings import Training
from preceptor.methods.data_env.small_models import IMAGE_ENCODER, ImagePrefixModel, SeenBatch, cut_patches
from preceptor.models.language_model import LanguageModel, in_evaluation
from preceptor.models.student import make_student
from preceptor.models.student_spec import LoraSpec
from preceptor.tasks.records import Datum, Item, Task, item_of

Teach = Callable[[Run, Listed[Datum], Callable[[list[Datum]], Batch]], None]


"""One lesson: the run of a fresh student, its data, and how some of them become a batch."""


@dataclass(frozen=True)
class Lesson:
    """What distinguishes one lesson from another, so that none is resumed with other data."""

    training: Training
    items: int
    data: str


def lesson_hash(data: Listed[Datum]) -> str:
    """16 hexadecimal digits that name the data by what a student reads of them, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for one in data:
        image = b"" if one.image is None else np.ascontiguousarray(one.image).tobytes()
        digest.update(json.dumps([one.instruction, one.starter, one.response]).encode() + image)
    return digest.hexdigest()


class TaskStudent:
    """A student of an environment: answers items greedily, is taught from its first weights, and starts over.

    ``model`` is the student as it is now.
    """

    def __init__(
        self,
        first: LanguageModel | ImagePrefixModel,
        task: Task,
        training: Training,
        teach: Teach,
        *,
        adapter: str | LoraSpec | None = None,
        answer_length: int = 350,
        max_length: int = 1024,
        batch_size: int = 256,
    ) -> None:
        """Keeps the first weights.

        Args:
            first: the model before any lesson; it is never changed.
            task: gives the text that the student reads of an item.
            training: how it is taught; epochs or steps count anew in each lesson.
            teach: one lesson, the loop of the recipe.
            adapter: a LoRA specification of ``make_student`` for what learns; None: all weights learn.
            answer_length: tokens of an answer at most.
            max_length: tokens of a training item; a longer one is cut.
            batch_size: items answered at a time.
        """
        self.first = first
        self.task = task
        self.training = training
        self.teach = teach
        self.adapter = adapter
        self.answer_length = answer_length
        self.max_length = max_length
        self.batch_size = batch_size
        self.model: LanguageModel | ImagePrefixModel = first
        self._read: dict[tuple[str, str], Sequence] = {}

    def restart(self) -> None:
        """Gives the student back its first weights."""
        self.model = self.first

    def answer(self, items: Listed[Item]) -> list[str]:
        """What the student answers to each item, greedily."""
        language = self._language
        prompts = [self._sequence(self.task.prompt(item)).ids for item in items]
        with in_evaluation(self.model):
            if isinstance(self.model, ImagePrefixModel):
                patches = torch.stack([cut_patches(item.image) for item in items])
                outputs = self.model.generate(prompts, patches, max_new_tokens=self.answer_length)
            else:
                outputs = self.model.generate(
                    prompts, max_new_tokens=self.answer_length, temperature=0.0, batch_size=self.batch_size
                )
        return [str(language.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in outputs]

    def learn(self, data: Listed[Datum], folder: Path) -> None:
        """Teaches the student all the data, from its first weights; a lesson that was stopped is taken up again.

        Raises:
            UserError: there is no datum, or the folder holds another lesson.
        """
        self.model = self._fresh()
        lesson = Lesson(self.training, len(data), lesson_hash(data))
        resume = (folder / "config.json").exists()
        run = Run(self.training, student=self.model, folder=folder, config=lesson, resume=resume)
        self.teach(run, data, self._collate)

    def save(self, folder: Path, *, card: dict[str, object]) -> None:
        """Writes the student with tokenizer and model card; an image encoder goes to image_encoder.safetensors."""
        self._language.save(folder, card=card)
        if isinstance(self.model, ImagePrefixModel):
            save_file(self.model.look.state_dict(), folder / IMAGE_ENCODER)

    @property
    def _language(self) -> LanguageModel:
        return self.model.language if isinstance(self.model, ImagePrefixModel) else self.model

    def _fresh(self) -> LanguageModel | ImagePrefixModel:
        if self.adapter:
            assert isinstance(self.first, LanguageModel)
            return make_student(self.adapter, self.first, seed=self.training.seed)
        return copy.deepcopy(self.first).train()

    def _collate(self, data: list[Datum]) -> Batch:
        sequences = [self._sequence(self.task.prompt(item_of(one, self.task.name)), one.response) for one in data]
        batch = collate(sequences, self._language.pad_id)
        if not isinstance(self.model, ImagePrefixModel):
            return batch
        patches = torch.stack([cut_patches(one.image) for one in data])
        return SeenBatch(batch.input_ids, batch.attention_mask, batch.response, patches)

    def _sequence(self, prompt: str, response: str = "") -> Sequence:
        """The tokens of a question, with those of the answer where there is one; each text is read once."""
        if (prompt, response) not in self._read:
            question, tokenizer = {"role": "user", "content": prompt}, self._language.tokenizer
            if response:
                spoken = Example((question, {"role": "assistant", "content": response}))
                self._read[prompt, response] = encode([spoken], tokenizer, max_length=self.max_length)[0]
            else:
                ids = encode_prompt([question], tokenizer)
                self._read[prompt, response] = Sequence(ids, (False,) * len(ids))
        return self._read[prompt, response]
