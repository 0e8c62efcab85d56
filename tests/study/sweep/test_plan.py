"""What a sweep will take: by arithmetic, and by cells that are finished."""

import ast
import dataclasses
import shlex

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import hf_config
from tiny_sweeps import in_step, run

from gptvq_jax.config import from_config, to_dict
from gptvq_jax.core.trellis_tensor import table_values
from gptvq_jax.methods.trellis import TrellisSettings
from gptvq_jax.models import flops
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.open import open_source
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.moves import viterbi
from gptvq_jax.run.work import OF_A_STEP, search_steps
from gptvq_jax.study.sweep import start
from gptvq_jax.study.sweep.axes import axis, sweep
from gptvq_jax.study.sweep.cells import resolve
from gptvq_jax.study.sweep.commands import command
from gptvq_jax.study.sweep.estimate import cell_bytes, cell_flop, pass_flop, seconds
from gptvq_jax.study.sweep.layers import Layers
from gptvq_jax.study.sweep.models import Models
from gptvq_jax.study.sweep.passes import FLOAT, GRADIENTS, MOMENTS, Pass, pass_bytes


def test_the_plan_goes_by_finished_cells(base, tmp_path, capsys, monkeypatch):
    config = in_step(base)
    # Of a slow machine, or the expected seconds are over before they are shown.
    monkeypatch.setattr(start, "matmul_rate", lambda: 1e6)
    run(config, tmp_path, cells="asymmetry0$")
    assert "[00:00, ETA at least " in capsys.readouterr().err  # before the cell
    start.plan(config, "tiny.py", (), str(tmp_path))
    out, errors = capsys.readouterr()
    assert "2 cells, 1 finished" in out and "as 1 finished cells took" in out
    assert "measuring" not in errors


def test_seconds_go_by_finished_cells_where_there_are_some():
    flop = {"a": 1e12, "b": 3e12}
    assert seconds(flop, ["a", "b"], 2e12, {}, lambda: 1e12).value == 6.0
    known = seconds(flop, ["b"], 0.0, {"a": {"seconds": 10.0}}, None)
    assert known.value == pytest.approx(30.0) and known.basis == "as 1 finished cells took"


def test_a_plan_of_blocks_with_and_without_experts(base):
    """Work is that of the experts of a token, room that of all of them."""
    base.method, base.vq.group_size = "gptvq", 0
    base.calibration.asymmetry, base.allocation.bits_per_value = 0.0, 2.5
    settings = from_config(base)
    few, many = (
        ModelConfig.from_hf(hf_config("qwen3_moe", num_experts=count)) for count in (5, 40)
    )
    for kind in (FLOAT, GRADIENTS, MOMENTS):
        of = Pass(kind, {}, settings, points=3)
        assert 0 < pass_flop(few, of) < pass_flop(many, of)
    assert flops.blocks_forward(many, 1, 64) < 1.3 * flops.blocks_forward(few, 1, 64)
    assert 0 < cell_flop(few, settings) < cell_flop(many, settings)
    sizes = [pass_bytes(Pass(MOMENTS, {}, settings), config) for config in (few, many)]
    experts = 2 * 2 * 35 * 4 * (48**2 + 32**2)  # fitted and held out, in two blocks
    assert sizes[1] - sizes[0] == experts
    assert cell_bytes(few, settings)[0] < cell_bytes(many, settings)[0]


def test_a_budget_for_columns_is_planned_with(base):
    """It has no candidates to choose from."""
    base.method, base.calibration.gradient_groups = "trellis", 1
    base.allocation.bits_per_value = 2.5
    settings = from_config(base)
    config = open_source(base.model).config
    alone = dataclasses.replace(
        settings,
        allocation=dataclasses.replace(settings.allocation, bits_per_value=0.0),
        trellis=dataclasses.replace(settings.trellis, bits=2.5),
    )
    assert cell_flop(config, settings) == cell_flop(config, alone) > 0
    assert cell_bytes(config, settings)[0] == cell_bytes(config, alone)[0] > 0


