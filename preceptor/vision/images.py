"""Images: read from Fashion-MNIST, scikit-learn's digits, a folder, or the hub; held in memory where they fit.

All images of a set have one size: the shorter side is resized, and the middle is cut out.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preceptor.errors import UserError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


HELD_BYTES = 1 << 30  # of pixels that are kept in memory; more are read again whenever they are needed


HELD_OUT = 0.1  # share of a set without a test part that is kept apart


THREADS = 8  # that decode files


@dataclass(frozen=True)
class Images:
    """A set of images of one size.

    ``read`` gives rows of it as uint8 (n, C, side, side); ``labels`` (N,) int64 is empty where there are none;
    ``classes`` names the labels.
    """

    count: int
    channels: int
    side: int
    read: Callable[[Sequence[int]], Tensor]
    labels: Tensor
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many."""
        return self.count

    def take(self, rows: Sequence[int]) -> Tensor:
        """Rows as float (n, C, side, side) in [0, 1]."""
        return self.read(rows).float().div_(255)

    def only(self, rows: Sequence[int]) -> Images:
        """The set of these rows alone, in this order."""
        chosen = list(rows)
        labels = self.labels[chosen] if len(self.labels) else self.labels
        return replace(self, count=len(chosen), read=lambda some: self.read([chosen[i] for i in some]), labels=labels)


def held(pixels: Tensor, labels: Tensor, classes: Sequence[str] = ()) -> Images:
    """A set in memory: pixels uint8 (N, C, side, side), labels (N,) int64 or empty."""
    return Images(
        len(pixels), pixels.shape[1], pixels.shape[-1], lambda rows: pixels[list(rows)], labels, tuple(classes)
    )


