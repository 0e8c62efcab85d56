"""Rules of a recipe: which layer has which, by names alone, and bad ones."""

import dataclasses
import itertools

import pytest

from gptvq_jax.config import RunSettings, default_config, from_config, to_dict
from gptvq_jax.methods.uniform import UniformSettings
from gptvq_jax.recipe import check_used, parse, plain, rule_text
from gptvq_jax.rule_settings import choices, format_of, is_open, methods_of
from gptvq_jax.rules import check_all_used, rule_of
from gptvq_jax.run.overrides import ignored, settle

LAYERS = ("self_attn/q_proj", "mlp/down_proj")
NAMES = [f"layers_{i}/{name}" for i in range(12) for name in LAYERS] + ["embed_tokens", "lm_head"]
RECIPE = (
    (r"layers_(0|11)/.*", "int8"),
    (".*/down_proj", {"bits": 4.0, "dim": 1}),
    (r"layers_1/.*", {"method": "aqlm", "code_bits": 6}),
    ("lm_head", "dense"),
)


def settings(recipe=RECIPE, **fields):
    config = default_config()
    config.recipe = recipe
    config.update_from_flattened_dict(fields)
    return from_config(config)


def budgeted(recipe, **fields):
    given = {"allocation.bits_per_value": 3.0, "allocation.dims": (1, 2)}
    return settings(recipe, **{**given, "allocation.bits": (2.0, 2.5, 3.0), **fields})


def test_the_first_rule_that_matches_the_whole_name_has_the_layer():
    of, rules = settings(), settings().recipe
    taken = {name: rule_of(rules, name) for name in NAMES}
    assert {n for n in NAMES if taken[n] == rules[0]} == {
        f"layers_{i}/{name}" for i, name in itertools.product((0, 11), LAYERS)
    }
    assert {n for n in NAMES if taken[n] == rules[1]} == {
        f"layers_{i}/mlp/down_proj" for i in range(1, 11)
    }
    assert [n for n in NAMES if taken[n] == rules[2]] == ["layers_1/self_attn/q_proj"]
    assert taken["lm_head"] == rules[3] and taken["embed_tokens"] is None
    assert taken["layers_10/self_attn/q_proj"] is None  # which layers_1/ does not match

    assert format_of(of, "layers_0/mlp/down_proj").settings == UniformSettings(8, 0, True)
    own = format_of(of, "layers_5/mlp/down_proj")
    assert own.method == "gptvq" and own.rule == rules[1]
    assert own.settings == dataclasses.replace(of.vq, bits=4.0, dim=1)
    aqlm = format_of(of, "layers_1/self_attn/q_proj")
    assert (aqlm.method, aqlm.settings) == ("aqlm", dataclasses.replace(of.aqlm, code_bits=6))
    free = format_of(of, "layers_5/self_attn/q_proj")
    assert (free.method, free.settings, free.rule) == ("gptvq", of.vq, None)
    assert format_of(of, "lm_head").coder == ""
    assert methods_of(of) == ["gptvq", "aqlm"]


def test_experts_have_names_too():
    rules = parse(((r"layers_\d+/block_sparse_moe/experts_\d+/w2", "int8"),))
    assert rule_of(rules, "layers_3/block_sparse_moe/experts_1/w2") == rules[0]
    assert rule_of(rules, "layers_3/block_sparse_moe/experts_1/w1") is None


def test_it_survives_a_config_and_json():
    of = settings()
    assert plain(of.recipe) == RECIPE == to_dict(of)["recipe"]
    as_lists = [["lm_head", "dense"], [".*/down_proj", {"bits": 4}]]
    assert [rule.pattern for rule in parse(as_lists)] == ["lm_head", ".*/down_proj"]
    assert settings(as_lists) == settings((tuple(as_lists[0]), tuple(as_lists[1])))
    assert rule_text(of.recipe, of.recipe[1]) == "2. .*/down_proj: bits=4.0, dim=1"
    assert rule_text(of.recipe, of.recipe[2]) == "3. layers_1/.*: aqlm, code_bits=6"
    assert settings(()).recipe == () and from_config(default_config()) == RunSettings()


