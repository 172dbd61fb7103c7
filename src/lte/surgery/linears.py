"""Linear layers of both kinds: ``nn.Linear``, and GPT-2's ``Conv1D``, whose weight is transposed."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lte.modules.quantised_linear import QuantisedLinear

Linear = nn.Linear | Conv1D


def check_plain(name: str, linear: nn.Module) -> None:
    """Raise ValueError unless ``linear`` is a plain linear layer, neither wrapped nor quantised.

    ``name`` is its name in messages.
    """
    if isinstance(linear, QuantisedLinear):
        raise ValueError(f"{name} is quantised: load the model that it was made from")
    if not isinstance(linear, Linear):
        raise ValueError(
            f"{name} is a {type(linear).__module__}.{type(linear).__name__}, not a linear layer: give the "
            "plain model (merge adapters first, e.g. with merge_and_unload; add new ones afterwards)"
        )
    sizes_of(linear)
    if type(linear.weight) is not nn.Parameter:  # some quantisers show a float's dtype
        kind = type(linear.weight).__name__
        raise ValueError(f"{name} keeps its weight as a {kind}: load the model unquantised and whole")


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer.

    Raises:
        ValueError: its weights are quantised by another library.
    """
    if isinstance(linear, QuantisedLinear):
        return linear.in_features, linear.out_features
    weight = linear.weight
    if not isinstance(weight, Tensor):  # after dynamic quantisation it is a method
        raise ValueError(f"{type(linear).__name__} holds quantised weights: load the model unquantised")
    if weight.ndim != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(
            f"{type(linear).__name__} holds quantised weights ({weight.dtype} of shape {tuple(weight.shape)}): "
            "load the model unquantised (or from GGUF, which is dequantised on loading)"
        )
    d_out, d_in = weight.shape[::-1] if isinstance(linear, Conv1D) else weight.shape
    return d_in, d_out


def rows_of(linear: nn.Module) -> Tensor:
    """Return ``[O, I]``, a view of the weight with a row for each output."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return (weight.T if isinstance(linear, Conv1D) else weight).detach()


def reorder_(linear: nn.Module, order: Tensor, side: str) -> None:
    """Reorder the inputs or outputs of a linear layer. ``side`` is ``in`` or ``out``."""
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    dim = int((side == "in") != isinstance(linear, Conv1D))
    order = order.to(weight.device)
    weight.copy_(weight.index_select(dim, order))
    if side == "out" and isinstance(bias, Tensor):
        bias.copy_(bias[order])
