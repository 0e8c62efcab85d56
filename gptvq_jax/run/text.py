"""The texts of a run as windows of tokens, and how they were cut."""

from typing import Any

import numpy as np

from gptvq_jax.config import CalibrationSettings, RunSettings
from gptvq_jax.core.products import FLOAT32
from gptvq_jax.data.corpora import documents, held_out
from gptvq_jax.data.mixture import interleaved
from gptvq_jax.data.windows import begun, bos_of, calibration_windows, evaluation_windows
from gptvq_jax.models.source import ModelSource


def calibration_tokens(source: ModelSource, settings: RunSettings) -> np.ndarray:
    """Random windows (n + h, T) of the calibration text, the last h = c.held_out held out.

    Each of several texts has its share of both, spread evenly. With calibration.statistics there
    are no windows.
    """
    c = settings.calibration
    if c.statistics:
        return np.empty((0, c.seqlen), np.int32)
    fitted, held_out = [], []
    for name, (count, kept) in c.mixture.items():
        windows = calibration_windows(
            source.tokenizer,
            documents(name, "train"),
            num_windows=count,
            seqlen=c.seqlen,
            seed=c.seed,
            held_out=kept,
            per_document=name == "c4",
            vocab_size=source.config.vocab_size,
        )
        fitted.append(windows[:count])
        held_out.append(windows[count:])
    windows = np.concatenate([interleaved(fitted), interleaved(held_out)])
    return begun(source.tokenizer, windows, "config.calibration.bos") if c.bos else windows


def evaluation_tokens(source: ModelSource, settings: RunSettings) -> np.ndarray:
    """Consecutive windows (n, T) of the held-out text."""
    e = settings.evaluation
    windows = evaluation_windows(
        source.tokenizer,
        documents(e.dataset, "test"),
        seqlen=e.seqlen,
        max_windows=e.num_windows or None,
        vocab_size=source.config.vocab_size,
    )
    return begun(source.tokenizer, windows, "config.evaluation.bos") if e.bos else windows


def protocol(source: ModelSource, dataset: str, windows: np.ndarray) -> dict[str, Any]:
    """What a figure on held-out text depends on beside the model.

    Args:
      source: whose tokenizer cut the text.
      dataset: its name.
      windows: tokens (n, T) of `evaluation_tokens`.

    Returns:
      "dataset"; "split" and "joiner", as corpora.held_out; "windows" and "context", n and T;
      "tokens", how many are predicted: all but the first of each window; "bos", as windows.bos_of.
    """
    count, context = windows.shape
    return {
        "dataset": dataset,
        **held_out(dataset),
        "windows": count,
        "context": context,
        "tokens": count * (context - 1),
        "bos": bos_of(source.tokenizer, windows),
    }


def check_seqlen(source: ModelSource, section: str, seqlen: int, flag: str = "") -> None:
    """Raises ValueError for windows beyond the model's positions; `flag` is what sets them."""
    limit = source.config.max_position_embeddings
    if seqlen > limit:
        raise ValueError(
            f"{section}.seqlen={seqlen} is beyond the {limit} positions of {source.name}; "
            f"set {flag or f'--config.{section}.seqlen'}={limit} or less"
        )


def calibration_protocol(c: CalibrationSettings) -> dict[str, Any]:
    """What a calibration has read.

    Returns:
      "context", tokens of a window; "seed"; "texts", of each its "dataset", and its "windows" that
      are fitted and "held_out_windows"; "bos", where each window begins with that token;
      "products" and "model_products", where those of Hessians and of the model are not of float32.
    """
    texts = [
        {"dataset": name, "windows": fitted, "held_out_windows": held_out}
        for name, (fitted, held_out) in c.mixture.items()
    ]
    more = {"bos": True} if c.bos else {}
    of = {"products": c.products, "model_products": c.model_products}
    more |= {name: products for name, products in of.items() if products != FLOAT32}
    return {"context": c.seqlen, "seed": c.seed, "texts": texts, **more}


def calibration_text(protocol: dict[str, Any]) -> str:
    """A `calibration_protocol` in words."""
    size, parts = f"x {protocol['context']} tokens", []
    for text in protocol["texts"]:
        parts.append(f"{text['windows']} {size} of {text['dataset']}")
    kept = sum(text["held_out_windows"] for text in protocol["texts"])
    bos = "; each begins with BOS" if protocol.get("bos") else ""
    products = f"; Hessians of {protocol['products']}" if "products" in protocol else ""
    if "model_products" in protocol:
        products += f"; the model in {protocol['model_products']}"
    return " and ".join(parts) + (f"; {kept} {size} held out" if kept else "") + bos + products


def describe(dataset: str, windows: np.ndarray) -> str:
    return f"{len(windows)} x {windows.shape[1]} tokens of {dataset}"
