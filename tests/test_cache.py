"""The teacher's cache: every kind within its stated error, and nothing lost, doubled or mistaken on disk."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from preceptor.cache import Cache, CachedTeacher, Config, Plan, Wanted, capture, main
from preceptor.cache.choice import choose, fit, measure
from preceptor.cache.codecs import decode, encode
from preceptor.cache.hidden import HiddenCodec
from preceptor.cache.measures import LogProbs, kl_to_hidden
from preceptor.cache.rans import Decoder, Encoder, Tables, quantise_frequencies
from preceptor.cache.soft import (
    kl_to_topk,
    level_of,
    log_p_of,
    sampled_rows,
    sampled_targets,
    topk_rows,
    topk_targets,
)
from preceptor.cache.sparse import SparseRows, fit_sparse
from preceptor.cache.store import read_index, shard_path
from preceptor.data import Sequence, collate
from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, SampledTargets, TopKTargets
from preceptor.models import LanguageModel

VOCABULARY = 211
KINDS = ("top_k", "sampled", "hidden")


def make_teacher(*, vocabulary: int = VOCABULARY, seed: int = 0, template: str = "{{ messages }}") -> LanguageModel:
    """A tiny random model with sharp enough predictions, and a tokenizer of words w0, w1, ..."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")
    tokenizer.chat_template = template
    return LanguageModel(LlamaForCausalLM(config), tokenizer).eval()


def make_sequences(count: int, seed: int = 0) -> list[Sequence]:
    """Sequences of 8 to 40 random ids, of which the last half is a response."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        length = draw.randint(8, 40)
        ids = tuple(draw.randrange(VOCABULARY) for _ in range(length))
        found.append(Sequence(ids, tuple(place >= length // 2 for place in range(length))))
    return found


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return make_teacher()


@pytest.fixture(scope="module")
def sequences() -> list[Sequence]:
    return make_sequences(60)


def plan_of(kind: str, budget: float = 40, **wanted: float) -> Plan:
    return Plan(Wanted(budget, 64, **wanted), kind, batch_tokens=256, sample=600, shard_bytes=4096)


def kept(teacher: LanguageModel, sequences: list[Sequence], folder: Path, plan: Plan) -> Cache:
    return capture(teacher, sequences, folder, name="tiny", max_length=64, plan=plan, say=lambda _: None)


def exact(teacher: LanguageModel, sequences: list[Sequence]) -> torch.Tensor:
    """The teacher's hidden states at the positions that predict response tokens."""
    batch = collate(sequences, 1)
    with torch.no_grad():
        return teacher(batch)[batch.predicts]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# The coder


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 30))
def test_streams_give_back_what_was_pushed(seed: int, lanes: int, steps: int) -> None:
    draw = np.random.default_rng(seed)
    tables = Tables.of(quantise_frequencies(draw.dirichlet(np.full(20, 0.2), size=4) + 1e-9))
    model, symbol = draw.integers(0, 4, (steps, lanes)), draw.integers(0, 20, (steps, lanes))
    bits = draw.integers(0, 17, (steps, lanes))
    raw = draw.integers(0, 1 << 16, (steps, lanes)) & ((1 << bits) - 1)
    encoder = Encoder(lanes, 4)
    for step in reversed(range(steps)):
        encoder.push_raw(raw[step], bits[step])
        encoder.push(tables, model[step], symbol[step])
    words, lengths = encoder.finish()
    decoder = Decoder(words, lengths)
    for step in range(steps):
        assert (decoder.pull(tables, model[step]) == symbol[step]).all()
        assert (decoder.pull_raw(bits[step]) == raw[step]).all()


