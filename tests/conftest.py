"""Read before any test: without a GPU, Triton's kernels go through its interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be there when triton is first imported
