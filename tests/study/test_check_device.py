"""The check of a device: that it finds what is wrong, and goes on after it; on a CPU."""

import json
import subprocess
import sys

import numpy as np
import pytest
from documented import REPOSITORY, parsed

from gptvq_jax.ops import vq_matmul, xla
from gptvq_jax.study import check_device, check_device_sections
from gptvq_jax.study.check_device_table import table

pytestmark = pytest.mark.usefixtures("short_programs")

DEVICE = dict.fromkeys(
    ("memory_gigabytes", "float32_tflops", "bfloat16_tflops", "copy_gigabytes"), 1.5
) | {"name": "chip", "platform": "tpu", "devices": 4, "jax": "0.10.2"}
SMOKE = {
    "perplexity_float": 14.5,
    "perplexity_quantized": 15.25,
    "bits_per_value": 3.1,
    "seconds": 70.0,
    "peak_memory_gigabytes": 1.5,
}


def found_by(**sections):
    """A runner of sections, which counts what it runs."""
    ran = []

    def run(name, seconds):
        ran.append((name, seconds))
        if isinstance(sections[name], Exception):
            raise sections[name]
        return sections[name]

    return run, ran


def test_a_section_that_fails_stops_no_other(tmp_path):
    output = tmp_path / "report.json"
    run, ran = found_by(device=DEVICE, kernels=ValueError("wrong\nand more"), smoke=SMOKE)
    names = check_device.chosen_sections(["smoke", "kernels"])
    report = check_device.check(names, 10.0, output, run, "1.2")
    assert [name for name, _ in ran] == ["device", "kernels", "smoke"]
    assert dict(ran)["kernels"] == pytest.approx(120) and sum(dict(ran).values()) <= 600
    assert json.loads(output.read_text()) == report
    assert report["sections"]["kernels"] == {"status": "failed", "reason": "wrong"}
    assert check_device.failed(report) == ["kernels"]
    lines = table(report).splitlines()
    assert lines[2] == "| device | 4 x chip, tpu, 1.5 GB, JAX 0.10.2 |"
    assert "| kernels | FAILED: wrong |" in lines
    assert "70 s, perplexity 14.50 -> 15.25 at 3.100 bits" in lines[-1]


@pytest.mark.parametrize("other", [{"name": "other chip"}, {"version": "1.3"}, {}])
def test_sections_of_an_earlier_report_stay_on_the_same_device(tmp_path, other):
    output = tmp_path / "report.json"
    run, _ = found_by(device=DEVICE, smoke=SMOKE, kernels=ValueError("wrong"))
    check_device.check(["device", "kernels", "smoke"], 10.0, output, run, "1.2")
    kernels = {"rows": [], "not_in_time": ["4d_2.25"]}
    name = {"name": other["name"]} if "name" in other else {}
    run, _ = found_by(device=DEVICE | name, kernels=kernels)
    version = other.get("version", "1.2")
    report = check_device.check(["device", "kernels"], 10.0, output, run, version)
    assert ("smoke" in report["sections"]) == (other == {})
    assert report["sections"]["kernels"]["found"] == kernels
    assert "| kernels not in time | 4d_2.25 |" in table(report)
    assert check_device.failed(report) == []


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--sections: 'kernel' is none of device, kernels, decode"):
        check_device.chosen_sections(["kernel"])
    output = tmp_path / "report.json"
    output.write_text("{}")
    with pytest.raises(ValueError, match="report.json is no report of this script; name another"):
        check_device.check(["device"], 1.0, output, lambda *_: {})
    for flags, message in (
        ("--alone=device --minutes=3", "--minutes has no effect on a section alone"),
        ("--seconds=3", "--seconds has no effect without --alone; give --minutes"),
        ("--alone=nothing", "--alone=nothing is none of device, kernels, decode, block_7b"),
    ):
        command = f"python scripts/check_device.py --output={output} {flags}"
        with parsed(command, monkeypatch) as script, pytest.raises(ValueError, match=message):
            script.main([])


