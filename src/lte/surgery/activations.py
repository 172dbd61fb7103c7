"""Records inputs of modules on data, without padding, for grouping and fitting."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lte.modules.token_masks import TokenMasks
from lte.surgery.sites import FFNSite

Wanted = tuple[str, nn.Module, Callable[[Tensor], Tensor]]
"""The name of a module's layer, the module, and a function from its input ``[T, ...]`` to the rows to keep."""


def record_inputs(
    model: PreTrainedModel, wanted: Sequence[Wanted], batches: Iterable[dict[str, Tensor]], max_tokens: int
) -> list[Tensor]:
    """Record inputs of modules on ``batches``, by :func:`watch_inputs`.

    Returns:
        For each of ``wanted`` the rows of all batches, on the CPU.

    Raises:
        ValueError: there is no batch, or only padding.
    """
    recorded: list[list[Tensor]] = [[] for _ in wanted]
    modules = [(name, module) for name, module, _ in wanted]
    watch_inputs(
        model, modules, batches, lambda index, rows: recorded[index].append(wanted[index][2](rows).cpu()), max_tokens
    )
    return [torch.cat(parts) for parts in recorded]


def check_inputs_are_tokens(config: PretrainedConfig) -> None:
    """Raise ValueError unless the inputs of every linear layer of the blocks are the tokens of a batch.

    In DeBERTa with relative attention, query and key projections also take positions.
    """
    if getattr(config, "relative_attention", False) and getattr(config, "share_att_key", False):
        raise ValueError(
            f"{config.model_type} puts embeddings of positions through its query and key projections, whose inputs "
            "are then not those of tokens: this method needs another model"
        )


@torch.no_grad()
def watch_inputs(
    model: PreTrainedModel,
    modules: Sequence[tuple[str, nn.Module]],
    batches: Iterable[dict[str, Tensor]],
    see: Callable[[int, Tensor], None],
    max_tokens: int,
) -> None:
    """Run ``model`` in mode eval over ``batches`` until each module has seen ``max_tokens`` real tokens.

    Args:
        modules: the name of a module's layer, and the module.
        see: called before each pass of a module with its index and its input without padding, ``[T, ...]``, before
            thresholds. It gets at most ``max_tokens`` tokens.

    Raises:
        ValueError: there is no batch, or only padding.
    """
    seen = [0] * len(modules)
    masks = TokenMasks(model)
    was_training = model.training
    model.eval()
    with ExitStack() as hooks:
        hooks.callback(model.train, was_training)
        hooks.callback(model.register_forward_pre_hook(masks.see, with_kwargs=True).remove)
        for index, (name, module) in enumerate(modules):

            def look(_module: nn.Module, args: tuple[Tensor, ...], index: int = index, name: str = name) -> None:
                mask = masks.of(name, args[0].shape[:-1])
                real = args[0].flatten(0, -2) if mask is None else args[0][mask.to(args[0].device).bool()]
                real = real[: max_tokens - seen[index]]
                seen[index] += len(real)
                if len(real):
                    see(index, real)

            hooks.callback(module.register_forward_pre_hook(look, prepend=True).remove)
        for batch in batches:
            model(**{name: value.to(model.device) for name, value in batch.items()})
            if min(seen, default=0) >= max_tokens:
                break
    if not all(seen):
        raise ValueError("the data is empty: give at least one batch with a token that is not padding")


def watch_ffns(
    model: PreTrainedModel,
    sites: Sequence[FFNSite],
    batches: Iterable[dict[str, Tensor]],
    see: Callable[[int, Tensor, Tensor], None],
    max_tokens: int,
) -> None:
    """:func:`watch_inputs` of FFNs: ``see`` gets an FFN's index, its input ``[T, D]`` and the neurons ``[T, F]``."""
    inputs: dict[int, Tensor] = {}

    def look(index: int, rows: Tensor) -> None:
        if index % 2:
            see(index // 2, inputs.pop(index // 2), rows)
        else:
            inputs[index // 2] = rows

    modules = [(site.name, module) for site in sites for module in (site.first, site.down)]
    watch_inputs(model, modules, batches, look, max_tokens)


def first_tokens(data: Iterable[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Return the first batches of ``data`` with ``count`` tokens, or all. Batches of padding are left out."""
    batches: list[dict[str, Tensor]] = []
    iterator = iter(data)
    while count > 0 and (batch := next(iterator, None)) is not None:
        mask = batch.get("attention_mask")
        tokens = next(iter(batch.values())).shape[:2].numel() if mask is None else int(mask.sum())
        if tokens > 0:
            batches.append(batch)
        count -= tokens
    return batches
