"""Few lengths for many texts: what is padded to the same one shares its compiled programs."""

_SHORTEST = 16


def padded_length(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: powers of 2, and the middle between two.

    Two lengths in each doubling: padding adds less than half, 1/5 on average where the logarithms
    of lengths are spread evenly, and 2048 positions need 15 programs.

    Args:
      length: of a text, in tokens.
    """
    power = max(_SHORTEST, 1 << (int(length) - 1).bit_length())
    middle = power * 3 // 4
    return middle if _SHORTEST < length <= middle else power
