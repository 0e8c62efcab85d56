"""What experts are calibrated by, against plain sums over the tokens that each of them gets."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_families import write_model
from tiny_run import byte_tokenizer, quick_config

from gptvq_jax.config import CalibrationSettings
from gptvq_jax.console import report
from gptvq_jax.core.hessian import init_moment
from gptvq_jax.models.experts import Routes
from gptvq_jax.models.llama import DecoderBlock, get_layer, run_stage, with_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.run import expert_moments, job, token_weights
from gptvq_jax.run.calibrate import LAST
from gptvq_jax.run.forward import block_halves
from gptvq_jax.run.gradients import block_backward
from gptvq_jax.run.held_out import Files, init_sums, run_windows
from gptvq_jax.run.objectives import hessians, shift
from gptvq_jax.run.statistics import calibrate
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study.report.layer_figures import experts_line
from gptvq_jax.study.report.results import Cell

W = ("w1", "w3", "w2")
MODULE = "block_sparse_moe"
WINDOWS = CalibrationSettings(num_windows=4, held_out=2, batch_size=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(str(write_model(tmp_path_factory.mktemp("moe"), "mixtral")))


def layer(number, name):
    return f"{MODULE}/experts_{number}/{name}"


def activations(seed=0, windows=6):
    return np.random.default_rng(seed).standard_normal((windows, 16, 48)).astype(np.float32)


def float64(block):
    """Kernels of the router and of the experts."""
    kernel = lambda tree: np.asarray(tree["kernel"], np.float64)  # noqa: E731
    moe = block[MODULE]
    return kernel(moe["gate"]), [[kernel(moe[f"experts_{e}"][n]) for n in W] for e in range(4)]


def after_attention(config, block, x):
    """Normed x (..., hidden) as router and experts read it."""
    middle, _ = block_halves(config, block, jnp.asarray(x))
    run = jax.jit(run_stage, static_argnums=(0, 2))
    return np.asarray(run(config, block, 2, middle, None)[2].inputs, np.float64)


def by_token(y, block):
    """[(token, expert, p, inner activations)] of tokens (N, hidden), in plain loops."""
    router, experts = float64(block)
    found = []
    for token, row in enumerate(y):
        p = np.exp(row @ router - (row @ router).max())
        p /= p.sum()
        chosen = np.argsort(-p)[:2]
        for e in chosen:
            w1, w3, _ = experts[e]
            gate = row @ w1
            inner = gate / (1 + np.exp(-gate)) * (row @ w3)
            found.append((token, e, p[e] / p[chosen].sum(), inner))
    return found


def sums_of(source, x, weights=None, crosses=None, float_block=None, block=None):
    config, block = source.config, source.block(0) if block is None else block
    sums = init_sums(config, block, range(LAST), weights, crosses is not None)
    files = Files(x, reference=crosses)
    return run_windows(config, block, files, 0, LAST - 1, sums, WINDOWS, weights, None, float_block)


def test_hessians_are_of_the_tokens_of_an_expert_by_squared_router_weights(source):
    x, block = activations(), source.block(0)
    sums = sums_of(source, x)
    y = after_attention(source.config, block, x).reshape(6, -1, 48)
    for moments, part in ((sums.fitted, y[:4]), (sums.held_out, y[4:])):
        found, tokens = hessians(moments), part.reshape(-1, 48)
        routed = by_token(tokens, block)
        for e in range(4):
            own = [(tokens[t], p, inner) for t, of, p, inner in routed if of == e]
            assert int(moments.tokens[layer(e, "w1"), 0]) == len(own) > 0
            for name, which in (("w1", 0), ("w2", 2)):
                total = sum(p**2 * np.outer(of[which], of[which]) for of in own for p in [of[1]])
                expected = total / sum(p**2 for _, p, _ in own)
                actual = found[layer(e, name), 0]
                np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_an_expert_with_few_tokens_shares_in_the_hessian_of_all(source):
    moments = sums_of(source, activations()).fitted
    owner = layer(2, "w1"), 0
    tokens = int(moments.tokens[owner])
    own, least = hessians(moments)[owner], 4 * tokens
    members = [moments.inputs[layer(e, "w1"), 0] for e in range(4)]
    of_all = sum(np.triu(m.total) for m in members) / sum(float(m.count) for m in members)
    of_all = of_all + np.triu(of_all, 1).T
    expected = 0.25 * np.asarray(own) + 0.75 * of_all
    np.testing.assert_allclose(hessians(moments, least)[owner], expected, rtol=0, atol=1e-5)
    assert expert_moments.shares({owner: tokens}, moments.inputs, 0)[owner] == max(
        0, 1 - tokens / 48
    )
    nothing = init_moment(48)
    moments = moments._replace(
        inputs={**moments.inputs, owner: nothing}, tokens={**moments.tokens, owner: jnp.int32(0)}
    )
    members[2] = nothing
    of_all = sum(np.triu(m.total) for m in members) / sum(float(m.count) for m in members)
    found = np.asarray(hessians(moments)[owner])
    np.testing.assert_allclose(found, of_all + np.triu(of_all, 1).T, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_asymmetric_target_aims_at_what_the_experts_of_these_tokens_read_in_float(source):
    config, exact, rng = source.config, source.block(0), np.random.default_rng(1)
    block = exact
    for name in config.linear_layers:
        kernel = np.asarray(get_layer(block, name)["kernel"])
        noise = 0.02 * rng.standard_normal(kernel.shape)
        block = with_layer(block, name, jnp.asarray(kernel + noise, jnp.float32))
    x, y = activations(), activations(seed=2)
    states = (y, *map(np.asarray, block_halves(config, exact, jnp.asarray(y))))
    moments = sums_of(source, x, crosses=states, float_block=exact, block=block).fitted
    of_x = after_attention(config, block, x)[:4].reshape(-1, 48)
    of_y = after_attention(config, exact, y)[:4].reshape(-1, 48)
    routed, (_, experts) = by_token(of_x, block), float64(exact)
    for name in ("w3", "w2"):
        expected, total = 0, 0
        own = np.asarray(get_layer(block, layer(1, name))["kernel"], np.float64)
        for t, e, p, inner in routed:
            if e != 1:
                continue
            gate, aimed = of_y[t] @ experts[1][0], of_y[t]
            if name == "w2":
                inner_y = gate / (1 + np.exp(-gate)) * (of_y[t] @ experts[1][1])
                difference, read = inner_y - inner, inner
            else:
                difference, read = aimed - of_x[t], of_x[t]
            expected, total = expected + p**2 * np.outer(difference @ own, read), total + p**2
        owner = config.layers.first_of[layer(1, name)], 0
        actual = shift(config, moments, owner, jnp.asarray(own.T, jnp.float32), None)
        expected = expected / total
        np.testing.assert_allclose(actual, expected, atol=1e-3 * np.abs(expected).max())
        least = 2 * int(moments.tokens[owner])  # as much of it as the expert's own Hessian is
        half = shift(config, moments, owner, jnp.asarray(own.T, jnp.float32), None, least)
        np.testing.assert_allclose(half, actual / 2, rtol=1e-5)


def plain_block(config, block, x, shifts):
    """A block whose experts are all multiplied by all tokens; shifts (b, T, k, rows) by layer."""
    x, mixed, _ = run_stage(config, block, 0, x, None)
    x, _, _ = run_stage(config, block, 1, x, mixed)
    variables = {"params": block}
    y = DecoderBlock(config).apply(variables, x, method=lambda m, x: m._norm("before_feed", x))
    p = jax.nn.softmax(y @ block[MODULE]["gate"]["kernel"])
    weights, chosen = jax.lax.top_k(p, 2)
    weights = weights / weights.sum(-1, keepdims=True)
    each = lambda n: jnp.stack([block[MODULE][f"experts_{e}"][n]["kernel"] for e in range(4)])  # noqa: E731
    gate, up = (jnp.einsum("bth,btkho->btko", y, each(n)[chosen]) + shifts[n] for n in W[:2])
    inner = jax.nn.silu(gate) * up
    outputs = jnp.einsum("btki,btkio->btko", inner, each("w2")[chosen]) + shifts["w2"]
    return x + (outputs * weights[..., None]).sum(-2), chosen


@pytest.mark.slow
def test_token_weights_are_squared_gradients_with_respect_to_the_outputs_of_slots(source):
    config, block, rng = source.config, source.block(0), np.random.default_rng(3)
    x, dy = (jnp.asarray(rng.standard_normal((2, 16, 48)), jnp.float32) for _ in range(2))
    shifts = {n: jnp.zeros((2, 16, 2, 32 if n != "w2" else 48)) for n in W}
    loss = lambda x, shifts: jnp.sum(dy * plain_block(config, block, x, shifts)[0])  # noqa: E731
    expected_dx, expected = jax.jit(jax.grad(loss, (0, 1)))(x, shifts)
    dx, weights, _ = block_backward(config, block, x, dy, 2)
    np.testing.assert_allclose(dx, expected_dx, rtol=0, atol=1e-4 * np.abs(expected_dx).max())
    _, chosen = plain_block(config, block, x, shifts)
    np.testing.assert_array_equal(weights[token_weights.ROUTES], chosen)
    for name in W:
        squares = np.square(expected[name]).reshape(2, 16, 2, 2, -1).mean(-1)
        actual = weights[f"{MODULE}/experts/{name}"]
        np.testing.assert_allclose(actual, squares, rtol=1e-3, atol=1e-5 * squares.max())
    shapes = token_weights.shapes(config, (2, 16), 2)
    assert {name: array.shape for name, array in weights.items()} == shapes


def test_weights_of_an_expert_are_relative_to_those_of_its_tokens(source):
    config, rng = source.config, np.random.default_rng(0)
    slots, routes = rng.lognormal(size=(3, 8, 2, 1)), rng.integers(3, size=(3, 8, 2))
    name = f"{MODULE}/experts/w1"
    weights = {name: slots.astype(np.float32), token_weights.ROUTES: routes.astype(np.int32)}
    relative = token_weights.relative(config, weights, 0.5, 2)
    for e in range(3):
        of_fitted = relative[name][:2][routes[:2] == e]
        np.testing.assert_allclose(of_fitted.mean(), 1, rtol=1e-5)
        mean = token_weights.means(config, weights, layer(e, "w1"))
        np.testing.assert_allclose(mean, [slots[routes == e].sum() / 24], rtol=1e-6)
    assert token_weights.means(config, weights, layer(3, "w1")) == 0  # no token reached it
    blended = token_weights.means(config, weights, layer(3, "w1"), share=1.0)
    np.testing.assert_allclose(blended, [slots.sum() / 24 / 4], rtol=1e-6)
    # A quantized model may send a token elsewhere.
    other = Routes(jnp.asarray(np.stack([routes[..., 1], np.full((3, 8), 3)], -1)), None)
    found = token_weights.of_slots(relative, name, 0, other)
    same = routes[..., 0] != routes[..., 1]
    np.testing.assert_array_equal(found[..., 0][same], relative[name][:, :, 1, 0][same])
    np.testing.assert_array_equal(found[..., 1], 1.0)


def unreachable(path):
    """A model of one block whose last expert no token reaches, the first two being opposites."""
    directory = write_model(
        path, "mixtral", vocab_size=256, num_hidden_layers=1, num_experts_per_tok=1
    )
    byte_tokenizer().save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    router = tensors[f"model.layers.0.{MODULE}.gate.weight"]
    router[1], router[3] = -router[0], 0.5 * router[0]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def run(directory, text_files, path, **fields):
    config = quick_config(directory, text_files)
    config.method = "gptq"
    config.uniform.group_size = 16
    for field, value in fields.items():
        config.update_from_flattened_dict({field.replace("__", "."): value})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
        summary = job.quantize(config, str(path))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return summary, {row["layer"]: row for row in rows if row["kind"] == "layer"}


def test_an_expert_that_no_token_reached_is_said_and_quantized(tmp_path, text_files, caplog):
    directory = unreachable(tmp_path / "model")
    summary, rows = run(directory, text_files, tmp_path / "run", calibration__expert_tokens=20)
    for name in W:
        row = rows[layer(3, name)]
        assert (row["expert_tokens"], row["shared_hessian"]) == (0, 1.0)
        assert 0 < row["relative_error"] < 1 and 0 < row["held_out_error"] < 1
    tokens = [rows[layer(e, "w2")]["expert_tokens"] for e in range(4)]
    assert sum(tokens) == 6 * 32
    for e in range(4):
        assert rows[layer(e, "w1")]["shared_hessian"] == max(0, 1 - tokens[e] / 20)
    assert "expert_tokens" not in rows["self_attn/q_proj"]
    said = [text for text in caplog.messages if "no token reached 3; raise calib" in text]
    assert len(said) == 1 and said[0].startswith("layers_0: ")
    table = report.layer_table(list(rows.values())).splitlines()
    assert sum(line.endswith("0 tokens, 100% shared") for line in table) == 3
    cell = Cell("run", tmp_path, "done", layers=list(rows.values()))
    assert "of 12 layers of experts got too few" in experts_line(cell)
    assert np.isfinite(summary["perplexity_quantized"])


@pytest.mark.slow
def test_more_tokens_wanted_of_an_expert_change_its_codes(tmp_path, text_files):
    directory = unreachable(tmp_path / "model")
    codes = {}
    for wanted in (1, 10**6):
        fields = {"calibration__expert_tokens": wanted, "calibration__held_out": 0}
        _, rows = run(directory, text_files, tmp_path / str(wanted), **fields)
        packed = PackedCheckpoint(tmp_path / str(wanted) / "checkpoint").packed_block(0)
        codes[wanted] = np.asarray(get_layer(packed, layer(0, "w1"))["kernel"].codes)
        assert rows[layer(0, "w1")]["shared_hessian"] == pytest.approx(float(wanted > 1), abs=1e-3)
    assert not np.array_equal(*codes.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["trellis", "gptvq"])
def test_a_budget_is_spent_on_all_experts(tmp_path, text_files, method):
    fields = {
        "method": method,
        "vq__group_size": 0,
        "allocation__bits": (2.0, 4.0),
        "allocation__em_iterations": 0,
        "trellis__window_bits": 6,
        "trellis__bits": 4.0,
        "allocation__bits_per_value": 4.0,
        "calibration__gradient_groups": int(method == "trellis"),
        "calibration__gradient_power": 1.0,
    }
    summary, rows = run(unreachable(tmp_path / "model"), text_files, tmp_path / "run", **fields)
    assert 3.5 < summary["bits_per_value"] <= 4
    assert all(rows[layer(3, name)]["bits_per_value"] > 1 for name in W)
    curves = json.loads((tmp_path / "run/curves/00000.json").read_text())
    assert {row["layer"] for row in curves} == rows.keys()


@pytest.mark.slow
def test_blocks_with_experts_are_tuned(tmp_path, text_files):
    directory = write_model(tmp_path / "model", "mixtral", vocab_size=256, num_hidden_layers=1)
    byte_tokenizer().save_pretrained(directory)
    fields = {"method": "gptvq", "tune__block": True, "tune__epochs": 3, "tune__batch_size": 2}
    run(directory, text_files, tmp_path / "run", **fields)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (block,) = [row for row in rows if row["kind"] == "block"]
    assert block["tune_error_after"] < 0.98 * block["tune_error_before"]
    router = get_layer(PackedCheckpoint(tmp_path / "run/checkpoint").block(0), f"{MODULE}/gate")
    kernel = np.asarray(open_source(str(directory)).block(0)[MODULE]["gate"]["kernel"])
    np.testing.assert_array_equal(router["kernel"], kernel.astype(np.float16))  # left alone


@pytest.mark.slow
def test_statistics_of_experts_stand_for_the_text(tmp_path, text_files):
    directory = unreachable(tmp_path / "model")
    fields = {"calibration__inputs": "float", "true_sequential": False}
    _, expected = run(directory, text_files, tmp_path / "a", **fields)
    config = quick_config(directory, text_files)
    calibrate(config, str(tmp_path / "statistics.npz"))
    fields["calibration__statistics"] = str(tmp_path / "statistics.npz")
    _, rows = run(directory, text_files, tmp_path / "b", **fields)
    for name, row in rows.items():
        fields = row.keys() & {"relative_error", "expert_tokens", "shared_hessian"}
        assert {f: row[f] for f in fields} == pytest.approx({f: expected[name][f] for f in fields})
    assert rows[layer(3, "w1")]["expert_tokens"] == 0


def test_a_model_without_experts_does_not_take_tokens_for_them(tiny_config, tmp_path):
    tiny_config.calibration.expert_tokens = 9
    with pytest.raises(ValueError, match="calibration.expert_tokens has no effect: .*leave it out"):
        job.quantize(tiny_config, str(tmp_path / "run"))
