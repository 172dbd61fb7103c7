"""A sparse model in vLLM: vLLM runs attention, embeddings and head, and lte runs the FFNs. One class for all families.

vLLM's Transformers backend makes the model by ``AutoModel`` and puts its own layers in the places of Hugging Face's.
The class here keeps FFNs, and layers with a threshold on their inputs, as they are. After the weights are loaded, FFNs
skip their idle experts wherever :func:`lte.optimize_` can make them do so.
"""

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models import transformers as backend  # pyright: ignore[reportMissingImports]

from lte.inference.optimize import pack_ffns_
from lte.modules.input_threshold import cut_layers
from lte.surgery.sites import find_sites

logger = logging.getLogger(__name__)


class TransformersForCausalLM(backend.TransformersForCausalLM):
    """A sparse causal language model. vLLM asks for the name of this class to know its Transformers backend.

    Raises:
        ValueError: the model is GPT-2, or vLLM is asked for LoRA adapters, quantisation, pipeline stages, or tensor
            parallelism that this model does not allow.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if vllm_config.lora_config is not None:
            raise ValueError("sparse FFNs take no LoRA adapters in vLLM: merge the adapter, and serve the merged model")
        if vllm_config.quant_config is not None:
            raise ValueError("vLLM does not quantise sparse FFNs: leave --quantization out, and use lte quantise")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("a sparse model has no pipeline stages: leave --pipeline-parallel-size out")
        if vllm_config.model_config.hf_config.model_type == "gpt2":  # attention's output loses its shape there
            raise ValueError("vLLM cannot run GPT-2 as transformers has it: take lte serve --engine transformers")
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def recursive_replace(self) -> None:
        """Put vLLM's layers in the places of Hugging Face's, but not inside FFNs or where a layer has a threshold."""
        ffns = [name for site in find_sites(self.model, self.config.model_type) for name in site.modules()]
        others = [name for name in cut_layers(self.model) if name not in ffns and not _inside(name, ffns)]
        if self.tp_group.world_size > 1:
            _check_divisible(self.model, others)
        self._kept = {name: self.model.get_submodule(name) for name in (*ffns, *others)}
        for name in self._kept:
            self.model.set_submodule(name, nn.Identity())
        super().recursive_replace()
        for name, module in self._kept.items():
            self.model.set_submodule(name, module)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights. Then make the FFNs skip idle experts if they can.

        Raises:
            ValueError: the checkpoint lacks a weight of a layer that vLLM did not replace.
        """
        loaded = super().load_weights(weights)
        needed = {f"model.{name}" for name in self.model.state_dict() if _inside(name, self._kept)}
        if missing := needed - loaded:
            raise ValueError(f"{len(missing)} weights are missing, first {min(missing)}: save or copy the model again")
        try:
            pack_ffns_(self.model)
        except ValueError as error:
            logger.warning("idle experts are computed too: %s", error)
        return loaded


def _inside(name: str, modules: Iterable[str]) -> bool:
    return name.startswith(tuple(f"{one}." for one in modules))


def _check_divisible(model: Any, whole: list[str]) -> None:
    """Raise ValueError unless vLLM can divide attention among processes.

    Args:
        whole: the names of layers of attention that cannot be divided.
    """
    if whole or not model.tp_plan:
        reason = f"{whole[0]} has a threshold on its inputs" if whole else "transformers has no plan to divide it"
        raise ValueError(f"{type(model).__name__} runs in one process ({reason}): leave --tensor-parallel-size out")
    logger.warning("each process has all experts: --tensor-parallel-size divides only attention and embeddings")
