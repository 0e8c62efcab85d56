"""The two calls of the API, read from their JSON: what is asked, in our own terms."""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from gptvq_jax.console.errors import brief
from gptvq_jax.core.seeds import LARGEST_SEED
from gptvq_jax.serve.http.errors import bad_field
from gptvq_jax.serve.http.fields import Fields
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.serve.slot_programs import MOST_LIKELY

_MOST_STOPS = 16  # OpenAI takes 4; benchmarks have more
_MOST_CHOICES = 128  # of one prompt
_MOST_TOKENS = 2**31 - 1
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What both calls have."""

    model: str
    sampling: Sampling
    seed: int
    choices: int  # of each prompt
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool  # at the end of a stream


@dataclasses.dataclass(frozen=True)
class CompletionCall:
    """/v1/completions."""

    options: Options
    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int
    echo: bool
    logprobs: int | None


@dataclasses.dataclass(frozen=True)
class ChatCall:
    """/v1/chat/completions."""

    options: Options
    messages: tuple[dict[str, str], ...]
    max_tokens: int | None  # None: as many as there is room for
    max_tokens_field: str  # that says so
    logprobs: int | None


def read_completion(body: Mapping[str, Any]) -> CompletionCall:
    """Raises APIError, which names the field, for what is wrong or not supported."""
    fields = Fields(body)
    options = _options(fields)
    best_of = fields.integer("best_of", options.choices, 1, _MOST_CHOICES)
    if best_of != options.choices:
        raise bad_field("best_of", f"= {best_of} is not supported unless it equals n; leave it out")
    echo = fields.boolean("echo")
    call = CompletionCall(
        options,
        _prompts(fields.take("prompt")),
        fields.integer("max_tokens", 16, 0 if echo else 1, _MOST_TOKENS),
        echo,
        fields.integer("logprobs", None, 0, MOST_LIKELY),
    )
    fields.finish()
    if echo and call.options.stream and call.logprobs is not None:
        raise bad_field("echo", "with logprobs and stream is not supported; leave one of them out")
    return call


def read_chat(body: Mapping[str, Any]) -> ChatCall:
    """Raises APIError, which names the field, for what is wrong or not supported."""
    fields = Fields(body)
    options = _options(fields)
    name, other = "max_completion_tokens", "max_tokens"
    limits = {each: fields.integer(each, None, 1, _MOST_TOKENS) for each in (name, other)}
    given = [each for each in limits if limits[each] is not None]
    if len(given) == 2 and limits[name] != limits[other]:
        raise bad_field(other, f"= {limits[other]} contradicts {name}; leave it out")
    field = given[0] if given else name
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", None, 0, MOST_LIKELY)
    if top is not None and not wanted:
        raise bad_field("top_logprobs", "has no effect without logprobs; add logprobs = true")
    messages = _messages(fields.take("messages"))
    fields.finish()
    return ChatCall(options, messages, limits[field], field, (top or 0) if wanted else None)


def _options(fields: Fields) -> Options:
    temperature = fields.number("temperature", 1.0, 0, 2)
    top_p = fields.number("top_p", 1.0, 0, 1)
    if top_p == 0:
        raise bad_field("top_p", "must be above 0; temperature = 0 is greedy")
    top_k = fields.integer("top_k", 0, 0, _MOST_TOKENS)  # not OpenAI's, but everybody's
    stream = fields.boolean("stream")
    return Options(
        model=fields.text("model"),
        sampling=Sampling(temperature, top_k, top_p),
        seed=fields.integer("seed", secrets.randbelow(LARGEST_SEED), 0, LARGEST_SEED),
        choices=fields.integer("n", 1, 1, _MOST_CHOICES),
        stop=fields.strings("stop", _MOST_STOPS),
        stream=stream,
        include_usage=_include_usage(fields.take("stream_options"), stream),
    )


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise bad_field("stream_options", "has no effect without stream; add stream = true")
    if not isinstance(options, dict):
        raise bad_field("stream_options", f"must be an object, not {brief(options)}")
    known = {"include_usage", "include_obfuscation"}
    if set(options) - known or not all(isinstance(v, bool) for v in options.values()):
        raise bad_field("stream_options", f"= {brief(options)} may have include_usage, a boolean")
    if options.get("include_obfuscation"):
        raise bad_field("stream_options", "include_obfuscation is not supported; leave it out")
    return options.get("include_usage", False)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, each a text or token ids."""

    def is_tokens(each: Any) -> bool:
        return (
            isinstance(each, list)
            and each
            and all(isinstance(t, int) and not isinstance(t, bool) for t in each)
        )

    if value is None:
        raise bad_field("prompt", "is missing")
    several = [value] if isinstance(value, str) or is_tokens(value) else value
    if (
        not isinstance(several, list)
        or not several
        or not all(isinstance(each, str) or is_tokens(each) for each in several)
    ):
        raise bad_field(
            "prompt", f"must be a text, token ids, or a list of these, none empty: {brief(value)}"
        )
    return tuple(each if isinstance(each, str) else tuple(each) for each in several)


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    """{"role", "content"} of a conversation."""
    if not isinstance(value, list) or not value:
        what = "is missing" if value is None else f"must be a list of messages, not {brief(value)}"
        raise bad_field("messages", what)
    return tuple(_message(f"messages[{index}]", each) for index, each in enumerate(value))


def _message(name: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise bad_field(name, f"must be an object with role and content, not {brief(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_field(f"{name}.role", f"must be one of {', '.join(_ROLES)}, not {brief(role)}")
    for field, other in message.items():
        if field not in ("role", "content", "name", "refusal", "annotations") and other:
            raise bad_field(f"{name}.{field}", "is not supported; leave it out")
    if message.get("name") is not None:
        raise bad_field(f"{name}.name", "is not supported; write it into the content")
    return {"role": _ROLES[role], "content": _content(f"{name}.content", message.get("content"))}


def _content(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad_field(name, f"must be a text, or a list of parts, not {brief(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise bad_field(name, f"has a part that is no text, {brief(part)}; leave it out")
        texts.append(part["text"])
    return "".join(texts)
