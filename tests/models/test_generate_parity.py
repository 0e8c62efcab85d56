"""Greedy generation against transformers' own, in PyTorch."""

import numpy as np
import pytest
from make_golden import CONFIGS, random_params, random_tokens, torch_model

from gptvq_jax.serve.generate import generate

STEPS = 30  # beyond the sliding window of 16


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_greedy_tokens_match_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    params = random_params(config, seed=11)
    model = torch_model(config, params, tmp_path)
    prompts = [tokens.tolist() for tokens in random_tokens(config, seed=11, batch=2)[:, :25]]
    prompts[1] = prompts[1][:9]
    ours = generate(config, params, prompts, max_tokens=STEPS).tokens
    for prompt, tokens in zip(prompts, ours, strict=True):
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=STEPS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        np.testing.assert_array_equal(tokens, expected[0, len(prompt) :].numpy())
