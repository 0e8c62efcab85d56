"""Where scripts/ and configs/ are: beside the package in a checkout, inside it once installed."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def shipped(folder: str) -> Path:
    """The directory "scripts" or "configs" that belongs to this package."""
    inside = _PACKAGE / "shipped" / folder  # where pyproject.toml puts it
    return inside if inside.is_dir() else _PACKAGE.parent / folder
