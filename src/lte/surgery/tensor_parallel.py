"""Tells the sparse FFNs of a loaded model which experts this process has under tensor parallelism."""

from typing import Any

from lte.modules.quantised_linear import is_quantised
from lte.modules.sparse_ffn import Selecting
from lte.modules.tensor_parallel import ExpertShard, processes_of


def shard_experts_(model: Any) -> None:
    """Tell each sparse FFN of a model just loaded which experts this process has. A whole model does not change.

    Raises:
        ValueError: the processes cannot have the same number of experts, or experts are quantised.
    """
    size = processes_of(model)
    if size == 1:
        return
    if is_quantised(model):
        raise ValueError("quantised experts cannot be divided among processes: load the model without tp_size")
    mesh = model._device_mesh
    mesh = mesh if mesh.ndim == 1 else mesh["tp"]
    for name, layer in model.named_modules():
        if not isinstance(layer, Selecting):
            continue
        experts = layer.router.num_experts
        if experts % size:
            raise ValueError(
                f"{name} has {experts} experts, which {size} processes cannot share evenly: load the model with a "
                f"tp_size that divides {experts}, or convert the dense one with another expert_size"
            )
        layer.shard = ExpertShard(mesh, experts)