def test_a_budget_chooses_what_a_rule_leaves_open():
    recipe = ((".*/q_proj", {"dim": 1}), (".*/down_proj", {"beam": 2}), (".*/o_proj", {"bits": 2}))
    of = budgeted(recipe)
    q, down, o = of.recipe
    assert [(c.dim, c.bits) for c in choices(of, q)] == [(1, 2.0), (1, 3.0)]
    # 2.5 bits make no code of whole bits with single weights.
    assert [(c.dim, c.bits) for c in choices(of, down)] == [
        (1, 2.0),
        (1, 3.0),
        (2, 2.0),
        (2, 2.5),
        (2, 3.0),
    ]
    assert {c.beam for c in choices(of, down)} == {2}
    assert [(c.dim, c.bits) for c in choices(of, o)] == [(1, 2.0), (2, 2.0)]
    assert all(is_open(of, rule) for rule in (q, down, o, None))
    assert choices(of, None) == of.candidates


@pytest.mark.parametrize(
    "overrides", ["int8", "dense", "aqlm", {"dim": 2, "bits": 4.0}, {"method": "rtn", "bits": 4}]
)
def test_a_rule_that_says_the_bits_leaves_a_budget_nothing(overrides):
    of = budgeted(((".*/down_proj", overrides),))
    assert not is_open(of, of.recipe[0])
    if overrides == {"dim": 2, "bits": 4.0}:
        found = format_of(of, "layers_0/mlp/down_proj").settings
        assert found == dataclasses.replace(of.vq, dim=2, bits=4.0)


def test_a_head_is_not_in_the_budget():
    of = budgeted(((".*", {"beam": 2}),))
    assert format_of(of, "lm_head").settings == dataclasses.replace(of.vq, beam=2)
    assert format_of(of, "layers_0/mlp/down_proj").settings in choices(of, of.recipe[0])


def test_a_budget_for_columns_leaves_a_layer_its_own_settings():
    recipe = ((".*/q_proj", {"outlier_limit": "0"}), (".*/down_proj", {"bits": 4}))
    of = settings(recipe, method="trellis", **{"allocation.bits_per_value": 3.0})
    assert is_open(of, of.recipe[0]) and not is_open(of, of.recipe[1])
    assert format_of(of, "layers_0/self_attn/q_proj").settings.outlier_limit == "0"
    assert format_of(of, "layers_0/mlp/down_proj").settings.bits == 4.0


@pytest.mark.parametrize(
    "recipe, message",
    [
        (("lm_head", "int8"), "rule 1 is 'lm_head' and must be a pair .* comma behind a single"),
        ((("lm_head",),), "rule 1 is .* must be a pair"),
        ((("lm_head", 8),), r"rule 1 \('lm_head'\) sets 8; name a method, dense, int8, gptvq"),
        ((("lm_head", {}),), "sets {}; name a method"),
        ((("(lm_head", "int8"),), r"pattern '\(lm_head' of rule 1 is no regular expression: miss"),
        (((".*", "int4"),), r"rule 1 \('\.\*'\): method='int4' must be one of dense, int8, gptvq"),
        (((".*", {"bit": 3}),), "'bit' is neither 'method' nor a field of vq.*mean 'bits'"),
        (
            ((".*", {"method": "aqlm", "bits": 3}),),
            "'bits' is neither 'method' nor a field of aqlm",
        ),
        (((".*", {"bits": "3"}),), "bits='3' must be of type float, not str"),
        (((".*", {"bits": 1e999}),), "bits=inf must be finite"),
        (((".*", {"dim": 2.0}),), "dim=2.0 must be of type int, not float"),
        (((".*", {"bits": 2.3}),), r"rule 1 \('\.\*'\): vq.bits=2.3 must be such that"),
        (((".*", {"method": "int8", "bits": 8}),), "'int8' takes no bits; leave it out"),
    ],
)
def test_a_bad_rule_is_refused_in_a_line_that_names_it(recipe, message):
    with pytest.raises(ValueError, match=message) as error:
        settings(recipe)
    assert "\n" not in str(error.value)


def test_a_recipe_is_a_tuple():
    with pytest.raises(
        ValueError, match=r"recipe='lm_head' must be a tuple of rules, as in \(\('lm"
    ):
        parse("lm_head")


