"""Grouping: divides an FFN's F neurons into E experts of exactly N = F/E neurons.

A grouping is `labels_F`, the expert of each neuron. `grouping_permutation` makes an order of neurons from it.

The paper runs balanced k-means with an exact assignment step (a min-cost flow). We minimise the same
objective by swaps of neurons between experts. Swaps keep every expert at N neurons and need only the rows'
inner products. They run as some hundred rounds of batched tensor operations, and they end at a lower objective.
The reason: k-means compares a row with a centroid, and the row itself is 1/N of its own centroid. If rows are
nearly orthogonal, this share alone keeps a row in its expert. The gain of a swap, below, is exact.

The objective: with S_e the sum of the rows of expert e, squared distances to centroids sum to
sum_i |x_i|^2 - sum_e |S_e|^2 / N. Swapping i of expert a with j of expert b raises sum_e |S_e|^2 by twice
    want[b, i] + want[a, j] - 2 x_i.x_j,    want[b, i] = x_i.S_b - x_i.(S_a - x_i).

Shapes: L layers, T tokens, D model width, F neurons, E experts, N neurons an expert (F = E*N), C some experts, P
neurons of these.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

RESHUFFLES = 4  # attempts to leave a local optimum; on real gates more attempts gain less than 0.1 %
MAX_ROUNDS = 4096  # of swaps; a safeguard: 100 to 600 rounds are usual
ROUNDS_PER_CHECK = 16  # a check for convergence waits for the device, so checks are rare
MATCHINGS_PER_ROUND = 4
TOKENS_PER_CHUNK = 4096
FEW_NEURONS = (
    4096  # with fewer neurons rounds are too short for threads: on a busy machine threads wait minutes for each other
)


def balanced_kmeans(weight_FD: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Balanced k-means of the rows of an FFN's first weight (the gate in a gated FFN).

    Only the direction of a row counts: rows are L2-normalised in fp32 (a zero row stays zero).
    Return labels_F, int64 on the weight's device. Each label occurs exactly F/num_clusters times.
    The same seed gives the same labels on the same device. The global RNG is neither read nor changed.
    Memory: one F x F fp32 matrix, 0.5 GB for F = 11008.

    Raise ValueError if the weight is not 2-D or not finite, or if `num_clusters` does not divide F.
    Source: LTE paper (its grouping, with our solver), after MoEfication (Zhang et al., 2022).
    """
    return group_by_gram(direction_gram(weight_FD)[None], num_clusters, [seed])[0]


def direction_gram(weight_FD: Tensor) -> Tensor:
    """Return the cosines of rows, [F, F] fp32, which `balanced_kmeans` groups by. It raises the same errors."""
    _check_matrix(weight_FD, "weight_FD", "(F neurons, D features)")
    rows_FD = normalize(weight_FD.detach().float(), dim=1)
    return rows_FD @ rows_FD.T


def coactivation_gram(activations_TF: Tensor) -> Tensor:
    """Return how similarly neurons fire on data, [F, F] fp32, for `group_by_gram`.

    The feature of a neuron is its column of |activation| over the T tokens, L2-normalised. So the similarity of
    two neurons is the cosine of two such columns. Columns are not centred: neurons that are always on belong
    together, because their expert can never be skipped. Each token is first scaled to norm 1, because a router
    chooses within a token. Otherwise a few tokens with huge activations (often the first of a text) would decide.
    Only the F x F cosines are kept, so memory does not depend on T.

    Raise ValueError if the activations are not 2-D or not finite.
    Source: the co-activation split of MoEfication (Zhang et al., 2022), with cosines instead of counts.
    """
    _check_matrix(activations_TF, "activations_TF", "(T tokens, F neurons)")
    num_neurons = activations_TF.shape[1]
    gram_FF = torch.zeros(num_neurons, num_neurons, device=activations_TF.device)
    for chunk_TF in activations_TF.detach().split(TOKENS_PER_CHUNK):
        chunk_TF = normalize(chunk_TF.float().abs(), dim=1)
        gram_FF.addmm_(chunk_TF.T, chunk_TF)
    norm_F = gram_FF.diagonal().sqrt().clamp(min=1e-12)
    return gram_FF.div_(norm_F).div_(norm_F[:, None])


def random_grouping(num_neurons: int, num_clusters: int, seed: int = 0) -> Tensor:
    """Return labels_F of a random grouping, the paper's baseline (int64, on the CPU).

    Raise ValueError if `num_clusters` does not divide `num_neurons`.
    """
    _check_clusters(num_neurons, num_clusters)
    order_F = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    return _labels(order_F.view(1, num_clusters, -1))[0]


