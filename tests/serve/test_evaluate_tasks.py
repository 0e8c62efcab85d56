"""The job of scripts/evaluate_tasks.py: what it prints, stores, keeps and refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptvq_jax.serve import evaluate_tasks as job
from gptvq_jax.serve.evaluate_tasks import evaluate_tasks

SCRIPT = Path(__file__).parents[2] / "scripts/evaluate_tasks.py"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_fewshot": -1}, "num_fewshot=-1 must be 0 or larger"),
        ({"limit": 0.0}, "limit=0.0 must be a whole number of documents, or a fraction below 1"),
        ({"limit": 2.5}, "limit=2.5 must be a whole number"),
        ({"include_path": "none"}, "there is no directory none; pass one that holds tasks"),
        ({"output": "."}, r"--output=\. is a directory; name a file in it"),
        ({"model": "b"}, "either --checkpoint=DIR or --model=NAME"),
        ({"model": "b", "checkpoint": None, "dense": True}, "--dense is of a checkpoint"),
    ],
)
def test_bad_input(options, message, monkeypatch):
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: name)
    arguments = {"checkpoint": "a", "model": None, "tasks": ["x"], "version": "0"} | options
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(**arguments)


def test_without_the_harness(monkeypatch):
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lm-eval is not installed; pip install -r requirements-t"):
        evaluate_tasks("a", None, ["x"], version="0")


# --- with the harness ---


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    pytest.importorskip("lm_eval")
    import local_tasks

    return local_tasks.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("lm_eval")
    import local_tasks

    return str(local_tasks.write_model(tmp_path_factory.mktemp("model") / "packed", True))


def run(checkpoint, tasks, *names, **options):
    options = {"implementation": "xla", "include_path": str(tasks), "max_length": 96} | options
    return evaluate_tasks(checkpoint, None, names or ["local_*"], version="1.2.3", **options)


def test_table_file_and_what_was_evaluated(checkpoint, tasks, tmp_path, capsys):
    path = tmp_path / "new/results.json"
    found = run(checkpoint, tasks, output=str(path), limit=4, num_fewshot=1, batch_size=3)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|local_")]
    assert [row.split("|")[1].strip() for row in rows] == [
        *("local_choice", "local_continue", "local_letters", "local_rolling")
    ]
    assert "±" in rows[0] and f"{found['results']['local_choice']['acc,none']:.4f}" in rows[0]
    assert f"packed, {found['bits_per_value']:.3f} bits per value: 16 of 36 documents" in out
    assert out.endswith(f"written to {path}\n")
    assert json.loads(path.read_text()) == found
    assert found["checkpoint"] == checkpoint and found["tasks"] == ["local_*"]
    assert set(found["num_fewshot"].values()) == {1} and found["limit"] == 4
    assert found["task_versions"]["local_choice"] == 2.0
    assert found["versions"]["gptvq_jax"] == "1.2.3"
    assert found["versions"].keys() == {"gptvq_jax", "lm_eval", "jax", "transformers", "datasets"}


def test_options_reach_the_harness(checkpoint, tasks, monkeypatch):
    seen = {}

    def spy(**options):
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval.simple_evaluate", spy)
    options = {"num_fewshot": 2, "limit": 0.5, "batch_size": 5, "dtype": "bfloat16"}
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tasks, "local_choice", **options, add_bos_token=False, unsafe_code=True)
    expected = {
        "num_fewshot": 2,
        "limit": 0.5,
        "batch_size": 5,
        "apply_chat_template": False,
        "confirm_run_unsafe_code": True,
        "use_cache": None,
    }
    assert {name: seen[name] for name in expected} == expected
    assert [task.task_name for task in seen["tasks"]] == ["local_choice"]
    lm = seen["model"]
    assert (lm.batch_size, lm.max_length, lm._dtype, lm._add_bos_token) == (
        5,
        96,
        "bfloat16",
        False,
    )


def test_a_stopped_run_goes_on_where_it_was(checkpoint, tasks, tmp_path, monkeypatch):
    names, options = ("local_rolling", "local_letters"), {"cache": str(tmp_path / "kept")}
    whole = run(checkpoint, tasks, *names)["results"]
    from gptvq_jax.serve import harness

    sizes = []

    def counted(config, params, batch, dtype):
        if len(sizes) == stop_at:
            raise KeyboardInterrupt
        sizes.append(batch.tokens.shape)
        return score_batch(config, params, batch, dtype)

    score_batch, stop_at = harness.score_batch, 3
    monkeypatch.setattr(harness, "score_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tasks, *names, **options)
    assert len(sizes) == 3
    stop_at = None
    assert run(checkpoint, tasks, *names, **options)["results"] == whole
    in_all = len(sizes)
    assert run(checkpoint, tasks, *names, **options)["results"] == whole
    assert len(sizes) == in_all  # nothing was left to do
    run(checkpoint, tasks, *names, **options, add_bos_token=False)
    assert len(sizes) > in_all  # another setting has answers of its own


def test_a_chat_asks_in_the_template(checkpoint, tasks, tmp_path, monkeypatch):
    from gptvq_jax.serve import harness

    with pytest.raises(ValueError, match="no chat template; leave out --chat"):
        run(checkpoint, tasks, chat=True)
    seen = []
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    file = copy / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    asked = harness.HarnessModel.generate_until

    def spy(self, requests, **options):
        seen.extend(request.args[0] for request in requests)
        return asked(self, requests, **options)

    monkeypatch.setattr(harness.HarnessModel, "generate_until", spy)
    run(str(copy), tasks, "local_continue", chat=True, system="S", limit=2, num_fewshot=1)
    assert all(text.startswith("[system]S[user]") for text in seen)
    assert all(text.count("[assistant]") == 1 for text in seen)  # the answer of an example


def test_an_unknown_task_is_one_line_with_the_nearest(checkpoint, tasks):
    message = r"lm-eval has no task 'local_chioce'; the nearest are 'local_choice', "
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        from lm_eval.tasks import TaskManager

        whole = TaskManager.__init__
        patch.setattr(  # its 14,000 files take long to read
            TaskManager,
            "__init__",
            lambda self, **o: whole(self, **{**o, "include_defaults": False}),
        )
        with pytest.raises(ValueError, match=message):
            run(checkpoint, tasks, "local_chioce")


def test_a_file_is_a_task(checkpoint, tasks):
    found = run(checkpoint, tasks, str(tasks / "letters.yaml"), limit=1)
    assert list(found["results"]) == ["local_letters"]


def test_groups_have_a_row_of_their_own(checkpoint, tasks, tmp_path, capsys, monkeypatch):
    import local_tasks
    import yaml
    from lm_eval.tasks import TaskManager

    whole = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **o: whole(self, **{**o, "include_defaults": False})
    )
    both = local_tasks.write_tasks(tmp_path / "both")
    group = {
        "group": "local_both",
        "task": ["local_choice", "local_letters"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (both / "both.yaml").write_text(yaml.safe_dump(group))
    found = run(checkpoint, both, "local_both", limit=3)
    of_tasks = [found["results"][f"local_{name}"]["acc,none"] for name in ("choice", "letters")]
    assert found["groups"]["local_both"]["acc,none"] == pytest.approx(sum(of_tasks) / 2)
    assert "|Groups" in capsys.readouterr().out.replace(" ", "")


def test_a_broken_task_is_one_line(checkpoint, tasks, tmp_path):
    import local_tasks

    bad = local_tasks.changed(
        tasks, tmp_path / "bad", "choice", dataset_kwargs={"data_files": "no"}
    )
    with pytest.raises((ValueError, OSError)):
        run(checkpoint, bad, "local_choice")
    wrong = local_tasks.changed(tasks, tmp_path / "wrong", "choice", test_split="none")
    with pytest.raises(ValueError, match="lm-eval cannot load local_choice: .*; mend the task"):
        run(checkpoint, wrong, "local_choice")


def test_a_fixed_number_of_examples_is_said(checkpoint, tasks, tmp_path, caplog):
    import local_tasks

    fixed = local_tasks.changed(tasks, tmp_path / "fixed", "letters", num_fewshot=0)
    found = run(checkpoint, fixed, "local_letters", num_fewshot=2, limit=1)
    assert found["num_fewshot"] == {"local_letters": 0}
    assert "--num_fewshot=2 has no effect on local_letters" in caplog.text


def test_the_script(checkpoint, tasks, tmp_path):
    flags = [f"--checkpoint={checkpoint}", f"--include_path={tasks}", "--implementation=xla"]
    command = [sys.executable, SCRIPT, *flags, "--max_length=96", "--tasks=local_letters"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    done = subprocess.run([*command, "--limit=2", "--output=a.json"], **options)
    assert done.returncode == 0, done.stderr
    assert "|local_letters|" in done.stdout and (tmp_path / "a.json").is_file()
    assert done.stderr.count("loglikelihood: 100%") >= 1
    assert "Running loglikelihood" not in done.stderr  # no bar of the harness beside ours
    refused = subprocess.run([*command, "--limit=1.5"], **options)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: limit=1.5 must be a whole number")
