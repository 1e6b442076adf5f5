"""Visual words: a vocabulary of local features that renews itself, bags of its words, and a head that follows it.

Source: OBoW, online bag-of-visual-words generation (Gidaris et al., CVPR 2021), https://arxiv.org/abs/2012.11552,
section 3. Shapes: images B, channels D, words K, positions u of a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from preceptor.errors import UserError

Assignment = Literal["soft", "hard"]


Pooling = Literal["max", "average"]


SMALLEST_MAP = 5  # one pixel of border at each side, and 3x3 averages of what is left


DECAY = 0.99  # of the running mean of the smallest distance


CHUNK_BYTES = 4 << 20  # of distances that are made at a time: they stay in the processor's cache


HELD_BYTES = 256 << 20  # of distances that are kept for the codes; those of further images are computed twice


class VisualWords(nn.Module):
    """The vocabulary of one feature level: a queue of K words of width D, and the scale of distances to them.

    Buffers, which belong into a checkpoint: ``words`` (K, D), ``oldest`` (the row that is replaced next, int64) and
    ``distance`` (m, the running mean of the squared distance to the nearest word).

    Args:
        count: K.
        width: D, channels of the feature map.
        inv_delta: inverse temperature 1/δ of soft codes, relative to the running distance.
        assignment: ``soft`` codes, or ``hard`` ones (1 at the nearest word).
        pooling: how the codes of an image's positions become one bag.
        renewed: False keeps the first, random words for ever (a control).

    Raises:
        UserError: fewer than two words, or an ``inv_delta`` that is not above 0.
    """

    words: Tensor
    oldest: Tensor
    distance: Tensor

    def __init__(
        self,
        count: int,
        width: int,
        *,
        inv_delta: float = 15.0,
        assignment: Assignment = "soft",
        pooling: Pooling = "max",
        renewed: bool = True,
    ) -> None:
        super().__init__()
        if count < 2:
            raise UserError(f"A vocabulary of {count} visual words tells nothing apart: choose at least 2.")
        if not inv_delta > 0:
            raise UserError(f"inv_delta is {inv_delta}: it must be above 0.")
        self.inv_delta, self.assignment, self.pooling, self.renewed = inv_delta, assignment, pooling, renewed
        self.register_buffer("words", torch.randn(count, width).clamp_(min=0))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self.register_buffer("distance", torch.full((), 0.5))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """The bags of images (B, K), rows that sum to 1, of the teacher's feature maps (B, D, h, w).

        In training mode, in this order: distances to the words as they are, the running distance moves, the words are
        renewed, and codes are made of the same distances with the moved scale.

        Raises:
            UserError: the map is smaller than 5x5, or of another width than the words.
        """
        _check_map(features, self.words)
        inner = features[:, :, 1:-1, 1:-1].float()
        rows = inner.flatten(2).transpose(1, 2).contiguous()
        # A queue that is renewed in place would change the words under the distances that are computed twice.
        words = self.words.clone() if self.training and self.renewed else self.words
        held, nearest = _distances(rows, words)
        if self.training:
            smallest = (nearest + rows.square().sum(-1)).mean()
            self.distance.lerp_(_gathered(smallest.view(1)).mean(), 1 - DECAY)
            if self.renewed:
                self._renew(_gathered(_local_features(inner)))
        bags = rows.new_empty(len(rows), len(words))
        scale = self.inv_delta / float(self.distance)
        for there, distances in held:
            codes = self._codes(distances, nearest[there].view(-1, 1), scale).view(-1, rows.shape[1], len(words))
            bags[there] = codes.amax(1) if self.pooling == "max" else codes.mean(1)
        return bags.div_(bags.sum(1, keepdim=True))

    def _codes(self, distances: Tensor, nearest: Tensor, scale: float) -> Tensor:
        """Rows of codes in place of rows of distances (positions, K); each distance lacks the same ‖a‖² of its row."""
        if self.assignment == "hard":
            return torch.zeros_like(distances).scatter_(1, distances.argmin(1, keepdim=True), 1.0)
        codes = distances.sub_(nearest).mul_(-scale).exp_()
        return codes.div_(codes.sum(1, keepdim=True))

    def _renew(self, features: Tensor) -> None:
        """Puts features (N, D) in place of the oldest words; the queue goes on at its start where it ends."""
        newest = features[-len(self.words) :]
        places = (self.oldest + torch.arange(len(newest), device=newest.device)) % len(self.words)
        self.words[places] = newest
        self.oldest.copy_((self.oldest + len(newest)) % len(self.words))


class Vocabularies(nn.Module):
    """A vocabulary for each of several feature levels.

    Args:
        levels: the channels of each level, by its name.
        count: K, words of a level.
        inv_delta: see `VisualWords`, as are the others.
        assignment: soft or hard codes.
        pooling: max or average.
        renewed: whether words are ever replaced.
    """

    def __init__(
        self, levels: Mapping[str, int], count: int, *, inv_delta: float = 15.0, assignment: Assignment = "soft",
        pooling: Pooling = "max", renewed: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.levels = tuple(levels)
        self.of_level = nn.ModuleList(
            VisualWords(count, width, inv_delta=inv_delta, assignment=assignment, pooling=pooling, renewed=renewed)
            for width in levels.values()
        )

    def of(self, level: str) -> VisualWords:
        """One level's vocabulary."""
        found = self.of_level[self.levels.index(level)]
        assert isinstance(found, VisualWords)
        return found

    def now(self) -> list[Tensor]:
        """The words (K, D_l) of each level as they are; the next bags renew them in place."""
        return [self.of(level).words for level in self.levels]

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The bags (B, K) of each level, of the teacher's maps of all levels; see `VisualWords.forward`."""
        return {level: self.of(level)(maps[level]) for level in self.levels}


