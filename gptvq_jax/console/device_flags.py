"""The flag --devices, which every script has that spreads its work."""

from typing import Any

from absl import flags

flags.disclaim_key_flags()  # what is defined here belongs to the script that asked for it


def define_devices() -> Any:
    """The flag, whose value is for core.mesh.use_devices."""
    return flags.DEFINE_integer(
        "devices", 0, "Devices of this machine to work on; 0: all that JAX shows.", lower_bound=0
    )
