"""Write CIFAR-10 as JPEG files in class folders: the copy that our figures on CIFAR-10 are from.

    python studies/cifar10_jpeg.py cifar-10-batches-bin data

reads the binary version of CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html), which needs no pickle, and writes
``data/train/CLASS/NNNN.jpg`` and ``data/test/CLASS/NNNN.jpg``, numbered within each class in the order of the batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lowbit.data.cifar10 import CLASSES
from lowbit.errors import LowbitError

PARTS = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
JPEG = {"quality": 75, "subsampling": "4:2:0"}


def read_batch(path: Path) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Label and image (32, 32, 3) of each record: a byte of label, then the red, green and blue planes, row by row.

    Raises:
        LowbitError: the file is missing or is no batch of CIFAR-10.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise LowbitError(
            f"cannot read {path}: {error.strerror}; give the folder of CIFAR-10's binary version"
        ) from None
    if len(data) == 0 or len(data) % RECORD or data[::RECORD].max() >= len(CLASSES):
        raise LowbitError(f"{path} is no batch of CIFAR-10's binary version; download it again")
    for record in data.reshape(-1, RECORD):
        yield int(record[0]), record[1:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)


def write_copy(source: Path, out: Path) -> int:
    """Write all images of the batches in ``source`` below ``out``; returns how many.

    Raises:
        LowbitError: a batch is missing or damaged, or ``out`` holds such a copy already.
    """
    written = 0
    for part, names in PARTS.items():
        if (out / part).exists():
            raise LowbitError(f"{out / part} exists; choose another folder")
        counts = dict.fromkeys(CLASSES, 0)
        for name in CLASSES:
            (out / part / name).mkdir(parents=True)
        for name in names:
            for label, pixels in read_batch(source / name):
                of_class = CLASSES[label]
                path = out / part / of_class / f"{counts[of_class]:04d}.jpg"
                Image.fromarray(np.ascontiguousarray(pixels)).save(path, "JPEG", **JPEG)
                counts[of_class] += 1
        written += sum(counts.values())
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder cifar-10-batches-bin")
    parser.add_argument("out", type=Path, help="where train/ and test/ go")
    arguments = parser.parse_args()
    try:
        written = write_copy(arguments.source, arguments.out)
    except LowbitError as error:
        parser.exit(1, f"cifar10_jpeg.py: {error}\n")
    print(f"wrote {written:,} images to {arguments.out}")


if __name__ == "__main__":
    main()
