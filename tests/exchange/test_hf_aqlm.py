"""Export for the aqlm package: its arrays stand for the same weights, and it computes the same."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny
from safetensors.numpy import load_file

from gptvq_jax.core.quantized_tensor import dequantize_compiled
from gptvq_jax.exchange.aqlm_format import AQLMFormat, from_aqlm, to_aqlm
from gptvq_jax.exchange.aqlm_source import AQLMSource
from gptvq_jax.exchange.hf_aqlm import hf_aqlm
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.models.llama import Decoder, get_layer, with_layer
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study.sample_tensors import TensorFormat, random_tensor

SCRIPT = Path(__file__).parents[2] / "scripts/export.py"
FORMATS = {
    "2x8": TensorFormat(8, 8, codebook_bits=16, num_codebooks=2, row_scales=True),
    "1x12": TensorFormat(8, 12, codebook_bits=16, row_scales=True),
    "gptvq int8": TensorFormat(4, 8, codebook_bits=8),
    "gptvq int4": TensorFormat(2, 5, codebook_bits=4),
    "gptvq float16": TensorFormat(2, 3, codebook_bits=16),
    "summed int8": TensorFormat(2, 4, codebook_bits=8, num_codebooks=2, row_scales=True),
}


def blocks(*formats, config=tiny.WHOLE_VECTORS):
    """One block of each format; norms so large that the layers matter for the logits."""
    made = [tiny.random_block(index, config, fmt) for index, fmt in enumerate(formats)]
    for block in made:
        for name in ("input_layernorm", "post_attention_layernorm"):
            block[name]["scale"] *= 8
    return made


def write(path, made, embeddings="dense", config=tiny.WHOLE_VECTORS):
    return PackedCheckpoint(tiny.write_checkpoint(path, config, embeddings, made))


def decode(codes, codebooks, scales, bits):
    """The weight (R, C) of a layer, by the definition of the format."""
    rows, vectors, books = codes.shape
    weight = np.zeros((rows, vectors, codebooks.shape[-1]), np.float32)
    for r, j, m in np.ndindex(rows, vectors, books):
        weight[r, j] += codebooks[m, int(codes[r, j, m]) % 2**bits, 0].astype(np.float32)
    return (weight * scales[..., 0].astype(np.float32)).reshape(rows, -1)


@pytest.mark.parametrize("kind", FORMATS)
def test_arrays_stand_for_the_weight(kind):
    fmt, rows, cols = FORMATS[kind], 6, 32
    tensor = random_tensor(fmt, fmt.grid(rows, cols))
    arrays = to_aqlm(tensor)
    books, bits, dim = fmt.num_codebooks, fmt.index_bits, fmt.dim
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        "codes": (np.int8 if bits <= 8 else np.int16, (rows, cols // dim, books)),
        "codebooks": (np.float16, (books, 2**bits, 1, dim)),
        "scales": (np.float16, (rows, 1, 1, 1)),
    }
    weight = np.asarray(dequantize_compiled(tensor))
    # Only integers of several codebooks times their scales are rounded.
    tolerance = (2**-10 if kind == "summed int8" else 1e-6) * np.abs(weight).max()
    np.testing.assert_allclose(decode(**arrays, bits=bits), weight, rtol=0, atol=tolerance)
    back = from_aqlm(AQLMFormat(books, bits, dim), **arrays)
    np.testing.assert_allclose(dequantize_compiled(back), weight, rtol=0, atol=tolerance)
    if kind in ("2x8", "1x12"):
        tiny.assert_same_tree(back, tensor)
    if kind == "gptvq int8":  # integers and their scale are exact in float16, products are not
        np.testing.assert_array_equal(dequantize_compiled(back), weight)


@pytest.mark.parametrize(
    ("bits", "codes", "stored"),
    [
        (2, [0, 1, 2, 3], [0, 1, -2, -1]),
        (8, [0, 127, 128, 255], [0, 127, -128, -1]),
        (9, [255, 256, 300, 511], [255, -256, -212, -1]),
        (16, [32767, 32768, 40000, 65535], [32767, -32768, -25536, -1]),
    ],
)
def test_codes_by_hand(bits, codes, stored):
    fmt = TensorFormat(2, bits, codebook_bits=16)
    tensor = random_tensor(fmt, fmt.grid(1, 8))
    arrays = to_aqlm(tensor)
    arrays["codes"] = np.array(stored, arrays["codes"].dtype).reshape(1, 4, 1)
    back = from_aqlm(AQLMFormat(1, bits, 2), **arrays)
    np.testing.assert_array_equal(back.unpack_codes(), np.reshape(codes, (1, 1, 4)))
    np.testing.assert_array_equal(to_aqlm(back)["codes"].ravel(), stored)


def test_files_hold_layers_and_what_is_not_quantized(tmp_path):
    made = blocks(FORMATS["2x8"], FORMATS["2x8"])
    kernel = np.ones((32, 48), np.float32)
    made[1] = with_layer(made[1], "mlp/up_proj", kernel)
    checkpoint = write(tmp_path / "c", made, embeddings="int8")
    calls = []
    hf_aqlm(checkpoint, tmp_path / "out", "bfloat16", on_block=lambda: calls.append(1))
    assert len(calls) == 2
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert len(tensors) == 13 * 3 + 1 + 2 * 2 + 3
    for index, name in itertools.product((0, 1), LINEAR_LAYERS):
        path = f"model.layers.{index}.{name.replace('/', '.')}"
        layer = get_layer(made[index], name)["kernel"]
        if layer is kernel:
            np.testing.assert_array_equal(tensors[f"{path}.weight"], kernel.T)
        else:
            for part, array in to_aqlm(layer).items():
                np.testing.assert_array_equal(tensors[f"{path}.{part}"], array, strict=True)
    for name, array in {
        "model.layers.1.input_layernorm": checkpoint.packed_block(1)["input_layernorm"]["scale"],
        "model.embed_tokens": checkpoint.outer()["embed_tokens"]["embedding"],
        "lm_head": checkpoint.outer()["lm_head"]["kernel"].T,
    }.items():
        expected = array.astype("bfloat16")
        np.testing.assert_array_equal(tensors[f"{name}.weight"], expected, strict=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    dense = ["lm_head", "model.layers.1.mlp.up_proj"]
    assert config["quantization_config"] == {
        "quant_method": "aqlm",
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
        "in_group_size": 8,
        "out_group_size": 1,
        "linear_weights_not_to_quantize": [*dense, *(f"{name}.weight" for name in dense)],
    }


@pytest.mark.parametrize(
    ("fmt", "config", "reason"),
    [
        (None, tiny.MODEL, r"q_proj has 4 codebook groups, not 1; .* vq\.max_group_cols"),
        (TensorFormat(1, 3, rank=2), tiny.MODEL, "q_proj has a uniform grid or SVD"),
        (TensorFormat(2, 4, scale_block_size=8), tiny.MODEL, "q_proj has scales of blocks; .*=0"),
        (FORMATS["2x8"], tiny.MODEL, "q_proj has 36 inputs, which vectors of 8 do not divide"),
    ],
)
def test_layers_that_do_not_fit_are_refused(fmt, config, reason, tmp_path):
    checkpoint = write(tmp_path / "c", blocks(fmt, fmt, config=config), config=config)
    with pytest.raises(NotImplementedError, match=f"layers_0/self_attn/{reason}") as caught:
        hf_aqlm(checkpoint, tmp_path / "out")
    assert str(caught.value).endswith(", or export with --format=hf-dense")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_layers_of_several_formats_or_none_are_refused(tmp_path):
    made = blocks(FORMATS["2x8"], FORMATS["gptvq int8"])
    with pytest.raises(
        NotImplementedError,
        match=r"layers_1/self_attn/q_proj has codebooks of 1 x 8 bits, D = 4, "
        r"layers_0/self_attn/q_proj of 2 x 8 bits, D = 8, .* without allocation\.bits_per_value",
    ):
        hf_aqlm(write(tmp_path / "c", made), tmp_path / "out")
    for index, name in itertools.product((0, 1), LINEAR_LAYERS):
        shape = get_layer(made[index], name)["kernel"].shape
        made[index] = with_layer(made[index], name, np.zeros(shape[::-1], np.float32))
    with pytest.raises(NotImplementedError, match="no layer is quantized; .*hf-dense"):
        hf_aqlm(write(tmp_path / "dense", made), tmp_path / "out")


def test_script(tmp_path):
    fmt = FORMATS["gptvq int8"]
    write(tmp_path / "c", blocks(fmt, fmt))
    command = [sys.executable, SCRIPT, "--checkpoint=c", "--output=out", "--format=hf-aqlm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "c written to out as hf-aqlm, float16\n")
    assert "2/2" in done.stderr
    assert "model.layers.1.mlp.up_proj.codes" in load_file(tmp_path / "out/model.safetensors")


@pytest.fixture
def one_numba_thread():
    """The aqlm package's kernel for 256 centroids races with itself (its issue 86)."""
    numba = pytest.importorskip("numba")
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize("kind", ["2x8", "1x12", "gptvq int8 tied"])
def test_aqlm_computes_the_same_logits(kind, tmp_path, one_numba_thread):
    torch = pytest.importorskip("torch")
    pytest.importorskip("aqlm")
    transformers = pytest.importorskip("transformers")
    fmt = FORMATS[kind.removesuffix(" tied")]
    tied = kind.endswith("tied")
    config = dataclasses.replace(tiny.WHOLE_VECTORS, tie_word_embeddings=tied)
    made = blocks(fmt, fmt)
    kernel = np.asarray(dequantize_compiled(made[1]["mlp"]["up_proj"]["kernel"])).T
    made[1] = with_layer(made[1], "mlp/up_proj", kernel)
    checkpoint = write(tmp_path / "c", made, config=config)
    hf_aqlm(checkpoint, tmp_path / "out", shard_bytes=20_000)

    # The kernel for a CPU computes in float32 only.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    # What transformers itself saves, an import reads. Before the first product: that turns codes.
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = (AQLMSource(HFDirectory(tmp_path / name)) for name in ("out", "saved"))
    assert theirs.config == ours.config
    tiny.assert_same_tree(theirs.packed_block(1), ours.packed_block(1))
    classes = [type(layer.mlp.up_proj).__name__ for layer in model.model.layers]
    assert classes == ["QuantizedLinear", "Linear"]
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 20))
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    params = checkpoint.outer() | {f"layers_{index}": checkpoint.block(index) for index in (0, 1)}
    logits = jax.jit(Decoder(config).apply)({"params": params}, jnp.asarray(tokens))

    def error(other):
        return np.linalg.norm(other - expected) / np.linalg.norm(expected)

    without_layers = params | {
        f"layers_{index}": jax.tree.map(jnp.zeros_like, checkpoint.block(index)) for index in (0, 1)
    }
    shallow = jax.jit(Decoder(config).apply)({"params": without_layers}, jnp.asarray(tokens))
    assert error(shallow) > 0.1
    assert error(logits) < 1e-4
