"""What a run will hold in memory, from shapes: bytes by phase and item, on the host and the device.

Where the device is a CPU both are the memory of one process. What the phases hold is what the code
of passes.py, packed_block.py, gradients.py and evaluate.py keeps, in float32 where nothing else is
said; temporaries are those of the largest program of a phase. The memory of Python, JAX and its
compiler is not in it. scripts/plan.py prints it; tests/run/test_memory.py and docs/planning.md say
how near it comes.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from gptvq_jax.config import RunSettings
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.methods.pool import num_workers
from gptvq_jax.methods.trellis_settings import TrellisSettings
from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.head_chunk import head_chunk, pair_chunk
from gptvq_jax.models.shapes import block_shapes, opened_width, outer_shapes
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.models.stages import expert_of
from gptvq_jax.rule_settings import choices, is_open
from gptvq_jax.run import token_weights
from gptvq_jax.run.calibrate import batches, closes
from gptvq_jax.run.formats import layer_format, num_quantized
from gptvq_jax.run.forward import wants_middle
from gptvq_jax.run.packed_block import EXPERTS_AT_ONCE
from gptvq_jax.run.work import LAST, owners

HOST, DEVICE = "host", "device"
_QUERIES = 128  # of attention that go together

# Items that are there whatever the compiler does.
CERTAIN = (
    *("block", "next block", "block as quantized so far", "embedding and head"),
    *("sums of x x^T", "sums of float x times x^T", "Hessians and factors", "token weights"),
    *("heads of both models", "head", "weights and their gradients"),
)


class Item(NamedTuple):
    """What is in memory in a phase."""

    phase: str
    name: str
    where: str
    num_bytes: int


def memory_items(
    config: ModelConfig, settings: RunSettings, platform: str | None = None
) -> list[Item]:
    """All of a run, by phase.

    Args:
      config: of the model.
      settings: of the run.
      platform: of the device, by default JAX's; a CPU quantizes layers in parts.
    """
    platform = platform or jax.default_backend()
    found = [*_outer(config, settings), *_evaluate(config, settings)]
    last = num_quantized(settings, config)
    seen = set()
    for index in range(config.num_hidden_layers):
        block = config.of_block(index)
        if (block, index < last) in seen:
            continue
        seen.add((block, index < last))
        if settings.weight_groups:
            found += _gradients(block, config, settings, index < last)
        if index < last:
            found += _hessians(block, settings)
            found += _quantize(block, settings, index, platform)
            found += _tune(block, settings)
    found += _tune_model(config, settings)
    return [item for item in found if item.num_bytes]


def peaks(items: Iterable[Item], shared: bool) -> dict[str, tuple[int, str]]:
    """{where: (most bytes of a phase, which)}.

    Args:
      items: of a run.
      shared: whether host and device have one memory, which is then called HOST.
    """
    sums: dict[tuple[str, str], int] = {}
    largest: dict[tuple[str, str, str], int] = {}
    for item in items:  # blocks of several kinds have the same items
        key = item.phase, item.name, item.where
        largest[key] = max(largest.get(key, 0), item.num_bytes)
    for (phase, _, where), size in largest.items():
        place = HOST if shared else where
        sums[place, phase] = sums.get((place, phase), 0) + size
    found: dict[str, tuple[int, str]] = {}
    for (place, phase), size in sums.items():
        found[place] = max(found.get(place, (0, "")), (size, phase))
    return found


def _outer(config: ModelConfig, settings: RunSettings) -> list[Item]:
    """While what is outside the blocks is read, stored and embedded with."""
    values = sum(map(math.prod, outer_shapes(config).values()))
    item = 4 if settings.dense_dtype == "float32" else 2
    return [
        Item("embed", "embedding and head", HOST, 4 * values),
        Item("embed", "the same as stored", HOST, item * values),
        Item("embed", "the same read again", HOST, 4 * values),
    ]


def _blocks(config: ModelConfig, phase: str, copies: int = 2) -> list[Item]:
    """The block at work, and the next one, which is read meanwhile."""
    shapes = [math.prod(shape) for shape in block_shapes(config).values()]
    return [
        Item(phase, "block", DEVICE, 4 * sum(shapes)),
        Item(phase, "next block", DEVICE, 4 * sum(shapes) * (copies - 1)),
        Item(phase, "a tensor as it is read", HOST, 2 * max(shapes)),
    ]


def _activations(config: ModelConfig, batch: int, time: int) -> int:
    """Of a batch on its way through a block, at most."""
    tokens, hidden = batch * time, config.hidden_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    scores = 2 * batch * config.num_attention_heads * min(_QUERIES, time) * time
    attention = tokens * (2 * q + 2 * kv) + scores
    feed = 3 * tokens * opened_width(config, 2)
    return 4 * (3 * tokens * hidden + max(attention, feed))


def _batch(settings: RunSettings) -> int:
    c = settings.calibration
    part = next(batches(c.num_windows, c.batch_size))
    return part.stop - part.start


def _hessians(config: ModelConfig, settings: RunSettings) -> list[Item]:
    c, found = settings.calibration, []
    if c.statistics:
        return []
    crosses, batch = wants_middle(settings), _batch(settings)
    kinds = 1 + (c.held_out > 0)
    stages = range(LAST) if settings.true_sequential else [None]
    for stage in stages:
        phase = "hessians" if stage is None else f"hessians of stage {stage + 1}"
        squares, others = _moment_bytes(config, settings, stage)
        found += [
            *_blocks(config, phase),
            Item(phase, "block as quantized so far", DEVICE, _done_bytes(config, stage or 0)),
            Item(phase, "sums of x x^T", DEVICE, kinds * squares),
            Item(phase, "sums of float x times x^T", DEVICE, kinds * crosses * others),
            Item(phase, "activations", DEVICE, _activations(config, batch, c.seqlen)),
            Item(
                phase, "the largest sum as it is added to", DEVICE, _largest_moment(config, stage)
            ),
        ]
    return found


def _names(config: ModelConfig, stage: int | None) -> list[str]:
    return [n for n in config.linear_layers if stage is None or config.layers.stage_of[n] == stage]


def _moment_bytes(config: ModelConfig, settings: RunSettings, stage: int | None) -> tuple[int, int]:
    """Of second moments, and of those with the float model's states."""
    squares = others = 0
    for name, rows, cols in owners(config, settings):
        of = config.layers.stage_of[name]
        if stage is None or of == stage:
            squares += 4 * cols * cols
            others += 4 * cols * (rows if closes(config, of) else cols)
    return squares, others


