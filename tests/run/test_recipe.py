"""A run with a recipe: layers, embedding and head in formats of their own, under a budget."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
from tiny_families import hf_config, write_model
from tiny_run import byte_tokenizer, config_file, quick_config

from gptvq_jax.config import default_config, from_config
from gptvq_jax.core.int8_rows import is_int8_rows
from gptvq_jax.core.trellis_tensor import TrellisTensor
from gptvq_jax.core.vq_tensor import FactoredCodebook, VQTensor
from gptvq_jax.exchange.hf_dense import hf_dense
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Decoder, get_layer
from gptvq_jax.models.open import open_source
from gptvq_jax.models.stages import LINEAR_LAYERS
from gptvq_jax.recipe import parse, rule_text
from gptvq_jax.rule_settings import choices, is_open
from gptvq_jax.run import job
from gptvq_jax.run.formats import check_formats, check_given, layer_format, linear_layers
from gptvq_jax.run.outer import stored_outer
from gptvq_jax.run.packed_block import PackedBlock
from gptvq_jax.run.sizes import stored_bytes
from gptvq_jax.serve.generate import generate
from gptvq_jax.serve.params import dense_params, memory_bytes, packed_params
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.overhead import checkpoint_overhead
from gptvq_jax.study.report.report import report
from gptvq_jax.study.sweep.estimate import cell_bytes, cell_flop
from gptvq_jax.study.sweep.passes import GRADIENTS, passes_of

GPTQ = {"method": "gptq", "bits": 3, "group_size": 16}
RECIPE = (
    ("layers_0/self_attn/[qk]_proj", "int8"),
    ("layers_0/mlp/down_proj", "dense"),
    (".*/o_proj", GPTQ),
    (".*/v_proj", {"bits": 1.0}),
    (".*/gate_proj", {"block_size": 64}),
    ("embed_tokens", {"bits": 1.0}),
    ("lm_head", GPTQ),
)
BUDGET = 4.5


def recipe_config(directory, text_files):
    config = quick_config(directory, text_files)
    config.recipe, config.calibration.gradient_groups = RECIPE, 1
    config.vq.group_size, config.vq.codebook_overhead = 0, 0.5
    config.vq.seed = "mahalanobis"  # which compiles soon
    config.allocation.bits_per_value, config.allocation.bits = BUDGET, (1.0, 2.0)
    config.allocation.em_iterations = 1
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a head of its own."""
    directory = write_model(
        tmp_path_factory.mktemp("untied") / "model",
        "llama",
        vocab_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,  # equal shapes: fewer programs
        num_key_value_heads=3,
        tie_word_embeddings=False,
    )
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory, text_files):
    config, path = recipe_config(model, text_files), tmp_path_factory.mktemp("recipe") / "run"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        summary = job.quantize(config, str(path))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        config=config,
        settings=from_config(config),
        source=open_source(str(model)),
        summary=summary,
        path=path,
        packed=PackedCheckpoint(path / "checkpoint"),
        layers={(r["block"], r["layer"]): r for r in rows if r["kind"] == "layer"},
        outer={r["layer"]: r for r in rows if r["kind"] == "outer"},
        out="\n".join(lines),
    )


def kernel(run, index, name):
    return get_layer(run.packed.packed_block(index), name)["kernel"]


