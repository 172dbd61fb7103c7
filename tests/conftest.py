"""Read before any test: one thread, helpers of several folders, Triton's interpreter where there is no GPU."""

import os
import sys
import tempfile
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path += [str(Path(__file__).parent / folder) for folder in ("surgery", "training", "methods")]  # tiny_models, ...

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be there when triton is first imported

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # compiled headers of one are of no use to another
    folder = Path(tempfile.gettempdir()) / f"torchinductor_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
