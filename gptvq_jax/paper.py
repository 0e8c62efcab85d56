"""The papers' protocols: GPTVQ's Table 2 (arXiv 2402.15319), AQLM's formats (arXiv 2401.06118)."""

import re

from ml_collections import config_dict

from gptvq_jax.config import default_config
from gptvq_jax.core.trellis_tensor import MAX_RATE
from gptvq_jax.methods.gptvq_settings import makes_codes

# (dim, bits per value) -> (index bits per weight, weights per codebook), int8 centroids.
GROUP_SIZES = {
    (1, "2.125b"): (2.0, 256),
    (1, "2.25b"): (2.0, 128),
    (1, "3.125b"): (3.0, 512),
    (1, "4.125b"): (4.0, 1024),
    (2, "2.125b"): (2.0, 2048),
    (2, "2.25b"): (2.0, 1024),
    (2, "3.125b"): (3.0, 8192),
    (2, "4.125b"): (4.0, 32768),
    (4, "2.125b"): (2.0, 65536),
    (4, "2.25b"): (2.0, 32768),
}


def table2_config(model: str, dim: int, bits: str) -> config_dict.ConfigDict:
    """A cell of Table 2: calibrated on 128 x 2048 tokens of WikiText-2, measured on its test split.

    Args:
      model: directory or hub name.
      dim: D.
      bits: nominal bits per value, such as '2.125b'; with a 16-bit scale per codebook the true
        bits, which a run prints, are a little more.
    """
    if (dim, bits) not in GROUP_SIZES:
        known = ", ".join(b for d, b in GROUP_SIZES if d == dim)
        raise ValueError(f"{bits!r} is not in the table for {dim}D, which has {known}")
    config = default_config()
    config.model = model
    config.vq.dim = dim
    width, config.vq.group_size = GROUP_SIZES[dim, bits]
    set_index_bits(config, width)
    config.uniform.group_size = round(16 / (float(bits.removesuffix("b")) - width))
    _set_text(config, "wikitext2", num_windows=128, seqlen=2048)
    _set_products(config)
    return config


def aqlm_config(model: str, code: str) -> config_dict.ConfigDict:
    """AQLM with block tuning, on the default texts.

    Args:
      model: directory, hub name or package.
      code: "MxB" or "MxBgD": M codebooks of B-bit codes for vectors of D weights, 8 if not said.
        2x8, 1x16 and 4x8g16 take 2 bits per weight for the codes, 2x12 takes 3.
    """
    match = re.fullmatch(r"(\d+)x(\d+)(?:g(\d+))?", code)
    if not match:
        raise ValueError(f"{code!r} is not of the form MxB or MxBgD, such as 2x8 or 4x8g16")
    config = default_config()
    config.model = model
    config.method = "aqlm"
    books, bits, dim = (int(number or 8) for number in match.groups())
    config.aqlm.num_codebooks, config.aqlm.code_bits, config.aqlm.dim = books, bits, dim
    if books and dim % books:
        config.aqlm.start = "residual"
    if bits > 12:
        config.aqlm.seed = "random"
    config.tune.block = True
    if books and dim:
        set_index_bits(config, books * bits / dim)
    return config


def aqlm_protocol(model: str, code: str) -> config_dict.ConfigDict:
    """`aqlm_config` with the paper's amount of text (section 4): C4 in place of its RedPajama."""
    config = aqlm_config(model, code)
    _set_text(config, "c4", num_windows=1024, seqlen=4096)
    config.tune.batch_size = 8
    return config


def trellis_config(model: str, width: str, budgets: dict[str, float]) -> config_dict.ConfigDict:
    """Trellis codes under a budget for all layers, on the default texts, weighted by gradients.

    Args:
      model: directory, hub name or package.
      width: key of `budgets`, or true bits per value themselves, as in 2.5b.
      budgets: true bits per value by name.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)b", width)
    bits = budgets.get(width, float(match[1])) if match else 0.0
    if not 0 < bits <= MAX_RATE:
        raise ValueError(f"{width!r} is not bits per value up to {MAX_RATE}, as in 2b or 2.5b")
    config = default_config()
    config.model = model
    config.method = "trellis"
    set_index_bits(config, max(1, round(bits)))
    config.allocation.bits_per_value = config.trellis.bits = bits
    config.calibration.gradient_groups = 1
    return config


def trellis_protocol(model: str, width: str) -> config_dict.ConfigDict:
    """`trellis_config` with the texts of GPTVQ's Table 2; bits are true ones."""
    config = trellis_config(model, width, {})
    _set_text(config, "wikitext2", num_windows=128, seqlen=2048)
    return config


def set_index_bits(config: config_dict.ConfigDict, bits: float) -> None:
    """Index bits per weight of every method, so that --config.method=... keeps those of the file.

    Args:
      config: whose `vq.dim` and, if the method is "aqlm", whole section `aqlm` are set.
      bits: a method that has no format of so many takes the nearest, or keeps its default.
    """
    if makes_codes(config.vq.dim, bits):
        config.vq.bits = float(bits)
    config.uniform.bits = min(max(round(bits), 1), 8)
    config.trellis.bits = float(min(bits, MAX_RATE))  # of which scales and rates are a part
    if config.method != "aqlm":
        config.aqlm.num_codebooks = round(bits)  # of 8-bit codes for 8 weights
        if config.aqlm.dim % config.aqlm.num_codebooks:
            config.aqlm.start = "residual"


def _set_products(config: config_dict.ConfigDict) -> None:
    """The model in half precision, as in the papers: what layers read is bfloat16 then, and so are
    the products of Hessians without a loss."""
    config.calibration.model_products = config.calibration.products = "bfloat16"
    config.evaluation.products, config.solve_products = "bfloat16", "bfloat16x3"


def _set_text(config: config_dict.ConfigDict, dataset: str, num_windows: int, seqlen: int) -> None:
    """Calibration text, a tenth of it held out, and to evaluate all of WikiText-2's test split."""
    for section in (config.calibration, config.evaluation):
        section.seqlen, section.batch_size = seqlen, 1
    config.calibration.datasets, config.calibration.num_windows = (dataset,), num_windows
    config.calibration.held_out = round(num_windows / 9)  # a tenth of all
    config.evaluation.dataset, config.evaluation.num_windows = "wikitext2", 0