def _largest_moment(config: ModelConfig, stage: int | None) -> int:
    shapes = layer_shapes(config)
    return max(4 * shapes[name][1] ** 2 for name in _names(config, stage))


def _done_bytes(config: ModelConfig, stage: int) -> int:
    """Of the dense copies of layers before a stage."""
    shapes = layer_shapes(config)
    earlier = (n for n in config.linear_layers if config.layers.stage_of[n] < stage)
    return sum(4 * math.prod(shapes[name]) for name in earlier)


def _quantize(config: ModelConfig, settings: RunSettings, index: int, platform: str) -> list[Item]:
    """While the layers of a stage are quantized; of experts a few at a time."""
    c, shapes, found = settings.calibration, layer_shapes(config), []
    crosses, kinds = wants_middle(settings), 1 + (c.held_out > 0)
    for stage in range(LAST):
        phase = f"quantize stage {stage + 1}"
        of_sums = stage if settings.true_sequential else None
        squares, others = _moment_bytes(config, settings, of_sums)
        names = _names(config, stage)
        at_once = names
        if any(expert_of(name) is not None for name in names):
            each = len(names) // config.experts
            at_once = names[: EXPERTS_AT_ONCE * each]
        weights = sum(4 * math.prod(shapes[name]) for name in at_once)
        own = {(n, r, k) for n, r, k in owners(config, settings) if n in at_once}
        hessians = sum(4 * k * k for _, _, k in own) * (c.gradient_groups or 1)
        found += [
            *_blocks(config, phase),
            Item(phase, "block as quantized so far", DEVICE, _done_bytes(config, stage)),
            Item(phase, "sums of x x^T", DEVICE, kinds * squares),
            Item(phase, "sums of float x times x^T", DEVICE, crosses * others),
            Item(phase, "Hessians and factors", DEVICE, (1 + kinds) * hessians),
            Item(phase, "weights and targets", DEVICE, (2 + crosses) * weights),
            Item(phase, "quantized weights", DEVICE, 2 * weights),
            Item(
                phase,
                "temporaries of the method",
                DEVICE,
                _temporaries(settings, index, {n: shapes[n] for n in at_once}, platform),
            ),
        ]
    return found


