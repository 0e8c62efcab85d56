"""Whether 'auto' takes `cpu_int8`: what rounded activations do to a model's perplexity, once.

The packed model reads a short text with `cpu`, which is exact, and with `cpu_int8`, block by block,
each block with both. What came out stays in the user's cache, under a name that changes with the
weights, the kernels, the instruction set and the text, so that only the first load measures.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from gptvq_jax.console.compile_time import CompileTime
from gptvq_jax.console.errors import first_line
from gptvq_jax.console.progress import Progress
from gptvq_jax.console.user_cache import user_cache
from gptvq_jax.data.sample_text import SAMPLE
from gptvq_jax.data.vocabulary import check_tokens, encode
from gptvq_jax.files.durable import write_text
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import DecoderBlock, embed
from gptvq_jax.ops.cpu.build import library_key
from gptvq_jax.serve.loglikelihood import plan_batches, score_outputs
from gptvq_jax.serve.params import block_on_device, float32_bytes, outer_on_device, packed_leaf
from gptvq_jax.storage.checkpoint import PackedCheckpoint

LIMIT = 0.002  # of the perplexity: a smaller change is taken for the speed
_EXACT, _ROUNDED = "cpu", "cpu_int8"
_WORK = 1.5e11  # multiply-adds that each of them may take, if that is _FEWEST tokens or more
_FEWEST = 64


@dataclasses.dataclass(frozen=True)
class Effect:
    """Of rounded activations, and of a rounded head.

    Fields:
      tokens: that were predicted; 0: a layer has no kernel with int8 activations.
      change: of the perplexity, relative.
    """

    tokens: int
    change: float


def choose(checkpoint: PackedCheckpoint, implementation: str) -> str:
    """What a model runs on that is to generate: for 'auto' on a CPU, `cpu_int8` or `cpu`.

    A line on standard error says which of them and why.

    Args:
      checkpoint: whose effect is looked up or measured.
      implementation: see `ops.vq_matmul`; returned as it is, unless it is 'auto', there are C++
        kernels here, and all layers have those of `cpu_int8`.

    Raises:
      ValueError: the checkpoint is damaged.
    """
    if implementation != "auto" or jax.default_backend() != "cpu":
        return implementation
    try:
        kernels = library_key()
    except NotImplementedError:
        return implementation
    try:
        tokens = sample_tokens(checkpoint)
    except ValueError as error:
        _say(
            f"the effect of activations rounded to int8 is not known ({first_line(error)})", _EXACT
        )
        return implementation
    effect = _known_effect(checkpoint, tokens, kernels)
    if not effect.tokens:
        return implementation
    change = f"activations rounded to int8 change the perplexity of {effect.tokens} tokens by "
    change += f"{100 * effect.change:+.2f} %"
    if abs(effect.change) < LIMIT:
        _say(change, _ROUNDED, f"--implementation={_EXACT} is exact")
        return _ROUNDED
    _say(f"{change}, not by less than {100 * LIMIT:.1f} %", _EXACT)
    return _EXACT


def sample_tokens(checkpoint: PackedCheckpoint) -> list[int]:
    """Tokens of the text, fewer of a model that is large or has few positions.

    Raises:
      ValueError: the tokenizer cannot be loaded, or has no tokens of the model for the text.
    """
    config = checkpoint.config
    tokens = encode(checkpoint.tokenizer, SAMPLE, "the sample text", verbose=False)
    tokens = tokens[: min(_affordable(config), config.max_position_embeddings)]
    check_tokens(tokens, config.vocab_size, checkpoint.tokenizer, "the sample text")
    if len(tokens) < 2:
        raise ValueError("the tokenizer makes less than two tokens of the sample text")
    return tokens


def measure(checkpoint: PackedCheckpoint, tokens: Sequence[int]) -> Effect:
    """Runs the tokens through the model in both ways.

    Args:
      checkpoint: whose blocks are read once.
      tokens: of which all but the first are predicted.

    Raises:
      ValueError: the checkpoint is damaged.
    """
    config = checkpoint.config
    (batch,) = plan_batches([(tokens[:1], tokens[1:])], 1, len(tokens))
    leaves = {name: packed_leaf(config, name) for name in (_EXACT, _ROUNDED)}
    depth = config.num_hidden_layers
    try:
        stored = checkpoint.packed_outer()
        outer = {name: outer_on_device(stored, leaf) for name, leaf in leaves.items()}
        x = {name: embed(config, outer[name], batch.tokens).astype("float32") for name in leaves}
        # Sizes differ between layers, so that every block compiles: a part of what is left.
        bar = Progress(depth, "effect of int8 activations", "block", compiling=CompileTime())
        with bar as progress:
            for index in range(depth):
                stored, block = checkpoint.packed_block(index), DecoderBlock(config.of_block(index))
                made = {n: block_on_device(config, index, stored, leaves[n]) for n in leaves}
                # Not one program: each block may have other codes, and would compile its own.
                x = {n: block.apply({"params": made[n]}, x[n]) for n in leaves}
                jax.block_until_ready(x)
                progress.advance()
    except NotImplementedError:
        return Effect(0, 0.0)
    logprob = {
        name: score_outputs(config, outer[name], batch, x[name])[0].logprob for name in leaves
    }
    count = len(tokens) - 1
    try:
        change = math.expm1((logprob[_EXACT] - logprob[_ROUNDED]) / count)
    except OverflowError:
        change = math.inf
    return Effect(count, change)


def _affordable(config: ModelConfig) -> int:
    return max(_FEWEST, int(_WORK / (float32_bytes(config) / 4)))


def _known_effect(checkpoint: PackedCheckpoint, tokens: Sequence[int], kernels: str) -> Effect:
    key = hashlib.sha256(repr((checkpoint.fingerprint, kernels, list(tokens))).encode())
    try:
        path = user_cache("int8_effect") / f"{key.hexdigest()[:20]}.json"
    except OSError:
        return measure(checkpoint, tokens)
    effect = _read(path)
    if effect is None:
        effect = measure(checkpoint, tokens)
        with contextlib.suppress(OSError):  # the next load measures again
            write_text(path, json.dumps(dataclasses.asdict(effect)))
    return effect


def _read(path: Path) -> Effect | None:
    """None: it is not there, or damaged."""
    try:
        read = json.loads(path.read_text("utf-8"))
        return Effect(int(read["tokens"]), float(read["change"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _say(what: str, taken: str, besides: str = "") -> None:
    line = f"{what}: 'auto' takes {taken}{f' ({besides})' if besides else ''}"
    print(line, file=sys.stderr, flush=True)
