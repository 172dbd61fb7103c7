"""What is done to a model when a stage begins: neurons grouped anew, routers started, sharpened, frozen, calibrated.

All of it changes the model in place, and leaves all ranks with the same one.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor

from lte.modules.recording import sparse_layers
from lte.modules.sparse_ffn import Selecting
from lte.surgery.activations import first_tokens
from lte.surgery.convert import group, set_mode_
from lte.surgery.method import Method
from lte.surgery.sites import find_sites
from lte.training.arguments import LTETrainingArguments
from lte.training.calibration import calibrate_
from lte.training.compensation_start import fit_compensations_
from lte.training.router_start import fit_routers_
from lte.training.stages import Stage

Batches = Iterable[dict[str, Tensor]]
_USUAL_SPARSITY = 0.5  # that a start is made for where none is asked for


def set_stage_(model: Any, stage: Stage, train_bias: bool) -> None:
    """The mode of a stage; routers train in the soft one only, compensation for idle experts in the hard one too."""
    set_mode_(model, stage)
    for layer in sparse_layers(model).values():
        for name, parameter in layer.router.named_parameters():
            parameter.requires_grad_(stage == "soft" and (train_bias or not name.endswith("bias")))
        if layer.compensation is not None:
            layer.compensation.requires_grad_(stage != "dense")


def regroup_(model: Any, method: Method, batches: Batches) -> None:
    """Group the neurons again, on the weights that the dense stage left (LTE paper, section 4.1).

    A method that groups by activations records them anew, on ``batches``; others read none.
    """
    sites = find_sites(model, model.config.model_type)
    for site, order in zip(sites, group(model, sites, method, batches), strict=True):
        site.permute_neurons(broadcast(order.to(model.device)))  # pyright: ignore[reportArgumentType]
    model.config.lte.pop("grouped", None)


def start_routers_(model: Any, method: Method, batches: Batches, args: LTETrainingArguments) -> None:
    """Routers as the soft stage begins with them, or a method that does not learn needs them; reads what it must."""
    layers = sparse_layers(model).values()
    bias = cast(float, args.router_bias) if method.learns else 0.0
    generator = torch.Generator().manual_seed(args.seed)
    for layer in layers:
        layer.reset(generator, bias)
    if method.learns and args.router_start == "random":
        return
    set_mode_(model, "dense")
    if method.learns:
        seen: list[dict[str, Tensor]] = []
        fit_routers_(model, (seen.append(batch) or batch for batch in batches), bias)
        if any(layer.compensation is not None for layer in layers):
            fit_compensations_(model, seen, args.target_sparsity or _USUAL_SPARSITY)
    else:
        for layer in layers:
            layer.router.requires_grad_(True)  # a method may train them, outside of the training loop
        method.fit(model, first_tokens(batches, method.fit_tokens))
    _share_routers(layers)


def sharpen_(layers: Iterable[Selecting], temperature: float) -> None:
    """Set how sharp the sigmoid of the scores is."""
    temperatures = [layer.linear_router.temperature for layer in layers]
    torch._foreach_zero_(temperatures)  # pyright: ignore  # few launches, not one a layer
    torch._foreach_add_(temperatures, temperature)  # pyright: ignore


def move_thresholds_(model: Any, method: Method, batches: Batches, target_sparsity: float) -> None:
    """Give ``batches`` the target's sparsity, in mode hard: by one shift of LTE's thresholds, or as the method does."""
    layers = sparse_layers(model).values()
    if not all(layer.router.is_linear for layer in layers):
        method.calibrate(model, list(batches))
        _share_routers(layers)
        return
    before = [layer.linear_router.bias.clone() for layer in layers]
    shift = calibrate_(model, batches, target_sparsity)
    mean = cast(Tensor, reduce(torch.tensor(shift, device=PartialState().device), reduction="mean"))
    for layer, bias in zip(layers, before, strict=True):
        layer.linear_router.bias.data.copy_(bias - mean / layer.linear_router.temperature)


def _share_routers(layers: Iterable[Selecting]) -> None:
    """All ranks take those of the first."""
    for layer in layers:
        broadcast(layer.router.state_dict())
        if layer.compensation is not None:
            broadcast(layer.compensation.state_dict())
