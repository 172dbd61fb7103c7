"""Learn To be Efficient: train a language model to use few of its feed-forward neurons."""

from lte.core.accounting import Cost, Shape
from lte.core.grouping import balanced_kmeans
from lte.core.losses import efficiency_loss, separability_loss
from lte.methods.lte import LTEConfig
from lte.modules.recording import record_scores, track_sparsity
from lte.surgery.convert import set_mode_, sparsify_
from lte.surgery.cost import cost_per_token
from lte.surgery.families import Family, register_family
from lte.training.arguments import LTETrainingArguments
from lte.training.trainer import LTETrainer

__all__ = [
    "Cost",
    "Family",
    "LTEConfig",
    "LTETrainer",
    "LTETrainingArguments",
    "Shape",
    "balanced_kmeans",
    "cost_per_token",
    "efficiency_loss",
    "record_scores",
    "register_family",
    "separability_loss",
    "set_mode_",
    "sparsify_",
    "track_sparsity",
]
