"""Windows of tokens: a tokenizer of one id per character makes every case countable by hand."""

import logging

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gptvq_jax.data import calibration_windows, evaluation_windows
from gptvq_jax.data.windows import begun, bos_of

BOS = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz\n"


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<s>": BOS} | {letter: i + 1 for i, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=8)


def ids(text):
    return [LETTERS.index(letter) + 1 for letter in text]


def test_evaluation_windows_are_consecutive(tokenizer):
    # One BOS, the texts joined by a blank line, the remainder "gh" dropped.
    windows = evaluation_windows(tokenizer, iter(["ab", "cdefgh"]), 4)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[BOS, *ids("ab\n")], ids("\ncde")]
    assert evaluation_windows(tokenizer, ["ab", "cdefgh"], 4, max_windows=1).tolist() == [
        [BOS, *ids("ab\n")]
    ]
    assert len(evaluation_windows(tokenizer, ["ab", "cdefgh"], 4, max_windows=9)) == 2


def test_the_token_that_begins_a_text_is_told(tokenizer):
    windows = evaluation_windows(tokenizer, ["abcdefgh"], 4)
    assert bos_of(tokenizer, windows) == "first token of the text"
    assert bos_of(tokenizer, windows[1:]) == bos_of(object(), windows) == "none"


def test_each_window_may_begin_with_bos(tokenizer):
    plain = evaluation_windows(tokenizer, ["abcdefgh"], 4)
    windows = begun(tokenizer, plain, "evaluation.bos")
    assert windows.dtype == np.int32
    assert windows.tolist() == [[BOS, *ids("abc")], [BOS, *ids("efg")]]
    assert plain[1, 0] != BOS  # which is left alone
    assert bos_of(tokenizer, windows) == "first token of each window"
    assert bos_of(tokenizer, windows[:1]) == "first token of the text"
    with pytest.raises(ValueError, match=r"no BOS token; set evaluation\.bos=False"):
        begun(object(), plain, "evaluation.bos")


def test_calibration_windows_are_random_slices(tokenizer):
    text = LETTERS[:26]
    stream = [BOS, *ids(text)]
    windows = calibration_windows(tokenizer, [text], 200, 5, seed=0)
    assert windows.shape == (200, 5) and windows.dtype == np.int32
    starts = [stream.index(first) for first in windows[:, 0]]
    assert [stream[start : start + 5] for start in starts] == windows.tolist()
    # Every offset is possible, the first and the last included.
    assert set(starts) == set(range(len(stream) - 5 + 1))


def test_calibration_windows_are_deterministic(tokenizer):
    text = LETTERS * 20
    first = calibration_windows(tokenizer, [text], 8, 16, seed=3)
    np.testing.assert_array_equal(calibration_windows(tokenizer, [text], 8, 16, seed=3), first)
    assert (calibration_windows(tokenizer, [text], 8, 16, seed=4) != first).any()


def test_calibration_windows_per_document(tokenizer):
    texts = ["a", "bcde", "fg", "hijklmn"]
    windows = calibration_windows(tokenizer, texts, 60, 4, seed=0, per_document=True)
    streams = [[BOS, *ids(text)] for text in texts]
    possible = {
        tuple(stream[start : start + 4]) for stream in streams for start in range(len(stream) - 3)
    }
    assert {tuple(window) for window in windows.tolist()} == possible


def test_exactly_one_window(tokenizer):
    for windows in (
        evaluation_windows(tokenizer, ["abc"], 4),
        calibration_windows(tokenizer, ["abc"], 1, 4, seed=0),
        calibration_windows(tokenizer, ["abc"], 1, 4, seed=0, per_document=True),
    ):
        assert windows.tolist() == [[BOS, *ids("abc")]]


def test_text_too_short(tokenizer):
    message = r"only 4 tokens, fewer than one window of 5; pass more text or seqlen <= 4"
    with pytest.raises(ValueError, match="the text has " + message):
        evaluation_windows(tokenizer, ["abc"], 5)
    with pytest.raises(ValueError, match="the text has " + message):
        calibration_windows(tokenizer, ["abc"], 2, 5, seed=0)
    with pytest.raises(ValueError, match="the longest of 2 documents has " + message):
        calibration_windows(tokenizer, ["abc", "d"], 2, 5, seed=0, per_document=True)
    none = "only 0 tokens, fewer than one window of 5; pass more text, of at least 2 tokens$"
    with pytest.raises(ValueError, match=f"the longest of 0 documents has {none}"):
        calibration_windows(tokenizer, [], 2, 5, seed=0, per_document=True)
    with pytest.raises(ValueError, match="the text has only 1 token, .* of at least 2 tokens$"):
        evaluation_windows(tokenizer, [""], 5)  # the BOS


