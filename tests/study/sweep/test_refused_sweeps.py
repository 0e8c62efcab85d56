"""What cannot be is refused before anything runs, and the plan tells of it."""

import pytest
from tiny_sweeps import budgets, in_step, run, weighted

from gptvq_jax.study.sweep import start
from gptvq_jax.study.sweep.axes import axis, points, sweep


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: axis("vq.dimm", (1,)), r"axis 'dimm', .*config\.vq\.dimm is not a field; .*dim, "),
        (lambda: axis("vq.dim", ("two",)), r"config\.vq\.dim='two' must be of type int"),
        (lambda: axis("vq.dim", (1.5,)), r"config\.vq\.dim=1\.5 must be of type int"),
        (lambda: axis("vq", (1,)), r"config\.vq is a section; name one of its fields"),
        (lambda: axis("vq.dim.x", (1,)), r"config\.vq\.dim\.x is not a field"),
        (lambda: axis("vq.dim", ()), "axis 'dim' has no points"),
        (lambda: axis("vq.dim", (1, 1)), "two points of axis 'dim' are called 'dim1'"),
        (lambda: axis("vq.dim", (1, 2), names=("a",)), "2 values and 1 names"),
        (lambda: points("p", {"a/b": {"vq.dim": 1}}), "the name 'a/b' of a point"),
        (lambda: sweep("s", "nothing:2b", [axis("seed", (1,))]), "there is no config 'nothing'"),
        (lambda: sweep("s", "smollm2_135m_2d", []), "has no axes"),
        (
            lambda: sweep("s", "smollm2_135m_2d", [axis("seed", (1,)), axis("seed", (2,))]),
            "two axes of sweep 's' are called 'seed'",
        ),
        (
            lambda: sweep("s", "smollm2_135m_2d", [axis("seed", (1,))], cells={("x",): {}}),
            r"there is no cell \('x',\)",
        ),
    ],
)
def test_axes_that_cannot_be_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "change, given, message",
    [
        (
            {"axes": [axis("uniform.bits", (16,))]},
            (),
            "no cell of sweep .* can be; bits16: uniform",
        ),
        ({}, ("base.uniform.bits",), r"--config\.base\.uniform\.bits .* where 'bits' sets it"),
        ({}, ("name",), r"--config\.name is not to be set"),
        ({}, ("base.aqlm.beam",), r"--config\.base\.aqlm\.beam has no effect with method 'rtn'"),
        ({"axes": [axis("aqlm.beam", (1, 2))]}, (), "aqlm.beam of an axis has no effect with"),
        (
            {"axes": [axis("uniform.bits", (1, 2)), axis("uniform.bits", (1,), name="again")]},
            (),
            "axes 'bits' and 'again' both set uniform.bits",
        ),
        (
            {"axes": [axis("uniform.bits", (2, 3))], "fields": {"recipe": ((".*", {"bits": 4}),)}},
            (),
            "uniform.bits of an axis has no effect because rules of config.recipe say otherwise",
        ),
        (
            {
                "axes": [axis("calibration.asymmetry", (0.25,))],
                "fields": {"recipe": ((".*", {"bits": 4}),)},
            },
            ("base.uniform.bits",),
            r"--config\.base\.uniform\.bits has no effect because rules of config.recipe",
        ),
        (
            {"axes": [axis("uniform.bits", (16, 2, 3))], "fields": {"recipe": (("x", "int8"),)}},
            (),
            r"no cell of sweep .* can be; bits2: config\.recipe: rule 1 \('x'\) has no layer",
        ),
        (
            {"axes": [axis("uniform.bits", (16, 2, 3))], "fields": {"recipe": ((".*", "int9"),)}},
            (),
            r"no cell of sweep .* can be; bits2: config\.recipe: rule 1 \('\.\*'\): method='int9'",
        ),
        (
            {"kind": "layers", "axes": [axis("calibration.batch_size", (1, 2))]},
            (),
            "calibration.batch_size has no effect on layers by themselves",
        ),
    ],
)
def test_sweeps_that_cannot_be_are_refused_before_anything_runs(
    change, given, message, base, tmp_path
):
    config = sweep("s", base, change.pop("axes", [axis("uniform.bits", (2, 3))]), **change)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "sweep", *given)
    assert not (tmp_path / "sweep").exists()


