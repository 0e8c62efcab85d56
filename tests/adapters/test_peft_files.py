"""PEFT's files: what is written is read again, and what cannot be used is refused by name."""

import dataclasses
import json
import logging
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_adapter import random_adapter
from tiny_checkpoint import MODEL

from gptvq_jax.adapters.peft_config import FILE, read_config
from gptvq_jax.adapters.peft_files import WEIGHTS, open_adapter, read_adapter, write_adapter

PHI3 = dataclasses.replace(MODEL, model_type="phi3")


def written(directory, config=MODEL, **options):
    targets = options.pop("targets", ("q_proj", "v_proj", "down_proj"))
    adapter = random_adapter(config, targets)
    write_adapter(directory, config, adapter, alpha=6.0, **options)
    return adapter


def change(directory, **fields):
    path = directory / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(directory, edit):
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    "config, targets",
    [
        (MODEL, ("q_proj", "v_proj", "down_proj")),
        (PHI3, ("qkv_proj", "gate_proj", "down_proj")),  # gate_proj is a part of gate_up_proj
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_written_is_read_again(config, targets, rslora, tmp_path):
    scale = 6 / (np.sqrt(3) if rslora else 3)
    adapter = random_adapter(config, targets, scale=scale)
    write_adapter(tmp_path, config, adapter, alpha=6.0, rslora=rslora, dropout=0.1)
    again = read_adapter(tmp_path, config)
    assert again.base_name == "tiny"
    for name, layer in adapter.layers.items():
        found = again.layers[name]
        assert found.scale == pytest.approx(scale)
        np.testing.assert_allclose(found.b @ found.a, layer.b @ layer.a, atol=1e-6)
    for name, layer in again.layers.items():  # up_proj, which shares a weight with gate_proj
        assert name in adapter.layers or not layer.b.any()


def test_names_and_fields_are_those_of_peft(tmp_path):
    written(tmp_path, dropout=0.1)
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 2 * 3 * 2
    assert tensors[KEY.format("A")].shape == (3, 36) and tensors[KEY.format("B")].shape == (32, 3)
    fields = json.loads((tmp_path / FILE).read_text())
    assert fields["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (3, 6.0, 0.1)
    assert (fields["peft_type"], fields["task_type"]) == ("LORA", "CAUSAL_LM")
    assert fields["base_model_name_or_path"] == "tiny" and fields["rank_pattern"] == {}


def test_layers_of_some_blocks_are_named_in_full(tmp_path):
    adapter = random_adapter(MODEL)
    layers = {n: layer for n, layer in adapter.layers.items() if n != "layers_0/mlp/down_proj"}
    adapter = dataclasses.replace(adapter, layers=layers)
    write_adapter(tmp_path, MODEL, adapter, alpha=6.0)
    targets = json.loads((tmp_path / FILE).read_text())["target_modules"]
    assert targets == ["q_proj", "v_proj", "model.layers.1.mlp.down_proj"]
    assert read_adapter(tmp_path, MODEL).layers.keys() == layers.keys()


def test_patterns_give_layers_their_own_rank_and_alpha(tmp_path):
    written(tmp_path)
    change(
        tmp_path,
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.1\..*q_proj": 9, "model.layers.0.mlp.down_proj": 1},
    )

    def two(tensors):
        for key in [key for key in tensors if "down_proj" in key]:
            rows = tensors[key][:2] if "lora_A" in key else tensors[key][:, :2]
            tensors[key] = np.ascontiguousarray(rows)

    change_tensors(tmp_path, two)
    layers = read_adapter(tmp_path, MODEL).layers
    scales = {name: layer.scale for name, layer in layers.items()}
    assert scales["layers_0/self_attn/q_proj"] == scales["layers_1/self_attn/v_proj"] == 2
    assert scales["layers_1/self_attn/q_proj"] == 3
    assert scales["layers_0/mlp/down_proj"] == 0.5 and scales["layers_1/mlp/down_proj"] == 3
    assert len(layers["layers_1/mlp/down_proj"].a) == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; only 'LORA' is"),
        ({"bias": "all"}, "bias='all' is not supported; only 'none' is"),
        ({"use_dora": True}, r"use_dora is not supported \(DoRA\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"target_parameters": ["a"]}, "target_parameters is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not"),
        ({"r": 0}, f"{FILE}: r must be a positive integer, got 0"),
        ({"r": None}, "lacks the field 'r'"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number from 0 to 1e[+]09, got 'x'"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be a positive integer"),
        ({"use_rslora": 3}, "use_rslora must be true or false"),
        ({"r": 4}, r"has A \(3, 52\) and B \(36, 3\), but rank 4 and a layer of 36 x 52 need"),
    ],
)
def test_fields_that_are_refused(fields, message, tmp_path):
    written(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises((ValueError, NotImplementedError), match=message) as caught:
        read_adapter(tmp_path, MODEL)
    assert "\n" not in str(caught.value)


def rename(key, new):
    return lambda tensors: tensors.update({new: tensors.pop(key)})


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda tensors: tensors.pop(KEY.format("B")),
            "has lora_A of .*1.self_attn.q_proj without",
        ),
        (lambda tensors: tensors.clear(), "holds no adapter"),
        (lambda t: t.update({KEY.format("A"): np.full((3, 36), np.nan, "f4")}), "NaN or Inf"),
        (lambda t: t.update({KEY.format("A"): np.ones((3, 36), "i4")}), "is I32 of shape"),
        (lambda t: t.update({KEY.format("A"): np.ones((3, 40), "f4")}), r"A \(3, 40\) .* use the"),
        (
            rename(KEY.format("A"), "base_model.model.lm_head.lora_A.weight"),
            r"an adapter of lm_head, but the linear layers .* are model.layers.N.self_attn.q_proj,",
        ),
        (
            rename(KEY.format("A"), KEY.format("A").replace("layers.1", "layers.2")),
            "has an adapter of model.layers.2.self_attn.q_proj, but",
        ),
        (
            rename(KEY.format("A"), "base_model.model.x.lora_magnitude_vector"),
            "which is not A or B",
        ),
    ],
)
def test_tensors_that_are_refused(edit, message, tmp_path):
    written(tmp_path)
    change_tensors(tmp_path, edit)
    with pytest.raises((ValueError, NotImplementedError), match=message) as caught:
        read_adapter(tmp_path, MODEL)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter directory .*/none; check the path"):
        read_adapter(tmp_path / "none", MODEL)
    with pytest.raises(FileNotFoundError, match=f"{FILE} is missing: .* not the directory of an"):
        read_adapter(tmp_path, MODEL)
    written(tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(weights[:-5])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        read_adapter(tmp_path, MODEL)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        read_adapter(tmp_path, MODEL)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(
        ValueError, match="as a PyTorch pickle, adapter_model.bin; save the adapter"
    ):
        read_adapter(tmp_path, MODEL)
    (tmp_path / FILE).write_text('{"r": 3,')
    with pytest.raises(ValueError, match=f"{FILE} is not valid JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "base, warns", [("tiny", False), ("hub/Tiny", False), (None, False), ("other", True)]
)
def test_another_base_is_told(base, warns, tmp_path, caplog):
    written(tmp_path)
    change(tmp_path, base_model_name_or_path=base)
    source = types.SimpleNamespace(
        config=MODEL, name="checkpoint", manifest={"source": {"name": "tiny"}}
    )
    with caplog.at_level(logging.WARNING):
        open_adapter(tmp_path, source)
    said = "made for the base 'other', and this model is called checkpoint or tiny" in caplog.text
    assert said == warns
