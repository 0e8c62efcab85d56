"""The kind of a linear layer, which layers of all blocks and of all experts of a block share."""

import re

_EXPERT = re.compile(r"/experts_\d+/")


def layer_kind(name: str) -> str:
    """The name of a layer; for mlp/experts_3/up_proj, mlp/experts/up_proj."""
    return _EXPERT.sub("/experts/", name)
