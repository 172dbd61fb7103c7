"""Read before any test: one thread, helpers of several folders, Triton's interpreter where there is no GPU."""

import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path += [str(Path(__file__).parent / folder) for folder in ("surgery", "training")]  # tiny_models, tiny_training

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be there when triton is first imported
