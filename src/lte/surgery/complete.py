"""Checks that a model got all its weights, by the loading report of transformers, and that weights are finite."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lte.surgery.heads import all_weight_names, own_class, weight_names

_WRAPPERS = {
    "_orig_mod.": "torch.compile puts it there: save model._orig_mod instead",
    "module.": "DataParallel puts it there: save model.module instead",
}


def check_complete(name: Any, model: PreTrainedModel, report: dict[str, Any], resized: bool = False) -> None:
    """Raise ValueError unless all weights of the model are from the checkpoint, and the checkpoint has no others.

    A head that the checkpoint lacks may be new, and heads of other tasks may be left out. The report does not have
    weights that transformers ignores: tied weights, and keys that a model class names.

    Args:
        name: the checkpoint's name in messages.
        report: of ``from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)``.
        resized: whether a head may be new because of another number of labels.

    Raises:
        ValueError: weights are missing, left over, or have another shape.
    """
    missing, left, shapes = set(report["missing_keys"]), set(report["unexpected_keys"]), report["mismatched_keys"]
    prefix = f"{model.base_model_prefix}."
    own = own_class(model.config)
    if wrapper := next((one for one in _WRAPPERS if left and all(key.startswith(one) for key in left)), None):
        raise ValueError(
            f"{name}: the names of its weights begin with {wrapper}, e.g. {min(left)}; {_WRAPPERS[wrapper]}"
        )
    inside = {child for child, _ in model.base_model.named_children()} | {model.base_model_prefix}
    if own is None:
        missing = {key for key in missing if key.partition(".")[0] in inside}
    elif missing and own is not type(model):
        has = weight_names(model.config, own)
        made = [
            re.compile(one) for one in getattr(own, "_keys_to_ignore_on_load_missing", None) or ()
        ]  # e.g. positions
        bare = {key.removeprefix(prefix) for key in missing} & has
        missing = {key for key in bare if not any(one.search(f"{prefix}{key}") for one in made)}
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} weights are missing, first {min(missing)}; "
            "the checkpoint is incomplete, save or copy it again"
        )
    if left:
        known = all_weight_names(model.config)
        left = {
            key
            for key in left
            if key.removeprefix(prefix) not in known and (own is type(model) or key.partition(".")[0] in inside)
        }
    if left:
        raise ValueError(
            f"{name}: {len(left)} weights have no place in the model that config.json describes, first {min(left)}; "
            "the two do not belong together"
        )
    labels = getattr(model.config, "num_labels", None)
    wrong = sorted(
        (key, tuple(found), tuple(needed))
        for key, found, needed in shapes
        if not resized or key.startswith(prefix) or needed[0] != labels or found[1:] != needed[1:]
    )
    if wrong:
        key, found, needed = wrong[0]
        raise ValueError(
            f"{name}: {len(wrong)} weights have the wrong shape, first {key} with {found} where the config asks for "
            f"{needed}; they do not belong together"
        )


def check_numbers(name: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError, with the first name, unless all weights in memory are finite. It waits once for a GPU."""
    local = ((key, tensor.to_local() if isinstance(tensor, DTensor) else tensor) for key, tensor in tensors)
    present = ((key, tensor) for key, tensor in local if tensor.numel() and not tensor.is_meta)
    floats = {key: tensor for key, tensor in present if tensor.is_floating_point()}
    if not floats:
        return
    extremes = [torch.stack(tensor.detach().aminmax()).double() for tensor in floats.values()]  # NaN stays NaN here
    device = extremes[0].device
    sound = torch.stack([one.to(device) for one in extremes]).isfinite().all(-1).tolist()
    wrong = [key for key, fine in zip(floats, sound, strict=True) if not fine]
    if wrong:
        raise ValueError(f"{name}: {len(wrong)} weights are NaN or infinite, first {wrong[0]}: the model is damaged")


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give parameters and all buffers. An option of the config can make a buffer NaN."""
    yield from model.named_parameters()
    yield from model.named_buffers()
