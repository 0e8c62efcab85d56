"""The HTTP API: what it refuses, and with which words."""

import json
import re

import pytest

pytest.importorskip("starlette")
from asking import CHAT, GREEDY, PROMPT, complete, talk  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from gptvq_jax.serve.answer import Answer  # noqa: E402
from gptvq_jax.serve.http.app import make_app  # noqa: E402
from gptvq_jax.serve.requests import Request  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_slot_is_lost")


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