@pytest.mark.parametrize(
    "recipe, fields, message",
    [
        (((".*", {"dim": 4}),), {"allocation.bits": (3.5,)}, "no pair of allocation.dims"),
        (((".*", {"group_size": 4096}),), {}, "group_size must be 0 where a budget chooses"),
        (((".*", {"window_bits": 8}),), {"method": "trellis"}, "window_bits is the same .* bits"),
    ],
)
def test_what_a_budget_does_not_allow_is_refused(recipe, fields, message):
    with pytest.raises(ValueError, match=message):
        budgeted(recipe, **fields)


@pytest.mark.parametrize("method, given", [("trellis", {}), ("gptvq", {"scale_block_size": 16})])
def test_rules_keep_to_what_row_groups_allow(method, given):
    with pytest.raises(ValueError, match="gradient_groups=2 must be 0 or 1 with"):
        settings(((".*", {"method": method, **given}),), **{"calibration.gradient_groups": 2})


@pytest.mark.parametrize(
    "recipe, message",
    [
        (((".*", "int8"), ("lm_head", "dense")), "rule 2 .* rule 1 takes lm_head first; move it"),
        ((("down_proj", "int8"),), "has no layer: a pattern is to match a whole name, such as "
         "'layers_0/mlp/down_proj', .* and 8 more; mend it"),
        (((".*", {"bits": 4}),) * 2, "rule 2 .* rule 1 takes layers_0/self_attn/q_proj first"),
        ((("layers_99/.*", "int8"),), "rule 1 .'layers_99/.*'. has no layer"),
    ],
)  # fmt: skip
def test_a_rule_without_a_layer_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        check_used(parse(recipe), NAMES)


def test_a_rule_for_a_router_says_that_routers_stay():
    with pytest.raises(
        ValueError, match="rule 1 .* has no layer: it is of a router, and routers stay as they"
    ):
        check_used(parse(((".*/gate", "int8"),)), NAMES, ["layers_1/mlp/gate"])


def test_a_recipe_that_is_no_literal_says_so():
    with pytest.raises(ValueError, match="cannot be read: something in it is no literal"):
        parse(("(('.*', {'bits': float('inf')}),)",))


def test_a_rule_for_a_tied_head_names_the_embedding():
    with pytest.raises(ValueError, match="head of this model is its embedding; name 'embed_tok"):
        check_used(parse((("lm_head", "int8"),)), NAMES[:-1])


def test_a_rule_for_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"^rules: rule 1 .'a'. has no layer: the model has none"):
        check_all_used("rules", parse((("a", "int8"),)), [], {"b": "it is no layer"})


# --- beside the command line ---


def given(recipe, *names, **fields):
    config = default_config()
    config.recipe = recipe
    config.update_from_flattened_dict(fields)
    return settle(config, names)


def test_a_field_of_a_rule_without_effect_is_refused():
    with pytest.raises(ValueError, match=r"beam of rule 1 \('\.\*'\) has no effect with vq.polish"):
        given(((".*", {"beam": 2, "polish_rounds": 0}),))
    given(((".*", {"beam": 2}),))
    given(((".*", {"method": "aqlm", "beam": 2}),), **{"vq.polish_rounds": 1})
    with pytest.raises(ValueError, match="tolerance of rule 1 .* has no effect with aqlm.rounds=1"):
        given(((".*", {"method": "aqlm", "rounds": 1, "tolerance": 0.1}),))


def test_fields_of_a_method_that_a_rule_names_count():
    aqlm = ((".*/down_proj", "aqlm"),)
    given(aqlm, "aqlm.rounds", **{"aqlm.rounds": 3})
    with pytest.raises(ValueError, match="aqlm.rounds has no effect with method 'gptvq'"):
        given((), "aqlm.rounds", **{"aqlm.rounds": 3})
    # Under a budget as well: what a rule says is not the budget's.
    budget = {"allocation.bits_per_value": 3.0}
    trellis = settings(((".*/down_proj", "trellis"),), **budget)
    assert "trellis.bits" not in ignored(trellis) and "trellis.bits" in ignored(settings(()))
    columns = settings(((".*/down_proj", "gptvq"),), method="trellis", **budget)
    assert "vq.bits" not in ignored(columns) and "trellis.bits" in ignored(columns)
    drawn = settings(((".*/down_proj", "gptvq"),), method="trellis")
    assert "seed" not in ignored(drawn) and "seed" in ignored(settings((), method="trellis"))
