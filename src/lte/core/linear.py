"""A linear map in fp32, as every router takes it."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_fp32(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` in fp32, for any dtypes and under autocast."""
    x_TD, weight, bias = x_TD.float(), weight.float(), None if bias is None else bias.float()
    device_type = "cpu" if x_TD.is_meta else x_TD.device.type  # meta has no autocast to turn off
    if not torch.is_autocast_enabled(device_type):
        return F.linear(x_TD, weight, bias)
    with torch.autocast(device_type, enabled=False):
        return F.linear(x_TD, weight, bias)
