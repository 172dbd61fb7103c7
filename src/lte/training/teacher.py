"""The dense model that a run distils from: as the dense stage left it, and kept on disk for resuming."""

import shutil
from pathlib import Path
from types import MethodType
from typing import Any

from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn

from lte.surgery.convert import set_mode_


def save_teacher(model: Any, folder: Path) -> None:
    """Keep the model; a run cut short meanwhile leaves the folder as it was, or none."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_teacher(folder: Path, like: Any) -> nn.Module:
    """The teacher that a run left, of the class, dtype and device of ``like``.

    Raises:
        ValueError: it left none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: resuming needs the dense model that this run distils from")
    teacher = type(like).from_pretrained(folder, dtype=like.dtype)
    set_mode_(teacher, "dense")
    return teacher.to(like.device)


def keep_dtypes(model: nn.Module) -> None:
    """Undo what accelerate adds to mixed precision, a copy in fp32 of all outputs: logits are large."""
    for module in model.modules():
        convert = getattr(vars(module).get("forward"), "__wrapped__", None)
        if isinstance(convert, ConvertOutputsToFp32):
            module.forward = MethodType(convert.model_forward, module)
