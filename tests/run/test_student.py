"""Loss and gradients of the whole packed model, block by block, against one plain program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpr_flops import count
from tiny_checkpoint import MODEL, TIED, random_outer, write_checkpoint

from gptvq_jax.console.stopwatch import Stopwatch
from gptvq_jax.methods import leaf_steps
from gptvq_jax.models import flops
from gptvq_jax.models.llama import Decoder, head_logits
from gptvq_jax.run import student as student_file
from gptvq_jax.run.embedding import head_on_device
from gptvq_jax.run.model_loss import divergence
from gptvq_jax.run.student import LAST_NORM, Student, Teacher
from gptvq_jax.storage.checkpoint import PackedCheckpoint

BATCH, TIME = 4, 12


def made(directory: Path, config=MODEL, micro_batch=BATCH):
    """A student of every kind of tensor; tokens, and what another model's last block leaves."""
    packed = PackedCheckpoint(write_checkpoint(directory, config))
    other = head_on_device(config, random_outer(8, config))
    student = Student(packed, Teacher(config, other), micro_batch, Stopwatch())
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (BATCH, TIME)).astype(np.int32)
    reference = rng.normal(size=(BATCH, TIME, config.hidden_size)).astype(np.float32)
    return student, packed, other, tokens, reference


_HEADS = [pytest.param(MODEL, id="head", marks=pytest.mark.slow), pytest.param(TIED, id="tied")]


@pytest.fixture(scope="module", params=_HEADS)
def everything(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("student") / "packed", request.param)


def plain_loss(student, packed, other, tokens, reference):
    """The loss as a function of all parameters, of one program."""
    config, outer = packed.config, jax.tree.map(jnp.asarray, packed.outer())
    states = student.states()
    blocks = [packed.block(i) for i in range(config.num_hidden_layers)]

    def loss(params):
        def weight(path):
            value = leaf_steps.decode(
                student.leaves[path], states[path]._replace(params=params[path])
            )
            return value.T if path.endswith("kernel") else value

        tree = {**outer, "norm": {"scale": weight(LAST_NORM)}}
        for index, block in enumerate(blocks):
            tree[f"layers_{index}"] = jax.tree_util.tree_map_with_path(
                lambda path, _, index=index: weight(
                    f"layers_{index}/" + "/".join(key.key for key in path)
                ),
                block,
            )
        q = jax.nn.log_softmax(Decoder(config).apply({"params": tree}, tokens))
        p = jax.nn.log_softmax(head_logits(config, other, jnp.asarray(reference)))
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))

    return loss


def test_loss_and_gradients_are_those_of_one_program(everything):
    student, packed, other, tokens, reference = everything
    states = student.states()
    kl, found = student.gradients(states, tokens, reference)
    params = {name: state.params for name, state in states.items()}
    loss = plain_loss(student, packed, other, tokens, reference)
    value, expected = jax.jit(jax.value_and_grad(loss))(params)
    assert float(np.mean(kl)) == pytest.approx(float(value), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, of_leaf in expected.items():
        assert found[name].keys() == of_leaf.keys()
        for parameter, gradient in of_leaf.items():
            size = np.abs(gradient).max()
            np.testing.assert_allclose(
                found[name][parameter], gradient, atol=2e-4 * size, err_msg=f"{name} {parameter}"
            )
    looked = student.divergences(states, tokens, reference)
    np.testing.assert_allclose(looked, kl, rtol=1e-6)


def test_micro_batches_add_up(everything):
    student, packed, other, tokens, reference = everything
    in_parts = Student(packed, Teacher(packed.config, other), BATCH // 2, Stopwatch())
    kl, whole = student.gradients(student.states(), tokens, reference)
    again, parts = in_parts.gradients(in_parts.states(), tokens, reference)
    np.testing.assert_allclose(again, kl, rtol=1e-5)
    assert parts.keys() == whole.keys()
    for name, of_leaf in whole.items():
        for parameter, gradient in of_leaf.items():
            size = np.abs(gradient).max()
            np.testing.assert_allclose(parts[name][parameter], gradient, atol=1e-5 * size)


@pytest.mark.parametrize(
    "size", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 64))]
)  # ends short, is all, is more
def test_the_loss_of_chunks(everything, size, monkeypatch):
    student, packed, other, _, reference = everything
    head = head_on_device(packed.config, packed.outer())
    x = np.random.default_rng(3).normal(size=reference.shape).astype(np.float32)
    monkeypatch.setattr("gptvq_jax.run.model_loss.loss_chunk", lambda *_: size)
    jax.clear_caches()
    arguments = packed.config, head, x, packed.config, other, reference
    kl, dx, of_scale = divergence(*arguments)
    jax.clear_caches()  # nor is the program of this size there for other tests

    def plain(scale, x):
        q = jax.nn.log_softmax(head_logits(packed.config, {**head, "norm": {"scale": scale}}, x))
        p = jax.nn.log_softmax(head_logits(packed.config, other, reference))
        of_windows = jnp.sum(jnp.exp(p) * (p - q), axis=(1, 2))
        return jnp.sum(of_windows), of_windows

    expected, of_windows = jax.grad(plain, (0, 1), has_aux=True)(head["norm"]["scale"], x)
    for found, wanted in ((of_scale, expected[0]), (dx, expected[1]), (kl, of_windows)):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_its_operations_are_those_of_the_traced_programs(everything):
    student, packed, other, tokens, reference = everything
    config, states = packed.config, student.states()
    of_block = student._decoded(0, states)
    x = jnp.asarray(reference)
    forward = count(lambda w, x: student_file._forward(of_block[0], w, {}, x), of_block[1], x)
    backward = count(
        lambda w, x: student_file._backward(of_block[0], w, {}, x, x, student._everywhere),
        of_block[1],
        x,
    )
    head = head_on_device(config, packed.outer())
    of_loss = count(
        lambda head, other, x: divergence(config, head, x, config, other, x), head, other, x
    )
    counted = config.num_hidden_layers * (forward + backward) + of_loss
    assert counted == flops.model_tuning(config, *tokens.shape)


_ON_DEVICES = """
import json, sys
from pathlib import Path
import jax, numpy as np
sys.path[:0] = {paths!r}
from test_student import made
student, packed, other, tokens, reference = made(Path(sys.argv[1]))
assert len(student._spread.mesh.devices) == {devices}, student._spread
states = student.states()
kl, found = student.gradients(states, tokens, reference)
again, finite = student.update(states, found, {rates})
again, _ = student.gradients(again, tokens, reference)
sums = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(found)]
print(json.dumps([float(kl.sum()), float(again.sum()), sums]))
"""


@pytest.mark.slow
def test_a_batch_over_several_devices_has_the_same_loss(tmp_path):
    """4 of 8 virtual devices, which divide the batch, and one."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1])]
    rates = "__import__('gptvq_jax').methods.leaf_steps.Rates(1e-2, 1e-2, 1e-2, 0.9, 0.95)"
    results = []
    for devices in (1, 8):
        code = _ON_DEVICES.format(paths=paths, rates=rates, devices=min(devices, BATCH))
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count="
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags}{devices}"}
        command = [sys.executable, "-c", code, str(tmp_path / str(devices))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads(done.stdout.splitlines()[-1]))
    one, several = results
    np.testing.assert_allclose(several[:2], one[:2], rtol=1e-5)
    assert one[1] < one[0]
    np.testing.assert_allclose(several[2], one[2], rtol=1e-3)
