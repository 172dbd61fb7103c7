"""TEAL's greedy search: it finds the sparsity of each linear layer of a block by the error of the block's output."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.modules.input_threshold import CUT
from lte.surgery.conversion import Progress
from lte.surgery.sites import block_of

Call = tuple[tuple, dict[str, Any]]
"""The arguments of a call of a block."""
MOST_GREEDY = 0.95
"""The highest sparsity of a layer."""

_TOKENS = 512  # tokens of each row on which outputs are compared
_SHARE = 0.05  # share of a block's weights that a step leaves unread
_LONGEST_STEP = 0.25  # share of a layer's inputs: otherwise one step could remove a whole small layer


@torch.no_grad()
def greedy_sparsities(
    model: PreTrainedModel,
    linears: Mapping[str, nn.Module],
    sizes: Mapping[str, Tensor],
    batch: dict[str, Tensor],
    target: float,
    progress: Progress = iter,
) -> dict[str, float]:
    """Return a sparsity for each of ``linears``, by name, so that ``target`` of each block's weights are left unread.

    The search starts dense. Each step makes that layer sparser whose step adds the least error per weight. Cuts must be
    0, and they are 0 afterwards.

    Args:
        sizes: a sample of the sizes of each layer's inputs in the dense model, in any order.
        batch: the batch on which the block's outputs are compared.
        progress: wraps the iteration over blocks.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks: dict[str, list[str]] = {}
    for name in linears:
        blocks.setdefault(block_of(name), []).append(name)
    ranked = {name: one.float().sort().values for name, one in sizes.items()}
    batch = {name: value[:, :_TOKENS] for name, value in batch.items() if value.ndim > 1}
    calls = _calls(model, [model.get_submodule(name) for name in blocks], batch)
    mask = batch.get("attention_mask")
    chosen: dict[str, float] = {}
    real_BT = None if mask is None else mask.to(model.device).bool()
    for block, call in progress(calls.items()):
        inside = {name: linears[name] for name in blocks[names[block]]}
        chosen |= _allocate(partial(_output, block, call, real_BT), inside, ranked, target)
    return chosen


def _allocate(
    run: Callable[[], Tensor], linears: Mapping[str, nn.Module], ranked: Mapping[str, Tensor], target: float
) -> dict[str, float]:
    """Return the sparsities of one block. ``run()`` gives its output with the current cuts."""
    weights = {name: linear.get_parameter("weight").numel() for name, linear in linears.items()}
    total = sum(weights.values())
    found, expected, error = dict.fromkeys(linears, 0.0), run(), 0.0
    while (left := target * total - sum(found[name] * weights[name] for name in found)) > 1e-6 * total:
        tried: dict[str, tuple[float, float, float]] = {}  # added error per weight, sparsity, error
        for name, linear in linears.items():
            step = min(_SHARE * total / weights[name], _LONGEST_STEP, left / weights[name], MOST_GREEDY - found[name])
            if step > 1e-6:
                _set(linear, ranked[name], found[name] + step)
                after = (run() - expected).square().sum().item()
                tried[name] = (after - error) / (step * weights[name]), found[name] + step, after
                _set(linear, ranked[name], found[name])
        if not tried:
            break
        best = min(tried, key=lambda name: tried[name][0])
        _, found[best], error = tried[best]
        _set(linears[best], ranked[best], found[best])
    for linear in linears.values():
        linear.get_buffer(CUT).zero_()
    return found


def _set(linear: nn.Module, sizes: Tensor, sparsity: float) -> None:
    rank = round(sparsity * len(sizes))
    linear.get_buffer(CUT).fill_(sizes[min(rank, len(sizes)) - 1].item() if rank else 0.0)


def _calls(model: PreTrainedModel, blocks: list[nn.Module], batch: dict[str, Tensor]) -> dict[nn.Module, Call]:
    """Return the arguments of each block for a batch, without a cache, which another call would fill."""
    calls: dict[nn.Module, Call] = {}

    def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[block] = args, kwargs

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    config: Any = model.config
    cached = getattr(config, "use_cache", None)
    try:
        config.use_cache = False
        model(**{name: value.to(model.device) for name, value in batch.items()})
    finally:
        config.use_cache = cached
        for hook in hooks:
            hook.remove()
    return calls


def _output(block: nn.Module, call: Call, real_BT: Tensor | None) -> Tensor:
    args, kwargs = call
    output = block(*args, **kwargs)
    output = (output[0] if isinstance(output, tuple) else output).float()
    return output if real_BT is None else output[real_BT]