def test_streams_are_within_two_words_of_the_entropy() -> None:
    draw = np.random.default_rng(0)
    tables = Tables.of(quantise_frequencies(draw.dirichlet(np.full(30, 0.3), size=1) + 1e-9))
    p = tables.frequencies[0] / tables.frequencies[0].sum()
    symbol = draw.choice(30, size=(400, 50), p=p)
    encoder = Encoder(50, 4)
    for row in symbol[::-1]:
        encoder.push(tables, np.zeros(50, np.int64), row)
    _, lengths = encoder.finish()
    assert (16 * lengths - tables.bits()[0, symbol].sum(0)).max() < 32


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 500]))
def test_sparse_rows_come_back_as_sets(seed: int, limit: int) -> None:
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 30, 25)
    ids = np.stack([draw.permutation(997)[:30] for _ in counts])
    levels = draw.integers(0, 500, ids.shape)
    rows = SparseRows(ids, levels, counts, draw.integers(0, 90, 25))
    codec = fit_sparse(rows, draw.random(997), limit=limit)
    back = codec.decode(*codec.encode(rows))
    assert (back.counts == counts).all()
    assert (back.extra == rows.extra).all()
    for row, count in enumerate(counts):
        assert dict(zip(back.ids[row, :count], back.levels[row, :count])) == dict(
            zip(ids[row, :count], levels[row, :count])
        )


# The kinds


def test_levels_round_within_their_width() -> None:
    log_p = -torch.rand(5000) * 20
    error = (log_p_of(level_of(log_p)) - log_p).abs()
    assert (error <= 0.5 * torch.clamp(0.05 * torch.exp(-log_p / 2), max=0.5) * 1.3 + 1e-4).all()


def test_topk_keeps_the_smallest_set_and_exact_masses() -> None:
    torch.manual_seed(0)
    log_p = (torch.randn(200, VOCABULARY) * 3).log_softmax(-1)
    rows = topk_rows(LogProbs.from_logits(log_p), k=50, mass=0.9, floor=0.0)
    ordered = log_p.exp().sort(descending=True).values.cumsum(-1)
    least = (ordered < 0.9).sum(-1) + 1
    assert (torch.from_numpy(rows.counts) == least.clamp_max(50)).all()
    targets = topk_targets(rows)
    listed = targets.log_probs.exp().sum(-1)
    truth = torch.stack([log_p[row, targets.ids[row, : rows.counts[row]]].exp().sum() for row in range(200)])
    # The tail's mass is rounded to a level; the listed tokens hold the rest exactly.
    tail = log_p_of(torch.from_numpy(rows.extra)).exp()
    assert torch.allclose(listed + tail, torch.ones(200), atol=1e-6)
    assert ((1 - truth).log() - tail.log()).abs().max() < 0.3
    assert (
        topk_rows(LogProbs.from_logits(log_p), k=50, mass=1.0, floor=0.01).counts
        == (log_p.exp() >= 0.01).sum(-1).numpy()
    ).all()


def test_kl_to_topk_is_that_of_the_dense_distribution() -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(40, 16), Head(torch.randn(VOCABULARY, 16))
    teacher = LogProbs.of(hidden, head)
    targets = topk_targets(topk_rows(teacher, k=12, mass=1.0, floor=1e-4))
    dense = torch.zeros(40, VOCABULARY, dtype=torch.float64)
    for row in range(40):
        used = targets.log_probs[row] > -torch.inf
        p = targets.log_probs[row, used].double().exp()
        dense[row] = (1 - p.sum()) / (VOCABULARY - used.sum())
        dense[row, targets.ids[row, used]] = p
    log_p = teacher.logits.double().log_softmax(-1)
    assert torch.allclose(
        kl_to_topk(teacher, targets).double(), (log_p.exp() * (log_p - dense.log())).sum(-1), atol=1e-4
    )


