"""A study of encoders on the embedded sentences: a teacher, what students learn from, and what they are examined on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preceptor.data.embedded_sentences import embedded_sentences
from preceptor.data.sequences import Sequence, collate
from preceptor.data.tokenizer import Tokenizer
from preceptor.evaluation.probing import mean_pool, probe_accuracy, random_pairs, rank_agreement
from preceptor.methods.minilm.attention_reader import AttentionTeacher, SelfAttention, pair_up
from preceptor.methods.minilm.encoders import load_body
from preceptor.methods.minilm.texts import Texts, encode_texts, padding_id


@dataclass(frozen=True)
class SentenceExam:
    """What an encoder's sentence vectors are held against, on sentences that it has not learned from.

    ``sequences``: sentences whose pairs are ranked; ``vectors``: the teacher's of them, (N, D); ``pairs``: (P, 2) rows;
    ``labelled`` and ``labels``: sentences of the probe, the first half to learn it, the second to ask it.
    """

    sequences: list[Sequence]
    vectors: Tensor
    pairs: Tensor
    labelled: list[Sequence]
    labels: list[str]

    def figures(self, hidden: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        """``rank agreement`` (Spearman, -1 to 1) and ``probe`` (accuracy in %) of mean-pooled ``hidden(ids, mask)``."""
        known, half = embed(hidden, self.labelled), len(self.labelled) // 2
        accuracy = probe_accuracy(known[:half], self.labels[:half], known[half:], self.labels[half:])
        agreement = rank_agreement(embed(hidden, self.sequences), self.vectors, self.pairs)
        return {"rank agreement": agreement, "probe": 100 * accuracy}


@torch.no_grad()
def embed(hidden: Callable[[Tensor, Tensor], Tensor], sequences: list[Sequence]) -> Tensor:
    """One mean-pooled vector a sequence, (N, D), of a model that maps ids and mask (B, T) to states (B, T, D)."""
    batches = [collate(sequences[start : start + 64], 0) for start in range(0, len(sequences), 64)]
    return torch.cat([mean_pool(hidden(b.input_ids, b.attention_mask), b.attention_mask) for b in batches])


@dataclass(frozen=True)
class Study:
    """What all arms and seeds share.

    ``body``, ``tokenizer``: the teacher. ``teacher``: its attention, remembered; ``control``: the same, answering with
    another sentence of equal length. ``texts``: lessons and held-out sentences. ``exam``: of sentence vectors.
    """

    body: Any
    tokenizer: Tokenizer
    teacher: AttentionTeacher
    control: AttentionTeacher
    texts: Texts
    exam: SentenceExam


def make_study(name: str, *, lessons: int, max_length: int, examined: int = 1000, probed: int = 3000) -> Study:
    """The teacher ``name``, the first sentences to examine and to probe, and ``lessons`` others to learn from.

    The first ``examined`` sentences are for relations and ranks; the probe tells the five largest sources of the first
    ``probed`` apart. Which sentences come first depends on the Python installation alone.
    """
    body, tokenizer = load_body(name)
    listed = embedded_sentences()
    listed = [listed[i] for i in np.random.default_rng(0).permutation(len(listed))]
    sequences = encode_texts([one.text for one in listed], tokenizer, max_length=max_length)
    exam, learned = sequences[:examined], sequences[probed : probed + lessons]
    common = {source for source, _ in Counter(one.source for one in listed[:probed]).most_common(5)}
    asked = [i for i in range(probed) if listed[i].source in common]
    questions = SentenceExam(
        exam,
        embed(lambda ids, mask: body(input_ids=ids, attention_mask=mask).last_hidden_state, exam),
        random_pairs(1000, len(exam)),
        [sequences[i] for i in asked],
        [listed[i].source for i in asked],
    )
    teacher = AttentionTeacher(SelfAttention(body), remember=True)
    control = teacher.confused(pair_up(learned))
    return Study(body, tokenizer, teacher, control, Texts(learned, exam, padding_id(tokenizer)), questions)
