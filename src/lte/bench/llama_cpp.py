"""llama.cpp beside ours: the same weights as a GGUF file, the same prompt, and the same number of threads.

llama.cpp comes as the package ``xllamacpp``. The vocabulary in the file has no words, because prompts are token ids.
"""

import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.bench.decoding import Decoded

FORMS = ("BF16", "Q8_0", "Q4_0")
"""How llama.cpp stores the weights: the peers of bf16, int8 and int4."""
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}


class LlamaCpp:
    """A dense model that llama.cpp decodes.

    Args:
        model: dense, or sparse in any mode: all experts are taken.
        form: one of :data:`FORMS`.
        prompt_tokens, new_tokens: the size. There is one text.

    Raises:
        ValueError: GGUF has no place for a tensor of the model.
    """

    def __init__(self, model: PreTrainedModel, form: str, prompt_tokens: int, new_tokens: int) -> None:
        xllamacpp: Any = import_module("xllamacpp")

        self._new_tokens, threads = new_tokens, torch.get_num_threads()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, form)
            options: Any = xllamacpp.CommonParams()
            options.model.path = str(path)
            options.n_ctx, options.n_parallel, options.verbosity = prompt_tokens + new_tokens + 8, 1, 0
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
            self._server: Any = xllamacpp.Server(options)  # the mapped file lives on

    def __call__(self, prompt_BS: Tensor) -> Decoded:
        """Continue one prompt greedily. The times are llama.cpp's own, and its tokens are not returned.

        Raises:
            ValueError: it decoded another number of tokens.
        """
        request = {"prompt": prompt_BS[0].tolist(), "n_predict": self._new_tokens, "temperature": 0}
        answer = self._server.handle_completions({**request, "ignore_eos": True, "cache_prompt": False})
        timings = answer.get("timings", {})
        if timings.get("predicted_n") != self._new_tokens:
            raise ValueError(f"llama.cpp did not decode {self._new_tokens} tokens: {str(answer)[:200]}")
        steps = [timings["predicted_per_token_ms"] / 1e3] * (self._new_tokens - 1)
        return Decoded(prompt_BS, timings["prompt_ms"] / 1e3, steps)


def is_there() -> bool:
    """Return whether the packages that a peer needs are installed."""
    return all(find_spec(name) is not None for name in ("xllamacpp", "gguf"))


@torch.no_grad()
def write_gguf(model: PreTrainedModel, path: Path, form: str) -> None:
    """Write a dense model's weights as llama.cpp reads them. Norms and biases stay fp32.

    Raises:
        ValueError: the family is not one of llama, mistral, qwen2 and qwen3, or GGUF has no name for a tensor.
    """
    import gguf

    config: Any = model.config
    if config.model_type not in _ARCHITECTURES:
        raise ValueError(f"{config.model_type} is not written as GGUF: only {', '.join(_ARCHITECTURES)} are")
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType[form]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_sizes(writer, config, head)
    for name, tensor in _dense_tensors(model).items():
        base, _, suffix = name.rpartition(".")
        found = names.get_name(base)
        if found is None:
            raise ValueError(f"GGUF has no name for {name}")
        if architecture is gguf.MODEL_ARCH.LLAMA and base.endswith(("q_proj", "k_proj")):
            tensor = _interleaved(tensor, head)
        values = tensor.float().numpy()
        stored = gguf.quants.quantize(values, kind) if tensor.ndim == 2 else values
        writer.add_tensor(f"{found}.{suffix}", stored, raw_dtype=kind if tensor.ndim == 2 else None)
    factors = _rope_factors(model, head)
    if not torch.allclose(factors, torch.ones_like(factors)):
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: Any, head: int) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)


def _dense_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights besides routers and compensations. A tied head is left out, as llama.cpp wants it."""
    return {
        name: tensor.detach()
        for name, tensor in model.named_parameters()  # names a tied weight once
        if ".router." not in name and ".compensation." not in name
    }


def _interleaved(rows: Tensor, head: int) -> Tensor:
    """Return the rows of queries or keys in llama.cpp's order for Llama: the two of each rotation are neighbours."""
    return rows.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)


def _rope_factors(model: Any, head: int) -> Tensor:
    """Return what llama.cpp divides the plain frequencies of the rotation by, ``[d / 2]``."""
    theta = model.config.rope_parameters["rope_theta"]
    plain = torch.exp(-math.log(theta) * torch.arange(0, head, 2) / head)
    rotation = model.model.rotary_emb
    exact = type(rotation)(config=model.config).inv_freq  # the model's own was perhaps cast to 16 bits
    return (plain / exact.cpu()).float()
