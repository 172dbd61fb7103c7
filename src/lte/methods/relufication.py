"""ReLUfication: the activation is ReLU, and neurons that give 0 are skipped (Mirzadeh et al., arXiv 2310.04564)."""

from dataclasses import dataclass
from typing import ClassVar

from lte.methods.cats import CATSConfig
from lte.surgery.relufy import ReLUName


@dataclass(frozen=True)
class ReLUficationConfig(CATSConfig):
    """How to convert a model by ReLUfication. Then it must be fine-tuned.

    A neuron is idle if the new activation gives 0. This changes no output, and the model decides how often it happens.
    If the target is higher, each layer has a threshold that is set on data, and activations below it are idle too.

    Attributes:
        target_sparsity: least fraction of idle neurons, in every layer.
        tokens: number of tokens of the data for the thresholds.
        activation: ``relu``, or ``relu2`` (its square).

    Raises:
        ValueError: an option is outside its range.
    """

    name: ClassVar[str] = "relufication"

    activation: ReLUName | None = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation is None:
            raise ValueError("relufication needs an activation, relu or relu2; to keep the model's own take cats")
