"""A token by part: what each must read and multiply, counted another way, and what is measured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpr_flops import count
from tiny_checkpoint import MODEL, TIED, random_block, write_checkpoint
from tiny_families import write_model

from gptvq_jax.models.kv_cache import LayerCache
from gptvq_jax.models.llama import block_step
from gptvq_jax.models.open import open_source
from gptvq_jax.ops import int8_head
from gptvq_jax.serve.forward import empty_caches
from gptvq_jax.serve.generate import STEPS_PER_CALL, generate, prefill
from gptvq_jax.serve.params import dense_params, memory_bytes, packed_params
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study import block_calls, token_parts, token_report, token_times
from gptvq_jax.study.sample_tensors import TensorFormat
from gptvq_jax.study.token_parts import NoProduct, weight_bytes, weight_shape

POSITION, LENGTH = 9, 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return PackedCheckpoint(write_checkpoint(tmp_path_factory.mktemp("tied") / "packed", TIED))


@pytest.fixture(scope="module")
def params(checkpoint):
    return packed_params(checkpoint, "xla")


@pytest.fixture(scope="module")
def dense(checkpoint):
    """Which compiles fast."""
    return dense_params(checkpoint)


def parts_of(config, params, batch=1, position=POSITION):
    caches = empty_caches(config, batch, LENGTH, "float32")
    made = token_parts.parts(config, params, caches, position, batch)
    return {part.name: part for part in made}


def test_bytes_are_those_of_the_weights_and_of_the_positions_that_are_seen(params):
    parts = parts_of(TIED, params)
    blocks = [params[f"layers_{index}"] for index in range(2)]
    q, gate = parts["q_proj k_proj v_proj"], parts["gate_proj up_proj"]
    attention = [block["self_attn"] for block in blocks]
    assert q.bytes == sum(a[f"{n}_proj"]["kernel"].num_bytes for a in attention for n in "qkv")
    assert (q.calls, gate.calls, parts["o_proj"].calls) == (6, 4, 2)
    # 2 blocks, keys and values of 1 head of 16 in float32, of 10 positions.
    assert parts["attention with cache"].bytes == 2 * 2 * 16 * 4 * (POSITION + 1)
    # Every array of the tree is in one part, and the tied embedding in two.
    row = parts["embedding"].bytes
    cached = parts["attention with cache"].bytes + parts["sampling"].bytes
    assert parts["sampling"].bytes == 4 * 40
    everything = sum(part.bytes for part in parts.values()) - row - cached
    assert everything == sum(memory_bytes(params))
    assert row == weight_bytes(params["embed_tokens"]) // 40


def test_batch_and_window_change_what_they_must(params):
    one, three = parts_of(TIED, params), parts_of(TIED, params, 3)
    assert three["o_proj"].bytes == one["o_proj"].bytes
    assert three["o_proj"].multiply_adds == 3 * one["o_proj"].multiply_adds
    for name in ("attention with cache", "sampling"):
        assert three[name].bytes == 3 * one[name].bytes
    assert parts_of(TIED, params, position=0)["attention with cache"].bytes == 2 * 2 * 16 * 4


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "qwen3_moe", "gemma2"])
def test_multiply_adds_are_those_of_the_programs(tmp_path, name):
    """Counted in what is traced, for every kind of block."""
    source = open_source(str(write_model(tmp_path, name)))
    config, params = source.config, dense_params(source)
    # All positions of the caches are seen, which the programs multiply in any case.
    window = min((kind.sliding_window or LENGTH) for kind in config.kinds)
    length = min(LENGTH, window)
    caches = empty_caches(config, 1, length, "float32")
    for part in token_parts.parts(config, params, caches, length - 1):
        program, *arguments = part.run.func, *part.run.args
        if part.name == "attention with cache":
            program = token_parts._mix.__wrapped__
            configs, free, held, x, positions = captured(part)
            flops = count(lambda *a, c=configs, p=program: p(c, *a), free, held, x, positions)
        elif arguments and isinstance(arguments[0], tuple | type(config)):
            static = arguments.pop(0)
            flops = count(lambda *a, s=static, p=program: p.__wrapped__(s, *a), *arguments)
        else:
            flops = count(program.__wrapped__, *arguments)
        again = 0  # the router, which is traced twice, and compiled once
        if part.name == "experts":
            again = part.calls * config.hidden_size * max(k.num_experts for k in config.kinds)
        assert flops == 2 * (part.multiply_adds + again), part.name


def captured(part):
    """The arguments of the program of attention, which holds its caches."""
    cells = dict(zip(part.run.func.__code__.co_freevars, part.run.func.__closure__, strict=True))
    value = {name: cell.cell_contents for name, cell in cells.items()}
    return value["configs"], value["free"], value["held"]["run"], value["x"], value["positions"]


def test_of_experts_those_count_that_a_token_meets(tmp_path):
    source = open_source(str(write_model(tmp_path, "mixtral")))
    params = dense_params(source)
    module = [params[f"layers_{i}"]["block_sparse_moe"] for i in range(3)]
    routers = sum(weight_bytes(m["gate"]) for m in module)
    experts = sum(weight_bytes(m) for m in module) - routers
    for batch, share in ((1, 2 / 4), (8, 1)):
        part = parts_of(source.config, params, batch)["experts"]
        assert part.bytes == routers + experts * share


def test_every_part_runs_and_leaves_its_caches_usable(dense):
    for part in parts_of(TIED, dense, 2).values():
        for _ in range(2):
            for found in (part.run(), part.nothing()):
                first, *_ = jax.tree.leaves(found)
                assert np.isfinite(first).all()


def test_products_and_attention_are_the_models_own(dense):
    """What a part returns is what the layers return, but for a trace that makes it wait."""
    parts = parts_of(TIED, dense)
    x, groups = parts["o_proj"].run.args
    expected = x
    for (kernel,) in groups:
        expected = token_parts._after(expected, expected @ kernel)
    np.testing.assert_allclose(parts["o_proj"].run(), expected, rtol=1e-5)
    configs, free, caches, x, positions = captured(parts["attention with cache"])
    _, updated = token_parts._mix.__wrapped__(configs, free, caches, x, positions)
    for before, after in zip(caches, updated, strict=True):
        changed = np.flatnonzero(np.any(np.asarray(before.k != after.k), axis=(0, 2)))
        assert changed.tolist() == [POSITION] and isinstance(after, LayerCache)


def test_no_product_has_the_shape_of_one():
    x = jnp.arange(3.0)[None]
    np.testing.assert_array_equal(x @ NoProduct(7), [[0, 1, 2, 0, 1, 2, 0]])
    np.testing.assert_array_equal(x @ NoProduct(2), [[0, 1]])


def test_shapes_of_weights(params):
    layers = params["layers_0"]["self_attn"]
    assert weight_shape(layers["q_proj"]["kernel"]) == (32, 36)
    assert weight_shape(layers["o_proj"]["kernel"]) == (36, 32)
    assert weight_shape(params["embed_tokens"]["embedding"]) == (40, 36)


@pytest.fixture(scope="module")
def measured(dense):
    rounds = []
    steps = {"a": token_times.Steps(TIED, dense, POSITION, 1)}
    found = token_times.measure(steps, 3, lambda: rounds.append(1))
    assert len(rounds) == 4
    return found["a"]


def test_the_rest_is_what_the_parts_leave_of_a_step(measured):
    rows = measured["rows"]
    assert [row["part"] for row in rows][-1] == token_times.REST
    for row in (measured, *rows):
        low, high = row["quartiles"]
        assert low <= row["seconds"] <= high
    assert measured["seconds"] > 0


def test_steps_are_those_of_generation(dense):
    """From the same caches: of generation's own, behind its prompt."""
    prompt = [5, 9, 3, 7, 11, 2, 30, 8, 1]
    expected = generate(TIED, dense, [prompt], max_tokens=STEPS_PER_CALL + 1).tokens[0]
    steps = token_times.Steps(TIED, dense, len(prompt), 1)
    state = prefill(steps._plan, dense, np.array([prompt]), np.array([9]), jax.random.key(0))
    steps._state = dataclasses.replace(state, ended=steps._state.ended)
    assert int(state.tokens[0]) == expected[0]
    assert steps.run().tolist() == [expected[1:]]


