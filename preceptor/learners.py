"""Students that answer a task's items and are taught on training items: a local model with LoRA, or a small fresh one.

``Pupil`` wraps either. Teaching always starts from the first weights (a new adapter, or a fresh copy) and takes all the
items there are, as DataEnvGym's trainer does: no lesson builds on weights that an earlier lesson left.

The small student reads and writes characters: a causal transformer of the Llama kind, 2 layers of width 128. For
questions about images it reads the image first, a small network's map of each patch in the place of a token
(Dosovitskiy et al., 2021, for the patches; Koh et al., 2023, for images as a prefix of a language model).
"""

from __future__ import annotations

import copy
import hashlib
import json
import string
from collections.abc import Callable, Sequence as Listed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from preceptor.data import Batch, Example, Sequence, collate, encode, encode_prompt
from preceptor.errors import UserError
from preceptor.knowledge import Head
from preceptor.losses.divergences import divergence
from preceptor.models import LanguageModel, in_evaluation, load, project
from preceptor.student import make_student
from preceptor.tasks import Datum, Item, Task, item_of
from preceptor.training import Run, Training

T = TypeVar("T")

SMALL = "small"
LAYERS, WIDTH, HEADS, INNER = 2, 128, 4, 256
PATCH = 8  # pixels a side of an image's patch
CHARACTERS = string.printable[:95] + "\n"
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)  # a question ends with a newline, an answer with the end token: nothing that a character model must read in vain
EYES = "eyes.safetensors"


@dataclass(frozen=True, eq=False)
class SeenBatch(Batch):
    """Sequences that each follow an image. ``patches``: (B, P, 3 · PATCH²) float32 in [0, 2], white is 0."""

    patches: Tensor

    def to(self, device: torch.device | str) -> SeenBatch:
        """The same batch on a device."""
        text = super().to(device)
        return SeenBatch(text.input_ids, text.attention_mask, text.response, self.patches.to(device))


