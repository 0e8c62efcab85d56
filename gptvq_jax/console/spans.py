"""Spans of time, such as those in which something compiled, and what two kinds of them share."""


class Spans:
    """Disjoint spans, rising; one that is added ends no earlier than all before it."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []

    def __iter__(self):
        return iter(self._spans)

    @property
    def seconds(self) -> float:
        return sum(end - start for start, end in self._spans)

    def add(self, start: float, end: float) -> None:
        """Adds [start, end]; what it overlaps or touches becomes one span with it."""
        while self._spans and self._spans[-1][1] >= start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))

    def shared(self, other: "Spans") -> float:
        """Seconds that are in both."""
        total, mine, others = 0.0, list(self), list(other)
        i = j = 0
        while i < len(mine) and j < len(others):
            start = max(mine[i][0], others[j][0])
            end = min(mine[i][1], others[j][1])
            total += max(0.0, end - start)
            if mine[i][1] < others[j][1]:
                i += 1
            else:
                j += 1
        return total

    def since(self, start: float) -> float:
        """Seconds that are later than `start`."""
        total = 0.0
        for first, last in reversed(self._spans):
            if last <= start:
                break
            total += last - max(first, start)
        return total
