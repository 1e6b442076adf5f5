"""The engine in one process: division, order, schedule, metrics, guard, settings, folders."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import weakref
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from preceptor.catalogue import find_methods
from preceptor.engine.run import NonFiniteLoss, Run
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.files import write_whole


@dataclasses.dataclass(frozen=True)
class Settings:
    """A recipe's config, as small as one can be."""

    training: Training
    output: str = "somewhere"
    resume: bool = False
    temperature: float = 1.0


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def material(count: int = 40, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 5, generator=generator, dtype=dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def ragged_loss(student: nn.Module, x: Tensor, y: Tensor, rows: list[int]) -> tuple[Tensor, int]:
    """A sum over a number of terms that differs from row to row, as tokens do."""
    repeats = torch.tensor([row % 4 + 1 for row in rows])
    losses = nn.functional.cross_entropy(student(x[rows]), y[rows], reduction="none")
    return (losses * repeats).sum(), int(repeats.sum())


def train(folder: Path, training: Training, count: int = 40) -> nn.Sequential:
    student = network()
    x, y = material(count)
    run = Run(training, student=student, folder=folder)
    for rows in run.batches(range(count), list):
        run.update(*ragged_loss(run.student, x, y, rows))
    run.finish()
    return student


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_ragged_accumulation_equals_one_batch(tmp_path: Path, accumulate: int, optimizer: str) -> None:
    settings = Training(epochs=3, batch_size=11, optimizer=optimizer, learning_rate=0.05, weight_decay=0.1)
    whole = train(tmp_path / "whole", settings)
    parts = train(tmp_path / "parts", dataclasses.replace(settings, accumulate=accumulate))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert one["count"] == other["count"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-12)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], abs=1e-12)


