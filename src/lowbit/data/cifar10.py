"""CIFAR-10: torchvision's layout and download, or a folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lowbit.data.base import ImageData, Labels, registry
from lowbit.errors import LowbitError
from lowbit.preprocessing import Pixels, Preprocessing

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PREPROCESSING = Preprocessing("RGB", (32, 32), 0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@registry.register
def cifar10(data_dir: Path) -> ImageData:
    """Tiny photographs, 32x32 colour; 10 classes, 50,000 train and 10,000 test images.

    ``data_dir`` may hold image folders (``train/airplane/*.jpg`` ...) or torchvision's ``cifar-10-batches-py``;
    otherwise the latter is downloaded into it. Source: Krizhevsky (2009).

    Raises:
        LowbitError: an image folder is incomplete, or the download failed.
    """
    if (data_dir / "train" / CLASSES[0]).is_dir():
        from lowbit.data.folder import read_folder

        train, test, classes, mode = read_folder(data_dir)
        if classes != CLASSES or mode != "RGB" or train.images.shape[1:] != (32, 32, 3):
            raise LowbitError(f"{data_dir} does not hold the ten classes of CIFAR-10 in 32x32 colour")
        parts = [(train.images, train.labels), (test.images, test.labels)]
    else:
        parts = [_torchvision(data_dir, training) for training in (True, False)]
    return ImageData("cifar10", *parts[0], *parts[1], classes=CLASSES, preprocessing=PREPROCESSING, flip=True)


def _torchvision(data_dir: Path, training: bool) -> tuple[Pixels, Labels]:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(data_dir), train=training, download=True)
    except (OSError, RuntimeError) as error:
        raise LowbitError(
            f"cifar10 could not be downloaded into {data_dir} ({error}); give --data-dir a folder that holds "
            "cifar-10-batches-py, or image folders train/airplane ... test/truck"
        ) from None
    return data.data, np.asarray(data.targets, np.int64)
