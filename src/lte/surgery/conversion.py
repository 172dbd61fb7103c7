"""What makes a model sparse: a frozen config whose type is the choice. A model's own config says which it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.core.accounting import Cost
from lte.modules.recording import SparsityMeter
from lte.surgery.cost import Spent, cost_per_token, weight_sparsity

Kind = TypeVar("Kind", bound="Conversion")
Batch = dict[str, Tensor]
Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps an iteration, e.g. in a progress bar."""

_ALL = "lte.methods.all"
"""Importing it makes the conversions that come with lte known by their names. It stands above this file."""


@dataclass(frozen=True)
class Conversion:
    """Base of all conversions: methods with routers, thresholds on inputs, pruning of weights.

    A subclass names itself and is then known to saving and loading. A field declared with ``init=False`` is fixed: no
    option, and not saved. This base itself stands for no conversion, and says what a dense model takes.
    """

    name: ClassVar[str] = ""
    section: ClassVar[str] = ""
    """What a model's config calls the options. Conversions of one kind share it, and say by their name which it was."""
    state: ClassVar[tuple[str, ...]] = ()
    """What the section holds beside the options."""
    stock: ClassVar[bool] = True
    """Whether a converted model is still one of Hugging Face's classes, and computes all that it computed before."""
    doing: ClassVar[str] = ""
    """What converting does, for a progress bar."""
    added_later: ClassVar[tuple[str, ...]] = ()
    """Options that early saved models lack. Without them a model is as it was then: their defaults. All others are
    written with every model, and without one of them a model would be another."""
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
        """Raise ValueError unless it can convert this model. Called before the first change."""

    @property
    def data_tokens(self) -> int:
        """How many tokens of data :meth:`convert_` looks at; 0: it needs no data."""
        return 0

    def convert_(self, model: PreTrainedModel, batches: list[Batch], progress: Progress) -> None:
        """Convert a dense model that :meth:`check` has let pass, in place.

        Args:
            batches: of data, with :attr:`data_tokens` tokens, or all there are.
            progress: wraps what takes long.
        """
        raise NotImplementedError

    def install_(self, model: PreTrainedModel) -> None:
        """Put into a model just built what converted ones have beside their weights, which are loaded afterwards."""

    def training(self, options: Any) -> Any:
        """What it does while ``LTETrainer`` trains a model.

        Raises:
            ValueError: it is not trained.
        """
        raise ValueError(
            f"{type(self).__name__} has no routers and is not trained: call lte.sparsify_(model, config, data=batches)"
        )

    def cost(self, model: PreTrainedModel, sparsity: Any = 0.0) -> Cost:
        """FLOPs and weight bytes of one token at a given sparsity.

        Here of weights that are 0, on hardware that neither multiplies nor stores them.

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
        """Look at all forward passes made within, and yield the meter, which :meth:`spent` reads.

        Args:
            entry: what is called: ``model``, or a part of it.
        """
        yield SparsityMeter()  # which sees nothing: all is computed

    def spent(self, model: PreTrainedModel, meter: Any) -> Spent:
        """What a token took in the passes that ``meter`` saw."""
        zeros = weight_sparsity(model)
        return Spent(
            sparsity=0.0,
            layer_sparsity=[],
            weight_sparsity=zeros,
            gflops_per_token=self.cost(model, zeros).gflops,
            gflops_per_token_dense=cost_per_token(model).gflops,
        )

    def describe(self, config: Any) -> str:
        """How a model of this config is, in a few words."""
        return "dense"

    def outcome(self, model: PreTrainedModel) -> str:
        """What converting has made of a model, in a few words."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, **{option: getattr(self, option) for option in self.options()}}

    def lacking(self, section: Mapping[str, Any]) -> list[str]:
        """What is missing in the section of a saved model, so that it was not written by :meth:`to_dict`."""
        return sorted(self.to_dict().keys() - section.keys() - {*self.added_later})

    @classmethod
    def options(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.init]

    @classmethod
    def named(cls: type[Kind], name: str | None) -> type[Kind]:
        """The conversion of that name, of this class or one derived from it.

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
        """The conversion that :meth:`to_dict` or a config's section describes; where these name none, this class's.

        Raises:
            ValueError: unknown method, unknown option, or one of the wrong type.
        """
        name = values.get("method", cls.name or None)
        found = cls.named(name)
        options = {option: value for option, value in values.items() if option not in ("method", *found.state)}
        return _made_of(found, options, found.options(), f"method {name!r}")


def conversion_of(config: Any) -> Conversion | None:
    """How the model of this config was converted; None of a dense one.

    Args:
        config: of a model, or the content of its ``config.json``.

    Raises:
        ValueError: what the config says of it is damaged.
    """
    kind, section = _found(config)
    if kind is None:
        return None
    try:
        return kind.from_dict(section)
    except ValueError:
        if kind.stock:  # any stock model may have a section of that name, for something else
            return None
        raise


def is_sparse(config: Any) -> bool:
    """Whether a model of this config chooses what to leave out: by routers, or by thresholds. A pruned one does not."""
    kind, _ = _found(config)
    return kind is not None and not kind.stock


def section_of(config: Any) -> dict[str, Any]:
    """What a config says of its model's conversion, to be read or changed; empty of a dense one."""
    return _found(config)[1]


def sections_of(config: Any) -> dict[str, dict[str, Any] | None]:
    """The same of each kind of conversion, by what configs call it; None for those that there were not."""
    return {kind.section: getattr(config, kind.section, None) for kind in _kinds()}


def _kinds() -> list[type[Conversion]]:
    """A class for each section, and first those of sparse models: these may have been pruned before."""
    import_module(_ALL)
    return sorted(Conversion._by_section.values(), key=lambda kind: kind.stock)


def _found(config: Any) -> tuple[type[Conversion] | None, dict[str, Any]]:
    values = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for kind in _kinds():
        if isinstance(section := values.get(kind.section), dict):
            return kind, section
    return None, {}


def _made_of(cls: type[Kind], values: dict[str, Any], options: Sequence[str], title: str) -> Kind:
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
