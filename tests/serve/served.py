"""A tiny chat model behind the API, for every test of it: its engine is warmed up once a file."""

import contextlib
import dataclasses
import threading
from pathlib import Path

import local_tasks
import numpy as np
from tiny_checkpoint import random_block, random_outer

from gptvq_jax.serve.engine import Engine
from gptvq_jax.serve.params import dense_params
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.checkpoint_writer import CheckpointWriter

CONFIG = dataclasses.replace(
    local_tasks.CONFIG, num_hidden_layers=1, max_position_embeddings=192, tie_word_embeddings=False
)
NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no\\nnever') }}"
    "{% endif %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def write_model(directory: Path) -> Path:
    """A packed checkpoint that writes a few letters, of which all of its context decides."""
    outer, of_bytes = random_outer(7, CONFIG), local_tasks.tokenizer(False)
    letters = of_bytes("abcdef .\n", add_special_tokens=False)["input_ids"]
    known = np.isin(np.arange(CONFIG.vocab_size), letters)
    outer["lm_head"]["kernel"] *= np.where(known, 0.5, 0.0).astype(np.float32)
    of_bytes.chat_template = TEMPLATE
    writer = CheckpointWriter(directory)
    writer.write_outer(outer)
    writer.write_tokenizer(of_bytes)
    block = random_block(0, CONFIG)
    block["input_layernorm"]["scale"] *= 30
    writer.write_block(0, block)
    writer.finalize({"vq": {"dim": 2}}, CONFIG, NAME, "0123")
    return directory


class Gate:
    """Lets an engine's steps through, or holds them back, so that a test can look in between."""

    def __init__(self, engine: Engine):
        self._open = threading.Event()
        self._open.set()
        step = engine.step

        def held() -> None:
            self._open.wait()
            step()

        engine.step = held

    def open(self) -> None:
        self._open.set()

    @contextlib.contextmanager
    def closed(self):
        self._open.clear()
        try:
            yield
        finally:
            self.open()


def make_engine(source: PackedCheckpoint, **options) -> Engine:
    """Dense, which compiles fast."""
    options = {"slots": 3, "queue": 60, "chunk": 16} | options
    return Engine(source.config, dense_params(source), **options)
