"""Exports and imports say beforehand what they take on the disk, and it is what they take."""

import shutil
from types import SimpleNamespace

import pytest
import tiny_checkpoint as tiny

from gptvq_jax.exchange import hf_layout, import_aqlm
from gptvq_jax.exchange.aqlm_source import AQLMSource
from gptvq_jax.exchange.hf_aqlm import hf_aqlm
from gptvq_jax.exchange.hf_dense import hf_dense
from gptvq_jax.files.disk_space import FullDiskError, directory_bytes
from gptvq_jax.models.hf_directory import HFDirectory
from gptvq_jax.storage.checkpoint import PackedCheckpoint
from gptvq_jax.storage.overhead import checkpoint_overhead
from gptvq_jax.study.sample_tensors import TensorFormat

FORMAT = TensorFormat(8, 12, codebook_bits=16, row_scales=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "c"
    blocks = [tiny.random_block(index, tiny.WHOLE_VECTORS, FORMAT) for index in (0, 1)]
    return PackedCheckpoint(tiny.write_checkpoint(path, tiny.WHOLE_VECTORS, blocks=blocks))


def refused_without_room(monkeypatch, num_bytes, write, path):
    with monkeypatch.context() as patch, pytest.raises(FullDiskError) as caught:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=num_bytes - 1))
        write()
    assert f"{path} needs {num_bytes / 1e9:.6f} GB more" in str(caught.value)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    "packed, dtype", [(False, "float32"), (False, "bfloat16"), (True, "float16")]
)
def test_an_export_takes_what_was_said(checkpoint, tmp_path, monkeypatch, packed, dtype):
    said = hf_layout._num_bytes(checkpoint, dtype, packed)
    write = hf_aqlm if packed else hf_dense

    def run():
        write(checkpoint, tmp_path / "out", dtype, shard_bytes=20_000)

    refused_without_room(monkeypatch, said, run, tmp_path / "out")
    run()
    written = directory_bytes(tmp_path / "out")
    tensors = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert tensors < written <= said
    names = sum(len(checkpoint.manifest[section]) for section in ("layers", "dense"))
    assert said - hf_layout._CONFIG_BYTES - names * hf_layout._ENTRY_BYTES <= written


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_import_takes_what_was_said(checkpoint, tmp_path, monkeypatch, dtype):
    hf_aqlm(checkpoint, tmp_path / "model")
    source, path = AQLMSource(HFDirectory(tmp_path / "model")), tmp_path / "new/out"
    path.parent.mkdir()
    said = import_aqlm._num_bytes(source, dtype)

    def run():
        import_aqlm.import_aqlm(source, path, dtype)

    refused_without_room(monkeypatch, said, run, path)
    run()
    arrays = PackedCheckpoint(path).manifest
    sizes = [arrays[f"{part}_bytes"] for part in ("quantized", "embedding", "dense")]
    assert said - checkpoint_overhead(source.config) == sum(sizes)
    assert directory_bytes(path) <= said
