"""Texts up to a string that ends them."""

import dataclasses

import pytest
from tiny_checkpoint import MODEL, write_checkpoint

from gptvq_jax.serve import generate_until as driver
from gptvq_jax.serve.generate_until import generate_until
from gptvq_jax.serve.params import dense_params
from gptvq_jax.storage.checkpoint import PackedCheckpoint

PROMPTS = [[5, 9, 3], [7], list(range(10, 22))]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Config, weights and tokenizer, whose words are w0 to w39."""
    config = dataclasses.replace(MODEL, num_hidden_layers=1)
    path = write_checkpoint(tmp_path_factory.mktemp("model") / "packed", config)
    source = PackedCheckpoint(path)
    return config, dense_params(source), source.tokenizer


@pytest.fixture(scope="module")
def whole(parts):
    return generate_until(*parts, PROMPTS, until=[], max_tokens=20)


def test_without_a_string_all_tokens_are_made(whole):
    assert {len(text.split()) for text in whole} == {20}
    assert len(set(whole)) == 3


def test_the_first_of_several_strings_ends_a_text(parts, whole):
    words = whole[0].split()
    until = ["", words[6], f"{words[2]} {words[3]}"]  # an empty one ends nothing
    found = generate_until(*parts, PROMPTS, until=until, max_tokens=20)
    cut = [min((text.partition(string)[0] for string in until[1:]), key=len) for text in whole]
    assert found == cut and len(found[0]) < len(whole[0])


def test_steps_go_on_until_every_text_has_ended(parts, whole):
    def steps(until):
        made = []
        generate_until(*parts, PROMPTS, until=until, max_tokens=20, on_step=made.append)
        return made

    assert steps([]) == [1, 9, 17, 20]  # the first token, then eight at a time
    words = [text.split() for text in whole]
    assert steps([row[0] for row in words]) == [1]
    assert steps([row[3] for row in words]) == [1, 9]
    late = " ".join(words[0][9:11])  # the others hold it sooner
    assert all(late in " ".join(row[:9]) for row in words[1:])
    assert steps([late]) == [1, 9, 17]


def test_options_reach_the_generator(parts, monkeypatch):
    seen = {}
    monkeypatch.setattr(driver, "generate", lambda *_, **options: seen.update(options) or 1 / 0)
    options = {"sampling": "S", "seed": 3, "stop_tokens": (4,), "dtype": "bfloat16"}
    with pytest.raises(ZeroDivisionError):
        generate_until(*parts, PROMPTS, until=["a"], max_tokens=5, **options)
    assert {name: seen[name] for name in options} == options and seen["max_tokens"] == 5
