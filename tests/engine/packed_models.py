"""Random packed models for tests."""

from __future__ import annotations

import numpy as np

from lowbit.packed import PackedModel


def words(rng, *shape, depth):
    """Random packed weights (*shape, ceil(depth/64)) with zero tail bits."""
    bits = rng.integers(0, 2, (*shape, -(-depth // 64) * 64), dtype=np.uint8)
    bits[..., depth:] = 0
    return np.packbits(bits, axis=-1, bitorder="little").view(np.uint64)


def thresholds(rng, dtype, channels, bits, spread):
    """Ordered thresholds for codes, with falling channels and channels whose code is constant."""
    falling = rng.integers(0, 2, channels, dtype=np.uint8)
    values = np.sort(rng.normal(0, spread, (channels, 2**bits - 1)), axis=1).astype(dtype)
    ends = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype == np.int32 else (-np.inf, np.inf)
    for channel in range(0, channels, 5):
        values[channel] = ends[rng.integers(2)]
    values[falling == 1] = values[falling == 1, ::-1]
    return {"thresholds": np.ascontiguousarray(values), "falling": falling}


def window(kernel, stride=(1, 1), padding=(0, 0), dilation=None):
    attributes = {"kernel": list(kernel), "stride": list(stride), "padding": list(padding)}
    return attributes if dilation is None else {**attributes, "dilation": list(dilation)}


class Builder:
    """Collects ops and tensors; each method appends an op and returns the number of its value."""

    def __init__(self, shape):
        self.model = PackedModel(tuple(shape), [], {})

    def op(self, kind, inputs=None, tensors=(), **attributes):
        index = len(self.model.ops)
        inputs = [index] if inputs is None else inputs
        self.model.ops.append({"op": kind, "inputs": inputs, "source": f"layer{index}", **attributes})
        for name, tensor in dict(tensors).items():
            self.model.tensors[f"{index}.{name}"] = tensor
        return index + 1


def vgg(rng, rows=(64, 64, "M", 128, 128, "M"), size=32, classes=10):
    """A random binary VGG: float stem, threshold, binary convolutions, pools on codes, float head."""
    net, channels, first = Builder((3, size, size)), 3, True
    same = window((3, 3), padding=(1, 1), dilation=(1, 1))
    for row in rows:
        if row == "M":
            falling = {"falling": net.model.tensors[f"{len(net.model.ops) - 1}.falling"]}
            net.op("max_pool", tensors=falling, **window((2, 2), (2, 2)))
            size //= 2
            continue
        if first:
            weight = rng.normal(size=(row, 3, 3, 3)).astype(np.float32)
            net.op("conv2d", tensors={"weight": weight}, groups=1, channels=row, **same)
            net.op("threshold", tensors=thresholds(rng, np.float32, row, 1, 2.0), bits=1)
            first = False
        else:
            tensors = {"weight_bits": words(rng, row, 3, 3, depth=channels)}
            tensors |= thresholds(rng, np.int32, row, 1, (9 * channels) ** 0.5)
            net.op("binary_conv2d", tensors=tensors, groups=1, channels=row, bits=1, **same)
        channels = row
    whole = window((size, size), dilation=(1, 1))
    tensors = {"weight_bits": words(rng, classes, size, size, depth=channels)}
    tensors |= {"scale": rng.uniform(0.01, 0.1, classes).astype(np.float32), "bias": np.zeros(classes, np.float32)}
    net.op("binary_conv2d", tensors=tensors, groups=1, channels=classes, **whole)
    return net.model
