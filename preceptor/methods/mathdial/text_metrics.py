"""How close a tutor's turn is to a reference: BLEU, knowledge F1, and F1 over contextual embeddings.

KF1 and the choice of the others follow MathDial (Macina et al., 2023, https://arxiv.org/abs/2305.14536).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.models.loading import load_encoder

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def sbleu(written: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 with brevity penalty under sacrebleu's tokenisation, 0 to 100 (Post 2018).

    Raises:
        UserError: no text, or texts without a reference each.
    """
    import sacrebleu

    _same_number(written, references)
    return float(sacrebleu.corpus_bleu(list(written), [list(references)]).score)


def _same_number(written: Sequence[str], references: Sequence[str]) -> None:
    if not written or len(written) != len(references):
        raise UserError(f"{len(written)} texts and {len(references)} references: give one reference for each text.")


def knowledge_f1(written: str, knowledge: str) -> float:
    """KF1: the F1 of two texts' words, overlap by the smaller count, 0 to 1; 0 where either has no word.

    Words are normalised as in SQuAD: lower case, without punctuation and articles. A high KF1 can mean telling.
    """
    ours, theirs = Counter(content_words(written)), Counter(content_words(knowledge))
    overlap = sum((ours & theirs).values())
    if not overlap:
        return 0.0
    precision, recall = overlap / sum(ours.values()), overlap / sum(theirs.values())
    return 2 * precision * recall / (precision + recall)


def content_words(text: str) -> list[str]:
    """A text's words in lower case, without punctuation, a, an and the."""
    return re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


class TextEncoder:
    """An encoder of texts, by a name that ``load_encoder`` takes; every figure that rests on it names it.

    Raises:
        UserError: no such model.
    """

    def __init__(self, name: str = "minilm-l6") -> None:
        self.name = name
        self.model, self.tokenizer = load_encoder(name)

    @torch.no_grad()
    def tokens(self, texts: Sequence[str], *, batch_size: int = 32) -> list[Tensor]:
        """The last hidden states of each text's tokens, of length 1: (tokens, width), without special tokens."""
        special = torch.tensor(self.tokenizer.all_special_ids)
        limit = min(512, self.model.config.max_position_embeddings)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            part = [texts[place] for place in chosen]
            batch = self.tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            states = torch.nn.functional.normalize(self.model(**batch).last_hidden_state, dim=-1)
            for place, state, ids in zip(chosen, states, batch["input_ids"]):
                vectors[place] = state[~torch.isin(ids, special)]
        return vectors

    def means(self, texts: Sequence[str]) -> Tensor:
        """One vector of length 1 a text, the mean of its tokens': (texts, width); zeros for a text without tokens."""
        found = [state.mean(0) if len(state) else state.new_zeros(state.shape[1]) for state in self.tokens(texts)]
        return torch.nn.functional.normalize(torch.stack(found), dim=-1)


def bert_f1(written: Sequence[str], references: Sequence[str], encoder: TextEncoder) -> list[float]:
    """BERT F1 of each text against its reference, 0 to 100 (Zhang et al. 2020), without idf weights or rescaling.

    Each token is matched with the other text's nearest by cosine; precision is the mean over the text's tokens, recall
    over the reference's. Figures of two encoders cannot be compared: name the encoder with the result.

    Raises:
        UserError: no text, or texts without a reference each.
    """
    _same_number(written, references)
    vectors = encoder.tokens([*written, *references])
    return [100 * _greedy_f1(a, b) for a, b in zip(vectors[: len(written)], vectors[len(written) :])]


def _greedy_f1(ours: Tensor, theirs: Tensor) -> float:
    if not len(ours) or not len(theirs):
        return 0.0
    cosine = ours @ theirs.T
    precision, recall = float(cosine.max(1).values.mean()), float(cosine.max(0).values.mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
