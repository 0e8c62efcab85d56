"""The history of a chat, and how much of it fits in the context."""

from typing import Any

from gptvq_jax.data.vocabulary import check_tokens, encode
from gptvq_jax.serve.prompts import check_unicode, render_chat


class Conversation:
    """Messages in turn, of which the oldest go where there is no room for all.

    Args:
      tokenizer: of transformers, with a chat template.
      vocab_size: of the model.
      system: system message; None: the template's own, if any. It stays.
      context: most tokens of the conversation and the answer to come.

    Attributes:
      turns: a question and its answer, each.

    Raises:
      ValueError: there is no chat template.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, system: str | None, context: int):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model's tokenizer has no chat template; use scripts/generate.py")
        check_unicode("the system message", system or "")
        self._tokenizer, self._vocab_size, self._context = tokenizer, vocab_size, context
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[tuple[str, str]] = []

    def ask(self, message: str, room: int) -> tuple[tuple[int, ...], int]:
        """Tokens of the conversation up to where the answer to a message begins.

        Turns that do not fit any more are dropped for good, the oldest first.

        Args:
          message: the user's.
          room: tokens that the answer may have.

        Returns:
          The tokens, and how many turns were dropped.

        Raises:
          ValueError: the message alone does not fit, or cannot be read. Nothing is dropped then.
        """
        check_unicode("the message", message)
        for dropped in range(len(self.turns) + 1):
            tokens = self._tokens(self.turns[dropped:], message)
            if len(tokens) + room <= self._context:
                del self.turns[:dropped]
                return tokens, dropped
        raise ValueError(
            f"the message has {len(tokens)} tokens, as the model's chat template writes it; with "
            f"{room} more for the answer it does not fit in the context of {self._context}; "
            "shorten it, or start with a lower --max_tokens"
        )

    def _tokens(self, turns: list[tuple[str, str]], message: str) -> tuple[int, ...]:
        messages = list(self._system)
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": message})
        text = render_chat(self._tokenizer, messages, True, fix="change --system or the message")
        # The template has written the special tokens.
        tokens = encode(self._tokenizer, text, "the chat", add_special_tokens=False, verbose=False)
        check_tokens(tokens, self._vocab_size, self._tokenizer, "the chat")
        return tuple(tokens)
