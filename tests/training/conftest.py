from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor


@pytest.fixture
def spy_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[torch.autograd.Function]], list[tuple[int, ...]]]:
    """Gives a list of the shapes of what a function is applied to from now on."""

    def spy_on(function: type[torch.autograd.Function]) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        apply = function.apply

        def spy(x: Tensor, *rest: object) -> object:
            shapes.append(tuple(x.shape))
            return apply(x, *rest)

        monkeypatch.setattr(function, "apply", spy)
        return shapes

    return spy_on


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder that is quickly learned: stripes 32x32 in grey, 40 train and 10 test images of each direction."""
    root = tmp_path_factory.mktemp("stripes")
    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10)):
        for name in ("horizontal", "vertical"):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                wave = 128 + 100 * np.sign(np.sin(np.arange(32) * random.uniform(0.5, 1.5) + random.uniform(0, 6)))
                image = np.tile(wave[:, None], (1, 32)) + random.normal(0, 10, (32, 32))
                image = image if name == "horizontal" else image.T
                pixels = np.clip(image, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index:02}.png")
    return root