def test_every_layer_is_what_its_rule_says(finished):
    for name in ("self_attn/q_proj", "self_attn/k_proj"):
        tensor = kernel(finished, 0, name)
        assert is_int8_rows(tensor) and not is_int8_rows(kernel(finished, 1, name))
        row = finished.layers[0, name]
        assert row["method"] == "int8" and row["relative_error"] < 1e-4
        assert row["bits_per_value"] == tensor.bits_per_value > 8
    dense = kernel(finished, 0, "mlp/down_proj")
    source = np.asarray(get_layer(finished.source.block(0), "mlp/down_proj")["kernel"])
    assert dense.dtype == np.float16 and np.array_equal(dense, source.astype(np.float16))
    row = finished.layers[0, "mlp/down_proj"]
    assert (row["method"], row["bits_per_value"], row["num_codebooks"]) == ("dense", 16.0, 0)
    assert 0 < row["relative_error"] < 1e-6 and 0 < row["held_out_error"] < 1e-6
    for index in range(2):
        tensor = kernel(finished, index, "self_attn/o_proj")
        assert isinstance(tensor.codebook, FactoredCodebook) and tensor.index_bits == 3
        v_proj = finished.layers[index, "self_attn/v_proj"]
        assert (v_proj["dim"], v_proj["index_bits"]) == (2, 2)


def test_rows_name_the_rule_that_took_them(finished):
    rules = finished.settings.recipe
    for (index, name), row in finished.layers.items():
        own = layer_format(finished.settings, index, name).rule
        assert row["rule"] == (rule_text(rules, own) if own else None)
    assert finished.layers[1, "self_attn/q_proj"]["rule"] is None
    assert finished.layers[0, "mlp/gate_proj"]["rule"] == "5. .*/gate_proj: block_size=64"
    assert finished.outer["lm_head"]["rule"] == "7. lm_head: gptq, bits=3, group_size=16"


def test_the_budget_is_of_all_layers_and_is_spent_on_what_is_open(finished):
    rows = finished.layers.values()
    num_bytes, values = (sum(row[n] for row in rows) for n in ("num_bytes", "num_values"))
    bits = 8 * num_bytes / values
    manifest = finished.packed.manifest
    assert BUDGET - 0.2 < bits <= BUDGET
    assert finished.summary["bits_per_value"] == manifest["bits_per_value"]
    assert manifest["bits_per_value"] == pytest.approx(bits, rel=1e-12)
    assert manifest["kept_dense"] == ["layers_0/mlp/down_proj"]
    assert len(manifest["layers"]) == len(finished.layers) - 1
    measured = {}
    for index in range(2):
        for row in json.loads((finished.path / f"curves/{index:05d}.json").read_text()):
            measured.setdefault((index, row["layer"]), []).append(row)
    for layer, own in measured.items():
        rule = layer_format(finished.settings, *layer).rule
        assert len(own) == (2 if is_open(finished.settings, rule) else 1)
        assert finished.layers[layer]["num_bytes"] in {row["num_bytes"] for row in own}
    assert sum(row["num_values"] for row, *_ in measured.values()) == values
    free = [layer for layer, own in measured.items() if len(own) > 1]
    assert len({finished.layers[layer]["index_bits"] for layer in free}) > 1
    gate = layer_format(finished.settings, 0, "mlp/gate_proj").rule
    assert {c.block_size for c in choices(finished.settings, gate)} == {64}


def test_embedding_and_head_are_packed_apart_from_the_budget(finished):
    outer, sections = finished.packed.packed_outer(), finished.packed.manifest
    table, head = outer["embed_tokens"]["embedding"], outer["lm_head"]["kernel"]
    assert isinstance(table, VQTensor) and (table.grid.dim, table.index_bits) == (2, 2)
    assert isinstance(head.codebook, FactoredCodebook) and head.index_bits == 3
    assert sections["embeddings"].keys() == {"embed_tokens/embedding", "lm_head"}
    assert sections["embedding_bytes"] == table.num_bytes + head.num_bytes
    for name, tensor in (("embed_tokens", table), ("lm_head", head)):
        row = finished.outer[name]
        own = finished.source.outer()[name]
        weight = own["embedding"] if name == "embed_tokens" else own["kernel"].T
        error = np.sum(np.square(weight - np.asarray(tensor.dequantize()))) / np.sum(weight**2)
        assert row["relative_error"] == pytest.approx(error, rel=1e-4) and 0 < error < 0.5
        assert row["bits_per_value"] == tensor.bits_per_value