def test_a_position_that_the_model_does_not_have(params):
    for position in (0, TIED.max_position_embeddings - STEPS_PER_CALL + 1):
        with pytest.raises(ValueError, match=rf"context={position} must be from 1 to 2040"):
            token_times.Steps(TIED, params, position, 1)


def test_the_bound_is_the_longer_of_bytes_and_products():
    row = {"bytes": 1000, "multiply_adds": 600}
    assert token_times.bound(row, 100.0, 100.0) == 12
    assert token_times.bound(row, 50.0, 100.0) == 20


def test_the_table_has_every_part_and_the_sum():
    def row(part, calls, size, work, seconds, within=False):
        quartiles = [seconds, seconds]
        said = {
            "part": part,
            "calls": calls,
            "bytes": size,
            "multiply_adds": work,
            "within": within,
        }
        return {**said, "seconds": seconds, "quartiles": quartiles}

    rows = [row("o_proj", 2, 4_000_000, 3_000_000, 2e-3), row("sampling", 1, 1000, 0, 1e-4)]
    rows.insert(1, row("in it", 9, 500, 100, 1e-3, within=True))
    rows.append(row(token_times.REST, 1, 0, 0, -1e-4))
    model = {"name": "xla", "batch": 2, "context": 5, "seconds": 2e-3, "quartiles": [2e-3, 2e-3]}
    text = token_report.table([{**model, "rows": rows}], 4e9, 1e12)
    first, _, o_proj, in_it, sampling, rest, whole = text.splitlines()
    assert in_it.startswith("  in it ") and o_proj.startswith("o_proj ")
    assert first.startswith("xla, batch 2, 5 tokens before: 2.00 ms a step")
    assert first.endswith("1000.0 tokens/s")
    assert o_proj.split() == [
        *("o_proj", "2", "2000", "2000", "to", "2000", "100.0%"),
        *("4.00", "2.0", "3.00", "1000.0", "2.0"),
    ]
    assert sampling.split()[-4:] == ["0.0", "-", "0.2", "400.0"]
    assert rest.split() == ["the", "rest", "-", "-100", "-100", "to", "-100", "-5.0%"]
    assert whole.split()[:3] == ["a", "step", "3"] and whole.split()[-2:] == ["1000.2", "2.0"]