def test_ids_outside_the_vocabulary(tokenizer):
    message = "token id 26 is outside the model's vocabulary of 26"
    for per_document in (False, True):
        with pytest.raises(ValueError, match=message):
            calibration_windows(
                tokenizer, ["xyz"], 1, 2, seed=0, per_document=per_document, vocab_size=26
            )
    with pytest.raises(ValueError, match=message):
        evaluation_windows(tokenizer, ["xyz"], 2, vocab_size=26)
    assert len(evaluation_windows(tokenizer, ["xyz"], 2, vocab_size=27)) == 2


def test_bad_sizes(tokenizer):
    with pytest.raises(ValueError, match="seqlen must be at least 1"):
        evaluation_windows(tokenizer, ["abc"], 0)
    with pytest.raises(ValueError, match="max_windows must be at least 1"):
        evaluation_windows(tokenizer, ["abc"], 2, max_windows=0)
    with pytest.raises(ValueError, match="num_windows must be at least 1"):
        calibration_windows(tokenizer, ["abc"], 0, 2, seed=0)


def test_no_warning_about_length(tokenizer, caplog):
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            evaluation_windows(tokenizer, ["abc" * 50], 4)
            assert not caplog.records
            tokenizer("abc" * 50)  # the warning this is about
            assert "longer than the specified maximum" in caplog.text
    finally:
        logging.getLogger("transformers").propagate = False


def held_out_windows(tokenizer, texts, seed=0, count=40, held_out=2, **options):
    windows = calibration_windows(
        tokenizer, texts, count, 4, seed, held_out=held_out, **options
    ).tolist()
    return windows[:count], windows[count:]


def letters(count, seed=0):
    return "".join(np.random.default_rng(seed).choice(list(LETTERS[:26]), count))


def test_held_out_windows_stand_in_the_middle_of_equal_parts(tokenizer):
    text = LETTERS[:26] + "a"
    stream = [BOS, *ids(text)]  # 28 tokens, halves of 14
    fitted, held_out = held_out_windows(tokenizer, [text], count=400)
    assert held_out == [stream[5:9], stream[19:23]]
    # Every place is possible that reaches into none of them.
    possible = [*range(2), *range(9, 16), *range(23, 25)]
    assert {tuple(w) for w in fitted} == {tuple(stream[i : i + 4]) for i in possible}


def test_windows_that_reach_into_none_of_those_held_out_are_as_without_them(tokenizer):
    text = letters(4000)
    plain, nothing = held_out_windows(tokenizer, [text], held_out=0)
    fitted, held_out = held_out_windows(tokenizer, [text], held_out=20)
    assert nothing == [] and len(held_out) == 20
    stream = np.array([BOS, *ids(text)])

    def places(windows):
        views = np.lib.stride_tricks.sliding_window_view(stream, 4).tolist()
        return np.array([views.index(window) for window in windows])

    # Of a text of 4001 tokens 200 are kept, 10 for each of them: 3 before it, itself, 3 behind it.
    gaps = np.abs(places(plain)[:, None] - places(held_out)).min(axis=1)
    assert 0 < np.sum(gaps < 7) < 10
    same = [a == b for a, b in zip(plain, fitted, strict=True)]
    assert same == (gaps >= 7).tolist()
    assert np.abs(places(fitted)[:, None] - places(held_out)).min() >= 7


@pytest.mark.parametrize("per_document", [False, True])
def test_no_seed_and_no_count_fits_what_another_holds_out(tokenizer, per_document):
    texts = [letters(20, seed) for seed in range(20)]
    _, held_out = held_out_windows(tokenizer, texts, per_document=per_document)
    for seed, count in ((1, 40), (0, 300)):
        fitted, same = held_out_windows(tokenizer, texts, seed, count, per_document=per_document)
        assert same == held_out and len(fitted) == count
        assert not {tuple(w) for w in fitted} & {tuple(w) for w in held_out}


def test_whole_documents_are_held_out_the_next_ones_long_enough(tokenizer):
    texts = ["aaaaaa", "b", "bcdef", "aaaaaa", "aaaaaa", "wxyz", "aaaaaa", "aaaaaa"]
    fitted, held_out = held_out_windows(tokenizer, texts, per_document=True)
    # In the middle of the halves stand the documents 2 and 6; 5 is left.
    assert held_out == [[*ids("bcde")], ids("aaaa")]
    assert not np.isin(fitted, ids("bcdef")).any() and np.isin(fitted, ids("wxyz")).any()
    texts[2], texts[3] = texts[1], "abcdef"
    _, held_out = held_out_windows(tokenizer, texts, per_document=True)
    assert held_out[0] == ids("abcd")


@pytest.mark.parametrize("per_document", [False, True])
def test_a_text_too_short_to_hold_out_anything_is_refused(tokenizer, per_document):
    with pytest.raises(ValueError, match=r"too few for a window of 4 beside 2 .*; pass more text"):
        held_out_windows(tokenizer, ["abcdef"], per_document=per_document)
