"""Two models on the same held-out text: what both say of every token, and its summary.

Only the outputs of their last blocks are needed, and the two heads; the logits of a few tokens are
in memory at a time, and none are stored.
"""

from typing import Any

import numpy as np

from gptvq_jax.console.progress import Progress
from gptvq_jax.core import standard_error
from gptvq_jax.core.divergence import FIGURES
from gptvq_jax.models import flops
from gptvq_jax.models.head_chunk import pair_chunk
from gptvq_jax.run import spread
from gptvq_jax.run.evaluate import Evaluation, perplexity_of
from gptvq_jax.run.token_losses import token_figures

Figure = dict[str, float | None]  # "value", "standard_error"
_LEVELS = {"kl_median": 0.5, "kl_99": 0.99}


def write_figures(
    model: Evaluation,
    reference: Evaluation,
    out: Any,
    progress: Progress | None = None,
) -> None:
    """Fills `out` (n, T - 1, 4) with FIGURES of every token, after both walks.

    Args:
      model, reference: of the same windows and models of one vocabulary.
      out: what slices of windows are assigned to.
      progress: of windows.
    """
    outputs, of_reference = model.outputs(), reference.outputs()
    # The float model's first: its table is the largest array while it is read.
    heads = spread.on_all(reference.head())
    heads = spread.on_all(model.head()), heads
    configs = model.config, reference.config
    with model.stopwatch.stage("evaluate"):
        for part in model.batches():
            own = spread.mine(part)
            tokens = model.windows[own]
            for config in configs:
                size = pair_chunk(config, len(tokens))
                model.stopwatch.flops(flops.head_forward(config, *tokens.shape, size))
            windows = outputs[own], of_reference[own], tokens
            out[own] = np.asarray(spread.run(_figures, configs, heads, windows, part=part)[0])
            if progress is not None:
                progress.advance(steps=part.stop - part.start)


def _figures(static, heads, windows, sums):
    (config, reference_config), (head, reference_head) = static, heads
    x, reference_x, tokens = windows
    of_reference = reference_config, reference_head, reference_x
    return token_figures(config, head, x, *of_reference, tokens), sums


def comparison(figures: np.ndarray) -> dict[str, Figure]:
    """What the figures of all tokens come to, each with its standard error.

    Standard errors are over windows, core/standard_error.py: of means directly, of a perplexity by
    the first derivative, of quantiles by a bootstrap. That of the logarithm of a ratio is of
    differences token by token, and so much smaller than those of the two perplexities. There is
    none of a maximum, nor with one window.

    Args:
      figures: (n, T - 1, 4), FIGURES.

    Returns:
      {name: {"value", "standard_error"}}: "perplexity" of the model, "perplexity_float" of the
      reference, "log_perplexity_ratio" of the first over the second; "kl_mean", "kl_median",
      "kl_99" and "kl_max" of KL(reference || model) in nats; "same_top1", the share of tokens for
      which both models think the same one likeliest.
    """
    nll, of_reference, kl, same = (figures[..., i] for i in range(len(FIGURES)))
    with np.errstate(invalid="ignore", over="ignore"):
        median, high = np.quantile(kl, list(_LEVELS.values()))
        errors = standard_error.of_quantiles(kl, list(_LEVELS.values()))
        return {
            "perplexity": of_perplexity(nll),
            "perplexity_float": of_perplexity(of_reference),
            "log_perplexity_ratio": _of_mean(nll.astype(np.float64) - of_reference),
            "kl_mean": _of_mean(kl),
            "kl_median": _figure(median, errors[0]),
            "kl_99": _figure(high, errors[1]),
            "kl_max": _figure(kl.max(), None),
            "same_top1": _of_mean(same),
        }


def of_perplexity(losses: np.ndarray) -> Figure:
    """Perplexity of a model and its standard error, by the first derivative.

    Args:
      losses: (n, T - 1), in nats.
    """
    value, error = perplexity_of(losses), standard_error.of_mean(losses)
    with np.errstate(invalid="ignore", over="ignore"):
        return _figure(value, None if error is None else np.float64(value) * error)


def _of_mean(values: np.ndarray) -> Figure:
    return _figure(values.mean(dtype=np.float64), standard_error.of_mean(values))


def _figure(value: float, error: float | None) -> Figure:
    return {"value": float(value), "standard_error": None if error is None else float(error)}
