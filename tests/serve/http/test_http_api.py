"""The HTTP API: what it answers, and that texts are those of generate.py."""

import jax
import numpy as np
import pytest

pytest.importorskip("starlette")
import served  # noqa: E402
from asking import PROMPT, complete, events, talk  # noqa: E402

from gptvq_jax.models import llama  # noqa: E402
from gptvq_jax.serve.generate_text import generate_text  # noqa: E402
from gptvq_jax.serve.sampling import Sampling  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_slot_is_lost")


def generated(checkpoint, prompt, capsys, **options):
    options = {"max_tokens": 30, "dense": True} | options
    texts = generate_text(str(checkpoint), None, [prompt], **options)
    capsys.readouterr()
    return texts[0]


def test_the_text_is_that_of_generate(client, checkpoint, capsys):
    found = complete(client, max_tokens=30)
    text = generated(checkpoint, PROMPT, capsys)
    assert len(set(text)) > 4
    assert found["choices"] == [
        {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
    ]
    assert found["object"] == "text_completion" and found["model"] == served.NAME
    usage = found["usage"]
    assert [usage[f"{kind}_tokens"] for kind in ("prompt", "completion", "total")] == [5, 30, 35]
    options = {"temperature": 2.0, "top_p": 0.9, "seed": 5, "max_tokens": 30}
    drawn = complete(client, **options)["choices"][0]["text"]
    sampling = Sampling(2.0, 0, 0.9)
    assert drawn == generated(checkpoint, PROMPT, capsys, sampling=sampling, seed=5) != text


def test_a_chat_is_that_of_generate(client, checkpoint, capsys):
    found = talk(client, "ab", max_tokens=20)
    text = generated(checkpoint, "ab", capsys, chat=True, max_tokens=20)
    assert found["choices"][0]["message"]["content"] == text
    assert found["object"] == "chat.completion"
    history = f"u:ab;a:{text};u:cd;a:"
    assert found["usage"]["prompt_tokens"] == len("u:ab;a:")
    again = talk(client, "ab", text, "cd", max_completion_tokens=9)
    assert again["choices"][0]["message"]["content"] == generated(
        checkpoint, history, capsys, max_tokens=9
    )
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 20
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    same = talk(client, parts, max_tokens=20)
    assert same["choices"][0]["message"]["content"] == text
    system = [{"role": "developer", "content": "S"}, {"role": "user", "content": "ab"}]
    found = talk(client, messages=system, max_tokens=20)
    assert found["choices"][0]["message"]["content"] == generated(
        checkpoint, "ab", capsys, chat=True, system="S", max_tokens=20
    )


def test_without_a_limit_an_answer_may_fill_the_context(client):
    found = talk(client, "ab")
    assert found["usage"]["total_tokens"] == served.CONFIG.max_position_embeddings
    assert found["choices"][0]["finish_reason"] == "length"
    assert complete(client)["usage"]["completion_tokens"] == 16


def test_a_stream_has_the_same_text(client):
    whole = complete(client, max_tokens=30, n=2, stop=["e"])
    parts = events(client, "/v1/completions", prompt=PROMPT, max_tokens=30, n=2, stop=["e"])
    for index in range(2):
        choices = [c for part in parts for c in part["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in choices) == whole["choices"][index]["text"]
        ends = [c["finish_reason"] for c in choices]
        assert ends[:-1] == [None] * (len(ends) - 1)
        assert ends[-1] == whole["choices"][index]["finish_reason"]
    assert len({part["id"] for part in parts}) == 1
    messages = [{"role": "user", "content": "ab"}]
    usage = {"stream_options": {"include_usage": True}}
    chat = events(client, "/v1/chat/completions", messages=messages, max_tokens=9, **usage)
    assert chat[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["delta"].get("content", "") for part in chat for c in part["choices"])
    assert text == talk(client, "ab", max_tokens=9)["choices"][0]["message"]["content"]
    assert chat[-1]["choices"] == [] and chat[-1]["usage"]["completion_tokens"] == 9
    assert len([c for part in chat for c in part["choices"]]) == 1 + 9 + 1


@pytest.mark.parametrize("length", [1, 3])
def test_a_stop_string_ends_the_text_and_is_no_part_of_it(client, length):
    text = complete(client, max_tokens=30)["choices"][0]["text"]
    stop = text[9 : 9 + length]
    at = text.index(stop)
    found = complete(client, max_tokens=30, stop=stop)
    assert found["choices"][0]["text"] == text[:at]
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == at + length
    never = complete(client, max_tokens=30, stop=["zzz", text[-1] + "zzz"])["choices"][0]
    assert (never["text"], never["finish_reason"]) == (text, "length")


def test_prompts_are_texts_or_tokens_one_or_several(client, source):
    other = "fed."
    texts = [complete(client, prompt=p)["choices"][0]["text"] for p in (PROMPT, other)]
    tokens = [source.tokenizer(p)["input_ids"] for p in (PROMPT, other)]
    for prompt in ([PROMPT, other], tokens, [PROMPT, tokens[1]]):
        found = complete(client, prompt=prompt)
        assert [c["text"] for c in found["choices"]] == texts
        assert found["usage"]["prompt_tokens"] == 9
    assert complete(client, prompt=tokens[0])["choices"][0]["text"] == texts[0]


def test_choices_of_one_prompt_are_drawn_apart(client):
    fields = {"n": 3, "temperature": 2, "seed": 3, "max_tokens": 20, "prompt": [PROMPT, "b"]}
    found = complete(client, **fields)
    texts = [c["text"] for c in found["choices"]]
    assert len(set(texts)) == 6
    assert [c["index"] for c in found["choices"]] == [*range(6)]
    assert found["usage"]["prompt_tokens"] == 6 and found["usage"]["completion_tokens"] == 120
    assert [c["text"] for c in complete(client, **fields)["choices"]] == texts
    assert complete(client, best_of=2, n=2)["choices"][1]["index"] == 1
    free = [complete(client, temperature=2, max_tokens=20)["choices"][0]["text"] for _ in range(2)]
    assert free[0] != free[1]  # without a seed


def full_forward(source, text):
    """Log-probabilities (time, vocab) of next tokens."""
    params = {"layers_0": source.block(0)} | source.outer()
    tokens = source.tokenizer(text)["input_ids"]
    logits = llama.Decoder(source.config).apply({"params": params}, np.array([tokens]))
    return tokens, np.asarray(jax.nn.log_softmax(logits[0]))


def test_logprobs_of_completions(client, source):
    fields = {"logprobs": 2, "echo": True, "max_tokens": 6}
    choice = complete(client, **fields)["choices"][0]
    text, scores = choice["text"], choice["logprobs"]
    assert text.startswith(PROMPT) and len(text) == 11
    assert "".join(scores["tokens"]) == text and scores["text_offset"] == [*range(11)]
    tokens, rows = full_forward(source, text)
    expected = [rows[i, token] for i, token in enumerate(tokens[1:])]
    assert scores["token_logprobs"][0] is None is scores["top_logprobs"][0]
    assert scores["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    for row, top, own in zip(
        rows, scores["top_logprobs"][1:], scores["token_logprobs"][1:], strict=False
    ):
        assert max(top.values()) == pytest.approx(row.max(), abs=1e-4)
        assert 2 <= len(top) <= 3 and own in top.values()
    greedy = [max(top.values()) for top in scores["top_logprobs"][5:]]
    assert greedy == scores["token_logprobs"][5:]
    only = complete(client, **fields | {"max_tokens": 0})["choices"][0]
    assert only["text"] == PROMPT and only["finish_reason"] == "length"
    assert only["logprobs"]["token_logprobs"] == scores["token_logprobs"][:5]
    chosen = complete(client, logprobs=0, max_tokens=6)["choices"][0]["logprobs"]
    assert chosen["token_logprobs"] == pytest.approx(scores["token_logprobs"][5:], abs=1e-5)
    assert chosen["top_logprobs"] is None
    assert complete(client, echo=True, max_tokens=6)["choices"][0]["text"] == text
    assert complete(client, echo=True, max_tokens=0)["choices"][0]["text"] == PROMPT
    parts = events(client, "/v1/completions", prompt=PROMPT, echo=True, max_tokens=6)
    assert "".join(part["choices"][0]["text"] for part in parts) == text


def test_logprobs_of_what_a_stop_string_leaves(client):
    free = complete(client, max_tokens=30, logprobs=1)["choices"][0]
    stop = free["text"][9:12]
    at = free["text"].index(stop)
    cut = complete(client, max_tokens=30, logprobs=1, stop=stop)["choices"][0]
    assert len(cut["logprobs"]["tokens"]) == at == len(cut["text"])
    parts = events(client, "/v1/completions", prompt=PROMPT, max_tokens=30, logprobs=1, stop=stop)
    tokens = [t for part in parts for t in part["choices"][0]["logprobs"]["tokens"]]
    assert tokens == cut["logprobs"]["tokens"]


def test_logprobs_of_a_chat(client):
    choice = talk(client, "ab", max_tokens=5, logprobs=True, top_logprobs=3)["choices"][0]
    scores = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in scores) == choice["message"]["content"]
    for each in scores:
        assert each["bytes"] == list(each["token"].encode())
        assert len(each["top_logprobs"]) == 3
        assert each["top_logprobs"][0]["logprob"] == each["logprob"]
    messages = [{"role": "user", "content": "ab"}]
    fields = {"messages": messages, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    parts = events(client, "/v1/chat/completions", **fields)
    found = [part["choices"][0]["logprobs"] for part in parts]
    assert [each for part in found if part for each in part["content"]] == scores


def test_models(client):
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [served.NAME]
    assert client.get(f"/v1/models/{served.NAME}").json() == listed["data"][0]
    assert client.get("/v1/models/other").status_code == 404
