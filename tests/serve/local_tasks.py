"""Tasks in lm-eval's own format, on data beside them, and a byte-level model to run them on."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import yaml
from tiny_checkpoint import MODEL, random_block, random_outer
from tiny_run import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gptvq_jax.storage.checkpoint_writer import CheckpointWriter

MAX_LENGTH = 96  # of what the model reads at once, so that texts are cut
NAMES = ("choice", "letters", "rolling", "continue")
CONFIG = dataclasses.replace(
    MODEL, vocab_size=258, bos_token_id=256, eos_token_id=257, max_position_embeddings=512
)


def tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """Of bytes, with an end of text; one that has a BOS puts it before every text."""
    plain = byte_tokenizer()
    plain.add_tokens(["<s>", "</s>"], special_tokens=True)
    inner = plain.backend_tokenizer
    if adds_bos:
        inner.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    names = {"bos_token": "<s>"} if adds_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", **names)


def write_model(directory: Path, adds_bos: bool) -> Path:
    """A packed checkpoint of random codes, whose text depends on all of its context.

    It is of a few letters, because the head knows no other: what is generated can be asked for.
    """
    outer, of_bytes = random_outer(7, CONFIG), tokenizer(adds_bos)
    letters = of_bytes("abcdef .\n", add_special_tokens=False)["input_ids"]
    known = np.isin(np.arange(CONFIG.vocab_size), letters)
    outer["lm_head"]["kernel"] *= np.where(known, 0.5, 0.0).astype(np.float32)
    writer = CheckpointWriter(directory)
    writer.write_outer(outer)
    writer.write_tokenizer(of_bytes)
    for index in range(CONFIG.num_hidden_layers):
        block = random_block(index, CONFIG)
        block["input_layernorm"]["scale"] *= 30  # so that attention decides
        writer.write_block(index, block)
    writer.finalize({"vq": {"dim": 2}}, CONFIG, "bytes", "0123")
    return directory


def write_tasks(directory: Path) -> Path:
    """A YAML file and its data for each of NAMES; contexts and texts are of many lengths."""
    rng = np.random.default_rng(0)

    def words(low, high):
        return " ".join(
            "".join(rng.choice(list("abcdef"), 4)) for _ in range(rng.integers(low, high))
        )

    documents = [
        {
            # The second ends in a blank, which belongs to the continuation.
            "question": "" if i == 0 else words(1, 30) + (" " if i == 1 else ""),
            "choices": [f" {words(1, 3)}" for _ in range(3)],
            "answer": int(rng.integers(3)),
            "letter": "ABC"[int(rng.integers(3))],
            "text": words(1, 60) if i else "",
        }
        for i in range(9)
    ]
    directory.mkdir(exist_ok=True)
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data), "cache_dir": str(directory / "cache")},
        "test_split": "train",
        "fewshot_split": "train",
        "metadata": {"version": 2.0},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": name, **mean} for name in ("acc", "acc_norm")],
        },
        "letters": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C"],
            "doc_to_target": "{{letter}}",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}} .",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
        "continue": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}:",
            "doc_to_target": "{{letter}}",
            "generation_kwargs": {"until": ["de", "b"], "max_gen_toks": 20},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }
    for name, task in tasks.items():
        task = {"task": f"local_{name}", **shared, **task}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return directory


def changed(directory: Path, copy: Path, name: str, **fields) -> Path:
    """Another directory with one of the tasks alone, some of its fields changed."""
    copy.mkdir()
    task = yaml.safe_load((directory / f"{name}.yaml").read_text())
    (copy / f"{name}.yaml").write_text(yaml.safe_dump({**task, **fields}))
    shutil.copy(directory / "data.jsonl", copy)
    return copy
