"""adapter_config.json as Hugging Face's PEFT writes it: what of it counts, what is refused."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptvq_jax.console.errors import brief
from gptvq_jax.console.json_file import read_json_object
from gptvq_jax.models.fields import FLAG, OBJECT, SIZE, TEXT, number

FILE = "adapter_config.json"
_ALPHA = number(0, 1e9)
# Fields of other things than W + s B A. They do nothing where they are absent, null, false or
# empty.
_UNSUPPORTED = {
    "alora_invocation_tokens": "an adapter that some tokens switch on",
    "arrow_config": "routing between adapters",
    "fan_in_fan_out": "transposed weights",
    "kasa_config": "KaSA",
    "layer_replication": "layers that occur several times",
    "lora_bias": "biases of adapters",
    "modules_to_save": "whole layers beside the adapters",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapters of parameters that are no layers",
    "trainable_token_indices": "trained rows of the embedding",
    "use_bdlora": "block-diagonal adapters",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
_INITIALIZERS = ("gaussian", "eva", "orthogonal")  # that leave the base as it is


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What says how a file's A and B are to be used."""

    rank: int
    alpha: float
    rslora: bool = False  # scale by 1 / sqrt(rank), not 1 / rank
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    base_name: str | None = None

    def rank_of(self, module: str) -> int:
        """Of a module by its name in the model, "model.layers.3.self_attn.q_proj"."""
        return _of_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Likewise."""
        rank = self.rank_of(module)
        return scale(_of_pattern(self.alpha_pattern, module, self.alpha), rank, self.rslora)

    def to_json(self, targets: Sequence[str], dropout: float = 0.0) -> dict[str, Any]:
        """The fields of the file.

        Args:
          targets: modules that have adapters, by their whole names or the ends of these.
          dropout: with which they were trained.
        """
        return {
            "alpha_pattern": dict(self.alpha_pattern),
            "base_model_name_or_path": self.base_name,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.alpha,
            "lora_dropout": dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": dict(self.rank_pattern),
            "target_modules": list(targets),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": self.rslora,
        }


def scale(alpha: float, rank: int, rslora: bool) -> float:
    """The factor of B A."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def read_config(directory: Path) -> PeftConfig:
    """What adapter_config.json of a directory says.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is damaged.
      NotImplementedError: it describes another kind of adapter.
    """
    path = directory / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {directory} is not the directory of an adapter; pass one that "
            "scripts/lora.py or PEFT's save_pretrained wrote"
        )
    fields = read_json_object(path)
    _refuse(fields, path)
    try:
        return PeftConfig(
            rank=SIZE.read(fields, "r"),
            alpha=_ALPHA.read(fields, "lora_alpha"),
            rslora=bool(FLAG.optional(False).read(fields, "use_rslora")),
            rank_pattern=_pattern(fields, "rank_pattern", SIZE),
            alpha_pattern=_pattern(fields, "alpha_pattern", _ALPHA),
            base_name=TEXT.optional().read(fields, "base_model_name_or_path"),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore the file, or train the adapter again") from None


def _refuse(fields: Mapping[str, Any], path: Path) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise NotImplementedError(
            f"{path}: peft_type={brief(kind)} is not supported; only 'LORA' is"
        )
    if fields.get("bias", "none") != "none":
        raise NotImplementedError(
            f"{path}: bias={brief(fields['bias'])} is not supported; only 'none' is: train the "
            "adapter without biases"
        )
    for name, what in _UNSUPPORTED.items():
        if fields.get(name):
            raise NotImplementedError(
                f"{path}: {name} is not supported ({what}); merge the adapter into its base with "
                "PEFT's merge_and_unload and quantize that, or train it without"
            )
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _INITIALIZERS:
        raise NotImplementedError(
            f"{path}: init_lora_weights={brief(start)} is not supported: it changes the base too; "
            "save the adapter with PEFT's path_initial_model_for_weight_conversion"
        )


def _pattern(fields: Mapping[str, Any], name: str, kind) -> dict[str, Any]:
    pattern = OBJECT.optional({}).read(fields, name) or {}
    for key, value in pattern.items():
        kind.check(f"{name}[{key!r}]", value)
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{name}: {key!r} is no regular expression: {error}") from None
    return dict(pattern)


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first entry whose key matches the end of a name, as PEFT looks for it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
