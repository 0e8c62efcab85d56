"""A run with method 'aqlm': its settings reach every layer, and its numbers are those on disk."""

import json

import numpy as np
import pytest

from gptvq_jax.models.llama import get_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.run import job
from gptvq_jax.storage.checkpoint import PackedCheckpoint


@pytest.mark.slow
def test_a_run(tiny_config, tmp_path, capsys):
    tiny_config.method, tiny_config.num_blocks = "aqlm", 1
    tiny_config.update_from_flattened_dict({
        "aqlm.num_codebooks": 2,
        "aqlm.code_bits": 7,
        "aqlm.seed": "random",
        "aqlm.dim": 4,
        "aqlm.em_iterations": 1,
        "aqlm.rounds": 1,
    })  # fmt: skip
    summary = job.quantize(tiny_config, str(tmp_path / "run"))
    assert "  2x7/4 " in capsys.readouterr().out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "layer"]
    assert [row["layer"] for row in rows] == list(LINEAR_LAYERS)
    source, packed = open_source(tiny_config.model), PackedCheckpoint(tmp_path / "run/checkpoint")
    num_bytes = num_values = 0
    for row in rows:
        weight = np.asarray(get_layer(source.block(0), row["layer"])["kernel"]).T
        tensor = get_layer(packed.packed_block(0), row["layer"])["kernel"]
        assert tensor.shape == weight.shape
        assert (row["num_codebooks"], row["index_bits"], row["dim"]) == (2, 7, 4)
        codes = np.asarray(tensor.unpack_codes())
        assert codes.shape == (2, len(weight), weight.shape[1] // 4)
        assert row["unused_centroids"] == sum(128 - len(np.unique(of_book)) for of_book in codes)
        shares = [np.unique(book, return_counts=True)[1] / book.size for book in codes]
        entropy = np.mean([-np.sum(share * np.log2(share)) for share in shares])
        assert row["code_entropy"] == pytest.approx(entropy, rel=1e-5)
        # Rows of 7-bit codes in whole bytes, a float16 for each, 2 x 128 centroids of 4 float16.
        stored = 2 * len(weight) * -(-7 * codes.shape[2] // 8) + 2 * len(weight) + 2 * 128 * 4 * 2
        assert row["num_bytes"] == tensor.num_bytes == stored
        assert row["bits_per_value"] == 8 * stored / weight.size
        num_bytes, num_values = num_bytes + stored, num_values + weight.size
        assert 0 < row["relative_error"] < 0.05
    assert sum(row["unused_centroids"] for row in rows) > 0
    assert summary["bits_per_value"] == pytest.approx(8 * num_bytes / num_values)
