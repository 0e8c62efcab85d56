"""Trains a low-rank adapter (LoRA) on a packed checkpoint, or on any model, which stays as it is.

  python scripts/lora.py --checkpoint=DIR --out=adapter
  python scripts/lora.py --checkpoint=DIR --out=adapter --dataset=mine.txt --rank=8 --alpha=16
  python scripts/lora.py --checkpoint=DIR --out=adapter --dataset=chats.jsonl --chat
  python scripts/lora.py --checkpoint=DIR --out=adapter --targets=q_proj,k_proj,v_proj,o_proj

The adapter is in PEFT's format: scripts/generate.py and others take it as --adapter=DIR, and so
does PEFT. With --chat each line of the dataset is {"messages": [{"role": ..., "content": ...}]},
and what is learned are the assistant's messages. What is stopped goes on when the same command is
given again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a packed checkpoint.")
_MODEL = flags.DEFINE_string("model", None, "Any model instead, named as config.model is.")
_OUT = flags.DEFINE_string("out", None, "Directory for the adapter.")
_SETTINGS = (
    flags.DEFINE_integer("rank", 16, "Of the adapters."),
    flags.DEFINE_float("alpha", 32.0, "An adapter counts alpha / rank times."),
    flags.DEFINE_bool("rslora", False, "It counts alpha / sqrt(rank) times instead."),
    flags.DEFINE_list("targets", ["q_proj", "v_proj"], "Last parts of the names of layers."),
    flags.DEFINE_float("dropout", 0.0, "Share of an adapter's inputs that a step leaves out."),
    flags.DEFINE_string(
        "dataset", "wikipedia", "wikitext2, c4, ptb, or a .txt, .jsonl or .parquet file."
    ),
    flags.DEFINE_bool("chat", False, "The dataset is chats; learn the assistant's messages."),
    flags.DEFINE_integer("seqlen", 512, "Tokens of a window; of a chat, at most."),
    flags.DEFINE_integer("num_windows", 256, "Windows of a text that are trained on."),
    flags.DEFINE_integer("held_out", 8, "Windows or chats that say when to stop."),
    flags.DEFINE_integer("steps", 300, "Most steps."),
    flags.DEFINE_integer("batch", 4, "Windows or chats per step."),
    flags.DEFINE_float("lr", 2e-4, "Largest learning rate of AdamW."),
    flags.DEFINE_integer(
        "warmup", None, "Steps in which it rises; then it falls along a cosine; default: 10."
    ),
    flags.DEFINE_float("weight_decay", 0.0, "Of AdamW."),
    flags.DEFINE_float("clip", 1.0, "Largest norm of the gradient."),
    flags.DEFINE_integer("eval_every", 25, "Steps from one held-out loss to the next."),
    flags.DEFINE_integer("patience", 4, "Held-out losses without a gain that stop; 0: none do."),
    flags.DEFINE_integer("seed", 0, "Of windows, their order, the start and the dropout."),
)
flags.mark_flag_as_required("out")


def main(_) -> None:
    from gptvq_jax.lora.settings import LoraSettings
    from gptvq_jax.lora.train import train

    given = {holder.name: holder.value for holder in _SETTINGS}
    if given["chat"]:
        cli.refuse(["num_windows"], "with --chat, which trains on all chats; leave it out")
    settings = LoraSettings(**{**given, "targets": tuple(given["targets"])})
    train(_CHECKPOINT.value, _MODEL.value, _OUT.value, settings)


if __name__ == "__main__":
    cli.run(main, __doc__)
