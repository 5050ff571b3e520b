"""Every instruction set of this machine, forced, against the slow reference in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from packed_models import Builder, coded, quant_net, table_net, thresholds, vgg, window, words

from lowbit import _engine
from lowbit.errors import LowbitError
from lowbit.runtime import Engine

# size, channels in, channels out, groups, kernel, stride, padding, dilation, batch
CASES = {
    "plain": (8, 64, 64, 1, 3, 1, 1, 1, 1),
    "odd channels": (7, 37, 29, 1, 3, 1, 1, 1, 2),
    "one channel": (5, 1, 1, 1, 3, 1, 1, 1, 3),
    "one pixel": (1, 100, 70, 1, 1, 1, 0, 1, 3),
    "one pixel, padded": (1, 65, 17, 1, 3, 1, 1, 1, 1),
    "empty batch": (6, 33, 20, 1, 3, 1, 1, 1, 0),
    "wide padding": (6, 40, 24, 1, 5, 2, 3, 1, 2),
    "padding beyond the kernel": (4, 30, 16, 1, 1, 1, 3, 1, 1),
    "stride": (11, 130, 96, 1, 3, 2, 1, 1, 2),
    "dilation": (12, 64, 48, 1, 3, 1, 2, 2, 1),
    "stride and dilation": (13, 70, 33, 1, 3, 3, 3, 3, 1),
    "groups of words": (6, 128, 128, 2, 3, 1, 1, 1, 2),
    "groups within words": (6, 60, 90, 3, 3, 1, 1, 1, 2),
    "groups across words": (5, 210, 42, 3, 3, 1, 1, 1, 1),
    "depthwise": (7, 70, 70, 70, 3, 1, 1, 1, 2),
    "whole map": (4, 96, 200, 1, 4, 1, 0, 1, 3),
    "even kernel": (9, 64, 80, 1, 2, 2, 0, 1, 1),
    "many tiles": (14, 192, 130, 1, 3, 1, 1, 1, 3),
    "small maps": (4, 128, 72, 1, 3, 1, 1, 1, 5),
    "one pixel of many images": (1, 192, 40, 1, 1, 1, 0, 1, 19),
    "one pixel of windows": (3, 64, 40, 1, 3, 1, 0, 1, 9),
    "no images": (6, 64, 24, 1, 3, 1, 1, 1, 0),
}


def layer(case, seed, kind):
    """A model of one convolution, and its input as the engine's run_op takes it."""
    size, c_in, c_out, groups, kernel, stride, padding, dilation, batch = CASES[case]
    rng = np.random.default_rng(seed)
    shape, depth = window((kernel, kernel), (stride,) * 2, (padding,) * 2, (dilation,) * 2), c_in // groups
    spread = (kernel * kernel * depth) ** 0.5
    net, attributes = Builder((c_in, size, size)), {"groups": groups, "channels": c_out, **shape}
    bits = {"weight_bits": words(rng, c_out, kernel, kernel, depth=depth)}
    scale, bias = rng.normal(size=(2, c_out)).astype(np.float32)
    x = rng.normal(size=(batch, size, size, c_in)).astype(np.float32)
    if kind.startswith("float"):
        weights = {"weight": rng.normal(size=(c_out, kernel, kernel, depth)).astype(np.float32)}
        net.op(
            "conv2d",
            tensors=weights if kind == "float" else {**bits, "weight_scale": scale, "bias": bias},
            **attributes,
        )
        return net.model, 0, x
    net.op("threshold", tensors=thresholds(rng, np.float32, c_in, 1, 1.0), bits=1)
    if kind == "scale":
        net.op("binary_conv2d", tensors={**bits, "scale": scale}, **attributes)
    elif kind == "scale and bias":
        net.op("binary_conv2d", tensors={**bits, "scale": scale, "bias": bias}, **attributes)
    else:
        out_bits = int(kind)
        tensors = {**bits, **thresholds(rng, np.int32, c_out, out_bits, spread)}
        net.op("binary_conv2d", tensors=tensors, bits=out_bits, **attributes)
        net.op("relu", inputs=[0])  # the output must be float32
    return net.model, 1, rng.integers(0, 2, x.shape, dtype=np.uint8)


