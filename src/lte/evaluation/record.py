"""What is written down of a measurement beside its numbers: where it was made, and where a model says how."""

from importlib.metadata import version

import torch
import transformers

SUMMARY = "lte_training.json"
"""What training leaves beside a model: how it was made, and what was measured then."""


def environment(device: torch.device) -> dict[str, str]:
    """Where a number was measured."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "device": where,
        "lte": version("lte"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
