"""A slow, obvious interpreter of the packed graph: docs/contract.md in NumPy, sharing nothing with the engine.

Values are (N, H, W, C): float32, or codes as uint8.
"""

from __future__ import annotations

import numpy as np

from lowbit.packed import PackedModel


def run(model: PackedModel, x):
    """All values of the graph for images ``x`` (N, C, H, W)."""
    values = [np.ascontiguousarray(x.transpose(0, 2, 3, 1))]
    for index, op in enumerate(model.ops):
        values.append(run_op(op, model.op_tensors(index), [values[number] for number in op["inputs"]]))
    return values


def run_op(op, tensors, inputs):
    return globals()[op["op"]](op, tensors, *inputs)


def unpack(words, depth):
    """uint64 words (..., W) to -1 and +1 (..., depth): bit 1 means +1, least significant bit first."""
    bits = (words[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return 2.0 * bits.reshape(*words.shape[:-1], -1)[..., :depth] - 1.0


def windows(op, x, fill):
    """Yields (ky, kx, slice (N, OH, OW, C) of the padded input under that tap)."""
    (kh, kw), (sy, sx), (py, px) = op["kernel"], op["stride"], op["padding"]
    dy, dx = op.get("dilation", [1, 1])
    x = np.pad(x, ((0, 0), (py, py), (px, px), (0, 0)), constant_values=fill)
    height, width = (x.shape[1] - dy * (kh - 1) - 1) // sy + 1, (x.shape[2] - dx * (kw - 1) - 1) // sx + 1
    for ky in range(kh):
        for kx in range(kw):
            rows, columns = ky * dy + sy * np.arange(height), kx * dx + sx * np.arange(width)
            yield ky, kx, x[:, rows][:, :, columns]


def convolve(op, x, weight):
    """Sums in float64 of x (N, H, W, C) and weight (O, kh, kw, C/groups), with padding by 0."""
    groups, total = op["groups"], 0.0
    for ky, kx, tap in windows(op, x.astype(np.float64), 0):
        parts = np.split(tap, groups, axis=3), np.split(weight[:, ky, kx].astype(np.float64), groups)
        total = total + np.concatenate([a @ w.T for a, w in zip(*parts, strict=True)], axis=3)
    return total


def codes(values, thresholds, falling):
    """Number of thresholds passed, per channel."""
    v, t = values[..., None], thresholds
    return np.where(falling.astype(bool)[:, None], v <= t, v >= t).sum(axis=-1).astype(np.uint8)


def conv2d(op, tensors, x):
    if "weight_bits" in tensors:
        sums = convolve(op, x, unpack(tensors["weight_bits"], x.shape[3] // op["groups"])) * tensors["weight_scale"]
    elif "weight_codes" in tensors:
        weight = weight_integers(op, tensors["weight_codes"], x.shape[3] // op["groups"])
        sums = convolve(op, x, weight) * tensors["weight_scale"]
    else:
        sums = convolve(op, x, tensors["weight"])
    return (sums + tensors.get("bias", 0)).astype(np.float32)


def table_conv2d(op, tensors, x):
    return conv2d(op, tensors, tensors["levels"][x])


def binary_conv2d(op, tensors, x):
    return transformed(tensors, convolve(op, 2.0 * x - 1.0, unpack(tensors["weight_bits"], x.shape[3] // op["groups"])))


def quant_conv2d(op, tensors, x):
    integers = op["input_multiplier"] * x.astype(np.int64) + op["input_offset"]
    weight = weight_integers(op, tensors["weight_codes"], x.shape[3] // op["groups"])
    return transformed(tensors, convolve(op, integers, weight))


def weight_integers(op, words, depth):
    """Packed codes (O, W) to the integers that they stand for, (O, kh, kw, depth)."""
    width, (kh, kw) = op["weight_width"], op["kernel"]
    bits = (words[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    bits = bits.reshape(len(words), -1)[:, : kh * kw * depth * width].reshape(len(words), kh, kw, depth, width)
    codes = (bits.astype(np.int64) << np.arange(width)).sum(axis=-1)
    return op["weight_multiplier"] * codes + op["weight_offset"]


def transformed(tensors, sums):
    """Sums, exact in float64, to codes or floats."""
    sums = sums.astype(np.int64)
    if "thresholds" in tensors:
        return codes(sums, tensors["thresholds"], tensors["falling"])
    y = sums.astype(np.float32) * tensors["scale"]
    return y + tensors["bias"] if "bias" in tensors else y


def threshold(op, tensors, x):
    return codes(x, tensors["thresholds"], tensors["falling"])


def max_pool(op, tensors, x):
    taps = np.stack([tap for _, _, tap in windows(op, x.astype(np.float64), -np.inf)])
    result = taps.max(axis=0)
    if "falling" in tensors:
        low = np.stack([tap for _, _, tap in windows(op, x.astype(np.float64), np.inf)]).min(axis=0)
        result = np.where(tensors["falling"].astype(bool), low, result)
    return result.astype(x.dtype)


def avg_pool(op, tensors, x):
    total = sum(tap for _, _, tap in windows(op, x.astype(np.float64), 0))
    if op["count_include_pad"]:
        return (total / np.prod(op["kernel"])).astype(np.float32)
    return (total / sum(tap for _, _, tap in windows(op, np.ones_like(x, np.float64), 0))).astype(np.float32)


def abs_mean(op, tensors, x):
    depth = x.shape[3] // op["groups"]
    means = np.abs(x.astype(np.float64)).reshape(*x.shape[:3], op["groups"], depth).mean(axis=4)
    return (sum(tap for _, _, tap in windows(op, means, 0)) / np.prod(op["kernel"])).astype(np.float32)


def affine(op, tensors, x):
    return x * tensors["scale"] + tensors["shift"]


def relu(op, tensors, x):
    return np.maximum(x, np.float32(0))


def prelu(op, tensors, x):
    return np.where(x < 0, x * tensors["slope"], x)


def hardtanh(op, tensors, x):
    return np.clip(x, np.float32(op["min"]), np.float32(op["max"]))


def add(op, tensors, x, y):
    return x + y


def multiply(op, tensors, x, y):
    product = x * y.repeat(x.shape[3] // y.shape[3], axis=3)
    return product + tensors["bias"] if "bias" in tensors else product
