"""Hints: one model as teacher, shown a right and a wrong attempt at a question, and as student, shown the question.

Both read the same reply, token by token; only what stands before it differs. ``Hinted`` hands the teacher's words on
each reply to the student who reads it from the bare question.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence as Listed
from dataclasses import dataclass

import torch

from preceptor.data.encoding import encode_prompt
from preceptor.data.readers import Message
from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.data.tokenizer import Tokenizer
from preceptor.distillation.teachers import Teacher
from preceptor.errors import UserError
from preceptor.knowledge import HiddenTargets, LogitTargets, SoftTargets
from preceptor.methods.soft_bootstrapping.rollouts import Tried
from preceptor.tasks.records import Item

SYSTEM = (
    "You teach mathematics. Solve the problem step by step, leave no step out, and give the final answer at the end in "
    "\\boxed{}."
)


HINT = (
    "Problem: {question}\n\nHere is an attempt whose result is right:\n{right}\n\nHere is one whose result is wrong:\n"
    "{wrong}\n\nUse both to write a new solution of your own: complete, careful, and with a word on the mistakes that "
    "are easy to make here. It must stand by itself, so do not let anybody see that you were shown attempts. Give the "
    "result of the right attempt at the end in \\boxed{{}}."
)


TELLTALES = (
    "attempt", "attempts", "the wrong solution", "the right solution", "the incorrect solution", "the correct solution",
    "i was shown", "i was given", "you provided", "provided solution", "the hint",
)  # fmt: skip


RUN = 5  # words of the hint in a row that give it away


_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai to Khmer, kana, Han


_LETTER = rf"(?:(?![{_UNSPACED}])[^\W_])"


_WORD = re.compile(rf"[{_UNSPACED}]|{_LETTER}+(?:'{_LETTER}+)*")


@dataclass(frozen=True)
class Prompts:
    """What teacher and student read besides the question."""

    system: str = SYSTEM
    """The system prompt of both."""
    shots: tuple[str, ...] = ()
    """Worked examples for both, earlier turns of the chat: a question, its answer, a question, its answer, ..."""
    hint: str = HINT
    """What the teacher reads in the question's place, with {question}, {right} and {wrong}."""
    hint_shots: tuple[str, ...] = ()
    """Worked examples of the hint in use, for the teacher in place of ``shots``; empty: those."""
    forbidden: tuple[str, ...] = TELLTALES
    """Phrases of whole words that give the hint away: a reply with one is not kept, nor one with five words of the hint
    in a row. What the question says too gives nothing away."""
    template: bool = True
    """The student learns under the chat template; off: system prompt and question as plain text, as the authors do."""
    end_of_turn: bool = True
    """The token that ends the turn is learned too; off: the reply stops before it, as in the authors' scripts."""

    def __post_init__(self) -> None:
        """Refuse a hint that cannot be filled in, and half an example."""
        try:
            filled = self.hint.format(question="<question>", right="<right>", wrong="<wrong>")
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"prompts.hint cannot be filled in ({error!r}): it takes {{question}}, {{right}} and {{wrong}}, and "
                "braces that are meant as such are doubled."
            ) from error
        if missing := [name for name in ("question", "right") if f"<{name}>" not in filled]:
            raise UserError(f"prompts.hint has no {{{missing[0]}}}: without it the teacher knows no more than before.")
        for name, shots in (("shots", self.shots), ("hint_shots", self.hint_shots)):
            if len(shots) % 2:
                raise UserError(f"prompts.{name} has {len(shots)} texts: give a question and an answer for each.")

    def chat(self, text: str, shots: tuple[str, ...]) -> list[Message]:
        """A conversation up to what is asked, after worked examples."""
        roles = ("user", "assistant")
        turns: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        turns += [{"role": roles[place % 2], "content": shot} for place, shot in enumerate(shots)]
        return [*turns, {"role": "user", "content": text}]

    def ask(self, item: Item, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids of the bare question, as it is answered: under the template (``PLAIN_TEMPLATE`` without one)."""
        return encode_prompt(self.chat(item.instruction, self.shots), tokenizer)

    def learn(self, item: Item, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids before the reply that the student learns."""
        if self.template:
            return self.ask(item, tokenizer)
        text = "\n\n".join(message["content"] for message in self.chat(item.instruction, self.shots))
        return tuple(tokenizer(f"{text}\n\n")["input_ids"])

    def show(self, tried: Tried, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids of the hinted prompt of a question with two exemplars."""
        assert tried.right is not None
        assert tried.wrong is not None
        right, wrong = tried.rollouts[tried.right].text, tried.rollouts[tried.wrong].text
        text = self.hint.format(question=tried.item.instruction, right=right, wrong=wrong)
        return encode_prompt(self.chat(text, self.hint_shots or self.shots), tokenizer)

    def leak(self, reply: str, question: str = "") -> str | None:
        """What in a reply gives away that its writer was shown attempts; None where nothing does.

        Words are compared without regard to case; what stands in the question is left out.
        """
        answered, asked = (f" {' '.join(_words(text))} " for text in (reply, question))
        literal = re.split(r"\{question\}|\{right\}|\{wrong\}", self.hint)
        runs = [run for part in literal for run in _runs(_words(part))]
        for phrase in (*self.forbidden, *runs):
            words = " ".join(_words(phrase))
            if words and f" {words} " in answered and f" {words} " not in asked:
                return phrase
        return None


@dataclass(frozen=True)
class HintedPair:
    """One reply seen twice: after the hinted prompt (``teacher``) and after the bare question (``student``)."""

    name: str
    teacher: Sequence
    student: Sequence


def views(
    kept: Listed[Tried], prompts: Prompts, tokenizer: Tokenizer, *, max_length: int, stop: frozenset[int]
) -> list[HintedPair]:
    """The two sequences of each kept question, of as many response tokens each.

    What is longer than ``max_length`` keeps the reply's first tokens and the prompt's last ones, with a warning that
    counts them; an empty reply is left out.

    Raises:
        UserError: a reply holds ids that the tokenizer does not know; the question is named.
    """
    vocabulary = 1 + max(tokenizer.get_vocab().values())
    found, cut = [], 0
    for one in kept:
        assert one.reply is not None
        reply = one.reply.ids
        while reply and reply[-1] in stop and not prompts.end_of_turn:
            reply = reply[:-1]
        if reply and max(reply) >= vocabulary:
            raise UserError(
                f"The reply to {one.item.id} holds the id {max(reply)}, and the tokenizer has {vocabulary}: go on with "
                "the model that wrote the rollouts, or choose another folder."
            )
        before = prompts.show(one, tokenizer), prompts.learn(one.item, tokenizer)
        cut += any(len(prompt) + len(reply) > max_length for prompt in before)
        if reply:
            found.append(HintedPair(one.item.id, *(fitted(prompt, reply, max_length) for prompt in before)))
    if cut:
        warnings.warn(f"{cut} of {len(kept)} replies and prompts are cut to {max_length} tokens.", stacklevel=2)
    return found


def fitted(prompt: tuple[int, ...], reply: tuple[int, ...], max_length: int) -> Sequence:
    """A prompt and a reply within ``max_length`` tokens: the reply's first ones, at most all but one, go before.

    How much of the reply is left does not depend on the prompt, so two views of a reply stay aligned.
    """
    answer = reply[: max_length - 1]
    room = max_length - len(answer)
    before = prompt[-room:]
    return Sequence(before + answer, (False,) * len(before) + (True,) * len(answer))


class Hinted:
    """A teacher that hears the hinted prompt where the student reads the bare question.

    Args:
        source: gives targets for the hinted sequences: the student with its adapter off, another model, or a cache.
        shown: all views that the student will read.
        pad_id: to pad hinted sequences with.

    Raises:
        UserError: the two views of an example hold different replies; it is named.
    """

    def __init__(self, source: Teacher, shown: Listed[HintedPair], pad_id: int) -> None:
        self.targets_of, self.pad_id = source, pad_id
        self.heard: Mapping[Sequence, Sequence] = {one.student: one.teacher for one in shown}
        for one in shown:
            mine, theirs = _reply(one.student), _reply(one.teacher)
            if mine != theirs:
                raise UserError(
                    f"The teacher's reply to {one.name} has {len(theirs)} tokens and the student's {len(mine)}, or "
                    "other ones: make the lessons anew, in another folder."
                )

    @torch.no_grad()
    def __call__(self, batch: Batch) -> SoftTargets:
        """Packed rows, one for each reply token, in the order of the student's ``batch.predicts``."""
        heard = collate([self.heard[one] for one in batch.sequences()], self.pad_id).to(batch.input_ids.device)
        targets = self.targets_of(heard)
        if isinstance(targets, HiddenTargets) and targets.hidden.dim() == 3:
            return HiddenTargets(targets.hidden[heard.predicts], targets.head)
        if isinstance(targets, LogitTargets) and targets.logits.dim() == 3:
            return LogitTargets(targets.logits[heard.predicts])
        return targets


def _reply(sequence: Sequence) -> tuple[int, ...]:
    return tuple(token for token, counts in zip(sequence.ids, sequence.response) if counts)


def _words(text: str) -> list[str]:
    """The words of a text in any script; where no spaces part words, each letter is one."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _runs(words: list[str]) -> list[str]:
    return [" ".join(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
