"""What a row of a results file must have before it is drawn."""

from typing import Any

from gptvq_jax.console.errors import brief, printable

_LAYER = {
    "block": int,
    "layer": str,
    "dim": int,
    "index_bits": int,
    "num_codebooks": int,
    "relative_error": float,
    "bits_per_value": float,
    "seconds": float,
    "num_values": int,
}
_OUTER = {"layer": str, "relative_error": float, "bits_per_value": float, "num_values": int}
_BLOCK = {"block": int, "tune_error_before": float, "tune_error_after": float}
_SUMMARY = {"bits_per_value": float, "perplexity_float": float, "perplexity_quantized": float}
_TUNE = {"step": int}
_MOVED = {"leaf": str, "parameter": str, "moved": float}
_CODES = {
    "step": int,
    "changed": int,
    "vectors": int,
    "kept": bool,
    "held_out_before": float,
    "held_out_after": float,
}
_TUNED = {"steps": int, "best_step": int, "held_out_before": float, "held_out_after": float}
_OF_LAYERS = {"bits_per_value": float, "relative_error": float}
_OPTIONAL = {  # of a layer
    "code_entropy": float,
    "unused_centroids": int,
    "held_out_error": float,
    "expert_tokens": int,
    "shared_hessian": float,
    "rule": str,
    "method": str,
}
_PROTOCOL = {
    "dataset": str,
    "split": str,
    "bos": str,
    "windows": int,
    "context": int,
    "tokens": int,
}
_FIELDS = {
    "layer": _LAYER,
    "block": _BLOCK,
    "summary": _SUMMARY,
    "outer": _OUTER,
    "tune": _TUNE,
    "tuned": _TUNED,
    "moved": _MOVED,
    "codes": _CODES,
}
_OF_STEP = {"loss": float, "rate": float, "seconds": float, "tflop": float}


def check_row(row: dict[str, Any], where: str) -> None:
    """Raises ValueError unless it can be a row of a run's metrics.jsonl; makes its numbers floats.

    Args:
      row: of the file.
      where: file and line, for the message.
    """
    if row.get("kind") not in _FIELDS:
        raise ValueError(f"{where}: kind={brief(row.get('kind'))} is none of {', '.join(_FIELDS)}")
    _check(row, _FIELDS[row["kind"]], where)
    present = {name: kind for name, kind in _OPTIONAL.items() if row.get(name) is not None}
    _check(row, present, where)
    if row["kind"] == "tune":
        _check(row, {"held_out": float} if "held_out" in row else _OF_STEP, where)
    if row["kind"] == "summary":
        _check_optional(row, where)


def check_result(row: dict[str, Any], kind: Any, where: str) -> None:
    """Raises ValueError unless it can be a row of a sweep's results.jsonl; makes numbers floats.

    Args:
      row: of the file.
      kind: of the sweep: "models" or "layers".
      where: file and line, for the message.
    """
    _check(row, {"cell": str, "status": str}, where)
    if row["status"] not in ("done", "failed"):
        raise ValueError(f"{where}: status={brief(row['status'])} is neither done nor failed")
    if row["status"] == "failed":
        return
    if kind == "models":
        _check(row, _SUMMARY, where)
        _check_optional(row, where)
        return
    _check(row, _OF_LAYERS, where)
    layers = row.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(f"{where}: layers={brief(layers)} is no list of rows")
    for layer in layers:
        _check(layer, {"layer": str, "relative_error": float, "bits_per_value": float}, where)


def _check(row: dict[str, Any], fields: dict[str, type], where: str) -> None:
    for name, kind in fields.items():
        value = row.get(name)
        if not (_is_number(value) if kind is float else type(value) is kind):
            wanted = {
                float: "a number",
                int: "a whole number",
                str: "a text",
                bool: "true or false",
            }[kind]
            raise ValueError(f"{where}: {name}={brief(value)} must be {wanted}; restore the file")
        row[name] = printable(value) if kind is str else kind(value)


def _check_optional(row: dict[str, Any], where: str) -> None:
    """What older runs do not have must be whole where it is there."""
    for name in ("comparison", "stages", "protocol"):
        if name in row and not isinstance(row[name], dict):
            raise ValueError(f"{where}: {name}={brief(row[name])} is no object; restore the file")
    _check(row, {"seconds": float} if "seconds" in row else {}, where)
    if "protocol" in row:
        _check(row["protocol"], _PROTOCOL, where)
        joiner = row["protocol"].setdefault("joiner", None)  # its line breaks are shown escaped
        if joiner is not None and not isinstance(joiner, str):
            raise ValueError(f"{where}: joiner={brief(joiner)} must be a text; restore the file")
    for name, compared in row.get("comparison", {}).items():
        if not isinstance(compared, dict):
            raise ValueError(f"{where}: {name}={brief(compared)} is no object; restore the file")
        _check(compared, {"value": float}, where)
        if compared.get("standard_error") is not None:
            _check(compared, {"standard_error": float}, where)
    for name, stage in row.get("stages", {}).items():
        value = stage.get("seconds") if isinstance(stage, dict) else stage
        _check({name: value}, {name: float}, where)


def _is_number(value: Any) -> bool:
    """Infinity and NaN are written as texts (console/report.py)."""
    return type(value) in (int, float) or value in ("inf", "-inf", "nan")
