"""Images from every source: their size, their labels, their parts, and what is said when there are none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from preceptor.errors import UserError
from preceptor.vision import images as module
from preceptor.vision.images import FASHION_MNIST, from_dataset, read_folder, read_images

Image = pytest.importorskip("PIL.Image")


def write(path: Path, shade: int, size: tuple[int, int] = (20, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 0)).save(path)


def test_digits_are_split_alike_by_every_seed() -> None:
    lessons, exam = read_images("digits", 16)
    assert (len(lessons), len(exam)) == (1078, 719)
    assert lessons.classes == tuple("0123456789")
    some = lessons.take([0, 5])
    assert some.shape == (2, 1, 16, 16)
    assert 0 <= float(some.min()) < float(some.max()) <= 1
    fewer, same = read_images("digits", 16, limit=50)
    again, _ = read_images("digits", 16, limit=50)
    assert len(fewer) == 50
    assert torch.equal(fewer.labels, again.labels)
    assert torch.equal(fewer.take(range(50)), again.take(range(50)))
    assert torch.equal(same.labels, exam.labels)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_what_it_is_known_to_be() -> None:
    lessons, exam = read_images("", 28)
    assert (len(lessons), len(exam)) == (60_000, 10_000)
    assert torch.bincount(lessons.labels).tolist() == [6000] * 10
    assert torch.bincount(exam.labels).tolist() == [1000] * 10
    assert lessons.classes[int(lessons.labels[0])] == "ankle boot"
    mean = float(lessons.take(range(len(lessons))).mean())
    assert mean == pytest.approx(0.286, abs=0.001)  # as its authors give it


@pytest.mark.parametrize("held", [True, False])
def test_a_folder_of_classes_and_parts(tmp_path: Path, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not held:
        monkeypatch.setattr(module, "HELD_BYTES", 0)
    for part, count in (("train", 3), ("val", 2)):
        for label, shade in (("cat", 50), ("dog", 200)):
            for number in range(count):
                write(tmp_path / part / label / f"{number}.png", shade, (20 + number, 30))
    lessons, exam = read_images(str(tmp_path), 16)
    assert lessons.classes == ("cat", "dog")
    assert lessons.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert exam.labels.tolist() == [0, 0, 1, 1]
    some = lessons.take([0, 5])
    assert some.shape == (2, 3, 16, 16)
    assert some[0, 0].unique().tolist() == pytest.approx([50 / 255])
    assert some[1, 0].unique().tolist() == pytest.approx([200 / 255])
    assert torch.equal(lessons.only([5, 1]).take([0]), lessons.take([5]))
    assert lessons.only([5, 1]).labels.tolist() == [1, 0]


def test_a_folder_without_classes_has_no_labels_and_is_split(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / f"{number}.jpg", number, mode="L")
    lessons, exam = read_folder(tmp_path, 8)
    assert (len(lessons), len(exam), lessons.channels) == (18, 2, 1)
    assert len(lessons.labels) == len(lessons.classes) == 0


def test_the_middle_of_an_image_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    for number in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    lessons, _ = read_folder(tmp_path, 10)
    assert float(lessons.take([0]).min()) == 1.0


def test_classes_have_the_numbers_of_the_part_to_learn_from(tmp_path: Path) -> None:
    for place in ("train/a/1", "train/b/1", "train/c/1", "test/b/1", "test/c/1"):
        write(tmp_path / f"{place}.png", 5)
    lessons, exam = read_folder(tmp_path, 8)
    assert exam.classes == lessons.classes == ("a", "b", "c")
    assert exam.labels.tolist() == [1, 2]
    write(tmp_path / "test" / "d" / "1.png", 5)
    with pytest.raises(UserError, match='has the class "d"'):
        read_folder(tmp_path, 8)


def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path: Path) -> None:
    for number in range(2):
        Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)).save(tmp_path / f"{number}.png")
    assert read_folder(tmp_path, 2)[0].read([0]).flatten().tolist() == [0, 100, 200, 255]


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="limit is -5"):
        read_images("digits", 8, limit=-5)


def test_a_part_without_labels_is_no_exam() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["red", "black"])})
    image = Image.new("L", (8, 8))
    data = {
        part: datasets.Dataset.from_dict({"picture": [image] * 2, "label": [label] * 2}, features=features)
        for part, label in (("train", 0), ("validation", 1), ("test", -1))
    }
    assert from_dataset(datasets.DatasetDict(data), 8)[1].labels.tolist() == [1, 1]


def test_a_data_set_of_the_hub_brings_its_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["red", "black"])})
    rows = {"picture": [Image.new("RGB", (12, 9), (255 * (i % 2), 0, 0)) for i in range(6)], "label": [1, 0] * 3}
    data = datasets.Dataset.from_dict(rows, features=features)
    lessons, exam = from_dataset(datasets.DatasetDict({"train": data, "test": data.select(range(2))}), 8)
    assert (len(lessons), len(exam)) == (6, 2)
    assert lessons.classes == ("red", "black")
    assert lessons.labels.tolist() == [1, 0] * 3
    assert lessons.take([1])[0, 0].min() == 1.0
    alone, rest = from_dataset(data, 8)
    assert len(alone) + len(rest) == 6
    with pytest.raises(UserError, match="no column of images"):
        from_dataset(datasets.Dataset.from_dict({"text": ["a", "b"]}), 8)


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="holds no image"):
        read_images(str(tmp_path), 8)
    write(tmp_path / "one.png", 5)
    with pytest.raises(UserError, match="There is one image"):
        read_images(str(tmp_path), 8)
    (tmp_path / "two.png").write_text("no image")
    with pytest.raises(UserError, match=r"two\.png is not an image"):
        read_images(str(tmp_path), 8)
    with pytest.raises(UserError, match="is no set of images"):
        read_images("nobody/such-images", 8)
    monkeypatch.setattr(module, "FASHION_MNIST", tmp_path / "nowhere")
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        read_images("fashion-mnist", 28)
    assert len(read_images("", 8)[0]) == 1078
