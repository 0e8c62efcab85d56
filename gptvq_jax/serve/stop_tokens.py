"""Which tokens end a text: whatever says so counts."""

from typing import Any

from gptvq_jax.models.source import ModelSource
from gptvq_jax.serve.prompts import render_chat

_ANSWER = "Yes."


def stop_tokens(source: ModelSource) -> tuple[int, ...]:
    """Ids at which generation stops, sorted; ids that the model cannot produce are left out.

    They are the end of text of config.json and of the tokenizer, those of generation_config.json
    or a GGUF file's end of turn and of message, and the token with which the chat template ends an
    answer. A model that was taught to chat ends its answers with that one, whatever the prompt.

    Args:
      source: where the model comes from.
    """
    eos = source.config.eos_token_id
    found = {
        *(eos if isinstance(eos, tuple) else (eos,)),
        source.tokenizer.eos_token_id,
        *source.stop_tokens,
        end_of_turn(source.tokenizer),
    }
    return tuple(sorted(token for token in found - {None} if token < source.config.vocab_size))


def end_of_turn(tokenizer: Any) -> int | None:
    """The added token that the chat template writes right after an answer, if it writes one.

    Args:
      tokenizer: of transformers.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render_chat(tokenizer, messages, False)
    except ValueError:  # it is an error only of a chat, which renders the template itself
        return None
    _, found, rest = text.rpartition(_ANSWER)
    rest = rest.lstrip()
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    fitting = [token for token in added if found and token and rest.startswith(token)]
    return added[max(fitting, key=len)] if fitting else None
