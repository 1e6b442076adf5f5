"""Backbones: their levels, what goes into a folder and comes back, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from preceptor.errors import UserError
from preceptor.vision.backbones import TransformersBackbone, levels_of, make_backbone, pooled, save_backbone


def test_the_small_network_names_its_levels() -> None:
    backbone = make_backbone("conv:width=8", 1, seed=0)
    assert levels_of(backbone) == {"block1": 8, "block2": 16, "block3": 32, "block4": 32}
    maps = backbone(torch.rand(2, 1, 28, 28))
    assert {name: tuple(one.shape) for name, one in maps.items()} == {
        "block1": (2, 8, 14, 14), "block2": (2, 16, 14, 14), "block3": (2, 32, 7, 7), "block4": (2, 32, 7, 7),
    }  # fmt: skip
    torch.testing.assert_close(pooled(backbone.eval(), torch.ones(1, 1, 28, 28)).shape, torch.Size([1, 32]))


def test_a_seed_draws_the_weights_and_leaves_the_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (make_backbone("conv:width=4", 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    first = [next(backbone.parameters()) for backbone in (one, same, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("spec", ["conv:width=4", "resnet18"])
def test_a_folder_gives_the_backbone_back(tmp_path: Path, spec: str) -> None:
    backbone = make_backbone(spec, 1, seed=0).eval()
    save_backbone(tmp_path / "student", backbone, spec, 1, {"method": "obow"})
    again = make_backbone(str(tmp_path / "student"), 1, seed=9).eval()
    images = torch.rand(1, 1, 64, 64)
    assert levels_of(again) == levels_of(backbone)
    torch.testing.assert_close(pooled(again, images), pooled(backbone, images))
    assert "obow" in (tmp_path / "student" / "README.md").read_text()
    assert not list(tmp_path.rglob("*.bin"))
    save_backbone(tmp_path / "twice", again, str(tmp_path / "student"), 1, {})
    torch.testing.assert_close(
        pooled(make_backbone(str(tmp_path / "twice"), 1, seed=0).eval(), images), pooled(backbone, images)
    )
    with pytest.raises(UserError, match="1 channels and these have 3"):
        make_backbone(str(tmp_path / "student"), 3, seed=0)


def test_resnet50_is_the_papers() -> None:
    with torch.device("meta"):
        backbone = make_backbone("resnet50", 3, seed=0)
    assert isinstance(backbone, TransformersBackbone)
    assert levels_of(backbone, ("stage3", "stage4")) == {"stage3": 1024, "stage4": 2048}
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 23_508_032  # torchvision's, without fc


def test_timm_gives_levels_by_its_own_names() -> None:
    pytest.importorskip("timm", exc_type=ImportError)
    backbone = make_backbone("timm:resnet18", 1, seed=0)
    assert list(levels_of(backbone).values()) == [64, 64, 128, 256, 512]
    assert backbone(torch.rand(1, 1, 64, 64))["layer4"].shape == (1, 512, 2, 2)


def test_any_module_that_names_its_levels_will_do() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels = {"only": 5}
            self.layer = nn.Conv2d(2, 5, 3)

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"only": self.layer(images)}

    assert levels_of(Own()) == {"only": 5}
    assert pooled(Own(), torch.rand(3, 2, 8, 8)).shape == (3, 5)
    with pytest.raises(UserError, match="names no feature levels"):
        levels_of(nn.Linear(2, 2))


def test_what_does_not_fit_is_said() -> None:
    backbone = make_backbone("conv:width=4", 1, seed=0)
    with pytest.raises(UserError, match="no level stage4: choose among block1, block2, block3, block4"):
        levels_of(backbone, ("block2", "stage4"))
    with pytest.raises(UserError, match="each level once"):
        levels_of(backbone, ("block2", "block2"))
    with pytest.raises(UserError, match="conv:width=64"):
        make_backbone("conv:wide", 1, seed=0)
    with pytest.raises(UserError, match='no backbone "resnet17"'):
        make_backbone("resnet17", 1, seed=0)
