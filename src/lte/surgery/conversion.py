"""`Conversion`: a frozen config that makes a model sparse. Its type is the choice, and the model's config keeps it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.core.accounting import Cost
from lte.modules.sparsity_meter import SparsityMeter
from lte.surgery.cost import Spent, cost_per_token, weight_sparsity

Kind = TypeVar("Kind", bound="Conversion")
Batch = dict[str, Tensor]
Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps an iteration, e.g. in a progress bar."""

_ALL = "lte.methods.all"
"""The module whose import registers the conversions of lte by their names. It is above this file."""


@dataclass(frozen=True)
class Conversion:
    """Base of all conversions: methods with routers, thresholds on inputs, pruning of weights.

    A subclass has a name, by which it is saved and loaded. A field with ``init=False`` is fixed: it is no option and is
    not saved. The base class itself stands for a dense model.
    """

    name: ClassVar[str] = ""
    section: ClassVar[str] = ""
    """The name of the options' section in a model's config. Conversions of one kind share it and add their name."""
    state: ClassVar[tuple[str, ...]] = ()
    """The keys of the section that are not options."""
    stock: ClassVar[bool] = True
    """Whether a converted model keeps its Hugging Face class and computes every weight."""
    doing: ClassVar[str] = ""
    """The text of a progress bar for the conversion."""
    added_later: ClassVar[tuple[str, ...]] = ()
    """Options that early saved models lack. They take their defaults then. All other options must be in every saved
    model, because a default could change the model."""
    of_training: ClassVar[tuple[str, ...]] = ()
    """Options that do nothing before the model is trained."""
    _by_name: ClassVar[dict[str, type["Conversion"]]] = {}
    _by_section: ClassVar[dict[str, type["Conversion"]]] = {}

    def __post_init__(self) -> None:
        """Raise ValueError unless all options are in their range."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            Conversion._by_name[cls.name] = cls
        if "section" in vars(cls):
            Conversion._by_section[cls.section] = cls

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless this model can be converted. Called before the first change."""

    @property
    def data_tokens(self) -> int:
        """The number of tokens of data for :meth:`convert_`; 0 if it needs no data."""
        return 0

    def convert_(self, model: PreTrainedModel, batches: list[Batch], progress: Progress) -> None:
        """Convert a dense model, in place, after :meth:`check`.

        Args:
            batches: batches of data with :attr:`data_tokens` tokens, or all batches.
            progress: wraps a long iteration.
        """
        raise NotImplementedError

    def install_(self, model: PreTrainedModel) -> None:
        """Add the modules and buffers of the conversion to a new model, before its weights are loaded."""

    def training(self, options: Any) -> Any:
        """Return the work of this conversion in a training by ``LTETrainer``.

        Raises:
            ValueError: the conversion cannot be trained.
        """
        raise ValueError(
            f"{type(self).__name__} has no routers and is not trained: call lte.sparsify_(model, config, data=batches)"
        )

    def cost(self, model: PreTrainedModel, sparsity: Any = 0.0) -> Cost:
        """Return FLOPs and weight bytes of one token at a given sparsity.

        In this base class it is the sparsity of weights, on hardware that neither multiplies nor stores zeros.

        Raises:
            ValueError: unknown family, a sparsity outside [0, 1].
        """
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity is {sparsity}, but it is a fraction between 0 (dense) and 1")
        dense, kept = cost_per_token(model), 1 - sparsity
        return replace(
            dense,
            gflops=kept * dense.gflops,
            ffn_gflops=kept * dense.ffn_gflops,
            attention_gflops=kept * dense.attention_gflops,
            weight_bytes=round(kept * dense.weight_bytes),
        )

    @contextmanager
    def meter(self, model: PreTrainedModel, entry: nn.Module) -> Iterator[Any]:
        """Measure all forward passes inside the context. Give the meter, which :meth:`spent` reads.

        Args:
            entry: the module that is called: ``model``, or a part of it.
        """
        yield SparsityMeter()  # this meter measures nothing: all weights are computed

    def spent(self, model: PreTrainedModel, meter: Any) -> Spent:
        """Return the cost of a token in the passes that ``meter`` measured."""
        zeros = weight_sparsity(model)
        return Spent(
            sparsity=0.0,
            layer_sparsity=[],
            weight_sparsity=zeros,
            gflops_per_token=self.cost(model, zeros).gflops,
            gflops_per_token_dense=cost_per_token(model).gflops,
        )

    def describe(self, config: Any) -> str:
        """Return a short description of a model with this config."""
        return "dense"

    def outcome(self, model: PreTrainedModel) -> str:
        """Return a short description of the result of a conversion."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, **{option: getattr(self, option) for option in self.options()}}

    def lacking(self, section: Mapping[str, Any]) -> list[str]:
        """Return the options that a saved model's section lacks. :meth:`to_dict` writes them all."""
        return sorted(self.to_dict().keys() - section.keys() - {*self.added_later})

    @classmethod
    def options(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.init]

    @classmethod
    def named(cls: type[Kind], name: str | None) -> type[Kind]:
        """Return the conversion of this name: this class or a subclass.

        Raises:
            ValueError: there is none.
        """
        import_module(_ALL)
        known = {one: found for one, found in Conversion._by_name.items() if issubclass(found, cls)}
        if name not in known:
            raise ValueError(f"unknown method {name!r}: this version of lte knows {', '.join(sorted(known))}")
        return known[name]

    @classmethod
    def from_dict(cls: type[Kind], values: Mapping[str, Any]) -> Kind:
        """Return the conversion of the result of :meth:`to_dict` or a config's section; without a name, of this class.

        Raises:
            ValueError: an unknown method, an unknown option, or an option of the wrong type.
        """
        name = values.get("method", cls.name or None)
        found = cls.named(name)
        options = {option: value for option, value in values.items() if option not in ("method", *found.state)}
        return _made_of(found, options, found.options(), f"method {name!r}")


