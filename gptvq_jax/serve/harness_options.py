"""How a task of lm-eval wants its text generated: every one of its `generation_kwargs` counts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from gptvq_jax.serve.sampling import Sampling

MAX_NEW_TOKENS = 256  # where a task does not say, as in the harness
# Options that are not ours, at the values that change nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """Of one request."""

    until: tuple[str, ...]  # each ends the text
    max_tokens: int
    sampling: Sampling

    @classmethod
    def of_task(
        cls, options: Mapping[str, Any], end: str | None, max_length: int
    ) -> "GenerationOptions":
        """Reads `generation_kwargs`.

        Args:
          options: of a request.
          end: how the tokenizer writes the end of text, which ends it too.
          max_length: most tokens that the model reads at once.

        Raises:
          ValueError: an option is not supported, out of range, or leaves no room for the prompt.
        """
        given = normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS)
        max_tokens = given.pop("max_gen_toks")
        until = handle_stop_sequences(given.pop("until"), eos=end)
        if not 1 <= max_tokens < max_length:
            raise ValueError(
                f"the task generates max_gen_toks={max_tokens} tokens; that must be from 1 to "
                f"{max_length - 1}, so that some of its prompt is left in the {max_length} tokens "
                "that the model reads"
            )
        return cls(tuple(until), max_tokens, _sampling(given))


def _sampling(given: dict[str, Any]) -> Sampling:
    drawn = given.pop("do_sample")
    temperature = float(given.pop("temperature", 0.0))
    top_k, top_p = int(given.pop("top_k", None) or 0), float(given.pop("top_p", None) or 1.0)
    for name, value in given.items():
        if name not in _NEUTRAL or _NEUTRAL[name] != value:
            raise ValueError(
                f"the task's generation_kwargs have {name}={value!r}, which is not supported here; "
                "leave it out of the task, or the task out of --tasks"
            )
    if not drawn:
        return Sampling()
    if temperature == 0:
        raise ValueError(
            "the task's generation_kwargs have do_sample without a temperature; set it above 0"
        )
    return Sampling(temperature, top_k, top_p)