INT8 = TensorFormat(2, 4, 1024, 256)
TWO_HEADS = dataclasses.replace(TIED, num_key_value_heads=2)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """Parameters each of whose layers has a C++ kernel."""
    if not int8_head.can_run():
        pytest.skip("no C++ compiler")
    blocks = [random_block(seed, TWO_HEADS, INT8) for seed in range(2)]
    path = write_checkpoint(tmp_path_factory.mktemp("native") / "packed", TWO_HEADS, blocks=blocks)
    return packed_params(PackedCheckpoint(path), "cpu")


def test_blocks_of_one_call_are_a_part_that_has_others_in_it(native, dense):
    assert not any(part.within for part in token_times.Steps(TIED, dense, POSITION, 1).parts)
    whole, *others = token_times.Steps(TWO_HEADS, native, POSITION, 2).parts
    within = [part for part in others if part.within]
    assert (whole.name, whole.calls, whole.within) == (block_calls.BLOCKS, 2, False)
    assert [part.name for part in others if not part.within] == [*block_calls._OUTSIDE]
    assert len(within) == 6
    assert whole.bytes == sum(part.bytes for part in within)
    assert whole.multiply_adds == sum(part.multiply_adds for part in within)


def test_blocks_of_one_call_are_those_of_the_step(native):
    whole = token_times.Steps(TWO_HEADS, native, POSITION, 2).parts[0]
    configs, blocks, caches, x, positions = captured(whole)
    expected = x
    caches = jax.tree.map(jnp.copy, caches)
    for config, block, cache in zip(configs, blocks, caches, strict=True):
        expected, _ = block_step(config, block, expected, cache, positions)
    for _ in range(2):  # its caches are usable again
        np.testing.assert_allclose(whole.run(), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(whole.nothing(), -x)


def test_the_rest_leaves_out_what_is_within_another(native, monkeypatch):
    steps = token_times.Steps(TWO_HEADS, native, POSITION, 1)
    clock = {part.run: float(number) for number, part in enumerate(steps.parts, 1)}
    clock |= {part.nothing: 0.0 for part in steps.parts} | {steps.run: 100.0 * STEPS_PER_CALL}
    monkeypatch.setattr(token_times, "_seconds", clock.__getitem__)
    rows = token_times.measure({"a": steps}, 1)["a"]["rows"]
    assert [row["within"] for row in rows] == [False, *[True] * 6, *[False] * 4]
    assert rows[-1]["seconds"] == 100 - (1 + 8 + 9 + 10)


def test_a_rounded_head_is_read_and_its_exact_rows_are_looked_up(native):
    table = native["embed_tokens"]["embedding"].values
    rounded = int8_head.Int8Head.rounded(np.asarray(table), tied=True)
    found = parts_of(TWO_HEADS, {**native, "embed_tokens": {"embedding": rounded}})
    norm = weight_bytes(native["norm"])
    assert found["head, with its norm"].bytes == weight_bytes(rounded.coded) + norm
    assert found["embedding"].bytes == table.nbytes // 40


def test_models_untied_have_a_head_of_their_own(tmp_path):
    path = write_checkpoint(tmp_path / "packed", MODEL)
    params = packed_params(PackedCheckpoint(path), "xla")
    head = parts_of(MODEL, params)["head, with its norm"]
    assert head.bytes == weight_bytes(params["lm_head"]) + weight_bytes(params["norm"])
    assert head.multiply_adds == 40 * 36
