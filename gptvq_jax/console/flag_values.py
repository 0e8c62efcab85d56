"""What is wrong with the value of a flag, in words of the user."""

import re

_KINDS = {
    "invalid literal for int()": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument": "True or False",
}


def in_words(text: str) -> str:
    """What a flag must be, where a message has Python's own words for it.

    Args:
      text: of a flags.IllegalFlagValueError: "flag --NAME=VALUE: REASON". Any other stays.
    """
    for of_python, kind in _KINDS.items():
        found = re.match(rf"flag --([\w.]+)=(.*): \W*{re.escape(of_python)}", text)
        if found is not None:
            return f"--{found[1]} must be {kind}, not {found[2]!r}"
    return text
