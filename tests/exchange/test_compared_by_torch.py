"""KL divergence and top-1 of a run's checkpoint, computed by PyTorch from the dense export."""

from pathlib import Path

import numpy as np
import pytest
from tiny_run import model_dir, text_files, tiny_config  # noqa: F401 - fixtures

from gptvq_jax.exchange.hf_dense import hf_dense
from gptvq_jax.run import evaluate_job, job
from gptvq_jax.storage.checkpoint import PackedCheckpoint


def torch_logits(torch, directory, windows):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(windows)).logits[:, :-1].double()


def test_a_comparison_is_that_of_torch(tiny_config, tmp_path, monkeypatch):  # noqa: F811
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("gptvq_jax.console.layer_plot.plot", lambda *_: None)
    tiny_config.evaluation.num_windows = 8
    tiny_config.method, tiny_config.uniform.bits = "rtn", 4
    summary = job.quantize(tiny_config, str(tmp_path / "run"))
    packed = PackedCheckpoint(tmp_path / "run/checkpoint")
    hf_dense(packed, tmp_path / "dense")
    text = Path(tiny_config.evaluation.dataset).read_text()[: 8 * 32]
    windows = np.asarray(packed.tokenizer(text)["input_ids"], np.int64).reshape(8, 32)
    logits, of_float = (
        torch_logits(torch, path, windows) for path in (tmp_path / "dense", tiny_config.model)
    )
    log_q, log_p = (torch.log_softmax(each, dim=-1) for each in (logits, of_float))
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    targets = torch.from_numpy(windows[:, 1:])
    nll, of_reference = (
        torch.nn.functional.cross_entropy(each.flatten(0, 1), targets.flatten())
        for each in (logits, of_float)
    )
    expected = {
        "perplexity": nll.exp(),
        "perplexity_float": of_reference.exp(),
        "log_perplexity_ratio": nll - of_reference,
        "kl_mean": kl.mean(),
        "kl_median": kl.quantile(0.5),
        "kl_99": kl.quantile(0.99),
        "kl_max": kl.max(),
        "same_top1": (logits.argmax(-1) == of_float.argmax(-1)).double().mean(),
    }
    expected = {name: float(value) for name, value in expected.items()}
    assert expected["kl_mean"] > 0.01 and 0 < expected["same_top1"] < 1
    found = {name: figure["value"] for name, figure in summary["comparison"].items()}
    assert found == pytest.approx(expected, rel=1e-3)
    # As does the dense export, read as any other model.
    dataset = tmp_path / "text.txt"
    dataset.write_text(text)
    again = evaluate_job.compare(
        None, str(tmp_path / "dense"), tiny_config.model, dataset=str(dataset), seqlen=32
    )
    assert {name: figure["value"] for name, figure in again.items()} == pytest.approx(
        expected, rel=1e-3
    )
