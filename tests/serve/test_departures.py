"""How long a request that finds no room is told to wait."""

from gptvq_jax.serve import departures
from gptvq_jax.serve.departures import Departures


def after(*times):
    """Departures that begin at 0 and end at these times, and their clock."""
    now = [0.0]
    found = Departures(lambda: now[0])
    found.begin()
    for now[0] in times:
        found.note()
    return found, now


def test_the_pace_of_the_latest_ends_goes_on():
    found, _ = after(2.0, 4.0, 6.0)
    assert [found.seconds_until(count) for count in (1, 2, 5)] == [2, 4, 10]


def test_where_none_ended_it_is_what_was_waited():
    found, now = after()
    assert found.seconds_until(1) == 1  # never at once
    now[0] = 7.5
    assert (found.seconds_until(1), found.seconds_until(3)) == (8, 23)


def test_a_pace_that_has_become_slow_is_told():
    found, now = after(0.1, 0.2)
    assert found.seconds_until(4) == 1
    now[0] = 20.0
    assert found.seconds_until(4) == 40


def test_no_more_than_ten_minutes_are_said():
    found, now = after()
    now[0] = 1000.0
    assert found.seconds_until(9) == 600


def test_ends_before_a_pause_do_not_count():
    found, now = after(1.0, 2.0)
    now[0] = 5000.0
    found.begin()
    now[0] = 5003.0
    found.note()
    assert found.seconds_until(2) == 6


def test_old_ends_are_forgotten(monkeypatch):
    monkeypatch.setattr(departures, "_KEPT", 2)
    found, _ = after(100.0, 101.0, 102.0)
    assert found.seconds_until(3) == 3
