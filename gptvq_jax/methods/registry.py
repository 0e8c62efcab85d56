"""The table of methods, each (weight, hessian, hinv_chol, key, settings) -> QuantizedTensor."""

from collections.abc import Callable
from typing import NamedTuple

from gptvq_jax.methods import aqlm, gptvq, trellis, uniform


class Method(NamedTuple):
    quantize: Callable
    settings: type  # frozen dataclass
    section: str  # of the config: where the settings stand
    allocation: str = ""  # under a budget for all layers: of "candidates", or "columns"; "": none


METHODS = {
    "gptvq": Method(gptvq.quantize, gptvq.GPTVQSettings, "vq", "candidates"),
    "aqlm": Method(aqlm.quantize, aqlm.AQLMSettings, "aqlm"),
    "trellis": Method(trellis.quantize, trellis.TrellisSettings, "trellis", "columns"),
    "gptq": Method(uniform.gptq, uniform.UniformSettings, "uniform"),
    "rtn": Method(uniform.rtn, uniform.UniformSettings, "uniform"),
}
