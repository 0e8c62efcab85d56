# ruff: noqa: RUF001  dashes and quotation marks are meant as they are
"""Turns MediaWiki markup into running prose: headings and paragraphs, one per line.

Tables, lists of short items, references, files and boxes are left out. A paragraph that would read
broken without something that cannot be written as text (a formula, an unknown template) is left
out as a whole: for a language model a gap between paragraphs is harmless, a gap in a sentence not.
"""

import re

import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.nodes import Node, Tag, Template
from mwparserfromhell.wikicode import Wikicode

# Sections that list other works instead of telling something.
_APPENDICES = {
    "bibliography", "citations", "discography", "external links", "filmography", "footnotes",
    "further reading", "gallery", "general references", "literature", "notes",
    "notes and references", "publications", "references", "references and notes", "see also",
    "selected works", "sources", "works", "works cited",
}  # fmt: skip
_DROPPED_LINKS = re.compile(r"\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)?)\s*:", re.I)
_DROPPED_TAGS = {
    "div", "gallery", "imagemap", "pre", "ref", "references", "score", "source",
    "syntaxhighlight", "table", "timeline",
}  # fmt: skip
# Templates that add nothing to a sentence: citations, doubts, pronunciation, pointers, icons.
_DROPPED_TEMPLATES = re.compile(
    r"(cit(e|ation)|vcite|sfn|harv|rp$|refn|efn|#tag|ref|note|ipa|respell|pron|audio|lang-|coord"
    r"|clarify|when|who|which|where$|why$|dubious|fact|page needed|verif|full|better|dead|by whom"
    r"|according|contradict|update|unreferenced|expand|cn$|main|see|further|details|use |pp-|icon"
    r"|flagicon|anchor|portal|commons|wiki|clear|-$|redirect|about|other|distinguish|hatnote|for$"
    r"|good|featured|toc|col|div|end|authority|osm|disputed|failed|specify|vague|weasel|zh$|zh-|:)"
)
# Inline templates that are words of their sentence -> the parameter that holds the words.
_KEPT_TEMPLATES = {
    "abbr": "1", "angbr": "1", "big": "1", "flag": "1", "lang": "2", "linktext": "1",
    "nihongo": "1", "nobr": "1", "nowrap": "1", "sc": "1", "script": "2", "sic": "1",
    "small": "1", "smallcaps": "1", "smaller": "1", "unicode": "1", "vanchor": "1",
    "quote": "1", "blockquote": "1", "bquote": "1", "polytonic": "1", "tooltip": "1",
}  # fmt: skip
_LITERAL_TEMPLATES = {
    "'s": "'s", "nbsp": " ", "spaces": " ", "mdash": "—", "mdashb": "—", "ndash": "–",
    "spaced ndash": " – ", "snd": " – ", "'": "'", "ad": "AD", "bc": "BC", "=": "=", "!": "|",
}  # fmt: skip
_UNITS = {"sqmi": "square miles", "sqkm": "square kilometres", "km2": "square kilometres",
          "m2": "square metres", "m3": "cubic metres", "C": "°C", "F": "°F", "K": "K",
          "lb": "lb", "acre": "acres"}  # fmt: skip
_RANGES = {"-": "–", "–": "–", "to": " to ", "and": " and ", "or": " or ", "by": " by ", "x": " × "}
# Stands for what cannot be written as text: its paragraph goes with it.
_HOLE = "\x00"
_LEFTOVERS = (_HOLE, "{{", "}}", "[[", "]]", "{|", "|}", "<", "|", "http://", "https://")
_SHORTEST_PARAGRAPH = 60  # characters; below are captions and fragments


def clean_markup(title: str, markup: str) -> str:
    """Returns the prose of one article.

    Args:
      title: the article's title, which becomes the first line, "= title =".
      markup: its MediaWiki source.

    Returns:
      One line per paragraph, a blank line and a line "== heading ==" before each section that has
      any text. No tabs, no repeated spaces.
    """
    text = [f"= {title} ="]
    pending: list[tuple[int, str]] = []  # headings whose section has shown no text so far
    for level, line in _lines(mwparserfromhell.parse(markup)):
        if level:
            pending = [heading for heading in pending if heading[0] < level]
            pending.append((level, line))
        elif paragraph := _paragraph(line):
            text += [f"\n{'=' * depth} {heading} {'=' * depth}" for depth, heading in pending]
            text.append(paragraph)
            pending = []
    return "\n".join(text)


