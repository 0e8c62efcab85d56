"""The measurement of loading, on a small model."""

from gptvq_jax.models.open import open_source
from gptvq_jax.models.shapes import block_shapes
from gptvq_jax.study.loading_benchmark import measure


def test_measures_every_way_on_a_model_of_that_shape(tmp_path):
    row = measure(tmp_path / "model", hidden=32, wide=48, head_dim=16, repeats=1)
    assert set(row) == {"read", "cast_host", "cast_device", "load", "ratio", "bytes"}
    assert all(value > 0 for value in row.values())
    config = open_source(str(tmp_path / "model")).config
    assert (config.num_hidden_layers, config.head_dim, config.vocab_size) == (2, 16, 256)
    assert block_shapes(config)["mlp.up_proj.weight"] == (48, 32)
    assert row["bytes"] == 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    assert row["ratio"] == row["load"] / min(row["cast_host"], row["cast_device"])
