"""A training step of obow beside the authors' own code: the same weights, views, batch and threads.

Both predict, move the teacher, make bags, renew the words, go backward and take a step of SGD, and both read loss and
perplexities. Steps interleave and change places from round to round; a ratio is the median over rounds of ours over
theirs. Peak memory is that of a child process each, above what it held before its first step. The losses of the first
step are compared too: they must agree.

    git clone https://github.com/valeoai/obow OFFICIAL
    python benchmarks/obow.py --official OFFICIAL [--quick] [--threads 1] [--save]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from preceptor.engine.settings import Training
from preceptor.methods.obow import recipe as obow
from preceptor.methods.obow.visual_words import perplexities
from preceptor.vision.backbones import make_backbone
from preceptor.vision.views import Views, student_views, teacher_view

Step = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """What both are given."""

    name: str
    backbone: str
    channels: int
    side: int
    batch: int
    words: int
    levels: tuple[str, ...]
    views: Views

    def config(self) -> obow.Config:
        training = Training(steps=1000, batch_size=self.batch, optimizer="sgd", learning_rate=0.05, clip=None)
        return obow.Config(
            backbone=self.backbone, levels=self.levels, words=self.words, views=self.views, training=training
        )


BLOCKS, STAGES = ("block2", "block4"), ("stage3", "stage4")
SMALL = Views(crops=2, crop_size=20, patches=0)
LARGE = Views(side=160, size=160, crops=1, crop_size=96, patches=0)
SETTINGS = [
    Setting("conv, 128 x 28 x 28, K 512", "conv", 1, 28, 128, 512, BLOCKS, SMALL),
    Setting("conv, 64 x 28 x 28, K 8192", "conv", 1, 28, 64, 8192, BLOCKS, SMALL),
    Setting("ResNet-18, 16 x 160 x 160, K 8192", "resnet18", 3, 160, 16, 8192, STAGES, LARGE),
]


class Levels(nn.Module):
    """Our backbone as the authors' code calls one: some levels' maps, or the pooled last one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, levels: list[str] | None = None) -> Tensor | list[Tensor]:
        maps = self.backbone(images)
        return [maps[name] for name in levels] if levels else list(maps.values())[-1].mean((2, 3))


def data(setting: Setting) -> tuple[Tensor, list[Tensor]]:
    """The views of one batch, the same for both."""
    torch.manual_seed(1)
    images = torch.rand(setting.batch, setting.channels, setting.side, setting.side)
    return teacher_view(images, setting.views), student_views(images, setting.views)


def ours(setting: Setting) -> tuple[Step, obow.Student, obow.Vocabularies]:
    config = setting.config()
    student, teacher, words = obow.make(config, setting.channels)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    seen, views = data(setting)
    done = [0]

    def step() -> float:
        momentum = obow.momentum_at(0.99, done[0], 1000)
        done[0] += 1
        kinds, bags = obow.lesson(student, student, teacher, words, seen, views, momentum)
        for bag in bags.values():
            perplexities(bag)
        loss = torch.stack(kinds).sum() / setting.batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, student, words


def theirs(setting: Setting, official: Path) -> tuple[Step, nn.Module]:
    sys.path.insert(0, str(official))
    from obow.builder_obow import OBoW

    config = setting.config()
    backbone = make_backbone(setting.backbone, setting.channels, seed=0)
    widths = [dict(backbone.levels)[name] for name in setting.levels]  # type: ignore[arg-type]
    last = list(dict(backbone.levels).values())[-1]  # type: ignore[arg-type]
    model = OBoW(
        feature_extractor=Levels(backbone),
        num_channels=last,
        bow_levels=list(setting.levels),
        bow_extractor_opts_list=[
            {"num_words": setting.words, "num_channels": width, "inv_delta": config.inv_delta, "bow_pool": "max"}
            for width in widths
        ],
        bow_predictor_opts={"kappa": config.kappa},
        alpha=(0.99, 1000),
    ).train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.05, momentum=0.9, weight_decay=5e-4)
    seen, views = data(setting)

    def step() -> float:
        losses, _ = model(seen, views)
        loss = losses.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, model


def alike(student: obow.Student, words: obow.Vocabularies, model: nn.Module) -> None:
    """Gives the authors' model our head and our words."""
    with torch.no_grad():
        for generator, layers in zip(student.head.generators, model.bow_predictor.layers_w):  # type: ignore[union-attr]
            linear, norm, _, final = generator
            for mine, other in zip((linear, norm, final), (layers[1], layers[2], layers[4])):
                other.load_state_dict(mine.state_dict())
        for mine, extractor in zip(words.now(), model.bow_extractor.bow_extractor):  # type: ignore[union-attr]
            extractor._embedding.copy_(mine)


def memory(setting: Setting, arm: str, official: Path, threads: int) -> None:
    """In a child: the peak above what was held before the first step, in MiB."""
    torch.set_num_threads(threads)
    step = ours(setting)[0] if arm == "ours" else theirs(setting, official)[0]
    before = kibibytes("VmRSS")
    for _ in range(3):
        step()
    print(json.dumps((kibibytes("VmHWM") - before) / 1024))


def kibibytes(name: str) -> int:
    """A line of /proc/self/status; ``getrusage`` would hand the parent's peak down to a child."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak(arguments: argparse.Namespace, number: int, arm: str) -> float:
    command = [sys.executable, __file__, "--official", str(arguments.official), "--threads", str(arguments.threads)]
    said = subprocess.run(
        [*command, "--memory", arm, "--setting", str(number)], check=True, capture_output=True, text=True
    )
    return float(said.stdout.strip().splitlines()[-1])


def measure(setting: Setting, number: int, arguments: argparse.Namespace) -> dict[str, float | str]:
    mine, student, words = ours(setting)
    other, model = theirs(setting, arguments.official)
    alike(student, words, model)
    first = mine() - other()
    arms, times = {"ours": mine, "theirs": other}, {"ours": list[float](), "theirs": list[float]()}
    for turn in range(4 if arguments.quick else 15):
        for name in sorted(arms, reverse=bool(turn % 2)):
            begun = time.perf_counter()
            arms[name]()
            times[name].append(time.perf_counter() - begun)
    peaks = {name: peak(arguments, number, name) for name in arms}
    ratios = [a / b for a, b in zip(times["ours"], times["theirs"])]
    return {
        "setting": setting.name,
        "first loss, difference": first,
        "ours, ms": 1000 * statistics.median(times["ours"]),
        "theirs, ms": 1000 * statistics.median(times["theirs"]),
        "time ratio": statistics.median(ratios),
        "ours, MiB": peaks["ours"],
        "theirs, MiB": peaks["theirs"],
        "memory ratio": peaks["ours"] / peaks["theirs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="a clone of valeoai/obow")
    parser.add_argument("--quick", action="store_true", help="the two small settings, few rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/obow_step.json")
    parser.add_argument("--memory", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory(SETTINGS[arguments.setting], arguments.memory, arguments.official, arguments.threads)
        return
    torch.set_num_threads(arguments.threads)
    found = [measure(s, number, arguments) for number, s in enumerate(SETTINGS[: 2 if arguments.quick else None])]
    versions = {"torch": torch.__version__, "python": platform.python_version(), "threads": arguments.threads}
    result = {**versions, "settings": found}
    print(json.dumps(result))
    if arguments.save:
        path = Path(__file__).parent / "obow_step.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