@pytest.mark.parametrize("bits, rate, rows", [(4, 1, 64), (6, 2, 300), (8, 3, 1000)])
def test_steps_of_a_search_are_counted(bits, rate, rows, monkeypatch):
    """In each search that is made for a column, and once in every pass that knows the cut."""
    settings = TrellisSettings(bits=rate, window_bits=bits, stream_rows=100, recode_passes=0)
    streams, made = (-1, settings.rows_of_stream(rows)), []
    search = viterbi.viterbi

    def counting(target, weight, table, *args):
        made.append(target.size * len(table))
        return search(target, weight, table, *args)

    monkeypatch.setattr(viterbi, "viterbi", counting)
    column = np.random.default_rng(0).normal(size=-(-rows // streams[1]) * streams[1])
    column = jnp.asarray(column.reshape(streams), jnp.float32)
    viterbi.tail_biting(column, jnp.ones_like(column), table_values(bits, None), rate)
    assert search_steps(settings, rows, 1) == sum(made)
    again = dataclasses.replace(settings, recode_passes=2)
    assert search_steps(again, rows, 5) == 5 * (sum(made) + 2 * column.size * 2**bits)


def test_a_plan_counts_searches(tiny_config, tmp_path):
    """A longer window doubles them with each bit, and the matrix products stay."""
    tiny_config.method = "trellis"
    axes = [axis("trellis.window_bits", (8, 9))]
    for kind, maker in (("layers", Layers), ("models", Models)):
        made = maker(resolve(sweep("s", tiny_config, axes, kind=kind)), tmp_path)
        cells = made.sweep.cells
        short, long = (made.cell_flop(cell) for cell in cells)
        shapes = layer_shapes(open_source(tiny_config.model).config)
        shapes = made._shapes(cells[0]) if kind == "layers" else 3 * [*shapes.values()]
        steps = [sum(search_steps(c.settings.trellis, *shape) for shape in shapes) for c in cells]
        assert 1.9 < steps[1] / steps[0] < 2.2
        assert long - short == pytest.approx(OF_A_STEP * (steps[1] - steps[0]))


def test_recipes_are_points_and_their_commands_say_them():
    recipe = ((".*/down_proj", {"bits": 4.0}), ("embed_tokens", "int8"))
    of_recipes = axis("recipe", [(), recipe], names=["none", "mixed"])
    config = sweep("recipes", "smollm2_135m_2d:3b", [of_recipes])
    cells = resolve(config).cells
    assert [to_dict(cell.settings)["recipe"] for cell in cells] == [(), recipe]
    plain, mixed = (command(resolve(config), cell, "recipes.py") for cell in cells)
    (flag,) = (word for word in shlex.split(mixed) if word.startswith("--config.recipe="))
    assert ast.literal_eval(flag.partition("=")[2]) == recipe and "recipe=" not in plain


@pytest.mark.parametrize(
    "recipes, names",
    [
        ([(), ((".*/k_proj", {"bits": 4.0}),)], ["recipe-none", "recipe-k_proj-bits4"]),
        (
            [((".*", "dense"),), (("layers_(0|29)/.*", {"method": "rtn", "bits": 8}),)],
            ["recipe-all-dense", "recipe-layers_-0-29-rtn-bits8"],
        ),
        ([((".*k_proj", "int8"),), (("k_proj.*", "int8"),)], ["recipe1", "recipe2"]),
        ([tuple((f"layers_{i}/.*", "int8") for i in range(9)), ()], ["recipe1", "recipe2"]),
    ],
)
def test_points_of_recipes_have_names_that_can_be_read(recipes, names):
    assert [point.name for point in axis("recipe", recipes).points] == names


def test_layers_by_themselves_have_no_recipe(base):
    base.recipe = (("embed_tokens", "int8"),)
    with pytest.raises(ValueError, match=r"recipe of a sweep of layers must be \(\)"):
        resolve(sweep("layers", base, [axis("vq.dim", (1, 2))], kind="layers"))
