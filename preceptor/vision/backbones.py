"""Backbones: networks that turn images into feature maps and name their levels.

A backbone is any module with ``levels``, a mapping from the name of each level to its channels, from the first to the
last, whose forward takes images (B, C, H, W) and returns a dict of the levels' maps (B, channels, h, w).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.models.embedded import without_progress_bars

RESNETS: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ("basic", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": ("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    "resnet101": ("bottleneck", (3, 4, 23, 3), (256, 512, 1024, 2048)),
}


class Backbone(Protocol):
    """What names its feature levels."""

    levels: Mapping[str, int]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of all levels."""
        ...


class ConvNet(nn.Module):
    """A small network for images of about 28x28: four blocks of 3x3 convolution, batch norm and ReLU.

    The first and the third block halve the map: 28x28 images give maps of 14, 14, 7 and 7 pixels a side.

    Args:
        channels: of the images.
        width: channels of the first block; the others have twice, four times and four times as many.
    """

    levels: Mapping[str, int]

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.levels = {f"block{number}": size for number, size in enumerate(widths, 1)}
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, size, 3, padding=1, bias=False),
                nn.BatchNorm2d(size),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2) if number % 2 == 0 else nn.Identity(),
            )
            for number, (before, size) in enumerate(zip((channels, *widths), widths))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of the four blocks."""
        maps, now = {}, images.contiguous(memory_format=torch.channels_last)
        for name, block in zip(self.levels, self.blocks):
            maps[name] = now = block(now)
        return maps


class TransformersBackbone(nn.Module):
    """A backbone of transformers, such as a ResNet; its stages are the levels.

    Args:
        model: what ``AutoBackbone`` gives.
    """

    levels: Mapping[str, int]

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.levels = dict(zip(model.out_features, model.channels))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of the stages."""
        return dict(zip(self.levels, self.model(images).feature_maps))


