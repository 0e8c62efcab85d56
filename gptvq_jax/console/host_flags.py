"""The flags of a script that several hosts may do together, and who watches over it there.

A process whose partner has died may be ended by C++ code, from within a collective operation. So
the script starts itself once more, and the first process says what became of the second.
"""

import ctypes
import os
import signal
import subprocess
import sys

from absl import flags

from gptvq_jax.files import sharing

flags.disclaim_key_flags()  # what is defined here belongs to the script that asked for it

_WATCHED = "GPTVQ_JAX_WATCHED"
_LOST = (
    "another process of this run has ended, and so does this one; give the same command on every "
    "host again: the run goes on after its last finished block"
)


class Hosts:
    """The flags --distributed, --coordinator, --num_processes and --process_id."""

    def __init__(self) -> None:
        self._distributed = flags.DEFINE_bool(
            "distributed",
            False,
            "Be one of several processes, one for each host, on one work directory.",
        )
        self._coordinator = flags.DEFINE_string(
            "coordinator", None, "HOST:PORT of process 0; default: as the cluster says."
        )
        self._count = flags.DEFINE_integer(
            "num_processes", None, "How many there are; default: as the cluster says.", 1
        )
        self._index = flags.DEFINE_integer(
            "process_id", None, "Of this one, from 0; default: as the cluster says.", 0
        )

    def place(self) -> tuple[str | None, int | None, int | None] | None:
        """The coordinator, how many processes there are, and the number of this one, for
        run.hosts.join_hosts; None without --distributed.

        Raises:
          ValueError: the flags do not fit each other.
        """
        named = (self._coordinator, self._count, self._index)
        given = [f"--{flag.name}" for flag in named if flag.value is not None]
        if not self._distributed.value:
            if given:
                raise ValueError(f"{given[0]} has no effect without --distributed; add it")
            return None
        if 0 < len(given) < len(named):
            missing = next(f"--{flag.name}" for flag in named if flag.value is None)
            raise ValueError(f"{given[0]} needs {missing} beside it, or leave all three out")
        if self._count.value is not None and self._index.value >= self._count.value:
            raise ValueError(
                f"--process_id={self._index.value} must be below --num_processes="
                f"{self._count.value}"
            )
        if _WATCHED not in os.environ:
            sys.stdout.flush()
            os._exit(_watch())
        _die_with_parent()
        return self._coordinator.value, self._count.value, self._index.value


def lost_others(error: BaseException) -> ValueError | None:
    """The line for an error of JAX's that the end of another process has caused; None: another."""
    if sharing.count() == 1:
        return None
    import jax

    return ValueError(_LOST) if isinstance(error, jax.errors.JaxRuntimeError) else None


def _watch() -> int:
    """Runs this command once more; its status, after a line where C++ code has ended it."""
    child = subprocess.Popen(sys.orig_argv, env=os.environ | {_WATCHED: "1"})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: child.send_signal(number))
    status = child.wait()
    if status == -signal.SIGABRT:
        print(f"error: {_LOST}", file=sys.stderr, flush=True)
        return 1
    return status if status >= 0 else 128 - status


def _die_with_parent() -> None:
    """On Linux: without the process that watches, nobody would end this one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def define_hosts() -> Hosts:
    """Defines the flags."""
    return Hosts()
