"""The teacher's cache on disk: nothing lost, doubled or mistaken, and every misuse named."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preceptor.cache import Cache, Wanted, capture
from preceptor.cache.decoding_error import LogProbs, kl_to_hidden
from preceptor.cache.store import read_index, shard_path
from preceptor.commands.cache import Config, main
from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.teachers import CachedTeacher
from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, SampledTargets, TopKTargets
from preceptor.models.language_model import LanguageModel
from tests.cache_models import KINDS, VOCABULARY, contents, exact, kept, make_sequences, make_teacher, plan_of


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


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork need a POSIX system")
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    script = tmp_path / "capture.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

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
