"""Preprocessing: the formula, the round trip through a file, and files that lie."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lowbit.errors import LowbitError
from lowbit.preprocessing import MODES, Preprocessing

GREY = Preprocessing("L", (4, 6), 0, (0.25,), (0.5,))
COLOUR = Preprocessing("RGB", (5, 3), 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def image(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@st.composite
def preprocessings(draw: st.DrawFn) -> Preprocessing:
    mode = draw(st.sampled_from(["RGB", "L"]))
    count = {"RGB": 3, "L": 1}[mode]
    numbers = lambda low, high: st.tuples(*[st.floats(low, high)] * count)  # noqa: E731
    size = draw(st.tuples(st.integers(1, 1 << 14), st.integers(1, 1 << 14)))
    return Preprocessing(mode, size, draw(st.integers(0, 1024)), draw(numbers(-9, 9)), draw(numbers(1e-3, 9)))


@settings(max_examples=50, deadline=None)
@given(preprocessings())
def test_round_trip_through_json(preprocessing):
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@settings(max_examples=50, deadline=None)
@given(preprocessings(), st.integers(0, 255))
def test_normalised_values_are_the_formula(preprocessing, pixel):
    inputs = preprocessing.normalise(np.full((1, 2, 2, preprocessing.channels), pixel, np.uint8))
    assert inputs.dtype == np.float32
    assert inputs.shape == (1, preprocessing.channels, 2, 2)
    for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
        expected = (pixel / 255 - mean) / std
        rounding = 2.0**-22 * (1 + abs(mean)) / std
        assert np.abs(inputs[0, channel] - expected).max() <= rounding


def test_channels_rows_and_columns_keep_their_places():
    pixels = np.arange(2 * 4 * 6, dtype=np.uint8).reshape(2, 4, 6, 1)
    inputs = GREY.normalise(pixels)
    for n, y, x in np.ndindex(2, 4, 6):
        assert inputs[n, 0, y, x] == pytest.approx((pixels[n, y, x, 0] / 255 - 0.25) / 0.5, abs=1e-6)
    assert inputs.flags.c_contiguous


def test_images_to_inputs():
    pictures = [image(5, 3, seed=seed) for seed in range(2)]
    inputs = COLOUR(pictures)
    assert inputs.shape == (2, *COLOUR.shape) == (2, 3, 9, 7)
    for n, picture in enumerate(pictures):
        for channel, (mean, std) in enumerate(zip(COLOUR.mean, COLOUR.std, strict=True)):
            plain = np.zeros((9, 7))
            plain[2:-2, 2:-2] = np.asarray(picture)[:, :, channel]
            np.testing.assert_allclose(inputs[n, channel], (plain / 255 - mean) / std, atol=2e-6)


@pytest.mark.parametrize("size", [(4, 6), (6, 4), (1, 1), (40, 60), (5, 6)], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
def test_any_image_is_converted_and_resized(mode, size):
    picture = image(*size, mode=mode)
    for preprocessing in (GREY, COLOUR):
        height, width = preprocessing.size
        pixels = preprocessing.pixels(picture)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (preprocessing.shape[1], preprocessing.shape[2], preprocessing.channels)
        expected = picture.convert(preprocessing.mode)
        if size != preprocessing.size:
            expected = expected.resize((width, height), Image.Resampling.BILINEAR)
        pad = preprocessing.pad
        inner = pixels[pad : pad + height, pad : pad + width]
        np.testing.assert_array_equal(inner.squeeze(2) if inner.shape[2] == 1 else inner, np.asarray(expected))
        assert pixels.sum() == inner.sum()


GOOD: dict[str, Any] = {"mode": "RGB", "size": [5, 3], "pad": 0, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}
HUGE = 10**400

# what is changed, what the message says
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"mode": "CMYK"}, "mode is 'CMYK', but must be RGB or L"),
    ({"mode": None}, "mode"),
    ({"mode": ["RGB"]}, "mode"),
    ({"mode": "L"}, "1 values of mean"),
    ({"size": [0, 3]}, "out of range"),
    ({"size": [3, -1]}, "out of range"),
    ({"size": [3, 1 << 40]}, "out of range"),
    ({"size": [3, HUGE]}, "out of range|malformed"),
    ({"size": [3]}, "malformed"),
    ({"size": [3, 3, 3]}, "malformed"),
    ({"size": [3.5, 3]}, "malformed"),
    ({"size": [math.inf, 3]}, "malformed"),
    ({"size": "35"}, "malformed"),
    ({"size": 5}, "malformed"),
    ({"size": None}, "malformed"),
    ({"size": {"5": 3, "3": 5}}, "malformed"),
    ({"pad": -1}, "out of range"),
    ({"pad": 1 << 20}, "out of range"),
    ({"pad": math.inf}, "malformed"),
    ({"pad": math.nan}, "malformed"),
    ({"pad": "x"}, "malformed"),
    ({"mean": [0.5]}, "3 values of mean"),
    ({"mean": []}, "3 values of mean"),
    ({"mean": [0.5, math.nan, 0.5]}, "mean must lie in"),
    ({"mean": [0.5, math.inf, 0.5]}, "mean must lie in"),
    ({"mean": [0.5, HUGE, 0.5]}, "malformed"),
    ({"mean": [0.5, "a", 0.5]}, "malformed"),
    ({"mean": [0.5, None, 0.5]}, "malformed"),
    ({"mean": 0.5}, "malformed"),
    ({"mean": [[0.5, 0.5, 0.5]] * 3}, "malformed"),
    ({"std": [1, 1]}, "3 values of mean and of std"),
    ({"std": [1, 0, 1]}, "std in 1e-9"),
    ({"std": [1, -1, 1]}, "std in 1e-9"),
    ({"std": [1, 1e-320, 1]}, "std in 1e-9"),
    ({"std": [1, math.nan, 1]}, "std in 1e-9"),
    ({"spare": 1}, "malformed"),
    ({"__class__": "x"}, "malformed"),
    ({"self": 1}, "malformed"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=lambda value: str(value)[:40])
def test_hostile_files_are_refused(change, message):
    assert Preprocessing.from_dict(GOOD).size == (5, 3)
    with pytest.raises(LowbitError, match=message):
        Preprocessing.from_dict({**GOOD, **change})


@pytest.mark.parametrize("field", GOOD)
def test_a_missing_field_is_named(field):
    with pytest.raises(LowbitError, match=field):
        Preprocessing.from_dict({key: value for key, value in GOOD.items() if key != field})


@pytest.mark.parametrize("data", [None, [], {}, "x", 3, [["mode", "L"]]], ids=str)
def test_what_is_no_table_is_refused(data):
    with pytest.raises(LowbitError, match="malformed"):
        Preprocessing.from_dict(data)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_refused_not_clipped(mode):
    with pytest.raises(LowbitError, match="the image has more than 8 bits a pixel"):
        Preprocessing.from_dict(GOOD)([Image.new(mode, (3, 5), 300)])


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
changes = st.dictionaries(st.sampled_from([*GOOD, "other"]), anything, min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(changes)
def test_any_file_is_taken_or_refused(change):
    """Never another exception; and what is taken gives finite inputs."""
    try:
        preprocessing = Preprocessing.from_dict({**GOOD, **change})
    except LowbitError:
        return
    inputs = preprocessing.normalise(np.full((1, 1, 1, preprocessing.channels), 255, np.uint8))
    assert np.isfinite(inputs).all()


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("preprocessing", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_mode_that_is_taken_is_converted(mode, preprocessing):
    channels, height, width = preprocessing.shape
    assert preprocessing.pixels(Image.new(mode, (9, 7))).shape == (height, width, channels)


def test_colours_that_are_not_converted_are_refused():
    with pytest.raises(LowbitError, match="the image has colours of the kind LAB; convert it to RGB"):
        COLOUR.pixels(Image.new("LAB", (9, 7)))
