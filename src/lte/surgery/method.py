"""`Method`: a conversion that groups the neurons of FFNs into experts and gives the FFNs routers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lte.core.accounting import Cost
from lte.core.grouping import check_divisible
from lte.modules.compensation import Compensation
from lte.modules.recording import sparse_layers, track_sparsity
from lte.modules.router import BaseRouter
from lte.modules.sparse_ffn import Mode
from lte.modules.sparsity_meter import SparsityMeter
from lte.surgery.architectures import become_lte_
from lte.surgery.conversion import Batch, Conversion, Progress, section_of
from lte.surgery.convert import set_mode_
from lte.surgery.cost import Spent, cost_per_token
from lte.surgery.experts import RECORDED_TOKENS, group, replace_ffn_
from lte.surgery.quantise import check_form, quantise_site_, weights_of
from lte.surgery.sites import FFNSite, find_sites
from lte.surgery.training_options import TrainingOptions

if TYPE_CHECKING:
    from lte.surgery.training import Training

STATE = ("mode", "grouped", "weights")
"""Keys of a config's section ``lte`` besides the method: the mode, ``grouped: False`` until neurons are grouped, and
``weights`` for the form of quantised experts, see :func:`lte.quantise_`."""


@dataclass(frozen=True)
class Method(Conversion):
    """Base of all methods.

    Subclasses group neurons (:meth:`group`) and build the router to the groups (:meth:`build_router`). A method that
    needs no training sets its routers in :meth:`fit`.
    """

    section: ClassVar[str] = "lte"
    state: ClassVar[tuple[str, ...]] = STATE
    stock: ClassVar[bool] = False
    doing: ClassVar[str] = "grouping neurons"
    soft_computes_all: ClassVar[bool] = False
    """Whether mode soft computes every expert, because no score is 0."""

    expert_size: int = 32
    tau: float = 0.5
    seed: int = 0

    @classmethod
    def sized_for(cls, config: PretrainedConfig, **options: Any) -> "Method":
        """Return the method with options that fit the size of a dense model. Options that are given are kept."""
        return cls(**options)

    def check(self, model: PreTrainedModel) -> None:
        sites = find_sites(model, model.config.model_type)
        for site in sites:
            site.check()
            self.check_site(site)
        weights = [linear.weight for site in sites for linear in site.projections().values()]
        if len({id(weight) for weight in weights}) < len(weights):
            raise ValueError(f"{type(model).__name__} shares FFN weights between layers: that is not supported")

    def check_site(self, site: FFNSite) -> None:
        """Raise ValueError unless the method can convert this FFN."""
        check_divisible(site.d_ff, self.expert_size)

    def group(self, sites: Sequence[FFNSite], activations: Sequence[Tensor]) -> Iterable[Tensor]:
        """Give the labels ``[F]`` of each FFN: the expert of each neuron.

        FFN number ``i`` has the seed ``seed + i``, see :meth:`of_site`.

        Args:
            sites: all FFNs.
            activations: neurons of each FFN on data, ``[T, F]``; empty unless the method :attr:`needs_activations`.
        """
        raise NotImplementedError

    def of_site(self, number: int) -> "Method":
        """Return the method that groups one FFN alone as :meth:`group` groups FFN ``number`` among all."""
        return replace(self, seed=self.seed + number)

    def build_router(self, site: FFNSite, device: torch.device) -> BaseRouter:
        """Return a router for this FFN, not yet initialised."""
        raise NotImplementedError

    def build_compensation(self, site: FFNSite, device: torch.device) -> Compensation | None:
        """Return the compensation of this FFN's idle experts, not yet initialised; None if there is none."""
        return None

    def prepare_(self, model: PreTrainedModel) -> Callable[[], None]:
        """Change the dense model before the conversion, if the method needs it. Return a function that undoes this."""
        return lambda: None

    def fit(self, model: PreTrainedModel, batches: list[Batch]) -> None:
        """Set the routers of a model just converted, in mode dense. Do nothing if training sets them.

        Args:
            batches: batches with the first ``fit_tokens`` tokens of the data or more; empty if that is 0.
        """

    def calibrate(self, model: PreTrainedModel, batches: list[Batch]) -> None:
        """Set thresholds again on all of ``batches``, in mode hard. Do nothing if the number of experts is fixed."""

    @property
    def fit_tokens(self) -> int:
        """The number of tokens of data for :meth:`fit`; 0 if it needs none."""
        return 0

    @property
    def needs_activations(self) -> bool:
        """Whether :meth:`group` needs neurons recorded on data."""
        return False

    @property
    def data_tokens(self) -> int:
        return max(RECORDED_TOKENS * self.needs_activations, self.fit_tokens)

    def training(self, options: TrainingOptions) -> "Training":
        """Return the work in a training by ``LTETrainer``. Here :meth:`fit` sets routers after the dense stage."""
        from lte.surgery.training import Training  # not needed to convert or load a model

        return Training(self, options)

    def convert_(self, model: PreTrainedModel, batches: list[Batch], progress: Progress) -> None:
        sites = find_sites(model, model.config.model_type)
        undo = self.prepare_(model)
        try:
            orders = list(group(model, sites, self, batches, progress))  # all orders are found before routers are added
        except BaseException:
            undo()
            raise
        for site, order in zip(sites, orders, strict=True):
            site.permute_neurons(order)
        self.put_in_(model)
        self.fit(model, batches)

    def put_in_(self, model: PreTrainedModel, **state: Any) -> None:
        """Give every FFN of a dense model a router, drawn from the method's seed, in mode dense.

        Args:
            state: keys for the config's section besides the method and the mode.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for site in find_sites(model, model.config.model_type):
            replace_ffn_(site, self).reset(generator)
        become_lte_(model, self, mode="dense", **state)

    def install_(self, model: PreTrainedModel) -> None:
        for site in find_sites(model, model.config.model_type):
            sparse = replace_ffn_(site, self)
            if not any(tensor.is_meta for tensor in sparse.router.state_dict().values()):
                sparse.reset()
            if (weights := weights_of(model)) is not None:
                check_form(weights)
                quantise_site_(site, weights)
        set_mode_(model, mode_of(model.config))

    def cost(self, model: PreTrainedModel, sparsity: float | Sequence[float] = 0.0) -> Cost:
        return cost_per_token(model, sparsity, self.expert_size)

    @contextmanager
    def meter(self, model: PreTrainedModel, entry: nn.Module) -> Iterator[SparsityMeter]:
        with track_sparsity(entry) as meter:
            yield meter

    def spent(self, model: PreTrainedModel, meter: SparsityMeter) -> Spent:
        mode = mode_of(model.config)
        computes_all = mode == "soft" and self.soft_computes_all
        sparsity, attention = 0.0 if computes_all else meter.by_layer, meter.attention_sparsity
        cost = cost_per_token(model, sparsity, router=computes_all or None, attention_sparsity=attention)
        return Spent(
            sparsity=meter.overall,
            layer_sparsity=meter.by_layer,
            attention_sparsity=attention,
            gflops_per_token=cost.gflops,
            gflops_per_token_dense=cost_per_token(model).gflops,
            mode=mode,
        )

    def describe(self, config: Any) -> str:
        return f"sparse by {self.name}, mode {mode_of(config)}"

    def outcome(self, model: PreTrainedModel) -> str:
        layers = list(sparse_layers(model).values())
        return f"{len(layers)} FFNs of {layers[0].router.num_experts} experts x {self.expert_size} neurons"

    def lacking(self, section: Mapping[str, Any]) -> list[str]:
        return sorted([*super().lacking(section), *({"mode"} - section.keys())])


def mode_of(config: Any) -> Mode:
    """Return the mode of a model with this config; dense if its FFNs have no routers."""
    return section_of(config).get("mode", "dense")
