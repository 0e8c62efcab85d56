"""Random quantized tensors of every kind and a two-block checkpoint, made without any solving."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from gptvq_jax.core.int8_rows import int8_rows
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import get_layer, with_layer
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter
from gptvq_jax.study import sample_tensors
from gptvq_jax.study.sample_tensors import TensorFormat

# Every kind of codebook, D = 1, 2, 4, code widths that do not fill bytes, with and without scales.
SETTINGS = {
    "int8": {"dim": 2, "bits": 2.5, "codebook_bits": 8},
    "int4": {"dim": 2, "bits": 1.5, "codebook_bits": 4, "scale_block_size": 8},
    "float16": {"dim": 4, "bits": 1.25, "codebook_bits": 16, "scale_block_size": 16},
    "svd int8": {"dim": 1, "bits": 3.0, "codebook_bits": 8, "svd_rank": 2},
    "svd float16": {"dim": 1, "bits": 4.0, "codebook_bits": 16, "svd_rank": 3},
    "1d int8": {"dim": 1, "bits": 3.0, "codebook_bits": 8, "scale_block_size": 8},
}
# No GPTVQSettings make this one: codebooks that are summed, and a scale for every row.
AQLM = TensorFormat(dim=4, index_bits=5, codebook_bits=16, num_codebooks=2, row_scales=True)
KINDS = (*SETTINGS, "aqlm", "trellis")
MODEL = ModelConfig(
    model_type="llama",
    vocab_size=40,
    hidden_size=36,  # neither a vector of 8, a strip nor a scale block divides it
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=(1, 2),
)
TIED = dataclasses.replace(MODEL, tie_word_embeddings=True)
WHOLE_VECTORS = dataclasses.replace(MODEL, hidden_size=32, intermediate_size=48)  # of 8
_OF_LAYERS = ["trellis" if kind == "svd int8" else kind for kind in KINDS[:-1]]
LAYER_KINDS = dict(zip(LINEAR_LAYERS, _OF_LAYERS, strict=True))


def settings(kind: str) -> GPTVQSettings:
    return GPTVQSettings(group_size=256, max_group_cols=24, **SETTINGS[kind])


def random_tensor(kind: str, rows: int, cols: int, seed: int = 0) -> QuantizedTensor:
    """Stored arrays of a kind of KINDS, with random contents.

    For settings(kind), arrays as `gptvq.quantize` returns them.
    """
    if kind == "trellis":
        return sample_tensors.random_trellis(rows, cols, window_bits=5, stream_rows=8, seed=seed)
    if kind == "aqlm":
        return sample_tensors.random_tensor(AQLM, AQLM.grid(rows, cols), seed)
    s = settings(kind)
    fmt = TensorFormat(
        dim=s.dim,
        index_bits=s.index_bits,
        codebook_bits=s.codebook_bits,
        rank=s.svd_rank,
        scale_block_size=s.scale_block_size,
    )
    return sample_tensors.random_tensor(fmt, s.grid(rows, cols), seed)


def random_block(seed: int, config: ModelConfig = MODEL, fmt: TensorFormat | None = None) -> dict:
    """A block whose seven kernels are quantized, of one format, or of all kinds."""
    rng = np.random.default_rng(seed)
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    q = config.num_attention_heads * config.head_dim
    shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    block = {
        "input_layernorm": {"scale": rng.uniform(0.5, 1.5, hidden).astype(np.float32)},
        "self_attn": {f"{name}_proj": {} for name in "qkvo"},
        "post_attention_layernorm": {"scale": rng.uniform(0.5, 1.5, hidden).astype(np.float32)},
        "mlp": {f"{name}_proj": {} for name in ("gate", "up", "down")},
    }
    for name, shape in zip(LINEAR_LAYERS, shapes, strict=True):
        if fmt is None:
            kernel = random_tensor(LAYER_KINDS[name], *shape, seed=seed)
        else:
            kernel = sample_tensors.random_tensor(fmt, fmt.grid(*shape), seed)
        block = with_layer(block, name, kernel)
        assert get_layer(block, name)["kernel"].shape == shape
    return block


def random_outer(seed: int, config: ModelConfig = MODEL) -> dict:
    rng = np.random.default_rng(seed)
    vocab, hidden = config.vocab_size, config.hidden_size
    outer = {
        "embed_tokens": {"embedding": rng.normal(size=(vocab, hidden)).astype(np.float32)},
        "norm": {"scale": rng.uniform(0.5, 1.5, hidden).astype(np.float32)},
    }
    if not config.tie_word_embeddings:
        outer["lm_head"] = {"kernel": rng.normal(size=(hidden, vocab)).astype(np.float32)}
    return outer


def int8_outer(outer: dict) -> dict:
    """With int8 rows (vocab, hidden) in place of the embedding and of a head of its own."""
    coded = {**outer, "embed_tokens": {"embedding": int8_rows(outer["embed_tokens"]["embedding"])}}
    if "lm_head" in outer:
        coded["lm_head"] = {"kernel": int8_rows(outer["lm_head"]["kernel"].T)}
    return coded


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(MODEL.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")


def write_checkpoint(
    directory: Path,
    config: ModelConfig = MODEL,
    embeddings: str = "dense",
    blocks: Sequence[dict] | None = None,
) -> Path:
    """A complete checkpoint; calls with the same arguments write the same model.

    Its blocks are those of `random_block`, or these.
    """
    writer = CheckpointWriter(directory)
    outer = random_outer(7, config)
    writer.write_outer(int8_outer(outer) if embeddings == "int8" else outer)
    writer.write_tokenizer(tiny_tokenizer())
    for index in range(config.num_hidden_layers):
        writer.write_block(index, blocks[index] if blocks else random_block(index, config))
    writer.finalize({"vq": {"dim": 2}}, config, "tiny", "0123")
    return Path(directory)


def embedding_checkpoints():
    """A fixture of checkpoints with embeddings dense or int8, and a head of their own or not."""

    slow = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("dense tied", "int8")]

    @pytest.fixture(scope="module", params=["dense", *slow, "int8 tied"])
    def checkpoint(request, tmp_path_factory):
        embeddings, _, tied = request.param.partition(" ")
        path = tmp_path_factory.mktemp("checkpoint") / "packed"
        return PackedCheckpoint(write_checkpoint(path, TIED if tied else MODEL, embeddings))

    return checkpoint


def signature(array):
    return array.shape, array.dtype


def half(tree):
    """Arrays as a checkpoint stores them by default, in float16."""
    return jax.tree.map(lambda array: array.astype(np.float16), tree)


def assert_same_tree(actual, expected) -> None:
    """Equal structure, static fields, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
