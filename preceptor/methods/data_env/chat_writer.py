"""A language model that writes training items: what it is shown, what it is asked for, and what is done when it fails.

Source: DataEnvGym (Khan et al., ICLR 2025, arXiv 2410.06215), its Open-Ended, Skill-List and Skill-Tree engines; the
prompts are our own words for the sections that it names. Malformed answers are asked for again by ``Chat`` (a schema's
bounded tries); what still fails is left out with its reason, and only too many failures end the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from preceptor.errors import UserError
from preceptor.language import Chat, Reply, Request
from preceptor.language.structured import object_schema
from preceptor.methods.data_env.writers import Order, Written
from preceptor.tasks.records import Completed, Datum, Item, Task

Draw = Callable[[str], Any]


"""From an image's description to the image, uint8 (H, W, 3).

Raises:
    UserError: the description names nothing that can be drawn.
"""


@dataclass(frozen=True)
class ChatWriter:
    """Any chat backend as a writer.

    ``least``: share of calls that must give at least one item, over one round; below it an error ends the work.
    ``draw``: draws images from their descriptions, for visual questions. ``item_tokens``: what an item may take.
    """

    chat: Chat
    task: Task
    draw: Draw | None = None
    least: float = 0.1
    temperature: float = 1.0
    item_tokens: int = 150

    def write(self, orders: Sequence[Order]) -> list[Written]:
        """What came of each order. Where too few items came, the rest is asked for once more, showing what there is.

        Raises:
            UserError: fewer calls than ``least`` gave an item.
        """
        first = self._ask(orders, [()] * len(orders))
        again = [replace(order, count=max(0, order.count - len(got.data))) for order, got in zip(orders, first)]
        second = self._ask(again, [got.data for got in first])
        done = [
            Written((*a.data, *b.data)[: order.count], (*a.failures, *b.failures))
            for order, a, b in zip(orders, first, second, strict=True)
        ]
        wanted = [written for order, written in zip(orders, done, strict=True) if order.count]
        good = sum(bool(written.data) for written in wanted)
        if wanted and good < self.least * len(wanted):
            reason = next((text for written in wanted for text in written.failures), "no reason was given")
            raise UserError(
                f"Only {good} of {len(wanted)} calls to the teacher gave an item ({reason}): choose a stronger model, "
                "or lower the least share of good calls."
            )
        return done

    def propose(self, skill: str, there: tuple[str, ...], count: int) -> Sequence[str]:
        """New subskills in the model's words; none when it fails."""
        text = (
            f'You are an educator. The skill "{skill}" of a {SUBJECTS[self.task.name]} course is to be split into '
            f"subskills for practice. There are already: {', '.join(there) or 'none'}. Name exactly {count} new ones, "
            "each unlike the others and unlike those there."
        )
        schema = object_schema(subskills={"type": "array", "items": {"type": "string"}})
        request = Request(({"role": "user", "content": text},), 300, seed=len(there), schema=schema)
        reply = self.chat.ask([request])[0]
        return [str(name) for name in (reply.data or {}).get("subskills", [])][:count]

    def _ask(self, orders: Sequence[Order], there: Sequence[Sequence[Datum]]) -> list[Written]:
        """One call an order; an order of 0 items is no call."""
        asked = [place for place, order in enumerate(orders) if order.count > 0]
        replies = self.chat.ask([self._request(orders[place], there[place]) for place in asked]) if asked else []
        written = [Written()] * len(orders)
        for place, reply in zip(asked, replies, strict=True):
            written[place] = self._read(orders[place], reply)
        return written

    def _request(self, order: Order, there: Sequence[Datum]) -> Request:
        return Request(
            ({"role": "user", "content": prompt(self.task, order, there)},),
            100 + self.item_tokens * order.count,
            self.temperature,
            seed=order.seed % 2**31,
            schema=schema(self.task.name, order),
        )

    def _read(self, order: Order, reply: Reply) -> Written:
        if reply.error or not isinstance(reply.data, dict):
            return Written((), (f"the call failed: {reply.error or 'no structured answer'}",))
        groups = reply.data.get("hypotheses", []) if order.hypotheses else [reply.data]
        data, failures = [], []
        for group in groups:
            subskill = str(group.get("weak_subskill", "")) if order.hypotheses else order.subskill
            for spec in group.get("items", []):
                try:
                    data.append(self._datum(spec, replace(order, subskill=subskill)))
                except UserError as error:
                    failures.append(f"malformed item: {error}")
        return Written(tuple(data[: order.count]), tuple(failures))

    def _datum(self, spec: dict[str, Any], order: Order) -> Datum:
        image = self.draw(str(spec.get("image", ""))) if self.draw else None
        return datum_of(self.task, spec, order, image)


