"""config.json with anything in any field: the model opens, or one line names what is wrong."""

import copy
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models.test_hf_source import CONFIG, random_tensors, write_model
from numpy import isfinite

from gptvq_jax.exchange.aqlm_source import AQLMSource
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.models.open import open_source
from gptvq_jax.models.rope import inverse_frequencies
from gptvq_jax.serve.prompts import encode_prompts
from gptvq_jax.serve.stop_tokens import stop_tokens

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
FULL = CONFIG | {
    "head_dim": 4,
    "rope_theta": 10000.0,
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "layer_types": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "torch_dtype": "float32",
}
QUANTIZATION = {
    "quant_method": "aqlm",
    "num_codebooks": 2,
    "nbits_per_codebook": 8,
    "in_group_size": 4,
    "out_group_size": 1,
}
DEEP = json.loads("[" * 200 + "]" * 200)
EXACT = [None, True, False, 0, -1, 1, 2, 10**30, 1e400, -1e400, float("nan"), 0.0, 1e-320, 2.5]
OTHER = ["", "12", "silu", "mistral", [], {}, [1], [None], [True], {"a": 1}, {"factor": 2}, DEEP]
VALUES = st.one_of(
    st.sampled_from(EXACT + OTHER),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    ),
)
# A field, or one inside one of the objects; the value "absent" takes it away.
PATHS = [(name,) for name in FULL] + [
    (outer, inner) for outer in ("rope_scaling", "rope_parameters") for inner in ROPE
]
CHANGES = st.lists(
    st.tuples(st.sampled_from(PATHS), VALUES | st.just("absent")), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzzed")
    write_model(path, random_tensors(), config=FULL)
    open_source(str(path))  # imports, which are not of the time of one config
    return path


def changed(config, changes):
    """A copy of `config` with other values at some paths."""
    config = copy.deepcopy(config)
    for (*outer, name), value in changes:
        parent = config
        for key in outer:
            parent = parent[key] if isinstance(parent, dict) and key in parent else {}
        if isinstance(parent, dict):
            parent[name] = value
            if value == "absent":
                del parent[name]
    return config


def opens_or_says_why(directory, opened):
    """Whether opened() works; else its error must be of one line that names the directory."""
    start = time.monotonic()
    try:
        source = opened()
        source.outer()
        source.block(0)
        assert isfinite(inverse_frequencies(source.config)).all()
        works = True
    except (ValueError, NotImplementedError) as error:
        assert str(directory) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        works = False
    assert time.monotonic() - start < 5
    return works


def check(directory, config):
    (directory / "config.json").write_text(json.dumps(config))
    return opens_or_says_why(directory, lambda: open_source(str(directory)))


def fuzz(examples):
    return lambda test: given(changes=CHANGES)(
        settings(
            max_examples=examples,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )(test)
    )


@fuzz(50)
def test_a_config_opens_or_one_line_says_why(directory, changes):
    check(directory, changed(FULL, changes))


@pytest.mark.slow
@fuzz(500)
def test_500_configs_open_or_one_line_says_why(directory, changes):
    check(directory, changed(FULL, changes))


def test_every_field_with_every_kind_of_value(directory):
    assert check(directory, FULL)
    refused = 0
    for path in PATHS:
        for value in (*EXACT, *OTHER, "absent"):
            try:
                config = ModelConfig.from_hf(changed(FULL, [(path, value)]))
                assert isfinite(inverse_frequencies(config)).all()
            except (ValueError, NotImplementedError) as error:
                # Where sizes contradict each other, the line may be about the other one.
                assert "\n" not in str(error) and len(str(error)) < 300
                refused += 1
    assert refused > len(PATHS) * 5


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden_size", "12"),
        ("hidden_size", 12.0),
        ("num_attention_heads", 0),
        ("num_attention_heads", True),
        ("num_hidden_layers", 10**9),
        ("num_key_value_heads", []),
        ("rms_norm_eps", None),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", 1e400),
        ("tie_word_embeddings", "false"),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, "1"]),
        ("eos_token_id", {}),
        ("bos_token_id", 1.0),
        ("rope_scaling", "linear"),
        ("rope_scaling", [1]),
        ("rope_scaling", {**ROPE, "factor": "8"}),
        ("rope_scaling", {**ROPE, "rope_theta": [1e4]}),
        ("rope_scaling", {**ROPE, "rope_type": ["llama3"]}),
        ("model_type", ["llama"]),
        ("layer_types", [[]]),
    ],
)
def test_the_line_names_file_and_field(directory, name, value):
    (directory / "config.json").write_text(json.dumps({**FULL, name: value}))
    with pytest.raises((ValueError, NotImplementedError), match=rf"config\.json: .*{name}"):
        open_source(str(directory))


@pytest.mark.parametrize("text", ["[]", "1e400", '"llama"', "null", "", "{", "[" * 100_000, "\xff"])
def test_what_is_no_object_is_refused(directory, text):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (directory / "config.json").write_text(json.dumps(FULL))
        before = (directory / name).read_bytes() if (directory / name).exists() else None
        (directory / name).write_text(text, "latin-1")
        try:
            with pytest.raises(
                ValueError, match=rf"{name} (is not valid JSON|holds .* not a JSON)"
            ):
                open_source(str(directory)).tokenizer  # noqa: B018
        finally:
            if before is None:
                (directory / name).unlink()
            else:
                (directory / name).write_bytes(before)


@pytest.mark.parametrize("ids", ["2", [1, "2"], [[1]], {}, 1.5, True, [True]])
def test_generation_config_with_ids_of_other_types(directory, ids):
    path = directory / "generation_config.json"
    (directory / "config.json").write_text(json.dumps(FULL))
    path.write_text(json.dumps({"eos_token_id": ids}))
    try:
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a"):
            open_source(str(directory))
    finally:
        path.unlink()


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_a_weight_map_of_other_types(tmp_path, index):
    path = write_model(tmp_path, random_tensors(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        open_source(path)


def test_quantization_config_with_every_kind_of_value(directory):
    for name in QUANTIZATION:
        for value in (*EXACT, *OTHER):
            config = FULL | {"quantization_config": {**QUANTIZATION, name: value}}
            (directory / "config.json").write_text(json.dumps(config))
            # The tensors are those of a float model, so that sound fields open it, all dense.
            opens_or_says_why(directory, lambda: AQLMSource(HFDirectory(directory)))


SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "w0",
    "eos_token": "w1",
    "chat_template": "{{ messages[0].content }}",
    "additional_special_tokens": ["w2"],
    "added_tokens_decoder": {"1": {"content": "w1", "special": True}},
    "model_max_length": 64,
    "auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]},
}


@pytest.mark.parametrize("value", [5, True, [7], {"a": 1}, "x"], ids=repr)
def test_tokenizer_config_with_fields_of_other_types(tmp_path, value):
    path = write_model(tmp_path, random_tensors(), config=FULL)
    for name in SETTINGS:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, name: value}))
        try:
            source = open_source(path)
            assert set(stop_tokens(source)) >= {2, 3}
            encode_prompts(source.tokenizer, ["w3"], chat=bool(source.tokenizer.chat_template))
        except ValueError as error:
            assert "\n" not in str(error)
            assert str(tmp_path) in str(error) or "the model's" in str(error)
