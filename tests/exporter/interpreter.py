"""The ops of docs/contract.md in NumPy, slow and obvious: what an exported graph means, without the engine.

Values are (N, H, W, C): float32, or codes as uint8.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from lowbit.packed import PackedModel


class Interpreter:
    """Runs a packed model op by op, like `lowbit.Engine`."""

    def __init__(self, packed: PackedModel) -> None:
        packed.values()
        self.packed = packed

    def __call__(self, x: np.ndarray) -> np.ndarray:
        values = [x.transpose(0, 2, 3, 1)]
        for index, op in enumerate(self.packed.ops):
            values.append(self.run_op(index, [values[i] for i in op["inputs"]]))
        out = values[-1].transpose(0, 3, 1, 2)
        return out.reshape(len(out), -1) if out.shape[2:] == (1, 1) else out

    def run_op(self, index: int, inputs: list[np.ndarray]) -> np.ndarray:
        op = self.packed.ops[index]
        return getattr(self, op["op"])(op, self.packed.op_tensors(index), *inputs)

    def conv2d(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        if "weight_bits" in tensors:
            weight = signs(tensors["weight_bits"], x.shape[-1] // op["groups"])
            y = convolve(op, x, weight) * tensors["weight_scale"]
        elif "weight_codes" in tensors:
            weight = weight_integers(op, tensors["weight_codes"], x.shape[-1] // op["groups"])
            y = convolve(op, x, weight) * tensors["weight_scale"]
        else:
            y = convolve(op, x, tensors["weight"])
        return (y + tensors.get("bias", np.float32(0))).astype(np.float32)

    def table_conv2d(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        assert x.dtype == np.uint8
        return self.conv2d(op, tensors, tensors["levels"][x])

    def binary_conv2d(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        assert x.dtype == np.uint8
        weight = signs(tensors["weight_bits"], x.shape[-1] // op["groups"])
        return transformed(tensors, convolve(op, x.astype(np.int64) * 2 - 1, weight))

    def quant_conv2d(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        assert x.dtype == np.uint8
        weight = weight_integers(op, tensors["weight_codes"], x.shape[-1] // op["groups"])
        integers = x.astype(np.int64) * op["input_multiplier"] + op["input_offset"]
        return transformed(tensors, convolve(op, integers, weight))

    def threshold(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return codes(tensors, x)

    def max_pool(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        highest = windows(op, x.astype(np.float64), -np.inf).max(axis=(3, 4))
        lowest = windows(op, x.astype(np.float64), np.inf).min(axis=(3, 4))
        falling = tensors.get("falling", np.zeros(x.shape[-1], np.uint8))
        return np.where(falling == 1, lowest, highest).astype(x.dtype)

    def avg_pool(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        total = windows(op, x.astype(np.float64), 0).sum(axis=(3, 4))
        ones = np.ones_like(x) if not op["count_include_pad"] else None
        count = np.prod(op["kernel"]) if ones is None else windows(op, ones, 0).sum(axis=(3, 4))
        return (total / count).astype(np.float32)

    def abs_mean(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        channels = x.shape[-1] // op["groups"]
        box = np.full((op["groups"], *op["kernel"], channels), 1 / (np.prod(op["kernel"]) * channels))
        return convolve(op, np.abs(x), box).astype(np.float32)

    def affine(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return x * tensors["scale"] + tensors["shift"]

    def relu(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return np.maximum(x, np.float32(0))

    def prelu(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return np.where(x >= 0, x, x * tensors["slope"])

    def hardtanh(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return x.clip(np.float32(op["min"]), np.float32(op["max"]))

    def add(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x + y

    def multiply(self, op: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> np.ndarray:
        product = x * np.repeat(y, x.shape[-1] // y.shape[-1], axis=-1)
        return product + tensors["bias"] if "bias" in tensors else product


def codes(tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    thresholds = tensors["thresholds"]
    rising = (x[..., None] >= thresholds).sum(axis=-1)
    falling = (x[..., None] <= thresholds).sum(axis=-1)
    return np.where(tensors["falling"] == 1, falling, rising).astype(np.uint8)


def transformed(tensors: dict[str, np.ndarray], sums: np.ndarray) -> np.ndarray:
    """Sums to codes by thresholds, or to floats by scale and bias."""
    if "thresholds" in tensors:
        return codes(tensors, sums.astype(np.int64))
    y = sums.astype(np.float32) * tensors["scale"]
    return y + tensors["bias"] if "bias" in tensors else y


def weight_integers(op: dict[str, Any], words: np.ndarray, channels: int) -> np.ndarray:
    """(O, kh, kw, C): the code of each weight, taken from its row of bits as one long number."""
    shape, width = (*op["kernel"], channels), op["weight_width"]
    rows = [sum(int(word) << 64 * place for place, word in enumerate(row)) for row in words]
    codes = [[row >> width * n & (1 << width) - 1 for n in range(int(np.prod(shape)))] for row in rows]
    return np.array(codes, np.int64).reshape(len(words), *shape) * op["weight_multiplier"] + op["weight_offset"]


def signs(words: np.ndarray, channels: int) -> np.ndarray:
    bits = (words[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return bits.reshape(*words.shape[:-1], -1)[..., :channels].astype(np.int64) * 2 - 1


def windows(op: dict[str, Any], x: np.ndarray, fill: float, dilation: tuple[int, int] = (1, 1)) -> np.ndarray:
    """(N, H', W', kh, kw, C)"""
    (kh, kw), (sh, sw), (ph, pw) = op["kernel"], op["stride"], op["padding"]
    padded = np.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)), constant_values=fill)
    h = (padded.shape[1] - dilation[0] * (kh - 1) - 1) // sh + 1
    w = (padded.shape[2] - dilation[1] * (kw - 1) - 1) // sw + 1
    out = np.empty((len(x), h, w, kh, kw, x.shape[-1]), padded.dtype)
    for i, j in itertools.product(range(kh), range(kw)):
        top, left = i * dilation[0], j * dilation[1]
        out[:, :, :, i, j] = padded[:, top : top + h * sh : sh, left : left + w * sw : sw][:, :h, :w]
    return out


def convolve(op: dict[str, Any], x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """In float64, zeros around the image; (N, H', W', O)."""
    taps = windows(op, x.astype(np.float64), 0, tuple(op["dilation"]))
    parts = [
        np.tensordot(taps_of_group, w.astype(np.float64), axes=((3, 4, 5), (1, 2, 3)))
        for taps_of_group, w in zip(
            np.split(taps, op["groups"], axis=-1), np.split(weight, op["groups"], axis=0), strict=True
        )
    ]
    return np.concatenate(parts, axis=-1)
