"""The small student, made fresh: a causal transformer of the Llama kind over characters, 2 layers of width 128.

For questions about images it reads the image first, a small network's map of each patch in the place of a token
(Dosovitskiy et al., 2021, for the patches; Koh et al., 2023, for images as a prefix of a language model).
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from preceptor.data.sequences import Batch
from preceptor.errors import UserError
from preceptor.knowledge import Head
from preceptor.models.language_model import LanguageModel, project
from preceptor.models.loading import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")


SMALL = "small"


LAYERS, WIDTH, HEADS, INNER = 2, 128, 4, 256


PATCH = 8  # pixels a side of an image's patch


CHARACTERS = string.printable[:95] + "\n"


TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)  # a question ends with a newline, an answer with the end token, and no other marks


IMAGE_ENCODER = "image_encoder.safetensors"
OLD_IMAGE_ENCODER = "eyes.safetensors"  # its name in folders that were written before


@dataclass(frozen=True, eq=False)
class SeenBatch(Batch):
    """Sequences that each follow an image. ``patches``: (B, P, 3 · PATCH²) float32 in [0, 2], white is 0."""

    patches: Tensor

    def to(self, device: torch.device | str) -> SeenBatch:
        """The same batch on a device."""
        text = super().to(device)
        return SeenBatch(text.input_ids, text.attention_mask, text.response, self.patches.to(device))


class ImagePrefixModel(nn.Module):
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
        state = body(inputs_embeds=states, use_cache=True)
        columns: list[Tensor] = []
        ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        while len(columns) < count and not bool(ended.all()):
            columns.append(project(state.last_hidden_state[:, -1], self.language.head).argmax(-1))
            ended |= torch.isin(columns[-1], stop)
            state = body(input_ids=columns[-1].unsqueeze(-1), past_key_values=state.past_key_values, use_cache=True)
        return torch.stack(columns, dim=1)


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


def small_student(*, seed: int, sees: bool = False) -> LanguageModel | ImagePrefixModel:
    """A fresh character-level transformer, some 0.3 million parameters; with ``sees``, one that reads images."""
    from transformers import LlamaConfig, LlamaForCausalLM

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
        return ImagePrefixModel(language).eval() if sees else language.eval()


def reads_characters(student: str) -> bool:
    """Whether a student is ``small``, or the folder of one: its tokenizer knows no longer pieces."""
    path = Path(student) / "tokenizer.json"
    if student == SMALL or not path.is_file():
        return student == SMALL
    return bool(json.loads(path.read_text(encoding="utf-8"))["model"]["type"] == "WordLevel")


def load_task_model(folder: Path) -> LanguageModel | ImagePrefixModel:
    """A student that ``TaskStudent.save`` wrote, or any local model by name.

    It reads images where an image encoder lies beside its weights.
    """
    language = load(str(folder))
    encoders = [folder / name for name in (IMAGE_ENCODER, OLD_IMAGE_ENCODER) if (folder / name).exists()]
    if not encoders:
        return language
    model = ImagePrefixModel(language)
    model.look.load_state_dict(load_file(encoders[0]))
    return model.eval()


def _characters() -> PreTrainedTokenizerFast:
    """A tokenizer with a token a character; one that it does not know becomes a question mark."""
    from transformers import PreTrainedTokenizerFast

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
