"""A process that shares a directory with another: who writes, and where they wait."""

import pytest

from gptvq_jax.files import durable, sharing


@pytest.fixture(params=[0, 1])
def index(request):
    """Of this process, of two; the other one is always there already."""
    waits.clear()
    sharing.join(request.param, 2, lambda: waits.append(1))
    yield request.param
    sharing.join(0, 1, lambda: None)


waits = []


def test_one_of_two_writes_and_both_wait_as_often(index, tmp_path):
    path = tmp_path / "a.txt"
    durable.write_text(path, "text")
    durable.append_lines(tmp_path / "b.jsonl", [{"x": 1}])
    (tmp_path / "c.partial").touch()
    durable.drop_partial(tmp_path)
    assert sharing.writes() == (index == 0) and sharing.count() == 2
    assert [(tmp_path / name).exists() for name in ("a.txt", "b.jsonl")] == [index == 0] * 2
    assert (tmp_path / "c.partial").exists() == (index == 1)
    assert len(waits) == 6


def test_what_the_writer_does_alone_waits_for_nobody(index, tmp_path):
    sharing.by_writer(lambda: durable.write_text(tmp_path / "a.txt", "text"))
    assert (tmp_path / "a.txt").exists() == (index == 0) and len(waits) == 2


def test_an_error_of_the_writer_is_raised_there(index, tmp_path):
    def fail():
        raise ValueError("no")

    if index:
        sharing.by_writer(fail)
    else:
        with pytest.raises(ValueError, match="no"):
            sharing.by_writer(fail)
        sharing.meet()
    assert waits and not list(tmp_path.iterdir())


def test_a_process_alone_waits_for_nobody(tmp_path):
    durable.write_text(tmp_path / "a.txt", "text")
    assert sharing.writes() and sharing.count() == 1 and (tmp_path / "a.txt").read_text() == "text"
