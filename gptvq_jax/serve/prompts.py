"""Text to tokens before generation, tokens to text while it goes on."""

import contextlib
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from gptvq_jax.console.errors import first_line
from gptvq_jax.data.vocabulary import encode

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_TEMPLATE_SECONDS = 3  # a real template takes milliseconds, but anyone may write one without end
_INCOMPLETE = "\ufffd"  # what a tokenizer makes of bytes that are no character (yet)


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], chat: bool = False, system: str | None = None
) -> list[list[int]]:
    """Token ids of prompts, each as the user's first message if `chat`.

    Args:
      tokenizer: of transformers.
      prompts: texts.
      chat: write each prompt into the tokenizer's chat template, up to where the answer begins.
      system: system message of the chat; None: the template's own, if any.

    Raises:
      ValueError: a prompt that is empty, no Unicode, or one that the tokenizer cannot read; a chat
        without a template, or with one that refuses or fails; a system message without a chat.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; write what the model is to continue")
        check_unicode(f"prompt {index}", prompt)
    check_unicode("the system message", system or "")
    if not chat:
        if system is not None:
            raise ValueError("a system message is part of a chat; add --chat")
        return [encode(tokenizer, text, f"prompt {i}") for i, text in enumerate(prompts)]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template; leave out --chat")
    first = [] if system is None else [{"role": "system", "content": system}]
    texts = [
        render_chat(tokenizer, [*first, {"role": "user", "content": prompt}], True)
        for prompt in prompts
    ]
    # The template has written the special tokens.
    return [
        encode(tokenizer, text, f"prompt {i}", add_special_tokens=False)
        for i, text in enumerate(texts)
    ]


def render_chat(
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    answer_next: bool,
    goes_on: bool = False,
    *,
    fix: str = "change --system, or leave out --chat",
) -> str:
    """The text that the tokenizer's chat template makes of messages.

    Args:
      tokenizer: of transformers, with a chat template.
      messages: {"role": ..., "content": ...}, in turn.
      answer_next: end where the assistant's answer begins.
      goes_on: end where the last message does, without what closes it.
      fix: what to do where the template fails, for the message.

    Raises:
      ValueError: the template refuses them, is faulty, or takes too long (which only the main
        thread notices); the message quotes its own.
    """
    try:
        with _time_limit(_TEMPLATE_SECONDS):
            text = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=answer_next,
                continue_final_message=goes_on,
            )
    except Exception as error:  # a template is a program
        raise ValueError(
            f"the model's chat template fails: {first_line(error)} ({type(error).__name__}); {fix}"
        ) from None
    if not isinstance(text, str):
        raise ValueError(f"the model's chat template makes no text; {fix}")
    return text


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what runs for longer, if the main thread runs it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"it takes more than {seconds} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def check_unicode(name: str, text: str) -> None:
    """Raises ValueError for a text that no tokenizer takes.

    Python stands for a byte of the command line that is not UTF-8 with a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = code - 0xDC00
        what = f"byte 0x{byte:02x}" if 0x80 <= byte <= 0xFF else f"surrogate \\u{code:04x}"
        raise ValueError(
            f"{name} is not UTF-8: {what} after {error.start} characters; pass it in UTF-8"
        ) from None


class TextStream:
    """Text of a sequence that grows by a few tokens at a time, in whole characters.

    Args:
      tokenizer: of transformers; special tokens are not shown.
      context: tokens that come before, such as the prompt, whose text is not part of the stream;
        without them a tokenizer may take the first token for the start of a text.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._tokens = list(context)  # the newest; older ones are forgotten
        self._complete = len(self._tokens)  # how many of them made whole characters together
        self._shown = len(self._decode())  # characters of their text

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        if not tokens:
            return ""
        self._tokens += tokens
        if self._in_bytes():
            return ""
        text = self._decode()
        certain = text.rstrip(_INCOMPLETE)
        new = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if certain == text:
            # Of what was complete before, nothing is needed where the newest tokens have a text:
            # they are context enough. Where they have none, as special tokens, they are no context.
            newest = self._tokens[self._complete :]
            if self._decode(newest):
                self._tokens = newest
            self._complete, self._shown = len(self._tokens), len(self._decode())
        return new

    def finish(self) -> str:
        """What is left: bytes that did not become a character."""
        return self._decode()[self._shown :]

    def _in_bytes(self) -> bool:
        """Whether the newest token is a byte like <0xE2>, which stands for what has no token.

        Such bytes are decoded together: the next may make characters of them, or unmake them.
        """
        shown = (token for token in reversed(self._tokens) if token not in self._special)
        token = self._tokenizer.convert_ids_to_tokens(next(shown, self._tokens[-1]))
        return isinstance(token, str) and _BYTE.fullmatch(token) is not None

    def _decode(self, tokens: Sequence[int] | None = None) -> str:
        return self._tokenizer.decode(
            self._tokens if tokens is None else tokens,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
