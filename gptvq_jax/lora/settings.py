"""What the training of an adapter depends on beside the model."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Of scripts/lora.py, whose flags have the same names.

    Raises:
      ValueError: a field is out of range, in words of the flag.
    """

    rank: int = 16
    alpha: float = 32.0  # B A counts alpha / rank times
    rslora: bool = False  # alpha / sqrt(rank) times instead
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # last parts of the names of layers
    dropout: float = 0.0  # of what A reads, while it is trained
    dataset: str = "wikipedia"
    chat: bool = False  # the dataset is chats, of which answers are learned
    seqlen: int = 512  # tokens of a window; of a chat, at most
    num_windows: int = 256  # of a text, that are trained on
    held_out: int = 8  # windows or chats that say when to stop
    steps: int = 300
    batch: int = 4  # windows per step
    lr: float = 2e-4  # largest learning rate of AdamW
    warmup: int | None = None  # steps in which it rises, then it falls along a cosine; None: 10,
    # or all where these are fewer
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 25  # steps between two looks at the held-out loss, and two saved states
    patience: int = 4  # stop after so many looks in a row without a gain; 0: never
    seed: int = 0

    def __post_init__(self):
        if self.warmup is None:
            object.__setattr__(self, "warmup", min(10, self.steps))
        for name in ("rank", "held_out", "steps", "batch", "eval_every"):
            self._check(getattr(self, name) >= 1, name, "at least 1")
        for name in ("warmup", "patience"):
            self._check(getattr(self, name) >= 0, name, "at least 0")
        for name in ("alpha", "lr", "clip"):
            value = getattr(self, name)
            self._check(0 < value < math.inf, name, "above 0")
        self._check(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0")
        self._check(0 <= self.dropout < 1, "dropout", "from 0 to below 1")
        self._check(self.seqlen >= 2, "seqlen", "at least 2")
        self._check(self.warmup <= self.steps, "warmup", f"at most --steps={self.steps}")
        self._check(len(self.targets) > 0, "targets", "names of layers, as q_proj,v_proj")
        if not self.chat and self.num_windows < self.batch:
            raise ValueError(
                f"--num_windows={self.num_windows} are fewer than a batch of {self.batch}; set "
                f"--num_windows={self.batch} or more, or a smaller --batch"
            )

    def _check(self, good: bool, name: str, text: str) -> None:
        if not good:
            raise ValueError(f"--{name}={getattr(self, name)!r} must be {text}")
