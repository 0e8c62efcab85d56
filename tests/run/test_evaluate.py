"""A streamed evaluation against the whole model at once."""

import re
import tempfile

import jax
import numpy as np
import pytest
from documented import parsed
from steps import Steps

from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.files.disk_space import FullDiskError
from gptvq_jax.models.llama import Decoder
from gptvq_jax.models.open import open_source
from gptvq_jax.run import evaluate, evaluate_job
from gptvq_jax.run.stream_files import StreamFiles
from gptvq_jax.run.stream_memory import StreamMemory
from gptvq_jax.run.walk import walk


@pytest.fixture
def source(model_dir):
    return open_source(str(model_dir))


def whole_model_perplexity(source, windows):
    tree = source.outer()
    for index in range(source.config.num_hidden_layers):
        tree[f"layers_{index}"] = source.block(index)
    logits = Decoder(source.config).apply({"params": tree}, windows)
    log_p = np.asarray(jax.nn.log_softmax(logits[:, :-1]), np.float64)
    picked = np.take_along_axis(log_p, windows[:, 1:, None], axis=-1)
    return np.exp(-picked.mean())


# 300 tokens end in a partly filled chunk of logits; 257 fill exactly one.
@pytest.mark.parametrize("seqlen", [32, pytest.param(257, marks=pytest.mark.slow), 300])
def test_equals_the_whole_model(source, seqlen):
    windows = np.random.default_rng(0).integers(0, 256, (3, seqlen)).astype(np.int32)
    expected = whole_model_perplexity(source, windows)
    assert evaluate.perplexity(source, windows, batch_size=2) == pytest.approx(expected, rel=1e-5)


def random_windows(count, seqlen=32):
    return np.random.default_rng(0).integers(0, 256, (count, seqlen)).astype(np.int32)


class Counted:
    """A source that counts what is read of it, and may die before a block."""

    def __init__(self, source, dies_at=None):
        self.config, self._source, self.dies_at = source.config, source, dies_at
        self.fingerprint = source.fingerprint
        self.blocks, self.outers = [], 0

    def outer(self):
        self.outers += 1
        return self._source.outer()

    def block(self, index):
        self.blocks.append(index)
        if index == self.dies_at:
            raise MemoryError("killed")
        return self._source.block(index)


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_batches_files_and_memory_give_the_same(
    source, tmp_path, monkeypatch, in_files, batch_size
):
    windows = random_windows(5)
    expected = whole_model_perplexity(source, windows)
    if in_files:
        monkeypatch.setattr(evaluate, "_MEMORY_BYTES", 0)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written = []
    writing = StreamFiles.write

    def write(self, stream, point, *rest):
        written.append((stream.partition("-")[0], point))
        return writing(self, stream, point, *rest)

    monkeypatch.setattr(StreamFiles, "write", write)
    counted, depth = Counted(source), source.config.num_hidden_layers
    steps = Steps()
    with evaluate.evaluated(counted, windows, batch_size, progress=steps) as evaluation:
        found = evaluate.perplexity_of(evaluation.losses())
    assert found == pytest.approx(expected, rel=1e-5)
    assert counted.blocks == list(range(depth)) and steps.advanced == depth
    assert counted.outers == 2  # embeddings before the walk, the head after it
    points = [("evaluation", i) for i in range(depth)] + [("outputs", depth)]
    assert written == (points if in_files else [])
    assert not list(tmp_path.iterdir())


def in_directory(source, windows, directory, batch_size=4):
    """An evaluation in files that stay, walked from where it is."""
    stopwatch = Stopwatch()
    made = evaluate.Evaluation(source, windows, batch_size, StreamFiles(directory), stopwatch)
    made.check_room()
    walk(source, [made], range(source.config.num_hidden_layers), stopwatch)
    return made


def names(directory):
    """Of its files, without the digest of model and text."""
    return sorted(re.sub("-[0-9a-f]{12}", "", path.name) for path in directory.iterdir())


