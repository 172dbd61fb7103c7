"""All conversions that come with lte: importing this makes their names known to saving and loading."""

from lte.methods.cats import CATSConfig
from lte.methods.deja_vu import DejaVuConfig
from lte.methods.lte import LTEConfig
from lte.methods.moefication import MoEficationConfig
from lte.methods.noisy_topk import NoisyTopKConfig
from lte.methods.relufication import ReLUficationConfig
from lte.methods.sigma_moe import SigmaMoEConfig
from lte.methods.static_pruning import StaticPruningConfig
from lte.methods.teal import TEALConfig
from lte.methods.topk_moe import TopKMoEConfig
from lte.methods.weight_pruning import MagnitudeConfig, WandaConfig

__all__ = [
    "CATSConfig",
    "DejaVuConfig",
    "LTEConfig",
    "MagnitudeConfig",
    "MoEficationConfig",
    "NoisyTopKConfig",
    "ReLUficationConfig",
    "SigmaMoEConfig",
    "StaticPruningConfig",
    "TEALConfig",
    "TopKMoEConfig",
    "WandaConfig",
]
