"""The turns that a tutor learns, and those held out: a teacher's turn with the dialogue before it."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from preceptor.data.encoding import encode
from preceptor.data.readers import Example
from preceptor.data.sequences import Sequence
from preceptor.data.tokenizer import Tokenizer
from preceptor.dialogue.dialogue import Dialogue, Turn, fit_turns, parse_dialogue, read_dialogues
from preceptor.dialogue.examples import worked_dialogues
from preceptor.dialogue.tutors import tutor_messages
from preceptor.errors import UserError
from preceptor.models.language_model import LanguageModel

if TYPE_CHECKING:
    from preceptor.methods.mathdial.recipe import Config


@dataclass(frozen=True)
class Pair:
    """A teacher's turn to be learned: the dialogue up to it, the turn, its tokens, and whether its problem is new."""

    before: Dialogue
    turn: Turn
    tokens: Sequence
    unseen: bool


def read_data(source: str) -> list[Dialogue]:
    """The dialogues of a file, of the hub, or our own.

    Raises:
        UserError: there is no such file or data set, or it has another form.
    """
    if not source:
        return worked_dialogues()
    if Path(source).exists() or source.endswith(".jsonl"):
        return read_dialogues(Path(source))
    import datasets

    try:
        return [parse_dialogue(record) for part in datasets.load_dataset(source).values() for record in part]
    except (OSError, ValueError, ConnectionError) as error:
        raise UserError(f"The data set {source} cannot be read ({error}): give a JSON Lines file.") from error


def split(dialogues: Listed[Dialogue], share: float, seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """Training and held-out conversations, split by conversation."""
    order = list(range(len(dialogues)))
    Random(seed).shuffle(order)
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise UserError(f"{len(order)} conversations cannot be split: give more, or hold out less.")
    return [dialogues[place] for place in order[count:]], [dialogues[place] for place in order[:count]]


def make_pairs(
    dialogues: Listed[Dialogue], config: Config, tokenizer: Tokenizer, known: frozenset[str] = frozenset()
) -> list[Pair]:
    """Every teacher turn after the opening line that fits, with what precedes it; ``known`` problems are not unseen."""
    pairs = []
    for dialogue in dialogues:
        for place, turn in enumerate(dialogue.turns):
            before = replace(dialogue, turns=dialogue.turns[:place])
            if place and turn.role == "teacher" and turn.text.strip():
                tokens = encode_pair(before, turn, config, tokenizer)
                pairs += [Pair(before, turn, tokens, dialogue.problem not in known)] if tokens else []
    return pairs


def encode_pair(before: Dialogue, turn: Turn, config: Config, tokenizer: Tokenizer) -> Sequence | None:
    """The tokens of knowledge, history and turn, only the turn to be learned; None where it does not fit alone."""
    reading = config.reading
    answer = {"role": "assistant", "content": turn.text.strip()}

    def tokens(turns: Listed[Turn]) -> Sequence:
        asked = tutor_messages(before, turns, reading.knowledge, turn.move if reading.with_move else "")
        return encode([Example(messages=(*asked, answer))], tokenizer, max_length=1 << 20)[0]

    def fits(turns: Listed[Turn]) -> bool:
        return len(tokens(turns).ids) <= reading.max_length

    turns = fit_turns(before.turns, fits, history=reading.history)
    whole, start = tokens(turns), len(tokens(turns).prompt)
    return Sequence(whole.ids, (False,) * start + whole.response[start:]) if fits(turns) else None


def lessons(
    train: Listed[Dialogue], held_out: Listed[Dialogue], config: Config, tutor: LanguageModel
) -> tuple[list[Pair], list[Pair]]:
    """The turns to be learned and those that are measured."""
    known = frozenset(dialogue.problem for dialogue in train)
    pairs, exam = make_pairs(train, config, tutor.tokenizer), make_pairs(held_out, config, tutor.tokenizer, known)
    if not pairs or not exam:
        raise UserError(f"No teacher's turn fits into {config.reading.max_length} tokens: raise reading.max_length.")
    Random(config.training.seed).shuffle(exam)
    return pairs, exam[: config.exam or None]
