"""What a TEAL model is: its options, and where its thresholds are. Setting them: :mod:`lte.methods.teal`."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from transformers import PreTrainedModel

from lte.modules.input_threshold import add_cut_
from lte.surgery.method import made_of
from lte.surgery.sites import linear_sites

Allocation = Literal["uniform", "greedy"]

SECTION = "teal"
"""What a config calls the options."""
MOST_GREEDY = 0.95
"""The sparsity beyond which a greedy search makes no layer."""


@dataclass(frozen=True)
class TEALConfig:
    """How to convert a model for TEAL (Liu et al., arXiv 2408.14690): one threshold a linear layer, no training.

    In every linear layer of the blocks, attention and FFN, the inputs no larger than the layer's threshold are taken
    for 0. The weights that they would be multiplied with need not be read.

    Attributes:
        target_sparsity: fraction of the inputs to take for 0, in (0, 1): in every layer, or with greedy in the mean
            over each block's weights.
        tokens: how many tokens of the data the thresholds are set on.
        allocation: ``uniform``, or ``greedy``: within each block, the layers that matter least to its output are made
            sparser than the others. Takes about a hundred passes through each block.

    Raises:
        ValueError: an option outside its range.
    """

    name: ClassVar[str] = "teal"
    added_later: ClassVar[tuple[str, ...]] = ("allocation",)

    target_sparsity: float = 0.5
    tokens: int = 4096
    allocation: Allocation = "uniform"

    def __post_init__(self) -> None:
        if not 0 < self.target_sparsity < 1:
            raise ValueError(
                f"target_sparsity is {self.target_sparsity}, but it is the fraction of inputs taken for 0: "
                "between 0 and 1, e.g. 0.5"
            )
        if self.allocation == "greedy" and self.target_sparsity > MOST_GREEDY:
            raise ValueError(
                f"target_sparsity is {self.target_sparsity}, but greedy leaves at least {1 - MOST_GREEDY:.0%} of a "
                "layer: give allocation='uniform'"
            )
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}, but at least 1 is needed (usual: 4096)")
        if self.allocation not in get_args(Allocation):
            raise ValueError(f"allocation is {self.allocation!r}, but it is one of {', '.join(get_args(Allocation))}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TEALConfig":
        """The options that :meth:`to_dict` gave.

        Raises:
            ValueError: unknown option, or one of the wrong type.
        """
        return made_of(cls, values, [field.name for field in fields(cls)], "TEAL")

    @staticmethod
    def install_(model: PreTrainedModel) -> None:
        """Give every linear layer of the blocks a threshold, 0 until weights are loaded or data is seen."""
        for site in linear_sites(model, model.config.model_type):
            add_cut_(site.linear)
