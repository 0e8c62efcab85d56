"""Where the time of runs went."""

from collections.abc import Sequence
from typing import Any

from gptvq_jax.console.plot_style import style
from gptvq_jax.console.stopwatch import stages_of
from gptvq_jax.study.report.drawing import Figure
from gptvq_jax.study.report.results import Cell


def time_by_stage(cells: Sequence[Cell], notes: list[str]) -> list[Figure]:
    """Seconds of each stage; stages that overlap count both, so that they do not add up."""
    timed = [cell for cell in cells if cell.summary.get("stages")]
    if not timed:
        notes.append("no times of stages: time by stage is left out")
        return []
    seconds = {
        cell.name: {
            stage: row["seconds"]
            for stage, row in stages_of(cell.summary).items()
            if row["seconds"] is not None
        }
        for cell in timed
    }
    stages = list(dict.fromkeys(stage for row in seconds.values() for stage in row))

    def draw(axes: Any) -> None:
        for index, (name, row) in enumerate(seconds.items()):
            places = [stages.index(stage) for stage in row]
            if len(timed) == 1:
                axes.barh(places, row.values(), color=style(0)["color"], height=0.7)
            else:
                look = {**style(index), "linestyle": "none"}
                axes.plot(list(row.values()), places, label=name, **look)
        axes.set_yticks(range(len(stages)), stages)
        axes.invert_yaxis()
        axes.set(xlabel="seconds")
        axes.set_xlim(left=0)

    processors = sorted({str(cell.summary.get("processor", "")) for cell in timed} - {""})
    resumed = [cell.name for cell in timed if cell.summary.get("resumed_at") is not None]
    caption = "Stages that overlap count both." + (
        f" On {'; '.join(processors)}." * bool(processors)
    )
    if resumed:
        caption += (
            f" Stopped and resumed, so that the last part alone counts: {', '.join(resumed)}."
        )
    return [Figure("time_stages", "Time by stage", caption, draw, rows=len(stages))]
