"""llama.cpp beside us: refused in one line where it is not there, the same text where it is."""

import importlib.util

import numpy as np
import pytest
from tiny_families import write_model

from gptvq_jax.models.open import open_source
from gptvq_jax.serve.generate import generate
from gptvq_jax.serve.params import dense_params
from gptvq_jax.study import llama_cpp, token_report, token_speeds


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    llama_cpp.check_formats([])
    with pytest.raises(ValueError, match="not installed; pip install llama-cpp-python, or leave"):
        llama_cpp.check_formats(["Q4_0"])


def test_an_unknown_format_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="unknown format 'Q4' of llama.cpp; .*F16, Q4_0"):
        llama_cpp.check_formats(["F16", "Q4"])


def test_the_same_greedy_text_in_float32(tmp_path):
    pytest.importorskip("llama_cpp")
    source = open_source(str(write_model(tmp_path / "hf", "llama", attention_bias=False)))
    paths = llama_cpp.write_formats(source, ["F32", "F16", "Q8_0"], tmp_path)
    assert set(paths) == {"F32", "F16", "Q8_0"} and all(path.exists() for path in paths.values())
    prompt = token_speeds.prompt_of(source.config, 12)
    llama = llama_cpp.Llama(paths["F32"], 64, 1)
    try:
        theirs = llama_cpp.tokens_of(llama, prompt, 12)
        assert llama_cpp.tokens_of(llama, prompt, 12) == theirs  # from an empty cache again
    finally:
        llama.close()
    ours = generate(source.config, dense_params(source), [prompt], max_tokens=12).tokens[0]
    assert theirs == ours


class Clock:
    """A llama that counts, and the time that it says passes."""

    def __init__(self):
        self.fed, self.now = [], 0.0

    def read(self, prompt):
        self.fed.append(list(prompt))
        self.now += 100  # which does not count
        return 7

    def step(self, token):
        self.fed.append(token)
        self.now += 0.5
        return token + 1


def test_a_speed_is_of_the_steps_behind_the_first_token(monkeypatch):
    llama = Clock()
    monkeypatch.setattr(token_speeds.time, "perf_counter", lambda: llama.now)
    assert token_speeds.theirs(llama, [1, 2], 5)() == 2
    assert llama.fed == [[1, 2], 7, 8, 9, 10]


def test_contenders_take_turns_and_are_compared_round_by_round():
    order, speeds = [], {"a": iter([9, 1, 2, 4]), "b": iter([9, 3, 2, 2])}

    def speed(name):
        order.append(name)
        return next(speeds[name])

    contenders = {name: lambda name=name: speed(name) for name in speeds}
    found = token_speeds.measure(contenders, 3)
    assert order == list("ab" * 4)
    assert found["a"]["tokens_per_second"] == 2 and found["a"]["to_first"] == 1
    assert found["b"]["to_first"] == 1  # 3, 1 and 1/2
    rows = [{"name": n, "bytes": 2**20 * i, **row} for i, (n, row) in enumerate(found.items())]
    text = token_report.speeds(rows).splitlines()
    assert text[1].split()[:2] == ["in", "turn"]
    assert text[3].split() == ["b", "2.0", "2.0", "to", "2.5", "1.0"]


def test_a_prompt_is_of_the_vocabulary(tmp_path):
    config = open_source(str(write_model(tmp_path, "llama"))).config
    prompt = token_speeds.prompt_of(config, 50)
    assert len(prompt) == 50 and np.unique(prompt).size > 20
    assert 0 <= min(prompt) <= max(prompt) < config.vocab_size