def _lines(code: Wikicode):
    """Yields (heading level, heading) and (0, line of text); skips appendices."""
    skipped_level = 0
    buffer: list[str] = []
    for node in code.nodes:
        if not isinstance(node, nodes.Heading):
            if not skipped_level:
                buffer.append(_render_node(node))
            continue
        yield from ((0, line) for line in "".join(buffer).split("\n"))
        buffer = []
        heading = _tidy(_render(node.title))
        if not skipped_level or node.level <= skipped_level:
            skipped_level = node.level if heading.lower() in _APPENDICES else 0
            if not skipped_level and heading and not _is_dirty(heading):
                yield node.level, heading
    yield from ((0, line) for line in "".join(buffer).split("\n"))


def _render(code: Wikicode) -> str:
    return "".join(map(_render_node, code.nodes))


def _render_node(node: Node) -> str:
    match node:
        case nodes.Text():
            return str(node.value)
        case nodes.HTMLEntity():
            return node.normalize()
        case nodes.Wikilink():
            if _DROPPED_LINKS.match(str(node.title)):
                return ""
            return _render(node.title if node.text is None else node.text).lstrip(":")
        case nodes.ExternalLink():
            return "" if node.title is None else _render(node.title)
        case Tag():
            return _render_tag(node)
        case Template():
            return _render_template(node)
        case nodes.Argument():
            return _HOLE
    return ""  # comments


def _render_tag(tag: Tag) -> str:
    name = str(tag.tag).strip().lower()
    if name in ("li", "dt", "dd"):
        # A bare marker: the item is the text that follows on its line.
        return str(tag.wiki_markup) if tag.wiki_markup else "\n*" + _render(tag.contents)
    if name == "br":
        return " "
    if name in _DROPPED_TAGS or tag.contents is None:
        return ""
    if name in ("math", "chem", "code"):
        return _HOLE
    contents = _render(tag.contents)
    if name == "sup" and contents.startswith(tuple("0123456789-−–+n")):
        return _HOLE  # 10<sup>6</sup> is not 106
    if name in ("blockquote", "p", "center", "ul", "ol", "dl"):
        return f"\n{contents}\n"
    return contents


def _render_template(template: Template) -> str:
    name = str(template.name).strip().lower().replace("_", " ")
    if name in _LITERAL_TEMPLATES:
        return _LITERAL_TEMPLATES[name]
    if name in _KEPT_TEMPLATES:
        key = _KEPT_TEMPLATES[name]
        return _render(template.get(key).value).strip() if template.has(key) else _HOLE
    if name in ("transl", "translit"):  # {{transl|ar|ALA|Allāh}}: language, standard, words
        words = [p.value for p in template.params if not p.showkey]
        return _render(words[-1]).strip() if words else _HOLE
    if name in ("convert", "cvt"):
        return _render_convert(template)
    if name == "as of":
        words = "as of" if template.has("lc") else "As of"
        dates = [str(p.value).strip() for p in template.params if not p.showkey]
        return " ".join([words, *reversed(dates)])
    if _DROPPED_TEMPLATES.match(name):
        return ""
    # What spans lines is a box beside the text.
    return "\n" if "\n" in str(template) else _HOLE


def _render_convert(template: Template) -> str:
    """{{convert|4|to|5|km|mi}} -> "4 to 5 km"."""
    values = [str(p.value).strip() for p in template.params if not p.showkey]
    words = values[0] if values else ""
    rest = values[1:]
    while len(rest) > 2 and rest[0] in _RANGES:
        words += _RANGES[rest[0]] + rest[1]
        rest = rest[2:]
    # {{convert|5|ft|4|in|cm}} is one length in two units.
    if not rest or (len(rest) > 2 and rest[1][:1].isdigit() and not rest[2][:1].isdigit()):
        return _HOLE
    return f"{words} {_UNITS.get(rest[0], rest[0])}"


def _is_dirty(text: str) -> bool:
    return any(mark in text for mark in _LEFTOVERS)


def _paragraph(line: str) -> str:
    """Returns the line made tidy, or "" if it is not prose."""
    text = _tidy(line.lstrip("*#;: \t"))
    is_sentence = re.search(r"[.!?…][\"'”’)]*$", text) and not text[:1].islower()
    return text if is_sentence and len(text) >= _SHORTEST_PARAGRAPH and not _is_dirty(text) else ""


def _tidy(text: str) -> str:
    """Closes the gaps that dropped markup leaves."""
    text = re.sub(r"''+|__[A-Z]+__|[\u200b\u200e\u200f\ufeff\u00ad]", "", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\(\s*([,;:–—-]\s*)+", "(", text)
    text = re.sub(r"([,;:]\s*)+\)", ")", text)
    text = re.sub(r"\s*(\(\s*\)|\[\s*\])", "", text)
    text = re.sub(r" +([,;:.!?)](?!\d))", r"\1", text)
    text = re.sub(r"\( +", "(", text)
    text = re.sub(r"([,;])(\s*[,;])+", r"\1", text)
    return text.strip()
