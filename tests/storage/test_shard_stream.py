"""A safetensors file in pieces: the library that defines the format reads the same values."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gptvq_jax.storage.shard_stream import Slot, stream_bytes, write_stream

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SLOTS = {"a": Slot((3, 4), BFLOAT16), "empty": Slot((0, 2), BFLOAT16), "b": Slot((5,), BFLOAT16)}
A, B = np.arange(12).reshape(3, 4).astype(BFLOAT16), np.arange(5).astype(BFLOAT16)


def test_pieces_become_the_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    write_stream(path, SLOTS, [("a", A[:1]), ("a", A[1:]), ("b", B)])
    found = load_file(path)
    assert set(found) == set(SLOTS) and found["empty"].shape == (0, 2)
    np.testing.assert_array_equal(found["a"], A)
    np.testing.assert_array_equal(found["b"], B)
    assert path.stat().st_size == stream_bytes(SLOTS)


@pytest.mark.parametrize(
    "pieces",
    [
        [("b", B), ("a", A)],
        [("a", A)],
        [("a", A), ("a", A), ("b", B)],
        [("a", A.astype(np.float32)), ("b", B)],
        [("a", A), ("b", B), ("c", B)],
    ],
    ids=["order", "missing", "twice", "dtype", "unknown"],
)
def test_other_pieces_are_refused_and_leave_no_file(tmp_path, pieces):
    with pytest.raises(ValueError, match="not the next|missing"):
        write_stream(tmp_path / "x", SLOTS, pieces)
    assert not list(tmp_path.iterdir())
