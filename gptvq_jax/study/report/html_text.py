"""HTML in which no text of a file can become markup."""

import html

from gptvq_jax.console.errors import printable


class Markup(str):
    """HTML; any other text is escaped where it is put into an element."""


def element(name: str, *children: str, **attributes: str | None) -> Markup:
    """One element with what is in it.

    Args:
      name: of the tag.
      children: Markup as it is, texts escaped.
      attributes: a trailing _ is dropped and others become -, as in class_ and data_sort; with None
        they are left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Several after each other."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escaped(str(child)) for child in children)
    )


def escaped(text: str) -> str:
    """A text as it stands in HTML, which has no control characters but tabs and ends of lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return html.escape("".join(c if c in "\t\n" else printable(c) for c in text))
