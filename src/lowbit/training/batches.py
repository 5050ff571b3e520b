"""Batches out of memory: bytes until the last moment, order and augmentation drawn from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lowbit.data.augment import cutout, random_crop_flip
from lowbit.data.base import Labels
from lowbit.preprocessing import Pixels, Preprocessing

Batch = tuple[Tensor, Tensor]


def derived_seed(*parts: int) -> int:
    """A 64-bit seed from several integers; different integers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Normalise:
    """`Preprocessing.normalise` on tensors: (N, H, W, C) uint8 to (N, C, H, W) float32, channels last in memory."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self.scale, self.shift = (torch.from_numpy(each).to(device) for each in preprocessing.scale_and_shift)

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).mul_(self.scale).sub_(self.shift).permute(0, 3, 1, 2)


class TrainBatches:
    """Shuffled, augmented batches of one epoch. Set ``epoch`` before iterating.

    All batches have one size: the images left over sit this epoch out (another order brings them back in the next),
    so that batch norm never sees a batch of one.

    Args:
        images, labels: uint8 (N, H, W, C) and int64 (N,).
        preprocessing: gives the normalisation.
        batch_size: images in a batch; fewer when there are not as many.
        seed: of the run.
        augment: crop at random, and flip if ``flip``.
        device: where the images are kept and the batches are made.
        crop: pixels of padding around an image that is cropped.
        cutout: side of a square that is cleared in each image, in pixels; 0 clears nothing.

    Yields:
        Inputs (B, C, H, W) float32 and labels (B,).
    """

    def __init__(
        self,
        images: Pixels,
        labels: Labels,
        preprocessing: Preprocessing,
        batch_size: int,
        seed: int,
        augment: bool,
        flip: bool,
        device: torch.device,
        crop: int = 4,
        cutout: int = 0,
    ) -> None:
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.normalise = Normalise(preprocessing, device)
        self.crop = crop
        self.cutout = cutout
        self.batch_size = min(batch_size, len(images))
        self.seed = seed
        self.augment = augment
        self.flip = flip
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch, 1))
        order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        for indices in order[: len(self) * self.batch_size].view(-1, self.batch_size):
            pixels = self.images[indices]
            if self.augment:
                pixels = random_crop_flip(pixels, generator, self.crop, self.flip)
            inputs = self.normalise(pixels)
            if self.cutout:
                cutout(inputs, generator, self.cutout)
            yield inputs, self.labels[indices]


class EvalBatches:
    """All images in order, in batches of at most ``batch_size``; otherwise like `TrainBatches`."""

    def __init__(
        self, images: Pixels, labels: Labels, preprocessing: Preprocessing, batch_size: int, device: torch.device
    ) -> None:
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.normalise = Normalise(preprocessing, device)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.normalise(self.images[part]), self.labels[part]
