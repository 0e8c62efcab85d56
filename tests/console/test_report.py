"""What a run tells of numbers that are none."""

import json

import numpy as np
import pytest

from gptvq_jax.console import report
from gptvq_jax.console.comparison_text import protocol_text
from gptvq_jax.run import job
from gptvq_jax.study import ablations

INF, NAN = float("inf"), float("nan")


def test_numbers_that_json_does_not_have_are_written_as_float_reads_them():
    rows = {"a": [1.5, INF, -INF, NAN], "b": {"c": np.float64(INF)}, "d": "inf", "e": None, "f": 3}
    text = json.dumps(report.json_numbers(rows), allow_nan=False)
    read = json.loads(text)
    np.testing.assert_equal([float(value) for value in read["a"]], rows["a"])
    assert float(read["b"]["c"]) == INF
    assert (read["d"], read["e"], read["f"]) == ("inf", None, 3)


@pytest.mark.parametrize(
    "after, before, expected",
    [(np.e, 1.0, 1.0), (INF, 2.0, INF), (2.0, INF, -INF), (INF, INF, NAN), (NAN, 2.0, NAN)],
)
def test_the_logarithm_of_a_ratio(after, before, expected):
    np.testing.assert_equal(report.log_ratio(after, before), expected)


def summary_of(**more):
    numbers = ("num_layers", "quantized_bytes", "embedding_bytes", "dense_bytes", "seconds")
    numbers += ("checkpoint_bytes", "compile_seconds", "peak_memory_bytes", "bits_per_value")
    texts = {"evaluation": "3 x 8 tokens", "calibration": "6 x 32 tokens", "stages": {}}
    perplexity = {"perplexity_float": 2.0, "perplexity_quantized": 3.0}
    return dict.fromkeys(numbers, 1) | texts | perplexity | more


def figure(value, error=None):
    return {"value": value, "standard_error": error}


def test_figures_are_shown_with_their_standard_errors():
    comparison = {
        "perplexity": figure(3.0, 0.25),
        "perplexity_float": figure(2.0, 0.125),
        "log_perplexity_ratio": figure(0.405465, 0.01234),
        "kl_mean": figure(0.25, 0.015),
        "kl_median": figure(0.125, 0.0104),
        "kl_99": figure("inf", "nan"),
        "kl_max": figure(12.3456),
        "same_top1": figure(0.875, 0.0123),
    }
    protocol = {"dataset": "news", "split": "test", "joiner": "\n", "windows": 3, "context": 8}
    protocol |= {"tokens": 21, "bos": "none"}
    lines = report.summary_text(summary_of(comparison=comparison, protocol=protocol)).splitlines()
    assert lines[2:6] == [
        "     perplexity  float 2.000 ± 0.12 -> quantized 3.000 ± 0.25  (log-perplexity "
        "+0.4055 ± 0.012; 3 x 8 tokens)",
        "  KL divergence  mean 0.25 ± 0.015, median 0.125 ± 0.01, 99 % inf ± nan, maximum 12.35 "
        "nats a token, KL(float || quantized)",
        "     same top-1  87.50 ± 1.2 % of tokens",
        '       protocol  news, test, joined by "\\n"; 3 windows x 8 tokens, 21 predicted; '
        "BOS: none; standard errors over windows",
    ]
    one = protocol_text(protocol | {"windows": 1, "joiner": None})
    assert "one text; 1 windows x" in one and one.endswith("one window has no standard error")


def test_parts_of_a_compressed_checkpoint_are_told_apart_from_the_whole():
    mib = 2**20
    sizes = {"checkpoint_bytes": 226 * mib, "quantized_bytes": 3 * mib, "dense_bytes": 243 * mib}
    text = report.summary_text(summary_of(embedding_bytes=0, **sizes))
    expected = "226.0 MiB, compressed; before that quantized layers 3.0 MiB, dense leaves 243.0 MiB"
    assert f"  bytes on disk  {expected}\n" in text


def test_runs_of_earlier_versions_are_shown_as_before():
    lines = report.summary_text(summary_of()).splitlines()
    assert lines[2].endswith(
        "float 2.000 -> quantized 3.000  (log-perplexity +0.4055; 3 x 8 tokens)"
    )
    assert lines[3].startswith("    calibration  ")


