"""Which modules of a sparse model get adapters, and which train in full beside them."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from lte.modules.input_threshold import cut_layers
from lte.modules.recording import sparse_layers
from lte.surgery.linears import check_plain
from lte.surgery.sites import LinearSite, linear_sites


def linears_to_adapt(model: PreTrainedModel, targets: Sequence[str]) -> list[LinearSite]:
    """Return the linear layers of the blocks with these names, or all of them.

    Raises:
        ValueError: no layer has such a name, or a layer is not plain or has thresholds on its inputs.
    """
    sites = linear_sites(model, model.config.model_type)
    short = {site.name.rpartition(".")[2]: None for site in sites}
    if unknown := [one for one in targets if one not in short and all(one != site.name for site in sites)]:
        raise ValueError(f"lora_targets has {unknown[0]}, but the linear layers of the blocks are {', '.join(short)}")
    chosen = [site for site in sites if not targets or site.name in targets or site.name.rpartition(".")[2] in targets]
    for site in chosen:
        check_plain(site.name, site.linear)
    if cut := [site.name for site in chosen if site.linear in cut_layers(model).values()]:
        raise ValueError(
            f"{cut[0]} has a threshold on its inputs (attention_sparsity), which an adapter would not see: give "
            "lora_targets without attention's projections, or attention_sparsity=0"
        )
    return chosen


def modules_to_train_in_full(model: PreTrainedModel) -> list[str]:
    """Return the names of norms, and of the head of a model that has no vocabulary of outputs."""
    ours = {id(one) for layer in sparse_layers(model).values() for one in (layer.router, layer.compensation)}
    found = []
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False)]
        if own and not [*module.children()] and id(module) not in ours and all(one.ndim == 1 for one in own):
            found.append(name)
    if model.get_output_embeddings() is None and model.base_model is not model:
        heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
        found = [name for name in found if name.partition(".")[0] not in heads]
        found += [name for name in heads if [*model.get_submodule(name).parameters()]]
    return found
