"""The fitted start of routers: they predict how much each expert contributes in the dense model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lte.core.selection import expert_norms
from lte.methods.ridge import check_converged, ridge_regression
from lte.modules.sharding import whole
from lte.surgery.activations import watch_ffns
from lte.surgery.sites import FFNSite, find_sites

TOKENS_PER_INPUT = 16


def tokens_to_fit(model: Any) -> int:
    """Return the number of tokens of a fit: 16 for each of the D + 1 numbers of an expert's row."""
    return TOKENS_PER_INPUT * (1 + max(site.d_model for site in find_sites(model, model.config.model_type)))


@torch.no_grad()
def fit_routers_(model: Any, batches: Iterable[dict[str, Tensor]], bias: float) -> None:
    """Set every router to the ridge regression of its experts' contributions on the FFN's input.

    An expert contributes ``c_e(x) = sqrt(sum_n (h_n |down_n|)^2)`` over its neurons n. This is the norm of its output
    if its neurons have independent directions. The regression predicts the fourth root of c, which ranks experts as
    well as the logarithm does and allows zeros. Then one factor for each layer scales logits to mean ``bias`` and
    standard deviation 1 over tokens and experts. MoEfication (Zhang et al., 2022) trains its routers for contributions
    too, but as the last step. Here it is the start of training.

    Args:
        model: sparse, in mode dense, with temperatures of 1.
        batches: inputs of the model. :func:`tokens_to_fit` tokens are read.
        bias: the mean of a layer's logits.

    Raises:
        ValueError: there is no batch, or the model gives NaN or infinities.
    """
    sites = find_sites(model, model.config.model_type)
    moments = [_Moments(site) for site in sites]
    watch_ffns(model, sites, batches, lambda index, *seen: moments[index].add(*seen), tokens_to_fit(model))
    for one in moments:
        one.fit_(bias)


class _Moments:
    """Sums over tokens: products of an FFN's input (and a 1) with itself and with its experts' contributions."""

    def __init__(self, site: FFNSite) -> None:
        self.router: Any = site.installed.router  # a router with weight and bias: LTE's or a mixture's
        self.site = site
        self.down_F: Tensor | None = None  # of the first pass: only then are sharded weights whole
        device, inputs = site.down_rows().device, site.d_model + 1
        self.gram_II = torch.zeros(inputs, inputs, device=device)
        self.cross_IE = torch.zeros(inputs, self.router.num_experts, device=device)

    def add(self, x_TD: Tensor, hidden_TF: Tensor) -> None:
        """Add an FFN's input and its neurons."""
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.down_F is None:
                self.down_F = self.site.down_rows().float().norm(dim=1)
            x_TI = torch.nn.functional.pad(x_TD.float(), (0, 1), value=1.0)
            added_TE = expert_norms(hidden_TF.float() * self.down_F, self.router.num_experts)
            self.gram_II.addmm_(x_TI.T, x_TI)
            self.cross_IE.addmm_(x_TI.T, added_TE.pow(0.25))

    def fit_(self, bias: float) -> None:
        check_converged("what FFNs are given and give", [self.gram_II, self.cross_IE])
        gram_II = self.gram_II.double()
        count = gram_II[-1, -1]
        weight_IE, _ = ridge_regression(gram_II, self.cross_IE, free=1)  # the constant
        mean_E = gram_II[-1] @ weight_IE / count
        square_E = (weight_IE * (gram_II @ weight_IE)).sum(0) / count
        mean = mean_E.mean()
        spread = (square_E.mean() - mean.square()).clamp_min(1e-12).sqrt()
        with whole(self.router):
            self.router.weight.copy_(weight_IE[:-1].T / spread)
            self.router.bias.copy_((weight_IE[-1] - mean) / spread + bias)
