"""Settings of trellis codes, and the sizes that follow from them: rows of a stream, bytes, FLOP."""

import dataclasses

from gptvq_jax.core import flops, packing
from gptvq_jax.core.quantized_tensor import QuantizedTensor
from gptvq_jax.core.trellis_table import MAX_BITS, MIN_BITS
from gptvq_jax.core.trellis_tensor import LONGEST_GAP, MAX_RATE, TrellisTensor, stream_bytes
from gptvq_jax.methods.check_fields import field_check
from gptvq_jax.methods.uniform import UniformSettings

AUTO, GAUSSIAN, CODES, INT8 = "auto", "gaussian", "codes", "int8"
REFIT_STEPS = 4  # of conjugate gradients on levels, before every pass of recoding
OUTLIER_BYTES = 4  # a gap and a value
MOST_OUTLIERS = 0.01  # of the weights of a layer
STANDS_OUT = 4.5  # standard deviations of its row and column, before bits have a price
_INT8_GROUP = 128  # inputs that share a scale in a layer that is kept in 8 bits
_MOST_OF_CODES = 0.25  # of what is left for codes, which outliers may take


@dataclasses.dataclass(frozen=True)
class TrellisSettings:
    """Of method 'trellis'; hashable."""

    bits: float = 2.125  # true bits per value: codes, rates, scales and outliers; never more
    window_bits: int = 12  # L, 4 to 16: the search takes 2^L steps per weight
    stream_rows: int = 256  # T, about: rows that are coded as one
    column_rates: bool = True  # False: as far as the budget allows, all columns the same
    outlier_limit: str = AUTO  # keep weights that are worth it; or beyond so many deviations; 0
    form: str = AUTO  # 'int8': 8 bits, no codes; 'codes'; 'auto': codes unless outliers are crowded
    levels: str = GAUSSIAN  # values of the table: its quantiles, or so many that are fitted
    recode_passes: int = 2  # passes of coordinate descent after the sweep
    block_size: int = 128  # columns per lazy update

    def __post_init__(self):
        check = field_check(self, "trellis")
        check(0 < self.bits <= MAX_RATE, "bits", f"above 0, to {MAX_RATE}")
        whole = MIN_BITS <= self.window_bits <= MAX_BITS
        check(whole, "window_bits", f"{MIN_BITS} to {MAX_BITS}")
        enough = self.stream_rows >= self.window_bits
        check(enough, "stream_rows", f"at least window_bits={self.window_bits}")
        limit = self.fixed_limit
        check(limit is None or limit == 0 or limit >= 2, "outlier_limit", "'auto', 0, or 2 up")
        check(self.form in (AUTO, CODES, INT8), "form", "'auto', 'codes' or 'int8'")
        count = self.num_levels
        power = count >= 0 and count & (count - 1) == 0 and count not in (1,)
        whole = f"'gaussian', or a power of two from 2 to 2^window_bits={2**self.window_bits}"
        check(power and count <= 2**self.window_bits, "levels", whole)
        if count:
            check(self.recode_passes >= 1, "recode_passes", "at least 1 with fitted levels")
        check(self.recode_passes >= 0, "recode_passes", "at least 0")
        check(self.block_size >= 1, "block_size", "at least 1")

    @property
    def fixed_limit(self) -> float | None:
        """`outlier_limit` as a number, -1 where it is none; None for 'auto'."""
        if self.outlier_limit == AUTO:
            return None
        try:
            return float(self.outlier_limit)
        except ValueError:
            return -1.0

    @property
    def may_be_crowded(self) -> bool:
        """Whether a layer of which more than MOST_OUTLIERS stand out is kept in 8 bits."""
        limit = self.fixed_limit
        return self.form == AUTO and (limit is None or limit >= STANDS_OUT)

    @property
    def int8(self) -> UniformSettings:
        """Of a layer that is kept in 8 bits."""
        return UniformSettings(8, _INT8_GROUP, symmetric=True, block_size=self.block_size)

    @property
    def num_levels(self) -> int:
        """Of a fitted table; 0 for 'gaussian', -1 where `levels` is neither."""
        if self.levels == GAUSSIAN:
            return 0
        return int(self.levels) if self.levels.isdecimal() and int(self.levels) else -1

    @property
    def most_rate(self) -> int:
        """Most bits of a column's weight: no more than a window has."""
        return min(MAX_RATE, self.window_bits)

    def rows_of_stream(self, rows: int) -> int:
        """T for R rows: even cuts, of whole bytes at every rate, no shorter than a window."""
        cuts = max(1, round(rows / self.stream_rows))
        return -(-max(-(-rows // cuts), self.window_bits) // 8) * 8

    def budget_bytes(self, rows: int, cols: int) -> int:
        """Of a layer, as far as it is not one whose outliers turn out to be crowded."""
        if self.form == INT8:
            return self.int8.bytes(rows, cols)
        return int(self.bits * rows * cols / 8 + 1e-6)

    def fixed_bytes(self, rows: int, cols: int) -> int:
        """Of what a layer stores in any case: scales, levels, rates; a byte if it has no codes."""
        numbers = rows + cols + self.num_levels
        return 2 * numbers + packing.packed_length(cols, 4) + 1

    def check_budget(self, rows: int, cols: int) -> None:
        """Raises ValueError where the budget of a layer is below its fixed bytes."""
        fixed = self.fixed_bytes(rows, cols)
        if self.budget_bytes(rows, cols) < fixed:
            raise ValueError(
                f"trellis.bits={self.bits:g} is below what the scales and rates of a {rows} x "
                f"{cols} layer take; set at least {8 * fixed / (rows * cols):.3f}"
            )

    def bytes_per_bit(self, rows: int) -> int:
        """Of one more bit for each weight of a column."""
        stream_rows = self.rows_of_stream(rows)
        return -(-rows // stream_rows) * int(stream_bytes(1, stream_rows))

    def most_outliers(self, rows: int, cols: int) -> int:
        """Of a layer: codes must be left something."""
        left = max(self.budget_bytes(rows, cols) - self.fixed_bytes(rows, cols), 0)
        spare = int(_MOST_OF_CODES * left)
        if not self.column_rates:  # a whole bit of all columns is worth more than any of them
            of_bit = cols * self.bytes_per_bit(rows)
            spare = min(spare, left - of_bit * min(left // of_bit, self.most_rate))
        bridges = rows * cols // LONGEST_GAP
        return max(0, min(int(MOST_OUTLIERS * rows * cols), spare // OUTLIER_BYTES - bridges))

    def flops(self, rows: int, cols: int) -> int:
        """Of matrix products of a layer; inside a block of columns there are none."""
        if self.form == INT8:
            return self.int8.flops(rows, cols)
        padded = -(-cols // self.block_size) * self.block_size if cols > self.block_size else cols
        refit = REFIT_STEPS + 1 if self.num_levels else 0  # what was rounded is looked at again
        polish = 1 + self.recode_passes * (1 + refit) if self.recode_passes else 0
        return (1 + polish) * flops.unit(rows, padded)

    def note(self, tensor: QuantizedTensor) -> str | None:
        """What is to be said of a layer that these settings have made."""
        if not isinstance(tensor, TrellisTensor):
            why = "" if self.form == INT8 else _CROWDED + "; it "
            return f"{why}is kept in 8 bits, {tensor.bits_per_value:.3f} bits per value"
        kept = 0 if tensor.outlier_gaps is None else len(tensor.outlier_gaps)
        most = self.most_outliers(*tensor.shape)
        if self.column_rates and kept and kept >= most:
            return (
                f"has more outliers than the {most} that are kept beside codes, the largest ones; "
                "raise trellis.bits, or set a budget for all layers, allocation.bits_per_value, "
                "which gives such a layer more"
            )
        return None


_CROWDED = f"has more outliers than the {MOST_OUTLIERS:.0%} of its weights that codes can have"
