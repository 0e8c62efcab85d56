"""Counts the kernels that a program compiled for a GPU launches, from its text."""

import re

_OPERATION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(")
# What names or shapes values, and launches nothing.
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "copy-done"),
    "opt-barrier",
}


def launches(text: str) -> int:
    """Kernels of one call; of a conditional, those of the branch with most.

    The condition of a loop whose length is known is not evaluated.

    Args:
      text: of the compiled program.

    Raises:
      ValueError: a loop has no known length: how often it runs is not in the program.
    """
    computations, entry = _computations(text)

    def count(name: str) -> int:
        return sum(map(of_line, computations[name]))

    def of_line(line: str) -> int:
        match = _OPERATION.match(line)
        if match is None or match[1] in _FREE:
            return 0
        if match[1] == "while":
            length = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            if length is None:
                raise ValueError(f"a loop of unknown length: {line[:200]}")
            return int(length[1]) * count(_named("body", line))
        if match[1] == "call":
            return count(_named("to_apply", line))
        if match[1] == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)[1]
            return 1 + max(count(name.strip().lstrip("%")) for name in branches.split(","))
        return 1

    return count(entry)


def _named(attribute: str, line: str) -> str:
    return re.search(attribute + r"=%?([\w.\-]+)", line)[1]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found, entry, lines = {}, "", []
    for line in text.splitlines():
        if not line.startswith(" ") and line.endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
            lines = found[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("  "):
            lines.append(line.strip())
    return found, entry
