"""Writes golden/*.json: logits of transformers' PyTorch models, to be checked without PyTorch.

    PYTHONPATH=.:tests python tests/models/make_golden.py           # what is missing
    PYTHONPATH=.:tests python tests/models/make_golden.py llama3 olmo3   # these, anew

needs torch and transformers. Another version of either changes last digits of what is there: so
what is there stays, unless it is named. The weights are not stored: `random_params` draws them
from a seed.
"""

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import tiny_families as families

from gptvq_jax.models.config import Llama3RopeScaling, ModelConfig

GOLDEN_DIR = Path(__file__).with_name("golden")
# Longer than a chunk of queries (256), every sliding window and every original context below.
NUM_TOKENS = 300
GOLDEN_POSITIONS = (0, 15, 63, 256, 299)

# Every rms_norm_eps below is large enough to be missed when left out.
_SMALL = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
CONFIGS = {
    "llama2": ModelConfig(
        model_type="llama",
        **_SMALL,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        rms_norm_eps=1e-2,
    ),
    # The rotary wavelengths 6, 32, 167, ... fall below, inside and above the band 16..64.
    "llama3": ModelConfig(
        model_type="llama",
        **_SMALL,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-2,
        rope_theta=5e5,
        rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 64),
        max_position_embeddings=512,
        bos_token_id=90,
        eos_token_id=(91, 92),
    ),
    "mistral": ModelConfig(
        model_type="mistral",
        **_SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-2,
        max_position_embeddings=1024,
        sliding_window=16,
    ),
    "smollm2": ModelConfig(
        model_type="llama",
        **_SMALL,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        rms_norm_eps=1e-2,
        rope_theta=1e5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
    ),
}
GOLDEN_SEEDS = {"llama3": 3, "mistral": 4}
FAMILY_TOKENS, FAMILY_POSITIONS = 140, (0, 70, 139)  # of families.json; 140 is over a chunk of 128


def random_params(config: ModelConfig, seed: int) -> dict:
    """Draws a float32 parameter tree; RandomState, because its stream is frozen in NumPy.

    Kernels are large enough for sharp attention and norm scales far enough from 1 that leaving any
    of them out changes the logits.
    """
    rng = np.random.RandomState(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def kernel(fan_in, fan_out, gain=1.0):
        return {"kernel": normal(fan_in, fan_out) * np.float32(gain / np.sqrt(fan_in))}

    def norm():
        return {"scale": 1 + np.float32(0.3) * normal(hidden)}

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    params = {"embed_tokens": {"embedding": normal(config.vocab_size, hidden)}}
    for i in range(config.num_hidden_layers):
        params[f"layers_{i}"] = {
            "input_layernorm": norm(),
            "self_attn": {
                "q_proj": kernel(hidden, q_size, gain=1.5),
                "k_proj": kernel(hidden, kv_size, gain=1.5),
                "v_proj": kernel(hidden, kv_size),
                "o_proj": kernel(q_size, hidden),
            },
            "post_attention_layernorm": norm(),
            "mlp": {
                "gate_proj": kernel(hidden, inner),
                "up_proj": kernel(hidden, inner),
                "down_proj": kernel(inner, hidden),
            },
        }
    params["norm"] = norm()
    if not config.tie_word_embeddings:
        params["lm_head"] = kernel(hidden, config.vocab_size)
    return params


def random_tokens(config: ModelConfig, seed: int, batch: int = 1) -> np.ndarray:
    """Draws int32 tokens (batch, NUM_TOKENS)."""
    rng = np.random.RandomState(1000 + seed)
    return rng.randint(config.vocab_size, size=(batch, NUM_TOKENS)).astype(np.int32)


def torch_model(config: ModelConfig, params: dict, directory: Path):
    """Builds transformers' eager float32 model from config.to_hf(), written to `directory`."""
    import torch
    import transformers

    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    hf_config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    state = {name: torch.from_numpy(array) for name, array in _torch_names(params)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or missing != (["lm_head.weight"] if config.tie_word_embeddings else []):
        raise ValueError(f"weights do not fit {config}: {missing=} {unexpected=}")
    return model.eval()


def torch_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Runs a transformers model on tokens (batch, time), giving float32 (batch, time, vocab)."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def _torch_names(tree: dict, prefix: str = "model"):
    for name, value in tree.items():
        if name == "lm_head":
            yield "lm_head.weight", np.ascontiguousarray(value["kernel"].T)
        elif isinstance(value, dict):
            yield from _torch_names(value, f"{prefix}.{name.replace('layers_', 'layers.')}")
        else:
            yield f"{prefix}.weight", np.ascontiguousarray(value.T if name == "kernel" else value)


def wanted(names: Sequence[str], stored: Collection[str], known: Collection[str]) -> list[str]:
    """Which of `known` to write: those that are named, or, where none is, those not stored."""
    return [name for name in known if (name in names if names else name not in stored)]


def main(names: Sequence[str]):
    """Writes a file per entry of GOLDEN_SEEDS, and one of all families."""
    import tempfile

    if unknown := {*names} - {*GOLDEN_SEEDS, *families.CONFIGS}:
        known = ", ".join([*GOLDEN_SEEDS, *families.CONFIGS])
        raise SystemExit(f"error: no model is called {min(unknown)!r}; name some of {known}")
    GOLDEN_DIR.mkdir(exist_ok=True)
    stored = {path.stem for path in GOLDEN_DIR.glob("*.json")}
    for name in wanted(names, stored, GOLDEN_SEEDS):
        config, seed = CONFIGS[name], GOLDEN_SEEDS[name]
        with tempfile.TemporaryDirectory() as directory:
            model = torch_model(config, random_params(config, seed), Path(directory))
        logits = torch_logits(model, random_tokens(config, seed))[0]
        golden = {
            "config": config.to_hf(),
            "seed": seed,
            "logits": {str(t): [round(float(v), 6) for v in logits[t]] for t in GOLDEN_POSITIONS},
        }
        path = GOLDEN_DIR / f"{name}.json"
        path.write_text(json.dumps(golden, indent=1) + "\n")
        print(f"{path.name}: {path.stat().st_size} bytes")
    path = GOLDEN_DIR / "families.json"
    golden = json.loads(path.read_text()) if path.exists() else {}
    todo = wanted(names, golden, families.CONFIGS)
    for name in todo:
        with tempfile.TemporaryDirectory() as directory:
            model = families.write_model(Path(directory), name)
            logits = families.torch_logits(model, families.random_tokens(FAMILY_TOKENS))[0]
        golden[name] = {t: [round(float(v), 5) for v in logits[t]] for t in FAMILY_POSITIONS}
        print(f"{path.name}: {name}")
    if todo:
        lines = (f"{json.dumps(name)}: {json.dumps(golden[name])}" for name in families.CONFIGS)
        path.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
