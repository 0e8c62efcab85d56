"""Token weights against gradients of the whole model, and passes that are killed or go wrong."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from first_passes import contents, find
from flax.traverse_util import unflatten_dict
from kills import counted_visits

from gptvq_jax.config import CalibrationSettings, RunSettings
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Decoder, Linear, block_forward, embed, get_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import CheckpointSource, block_shapes, outer_shapes
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.run.gradients import block_backward, check_groups, head_backward
from gptvq_jax.run.workdir import WorkDir

GROUPS = 4


class Recorder:
    """A source that lists the blocks it is asked for, and changes what it hands out."""

    def __init__(self, source, change=lambda part, params: params):
        self.config, self._source, self._change, self.blocks = source.config, source, change, []

    def outer(self):
        return self._change("outer", self._source.outer())

    def block(self, index):
        self.blocks.append(index)
        return self._change(index, self._source.block(index))


class RandomSource(CheckpointSource):
    """What `model_dir` is not: grouped queries, an untied head, norms other than 1."""

    config = ModelConfig(
        model_type="llama",
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )

    def _read(self, name):
        shapes = outer_shapes(self.config) | block_shapes(self.config)
        shape = shapes[re.sub(r"model\.layers\.\d+\.", "", name)]
        generator = np.random.default_rng(list(name.encode()))
        array = generator.normal(size=shape).astype(np.float32)
        return (1 + 0.3 * array if len(shape) == 1 else array / np.sqrt(shape[1])), Path(name)


@pytest.fixture(scope="module")
def source(model_dir):
    return open_source(str(model_dir))


def random_tokens(windows=6, seqlen=32):
    return np.random.default_rng(0).integers(0, 256, (windows, seqlen)).astype(np.int32)


def settings(groups=GROUPS):
    calibration = CalibrationSettings(
        num_windows=4, held_out=2, gradient_groups=groups, asymmetry=0.0
    )
    return RunSettings(calibration=calibration)


def save(source, path, tokens, limit=None):
    return find(source, settings(), path, tokens, limit)


def load(path, depth):
    with WorkDir(path, {}) as workdir:
        return [workdir.load_token_weights(index) for index in range(depth)]


def nll_sum(logits, tokens):
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.sum(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))


def group_means(gradient):
    """(n, T, rows) -> (n, T, GROUPS) by the definition, in float64."""
    squares = np.square(np.asarray(gradient, np.float64))
    return np.stack([part.mean(-1) for part in np.split(squares, GROUPS, axis=-1)], axis=-1)


def whole_model_weights(source, tokens):
    """Per block, from jax.grad through the whole Decoder with respect to shifts of outputs."""
    params = source.outer()
    depth = source.config.num_hidden_layers
    params |= {f"layers_{index}": source.block(index) for index in range(depth)}
    shifts = {}
    for index in range(depth):
        for name in LINEAR_LAYERS:
            rows = get_layer(params[f"layers_{index}"], name)["kernel"].shape[1]
            shifts[f"layers_{index}/{name}/outputs"] = jnp.zeros((*tokens.shape, rows))

    def loss(shifts):
        variables = {"params": params, "perturbations": unflatten_dict(shifts, sep="/")}
        return nll_sum(Decoder(source.config).apply(variables, tokens), tokens)

    gradients = jax.jit(jax.grad(loss))(shifts)
    return [
        {n: group_means(gradients[f"layers_{index}/{n}/outputs"]) for n in LINEAR_LAYERS}
        for index in range(depth)
    ]


def float32_weights(source, tokens):
    """Per block, from this package's steps, without the driver and its bfloat16 streams."""
    blocks = [source.block(index) for index in range(source.config.num_hidden_layers)]
    inputs = [embed(source.config, source.outer(), tokens)]
    for block in blocks:
        inputs.append(block_forward(source.config, block, inputs[-1]))
    dx = head_backward(source.config, source.outer(), inputs.pop(), tokens)
    weights = []
    for block in reversed(blocks):
        dx, of_block, _ = block_backward(source.config, block, inputs.pop(), dx, GROUPS)
        weights.append(of_block)
    return weights[::-1]


