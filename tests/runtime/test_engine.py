"""The engine's Python face: what it accepts, what it says, and calls from many threads."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
import reference
from packed_models import Builder, coded, quant_net, table_net, thresholds, vgg, window, words

from lowbit import _engine
from lowbit.errors import LowbitError, UsageError
from lowbit.packed import check_graph, container
from lowbit.preprocessing import Preprocessing
from lowbit.runtime import Engine, instruction_sets, load_image, peak

# How instruction sets multiply bits, where not by tiles.
WAYS = {"amx": "matrices.multiply", "avx512": "blocks.count", "avx_vnni": "blocks.count", "avx2": "blocks.count"}


@pytest.fixture
def model():
    model = vgg(np.random.default_rng(1), (16, 40, "M"), 8, classes=3)
    model.preprocessing = Preprocessing("RGB", (8, 8), 0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model.classes = ["ant", "bee", "cow"]
    return model


def images(count=4, shape=(3, 8, 8)):
    return np.random.default_rng(2).normal(size=(count, *shape)).astype(np.float32)


def test_file_bytes_and_model_give_the_same_and_are_checked_once(model, tmp_path, monkeypatch):
    model.save(tmp_path / "m.lowbit")
    x, data, checked = images(), model.to_bytes(), []
    monkeypatch.setattr(container, "check_graph", lambda *graph: checked.append(graph) or check_graph(*graph))
    expected = Engine(model)(x)
    assert expected.shape == (4, 3)
    assert expected.dtype == np.float32
    for count, source in enumerate((tmp_path / "m.lowbit", str(tmp_path / "m.lowbit"), data), 1):
        assert len(checked) == count
        np.testing.assert_array_equal(Engine(source)(x), expected)
    assert len(checked) == 4


def test_properties(model):
    engine = Engine(model, threads=2)
    assert engine.classes == ["ant", "bee", "cow"]
    assert engine.preprocessing == model.preprocessing
    assert engine.input_shape == (3, 8, 8)
    assert engine.isa == _engine.available_isas()[0]
    assert engine.threads == 2


def test_input_of_any_memory_order(model):
    x, engine = images(), Engine(model)
    strided = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(engine(strided), engine(x))
    np.testing.assert_array_equal(engine(x[::2]), engine(x)[::2])
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(engine(read_only), engine(x))


def test_map_as_output():
    net = Builder((2, 5, 4))
    net.op("relu")
    x = images(3, (2, 5, 4))
    np.testing.assert_array_equal(Engine(net.model)(x), np.maximum(x, 0))
    assert Engine(net.model)(x[:0]).shape == (0, 2, 5, 4)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1.0]], "needs a float32 NumPy array, not list"),
        (np.zeros((1, 3, 8, 8)), "not float64 array"),
        (np.zeros((3, 8, 8), np.float32), r"shape \(N, 3, 8, 8\)"),
        (np.zeros((1, 8, 8, 3), np.float32), r"shape \(N, 3, 8, 8\)"),
        (np.full((1, 3, 8, 8), np.nan, np.float32), "NaN or an infinity"),
        (np.full((1, 3, 8, 8), -np.inf, np.float32), "NaN or an infinity"),
    ],
)
def test_wrong_inputs_are_refused(model, x, message):
    engine = Engine(model)
    for call in (engine, engine.profile):
        with pytest.raises(UsageError, match=message):
            call(x)


@pytest.mark.parametrize("threads", [0, -1, 257, 1.5, True, "2"])
def test_wrong_threads_are_refused(model, threads):
    with pytest.raises(UsageError, match="threads"):
        Engine(model, threads=threads)


def test_what_is_no_packed_model_is_refused():
    with pytest.raises(UsageError, match=r"a dict is no packed model, file's path or its bytes; .* give \.packed"):
        Engine({})


def test_unknown_isa_is_refused(model, monkeypatch):
    monkeypatch.setenv("LOWBIT_ISA", "sse9")
    with pytest.raises(UsageError, match=r"LOWBIT_ISA is 'sse9'.*scalar"):
        Engine(model)


def test_scalar_isa_can_be_forced(model, monkeypatch):
    monkeypatch.setenv("LOWBIT_ISA", "scalar")
    assert Engine(model).isa == "scalar"


@pytest.mark.parametrize("isa", _engine.available_isas())
def test_each_op_names_the_kernel_that_it_calls(model, monkeypatch, isa):
    """The first convolution does the threshold too; the last one has too few channels for blocks."""
    monkeypatch.setenv("LOWBIT_ISA", isa)
    monkeypatch.setenv("LOWBIT_TUNE", "0")
    bits = WAYS.get(isa, "binary_bits")
    assert Engine(model).kernels == ["float_tile_bits", "", bits, "", "binary_floats"]
    coded = quant_net(np.random.default_rng(5))
    sums = "integer_sums" if isa in ("scalar", "neon") else "bytes.sums"
    assert Engine(coded).kernels == ["", *[sums] * 3, "", sums]
    assert Engine(table_net(np.random.default_rng(6))).kernels[:2] == ["float_codes", "float_tile"]


@pytest.mark.parametrize("isa", _engine.available_isas())
@pytest.mark.parametrize("side", [1, 2, 3])
def test_a_layer_of_few_pixels_names_the_tiles_that_it_calls(monkeypatch, isa, side):
    monkeypatch.setenv("LOWBIT_ISA", isa)
    monkeypatch.setenv("LOWBIT_TUNE", "0")
    rng, net = np.random.default_rng(8), Builder((64, side, side))
    net.op("threshold", tensors=thresholds(rng, np.float32, 64, 1, 1.0), bits=1)
    tensors = {"weight_bits": words(rng, 64, 3, 3, depth=64), "scale": np.ones(64, np.float32)}
    shape = window((3, 3), padding=(1, 1), dilation=(1, 1))
    net.op("binary_conv2d", tensors=tensors, groups=1, channels=64, **shape)
    fewest = {"blocks.count": 4, "matrices.multiply": 8}
    kernel = WAYS.get(isa, "binary_floats")
    assert Engine(net.model).kernels[1] == (kernel if side**2 >= fewest.get(kernel, 0) else "binary_floats")


def test_kernels_chosen_by_measuring_give_the_same_bits(model, monkeypatch):
    outputs = []
    for tune in ("0", "1"):
        monkeypatch.setenv("LOWBIT_TUNE", tune)
        engine = Engine(model)
        assert engine.kernels[2] in ("binary_bits", *WAYS.values())
        assert Engine(model).kernels == engine.kernels  # measured once
        outputs.append(engine(images()))
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("isa", _engine.available_isas())
def test_codes_may_be_multiplied_bit_by_bit(monkeypatch, isa):
    monkeypatch.setenv("LOWBIT_ISA", isa)
    rng, shape = np.random.default_rng(7), window((3, 3), padding=(1, 1), dilation=(1, 1))
    net = Builder((64, 9, 9))
    net.op("threshold", tensors=thresholds(rng, np.float32, 64, 2, 1.0), bits=2)
    grid, tensors = coded(rng, 48, 3, 64, 1, 2, -1)
    grid |= {"input_multiplier": 1, "input_offset": 0}
    net.op("quant_conv2d", tensors=tensors | {"scale": np.ones(48, np.float32)}, groups=1, channels=48, **grid, **shape)
    x = rng.normal(size=(3, 64, 9, 9)).astype(np.float32)
    expected = reference.run(net.model, x)[-1].transpose(0, 3, 1, 2)
    planes = "planes.blocks.count" if WAYS.get(isa) == "blocks.count" else "planes.binary_subtract"
    for tune in ("0", "1"):
        monkeypatch.setenv("LOWBIT_TUNE", tune)
        engine = Engine(net.model)
        by_bits = engine.kernels[1] == planes
        assert by_bits or engine.kernels[1] in ("bytes.sums", "matrices.multiply", "integer_sums")
        assert tune == "1" or by_bits == (isa in ("avx512_vpopcntdq", "avx512", "avx2", "avx_vnni"))
        np.testing.assert_array_equal(engine(x), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of a process's memory")
def test_measuring_takes_no_memory_that_the_file_does_not_need(tmp_path):
    """One pixel of 16 million is looked at: as many images as measuring wants would take 16 GB."""
    net, rng = Builder((1, 4096, 4096)), np.random.default_rng(8)
    net.op("threshold", tensors=thresholds(rng, np.float32, 1, 1, 1.0), bits=1)
    shape = window((1, 1), stride=(4096, 4096), dilation=(1, 1))
    tensors = {"weight_bits": words(rng, 32, 1, 1, depth=1), "scale": np.ones(32, np.float32)}
    net.op("binary_conv2d", tensors=tensors, groups=1, channels=32, **shape)
    net.model.save(tmp_path / "net.lowbit")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
        "from lowbit.runtime import Engine; print(Engine(sys.argv[1], threads=1).kernels[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "net.lowbit"],
        env={**os.environ, "LOWBIT_TUNE": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("binary_floats", *WAYS.values())


def test_instruction_sets_are_those_of_the_build_and_one_is_chosen(monkeypatch):
    listed = instruction_sets()
    assert [row["isa"] for row in listed] == _engine.built_isas()
    assert [row["isa"] for row in listed if row["cpu"]] == _engine.available_isas()
    for isa in ("", "scalar"):
        monkeypatch.setenv("LOWBIT_ISA", isa)
        chosen = [row["isa"] for row in instruction_sets() if row["chosen"]]
        assert chosen == [isa or _engine.available_isas()[0]]
    monkeypatch.setenv("LOWBIT_ISA", "sse9")
    with pytest.raises(UsageError, match="LOWBIT_ISA is 'sse9'"):
        instruction_sets()


def test_run_op_checks_its_inputs(model):
    engine = Engine(model)
    codes = np.zeros((2, 8, 8, 16), np.uint8)
    assert engine.run_op(2, [codes]).shape == (2, 8, 8, 40)
    with pytest.raises(UsageError, match="no op 9"):
        engine.run_op(9, [codes])
    with pytest.raises(UsageError, match="1 inputs, not 2"):
        engine.run_op(2, [codes, codes])
    with pytest.raises(UsageError, match="uint8 of shape"):
        engine.run_op(2, [codes.astype(np.float32)])
    with pytest.raises(UsageError, match="codes of 1 bits, but one is 2"):
        engine.run_op(2, [codes + 2])


def test_profile_times_every_op(model):
    seconds = Engine(model).profile(images())
    assert len(seconds) == len(model.ops)
    assert all(time >= 0 for time in seconds)


def test_predict_gives_probabilities(model):
    pictures = [Image.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
    engine = Engine(model)
    probabilities = engine.predict(pictures)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    logits = engine(model.preprocessing(pictures))
    np.testing.assert_array_equal(probabilities.argmax(axis=1), logits.argmax(axis=1))
    assert engine.predict([]).shape == (0, 3)


def test_predict_needs_a_preprocessing(model):
    model.preprocessing = None
    with pytest.raises(LowbitError, match="how images are prepared"):
        Engine(model).predict([Image.new("RGB", (8, 8))])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_with_images_of_their_own_give_the_same(model, threads):
    """Fewer images than threads, as many, a rest, and more than fit into memory at once."""
    x = images(215)
    alone, together = Engine(model), Engine(model, threads=threads)
    expected = alone(x)
    for batch in (215, 1, threads, threads + 1, 4 * threads + 1, 150, 0):
        np.testing.assert_array_equal(together(x[:batch]), expected[:batch])
    together.profile(x[:12])
    np.testing.assert_array_equal(together(x), expected)


def test_a_caller_that_flushes_denormals_changes_no_bit(model):
    torch = pytest.importorskip("torch", reason="torch sets the mode")
    model.tensors["1.thresholds"] = np.zeros_like(model.tensors["1.thresholds"])
    x = images(20) * np.float32(1e-40)
    engines = [Engine(model), Engine(model, threads=2)]
    expected = engines[0](x)
    sums = engines[0].run_op(0, [np.ascontiguousarray(x.transpose(0, 2, 3, 1))])
    assert 0 < np.abs(sums[sums != 0]).max() < np.finfo(np.float32).tiny
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        engines.append(Engine(model, threads=2))
        found = [engine(x) for engine in engines for _ in range(3)]
        again = engines[0].run_op(0, [np.ascontiguousarray(x.transpose(0, 2, 3, 1))])
    finally:
        torch.set_flush_denormal(False)
    assert all(np.array_equal(logits, expected) for logits in found)
    assert np.array_equal(again, sums)


def test_a_network_that_is_loaded_while_denormals_are_flushed_gives_the_same_codes():
    """These thresholds lie close enough to a line for codes to be computed only where denormal numbers are zero."""
    torch = pytest.importorskip("torch", reason="torch sets the mode")
    limits = ((np.arange(31) - 15) * 2e-38).astype(np.float32)
    limits[15] = 1.1e-38
    net = Builder((1, 1, 1))
    net.op("threshold", tensors={"thresholds": limits[None], "falling": np.zeros(1, np.uint8)}, bits=5)
    tensors = {"levels": np.zeros(32, np.float32), "weight": np.ones((1, 1, 1, 1), np.float32)}
    net.op("table_conv2d", tensors=tensors, groups=1, channels=1, **window((1, 1), dilation=(1, 1)))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        engine = Engine(net.model)
    finally:
        torch.set_flush_denormal(False)
    x = np.array([0, 5e-39, 1.05e-38, 1.2e-38, -1e-39], np.float32)
    codes = engine.run_op(0, [x.reshape(-1, 1, 1, 1)])
    assert codes.ravel().tolist() == [int((limits <= value).sum()) for value in x]


def test_calls_from_many_threads(model):
    """Two engines, each called from four threads at once with batches of different sizes."""
    engines = [Engine(model, threads=2), Engine(model)]
    x = images(20)
    expected = engines[1](x)
    wrong = []

    def work(number):
        batches = (1, 7, 20, 3)
        wrong.extend(b for b in batches if not np.array_equal(engines[number % 2](x[:b]), expected[:b]))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_engine_answers_in_a_forked_child_and_can_be_deleted_there(model):
    """Its helpers are not there, and another thread of the parent is in the middle of a call."""
    engines, x, stop = [Engine(model, threads=2)], images(20), threading.Event()
    expected = engines[0](x)

    def keep_busy(engine):
        while not stop.is_set():
            engine(x)

    def work():
        np.testing.assert_array_equal(engines[0](x), expected)
        assert engines[0].threads == 1
        del engines[0]

    busy = threading.Thread(target=keep_busy, args=(engines[0],))
    busy.start()
    children = [multiprocessing.get_context("fork").Process(target=work) for _ in range(3)]
    for child in children:
        child.start()
    stop.set()
    for child in children:
        child.join(timeout=30)
        child.kill()
    busy.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert engines[0].threads == 2


def test_dense_layers_of_any_width():
    rng = np.random.default_rng(3)
    for width in (1, 63, 1000):
        net = Builder((width, 1, 1))
        weight = rng.normal(size=(5, 1, 1, width)).astype(np.float32)
        net.op("conv2d", tensors={"weight": weight}, groups=1, channels=5, **window((1, 1), dilation=(1, 1)))
        x = images(9, (width, 1, 1))
        np.testing.assert_allclose(Engine(net.model)(x), x[:, :, 0, 0] @ weight[:, 0, 0].T, rtol=1e-4, atol=1e-4)


def test_importing_the_runtime_needs_no_torch():
    code = "import sys, lowbit, lowbit.runtime, lowbit.packed; lowbit.Engine; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_images_are_loaded_or_refused_in_one_sentence(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(4).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(whole)
    assert load_image(whole).size == (30, 40)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:2000])
    text = tmp_path / "text.png"
    text.write_text("no image")
    script = tmp_path / "script.png"  # Pillow would start another program to decode it
    script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    lab = tmp_path / "lab.tif"
    Image.new("LAB", (8, 8)).save(lab)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (9000, 9000)).save(bomb)
    for path, message in (
        (cut, "damaged or cut short"),
        (text, "no image of a known format"),
        (script, "no image of a known format"),
        (lab, "has colours of the kind LAB; convert it to RGB"),
        (bomb, "scale it down"),
        (tmp_path / "none.png", "does not exist"),
        (tmp_path, "is no regular file"),
    ):
        with pytest.raises(LowbitError, match=message):
            load_image(path)


@pytest.mark.parametrize("kind", ["float", "integer", "binary"])
def test_a_core_has_a_peak_in_every_instruction_set(kind):
    assert all(0 < peak(kind, isa) < 1e16 for isa in _engine.available_isas())


@pytest.mark.parametrize(("kind", "isa"), [("binary", "sse9"), ("octal", "scalar")])
def test_an_unknown_peak_is_refused(kind, isa):
    with pytest.raises(UsageError, match=r"(octal|sse9)'.*; `lowbit bench --list-kernels` lists"):
        peak(kind, isa)
