"""Windows and chats: what is held out, what is learned, and what is refused."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import byte_tokenizer

from gptvq_jax.lora.examples import Examples, batch_of, chat_tokens, load_examples
from gptvq_jax.lora.settings import LoraSettings

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
# As templates that drop what was thought in earlier answers.
FORGETFUL = TEMPLATE.replace("m.content }}", "m.content if loop.last or m.role == 'user' }}")


def say(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def source():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = SimpleNamespace(vocab_size=256, max_position_embeddings=64)
    return SimpleNamespace(tokenizer=tokenizer, config=config, name="tiny")


def write(path, lines):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    return str(path)


def test_answers_alone_are_learned_with_what_closes_them(source):
    messages = [{"role": "system", "content": "Be."}, *say("Hi", "Hello ü", "Why", "So")]
    tokens, learned = chat_tokens(source.tokenizer, messages, "line 1")
    text = source.tokenizer.decode(tokens)
    assert text == "s:Be.;u:Hi;a:Hello ü;u:Why;a:So;"
    assert source.tokenizer.decode(tokens[learned]) == "Hello ü;So;"


def test_a_template_that_forgets_is_refused(source):
    source.tokenizer.chat_template = FORGETFUL
    tokens, learned = chat_tokens(source.tokenizer, say("Hi", "Hello"), "line 1")
    assert source.tokenizer.decode(tokens[learned]) == "Hello;"
    with pytest.raises(ValueError, match="line 1: .* does not write answer 1 as it asks for it"):
        chat_tokens(source.tokenizer, say("Hi", "Hello", "Why", "So"), "line 1")


def test_chats_are_held_out_cut_and_filled_up(source, tmp_path, caplog):
    lines = [say(f"q{i}", "a" * (3 + i)) for i in range(8)]
    lines += [say("q" * 40, "never seen"), say("q9", "b" * 99)]
    dataset = write(tmp_path / "chats.jsonl", lines)
    settings = LoraSettings(dataset=dataset, chat=True, seqlen=32, held_out=3, batch=2)
    with caplog.at_level(logging.WARNING):
        examples, held_out = load_examples(source, settings)
    assert "2 chats are longer than --seqlen=32 and are cut there" in caplog.text
    # The one whose answer is beyond the end is left out.
    assert examples.tokens.shape == (6, 32) and held_out.tokens.shape == (3, 32)
    assert examples.learned.shape == (6, 31)
    decoded = [source.tokenizer.decode(row[1:][of]) for row, of in zip(*held_out, strict=True)]
    assert decoded == ["a" * 4 + ";", "a" * 7 + ";", "a" * 10 + ";"]
    short = write(tmp_path / "short.jsonl", lines[:6])
    settings = LoraSettings(dataset=short, chat=True, seqlen=60, held_out=2)
    examples, _ = load_examples(source, settings)
    assert examples.tokens.shape[1] == 16  # "u:q5;a:aaaaaaaa;"
    assert not examples.learned[0, 11:].any()


def test_windows_of_text_are_learned_whole(source, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i:04d} " for i in range(2000)))
    settings = LoraSettings(dataset=str(path), seqlen=20, num_windows=9, held_out=2)
    examples, held_out = load_examples(source, settings)
    assert examples.tokens.shape == (9, 20) and held_out.tokens.shape == (2, 20)
    assert examples.learned.shape == (9, 19) and examples.learned.all()
    kept = {tuple(row[i : i + 6]) for row in held_out.tokens for i in range(15)}
    assert not kept & {tuple(row[i : i + 6]) for row in examples.tokens for i in range(15)}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", 'chats.jsonl line 2 is not {"messages": '),
        ('{"messages": []}', "line 2 is not"),
        ('{"messages": [{"role": "user"}]}', "line 2 is not"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 2 is not"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "strings of Unicode"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'no message of the role "assistant"'),
    ],
)
def test_lines_that_are_no_chat(line, message, source, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": say("Hi", "Hello")}) + f"\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_examples(source, LoraSettings(dataset=str(path), chat=True, seqlen=32))


def test_every_pass_reads_each_example_once_in_another_order():
    examples = Examples(np.arange(5)[:, None], np.ones((5, 0), bool))
    batches = [batch_of(examples, step, 2, seed=3).tokens[:, 0] for step in range(1, 6)]
    read = np.concatenate(batches)
    assert sorted(read[:5]) == sorted(read[5:]) == [0, 1, 2, 3, 4]
    assert list(read[:5]) != list(read[5:])
    again = batch_of(examples, 3, 2, seed=3).tokens[:, 0]
    np.testing.assert_array_equal(again, batches[2])


def test_too_little(source, tmp_path):
    dataset = write(tmp_path / "chats.jsonl", [say("Hi", "Hello")] * 9)
    settings = LoraSettings(dataset=dataset, chat=True, seqlen=32, held_out=8, batch=4)
    with pytest.raises(
        ValueError, match="has 9 chats .* with 8 held out, 1 are fewer than a batch"
    ):
        load_examples(source, settings)
    with pytest.raises(ValueError, match="--seqlen=65 is beyond the 64 positions of tiny; set"):
        load_examples(source, LoraSettings(dataset=dataset, chat=True, seqlen=65))
    with pytest.raises(ValueError, match="--chat reads a .jsonl file of messages, not 'wikipedia'"):
        load_examples(source, LoraSettings(chat=True, seqlen=32))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="contains no chat"):
        load_examples(
            source, LoraSettings(dataset=str(tmp_path / "empty.jsonl"), chat=True, seqlen=32)
        )
    source.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; leave out --chat"):
        load_examples(source, settings)
