"""Stands in for Progress."""


class Steps:
    """Counts as Progress does; fails once it has counted to `limit`."""

    def __init__(self, limit=None):
        self.skipped = self.advanced = 0
        self.limit = limit

    def skip(self, steps, work=None):
        self.skipped += steps

    def note(self, text):
        pass

    def advance(self, text="", steps=1, work=None):
        self.advanced += steps
        if self.advanced == self.limit:
            raise KeyboardInterrupt
