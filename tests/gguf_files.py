"""GGUF files of small models as llama.cpp's converter makes them, written without our reader's
tables: names, metadata and the order of rows are spelled out here."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

# The others are called as in transformers.
ARCHITECTURES = {"gemma3_text": "gemma3", "olmo3": "olmo2"}
INTERLEAVED = ("llama", "granite", "smollm3")
_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
# The others have it before feed.
_AFTER_ATTENTION = ("gemma2", "gemma3_text", "olmo2", "olmo3", "seed_oss")


def write_gguf(path: Path, directory: Path, model_type: str, more: dict | None = None) -> Path:
    """Converts a directory in Hugging Face's layout; returns `path`.

    Args:
      path: of the new file.
      directory: with config.json and model.safetensors.
      model_type: of the model.
      more: further tensors, by GGUF's names.
    """
    hf = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(model_type, model_type))
    _metadata(writer, hf, model_type)
    after = "post_attention_norm" if model_type in _AFTER_ATTENTION else "ffn_norm"
    names = {**_NAMES, "post_attention_layernorm": after}
    for name, array in load_file(directory / "model.safetensors").items():
        *parents, module, kind = name.split(".")
        block = f"blk.{parents[2]}." if "layers" in parents else ""
        if model_type.startswith("gemma") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        heads = {"q_proj": hf["num_attention_heads"], "k_proj": hf["num_key_value_heads"]}
        if model_type in INTERLEAVED and module in heads:
            halves = array.reshape(heads[module], 2, -1, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        writer.add_tensor(f"{block}{names[module]}.{kind}", array.astype(np.float32))
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(writer: gguf.GGUFWriter, hf: dict, model_type: str) -> None:
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_rope_dimension_count(int(hf["head_dim"] * hf.get("partial_rotary_factor", 1)))
    writer.add_bos_token_id(hf["bos_token_id"])
    writer.add_eos_token_id(hf["eos_token_id"])
    rope = hf.get("rope_scaling")
    if rope:
        kind = rope.get("rope_type", rope.get("type"))
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if model_type in ("gemma2", "gemma3_text", "phi3", "olmo3"):
        writer.add_sliding_window(hf["sliding_window"])
    if model_type == "olmo3":
        every_fourth = [(index + 1) % 4 == 0 for index in range(hf["num_hidden_layers"])]
        full = [kind == "full_attention" for kind in hf.get("layer_types", [])] or every_fourth
        writer.add_sliding_window_pattern([not all_positions for all_positions in full])
    if model_type == "gemma2":
        writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
    if model_type == "granite":
        writer.add_embedding_scale(hf["embedding_multiplier"])
        writer.add_attention_scale(hf["attention_multiplier"])
        writer.add_residual_scale(hf["residual_multiplier"])
        writer.add_logit_scale(hf["logits_scaling"])
