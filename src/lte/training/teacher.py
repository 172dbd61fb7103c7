"""The dense model that a run distils from: as the dense stage left it, and kept on disk for resuming."""

import copy
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate.utils import compile_regions
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn

from lte.surgery.convert import set_mode_
from lte.surgery.reading import reading


def make_teacher(
    model: Any, folder: Path | None, compilation: dict[str, Any] | None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A frozen copy of the model, which is put in mode dense.

    Args:
        model: as its dense stage left it, not compiled.
        folder: where the copy is kept too; a run cut short meanwhile leaves it as it was, or none. None keeps none.
        compilation: options of ``torch.compile`` for the copy's blocks; None does not compile them.
        dtype: of the copy's parameters; None: the model's.
    """
    set_mode_(model, "dense")
    if folder is not None:
        model.save_pretrained(folder)
    return _frozen(copy.deepcopy(model), compilation, dtype)


def load_teacher(
    folder: Path, like: Any, compilation: dict[str, Any] | None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The teacher that a run left, of the class and device of ``like``; otherwise as :func:`make_teacher` gives it.

    Raises:
        ValueError: it left none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: resuming needs the dense model that this run distils from")
    with reading(str(folder)):
        teacher = type(like).from_pretrained(folder, dtype=like.dtype)
    set_mode_(teacher, "dense")
    return _frozen(teacher.to(like.device), compilation, dtype)


def keep_dtypes(model: nn.Module) -> None:
    """Undo what accelerate adds to mixed precision, a copy in fp32 of all outputs: logits are large."""
    for module in model.modules():
        convert = getattr(vars(module).get("forward"), "__wrapped__", None)
        if isinstance(convert, ConvertOutputsToFp32):
            module.forward = MethodType(convert.model_forward, module)


def _frozen(teacher: nn.Module, compilation: dict[str, Any] | None, dtype: torch.dtype | None) -> nn.Module:
    teacher = teacher.eval().requires_grad_(False)
    if dtype is not None:
        # not the buffers: frequencies of rotary embeddings are fp32 in any model
        for parameter in teacher.parameters():
            parameter.data = parameter.data.to(dtype)
    keep_dtypes(teacher)
    return teacher if compilation is None else compile_regions(teacher, **compilation)