def test_cells_that_cannot_be_are_told_and_the_others_are_planned(base, tmp_path, capsys):
    budgets(base)
    base.calibration.num_windows = 5
    config = sweep(
        "some",
        base,
        [axis("allocation.bits_per_value", (0.3, 1.4), "budget"), axis("vq.block_size", (0, 128))],
    )
    start.plan(config, "tiny.py", (), str(tmp_path / "sweep"))
    out, errors = capsys.readouterr()
    told = "working out the cells ...\nreading the models of 2 cells ...\nmeasuring the matrix"
    assert errors.startswith(told)
    assert "refused: budget0.3_block_size128: allocation.bits_per_value=0.3 cannot be met" in out
    assert "refused: budget1.4_block_size0: vq.block_size=0 must be at least 1" in out
    assert "sweep some: 1 cells, 0 finished" in out and "gradients-" in out
    assert "time  at least" in out and "GB of shared files" in out
    assert not (tmp_path / "sweep").exists()


def test_two_points_that_are_the_same_run_make_one(base, tmp_path, capsys):
    config = sweep(
        "same",
        base,
        [points("method", {"vq": {"method": "gptvq"}, "rtn": {}}), axis("uniform.bits", (2, 3))],
    )
    start.plan(config, "tiny.py", (), str(tmp_path))
    assert "refused: vq_bits3: it would be the same run as vq_bits2" in capsys.readouterr().out


def test_what_rules_settle_in_some_cells_makes_no_cells_of_its_own(base, tmp_path, capsys):
    recipes = [(), ((".*", {"bits": 4}),), ((".*/(down|up)_proj", "int8"), ("embed.*", "int8"))]
    config = sweep("rules", base, [axis("recipe", recipes), axis("uniform.bits", (2, 3))])
    start.plan(config, "tiny.py", (), str(tmp_path))
    out = capsys.readouterr().out
    twin = "recipe-all-bits4_bits"
    assert f"refused: {twin}3: it would be the same run as {twin}2\n" in out
    assert out.count("refused") == 1 and "5 cells" in out
    assert "recipe=1. .*: bits=4, uniform.bits=2" in out and "recipe=none, uniform.bits=2" in out
    assert "  recipe-down-up-_proj-int8+embed-int8_bits2 " in out


def test_a_plan_shows_the_recipe_of_its_base(base, tmp_path, capsys):
    base.recipe = ((".*/down_proj", {"bits": 4}),)
    start.plan(
        sweep("s", base, [axis("calibration.asymmetry", (0.25,))]), "tiny.py", (), str(tmp_path)
    )
    out = capsys.readouterr().out
    assert "recipe of cells that name none: 1. .*/down_proj: bits=4\n" in out


def test_one_sweep_has_a_directory(base, tmp_path):
    run(in_step(base), tmp_path / "sweep", cells="asymmetry0$")
    message = r"is the directory of another sweep: .*name: 'in_step' -> 'weighted'.*--workdir"
    with pytest.raises(ValueError, match=message) as caught:
        run(weighted(base), tmp_path / "sweep")
    assert "\n" not in str(caught.value)
    base.calibration.gradient_groups = 0
    changed = in_step(base)
    changed.base.damping = 0.5
    with pytest.raises(ValueError, match=r"base\.damping: 0\.01 -> 0\.5"):
        run(changed, tmp_path / "sweep", "base.damping")
    with pytest.raises(ValueError, match="holds .* and no sweep.json.*pass another --workdir"):
        run(in_step(base), tmp_path / "sweep/cells/asymmetry0")
    (tmp_path / "sweep/sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="sweep.json is not the record of a sweep"):
        run(in_step(base), tmp_path / "sweep")


def test_a_pattern_that_matches_nothing_names_the_cells(base, tmp_path):
    for pattern, message in (
        ("x", "--cells=x matches none .* bits2, bits3"),
        ("(", "no regular"),
    ):
        with pytest.raises(ValueError, match=message):
            run(weighted(base), tmp_path, cells=pattern)
