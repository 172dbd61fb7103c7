"""What a method is: a frozen dataclass that groups neurons, builds routers and fits them. Its type is the choice."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.core.grouping import check_divisible
from lte.modules.compensation import Compensation
from lte.modules.router import BaseRouter
from lte.surgery.sites import FFNSite
from lte.surgery.training_options import TrainingOptions

if TYPE_CHECKING:
    from lte.surgery.training import Training

Made = TypeVar("Made")

_ALL = "lte.methods.all"
"""Importing it makes the methods that come with lte known by their names. It stands above this file."""

STATE = ("mode", "grouped")
"""What a config's section ``lte`` holds beside the method: the mode, and ``grouped: False`` until neurons are."""


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass names itself and is then known to saving and loading.

    Subclasses say how neurons are grouped (:meth:`group`) and what routes to the groups
    (:meth:`build_router`). One that needs no training sets its routers in :meth:`fit`.
    A field declared with ``init=False`` is fixed: no option, and not saved.
    """

    name: ClassVar[str] = ""
    added_later: ClassVar[tuple[str, ...]] = ()
    """Options that early saved models lack. Without them a model is as it was then: their defaults. All others are
    written with every model, and without one of them a model would be another."""
    of_training: ClassVar[tuple[str, ...]] = ()
    """Options that do nothing before the model is trained."""
    _by_name: ClassVar[dict[str, type["Method"]]] = {}

    expert_size: int = 32
    tau: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError unless all options are in their range."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            Method._by_name[cls.name] = cls

    def check(self, site: FFNSite) -> None:
        """Raise ValueError unless it can convert this FFN. Called for each before the first change."""
        check_divisible(site.d_ff, self.expert_size)

    def group(self, sites: Sequence[FFNSite], activations: Sequence[Tensor]) -> Iterable[Tensor]:
        """Labels ``[F]`` of each FFN: the expert of each neuron.

        Args:
            sites: all FFNs.
            activations: neurons of each on data, ``[T, F]``; none unless the method :attr:`needs_activations`.
        """
        raise NotImplementedError

    def build_router(self, site: FFNSite, device: torch.device) -> BaseRouter:
        """A router for this FFN, not yet initialised."""
        raise NotImplementedError

    def build_compensation(self, site: FFNSite, device: torch.device) -> Compensation | None:
        """What stands in for this FFN's idle experts, not yet initialised; None where nothing does."""
        return None

    def prepare_(self, model: PreTrainedModel) -> Callable[[], None]:
        """Change the dense model before it is converted, where the method needs another one; gives what undoes it."""
        return lambda: None

    def fit(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        """Set the routers of a model just converted, in mode dense. Nothing to do where training does it.

        Args:
            batches: the first ``fit_tokens`` of the data, or more; none where that is 0.
        """

    def calibrate(self, model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        """Set thresholds anew on all of ``batches``, in mode hard. Nothing to do where as many experts always run."""

    @property
    def fit_tokens(self) -> int:
        """How many tokens of data :meth:`fit` wants; 0: none."""
        return 0

    @property
    def needs_activations(self) -> bool:
        """Whether :meth:`group` wants neurons recorded on data."""
        return False

    def training(self, options: TrainingOptions) -> "Training":
        """What it does while ``LTETrainer`` trains a model: here, set routers by :meth:`fit` after the dense stage."""
        from lte.surgery.training import Training  # which looks at models, as methods do not

        return Training(self, options)

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, **{option: getattr(self, option) for option in self.options()}}

    @classmethod
    def options(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.init]

    @staticmethod
    def named(name: str | None) -> type["Method"]:
        """The method of that name.

        Raises:
            ValueError: there is none.
        """
        if name not in Method._by_name:
            import_module(_ALL)
        cls = Method._by_name.get(str(name))
        if cls is None:
            raise ValueError(f"unknown method {name!r}: this version of lte knows {', '.join(sorted(Method._by_name))}")
        return cls

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Method":
        """The method that :meth:`to_dict` described. Of a config's section ``lte``, :data:`STATE` is not the method's.

        Raises:
            ValueError: unknown method, unknown option, or one of the wrong type.
        """
        values = {option: value for option, value in values.items() if option not in STATE}
        name = values.pop("method", None)
        cls = Method.named(name)
        return made_of(cls, values, cls.options(), f"method {name!r}")


def made_of(cls: type[Made], values: dict[str, Any], options: Sequence[str], title: str) -> Made:
    """``cls`` with the values of its options; ``title`` is what messages call it.

    Raises:
        ValueError: unknown option, or one of the wrong type.
    """
    if unknown := values.keys() - set(options):
        raise ValueError(f"unknown option {', '.join(sorted(unknown))} for {title}: it has {', '.join(options)}")
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not _is(value, hints[name]):
            raise ValueError(f"{title} has an option of the wrong type: {name} {value!r}")
    return cls(**values)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value, as JSON has it, is what an option is declared as."""
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # which one, the class says
    if get_args(hint):
        return any(_is(value, one) for one in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