SUBJECTS = {"math": "mathematics", "code": "Python programming", "visual": "visual question answering"}


def prompt(task: Task, order: Order, there: Sequence[Datum]) -> str:
    """What the model reads: what the student got wrong, where the weakness lies or is to be guessed, how many items."""
    parts = [f"You write practice for a student of {SUBJECTS[task.name]}."]
    if order.examples:
        parts.append("Examples of the problems:\n" + "\n".join(f"- {_problem(item)}" for item in order.examples))
    if order.errors:
        what = "These problems the student got wrong" + (f", all of the skill {order.skill}" if order.skill else "")
        parts.append(f"{what}:\n" + "\n".join(_error(one) for one in order.errors))
    if order.hypotheses:
        each = -(-order.count // order.hypotheses)
        parts.append(
            f"Make {order.hypotheses} hypotheses, each naming a subskill that the student is weak in"
            f"{'' if order.errors else f' within the skill {order.skill}'}, and write {each} new problems for each."
        )
    elif order.subskill:
        parts.append(f'Write {order.count} new problems that practise "{order.subskill}" ({order.skill}).')
    else:
        parts.append(f"Write {order.count} new problems{' that teach what is missing' if order.errors else ''}.")
    if there:
        parts.append("There are already, so do not repeat them:\n" + "\n".join(f"- {one.instruction}" for one in there))
    parts.append("Number the problems in the field index. Each needs its exact answer; do not copy a problem above.")
    return "\n\n".join(parts)


def schema(task: str, order: Order) -> dict[str, Any]:
    """The JSON schema of the answer: a list of items, or of hypotheses that hold one each."""
    fields = {name: {"type": "string", "description": what} for name, what in SPECS[task].items()}
    item = {
        "type": "object",
        "properties": {"index": {"type": "integer"}, **fields},
        "required": [name for name in SPECS[task] if name in REQUIRED],
    }
    items: dict[str, Any] = {"type": "array", "items": item}
    if not order.hypotheses:
        return object_schema(items=items)
    hypothesis = object_schema(weak_subskill={"type": "string"}, items=items)
    return object_schema(hypotheses={"type": "array", "items": hypothesis})


def _problem(item: Item) -> str:
    return f"{item.instruction}{f' (begin with: {item.starter})' if item.starter else ''} Answer: {item.truth}"


def _error(one: Completed) -> str:
    return f"- {one.item.instruction}\n  The student answered: {one.response[:400]}\n  Right is: {one.item.truth}"


def datum_of(task: Task, spec: Mapping[str, Any], order: Order, image: Any = None) -> Datum:
    """A training item from what a language model wrote (``SPECS``).

    Raises:
        UserError: a field is missing or empty; the text names it.
    """
    missing = [name for name in SPECS[task.name] if name in REQUIRED and not str(spec.get(name, "")).strip()]
    if missing:
        raise UserError(f"an item lacks its {missing[0]}")
    text = {name: str(spec.get(name, "")).strip() for name in SPECS[task.name]}
    item = Item(
        id="",
        task=task.name,
        skill=order.skill or str(spec.get("skill", "")),
        subskill=order.subskill or str(spec.get("subskill", "")),
        instruction=text["problem"],
        truth=text["answer"],
        image=image,
        starter=text.get("starter", ""),
        tests=text.get("tests", ""),
        work=text.get("work", ""),
    )
    return task.datum(item)


SPECS: Mapping[str, Mapping[str, str]] = {
    "math": {
        "problem": "the problem",
        "work": "one line of working",
        "answer": "the final answer: a number",
    },
    "code": {
        "problem": "what the function is to do",
        "starter": "the function's first line, or nothing",
        "answer": "the whole function in Python",
        "tests": "calls with their results, one a line, such as f(2, 3) == 5",
    },
    "visual": {
        "problem": "the question about the image",
        "image": (
            "the image, a grid of 4 rows and 4 columns counted from 1: each shape as COLOUR KIND at row R column C, "
            "separated by semicolons, with the colours red, green, blue, yellow and the kinds circle, square, "
            "triangle, cross"
        ),
        "answer": "the answer: a word or a number",
    },
}


REQUIRED = ("problem", "answer", "tests", "image")
