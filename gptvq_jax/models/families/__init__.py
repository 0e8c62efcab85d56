"""The architectures that are read: one small file for each, found by its name in this folder.

How to add one is in docs/add_a_model.md.
"""

import importlib
import pkgutil
from typing import Any

from gptvq_jax.console.errors import brief
from gptvq_jax.models.families.base import Family

DOCUMENT = "docs/add_a_model.md"
FAMILIES: dict[str, Family] = {}
for _module in pkgutil.iter_modules(__path__):
    if _module.name != "base":
        _family = importlib.import_module(f"{__name__}.{_module.name}").FAMILY
        FAMILIES[_family.model_type] = _family


def find_family(model_type: Any) -> Family:
    """The family of a `model_type`.

    Raises:
      NotImplementedError: there is none; lists those that there are, and how to add one.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise NotImplementedError(
            f"model_type={brief(model_type)} is not supported, only {', '.join(sorted(FAMILIES))}; "
            f"{DOCUMENT} shows how to add a family"
        )
    return FAMILIES[model_type]
