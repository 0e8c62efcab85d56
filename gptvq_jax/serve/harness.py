"""A model as EleutherAI's evaluation harness takes it (lm-eval, of requirements-tasks.txt).

What is a token of the context and what of the continuation, what is cut and what comes before an
empty context, is as in the harness's own backend for transformers (lm_eval.models.huggingface), so
that accuracies can be compared. Only what runs the model is ours.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gptvq_jax.console.progress import Progress
from gptvq_jax.data.vocabulary import check_tokens, encode
from gptvq_jax.serve.generate_until import generate_until
from gptvq_jax.serve.harness_options import GenerationOptions
from gptvq_jax.serve.loglikelihood import Score, plan_batches, score_batch
from gptvq_jax.serve.prompts import render_chat
from gptvq_jax.serve.served_model import ServedModel
from gptvq_jax.serve.stop_tokens import stop_tokens

SEED = 1234  # of draws, the harness's own


class HarnessModel(TemplateLM):
    """What `lm_eval.simple_evaluate(model=...)` asks.

    Args:
      served: the model; its weights are read at the first request.
      batch_size: texts that go through it together.
      max_length: most tokens that it reads at once; None: its positions.
      add_bos_token: begin texts with BOS, or never; None: as its tokenizer does.
      dtype: of the activations.

    Raises:
      ValueError: a number out of range, or a BOS is wanted that the tokenizer does not have.
    """

    def __init__(
        self,
        served: ServedModel,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        dtype: str = "float32",
    ):
        super().__init__()
        self._served, self._dtype = served, dtype
        self._config = served.source.config
        self.tokenizer = served.source.tokenizer
        self.batch_size = batch_size
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        limit = self._config.max_position_embeddings
        self.max_length = limit if max_length is None else max_length
        if not 1 <= self.max_length <= limit:
            raise ValueError(f"{max_length=} must be from 1 to {limit}, the model's positions")
        self._add_bos_token = add_bos_token
        if add_bos_token and self.tokenizer.bos_token_id is None:
            raise ValueError("the tokenizer has no BOS token; leave out --add_bos_token")

    @cached_property
    def _params(self) -> Any:
        return self._served.params(self._dtype)

    @cached_property
    def _stop_tokens(self) -> tuple[int, ...]:
        return stop_tokens(self._served.source)

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is made of: BOS, or else the end of text.

        Raises:
          ValueError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError(
            "the tokenizer has neither a BOS token nor one for the end of text, before which no "
            "text begins; set bos_token in its tokenizer_config.json"
        )

    @property
    def _end(self) -> str | None:
        """How the end of text is written."""
        token = self.eot_token_id
        return None if token is None else self.tokenizer.decode(token, skip_special_tokens=False)

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness may keep requests."""
        return self._served.source.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; special tokens come first unless it begins with them already.

        Raises:
          ValueError: the tokenizer cannot read it, or it has tokens that the model does not have.
        """
        special, add_bos = add_special_tokens, False
        if special is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            special = self._add_bos_token is not False and not has_bos_prefix(string, prefix)
            add_bos = special and bool(self._add_bos_token)
        name = "a text of the task"
        # verbose=False: a text longer than the context is cut later.
        tokens = encode(self.tokenizer, string, name, add_special_tokens=special, verbose=False)
        if add_bos and tokens[:1] != [self.tokenizer.bos_token_id]:
            tokens = [self.tokenizer.bos_token_id, *tokens]
        check_tokens(tokens, self._config.vocab_size, self.tokenizer, name)
        return tokens

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of the continuation in each request's arguments."""
        for request in requests:
            if not request.args[1]:
                raise ValueError(f"task {request.task_name} has an empty continuation; mend it")
        return super().loglikelihood(requests, disable_tqdm=True)  # the bar is ours

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}

        def store(scores: dict[int, Score]) -> None:
            for index, score in scores.items():
                answers[index] = (score.logprob, score.greedy)
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])

        pairs = [(context, continuation) for _, context, continuation in requests]
        self._score(pairs, "loglikelihood", "request", store)
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each request's whole text, in windows that do not overlap."""
        pairs, owners, left = [], [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [make_disjoint_window(window) for window in windows]
            pairs += found
            owners += [owner] * len(found)
            left.append(len(found))
        totals = [0.0] * len(requests)

        def store(scores: dict[int, Score]) -> None:
            for index, score in scores.items():
                owner = owners[index]
                totals[owner] += score.logprob
                left[owner] -= 1
                if not left[owner]:
                    text = requests[owner].args
                    self.cache_hook.add_partial("loglikelihood_rolling", text, totals[owner])

        self._score(pairs, "loglikelihood_rolling", "window", store)
        return totals

    def _score(self, pairs, description: str, unit: str, store) -> None:
        """Scores pairs with a progress bar, and hands the scores of each batch to `store`."""
        batches = plan_batches(pairs, self.batch_size, self.max_length)
        work = [batch.flops(self._config) for batch in batches]
        with Progress(len(pairs), description, unit, sum(work)) as progress:
            for batch, flops in zip(batches, work, strict=True):
                scores = score_batch(self._config, self._params, batch, self._dtype)
                store(scores)
                text = f"{batch.tokens.shape[0]} x {batch.tokens.shape[1]} tokens"
                progress.advance(text, len(scores), flops)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each request's context, up to one of its strings."""
        texts = []
        groups = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        batches = list(groups.get_batched(n=self.batch_size))
        options = [
            GenerationOptions.of_task(batch[0][1], self._end, self.max_length) for batch in batches
        ]
        most = [given.max_tokens for given in options]
        with Progress(len(requests), "generate_until", "request", sum(most)) as progress:
            for number, (batch, given) in enumerate(zip(batches, options, strict=True)):
                contexts = [context for context, _ in batch]
                made = 0

                def on_step(total: int, given=given) -> None:
                    nonlocal made
                    text = f"{total} of at most {given.max_tokens} tokens"
                    progress.advance(text, 0, total - made)
                    made = total

                new = self._generate(contexts, given, SEED + number, on_step)
                progress.advance(steps=len(batch), work=given.max_tokens - made)
                for arguments, text in zip(batch, new, strict=True):
                    texts.append(text)
                    self.cache_hook.add_partial("generate_until", arguments, text)
        return groups.get_original(texts)

    def _generate(
        self, contexts: Sequence[str], given: GenerationOptions, seed: int, on_step
    ) -> list[str]:
        """Texts of one batch, whose requests have the same options."""
        room = self.max_length - given.max_tokens
        prompts = [(self.tok_encode(text) or [self.prefix_token_id])[-room:] for text in contexts]
        prompts += prompts[-1:] * (self.batch_size - len(prompts))  # one size, one program
        texts = generate_until(
            self._config,
            self._params,
            self.tokenizer,
            prompts,
            until=given.until,
            max_tokens=given.max_tokens,
            sampling=given.sampling,
            seed=seed,
            stop_tokens=self._stop_tokens,
            dtype=self._dtype,
            on_step=on_step,
        )
        return texts[: len(contexts)]

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's chat template writes it.

        Without `add_generation_prompt` its last message goes on. A template that knows no system
        message gets none.

        Raises:
          ValueError: see `render_chat`.
        """
        others = [message for message in chat_history if message["role"] != "system"]
        try:
            return self._render(chat_history, add_generation_prompt)
        except ValueError:
            if len(others) == len(chat_history):
                raise
            return self._render(others, add_generation_prompt)

    def _render(self, messages, answer_next: bool) -> str:
        return render_chat(self.tokenizer, messages, answer_next, goes_on=not answer_next)