@pytest.mark.skipif(os.name != "posix", reason="permissions of files are those of a POSIX system")
def test_a_whole_file_has_the_permissions_of_any_other(tmp_path):
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "a.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_a_step_is_what_plain_torch_does(tmp_path: Path) -> None:
    x, y = material()
    plain = network()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    run = Run(
        Training(steps=6, batch_size=16, learning_rate=0.1, schedule="constant", clip=0.05),
        student=network(),
        folder=tmp_path,
    )
    for rows in run.batches(range(40), list):
        loss, count = ragged_loss(run.student, x, y, rows)
        run.update(loss, count)
        optimizer.zero_grad()
        loss, count = ragged_loss(plain, x, y, rows)
        (loss / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
        assert run.step == 1 or norm > 0.05
    for one, other in zip(run.unwrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_order_is_a_permutation_each_pass_and_follows_the_seed(tmp_path: Path) -> None:
    def order(folder: str, seed: int) -> list[int]:
        x, y = material()
        run = Run(Training(epochs=2, batch_size=16, seed=seed), student=network(), folder=tmp_path / folder)
        seen: list[int] = []
        for rows in run.batches(range(40), list):
            seen += rows
            run.update(*ragged_loss(run.student, x, y, rows))
        assert run.step == run.total == 6
        return seen

    first = order("a", 0)
    assert sorted(first[:40]) == sorted(first[40:]) == list(range(40))
    assert first[:40] != first[40:]
    assert first == order("b", 0)
    assert first[40:] != order("c", 1)[:40], "the second pass of one seed is not the first of the next"


def test_rounds_over_data_written_anew(tmp_path: Path) -> None:
    x, y = material()
    run = Run(Training(steps=5, batch_size=4), student=network(), folder=tmp_path)
    seen = []
    for written, until in ((range(0, 8), 2), (range(20, 28), 5)):
        for rows in run.steps(written, until=until):
            seen.append(set(rows) <= set(written))
            for part in run.split(rows, list):
                run.update(*ragged_loss(run.student, x, y, part))
    run.finish()
    assert seen == [True] * 5
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_schedules() -> None:
    cosine = Training(steps=100, learning_rate=2.0, warmup=0.1)
    rates = [cosine.rate(step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(1.0)
    assert cosine.rate(100, 100) == pytest.approx(0.0)
    linear = Training(steps=10, learning_rate=1.0, schedule="linear", warmup=2)
    assert [linear.rate(step, 10) for step in (0, 1, 2, 6)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])
    assert Training(steps=9, schedule="constant").rate(8, 9) == Training().learning_rate


def test_metrics_have_a_line_a_step_with_parts_and_evaluations(tmp_path: Path) -> None:
    x, y = material()
    training = Training(steps=5, batch_size=10, accumulate=2, evaluate_every=2)
    run = Run(training, student=network(), folder=tmp_path)
    evaluated = []
    run.log(untaught=3.0)
    for rows in run.batches(range(40), list):
        loss, count = ragged_loss(run.student, x, y, rows)
        run.update(loss, count, {"twice": 2 * loss.detach(), "rows": len(rows)})
        if run.evaluate_due:
            evaluated.append(run.step)
            run.log(held_out=float("nan"))
    run.finish()
    before, *written = lines(tmp_path)
    assert before == {"step": 0, "untaught": 3.0}
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5]
    assert evaluated == [2, 4, 5] == [line["step"] for line in written if "held_out" in line]
    for line in written:
        assert line["twice"] == pytest.approx(2 * line["loss"])
        assert line["rows"] == pytest.approx(10 / line["count"])
        assert line["learning_rate"] > 0
        assert line["items_per_second"] > 0
        assert line["memory_mib"] > 0
    assert written[1]["held_out"] is None


def test_a_discriminator_has_its_own_optimizer(tmp_path: Path) -> None:
    """Alternating updates equal two plain optimizers, and the student's loss leaves nothing in the discriminator."""
    x, _ = material()

    def losses(student: nn.Module, judge: nn.Module, rows: list[int]) -> tuple[Tensor, Tensor]:
        made = student(x[rows])
        fooled = nn.functional.softplus(-judge(made)).sum()
        judged = nn.functional.softplus(judge(made.detach())).sum() + nn.functional.softplus(-judge(x[rows, :3])).sum()
        return fooled, judged

    torch.manual_seed(5)
    judges = [nn.Linear(3, 1).double() for _ in range(2)]
    judges[1].load_state_dict(judges[0].state_dict())
    students = [network(), network()]
    training = Training(steps=8, batch_size=10, accumulate=2, schedule="constant", clip=None)
    own = Training(optimizer="sgd", momentum=0.0, learning_rate=0.3, schedule="constant", clip=None)
    run = Run(
        training,
        student=students[0],
        folder=tmp_path,
        modules={"discriminator": judges[0]},
        module_training={"discriminator": own},
    )
    adamw = torch.optim.AdamW(students[1].parameters(), lr=1e-3, weight_decay=0.0)
    sgd = torch.optim.SGD(judges[1].parameters(), lr=0.3)
    for rows in run.steps(range(40)):
        for part in run.split(rows, list):
            fooled, judged = losses(run.student, run.modules["discriminator"], part)
            run.update(fooled, len(part))
            run.update(judged, 2 * len(part), module="discriminator")
        fooled, judged = losses(students[1], judges[1], rows)
        student_gradient = torch.autograd.grad(fooled / 10, list(students[1].parameters()))
        judge_gradient = torch.autograd.grad(judged / 20, list(judges[1].parameters()))
        for module, gradients in ((students[1], student_gradient), (judges[1], judge_gradient)):
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.grad = gradient
        adamw.step()
        sgd.step()
    run.finish()
    for mine, plain in zip([*students[0].parameters(), *judges[0].parameters()],
                           [*students[1].parameters(), *judges[1].parameters()], strict=True):  # fmt: skip
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-9)
    written = lines(tmp_path)
    assert len(written) == 8
    assert all({"loss", "discriminator_loss", "discriminator_gradient_norm"} <= line.keys() for line in written)


def test_bf16_runs_the_forward_under_autocast(tmp_path: Path) -> None:
    seen = []

    class Look(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            seen.append(out.dtype)
            return out

    x, _ = material(dtype=torch.float32)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        run = Run(Training(steps=2, precision=precision), student=Look(5, 1), folder=tmp_path / precision)
        for rows in run.batches(range(40), list):
            out = run.student(x[rows])
            assert out.dtype == torch.float32
            run.update(out.square().sum(), len(rows))
        run.finish()
        assert seen[-1] == dtype
        assert all(p.dtype == torch.float32 for p in run.unwrapped.parameters())


def test_a_finished_student_answers_in_its_own_precision_and_may_learn_again(tmp_path: Path) -> None:
    x, _ = material(dtype=torch.float32)
    student = network(dtype=torch.float32)
    for name in ("first", "second"):
        run = Run(Training(steps=2, precision="bf16"), student=student, folder=tmp_path / name)
        for rows in run.batches(range(40), list):
            out = run.student(x[rows])
            run.update(out.square().sum(), len(rows))
        assert not torch.equal(student(x), network_of(student)(x))
        run.finish()
        assert torch.equal(student(x), network_of(student)(x))


def network_of(student: nn.Module) -> nn.Sequential:
    """A new network with these weights."""
    copy = network(dtype=torch.float32)
    copy.load_state_dict(student.state_dict())
    return copy


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(tmp_path: Path) -> None:
    x, y = material()
    x[13] = float("inf")
    student = network()
    run = Run(Training(steps=40, batch_size=4, save_every=1), student=student, folder=tmp_path)
    before: dict[str, Tensor] = {}

    def go() -> None:
        for rows in run.batches(range(40), list):
            before.update({name: value.clone() for name, value in student.state_dict().items()})
            run.update(*ragged_loss(run.student, x, y, rows))

    with pytest.raises(NonFiniteLoss) as caught:
        go()
    assert 13 in caught.value.indices
    assert caught.value.step == run.step + 1
    assert str(caught.value.indices) in str(caught.value)
    assert f"step {run.step + 1} " in str(caught.value)
    assert caught.value.checkpoint == tmp_path / "checkpoints" / f"step-{run.step:08d}" or run.step == 0
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, run.step + 1))


