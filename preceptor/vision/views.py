"""Views of images: random crops, patches and changes of colour, drawn for a whole batch at once in plain torch.

Images are float (B, C, H, W) in [0, 1]; every draw is from torch's own generator, so that a run can be repeated and
resumed. Views of one image stand one after the other. Source of the two kinds of view: OBoW (Gidaris et al., CVPR
2021), https://arxiv.org/abs/2012.11552, section 4.1 and its code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from preceptor.errors import UserError

ASPECT = (3 / 4, 4 / 3)  # of a random crop's sides


GREY = (0.299, 0.587, 0.114)


# Patches of 96 pixels, moved by up to 24, on a 3x3 grid of step 68 in a frame of 256 pixels.
PATCH, SHIFT, STEP, GRID = 96 / 256, 24 / 256, 68 / 256, 3


@dataclass(frozen=True)
class Views:
    """What teacher and student see of an image."""

    side: int = 28
    """Pixels a side of the images as they are kept."""
    size: int = 28
    """Pixels a side of the teacher's view, cut from the middle."""
    crops: int = 2
    """Random crops an image."""
    crop_scale: tuple[float, float] = (0.1, 0.5)
    """Least and largest share of the image's area in a crop."""
    crop_size: int = 20
    """Pixels a side of a crop."""
    patches: int = 0
    """Patches an image, of nine that overlap, each 3/8 of a frame a side."""
    patch_size: int = 12
    """Pixels a side of a patch."""
    patch_scale: tuple[float, float] = (0.6, 1.0)
    """Least and largest share of the image's area in the frame that the patches are cut from."""
    flip: bool = True
    """Mirror teacher's and student's views at random."""
    jitter: float = 0.4
    """Largest change of brightness, contrast and saturation; hue turns by a quarter of it, of a whole circle."""
    jitter_share: float = 0.8
    """Share of views whose colours are changed."""
    grey_share: float = 0.2
    """Share of colour views that lose their colour."""
    blur: float = 2.0
    """Largest standard deviation of the blur of crops, in pixels; half of them are blurred, none if 0."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of view that the student gets, in their order."""
        return ("crops",) * (self.crops > 0) + ("patches",) * (self.patches > 0)

    def __post_init__(self) -> None:
        """Refuse views that cannot be cut."""
        if self.crops < 0 or self.patches < 0 or self.crops + self.patches == 0:
            raise UserError("There is no view for the student: give at least one crop or patch an image.")
        if self.patches > GRID**2:
            raise UserError(f"views.patches is {self.patches}: there are {GRID**2} patches in an image.")
        if not 0 < self.size <= self.side or min(self.crop_size, self.patch_size) < 1:
            raise UserError(f"views.size is {self.size}: choose 1 to {self.side}, and crops and patches of 1 or more.")
        for name, (least, most) in (("crop_scale", self.crop_scale), ("patch_scale", self.patch_scale)):
            if not 0 < least <= most <= 1:
                raise UserError(
                    f"views.{name} is {least}, {most}: give two shares of the area, 0 < least <= most <= 1."
                )
        if min(self.jitter, self.jitter_share, self.grey_share, self.blur) < 0 or self.jitter > 1:
            raise UserError("views.jitter must lie in [0, 1], and jitter_share, grey_share and blur be 0 or more.")


def whole(images: Tensor, views: Views) -> Tensor:
    """The middle of the images, without any chance: (B, C, size, size)."""
    start = (images.shape[-1] - views.size) // 2
    return images[..., start : start + views.size, start : start + views.size]


def teacher_view(images: Tensor, views: Views) -> Tensor:
    """The middle of the images, some mirrored: (B, C, size, size)."""
    middle = whole(images, views)
    if not views.flip:
        return middle
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, middle.flip(-1), middle)


def student_views(images: Tensor, views: Views) -> list[Tensor]:
    """By kind of view, crops (B·n, C, crop_size, crop_size) and patches (B·n, C, patch_size, patch_size)."""
    found = []
    if views.crops:
        boxes = _crops(len(images), views.crops, views.crop_scale).to(images.device)
        crops = _jitter(_cut(images, boxes, views.crop_size, flip=views.flip), views)
        found.append(_blur(crops, views.blur) if views.blur else crops)
    if views.patches:
        boxes = _patches(len(images), views.patches, views.patch_scale).to(images.device)
        # One change of colours for all patches of an image, as if the whole of it had changed before it was cut.
        found.append(_cut(_jitter(images, views), boxes, views.patch_size, flip=views.flip))
    return found