def test_a_layer_has_its_error_on_held_out_windows_beside_that_on_fitted_ones():
    row = {"block": 3, "layer": "mlp/up_proj", "relative_error": 0.05, "sqnr_db": 13.01}
    row |= {"num_codebooks": 1, "index_bits": 4, "dim": 2, "seconds": 1.0, "bits_per_value": 2.0}
    judged = {"held_out_error": 0.0625, "held_out_sqnr_db": 12.04}
    head, new, old = report.layer_table([row | judged, row]).splitlines()
    assert head.split()[2:8] == ["rel.", "error", "held", "out", "SQNR", "dB"]
    assert new.split()[2:5] == ["0.05000", "0.06250", "13.01"]
    assert old.split()[2:5] == ["0.05000", "none", "13.01"]
    assert new.index("0.06250") + 7 == head.index("held out") + 8


def test_an_expert_with_few_tokens_has_their_number_behind_its_line():
    row = {"block": 3, "layer": "mlp/experts_12/up_proj", "relative_error": 0.05, "sqnr_db": 13.01}
    row |= {"num_codebooks": 1, "index_bits": 4, "dim": 2, "seconds": 1.0, "bits_per_value": 2.0}
    few = row | {"expert_tokens": 7, "shared_hessian": 0.875}
    plain = row | {"layer": "mlp/up_proj"}
    head, *lines = report.layer_table([few, plain]).splitlines()
    assert lines[0].endswith("  7 tokens, 88% shared") and lines[1].endswith("1.00")
    assert all(line.index("0.05000") + 7 == head.index("rel. error") + 10 for line in lines)


@pytest.mark.parametrize("values", [(0.5, INF, NAN), (INF, 0.5), (0.0, NAN)])
def test_ablations_with_runs_that_diverged(values, tmp_path):
    rows = [
        {"row": f"r{i}", "rise": v, "perplexity": v, "bits_per_value": 2.0, "seconds": 1.0}
        for i, v in enumerate(values)
    ]
    assert len(ablations.table(rows, "rise").splitlines()) == 2 + len(values)
    ablations.plot({"model": (rows, "rise")}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_run_of_a_hopeless_model_ends_with_its_summary(
    tiny_config, tmp_path, monkeypatch, capsys
):
    calls = []

    def hopeless(source, settings, workdir, *_):
        calls.append(settings)
        layer = {"kind": "layer", "block": 0, "layer": "mlp/up_proj", "relative_error": 0.5}
        layer |= {"sqnr_db": 3.0, "num_codebooks": 1, "index_bits": 2, "dim": 2, "seconds": 1.0}
        workdir.append_metrics([{**layer, "bits_per_value": 2.0}])
        workdir.checkpoint.mkdir()
        (workdir.checkpoint / "manifest.json").write_text("{}")
        sizes = ("num_layers", "quantized_bytes", "embedding_bytes", "dense_bytes", "seconds")
        sizes += ("checkpoint_bytes", "compile_seconds", "peak_memory_bytes", "bits_per_value")
        texts = {"evaluation": "1 x 32 tokens", "calibration": "6 x 32 tokens"}
        stages = {"stages": {"evaluate": {"seconds": 3.2}, "elsewhere": {"seconds": 1.9}}}
        perplexity = {"perplexity_float": INF, "perplexity_quantized": INF}
        return {"kind": "summary", **dict.fromkeys(sizes, 1), **texts, **stages, **perplexity}

    monkeypatch.setattr(job, "_quantize", hopeless)
    first = job.quantize(tiny_config, str(tmp_path / "w"))
    text = capsys.readouterr().out
    assert "perplexity  float inf -> quantized inf  (log-perplexity +nan" in text
    assert (
        "time  1 s, of which compilation 1 s\n         stages  evaluate 3 s, elsewhere 2 s\n"
        in text
    )
    assert job.quantize(tiny_config, str(tmp_path / "w")) == first and len(calls) == 1
    assert first["perplexity_quantized"] == INF
    for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # Infinity is not JSON