def test_files_and_memory_agree_to_the_last_bit(source, tmp_path):
    windows = random_windows(5)
    in_memory = evaluate.perplexity(source, windows, 2)
    losses = in_directory(source, windows, tmp_path, 2).losses()
    assert losses.shape == (5, 31) and losses.dtype == np.float32
    assert evaluate.perplexity_of(losses) == in_memory


def test_a_killed_evaluation_goes_on_where_it_was(source, tmp_path):
    windows, depth = random_windows(3), source.config.num_hidden_layers
    expected = evaluate.perplexity(source, windows)
    for dies_at in range(depth):
        counted = Counted(source, dies_at)
        with pytest.raises(MemoryError):
            in_directory(counted, windows, tmp_path)
        # The visitor may have died before it was through with the block that came before.
        assert counted.blocks[0] == max(0, dies_at - 1)
        assert [path.name for path in tmp_path.glob("*.partial")] == []
    counted = Counted(source)
    losses = in_directory(counted, windows, tmp_path).losses()
    assert evaluate.perplexity_of(losses) == expected
    assert counted.blocks == [depth - 1]
    assert names(tmp_path) == [f"{depth:05d}.outputs.npy"]
    again = Counted(source)
    assert (in_directory(again, windows, tmp_path).losses() == losses).all()
    assert again.blocks == []


def test_files_of_another_model_or_text_are_not_its_own(source, tmp_path):
    windows, depth = random_windows(3), source.config.num_hidden_layers
    in_directory(source, windows, tmp_path)
    other_text = windows.copy()
    other_text[0, 5] ^= 1
    other_model = Counted(source)
    other_model.fingerprint = "another"
    for model, text in ((Counted(source), other_text), (other_model, windows)):
        in_directory(model, text, tmp_path)
        assert model.blocks == list(range(depth))
    assert names(tmp_path) == [f"{depth:05d}.outputs.npy"] * 3


def test_outputs_that_were_cut_are_named(source, tmp_path):
    made = in_directory(source, random_windows(3), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path} is damaged.*; remove it, and it is made again"):
        made.losses()


def test_it_shares_a_walk(source, tmp_path):
    """Behind another visitor that makes streams of the same points, and further than it."""
    windows, config = random_windows(3), source.config
    expected = evaluate.perplexity(source, windows)
    files, seen, stopwatch = StreamFiles(tmp_path), [], Stopwatch()

    class Other:
        files, releases = StreamFiles(tmp_path), ("other",)

        def position(self, order):
            return 0

        def begin(self):
            with files.write("other", 0, (1, 1, 1)) as out:
                out[:1] = np.zeros((1, 1, 1))

        def visit(self, index, block):
            seen.append(index)
            assert files.read("other", index).dtype != np.float32
            with files.write("other", index + 1, (1, 1, 1)) as out:
                out[:1] = np.zeros((1, 1, 1))

    order = range(config.num_hidden_layers)
    evaluation = evaluate.Evaluation(source, windows, 4, files, stopwatch)
    with pytest.raises(MemoryError):
        walk(Counted(source, dies_at=2), [evaluation], order, stopwatch)
    evaluation = evaluate.Evaluation(source, windows, 4, files, stopwatch)
    counted = Counted(source)
    walk(counted, [Other(), evaluation], order, stopwatch)
    assert counted.blocks == seen == list(order)
    assert evaluate.perplexity_of(evaluation.losses()) == expected
    assert names(tmp_path) == [f"{config.num_hidden_layers:05d}.outputs.npy"]
    with pytest.raises(ValueError, match="the whole model"):
        evaluation.position(range(1))
    with pytest.raises(ValueError, match="the whole model"):
        evaluation.position(order[::-1])


def test_room_on_the_disk_is_checked_first(source, tmp_path, monkeypatch):
    monkeypatch.setattr("gptvq_jax.files.disk_space._free", lambda path: 1000)
    counted = Counted(source)
    with pytest.raises(FullDiskError, match=f"{tmp_path} needs .* more, and .* are free"):
        in_directory(counted, random_windows(3), tmp_path)
    assert counted.blocks == [] and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    done = in_directory(source, random_windows(3), tmp_path)
    monkeypatch.setattr("gptvq_jax.files.disk_space._free", lambda path: 0)
    done.check_room()  # nothing is left to write
    with pytest.raises(FullDiskError):
        done.check_room(1)


