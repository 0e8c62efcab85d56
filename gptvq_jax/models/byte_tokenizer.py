"""A tokenizer for models that nobody has trained: a token for every byte, and no merges."""

from collections.abc import Sequence
from typing import Any

SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1 and 2
BOS, EOS = 1, 2


def byte_tokenizer(special: Sequence[str] = ()) -> Any:
    """A transformers tokenizer with 256 tokens, behind those that are special.

    Args:
      special: SPECIAL, or none.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {}
    if special:
        tokenizer.add_special_tokens(list(special))
        names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
