"""Directories of runs and sweeps as runs and sweeps write them, with numbers of our own."""

import json
from pathlib import Path

from gptvq_jax.config import default_config, from_config, to_dict

LAYERS = ("self_attn/q_proj", "mlp/up_proj")
PROTOCOL = {"dataset": "t.txt", "split": "whole file", "joiner": "\n\n", "windows": 2}
PROTOCOL |= {"context": 32, "tokens": 62, "bos": "none"}
STAGES = {"quantize": {"seconds": 3.5}, "evaluate": {"seconds": 1.25}, "elsewhere": 0.5}


def write_lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def layer_row(block=0, layer=LAYERS[0], error=0.01, bits=2.125, **more):
    row = {"kind": "layer", "block": block, "layer": layer, "relative_error": error}
    row |= {"num_codebooks": 1, "dim": 2, "index_bits": 4, "sqnr_db": 20.0, "seconds": 1.0}
    return {**row, "bits_per_value": bits, "num_values": 100, "unused_centroids": 0, **more}


def summary_row(perplexity=20.0, bits=2.125, **more):
    row = {"kind": "summary", "bits_per_value": bits, "perplexity_float": 15.0}
    row |= {"perplexity_quantized": perplexity, "evaluation": "2 x 32 tokens of t.txt"}
    return {**row, "stages": STAGES, "seconds": 5.25, "processor": "a processor", **more}


def comparison(kl: float, error: float | None = 0.001):
    names = ("kl_median", "kl_99", "kl_max", "same_top1")
    figures = {name: {"value": 0.5, "standard_error": None} for name in names}
    return figures | {"kl_mean": {"value": kl, "standard_error": error}}


def config(**fields):
    values = default_config()
    values.update_from_flattened_dict(fields)
    return {**to_dict(from_config(values)), "weights": "sha256:0"}


def write_run(path: Path, rows, fields=None) -> Path:
    write_lines(path / "metrics.jsonl", rows)
    (path / "config.json").write_text(json.dumps(config(**(fields or {}))))
    return path


def write_sweep(path: Path, cells, rows, kind="models", refused=()) -> Path:
    """cells: {name: fields}; rows: of results.jsonl, without what all have in common."""
    listed = [
        {"name": name, "point": {"format": name}, "fields": fields, "workdir": f"cells/{name}"}
        | {"command": f"python scripts/sweep.py --cells={name}"}
        for name, fields in cells.items()
    ]
    sweep = {"name": path.name, "kind": kind, "axes": [], "cells": listed, "refused": list(refused)}
    write_lines(
        path / "results.jsonl",
        [{"status": "done", "error": None, "workdir": f"cells/{r['cell']}", **r} for r in rows],
    )
    (path / "sweep.json").write_text(json.dumps(sweep))
    return path


def dimensions(path: Path) -> Path:
    """A sweep of runs: 1D and 2D at 2 and 3 bits, and a cell that failed."""
    cells = {f"{d}d_{b}b": {"vq.dim": d, "vq.bits": float(b)} for d in (1, 2) for b in (2, 3)}
    rows = []
    for place, (name, fields) in enumerate(cells.items()):
        dim, bits = fields["vq.dim"], fields["vq.bits"]
        layers = [
            layer_row(b, n, 0.1 / bits**4 / dim, bits + 0.125, dim=dim, code_entropy=3.5)
            for b in range(3)
            for n in LAYERS
        ]
        summary = summary_row(30.0 - 4 * bits - dim, bits + 0.125)
        summary |= {"comparison": comparison(0.1 * (place + 1))}
        write_run(path / "cells" / name, [*layers, summary], fields)
        rows.append({**summary, "cell": name})
    rows.append({"cell": "8d", "status": "failed", "error": "vq.dim=8 must be 1, 2 or 4"})
    return write_sweep(path, {**cells, "8d": {"vq.dim": 8}}, rows)


def tuning_rows(steps=4):
    """Of a tuning whose second step was made again, with looks at windows held out."""
    rows = [{"kind": "tune", "step": 0, "held_out": 0.5}]
    for step in (1, 2, *range(2, steps + 1)):
        row = {"kind": "tune", "step": step, "loss": 0.6 / step, "rate": 1.0}
        rows.append({**row, "seconds": 4.0, "tflop": 2.0})
    rows.append({"kind": "tune", "step": steps, "held_out": 0.25})
    for block in range(2):
        leaf = f"layers_{block}/mlp/up_proj/kernel"
        rows.append({"kind": "moved", "leaf": leaf, "parameter": "row_scales", "moved": 0.01})
    rows.append({"kind": "moved", "leaf": "norm/scale", "parameter": "values", "moved": 0.02})
    tuned = {"kind": "tuned", "steps": steps, "best_step": steps, "tries": 1}
    return [*rows, {**tuned, "held_out_before": 0.5, "held_out_after": 0.25}]
