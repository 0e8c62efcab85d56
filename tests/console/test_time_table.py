"""The table of one run, and of two, by code of any age."""

import json
from pathlib import Path

import pytest
from documented import parsed

from gptvq_jax.console import processor, time_table
from gptvq_jax.console.processor import processor_name
from gptvq_jax.console.stopwatch import FIELDS


def stage(*values):
    return dict(zip(FIELDS, values, strict=True))


LAYERS = [
    {"kind": "layer", "block": 0, "layer": "mlp/up_proj", "seconds": 20.0},
    {"kind": "block", "block": 0, "seconds": 7.0},
    {"kind": "layer", "block": 1, "layer": "self_attn/q_proj", "seconds": 3.0},
    {"kind": "layer", "block": 1, "layer": "mlp/up_proj", "seconds": 10.5},
]
NEW = {
    "kind": "summary",
    "seconds": 100.0,
    "compile_seconds": 12.0,
    "processor": "2 cores of A",
    "stages": {
        "hessians": stage(40.0, 60.0, 4.0, 6.0, 3e9, 0),
        "quantize": stage(50.0, 100.0, 8.0, 2.5, 0, 0),
        "tune": stage(0.0, 0.0, 0.0, 0.0, None, None),
        "elsewhere": stage(10.0, 2.0, 0.0, None, 1e6, 1e9),
    },
    "totals": stage(100.0, 162.0, 12.0, 8.5, 3.001e9, 1e9),
}
OLD = {
    "kind": "summary",
    "seconds": 250.0,
    "compile_seconds": 30.0,
    "stages": {"advance": 20.0, "hessians": 80.0, "quantize": 140.0},
}
HEAD = (
    "stage                 seconds  share    TFLOP  TFLOP/s  of rate  cores  compile  read GB"
    "  wrote GB"
)


def table(*runs, **options):
    return time_table.time_table(*runs, **options).splitlines()


def words(lines):
    """[(first word or two of a line, the columns behind it)]."""
    return [(line[:20].rstrip(), " ".join(line[20:].split())) for line in lines]


def test_a_run_and_the_rate_of_its_processor():
    lines = table([*LAYERS, NEW], rate=0.2e12, processor="2 cores of A")
    assert lines[0] == HEAD and max(map(len, lines)) <= 100
    assert words(lines[1:]) == [
        ("hessians", "40.0 40.0% 6 0.15 75.0% 1.50 4.0 3.00 0.00"),
        ("quantize", "50.0 50.0% 2.5 0.05 25.0% 2.00 8.0 0.00 0.00"),
        ("tune", "0.0 0.0% 0 - - - 0.0 - -"),
        ("elsewhere", "10.0 10.0% - - - 0.20 0.0 0.00 1.00"),
        ("  mlp/up_proj", "30.5 30.5% - - - - - - -"),
        ("  self_attn/q_proj", "3.0 3.0% - - - - - - -"),
        ("total", "100.0 100.0% 8.5 0.085 42.5% 1.62 12.0 3.00 1.00"),
    ]


@pytest.mark.parametrize(
    "resumed_at, up_proj", [(None, "30.5 30.5%"), (0, "30.5 30.5%"), (1, "10.5 10.5%"), (2, None)]
)
def test_layers_of_an_earlier_process_are_not_in_its_time(resumed_at, up_proj):
    lines = dict(words(table([*LAYERS, {**NEW, "resumed_at": resumed_at}])))
    expected = None if up_proj is None else f"{up_proj} - - - - - - -"
    assert lines.get("  mlp/up_proj") == expected


def test_columns_stand_under_their_names():
    for line in table([*LAYERS, NEW], [OLD], rate=1e12, processor="2 cores of A")[1:]:
        for end in (29, 36, 45, 54, 63, 70, 79, 88, 98):
            assert line[end - 1] != " " and HEAD[end - 1] != " "


@pytest.mark.parametrize("rate", [None, 0.2e12])
def test_no_part_of_the_rate_of_another_processor(rate):
    lines = words(table([NEW], rate=rate, processor="2 cores of B"))
    assert lines[1] == ("hessians", "40.0 40.0% 6 0.15 - 1.50 4.0 3.00 0.00")


NOTHING = "- - - - - - -"