def test_a_process_says_what_it_found_or_why_not(tmp_path):
    result = tmp_path / "found.json"

    def ran(program, seconds=30.0):
        result.unlink(missing_ok=True)
        return check_device.in_process([sys.executable, "-c", program], seconds, result)

    write = f"open({str(result)!r}, 'w').write"
    assert ran(f"{write}('{{\"rows\": 1}}')") == {"rows": 1}
    with pytest.raises(ValueError, match="^no memory$"):
        ran(f'{write}(\'{{"error": "no memory"}}\'); exit(1)')
    with pytest.raises(ValueError, match=r"ended with status -9 \(-9: out of memory\)"):
        ran("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ValueError, match="took longer than 0 s; give more with --minutes"):
        ran("import time; time.sleep(30)", 0.3)


def test_kernels_agree_with_float64_and_a_wrong_one_is_named(monkeypatch):
    names = ["2d_2.125", "trellis_2.0_l8"]
    both = {name: vq_matmul.IMPLEMENTATIONS[name] for name in ("reference", "xla")}
    monkeypatch.setattr(check_device_sections, "IMPLEMENTATIONS", both)
    found = check_device_sections.kernels(1e6, names)
    assert {row["name"] for row in found["rows"]} == set(names) and not found["not_in_time"]
    assert {row["implementation"] for row in found["rows"]} == set(both)
    assert all(0 < row["error"] < row["most"] for row in found["rows"])
    assert check_device_sections.kernels(0.0, names)["not_in_time"] == names
    right = xla.matmul
    monkeypatch.setattr(xla, "matmul", lambda x, packed: right(x, packed) * 1.001)
    monkeypatch.setattr(check_device_sections, "IMPLEMENTATIONS", {"xla": both["xla"]})
    with pytest.raises(ValueError, match=r"2 of 3 products are wrong: 2d_2.125 xla float32: 1"):
        check_device_sections.kernels(1e6, names[:1])


def test_a_block_by_move_and_its_shapes(monkeypatch):
    counts = check_device_sections.layer_counts("llama2_7b")
    assert counts == {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
    large = check_device_sections.layer_counts("llama2_70b")
    assert large == {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 2, (8192, 28672): 1}
    monkeypatch.setattr(check_device_sections, "layer_counts", lambda *_: {(64, 64): 3})
    found = check_device_sections.block(60.0, "llama2_7b", divisor=64)
    (row,) = found["layers"]
    assert 0 < row["relative_error"] < 1 and all(s >= 0 for s in row["seconds"].values())
    assert found["seconds"]["compilation"] == 3 * row["seconds"]["compilation"] > 0
    text = table({"sections": {"block_7b": {"status": "ok", "found": found}}})
    assert "a block of llama2_7b (widths divided by 64, for memory and time)" in text
    both = {(64, 64): 3, (64, 32): 1}
    monkeypatch.setattr(check_device_sections, "layer_counts", lambda *_: both)
    found = check_device_sections.block(1e-6, "llama2_7b", divisor=64)
    assert len(found["layers"]) == 1 and found["not_in_time"] == ["64 x 32"]
    text = table({"sections": {"block_7b": {"status": "ok", "found": found}}})
    assert "| layers of llama2_7b not in time | 64 x 32 |" in text
    tensors = iter(range(100))
    monkeypatch.setattr(
        check_device_sections, "quantize_with", lambda *_: ([np.full(2, next(tensors))], 1.0)
    )
    with pytest.raises(ValueError, match="64 x 64 is not the same to the last bit, run twice"):
        check_device_sections.block(60.0, "llama2_7b", divisor=64)


@pytest.mark.parametrize(
    "rate, room, expected", [(1e18, 1e12, 1), (1e18, 4e8, 8), (1e10, 1e12, 32)]
)
def test_widths_are_divided_for_time_and_for_memory(monkeypatch, rate, room, expected):
    monkeypatch.setattr(check_device_sections, "matmul_rate", lambda **_: rate)
    monkeypatch.setattr(check_device_sections, "host_memory", lambda: room)
    found = check_device_sections._divisor("llama2_7b", 100.0)
    assert found == expected


def test_a_failing_run_of_the_model_says_its_last_line(tmp_path):
    script = tmp_path / "quantize.py"
    script.write_text("import sys; print('one', file=sys.stderr); sys.exit('error: no package')")
    with pytest.raises(ValueError, match="ended with status 1: error: no package"):
        check_device_sections.smoke(60.0, script, "x.py")
    row = SMOKE | {"peak_memory_bytes": 1.5e9, "perplexity_quantized": 15.25}
    script.write_text(
        "import sys, pathlib; work = pathlib.Path(sys.argv[2].partition('=')[2]); work.mkdir()\n"
        f"(work / 'metrics.jsonl').write_text({json.dumps(row) + chr(10)!r})"
    )
    found = check_device_sections.smoke(60.0, script, "x.py")
    assert found["perplexity_quantized"] == 15.25 and found["peak_memory_gigabytes"] == 1.5
    script.write_text(script.read_text().replace("15.25", "NaN"))
    with pytest.raises(ValueError, match="figures of the run are .*nan"):
        check_device_sections.smoke(60.0, script, "x.py")
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(ValueError, match="took longer than 1 s; give more with --minutes"):
        check_device_sections.smoke(0.5, script, "x.py")


@pytest.mark.slow
def test_the_command_writes_a_report_and_a_table(tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, str(REPOSITORY / "scripts/check_device.py"), f"--output={output}"]
    command += ["--sections=kernels", "--minutes=30"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| check | found |") and "| kernel reference | " in done.stdout
    report = json.loads(output.read_text())
    assert report["device"]["float32_tflops"] > 0 and set(report["sections"]) == {
        "device",
        "kernels",
    }
