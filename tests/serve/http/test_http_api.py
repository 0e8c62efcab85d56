"""The HTTP API: what it answers, what it refuses, and that texts are those of generate.py."""

import json
import re
import time

import jax
import numpy as np
import pytest

pytest.importorskip("starlette")
import served  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from gptvq_jax.models import llama  # noqa: E402
from gptvq_jax.serve.answer import Answer  # noqa: E402
from gptvq_jax.serve.engine_thread import EngineThread  # noqa: E402
from gptvq_jax.serve.generate_text import generate_text  # noqa: E402
from gptvq_jax.serve.http.app import make_app  # noqa: E402
from gptvq_jax.serve.http.service import Service  # noqa: E402
from gptvq_jax.serve.requests import Request  # noqa: E402
from gptvq_jax.serve.sampling import Sampling  # noqa: E402
from gptvq_jax.storage.checkpoint import PackedCheckpoint  # noqa: E402

PROMPT = "ab cd"
GREEDY = {"model": served.NAME, "temperature": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return served.write_model(tmp_path_factory.mktemp("checkpoint") / served.NAME)


@pytest.fixture(scope="module")
def source(checkpoint):
    return PackedCheckpoint(checkpoint)


@pytest.fixture(scope="module")
def service(source):
    engine = served.make_engine(source)
    thread = EngineThread(engine)
    thread.gate = served.Gate(engine)
    made = Service(source, thread, served.NAME)
    yield made
    made.close()
    assert thread.join(20)


@pytest.fixture(scope="module")
def client(service):
    with TestClient(make_app(service)) as made:
        yield made


@pytest.fixture(autouse=True)
def no_slot_is_lost(service):
    yield
    for _ in range(1000):
        if not service.thread.engine.num_jobs:
            return
        time.sleep(0.01)
    pytest.fail("a request is still there")


def complete(client, **fields):
    answer = client.post("/v1/completions", json=GREEDY | {"prompt": PROMPT} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def talk(client, *contents, **fields):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    answer = client.post("/v1/chat/completions", json=GREEDY | {"messages": messages} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client, path, **fields):
    body = GREEDY | {"stream": True} | fields
    with client.stream("POST", path, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


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


CHAT = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    "path, fields, status, param, message",
    [
        ("completions", {"model": None}, 400, "model", "model is missing"),
        ("completions", {"model": "gpt-4"}, 404, "model", "no model 'gpt-4'; this server has"),
        ("completions", {"model": 4}, 400, "model", "model must be a text, not 4"),
        ("completions", {"prompt": None}, 400, "prompt", "prompt is missing"),
        ("completions", {"prompt": ""}, 400, "prompt", "prompt is empty"),
        ("completions", {"prompt": []}, 400, "prompt", "must be a text, token ids, or a list"),
        ("completions", {"prompt": [[]]}, 400, "prompt", "none empty"),
        ("completions", {"prompt": [1, "a"]}, 400, "prompt", "must be a text, token ids"),
        ("completions", {"prompt": [True]}, 400, "prompt", "must be a text, token ids"),
        ("completions", {"prompt": {"a": 1}}, 400, "prompt", "must be a text, token ids"),
        ("completions", {"prompt": [-1]}, 400, "prompt", "has the token -1"),
        ("completions", {"prompt": [258]}, 400, "prompt", "ids are below 258"),
        ("completions", {"prompt": [10**30]}, 400, "prompt", "ids are below 258"),
        ("completions", {"prompt": "\ud800"}, 400, "prompt", "not UTF-8"),
        ("completions", {"prompt": "a" * 192}, 400, "prompt", "192 tokens; .* context of 192"),
        ("completions", {"max_tokens": 188}, 400, "max_tokens", "5 tokens; with 188 more"),
        ("completions", {"max_tokens": -1}, 400, "max_tokens", "whole number from 1 to"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens", "whole number from 1 to"),
        ("completions", {"max_tokens": 1.5}, 400, "max_tokens", "not 1.5"),
        ("completions", {"max_tokens": True}, 400, "max_tokens", "not True"),
        ("completions", {"temperature": -0.1}, 400, "temperature", "a number from 0 to 2"),
        ("completions", {"temperature": "hot"}, 400, "temperature", "not 'hot'"),
        ("completions", {"top_p": 0}, 400, "top_p", "top_p must be above 0"),
        ("completions", {"top_p": 1.01}, 400, "top_p", "a number from 0 to 1"),
        ("completions", {"top_k": -1}, 400, "top_k", "a whole number from 0"),
        ("completions", {"n": 0}, 400, "n", "a whole number from 1 to 128"),
        ("completions", {"n": 100}, 400, "n", "asks for 100 texts; the server takes 63"),
        ("completions", {"prompt": ["a"] * 70}, 400, "prompt", "asks for 70 texts"),
        ("completions", {"best_of": 2}, 400, "best_of", "best_of = 2 is not supported"),
        ("completions", {"seed": -1}, 400, "seed", "a whole number from 0 to 4294967295"),
        ("completions", {"stop": ""}, 400, "stop", "none empty"),
        ("completions", {"stop": ["a"] * 17}, 400, "stop", "up to 16"),
        ("completions", {"stop": 3}, 400, "stop", "must be a text or up to 16"),
        ("completions", {"logprobs": 21}, 400, "logprobs", "from 0 to 20"),
        ("completions", {"logprobs": True}, 400, "logprobs", "not True"),
        ("completions", {"stream": "yes"}, 400, "stream", "must be true or false, not 'yes'"),
        ("completions", {"stream_options": {}}, 400, "stream_options", "add stream = true"),
        (
            "completions",
            {"stream": True, "stream_options": {"x": 1}},
            400,
            "stream_options",
            "may have include_usage",
        ),
        (
            "completions",
            {"stream": True, "echo": True, "logprobs": 1},
            400,
            "echo",
            "with logprobs and stream is not supported",
        ),
        ("completions", {"suffix": "b"}, 400, "suffix", "suffix = 'b' is not supported"),
        ("completions", {"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ("completions", {"frequency_penalty": 1}, 400, "frequency_penalty", "not supported"),
        ("completions", {"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        ("completions", {"max_token": 5}, 400, "max_token", "nearest is 'max_tokens'"),
        ("completions", {"messages": []}, 400, "messages", "there is no field 'messages'"),
        ("chat/completions", {"prompt": "a"}, 400, "prompt", "there is no field 'prompt'"),
        ("chat/completions", {"messages": None}, 400, "messages", "messages is missing"),
        ("chat/completions", {"messages": []}, 400, "messages", "must be a list of messages"),
        ("chat/completions", {"messages": ["a"]}, 400, "messages[0]", "must be an object"),
        (
            "chat/completions",
            {"messages": [{"role": "tool", "content": "a"}]},
            400,
            "messages[0].role",
            "must be one of system, developer, user, assistant, not 'tool'",
        ),
        (
            "chat/completions",
            {"messages": [{"role": [], "content": "a"}]},
            400,
            "messages[0].role",
            "must be one of",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user"}]},
            400,
            "messages[0].content",
            "must be a text",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content",
            "a part that is no text",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "refuse"}]},
            400,
            "messages",
            "chat template fails: no",
        ),
        ("chat/completions", {"tools": [{}]}, 400, "tools", "is not supported"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, None, "supported"),
        ("chat/completions", {"reasoning_effort": "low"}, 400, "reasoning_effort", "supported"),
        ("chat/completions", {"max_tokens": 187}, 400, "max_tokens", "with 187 more it does not"),
        (
            "chat/completions",
            {"max_tokens": 7, "max_completion_tokens": 8},
            400,
            "max_tokens",
            "contradicts max_completion_tokens",
        ),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "add logprobs = true"),
        ("chat/completions", {"logprobs": 1}, 400, "logprobs", "must be true or false"),
    ],
)
def test_what_is_wrong_is_named(client, path, fields, status, param, message):
    base = GREEDY | (CHAT if path.startswith("chat") else {"prompt": PROMPT})
    content = json.dumps(base | fields)
    headers = {"content-type": "application/json"}
    answer = client.post(f"/v1/{path}", content=content, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param in (None, error["param"])
    assert re.search(message, error["message"]) and "\n" not in error["message"]


def test_fields_that_change_nothing_are_taken(client):
    neutral = {
        "user": "me",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "suffix": None,
        "best_of": 1,
        "logprobs": None,
        "stop": None,
    }
    assert complete(client, **neutral)["choices"] == complete(client)["choices"]
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "store": False,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
    }
    assert talk(client, "a", max_tokens=5, **neutral)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "nested too deep|not valid JSON"),
        (b"[1]", r"holds \[1\], not an object"),
        (b'"text"', "not an object"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature must be a number"),
        (b'{"model": "tiny", "prompt": "a", "top_p": 1e999}', "top_p must be a number"),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', "there is no field"),
    ],
)
def test_bodies_that_are_no_request(client, content, message):
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"]["message"])


def test_other_ways_to_ask_wrongly(client):
    text = {"content-type": "text/plain"}
    assert client.post("/v1/completions", content=b"{}", headers=text).status_code == 415
    large = b'{"prompt": "' + b"a" * (2**20 + 2**14) + b'"}'
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=large, headers=headers)
    assert answer.status_code == 413 and "shorten the prompt" in answer.json()["error"]["message"]
    for method, path in (("GET", "/v1/completions"), ("GET", "/"), ("POST", "/v1/models")):
        answer = client.request(method, path)
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["message"] == f"there is no {method} {path}"


