"""A language model and the student of its text: how both are loaded, and the settings of DistiLLM for GPT-2."""

from __future__ import annotations

from typing import Literal

from preceptor.distillation.lessons import Text
from preceptor.engine.settings import Training
from preceptor.models.identity import same_tokenizer
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student

# DistiLLM's script for GPT-2 (jongwooko/distillm): 1.5B teaches 0.1B on Dolly, 8 sequences on each of 4 devices.
DISTILLM_TEXT = Text(source="databricks/databricks-dolly-15k", held_out=500, max_length=512, answer_length=256)


DISTILLM_TRAINING = Training(
    epochs=20,
    batch_size=32,
    learning_rate=5e-4,
    weight_decay=0.01,
    schedule="cosine",
    clip=1.0,
    precision="bf16",
    evaluate_every=500,
    save_every=500,
)


def load_pair(
    teacher: str, student: str, *, dtype: Literal["float32", "bfloat16"], seed: int
) -> tuple[LanguageModel, LanguageModel]:
    """The teacher in ``dtype`` and the student that is made for it.

    Raises:
        UserError: a model cannot be loaded or made, or the tokenizers of the two differ.
    """
    teaches = load(teacher, dtype=dtype)
    learns = make_student(student, teaches, seed=seed)
    same_tokenizer(teaches, learns)
    return teaches, learns