def assert_close(actual, expected, rtol):
    """Every weight, relative to itself or to a hundredth of the layer's mean."""
    assert len(actual) == len(expected)
    for got, wanted in zip(actual, expected, strict=True):
        assert set(got) == set(wanted) == set(LINEAR_LAYERS)
        for name in LINEAR_LAYERS:
            atol = 0.01 * rtol * wanted[name].mean()
            np.testing.assert_allclose(got[name], wanted[name], rtol, atol, err_msg=name)


# --- the numbers ---


def test_a_perturbation_is_added_to_the_outputs_and_only_there():
    x, kernel, shift = (
        np.random.default_rng(i).normal(size=s)
        for i, s in enumerate([(2, 3, 5), (5, 4), (2, 3, 4)])
    )
    variables = {"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    x = jnp.asarray(x, jnp.float32)
    plain = Linear(4).apply(variables, x)
    np.testing.assert_allclose(plain, x @ kernel, rtol=1e-5, atol=1e-5)
    shifted = Linear(4).apply(variables | {"perturbations": {"outputs": shift}}, x)
    np.testing.assert_allclose(shifted, x @ kernel + shift, rtol=1e-5, atol=1e-5)
    assert set(Linear(4).init(jax.random.key(0), x)) == {"params"}


def test_steps_in_float32_equal_the_whole_model():
    source = RandomSource()
    tokens = random_tokens(windows=2)
    assert_close(float32_weights(source, tokens), whole_model_weights(source, tokens), rtol=1e-3)


def test_steps_in_float32_equal_torch(source, model_dir):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    outputs = {}

    def keep(name):
        def hook(_, __, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(keep(name.removeprefix("layers.").replace(".", "/")))
    tokens = random_tokens(windows=2)
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    ).backward()
    expected = [
        {name: group_means(outputs[f"{index}/{name}"].grad.numpy()) for name in LINEAR_LAYERS}
        for index in range(source.config.num_hidden_layers)
    ]
    assert_close(float32_weights(source, tokens), expected, rtol=1e-3)


# 300 tokens end in a partly filled chunk of logits; 257 fill exactly two.
@pytest.mark.parametrize("seqlen", [2, 257, 300])
def test_gradient_of_the_head_equals_that_of_all_logits_at_once(source, seqlen):
    config, outer, tokens = source.config, source.outer(), random_tokens(2, seqlen)
    x = np.random.default_rng(1).normal(size=(*tokens.shape, config.hidden_size))
    x = jnp.asarray(x, jnp.float32)

    def loss(x):
        return nll_sum(Decoder(config).apply({"params": outer}, x, method="head"), tokens)

    expected = jax.grad(loss)(x)
    actual = head_backward(config, outer, x, tokens)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected[:, :-1]).min(axis=(0, 2)).max() > 0
    np.testing.assert_array_equal(actual[:, -1], 0)


def test_gradient_of_the_head_never_holds_all_logits(source):
    config, outer, tokens = source.config, source.outer(), random_tokens(2, 4097)
    x = jnp.zeros((*tokens.shape, config.hidden_size))
    compiled = head_backward.lower(config, outer, x, tokens).compile()
    all_logits = 4 * tokens.size * config.vocab_size
    assert compiled.memory_analysis().temp_size_in_bytes < all_logits


def test_driver_equals_the_whole_model_up_to_bfloat16(source, tmp_path):
    tokens = random_tokens()
    progress, depth = save(source, tmp_path, tokens), source.config.num_hidden_layers
    assert (progress.skipped, progress.advanced) == (0, 2 * depth)
    assert sorted(contents(tmp_path)) == [f"{index:05d}.npz" for index in range(depth)]
    expected = whole_model_weights(source, tokens)
    for got, wanted in zip(load(tmp_path, depth), expected, strict=True):
        for name in LINEAR_LAYERS:
            assert got[name].dtype == np.float32
            error = np.linalg.norm(got[name] - wanted[name]) / np.linalg.norm(wanted[name])
            assert error < 0.01, name


# --- passes that are killed (at any change of file names: test_kills) ---


