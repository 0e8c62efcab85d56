"""Config files by name: a path, or one that comes with the package; after a colon its argument."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gptvq_jax.console.nearest_name import nearest_name
from gptvq_jax.console.shipped import shipped


def config_names() -> list[str]:
    """Names of the configs that come with the package, those of runs first: "sweeps/NAME" after."""
    folder = shipped("configs")
    return [
        path.relative_to(folder).with_suffix("").as_posix()
        for pattern in ("*.py", "*/*.py")
        for path in sorted(folder.glob(pattern))
    ]


def printed_config(name: str) -> str:
    """How a command that anyone may give names a config: configs/NAME.py, or its own path.

    Args:
      name: as `find_config` takes it.
    """
    path, colon, argument = name.partition(":")
    if path in config_names() and not Path(path).is_file():
        path = f"configs/{path}.py"
    folder = shipped("configs").resolve()
    if Path(path).resolve().is_relative_to(folder):
        path = f"configs/{Path(path).resolve().relative_to(folder).as_posix()}"
    return f"{path}{colon}{argument}"


def find_config(name: str) -> str:
    """The path of a config file, with its argument if it has one.

    Args:
      name: a file, such as "mine/config.py:2b"; or a name of `config_names`: "smollm2_135m_2d:2b".

    Raises:
      ValueError: it is neither.
    """
    path, colon, argument = name.partition(":")
    if Path(path).is_file():
        return name
    if path in config_names():
        return f"{shipped('configs') / path}.py{colon}{argument}"
    near = nearest_name(Path(path).stem, config_names())
    known = f"the nearest is {near!r}" if near else f"those are {', '.join(config_names())}"
    raise ValueError(
        f"there is no config {path!r}: neither a file nor one that comes with gptvq_jax; {known}"
    )


def load_config(name: str) -> Any:
    """What `get_config` of a config file returns, called with the argument if there is one.

    Args:
      name: as `find_config` takes it.

    Raises:
      ValueError: there is no such file, it has no `get_config`, that takes no such argument, or
        something in it fails; one line that begins with the file.
    """
    path, colon, argument = find_config(name).partition(":")
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if spec is None:
        raise ValueError(f"{path}: it is no Python file; a config file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    _run(path, lambda: spec.loader.exec_module(module))
    get_config, given = _get_config(path, module), [argument] if colon else []
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError:
        fix = f"leave out {colon + argument!r}" if colon else f"name one, as in {path}:ARGUMENT"
        takes = "no" if colon else "an"
        raise ValueError(f"{path}: get_config takes {takes} argument; {fix}") from None
    config = _run(path, lambda: get_config(*given))
    if config is None:
        raise ValueError(f"{path}: get_config returns nothing; end it with `return config`")
    return config


def load_config_of(name: str, sweep: bool) -> Any:
    """`load_config` for a script that takes configs of sweeps, or of runs.

    Raises:
      ValueError: as `load_config`; or it is a config of the other kind, or none.
    """
    config = load_config(name)
    if not hasattr(config, "to_dict"):
        raise ValueError(
            f"{name}: get_config must return a config, as default_config() gives it, not "
            f"{type(config).__name__}"
        )
    if is_sweep(config) and not sweep:
        raise ValueError(f"{name}: it is the config of a sweep; give it to scripts/sweep.py")
    if not is_sweep(config) and sweep:
        raise ValueError(
            f"{name}: it is the config of a run, which scripts/quantize.py takes; get_config of "
            "a sweep must return what study.sweep.axes.sweep gives, as in configs/sweeps/"
        )
    return config


def is_sweep(config: Any) -> bool:
    """Whether it is what the config file of a sweep gives (study/sweep/axes.py), not of a run."""
    return hasattr(config, "to_dict") and {"axes", "cells", "base"} <= {*config}


def _get_config(path: str, module: ModuleType) -> Callable[..., Any]:
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"{path}: it has no function get_config; configs/ shows how it looks")
    return get_config


def _run(path: str, code: Callable[[], Any]) -> Any:
    """Runs what a user wrote; raises ValueError, in one line, for whatever it raises."""
    try:
        return code()
    except SyntaxError as error:
        where = error.filename if error.filename and error.filename != path else path
        text = f"{where}: line {error.lineno} is no Python ({error.msg}); mend it"
    except (ValueError, NotImplementedError) as error:  # whose text says what to do
        text = str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}"
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f"line {lines[-1]}" if lines else "it"
        text = f"{path}: {place} raises {type(error).__name__} ({error}); mend it"
    raise ValueError(" ".join(text.split())) from None
