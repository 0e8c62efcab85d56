"""Streams in words: windows that are cut from them are those of the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base import tensor_of

from gptvq_jax.ops import vq_matmul as entry
from gptvq_jax.ops.trellis_words import ROWS, Streams, cut_windows, outside, stream_words
from gptvq_jax.study.sample_tensors import random_trellis


@pytest.mark.parametrize("bits", [4, 12, 16])
@pytest.mark.parametrize(("rows", "stream_rows"), [(50, 24), (96, 96), (130, 64), (300, 289)])
def test_windows_are_those_of_the_tensor(rows, stream_rows, bits):
    tensor = jax.tree.map(jnp.asarray, random_trellis(rows, 40, bits, stream_rows))
    streams, expected = Streams.of(tensor), np.asarray(tensor.windows())
    found = stream_words(tensor)
    assert sorted(found) == [k for k in range(1, 7) if np.any(tensor.column_rates() == k)]
    for rate, (columns, words) in found.items():
        assert words.shape == (streams.cuts, streams.chunks, rate, len(columns))
        own = [*np.moveaxis(words, 2, 0), np.roll(words[:, :, 0], -1, axis=1)]
        windows = np.stack(list(cut_windows(list(map(jnp.asarray, own)), rate, bits)), axis=2)
        windows = windows.reshape(streams.cuts, -1, len(columns))[:, :stream_rows]
        np.testing.assert_array_equal(
            windows.reshape(-1, len(columns))[:rows], expected[:, columns]
        )


def test_whole_chunks_take_no_more_bytes_than_what_is_stored():
    tensor = random_trellis(512, 64, 12, 256)
    words = stream_words(tensor)
    assert sum(w.nbytes for _, w in words.values()) == len(tensor.codes)
    assert Streams.of(tensor).chunks * ROWS == 256


def test_outliers_are_added_in_any_number_to_a_row():
    tensor = random_trellis(16, 12, outliers=100)
    rest = outside(tensor)
    assert np.all(np.diff(rest.rows) >= 0) and len(np.unique(rest.rows)) < 17
    x = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    expected = np.zeros((16, 12))
    row, col = map(np.asarray, tensor.outlier_positions())
    np.add.at(expected, (row, col), np.asarray(tensor.outlier_values, np.float64))
    y = rest.apply(jnp.zeros((2, 16)), jnp.asarray(x))
    np.testing.assert_allclose(y, x @ expected.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_rates_that_are_traced_are_refused_with_the_fix(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: name.removeprefix("pallas_"))
    tensor = tensor_of("trellis, 8 bits")
    assert entry.make_kernel(tensor, name).implementation == name
    with pytest.raises(NotImplementedError, match="call make_kernel on the tensor outside of jax"):
        jax.eval_shape(lambda t: entry.make_kernel(t, name).packed, tensor)


@pytest.mark.parametrize(("backend", "traced"), [("tpu", False), ("tpu", True), ("gpu", False)])
def test_auto_takes_the_kernel_of_a_tpu_where_the_rates_are_known(backend, traced, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    tensor = tensor_of("trellis, 8 bits")
    kernel = jax.eval_shape(entry.make_kernel, tensor) if traced else entry.make_kernel(tensor)
    assert kernel.implementation == ("pallas_tpu" if backend == "tpu" and not traced else "xla")


def test_a_kernel_that_does_not_know_the_codes_says_so(monkeypatch):
    module, tensor = entry._module("reference"), tensor_of("trellis, levels")
    for kind, name in entry._CODES.items():
        monkeypatch.setattr(module, "KINDS", tuple(k for k in entry._CODES if k is not kind))
        refused = tensor if isinstance(tensor, kind) else tensor_of("2d 2 bit")
        with pytest.raises(NotImplementedError, match=f"it has no kernel for {name}"):
            entry.check_supported(refused, "reference")


def test_a_layout_is_of_its_tensor_alone():
    tensor = tensor_of("trellis, 8 bits")
    longer = dataclasses.replace(tensor, codes=jnp.pad(tensor.codes, (0, 100)))  # for_compilation
    for one, other in zip(
        stream_words(tensor).values(), stream_words(longer).values(), strict=True
    ):
        np.testing.assert_array_equal(one[1], other[1])
