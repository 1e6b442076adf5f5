"""A picture of visual words: for each of the words most used, the image patches that lie nearest to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from preceptor.files import write_whole
from preceptor.methods.obow.visual_words import VisualWords
from preceptor.vision.images import Images

WORDS, NEAREST = 20, 12  # rows and columns of the picture


PIXELS, GAP = 36, 3  # a side of a patch, and between two


SHOWN = 1000  # images that are searched


BATCH = 100


LEAST = 0.25  # share of the image's side that a patch shows at least


@torch.no_grad()
def draw_words(
    path: Path,
    level: str,
    vocabulary: VisualWords,
    maps: Callable[[Tensor], dict[str, Tensor]],
    images: Images,
    view: Callable[[Tensor], Tensor],
) -> None:
    """Write a PNG, a row a word, and its caption beside it (``.txt``), as a run's page shows them.

    Args:
        path: of the picture; its folder is made.
        level: name of the feature level.
        vocabulary: its words.
        maps: the teacher, which gives maps of images.
        images: where patches are looked for; one of an image at most for each word.
        view: what the teacher is shown of images.
    """
    from PIL import Image

    seen = view(images.take(range(min(SHOWN, len(images)))))
    far, place, use, side = _search(vocabulary, lambda some: maps(some)[level], seen)
    words = use.argsort(descending=True)[:WORDS]
    nearest = far[:, words].topk(min(NEAREST, len(seen)), dim=0, largest=False).indices.T.tolist()
    canvas = torch.full((3, len(words) * (PIXELS + GAP) + GAP, NEAREST * (PIXELS + GAP) + GAP), 1.0)
    for row, (word, found) in enumerate(zip(words.tolist(), nearest)):
        for column, image in enumerate(found):
            top, left = (GAP + number * (PIXELS + GAP) for number in (row, column))
            cut = _patch(seen[image], int(place[image, word]), side)
            canvas[:, top : top + PIXELS, left : left + PIXELS] = cut
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((canvas * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    share = use[words].sum() / use.sum()
    write_whole(
        path.with_suffix(".txt"),
        f"Visual words of {level}: the {len(words)} that are used most, {100 * float(share):.0f} % of all use, a row "
        f"each, with the patches of {len(seen):,} images nearest to it.\n",
    )


def _search(
    vocabulary: VisualWords, maps: Callable[[Tensor], Tensor], seen: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Distance (N, K) of each image's nearest position to each word, that position, each word's use, the map's side."""
    mode = vocabulary.training
    vocabulary.eval()
    device, far, place = vocabulary.words.device, [], []
    use, side = torch.zeros(len(vocabulary.words)), 0
    for start in range(0, len(seen), BATCH):
        features = maps(seen[start : start + BATCH].to(device)).float()
        side = features.shape[-1]
        rows = features[:, :, 1:-1, 1:-1].flatten(2).transpose(1, 2).contiguous()
        least = torch.cdist(rows, vocabulary.words.expand(len(rows), -1, -1)).min(1)
        far.append(least.values.cpu())
        place.append(least.indices.cpu())
        use += vocabulary(features).sum(0).cpu()
    vocabulary.train(mode)
    return torch.cat(far), torch.cat(place), use, side


def _patch(image: Tensor, position: int, side: int) -> Tensor:
    """What an image (C, S, S) shows around an inner position of a map with ``side`` positions a side: (3, 36, 36)."""
    row, column = divmod(position, side - 2)
    size = image.shape[-1]
    reach = max(2, round(size * max(LEAST, 3 / side)))
    top, left = (min(max(0, round(size * (at + 1.5) / side - reach / 2)), size - reach) for at in (row, column))
    cut = image[:, top : top + reach, left : left + reach].unsqueeze(0)
    return F.interpolate(cut, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)[0].expand(3, -1, -1)
