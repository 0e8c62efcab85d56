"""Texts of local files, every one of them valid Unicode; what is not is named with its line.

A tokenizer takes no lone surrogate and would spend tokens on a byte order mark; a text in another
encoding would calibrate the model on characters that nobody wrote.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from gptvq_jax.console.errors import first_line

# First bytes of what is often named like a text.
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_txt(path: Path) -> Iterator[str]:
    """The one text of a file."""
    yield "".join(text_lines(path))


def read_jsonl(path: Path) -> Iterator[str]:
    """The field "text" of each line."""
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except RecursionError:
            raise ValueError(f"{path} line {number} is nested too deeply to be read") from None
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f'{path} line {number} is not a JSON object with "text": "..."')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path} line {number} has a surrogate without its other half, "
                f"\\u{ord(text[error.start]):04x}, in its text; write the character that is meant, "
                "or remove it"
            ) from None
        yield text


def read_parquet(path: Path) -> Iterator[str]:
    """The column "text"; nulls are left out."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        # Where a page has a checksum, it is compared.
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_column(path, file.schema_arrow)
            for batch in file.iter_batches(columns=["text"]):
                # Bytes first: not every file that says it holds UTF-8 does.
                column = batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                for data in column.to_pylist():
                    row += 1
                    if data is not None:
                        yield data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} row {row} is not UTF-8 text: {error}; write the column 'text' as UTF-8"
        ) from None
    except pyarrow.ArrowNotImplementedError as error:
        raise ValueError(
            f"{path} cannot be read ({first_line(error)}); write it without that, or as .jsonl"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a complete Parquet file, it fails after row {row} "
            f"({first_line(error)}); get or write it again"
        ) from None


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def check_file(path: Path) -> None:
    """Checks what can be told at once.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it cannot be read twice, or is packed.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file in it")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; write the text to one, it is read twice")
    with path.open("rb") as file:
        start = file.read(8)
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is not UTF-8 text but {name} data; unpack it first")
    if start[:4] == b"PAR1" and path.suffix.lower() != ".parquet":
        raise ValueError(f"{path} is not UTF-8 text but a Parquet file; name it .parquet")


def text_lines(path: Path) -> Iterator[str]:
    """Lines, each with a newline at its end; without a byte order mark."""
    # Bytes that are not UTF-8 become lone surrogates, which their line is searched for.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                byte = ord(line[error.start]) - 0xDC00
                raise _not_utf8(path, number, f"byte 0x{byte:02x}", "LATIN1") from None
            if "\0" in line:  # no text has them, but UTF-16 does at every second byte
                raise _not_utf8(path, number, "a NUL", "UTF-16")
            yield line


def _not_utf8(path: Path, number: int, found: str, encoding: str) -> ValueError:
    with path.open("rb") as file:
        start = file.read(4)
    for mark, name in _WIDE.items():
        if start.startswith(mark):
            found, encoding = f"a byte order mark of {name}", name
            break
    return ValueError(
        f"{path} line {number} is not UTF-8 text: it has {found}; convert it, as with iconv -f "
        f"{encoding} -t UTF-8"
    )


def _check_column(path: Path, schema) -> None:
    import pyarrow

    count = schema.names.count("text")
    if count != 1:
        has = "no column" if count == 0 else f"{count} columns"
        raise ValueError(f"{path} has {has} 'text', only {schema.names}; rename one")
    kind = schema.field("text").type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    known = (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_string_view,
        pyarrow.types.is_null,
    )
    if not any(is_kind(value) for is_kind in known):
        raise ValueError(f"{path} column 'text' holds {kind}, not strings; convert it to strings")
