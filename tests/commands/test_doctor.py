import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from preceptor.commands import doctor
from preceptor.errors import UserError
from preceptor.models.memory import memory_needed

WIDTH, LAYERS, VOCABULARY, BATCH, LENGTH = 256, 4, 8000, 8, 256


@pytest.fixture
def teacher() -> str:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained("teacher")
    return "teacher"


def parameters(layers: int) -> int:
    attention = WIDTH * (WIDTH + 2 * WIDTH // 2 + WIDTH)
    return VOCABULARY * WIDTH + WIDTH + layers * (attention + 3 * 3 * WIDTH * WIDTH + 2 * WIDTH)


def test_parameters_are_counted_from_the_configuration_alone(teacher: str) -> None:
    need = memory_needed(teacher, "teacher:layers=2", batch=4, length=64, teacher_dtype="bfloat16", optimizer="sgd")
    assert (need.teacher, need.student, need.learning) == (parameters(LAYERS), parameters(2), parameters(2))
    assert need.parts["student"] == need.parts["gradients"] == need.parts["optimizer"] == 4 * parameters(2)
    assert need.parts["teacher"] == 2 * parameters(LAYERS)
    assert need.total == sum(need.parts.values())


def test_activations_are_a_line_in_the_batch(teacher: str) -> None:
    kept = [
        memory_needed(teacher, "teacher:layers=0,3", batch=batch, length=32).parts["activations"] for batch in (1, 2, 5)
    ]
    assert kept[2] - kept[0] == 4 * (kept[1] - kept[0])
    assert kept[1] > 1.9 * kept[0] > 0


def test_lora_learns_its_low_rank_terms_only(teacher: str) -> None:
    need = memory_needed(teacher, "lora:rank=2", batch=1, length=16)
    widths = [(WIDTH, WIDTH), (WIDTH, WIDTH // 2), (WIDTH, WIDTH // 2), (WIDTH, WIDTH)] + 3 * [(WIDTH, 3 * WIDTH)]
    assert need.learning == LAYERS * sum(2 * (inner + outer) for inner, outer in widths)
    assert need.parts["teacher"] == 0, "the base teaches with its adapter off"


STEP = """
import json, pathlib, re, resource, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from preceptor.knowledge import Head, HiddenTargets
from preceptor.losses.divergences import divergence
from preceptor.models.memory import resident
torch.set_num_threads(1)
batch, length = int(sys.argv[1]), int(sys.argv[2])
before = resident()
config = AutoConfig.from_pretrained("teacher")
teacher, student = (AutoModelForCausalLM.from_config(config, dtype=torch.float32) for _ in range(2))
teacher.requires_grad_(False)
optimizer = torch.optim.AdamW(student.parameters())
ids = torch.randint(0, config.vocab_size, (batch, length))
for _ in range(2):
    optimizer.zero_grad()
    with torch.no_grad():
        targets = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hidden = student.base_model(input_ids=ids, use_cache=False).last_hidden_state
    loss = divergence(hidden, Head(student.lm_head.weight), HiddenTargets(targets, Head(teacher.lm_head.weight)))
    loss.sum.backward()
    optimizer.step()
status = pathlib.Path("/proc/self/status")
if status.exists():  # ru_maxrss holds what the process was before exec too: the size of the whole test run
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"before": before, "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource is not there")
def test_the_estimate_is_near_what_a_training_takes(teacher: str, root: Path) -> None:
    """Two real steps in a process of their own, against the estimate without the process's own share."""
    words = [sys.executable, "-c", STEP, str(BATCH), str(LENGTH)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=_with_path(root))
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    need = memory_needed(teacher, f"teacher:layers={LAYERS}", batch=BATCH, length=LENGTH)
    estimated = need.total - need.parts["process"]
    assert 0.6 < estimated / (measured["peak"] - measured["before"]) < 1.6


def _with_path(root: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(root)}


def test_the_doctor_says_whether_it_fits(
    teacher: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: (8 * doctor.GIB, 16 * doctor.GIB))
    small = doctor.Config(teacher=teacher, student="teacher:layers=2", batch=2, length=32)
    assert doctor.main(small) == 0
    assert "It fits" in capsys.readouterr().out
    assert doctor.main(doctor.Config(teacher=teacher, student="teacher:layers=2", batch=4096, length=512)) == 1
    assert "It does not fit" in capsys.readouterr().out


def test_the_doctor_shows_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(doctor.Config()) == 0
    shown = capsys.readouterr().out
    for expected in (torch.__version__, "cores", "free of", "SmolLM2-135M-Instruct", "text"):
        assert expected in shown


@pytest.mark.parametrize(
    ("student", "sentence"),
    [
        ("teacher:depth=2", "is not a student"),
        ("lora:rank=0", "rank is 0"),
        ("fresh:layers=two", "must be a whole number"),
        ("./absent", "No configuration of './absent'"),
    ],
)
def test_students_that_do_not_exist_are_refused(teacher: str, student: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        memory_needed(teacher, student, batch=1, length=8)


def test_an_empty_batch_is_refused(teacher: str) -> None:
    with pytest.raises(UserError, match="at least 1"):
        memory_needed(teacher, "teacher:layers=1", batch=0, length=8)
