"""What is OBoW's own: the order of updates, the momentum, what a run remembers, and every refusal."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from preceptor.cli import main as command
from preceptor.distillation.momentum import MomentumTeacher
from preceptor.engine.run import NonFiniteLoss, Run
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.methods.obow import recipe as obow, reproduction as experiment
from preceptor.methods.obow.recipe import Config, ObowStudent, lesson, make, momentum_at, tiny
from preceptor.methods.obow.visual_words import DynamicHead, Vocabularies, bag_divergence
from preceptor.vision.backbones import levels_of, make_backbone
from preceptor.vision.images import Images, held
from preceptor.vision.views import Views, student_views, teacher_view

SMALL = replace(tiny, backbone="conv:width=4", words=10, views=Views(crops=2, patches=1))


def images(count: int = 40, seed: int = 0) -> Images:
    pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=torch.Generator().manual_seed(seed))
    return held(pixels.to(torch.uint8), torch.arange(count) % 2, ("even", "odd"))


def batch(config: Config, count: int = 4) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(5)
    pixels = images().take(range(count))
    return teacher_view(pixels, config.views), student_views(pixels, config.views)


def test_a_lesson_is_the_papers_five_steps_in_their_order() -> None:
    student, teacher, words = make(SMALL, 1)
    with torch.no_grad():  # the teacher lags behind the student, as in the middle of a run
        for parameter in student.backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    seen, views = batch(SMALL)
    before = [one.clone() for one in words.now()]
    scales = [float(words.of(name).distance) for name in SMALL.levels]
    averaged = [
        0.9 * old.detach() + 0.1 * new.detach()
        for old, new in zip(teacher.model.parameters(), student.backbone.parameters())
    ]
    kinds, bags = lesson(student, student, teacher, words, seen, views, 0.9)

    # 2. The teacher moved before it looked.
    for mine, expected in zip(teacher.model.parameters(), averaged):
        torch.testing.assert_close(mine, expected)
    with torch.no_grad():
        maps = teacher.model(seen)
    for (name, bag), old, scale in zip(bags.items(), before, scales):
        inner = maps[name][:, :, 1:-1, 1:-1].flatten(2).transpose(1, 2).double()
        far = torch.cdist(inner, old.double().expand(len(inner), -1, -1)).square()
        # 3. Distances to the words as they were; the scale moves first and then makes the codes.
        scale = 0.99 * scale + 0.01 * float(far.min(-1).values.mean())
        assert float(words.of(name).distance) == pytest.approx(scale, rel=1e-4)
        codes = torch.softmax(-SMALL.inv_delta / scale * far, -1).amax(1)
        torch.testing.assert_close(bag.double(), codes / codes.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(bag.sum(1), torch.ones(4))
    # 4. The words were renewed, after the prediction, which knew the old ones (1).
    assert all(not torch.equal(now, old) for now, old in zip(words.now(), before))
    with_old, with_new = student(views, before), student(views, words.now())
    for kind, (old_logits, new_logits) in zip(kinds, zip(with_old, with_new)):
        expected, other = (
            sum(bag_divergence(bag, one).sum() for bag, one in zip(bags.values(), logits)) / 2
            for logits in (old_logits, new_logits)
        )
        torch.testing.assert_close(kind, expected)
        assert abs(float((kind - other).detach())) > 1e-4


def test_only_parameters_are_averaged_and_the_teachers_batch_norms_are_its_own() -> None:
    student, teacher, words = make(SMALL, 1)
    seen, views = batch(SMALL)
    lesson(student, student, teacher, words, seen, views, 1.0)
    mine, theirs = teacher.model.blocks[0][1], student.backbone.blocks[0][1]  # type: ignore[index]
    assert int(mine.num_batches_tracked) == 1  # the teacher's one view
    assert int(theirs.num_batches_tracked) == 2  # crops and patches
    assert not torch.allclose(mine.running_mean, theirs.running_mean)
    convolution = teacher.model.blocks[0][0]  # type: ignore[index]
    shown = convolution(seen).mean((0, 2, 3))
    torch.testing.assert_close(mine.running_mean, 0.1 * shown)
    assert teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    again = MomentumTeacher(student.backbone, 0.9, own_statistics=True)
    again.load_state_dict(teacher.state_dict())
    torch.testing.assert_close(again.model.blocks[0][1].running_mean, mine.running_mean)  # type: ignore[index]


def test_no_gradient_reaches_teacher_or_words() -> None:
    student, teacher, words = make(SMALL, 1)
    kinds, bags = lesson(student, student, teacher, words, *batch(SMALL), 0.99)
    assert not any(bag.requires_grad for bag in bags.values())
    torch.stack(kinds).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_the_momentum_follows_half_a_cosine_of_the_iteration() -> None:
    assert momentum_at(0.99, 0, 100) == pytest.approx(0.99)
    assert momentum_at(0.99, 50, 100) == pytest.approx(0.995)
    assert momentum_at(0.99, 100, 100) == pytest.approx(1.0)
    for step in (10, 77):
        assert momentum_at(0.9, step, 200) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi * step / 200)) / 2)
    assert momentum_at(1.0, 30, 100) == 1.0


def test_the_loss_is_a_sum_over_kinds_and_a_mean_over_levels_views_and_images() -> None:
    config = replace(SMALL, training=replace(SMALL.training, steps=1, learning_rate=1e-9, batch_size=4))
    student, teacher, words = make(config, 1)
    run = Run(config.training, student=student, folder="run", config=config)
    obow.teach(run, config, student, teacher, words, images(4))
    line = json.loads((Path("run") / "metrics.jsonl").read_text())
    assert line["loss"] == pytest.approx(line["kl_crops"] + line["kl_patches"], rel=1e-5)
    assert 0 < line["kl_crops"] < math.log(10)
    for name in config.levels:
        assert 1 <= line[f"image_perplexity_{name}"] <= line[f"batch_perplexity_{name}"] <= 10.001
    assert 0 < line["target_entropy"] <= math.log(10)
    assert line["distance_block3"] != 0.5


def test_a_run_that_was_stopped_ends_as_one_that_was_not() -> None:
    training = Training(
        steps=6, batch_size=8, optimizer="sgd", learning_rate=0.05, clip=None, save_every=3, weight_decay=1e-4
    )
    config = replace(SMALL, training=training)

    def teach(folder: str, *, resume: bool = False) -> tuple[ObowStudent, MomentumTeacher, Vocabularies]:
        student, teacher, words = make(config, 1)
        run = Run(training, student=student, folder=folder, config=config, resume=resume)
        obow.teach(run, config, student, teacher, words, images())
        return student, teacher, words

    whole = teach("whole")
    shutil.copytree("whole", "stopped")
    newest = sorted(
        (Path("stopped") / "checkpoints").iterdir(), key=lambda path: int("".join(filter(str.isdigit, path.name)))
    )[-1]
    shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    parts = teach("stopped", resume=True)
    for one, other in zip(whole, parts):
        first, second = one.state_dict(), other.state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert int(parts[2].of("block4").oldest) == 6 * 8 % 10
    assert (Path("whole") / "metrics.jsonl").read_text().count("\n") == 6


def test_any_backbone_that_names_its_levels_can_learn() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels = {"first": 6, "second": 8}
            self.first, self.second = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 8, 3, padding=1)

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            first = self.first(images).relu()
            return {"first": first, "second": self.second(first).relu()}

    backbone = Own()
    student = ObowStudent(backbone, DynamicHead(list(levels_of(backbone).values()), 8, kappa=5.0))
    teacher, words = MomentumTeacher(backbone, 0.9, own_statistics=True), Vocabularies(levels_of(backbone), 12)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    torch.manual_seed(0)
    seen, losses = torch.rand(8, 3, 16, 16), []
    for _ in range(25):
        kinds, _ = lesson(student, student, teacher, words, seen, [seen[..., :10, :10]], 0.9)
        optimizer.zero_grad()
        (torch.stack(kinds).sum() / 8).backward()
        optimizer.step()
        losses.append(float(kinds[0].detach()) / 8)
    assert losses[-1] < 0.7 * losses[0]


def test_a_loss_that_is_no_number_stops_the_run_and_tells_the_state_of_the_words() -> None:
    config = replace(SMALL, training=replace(SMALL.training, steps=20, learning_rate=1e30, batch_size=8))
    student, teacher, words = make(config, 1)
    run = Run(config.training, student=student, folder="run", config=config)
    with pytest.raises(NonFiniteLoss, match=r"block3: perplexities .* m .*block4") as told:
        obow.teach(run, config, student, teacher, words, images())
    assert told.value.step > 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"momentum": 1.5}, r"momentum is 1\.5.*\[0, 1\]"),
        ({"momentum": -0.1}, r"\[0, 1\]"),
        ({"inv_delta": 0.0}, "inv_delta is 0"),
        ({"kappa": -1.0}, "kappa -1"),
        ({"levels": ()}, "at least one level"),
        ({"words": 1}, "two words"),
        ({"training": Training(batch_size=1)}, "at least 2 images"),
        ({"training": Training(batch_size=4, accumulate=2)}, "training.accumulate at 1"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(tiny, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"levels": ("block3", "stage4")}, "no level stage4: choose among block1"),
        ({"views": Views(side=16, size=16)}, "4x4 is too small.*5x5"),
        ({"data": "nowhere/at-all"}, "no set of images"),
        ({"views": Views(crops=0, patches=1, patch_size=2)}, "views are too small"),
        ({"views": Views(crops=1, patches=1, crop_size=2)}, "views are too small"),
        ({"views": Views(size=3)}, "views are too small"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_written(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        obow.main(replace(tiny, output="out", **wrong))  # type: ignore[arg-type]
    assert not Path("out").exists()


def test_the_papers_settings_resolve() -> None:
    with torch.device("meta"):
        backbone = make_backbone(obow.paper.backbone, 3, seed=0)
    assert levels_of(backbone, obow.paper.levels) == {"stage3": 1024, "stage4": 2048}
    assert (obow.paper.words, obow.paper.kappa, obow.paper.inv_delta) == (8192, 8.0, 15.0)
    assert obow.paper.views.kinds == ("crops", "patches")


def test_a_run_leaves_pictures_a_table_and_a_student_that_comes_back() -> None:
    config = replace(tiny, limit=0, output="run", training=replace(tiny.training, steps=3))
    table = obow.main(config)
    assert table is not None
    assert table.columns == ["untaught student", "taught student"]
    assert "probe, 10 labels a class" in table.rows
    page = (Path("run") / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') == 2
    assert "Visual words of block4" in page
    again = make_backbone("run/student", 1, seed=3)
    assert levels_of(again) == levels_of(make_backbone(tiny.backbone, 1, seed=0))
    assert command(["run", "obow", "--tiny", "--output", "run"]) == 2


def test_images_without_labels_are_learned_from_too(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    pixels = images(24).read(range(24))
    for number, one in enumerate(pixels):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(one[0].numpy()).save(tmp_path / "set" / f"{number}.png")
    config = replace(
        SMALL, data=str(tmp_path / "set"), output="run", training=replace(SMALL.training, steps=2, batch_size=8)
    )
    table = obow.main(config)
    assert table is not None
    assert not table.rows
    assert "no labels" in (Path("run") / "result.json").read_text()


def test_the_reproduction_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(seed: int, *, full: bool) -> tuple[Config, str]:
        training = replace(tiny.training, steps=12, batch_size=16, seed=seed)
        return replace(SMALL, data="digits", limit=0, training=training, views=Views(side=28, size=28)), "digits"

    monkeypatch.setattr(experiment, "study", short)
    table = experiment.reproduce(2, Path("out"), full=False)
    assert list(table.rows) == list(experiment.ARMS)
    assert [claim.text for claim in table.claims][:1] == ["The loss is below ln K"]
    assert next(claim for claim in table.claims if claim.text == "The bags sum to 1").holds
    # An arm that is done is not made again.
    path = Path("out/arms/obow_0/figures.json")
    path.write_text(path.read_text().replace('"first loss"', '"first  loss"'))
    with pytest.raises(KeyError, match="first loss"):
        experiment.reproduce(2, Path("out"), full=False)
