"""Local texts: Unicode or an error that names the file, the line and the way out."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from gptvq_jax.data import documents

TEXTS = ["First text.", "Zweiter Text über Öl."]


def read(path):
    return list(documents(str(path), "test"))


def write_parquet(path, column, name="text"):
    pyarrow.parquet.write_table(pyarrow.table({name: column}), path)


def test_each_format(tmp_path):
    txt, jsonl, parquet = (tmp_path / f"t{suffix}" for suffix in (".txt", ".jsonl", ".parquet"))
    txt.write_text("\n".join(TEXTS), encoding="utf-8")
    jsonl.write_text(
        '{"text": "First text."}\n\n{"id": 1, "text": "Zweiter Text über Öl."}\n', encoding="utf-8"
    )
    table = pyarrow.table({"text": [TEXTS[0], None, "", TEXTS[1]], "id": [0, 1, 2, 3]})
    pyarrow.parquet.write_table(table, parquet)
    assert read(txt) == ["\n".join(TEXTS)]
    assert read(jsonl) == read(parquet) == TEXTS


@pytest.mark.parametrize("name", ["t.txt", "t.TXT", "t.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = "Öl\r\nund" if "jsonl" not in name else '{"text": "Öl\\nund"}\r\n'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / name) == ["Öl\nund"]


LATIN1 = "Zeile\nÖl\n".encode("latin-1")
GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.txt", b"", "t.txt contains no text"),
        ("t.txt", b" \n\t", "t.txt contains no text"),
        ("t.txt", LATIN1, "t.txt line 2 is not UTF-8 text: .* 0xd6; .*iconv -f LATIN1 -t UTF-8"),
        ("t.txt", b"a\n\n\xed\xa0\x80", "t.txt line 3 is not UTF-8 text: it has byte 0xed"),
        ("t.txt", b"a\nb \xe2\x82", "t.txt line 2 is not UTF-8 text: it has byte 0xe2"),
        ("t.txt", "Text".encode("utf-16"), "mark of UTF-16; .* iconv -f UTF-16 -t UTF-8"),
        ("t.txt", "Text".encode("utf-32"), "mark of UTF-32; .* iconv -f UTF-32 -t UTF-8"),
        ("t.txt", b"\xfe\xff\0T", "t.txt line 1 is not UTF-8 text: .* mark of UTF-16"),
        ("t.txt", "Text".encode("utf-16-le"), "t.txt line 1 is not UTF-8 text: it has a NUL"),
        ("t.txt", gzip.compress(b"text", mtime=0), "is not UTF-8 text but gzip data; unpack it"),
        ("t.jsonl", gzip.compress(GOOD, mtime=0), "t.jsonl is not UTF-8 text but gzip data"),
        ("t.txt", b"PAR1....PAR1", "a Parquet file; name it .parquet"),
        ("t.jsonl", b"", "t.jsonl contains no text"),
        ("t.jsonl", b'{"text": ""}\n', "t.jsonl contains no text"),
        ("t.jsonl", GOOD + b'{"txt": "b"}\n', "t.jsonl line 2 is not a JSON object"),
        ("t.jsonl", GOOD + b'{"text": \n', "t.jsonl line 2 is not a JSON object"),
        ("t.jsonl", GOOD + b'\n{"text": 3}\n', "t.jsonl line 3 is not a JSON object"),
        ("t.jsonl", b'["text"]\n', "t.jsonl line 1 is not a JSON object"),
        ("t.jsonl", b"null\n", "t.jsonl line 1 is not a JSON object"),
        ("t.jsonl", GOOD + b"1" * 5000, "t.jsonl line 2 is not a JSON object"),
        ("t.jsonl", GOOD + b"[" * 100_000, "t.jsonl line 2 is nested too deeply"),
        ("t.jsonl", b'{"text": "a", "b": ' + b"[" * 10**5, "t.jsonl line 1 is nested too deeply"),
        ("t.jsonl", GOOD + b'{"text": "\xd6l"}', "t.jsonl line 2 is not UTF-8 text: .*LATIN1"),
        ("t.jsonl", GOOD + b'{"text": "a\\ud83d"}', r"line 2 has a surrogate .* \\ud83d, in its"),
        ("t.parquet", b"", "t.parquet is not a complete Parquet file"),
        ("t.parquet", b"PAR1 but not really", "t.parquet is not a complete Parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_both_halves_of_a_surrogate_are_a_character(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "\U0001f98a"}))  # escaped as two
    assert read(tmp_path / "t.jsonl") == ["\U0001f98a"]


KINDS = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_strings_of_every_kind(tmp_path, kind):
    column = pyarrow.array([TEXTS[0], None, TEXTS[1]], pyarrow.string()).cast(KINDS[kind])
    write_parquet(tmp_path / "t.parquet", column)
    assert read(tmp_path / "t.parquet") == TEXTS


@pytest.mark.parametrize(
    "column, kind",
    [
        ([b"bytes"], "binary"),
        ([1, 2], "int64"),
        ([["a", "b"]], "list<.*string>"),
        ([{"a": "b"}], "struct<a: string>"),
        ([True], "bool"),
        ([1.5], "double"),
    ],
)
def test_parquet_columns_of_something_else(tmp_path, column, kind):
    write_parquet(tmp_path / "t.parquet", column)
    with pytest.raises(ValueError, match=rf"t\.parquet column 'text' holds {kind}, not strings"):
        read(tmp_path / "t.parquet")


def test_parquet_without_text(tmp_path):
    path = tmp_path / "t.parquet"
    write_parquet(path, ["a"], "body")
    with pytest.raises(ValueError, match=r"has no column 'text', only \['body'\]"):
        read(path)
    for nothing in (pyarrow.nulls(3), pyarrow.array([None], pyarrow.string())):
        write_parquet(path, nothing)
        with pytest.raises(ValueError, match=r"t\.parquet contains no text"):
            read(path)


def test_a_parquet_row_that_is_not_utf8(tmp_path):
    broken = pyarrow.array([b"good", b"\xd6l"], pyarrow.binary()).view(pyarrow.string())
    write_parquet(tmp_path / "t.parquet", broken)
    with pytest.raises(ValueError, match=r"t\.parquet row 2 is not UTF-8 text: .*0xd6"):
        read(tmp_path / "t.parquet")


def test_a_damaged_parquet_page(tmp_path):
    path = tmp_path / "t.parquet"
    texts = [f"text number {i}" * 9 for i in range(2000)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    for at in (30, len(data) // 2):  # the second makes another text, which only a checksum tells
        damaged = bytearray(data)
        damaged[at] ^= 255
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t\.parquet is not a complete .* after row \d+ \("):
            read(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.txt"):
        documents(str(tmp_path / "absent.txt"), "train")
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(ValueError, match=r"d\.txt is a directory; name a file in it"):
        documents(str(tmp_path / "d.txt"), "train")
    os.mkfifo(tmp_path / "f.txt")
    with pytest.raises(ValueError, match=r"f\.txt is no regular file"):
        documents(str(tmp_path / "f.txt"), "train")
    with pytest.raises(FileNotFoundError, match="no such file: ~nobody-here/a.txt"):
        documents("~nobody-here/a.txt", "train")