def test_killed_between_blocks_redoes_none(source, tmp_path):
    tokens = random_tokens()
    total = 2 * source.config.num_hidden_layers
    save(source, tmp_path / "whole", tokens)
    for count in range(1, total + 1):
        path = tmp_path / str(count)
        with counted_visits() as visits:
            with pytest.raises(KeyboardInterrupt):
                save(source, path, tokens, limit=count)
            progress = save(source, path, tokens)
        done = count if count < total else 0  # there is no bar where nothing is left to do
        assert (progress.skipped, progress.advanced) == (done, total - count)
        assert len(visits) == total and set(visits.values()) == {1}
        assert contents(path) == contents(tmp_path / "whole")


def test_finished_weights_are_not_computed_again(source, tmp_path):
    save(source, tmp_path, random_tokens())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "gradients").iterdir()}
    recorder = Recorder(source)
    progress = save(recorder, tmp_path, random_tokens())
    assert progress.advanced == 0
    assert recorder.blocks == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "gradients").iterdir()} == before


def test_weights_that_were_removed_are_made_again(source, tmp_path):
    save(source, tmp_path, random_tokens())
    before = contents(tmp_path)
    (tmp_path / "gradients/00001.npz").unlink()
    save(source, tmp_path, random_tokens())
    assert contents(tmp_path) == before


# --- passes that go wrong ---


def with_nan(params):
    return jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)


def test_activation_that_is_not_finite_names_the_block(source, tmp_path):
    bad = Recorder(source, lambda part, params: with_nan(params) if part == 1 else params)
    with pytest.raises(ValueError, match="block 1: an activation is not finite; check the model"):
        save(bad, tmp_path, random_tokens())
    assert set(contents(tmp_path)) == {"00000.float.npy", "00001.float.npy"}


def test_gradient_that_is_not_finite_names_the_block_and_can_be_mended(source, tmp_path):
    def change(part, params):  # the second time, on the way back
        return with_nan(params) if part == 1 and bad.blocks.count(1) == 2 else params

    bad = Recorder(source, change)
    with pytest.raises(ValueError, match="block 1: the gradient of the loss is not finite"):
        save(bad, tmp_path / "bad", random_tokens())
    streams = {f"0000{point}.float.npy" for point in range(4)}
    streams |= {f"0000{point}.gradient.npy" for point in (2, 3)}  # 3: were 2 found damaged
    assert set(contents(tmp_path / "bad")) == streams | {"00002.npz"}
    save(source, tmp_path / "bad", random_tokens())
    save(source, tmp_path / "whole", random_tokens())
    assert contents(tmp_path / "bad") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "scale, message",
    [
        (np.nan, "head: the gradient of the loss is not finite"),
        (1e25, "block 2: the squared gradient of self_attn/q_proj is not finite"),
    ],
)
def test_norm_that_blows_up_is_named(source, tmp_path, scale, message):
    def change(part, params):
        return (
            params | {"norm": {"scale": params["norm"]["scale"] * scale}}
            if part == "outer"
            else params
        )

    with pytest.raises(ValueError, match=message):
        save(Recorder(source, change), tmp_path, random_tokens())
    assert not any(name.endswith(".npz") for name in contents(tmp_path))


@pytest.mark.parametrize("groups", [0, 5, 32])
def test_groups_that_do_not_divide_the_rows_are_refused(source, tmp_path, groups):
    message = rf"calibration\.gradient_groups={groups} .* self_attn/q_proj; choose a divisor of 16"
    with pytest.raises(ValueError, match=message):
        check_groups(source.config, groups)
    recorder = Recorder(source)
    with pytest.raises(ValueError, match=message):
        find(recorder, settings(groups), tmp_path, random_tokens())
    assert recorder.blocks == []
    x = jnp.zeros((1, 2, source.config.hidden_size))
    with pytest.raises(ValueError, match=message):
        block_backward(source.config, source.block(0), x, x, groups)


def test_groups_may_fail_at_the_mlp_only(source):
    check_groups(source.config, 16)
    with pytest.raises(ValueError, match="the 128 rows of mlp/gate_proj"):
        check_groups(source.config, 3)
