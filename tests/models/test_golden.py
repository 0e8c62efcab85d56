"""The decoder reproduces stored logits of the PyTorch models; needs no PyTorch."""

import json

import jax
import make_golden
import numpy as np
import pytest
from make_golden import GOLDEN_DIR, GOLDEN_POSITIONS, GOLDEN_SEEDS, random_params, random_tokens

from gptvq_jax.models.config import ModelConfig
from gptvq_jax.models.llama import Decoder


@pytest.mark.parametrize("name", sorted(GOLDEN_SEEDS))
def test_golden_logits(name):
    golden = json.loads((GOLDEN_DIR / f"{name}.json").read_text())
    config, seed = ModelConfig.from_hf(golden["config"]), golden["seed"]
    params = random_params(config, seed)
    logits = jax.jit(Decoder(config).apply)({"params": params}, random_tokens(config, seed))
    assert len(golden["logits"]) == len(GOLDEN_POSITIONS)
    for position, expected in golden["logits"].items():
        assert np.std(expected) > 0.5  # a degenerate model would agree with anything
        np.testing.assert_allclose(logits[0, int(position)], expected, rtol=0, atol=1e-3)


def test_only_what_is_missing_or_named_is_written_anew(tmp_path, monkeypatch):
    for path in GOLDEN_DIR.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(make_golden, "GOLDEN_DIR", tmp_path)
    make_golden.main([])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    logits = np.zeros((1, make_golden.FAMILY_TOKENS, 2))
    monkeypatch.setattr(make_golden.families, "write_model", lambda *_: None)
    monkeypatch.setattr(make_golden.families, "torch_logits", lambda *_: logits)
    new = {str(t): [0.0, 0.0] for t in make_golden.FAMILY_POSITIONS}
    stored = json.loads(before["families.json"])
    make_golden.main(["qwen3", "phi3"])
    after = json.loads((tmp_path / "families.json").read_text())
    assert after == {**stored, "qwen3": new, "phi3": new} and [*after] == [*stored]
    del after["phi3"]
    (tmp_path / "families.json").write_text(json.dumps(after))
    make_golden.main([])
    assert json.loads((tmp_path / "families.json").read_text()) == {**after, "phi3": new}
    assert make_golden.wanted([], {"llama3"}, GOLDEN_SEEDS) == ["mistral"]
    with pytest.raises(SystemExit, match="no model is called 'llama9'; name some of llama3, "):
        make_golden.main(["llama9"])
