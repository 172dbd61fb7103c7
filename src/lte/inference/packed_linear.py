"""Linear layers with a threshold on their inputs that leave the weights of small inputs unread."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lte.inference.packed import PLAIN
from lte.modules.input_threshold import CUT, LeavesOut
from lte.ops.sparse_ffn import BackendName
from lte.ops.sparse_linear import LinearWeights, refuses, sparse_linears

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of layers of one module that have the same input in most families. If inputs differ, they run one by one."""


class PackedLinear(LeavesOut):
    """Base of both kinds. For a few tokens it leaves out small inputs; otherwise it is the layer it was before."""

    cutting: bool
    backend: BackendName
    group: "Group"

    def skips(self, x_TI: Tensor) -> bool:
        """Return whether the weights of small inputs are left unread in this pass.

        All weights are read with many tokens, with gradients, under autocast, while inputs are counted, and if hooks,
        quantisers or the like were added.
        """
        return (
            self.cutting
            and not self.kept_in
            and self.backend == "triton"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x_TI.device.type)
            and type(self._parameters.get("weight")) in PLAIN  # pruning and weight norm move it
            and "forward" not in vars(self)  # offloading replaces it
            and len(self._forward_pre_hooks) == 1
            and x_TI.dtype == self.get_parameter("weight").dtype
            and refuses(x_TI, [self.weights()]) is None
        )

    def weights(self) -> LinearWeights:
        """Return views of the current weights."""
        weight = self.get_parameter("weight")
        rows_IO = weight if isinstance(self, Conv1D) else weight.t()
        return LinearWeights(rows_IO, self._parameters["bias"], self.get_buffer(CUT))

    def forward(self, input: Tensor) -> Tensor:
        return self.group.output(self, input) if self.skips(input) else super().forward(input)

    @torch.no_grad()
    def pack_(self) -> None:
        """Make the rows of :meth:`weights` contiguous. Shape, values and the Parameter do not change."""
        rows_IO = self.weights().rows_IO.contiguous()  # no copy if it is contiguous already
        self.get_parameter("weight").data = rows_IO if isinstance(self, Conv1D) else rows_IO.t()


class SkippingLinear(PackedLinear, nn.Linear):
    pass


class SkippingConv1D(PackedLinear, Conv1D):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


_KINDS: dict[type[nn.Module], type[PackedLinear]] = {nn.Linear: SkippingLinear, Conv1D: SkippingConv1D}


class Group:
    """Linear layers with the same input. The one that is called first computes the outputs of all by one launch."""

    def __init__(self, members: list[PackedLinear]) -> None:
        self.members = members
        self._made: tuple[Tensor, list[Tensor]] | None = None

    def output(self, linear: PackedLinear, x_TI: Tensor) -> Tensor:
        """Return the output of one member. It :meth:`~PackedLinear.skips` this input."""
        made, last = self._made, linear is self.members[-1]
        if made is None or made[0] is not x_TI:
            if not all(one.skips(x_TI) for one in self.members):
                return sparse_linears(x_TI, [linear.weights()], linear.backend)[0]
            made = x_TI, sparse_linears(x_TI, [one.weights() for one in self.members], linear.backend)
        self._made = None if last else made
        return made[1][self.members.index(linear)]


def pack_linears_(linears: Mapping[str, nn.Module], backend: BackendName) -> None:
    """Make plain linear layers with a threshold leave out small inputs. Other kinds stay as they are.

    Only ``triton`` does so. ``auto`` does not change a layer: at a quarter of attention's inputs, a step was slower
    with the first kernel than without (docs/performance.md).

    Args:
        linears: the layers with a threshold, by their names in the model.
    """
    plain = {
        name: one
        for name, one in linears.items()
        if type(one._parameters.get("weight")) in PLAIN and (backend == "triton" or isinstance(one, PackedLinear))
    }
    for linear in plain.values():
        if type(linear) in _KINDS:
            linear.__class__ = _KINDS[type(linear)]
    packed = {name: one for name, one in plain.items() if isinstance(one, PackedLinear)}
    for linear in packed.values():
        linear.backend, linear.group = backend, Group([linear])
        linear.pack_()
    for members in _with_one_input(packed):
        group = Group(members)
        for linear in members:
            linear.group = group


def _with_one_input(packed: Mapping[str, PackedLinear]) -> Iterable[list[PackedLinear]]:
    """Yield the layers that take the same input, in the order of their calls."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in packed):
        for names in _TOGETHER:
            members = [packed.get(f"{parent}.{name}") for name in names]
            found = [one for one in members if one is not None]
            if len(found) == len(names):
                yield found
