"""Text to tokens before generation, tokens to text while it goes on."""

from collections.abc import Sequence
from typing import Any

from gptvq_jax.errors import first_line
from gptvq_jax.vocabulary import encode

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
      ValueError: an empty prompt, or one that the tokenizer cannot read; a chat without a template,
        or with one that refuses or fails; a system message without a chat.
    """
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {index} is empty; write what the model is to continue")
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


def render_chat(tokenizer: Any, messages: Sequence[dict[str, str]], answer_next: bool) -> str:
    """The text that the tokenizer's chat template makes of messages.

    Args:
      tokenizer: of transformers, with a chat template.
      messages: {"role": ..., "content": ...}, in turn.
      answer_next: end where the assistant's answer begins.

    Raises:
      ValueError: the template refuses them, or is faulty; the message quotes its own.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_next
        )
    except Exception as error:  # a template is a program
        raise ValueError(
            f"the model's chat template fails: {first_line(error)} ({type(error).__name__}); "
            "change --system, or leave out --chat"
        ) from None
    if not isinstance(text, str):
        raise ValueError("the model's chat template makes no text; leave out --chat")
    return text


class TextStream:
    """Text of a sequence that grows by a few tokens at a time, in whole characters.

    Args:
      tokenizer: of transformers; special tokens are not shown.
      context: tokens that come before, such as the prompt, whose text is not part of the stream;
        without them a tokenizer may take the first token for the start of a text.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(context)  # the newest; older ones are forgotten
        self._complete = len(self._tokens)  # how many of them made whole characters together
        self._shown = len(self._decode())  # characters of their text

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        if not tokens:
            return ""
        self._tokens += tokens
        text = self._decode()
        certain = text.rstrip(_INCOMPLETE)
        new = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if certain == text:
            # Of what was complete before, nothing is needed: the newest tokens are context enough.
            self._tokens = self._tokens[self._complete :]
            self._complete, self._shown = len(self._tokens), len(self._decode())
        return new

    def finish(self) -> str:
        """What is left: bytes that did not become a character."""
        return self._decode()[self._shown :]

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
