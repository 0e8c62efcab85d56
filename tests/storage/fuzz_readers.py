"""Runs atheris, which is guided by coverage, on the readers of files that anyone may have written.

    python tests/fuzz_readers.py READER [-max_total_time=SECONDS] [other options of libFuzzer]

READER: record, manifest, index (of safetensors), safetensors, or gguf. A crash is an exception that
is no user error, or a message of more than one line.
"""

import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gptvq_jax", "gguf.gguf_reader"]):
    import tiny_checkpoint as tiny
    from gguf import GGUFWriter

    from gptvq_jax.models.gguf_source import GGUFSource
    from gptvq_jax.models.hf_directory import HFDirectory
    from gptvq_jax.storage.checkpoint import PackedCheckpoint
    from gptvq_jax.storage.tree_io import read_record

USER_ERRORS = (ValueError, NotImplementedError, OSError)


def record(scratch: Path):
    """A file to write, what reads it, and examples of its content."""
    whole = tiny.write_checkpoint(scratch / "whole")
    return (
        scratch / "record.json",
        lambda: read_record(scratch),
        [
            (whole / "outer/record.json").read_bytes(),
            (whole / "blocks/00000/record.json").read_bytes(),
        ],
    )


def manifest(scratch: Path):
    whole = tiny.write_checkpoint(scratch / "whole")
    content = (whole / "manifest.json").read_bytes()
    return whole / "manifest.json", lambda: PackedCheckpoint(whole), [content]


def index(scratch: Path):
    (scratch / "config.json").write_text("{}")
    content = b'{"metadata": {}, "weight_map": {"model.norm.weight": "a.safetensors"}}'
    path = scratch / "model.safetensors.index.json"
    return path, lambda: HFDirectory(scratch).files, [content]


def safetensors(scratch: Path):
    (scratch / "config.json").write_text("{}")
    header = b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
    content = struct.pack("<Q", len(header)) + header + b"1234"

    def read():
        directory = HFDirectory(scratch)
        for name in directory.files:
            directory.read(name)
        return directory.fingerprint

    return scratch / "model.safetensors", read, [content]


def gguf(scratch: Path):
    path = scratch / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(8)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", tiny.random_outer(0)["embed_tokens"]["embedding"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, lambda: GGUFSource(path), [path.read_bytes()]


def main() -> None:
    name, options = sys.argv[1], sys.argv[2:]
    scratch = Path(tempfile.mkdtemp(prefix="gptvq-fuzz-"))
    readers = {f.__name__: f for f in (record, manifest, index, safetensors, gguf)}
    path, read, examples = readers[name](scratch)
    corpus = scratch / "corpus"
    corpus.mkdir()
    for number, content in enumerate(examples):
        (corpus / str(number)).write_bytes(content)

    def one_input(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read()
        except USER_ERRORS as error:
            assert len(str(error).splitlines()) == 1, repr(str(error))
            assert str(scratch) in str(error), str(error)

    # An input that takes longer than 5 s, or more than 2 GiB, counts as a crash too.
    limits = ["-timeout=5", "-rss_limit_mb=4096", f"-artifact_prefix={scratch}/"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
