"""Tensor parallelism as transformers does it: each process has a part of an FFN's neurons, some whole experts.

transformers gives each process rows of gate and up and columns of down, and adds up what the down projections put out.
Routers, thresholds and compensations are whole in every process.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ExpertShard:
    """Which of E experts this process has: of ``mesh``'s processes in their order, each the same number.

    The router is whole everywhere. So all scores can be had without a message, and those of a process's own experts
    for its share of the work. Gradients are right as well: a process's router gets those of all experts.

    Attributes:
        mesh: of one dimension, the processes that share an FFN.
        num_experts: E, of the whole FFN.
    """

    mesh: DeviceMesh
    num_experts: int

    @cached_property
    def own(self) -> slice:
        """The rows of this process's experts."""
        count = self.num_experts // self.mesh.size()
        first = count * self.mesh.get_local_rank()
        return slice(first, first + count)

    def cut(self, weights_TE: Tensor) -> Tensor:
        """``[..., E]`` -> ``[..., E / P]``: those of this process's experts, of P processes."""
        if not (torch.is_grad_enabled() and weights_TE.requires_grad):
            return weights_TE[..., self.own]
        from torch.distributed.tensor import DTensor, Replicate, Shard

        whole = DTensor.from_local(weights_TE, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(weights_TE.ndim - 1)]).to_local()

    def gather(self, own_TF: Tensor) -> Tensor:
        """``[..., F / P]`` -> ``[..., F]``: what all P processes have, for a router that reads neurons."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(own_TF, self.mesh, [Shard(own_TF.ndim - 1)], run_check=False).full_tensor()


def processes_of(model: nn.Module) -> int:
    """How many processes share the model's weights by tensor parallelism; 1: it is whole."""
    return getattr(model, "_tp_size", None) or 1


def check_not_shared(model: nn.Module, who: str) -> None:
    """Refuse a model whose weights are shared out.

    Args:
        who: wants its weights whole, and the verb: ``"optimize_ packs"``.

    Raises:
        ValueError: each process has a part of its weights.
    """
    if (size := processes_of(model)) > 1:
        raise ValueError(
            f"{who} whole weights, and this model's are shared out over {size} processes: load it without tensor "
            "parallelism"
        )
