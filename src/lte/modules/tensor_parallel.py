"""Tensor parallelism of transformers: each process has some whole experts of each FFN.

transformers gives each process rows of gate and up and columns of down. It sums the outputs of the down projections.
Routers, thresholds and compensations are whole in every process.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ExpertShard:
    """The experts of this process. The processes of ``mesh``, in their order, have the same number of the E experts.

    The router is whole in every process. So a process can compute all scores without communication, or only those of
    its own experts. Gradients are correct too: each process's router gets the gradients of all experts.

    Attributes:
        mesh: the processes that share an FFN, in one dimension.
        num_experts: E, of the whole FFN.
    """

    mesh: DeviceMesh
    num_experts: int

    @cached_property
    def own(self) -> slice:
        """The indices of this process's experts."""
        count = self.num_experts // self.mesh.size()
        first = count * self.mesh.get_local_rank()
        return slice(first, first + count)

    def cut(self, weights_TE: Tensor) -> Tensor:
        """Return the weights of this process's experts: ``[..., E]`` -> ``[..., E / P]``, for P processes."""
        if not (torch.is_grad_enabled() and weights_TE.requires_grad):
            return weights_TE[..., self.own]
        from torch.distributed.tensor import DTensor, Replicate, Shard

        whole = DTensor.from_local(weights_TE, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(weights_TE.ndim - 1)]).to_local()

    def gather(self, own_TF: Tensor) -> Tensor:
        """Return the neurons of all P processes, for a router that reads neurons: ``[..., F / P]`` -> ``[..., F]``."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(own_TF, self.mesh, [Shard(own_TF.ndim - 1)], run_check=False).full_tensor()


def processes_of(model: nn.Module) -> int:
    """Return the number of processes that share the model's weights by tensor parallelism; 1 if it is whole."""
    return getattr(model, "_tp_size", None) or 1


def check_not_shared(model: nn.Module, who: str) -> None:
    """Raise ValueError unless this process has the whole model.

    Args:
        who: the function that needs whole weights, with its verb: ``"optimize_ packs"``.
    """
    if (size := processes_of(model)) > 1:
        raise ValueError(
            f"{who} whole weights, but {size} processes share this model: load it without tensor parallelism"
        )