def test_a_run_of_older_code_has_seconds():
    lines = words(table([*LAYERS, OLD], rate=1e12, processor="2 cores of A"))
    assert lines[1:5] == [
        ("advance", f"20.0 8.0% {NOTHING}"),
        ("hessians", f"80.0 32.0% {NOTHING}"),
        ("quantize", f"140.0 56.0% {NOTHING}"),
        ("elsewhere", f"10.0 4.0% {NOTHING}"),
    ]
    assert lines[-1] == ("total", "250.0 100.0% - - - - 30.0 - -")


def test_a_run_against_another():
    """Stages of either; those that only the other has come behind."""
    lines = words(table([*LAYERS, NEW], [LAYERS[0], OLD], rate=0.2e12, processor="2 cores of A"))
    assert lines[1:] == [
        ("hessians", "40.0 40.0% 6 0.15 75.0% 1.50 4.0 3.00 0.00"),
        ("  against", f"80.0 0.50x {NOTHING}"),
        ("quantize", "50.0 50.0% 2.5 0.05 25.0% 2.00 8.0 0.00 0.00"),
        ("  against", f"140.0 0.36x {NOTHING}"),
        ("tune", "0.0 0.0% 0 - - - 0.0 - -"),
        ("  against", f"- - {NOTHING}"),
        ("advance", f"- - {NOTHING}"),
        ("  against", f"20.0 - {NOTHING}"),
        ("elsewhere", "10.0 10.0% - - - 0.20 0.0 0.00 1.00"),
        ("  against", f"10.0 1.00x {NOTHING}"),
        ("  mlp/up_proj", f"30.5 30.5% {NOTHING}"),
        ("  against", f"20.0 1.52x {NOTHING}"),
        ("  self_attn/q_proj", f"3.0 3.0% {NOTHING}"),
        ("  against", f"- - {NOTHING}"),
        ("total", "100.0 100.0% 8.5 0.085 42.5% 1.62 12.0 3.00 1.00"),
        ("  against", "250.0 0.40x - - - - 30.0 - -"),
    ]


@pytest.mark.parametrize("flag", ["", " --against=old"])
def test_the_script_prints_runs_rate_and_table(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptvq_jax.study.matmul_rate.matmul_rate", lambda: 0.2e12)
    monkeypatch.setattr("gptvq_jax.console.processor.processor_name", lambda: "2 cores of A")
    for name, rows in {"new": [*LAYERS, NEW], "old": [LAYERS[0], OLD], "half": LAYERS}.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    with parsed(f"python scripts/benchmark_pipeline.py --workdir=new{flag}", monkeypatch) as script:
        script.main([])
        with pytest.raises(ValueError, match="half is not finished; run gptvq_jax quantize"):
            script.read_run(tmp_path / "half")
    lines = capsys.readouterr().out.splitlines()
    against = ["against old: on a processor that was not noted"] if flag else []
    assert lines[: lines.index("")] == [
        "new: on 2 cores of A",
        *against,
        "rate: 0.200 TFLOP/s in float32 matrix products, on 2 cores of A",
    ]
    runs = [[*LAYERS, NEW], [LAYERS[0], OLD]][: 2 if flag else 1]
    assert lines[lines.index("") + 1 :] == table(*runs, rate=0.2e12, processor="2 cores of A")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_fresh_run_has_the_name_of_its_config(monkeypatch, capsys):
    def quantize(config, workdir, given):
        text = "".join(json.dumps(row) + "\n" for row in [*LAYERS, NEW])
        (Path(workdir) / "metrics.jsonl").write_text(text)

    monkeypatch.setattr("gptvq_jax.run.job.quantize", quantize)
    monkeypatch.setattr("gptvq_jax.study.matmul_rate.matmul_rate", lambda: 0.2e12)
    command = "python scripts/benchmark_pipeline.py --config=configs/smollm2_135m_2d.py:smoke"
    with parsed(command, monkeypatch) as script:
        script.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "a fresh run of smollm2_135m_2d_smoke: on 2 cores of A"]


def test_the_processor_has_its_name_or_another(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "_CPU_INFO", info)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert processor_name().endswith(" of arm64")
    info.write_text("processor\t: 0\nmodel name\t: Fast CPU 9\nflags\t: avx\nmodel name\t: Other\n")
    assert processor_name().endswith(" of Fast CPU 9")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert processor_name().endswith("1 core of Fast CPU 9")
    device = type("Device", (), {"platform": "gpu", "device_kind": "Big GPU"})
    monkeypatch.setattr("jax.devices", lambda: [device])
    assert processor_name() == "Big GPU, 1 core of Fast CPU 9"
