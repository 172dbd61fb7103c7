"""Set the routers of a whole model to a sparsity on the real inputs of its FFNs, and measure that sparsity."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lte.bench.synthetic import OPEN, biases, layer_targets, random_router_, shift_to
from lte.core.linear import linear_fp32
from lte.inference.packed import logit
from lte.modules.recording import record_scores, sparse_layers
from lte.modules.sparse_ffn import Selecting

_ROUNDS = 3  # the inputs of a layer depend on the layers before it


@torch.no_grad()
def random_routers_(model: nn.Module, seed: int = 0) -> None:
    """Draw new weights for every router. :func:`route_` then sets the biases."""
    layers = sparse_layers(model)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for layer in layers.values():
        random_router_(layer.lte_router.weight, generator)


@torch.no_grad()
def route_(model: nn.Module, tokens_BS: Tensor, sparsity: float, seed: int = 0) -> None:
    """Set router biases, in place, so that these tokens have that sparsity. Layers and experts differ."""
    layers = list(sparse_layers(model).values())
    targets = layer_targets(len(layers), sparsity, seed)
    for layer in layers:
        layer.lte_router.bias.fill_(OPEN)
    for layer, logits_BSE, target, index in _with_logits(model, tokens_BS, targets):
        layer.lte_router.bias.copy_(biases(logits_BSE.flatten(0, -2), target, logit(layer.tau), seed + index))
    if sparsity not in (0, 1):
        for _ in range(_ROUNDS):
            adjust_(model, tokens_BS, targets)


@torch.no_grad()
def adjust_(model: nn.Module, tokens_BS: Tensor, targets: list[float], first: int = 0) -> None:
    """Shift the biases of each layer, in place, to its target on these tokens from position ``first`` on."""
    for layer, logits_BSE, target, _ in _with_logits(model, tokens_BS, targets):
        wanted = logits_BSE[:, first:] + layer.lte_router.bias.float()
        layer.lte_router.bias.add_(shift_to([wanted], target, logit(layer.tau)))


@torch.no_grad()
def measured_routing(model: nn.Module, tokens_BS: Tensor, first: int) -> tuple[list[float], list[float]]:
    """Return sparsity and union sparsity, each by layer, of the positions from ``first`` on.

    The union is taken over the rows of the batch. Its sparsity is the share of experts that no row wants in a step.
    """
    sparsity, union = [], []
    layers = list(sparse_layers(model).values())
    for layer, logits_BSE, _, _ in _with_logits(model, tokens_BS, [0.0] * len(layers)):
        active_BSE = logits_BSE[:, first:] + layer.lte_router.bias.float() > logit(layer.tau)
        sparsity.append(1 - float(active_BSE.float().mean()))
        union.append(1 - float(active_BSE.any(0).float().mean()))
    return sparsity, union


@contextmanager
def router_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Return a context in which a forward pass stores the input of every router, by the name of its layer."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks, record_scores(model):  # recording makes an optimised layer call its router
        for name, layer in sparse_layers(model).items():

            def keep(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = args[0]

            hooks.callback(layer.router.register_forward_pre_hook(keep).remove)
        yield seen


def _with_logits(
    model: nn.Module, tokens_BS: Tensor, targets: list[float]
) -> Iterator[tuple[Selecting, Tensor, float, int]]:
    """Yield each layer with its logits on these tokens (without bias), its target and its number."""
    with router_inputs(model) as seen:
        model(input_ids=tokens_BS, use_cache=False, logits_to_keep=1)
    layers = sparse_layers(model)
    for index, (name, x_BSD) in enumerate(seen.items()):
        layer = layers[name]
        yield layer, linear_fp32(x_BSD, layer.lte_router.weight), targets[index], index