def test_samples_are_unbiased_and_sum_to_one() -> None:
    torch.manual_seed(2)
    p = (torch.randn(1, 60) * 2).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws, runs = 16, 4000
    every = sampled_targets(sampled_rows(p.expand(runs, -1), draws, torch.rand(runs, generator=generator)), draws)
    assert torch.allclose(every.weights.sum(-1), torch.ones(runs))
    dense = torch.zeros(runs, 60).scatter_add_(1, every.ids, every.weights)
    total, square = dense.mean(0), dense.var(0)
    # Six standard errors, for each of 60 tokens; and far less variance than independent draws have.
    assert ((total - p[0]).abs() <= 6 * (square / runs).sqrt() + 1e-6).all()
    assert square.sum() < 0.5 * (p[0] * (1 - p[0]) / draws).sum()


def test_hidden_rows_stay_within_the_tolerance() -> None:
    torch.manual_seed(3)
    head = Head(torch.randn(VOCABULARY, 24) * 0.6, bias=torch.randn(VOCABULARY), scale=0.7, softcap=20.0)
    states = torch.randn(1200, 24) @ torch.diag(torch.logspace(0.5, -1.5, 24)) @ torch.randn(24, 24)
    codec = fit("hidden", states[:1000], head, Wanted(20, 64, tolerance=0.003))
    assert isinstance(codec, HiddenCodec)
    encoded = encode(codec, states[1000:], head, torch.zeros(200))
    read = decode(codec, encoded.words, encoded.lengths, head)
    assert isinstance(read, HiddenTargets)
    kl = kl_to_hidden(LogProbs.of(states[1000:], head), torch.arange(200), read.hidden, head)
    assert kl.max() <= 0.003 * 1.01
    assert kl.mean() > 0.0005
    assert torch.allclose(kl, encoded.kl, atol=1e-6)
    p, q = (
        ((torch.tanh(0.7 * (h @ head.weight.T + head.bias) / 20) * 20).double().log_softmax(-1))
        for h in (states[1000:], read.hidden)
    )
    assert torch.allclose(kl.double(), (p.exp() * (p - q)).sum(-1), atol=1e-5)


def test_hidden_states_far_from_the_sample_come_back() -> None:
    torch.manual_seed(4)
    head = Head(torch.randn(VOCABULARY, 16))
    codec = fit("hidden", torch.randn(800, 16) * 0.01, head, Wanted(20, 64, tolerance=0.01))
    far = torch.randn(50, 16) * 3
    encoded = encode(codec, far, head, torch.zeros(50))
    assert encoded.kl.max() <= 0.0101
    read = decode(codec, encoded.words, encoded.lengths, head)
    assert torch.allclose(
        kl_to_hidden(LogProbs.of(far, head), torch.arange(50), read.hidden, head), encoded.kl, atol=1e-5
    )


def test_more_bytes_are_nearer(teacher: LanguageModel, sequences: list[Sequence]) -> None:
    states, head = exact(teacher, sequences), teacher.head.__class__(teacher.head.weight.detach())
    for kind in KINDS:
        small, large = (measure(fit(kind, states, head, Wanted(size, 128)), states, head) for size in (12, 36))
        assert small.bytes < 1.3 * 12
        assert large.bytes < 1.3 * 36
        assert large.kl < small.kl


def test_the_choice_is_the_nearest_and_says_why(teacher: LanguageModel, sequences: list[Sequence]) -> None:
    states, head = exact(teacher, sequences), Head(teacher.head.weight.detach())
    codec, sentence = choose(states, head, Wanted(40, 64))
    assert isinstance(codec, HiddenCodec)
    assert sentence.startswith("Chosen: hidden")
    assert "top_k" in sentence
    # Two hundred directions that all matter do not fit in ten bytes, a few likely tokens do.
    wide = Head(torch.randn(VOCABULARY, 200) * 0.25)
    assert not isinstance(choose(torch.randn(900, 200), wide, Wanted(10, 64))[0], HiddenCodec)


