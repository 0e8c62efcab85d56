"""The protocol of the GPTVQ paper (arXiv 2402.15319, section 4.1) and the rows of its Table 2."""

from ml_collections import config_dict

from gptvq_jax.config import default_config

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
    config.vq.bits, config.vq.group_size = GROUP_SIZES[dim, bits]
    config.calibration.dataset = "wikitext2"
    config.calibration.num_windows = 128
    config.calibration.seqlen = 2048
    config.calibration.batch_size = 1
    config.evaluation.dataset = "wikitext2"
    config.evaluation.num_windows = 0
    config.evaluation.seqlen = 2048
    config.evaluation.batch_size = 1
    return config
