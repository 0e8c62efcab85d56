"""The decode benchmark: what it measures, leaves out and shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptvq_jax.study import decode_benchmark as bench
from gptvq_jax.study import decode_report


@pytest.fixture(scope="module")
def rows():
    chosen = bench.contenders(["2d_2.25", "aqlm_2x8"], ["xla", "pallas_tpu"], ["float32"])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_MOST_SECONDS", float("inf"))  # however busy this machine is
        measured = bench.measure(64, 256, 2, chosen, 100_000, 3, seen.append)
    assert seen == [row["name"] for row in measured if "skipped" not in row]
    return measured


def test_every_contender_has_a_row_with_its_bytes(rows):
    names = [(row["name"], row["implementation"]) for row in rows if "skipped" not in row]
    assert names == [("float32", ""), ("int4_g128", ""), ("2d_2.25", "xla"), ("aqlm_2x8", "xla")]
    dense, int4, vq = rows[:3]
    assert dense["bytes"] == 4 * 64 * 256 and dense["copies"] == 2
    assert int4["bits_per_value"] == 4.125
    assert vq["bits_per_value"] == pytest.approx(2.265625)
    assert vq["copies"] == -(-100_000 // vq["bytes"])
    for row in rows[:3]:
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
    assert dense["to_float32"] == int4["to_int4"] == 1


def test_what_cannot_run_here_is_left_out_with_its_reason(rows):
    assert jax.default_backend() == "cpu"
    skipped = [row for row in rows if "skipped" in row]
    assert [row["implementation"] for row in skipped] == ["pallas_tpu"] * 2
    assert all("it needs a TPU" in row["skipped"] for row in skipped)


def test_a_product_is_that_of_the_last_weight():
    chosen = bench.contenders(["2d_3.125"], ["reference"], ["float32"])
    x = jnp.ones((1, 256))
    for contender in chosen[::2]:
        weights, _ = bench._copies(contender, 64, 256, 100_000)
        assert len(weights) > 1
        expected = x @ weights[-1]
        np.testing.assert_allclose(bench._products(x, weights), expected, rtol=1e-5, atol=1e-6)


def test_table_and_plot_show_every_row(rows, tmp_path):
    text = decode_report.table(rows, 1e10)
    assert text.count("64 x 256, batch 2") == 1
    assert all(row["name"] in text for row in rows)
    assert text.count("not measured: ") == 2
    decode_report.plot(rows, "a chip", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_shapes_and_names():
    assert list(bench.shapes_of(["7b", "12x34"])) == [*bench.MODELS["7b"], (12, 34)]
    for call in (
        lambda: list(bench.shapes_of(["13b"])),
        lambda: bench.contenders(["3d"], ["xla"], []),
        lambda: bench.contenders([], ["xla"], ["int3"]),
    ):
        with pytest.raises(ValueError, match=r"choose from|must be one of"):
            call()


def test_a_copy_has_a_bandwidth():
    assert bench.copy_bandwidth(1 << 20, 2) > 1e6


@pytest.mark.parametrize("name, bits", [("trellis_2.0_l8", 8), ("trellis_2.0", 12)])
def test_trellis_formats_have_the_rates_that_they_are_called_by(name, bits):
    *_, contender = bench.contenders([name], ["xla"], [])
    weights, size = bench._copies(contender, 512, 512, 0)
    tensor = weights[0].packed
    rates = np.asarray(tensor.column_rates())
    assert tensor.window_bits == bits and tensor.stream_rows == 256
    assert np.mean(rates == 2) == pytest.approx(0.5, abs=0.1) and set(rates) == {1, 2, 3}
    assert 8 * size / 512**2 == pytest.approx(2.1, abs=0.1)