def decode(source, tokens):
    blocks = {f"layers_{i}": source.block(i) for i in range(source.config.num_hidden_layers)}
    return np.asarray(
        Decoder(source.config).apply({"params": {**source.outer(), **blocks}}, tokens)
    )


def test_it_runs_from_codes_as_the_dequantized_model_does(finished):
    packed, tokens = finished.packed, jnp.array([[7, 3, 2, 8]])
    coded = packed_params(packed, "xla")
    np.testing.assert_allclose(
        jax.jit(Decoder(packed.config).apply)({"params": coded}, tokens),
        decode(packed, tokens),
        atol=1e-4,
    )
    # Norms, biases and the one dense kernel are all that is not packed.
    manifest = packed.manifest
    in_codes, others = memory_bytes(coded)
    assert others == manifest["dense_bytes"]
    assert in_codes <= 1.5 * (manifest["quantized_bytes"] + manifest["embedding_bytes"])


def test_the_dense_export_is_the_same_model(finished, tmp_path):
    hf_dense(finished.packed, tmp_path / "out")
    tokens = np.array([[5, 9, 11, 30]])
    again = open_source(str(tmp_path / "out"))
    np.testing.assert_allclose(decode(again, tokens), decode(finished.packed, tokens), atol=1e-5)


def test_the_end_of_a_run_says_which_rule_took_what(finished):
    lines = finished.out.splitlines()
    header = next(line for line in lines if line.startswith("block  layer"))
    assert header.endswith("   rule")
    cells = {tuple(line.split()[:2]): line.split() for line in lines if line}
    assert cells["0", "mlp/down_proj"][-1] == "2" and "dense" in cells["0", "mlp/down_proj"]
    assert cells["1", "self_attn/q_proj"][-1] == "-" and cells["-", "lm_head"][-1] == "7"
    assert "1. layers_0/self_attn/[qk]_proj: int8 (2 layers; 10." in finished.out
    assert "7. lm_head: gptq, bits=3, group_size=16 (lm_head; " in finished.out
    assert "of 13 layers, and 1 that a recipe keeps dense" in finished.out
    assert "packed embeddings" in finished.out
    assert (finished.path / "report.png").stat().st_size > 10_000


def test_the_page_says_so_too(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("gptvq_jax.study.report.report.said", lambda *_: {})
    page = report([finished.path], tmp_path / "page", [], False).read_text()
    assert "Rule 2. layers_0/mlp/down_proj: dense (1 layer; 16.0000 bits per value)." in page
    assert "Rules of the recipe" in page and (tmp_path / "page/figures/rules.svg").exists()
    assert "No rule (5 layers; " in page and "recipe" in page


def test_the_room_that_is_asked_for_is_that_of_the_formats(finished):
    plan = {
        layer: next(
            c
            for c in choices(finished.settings, layer_format(finished.settings, *layer).rule)
            if (c.dim, c.index_bits) == (row["dim"], row["index_bits"])
        )
        for layer, row in finished.layers.items()
        if is_open(finished.settings, layer_format(finished.settings, *layer).rule)
    }
    config, manifest = finished.source.config, finished.packed.manifest
    asked = stored_bytes(config, finished.settings, plan) - checkpoint_overhead(config)
    stored = sum(manifest[f"{part}_bytes"] for part in ("quantized", "embedding", "dense"))
    assert asked == stored


def test_estimates_and_shared_passes_know_the_recipe(finished):
    config, with_rules = finished.source.config, finished.settings
    without = dataclasses.replace(with_rules, recipe=())
    unbudgeted = dataclasses.replace(
        without, allocation=dataclasses.replace(without.allocation, bits_per_value=0.0)
    )
    dense = dataclasses.replace(unbudgeted, recipe=parse((("layers_.*", "dense"),)))
    assert cell_flop(config, dense) < cell_flop(config, unbudgeted)
    more, less = (cell_bytes(config, of)[0] for of in (dense, unbudgeted))
    layers = linear_layers(unbudgeted, config)
    weights = sum(rows * cols for rows, cols in layers.values())
    assert more - less > 10 * weights / 8  # 16 bits in place of two to three
    names = {
        passes.name
        for of in (with_rules, without)
        for passes in passes_of(of, finished.source)
        if passes.kind == GRADIENTS
    }
    assert len(names) == 2


def test_a_stopped_run_goes_on_and_another_recipe_is_refused(finished, tmp_path, monkeypatch):
    config = finished.config.copy_and_resolve_references()
    quantized = PackedBlock.quantized

    def stops(self, goes_on):
        if self._index == 1:
            raise KeyboardInterrupt
        return quantized(self, goes_on)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PackedBlock, "quantized", stops)
        job.quantize(config, str(tmp_path / "run"))
    other = config.copy_and_resolve_references()
    other.recipe = RECIPE[:-1]
    with pytest.raises(ValueError, match=r"with another config: recipe: .*'lm_head'.* -> "):
        job.quantize(other, str(tmp_path / "run"))
    job.quantize(config, str(tmp_path / "run"))
    manifests = [(path / "checkpoint/manifest.json") for path in (finished.path, tmp_path / "run")]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["layer"] for row in rows if row["kind"] == "outer"] == ["embed_tokens", "lm_head"]
    assert len([row for row in rows if row["kind"] == "layer"]) == 2 * len(LINEAR_LAYERS)


