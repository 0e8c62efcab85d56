"""Windows of text, or chats, and which of their tokens are learned."""

from typing import Any, NamedTuple

import numpy as np
from absl import logging

from gptvq_jax.data.chats import Message, chats
from gptvq_jax.data.corpora import documents
from gptvq_jax.data.vocabulary import check_tokens, encode
from gptvq_jax.data.windows import calibration_windows
from gptvq_jax.lora.settings import LoraSettings
from gptvq_jax.models.source import ModelSource
from gptvq_jax.serve.prompts import render_chat

_ROUND = 16  # the longest chat is filled up to a multiple of this


class Examples(NamedTuple):
    """Equally long ones; what follows the end of a chat is learned by nobody."""

    tokens: np.ndarray  # (n, T) int32
    learned: np.ndarray  # (n, T - 1) bool: of tokens 2..T, each predicted from those before it


def batch_of(examples: Examples, step: int, size: int, seed: int) -> Examples:
    """Those of step 1, 2, ...: every pass over the examples has an order of its own.

    Args:
      examples: n of them.
      step: number of the batch.
      size: of a batch.
      seed: of the orders.
    """
    count, chosen = len(examples.tokens), []
    orders: dict[int, np.ndarray] = {}
    for place in range((step - 1) * size, step * size):
        epoch, within = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
        chosen.append(orders[epoch][within])
    return Examples(examples.tokens[chosen], examples.learned[chosen])


def load_examples(source: ModelSource, settings: LoraSettings) -> tuple[Examples, Examples]:
    """Those to train on, and those held out, which no other overlaps.

    Raises:
      ValueError, FileNotFoundError: there is no such text, or too little of it.
    """
    limit = source.config.max_position_embeddings
    if settings.seqlen > limit:
        raise ValueError(
            f"--seqlen={settings.seqlen} is beyond the {limit} positions of {source.name}; set "
            f"--seqlen={limit} or less"
        )
    if settings.chat:
        return _chats(source, settings)
    windows = calibration_windows(
        source.tokenizer,
        documents(settings.dataset, "train"),
        num_windows=settings.num_windows,
        seqlen=settings.seqlen,
        seed=settings.seed,
        held_out=settings.held_out,
        vocab_size=source.config.vocab_size,
    )
    learned = np.ones((len(windows), settings.seqlen - 1), bool)
    count = settings.num_windows
    return Examples(windows[:count], learned[:count]), Examples(windows[count:], learned[count:])


def _chats(source: ModelSource, settings: LoraSettings) -> tuple[Examples, Examples]:
    if not getattr(source.tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template; leave out --chat")
    found, cut = [], 0
    for number, messages in chats(settings.dataset):
        where = f"{settings.dataset} line {number}"
        tokens, learned = chat_tokens(source.tokenizer, messages, where)
        check_tokens(tokens, source.config.vocab_size, source.tokenizer, where)
        cut += len(tokens) > settings.seqlen
        if learned[: settings.seqlen].any():
            found.append((tokens[: settings.seqlen], learned[: settings.seqlen]))
    if cut:
        logging.warning(
            "%d chats are longer than --seqlen=%d and are cut there", cut, settings.seqlen
        )
    count = len(found) - settings.held_out
    if count < settings.batch:
        raise ValueError(
            f"{settings.dataset} has {len(found)} chats with an answer in the first "
            f"{settings.seqlen} tokens; with {settings.held_out} held out, {max(0, count)} are "
            f"fewer than a batch of {settings.batch}; add chats, or lower --batch or --held_out"
        )
    longest = max(len(tokens) for tokens, _ in found)
    time = min(settings.seqlen, -(-longest // _ROUND) * _ROUND)
    kept = {(2 * i + 1) * len(found) // (2 * settings.held_out) for i in range(settings.held_out)}
    parts = [], []
    for number, example in enumerate(found):
        parts[number in kept].append(example)
    return tuple(_filled_up(part, time) for part in parts)


def _filled_up(chats: list[tuple[np.ndarray, np.ndarray]], time: int) -> Examples:
    tokens = np.zeros((len(chats), time), np.int32)
    learned = np.zeros((len(chats), time), bool)
    for row, (of_chat, of_answers) in enumerate(chats):
        tokens[row, : len(of_chat)] = of_chat
        learned[row, : len(of_chat)] = of_answers
    return Examples(tokens, learned[:, 1:])


def chat_tokens(
    tokenizer: Any, messages: list[Message], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a chat (n,) int32, and which of them are the assistant's own (n,) bool.

    These are what the template writes after an answer was asked for, with what closes it.

    Args:
      tokenizer: of transformers, with a chat template.
      messages: of the chat.
      where: it stands, for messages.

    Raises:
      ValueError: the template fails, or writes a message in other words once others follow.
    """
    fix = f"change {where}, or leave out --chat"

    def text(count: int, answer_next: bool) -> str:
        return render_chat(tokenizer, messages[:count], answer_next, fix=fix)

    whole, spans = text(len(messages), False), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text(number, True), text(number + 1, False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"{where}: the model's chat template does not write answer {number} as it asks for "
                "it, so that its tokens cannot be told from the others; give each line one answer, "
                "its last message, without parts that the template drops"
            )
        spans.append((len(before), len(after)))
    options = {"add_special_tokens": False, "verbose": False}
    tokens = np.asarray(encode(tokenizer, whole, where, **options), np.int32)
    places = tokenizer(whole, return_offsets_mapping=True, **options)["offset_mapping"]
    learned = [any(first <= start < last for first, last in spans) for start, _ in places]
    return tokens, np.asarray(learned, bool)
