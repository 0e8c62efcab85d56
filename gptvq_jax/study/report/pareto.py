"""Which of several points are worth having."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Points that no other one beats: at most as much in both numbers, and less in one.

    Args:
      points: two numbers each, finite, of which less is better.

    Returns:
      Their places in `points`, by the first number; of equal points all.
    """
    order = sorted(range(len(points)), key=lambda place: points[place])
    front: list[int] = []
    for place in order:
        if not front or points[place][1] < points[front[-1]][1] or (
            points[place] == points[front[-1]]
        ):  # fmt: skip
            front.append(place)
    return front
