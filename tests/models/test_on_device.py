"""Tensors on the device against NumPy, the way of a CPU and the way of an accelerator."""

import json
import re
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gptvq_jax.models import on_device
from gptvq_jax.models.file_tensor import read_header
from gptvq_jax.models.on_device import Loader

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32]
PATH = Path("model.safetensors")
both = pytest.mark.parametrize("platform", ["cpu", "accelerator"])


def finite_bits(dtype, shape):
    """Random bit patterns of finite numbers, zeros of both signs and subnormals among them."""
    bits = {2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize]
    values = np.random.default_rng(0).integers(0, np.iinfo(bits).max, shape, bits, endpoint=True)
    values = values.view(dtype)
    with np.errstate(invalid="ignore"):  # of NaNs that signal
        values[~np.isfinite(values)] = 1
    sign = np.iinfo(bits).max // 2 + 1
    special = np.array([1, 0, sign, sign + 1], bits).view(dtype)
    values.reshape(-1)[:4] = special[: values.size]
    return values


def load(array, platform="cpu"):
    with Loader(platform) as loader:
        loaded = loader.load(array, "w", PATH)
        loader.check()
    return loaded


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 300), (256, 64), (1000, 33), (1, 1), (300,)])
def test_every_bit_is_that_of_the_stored_values(platform, dtype, shape):
    if platform == "accelerator" and dtype != ml_dtypes.bfloat16:
        stored = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    else:
        stored = finite_bits(dtype, shape)
    loaded = load(stored, platform)
    assert isinstance(loaded, jax.Array) and loaded.dtype == np.float32
    expected = stored.astype(np.float32).T
    np.testing.assert_array_equal(
        np.asarray(loaded).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_is_read_as_an_array_is(tmp_path, dtype):
    stored = {"a": finite_bits(dtype, (1000, 40)), "b": finite_bits(dtype, (40,))}
    path = tmp_path / "x.safetensors"
    save_file(stored, path)
    _, tensors = read_header(path)
    for name, array in stored.items():
        tensor = tensors[name]
        assert tensor.shape == array.shape and tensor.dtype == array.dtype
        np.testing.assert_array_equal(tensor[3:7], array[3:7])
        np.testing.assert_array_equal(tensor[:], array)
        np.testing.assert_array_equal(load(tensor), array.astype(np.float32).T)


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
def test_the_first_tensor_that_is_not_finite_is_named(platform, dtype, value):
    good = np.full((600, 8), ml_dtypes.finfo(dtype).max, dtype)
    bad = good.copy()
    bad[599, 7] = value
    with Loader(platform) as loader:
        for name, array in {"a": good, "b": bad, "c": good[0], "d": bad[-1]}.items():
            loader.load(array, name, PATH)
        with pytest.raises(ValueError, match=rf"^{PATH}: tensor b contains NaN or Inf$"):
            loader.check()


@pytest.mark.parametrize("length", [-1, -5000, 0, +100])
def test_a_file_that_changed_since_it_was_opened_is_one_line(tmp_path, length):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones((1000, 40), np.float32)}, path)
    _, tensors = read_header(path)
    content = path.read_bytes()
    path.write_bytes(content + bytes(length) if length > 0 else content[:length])
    found = path.stat().st_size
    message = f"{path} has changed since it was opened: it has {found} bytes, not {len(content)}"
    with Loader("cpu") as loader, pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loader.load(tensors["a"], "a", path)


def test_a_file_cut_short_while_it_is_read_is_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones((1000, 40), np.float32)}, path)
    start, tensors = read_header(path)
    tensor = tensors["a"]
    assert tensor.offset == start
    beyond = type(tensor)(path, "F32", (2000, 40), start, tensor.file_bytes)
    with pytest.raises(ValueError, match="x.safetensors was cut short while it was read"):
        beyond[:]


def test_the_header_says_where_tensors_are(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6, dtype=np.int8), "b": np.ones((2, 3), np.float16)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    offsets = {k: v["data_offsets"] for k, v in json.loads(content[8 : 8 + length]).items()}
    start, tensors = read_header(path)
    assert start == 8 + length
    assert {name: tensor.offset - start for name, tensor in tensors.items()} == {
        name: begin for name, (begin, _) in offsets.items()
    }


def test_a_cpu_shares_the_memory_that_the_host_filled(monkeypatch):
    filled, aligned = [], on_device._aligned
    monkeypatch.setattr(
        on_device, "_aligned", lambda shape: filled.append(aligned(shape)) or filled[-1]
    )
    loaded = load(np.ones((1000, 40), ml_dtypes.bfloat16))
    assert loaded.unsafe_buffer_pointer() == filled[0].ctypes.data


def test_its_threads_end_with_it():
    before = threading.active_count()
    load(np.ones((1000, 8), np.float32))
    assert threading.active_count() == before
