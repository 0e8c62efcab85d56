"""llama.cpp on the same model: how many tokens per second it makes, where it is installed.

llama-cpp-python is optional. A model is written as a GGUF file in float16, and llama.cpp's own
quantizer makes the other formats of it.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gptvq_jax.exchange.gguf_file import write_gguf
from gptvq_jax.models.source import ModelSource

INSTALL = "pip install llama-cpp-python"
# Numbers of llama.cpp's enum llama_ftype, which is part of its file format.
FORMATS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q6_K": 18,
}


def check_formats(formats: Sequence[str]) -> None:
    """Raises ValueError for an unknown format, or where llama.cpp is not installed."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(
                f"unknown format {name!r} of llama.cpp; choose from {', '.join(FORMATS)}"
            )
    if formats and importlib.util.find_spec("llama_cpp") is None:
        raise ValueError(f"llama.cpp is not installed; {INSTALL}, or leave --llama_cpp out")


def write_formats(source: ModelSource, formats: Sequence[str], directory: Path) -> dict[str, Path]:
    """A GGUF file of a model in every format.

    Args:
      source: of the weights.
      formats: of FORMATS.
      directory: where the files are made.

    Raises:
      ValueError, NotImplementedError: see `check_formats` and `write_gguf`; or llama.cpp refuses.
    """
    check_formats(formats)
    import llama_cpp

    paths = {name: directory / f"{name}.gguf" for name in formats}
    base = directory / "F16.gguf"
    write_gguf(source, base)
    if "F32" in formats:
        write_gguf(source, paths["F32"], "float32")
    for name, path in paths.items():
        if path.exists():
            continue
        with quiet():
            options = llama_cpp.llama_model_quantize_default_params()
            options.ftype = FORMATS[name]
            failed = llama_cpp.llama_model_quantize(
                os.fsencode(base), os.fsencode(path), ctypes.byref(options)
            )
        if failed:
            raise ValueError(f"llama.cpp cannot quantize this model to {name}; leave it out")
    return paths


class Llama:
    """One model that llama.cpp runs.

    Args:
      path: of a GGUF file.
      context: positions of its cache.
      threads: that it multiplies with.

    Raises:
      ValueError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, context: int, threads: int):
        import llama_cpp

        with quiet():
            self._llama = llama_cpp.Llama(
                str(path),
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=0,
                verbose=False,
            )
        self._vocab = self._llama.n_vocab()

    def read(self, prompt: Sequence[int]) -> int:
        """Reads a prompt into an empty cache; returns the likeliest next token."""
        self._llama.reset()
        return self._next(list(prompt))

    def step(self, token: int) -> int:
        """Feeds a token; returns the likeliest next."""
        return self._next([token])

    def close(self) -> None:
        """Frees it."""
        with quiet():
            self._llama.close()

    def _next(self, tokens: list[int]) -> int:
        self._llama.eval(tokens)
        logits = self._llama._ctx.get_logits_ith(-1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocab,))))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What C writes to the terminal is dropped."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    with open(os.devnull, "w") as nowhere:
        for number, _ in kept:
            os.dup2(nowhere.fileno(), number)
        try:
            yield
        finally:
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)


def tokens_of(llama: Llama, prompt: Sequence[int], count: int) -> list[int]:
    """A greedy continuation of `count` tokens."""
    tokens = [llama.read(prompt)]
    while len(tokens) < count:
        tokens.append(llama.step(tokens[-1]))
    return tokens
