"""The progress bar of long runs: steps done, elapsed time, ETA, what is going on."""

from tqdm import tqdm


class Progress:
    """A bar over a known number of steps."""

    def __init__(self, total: int, description: str, unit: str):
        self._bar = tqdm(
            total=total, desc=description, unit=unit, dynamic_ncols=True, smoothing=0.05
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def skip(self, steps: int) -> None:
        """Steps that an earlier run finished: they count as done, but not towards the ETA."""
        self._bar.initial += steps
        self._bar.n += steps
        self._bar.refresh()

    def note(self, text: str) -> None:
        """Says what is going on."""
        self._bar.set_postfix_str(text)

    def advance(self, text: str = "", steps: int = 1) -> None:
        """Counts finished steps."""
        if text:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(steps)
