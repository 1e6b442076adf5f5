"""What a picture shows, read back from its pixels."""

from pathlib import Path

import numpy as np
from PIL import Image


def look(path: Path, colours: int = 2) -> None:
    """Fails unless a PNG opens, is large enough to read, is drawn on, not cut off, and uses some colours beside grey.

    Args:
        path: the picture.
        colours: saturated colours that must each cover some pixels: one a line, bar or series.
    """
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    height, width, _ = pixels.shape
    assert width >= 300, f"{path.name} is {width} pixels wide"
    assert height >= 150, f"{path.name} is {height} pixels high"
    ground = pixels[0, 0]
    ink = (np.abs(pixels - ground) > 24).any(-1)
    assert 0.002 < ink.mean() < 0.9, f"{path.name}: {ink.mean():.1%} of its pixels are drawn"
    frame = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    assert frame.mean() < 0.01, f"{path.name} is cut off at its edge"
    spread = pixels.max(-1) - pixels.min(-1)
    saturated = pixels[spread > 60] // 32
    seen, counts = np.unique(saturated, axis=0, return_counts=True) if len(saturated) else (saturated, np.array([]))
    assert (counts > 20).sum() >= colours, f"{path.name} shows {(counts > 20).sum()} colours: {seen.tolist()}"
