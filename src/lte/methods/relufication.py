"""ReLUfication: with ReLU for an activation, a neuron that gives 0 is skipped (Mirzadeh et al., arXiv 2310.04564)."""

from dataclasses import dataclass
from typing import ClassVar

from lte.methods.cats import CATSConfig
from lte.surgery.relufy import Activation


@dataclass(frozen=True)
class ReLUficationConfig(CATSConfig):
    """How to convert a model by ReLUfication; then it is fine-tuned.

    A neuron is idle where the new activation gives 0: nothing is lost by that, and how often is what the model makes of
    it. Where more is asked for, activations under a threshold are idle too, one a layer, set on data.

    Attributes:
        target_sparsity: fraction of neurons to leave idle at least, in every layer.
        tokens: how many tokens of the data the thresholds are set on.
        activation: ``relu``, or ``relu2``, its square.

    Raises:
        ValueError: an option outside its range.
    """

    name: ClassVar[str] = "relufication"

    activation: Activation | None = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation is None:
            raise ValueError("relufication needs an activation, relu or relu2; to keep the model's own take cats")
