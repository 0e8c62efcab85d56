"""The job of scripts/chat.py: a conversation in the terminal."""

import contextlib
import importlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

from gptvq_jax.console.late_note import late_note
from gptvq_jax.serve.answer import Answer, Piece
from gptvq_jax.serve.conversation import Conversation
from gptvq_jax.serve.engine import Engine
from gptvq_jax.serve.engine_options import check_options
from gptvq_jax.serve.params import implementations, memory_bytes
from gptvq_jax.serve.requests import Request
from gptvq_jax.serve.sampling import Sampling
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.serve.stop_tokens import stop_tokens

HELP = """\
/reset   forget the conversation, but not the system message
/stats   tokens, speed and memory so far
/help    this list
/exit    leave, as Ctrl-D does, or Ctrl-C twice
Ctrl-C stops an answer."""
_PROMPT = "> "
_MAX_TOKENS = 512


def chat(
    checkpoint: str | None,
    model: str | None,
    *,
    system: str | None = None,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    context: int | None = None,
    implementation: str | None = None,
    dtype: str = "float32",
    dense: bool = False,
    adapter: str | None = None,
) -> None:
    """Reads messages from standard input, and prints answers, until it ends.

    Args:
      checkpoint, model, implementation, dense, adapter: see `ServedModel`.
      system: system message; None: that of the model's chat template, if any.
      max_tokens: of an answer; None: 512, or half the context where that is less.
      sampling: how tokens are drawn; None: greedily.
      seed: of the first answer's draws; each answer takes the next.
      context: most tokens of conversation and answer; None: the model's positions.
      dtype: see `Engine`.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: bad input, in one line with the way out.
    """
    served = ServedModel(checkpoint, model, implementation, dense, adapter)
    source = served.source
    check_options(source.config, context=context)
    room = context or source.config.max_position_embeddings
    max_tokens = min(_MAX_TOKENS, room // 2) if max_tokens is None else max_tokens
    if not 1 <= max_tokens < room:
        raise ValueError(f"{max_tokens=} must be from 1 to {room - 1}, below the context")
    conversation = Conversation(source.tokenizer, source.config.vocab_size, system, room)
    conversation.ask("Hello", max_tokens)  # a system message without end is refused here
    engine = Engine(
        source.config,
        served.params(dtype),
        slots=1,
        context=context,
        stop_tokens=stop_tokens(source),
        dtype=dtype,
    )
    with late_note("compiling ..."):
        engine.warm_up(shortest=True)
    terminal = Chat(served, engine, conversation, max_tokens, sampling or Sampling(), seed)
    print(f"{served.name}: {room} tokens of context; /help lists commands")
    with contextlib.suppress(ImportError):  # arrow keys, where there is such a library
        importlib.import_module("readline")
    terminal.run()


class Chat:
    """What goes on between the user and an engine of one slot. Arguments are those of `chat`."""

    def __init__(
        self,
        served: ServedModel,
        engine: Engine,
        conversation: Conversation,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
    ):
        self._tokenizer, self._engine, self._conversation = (
            served.source.tokenizer,
            engine,
            conversation,
        )
        self._max_tokens, self._sampling, self._seed = max_tokens, sampling, seed
        self._answering = self._stop = False
        self._seconds = 0.0  # in which answers were made

    def run(self) -> None:
        """Until the input ends, /exit, or Ctrl-C twice at the prompt."""
        warned = False
        with self._interrupts():
            while True:
                try:
                    line = input(_PROMPT)
                    warned = False
                    if line.strip() == "/exit":
                        return
                    self.obey(line)
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    print()
                    if warned or self._answering:
                        return
                    warned = True
                    print("Ctrl-C once more leaves, and so does Ctrl-D")

    def obey(self, line: str) -> None:
        """Does what one line of the user says."""
        message = line.strip()
        if not message:
            return
        if message == "/help":
            print(HELP)
        elif message == "/reset":
            self._conversation.turns.clear()
            print("the conversation is forgotten")
        elif message == "/stats":
            print(self.stats())
        elif message.startswith("/"):
            print(f"there is no command {message.split()[0]}; /help lists them")
        else:
            try:
                self._answer(line)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)

    def stats(self) -> str:
        """Lines of figures."""
        counts, turns = self._engine.counts, len(self._conversation.turns)
        packed, dense = (size / 2**20 for size in memory_bytes(self._engine.params))
        products = " and ".join(implementations(self._engine.params)) or "dense"
        speed = counts.decoded / self._seconds if self._seconds else 0.0
        return (
            f"turns in mind: {turns}; prompts: {counts.read} tokens read, {counts.reused} taken "
            f"from the cache\n"
            f"answers: {counts.decoded} tokens after their first, {speed:.1f} a second, prompts "
            f"included ({products})\n"
            f"weights in memory: {packed + dense:.1f} MiB, packed {packed:.1f} and dense "
            f"{dense:.1f}"
        )

    def _answer(self, message: str) -> None:
        tokens, dropped = self._conversation.ask(message, self._max_tokens)
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            print(f"(the context is full: the oldest {turns} forgotten)", file=sys.stderr)
        texts, ends = [], []

        def show(piece: Piece) -> None:
            shown()
            texts.append(piece.text)
            ends.append(piece.end)
            print(piece.text, end="", flush=True)

        request = Request(tokens, self._max_tokens, self._sampling, self._seed)
        listener = Answer(self._tokenizer, tokens, (), show)
        start, self._stop, self._answering = time.perf_counter(), False, True
        # A conversation that has become long may need programs of its own.
        with late_note("reading the message, and compiling where that is needed ...") as shown:
            (job,) = self._engine.submit((request, listener))
            while self._engine.num_jobs:
                if self._stop:
                    job.cancel()
                self._engine.step()
        self._answering = False
        self._seconds += time.perf_counter() - start
        print()
        if ends[-1] == "length":
            print(f"(stopped after --max_tokens={self._max_tokens})", file=sys.stderr)
        elif ends[-1] == "cancelled":
            print("(stopped)", file=sys.stderr)
        elif ends[-1] != "stop":
            raise ValueError(ends[-1].removeprefix("error: "))
        self._seed += 1
        if any(texts):
            self._conversation.turns.append((message, "".join(texts)))

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C stops an answer; a second one, before it has stopped, does not wait for that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def on_signal(*_) -> None:
            if self._stop or not self._answering:
                raise KeyboardInterrupt
            self._stop = True

        signal.signal(signal.SIGINT, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
