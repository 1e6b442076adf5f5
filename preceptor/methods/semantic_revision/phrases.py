"""Phrases of a text, and which tokens lie in them.

A chunker turns text into spans of characters. ``textblob`` finds noun, verb and prepositional phrases of English: a
lexicon of parts of speech with Brill's rules, and regular expressions over the tags; the package brings its data.
Without it ``plain`` splits at punctuation, and wherever a function word follows a content word (the "chinks and chunks"
of Liberman & Church, 1992): "the old dog barked at the cat" is "the old dog barked" and "at the cat".
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence as Listed
from functools import partial
from typing import Any, Literal

from preceptor.data.sequences import Sequence
from preceptor.data.tokenizer import Tokenizer
from preceptor.distillation.marked import Marker
from preceptor.errors import UserError
from preceptor.models.language_model import LanguageModel

Span = tuple[int, int]


"""From a character (or token) up to, not including, another."""


Chunker = Callable[[str], list[Span]]


Name = Literal["textblob", "plain", "either"]


# As the Penn treebank splits words: "do n't", "dog 's"; numbers and compounds stay whole.
WORD = re.compile(r"[^\W\d_]+(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|\w+(?:[-.,]\w+)*|[^\w\s]")


ENDS = frozenset(".!?")


FUNCTION_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
    a an the this that these those each every either neither some any no all both half such what which whose another
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
    ourselves they them their theirs themselves who whom one
    about above across after against along among around as at before behind below beneath beside between beyond but by
    despite down during except for from in inside into like near of off on onto out outside over past per since than
    through throughout till to toward towards under until up upon via with within without
    and or nor so yet if because although though while whereas unless whether when where why how
    am is are was were be been being do does did have has had having can could may might must shall should will would
    not n't 's 're 've 'll 'd 'm there then
    """,
    )
)


def chunker(name: Name) -> Chunker:
    """The chunker of that name; ``either`` is textblob, or else plain, with a warning.

    Raises:
        UserError: textblob is wanted and not installed.
    """
    there = importlib.util.find_spec("textblob") is not None
    if name == "textblob" and not there:
        raise UserError(
            'The chunker "textblob" is not installed: pip install "preceptor[phrases]", or choose the chunker "plain", '
            "which splits at punctuation and function words."
        )
    if name == "either" and not there:
        warnings.warn(
            'textblob is not installed (pip install "preceptor[phrases]"): phrases are found by punctuation and by '
            "function words alone.",
            stacklevel=2,
        )
    return phrases if there and name != "plain" else plain_phrases


def phrases(text: str) -> list[Span]:
    """Noun, verb and prepositional phrases of English text, by TextBlob's tagger and chunker, in order.

    A prepositional phrase holds its noun phrase. Places are exact: the words are cut here, the parser only tags them.
    """
    parser: Any = importlib.import_module("textblob.en").parser
    sentences = _sentences(text)
    tagged = parser.parse(
        [" ".join(word.group().replace("’", "'") for word in words) for words in sentences], tokenize=False, split=True
    )
    return [
        span
        for words, tags in zip(sentences, tagged)
        for span in _grouped(words, [_kind(word.group(), *tag[2:4]) for word, tag in zip(words, tags)])
    ]


def plain_phrases(text: str) -> list[Span]:
    """Runs of words without punctuation between them, each of function words and then content words, in order."""
    spans: list[Span] = []
    for words in _sentences(text):
        tags: list[str] = []
        content = True
        for word in words:
            lower = word.group().lower().replace("’", "'")
            if not lower[-1].isalnum():
                tags.append("")
            else:
                begins = content and lower in FUNCTION_WORDS or not tags or not tags[-1]
                tags.append("B" if begins else "I")
            content = lower not in FUNCTION_WORDS
        spans += _grouped(words, tags)
    return spans


