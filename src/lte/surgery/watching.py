"""Seeing what goes through every FFN of a model while data runs through it."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lte.modules.recording import TokenMasks
from lte.surgery.sites import Site


@torch.no_grad()
def watch_ffns(
    model: nn.Module,
    sites: list[Site],
    batches: Iterable[dict[str, Tensor]],
    see: Callable[[int, Tensor, Tensor], None],
    max_tokens: int,
) -> None:
    """Run batches through the model in eval mode, until an FFN has seen ``max_tokens`` tokens that are no padding.

    Args:
        sites: FFNs of ``model``; one that is sparse already has to be in mode dense.
        see: called for every pass of an FFN with its index, its input ``[T, D]`` and its neurons after the
            activation ``[T, F]``, real tokens only.

    Raises:
        ValueError: no batch.
    """
    masks = TokenMasks(model)
    inputs: dict[int, Tensor] = {}
    seen = [0] * len(sites)
    device = next(model.parameters()).device
    was_training, empty = model.training, True
    model.eval()
    with ExitStack() as hooks:
        hooks.callback(model.train, was_training)
        hooks.callback(model.register_forward_pre_hook(masks.see, with_kwargs=True).remove)
        for index, site in enumerate(sites):

            def begin(_module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
                inputs[index] = args[0]

            def end(_module: nn.Module, args: tuple[Tensor, ...], index: int = index, name: str = site.name) -> None:
                mask = masks.of(name, args[0].shape[:-1])
                x_TD, hidden_TF = (_real(tensor, mask) for tensor in (inputs.pop(index), args[0]))
                seen[index] += len(x_TD)
                see(index, x_TD, hidden_TF)

            hooks.callback(site.first.register_forward_pre_hook(begin).remove)
            hooks.callback(site.down.register_forward_pre_hook(end).remove)
        for batch in batches:
            empty = False
            model(**{name: value.to(device) for name, value in batch.items()})
            if max(seen) >= max_tokens:
                break
    if empty:
        raise ValueError("there is no batch to see FFNs work on: data is empty")


def _real(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor.flatten(0, -2) if mask is None else tensor[mask.to(tensor.device).bool()]
