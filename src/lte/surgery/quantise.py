"""``quantise_`` stores the experts of a trained sparse model as int8 or int4."""

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from lte.modules.offloading import check_in_memory
from lte.modules.quantised_linear import QuantisedLinear
from lte.modules.recording import check_hard, sparse_layers
from lte.modules.tensor_parallel import check_not_shared
from lte.ops.error_feedback import int4_with_feedback
from lte.ops.quantise import QUANTISED, Quantised, quantise
from lte.ops.weights import INT4_GROUP
from lte.surgery.activations import watch_ffns
from lte.surgery.conversion import Batch, Progress, section_of
from lte.surgery.linears import rows_of
from lte.surgery.sites import FFNSite, find_sites

logger = logging.getLogger(__name__)

CALIBRATION_TOKENS = 16384
"""The number of tokens of data that :func:`quantise_` reads."""


def quantise_(
    model: PreTrainedModel, weights: Quantised, data: Iterable[Batch] | None = None, progress: Progress = iter
) -> PreTrainedModel:
    """Store the experts of ``model`` as integers, in place. Then it cannot be trained.

    Gate, up and down projections become :class:`~lte.modules.quantised_linear.QuantisedLinear`. Routers, compensations
    and all weights outside of the FFNs stay floats. The model is put in eval mode. It saves and loads in this form, and
    its folder is smaller. :func:`lte.optimize_` makes it fast.

    Args:
        model: sparse and in mode hard, as it is after training.
        weights: ``int8`` has a scale for each output. ``int4`` has a scale for 32 neurons in each column.
        data: for ``int4``, batches like the text that the model will see. Rounding then keeps the outputs of the sparse
            model on the first 16,384 tokens (GPTQ). This keeps a matrix ``[F, F]`` in fp32 for each layer.
        progress: wraps the iteration over FFNs, e.g. in a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: the model is dense, in another mode or quantised already. A projection is wrapped or has NaN. The
            number of neurons is no multiple of 32, or the width is odd, for int4. Data is given for int8, or it is
            empty. The model does not change then.
    """
    sites = checked_sites(model, weights)
    if data is not None and weights != "int4":
        raise ValueError("int8 rounds each weight to the nearest and needs no data: leave data out")
    if data is None and weights == "int4":
        logger.warning("int4 without data is rounded to the nearest number, at a high loss: give text to lte quantise")
    grams = [{}] * len(sites) if data is None else _grams(model, sites, data)
    for site, gram in progress(list(zip(sites, grams, strict=True))):
        quantise_site_(site, weights, gram)
    section_of(model.config)["weights"] = weights
    return model.eval()


def checked_sites(model: PreTrainedModel, weights: Quantised) -> list[FFNSite]:
    """Return the FFNs of a model that :func:`quantise_` can quantise.

    Raises:
        ValueError: it cannot quantise them.
    """
    check_form(weights)
    check_not_shared(model, "quantise_ reads")
    check_in_memory(model)
    check_hard(sparse_layers(model).values(), "and experts are quantised for good")
    if stored := weights_of(model):
        raise ValueError(f"the experts are {stored} already: load the model that they were made from")
    sites = find_sites(model, model.config.model_type)
    for site in sites:
        site.check_projections()
        if weights == "int4" and (site.d_ff % INT4_GROUP or site.d_model % 2):
            raise ValueError(
                f"{site.name} has {site.d_ff} neurons of width {site.d_model}, but int4 takes a multiple of "
                f"{INT4_GROUP} neurons and an even width: take int8"
            )
        for name, linear in site.projections().items():
            if not bool(linear.weight.isfinite().all()):  # pyright: ignore
                raise ValueError(f"{name} has NaN or infinite weights: the model is damaged, load it again")
    return sites


def _grams(model: PreTrainedModel, sites: list[FFNSite], data: Iterable[Batch]) -> list[dict[bool, Tensor]]:
    """Return for each FFN the Gram matrices of its inputs ``[D, D]``, and of its neurons ``[F, F]`` under True."""
    grams: list[dict[bool, Tensor]] = [{} for _ in sites]

    def see(index: int, x_TD: Tensor, neurons_TF: Tensor) -> None:
        for of_down, rows in ((False, x_TD.float()), (True, neurons_TF.float())):
            grams[index][of_down] = grams[index].get(of_down, 0) + rows.T @ rows

    watch_ffns(model, sites, data, see, CALIBRATION_TOKENS)
    return grams


def quantise_site_(site: FFNSite, weights: Quantised, grams: Mapping[bool, Tensor] | None = None) -> None:
    """Quantise the projections of one FFN. On the meta device this makes room for weights that are loaded later."""
    for path in site.paths:
        linear, transposed = site.module(path), path == site.family.down
        rows = rows_of(linear).T if transposed else rows_of(linear)
        matrix = (
            int4_with_feedback(rows, grams[transposed], transposed) if grams else quantise(rows, weights, transposed)
        )
        QuantisedLinear.become_(linear, matrix, transposed)


def check_savable(model: PreTrainedModel) -> None:
    """Raise ValueError if :func:`lte.optimize_` quantised weights outside of the FFNs."""
    if any(type(parameter).__module__.startswith("torchao.") for parameter in model.parameters()):
        raise ValueError(
            "lte.optimize_ quantised attention for this device, which cannot be saved exactly: save the model after "
            "lte.quantise_ and before lte.optimize_, or by the command lte quantise"
        )


def check_form(weights: object) -> None:
    """Raise ValueError unless ``weights`` names a quantised form."""
    if weights not in QUANTISED:
        raise ValueError(f"weights is {weights!r}, but it is one of {', '.join(QUANTISED)}")


def weights_of(model: PreTrainedModel) -> Quantised | None:
    """Return the form of the model's experts; None for floats."""
    return section_of(model.config).get("weights")