# On disk


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gets_its_rows_in_order(
    kind: str, teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path
) -> None:
    cache = kept(teacher, sequences, tmp_path / "c", plan_of(kind))
    assert len(cache) == 60
    assert cache.summary()["tokens"] == sum(sum(one.response) for one in sequences)
    some = [sequences[place] for place in (7, 3, 41, 3)]
    batch = collate(some, 1)
    targets = CachedTeacher(cache)(batch)
    alone = [cache.targets([one]) for one in some]
    states, head = exact(teacher, some), Head(teacher.head.weight.detach())
    rows = int(batch.predicts.sum())
    if isinstance(targets, HiddenTargets):
        assert targets.hidden.shape == (rows, 32)
        assert torch.allclose(targets.hidden, torch.cat([one.hidden for one in alone]), atol=1e-5)
        kl = kl_to_hidden(LogProbs.of(states, head), torch.arange(rows), targets.hidden, targets.head)
        assert kl.max() <= cache.header.parameters["tolerance"] * 1.05
    else:
        assert isinstance(targets, TopKTargets | SampledTargets)
        assert len(targets.ids) == rows
        assert torch.equal(targets.ids[:, 0], torch.cat([one.ids[:, 0] for one in alone]))
        assert (targets.ids[:, 0] == (states @ head.weight.T).argmax(-1)).float().mean() > 0.8


def test_keys_are_contents_not_places(teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path) -> None:
    one = kept(teacher, sequences, tmp_path / "a", plan_of("top_k", floor=0.01))
    shuffled = random.Random(1).sample(sequences, 60)
    other = kept(teacher, [*shuffled, *sequences[:5]], tmp_path / "b", plan_of("top_k", floor=0.01))
    assert len(other) == 60
    for sequence in sequences[::7]:
        assert one.targets([sequence]).ids.shape[0] == other.targets([sequence]).ids.shape[0]
    changed = Sequence(sequences[0].ids, (True, *sequences[0].response[1:]))
    with pytest.raises(UserError, match="1 of 2 sequences are not in the cache.*preceptor cache"):
        one.targets([sequences[1], changed])


def test_new_data_is_appended_and_old_is_left(teacher: LanguageModel, tmp_path: Path) -> None:
    old, new = make_sequences(30), make_sequences(20, seed=1)
    kept(teacher, old, tmp_path / "c", plan_of("hidden"))
    before = contents(tmp_path / "c")
    cache = kept(teacher, [*new, *old], tmp_path / "c", plan_of("auto", budget=400))
    after = contents(tmp_path / "c")
    assert len(cache) == 50
    assert cache.missing([*old, *new]) == 0
    for name, data in before.items():
        assert after[name].startswith(data)
    assert kept(teacher, old, tmp_path / "c", plan_of("hidden"))
    assert contents(tmp_path / "c") == after


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from preceptor.cache import store
from test_cache import kept, make_sequences, make_teacher, plan_of

opened, synced = Path.open, os.fsync