def test_a_step_that_counts_nothing_is_refused(tmp_path: Path) -> None:
    run = Run(Training(steps=2), student=network(), folder=tmp_path)
    x, y = material()
    rows = next(run.batches(range(40), list))
    loss, _ = ragged_loss(run.student, x, y, rows)
    with pytest.raises(UserError, match="counted nothing"):
        run.update(loss * 0, 0)


def test_a_loop_without_update_is_found_out(tmp_path: Path) -> None:
    run = Run(Training(steps=2), student=network(), folder=tmp_path)
    with pytest.raises(RuntimeError, match=r"before run\.update"):
        for _ in run.batches(range(40), list):
            pass


def test_a_second_update_in_one_step_is_found_out(tmp_path: Path) -> None:
    x, y = material()
    run = Run(Training(steps=2), student=network(), folder=tmp_path)
    steps = run.steps(range(40))
    rows = next(steps)
    run.update(*ragged_loss(run.student, x, y, rows))
    with pytest.raises(RuntimeError, match="updated already"):
        run.update(*ragged_loss(run.student, x, y, rows))


def test_a_loop_without_data_of_its_own_steps_at_every_update(tmp_path: Path) -> None:
    x, y = material()
    run = Run(Training(steps=3), student=network(), folder=tmp_path)
    while run.step < run.total:
        run.update(*ragged_loss(run.student, x, y, [run.step]))
    run.finish()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"steps": 3, "epochs": 1.0}, "Both steps and epochs"),
        ({"steps": 0}, "steps is 0"),
        ({"epochs": -1.0}, "epochs is -1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"accumulate": 9, "batch_size": 8}, "raise batch_size"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"warmup": -2.0}, "warmup is -2.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"keep": 0}, "keep is 0"),
        ({"save_every": -1}, "save_every is -1"),
    ],
)
def test_settings_that_cannot_be_meant(wrong: dict[str, float], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Training(**wrong)  # type: ignore[arg-type]


def test_a_student_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="requires a gradient"):
        Run(Training(), student=network().requires_grad_(False), folder=tmp_path)


def test_no_data_is_refused(tmp_path: Path) -> None:
    run = Run(Training(), student=network(), folder=tmp_path)
    with pytest.raises(UserError, match="no example"):
        next(run.batches([], list))


