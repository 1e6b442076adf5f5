"""Views: their sizes, where they are cut, what happens to colours, and that a seed repeats them."""

import pytest
import torch

from preceptor.errors import UserError
from preceptor.vision import views as module
from preceptor.vision.views import Views, student_views, teacher_view, whole

PLAIN = Views(side=32, size=32, flip=False, jitter=0.0, grey_share=0.0, blur=0.0)


def ramp(count: int = 2, side: int = 32) -> torch.Tensor:
    """Red is the place from left to right, green from top to bottom, blue the number of the image."""
    line = (torch.arange(side) + 0.5) / side
    x, y = line.expand(side, side), line.view(-1, 1).expand(side, side)
    blue = torch.arange(count).view(-1, 1, 1) / count
    return torch.stack([torch.stack([x, y, b.expand(side, side)]) for b in blue])


def test_sizes_order_and_repetition() -> None:
    views = Views(side=32, size=28, crops=3, crop_size=12, patches=5, patch_size=8)
    torch.manual_seed(0)
    crops, patches = student_views(ramp(4), views)
    assert crops.shape == (12, 3, 12, 12)
    assert patches.shape == (20, 3, 8, 8)
    assert views.kinds == ("crops", "patches")
    torch.manual_seed(0)
    again = student_views(ramp(4), views)
    assert torch.equal(crops, again[0])
    assert torch.equal(patches, again[1])
    assert float(crops.min()) >= 0
    assert float(crops.max()) <= 1
    assert teacher_view(ramp(4), views).shape == (4, 3, 28, 28)
    torch.testing.assert_close(whole(ramp(4), views), ramp(4)[..., 2:30, 2:30])


def test_views_of_one_image_stand_one_after_the_other() -> None:
    for made in student_views(ramp(4), Views(**{**vars(PLAIN), "crops": 3, "patches": 2})):
        each = len(made) // 4
        numbers = made[:, 2].mean((1, 2)) * 4
        torch.testing.assert_close(
            numbers.view(4, each), torch.arange(4.0).view(4, 1).expand(4, each), rtol=1e-4, atol=1e-4
        )


def test_a_crop_shows_one_box_of_the_asked_area() -> None:
    torch.manual_seed(0)
    views = Views(**{**vars(PLAIN), "crops": 4, "crop_size": 16, "crop_scale": (0.25, 0.36)})
    crops = student_views(ramp(50), views)[0]
    width, height = crops[:, 0, 0, -1] - crops[:, 0, 0, 0], crops[:, 1, -1, 0] - crops[:, 1, 0, 0]
    # The middles of the first and last pixel are 15/16 of the side apart.
    area = width * height * (16 / 15) ** 2
    assert 0.24 < float(area.min()) < 0.27
    assert 0.34 < float(area.max()) < 0.37
    assert 0.74 < float((width / height).min()) < 0.85
    assert 1.2 < float((width / height).max()) < 1.35
    torch.testing.assert_close(crops[:, 0], crops[:, 0, :1].expand_as(crops[:, 0]), rtol=1e-4, atol=1e-5)


def test_a_crop_of_everything_is_the_image_and_mirrors_are_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASPECT", (1.0, 1.0))
    settings = {**vars(PLAIN), "crops": 8, "crop_size": 32, "crop_scale": (1.0, 1.0)}
    image = ramp(1)
    same = student_views(image, Views(**settings))[0]
    torch.testing.assert_close(same, image.expand(8, -1, -1, -1), rtol=1e-4, atol=1e-5)
    mirrored = student_views(image, Views(**{**settings, "flip": True}))[0]
    kinds = {bool(torch.allclose(view, image[0].flip(-1), atol=1e-4)) for view in mirrored}
    assert kinds == {True, False}
    for view in mirrored:
        assert torch.allclose(view, image[0], atol=1e-4) or torch.allclose(view, image[0].flip(-1), atol=1e-4)


def test_patches_are_different_cells_of_a_grid() -> None:
    torch.manual_seed(0)
    settings = {**vars(PLAIN), "crops": 0, "patches": 9, "patch_size": 12, "patch_scale": (1.0, 1.0)}
    patches = student_views(ramp(20), Views(**settings))[0].view(20, 9, 3, 12, 12)
    middles = patches[:, :, :2].mean((3, 4))
    # The frame is nearly the whole image, so nine patches lie in a grid of three by three.
    for axis in range(2):
        ordered = middles[..., axis].sort(1).values
        assert (ordered[:, 3] - ordered[:, 2] > 0.05).all()
        assert (ordered[:, 6] - ordered[:, 5] > 0.05).all()
    width = patches[:, :, 0, 0, -1] - patches[:, :, 0, 0, 0]
    assert 0.28 < float(width.min() * 12 / 11) <= float(width.max() * 12 / 11) < 0.44


def test_colours_change_within_their_bounds_and_grey_has_none() -> None:
    torch.manual_seed(0)
    grey = student_views(ramp(8), Views(**{**vars(PLAIN), "grey_share": 1.0}))[0]
    torch.testing.assert_close(grey[:, 0], grey[:, 1], rtol=1e-4, atol=1e-4)
    flat = torch.full((200, 1, 32, 32), 0.5)
    bright = student_views(flat, Views(**{**vars(PLAIN), "jitter": 0.4, "jitter_share": 1.0}))[0].mean((1, 2, 3))
    assert 0.3 <= float(bright.min()) < 0.32
    assert 0.68 < float(bright.max()) <= 0.7
    still = student_views(flat, Views(**{**vars(PLAIN), "jitter": 0.4, "jitter_share": 0.0}))[0]
    torch.testing.assert_close(still, torch.full_like(still, 0.5))


def test_hue_turns_full_circle_and_keeps_grey() -> None:
    chroma = torch.randn(2, 3, 4, 4)
    chroma = chroma - (chroma * torch.tensor(module.GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    for turn in (0.0, 1.0):
        turned = module._turned(chroma, torch.full((2, 1, 1, 1), turn))
        torch.testing.assert_close(turned, chroma, rtol=1e-4, atol=1e-5)
    half = module._turned(chroma, torch.full((2, 1, 1, 1), 0.5))
    torch.testing.assert_close(half, -chroma, rtol=1e-4, atol=1e-5)


def test_blur_keeps_what_is_flat_and_spares_about_half() -> None:
    torch.manual_seed(0)
    flat = torch.full((6, 3, 20, 20), 0.3)
    torch.testing.assert_close(module._blur(flat, 2.0), flat)
    noise = torch.rand(200, 1, 20, 20)
    blurred = module._blur(noise, 2.0)
    same = (blurred - noise).abs().amax((1, 2, 3)) < 1e-5
    assert 0.35 < float(same.float().mean()) < 0.7
    assert float(blurred[~same].std((2, 3)).mean()) < 0.8 * float(noise.std((2, 3)).mean())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"crops": 0, "patches": 0}, "no view for the student"),
        ({"patches": 10}, "9 patches"),
        ({"size": 64}, "views.size is 64"),
        ({"crop_size": 0}, "1 or more"),
        ({"crop_scale": (0.0, 0.5)}, "views.crop_scale"),
        ({"patch_scale": (0.9, 0.5)}, "views.patch_scale"),
        ({"jitter": 1.5}, "views.jitter"),
        ({"blur": -1.0}, "views.jitter"),
    ],
)
def test_views_that_cannot_be_cut_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Views(**{**vars(PLAIN), **wrong})  # type: ignore[arg-type]
