"""Fashion-MNIST: Debian's package where it is installed, else torchvision's download."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowbit.data.base import ImageData, Labels, channel_statistics, pad_pixels, registry
from lowbit.errors import LowbitError
from lowbit.preprocessing import Pixels, Preprocessing

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MOST_BYTES = 100_000_000  # of a file unpacked: twice what the larger one holds
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@registry.register
def fashion_mnist(data_dir: Path) -> ImageData:
    """Zalando's clothing, 28x28 grey padded to 32x32; 10 classes, 60,000 train and 10,000 test images.

    Read from ``data_dir`` when it holds the gzipped IDX files, else from Debian's ``dataset-fashion-mnist``, else
    downloaded into ``data_dir``. Source: Xiao, Rasul & Vollgraf (2017), arXiv 1708.07747.

    Raises:
        LowbitError: a file is damaged, or the download failed.
    """
    folder = next((f for f in (data_dir, DEBIAN) if (f / "train-images-idx3-ubyte.gz").is_file()), None)
    if folder is None:
        folder = _download(data_dir)
    (train_images, train_labels), (test_images, test_labels) = (_part(folder, part) for part in ("train", "t10k"))
    return ImageData(
        name="fashion_mnist",
        train_images=pad_pixels(train_images, 2),
        train_labels=train_labels,
        test_images=pad_pixels(test_images, 2),
        test_labels=test_labels,
        classes=CLASSES,
        preprocessing=Preprocessing("L", (28, 28), 2, *channel_statistics(train_images)),
        flip=True,
    )


def _part(folder: Path, part: str) -> tuple[Pixels, Labels]:
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", (28, 28))
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return images[..., None], labels.astype(np.int64)


def read_idx(path: Path, each: tuple[int, ...] = ()) -> npt.NDArray[np.uint8]:
    """A gzipped IDX file of bytes: two zeros, type 8, number of axes, big-endian sizes, then the bytes.

    Args:
        path: of the file.
        each: shape of one of its items.

    Raises:
        LowbitError: the file is missing, cut short, of another type or shape, or of more than `MOST_BYTES`.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        zero, kind, axes = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{axes}I", data, 4)
        if (zero, kind) != (0, 8):
            raise ValueError("not IDX of bytes")
        if shape[1:] != each or not shape:
            raise ValueError(f"it holds {shape}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise LowbitError(f"{path} is damaged or missing ({error}); install or download the data set again") from None


def _download(data_dir: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        raise LowbitError(
            f"fashion_mnist could not be downloaded into {data_dir} ({error}); "
            "install Debian's dataset-fashion-mnist or give --data-dir the folder of the four IDX files"
        ) from None
    return data_dir / "FashionMNIST" / "raw"
