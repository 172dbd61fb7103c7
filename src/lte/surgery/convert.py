"""Converts a model in place, and back, and switches how it uses its experts."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from lte.modules.input_threshold import CUT, cut_layers, switch_cuts_
from lte.modules.offloading import check_in_memory
from lte.modules.quantised_linear import is_quantised
from lte.modules.recording import sparse_layers
from lte.modules.sparse_ffn import Mode
from lte.modules.tensor_parallel import check_not_shared
from lte.surgery.activations import first_tokens
from lte.surgery.architectures import dense_class, dense_config, lte_model_class
from lte.surgery.conversion import Batch, Conversion, Progress, is_sparse, section_of

if TYPE_CHECKING:
    from lte.surgery.method import Method


def sparsify_(
    model: PreTrainedModel,
    config: Conversion,
    data: Iterable[Batch] | None = None,
    progress: Progress = iter,
) -> PreTrainedModel:
    """Make ``model`` sparse, in place. The type of ``config`` says by which conversion.

    - A method that is trained (``LTEConfig``, a mixture): the model's function does not change, and its mode is dense.
      Neurons are reordered so that each expert is contiguous. Every FFN gets a router, drawn from the method's seed.
    - A method that needs no training: its routers are set on ``data``, and the model is sparse at once, in mode hard.
    - ``TEALConfig``: the inputs of all linear layers of the blocks get thresholds. The model is sparse at once.
    - ``WandaConfig`` and ``MagnitudeConfig``: single weights become 0.

    The model's class becomes ``LTE...``, so that it saves under its own name. A pruned model keeps its class.
    Parameters keep Hugging Face's names. Only ``router.*`` is new, ``compensation.*`` if it is asked for, and ``*.cut``
    with TEAL.

    Args:
        model: a dense Hugging Face model of a known family (see ``lte.Family``), with any head.
        config: the conversion, e.g. ``lte.LTEConfig(expert_size=32)``.
        data: batches for the model. The conversion reads as many as it needs to group by co-activation, to set routers
            or thresholds, or to judge weights. Grouping by co-activation keeps the neurons of 4096 tokens in bf16 on
            the CPU: 0.4 GB for a model of 135M parameters, 3 GB for one of 7B.
        progress: wraps a long iteration, e.g. in a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown family, an expert size that does not divide d_ff, a model that is sparse already, wrapped
            or quantised weights, weights divided by tensor parallelism or offloaded, or missing data. Then the model
            does not change.
    """
    _check(model, config)
    config.convert_(model, _needed(data, config), progress)
    return model


def install_routers_(model: PreTrainedModel, method: "Method") -> PreTrainedModel:
    """Give every FFN a router. Neurons keep their order, and routers are random.

    This is for ``LTETrainer``, which groups and fits on the weights of its dense stage.

    Raises:
        ValueError: as :func:`sparsify_`, but no data is needed.
    """
    _check(model, method)
    method.prepare_(model)
    method.put_in_(model, grouped=False)
    return model


def _check(model: PreTrainedModel, config: Conversion) -> None:
    """Raise ValueError unless the model can be converted."""
    if is_sparse(model.config):
        raise ValueError("the model is sparse already: load the dense checkpoint to convert it")
    check_not_shared(model, "a conversion needs")
    check_in_memory(model)
    config.check(model)
    if not config.stock:
        lte_model_class(type(model))  # made now, so that an error does not change the model


def _needed(data: Iterable[Batch] | None, config: Conversion) -> list[Batch]:
    if not config.data_tokens:
        return []
    if data is None:
        raise ValueError(f"this {type(config).__name__} needs data: pass sparsify_(model, config, data=batches)")
    batches = first_tokens(data, config.data_tokens)
    if not batches:
        raise ValueError(f"this {type(config).__name__} needs data, but the data is empty")
    return batches


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Return a plain Hugging Face model with the same weights, which computes what ``model`` does in mode dense.

    So a dense baseline becomes a checkpoint that any method can convert. Neurons keep the order of :func:`sparsify_`.

    Args:
        model: a model with sparse FFNs. It does not change.

    Returns:
        A new model on the same device; the two share no weights.

    Raises:
        ValueError: the model has no sparse FFNs, its experts are quantised, or it is divided by tensor parallelism or
            offloaded.
    """
    check_not_shared(model, "densify copies")
    check_in_memory(model)
    if is_quantised(model):
        raise ValueError("the experts are quantised: densify the model that they were made from")
    ours = tuple(f"{name}.{child}." for name in sparse_layers(model) for child in ("router", "compensation"))
    cuts = {f"{name}.{CUT}" for name in cut_layers(model)}
    weights = {
        name: value for name, value in model.state_dict().items() if not name.startswith(ours) and name not in cuts
    }
    plain = dense_class(type(model)).from_pretrained(
        None, config=dense_config(model.config), state_dict=weights, dtype=model.dtype
    )
    if model.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.to(model.device).train(model.training)


def set_mode_(model: nn.Module, mode: Mode) -> None:
    """Switch every sparse FFN to ``"dense"``, ``"soft"`` or ``"hard"``. The mode is saved with the model.

    Thresholds on the inputs of attention's projections act in mode hard alone.

    Raises:
        ValueError: the mode is unknown, or the model has no sparse FFNs.
    """
    for layer in sparse_layers(model).values():
        layer.set_mode(mode)
    switch_cuts_(model, mode == "hard")
    if section := section_of(getattr(model, "config", None)):
        section["mode"] = mode
