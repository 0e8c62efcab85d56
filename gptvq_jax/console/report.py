"""What a run tells its user: the table per layer and the summary."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptvq_jax.console.comparison_text import comparison_lines, figure_text, protocol_text
from gptvq_jax.console.recipe_text import rule_lines, rule_number
from gptvq_jax.console.stopwatch import stages_of

_COLUMNS = "  rel. error   held out   SQNR dB    code   bits/value   seconds"
_NAME_WIDTH = 17  # of layers, at least


def json_numbers(value: Any) -> Any:
    """JSON has no infinity and no NaN: in their place 'inf' and 'nan', which float() reads."""
    if isinstance(value, dict):
        return {name: json_numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [json_numbers(part) for part in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def log_ratio(after: float, before: float) -> float:
    """Natural logarithm of after / before: inf where only `after` is, nan where both are."""
    with np.errstate(invalid="ignore"):
        return float(np.log(after) - np.log(before))


def layer_table(rows: list[dict[str, Any]]) -> str:
    """One line per layer: relative output errors, SQNR, code, true bits per value, seconds.

    Errors and SQNR are on the windows that the layer was fitted to, "held out" is the error on the
    others. A code of 2x8/8 stands for two codes of 8 bits for 8 weights, L12/256 for windows of 12
    bits in streams of 256 rows. Of an expert with too few tokens their number follows, and how much
    of its Hessian is that of all experts; with a recipe, the number of the rule that took a layer.
    """
    ruled = any("rule" in row for row in rows)
    width = max([_NAME_WIDTH, *(len(row["layer"]) for row in rows)])
    lines = [f"block  {'layer':<{width}s}{_COLUMNS}" + "   rule" * ruled]
    for row in rows:
        sqnr = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
        held_out = f"{row['held_out_error']:.5f}" if "held_out_error" in row else "none"
        code = f"{row['num_codebooks']}x{row['index_bits']}/{row['dim']}"
        if "stream_rows" in row:
            code = f"L{row['index_bits']}/{row['stream_rows']}"
        if not row["num_codebooks"]:
            code = "dense"
        rule = f" {rule_number(row):>6s}" if ruled else ""
        few = ""
        if row.get("shared_hessian"):
            few = f"  {row['expert_tokens']} tokens, {row['shared_hessian']:.0%} shared"
        lines.append(
            f"{row.get('block', '-'):>5}  {row['layer']:<{width}s} {row['relative_error']:11.5f} "
            f"{held_out:>10s} {sqnr:>9s} "
            f"{code:>7s} {row['bits_per_value']:12.4f} {row['seconds']:9.2f}{rule}{few}"
        )
    return "\n".join(lines)


def summary_text(
    summary: dict[str, Any],
    tuned: Sequence[dict[str, Any]] = (),
    layers: Sequence[dict[str, Any]] = (),
) -> str:
    """The last lines of a run.

    Args:
      summary: of the run.
      tuned: rows of its blocks, if they were tuned.
      layers: rows of its layers, for what a recipe did; none: nothing is said of one.
    """
    mib = 1 / 2**20
    embedding_bytes = summary["embedding_bytes"]
    kind = "packed" if any(row["kind"] == "outer" for row in layers) else "int8"
    embeddings = f"{kind} embeddings {embedding_bytes * mib:.1f} MiB, " if embedding_bytes else ""
    resumed = summary.get("resumed_at") is not None
    stopped = "; the run was stopped before, which is not in it" if resumed else ""
    lines = [
        ("bits per value", f"{summary['bits_per_value']:.4f}  (codes, codebooks and scales of "
         f"{summary['num_layers']} layers{_kept_dense(layers)})"),
        *(("recipe" * (not i), line) for i, line in enumerate(rule_lines(layers))),
        ("bytes on disk", f"{summary['checkpoint_bytes'] * mib:.1f} MiB, compressed; before that "
         f"quantized layers {summary['quantized_bytes'] * mib:.1f} MiB, {embeddings}dense leaves "
         f"{summary['dense_bytes'] * mib:.1f} MiB"),
        ("perplexity", _perplexity_text(summary)),
        *_judged(summary),
        *([("block tuning", _tuning_text(tuned))] if tuned else []),
        *([("model tuning", _model_tuning(summary))] if "tuning" in summary else []),
        ("calibration", summary["calibration"]),
        ("time", f"{summary['seconds']:.0f} s, of which compilation "
         f"{summary['compile_seconds']:.0f} s{stopped}"),
        ("stages", ", ".join(f"{k} {v['seconds']:.0f} s" for k, v in stages_of(summary).items())),
        ("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]  # fmt: skip
    return "\n".join(f"{name:>15s}  {text}" for name, text in lines)


def _kept_dense(layers: Sequence[dict[str, Any]]) -> str:
    """Of layers of blocks that a recipe keeps dense, which count."""
    count = sum(row["kind"] == "layer" and not row["num_codebooks"] for row in layers)
    return f", and {count} that a recipe keeps dense" if count else ""


def _perplexity_text(summary: dict[str, Any]) -> str:
    before, after = summary["perplexity_float"], summary["perplexity_quantized"]
    values = {"perplexity_float": before, "perplexity": after}
    values["log_perplexity_ratio"] = log_ratio(after, before)
    of_old = {name: {"value": v, "standard_error": None} for name, v in values.items()}
    figures = summary.get("comparison", of_old)
    of_float = figure_text(figures["perplexity_float"], ".3f")
    quantized = figure_text(figures["perplexity"], ".3f")
    ratio = figure_text(figures["log_perplexity_ratio"], "+.4f")
    return (
        f"float {of_float} -> quantized {quantized}  (log-perplexity {ratio}; "
        f"{summary['evaluation']})"
    )


def _judged(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of what runs of earlier versions do not have."""
    lines = []
    if "comparison" in summary:
        lines += comparison_lines(summary["comparison"], "quantized", "float")
    if "protocol" in summary:
        lines.append(("protocol", protocol_text(summary["protocol"])))
    return lines


def _model_tuning(summary: dict[str, Any]) -> str:
    """What the tuning of the whole model did."""
    row, before = summary["tuning"], summary.get("perplexity_untuned")
    text = (
        f"held-out KL {row['held_out_before']:.4f} -> {row['held_out_after']:.4f}, the best after "
        f"{row['best_step']} of {row['steps']} steps"
    )
    if "recoded" in row:
        text += f"; new codes {row['recoded']} times, kept {row['kept']} times"
    if before is not None:
        removed = summary["rise_removed"]
        text += f"; perplexity before {float(before):.3f}"
        text += "" if removed is None else f", {100 * removed:.1f} % of its rise removed (log)"
    return text


def _tuning_text(tuned: Sequence[dict[str, Any]]) -> str:
    ratios = [row["tune_error_after"] / (row["tune_error_before"] or 1.0) for row in tuned]
    epochs = sum(row["epochs"] for row in tuned) / len(tuned)
    diverged = sum(row["diverged"] for row in tuned)
    return (
        f"held-out block error x {np.mean(ratios):.3f}, from {min(ratios):.3f} to "
        f"{max(ratios):.3f}, in {epochs:.1f} epochs a block"
        + (f"; {diverged} diverged" if diverged else "")
    )
