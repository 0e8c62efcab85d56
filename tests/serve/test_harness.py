"""The harness's tasks on packed weights, against its own PyTorch backend on the dense export."""

import os

import numpy as np
import pytest

pytest.importorskip("lm_eval")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import local_tasks  # noqa: E402
import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from gptvq_jax.exchange.hf_dense import hf_dense  # noqa: E402
from gptvq_jax.serve.harness import HarnessModel  # noqa: E402
from gptvq_jax.serve.served_model import ServedModel  # noqa: E402
from gptvq_jax.storage.checkpoint import PackedCheckpoint  # noqa: E402

TASKS = [f"local_{name}" for name in local_tasks.NAMES]


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    path = local_tasks.write_tasks(tmp_path_factory.mktemp("tasks"))
    return TaskManager(include_path=str(path), include_defaults=False)


@pytest.fixture(scope="module", params=[True, False], ids=["BOS", "no BOS"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "packed"
    return local_tasks.write_model(path, request.param)


def evaluate(model, manager, tasks=TASKS, **options):
    found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, **options)
    return found["results"], found["samples"]


def ours(checkpoint, **options):
    served = ServedModel(str(checkpoint), None, "xla")
    return HarnessModel(served, 4, local_tasks.MAX_LENGTH, **options)


@pytest.mark.parametrize("num_fewshot, add_bos_token", [(None, None), (1, False)])
def test_the_harness_own_backend_agrees(checkpoint, manager, tmp_path, num_fewshot, add_bos_token):
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    hf_dense(PackedCheckpoint(checkpoint), tmp_path / "out")
    options = {"max_length": local_tasks.MAX_LENGTH, "add_bos_token": add_bos_token}
    theirs = HFLM(str(tmp_path / "out"), device="cpu", dtype="float32", batch_size=4, **options)
    expected, of_theirs = evaluate(theirs, manager, num_fewshot=num_fewshot)
    model = ours(checkpoint, add_bos_token=add_bos_token)
    found, of_ours = evaluate(model, manager, num_fewshot=num_fewshot)
    count = 0
    for task in TASKS:
        for one, other in zip(of_ours[task], of_theirs[task], strict=True):
            assert one["arguments"] == other["arguments"]
            count += agree(one["resps"], other["resps"])
        for metric, value in expected[task].items():
            assert found[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
    assert count == 9 * (3 + 3 + 1 + 1)
    assert model.prefix_token_id == theirs.prefix_token_id


def agree(found, expected):
    """Asserts that answers to the requests of a document are the same; returns their number."""
    for (one,), (other,) in zip(found, expected, strict=True):
        if isinstance(other, str):
            assert one == other
        else:
            np.testing.assert_allclose(np.ravel(one), np.ravel(other), atol=1e-3)
    return len(found)
