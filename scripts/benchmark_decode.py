"""Measures products with packed weights against dense and 4-bit ones, on shapes of real layers.

  python scripts/benchmark_decode.py                                 # two 7B layers, batch 1
  python scripts/benchmark_decode.py --shapes=7b,70b --batches=1,8
  python scripts/benchmark_decode.py --formats=2d_2.25,2d_3.125 --implementations=cpu_int8,xla
  python scripts/benchmark_decode.py --json=rows.json --plot=decode.png
  python scripts/benchmark_decode.py --model=CHECKPOINT              # a token of a model, by part
  python scripts/benchmark_decode.py --model=CHECKPOINT --llama_cpp=F16,Q4_0,Q2_K
  python scripts/benchmark_decode.py --march=x86-64-v3               # with AVX2 alone

Contenders are measured in turn, round after round; the ratios are medians over rounds. Each holds
as many different weights as --working_set_mib asks for, so that they come from memory as in a
model; with 0 it is one weight, which stays in the caches if it fits. Columns: bits per value and MB
of the weight; microseconds of one product, with its quartiles; GB/s at which the weight is read,
and that as a fraction of what a copy moves; time relative to dense float32 and to 4-bit integers in
groups of 128 (on a CPU our own C++ kernel, with int8 activations).

With --model the table is of one greedy step of generation, as generate.py runs it: products by
kind of layer, head, attention, and so on, each measured as a program of its own, then what a step
takes beyond them; what each must read and multiply, and the time which that takes at the rates of a
copy and of a large float32 product, measured in the same run. --llama_cpp adds llama.cpp's tokens
per second on the same model, where llama-cpp-python is installed (it is optional).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptvq_jax.console import cli  # isort: skip  Ctrl-C is one line from here on

from absl import flags

_SHAPES = flags.DEFINE_list(
    "shapes", ["4096x4096", "11008x4096"], "smollm2, 7b, 70b or ROWSxCOLS (outputs x inputs)."
)
flags.DEFINE_list("batches", ["1"], "Rows of x.")
_FORMATS = flags.DEFINE_list("formats", None, "Such as 2d_2.25; a wrong name lists them.")
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations",
    None,
    "Of vq_matmul; default: auto, and of products on a CPU cpu_int8. Of a checkpoint also dense.",
)
_DENSE = flags.DEFINE_list(
    "dense", None, "Dense weights: float32, bfloat16; default: both, on a CPU float32."
)
_WORKING_SET = flags.DEFINE_integer(
    "working_set_mib", 256, "Of the copies of a weight.", lower_bound=0
)
_REPEATS = flags.DEFINE_integer("repeats", 25, "Rounds.", lower_bound=1)
_MODEL = flags.DEFINE_string(
    "model", None, "Measure a token of this: a checkpoint's directory, or as config.model."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "With --model: of activations and dense weights."
)
_CONTEXT = flags.DEFINE_integer(
    "context", 128, "With --model: tokens before the one that is measured.", lower_bound=1
)
_LLAMA_CPP = flags.DEFINE_list(
    "llama_cpp", [], "With --model: formats that llama.cpp runs in turn, as F16,Q4_0,Q2_K."
)
_MARCH = flags.DEFINE_string(
    "march", None, "Of the C++ kernels, as the compiler calls it; default: native."
)
_JSON = flags.DEFINE_string("json", None, "Also write the rows to this file.")
_PLOT = flags.DEFINE_string("plot", None, "Also plot the times to this PNG file.")


def main(_) -> None:
    from gptvq_jax.ops.cpu import build

    if _MARCH.value:
        build.choose_march(_MARCH.value)
    if _MODEL.value:
        cli.refuse(
            ["shapes", "formats", "dense", "working_set_mib", "plot"],
            "on a token of a model; leave it or --model out",
        )
        measure_token()
    else:
        cli.refuse(["dtype", "context", "llama_cpp"], "without a model; add --model=CHECKPOINT")
        measure_products()


def measure_token() -> None:
    from gptvq_jax.files.durable import write_text
    from gptvq_jax.study.token_benchmark import benchmark_token

    found = benchmark_token(
        _MODEL.value,
        _IMPLEMENTATIONS.value,
        dtype=_DTYPE.value,
        context=_CONTEXT.value,
        batches=cli.integers("batches"),
        repeats=_REPEATS.value,
        llama_formats=_LLAMA_CPP.value,
    )
    if _JSON.value:
        write_text(_JSON.value, json.dumps(found, indent=1) + "\n")


def measure_products() -> None:
    import jax

    from gptvq_jax.files.durable import write_text
    from gptvq_jax.ops.cpu import build
    from gptvq_jax.study import decode_benchmark as bench
    from gptvq_jax.study import decode_report
    from gptvq_jax.study.decode_formats import FORMATS

    on_cpu = jax.default_backend() == "cpu"
    implementations = _IMPLEMENTATIONS.value or (["cpu_int8", "auto"] if on_cpu else ["auto"])
    dense = _DENSE.value or (["float32"] if on_cpu else ["float32", "bfloat16"])
    formats = _FORMATS.value or list(FORMATS)
    chosen = bench.contenders(formats, implementations, dense)
    shapes = list(bench.shapes_of(_SHAPES.value))
    batches = cli.integers("batches")
    copy = bench.copy_bandwidth()
    device = jax.devices()[0].device_kind
    print(f"{device}: a copy moves {copy / 1e9:.1f} GB/s")
    if on_cpu:
        print(f"C++ kernels: {build.instruction_set()}")
    sizes = _WORKING_SET.value << 20, _REPEATS.value
    rows = bench.measure_all(shapes, batches, chosen, *sizes)
    print(decode_report.table(rows, copy))
    if _JSON.value:
        text = json.dumps({"device": device, "copy_bandwidth": copy, "rows": rows}, indent=1)
        write_text(_JSON.value, text + "\n")
    if _PLOT.value:
        decode_report.plot(rows, device, Path(_PLOT.value))


if __name__ == "__main__":
    cli.run(main, __doc__)