class TimmBackbone(nn.Module):
    """A model of timm, by name, cut into its feature levels, which carry timm's own names."""

    levels: Mapping[str, int]

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        import timm  # type: ignore[import-not-found,unused-ignore]

        self.model = timm.create_model(name, pretrained=False, features_only=True, in_chans=channels)
        info = self.model.feature_info
        self.levels = dict(zip(info.module_name(), info.channels()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of the levels."""
        return dict(zip(self.levels, self.model(images)))


def make_backbone(spec: str, channels: int, *, seed: int) -> nn.Module:
    """A backbone for images of so many channels, its weights drawn from the seed unless they lie in a folder.

    Args:
        spec: ``conv`` or ``conv:width=64``; ``resnet18``, ``34``, ``50``, ``101``; ``timm:NAME``; a folder that
            `save_backbone` wrote; or a folder or hub name of a transformers backbone.
        channels: of the images.
        seed: of the weights; torch's own generator is left as it was.

    Raises:
        UserError: no such backbone, a missing package, or one for images of other channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind, _, rest = spec.partition(":")
        if kind == "conv":
            width = rest.removeprefix("width=") if rest else "32"
            if not width.isdecimal() or int(width) < 1:
                raise UserError(f'"{spec}" is not a backbone: give conv or conv:width=64.')
            return ConvNet(channels, int(width))
        if kind == "timm":
            return _timm(rest, channels)
        if spec in RESNETS:
            return _resnet(spec, channels)
        if (Path(spec) / "config.json").is_file():
            return _check_channels(_from_folder(Path(spec)), spec, channels)
        return _check_channels(_from_transformers(spec), spec, channels)


def save_backbone(folder: Path, backbone: nn.Module, spec: str, channels: int, card: Mapping[str, object]) -> None:
    """Write weights (safetensors), ``config.json`` and a model card to a folder that `make_backbone` takes.

    A transformers backbone is written as its own library does, so that ``AutoBackbone.from_pretrained`` loads it too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(backbone, TransformersBackbone):
        with without_progress_bars():
            backbone.model.save_pretrained(folder)
    else:
        state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        kind = json.loads((Path(spec) / "config.json").read_text())["backbone"] if Path(spec).is_dir() else spec
        write_whole(folder / "config.json", json.dumps({"backbone": kind, "channels": channels}, indent=2) + "\n")
    size = sum(parameter.numel() for parameter in backbone.parameters())
    facts = {"parameters": f"{size:,}", "levels": ", ".join(levels_of(backbone)), **card}
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    write_whole(
        folder / "README.md",
        f"# {folder.name}\n\nAn image backbone taught without labels with Preceptor.\n\n| | |\n| --- | --- |\n{rows}\n"
        "## Use\n\n```python\nfrom preceptor.backbones import make_backbone\n\n"
        f'backbone = make_backbone("path/to/this/folder", channels={channels}, seed=0).eval()\n'
        "maps = backbone(images)  # float images in [0, 1], not normalised; a dict of feature maps\n```\n\n"
        "## Limits\n\nIt has learned from the images named above and no others, without labels. The licence of the "
        "data applies to it.\n",
    )


def levels_of(backbone: nn.Module, wanted: tuple[str, ...] = ()) -> dict[str, int]:
    """The names and channels of the wanted levels, or of all.

    Raises:
        UserError: the module names no levels, or not these, or one is named twice.
    """
    levels = dict(vars(backbone).get("levels", {}))
    if not levels:
        raise UserError(
            f"{type(backbone).__name__} names no feature levels: give it an attribute levels (name to channels) and a "
            "forward that returns a dict of maps."
        )
    unknown = [name for name in wanted if name not in levels]
    if unknown or len(set(wanted)) < len(wanted):
        wrong = f"no level {unknown[0]}" if unknown else "each level once"
        raise UserError(f"The backbone has {wrong}: choose among {', '.join(levels)}.")
    return {name: levels[name] for name in wanted or levels}


def pooled(backbone: nn.Module, images: Tensor) -> Tensor:
    """The mean of the last level's map over its positions: (B, channels)."""
    maps: dict[str, Tensor] = backbone(images)
    return maps[next(reversed(levels_of(backbone)))].mean((2, 3))


def _resnet(name: str, channels: int) -> nn.Module:
    from transformers import ResNetBackbone, ResNetConfig

    layer, depths, widths = RESNETS[name]
    config = ResNetConfig(
        num_channels=channels,
        depths=list(depths),
        hidden_sizes=list(widths),
        layer_type=layer,
        out_features=[f"stage{number}" for number in range(1, 5)],  # type: ignore[call-arg]
    )
    return TransformersBackbone(ResNetBackbone(config))


def _timm(name: str, channels: int) -> nn.Module:
    try:
        return TimmBackbone(name, channels)
    except ModuleNotFoundError as error:
        raise UserError(f"timm:{name} needs timm and torchvision ({error}): `pip install timm torchvision`.") from error
    except RuntimeError as error:
        raise UserError(f"timm cannot make {name} ({error}): `timm.list_models()` shows what it has.") from error


def _from_folder(folder: Path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "backbone" not in config:
        return _from_transformers(str(folder))
    backbone = make_backbone(config["backbone"], config["channels"], seed=0)
    backbone.load_state_dict(load_file(folder / "model.safetensors"))
    return backbone


def _from_transformers(name: str) -> nn.Module:
    from transformers import AutoBackbone, AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
        stages = [stage for stage in config.stage_names if stage != "stem"]
        config = AutoConfig.from_pretrained(name, out_features=stages)
        # AutoBackbone.from_pretrained takes names on the hub alone; the class that it would choose takes folders too.
        with torch.device("meta"):
            kind = type(AutoBackbone.from_config(config))  # type: ignore[no-untyped-call]
        return TransformersBackbone(kind.from_pretrained(name, config=config))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f'There is no backbone "{name}": choose conv, {", ".join(RESNETS)}, timm:NAME, a folder, or a transformers '
            f"backbone ({str(error).splitlines()[0][:120]})."
        ) from error


def _check_channels(backbone: nn.Module, spec: str, channels: int) -> nn.Module:
    first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    if first.in_channels != channels:
        raise UserError(f"{spec} takes images of {first.in_channels} channels and these have {channels}.")
    return backbone