def read_images(source: str, side: int, *, limit: int = 0) -> tuple[Images, Images]:
    """Images to learn from and images to be examined on.

    Args:
        source: ``fashion-mnist`` (Debian's ``dataset-fashion-mnist``, or the folder of its four files), ``digits``
            (scikit-learn's, 60 to 40), a folder of images (folders in it are classes; ``train`` and ``test`` or
            ``val`` folders are parts), or a data set's name on the hub. Empty: Fashion-MNIST where it is installed,
            digits otherwise.
        side: pixels a side.
        limit: at most so many to learn from, drawn once and for all; 0 is all.

    Raises:
        UserError: there is no such set, or no image in it; the limit is below 0.
    """
    if limit < 0:
        raise UserError(f"The limit is {limit} images: give 1 or more, or 0 for all.")
    if source in ("", "fashion-mnist") and (FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file():
        parts = _fashion(FASHION_MNIST, side)
    elif source == "fashion-mnist":
        raise UserError(f"{FASHION_MNIST} is not there: `apt install dataset-fashion-mnist`, or name another set.")
    elif source in ("", "digits"):
        parts = _digits(side)
    elif (Path(source) / "train-images-idx3-ubyte.gz").is_file():
        parts = _fashion(Path(source), side)
    elif Path(source).is_dir():
        parts = read_folder(Path(source), side)
    else:
        parts = _hub(source, side)
    lessons, exam = parts
    if not limit or limit >= len(lessons):
        return lessons, exam
    return lessons.only(np.random.default_rng(0).permutation(len(lessons))[:limit].tolist()), exam


def read_folder(folder: Path, side: int) -> tuple[Images, Images]:
    """Images in files: a class a folder, or no classes; parts as ``train`` and ``test``, ``val`` or ``validation``.

    Raises:
        UserError: there is no image, or a class that ``train`` has not.
    """
    parts = {path.name: path for path in folder.iterdir() if path.is_dir()}
    test = next((parts[name] for name in ("test", "val", "validation") if name in parts), None)
    if "train" in parts:
        lessons = _files(parts["train"], side)
        return (lessons, _files(test, side, lessons.classes)) if test else _split(lessons)
    return _split(_files(folder, side))


def from_dataset(data: Any, side: int) -> tuple[Images, Images]:
    """A ``datasets.DatasetDict`` or ``Dataset`` with an image column, and a label column where there is one.

    The part to be examined on is ``test``, or ``validation`` where the labels of ``test`` are withheld (-1).

    Raises:
        UserError: no column holds images.
    """
    if not hasattr(data, "keys"):
        return _split(_rows(data, side))
    names = list(data.keys())
    first = "train" if "train" in names else names[0]
    others = [name for name in ("test", "validation", "val") if name in names and name != first]
    test = next((name for name in others if not _withheld(data[name])), None)
    lessons = _rows(data[first], side)
    return (lessons, _rows(data[test], side)) if test else _split(lessons)


def _fashion(folder: Path, side: int) -> tuple[Images, Images]:
    parts = []
    for name in ("train", "t10k"):
        pixels = _idx(folder / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
        labels = _idx(folder / f"{name}-labels-idx1-ubyte.gz", 8)
        parts.append(held(_resized(torch.from_numpy(pixels), side), torch.from_numpy(labels).long(), GARMENTS))
    return parts[0], parts[1]


def _idx(path: Path, header: int) -> np.ndarray:
    try:
        with gzip.open(path) as file:
            return np.frombuffer(bytearray(file.read()), dtype=np.uint8, offset=header)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): install dataset-fashion-mnist again.") from error


def _digits(side: int) -> tuple[Images, Images]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = torch.from_numpy(data.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    first, second = train_test_split(np.arange(len(labels)), test_size=0.4, stratify=data.target, random_state=0)
    pixels, classes = _resized(pixels, side), tuple(map(str, range(10)))
    return held(pixels[first], labels[first], classes), held(pixels[second], labels[second], classes)


def _resized(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-1] == side:
        return pixels
    resized = F.interpolate(pixels.float(), size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _files(folder: Path, side: int, of: Sequence[str] = ()) -> Images:
    """The images in a folder; their classes are numbered as in ``of`` where it names any."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no image: give a folder of {', '.join(sorted(SUFFIXES))} files.")
    names = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    classes = sorted({name for name in names if name})
    if of and (unknown := next((name for name in classes if name not in of), "")):
        raise UserError(f'{folder} has the class "{unknown}", which the images to learn from have not: remove it.')
    known = all(names) and (bool(of) or len(classes) > 1)
    classes = list(of) or classes
    labels = torch.tensor([classes.index(name) for name in names] if known else [], dtype=torch.int64)

    def decode(row: int) -> Any:
        from PIL import Image

        try:
            with Image.open(paths[row]) as image:
                return image.copy()
        except OSError as error:
            raise UserError(f"{paths[row]} is not an image that can be read ({error}): mend or remove it.") from error

    return _decoded(len(paths), decode, side, labels, tuple(classes) if known else ())


def _rows(data: Any, side: int) -> Images:
    kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
    column = next((name for name, kind in kinds.items() if kind == "Image"), None)
    if column is None:
        raise UserError(f"The data set has no column of images: it has {', '.join(kinds)}.")
    label = _label(data)
    labels = torch.tensor(data[label] if label else [], dtype=torch.int64)
    classes = tuple(data.features[label].names) if label else ()
    return _decoded(len(data), lambda row: data[row][column], side, labels, classes)


def _label(data: Any) -> str | None:
    """The column of labels."""
    return next((name for name, feature in data.features.items() if type(feature).__name__ == "ClassLabel"), None)


def _withheld(data: Any) -> bool:
    """Whether labels are missing, which the hub writes as -1."""
    label = _label(data)
    return label is not None and min(data[label], default=0) < 0


def _decoded(count: int, decode: Callable[[int], Any], side: int, labels: Tensor, classes: tuple[str, ...]) -> Images:
    """A set whose images are decoded when they are asked for, or at once where all of them fit into memory."""
    channels = 1 if decode(0).mode in ("1", "L", "I;16") else 3

    def one(row: int) -> Tensor:
        return _square(decode(int(row)), side, channels)

    def read(rows: Sequence[int]) -> Tensor:
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack(list(pool.map(one, rows)))

    if count * channels * side**2 <= HELD_BYTES:
        return held(read(range(count)), labels, classes)
    return Images(count, channels, side, read, labels, classes)


def _square(image: Any, side: int, channels: int) -> Tensor:
    """The middle of a PIL image, its shorter side resized: uint8 (C, side, side)."""
    if image.mode.startswith("I;16"):  # conversion would cut all above 255 off
        image = image.convert("I").point(lambda value: value / 257)
    image = image.convert("RGB" if channels == 3 else "L")
    shrink = side / min(image.size)
    image = image.resize([max(side, round(length * shrink)) for length in image.size], resample=2, reducing_gap=3.0)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels.reshape(side, side, channels).copy()).permute(2, 0, 1)


def _split(images: Images) -> tuple[Images, Images]:
    if len(images) < 2:
        raise UserError("There is one image: give at least one to learn from and one to be examined on.")
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    size = max(1, round(HELD_OUT * len(images)))
    return images.only(order[size:]), images.only(order[:size])


def _hub(name: str, side: int) -> tuple[Images, Images]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise UserError(f'"{name}" is no folder, and the hub needs `pip install "preceptor[text]"`.') from error
    path, _, configuration = name.partition(":")
    try:
        data = load_dataset(path, configuration or None)
    except Exception as error:  # the hub raises a dozen kinds
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f'"{name}" is no set of images ({reason}): choose fashion-mnist, digits, a folder of images, or a name on '
            "the hub."
        ) from error
    return from_dataset(data, side)