def grouping_permutation(labels_F: Tensor) -> Tensor:
    """Return the order_F that makes experts contiguous: `weight_FD[order_F]` starts with the neurons of expert 0.

    Inside an expert, neurons keep their order. The result is int64, on the labels' device.
    Raise ValueError unless each label 0..E-1 occurs equally often.
    """
    if labels_F.ndim != 1 or labels_F.is_floating_point() or labels_F.numel() == 0:
        raise ValueError(f"labels_F must be 1-D integers, got {labels_F.dtype} of shape {tuple(labels_F.shape)}")
    sizes_E = labels_F.bincount() if labels_F.min() >= 0 else None
    if sizes_E is None or (sizes_E != sizes_E[0]).any():
        raise ValueError("labels_F must use each of 0..E-1 equally often: make it with a grouping function")
    return labels_F.argsort(stable=True)


def check_divisible(num_neurons: int, expert_size: int) -> int:
    """Return the number of experts. Raise ValueError, with possible sizes, unless `expert_size` divides the neurons."""
    if expert_size > 0 and num_neurons > 0 and num_neurons % expert_size == 0:
        return num_neurons // expert_size
    divisors = _divisors(num_neurons)
    sizes = ", ".join(str(d) for d in [d for d in divisors if 8 <= d <= 256] or divisors)
    raise ValueError(f"expert_size {expert_size} does not divide d_ff {num_neurons}: use one of {sizes}")


def group_by_gram(gram_LFF: Tensor, num_clusters: int, seeds: Sequence[int]) -> Tensor:
    """Return the labels [L, F] of L layers from their rows' inner products.

    All layers are grouped at once, because on a GPU a round of swaps waits for its launches, not for its arithmetic.
    The labels of a layer do not depend on the other layers.

    Swaps start from a random order, then the loosest experts are reshuffled. Swaps alone stop if only a cycle of
    three would help (three experts, each half of one true cluster and half of the next). Such experts are the loosest.
    A new random division of their neurons, followed by swaps, separates them.
    """
    _check_clusters(gram_LFF.shape[-1], num_clusters)
    threads = torch.get_num_threads()
    if gram_LFF.device.type == "cpu" and gram_LFF.shape[-1] <= FEW_NEURONS:
        torch.set_num_threads(1)
    try:
        return _group(gram_LFF, num_clusters, seeds)
    finally:
        torch.set_num_threads(threads)