def coded_layer(case, seed, bits_in, width, kind, weight_grid=None):
    """A model of one convolution of codes whose grids are drawn at random, and its input as run_op takes it."""
    size, c_in, c_out, groups, kernel, stride, padding, dilation, batch = CASES[case]
    rng = np.random.default_rng(seed)
    shape, depth = window((kernel, kernel), (stride,) * 2, (padding,) * 2, (dilation,) * 2), c_in // groups
    largest = [2**bits - 1 for bits in (bits_in, width)]
    grids = [
        [(1, 0), (1, -int(rng.integers(0, top + 1))), (2, -top), (3, int(rng.integers(-top, top)))][rng.integers(4)]
        for top in largest
    ]
    grid, tensors = coded(rng, c_out, kernel, depth, width, *(weight_grid or grids[1]))
    attributes = {"groups": groups, "channels": c_out, **shape, **grid}
    attributes |= {"input_multiplier": grids[0][0], "input_offset": grids[0][1]}
    net = Builder((c_in, size, size))
    net.op("threshold", tensors=thresholds(rng, np.float32, c_in, bits_in, 1.0), bits=bits_in)
    x = rng.integers(0, 2**bits_in, (batch, size, size, c_in), dtype=np.uint8)
    if kind.startswith("scale"):
        names = ("scale", "bias") if "bias" in kind else ("scale",)
        tensors |= {name: rng.normal(size=c_out).astype(np.float32) for name in names}
        net.op("quant_conv2d", tensors=tensors, **attributes)
        return net.model, x
    # Thresholds where the sums are.
    scaled = {**tensors, "scale": np.ones(c_out, np.float32)}
    sums = reference.run_op({"op": "quant_conv2d", **attributes}, scaled, [x if batch else np.zeros((1, *x.shape[1:]))])
    tensors |= thresholds(rng, np.int32, c_out, int(kind), float(sums.std()) + 1.0)
    middle = np.rint(sums.mean()).astype(np.int32)
    inside = np.abs(tensors["thresholds"].astype(np.int64)) < 2**30
    tensors["thresholds"][inside] += middle
    net.op("quant_conv2d", tensors=tensors, bits=int(kind), **attributes)
    net.op("relu", inputs=[0])  # the output must be float32
    return net.model, x


def close(left, right):
    """Float results: relative to the largest, as both sum in another order."""
    return np.allclose(left, right, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(right).max(initial=0))))


@pytest.mark.parametrize("kind", ["1", "2", "8", "scale", "scale and bias"])
@pytest.mark.parametrize("case", CASES)
def test_binary_convolution_equals_the_reference(isa, case, kind):
    model, index, x = layer(case, 1, kind)
    expected = reference.run_op(model.ops[index], model.op_tensors(index), [x])
    for threads in (1, 2):
        engine = Engine(model, threads=threads)
        assert engine.isa == isa
        result = engine.run_op(index, [x])
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("channels", [20, 64, 130])
@pytest.mark.parametrize("size", [(9, 12), (3, 40), (16, 3), (1, 9)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        ((1, 5), (2, 1), (0, 2), (1, 2)),
        ((3, 1), (1, 3), (1, 0), (1, 1)),
        ((2, 3), (3, 2), (2, 1), (2, 1)),
        ((1, 1), (4, 5), (0, 0), (1, 1)),
    ],
    ids=str,
)
def test_binary_convolution_of_windows_that_are_no_squares(isa, shape, size, channels):
    kernel, _, padding, dilation = shape
    if any(e + 2 * p < d * (k - 1) + 1 for e, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
        pytest.skip("the window is larger than the map")
    rng, net = np.random.default_rng(7), Builder((channels, *size))
    net.op("threshold", tensors=thresholds(rng, np.float32, channels, 1, 1.0), bits=1)
    tensors = {"weight_bits": words(rng, 50, *kernel, depth=channels), "scale": np.ones(50, np.float32)}
    net.op("binary_conv2d", tensors=tensors, groups=1, channels=50, **window(*shape))
    x = rng.integers(0, 2, (6, *size, channels), dtype=np.uint8)
    expected = reference.run_op(net.model.ops[1], net.model.op_tensors(1), [x])
    np.testing.assert_array_equal(Engine(net.model).run_op(1, [x]), expected)


@pytest.mark.parametrize("channels", [8, 24, 40, 72, 100, 130])
def test_no_bit_is_set_behind_the_last_channel(isa, channels):
    """The second convolution would count it."""
    rng, net, shape = (
        np.random.default_rng(channels),
        Builder((3, 9, 9)),
        window((3, 3), padding=(1, 1), dilation=(1, 1)),
    )
    net.op("threshold", tensors=thresholds(rng, np.float32, 3, 1, 1.0), bits=1)
    bits = {"weight_bits": words(rng, channels, 3, 3, depth=3)}
    tensors = bits | thresholds(rng, np.int32, channels, 1, 5.0)
    net.op("binary_conv2d", tensors=tensors, groups=1, channels=channels, bits=1, **shape)
    tensors = {"weight_bits": words(rng, 20, 3, 3, depth=channels), "scale": np.ones(20, np.float32)}
    net.op("binary_conv2d", tensors=tensors, groups=1, channels=20, **shape)
    x = rng.normal(size=(2, 3, 9, 9)).astype(np.float32)
    np.testing.assert_array_equal(Engine(net.model)(x), reference.run(net.model, x)[-1].transpose(0, 3, 1, 2))


def check_coded_layer(isa, *layer, kernel=None):
    return check_op(isa, *coded_layer(*layer), kernel=kernel)


def check_op(isa, model, x, kernel=None):
    """The second op of a model, of ``x``."""
    expected = reference.run_op(model.ops[1], model.op_tensors(1), [x])
    for threads in (1, 2):
        engine = Engine(model, threads=threads)
        assert engine.isa == isa
        assert kernel in (None, engine.kernels[1])
        result = engine.run_op(1, [x])
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)
    return expected


