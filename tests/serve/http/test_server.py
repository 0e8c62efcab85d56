"""A real server on a real port: many clients, broken ones, the ends of it."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn")
import served  # noqa: E402
import uvicorn  # noqa: E402
from documented import REPOSITORY, python_blocks  # noqa: E402

from gptvq_jax.serve.engine_thread import EngineThread  # noqa: E402
from gptvq_jax.serve.http import server as job  # noqa: E402
from gptvq_jax.serve.http.app import make_app  # noqa: E402
from gptvq_jax.serve.http.server import is_loopback, listen, serve  # noqa: E402
from gptvq_jax.serve.http.service import Service  # noqa: E402
from gptvq_jax.serve.requests import Request  # noqa: E402
from gptvq_jax.serve.served_model import ServedModel  # noqa: E402
from gptvq_jax.storage.checkpoint import PackedCheckpoint  # noqa: E402

SCRIPT = REPOSITORY / "scripts/serve.py"
NOBODY = SimpleNamespace(on_token=lambda *_: False, on_end=lambda _: None)
GREEDY = {"model": served.NAME, "temperature": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return served.write_model(tmp_path_factory.mktemp("checkpoint") / served.NAME)


@pytest.fixture(scope="module")
def live(checkpoint):
    """(port, service) of a server in a thread of its own."""
    source = PackedCheckpoint(checkpoint)
    engine = served.make_engine(source)
    engine.warm_up()
    thread = EngineThread(engine)
    thread.gate = served.Gate(engine)
    service = Service(source, thread, served.NAME)
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(make_app(service), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    runner = threading.Thread(target=server.run, args=([listener],))
    runner.start()
    yield listener.getsockname()[1], service
    server.should_exit = True
    service.close()
    runner.join(20)
    assert thread.join(20)


def post(port, path="/v1/completions", timeout=60, **fields):
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        body = json.dumps(GREEDY | fields)
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def text_of(answer):
    status, content = answer
    assert status == 200, content
    return json.loads(content)["choices"][0]["text"]


def settled(service):
    """Waits until no request is left."""
    for _ in range(2000):
        if not service.thread.engine.num_jobs:
            return True
        time.sleep(0.01)
    return False


PROMPTS = [("abc def. " * (i % 4) + "fa" * (i % 7) + "b", 5 + i % 11) for i in range(50)]


@pytest.fixture(scope="module")
def texts(live):
    """Of PROMPTS, one by one."""
    port, _ = live
    return [text_of(post(port, prompt=p, max_tokens=n)) for p, n in PROMPTS]


def test_50_clients_at_once_get_what_each_gets_alone(live, texts):
    port, service = live
    before = service.thread.engine.counts.steps
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda p: text_of(post(port, prompt=p[0], max_tokens=p[1])), PROMPTS))
    assert found == texts and len(set(texts)) > 20
    made = sum(n for _, n in PROMPTS)
    assert service.thread.engine.counts.steps - before < made  # some went together
    assert settled(service)


def hang_up(port, rng, streaming):
    """Sends a request, or a part of one, reads some of the answer or none, and goes."""
    body = json.dumps(GREEDY | {"prompt": "ab", "max_tokens": 150, "stream": streaming}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    whole = head + body
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(whole[: rng.choice([len(head) // 2, len(head) + 3, len(whole)])])
        time.sleep(rng.uniform(0, 0.05))
        if rng.random() < 0.3:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize("streaming", [False, True])
def test_who_hangs_up_frees_the_slot(live, streaming):
    port, service = live
    gate = service.thread.gate
    body = json.dumps(GREEDY | {"prompt": "ab", "max_tokens": 150, "stream": streaming})
    before = service.thread.engine.counts.decoded
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    with gate.closed():
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        while not service.thread.engine.num_jobs:
            time.sleep(0.01)
        (cancelled,) = service.thread.engine._queue.waiting or service.thread.engine._slots.jobs
        connection.sock.close()
        connection.close()
        for _ in range(1000):
            if cancelled.cancelled:
                break
            time.sleep(0.01)
    assert cancelled.cancelled and settled(service)
    assert service.thread.engine.counts.decoded - before < 149


def test_random_hang_ups_cost_nobody_else_anything(live, texts):
    port, service = live
    rng = random.Random(0)
    with ThreadPoolExecutor(16) as pool:
        broken = [pool.submit(hang_up, port, rng, i % 2 == 0) for i in range(40)]
        good = [
            pool.submit(lambda p=p: text_of(post(port, prompt=p[0], max_tokens=p[1])))
            for p in PROMPTS[:20]
        ]
        assert [each.result() for each in good] == texts[:20]
        for each in broken:
            each.result()
    assert settled(service)


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_1000_requests_with_every_tenth_killed_leave_nothing_behind(live):
    port, service = live
    rng = random.Random(1)

    def ask(index):
        if index % 10 == 0:
            hang_up(port, rng, index % 20 == 0)
        else:
            assert text_of(post(port, prompt="ab", max_tokens=5, temperature=1))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(300)))
        assert settled(service)
        before = resident_mib()
        list(pool.map(ask, range(1000)))
    assert settled(service)
    assert resident_mib() < before + 16
    with service.thread.gate.closed():  # every slot and every place in the queue is there
        jobs = service.thread.submit(*[(Request((5,), 1), NOBODY)] * 63)
        assert service.thread.engine.num_jobs == 63
        for job_ in jobs:
            job_.cancel()
    assert settled(service)


def test_a_client_that_does_not_read_holds_nobody_up(live, texts):
    port, service = live
    body = json.dumps(GREEDY | {"prompt": "ab", "max_tokens": 180, "stream": True})
    slow = HTTPConnection("127.0.0.1", port, timeout=60)
    slow.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    assert text_of(post(port, prompt=PROMPTS[5][0], max_tokens=PROMPTS[5][1])) == texts[5]
    assert settled(service)  # what it was to read is made, and waits for it
    answer = slow.getresponse().read().decode()
    slow.close()
    assert answer.endswith("data: [DONE]\n\n")


def test_a_checkpoint_that_is_removed_is_still_served(live, checkpoint, texts, tmp_path):
    port, _ = live
    away = shutil.move(checkpoint, tmp_path / "away")
    try:
        assert text_of(post(port, prompt=PROMPTS[9][0], max_tokens=PROMPTS[9][1])) == texts[9]
    finally:
        shutil.move(away, checkpoint)


def test_the_openai_client(live, texts):
    openai = pytest.importorskip("openai")
    port, service = live
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [served.NAME]
        assert client.models.retrieve(served.NAME).owned_by == "gptvq_jax"
        prompt, count = PROMPTS[8]
        options = {"model": served.NAME, "temperature": 0, "max_tokens": count}
        made = client.completions.create(prompt=prompt, logprobs=2, **options)
        assert made.choices[0].text == texts[8]
        assert len(made.choices[0].logprobs.token_logprobs) == count
        stream = client.completions.create(prompt=prompt, stream=True, **options)
        assert "".join(part.choices[0].text for part in stream) == texts[8]
        messages = [{"role": "user", "content": "ab"}]
        chat = client.chat.completions.create(
            messages=messages, logprobs=True, top_logprobs=2, n=2, seed=1, **options
        )
        text = chat.choices[1].message.content
        assert len(text) == count and len(chat.choices[0].logprobs.content) == count
        usage = {"include_usage": True}
        parts = list(
            client.chat.completions.create(
                messages=messages, stream=True, stream_options=usage, **options
            )
        )
        pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
        assert "".join(pieces) == text and parts[-1].usage.completion_tokens == count
        with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
            client.completions.create(prompt="a", **options | {"model": "other"})
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(prompt="a", presence_penalty=1, **options)
        assert error.value.param == "presence_penalty"
        with service.thread.gate.closed():
            fill = openai.OpenAI(base_url=url, api_key="none", max_retries=0).with_options(
                timeout=9
            )
            with ThreadPoolExecutor(1) as pool, fill:
                first = pool.submit(
                    fill.completions.create, prompt=["a"] * 63, **options | {"max_tokens": 1}
                )
                while service.thread.engine.num_jobs < 63:
                    time.sleep(0.01)
                with pytest.raises(openai.RateLimitError):
                    client.completions.create(prompt="a", **options)
                service.thread.gate.open()
                assert len(first.result().choices) == 63


def test_the_example_of_the_docs(live, capsys):
    pytest.importorskip("openai")
    port, _ = live
    (code,) = python_blocks((REPOSITORY / "docs/serving.md").read_text())
    assert ":8000/" in code
    names = {}
    exec(code.replace(":8000/", f":{port}/"), names)
    names["client"].close()
    answer = post(port, "/v1/chat/completions", messages=names["messages"], max_tokens=40)
    assert capsys.readouterr().out == json.loads(answer[1])["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_lm_eval_over_http_agrees_with_lm_eval_on_the_weights(live, checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    for library in ("aiohttp", "requests", "tenacity"):
        pytest.importorskip(library)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import lm_eval
    import local_tasks
    from lm_eval.tasks import TaskManager

    from gptvq_jax.serve.harness import HarnessModel

    port, service = live
    path = local_tasks.write_tasks(tmp_path / "tasks")
    manager = TaskManager(include_path=str(path), include_defaults=False)
    tasks = [f"local_{name}" for name in ("choice", "letters", "continue")]
    # Its own client leaves a place for the token that it asks for, and cuts prompts to the rest.
    arguments = {
        "model": served.NAME,
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer": str(checkpoint / "tokenizer"),
        "tokenizer_backend": "huggingface",
        "max_length": 192,
        "num_concurrent": 4,
        "batch_size": 2,
        "max_retries": 1,
    }
    over_http = lm_eval.simple_evaluate(
        "local-completions", model_args=arguments, tasks=tasks, task_manager=manager
    )
    model = HarnessModel(ServedModel(str(checkpoint), None, "xla"), 4, 191)
    on_weights = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager)
    for task in tasks:
        rows = zip(over_http["samples"][task], on_weights["samples"][task], strict=True)
        for one, other in rows:
            assert one["arguments"] == other["arguments"]
            for (answer,), (expected,) in zip(one["resps"], other["resps"], strict=True):
                if isinstance(expected, str):
                    assert answer == expected
                else:
                    assert answer[0] == pytest.approx(expected[0], abs=1e-3)
                    assert answer[1] == expected[1]
    assert settled(service)


def test_the_name_of_a_model_is_that_of_its_directory_or_run(checkpoint, tmp_path):
    assert ServedModel(str(checkpoint), None).name == served.NAME
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/checkpoint").symlink_to(checkpoint)
    assert ServedModel(str(tmp_path / "mine/checkpoint"), None).name == "mine"


def test_which_addresses_are_this_machine_alone():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.1", "example.com", "")))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"host": "0.0.0.0"}, "--host=0.0.0.0 lets other machines in; add --api_key=KEY"),
        ({"host": "example.com"}, "--host=example.com lets other machines in"),
        ({"host": "256.0.0.1", "api_key": "k"}, "--host=256.0.0.1 is no address"),
        ({"port": 65536}, "--port=65536 must be from 0"),
        ({"port": -1}, "--port=-1 must be from 0"),
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"queue": -1}, "queue=-1 must be at least 0"),
        ({"context": 193}, "context=193 must be from 2 to 192"),
        ({"checkpoint": None}, "either --checkpoint=DIR or --model=NAME"),
    ],
)
def test_bad_options_are_refused_before_the_weights_are_read(
    checkpoint, options, message, monkeypatch
):
    monkeypatch.setattr("gptvq_jax.serve.served_model.ServedModel.params", None)
    arguments = {"checkpoint": str(checkpoint), "model": None} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        serve(**arguments)


def test_a_port_in_use(checkpoint, live):
    port, _ = live
    with pytest.raises(ValueError, match=f"cannot listen at port {port} of 127.0.0.1: .* in use"):
        serve(str(checkpoint), None, port=port)


def test_of_two_servers_at_once_the_second_ends():
    with listen("127.0.0.1", 0) as first, pytest.raises(ValueError, match="in use"):
        listen("127.0.0.1", first.getsockname()[1])


def test_without_its_libraries(monkeypatch):
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ValueError, match="not installed: starlette, uvicorn; .*requirements-serve.txt"
    ):
        serve("DIR", None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_script_until_it_is_told_to_stop(checkpoint, number):
    words = [sys.executable, str(SCRIPT), f"--checkpoint={checkpoint}", "--port=0", "--slots=2"]
    words += ["--implementation=reference", "--name=mine"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        line = process.stdout.readline()
        said = r"model 'mine' at http://127\.0\.0\.1:(\d+)/v1: 2 slots, context 192, caches of "
        said += r"0\.1 to 0\.1 MiB; Ctrl-C stops it"
        port = int(re.match(said, line)[1])
        assert text_of(post(port, prompt="ab", model="mine", max_tokens=5))
        body = json.dumps({"model": "mine", "prompt": "ab", "max_tokens": 180, "stream": True})
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.readline()
        process.send_signal(number)
        rest = answer.read().decode()
        answer.close()
        connection.close()
        assert "[DONE]" in rest or "the server stops" in rest
        out, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors and out == ""
    if number == signal.SIGINT:
        assert process.returncode == 130 and errors.endswith("interrupted\n")
    else:
        assert process.returncode == -signal.SIGTERM