def _check_map(features: Tensor, words: Tensor) -> None:
    if features.dim() != 4 or min(features.shape[2:]) < SMALLEST_MAP:
        shape = "x".join(map(str, features.shape[2:]))
        raise UserError(
            f"A feature map of {shape} is too small for visual words: they need {SMALLEST_MAP}x{SMALLEST_MAP} or more, "
            "so choose an earlier level or larger images."
        )
    if features.shape[1] != words.shape[1]:
        raise UserError(f"The feature map has {features.shape[1]} channels and the words {words.shape[1]}.")


def _distances(rows: Tensor, words: Tensor) -> tuple[Iterator[tuple[slice, Tensor]], Tensor]:
    """‖v_k‖² - 2 a·v_k for positions a of rows (B, u, D), chunk by chunk of images, and its minimum over k, (B, u).

    The squared distance but for ‖a‖², which no code depends on. What is beyond ``HELD_BYTES`` is computed again when
    the iterator comes to it.
    """
    squares, positions = words.square().sum(1), rows.shape[1]
    size = max(1, CHUNK_BYTES // (4 * positions * len(words)))
    places = [slice(start, start + size) for start in range(0, len(rows), size)]
    room = HELD_BYTES // (4 * positions * len(words) * size)

    def of(there: slice) -> Tensor:
        return torch.addmm(squares, rows[there].flatten(0, 1), words.T, alpha=-2)

    nearest, held = rows.new_empty(rows.shape[:2]), dict[int, Tensor]()
    for number, there in enumerate(places):
        distances = of(there)
        nearest[there] = distances.amin(1).view(-1, positions)
        if number < room:
            held[number] = distances
    parts = ((there, held.pop(number) if number in held else of(there)) for number, there in enumerate(places))
    return parts, nearest


def _local_features(inner: Tensor) -> Tensor:
    """One 3x3 average of each image's map (B, D, h, w), at a random place: (B, D)."""
    averages = F.avg_pool2d(inner, 3, stride=1).flatten(2)
    places = torch.randint(averages.shape[2], (len(averages),), device=averages.device)
    return averages[torch.arange(len(averages), device=averages.device), :, places]


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes, which may have different numbers of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    most = int(max(counts))
    padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, most - len(rows))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])