@pytest.mark.parametrize(
    "recipe, budget, message",
    [
        ((("layers_2/.*", "int8"),), BUDGET, r"rule 1 \('layers_2/.*'\) has no layer"),
        (((".*", "dense"), ("lm_head", "int8")), 0.0, "rule 1 takes lm_head first; move it up"),
        (((".*_proj", "int8"),), BUDGET, "bits_per_value=4.5 has no effect: the rules .* every"),
        (((".*[qkv]_proj", "int8"),), 2.0, "cannot be met: .* of which layers that config.recipe"),
        ((("embed_tokens", "trellis"),), BUDGET, "embed_tokens cannot have method 'trellis'"),
        ((("lm_head", {"method": "trellis", "bits": 0.1}),), BUDGET, "lm_head: trellis.bits=0.1"),
    ],
)
def test_what_the_model_does_not_allow_is_refused_before_any_work(
    finished, tmp_path, recipe, budget, message
):
    config = finished.config.copy_and_resolve_references()
    config.recipe, config.allocation.bits_per_value = recipe, budget
    if not budget:
        config.vq.bits = 2.0
    with pytest.raises(ValueError, match=message):
        job.quantize(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "recipe, field, value, reached",
    [
        (((".*_proj", {"bits": 2.0, "dim": 2}),), "vq.bits", 1.0, False),
        (((".*_proj", {"bits": 2.0, "dim": 2}),), "vq.em_iterations", 2, True),
        (((".*_proj", "int8"),), "method", "gptq", False),
        ((("layers_0/.*", "int8"),), "method", "gptq", True),
        (((".*embed.*|lm_head", "dense"),), "embeddings", "int8", False),
        ((("lm_head", "dense"),), "embeddings", "int8", True),
        (((".*_proj", "aqlm"), ("lm_head", "int8")), "vq.dim", 2, False),
        (((".*_proj", "aqlm"), ("lm_head", {"bits": 2.0})), "vq.dim", 2, True),
    ],
)
def test_what_the_command_line_names_reaches_a_layer(model, recipe, field, value, reached):
    config = default_config()
    config.recipe = recipe
    config.update_from_flattened_dict({field: value})
    arguments = from_config(config), open_source(str(model)).config, [field, "damping"]
    if reached:
        check_given(*arguments)
        return
    with pytest.raises(
        ValueError, match=f"--config.{field} has no effect because rules of config.recipe"
    ):
        check_given(*arguments)


