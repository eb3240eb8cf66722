"""Image classification: a small vision transformer, a base trained on three tasks and experts for four other ones.

All images are generated: 16 x 16 pixels with noise, and six classes per task. Every task has its own kind of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.quality.training import Batch, Suite, TransformerBlock

SIZE, PATCH, CLASSES, WIDTH, LAYERS = 16, 4, 6, 64, 2
NOISE = 0.3

# Pixel coordinates from -1 to 1, (SIZE, SIZE).
Y, X = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")

Draw = Callable[..., Tensor]  # uniform(low, high): a number for each image, (n, 1, 1)
Paint = Callable[[Tensor, Draw], Tensor]  # images (n, SIZE, SIZE) of the classes (n, 1, 1)


def stripes(label: Tensor, uniform: Draw) -> Tensor:
    """Tell the angle of stripes."""
    angle = label * math.pi / CLASSES
    return torch.sin(uniform(6, 11) * (X * angle.cos() + Y * angle.sin()) + uniform(0, 2 * math.pi))


def shapes(label: Tensor, uniform: Draw) -> Tensor:
    """Tell the outline: disc, square, diamond, ring, upright cross, diagonal cross."""
    x, y, radius = (X - uniform(-0.3, 0.3)).abs(), (Y - uniform(-0.3, 0.3)).abs(), uniform(0.45, 0.65)
    distance, side = (x**2 + y**2).sqrt(), torch.maximum(x, y)
    outlines = [
        distance < radius, side < 0.9 * radius, x + y < 1.2 * radius, (distance - radius).abs() < 0.13,
        (torch.minimum(x, y) < 0.13) & (side < radius), ((x - y).abs() < 0.18) & (side < radius),
    ]  # fmt: skip
    return 2 * torch.stack(outlines).float().gather(0, label.long().expand(1, -1, SIZE, SIZE))[0] - 1


def spots(label: Tensor, uniform: Draw) -> Tensor:
    """Tell the place of a bright spot, on a grid of two rows and three columns."""
    x = 0.65 * (label % 3 - 1) + uniform(-0.2, 0.2)
    y = (label // 3) - 0.5 + uniform(-0.25, 0.25)
    return 2.5 * torch.exp(-((X - x) ** 2 + (Y - y) ** 2) / uniform(0.03, 0.08))


def rings(label: Tensor, uniform: Draw) -> Tensor:
    """Tell the distance between concentric rings."""
    distance = ((X - uniform(-0.4, 0.4)) ** 2 + (Y - uniform(-0.4, 0.4)) ** 2).sqrt()
    return torch.sin((5 + 2.5 * label) * distance + uniform(0, 2 * math.pi))


def bars(label: Tensor, uniform: Draw) -> Tensor:
    """Tell the width of an upright dark bar."""
    return 1 - 2 * ((X - uniform(-0.3, 0.3)).abs() < 0.09 + 0.11 * label).float()


def ramps(label: Tensor, uniform: Draw) -> Tensor:
    """Tell in which direction it gets brighter."""
    angle = 2 * math.pi * (label + uniform(-0.3, 0.3)) / CLASSES
    return uniform(0.7, 1.5) * (X * angle.cos() + Y * angle.sin()) + uniform(-0.5, 0.5)


def quadrants(label: Tensor, uniform: Draw) -> Tensor:
    """Tell which two of the four quadrants are bright."""
    bright = torch.tensor([(1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1)])
    below, right = Y - uniform(-0.3, 0.3) > 0, X - uniform(-0.3, 0.3) > 0
    place = 2 * below.long() + right.long()
    return uniform(0.5, 1.2) * (2 * bright[label.long(), place].float() - 1)


SOURCES: tuple[Paint, ...] = (stripes, shapes, spots)
TASKS: dict[str, Paint] = {"rings": rings, "bars": bars, "ramps": ramps, "quadrants": quadrants}


class VisionTransformer(nn.Module):
    """A small transformer on patches of an image; the mean over patches is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH**2, WIDTH)
        self.positions = nn.Embedding((SIZE // PATCH) ** 2, WIDTH)
        nn.init.normal_(self.positions.weight, std=0.1)
        self.blocks = nn.Sequential(*(TransformerBlock(WIDTH, 4, causal=False) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, SIZE, SIZE) to logits (n, CLASSES)."""
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        x = self.blocks(self.patches(patches) + self.positions.weight)
        return self.head(self.norm(x).mean(1))


def images(paint: Paint, count: int, generator: torch.Generator) -> Batch:
    """Draw images (count, SIZE, SIZE) of one task, and their classes (count,)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = NOISE * torch.randn(count, SIZE, SIZE, generator=generator)
    return paint(labels[:, None, None], uniform) + noise, labels


def build(seed: int, quick: bool) -> Suite:
    """Make the suite; `quick` trains far less, for tests."""
    training, validation, test = (torch.Generator().manual_seed(1000 * seed + stream) for stream in range(3))

    def base_batch() -> Batch:
        parts = [images(paint, 24, training) for paint in SOURCES]
        return torch.cat([drawn for drawn, _ in parts]), torch.cat([labels for _, labels in parts])

    return Suite(
        model=VisionTransformer,
        base_batch=base_batch,
        task_batches={name: lambda paint=paint: images(paint, 48, training) for name, paint in TASKS.items()},
        validation={name: images(paint, 20 if quick else 100, validation) for name, paint in TASKS.items()},
        test={name: images(paint, 20 if quick else 500, test) for name, paint in TASKS.items()},
        base_steps=6 if quick else 500,
        expert_steps=4 if quick else 150,
        peak_rate=3e-3,
        expert_rate=1e-3,
    )
