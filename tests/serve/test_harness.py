"""The harness's tasks on packed weights, against its own PyTorch backend on the dense export."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lm_eval  # noqa: E402
import local_tasks  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tiny_run import byte_tokenizer  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from gptvq_jax.console.progress import Progress  # noqa: E402
from gptvq_jax.exchange.hf_dense import hf_dense  # noqa: E402
from gptvq_jax.serve.harness import HarnessModel  # noqa: E402
from gptvq_jax.serve.harness_options import GenerationOptions  # noqa: E402
from gptvq_jax.serve.sampling import Sampling  # noqa: E402
from gptvq_jax.serve.served_model import ServedModel  # noqa: E402
from gptvq_jax.storage.checkpoint import PackedCheckpoint  # noqa: E402

TASKS = [f"local_{name}" for name in local_tasks.NAMES]


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    path = local_tasks.write_tasks(tmp_path_factory.mktemp("tasks"))
    return TaskManager(include_path=str(path), include_defaults=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its tokenizer begins texts with BOS."""
    return local_tasks.write_model(tmp_path_factory.mktemp("checkpoint") / "packed", True)


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory):
    """The same weights."""
    return local_tasks.write_model(tmp_path_factory.mktemp("checkpoint") / "packed", False)


@pytest.fixture(scope="module")
def model(checkpoint):
    return ours(checkpoint)


def evaluate(model, manager, tasks=TASKS, **options):
    found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, **options)
    return found["results"], found["samples"]


def ours(checkpoint, **options):
    served = ServedModel(str(checkpoint), None, "xla")
    return HarnessModel(served, 4, local_tasks.MAX_LENGTH, **options)


