"""What every script shares: flags, quiet logs, and errors of one line instead of a traceback.

This file imports nothing that takes long: from its import on, Ctrl-C ends a script in one line.
"""

import atexit
import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it: 128 + SIGINT
_BROKEN_PIPE = 141  # likewise after SIGPIPE: nobody reads the output any more


class _Interrupts:
    """Ctrl-C: the first asks the script to stop, the next does not wait for it."""

    def __init__(self):
        self.seen = False
        self.at_exit = False  # the job is done: nothing is left that could stop in order

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.on_signal)
        sys.unraisablehook = self.unraisable
        threading.excepthook = self.in_thread

    def ignore(self) -> None:
        """While Python shuts down it would give Ctrl-C back to the system, which kills it."""
        if signal.getsignal(signal.SIGINT) == self.on_signal:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.unraisablehook = sys.__unraisablehook__  # ours has no modules left by then

    def on_signal(self, _, frame) -> None:
        if self.seen or self.at_exit or _imports(frame):
            leave(_INTERRUPTED, "interrupted")
        self.seen = True
        raise KeyboardInterrupt

    def unraisable(self, unraisable) -> None:
        """What is raised in a finalizer or a callback, Python drops: Ctrl-C must not get lost."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            leave(_INTERRUPTED, "interrupted")
        # What breaks off in the middle leaves finalizers that complain, and so does a closed pipe.
        if not self.seen and not isinstance(unraisable.exc_value, BrokenPipeError):
            sys.__unraisablehook__(unraisable)

    def in_thread(self, arguments) -> None:
        """Nor do threads complain whose files are cleared away after Ctrl-C."""
        if not self.seen:
            threading.__excepthook__(arguments)

    def worth_logging(self, record) -> bool:
        """Nor do they log it."""
        return not self.seen

    def uncaught(self, kind, error, traceback) -> None:
        """While the script is imported, and its flags are parsed."""
        if self.seen or issubclass(kind, KeyboardInterrupt):
            leave(_INTERRUPTED, "interrupted")
        sys.__excepthook__(kind, error, traceback)


def _imports(frame) -> bool:
    """Whether a module is being imported: one in C++ may abort if that ends in an exception."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def show(text: str) -> None:
    """Prints a text; where it cannot be written, ends the process as `run` does."""
    with _written_output():
        print(text)


