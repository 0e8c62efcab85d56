"""What the tests of the HTTP API ask, greedily, and that it is answered."""

import json

import served

PROMPT = "ab cd"
GREEDY = {"model": served.NAME, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "a"}]}


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
