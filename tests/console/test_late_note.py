"""A line comes where something takes long, and only there."""

import time

from gptvq_jax.console.late_note import late_note


def test_what_takes_long_is_told_once(capsys):
    with late_note("compiling ...", seconds=0.01):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "compiling ...\n")


def test_what_is_quick_or_shows_something_is_not(capsys):
    with late_note("compiling ...", seconds=0.1):
        pass
    with late_note("compiling ...", seconds=0.1) as shown:
        shown()
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "")
