"""Learn To be Efficient: train a language model to use few of its feed-forward neurons."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lte.surgery import auto as _auto

if TYPE_CHECKING:
    from lte.core.accounting import Cost, Shape
    from lte.core.grouping import balanced_kmeans
    from lte.core.losses import efficiency_loss, separability_loss
    from lte.data.config import DataConfig
    from lte.inference.generate import generate
    from lte.inference.optimize import optimize_
    from lte.methods.cats import CATSConfig
    from lte.methods.deja_vu import DejaVuConfig
    from lte.methods.lte import LTEConfig
    from lte.methods.lte.calibration import calibrate_
    from lte.methods.moefication import MoEficationConfig
    from lte.methods.noisy_topk import NoisyTopKConfig
    from lte.methods.relufication import ReLUficationConfig
    from lte.methods.sigma_moe import SigmaMoEConfig
    from lte.methods.static_pruning import StaticPruningConfig
    from lte.methods.teal import TEALConfig, teal_, teal_cost
    from lte.methods.topk_moe import TopKMoEConfig
    from lte.methods.weight_pruning import MagnitudeConfig, WandaConfig, prune_
    from lte.modules.recording import record_scores, track_sparsity
    from lte.ops.sparse_ffn import sparse_ffn
    from lte.ops.weights import FFNWeights
    from lte.surgery.adapter_folder import load_adapter_
    from lte.surgery.convert import densify, set_mode_, sparsify_
    from lte.surgery.cost import cost_per_token, weight_sparsity
    from lte.surgery.families import Family, register_family
    from lte.surgery.quantise import quantise_
    from lte.surgery.relufy import relufy_
    from lte.training.arguments import LTETrainingArguments
    from lte.training.run import Trained, train
    from lte.training.trainer import LTETrainer

__version__ = "0.1.0"

__all__ = [
    "CATSConfig",
    "Cost",
    "DataConfig",
    "DejaVuConfig",
    "FFNWeights",
    "Family",
    "LTEConfig",
    "LTETrainer",
    "LTETrainingArguments",
    "MagnitudeConfig",
    "MoEficationConfig",
    "NoisyTopKConfig",
    "ReLUficationConfig",
    "Shape",
    "SigmaMoEConfig",
    "StaticPruningConfig",
    "TEALConfig",
    "TopKMoEConfig",
    "Trained",
    "WandaConfig",
    "balanced_kmeans",
    "calibrate_",
    "cost_per_token",
    "densify",
    "efficiency_loss",
    "generate",
    "load_adapter_",
    "optimize_",
    "prune_",
    "quantise_",
    "record_scores",
    "register_family",
    "relufy_",
    "separability_loss",
    "set_mode_",
    "sparse_ffn",
    "sparsify_",
    "teal_",
    "teal_cost",
    "track_sparsity",
    "train",
    "weight_sparsity",
]

_HOMES = {
    "lte.core.accounting": "Cost Shape",
    "lte.core.grouping": "balanced_kmeans",
    "lte.core.losses": "efficiency_loss separability_loss",
    "lte.data.config": "DataConfig",
    "lte.inference.generate": "generate",
    "lte.inference.optimize": "optimize_",
    "lte.methods.cats": "CATSConfig",
    "lte.methods.deja_vu": "DejaVuConfig",
    "lte.methods.lte": "LTEConfig",
    "lte.methods.lte.calibration": "calibrate_",
    "lte.methods.moefication": "MoEficationConfig",
    "lte.methods.noisy_topk": "NoisyTopKConfig",
    "lte.methods.relufication": "ReLUficationConfig",
    "lte.methods.sigma_moe": "SigmaMoEConfig",
    "lte.methods.static_pruning": "StaticPruningConfig",
    "lte.methods.teal": "TEALConfig teal_ teal_cost",
    "lte.methods.topk_moe": "TopKMoEConfig",
    "lte.methods.weight_pruning": "MagnitudeConfig WandaConfig prune_",
    "lte.modules.recording": "record_scores track_sparsity",
    "lte.ops.sparse_ffn": "sparse_ffn",
    "lte.ops.weights": "FFNWeights",
    "lte.surgery.adapter_folder": "load_adapter_",
    "lte.surgery.convert": "densify set_mode_ sparsify_",
    "lte.surgery.cost": "cost_per_token weight_sparsity",
    "lte.surgery.families": "Family register_family",
    "lte.surgery.quantise": "quantise_",
    "lte.surgery.relufy": "relufy_",
    "lte.training.arguments": "LTETrainingArguments",
    "lte.training.run": "Trained train",
    "lte.training.trainer": "LTETrainer",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
"""Public names are imported when they are first used (PEP 562). Loading a model needs no trainer, for example."""

_auto.register()


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return globals().setdefault(name, getattr(import_module(_HOME_OF[name]), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
