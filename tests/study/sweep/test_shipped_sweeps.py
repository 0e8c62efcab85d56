"""The sweeps that come with the package, and the command of each of their cells."""

from documented import REPOSITORY, parsed

from gptvq_jax.config import flat, from_config, to_dict
from gptvq_jax.console import cli
from gptvq_jax.console.config_file import load_config
from gptvq_jax.run.overrides import ignored, settle
from gptvq_jax.study.sweep.axes import axis, sweep
from gptvq_jax.study.sweep.cells import resolve
from gptvq_jax.study.sweep.commands import command


def test_a_budget_gives_way_to_an_axis_and_a_line_says_so():
    config = sweep("s", "smollm2_135m_2d:2b", [axis("vq.dim", (1, 2))])
    resolved = resolve(config)
    (note,) = resolved.notes
    assert note.startswith("allocation.bits_per_value=2.125 of the config file is off")
    assert note.endswith("all layers get what vq.dim says")
    budgets = {c.name: c.settings.allocation.bits_per_value for c in resolved.cells}
    assert budgets["dim1"] == 0


def test_the_command_of_a_cell_is_that_run(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for name in ("sweeps/smollm2_dimensionality", "sweeps/llama2_7b_table2"):
        resolved = resolve(load_config(name))
        for cell in resolved.cells:
            line = command(resolved, cell, name)
            with parsed(line, monkeypatch) as script:
                settings = from_config(settle(script._CONFIG.value, cli.given_fields())[0])
            reasons = ignored(cell.settings)
            ours, theirs = (
                {k: v for k, v in flat(to_dict(s)).items() if k not in reasons}
                for s in (cell.settings, settings)
            )
            assert ours == theirs, line


def test_cells_of_the_papers_table_are_the_shipped_configs():
    resolved = resolve(load_config("sweeps/llama2_7b_table2"))
    assert len(resolved.cells) == 10 and not resolved.refused
    for cell in resolved.cells:
        assert cell.settings == from_config(load_config(cell.source))
    config = load_config("sweeps/llama2_7b_table2")
    config.base.model = "/models/mine"
    for cell in resolve(config, ["base.model"]).cells:
        assert cell.settings.model == "/models/mine"
        line = command(resolved, cell, "sweeps/llama2_7b_table2", ["base.model"])
        assert f"--config=configs/{cell.source.replace(':', '.py:')} " in line
        assert "--config.model=/models/mine --workdir=runs/llama2_7b_table2_" in line


def test_a_cell_without_a_config_of_its_own_is_named_in_its_sweep(base):
    resolved = resolve(sweep("s", base, [axis("damping", (0.01, 0.02))]))
    line = command(resolved, resolved.cells[1], "mine.py:x", ["base.model"])
    expected = f"--config=mine.py:x --config.base.model={base.model} '--cells=^damping0\\.02$'"
    assert line == f"python scripts/sweep.py {expected}"
