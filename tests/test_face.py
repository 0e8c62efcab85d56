"""What `import gptvq_jax` gives: quantize a model, load it, run it."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from documented import README, REPOSITORY, python_blocks
from tiny_checkpoint import MODEL, TIED, write_checkpoint
from tiny_run import model_dir, text_files, tiny_config  # noqa: F401 - fixtures

import gptvq_jax
from gptvq_jax.console import config_file
from gptvq_jax.models.llama import Decoder
from gptvq_jax.ops import vq_matmul
from gptvq_jax.run import evaluate_job
from gptvq_jax.serve.generate_text import generate_text
from gptvq_jax.serve.sampling import Sampling

pytestmark = pytest.mark.usefixtures("short_programs")
PROMPT = "w5 w9 w3"
CONFIG = """
from gptvq_jax.config import default_config
def get_config(arg):
    config = default_config()
    config.update({fields!r})
    config.num_blocks = {{"3b": 1}}[arg]
    return config
"""


@pytest.fixture(scope="module", params=["dense", pytest.param("int8", marks=pytest.mark.slow)])
def model(request, tmp_path_factory):
    """Of every kind of tensor, with a head of its own or not."""
    path = tmp_path_factory.mktemp("checkpoint") / "packed"
    write_checkpoint(path, MODEL if request.param == "dense" else TIED, request.param)
    return gptvq_jax.load(path, "reference")


def dense_logits(model, weights, tokens):
    return np.asarray(Decoder(model.config).apply({"params": weights}, np.array(tokens)))


def test_the_readmes_lines_run(tiny_config, tmp_path, monkeypatch, capsys):  # noqa: F811
    """As they stand there, with a tiny model in the place of the config that they name."""
    monkeypatch.setattr(config_file, "shipped", lambda _: tmp_path)
    monkeypatch.setitem(vq_matmul._PREFERRED, "cpu", ("xla",))  # no C++ to compile
    text = CONFIG.format(fields=tiny_config.to_dict())
    (tmp_path / "smollm2_135m_2d.py").write_text(text)
    (tmp_path / "README.md").write_text("A text of some length. " * 20)
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(README.read_text())
    assert len([line for line in block.splitlines() if line]) == 6
    names = {}
    exec(compile(block, "README.md", "exec"), names)

    report, _, printed = capsys.readouterr().out.partition("written to  ")
    assert "bits per value" in report and printed.splitlines()[0] == "runs/mine"
    assert float(printed.split()[-1]) > 1
    model, logits, weights = (names[name] for name in ("model", "logits", "weights"))
    assert len(model.checkpoint.manifest["layers"]) == 7
    assert logits.shape == (1, 3, model.config.vocab_size) and logits.dtype == np.float32
    expected = dense_logits(model, weights, [[1, 2, 3]])
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_quantize_takes_a_config(tiny_config, tmp_path, capsys):  # noqa: F811
    tiny_config.num_blocks = 1
    summary = gptvq_jax.quantize(tiny_config, tmp_path / "work")
    assert summary["num_layers"] == 7 and (tmp_path / "work/report.png").is_file()
    assert " 7/7 steps " in capsys.readouterr().err  # blocks that stay dense are none
    # The text of the evaluation, whole, in that run's windows.
    path = tmp_path / "work/checkpoint"
    text = Path(tiny_config.evaluation.dataset).read_text()
    value = gptvq_jax.load(path).perplexity(text)
    assert value == evaluate_job.evaluate(str(path), None, num_windows=0)
    first = text[: 32 * 4]  # a token is a byte
    assert gptvq_jax.load(path).perplexity(first) == pytest.approx(
        summary["perplexity_quantized"], rel=1e-6
    )


@pytest.mark.parametrize(
    "config, message",
    [
        ("smollm2_2d", "no config 'smollm2_2d': .* the nearest is 'smollm2_135m_2d'"),
        ("smollm2_135m_2d:5b", "'5b' is not one of 2b, 3b, 4b"),
        ({"vq": 1}, "must return what default_config"),
        (None, "must return what default_config"),
    ],
)
def test_quantize_refuses_what_is_no_config(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gptvq_jax.quantize(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_logits_are_those_of_the_dense_weights(model):
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 9))
    logits = model.logits(tokens)
    weights = model.dequantize()
    assert logits.shape == (2, 9, MODEL.vocab_size) and logits.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {np.dtype(np.float32)}
    expected = dense_logits(model, weights, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([1, 2], r"must be integers \(batch, time\), .* got int64 \(2,\)"),
        ([[1, 2], [3]], r"every row as long, .* got rows of 1 to 2 tokens; pad them or pass them"),
        ([[[1], [2]], [3, 4]], "got a list whose parts have different shapes"),
        ([[1.0, 2.0]], "got float64"),
        ([], r"at least one token; got no token, in shape \(0,\)"),
        ([[]], r"at least one token; got no token, in shape \(1, 0\)"),
        ("text", r"must be integers .* got a text, of which model\.tokenizer makes tokens"),
        (None, r"got object \(\)"),
        ([[0, 40]], r"tokens from 0 to 40 must be in 0\.\.39"),
        ([[-1]], r"tokens from -1 to -1 must be in"),
        (np.zeros((1, 2049), int), "time=2049, beyond the 2048 positions"),
    ],
)
def test_logits_of_what_are_no_tokens(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.logits(tokens)


def test_perplexity_is_that_of_evaluate(model, tmp_path, capsys):
    words = np.random.default_rng(0).integers(20, MODEL.vocab_size, 43)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{word}" for word in words))
    cut = {"seqlen": 8, "batch_size": 2}
    expected = evaluate_job.evaluate(
        str(model.checkpoint.directory), None, dataset=str(file), **cut
    )
    assert "5 x 8 tokens" in capsys.readouterr().out
    assert model.perplexity(file.read_text(), **cut) == expected


@pytest.mark.parametrize(
    "text, options, message",
    [
        (["w1"], {}, r"text must be a text \(str\), not list"),
        ("w1 w2", {}, "the text has only 2 tokens, fewer than one window of 1024; .* seqlen <= 2"),
        ("w1", {}, "only 1 token, fewer than .* 1024; pass more text, of at least 2 tokens$"),
        ("", {}, "only 0 tokens, fewer than one window of 1024; pass more text, of at least 2 tok"),
        ("w1 w2", {"seqlen": 2049}, "seqlen=2049 is beyond the 2048 positions"),
        ("w1 w2", {"seqlen": 1}, r"evaluation\.seqlen=1 must be at least 2"),
        ("w1 w2", {"seqlen": 2, "batch_size": 0}, r"evaluation\.batch_size=0 must be at least 1"),
    ],
)
def test_perplexity_refuses(model, text, options, message):
    with pytest.raises(ValueError, match=message):
        model.perplexity(text, **options)


@pytest.mark.parametrize("drawn", [{}, {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "seed": 3}])
def test_generate_gives_the_text_of_the_command(model, drawn, capsys):
    text = model.generate(PROMPT, max_tokens=6, **drawn)
    assert capsys.readouterr() == ("", "") and text.split()
    seed = drawn.get("seed", 0)
    sampling = Sampling(**{name: value for name, value in drawn.items() if name != "seed"})
    options = {"max_tokens": 6, "sampling": sampling, "seed": seed, "implementation": "reference"}
    assert [text] == generate_text(str(model.checkpoint.directory), None, [PROMPT], **options)


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ("", {}, "prompt 0 is empty"),
        ([PROMPT], {}, r"prompt must be a text \(str\), not list"),
        (PROMPT, {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        (PROMPT, {"max_tokens": 2046}, "does not fit in the 2048 positions"),
        (PROMPT, {"temperature": -1}, "temperature=-1 must be 0"),
        (PROMPT, {"temperature": 1.0, "top_p": 0}, "top_p=0 must be above 0"),
        (PROMPT, {"temperature": 1.0, "seed": -1}, "seed=-1 must be from 0"),
        (PROMPT, {"top_k": 3}, "top_k=3 has no effect at temperature 0, .* set temperature=1"),
        (PROMPT, {"top_p": 0.5}, "top_p=0.5 has no effect at temperature 0"),
        (PROMPT, {"seed": 3}, "seed=3 has no effect at temperature 0"),
    ],
)
def test_generate_refuses(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **options)


def test_load_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint directory .*nowhere; check the"):
        gptvq_jax.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="implementation='fast' must be one of auto, reference"):
        gptvq_jax.load(tmp_path, "fast")


@pytest.mark.parametrize("path", ["", 3, None, b"runs/mine"])
def test_a_path_is_a_text_that_names_a_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which "" must not mean
    for name, call in (
        ("workdir", lambda: gptvq_jax.quantize("smollm2_135m_2d:smoke", path)),
        ("checkpoint", lambda: gptvq_jax.load(path)),
    ):
        message = f"{name} must be the path of a directory, as in 'runs/mine', not {path!r}"
        with pytest.raises(ValueError, match=message):
            call()
    assert not any(tmp_path.iterdir())


def test_a_model_says_what_it_is(model):
    bits = model.checkpoint.manifest["bits_per_value"]
    text = f"<QuantizedModel {model.checkpoint.directory}: {bits:.3f} bits per value>"
    assert repr(model) == text
    assert model.tokenizer(PROMPT)["input_ids"] == [5, 9, 3]


def test_the_import_is_quick():
    code = "import sys; before = {*sys.modules}; import gptvq_jax; print(*{*sys.modules} - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    foreign = {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    assert foreign == {"gptvq_jax"}
