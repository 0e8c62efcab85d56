"""Config files by name: a path, or one that comes with the package; after a colon its argument."""

import importlib.util
from pathlib import Path
from typing import Any

from gptvq_jax.console.errors import first_line
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
      ValueError: there is no such file, or it has no `get_config`, or that takes no such argument.
    """
    path, colon, argument = find_config(name).partition(":")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None:
        raise ValueError(f"{path} is no Python file; a config file ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{path} is no Python file: {first_line(error)}") from None
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"{path} has no function get_config; configs/ shows how it looks")
    return module.get_config(argument) if colon else module.get_config()