def leave(status: int, line: str = "") -> None:
    """Ends the process at once: no thread is waited for, none gets to print a traceback."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        start = "\n" if bars is not None and bars._instances else ""
        print(start + line, end="\n" if line else "", file=sys.stderr, flush=True)
    os._exit(status)


_interrupts = _Interrupts()
sys.excepthook = _interrupts.uncaught
atexit.register(_interrupts.ignore)  # the first to be registered is the last to be called

from absl import app, flags  # noqa: E402 - Ctrl-C is one line from here on
from absl import logging as absl_logging  # noqa: E402

from gptvq_jax.console.flag_values import in_words  # noqa: E402
from gptvq_jax.console.freed_memory import return_freed_memory  # noqa: E402
from gptvq_jax.console.host_flags import lost_others  # noqa: E402
from gptvq_jax.console.repeatable import ask_for_repeatable_results  # noqa: E402

flags.disclaim_key_flags()  # what is defined here belongs to the script that asked for it

# Raised with a message that names the field or file and the fix; anything else is a bug of ours.
_USER_ERRORS = (ValueError, NotImplementedError, OSError)


def run(main: Callable[[list[str]], Any], doc: str | None = None) -> None:
    """Parses the flags, calls main(argv) and exits: 0, 1 after an error, 130 after Ctrl-C.

    A ValueError, NotImplementedError or OSError (a missing file, a full disk) is printed as one
    line; --verbosity=1 shows its traceback. Where the reader of the output has gone (`| head`), the
    script ends without a word. What the terminal cannot show is printed as "?".

    Args:
      main: the script's job; what it returns is ignored.
      doc: printed by --help above the flags; default: the docstring of the script.
    """
    if doc is not None:
        sys.modules["__main__"].__doc__ = doc
    _interrupts.install()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def guarded(argv: list[str]) -> int:
        try:
            if len(argv) > 1:
                raise ValueError(
                    f"unexpected argument {argv[1]!r}; flags look like --name=value, and --help "
                    "lists them"
                )
            _refuse_empty_flags()
            return_freed_memory()
            ask_for_repeatable_results()
            _quiet_logs()
            _keep_compiled_programs()
            main(argv)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BaseException as error:
            if _interrupts.seen or _comes_from(error, KeyboardInterrupt):
                leave(_INTERRUPTED, "interrupted")
            if isinstance(error, BrokenPipeError):
                leave(_BROKEN_PIPE)
            error = lost_others(error) or error
            if not isinstance(error, _USER_ERRORS) or flags.FLAGS.verbosity > 0:
                raise
            print_error(error)
            _drop_output()
            return 1
        finally:
            _interrupts.at_exit = True
        return 0

    app.run(guarded, flags_parser=_parse_flags)


def define_config(default: str | None = None, help: str = "", sweep: bool = False) -> Any:
    """Defines --config and --config.FIELD, as `config_flags.DEFINE_config_file` does.

    Args:
      default: as the flag takes it: a file, or the name of one that comes with the package.
      help: what it is for, before what it may be.
      sweep: whether it is of a sweep, not of a run.

    Returns:
      The flag's holder, whose value is a locked ConfigDict, or None.
    """
    from ml_collections import config_flags

    from gptvq_jax.console.config_file import load_config_of

    what = "A file, or a config that comes with gptvq_jax by its name; after a colon its argument."
    holder = config_flags.DEFINE_config_file("config", None, f"{help} {what}".strip())

    def parse(name: str) -> Any:
        try:
            config = load_config_of(name, sweep)
        except ValueError as error:
            # In the place of a ValueError the flags would put one that begins with the flag.
            raise flags.Error(str(error)) from None
        config.lock()
        return config

    flags.FLAGS["config"].parser.parse = parse
    if default is not None:
        with _refused_flags():  # fields that the command line names are set at once
            flags.set_default(holder, default)
    return holder


def command_line() -> str:
    """This command as one would type it again."""
    program, *words = sys.argv
    start = ["python"] if program.endswith(".py") else []  # else `gptvq_jax COMMAND`
    return " ".join([*start, program, *map(shlex.quote, words)])


def config_name(flag: str = "config") -> str:
    """Name of the file that a config flag was given, with its argument: x.py:4d -> x_4d."""
    from ml_collections import config_flags

    path, _, argument = config_flags.get_config_filename(flags.FLAGS[flag]).partition(":")
    return f"{Path(path).stem}_{argument}" if argument else Path(path).stem


def given_fields(flag: str = "config") -> list[str]:
    """Fields of a config that the command line names, in its order: ["vq.dim", ...]."""
    from ml_collections import config_dict

    fields = []
    for field, value in flags.FLAGS[flag].override_values.items():
        whole = isinstance(value, config_dict.ConfigDict)  # --config.vq={...}
        fields += [f"{field}.{name}" for name in value] if whole else [field]
    return fields


def given_flags(flag: str = "config") -> list[str]:
    """The same as names of flags: ["config.vq.dim", ...]."""
    return [f"{flag}.{field}" for field in flags.FLAGS[flag].override_values]


def refuse(names: Sequence[str], reason: str) -> None:
    """Raises ValueError if one of these flags was given: it would have no effect.

    Args:
      names: of flags.
      reason: why it has none, and what to do instead.
    """
    for name in names:
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} has no effect {reason}")


def integers(name: str, lowest: int = 1) -> list[int]:
    """The numbers of a list flag.

    Raises:
      ValueError: one of them is no integer, or below `lowest`.
    """
    values = flags.FLAGS[name].value
    try:
        numbers = [int(value) for value in values]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < lowest:
        raise ValueError(f"--{name}={','.join(values)} must be integers of at least {lowest}")
    return numbers


def _refuse_empty_flags() -> None:
    """--name= sets nothing; only a text may be empty."""
    for name, flag in flags.FLAGS.flag_values_dict().items():
        if (
            flag in ("", [], [""])
            and flags.FLAGS[name].present
            and name not in ("prompt", "system")
        ):
            raise ValueError(f"--{name}= is empty; give it a value or leave it out")


def _comes_from(error: BaseException | None, kind: type) -> bool:
    """Whether an exception, or one that it was raised after, is of a kind."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _drop_output() -> None:
    """After a full disk or a closed pipe, Python would fail once more to write what is left."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _written_output() -> Iterator[None]:
    """What is printed is written now, or the process ends as after a job that printed it."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        leave(_BROKEN_PIPE)
    except OSError as error:
        print_error(error)
        _drop_output()
        sys.exit(1)


def _quiet_logs() -> None:
    """Warnings only, unless --verbosity asks for more; libraries below raise their own levels."""
    handler = absl_logging.get_absl_handler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(_interrupts.worth_logging)
    # Where its cache cannot be written it takes a temporary one, which is fine.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # Without PyTorch, which nothing here needs, transformers advises to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not flags.FLAGS["verbosity"].present:
        handler.setLevel(logging.WARNING)


def _keep_compiled_programs() -> None:
    """Compiles each program once per machine; JAX_COMPILATION_CACHE_DIR chooses another place.

    Where nothing can be kept, it compiles them each time.
    """
    import jax

    from gptvq_jax.console.user_cache import user_cache

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            jax.config.update("jax_compilation_cache_dir", str(user_cache("xla")))
        except OSError as error:
            absl_logging.info("compiled programs are not kept: %s", error)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _parse_flags(argv: list[str]) -> list[str]:
    with _written_output(), _refused_flags():
        try:
            return flags.FLAGS(argv)
        except SystemExit:
            if any(word.lstrip("-").startswith(("help", "?")) for word in argv[1:]):
                sys.exit(0)  # absl's flags for help end with 1
            raise  # a config file may end the process, too


@contextlib.contextmanager
def _refused_flags() -> Iterator[None]:
    """Prints what is wrong with a flag in one line, and exits."""
    try:
        yield
        return
    except (AttributeError, KeyError) as error:  # --config.field=value without such a field
        text = str(error.args[0]).replace("\\n", ". ").replace("\\'", "'").strip("'\"")
        text += "" if "'" in text else "'"
        print_error(f"no such field of the config: '{text}; gptvq_jax/config.py lists all")
    except flags.UnrecognizedFlagError as error:
        flag, _, field = error.flagname.partition(".")
        before = f"; pass --{flag}=FILE before it" if field and flag in flags.FLAGS else ""
        print_error(f"{str(error).splitlines()[0]}{before}")
    except flags.Error as error:
        text = in_words([line for line in str(error).splitlines() if line.strip()][-1])
        missing = re.fullmatch(r"flag --(\w+)=None: .* other than None\.", text)
        print_error(f"--{missing[1]} is missing; --help has examples" if missing else text)
    sys.exit(1)


def print_error(error: Any) -> None:
    """Prints an error in one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