def conversion_of(config: Any) -> Conversion | None:
    """Return the conversion of the model with this config; None if it is dense.

    Args:
        config: of a model, or the content of its ``config.json``.

    Raises:
        ValueError: the section of the conversion is damaged.
    """
    kind, section = _found(config)
    if kind is None:
        return None
    try:
        return kind.from_dict(section)
    except ValueError:
        if kind.stock:  # a stock model may have a section of that name for something else
            return None
        raise


def is_sparse(config: Any) -> bool:
    """Return whether a model of this config has routers or thresholds. A pruned model has none."""
    kind, _ = _found(config)
    return kind is not None and not kind.stock


def section_of(config: Any) -> dict[str, Any]:
    """Return the section of a config's conversion, to read or change it. It is empty for a dense model."""
    return _found(config)[1]


def sections_of(config: Any) -> dict[str, dict[str, Any] | None]:
    """Return the section of each kind of conversion, by its name; None for a kind that was not applied."""
    return {kind.section: getattr(config, kind.section, None) for kind in _kinds()}


def _kinds() -> list[type[Conversion]]:
    """Return a class for each section, those of sparse models first: such a model may have been pruned before."""
    import_module(_ALL)
    return sorted(Conversion._by_section.values(), key=lambda kind: kind.stock)


def _found(config: Any) -> tuple[type[Conversion] | None, dict[str, Any]]:
    values = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for kind in _kinds():
        if isinstance(section := values.get(kind.section), dict):
            return kind, section
    return None, {}


def _made_of(cls: type[Kind], values: dict[str, Any], options: Sequence[str], title: str) -> Kind:
    """Return ``cls`` with the values of its options. ``title`` is its name in messages.

    Raises:
        ValueError: an unknown option, or an option of the wrong type.
    """
    if unknown := values.keys() - set(options):
        raise ValueError(f"unknown option {', '.join(sorted(unknown))} for {title}: it has {', '.join(options)}")
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not _is(value, hints[name]):
            raise ValueError(f"{title} has an option of the wrong type: {name} {value!r}")
    return cls(**values)


def _is(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the declared type of an option."""
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # the class checks which one
    if get_args(hint):
        return any(_is(value, one) for one in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
