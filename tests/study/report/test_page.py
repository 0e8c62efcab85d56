"""The page: it parses, has everything, loads nothing, and lets no text become markup."""

import contextlib
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from result_files import (
    LAYERS,
    PROTOCOL,
    comparison,
    dimensions,
    layer_row,
    summary_row,
    write_run,
    write_sweep,
)

from gptvq_jax.console.comparison_text import protocol_text
from gptvq_jax.study.report.drawing import WIDTH
from gptvq_jax.study.report.report import report

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Elements and texts of a page, whose tags must be balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.text, self.loads = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.loads += [v for n, v in attributes if n in ("src", "href", "xlink:href")]
        assert not any(name.startswith("on") for name in values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def made(path, **options):
    """The page of a directory, as text and taken apart."""
    page = report([path], ask=False, **options)
    text = page.read_text()
    return text, Page(text), page.parent


def table(text):
    """Rows of the table, as texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.S)
    return [[re.sub("<.*?>", "", c) for c in re.findall(r"<t[hd].*?</t[hd]>", r)] for r in rows]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The page of a sweep, taken apart, its directory, and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return *made(dimensions(tmp_path_factory.mktemp("sweep") / "s")), out.getvalue()


def test_a_sweep(swept):
    text, page, output, printed = swept
    head, *rows = table(text)
    assert head[:5] == ["cell", "state", "format", "vq.dim", "vq.bits"]
    assert [row[0] for row in rows] == ["1d_2b", "1d_3b", "2d_2b", "2d_3b", "8d"]
    by_title = dict(zip(head, rows[3], strict=True))
    assert (by_title["vq.dim"], by_title["vq.bits"]) == ("2", "3.0")
    assert (by_title["perplexity"], by_title["float perplexity"]) == ("16.000", "15.000")
    assert by_title["mean KL, nats/token"] == "0.4 \N{PLUS-MINUS SIGN} 0.001"
    assert "<dt>2d_3b</dt><dd><code>python scripts/sweep.py --cells=2d_3b</code></dd>" in text
    assert [row[1] for row in rows] == ["done"] * 4 + ["failed"]
    names = {path.stem for path in (output / "figures").glob("*.svg")}
    assert {"perplexity_bits", "kl_bits", "sqnr_dimension", "error_layers"} < names
    assert {"error_depth", "code_usage", "time_stages", "cell1_error", "cell4_error"} < names
    assert names == {path.stem for path in (output / "figures").glob("*.png")}
    assert names <= set(page.ids)  # every one of them is on the page
    *notes, last = printed.splitlines()
    assert last == str(output / "index.html")
    missing = "1 of 5 cells failed: 8d (vq.dim=8 must be 1, 2 or 4)"
    assert notes == [missing] and missing in "".join(page.text)


def test_pictures_are_whole(swept):
    _, page, output, _ = swept
    assert page.tags.count("svg") == len(list((output / "figures").glob("*.svg"))) > 8
    for path in (output / "figures").glob("*.svg"):
        assert ET.parse(path).getroot().tag == f"{SVG}svg"
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_page_loads_nothing_and_names_everything_once(swept):
    text, page, output, _ = swept
    for link in page.loads:  # downloads beside it, and places in it
        assert link[1:] in page.ids if link.startswith("#") else (output / link).is_file()
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"url\(#(.*?)\)", text)) <= set(page.ids)


def test_figures_take_the_colour_of_the_page_and_stay_legible_on_a_phone(swept):
    text, *_ = swept
    assert "prefers-color-scheme: dark" in text and 'content="width=device-width' in text
    elements = re.findall(r"<svg .*?</svg>", text, re.S)
    for element in map(ET.fromstring, elements):
        assert element.get("viewBox").startswith(f"0 0 {WIDTH} ") and not element.get("width")
        texts = list(element.iter(f"{SVG}text"))
        sizes = [float(re.search(r"font(?:-size)?: ([\d.]+)px", t.get("style"))[1]) for t in texts]
        room = 390 - 2 * 16 - 2 * 5  # between the edges of the page and of a figure's card
        assert texts and min(sizes) * room / WIDTH >= 10
        for other in element.iter():
            colours = re.findall(r"(?:fill|stroke): (#\w+)", other.get("style", ""))
            assert not {"#000000", "#ffffff", "#1b1b1c"} & set(colours)
        assert any("currentColor" in (e.get("style") or "") for e in element.iter())


EVIL = "<script>alert(1)</script>&\"'$x^{$"


def test_texts_of_files_are_no_markup(tmp_path):
    layers = [layer_row(b, f"{EVIL}{b}") for b in range(2)]
    summary = summary_row(evaluation=EVIL, processor=EVIL, calibration=EVIL, stages={EVIL: 2.0})
    summary["protocol"] = {**PROTOCOL, "split": EVIL, "joiner": EVIL}
    rows = [{"cell": EVIL, **summary}, {"cell": "b", "status": "failed", "error": EVIL}]
    sweep = write_sweep(
        tmp_path / "s",
        {EVIL: {"model": EVIL}, "b": {EVIL: 1}},
        rows,
        refused=[{"name": EVIL, "reason": f"\x1b[31m{EVIL}\n"}],
    )
    write_run(sweep / "cells" / EVIL, [*layers, summary])
    text, page, output = made(sweep)
    assert page.tags.count("script") == 1 and "alert(1)</script>" not in text
    assert "".join(page.text).count(EVIL) >= 6
    for path in (output / "figures").glob("*.svg"):
        ET.parse(path)
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


def test_a_single_run_and_what_it_lacks(tmp_path, capsys):
    rows = [layer_row(b, n, bits=2 + b, dim=1 + b) for b in range(2) for n in LAYERS]
    run = write_run(tmp_path / "w", [*rows, summary_row()], {"damping": 0.5})
    text, page, output = made(run, output=tmp_path / "elsewhere")
    assert output == tmp_path / "elsewhere" and not (run / "report").exists()
    assert {"error", "bits", "time_stages"} <= set(page.ids)
    assert "<dt>damping</dt><dd>0.5</dd>" in text and "not noted" in text
    assert "no KL divergences of w: their figure is left out" in capsys.readouterr().out


def test_a_run_without_a_summary(tmp_path, capsys):
    run = write_run(tmp_path / "w", [layer_row(b) for b in range(2)])
    _, page, _ = made(run)
    assert "error" in page.ids and "perplexity_bits" not in page.ids
    notes = capsys.readouterr().out
    assert "w is not finished" in notes and "no perplexities" in notes and "no times" in notes


def test_the_header_says_how_the_text_was_cut_and_the_table_ends_with_a_sentence(tmp_path):
    rows = [layer_row(unused_centroids=0), layer_row(1, unused_centroids=1), layer_row(2)]
    more = {"protocol": PROTOCOL, "calibration": "4 x 32 tokens of t.txt"}
    text, page, _ = made(write_run(tmp_path / "w", [*rows, summary_row(**more)]))
    lines = "".join(page.text)
    assert (
        "Calibration 4 x 32 tokens of t.txt; evaluation 2 x 32 tokens of t.txt; on a pro" in lines
    )
    assert f"Protocol: {protocol_text(PROTOCOL)}." in lines and r'joined by "\n\n"' in lines
    assert "1 centroid is unused, in 1 of 3 layers; the most, 1, in self_attn/q_proj of b" in lines
    assert "unused" not in page.ids


def test_an_unfinished_sweep_is_one_line_and_axes_that_repeat_a_field_are_no_columns(tmp_path):
    cells = {f"{dim}d_{bits}b": {"vq.dim": dim, "vq.bits": float(bits)}
             for dim in (1, 2) for bits in (2, 3, 4)}  # fmt: skip
    sweep = write_sweep(tmp_path / "s", cells, [{"cell": "1d_2b", **summary_row()}])
    record = json.loads((sweep / "sweep.json").read_text())
    for cell in record["cells"]:
        dim, bits = cell["name"].split("_")
        cell["point"] = {"width": f"dim{dim[0]}", "bits": bits, "recipe": f"r{int(bits[0]) + 1}"}
    (sweep / "sweep.json").write_text(json.dumps(record))
    text, page, _ = made(sweep)
    head, *rows = table(text)
    assert head[1:6] == ["state", "recipe", "vq.dim", "vq.bits", "bits per value"]
    assert [row[1] for row in rows] == ["done"] + ["not finished"] * 5
    items = re.findall("<li>(.*?)</li>", text)
    assert [item for item in items if "1d_3b" in item] == [
        "5 of 6 cells are not finished: 1d_3b, 1d_4b, 2d_2b and 2 more"
    ]


def test_a_directory_that_is_given_twice_is_drawn_once(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "w", [layer_row(), summary_row()])
    page = report([run, tmp_path / "w" / ".." / "w"], ask=False).read_text()
    assert "<h1>w: 1 run</h1>" in page
    assert "w/../w is given twice; it is drawn once" in capsys.readouterr().out


def test_the_same_results_make_the_same_page(tmp_path):
    rows = [layer_row(), summary_row(comparison=comparison(0.1))]
    run = write_run(tmp_path / "w", rows)
    first, _, output = made(run)
    pictures = {path: path.read_bytes() for path in (output / "figures").iterdir()}
    assert made(run)[0] == first
    assert pictures == {path: path.read_bytes() for path in (output / "figures").iterdir()}


def test_an_output_that_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "w", [layer_row()])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to .*; pass another directory with --outp"):
        report([run], tmp_path / "file" / "x")
