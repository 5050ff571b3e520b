"""Handwritten digits that scikit-learn ships: 1,797 images, no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lowbit.data.base import ImageData, channel_statistics, registry, stratified_split
from lowbit.preprocessing import Preprocessing


@registry.register
def digits(data_dir: Path) -> ImageData:
    """Handwritten digits 8x8, enlarged to 32x32; 10 classes, 1438 train and 359 test images.

    The split is fixed and takes a fifth of each class for the test. Source: Alpaydin & Kaynak (1998), UCI "Optical
    Recognition of Handwritten Digits", the part that `sklearn.datasets.load_digits` embeds; its pixels 0..16 become
    0..255.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    classes = tuple(str(digit) for digit in range(10))
    labels = source.target.astype(np.int64)
    small = np.round(source.images * (255 / 16)).astype(np.uint8)
    shape_only = Preprocessing("L", (32, 32), 0, (0.0,), (1.0,))
    images = np.stack([shape_only.pixels(Image.fromarray(image)) for image in small])
    train, test = stratified_split(labels, classes, fraction=0.2, seed=0)
    return ImageData(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        classes=classes,
        preprocessing=Preprocessing("L", (32, 32), 0, *channel_statistics(images[train])),
        flip=False,
    )
