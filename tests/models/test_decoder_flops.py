"""FLOP of a decoder: formulas against the traced programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jaxpr_flops import count
from tiny_checkpoint import MODEL

from gptvq_jax.core.flops import second_moment
from gptvq_jax.core.hessian import tile_size
from gptvq_jax.models import flops
from gptvq_jax.models.llama import Decoder, block_forward, head_logits
from gptvq_jax.models.source import layer_shapes
from gptvq_jax.models.stages import LINEAR_GROUPS, LINEAR_LAYERS
from gptvq_jax.run import finetune
from gptvq_jax.run.calibrate import LAST, FloatStates, init_moments, moment_flops, step
from gptvq_jax.run.gradients import block_backward, head_backward
from gptvq_jax.run.token_losses import token_nll

CONFIGS = {
    "grouped": dataclasses.replace(MODEL, num_attention_heads=4, num_key_value_heads=2),
    "window": dataclasses.replace(MODEL, model_type="mistral", sliding_window=50),
    "tied": dataclasses.replace(MODEL, tie_word_embeddings=True),
}
SHAPES = [(3, 40), (2, 128), (1, 300)]  # less than a chunk of queries, one, and no multiple

pytestmark = [
    pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS),
    pytest.mark.parametrize("batch, time", SHAPES),
]


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def parameters(config):
    """Shapes of block 0 and of what is outside the blocks."""
    tokens = array(1, 4, dtype=jnp.int32)
    tree = dict(jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"])
    block = tree.pop("layers_0")
    return block, {name: part for name, part in tree.items() if not name.startswith("layers")}


def hidden(config, batch, time):
    return array(batch, time, config.hidden_size)


def test_forward(config, batch, time):
    block, _ = parameters(config)
    shapes = layer_shapes(config)
    assert flops.linear_weights(config) == sum(rows * cols for rows, cols in shapes.values())
    counted = count(lambda b, x: block_forward(config, b, x), block, hidden(config, batch, time))
    assert counted == flops.block_forward(config, batch, time)


def test_stages_are_the_block(config, batch, time):
    whole = flops.block_forward(config, batch, time)
    assert flops.stage_flops(config, range(LAST), batch, time) == whole
    without_down = flops.stage_flops(config, range(LAST - 1), batch, time)
    assert without_down == flops.block_inputs(config, batch, time)


@pytest.mark.parametrize(
    "start, stop, added",
    [(0, LAST, range(LAST)), (0, LAST - 1, range(LAST)), (0, 0, [0]), (1, 2, [2]), (2, LAST, [])],
)
@pytest.mark.parametrize("aims_at_float", [False, True])
def test_forward_for_moments(config, batch, time, start, stop, added, aims_at_float):
    """The stages between the two, and no product for what layers behind them read."""
    block, _ = parameters(config)
    x, inner = hidden(config, batch, time), None
    if start == 1:
        inner = array(batch, time, config.num_attention_heads * config.head_dim)
    moments = jax.eval_shape(lambda b: init_moments(config, b, added, None, aims_at_float), block)
    reference = FloatStates(x, x, x) if aims_at_float else None
    counted = count(
        lambda b, x, inner, m, r: step(config, b, x, inner, start, stop, m, None, r),
        block,
        x,
        inner,
        moments,
        reference,
    )
    stages = flops.stage_flops(config, range(start, stop), batch, time)
    assert counted == stages + moment_flops(config, moments, batch * time)
    cols = [layer_shapes(config)[LINEAR_GROUPS[stage][0]][1] for stage in added]
    of_inputs = sum(second_moment(batch * time, c, tile_size(c)) for c in cols)
    assert moment_flops(config, moments._replace(crosses={}), batch * time) == of_inputs


def test_gradient_of_activations(config, batch, time):
    block, _ = parameters(config)
    x = hidden(config, batch, time)
    counted = count(lambda b, x, dy: block_backward(config, b, x, dy, 2), block, x, x)
    assert counted == flops.block_backward(config, batch, time)


def test_tuning(config, batch, time):
    block, _ = parameters(config)
    flat = {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(block)
    }
    weights = {n: array(*p.shape[::-1]) if "kernel" in n else p for n, p in flat.items()}
    assert len([n for n in weights if "kernel" in n]) == len(LINEAR_LAYERS)
    x = hidden(config, batch, time)
    counted = count(lambda w, x, y: finetune._gradients(config, w, {}, x, y, 1.0), weights, x, x)
    assert counted == flops.block_tuning(config, batch, time)


def test_head(config, batch, time):
    _, outer = parameters(config)
    x, tokens = hidden(config, batch, time), array(batch, time, dtype=jnp.int32)

    def counted(function, *args):
        return count(lambda *a: function(config, *a), outer, *args)

    assert counted(head_logits, x) == flops.logits(config, batch, time)
    assert counted(token_nll, x, tokens) == flops.head_forward(config, batch, time)
    assert counted(head_backward, x, tokens) == flops.head_backward(config, batch, time)
