"""What every script shares: flags, quiet logs, and errors of one line instead of a traceback."""

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

# Raised with a message that names the field or file and the fix; anything else is a bug of ours.
_USER_ERRORS = (ValueError, NotImplementedError, OSError)


def run(main: Callable[[list[str]], Any], doc: str | None = None) -> None:
    """Parses the flags, calls main(argv) and exits: 0, 1 after an error, 130 after Ctrl-C.

    A ValueError, NotImplementedError or OSError (a missing file, a full disk) is printed as one
    line; --verbosity=1 shows its traceback.

    Args:
      main: the script's job; what it returns is ignored.
      doc: printed by --help above the flags; default: the docstring of the script.
    """
    if doc is not None:
        sys.modules["__main__"].__doc__ = doc

    def guarded(argv: list[str]) -> int:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; flags look like --name=value")
        _return_freed_memory()
        _quiet_logs()
        _keep_compiled_programs()
        try:
            main(argv)
        except _USER_ERRORS as error:
            if flags.FLAGS.verbosity > 0:
                raise
            _print_error(error)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0

    app.run(guarded, flags_parser=_parse_flags)


def config_name(flag: str = "config") -> str:
    """Name of the file that a config flag was given, with its argument: x.py:4d -> x_4d."""
    from ml_collections import config_flags

    path, _, argument = config_flags.get_config_filename(flags.FLAGS[flag]).partition(":")
    return f"{Path(path).stem}_{argument}" if argument else Path(path).stem


def _return_freed_memory() -> None:
    """Large arrays go back to the system when freed, where the C library is glibc.

    By default it learns to keep blocks of up to 32 MiB, and peak memory drifts with the order in
    which the arrays of a block come and go.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_mmap_threshold = -3  # from malloc.h
        mallopt(m_mmap_threshold, 4 << 20)


def _quiet_logs() -> None:
    """Warnings only, unless --verbosity asks for more; libraries below raise their own levels."""
    handler = absl_logging.get_absl_handler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    if not flags.FLAGS["verbosity"].present:
        handler.setLevel(logging.WARNING)


def _keep_compiled_programs() -> None:
    """Compiles each program once per machine; JAX_COMPILATION_CACHE_DIR chooses another place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "gptvq_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # --config.field=value without such a field
        text = str(error.args[0]).replace("\\n", ". ").replace("\\'", "'").strip("'")
        _print_error(f"no such field of the config: '{text}; gptvq_jax/config.py lists all")
    except flags.Error as error:
        # What a config file raised comes with its traceback, of which the last line says it all.
        _print_error([line for line in str(error).splitlines() if line.strip()][-1])
    sys.exit(1)


def _print_error(error: Any) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