def test_a_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install trackio"):
        Run(Training(trackers=("trackio",)), student=network(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_folder_tells_what_ran_where(tmp_path: Path) -> None:
    config = Settings(Training(steps=1), temperature=2.0)
    Run(config.training, student=network(), folder=tmp_path, config=config, provenance={"teacher": "abc"}).finish()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["temperature"] == 2.0
    assert written["training"]["batch_size"] == config.training.batch_size
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["provenance"] == {"teacher": "abc"}
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["seed"] == 0


def test_a_run_writes_its_method_and_goes_on_with_that_one_only(tmp_path: Path) -> None:
    name = find_methods()[0].name
    training = Training(steps=1)
    config = dataclasses.replace(import_module(f"preceptor.methods.{name}.recipe").tiny, training=training)
    Run(training, student=network(), folder=tmp_path / "named", config=config).finish()
    assert json.loads((tmp_path / "named" / "environment.json").read_text())["method"] == name
    Run(training, student=network(), folder=tmp_path / "nameless", config=Settings(training)).finish()
    assert json.loads((tmp_path / "nameless" / "environment.json").read_text())["method"] is None
    path = tmp_path / "named" / "environment.json"
    path.write_text(path.read_text().replace(f'"method": "{name}"', '"method": "./mine"'))
    with pytest.raises(UserError, match=f"holds a run of mine, not of {name}"):
        Run(training, student=network(), folder=tmp_path / "named", config=config, resume=True)
    path.unlink()
    Run(training, student=network(), folder=tmp_path / "named", config=config, resume=True).finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    config = Settings(Training(steps=1))
    Run(config.training, student=network(), folder=tmp_path, config=config).finish()
    before = contents(tmp_path)
    with pytest.raises(UserError, match="holds a run already: go on with --resume"):
        Run(config.training, student=network(), folder=tmp_path, config=config)
    other = dataclasses.replace(config, temperature=4.0)
    with pytest.raises(UserError, match=r"another run \(temperature is 1.0 there and 4.0 here\)"):
        Run(other.training, student=network(), folder=tmp_path, config=other, resume=True)
    (tmp_path / "config.json").write_text(json.dumps({"teacher": "smollm2", "training": {}}))
    with pytest.raises(UserError, match="another method"):
        Run(config.training, student=network(), folder=tmp_path, config=config, resume=True)
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(UserError, match="cannot be read"):
        Run(config.training, student=network(), folder=tmp_path, config=config, resume=True)
    assert {**before, "config.json": b"not json"} == contents(tmp_path)


def test_resume_may_differ_in_the_flag_and_the_path_only(tmp_path: Path) -> None:
    config = Settings(Training(steps=1))
    Run(config.training, student=network(), folder=tmp_path, config=config).finish()
    again = dataclasses.replace(config, resume=True, output="elsewhere")
    run = Run(again.training, student=network(), folder=tmp_path, config=again, resume=True)
    assert run.step == 0
    run.finish()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    with pytest.raises(UserError, match=r"Cannot write a run in .*choose a folder") as caught:
        Run(Training(), student=network(), folder=tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "here first"


def test_a_run_gives_back_what_an_earlier_one_held(tmp_path):
    def teach(name: str) -> weakref.ref[nn.Module]:
        student = nn.Linear(3, 1)
        run = Run(Training(steps=1, batch_size=2), student=student, folder=tmp_path / name)
        for batch in run.batches(range(2), lambda rows: torch.ones(len(rows), 3)):
            run.update(run.student(batch).sum(), len(batch))
        run.finish()
        return weakref.ref(student)

    first = teach("first")
    teach("second")
    assert first() is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the process")
def test_the_memory_of_a_large_parent_is_not_counted():
    held = torch.ones(2**27)  # 512 MiB, which a child's getrusage would tell as its own
    script = (
        "import torch; from preceptor.engine.distribution import memory_mib; before = memory_mib(torch.device('cpu'))\n"
        "held = torch.ones(2**24); print(before, memory_mib(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert held.sum() > 0
    assert 0 < before < 512
    assert after >= before + 60
