"""A service and a client of it, for the tests of a file; no test may leave a request."""

import time

import pytest
import served

from gptvq_jax.serve.engine_thread import EngineThread
from gptvq_jax.storage.checkpoint import PackedCheckpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return served.write_model(tmp_path_factory.mktemp("checkpoint") / served.NAME)


@pytest.fixture(scope="module")
def source(checkpoint):
    return PackedCheckpoint(checkpoint)


@pytest.fixture(scope="module")
def service(source):
    from gptvq_jax.serve.http.service import Service

    engine = served.make_engine(source)
    thread = EngineThread(engine)
    thread.gate = served.Gate(engine)
    made = Service(source, thread, served.NAME)
    yield made
    made.close()
    assert thread.join(20)


@pytest.fixture(scope="module")
def client(service):
    from starlette.testclient import TestClient

    from gptvq_jax.serve.http.app import make_app

    with TestClient(make_app(service)) as made:
        yield made


@pytest.fixture
def no_slot_is_lost(service):
    yield
    for _ in range(1000):
        if not service.thread.engine.num_jobs:
            return
        time.sleep(0.01)
    pytest.fail("a request is still there")
