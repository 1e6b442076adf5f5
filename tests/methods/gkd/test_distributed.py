"""The same recipe under ``accelerate launch``: copied (DDP) and sharded (FSDP2) students, on two CPU processes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.small_llama import small_llama


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models")
    small_llama(0, 3).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    data = folder / "data.jsonl"
    rows = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(1, n + 1)))} for n in range(1, 14)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--teacher {folder / 'teacher'} --student teacher:layers=2 --text.source {data} --text.held-out 3 "
    words += "--teacher-dtype float32 --training.steps 4 --training.batch-size 5 --training.precision fp32 "
    return (words + "--text.answer-length 4").split()


def run(output, settings, processes, *more):
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
    launch += ["--multi_gpu"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={_port()}"]
    words = ["-m", "preceptor", "run", "gkd", *settings, "--output", str(output), *more]
    launch = launch if processes > 1 else [sys.executable]
    done = subprocess.run(launch + words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "rror" in line or "preceptor:" in line]
    return load_file(output / "student" / "model.safetensors")


def _port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_copied_or_sharded_equal_one(tmp_path, settings):
    alone = run(tmp_path / "one", settings, 1)
    for name, flags in (("copied", ()), ("sharded", ("--training.shard", "--labels-arm"))):
        both = run(tmp_path / name, settings, 2, *flags)
        assert both.keys() == alone.keys()
        for key, value in alone.items():
            assert torch.allclose(both[key], value, atol=1e-6), (name, key)


@pytest.mark.slow
def test_a_sharded_student_learns_on_its_own_samples(tmp_path, settings):
    run(tmp_path / "run", settings, 2, "--training.shard", "--own.share", "0.5")
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
