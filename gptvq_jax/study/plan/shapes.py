"""The shapes of the model that a config names; no weight is read."""

import os
from pathlib import Path

from gptvq_jax.console.json_file import read_json_object
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.open import open_source
from gptvq_jax.models.packaged import PACKAGES
from gptvq_jax.models.published import PUBLISHED, published


def model_shapes(model: str, config_name: str, like: str | None = None) -> tuple[ModelConfig, str]:
    """The architecture, and where it comes from.

    Args:
      model: config.model.
      config_name: of the config, as "llama2_70b_2d"; a hub name that is not on this machine has the
        shapes of the published model that it begins with.
      like: a row of models/published.py, or the path of a config.json, instead.

    Raises:
      ValueError, FileNotFoundError: there is no config.json at hand, or it is damaged; says what to
        pass.
    """
    if like is not None:
        path = Path(like).expanduser()
        if path.is_dir():
            path = path / "config.json"
        if path.suffix == ".json":
            return ModelConfig.from_hf(read_json_object(path)), str(path)
        return ModelConfig.from_hf(published(like)), f"the published {like}"
    local = Path(os.path.expanduser(model))
    if model in PACKAGES or model.startswith("package:") or model.endswith(".gguf"):
        return open_source(model).config, model
    if local.is_dir():
        path = local / "config.json"
        return ModelConfig.from_hf(read_json_object(path)), str(path)
    if cached := _downloaded(model):
        return ModelConfig.from_hf(read_json_object(cached)), f"{model}, as downloaded"
    names = [name for name in PUBLISHED if Path(config_name).stem.startswith(name)]
    if names:
        name = max(names, key=len)
        return ModelConfig.from_hf(published(name)), f"the published {name}"
    raise ValueError(
        f"there is no config.json of {model!r} on this machine; pass --like=PATH of one, or "
        f"--like=NAME of a published model: {', '.join(PUBLISHED)}"
    )


def _downloaded(model: str) -> Path | None:
    """The config.json of a hub name, where it has been downloaded before."""
    if model.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found) if isinstance(found, str) else None