def _temporaries(
    settings: RunSettings, index: int, shapes: dict[str, tuple[int, int]], platform: str
) -> int:
    """Of the programs that quantize layers, as many as run at once."""
    groups = settings.calibration.gradient_groups or 1
    sizes = []
    for name, (rows, cols) in shapes.items():
        of = layer_format(settings, index, name)
        own = [of.settings] if of.coder else []
        if settings.allocation.bits_per_value and is_open(settings, of.rule):
            own = choices(settings, of.rule) or own
        for candidate in own[:1]:
            sizes += _parts_of(candidate, rows // groups, cols, platform) * groups
        sizes.append(3 * 4 * cols * cols)  # to factorize: damped, its factor, its inverse
    running = num_workers() if platform == "cpu" else 1
    return sum(sorted(sizes, reverse=True)[:running])


def _parts_of(settings: Any, rows: int, cols: int, platform: str) -> list[int]:
    """Bytes of the program of each part of a layer."""
    if isinstance(settings, GPTVQSettings):
        count = 1
        if platform == "cpu":
            grid, firsts = settings.parts(rows, cols)
            rows, count = grid.rows, len(firsts)
        # Error and image, now, before and at best; the target, and its codes. H and U, padded.
        return [4 * (_OF_WEIGHTS * rows * cols + 2 * cols * cols)] * count
    if isinstance(settings, TrellisSettings):
        return [4 * (_OF_WEIGHTS * rows * cols + cols * cols)]
    return [4 * (_OF_WEIGHTS * rows * cols + 2 * cols * cols)]


_OF_WEIGHTS = 10  # arrays of R x C in a program that quantizes a layer


def _gradients(
    block: ModelConfig, config: ModelConfig, settings: RunSettings, measured: bool
) -> list[Item]:
    c, phase = settings.calibration, "gradients"
    batch, shapes = _batch(settings), layer_shapes(block)
    tokens = batch * c.seqlen
    kept = tokens * (sum(map(sum, shapes.values())) if not block.experts else 0)
    if block.experts:
        used = [n for n in shapes if expert_of(n) in (None, *range(block.experts_per_token))]
        kept = tokens * sum(sum(shapes[name]) for name in used)
    groups = settings.weight_groups
    arrays = token_weights.shapes(block, (c.all_windows, c.seqlen), groups).values()
    scores = 2 * batch * block.num_attention_heads * min(_QUERIES, c.seqlen) * c.seqlen
    found = [
        *_blocks(block, phase),
        Item(phase, "what a batch keeps for its way back", DEVICE, 4 * (2 * kept + scores)),
        Item(phase, "token weights", HOST, 2 * 4 * sum(map(math.prod, arrays))),
    ]
    if measured and settings.allocation.bits_per_value:
        squares, _ = _moment_bytes(block, settings, None)
        found.append(Item(phase, "sums of x x^T", DEVICE, squares))
        phase = "error curves"
        found += [
            *_blocks(block, phase),
            Item(phase, "sums of x x^T", DEVICE, squares),
            Item(phase, "Hessians and factors", DEVICE, 2 * squares),
            Item(phase, "token weights", HOST, 2 * 4 * sum(map(math.prod, arrays))),
        ]
    chunk = head_chunk(config, batch)
    phase = "gradient of the head"
    head = 4 * config.vocab_size * config.hidden_size
    return [
        *found,
        Item(phase, "head", DEVICE, head),
        Item(phase, "embedding and head", HOST, _outer(config, settings)[0].num_bytes),
        Item(phase, "logits", DEVICE, 3 * 4 * batch * chunk * config.vocab_size),
        Item(phase, "activations", DEVICE, 4 * 4 * tokens * config.hidden_size),
    ]


def _tune(config: ModelConfig, settings: RunSettings) -> list[Item]:
    c, t, phase = settings.calibration, settings.tune, "tune"
    if not t.block:
        return []
    values = sum(map(math.prod, block_shapes(config).values()))
    tokens = t.batch_size * c.seqlen
    kept = tokens * sum(map(sum, layer_shapes(config).values()))
    return [
        Item(phase, "next block", DEVICE, 4 * values),
        Item(phase, "weights and their gradients", DEVICE, 2 * 4 * values),
        Item(phase, "what a batch keeps for its way back", DEVICE, 4 * 2 * kept),
    ]


def _tune_model(config: ModelConfig, settings: RunSettings) -> list[Item]:
    """See run/student.py; codes count two bytes each, one for every weight."""
    f, phase = settings.finetune, "tune model"
    if not settings.tune.model:
        return []
    of_blocks = [
        (sum(map(math.prod, block_shapes(b).values())), b, n)
        for b, n in config.block_counts().items()
    ]
    largest, block, _ = max(of_blocks, key=lambda found: found[0])
    time = settings.calibration.seqlen
    depth, head = config.num_hidden_layers, 4 * config.vocab_size * config.hidden_size
    return [
        Item(phase, "codes of all blocks", DEVICE, 2 * sum(size * n for size, _, n in of_blocks)),
        Item(phase, "a block as weights and gradients, twice", DEVICE, 4 * 4 * largest),
        Item(
            phase,
            "what blocks read of a step's windows",
            DEVICE,
            4 * f.batch_size * time * depth * config.hidden_size,
        ),
        Item(
            phase,
            "what a block keeps for its way back",
            DEVICE,
            4 * 2 * f.micro_batch * time * sum(map(sum, layer_shapes(block).values())),
        ),
        Item(phase, "heads of both models", DEVICE, 2 * head),
        Item(phase, "embedding and head", HOST, _outer(config, settings)[0].num_bytes),
    ]


def _evaluate(config: ModelConfig, settings: RunSettings) -> list[Item]:
    e, found = settings.evaluation, []
    batch = e.batch_size if not e.num_windows else min(e.batch_size, e.num_windows)
    for block in config.block_counts():
        phase = "evaluate"
        found += [
            *_blocks(block, phase),
            Item(phase, "activations", DEVICE, _activations(block, batch, e.seqlen)),
        ]
    phase, head = "compare", 4 * config.vocab_size * config.hidden_size
    values = sum(map(math.prod, outer_shapes(config).values()))
    tables = 4 * 4 * batch * pair_chunk(config, batch) * config.vocab_size
    return [
        *found,
        Item(phase, "embedding and head of a model", HOST, 4 * values),
        Item(phase, "heads of both models", DEVICE, 2 * head),
        Item(phase, "logits", DEVICE, tables),
        Item(phase, "activations", DEVICE, 4 * 2 * batch * e.seqlen * config.hidden_size),
    ]
