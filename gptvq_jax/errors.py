"""What other libraries' exceptions have to say, in one line."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
