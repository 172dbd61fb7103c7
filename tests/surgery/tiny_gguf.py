"""A tiny Llama as a GGUF file, its numbers in fp32: what a damaged file is made from."""

from pathlib import Path

from torch import Tensor
from transformers import LlamaForCausalLM

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: LlamaForCausalLM, path: Path, **more: int) -> Path:
    """Write ``model`` with a tokenizer of bytes; ``more`` overrides metadata, e.g. ``block_count``."""
    import gguf

    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(more.get("block_count", config.num_hidden_layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*(chr(33 + n) for n in range(config.vocab_size - 1)), "!#"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["! #"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, weight: Tensor) -> None:
        writer.add_tensor(name, weight.detach().float().contiguous().numpy())

    weights = model.state_dict()
    add("token_embd.weight", weights["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):  # llama.cpp has the halves of a head's rotation one beside the other
                count = heads if ours == "attn_q" else kv_heads
                weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
            add(f"blk.{layer}.{ours}.weight", weight)
    add("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