def _crops(count: int, each: int, scale: tuple[float, float]) -> Tensor:
    """Boxes (B, n, 4): middle x, y and half sides, in units in which the image reaches from -1 to 1."""
    area = torch.empty(count, each).uniform_(*scale)
    ratio = torch.empty(count, each).uniform_(*map(math.log, ASPECT)).exp()
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], -1).clamp(max=1.0)
    middle = (1 - half) * (2 * torch.rand(count, each, 2) - 1)
    return torch.cat([middle, half], -1)


def _patches(count: int, each: int, scale: tuple[float, float]) -> Tensor:
    """Boxes (B, n, 4) of n different patches of a random frame."""
    frame = _crops(count, 1, scale)
    chosen = torch.rand(count, GRID**2).argsort(1)[:, :each]
    cell = torch.stack([chosen % GRID, chosen // GRID], -1)
    start = cell * STEP + SHIFT * torch.rand(count, each, 2)
    middle = frame[..., :2] + frame[..., 2:] * (2 * start + PATCH - 1)
    return torch.cat([middle, (frame[..., 2:] * PATCH).expand_as(middle)], -1)


def _cut(images: Tensor, boxes: Tensor, size: int, *, flip: bool) -> Tensor:
    """The boxes (B, n, 4) of the images, each resampled bilinearly to size x size: (B·n, C, size, size)."""
    count, each = boxes.shape[:2]
    middle, half = boxes[..., :2], boxes[..., 2:].clone()
    if flip:
        half[..., 0] *= torch.where(torch.rand(count, each, device=boxes.device) < 0.5, -1.0, 1.0)
    line = (2 * torch.arange(size, device=images.device) + 1) / size - 1
    x = middle[..., :1] + half[..., :1] * line
    y = middle[..., 1:] + half[..., 1:] * line
    # All views of an image are rows of one tall grid, so that the image is not copied for each of them.
    grid = torch.stack([x.unsqueeze(2).expand(-1, -1, size, -1), y.unsqueeze(3).expand(-1, -1, -1, size)], -1)
    cut = F.grid_sample(images, grid.flatten(1, 2), mode="bilinear", padding_mode="border", align_corners=False)
    return cut.view(count, -1, each, size, size).transpose(1, 2).flatten(0, 1)


def _jitter(images: Tensor, views: Views) -> Tensor:
    """Brightness, contrast, saturation and hue of each image changed by a factor of its own, some made grey."""
    count, channels = images.shape[:2]

    def draw(low: float, high: float, share: float, without: float) -> Tensor:
        changed = torch.rand(count, 1, 1, 1) < share
        return torch.where(changed, torch.empty(count, 1, 1, 1).uniform_(low, high), without).to(images.device)

    strength, share = views.jitter, views.jitter_share
    images = images * draw(1 - strength, 1 + strength, share, 1.0)
    mean = _grey(images).mean((2, 3), keepdim=True)
    images = mean + (images - mean) * draw(1 - strength, 1 + strength, share, 1.0)
    if channels == 3:
        grey, keep = _grey(images), draw(0.0, 0.0, views.grey_share, 1.0)
        saturation = draw(1 - strength, 1 + strength, share, 1.0) * keep
        images = grey + _turned(images - grey, draw(-strength / 4, strength / 4, share, 0.0)) * saturation
    return images.clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _turned(chroma: Tensor, turn: Tensor) -> Tensor:
    """Chroma (B, 3, H, W), colours without their grey, turned by ``turn`` (B, 1, 1, 1) of a circle (YIQ plane)."""
    yiq = chroma.new_tensor([GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    to_plane, back = yiq[1:], torch.linalg.inv(yiq)[:, 1:]
    angle = 2 * math.pi * turn.flatten()
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return torch.einsum("bij,bjhw->bihw", back @ rotation @ to_plane, chroma)


def _blur(images: Tensor, largest: float) -> Tensor:
    """A Gaussian blur of its own for each image, 0.1 to ``largest`` pixels wide; every second one stays as it is."""
    count, channels, height, width = images.shape
    sigma = torch.empty(count, 1).uniform_(min(0.1, largest), largest)
    reach = min(math.ceil(3 * largest), min(height, width) - 1)
    offsets = torch.arange(-reach, reach + 1)
    kernels = torch.exp(-offsets.square() / (2 * sigma.square()))
    kernels = kernels / kernels.sum(1, keepdim=True)
    still = torch.rand(count, 1) < 0.5
    kernels = torch.where(still, (offsets == 0).float(), kernels).to(images.device)
    kernels = kernels.repeat_interleave(channels, 0)
    flat = F.pad(images.reshape(1, count * channels, height, width), (reach,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernels.view(-1, 1, 1, 2 * reach + 1), groups=count * channels)
    flat = F.conv2d(flat, kernels.view(-1, 1, 2 * reach + 1, 1), groups=count * channels)
    return flat.view(count, channels, height, width)
