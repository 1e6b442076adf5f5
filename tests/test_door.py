"""Every mismatch that a user can make: one sentence, exit status 2, and what was there is left untouched."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preceptor import cli
from preceptor.engine import checkpoint
from tests.small_llama import small_llama

QUICK = ["--training.steps", "2", "--training.batch-size", "2", "--text.held-out", "2", "--student", "teacher:layers=1"]


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer) -> str:
    """A folder with a small causal model that speaks SmolLM2's tokens."""
    folder = tmp_path_factory.mktemp("small")
    small_llama(0, vocab_size=49152, tie_word_embeddings=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    rows = [
        {"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("yes", "no", "moon", "sun", "rain", "tea")
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gkd(small, data, output, *more):
    return ["run", "gkd", *QUICK, "--teacher", small, "--text.source", data, "--output", str(output), *more]


def refused(capsys, words, says) -> str:
    """The command ends with 2 and one sentence that says it; no traceback."""
    capsys.readouterr()
    status = cli.main(words)
    printed = capsys.readouterr().err.strip()
    assert status == 2, printed
    assert "Traceback" not in printed
    (told,) = [line for line in printed.splitlines() if line.startswith("preceptor: ")]
    assert printed.endswith(told), printed
    assert re.search(says, told), told
    return told


def test_the_quick_settings_work(capsys, small, data, tmp_path):
    assert cli.main(gkd(small, data, tmp_path / "run")) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_another_tokenizer(capsys, small, data, tmp_path):
    words = {f"word{n}": n for n in range(60)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    other = tmp_path / "other"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0", eos_token="word2").save_pretrained(other)
    small_llama(0, vocab_size=64, tie_word_embeddings=False).save_pretrained(other)
    told = refused(capsys, gkd(small, data, tmp_path / "run", "--student", str(other)), r"tokenizers differ.*id 0")
    assert "choose a student" in told
    assert not (tmp_path / "run").exists()


def test_a_padded_vocabulary_is_sliced_with_a_word(small, data, tmp_path, tokenizer):
    padded = tmp_path / "padded"
    small_llama(0, vocab_size=49200, tie_word_embeddings=False).save_pretrained(padded)
    tokenizer.save_pretrained(padded)
    with pytest.warns(UserWarning, match="sliced to the 49152 ids"):
        assert cli.main(gkd(small, data, tmp_path / "run", "--student", str(padded))) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--objective.temperature", "0"], "temperature above 0"),
        (["--objective.beta", "2"], r"beta is 2\.0.*\[0, 1\]"),
        (["--own.share", "-0.5"], r"probability in \[0, 1\]"),
        (["--training.steps", "0"], "steps is 0"),
        (["--student", "teacher:layers=9"], "the teacher has 2"),
        (["--student", "teacher:depth=9"], "is not a student"),
        (["--teacher", "./nowhere"], "does not exist"),
        (["--cache", "nowhere"], "nowhere"),
    ],
)
def test_settings_out_of_range(capsys, small, data, tmp_path, flags, says):
    refused(capsys, gkd(small, data, tmp_path / "run", *flags), says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c", \n', "line 2"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n', "no response.*--text.answers missing"),
        ('{"question": 1}\n[]\n', "record|line"),
    ],
)
def test_data_that_cannot_be_read(capsys, small, tmp_path, text, says):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    refused(capsys, gkd(small, str(path), tmp_path / "run"), says)
    assert path.read_text() == text


def test_nothing_left_after_truncation(capsys, small, data, tmp_path):
    words = gkd(small, data, tmp_path / "run", "--text.max-length", "4")
    refused(capsys, words, "mask is empty after truncation to 4 tokens")


def test_the_folder_of_another_run(capsys, small, data, tmp_path):
    run = tmp_path / "run"
    assert cli.main(gkd(small, data, run)) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(capsys, gkd(small, data, run), "holds a run already.*--resume")
    refused(
        capsys, gkd(small, data, run, "--resume", "--objective.beta", "0.1"), "objective.beta is 0.5 there and 0.1 here"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_full_disk_while_saving(capsys, small, data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = gkd(small, data, run, "--training.steps", "4", "--training.save-every", "2")
    real, times = checkpoint.write, []

    def second_is_full(*args, **kwargs):
        times.append(args[1])
        if len(times) == 2:
            monkeypatch.setattr(os, "fsync", full)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", second_is_full)
    refused(capsys, words, "(?i)disk|space|room")
    assert calls
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(checkpoint, "write", real)
    kept = checkpoint.newest(run / "checkpoints")
    assert kept is not None
    assert checkpoint.read_header(kept)["step"] == 2
    assert cli.main([*words, "--resume"]) == 0


def test_no_permission(capsys, small, data, tmp_path, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    refused(capsys, gkd(small, data, tmp_path / "run"), "(?i)cannot.*writ|permission")


def test_a_pickle_offered_as_weights(capsys, small, data, tmp_path):
    folder = tmp_path / "pickled"
    model = small_llama(0, vocab_size=49152, tie_word_embeddings=False)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    told = refused(capsys, gkd(str(folder), data, tmp_path / "run"), "pickle")
    assert "safetensors" in told
    refused(capsys, gkd(small, data, tmp_path / "run", "--student", str(folder / "pytorch_model.bin")), "single file")


def test_an_unknown_recipe_names_the_nearest(capsys):
    refused(capsys, ["run", "gkdd"], "did you mean 'gkd'")
    refused(capsys, ["reproduce", "minilmm"], "did you mean 'minilm'")


def test_a_missing_extra_names_the_line_that_installs_it():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from preceptor import cli; sys.exit(cli.main(['run', 'gkd', '--tiny']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert 'pip install "preceptor[text]"' in done.stderr
    assert "Traceback" not in done.stderr
