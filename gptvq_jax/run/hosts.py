"""Several processes, one for each host, that do a run together (`jax.distributed`).

Every process runs the same program. Batches and rows are spread over the devices of all (spread.py,
methods/devices.py); one process writes, and all wait for each other where it does
(files/sharing.py).
"""

import hashlib
import json
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptvq_jax.console.errors import first_line
from gptvq_jax.files import sharing

# Until a process that says nothing counts as gone, and until all must have come.
HEARTBEAT_SECONDS, START_SECONDS = 30, 300


def join_hosts(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several; the first of them writes and reports.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: of this one, from 0. None for any of these: as the cluster says, which
        `jax.distributed` asks (Cloud TPU, Slurm, Open MPI, Kubernetes).

    Raises:
      ValueError: the cluster does not say, or the others did not come.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:  # it raises whatever the cluster or the network gave it
        raise ValueError(
            f"--distributed: {first_line(error)}; start the same command on every host within "
            f"{START_SECONDS} s, with --coordinator=HOST:PORT of process 0, --num_processes and "
            "--process_id where no cluster says them"
        ) from None
    if jax.process_count() == 1:
        return
    sharing.join(jax.process_index(), jax.process_count(), _wait)
    if not sharing.writes():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process


def _wait() -> None:
    multihost_utils.sync_global_devices("gptvq_jax")


def check_same(settings: dict[str, Any]) -> None:
    """Refuses processes that were started with different settings.

    Raises:
      ValueError: another process has others.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(settings, sort_keys=True, default=str)
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(own)
    others = [index for index, of in enumerate(every) if (of != every[0]).any()]
    if others:
        raise ValueError(
            f"process {others[0]} has other settings, or another model, than process 0; give the "
            "same command on every host"
        )
