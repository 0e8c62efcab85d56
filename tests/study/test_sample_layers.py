"""Layers written for the benchmark: against the whole model at once, finished or not there."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from gptvq_jax.console.progress import Progress
from gptvq_jax.models.llama import Decoder
from gptvq_jax.models.open import open_source
from gptvq_jax.study.layer_benchmark import load_layer
from gptvq_jax.study.random_model import write_random_llama
from gptvq_jax.study.sample_layers import SAMPLED_LAYERS, make_layers, random_layer

WANTED = {0: ["self_attn/k_proj"], 2: ["mlp/down_proj", "mlp/up_proj", "self_attn/o_proj"]}
FILES = ["block00.k_proj", "block02.down_proj", "block02.o_proj", "block02.up_proj"]
TOKENS = np.random.default_rng(0).integers(20, size=(5, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    vocabulary = WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary))
    write_random_llama(path, tokenizer, num_blocks=4, hidden=48, head_dim=16)
    return path


class Watched:
    """A source that notes which blocks are read, and fails at one of them."""

    def __init__(self, model_dir, layers_dir, fail_at=None):
        self._source, self._layers_dir, self._fail_at = open_source(model_dir), layers_dir, fail_at
        self.config, self.outer = self._source.config, self._source.outer
        self.read = []

    def block(self, index):
        assert not self._layers_dir.exists()
        if index == self._fail_at:
            raise KeyboardInterrupt
        self.read.append(index)
        return self._source.block(index)


def make(source, directory, wanted=WANTED):
    with Progress(3, "test", "block") as progress:
        make_layers(source, TOKENS, wanted, directory, progress)


@pytest.fixture(scope="module")
def made(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "deep" / "layers"
    source = Watched(str(model_dir), directory)
    make(source, directory)
    assert source.read == [0, 1, 2]  # and not the last
    return directory


def test_weights_and_hessians_are_those_of_the_whole_model(made, model_dir):
    source = open_source(str(model_dir))
    blocks = {f"layers_{i}": source.block(i) for i in range(4)}
    params = {"params": {**source.outer(), **blocks}}
    _, state = Decoder(source.config).apply(params, TOKENS, mutable=["intermediates"])
    stored = load_file(model_dir / "model.safetensors")

    assert sorted(path.stem for path in made.iterdir()) == FILES
    for index, names in WANTED.items():
        for name in names:
            module, layer = name.split("/")
            weight, hessian = load_layer(made / f"block{index:02d}.{layer}.npz")
            assert weight.dtype == hessian.dtype == np.float32
            expected = stored[f"model.layers.{index}.{module}.{layer}.weight"]
            np.testing.assert_array_equal(weight, expected.astype(np.float32))
            sown = state["intermediates"][f"layers_{index}"][module][layer]["inputs"][0]
            x = np.asarray(sown, np.float64).reshape(TOKENS.size, -1)
            moment = x.T @ x / TOKENS.size
            np.testing.assert_allclose(hessian, moment, atol=1e-5 * np.abs(moment).max())


def test_a_finished_directory_is_used_again(made):
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    make_layers(None, None, WANTED, made, None)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_an_interruption_leaves_nothing(model_dir, tmp_path):
    directory = tmp_path / "layers"
    with pytest.raises(KeyboardInterrupt):
        make(Watched(str(model_dir), directory, fail_at=2), directory)
    assert list(tmp_path.iterdir()) == []
    make(Watched(str(model_dir), directory), directory)
    assert [path.name for path in tmp_path.iterdir()] == ["layers"]
    assert sorted(path.stem for path in directory.iterdir()) == FILES


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({4: ["mlp/up_proj"]}, r"\[4\] must be some of 0 to 3"),
        ({}, r"\[\] must be some of 0 to 3"),
        ({0: ["up_proj"]}, "'up_proj' is not a linear layer"),
    ],
)
def test_layers_that_do_not_exist(model_dir, tmp_path, wanted, message):
    directory = tmp_path / "layers"
    source = Watched(str(model_dir), directory)
    with pytest.raises(ValueError, match=message):
        make(source, directory, wanted)
    assert source.read == [] and list(tmp_path.iterdir()) == []


def test_the_sampled_layers_are_six():
    names = [f"block{i:02d}.{n.split('/')[1]}" for i, ns in SAMPLED_LAYERS.items() for n in ns]
    assert sorted(names) == [
        "block00.k_proj",
        "block14.down_proj",
        "block14.o_proj",
        "block14.up_proj",
        "block14.v_proj",
        "block29.q_proj",
    ]


def test_random_layer():
    weight, hessian = random_layer(200, 128)
    assert weight.shape == (200, 128) and hessian.shape == (128, 128)
    assert weight.dtype == hessian.dtype == np.float32
    deviation = np.sort(np.std(weight, axis=0))
    assert deviation[:126] == pytest.approx(1, rel=0.3)
    assert deviation[126:] == pytest.approx(8, rel=0.3)
    hessian = np.asarray(hessian, np.float64)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-6)
    assert np.trace(hessian) == pytest.approx(128, rel=1e-5)
    energy = np.linalg.eigvalsh(hessian)[::-1]
    assert energy[-1] > 0
    assert energy[:8].sum() > 0.75 * energy.sum()  # of rank 128 / 16, but for a diagonal
    again = random_layer(200, 128)
    assert all(np.array_equal(*pair) for pair in zip((weight, hessian), again, strict=True))
    assert not np.array_equal(random_layer(200, 128, seed=1)[0], weight)
    assert isinstance(weight, jax.Array)