class DynamicHead(nn.Module):
    """Predicts bags of words whose vocabulary moves: the weights are generated from the words themselves.

    For each level, W = g(V) with g: L2-normalise rows, linear without bias to 2D, batch norm over the K words, ReLU,
    linear to D, L2-normalise; logits = κ f Wᵀ for a student's pooled feature f, which is not normalised.

    Args:
        widths: channels D_l of each level's words.
        width: D, of the student's feature.
        kappa: κ, the fixed length of each word's weights.

    Raises:
        UserError: ``kappa`` is not above 0.
    """

    def __init__(self, widths: Sequence[int], width: int, *, kappa: float = 8.0) -> None:
        super().__init__()
        if not kappa > 0:
            raise UserError(f"kappa is {kappa}: it must be above 0.")
        self.kappa = kappa
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Linear(channels, 2 * width, bias=False),
                nn.BatchNorm1d(2 * width),
                nn.ReLU(inplace=True),
                nn.Linear(2 * width, width),
            )
            for channels in widths
        )

    def forward(self, features: Sequence[Tensor], vocabularies: Sequence[Tensor]) -> list[list[Tensor]]:
        """Logits (N, K_l) by view type and level, of each view type's features (N, D) and each level's words (K, D)."""
        weights = [
            F.normalize(generate(F.normalize(words, dim=1)), dim=1)
            for generate, words in zip(self.generators, vocabularies)
        ]
        return [[(self.kappa * feature) @ weight.T for weight in weights] for feature in features]


def bag_divergence(bags: Tensor, logits: Tensor) -> Tensor:
    """KL(y ‖ softmax(logits)) of each image, the mean over its views: (B,), in nats.

    Args:
        bags: y (B, K), the images' bags; they carry no gradient.
        logits: (B·n, K), n views of each image, those of one image one after the other.

    Raises:
        UserError: the number of predictions is no multiple of the number of images, or K differs.
    """
    if len(logits) == 0 or len(logits) % len(bags) or logits.shape[1] != bags.shape[1]:
        raise UserError(
            f"Predictions of shape {tuple(logits.shape)} do not fit bags of shape {tuple(bags.shape)}: give as many "
            "views of each image, one image after the other, over the same words."
        )
    views = logits.view(len(bags), -1, logits.shape[1])
    cross = torch.einsum("bk,bnk->bn", bags, views) - views.logsumexp(-1)
    entropy: Tensor = torch.special.entr(bags).sum(1)
    return -entropy - cross.mean(1)


def perplexities(bags: Tensor) -> tuple[float, float]:
    """How many words a batch uses, exp H(mean of y), and how many an image does, the mean of exp H(y); y (B, K)."""

    def perplexity(shares: Tensor) -> Tensor:
        entropy: Tensor = torch.special.entr(shares).sum(-1)
        return entropy.exp()

    return float(perplexity(bags.mean(0))), float(perplexity(bags).mean())


class VocabularyWatch:
    """Sees the perplexities of each step and stops a run whose bags have lost their meaning, with a clear word.

    A vocabulary has collapsed when a batch uses fewer than two of its words, and is uniform when an image uses nine
    tenths of them, for ``PATIENCE`` steps after the first, random words have been replaced once.
    """

    PATIENCE = 50

    def __init__(self, words: int, batch: int) -> None:
        self.words, self.first = words, math.ceil(words / batch)
        self.seen: dict[str, int] = {}
        self.bad: dict[str, int] = {}

    def see(self, level: str, batch: float, image: float, distance: float) -> None:
        """Counts one step of one level.

        Raises:
            UserError: the level has collapsed, or its codes are uniform.
        """
        collapsed, uniform = batch < 2, image > 0.9 * self.words
        self.seen[level] = self.seen.get(level, 0) + 1
        wrong = self.seen[level] > self.first and (collapsed or uniform)
        self.bad[level] = self.bad.get(level, 0) + 1 if wrong else 0
        if self.bad[level] < self.PATIENCE:
            return
        figures = f"batch perplexity {batch:.1f}, image perplexity {image:.1f} of {self.words} words, m {distance:.3g}"
        if collapsed:
            raise UserError(
                f"The visual words of {level} have collapsed, every image gets the same one ({figures}): lower the "
                "learning rate or raise inv_delta."
            )
        raise UserError(f"The codes of {level} are uniform and tell nothing ({figures}): raise inv_delta.")

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The counts."""
        return {"seen": dict(self.seen), "bad": dict(self.bad)}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        """Takes the counts back."""
        self.seen, self.bad = dict(state["seen"]), dict(state["bad"])
