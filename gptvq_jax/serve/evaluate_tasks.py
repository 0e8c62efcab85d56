"""The job of scripts/evaluate_tasks.py: benchmarks of EleutherAI's harness on one model."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import logging

from gptvq_jax.console import report
from gptvq_jax.console.errors import first_line
from gptvq_jax.console.nearest_name import nearest_names
from gptvq_jax.console.progress import Progress
from gptvq_jax.files.durable import make_directory, write_text
from gptvq_jax.serve.served_model import ServedModel

_LIBRARIES = ("lm_eval", "jax", "transformers", "datasets")


def evaluate_tasks(
    checkpoint: str | None,
    model: str | None,
    tasks: Sequence[str],
    *,
    version: str,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    include_path: str | None = None,
    output: str | None = None,
    cache: str | None = None,
    chat: bool = False,
    system: str | None = None,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    unsafe_code: bool = False,
    implementation: str | None = None,
    dtype: str = "float32",
    dense: bool = False,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Prints the harness's table of results, with its standard errors, and returns what it stores.

    Args:
      checkpoint, model, implementation, dense, adapter: see `ServedModel`.
      tasks: names of tasks, groups or tags, patterns with * of them, or YAML files.
      version: of this package, for the file.
      num_fewshot: examples in the prompt; None: as each task says.
      limit: evaluate so many documents of each task, or, below 1, this fraction of them.
      include_path: directory of further tasks.
      output: JSON file for settings and results; replaced if it exists.
      cache: directory in which answers are kept as they come, so that the same command goes on
        where it was stopped; those of other weights or settings are told apart.
      chat: write prompts into the chat template, few-shot examples as a conversation.
      system: system message of the chat.
      batch_size, max_length, add_bos_token, dtype: see `HarnessModel`.
      unsafe_code: run tasks that execute what the model writes.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: bad input, in one line with the way out.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed; pip install -r requirements-tasks.txt")
    _check(num_fewshot, limit, include_path, output)
    served = ServedModel(checkpoint, model, implementation, dense, adapter, exact=True)
    if chat and not getattr(served.source.tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template; leave out --chat")

    import lm_eval
    from lm_eval.utils import handle_non_serializable, make_table

    from gptvq_jax.serve.harness import HarnessModel

    lm = HarnessModel(served, batch_size, max_length, add_bos_token, dtype)
    manager, chosen = load_tasks(tasks, include_path)
    of_model = {
        "checkpoint" if checkpoint else "model": checkpoint or model,
        "name": served.source.name,
        "bits_per_value": served.bits_per_value,
        "fingerprint": served.source.fingerprint,
        "adapter": adapter,
        "adapter_fingerprint": served.adapter and served.adapter.fingerprint,
        "implementation": implementation,
        "dense": dense,
        "dtype": dtype,
        "max_length": lm.max_length,
        "add_bos_token": add_bos_token,
    }
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=chosen,
        task_manager=manager,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        limit=limit,
        use_cache=None if cache is None else _cache_file(cache, of_model),
        apply_chat_template=chat,
        system_instruction=system,
        fewshot_as_multiturn=chat,
        log_samples=False,
        confirm_run_unsafe_code=unsafe_code,
    )
    fixed = sorted(t for t, n in found["n-shot"].items() if num_fewshot not in (None, n))
    if fixed:
        logging.warning(
            "--num_fewshot=%s has no effect on %s, whose own number is fixed",
            num_fewshot,
            ", ".join(fixed),
        )
    stored = {
        "versions": {"gptvq_jax": version, **{n: metadata.version(n) for n in _LIBRARIES}},
        **of_model,
        "tasks": list(tasks),
        "limit": limit,
        "batch_size": batch_size,
        "chat": chat,
        "system": system,
        "num_fewshot": found["n-shot"],
        "task_versions": found["versions"],
        "documents": found["n-samples"],
        "higher_is_better": found["higher_is_better"],
        "results": found["results"],
        "groups": found.get("groups", {}),
    }
    stored = json.loads(json.dumps(stored, default=handle_non_serializable))
    stored = report.json_numbers(stored)
    print(make_table(found))
    if "groups" in found:
        print(make_table(found, "groups"))
    print(_figures(stored))
    if output is not None:
        write_text(output, json.dumps(stored, indent=2) + "\n")
        print(f"written to {output}")
    return stored


def load_tasks(names: Sequence[str], include_path: str | None = None) -> tuple[Any, list[Any]]:
    """The harness's index, and the tasks and groups of some names, which do not overlap.

    Their data are read, or downloaded by the harness from the Hugging Face hub.

    Args:
      names: of tasks, groups or tags, patterns with * of them, or YAML files.
      include_path: directory of further tasks; where all names are of tasks in there, those of the
        harness, 14,000 files, are not indexed.

    Raises:
      ValueError: there is no such task, or the harness cannot load it.
    """
    from lm_eval.tasks import TaskManager

    managers = [{"include_path": include_path}]
    if include_path is not None:
        managers.insert(0, {"include_path": include_path, "include_defaults": False})
    for options in managers:
        with Progress(1, "index tasks", "folder") as progress:
            manager = TaskManager(**options)
            progress.advance()
        resolved = [_resolve(manager, name) for name in names]
        if all(found and not set(found) & set(manager.all_groups) for found in resolved):
            break
    for name, found in zip(names, resolved, strict=True):
        if not found:
            near = ", ".join(map(repr, nearest_names(name, manager.all_tasks, 3)))
            meant = f"; the nearest are {near}" if near else ""
            raise ValueError(
                f"lm-eval has no task {name!r}{meant}; --include_path=DIR adds tasks of your own"
            )
    chosen = list(dict.fromkeys(name for found in resolved for name in found))
    try:
        loaded = manager.load(chosen)
    except (ValueError, OSError, NotImplementedError):
        raise
    except Exception as error:  # a task is a program, and so is the loader of its data
        raise ValueError(
            f"lm-eval cannot load {', '.join(chosen)}: {first_line(error)} "
            f"({type(error).__name__}); mend the task, or leave it out"
        ) from error
    groups = loaded.get("groups", {})
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    inside |= {child for children in loaded.get("group_map", {}).values() for child in children}
    parts = {**loaded["tasks"], **groups}
    return manager, [part for name, part in parts.items() if name not in inside]


def _resolve(manager: Any, name: str) -> list[str]:
    """Names of the harness that a name or a pattern stands for; a YAML file is its own."""
    if Path(name).suffix == ".yaml" and Path(name).is_file():
        return [name]
    return manager.match_tasks([name])


def _check(
    num_fewshot: int | None, limit: float | None, include_path: str | None, output: str | None
) -> None:
    """Refuses, before anything is read, what would fail after hours."""
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"{num_fewshot=} must be 0 or larger")
    if limit is not None and not (0 < limit < 1 or limit >= 1 and limit == int(limit)):
        raise ValueError(f"{limit=} must be a whole number of documents, or a fraction below 1")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"there is no directory {include_path}; pass one that holds tasks")
    if output is not None:
        if Path(output).is_dir():
            raise ValueError(f"--output={output} is a directory; name a file in it")
        make_directory(Path(output).absolute().parent)


def _cache_file(directory: str, of_model: dict[str, Any]) -> str:
    """The file of answers of one model, without the harness's ending."""
    make_directory(Path(directory).absolute())
    names = ("fingerprint", "implementation", "dense", "dtype", "max_length", "add_bos_token")
    settings = {name: of_model[name] for name in names}
    if of_model["adapter_fingerprint"]:
        settings["adapter_fingerprint"] = of_model["adapter_fingerprint"]
    settings = json.dumps(settings)
    return str(Path(directory) / hashlib.sha256(settings.encode()).hexdigest()[:16])


def _figures(stored: dict[str, Any]) -> str:
    """One line: which model, at which bits, on how much of the tasks."""
    bits = stored["bits_per_value"]
    model = stored["name"] if bits is None else f"{stored['name']}, {bits:.3f} bits per value"
    documents = sum(count["effective"] for count in stored["documents"].values())
    whole = sum(count["original"] for count in stored["documents"].values())
    part = "" if documents == whole else f" of {whole}"
    return f"{model}: {documents}{part} documents, {stored['dtype']} activations"
