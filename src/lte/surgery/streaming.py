"""Converts a checkpoint that is larger than memory: one block at a time is in memory, and becomes one weight file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lte.saving import saving
from lte.surgery.complete import check_numbers
from lte.surgery.conversion import Conversion, Progress
from lte.surgery.experts import group
from lte.surgery.loading import load_on_meta
from lte.surgery.method import Method
from lte.surgery.shards import UNFINISHED, Shards
from lte.surgery.sites import FFNSite, block_of, find_sites
from lte.surgery.tensor_files import StoredTensor

_INSTEAD = "load and save the model once with transformers, or convert it without streaming"


@contextmanager
def streaming(
    name: str,
    conversion: Conversion,
    folder: str | Path,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = iter,
) -> Iterator[tuple[Path, PreTrainedModel]]:
    """Convert the model ``name`` and save it to ``folder``, with one block of it in memory.

    The weights are those of :func:`~lte.surgery.convert.sparsify_`, bit for bit on a CPU. If the process is
    interrupted, the same call goes on where it ended.

    Args:
        name: a folder with safetensors files.
        conversion: a method that reads no data.
        folder: of the new model.
        device: of the block that is in memory.
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.
        progress: wraps the iteration over weight files.

    Yields:
        A folder for further files of the model, and the converted model on the meta device. Afterwards all files are
        moved into ``folder``, as :func:`~lte.saving.saving` does.

    Raises:
        ValueError: the conversion has no routers or reads data. The model cannot be loaded or converted. Another
            process writes to the folder, or the folder has unfinished work of another command.
        NotWritten: the disk is full, or the like. Complete weight files stay.
    """
    method = _without_data(conversion)
    model, stored = load_on_meta(name, dtype, trust_remote_code)
    if any(isinstance(one, WeightConverter) for one in getattr(model, "_weight_conversions", None) or ()):
        raise ValueError(f"{name}: transformers changes its weights on loading: {_INSTEAD}")
    method.check(model)
    _tie_equal_(model, stored)
    dense = model.state_dict().keys()
    sites = find_sites(model, model.config.model_type)
    method.put_in_(model)
    parts = _parts(model, sites)
    sources = {key: _source(model, key, stored) for part in parts for key in part.tensors}
    if lacking := sorted(key for key, source in sources.items() if source is None and key in dense):
        raise ValueError(f"{name}: its files have no {lacking[0]}: {_INSTEAD}")
    shards = Shards(Path(folder), _run(method, stored, device, model.dtype), len(parts))
    generator = torch.Generator().manual_seed(method.seed)
    with saving(folder, UNFINISHED) as fresh:
        for number, part in progress(list(enumerate(parts))):
            if shards.has(number):
                for site in part.sites.values():
                    site.installed.reset(generator)  # for the random numbers of the routers after these
                continue
            tensors = {key: _read(sources[key], meta, device) for key, meta in part.tensors.items()}
            check_numbers(name, tensors.items())
            model.load_state_dict(tensors, strict=False, assign=True)  # the model and `tensors` share their memory
            for index, site in part.sites.items():
                (order_F,) = group(model, [site], method.of_site(index), [])
                site.permute_neurons(order_F)
                site.installed.reset(generator)
            shards.write(number, _as_saved(model, tensors))
            model.load_state_dict(part.tensors, strict=False, assign=True)
            del tensors
        numbers = {key: number for number, part in enumerate(parts) for key in _as_saved(model, part.tensors)}
        size = sum(part.size for part in parts)
        shards.write_index(numbers, {"total_parameters": model.num_parameters(), "total_size": size})
        _save_config(model, fresh)
        yield fresh, model
    shards.remove_journal()


@dataclass(frozen=True)
class _Part:
    """The content of a weight file: the tensors on the meta device, by name, and the FFNs, by number."""

    tensors: dict[str, Tensor]
    sites: dict[int, FFNSite] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _parts(model: PreTrainedModel, sites: list[FFNSite]) -> list[_Part]:
    """Return each block with FFNs, then all other tensors in parts that are not larger, except for single tensors."""
    saved = {name: tensor for name, tensor in model.state_dict().items() if name not in _left_out(model)}
    left = remove_tied_weights_from_state_dict(saved, model)
    blocks: dict[str, dict[int, FFNSite]] = {}
    for number, site in enumerate(sites):
        blocks.setdefault(block_of(site.name), {})[number] = site
    parts = []
    for block, inside in blocks.items():
        names = [name for name in left if name.startswith(f"{block}.")]
        parts.append(_Part({name: left.pop(name) for name in names}, inside))
    most, others = max(part.size for part in parts), []
    for name, tensor in left.items():
        if not others or others[-1].size + tensor.nbytes > most:
            others.append(_Part({}))
        others[-1].tensors[name] = tensor
    return parts + others


def _left_out(model: PreTrainedModel) -> set[str]:
    return {*(model._keys_to_ignore_on_save or ())}


def _without_data(conversion: Conversion) -> Method:
    if not isinstance(conversion, Method):
        raise ValueError(f"streaming converts to a method with routers, not by {conversion.name}: leave --stream out")
    if conversion.data_tokens:
        raise ValueError(
            f"streaming has no whole model that could read data, and {conversion.name} with these options needs data: "
            "leave --stream out, or take lte or a mixture with --grouping kmeans"
        )
    return conversion


def _source(model: PreTrainedModel, name: str, stored: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """Return the tensor of a checkpoint for a name of the model; None if there is none.

    transformers loads some checkpoints under other names, and adds or removes the prefix of the base model.
    """
    prefix = f"{model.base_model_prefix}."
    names = (*_as_saved(model, {name: torch.empty(0, device="meta")}), name, name.removeprefix(prefix), prefix + name)
    return next((stored[one] for one in names if one in stored), None)


def _as_saved(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the model by the names that ``save_pretrained`` gives them."""
    return revert_weight_conversion(model, dict(tensors))


def _read(source: StoredTensor | None, meta: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the checkpoint as the model has it; zeros for a new one."""
    return torch.zeros_like(meta, device=device) if source is None else source.read().to(device, meta.dtype)


def _tie_equal_(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Tie weights that the config ties and that are twice in the files, if they are equal, as transformers does."""
    pairs = [
        (_source(model, one, stored), _source(model, other, stored))
        for one, other in model.all_tied_weights_keys.items()
    ]
    if pairs and all(one and other and torch.equal(one.read(), other.read()) for one, other in pairs):
        model.tie_weights()


def _run(
    method: Method, stored: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what the result depends on."""
    paths = sorted({one.path.resolve() for one in stored.values()})
    return {
        "method": {"method": method.name, **method.to_dict()},
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "device": device.type,
        "dtype": str(dtype),
        "versions": [version("lte"), torch.__version__],
    }


def _save_config(model: PreTrainedModel, folder: Path) -> None:
    """Save the config and the generation settings, with the values that ``save_pretrained`` adds."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")  # pyright: ignore[reportAttributeAccessIssue]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)  # pyright: ignore[reportOptionalMemberAccess]
