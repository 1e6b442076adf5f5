"""Token sequences with response masks, from examples.

One function, ``encode``, serves training, caching and evaluation: the chat template is applied once, and a token
belongs to a response from the first character of the assistant's message to its end-of-turn token, that included.

A tokenizer without a chat template (a base model's) gets ``PLAIN_TEMPLATE``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence as Listed

from preceptor.data.readers import Example, Message
from preceptor.data.sequences import Sequence
from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ (eos_token or '') if message['role'] == 'assistant' else '' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


def encode(examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int) -> list[Sequence]:
    """Token sequences of examples, with response masks.

    Chat examples are rendered with the tokenizer's own template (``PLAIN_TEMPLATE`` where it has none); each assistant
    turn is a response. In plain text every token but the first is one. What exceeds ``max_length`` tokens is cut off at
    the end; an example without a response token left is dropped, with a warning that counts them.

    Raises:
        UserError: no example has a response (or none is left after truncation), or the template changes earlier text
            when the conversation goes on, so that a turn's place cannot be found.
    """
    listed = list(examples)
    if not listed:
        raise UserError("There is no example to encode: the data is empty.")
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; it must be at least 2 tokens, one to read and one to predict.")
    if not any(_answered(example) for example in listed):
        raise UserError(
            "None of the examples has a response: give data with answers (messages that end with the assistant, "
            "prompt + completion, ...), or let a teacher write them first."
        )
    whole = [_tokenize_all(example, tokenizer) for example in listed if _answered(example)]
    cut = [Sequence(item.ids[:max_length], item.response[:max_length]) for item in whole]
    kept = [sequence for sequence in cut if any(sequence.response)]
    if not kept:
        raise UserError(
            f"The response mask is empty after truncation to {max_length} tokens: every prompt is as long as that; "
            "raise max_length or shorten the prompts."
        )
    if len(kept) < len(listed):
        warnings.warn(
            f"{len(listed) - len(kept)} of {len(listed)} examples were dropped: no response is left within "
            f"{max_length} tokens.",
            stacklevel=2,
        )
    return kept


def encode_prompt(messages: Listed[Message], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of a conversation up to where the assistant begins to speak."""
    return tuple(_ids(render(messages, tokenizer, speak=True), tokenizer))


def render(messages: Listed[Message], tokenizer: Tokenizer, *, speak: bool = False) -> str:
    """The text of a conversation under the chat template; with ``speak``, up to where the assistant begins.

    Raises:
        UserError: the template refuses the conversation (two turns of one role in a row, an unknown role, ...).
    """
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=speak, chat_template=template
        )
    except Exception as error:  # whatever a template written by others raises
        raise UserError(
            f"The chat template refuses a conversation with the roles {', '.join(item['role'] for item in messages)} "
            f"({error}): mend the data, or set another template."
        ) from error
    return str(text)


def _answered(example: Example) -> bool:
    return bool(example.text) or any(message["role"] == "assistant" for message in example.messages[1:])


def _tokenize_all(example: Example, tokenizer: Tokenizer) -> Sequence:
    if not example.messages:
        ids = tokenizer(example.text)["input_ids"]
        return Sequence(tuple(ids), tuple(place > 0 for place in range(len(ids))))
    text = render(example.messages, tokenizer)
    places = [place for span in _spans(example.messages, text, tokenizer) for place in span]
    pieces = _split(text, places, tokenizer)
    ids = tuple(token for piece in pieces for token in piece)
    response = tuple(place % 2 == 1 for place, piece in enumerate(pieces) for _ in piece)
    return Sequence(ids, response)


def _split(text: str, places: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of the text up to the last place, split at the places.

    A token must not reach over a place: what a model reads as its prompt when it answers is the prompt alone. Where the
    ids of each beginning are the beginning of the ids (nearly always), the text is tokenised as one; else in pieces.
    """
    beginnings = tokenizer([text[:place] for place in places], add_special_tokens=False)["input_ids"]
    whole = beginnings[-1]
    if all(whole[: len(ids)] == ids for ids in beginnings):
        counts = [0, *map(len, beginnings)]
        return [whole[start:end] for start, end in zip(counts, counts[1:])]
    pieces = [_ids(text[start:end], tokenizer) for start, end in zip([0, *places], places)]
    if tokenizer.decode([token for piece in pieces for token in piece]) != tokenizer.decode(whole):
        raise UserError(
            "The tokenizer joins the end of a prompt and the beginning of its answer in one token, and reads them "
            "otherwise when apart: end the template's generation prompt with a newline or a special token."
        )
    return pieces


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _spans(messages: Listed[Message], text: str, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Where each assistant turn begins and ends in the rendered conversation, in characters.

    An assistant's turn that opens the conversation answers nothing and is no response. A turn begins where the rendered
    prompt before it ends. It ends with the first special token after the content,
    that included, or right after the content where the template puts none.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before = render(messages[:index], tokenizer, speak=True)
        through = render(messages[: index + 1], tokenizer)
        content = message["content"].strip()
        place = through.find(content, len(before))
        if not (text.startswith(before) and text.startswith(through) and through.startswith(before)) or place < 0:
            raise UserError(
                f"The chat template does not keep turn {index + 1} as it was when the conversation goes on, so the "
                "response's place cannot be found: give conversations of one answer each, or another template."
            )
        stop = place + len(content)
        ends = [place + len(token) for token in special if (place := through.find(token, stop)) >= 0]
        spans.append((len(before), min(ends, default=stop)))
    return spans
