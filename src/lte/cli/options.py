"""Options that several commands share."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from transformers import PreTrainedModel

from lte.cli.console import err
from lte.evaluation.inputs import Inputs
from lte.inference.optimize import optimize_
from lte.ops.quantise import Quantised
from lte.ops.sparse_ffn import BackendName
from lte.surgery.loading import Head, load_model

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class DeviceOptions:
    """The device and the precision."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto keeps the checkpoint's."""
    trust_remote_code: bool = False
    """Run code that comes with the model, if there is any. Read the code first."""

    def resolve(self) -> tuple[torch.device, torch.dtype | str]:
        if self.device != "auto":
            try:
                device = torch.device(self.device)
                torch.empty(0, device=device)
                if device.type == "cuda" and device.index is not None:
                    torch.cuda.set_device(device)  # streams, graphs, events and Triton use the current device
            except (RuntimeError, AssertionError) as error:
                raise ValueError(f"device {self.device!r} cannot be used here: {str(error).splitlines()[0]}") from None
        else:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return device, self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)


def as_written(inputs: Inputs) -> Inputs:
    """With the line ends that templates mean: a shell hands over ``"{mr}\\n"`` as a backslash and an n."""
    data = inputs.data
    templates = {name: _unescaped(text) for name in ("prompt", "completion") if "{" in (text := getattr(data, name))}
    data = replace(data, completion_end=_unescaped(data.completion_end or "") or None, **templates)
    return replace(inputs, data=data)


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def open_model(
    name: str, head: Head, device: torch.device, dtype: torch.dtype | str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model on its device. The terminal shows that it loads."""
    with err.status("loading the model"):
        model = load_model(name, head, dtype, new_head=False, trust_remote_code=trust_remote_code)
        return model.to(device)  # pyright: ignore[reportArgumentType]


def check_folder(output: str | Path, model: str | None = None, instead: str = "give another one") -> None:
    """Raise ValueError if ``output`` is a file or the model's own folder. transformers would only log it.

    Args:
        output: the folder for the new model.
        model: the model that the new one is made from.
        instead: the cure in the message if both are the same folder.
    """
    if Path(output).is_file():
        raise ValueError(f"output {output} is a file: give a folder")
    if model is not None and Path(output).resolve() == Path(model).resolve():
        raise ValueError(f"{output} is the model's own folder: {instead}")


def optimize_where_possible_(model: PreTrainedModel, backend: BackendName, weights: Quantised | None = None) -> None:
    """Make the model skip idle experts.

    With ``auto``, a model that cannot do this runs unchanged with a warning. With ``weights`` that is an error.
    """
    try:
        optimize_(model, backend, weights)
    except ValueError as error:
        if backend != "auto" or weights is not None:
            raise
        err.print(f"idle experts are computed too: {error}", markup=False, soft_wrap=True)


Output = Annotated[str, tyro.conf.arg(aliases=("-o",))]
Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
