"""Sparsity and cost of forward passes, of any kind of model: dense, with routers, with thresholds on inputs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lte.core.accounting import Cost
from lte.methods.teal import teal_cost
from lte.methods.weight_pruning import weight_sparsity
from lte.modules.input_threshold import CUT, InputMeter, track_inputs
from lte.modules.recording import SparsityMeter, track_sparsity
from lte.modules.sparse_ffn import Selecting
from lte.surgery.complete import check_numbers
from lte.surgery.cost import cost_per_token
from lte.surgery.sites import find_sites, linear_sites
from lte.surgery.teal import SECTION as TEAL

Meter = SparsityMeter | InputMeter


@dataclass(kw_only=True)
class Spent:
    """What a token took, mean over the tokens that were seen.

    Attributes:
        sparsity: fraction of inactive neurons, mean over tokens and layers; 0 for a dense model. Of a TEAL model the
            fraction of FFN weights that its zeros leave unread.
        layer_sparsity: the same, layer by layer.
        attention_sparsity: fraction of the attention projections' weights left unread; 0 but for TEAL.
        weight_sparsity: fraction of the weights in the blocks' linear layers that are 0, of a model without routers or
            thresholds: :func:`lte.prune_` makes such. Their FLOPs are not counted.
        gflops_per_token, gflops_per_token_dense: FFN, attention projections and routers, G = 2^30. In LTE's mode soft
            every expert is computed, whatever its score.
        mode: dense, soft or hard.
    """

    sparsity: float
    layer_sparsity: list[float]
    gflops_per_token: float
    gflops_per_token_dense: float
    attention_sparsity: float = 0.0
    weight_sparsity: float = 0.0
    mode: str = "dense"


def is_sparse(model: nn.Module) -> bool:
    """Whether there is sparsity to measure: routers or thresholds, in whatever mode."""
    config = getattr(model, "config", None)
    return hasattr(config, "lte") or hasattr(config, TEAL)


def check_finite(model: PreTrainedModel, logits: Tensor) -> None:
    """Refuse outputs of ``model`` of which the best would be one like another.

    Raises:
        ValueError: one is NaN or infinite.
    """
    if not logits.isfinite().all():
        raise ValueError(
            f"outputs of the model {model.name_or_path} are NaN or infinite: is it damaged, or does its dtype not hold "
            "them?"
        )


@contextmanager
def measure(model: PreTrainedModel, entry: nn.Module | None = None) -> Iterator[Meter]:
    """Look at all forward passes of ``model`` made within; :func:`spent` says what they took.

    Padding (by the attention mask given to the model) is not counted.

    Args:
        entry: the part of ``model`` that is called, e.g. its backbone; None for the model.

    Raises:
        ValueError: a weight of a router, or a threshold, is NaN or infinite: it would count as idle.
    """
    entry = model if entry is None else entry
    check_numbers("the model", _choosing(entry))
    passes: AbstractContextManager[Meter] = nullcontext(SparsityMeter())
    if hasattr(model.config, TEAL):
        sites = linear_sites(model, model.config.model_type)
        passes = track_inputs(entry, {site.name: site.linear for site in sites})
    elif is_sparse(model):
        passes = track_sparsity(entry)
    with passes as meter:
        yield meter


def _choosing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that decide what is idle: of routers and compensations, and thresholds on inputs."""
    for name, module in model.named_modules():
        if isinstance(module, Selecting):
            parts = {"router": module.router, "compensation": module.compensation}
            for part, one in parts.items():
                yield from ((f"{name}.{part}.{key}", value) for key, value in (one or nn.Module()).state_dict().items())
        elif isinstance(cut := getattr(module, CUT, None), Tensor) and isinstance(module, nn.Linear | Conv1D):
            yield f"{name}.{CUT}", cut


def spent(model: PreTrainedModel, meter: Meter) -> Spent:
    """What the passes took that ``meter`` saw."""
    dense = cost_per_token(model)
    if isinstance(meter, InputMeter):
        return _spent_by_inputs(model, meter.by_linear, dense)
    if is_sparse(model):
        computes_all = model.config.lte["mode"] == "soft" and model.config.lte["method"] == "lte"
        cost = cost_per_token(model, 0.0, router=True) if computes_all else cost_per_token(model, meter.by_layer)
        return Spent(
            sparsity=meter.overall,
            layer_sparsity=meter.by_layer,
            gflops_per_token=cost.gflops,
            gflops_per_token_dense=dense.gflops,
            mode=model.config.lte["mode"],
        )
    zeros = weight_sparsity(model)
    return Spent(
        sparsity=0.0,
        layer_sparsity=meter.by_layer,
        weight_sparsity=zeros,
        gflops_per_token=(1 - zeros) * dense.gflops,
        gflops_per_token_dense=dense.gflops,
    )


def _spent_by_inputs(model: PreTrainedModel, by_linear: dict[str, float], dense: Cost) -> Spent:
    cost = teal_cost(model, by_linear)
    layers = []
    for site in find_sites(model, model.config.model_type):
        weights = {name: linear.get_parameter("weight").numel() for name, linear in site.projections().items()}
        layers.append(sum(by_linear[name] * count for name, count in weights.items()) / site.num_weights)
    return Spent(
        sparsity=1 - cost.ffn_gflops / dense.ffn_gflops,
        layer_sparsity=layers,
        attention_sparsity=1 - cost.attention_gflops / dense.attention_gflops,
        gflops_per_token=cost.gflops,
        gflops_per_token_dense=dense.gflops,
        mode="hard",
    )