@pytest.mark.parametrize("kind", ["1", "3", "scale and bias"])
@pytest.mark.parametrize("bits", [(1, 2), (2, 1), (5, 8)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_convolution_of_codes_equals_the_reference(isa, case, bits, kind):
    check_coded_layer(isa, case, sum(bits), *bits, kind)


@pytest.mark.parametrize("kind", ["1", "2", "8", "scale"])
@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("bits_in", range(1, 9))
def test_convolution_of_codes_of_every_width(isa, bits_in, width, kind):
    case = ["odd channels", "groups within words", "stride and dilation", "wide padding"][(bits_in + width) % 4]
    expected = check_coded_layer(isa, case, 10 * bits_in + width, bits_in, width, kind)
    assert len(np.unique(expected)) > 1


# Binary products that take no longer than one of bytes, so that codes are multiplied bit by bit.
PLANES = {"avx512_vpopcntdq": 2, "avx512": 4, "avx_vnni": 4, "avx2": 8}
# Panels of 16 channels that blocks take together, where there are blocks.
TOGETHER = {"avx512": 4, "avx_vnni": 2, "avx2": 2}


def fills_blocks(isa, channels):
    """Less than a third of the panels of its blocks is spare."""
    panels, together = -(-channels // 16), TOGETHER.get(isa)
    return together is not None and 2 * (-(-panels // together) * together) < 3 * panels


@pytest.mark.parametrize("kind", ["1", "3", "scale and bias"])
@pytest.mark.parametrize("bits", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 4), (8, 1)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        "odd channels",
        "stride",
        "stride and dilation",
        "wide padding",
        "many tiles",
        "small maps",
        "even kernel",
        "one pixel",
    ],
)
def test_products_of_the_bits_of_codes_equal_the_reference(isa, case, bits, kind):
    """Weights on a grid around zero: each of their bits is worth as much set as it takes away where not."""
    unit = 1 + sum(bits) % 3
    if bits[0] * bits[1] > PLANES.get(isa, 0):
        pytest.skip("without measuring, these are products of bytes here")
    grid = (2 * unit, -unit * (2 ** bits[1] - 1))
    by_blocks = case != "one pixel" and fills_blocks(isa, CASES[case][2])
    kernel = "planes.blocks.count" if by_blocks else "planes.binary_subtract"
    check_coded_layer(isa, case, 1, *bits, kind, grid, kernel=kernel)


@pytest.mark.parametrize("kind", ["1", "3", "scale and bias"])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(
    "case", ["plain", "dilation", "even kernel", "many tiles", "small maps", "one pixel of windows", "no images"]
)
def test_codes_times_signs_are_matrices_where_there_are_units_for_them(isa, case, bits, kind):
    kernel = "matrices.multiply" if isa == "amx" else None
    check_coded_layer(isa, case, 1, bits, 1, kind, (2, -1), kernel=kernel)


def test_sums_may_fill_an_int32(isa):
    """Two products of 32767 * 32767 lie just inside the range; one more is refused."""
    largest, x = 2**15 - 1, np.ones((1, 1, 1, 3), np.uint8)
    for channels in (2, 3):
        net = Builder((channels, 1, 1))
        net.op("threshold", tensors=thresholds(np.random.default_rng(0), np.float32, channels, 1, 1.0), bits=1)
        tensors = {"weight_codes": np.array([[0], [2**channels - 1]], np.uint64), "scale": np.ones(2, np.float32)}
        grid = {"weight_width": 1, "weight_multiplier": largest, "weight_offset": -largest}
        grid |= {"input_multiplier": largest, "input_offset": 0}
        net.op("quant_conv2d", tensors=tensors, groups=1, channels=2, **grid, **window((1, 1), dilation=(1, 1)))
        if channels == 2:
            expected = [np.float32(-2 * largest**2), 0]
            np.testing.assert_array_equal(Engine(net.model).run_op(1, [x[..., :2]]).flatten(), expected)
        else:
            with pytest.raises(LowbitError, match="a sum can reach"):
                Engine(net.model)
            with pytest.raises(ValueError, match="overflow"):
                _engine.Engine([3, 1, 1], net.model.ops, [net.model.op_tensors(i) for i in range(2)], 1)


def test_bits_where_the_sum_of_the_codes_themselves_exceeds_an_int32(isa):
    """Codes of 8 bits that stand for -128 to 127, all at the end: their offset brings the sum back."""
    channels, outputs, terms = 16_600, 20, 4 * 16_600
    assert terms * 255 * 127 > 2**31
    net = Builder((channels, 2, 2))
    net.op("threshold", tensors=thresholds(np.random.default_rng(0), np.float32, channels, 8, 1.0), bits=8)
    grid, tensors = coded(np.random.default_rng(1), outputs, 2, channels, 8, 1, -128)
    tensors["weight_codes"][::2] = np.iinfo(np.uint64).max  # 127
    limits = 127 * 127 * terms + np.arange(outputs) % 4 // 2  # of channels 0, 4, ... the sum itself
    tensors |= {"thresholds": limits.astype(np.int32)[:, None], "falling": np.zeros(outputs, np.uint8)}
    grid |= {"input_multiplier": 1, "input_offset": -128}
    net.op(
        "quant_conv2d", tensors=tensors, groups=1, channels=outputs, bits=1, **grid, **window((2, 2), dilation=(1, 1))
    )
    net.op("relu", inputs=[0])  # the output must be float32
    bits = check_op(isa, net.model, np.full((1, 2, 2, channels), 255, np.uint8))
    np.testing.assert_array_equal(np.flatnonzero(bits), np.arange(0, outputs, 4))


@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("case", ["odd channels", "groups within words", "wide padding"])
def test_float_convolution_with_coded_weights_is_close_to_the_reference(isa, case, width):
    size, c_in, c_out, groups, kernel, stride, padding, dilation, batch = CASES[case]
    rng = np.random.default_rng(width)
    grid, tensors = coded(rng, c_out, kernel, c_in // groups, width, 2, -(2**width - 1))
    tensors |= {name: rng.normal(size=c_out).astype(np.float32) for name in ("weight_scale", "bias")}
    net, shape = Builder((c_in, size, size)), window((kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
    net.op("conv2d", tensors=tensors, groups=groups, channels=c_out, **grid, **shape)
    x = rng.normal(size=(batch, size, size, c_in)).astype(np.float32)
    assert close(Engine(net.model).run_op(0, [x]), reference.run_op(net.model.ops[0], tensors, [x]))


@pytest.mark.parametrize("kind", ["float", "float input, binary weights"])
@pytest.mark.parametrize("case", CASES)
def test_float_convolution_is_close_to_the_reference(isa, case, kind):
    model, index, x = layer(case, 2, kind)
    expected = reference.run_op(model.ops[index], model.op_tensors(index), [x])
    results = [Engine(model, threads=threads).run_op(index, [x]) for threads in (1, 2)]
    assert close(results[0], expected)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("weight", ["float", "1 bit", "3 bits"])
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("case", CASES)
def test_convolution_of_a_table_is_close_to_the_reference(isa, case, bits, weight):
    size, c_in, c_out, groups, kernel, stride, padding, dilation, batch = CASES[case]
    rng = np.random.default_rng(bits)
    shape, depth = window((kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2), c_in // groups
    tensors = {"levels": np.sort(rng.normal(size=2**bits)).astype(np.float32)}
    grid = {}
    if weight == "float":
        tensors["weight"] = rng.normal(size=(c_out, kernel, kernel, depth)).astype(np.float32)
    else:
        tensors |= {name: rng.normal(size=c_out).astype(np.float32) for name in ("weight_scale", "bias")}
        if weight == "1 bit":
            tensors["weight_bits"] = words(rng, c_out, kernel, kernel, depth=depth)
        else:
            grid, codes = coded(rng, c_out, kernel, depth, 3, 2, -7)
            tensors |= codes
    net = Builder((c_in, size, size))
    net.op("threshold", tensors=thresholds(rng, np.float32, c_in, bits, 1.0), bits=bits)
    net.op("table_conv2d", tensors=tensors, groups=groups, channels=c_out, **grid, **shape)
    x = rng.integers(0, 2**bits, (batch, size, size, c_in), dtype=np.uint8)
    results = [Engine(net.model, threads=threads).run_op(1, [x]) for threads in (1, 2)]
    assert close(results[0], reference.run_op(net.model.ops[1], tensors, [x]))
    np.testing.assert_array_equal(*results)
    for image in range(batch):
        np.testing.assert_array_equal(
            Engine(net.model).run_op(1, [x[image : image + 1]]), results[0][image : image + 1]
        )


@pytest.mark.parametrize("case", CASES)
def test_abs_mean_is_close_to_the_reference(isa, case):
    """Over the very windows of a convolution: any stride, padding, dilation and groups."""
    size, c_in, _, groups, kernel, stride, padding, dilation, batch = CASES[case]
    net = Builder((c_in, size, size + 2))
    shape = window((kernel, kernel), (stride, 1), (padding, padding + 1), (dilation,) * 2)
    net.op("abs_mean", groups=groups, **shape)
    x = np.random.default_rng(5).normal(size=(batch, size, size + 2, c_in)).astype(np.float32)
    expected = reference.run_op(net.model.ops[0], {}, [x])
    results = [Engine(net.model, threads=threads).run_op(0, [x]) for threads in (1, 2)]
    np.testing.assert_allclose(results[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(*results)
    for image in range(batch):
        np.testing.assert_array_equal(
            Engine(net.model).run_op(0, [x[image : image + 1]]), results[0][image : image + 1]
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 21])
def test_multiply_rounds_once_for_the_product_and_once_for_the_bias(isa, groups, bias):
    rng = np.random.default_rng(6)
    net = Builder((21, 4, 3))
    net.op("abs_mean", groups=groups, **window((1, 1), dilation=(1, 1)))
    tensors = {"bias": rng.normal(size=21).astype(np.float32)} if bias else {}
    net.op("multiply", inputs=[0, 1], tensors=tensors)
    x = rng.normal(size=(5, 4, 3, 21)).astype(np.float32)
    x[0] = -0.0
    factors = rng.normal(size=(5, 4, 3, groups)).astype(np.float32)
    for threads in (1, 2):
        found = Engine(net.model, threads=threads).run_op(1, [x, factors])
        expected = reference.run_op(net.model.ops[1], tensors, [x, factors])
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("channels", [1, 15, 16, 64, 65, 200])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_threshold_decides_ties_zeros_and_ends_as_stated(isa, channels, bits):
    rng = np.random.default_rng(3)
    net = Builder((channels, 3, 5))
    tensors = thresholds(rng, np.float32, channels, bits, 1.0)
    tensors["thresholds"][::7] = 0.0
    net.op("threshold", tensors=tensors, bits=bits)
    net.op("relu", inputs=[0])
    x = rng.normal(size=(2, 3, 5, channels)).astype(np.float32)
    x[0, 0] = tensors["thresholds"][:, 0]
    x[0, 1] = np.nextafter(tensors["thresholds"][:, -1], np.float32(np.inf))
    x[0, 2], x[1, 0] = 0.0, -0.0
    expected = reference.run_op(net.model.ops[0], tensors, [x])
    np.testing.assert_array_equal(Engine(net.model).run_op(0, [x]), expected)


@pytest.mark.parametrize("sums", ["ends", "every"])
def test_integer_thresholds_at_every_sum_and_at_the_ends(isa, sums):
    """A 1x1 convolution of 20 channels whose sum takes every value, against every threshold near its range."""
    depth = 20
    limits = [-(2**31), -(2**31) + 1, 2**31 - 2, 2**31 - 1] if sums == "ends" else range(-depth - 3, depth + 4)
    table = np.array([[t] for t in limits for _ in range(2)], np.int32)
    falling = np.tile([0, 1], len(table) // 2).astype(np.uint8)
    channels = len(table)
    net = Builder((depth, 1, depth + 1))
    net.op("threshold", tensors=thresholds(np.random.default_rng(0), np.float32, depth, 1, 1.0), bits=1)
    tensors = {
        "weight_bits": np.full((channels, 1, 1, 1), 2**depth - 1, np.uint64),
        "thresholds": table,
        "falling": falling,
    }
    net.op("binary_conv2d", tensors=tensors, groups=1, channels=channels, bits=1, **window((1, 1), dilation=(1, 1)))
    net.op("relu", inputs=[0])
    x = np.tri(depth + 1, depth, -1, dtype=np.uint8)[None, None]
    expected = reference.run_op(net.model.ops[1], tensors, [x])
    np.testing.assert_array_equal(Engine(net.model).run_op(1, [x]), expected)


@pytest.mark.parametrize("jitter", [0.0, 1e-6, 0.3, 2.0])
@pytest.mark.parametrize(("channels", "shared"), [(3, True), (20, False), (130, False)])
@pytest.mark.parametrize("bits", [5, 8])
def test_thresholds_that_rise_almost_evenly_decide_as_they_say(isa, bits, channels, shared, jitter):
    """At every threshold, just below and above it, at the ends and at what is no number."""
    rng = np.random.default_rng(7)
    rows, levels = 1 if shared else channels, 2**bits - 1
    steps = rng.uniform(0.01, 3, (rows, 1))
    table = steps * (np.arange(levels) + rng.uniform(-levels, levels, (rows, 1)))
    table = np.sort(table + jitter * steps * rng.uniform(-0.5, 0.5, table.shape), axis=1).astype(np.float32)
    falling = np.full(channels, 1) if shared else rng.integers(0, 2, channels)
    table[falling[:rows] == 1] = table[falling[:rows] == 1, ::-1]
    tensors = {"thresholds": np.ascontiguousarray(table), "falling": falling.astype(np.uint8)}
    ends = np.broadcast_to(np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e38], np.float32), (rows, 6))
    sides = [np.nextafter(table, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([table, *sides, rng.normal(0, 300, (rows, 200)).astype(np.float32), ends], axis=1)
    x = np.ascontiguousarray(np.broadcast_to(x, (channels, x.shape[1])).T)[None, None]
    net = Builder((channels, 1, x.shape[2]))
    net.op("threshold", tensors=tensors, bits=bits)
    net.op("relu", inputs=[0])
    expected = reference.run_op(net.model.ops[0], tensors, [x])
    engine = Engine(net.model, threads=2)
    np.testing.assert_array_equal(engine.run_op(0, [x]), expected)
    if jitter < 1:
        assert engine.kernels[0] == "float_ramp"
    elif not shared:
        assert engine.kernels[0] == ""


@pytest.mark.parametrize("channels", [16, 37])
@pytest.mark.parametrize("step", [1, 7.3, 150])
def test_integer_thresholds_that_rise_almost_evenly_decide_as_they_say(isa, step, channels):
    """Every sum of a 1x1 convolution; thresholds that every sum passes and that none reaches; constant channels."""
    rng = np.random.default_rng(8)
    sums = np.arange(255 * 17 + 1)
    table = np.rint(step * (np.arange(255) - rng.integers(0, 200, (channels, 1)))).astype(np.int64)
    table += rng.integers(0, 500, (channels, 1))
    table[1:4, :100], table[3:6, 150:], table[6], table[7] = -(2**31), 2**31 - 1, -(2**31), 2**31 - 1
    falling = rng.integers(0, 2, channels)
    opposite = np.where(table == -(2**31), 2**31 - 1, np.where(table == 2**31 - 1, -(2**31), 4000 - table))
    table[falling == 1] = opposite[falling == 1]
    grid = {"input_multiplier": 1, "input_offset": 0, "weight_width": 8, "weight_multiplier": 1, "weight_offset": -100}
    tensors = {
        "weight_codes": np.full((channels, 1), 101 | 116 << 8, np.uint64),  # weights of 1 and 16
        "thresholds": table.astype(np.int32),
        "falling": falling.astype(np.uint8),
    }
    net = Builder((2, 1, len(sums)))
    net.op("threshold", tensors=thresholds(rng, np.float32, 2, 8, 1.0), bits=8)
    net.op(
        "quant_conv2d", tensors=tensors, groups=1, channels=channels, bits=8, **grid, **window((1, 1), dilation=(1, 1))
    )
    net.op("relu", inputs=[0])
    high = np.minimum(sums // 16, 255)
    x = np.stack([sums - 16 * high, high], axis=1).astype(np.uint8)[None, None]
    expected = reference.run_op(net.model.ops[1], tensors, [x])
    assert len(np.unique(expected)) > 100
    np.testing.assert_array_equal(Engine(net.model).run_op(1, [x]), expected)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2), (1, 1, 0)])
@pytest.mark.parametrize(("bits", "falls"), [(1, True), (4, True), (32, True), (32, False)])
def test_max_pool_equals_the_reference(isa, kernel, stride, padding, bits, falls):
    """Codes always say which channels fall; of floats it may be left out."""
    rng = np.random.default_rng(4)
    channels, shape = 70, window((kernel, kernel), (stride, stride), (padding, padding))
    net = Builder((channels, 7, 9))
    x = rng.normal(size=(2, 7, 9, channels)).astype(np.float32)
    if bits < 32:
        tensors = thresholds(rng, np.float32, channels, bits, 1.0)
        net.op("threshold", tensors=tensors, bits=bits)
        net.op("max_pool", tensors={"falling": tensors["falling"]}, **shape)
        net.op("relu", inputs=[0])
        x = rng.integers(0, 2**bits, x.shape, dtype=np.uint8)
    else:
        falling = {"falling": rng.integers(0, 2, channels, dtype=np.uint8)} if falls else {}
        net.op("max_pool", tensors=falling, **shape)
    index = 1 if bits < 32 else 0
    expected = reference.run_op(net.model.ops[index], net.model.op_tensors(index), [x])
    np.testing.assert_array_equal(Engine(net.model, threads=2).run_op(index, [x]), expected)


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (7, 1, 0)])
def test_avg_pool_is_close_to_the_reference(isa, kernel, stride, padding, count_include_pad):
    net = Builder((19, 7, 8))
    shape = window((kernel, kernel), (stride, stride), (padding, padding))
    net.op("avg_pool", count_include_pad=count_include_pad, **shape)
    x = np.random.default_rng(5).normal(size=(3, 7, 8, 19)).astype(np.float32)
    assert close(Engine(net.model).run_op(0, [x]), reference.run_op(net.model.ops[0], {}, [x]))


def test_elementwise_ops_round_once_at_each_step(isa):
    rng = np.random.default_rng(6)
    net = Builder((21, 4, 3))
    scale, shift = rng.normal(size=(2, 21)).astype(np.float32)
    net.op("affine", tensors={"scale": scale, "shift": shift})
    net.op("hardtanh", min=-0.7, max=1)
    net.op("relu", inputs=[1])
    net.op("add", inputs=[2, 3])
    net.op("prelu", inputs=[1], tensors={"slope": rng.normal(size=21).astype(np.float32)})
    net.op("add", inputs=[4, 5])
    x = rng.normal(size=(5, 21, 4, 3)).astype(np.float32)
    expected = reference.run(net.model, x)[-1].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(Engine(net.model, threads=2)(x), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_convolution_that_writes_the_codes_of_its_threshold_writes_the_same(isa, case):
    """Run as a whole, the two are one; each alone, they are two. A depthwise 1x1 convolution shows every code."""
    size, c_in, c_out, groups, kernel, stride, padding, dilation, batch = CASES[case]
    rng = np.random.default_rng(3)
    net, shape = Builder((c_in, size, size)), window((kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
    weight = rng.normal(size=(c_out, kernel, kernel, c_in // groups)).astype(np.float32)
    net.op("conv2d", tensors={"weight": weight}, groups=groups, channels=c_out, **shape)
    net.op("threshold", tensors=thresholds(rng, np.float32, c_out, 1, 2.0), bits=1)
    ones = {"weight_bits": np.ones((c_out, 1, 1, 1), np.uint64), "scale": np.ones(c_out, np.float32)}
    net.op("binary_conv2d", tensors=ones, groups=c_out, channels=c_out, **window((1, 1), dilation=(1, 1)))
    x = rng.normal(size=(batch, c_in, size, size)).astype(np.float32)
    for threads in (1, 2):
        engine = Engine(net.model, threads=threads)
        assert engine.kernels[:2] == ["float_tile_bits", ""]
        codes = engine.run_op(1, [engine.run_op(0, [x.transpose(0, 2, 3, 1)])]).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(engine(x).reshape(codes.shape), 2 * codes.astype(np.float32) - 1)


@pytest.mark.parametrize(("rows", "size"), [((64, 64, "M", 96, "M"), 32), ((17, 40, "M", 70, 33), 14)])
def test_network_gives_the_same_bits_for_every_batch_and_thread_count(isa, rows, size):
    rng = np.random.default_rng(7)
    model = vgg(rng, rows, size)
    x = rng.normal(size=(70, 3, size, size)).astype(np.float32)
    whole = Engine(model)(x)
    engine = Engine(model, threads=2)
    np.testing.assert_array_equal(engine(x), whole)
    for batch in (1, 3, 16):
        np.testing.assert_array_equal(engine(x[:batch]), whole[:batch])
    assert engine(x[:0]).shape == (0, 10)


def test_network_of_codes_equals_the_reference_for_every_batch_and_thread_count(isa):
    rng = np.random.default_rng(9)
    model = quant_net(rng, size=9)
    x = rng.normal(size=(70, 3, 9, 9)).astype(np.float32)
    expected = reference.run(model, x)[-1][:, 0, 0]
    for engine in (Engine(model), Engine(model, threads=2)):
        for batch in (70, 1, 3, 0):
            np.testing.assert_array_equal(engine(x[:batch]), expected[:batch])


def test_network_of_tables_and_a_k_map_is_the_reference_op_by_op_and_the_same_for_every_batch(isa):
    rng = np.random.default_rng(10)
    model = table_net(rng, size=9)
    x = rng.normal(size=(40, 3, 9, 9)).astype(np.float32)
    values, engine = reference.run(model, x), Engine(model, threads=2)
    for index, op in enumerate(model.ops):
        found = engine.run_op(index, [values[number] for number in op["inputs"]])
        assert close(found, values[index + 1])
        if op["op"] not in ("table_conv2d", "abs_mean"):
            np.testing.assert_array_equal(found, values[index + 1])
    whole = Engine(model)(x)
    for batch in (40, 1, 3, 0):
        np.testing.assert_array_equal(engine(x[:batch]), whole[:batch])


def test_network_equals_the_reference_op_by_op(isa):
    """The float stem may differ by a rounding, so each op gets the reference's own values."""
    rng = np.random.default_rng(8)
    model = vgg(rng, (24, 40, "M", 70, 33), 14)
    x = rng.normal(size=(3, 3, 14, 14)).astype(np.float32)
    values, engine = reference.run(model, x), Engine(model, threads=2)
    assert close(engine.run_op(0, [values[0]]), values[1])
    for index in range(1, len(model.ops)):
        np.testing.assert_array_equal(engine.run_op(index, [values[index]]), values[index + 1])