def test_a_head_that_int8_rows_cannot_hold_is_named():
    config = default_config()
    config.embeddings = "int8"
    source = SimpleNamespace(config=tiny_checkpoint.MODEL)
    context = SimpleNamespace(settings=from_config(config), source=source)
    outer = tiny_checkpoint.random_outer(0)
    outer["lm_head"]["kernel"][3, 4] = 1e8
    with pytest.raises(ValueError, match=r"lm_head: 1e\+08 .*; keep it dense: embeddings='dense'"):
        stored_outer(context, outer)


@pytest.mark.slow
def test_columns_of_a_trellis_share_what_rules_leave(model, text_files, tmp_path):
    config = recipe_config(model, text_files)
    config.method, config.trellis.window_bits, config.trellis.recode_passes = "trellis", 6, 0
    config.vq.group_size, config.calibration.gradient_groups = 0, 1
    config.recipe = (
        ("layers_0/mlp/.*", "int8"),
        (".*/q_proj", {"bits": 4}),
        (".*/k_proj", {"outlier_limit": "0"}),
        ("layers_1/self_attn/o_proj", {"method": "aqlm", "code_bits": 4, "rounds": 1}),
    )
    config.allocation.bits_per_value = 5.0
    job.quantize(config, str(tmp_path / "run"))
    packed = PackedCheckpoint(tmp_path / "run/checkpoint")
    assert 4.8 < packed.manifest["bits_per_value"] <= 5.0
    bits = {name: meta["bits_per_value"] for name, meta in packed.manifest["layers"].items()}
    assert all(bits[f"layers_0/mlp/{name}_proj"] > 8 for name in ("gate", "up", "down"))
    assert all(bits[f"layers_{i}/self_attn/q_proj"] <= 4 for i in range(2))
    run = SimpleNamespace(packed=packed)
    assert isinstance(kernel(run, 0, "self_attn/o_proj"), TrellisTensor)
    assert kernel(run, 1, "self_attn/o_proj").codes.shape[0] == 2  # codebooks
    assert all(kernel(run, i, "self_attn/k_proj").outlier_gaps is None
               for i in range(2))  # fmt: skip


@pytest.mark.slow
def test_a_recipe_on_the_command_line(model_dir, text_files, tmp_path):
    """The model is tied: its embedding and head are one tensor, in codes."""
    config = config_file(tmp_path / "tiny.py", model_dir, text_files, "config.vq.bits = 2.0")
    recipe = "(('embed_tokens',{'bits':2.5}),('layers_0/.*','int8'),('.*/down_proj','dense'))"
    root = Path(__file__).parents[2]
    words = [f"--config={config}", f"--config.recipe={recipe}", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, str(root / "scripts/quantize.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1. embed_tokens: bits=2.5 (embed_tokens; " in done.stdout
    assert "2. layers_0/.*: int8 (7 layers; " in done.stdout
    assert "3. .*/down_proj: dense (2 layers; 16.0000 bits per value)" in done.stdout
    packed = PackedCheckpoint(tmp_path / "run/checkpoint")
    assert packed.packed_outer()["embed_tokens"]["embedding"].index_bits == 5
    prompts = [[5, 9, 11], [7, 3, 2, 8]]
    own, other = (
        generate(packed.config, params, prompts, max_tokens=8).tokens
        for params in (packed_params(packed), dense_params(packed))
    )
    assert own == other
    words[1] = "--config.recipe=(('down_proj','int8'),)"
    done = subprocess.run([*command[:2], *words], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "error: config.recipe: rule 1 ('down_proj') has no layer" in done.stderr


@pytest.mark.parametrize("name, router", [("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")])
def test_a_rule_for_a_router_is_refused_as_one(name, router):
    config = default_config()
    config.recipe = ((f".*/{router}/gate", "int8"),)
    message = "rule 1 .* has no layer: it is of a router, and routers stay as they are"
    with pytest.raises(ValueError, match=message):
        check_formats(from_config(config), ModelConfig.from_hf(hf_config(name)))