class Seeing(nn.Module):
    """A language model that reads an image's patches before the text.

    ``language``: the model. ``look``: from a patch's values to the width of an embedding, by two layers.
    """

    def __init__(self, language: LanguageModel) -> None:
        super().__init__()
        self.language = language
        width = language.width
        self.look = nn.Sequential(nn.Linear(3 * PATCH * PATCH, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, batch: SeenBatch, objective: Callable[[Tensor, Head], T]) -> T:
        """What the objective makes of the hidden states at the text's places, (B, T, width)."""
        states = self._embed(batch.input_ids, batch.patches)
        hidden = self.language.causal.base_model(inputs_embeds=states, use_cache=False).last_hidden_state
        return objective(hidden[:, batch.patches.shape[1] :], self.language.head)

    @torch.no_grad()
    def generate(
        self, prompts: list[tuple[int, ...]], patches: Tensor, *, max_new_tokens: int
    ) -> list[tuple[int, ...]]:
        """Greedy answers, the end token left out. Prompts of one length are answered together, so nothing is padded."""
        lengths: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            lengths.setdefault(len(prompt), []).append(place)
        answers: list[tuple[int, ...]] = [()] * len(prompts)
        for places in lengths.values():
            ids = torch.tensor([prompts[place] for place in places], device=self.language.device)
            written = self._continue(self._embed(ids, patches[places].to(ids.device)), max_new_tokens)
            for place, row in zip(places, written.tolist(), strict=True):
                ends = [at for at, token in enumerate(row) if token in self.language.stop_ids]
                answers[place] = tuple(row[: ends[0]] if ends else row)
        return answers

    def _embed(self, ids: Tensor, patches: Tensor) -> Tensor:
        words = self.language.causal.get_input_embeddings()(ids)
        return torch.cat([self.look(patches), words], dim=1)

    def _continue(self, states: Tensor, count: int) -> Tensor:
        stop = torch.tensor(sorted(self.language.stop_ids), device=states.device)
        body: Any = self.language.causal.base_model
        told = body(inputs_embeds=states, use_cache=True)
        columns: list[Tensor] = []
        ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        while len(columns) < count and not bool(ended.all()):
            columns.append(project(told.last_hidden_state[:, -1], self.language.head).argmax(-1))
            ended |= torch.isin(columns[-1], stop)
            told = body(input_ids=columns[-1].unsqueeze(-1), past_key_values=told.past_key_values, use_cache=True)
        return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Lesson:
    """What tells one lesson from another, so that none is taken up with other data."""

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


class Pupil:
    """A student of an environment: answers items greedily, is taught from its first weights, and starts over.

    ``model`` is the student as it is now.
    """

    def __init__(
        self,
        first: LanguageModel | Seeing,
        task: Task,
        training: Training,
        *,
        adapter: str = "",
        answer_length: int = 350,
        max_length: int = 1024,
        batch_size: int = 256,
    ) -> None:
        """Keeps the first weights.

        Args:
            first: the model before any lesson; it is never changed.
            task: gives the text that the student reads of an item.
            training: how it is taught; epochs or steps count anew in each lesson.
            adapter: a LoRA specification of ``make_student`` for what learns; empty: all weights learn.
            answer_length: tokens of an answer at most.
            max_length: tokens of a training item; a longer one is cut.
            batch_size: items answered at a time.
        """
        self.first = first
        self.task = task
        self.training = training
        self.adapter = adapter
        self.answer_length = answer_length
        self.max_length = max_length
        self.batch_size = batch_size
        self.model: LanguageModel | Seeing = first
        self._read: dict[tuple[str, str], Sequence] = {}

    def restart(self) -> None:
        """Gives the student back its first weights."""
        self.model = self.first

    def answer(self, items: Listed[Item]) -> list[str]:
        """What the student answers to each item, greedily."""
        language = self._language
        prompts = [self._sequence(self.task.prompt(item)).ids for item in items]
        with in_evaluation(self.model):
            if isinstance(self.model, Seeing):
                patches = torch.stack([cut_patches(item.image) for item in items])
                told = self.model.generate(prompts, patches, max_new_tokens=self.answer_length)
            else:
                told = self.model.generate(
                    prompts, max_new_tokens=self.answer_length, temperature=0.0, batch_size=self.batch_size
                )
        return [str(language.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in told]

    def learn(self, data: Listed[Datum], folder: Path) -> None:
        """Teaches the student all the data, from its first weights; a lesson that was stopped is taken up again.

        The loss is the cross-entropy of the response's tokens, a mean over those of a whole step.

        Raises:
            UserError: there is no datum, or the folder holds another lesson.
        """
        self.model = self._fresh()
        lesson = Lesson(self.training, len(data), lesson_hash(data))
        resume = (folder / "config.json").exists()
        run = Run(self.training, student=self.model, folder=folder, config=lesson, resume=resume)
        for batch in run.batches(data, self._collate):
            labels = partial(
                divergence, teacher=None, mask=batch.predicts, labels=batch.labels, weight=0.0, label_weight=1.0
            )
            loss = run.student(batch, labels)
            run.update(loss.sum, loss.count)
        run.finish()

    def save(self, folder: Path, *, card: dict[str, object]) -> None:
        """Writes the student with its tokenizer and model card; what sees an image goes beside, in eyes.safetensors."""
        self._language.save(folder, card=card)
        if isinstance(self.model, Seeing):
            save_file(self.model.look.state_dict(), folder / EYES)

    @property
    def _language(self) -> LanguageModel:
        return self.model.language if isinstance(self.model, Seeing) else self.model

    def _fresh(self) -> LanguageModel | Seeing:
        if self.adapter:
            assert isinstance(self.first, LanguageModel)
            return make_student(self.adapter, self.first, seed=self.training.seed)
        return copy.deepcopy(self.first).train()

    def _collate(self, data: list[Datum]) -> Batch:
        told = [self._sequence(self.task.prompt(item_of(one, self.task.name)), one.response) for one in data]
        batch = collate(told, self._language.pad_id)
        if not isinstance(self.model, Seeing):
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


def cut_patches(image: Any) -> Tensor:
    """The patches of an image (H, W, 3) uint8, row by row: (P, 3 · PATCH²) float32 in [0, 2], white is 0.

    Raises:
        UserError: there is no image, or its sides are no multiples of PATCH.
    """
    if image is None or image.ndim != 3 or image.shape[0] % PATCH or image.shape[1] % PATCH:
        shape = "no image" if image is None else f"an image of the shape {image.shape}"
        raise UserError(f"A visual question has {shape}; give (height, width, 3), sides multiples of {PATCH} pixels.")
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    pieces = np.asarray(image).reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return torch.from_numpy(pieces.reshape(rows * columns, -1).astype(np.float32) / -127.5 + 2.0)


def small_student(*, seed: int, sees: bool = False) -> LanguageModel | Seeing:
    """A fresh character-level transformer, some 0.3 million parameters; with ``sees``, one that reads images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _characters()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        language = LanguageModel(LlamaForCausalLM(config), tokenizer)
        return Seeing(language).eval() if sees else language.eval()


def reads_characters(student: str) -> bool:
    """Whether a student is ``small``, or the folder of one: its tokenizer knows no longer pieces."""
    path = Path(student) / "tokenizer.json"
    if student == SMALL or not path.is_file():
        return student == SMALL
    return bool(json.loads(path.read_text(encoding="utf-8"))["model"]["type"] == "WordLevel")


def load_pupil_model(folder: Path) -> LanguageModel | Seeing:
    """A student that ``Pupil.save`` wrote, or any local model by name; one that sees, where its eyes lie beside it."""
    language = load(str(folder))
    if not (folder / EYES).exists():
        return language
    seeing = Seeing(language)
    seeing.look.load_state_dict(load_file(folder / EYES))
    return seeing.eval()


def _characters() -> PreTrainedTokenizerFast:
    """A tokenizer with a token a character; one that it does not know becomes a question mark."""
    vocabulary = {character: place for place, character in enumerate(["<pad>", "<end>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
