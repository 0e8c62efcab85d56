"""A tokenizer built from the metadata of a GGUF file.

transformers can do this too, but only with PyTorch installed, and it splits the text of a "smollm"
vocabulary as GPT-2 does, where llama.cpp and the model's own tokenizer.json first set every numeral
apart. The ids differ only where several spaces or newlines precede a digit, or a space one like ½.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from gptvq_jax.console.errors import brief, first_line
from gptvq_jax.models.fields import TEXT, TOKEN_ID, Field, is_integer
from gptvq_jax.models.gguf_sentencepiece import sentencepiece

# The token types of GGUF that the text may spell literally.
_CONTROL, _USER_DEFINED = 3, 4

_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_STRINGS = Field(
    "a list of strings",
    lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
)
_INTEGERS = Field(
    "a list of integers", lambda value: isinstance(value, list) and all(map(is_integer, value))
)
_FLAG = Field("true or false", lambda value: brief(value) in ("True", "False", "0", "1"), null=True)
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# llama.cpp's names of the rules that cut text into words.
_DIGITS_APART = ("smollm", "refact", "starcoder")
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "smaug-bpe", "dbrx"), _LLAMA3_SPLIT),
    "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def build_tokenizer(field: Callable[[str], Any], path: Path) -> PreTrainedTokenizerFast:
    """Builds the tokenizer described by GGUF metadata: byte-level BPE, or SentencePiece.

    Args:
      field: returns the value of a metadata key, or None if the file does not have it.
      path: the file, for error messages.

    Returns:
      A transformers tokenizer with special tokens and, if the file has one, the chat template.

    Raises:
      ValueError: a field is missing, of another type, or contradicts another.
      NotImplementedError: another kind of vocabulary, or an unknown splitting rule.
    """
    try:
        return _build(field)
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from None
    except Exception as error:  # of which the Rust library raises the plain kind
        raise ValueError(f"{path} has no usable tokenizer: {first_line(error)}") from None


def _build(field: Callable[[str], Any]) -> PreTrainedTokenizerFast:
    model = field("tokenizer.ggml.model")
    if model not in _MODELS:
        raise NotImplementedError(
            f"tokenizer.ggml.model = {brief(model)} is not supported, only 'gpt2' and 'llama'; "
            "use the model's safetensors checkpoint instead"
        )
    tokens = _STRINGS.check("tokenizer.ggml.tokens", field("tokenizer.ggml.tokens"))
    types = _INTEGERS.check("tokenizer.ggml.token_type", field("tokenizer.ggml.token_type"))
    if not tokens or len(types) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens and tokenizer.ggml.token_type are inconsistent")
    tokenizer = _MODELS[model](field, tokens, types)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == kind
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)

    special_ids, special_tokens = {}, {}
    for name, key in _SPECIAL.items():
        index = TOKEN_ID.optional().check(key, field(key))
        if index is None:
            continue
        if index >= len(tokens):
            raise ValueError(f"the id {index} of {name} is not in the vocabulary")
        special_ids[name], special_tokens[name] = index, tokens[index]

    processor = _post_processor(field, model, special_tokens, special_ids)
    if processor is not None:
        tokenizer.post_processor = processor
    template = field("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=TEXT.optional().check("tokenizer.chat_template", template),
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


def _byte_level(field, tokens, types) -> Tokenizer:
    """Byte-level BPE, as GPT-2 and most models since have; without added tokens."""
    split = field("tokenizer.ggml.pre") or "default"
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(field("tokenizer.ggml.merges"), vocab),
            # Llama 3 emits a word that is a token whole, even if merges cannot reach it.
            ignore_merges=split == "llama-bpe",
        )
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_MODELS = {"gpt2": _byte_level, "llama": sentencepiece}


def _merges(merges: Any, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens; each is checked, which the Rust library does in words of its own."""
    pairs = []
    for index, merge in enumerate(_STRINGS.check("tokenizer.ggml.merges", merges)):
        pair = tuple(merge.split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(
                f"tokenizer.ggml.merges[{index}] must be two tokens, and make one, "
                f"got {brief(merge)}"
            )
        pairs.append(pair)
    return pairs


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    """Returns the rule that cuts text into words, under llama.cpp's name for it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split in ("gpt-2", "default"):
        return byte_level
    if split in _DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if split in _SPLITS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[split]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise NotImplementedError(
        f"tokenizer.ggml.pre = {brief(split)} is not supported, only gpt-2, "
        f"{', '.join((*_DIGITS_APART, *_SPLITS))}; use the model's safetensors checkpoint instead"
    )


def _post_processor(field, model, tokens, ids) -> processors.PostProcessor | None:
    """Adds BOS and EOS where the file asks for them."""
    add_bos, add_eos = (
        _FLAG.check(key, field(key))
        for key in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    )
    if add_bos is None:
        # llama.cpp's default: SentencePiece, and Llama 3's vocabulary.
        add_bos = model == "llama" or field("tokenizer.ggml.pre") == "llama-bpe"
    wrapped = {"bos_token": bool(add_bos), "eos_token": bool(add_eos)}
    used = {}
    for name, wanted in wrapped.items():
        if wanted:
            if name not in tokens:
                raise ValueError(f"it asks for a {name} but does not name one")
            used[tokens[name]] = ids[name]
    if not used:
        return processors.ByteLevel(trim_offsets=False) if model == "gpt2" else None
    bos = [tokens["bos_token"]] if wrapped["bos_token"] else []
    eos = [tokens["eos_token"]] if wrapped["eos_token"] else []
    return processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *bos, "$B:1", *eos],
        special_tokens=list(used.items()),
    )