def capture(folder, left):
    def tick(before=lambda: None):
        nonlocal left
        left -= 1
        if left == 0:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    class Torn:
        # Half of what is written reaches the file before the kill.
        def __init__(self, file):
            self.file = file
        def write(self, data):
            tick(lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
            return self.file.write(data)
        def __getattr__(self, name):
            return getattr(self.file, name)

    def tearing(self, mode="r", **options):
        return Torn(opened(self, mode, **options)) if mode in ("ab", "ab+") else opened(self, mode, **options)

    store.Path.open = tearing
    store.os.fsync = lambda number: (tick(), synced(number))
    kept(make_teacher(), make_sequences(60), Path(folder), plan_of("hidden"))

for one in sys.argv[1:]:
    folder, _, after = one.rpartition(":")
    child = os.fork()
    if not child:
        capture(folder, int(after))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork need a POSIX system")
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    script = tmp_path / "capture.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}

    def run(*moments: tuple[str, int]) -> list[int]:
        arguments = [f"{tmp_path / folder}:{after}" for folder, after in moments]
        command = [sys.executable, str(script), *arguments]
        told = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
        return [int(line) for line in told.stdout.split()]

    # Each writes on from where the one before was killed: inside a shard, inside the index, or between them.
    moments = [("killed", after) for after in random.Random(5).sample(range(2, 9), 5)]
    assert run(("whole", 10**6), *moments) == [0, *[-signal.SIGKILL] * 5]
    entries, _ = read_index(tmp_path / "killed")
    assert 0 < len(entries) < 60
    assert len({bytes(key) for key in entries["key"]}) == len(entries)
    assert run(("killed", 10**6)) == [0]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(Cache.open(tmp_path / "killed")) == 60


def test_a_torn_tail_is_cut_and_read_past(teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path) -> None:
    kept(teacher, sequences, tmp_path / "c", plan_of("top_k"))
    wanted = contents(tmp_path / "c")
    index = tmp_path / "c/index.bin"
    last = max(int(path.stem[-5:]) for path in (tmp_path / "c").glob("shard-*.bin"))
    assert last >= 1
    index.write_bytes(wanted["index.bin"][:-9])
    shard_path(tmp_path / "c", last).open("ab").write(b"unfinished")
    (tmp_path / "c" / f"shard-{last + 1:05d}.bin").write_bytes(b"never finished")
    part = Cache.open(tmp_path / "c")
    assert 0 < len(part) < 60
    assert part.missing(sequences) == 60 - len(part)
    kept(teacher, sequences, tmp_path / "c", plan_of("top_k"))
    assert contents(tmp_path / "c") == wanted


def test_damage_is_found(teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path) -> None:
    cache = kept(teacher, sequences, tmp_path / "c", plan_of("hidden"))
    cache.targets(sequences)
    shard = shard_path(tmp_path / "c", 0)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        Cache.open(tmp_path / "c").targets(sequences)
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        Cache.open(tmp_path / "c").targets(sequences)


def test_a_full_disk_keeps_what_was_finished(
    teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [3]
    whole = os.fsync

    def fsync(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(number)

    # Three syncs: the header, and one batch's shard and index.
    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(UserError, match="no room left.*goes on from the last finished batch"):
        kept(teacher, sequences, tmp_path / "c", plan_of("hidden"))
    monkeypatch.undo()
    assert 0 < len(Cache.open(tmp_path / "c")) < 60
    kept(teacher, sequences, tmp_path / "c", plan_of("hidden"))
    kept(teacher, sequences, tmp_path / "whole", plan_of("hidden"))
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_two_writers_are_refused(teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path) -> None:
    from preceptor.cache.store import Appender

    kept(teacher, sequences[:10], tmp_path / "c", plan_of("hidden"))
    with Appender(tmp_path / "c", 1 << 20), pytest.raises(UserError, match="Another process"):
        kept(teacher, sequences, tmp_path / "c", plan_of("hidden"))


# At the door


def test_another_teacher_tokenizer_or_template_is_refused(
    teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    kept(teacher, sequences, folder, plan_of("hidden"))
    before = contents(folder)
    assert Cache.open(folder, tokenizer=teacher.tokenizer, teacher=teacher)
    with pytest.raises(UserError, match="another teacher"):
        kept(make_teacher(seed=1), sequences, folder, plan_of("hidden"))
    with pytest.raises(UserError, match="another tokenizer"):
        Cache.open(folder, tokenizer=make_teacher(vocabulary=VOCABULARY + 1).tokenizer)
    with pytest.raises(UserError, match="another chat template"):
        Cache.open(folder, tokenizer=make_teacher(template="{{ messages[0] }}").tokenizer)
    with pytest.raises(UserError, match="max_length"):
        capture(teacher, sequences, folder, name="tiny", max_length=32, plan=plan_of("hidden"))
    assert contents(folder) == before


def test_bad_input_is_one_sentence(teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no cache"):
        Cache.open(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/letter.txt").write_text("mine")
    with pytest.raises(UserError, match=r"something else than a cache \(letter.txt\)"):
        kept(teacher, sequences, tmp_path / "taken", plan_of("hidden"))
    with pytest.raises(UserError, match="nothing|no sequence"):
        kept(teacher, [], tmp_path / "c", plan_of("hidden"))
    with pytest.raises(UserError, match="no response token"):
        kept(teacher, [Sequence((1, 2), (True, False))], tmp_path / "c", plan_of("hidden"))
    for wanted in ({"mass": 1.5}, {"floor": 0.0}, {"draws": 1}, {"tolerance": 0.0}):
        with pytest.raises(UserError):
            Wanted(40, 64, **wanted)
    for budget, k in ((1, 64), (40, 0)):
        with pytest.raises(UserError):
            Wanted(budget, k)
    assert not (tmp_path / "c").exists()
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["letter.txt"]
    kept(teacher, sequences[:5], tmp_path / "c", plan_of("hidden"))
    header = json.loads((tmp_path / "c/header.json").read_text())
    (tmp_path / "c/header.json").write_text(json.dumps({**header, "version": 99}))
    with pytest.raises(UserError, match="cache format 1"):
        Cache.open(tmp_path / "c")


def test_the_command_captures_and_says_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: LanguageModel
) -> None:
    folder = tmp_path / "teacher"
    teacher.model.save_pretrained(folder)
    teacher.tokenizer.chat_template = None
    teacher.tokenizer.save_pretrained(folder)
    teacher.tokenizer.chat_template = "{{ messages }}"
    lines = [{"text": " ".join(f"w{word}" for word in one.ids)} for one in make_sequences(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    config = Config(
        data=str(tmp_path / "text.jsonl"), output=str(tmp_path / "c"), teacher=str(folder), budget=30, max_length=48,
        sample=500, k=64,
    )  # fmt: skip
    assert main(config) == 0
    said = capsys.readouterr()
    assert "Chosen: " in said.err
    assert "bytes a token" in said.out
    assert "30 sequences" in said.out
    assert Cache.open(tmp_path / "c").header.chosen.startswith("Chosen: ")
    assert main(config) == 0


# DistillKit


def distillkit_bytes(log_p: np.ndarray, form: dict[str, object]) -> bytes:
    """One row of DistillKit's compressed log-probabilities, written from the format's description."""
    values = log_p.astype(np.float32)
    if form["delta_encoding"]:
        values = np.concatenate([values[:1], np.diff(values)])
    out = b""
    exact = int(form["exact_k"])
    out += values[:exact].astype("<f2" if form["exact_dtype"] == "float16" else "<f4").tobytes()
    rest, fitted = values[exact:], np.zeros(len(values) - exact, np.float32)
    if form["polynomial_terms"]:
        t = np.arange(len(rest), dtype=np.float32)
        shapes = np.stack([np.sqrt(t) if term == "sqrt" else t ** int(term) for term in form["polynomial_terms"]], 1)
        weights = np.linalg.lstsq(shapes.astype(np.float64), rest.astype(np.float64), rcond=None)[0].astype("<f4")
        out += weights.tobytes()
        fitted = (shapes * weights).sum(1)
    start, left = 0, rest - fitted
    for one in form["residual_bins"]:
        count, bits = one["num_elements"], one["element_bits"]
        part = left[start : start + count]
        scale = np.float32(np.abs(part).max() / 2 ** (bits - 1))
        whole = np.clip(np.round(part / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(int) + 2 ** (bits - 1)
        text = "".join(format(value, f"0{bits}b") for value in whole)
        text += "0" * (-len(text) % 8)
        out += scale.tobytes() + int(text, 2).to_bytes(len(text) // 8, "big")
        start += count
    return out


FORMS = (
    {"k": 10, "exact_k": 10, "exact_dtype": "float32", "polynomial_terms": None, "residual_bins": [],
     "delta_encoding": False},
    {"k": 24, "exact_k": 4, "exact_dtype": "float16", "polynomial_terms": [0, 1, 2, "sqrt"], "residual_bins": [],
     "delta_encoding": False},
    {
        "k": 24, "exact_k": 2, "exact_dtype": "float32", "polynomial_terms": [0, 1], "delta_encoding": True,
        "residual_bins": [
            {"scale_dtype": "float32", "element_bits": 6, "num_elements": 10},
            {"scale_dtype": "float32", "element_bits": 3, "num_elements": 7},
        ],
    },
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_distillkit_captures_are_imported(
    form: dict[str, object], teacher: LanguageModel, sequences: list[Sequence], tmp_path: Path
) -> None:
    import pyarrow as pa
    import yaml
    from pyarrow import parquet

    from preceptor.cache.distillkit import Format, import_distillkit

    full = {"d": VOCABULARY, "term_dtype": "float32", "error_diffusion": False, "normalize_t": False, **form}
    rows: dict[str, list[object]] = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    truth = {}
    for one in sequences[:20]:
        with torch.no_grad():
            hidden = teacher(collate([Sequence((*one.ids, 1), (*one.response, False))], 1))[0]
        values, ids = (hidden @ teacher.head.weight.detach().T).log_softmax(-1).topk(int(form["k"]))
        truth[one.ids] = (values, ids)
        rows["input_ids"].append([*one.ids, 1])
        rows["compressed_logprobs"].append([list(distillkit_bytes(row.numpy(), full)) for row in values[:-1]])
        bits = ["".join(format(index, "08b") for index in row) for row in ids[:-1].tolist()]
        rows["bytepacked_indices"].append([list(int(row, 2).to_bytes(len(row) // 8, "big")) for row in bits])
    kind = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema(
        [("input_ids", pa.list_(pa.uint64())), ("compressed_logprobs", kind), ("bytepacked_indices", kind)]
    )
    source = tmp_path / "captured"
    source.mkdir()
    parquet.write_table(pa.table(rows, schema=schema), source / "data_0.parquet")
    (source / "compression_config.yaml").write_text(yaml.safe_dump(full), encoding="utf-8")
    cache = import_distillkit(
        source, tmp_path / "c", tokenizer=teacher.tokenizer, teacher="tiny", max_length=64, sequences=sequences
    )
    assert len(cache) == 20
    assert cache.header.kind == "top_k"
    assert cache.summary()["kl"] < 0.02
    exactly = form["exact_k"] == form["k"]
    for one in sequences[:20:3]:
        targets = cache.targets([one])
        start = len(one.ids) - int(sum(one.response)) - 1
        values, ids = (part[start : len(one.ids) - 1] for part in truth[one.ids])
        assert torch.equal(targets.ids.sort(-1).values, ids.sort(-1).values)
        found = torch.zeros(len(ids), VOCABULARY).scatter(1, targets.ids, targets.log_probs.exp())
        wanted = torch.zeros(len(ids), VOCABULARY).scatter(1, ids, values.exp())
        assert (found - wanted).abs().max() < (0.03 if exactly else 0.2)
    form_read = Format.read(source / "compression_config.yaml")
    decoded = form_read.targets(
        torch.tensor(rows["compressed_logprobs"][0], dtype=torch.uint8),
        torch.tensor(rows["bytepacked_indices"][0], dtype=torch.uint8),
    )
    values, ids = (part[:-1] for part in truth[sequences[0].ids])
    assert torch.equal(decoded.ids, ids)
    assert (decoded.log_probs - values).abs().max() < (1e-5 if exactly else 1.0)
    with pytest.raises(UserError, match="holds a cache already"):
        import_distillkit(source, tmp_path / "c", tokenizer=teacher.tokenizer, teacher="tiny", max_length=64)
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(UserError, match="None of the sequences"):
        import_distillkit(
            source, tmp_path / "c", tokenizer=teacher.tokenizer, teacher="t", max_length=64, sequences=sequences[30:]
        )
    (source / "compression_config.yaml").unlink()
    with pytest.raises(UserError, match="compression_config.yaml"):
        import_distillkit(source, tmp_path / "c", tokenizer=teacher.tokenizer, teacher="tiny", max_length=64)
