"""What a tutor is measured on: held-out turns, turns that it writes, and the problems that are played."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Listed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.data.sequences import Sequence, collate
from preceptor.dialogue.dialogue import Dialogue, strip_turn
from preceptor.dialogue.measures import answer_was_there
from preceptor.dialogue.tutors import DIFFICULTIES, NAMES, persona
from preceptor.distillation.held_out import held_out_means
from preceptor.errors import UserError
from preceptor.language import Chat
from preceptor.losses import Loss
from preceptor.losses.divergences import divergence
from preceptor.methods.mathdial.common_errors import chat_sampler, common_errors, read_problems
from preceptor.methods.mathdial.text_metrics import TextEncoder, bert_f1, knowledge_f1, sbleu
from preceptor.methods.mathdial.turns import Pair
from preceptor.methods.mathdial.uptake import overlap_share
from preceptor.models.language_model import LanguageModel
from preceptor.report.table import Table
from preceptor.statistics import mean_of

if TYPE_CHECKING:
    from preceptor.methods.mathdial.recipe import Config


@dataclass(frozen=True)
class Examined:
    """A tutor on held-out turns: nats a token of all, seen and unseen problems, and what it writes in their place."""

    loss: dict[str, float]
    texts: list[str]


def examine(tutor: LanguageModel, exam: Listed[Pair], config: Config) -> Examined:
    """Measure a tutor on held-out turns."""
    texts = write_turns(tutor, exam[: config.written], config.voice.max_tokens)
    return Examined(loss_by_problems(tutor, [(pair.tokens, pair.unseen) for pair in exam]), texts)


def loss_by_problems(tutor: LanguageModel, exam: Listed[tuple[Sequence, bool]]) -> dict[str, float]:
    """Nats a token of held-out turns: all, those of seen and those of unseen problems."""

    def losses(examples: Listed[tuple[Sequence, bool]]) -> Iterable[tuple[str, Loss]]:
        batch = collate([tokens for tokens, _ in examples], tutor.pad_id).to(tutor.device)
        hidden = tutor(batch)
        for row, (_, unseen) in enumerate(examples):
            mask, labels = batch.predicts[row], batch.labels[row]
            loss = divergence(hidden[row], tutor.head, None, mask=mask, labels=labels, weight=0.0, label_weight=1.0)
            yield "all", loss
            yield "unseen" if unseen else "seen", loss

    found = held_out_means(tutor, sorted(exam, key=lambda one: len(one[0].ids)), losses, batch_size=8)
    return {name: found[name] for name in ("all", "seen", "unseen") if name in found}


def write_turns(tutor: LanguageModel, pairs: Listed[Pair], length: int) -> list[str]:
    """The turns that a tutor writes in place of those held out, greedily."""
    outputs = tutor.generate([pair.tokens.prompt for pair in pairs], max_new_tokens=length, temperature=0.0)
    texts = [tutor.tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs]
    return [strip_turn(text, "teacher", name=pair.before.name).text for text, pair in zip(texts, pairs)]


def text_figures(texts: Listed[str], pairs: Listed[Pair], encoder: TextEncoder) -> dict[str, float]:
    """sBLEU, BERT F1, KF1 (against the problem) and the share of the student's words that the turns use again."""
    truth = [pair.turn.text for pair in pairs]
    asked = [next((turn.text for turn in reversed(pair.before.turns) if turn.role == "student"), "") for pair in pairs]
    return {
        "sBLEU": sbleu(texts, truth),
        f"BERT F1 ({encoder.name})": mean_of(bert_f1(texts, truth, encoder)).mean,
        "KF1": 100 * mean_of([knowledge_f1(text, pair.before.problem) for text, pair in zip(texts, pairs)]).mean,
        "words used again": 100 * mean_of([overlap_share(a, b) for a, b in zip(asked, texts)]).mean,
    }


def cases_to_play(config: Config, held_out: Listed[Dialogue], chat: Chat) -> list[Dialogue]:
    """Problems with wrong solutions and no turn yet: held-out ones, or the common errors of ``config.problems``."""
    if config.problems:
        roles = [persona(name, trouble) for name, trouble in zip(NAMES, DIFFICULTIES)]
        listed = read_problems(Path(config.problems), limit=config.played)
        sampler = chat_sampler(chat, config.errors, seed=config.training.seed)
        cases, counts = common_errors(listed, sampler, config.errors, roles)
        print("Common errors: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    else:
        bare = [replace(one, turns=(), outcome=None, facts={}) for one in held_out]
        cases = list({one.problem: one for one in bare if not answer_was_there(one)}.values())[: config.played]
    if not cases:
        raise UserError("No problem with a wrong solution is left to play: give other problems, or loosen the filters.")
    return cases


def tutor_table(
    config: Config, examined: dict[str, Examined], played: dict[str, dict[str, float]], exam: Listed[Pair]
) -> Table:
    """Measures by tutors: held-out turns first, then play."""
    encoder, table = TextEncoder(), Table(f"{config.tutor} as a tutor", list(dict.fromkeys([*examined, *played])))
    for name, one in examined.items():
        cells = {f"held-out loss, {part} problems": value for part, value in one.loss.items()}
        for row, value in {**cells, **text_figures(one.texts, exam[: config.written], encoder)}.items():
            table.rows.setdefault(row, {})[name] = value
            table.better[row] = "lower" if row in cells else "higher"
        table.units |= dict.fromkeys(cells, "nat/token")
    for name, figures in played.items():
        for row, value in figures.items():
            table.rows.setdefault(row, {})[name] = value
            table.units[row] = "%"
    table.notes = [
        f"{len(exam)} held-out turns, {len(examined['untaught'].texts)} of them written anew, greedily.",
        f"Play against {config.base} as the student: it agrees too easily for a claim about teaching.",
    ]
    return table


def page_samples(examined: dict[str, Examined], exam: Listed[Pair]) -> list[dict[str, object]]:
    """Held-out turns of the human teacher and of both tutors, for the page."""
    found: list[dict[str, object]] = []
    for place, pair in enumerate(exam[: min(6, len(examined["untaught"].texts))]):
        prompt = f"{pair.before.problem}\n\n... {pair.before.turns[-1].text}"
        answers = {"teacher": pair.turn.text, **{name: one.texts[place] for name, one in examined.items()}}
        found.append({"prompt": prompt, "answers": answers})
    return found