def test_a_key(service):
    with TestClient(make_app(service, "secret")) as client:
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            posted = client.post("/v1/completions", content=b"", headers=headers)
            assert posted.status_code == 401
        good = {"authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=good).status_code == 200


def test_a_full_queue(client, service):
    with service.thread.gate.closed():
        jobs = service.thread.submit(*waiting(service, 63))
        fields = GREEDY | {"prompt": PROMPT}
        answer = client.post("/v1/completions", json=fields)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        # None of them has ended in 20 seconds: so long does the next place take.
        service.thread.engine._queue._departures._start -= 20
        answer = client.post("/v1/completions", json=fields | {"n": 2})
        assert answer.status_code == 429 and 40 <= int(answer.headers["retry-after"]) <= 60
        for job in jobs:
            job.cancel()


def waiting(service, count):
    answer = Answer(service.tokenizer, (5,), (), lambda piece: None)
    return [(Request((5,), 10), answer)] * count


def test_a_model_without_a_chat_template(service, client, monkeypatch):
    monkeypatch.setattr(service.tokenizer, "chat_template", None)
    answer = client.post("/v1/chat/completions", json=GREEDY | CHAT)
    assert answer.status_code == 400
    assert "ask /v1/completions" in answer.json()["error"]["message"]


def test_a_step_that_fails_is_an_error_of_the_server(client, monkeypatch):
    monkeypatch.setattr("gptvq_jax.serve.slot_programs.step", lambda *_: 1 / 0)
    answer = client.post("/v1/completions", json=GREEDY | {"prompt": PROMPT})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "division by zero (ZeroDivisionError)"
    body = GREEDY | {"prompt": PROMPT, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        last = [line for line in answer.iter_lines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