def token_characters(ids: Listed[int], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    """The text of token ids, and the characters of each: special tokens have none.

    The ids are taken as they are: encoding the text again might give others. With byte-level tokens a character that
    several tokens share belongs to each of them.
    """
    special = set(tokenizer.all_special_ids)
    heads = [
        tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for end in range(len(ids) + 1)
    ]
    text, spans, start = heads[-1], list[Span](), 0
    for token, head in zip(ids, heads[1:]):
        end = _common(head, text)
        spans.append(
            (start, start) if token in special else (min(start, len(text)), max(end, min(start + 1, len(text))))
        )
        start = max(start, end)
    return text, spans


def token_spans(ids: Listed[int], tokenizer: Tokenizer, chunk: Chunker) -> list[Span]:
    """The phrases of a text as ranges of its tokens: a token belongs to the phrase that holds most of its characters.

    White space does not count. Phrases without a token are left out.
    """
    text, characters = token_characters(ids, tokenizer)
    owner = [-1] * len(text)
    for number, (start, end) in enumerate(chunk(text)):
        owner[start:end] = [number] * (end - start)
    belongs = [_most([owner[place] for place in range(*span) if not text[place].isspace()]) for span in characters]
    found: dict[int, Span] = {}
    for token, number in enumerate(belongs):
        if number >= 0:
            begun, end = found.get(number, (token, token))
            # Only tokens that follow each other: what lies between two parts of a phrase belongs to none.
            found[number] = (begun, token + 1) if end == token else (begun, end)
    return list(found.values())


def adjacent(spans: Listed[Span]) -> list[int]:
    """The first token of each pair of neighbours in one span."""
    return sorted(token for start, end in spans for token in range(start, end - 1))


def pairs(sequence: Sequence, tokenizer: Tokenizer, chunk: Chunker) -> tuple[int, ...]:
    """The pairs of a sequence's responses, none of its prompts: i of each (i, i + 1).

    They count the predicted response tokens, in the order of the rows that ``Batch.predicts`` selects.
    """
    found: list[int] = []
    row, start, length = 0, 1, len(sequence.ids)
    while start < length:
        if not sequence.response[start]:
            start += 1
            continue
        end = start
        while end < length and sequence.response[end]:
            end += 1
        found += [row + first for first in adjacent(token_spans(sequence.ids[start:end], tokenizer, chunk))]
        row, start = row + end - start, end
    return tuple(found)


def phrase_marker(
    student: LanguageModel, chunk: Chunker | None, known: dict[Sequence, tuple[int, ...]] | None = None
) -> Marker:
    """Marks the phrases of sequences by a chunker (None: there are none), beside pairs that are known already."""
    find = None if chunk is None else partial(pairs, tokenizer=student.tokenizer, chunk=chunk)
    return Marker(student, find, known or {})


def _sentences(text: str) -> list[list[re.Match[str]]]:
    """Words and punctuation marks, sentence by sentence; a line ends one too."""
    sentences: list[list[re.Match[str]]] = [[]]
    for word in WORD.finditer(text):
        before = sentences[-1]
        if before and (before[-1].group() in ENDS or "\n" in text[before[-1].end() : word.start()]):
            sentences.append([])
        sentences[-1].append(word)
    return [words for words in sentences if words]


def _kind(word: str, chunk: str, preposition: str) -> str:
    """B or I and the kind of a phrase, from a word's two tags; empty outside of one, as punctuation always is."""
    if not word[-1].isalnum():
        return ""
    if preposition != "O":
        return preposition
    return chunk if chunk.endswith(("-NP", "-VP")) else ""


def _grouped(words: Listed[re.Match[str]], tags: Listed[str]) -> list[Span]:
    """Spans of words: one that begins with a tag B, or that no other of its kind stands before, and the I after it."""
    spans: list[Span] = []
    last = ""
    for word, tag in zip(words, tags):
        if tag and (tag[0] == "B" or tag[1:] != last[1:] or not last):
            spans.append(word.span())
        elif tag:
            spans[-1] = (spans[-1][0], word.end())
        last = tag
    return spans


def _common(head: str, text: str) -> int:
    """How many characters two texts share from their start."""
    if text.startswith(head):
        return len(head)
    return next((place for place, (one, other) in enumerate(zip(head, text)) if one != other), len(text))


def _most(numbers: list[int]) -> int:
    """The number that most characters have, the earliest of equals; -1 for no characters."""
    return max(numbers, key=numbers.count) if numbers else -1
