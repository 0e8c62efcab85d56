"""Settings of GPTVQ, and the sizes that follow from them: groups, parts of a layer, FLOP."""

import dataclasses

from gptvq_jax.core import flops
from gptvq_jax.core.grid import GroupGrid, make_grid
from gptvq_jax.methods.check_fields import field_check
from gptvq_jax.moves.seed import SEEDS

_PART_ROWS = 256  # most rows of a part, unless a codebook has more
CODEBOOK_UPDATES = ("least_squares", "adam", "none")
FITTED, HELD_OUT = JUDGES = "fitted", "held_out"
MAX_CODE_BITS = 12  # k-means++ and every search make a pass over the layer for each centroid


def makes_codes(dim: int, bits: float) -> bool:
    """Whether vectors of `dim` weights at `bits` per weight have codes of 1 to 12 whole bits."""
    width = round(dim * bits)
    return abs(dim * bits - width) < 1e-6 and 1 <= width <= MAX_CODE_BITS


@dataclasses.dataclass(frozen=True)
class GPTVQSettings:
    """One row of the paper's tables; hashable, so that a compiled step is made once per setting."""

    dim: int = 2  # D: weights per vector: 1, 2 or 4 in the paper
    bits: float = 3.0  # index bits per weight; dim * bits, 1 to 12, is the width of a code
    group_size: int = 0  # weights that share a codebook; 0: as few as codebook_overhead allows
    codebook_overhead: float = 0.125  # most bits per weight spent on codebooks, if group_size is 0
    max_group_cols: int = 256  # widest group
    seed: str = "kmeans++"  # 'mahalanobis' (paper), 'kmeans++', 'random', 'cdf' (1D)
    em_iterations: int = 20  # the paper uses 100
    exact_metric: bool = True  # False: the diagonal of the block metric (paper)
    block_size: int = 128  # columns per lazy update
    scale_block_size: int = 0  # weights per 4-bit block scale, 8 to 128; 0: no normalization
    row_scales: bool = False  # a float16 scale for every output row: 16 / C bits per weight
    codebook_update: str = "least_squares"  # 'adam' (paper), 'none'
    update_iterations: int = 2  # steps of conjugate gradients, or of Adam (the paper: 25)
    learning_rate: float = 1e-3  # of Adam, relative to the root mean square of the codebooks
    polish_rounds: int = 2  # most alternations of codebook update and recode (the paper: 0)
    polish_tolerance: float = 0.005  # stop when a round lowers the loss by less than this fraction
    polish_judge: str = FITTED  # whose loss makes a round the best: 'fitted' or 'held_out'
    beam: int = 1  # of polish: width of the beam search over the codes of a row, 1 to 8
    codebook_bits: int = 8  # 16, 8 or 4 bits per stored centroid coordinate
    svd_rank: int = 0  # 1D: rank of all codebooks together; 0: stored one by one

    def __post_init__(self):
        check = field_check(self, "vq")
        check(self.dim >= 1, "dim", "at least 1 (the paper uses 1, 2 and 4)")
        check(
            makes_codes(self.dim, self.bits),
            "bits",
            f"such that dim * bits is a whole number from 1 to {MAX_CODE_BITS}; dim is {self.dim}",
        )
        check(self.group_size >= 0, "group_size", "0 or the weights per codebook")
        check(self.codebook_overhead > 0, "codebook_overhead", "above 0")
        check(self.max_group_cols >= self.dim, "max_group_cols", f"at least dim={self.dim}")
        check(self.seed in SEEDS, "seed", f"one of {', '.join(SEEDS)}")
        check(self.seed != "cdf" or self.dim == 1, "seed", "another one unless dim is 1")
        check(self.em_iterations >= 0, "em_iterations", "at least 0")
        check(self.block_size >= 1, "block_size", "at least 1")
        check(
            self.scale_block_size == 0
            or 8 <= self.scale_block_size <= 128
            and self.scale_block_size % self.dim == 0,
            "scale_block_size",
            f"0, or 8 to 128 and a multiple of dim={self.dim}",
        )
        check(
            not (self.row_scales and self.scale_block_size),
            "row_scales",
            "False unless scale_block_size is 0: a row has one kind of scales",
        )
        check(
            self.codebook_update in CODEBOOK_UPDATES,
            "codebook_update",
            f"one of {', '.join(CODEBOOK_UPDATES)}",
        )
        check(self.update_iterations >= 1, "update_iterations", "at least 1")
        check(self.learning_rate > 0, "learning_rate", "above 0")
        check(self.polish_rounds >= 0, "polish_rounds", "at least 0")
        check(0 <= self.polish_tolerance < 1, "polish_tolerance", "from 0 to below 1")
        check(self.polish_judge in JUDGES, "polish_judge", f"one of {', '.join(JUDGES)}")
        check(1 <= self.beam <= 8, "beam", "1 to 8")
        check(self.codebook_bits in (4, 8, 16), "codebook_bits", "16, 8 or 4")
        check(self.svd_rank >= 0, "svd_rank", "0 or the rank to keep")
        check(self.svd_rank == 0 or self.dim == 1, "svd_rank", "0 unless dim is 1")
        check(
            self.svd_rank == 0 or self.codebook_bits != 4,
            "codebook_bits",
            "8 or 16 when svd_rank is set",
        )

    @property
    def judged(self) -> bool:
        """Whether `quantize` is to be given a Hessian of other inputs."""
        return self.polish_judge == HELD_OUT

    @property
    def index_bits(self) -> int:
        """Bits of one code."""
        return round(self.bits * self.dim)

    @property
    def codebook_size(self) -> int:
        """K: centroids of one codebook."""
        return 2**self.index_bits

    def grid(self, rows: int, cols: int) -> GroupGrid:
        """Groups of a rows x cols weight."""
        return make_grid(
            rows,
            cols,
            dim=self.dim,
            group_size=self.group_size or self.smallest_group(),
            max_group_cols=self.max_group_cols,
        )

    def parts(self, rows: int, cols: int) -> tuple[GroupGrid, range]:
        """Cuts the rows where no codebook is shared, into equal parts of some hundred rows.

        Seeds, EM, sweep and recode are those of the whole, and so is a converged least squares;
        on the way there every part takes steps of its own length, and stops by its own gain.

        Returns:
          The grid of one part, and the first row of each.
        """
        grid = self.grid(rows, cols)
        shared = self.svd_rank or self.scale_block_size or rows % grid.strip_rows
        strips = grid.row_strips
        count = 1
        if not shared:  # as few parts as are small enough
            enough = (n for n in range(1, strips) if strips % n == 0 and rows // n <= _PART_ROWS)
            count = next(enough, strips)
        return dataclasses.replace(grid, rows=rows // count), range(0, rows, rows // count)

    def is_cut(self, rows: int, cols: int) -> bool:
        """Whether `parts` are several, or one that is small enough to be one of several."""
        return rows <= _PART_ROWS or len(self.parts(rows, cols)[1]) > 1

    def flops(self, rows: int, cols: int) -> int:
        """Of matrix products of a layer, at most: rounds of polish may be fewer."""
        block = self.grid(rows, cols).block_cols(self.block_size)
        one = flops.unit(rows, cols)
        adam = (2 * (self.update_iterations + 1) + 1) * one  # losses with gradients, and that of 0
        updates = {
            "none": 0,
            "least_squares": flops.refit(rows, cols, self.update_iterations),
            "adam": adam + one,  # and its residual
        }
        update = updates[self.codebook_update] + one  # and the residual of rounded codebooks
        judging = one if self.judged else 0
        one_round = flops.recode(rows, cols, block, beam=self.beam) + update + judging
        first = 0 if self.codebook_update == "adam" else one  # Adam takes no residual
        of_svd = adam if self.svd_rank and self.codebook_update != "none" else 0
        swept = flops.lazy_pass(rows, cols, block)
        if self.row_scales and self.codebook_update != "none":
            first += one  # the image of the weight
        return swept + first + update + judging + self.polish_rounds * one_round + of_svd

    def smallest_group(self) -> int:
        """Fewest weights whose codebook costs at most `codebook_overhead` bits per weight."""
        scale = 0 if self.codebook_bits == 16 else 16
        stored = self.codebook_size * self.dim * self.codebook_bits + scale
        if self.svd_rank:
            stored = self.svd_rank * self.codebook_bits
        return -int(-stored // self.codebook_overhead)