@pytest.mark.parametrize(
    "name, num_fewshot, add_bos_token",
    [("checkpoint", None, None), ("checkpoint", 1, False), ("without_bos", 1, None)],
)
def test_the_harness_own_backend_agrees(
    name, num_fewshot, add_bos_token, manager, tmp_path, request
):
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    checkpoint = request.getfixturevalue(name)
    hf_dense(PackedCheckpoint(checkpoint), tmp_path / "out")
    options = {"max_length": local_tasks.MAX_LENGTH, "add_bos_token": add_bos_token}
    theirs = HFLM(str(tmp_path / "out"), device="cpu", dtype="float32", batch_size=4, **options)
    expected, of_theirs = evaluate(theirs, manager, num_fewshot=num_fewshot)
    model = ours(checkpoint, add_bos_token=add_bos_token)
    found, of_ours = evaluate(model, manager, num_fewshot=num_fewshot)
    count = 0
    for task in TASKS:
        for one, other in zip(of_ours[task], of_theirs[task], strict=True):
            assert one["arguments"] == other["arguments"]
            count += agree(one["resps"], other["resps"])
        assert found[task].keys() == expected[task].keys()
        numbers = {name: v for name, v in expected[task].items() if not isinstance(v, str)}
        assert {name: found[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
    assert count == 9 * (3 + 3 + 1 + 1)
    assert model.prefix_token_id == theirs.prefix_token_id


def agree(found, expected):
    """Asserts that answers to the requests of a document are the same; returns their number."""
    for (one,), (other,) in zip(found, expected, strict=True):
        if isinstance(other, str):
            assert one == other
        else:
            np.testing.assert_allclose(np.ravel(one), np.ravel(other), atol=1e-3)
    return len(found)


def ask(**arguments):
    return SimpleNamespace(args=tuple(arguments.values()), task_name="asked")


def test_texts_differ_and_end_where_the_task_says(model, manager):
    _, samples = evaluate(model, manager, ["local_continue"])
    texts = [sample["resps"][0][0] for sample in samples["local_continue"]]
    assert len(set(texts)) > 3 and not any("de" in text or "b" in text for text in texts)
    contexts = [sample["arguments"][0][0] for sample in samples["local_continue"]]
    longer = [ask(context=c, options={"until": ["~"], "max_gen_toks": 20}) for c in contexts]
    whole = model.generate_until(longer)
    assert all(map(str.startswith, whole, texts))
    assert {len(text) for text in whole} == {20}
    stop = max(whole, key=lambda text: len(set(text)))[3:5]  # what one of them says
    ended = [ask(context=c, options={"until": [stop], "max_gen_toks": 20}) for c in contexts]
    assert model.generate_until(ended) == [text.split(stop)[0] for text in whole]
    assert any(stop in text for text in whole)
    # Prompts of other lengths, in other batches, with other options: answers keep their order.
    mixed = [ask(context=c, options={"until": "~", "max_gen_toks": 3}) for c in contexts[::-1]]
    found = model.generate_until(longer[:5] + mixed)
    # More of a long context is left where less follows it, so that it may go on otherwise.
    assert found == whole[:5] + [model.generate_until([request])[0] for request in mixed]


def test_what_is_generated_is_greedy(model):
    (text,) = model.generate_until([ask(context="abc def", options={"max_gen_toks": 6})])
    other = text[:-1] + ("a" if text[-1] != "a" else "b")
    requests = [ask(context="abc def", continuation=c) for c in (other, text)]
    assert [greedy for _, greedy in model.loglikelihood(requests)] == [False, True]


def test_steps_end_with_the_last_stop_string(model, monkeypatch):
    made = []
    monkeypatch.setattr(Progress, "advance", lambda self, text="", *rest, **_: made.append(text))
    options = {"until": [" ", "\n", *"abcdef."], "max_gen_toks": 60}
    assert model.generate_until([ask(context="abc", options=options)]) == [""]
    assert made == ["1 of at most 60 tokens", ""]


def test_draws_differ_in_a_batch_and_repeat(model):
    options = {"do_sample": True, "temperature": 1.5, "until": [], "max_gen_toks": 8}
    requests = [ask(context="abc", options=options)] * 6
    texts = model.generate_until(requests)
    assert len(set(texts)) > 2 and texts == model.generate_until(requests)
    likeliest = [ask(context="abc", options={**options, "top_k": 1})]
    greedy = [ask(context="abc", options={"until": [], "max_gen_toks": 8})]
    assert model.generate_until(likeliest) == model.generate_until(greedy)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"max_gen_toks": 9, "num_beams": 4},
            "generation_kwargs have num_beams=4, which is not supported",
        ),
        ({"max_gen_toks": 9, "do_sample": True}, "do_sample without a temperature; set it above 0"),
        ({"max_gen_toks": 96}, "max_gen_toks=96 tokens; that must be from 1 to 95"),
        ({"max_gen_toks": 9, "temperature": 1, "top_p": 2.0}, r"top_p=2\.0 must be above 0"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions.of_task({"until": ["a"], **options}, "</s>", local_tasks.MAX_LENGTH)


def test_options_that_count_or_change_nothing():
    options = {"until": "a", "num_beams": 1, "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9}
    found = GenerationOptions.of_task(options, "</s>", 10)
    assert found == GenerationOptions(("a", "</s>"), 5, Sampling(0.5, 0, 0.9))
    assert GenerationOptions.of_task({"do_sample": False, "temperature": 1}, None, 999) == (
        GenerationOptions((), 256, Sampling())
    )


def test_special_tokens(checkpoint, without_bos):
    bos, plain = local_tasks.CONFIG.bos_token_id, ours(without_bos).tok_encode("ab")
    assert ours(checkpoint, add_bos_token=False).tok_encode("ab") == plain
    for given in (None, True):
        model = ours(checkpoint, add_bos_token=given)
        assert model.tok_encode("ab") == [bos, *plain]
        assert model.tok_encode("<s>ab") == [bos, *plain]  # once is enough
        assert model.tok_encode("ab", add_special_tokens=False) == plain
    model.tokenizer = PreTrainedTokenizerFast(  # has one, and adds none by itself
        tokenizer_object=local_tasks.tokenizer(False).backend_tokenizer, bos_token="<s>"
    )
    assert model.tok_encode("ab") == [bos, *plain]
    with pytest.raises(ValueError, match="no BOS token; leave out --add_bos_token"):
        ours(without_bos, add_bos_token=True)
    # Before an empty context stands BOS, or else the end of text.
    assert model.prefix_token_id == bos
    assert ours(without_bos).prefix_token_id == local_tasks.CONFIG.eos_token_id


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_length": 513}, "max_length=513 must be from 1 to 512, the model's positions"),
    ],
)
def test_numbers_out_of_range(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        HarnessModel(ServedModel(str(checkpoint), None), **options)


def test_no_token_to_begin_with(checkpoint):
    model = ours(checkpoint)
    model.tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="neither a BOS token nor one for the end of text"):
        model.loglikelihood([ask(context="", continuation="a")])


def test_an_empty_continuation_is_one_line(model):
    with pytest.raises(ValueError, match="task asked has an empty continuation"):
        model.loglikelihood([ask(context="a", continuation="")])


def test_chat_template(checkpoint):
    model = ours(checkpoint)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    history = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert model.apply_chat_template(history) == "[user]U[end][assistant]"
    history.append({"role": "assistant", "content": "Yes"})
    unfinished = model.apply_chat_template(history, add_generation_prompt=False)
    assert unfinished == "[user]U[end][assistant]Yes"
    model.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match="chat template fails: never"):
        model.apply_chat_template(history)
