"""A conversation in the terminal: what is asked, what is forgotten, and Ctrl-C."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import served

from gptvq_jax.serve import chat as job
from gptvq_jax.serve.chat import Chat, chat
from gptvq_jax.serve.conversation import Conversation
from gptvq_jax.serve.generate_text import generate_text
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.storage.checkpoint import PackedCheckpoint

SCRIPT = Path(__file__).parents[2] / "scripts/chat.py"
TOKENS = 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return served.write_model(tmp_path_factory.mktemp("checkpoint") / "packed")


@pytest.fixture(scope="module")
def engine(checkpoint):
    made, done = served.make_engine(PackedCheckpoint(checkpoint), slots=1), []
    made.warm_up(lambda: done.append(1), shortest=True)
    assert len(done) == made.num_programs(shortest=True) == 3
    return made


@pytest.fixture
def talk(checkpoint, engine, monkeypatch, capsys):
    """Types lines, and returns the chat, with its errors, and what is printed for each line."""

    def run(*lines, system=None, max_tokens=TOKENS, **options):
        source = PackedCheckpoint(checkpoint)
        context = engine.context
        conversation = Conversation(source.tokenizer, source.config.vocab_size, system, context)
        sampling = options.get("sampling", Sampling())
        model = ServedModel(str(checkpoint), None, dense=True)
        made = Chat(model, engine, conversation, max_tokens, sampling, options.get("seed", 0))
        left, outputs, errors = list(lines), [], []
        capsys.readouterr()

        def type_next(prompt):
            for kept, new in zip((outputs, errors), capsys.readouterr(), strict=True):
                kept.append(new)
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, type):
                raise line
            return line

        monkeypatch.setattr("builtins.input", type_next)
        made.run()
        made.left, made.errors = left, "".join(errors)
        return made, [output.removesuffix("\n") for output in outputs[1:]]

    return run


def generated(checkpoint, capsys, history, **options):
    """Of generate.py, for a conversation as the template writes it."""
    options = {"max_tokens": TOKENS, "dense": True} | options
    (text,) = generate_text(str(checkpoint), None, [history], **options)
    capsys.readouterr()
    return text


def test_answers_are_those_of_generate_to_the_whole_conversation(talk, checkpoint, capsys):
    made, (first, second) = talk("ab", "cd", system="S")
    history = "s:S;u:ab;a:"
    assert first == generated(checkpoint, capsys, history)
    history += f"{first};u:cd;a:"
    assert second == generated(checkpoint, capsys, history)
    assert len(set(first)) > 3 and first != second
    assert made._conversation.turns == [("ab", first), ("cd", second)]


def test_the_cache_of_earlier_turns_is_used(talk, engine):
    before, reused = engine.counts.read, engine.counts.reused
    _, (first, _) = talk("abcdefabc", "d")
    whole = len("u:abcdefabc;a:")
    # All but the newest token of the answer, and what comes after it.
    assert engine.counts.reused - reused >= whole + len(first) - 1
    assert engine.counts.read - before <= whole + len(";u:d;a:") + 1


def test_commands(talk, engine):
    made, outputs = talk("ab", "/stats", "/reset", "/stats", "/help", "/halp x", "  ", "ab")
    first, stats, reset, later, help_, unknown, nothing, again = outputs
    assert nothing == ""
    assert stats.startswith("turns in mind: 1; prompts: ") and "weights in memory: " in stats
    counts = engine.counts
    assert re.search(r"answers: \d+ tokens after their first, \d+\.\d a second", stats)
    assert reset == "the conversation is forgotten" and later.startswith("turns in mind: 0;")
    assert help_ == job.HELP and unknown == "there is no command /halp; /help lists them"
    assert again == first and made._conversation.turns == [("ab", first)]
    assert counts.read > 0


def test_the_oldest_turns_go_where_the_context_is_full(talk, checkpoint, capsys):
    made, outputs = talk(*(f"{word}" for word in ("ab" * 15, "cd" * 15, "ef" * 15, "b")))
    assert "(the context is full: the oldest turn was forgotten)" in made.errors
    turns = made._conversation.turns
    assert [question for question, _ in turns] == ["cd" * 15, "ef" * 15, "b"]
    history = "".join(f"u:{q};a:{a};" for q, a in turns[:-1]) + "u:b;a:"
    assert outputs[-1] == generated(checkpoint, capsys, history)


def test_a_message_that_cannot_be_asked_leaves_the_conversation_as_it_was(talk):
    made, outputs = talk("ab", "a" * 200, "refuse", "\udcff", "ab")
    assert len(made._conversation.turns) == 2
    for said in (
        r"the message has 205 tokens, .* with 20 more for the answer .* context of 192; shorten",
        "the model's chat template fails: no .*; change --system or the message",
        "the message is not UTF-8",
    ):
        assert re.search(said, made.errors)
    assert made.errors.count("error: ") == 3


def test_draws_are_repeated_with_the_seed_and_differ_by_turn(talk):
    hot = {"sampling": Sampling(2.0), "seed": 3}
    _, once = talk("ab", "/reset", "ab", **hot)
    _, twice = talk("ab", "/reset", "ab", **hot)
    assert once == twice and once[0] != once[2]
    assert talk("ab", sampling=Sampling(2.0), seed=4)[1][0] == once[2]


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, engine, monkeypatch):
    step, count, before = engine.step, [0], signal.getsignal(signal.SIGINT)

    def stopped():
        count[0] += 1
        if count[0] == 6:
            signal.raise_signal(signal.SIGINT)
        step()

    monkeypatch.setattr(engine, "step", stopped)
    made, (first, second) = talk("ab", "ab")
    assert "(stopped)" in made.errors
    whole = made._conversation.turns[1][1]
    assert 0 < len(first) < len(second) == len(whole) == TOKENS
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_at_the_prompt_leaves(talk):
    made, outputs = talk(KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt, "ab")
    assert made.left == ["ab"]
    assert outputs[0] == "\nCtrl-C once more leaves, and so does Ctrl-D"
    assert talk("/exit", "ab")[0].left == ["ab"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoint": None}, "either --checkpoint=DIR or --model=NAME"),
        ({"max_tokens": 0}, "max_tokens=0 must be from 1 to 191"),
        ({"max_tokens": 192}, "max_tokens=192 must be from 1 to 191"),
        ({"context": 1000}, "context=1000 must be from 2 to 192"),
        ({"system": "refuse"}, "chat template fails: no"),
        ({"system": "s" * 190}, "with 96 more for the answer it does not fit"),
    ],
)
def test_bad_input_before_the_weights_are_read(checkpoint, options, message, monkeypatch):
    monkeypatch.setattr("gptvq_jax.serve.served_model.ServedModel.params", None)
    with pytest.raises(ValueError, match=message):
        chat(**{"checkpoint": str(checkpoint), "model": None} | options)


def test_a_model_without_a_chat_template(tmp_path):
    from tiny_checkpoint import write_checkpoint

    path = write_checkpoint(tmp_path / "packed")
    with pytest.raises(ValueError, match="no chat template; use scripts/generate.py"):
        chat(str(path), None)


IN_TERMINAL = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal whose Ctrl-C is for this process
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_script_in_a_terminal(checkpoint):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", IN_TERMINAL, str(SCRIPT), f"--checkpoint={checkpoint}"]
    process = subprocess.Popen(
        [*words, "--max_tokens=20", "--dense"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = ""

    def until(text):
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen:
            ready, _, _ = select.select([ours], [], [], end - time.monotonic())
            assert ready, seen
            seen += os.read(ours, 4096).decode(errors="replace")
        _, _, seen = seen.partition(text)

    def press_ctrl_c():
        until("> ")
        time.sleep(0.5)  # input() does not hear what comes just before it listens
        os.write(ours, b"\x03")

    try:
        until("/help lists commands")
        until("> ")
        os.write(ours, b"ab\n")
        until("(stopped after --max_tokens=20)")
        press_ctrl_c()
        until("Ctrl-C once more leaves")
        until("> ")
        os.write(ours, b"/stats\n")
        until("turns in mind: 1;")
        press_ctrl_c()
        until("Ctrl-C once more leaves")
        press_ctrl_c()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