def _group(gram_LFF: Tensor, num_clusters: int, seeds: Sequence[int]) -> Tensor:
    device, num_neurons = gram_LFF.device, gram_LFF.shape[-1]
    # on the CPU, so that the start is the same on every device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def random_orders(length: int) -> Tensor:
        return torch.stack([torch.randperm(length, generator=one) for one in generators]).to(device)

    order_LF = random_orders(num_neurons)
    members_LEN, cohesion_LE = _swap_until_converged(gram_LFF, order_LF.unflatten(1, (num_clusters, -1)))
    loosest = min(num_clusters, max(3, num_clusters // 4))
    for _ in range(RESHUFFLES):
        chosen_LC1 = cohesion_LE.argsort(dim=1, stable=True)[:, :loosest, None]
        chosen_LCN = chosen_LC1.expand(-1, -1, members_LEN.shape[-1])
        pool_LP = members_LEN.gather(1, chosen_LCN).flatten(1)
        dealt_LP = pool_LP.gather(1, random_orders(pool_LP.shape[1]))
        trial_LEN = members_LEN.scatter(1, chosen_LCN, dealt_LP.view(chosen_LCN.shape))
        trial_LEN, trial_LE = _swap_until_converged(gram_LFF, trial_LEN)
        better_L1 = trial_LE.sum(1, keepdim=True) > cohesion_LE.sum(1, keepdim=True)
        members_LEN = torch.where(better_L1[..., None], trial_LEN, members_LEN)
        cohesion_LE = torch.where(better_L1, trial_LE, cohesion_LE)
    return _labels(members_LEN)


def _swap_until_converged(gram_LFF: Tensor, members_LEN: Tensor) -> tuple[Tensor, Tensor]:
    """Swap neurons between pairs of experts until no candidate swap gains. Return members_LEN and |S_e|^2.

    In each round a pair (a, b) has two candidates: the neuron of a that gains most in b, and the neuron of b that
    gains most in a. Two experts swap if each is the other's best partner. An expert takes part in one swap at most,
    so swaps do not disturb each other and every round raises the objective. An expert without a partner swaps with
    itself: nothing changes, and no shape depends on data, so the device does not wait.
    """
    L, E, N = members_LEN.shape
    device = gram_LFF.device
    layers_L1 = torch.arange(L, device=device)[:, None]
    experts = torch.arange(E, device=device)
    members_LEN = members_LEN.clone()
    one_hot_LEF = torch.zeros(L, E, E * N, device=device).scatter_(2, members_LEN, 1.0)
    sums_LEF = one_hot_LEF @ gram_LFF  # x_i . S_e
    square_LF = gram_LFF.diagonal(dim1=1, dim2=2)
    least_gain = 1e-5 * N  # above the rounding of sums of N products
    for step in range(1, MAX_ROUNDS + 1):
        flat_LEF = members_LEN.view(L, 1, E * N).expand(-1, E, -1)
        sums_LEEN = sums_LEF.gather(2, flat_LEF).view(L, E, E, N)
        stay_LEN = sums_LEEN[:, experts, experts] - square_LF.gather(1, members_LEN.view(L, -1)).view(L, E, N)
        want_LEE, slot_LEE = sums_LEEN.sub_(stay_LEN[:, None]).max(dim=3)  # [b, a]: the best of a's neurons for b
        want_LEE, slot_LEE = want_LEE.mT, slot_LEE.mT  # [a, b]
        leaver_LEE = members_LEN.gather(2, slot_LEE)
        gain_LEE = want_LEE + want_LEE.mT - 2 * gram_LFF[layers_L1[..., None], leaver_LEE, leaver_LEE.mT]
        gain_LEE = torch.maximum(gain_LEE, gain_LEE.mT)  # a GEMM may be asymmetric by rounding
        gain_LEE.diagonal(dim1=1, dim2=2).zero_()
        partner_LE = _match(gain_LEE, least_gain)
        arriving_LE, leaving_LE = leaver_LEE[layers_L1, partner_LE, experts], leaver_LEE[layers_L1, experts, partner_LE]
        sums_LEF += gram_LFF[layers_L1, arriving_LE] - gram_LFF[layers_L1, leaving_LE]
        members_LEN[layers_L1, experts, slot_LEE[layers_L1, experts, partner_LE]] = arriving_LE
        if step % ROUNDS_PER_CHECK == 0 and torch.equal(partner_LE, experts.expand(L, -1)):
            break
    return members_LEN, sums_LEF.gather(2, members_LEN).sum(dim=2)


def _match(gain_LEE: Tensor, least_gain: float) -> Tensor:
    """Return a partner for each expert, or itself: pairs that are each other's best, then again among the others."""
    L, E, _ = gain_LEE.shape
    experts_LE = torch.arange(E, device=gain_LEE.device).expand(L, -1)
    partner_LE = experts_LE
    for _ in range(MATCHINGS_PER_ROUND):
        best_LE, choice_LE = gain_LEE.max(dim=2)
        matched_LE = (choice_LE.gather(1, choice_LE) == experts_LE) & (best_LE > least_gain)
        partner_LE = torch.where(matched_LE, choice_LE, partner_LE)
        gain_LEE = gain_LEE.masked_fill(matched_LE[:, :, None] | matched_LE[:, None, :], 0.0)
    return partner_LE


def _labels(members_LEN: Tensor) -> Tensor:
    L, E, N = members_LEN.shape
    experts_LF = torch.arange(E, device=members_LEN.device).repeat_interleave(N).expand(L, -1)
    return torch.empty_like(experts_LF, memory_format=torch.contiguous_format).scatter_(
        1, members_LEN.view(L, -1), experts_LF
    )


def _check_matrix(matrix: Tensor, name: str, shape: str) -> None:
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must be 2-D and not empty, {shape}, got shape {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite values: group a finite checkpoint")


def _check_clusters(num_neurons: int, num_clusters: int) -> None:
    if num_neurons > 0 and num_clusters > 0 and num_neurons % num_clusters == 0:
        return
    divisors = _divisors(num_neurons)
    near = [max((d for d in divisors if d < num_clusters), default=None)]
    near += [min((d for d in divisors if d > num_clusters), default=None)]
    use = " or ".join(f"{d} (experts of {num_neurons // d})" for d in near if d is not None)
    raise ValueError(f"num_clusters {num_clusters} does not divide {num_neurons} neurons: use {use}")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
