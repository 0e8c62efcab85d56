"""Whether token ids mean the same text to two models."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gptvq_jax.data.vocabulary import check_same_vocabulary

WINDOWS = np.array([[1, 2, 3], [3, 2, 1]], np.int32)


def tokenizer(letters, bos=False):
    """One id per letter, and one before the text if asked for."""
    vocabulary = {"<s>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_a_token_before_every_text_is_no_other_vocabulary():
    check_same_vocabulary((tokenizer("abc"), 4, "A"), (tokenizer("abc", bos=True), 4, "B"), WINDOWS)


def test_what_differs_is_named():
    with pytest.raises(ValueError, match="^A has a vocabulary of 4 tokens, B of 5; compare"):
        check_same_vocabulary((tokenizer("abc"), 4, "A"), (tokenizer("abcd"), 5, "B"), WINDOWS)
    message = r"^A and B have other vocabularies: token \d of the text is \[\d\] in the first and "
    with pytest.raises(ValueError, match=message + r"\[\d\] in the second; compare models"):
        check_same_vocabulary((tokenizer("abc"), 4, "A"), (tokenizer("acb"), 4, "B"), WINDOWS)
