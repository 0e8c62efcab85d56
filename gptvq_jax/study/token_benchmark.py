"""The job of scripts/benchmark_decode.py --model: a token, by part, and beside llama.cpp's."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptvq_jax.console.processor import processor_name
from gptvq_jax.console.progress import Progress
from gptvq_jax.serve.params import memory_bytes
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.open_any import open_any
from gptvq_jax.study import llama_cpp, token_report, token_speeds
from gptvq_jax.study.decode_benchmark import copy_bandwidth
from gptvq_jax.study.matmul_rate import matmul_rate
from gptvq_jax.study.token_times import Steps, measure

_TOKENS = 64  # of a generation that is compared with llama.cpp's
_DENSE = "dense"  # among implementations: the weights that a checkpoint's codes stand for


def benchmark_token(
    model: str,
    implementations: Sequence[str] | None = None,
    *,
    dtype: str = "float32",
    context: int = 128,
    batches: Sequence[int] = (1,),
    repeats: int = 25,
    llama_formats: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures, prints tables and returns what is in them.

    Args:
      model: directory of a packed checkpoint, or a float model as config.model names it.
      implementations: of a checkpoint, see `ops.vq_matmul`, or 'dense'; None: 'auto'.
      dtype: of activations, and of weights that are not packed.
      context: tokens before the one whose step is measured.
      batches: sequences that go together; the table has each.
      repeats: rounds.
      llama_formats: of llama.cpp, see `llama_cpp.FORMATS`; it generates in turn with ours.

    Returns:
      {"model", "processor", "copy_bandwidth", "multiply_rate", "steps": [...], "speeds": [...]}.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: bad input, in one line with the way out.
    """
    llama_cpp.check_formats(llama_formats)
    served = _models(model, implementations)
    source = next(iter(served.values())).source
    params = {name: each.params(dtype) for name, each in served.items()}
    steps = {
        (name, batch): Steps(source.config, tree, context, batch, dtype)
        for name, tree in params.items()
        for batch in batches
    }
    copy, multiply = copy_bandwidth(), matmul_rate()
    here = processor_name()
    print(
        f"{source.name} on {here}: a copy moves {copy / 1e9:.1f} GB/s, float32 products run at "
        f"{multiply / 1e12:.3f} TFLOP/s"
    )
    with Progress(repeats + 1, "parts of a token", "round") as progress:
        measured = measure(steps, repeats, progress.advance)
    rows = [
        {"name": name, "batch": batch, "context": context, **found}
        for (name, batch), found in measured.items()
    ]
    print(token_report.table(rows, copy, multiply))
    speeds = []
    if llama_formats:
        speeds = _in_turn(source, params, dtype, context, repeats, llama_formats)
        print(token_report.speeds(speeds))
    return {
        "model": model,
        "processor": here,
        "copy_bandwidth": copy,
        "multiply_rate": multiply,
        "steps": rows,
        "speeds": speeds,
    }


def _models(model: str, implementations: Sequence[str] | None) -> dict[str, ServedModel]:
    if not isinstance(open_any(model), PackedCheckpoint):
        if implementations is not None:
            raise ValueError(f"--implementations has no effect on {model}, whose weights are dense")
        return {_DENSE: ServedModel(None, model)}
    return {
        name: ServedModel(model, None, None if dense else name, dense)
        for name in implementations or ["auto"]
        for dense in [name == _DENSE]
    }


def _in_turn(source, params, dtype, context, repeats, formats) -> list[dict[str, Any]]:
    """Tokens per second of generations, ours first."""
    config = source.config
    prompt = token_speeds.prompt_of(config, context)
    contenders, sizes = {}, {}
    for name, tree in params.items():
        contenders[name] = token_speeds.ours(config, tree, prompt, _TOKENS, dtype)
        sizes[name] = sum(memory_bytes(tree))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with Progress(1, "converting to GGUF", "model") as progress:
            paths = llama_cpp.write_formats(source, formats, place)
            progress.advance()
        for name, path in paths.items():
            llama = llama_cpp.Llama(path, context + _TOKENS, threads)
            stack.callback(llama.close)
            contenders[f"llama.cpp {name}"] = token_speeds.theirs(llama, prompt, _TOKENS)
            sizes[f"llama.cpp {name}"] = path.stat().st_size
        with Progress(repeats + 1, "generations in turn", "round") as progress:
            found = token_speeds.measure(contenders, repeats, progress.advance)
    return [{"name": name, "bytes": sizes[name], **row} for name, row in found.items()]
