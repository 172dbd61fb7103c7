"""The start of compensation: it is fitted to the output of the experts that fitted routers make idle."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lte.methods.ridge import check_converged, ridge_regression
from lte.methods.router_start import tokens_to_fit
from lte.modules.sharding import whole
from lte.surgery.activations import watch_ffns
from lte.surgery.sites import FFNSite, find_sites


@torch.no_grad()
def fit_compensations_(model: Any, batches: Iterable[dict[str, Tensor]], sparsity: float) -> None:
    """Set every compensation to a reduced-rank regression on the FFN's input.

    The regression predicts what is missing if the (token, expert) pairs with the lowest router logits are idle: in each
    layer the share ``sparsity`` of them. It weighs a token's input and a 1 by its share of idle experts, as
    :class:`~lte.modules.compensation.Compensation` does. It keeps the ``R`` directions of the output that explain most
    (Izenman, 1975).

    Args:
        model: sparse, in mode dense, with fitted routers.
        batches: inputs of the model. The number of tokens is that of the routers' fit.
        sparsity: between 0 and 1.

    Raises:
        ValueError: there is no batch, or the model gives NaN or infinities.
    """
    sites = find_sites(model, model.config.model_type)
    fits = [_Fit(site, sparsity) for site in sites]
    watch_ffns(model, sites, batches, lambda index, *seen: fits[index].add(*seen), tokens_to_fit(model))
    for one in fits:
        one.fit_()


class _Fit:
    """Sums over tokens: products of the compensation's input with itself and with the missing output."""

    def __init__(self, site: FFNSite, sparsity: float) -> None:
        self.layer: Any = site.installed
        self.site = site
        self.sparsity = sparsity
        self.cut: Tensor | None = None
        device, inputs = site.down_rows().device, site.d_model + 1
        self.gram_II = torch.zeros(inputs, inputs, device=device)
        self.cross_ID = torch.zeros(inputs, site.d_model, device=device)
        self.count = 0

    def add(self, x_TD: Tensor, hidden_TF: Tensor) -> None:
        """Add an FFN's input and its neurons."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.layer.lte_router.logits(x_TD)
            if self.cut is None:  # the quantile of the first tokens is good enough for a start
                rank = min(logits_TE.numel(), 1 + int(self.sparsity * logits_TE.numel()))
                self.cut = logits_TE.flatten().kthvalue(rank).values
            idle_TE = logits_TE < self.cut
            x_TI = torch.nn.functional.pad(x_TD.float(), (0, 1), value=1.0) * idle_TE.float().mean(-1, keepdim=True)
            size = hidden_TF.shape[-1] // idle_TE.shape[-1]
            left_out_TD = (hidden_TF.float() * idle_TE.repeat_interleave(size, -1)) @ self.site.down_rows().float()
            self.gram_II.addmm_(x_TI.T, x_TI)
            self.cross_ID.addmm_(x_TI.T, left_out_TD)
            self.count += len(x_TI)

    def fit_(self) -> None:
        check_converged("what FFNs are given and leave out", [self.gram_II, self.cross_ID])
        map_ID, lower_II = ridge_regression(self.gram_II, self.cross_ID)
        given_DR = torch.linalg.svd(lower_II.T @ map_ID, full_matrices=False)[2].T
        given_DR = given_DR[:, : self.layer.compensation.compress.shape[0]]
        map_IR = map_ID @ given_DR
        size_R = (
            ((lower_II.T @ map_IR).square().sum(0) / self.count).sqrt().clamp_min(1e-12)
        )  # each of these inputs then gives 1
        into, rank = (
            self.layer.compensation,
            len(size_R),
        )  # with a rank above the width, the other directions keep their start
        with whole(into):
            into.compress[:rank].copy_((map_IR[:-1] / size_R).T)
            into.bias[:rank].copy_(map_IR[-1] / size_R)
            into.expand[:, :rank].copy_(given_DR * size_R)
