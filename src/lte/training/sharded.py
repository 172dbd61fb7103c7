"""A frozen copy of a model that FSDP2 divides among processes. Each process copies only its own part."""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn


@torch.no_grad()
def copy_parts(model: Any, accelerator: Accelerator, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy that is divided as ``model`` is. No process ever has the whole model.

    Args:
        model: a model of transformers, prepared by ``accelerator`` with FSDP2.
        dtype: of the copy's parameters; None takes those of the model.
    """
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
    bare.requires_grad_(False)
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in bare.named_parameters():
        parameter.data = parameter.data.to(dtype or own[name].dtype)
    copied: Any = fsdp2_prepare_model(accelerator, bare)
    copied.to_empty(device=str(accelerator.device))
    copied.tie_weights()
    for name, parameter in copied.named_parameters():
        parameter.to_local().copy_(own[name].to_local())
    buffers = dict(model.named_buffers())
    for name, buffer in copied.named_buffers():
        buffer.copy_(buffers[name])
    return copied.eval()