def test_the_head_is_sent_once_and_rows_are_picked_on_the_host(source, monkeypatch):
    windows, sent = random_windows(6), []
    table = source.config.vocab_size * source.config.hidden_size
    put = jax.device_put

    def device_put(tree, *args, **options):
        large = [leaf for leaf in jax.tree.leaves(tree) if np.size(leaf) == table]
        sent.extend(large)
        return put(tree, *args, **options)

    monkeypatch.setattr(jax, "device_put", device_put)
    nll = evaluate.token_nll

    def on_device(config, outer, x, tokens):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(outer))
        return nll(config, outer, x, tokens)

    monkeypatch.setattr(evaluate, "token_nll", on_device)
    evaluate.perplexity(source, windows, batch_size=1)
    assert len(sent) == 1


def test_says_what_was_measured_how(model_dir, text_files, capsys):
    text = dict(dataset=text_files[1], num_windows=2, seqlen=32, batch_size=2)
    value = evaluate_job.evaluate(None, str(model_dir), **text)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"perplexity    {value:.4f} ± ")
    assert first.endswith(f"on 2 x 32 tokens of {text_files[1]}, multiplied in float32")
    assert last == (
        f"protocol      {text_files[1]}, whole file, one text; 2 windows x 32 tokens, "
        "62 predicted; BOS: none; standard errors over windows"
    )


@pytest.mark.parametrize("in_files", [False, True])
def test_products_in_bfloat16_have_files_and_a_figure_of_their_own(source, tmp_path, in_files):
    """Near that of float32, and another; streams take half of the bytes."""
    windows, stopwatch = random_windows(3), Stopwatch()
    files = StreamFiles(tmp_path) if in_files else StreamMemory()
    kinds = {}
    for products in ("float32", "bfloat16"):
        kinds[products] = evaluate.Evaluation(
            source, windows, 3, files, stopwatch, products=products
        )
        walk(source, [kinds[products]], range(source.config.num_hidden_layers), stopwatch)
    exact, rounded = kinds.values()
    assert exact.outputs()[:].dtype == np.float32 and rounded.outputs()[:].dtype != np.float32
    assert 1.9 < exact.peak_bytes / rounded.peak_bytes < 2.1
    losses = [kind.losses() for kind in kinds.values()]
    assert [of.dtype for of in losses] == [np.float32] * 2
    apart = np.abs(losses[0] - losses[1])
    assert 1e-6 < apart.max() < 0.1


def test_products_are_those_of_the_flag_and_said(model_dir, text_files, monkeypatch, capsys):
    command = f"python scripts/evaluate.py --model={model_dir} --dataset={text_files[1]} "
    command += "--num_windows=2 --seqlen=32"
    found = []
    for more, how in (("", "float32"), (" --products=bfloat16", "bfloat16")):
        with parsed(command + more, monkeypatch) as script:
            script.main([])
        figure, *_ = capsys.readouterr().out.splitlines()
        assert figure.endswith(f"multiplied in {how}")
        found.append(float(figure.split()[1]))
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize(
    "loss, expected", [(800.0, np.inf), (np.inf, np.inf), (np.nan, np.nan), (2.0, np.exp(2.0))]
)
def test_losses_beyond_every_number(source, monkeypatch, loss, expected):
    monkeypatch.setattr(evaluate, "token_nll", lambda *_: np.full((1, 31), loss, np.float32))
    windows = np.zeros((1, 32), np.int32)
    np.testing.assert_equal(evaluate.perplexity(source, windows), expected)


def test_windows_beyond_the_model_name_the_flag_of_the_script(model_dir):
    with pytest.raises(ValueError, match=r"beyond the 2048 positions of tiny; set --seqlen=2048"):
        evaluate_job.evaluate(None, str(model_dir), seqlen=2049)
