"""Grouping: which of an FFN's F neurons form which of its E experts of exactly N = F/E neurons.

Every grouping is `labels_F`, the expert of each neuron; `grouping_permutation` turns it into an order.

The paper runs balanced k-means with an exact assignment step (a min-cost flow). We minimise the same
objective by swapping neurons between experts. That keeps every expert at N, needs only the rows' inner
products, runs as some hundred rounds of batched tensor operations, and ends lower: k-means compares a row with
a centroid of which the row itself is 1/N, and where rows are nearly orthogonal this share alone keeps it where
it is. The gain of a swap, below, is exact and has no such bias.

The objective: with S_e the sum of the rows of expert e, squared distances to centroids sum to
sum_i |x_i|^2 - sum_e |S_e|^2 / N. Swapping i of expert a with j of expert b raises sum_e |S_e|^2 by twice
    want[b, i] + want[a, j] - 2 x_i.x_j,    want[b, i] = x_i.S_b - x_i.(S_a - x_i).

Shapes: T tokens, D model width, F neurons, E experts, N neurons an expert (F = E*N).
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

RESHUFFLES = 4  # attempts to leave a local optimum; on real gates the gain beyond 4 is under 0.1 %
MAX_ROUNDS = 4096  # of swaps; a safeguard, 100 to 600 is usual
ROUNDS_PER_CHECK = 16  # convergence is asked for this seldom because the answer waits for the device
MATCHINGS_PER_ROUND = 4
TOKENS_PER_CHUNK = 4096
FEW_NEURONS = (
    4096  # up to here rounds are too short to share: threads wait for each other, on a busy machine for minutes
)


def balanced_kmeans(weight_FD: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Balanced k-means of the rows of an FFN's first weight (the gate in a gated FFN).

    Rows count by direction only: they are L2-normalised (a zero row stays zero), in fp32 whatever the dtype.
    Returns labels_F, int64 on the weight's device, each of the labels exactly F/num_clusters times.
    The same seed gives the same labels on the same device; the global RNG is neither read nor altered.
    Holds one F x F fp32 matrix: 0.5 GB for F = 11008.

    Raises ValueError if the weight is not 2-D or not finite, or `num_clusters` does not divide F.
    Source: LTE paper (its grouping, with our solver), after MoEfication (Zhang et al., 2022).
    """
    _check_matrix(weight_FD, "weight_FD", "(F neurons, D features)")
    _check_clusters(weight_FD.shape[0], num_clusters)
    rows_FD = normalize(weight_FD.detach().float(), dim=1)
    return _group_by_gram(rows_FD @ rows_FD.T, num_clusters, seed)


def coactivation_grouping(activations_TF: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Balanced grouping of neurons that fire together, from activations recorded on data.

    The feature of a neuron is its column of |activation| over the T tokens, L2-normalised, so two neurons are
    as similar as the cosine of how hard they fire. Columns are not centred: neurons that are always on belong
    together, as their expert can never be skipped. Each token is first scaled to norm 1: a router chooses
    within a token, and a few tokens with huge activations (often a text's first) would else decide alone.
    Only the F x F cosines are kept: after one pass over the tokens the cost does not depend on T.

    Returns labels_F as `balanced_kmeans` does, which also has the same guarantees and errors.
    Source: the co-activation split of MoEfication (Zhang et al., 2022), by cosine in place of counts.
    """
    _check_matrix(activations_TF, "activations_TF", "(T tokens, F neurons)")
    num_neurons = activations_TF.shape[1]
    _check_clusters(num_neurons, num_clusters)
    gram_FF = torch.zeros(num_neurons, num_neurons, device=activations_TF.device)
    for chunk_TF in activations_TF.detach().split(TOKENS_PER_CHUNK):
        chunk_TF = normalize(chunk_TF.float().abs(), dim=1)
        gram_FF.addmm_(chunk_TF.T, chunk_TF)
    norm_F = gram_FF.diagonal().sqrt().clamp(min=1e-12)
    gram_FF.div_(norm_F).div_(norm_F[:, None])
    return _group_by_gram(gram_FF, num_clusters, seed)


def random_grouping(num_neurons: int, num_clusters: int, seed: int = 0) -> Tensor:
    """Neurons dealt to experts at random, the paper's baseline. Returns labels_F (int64, on the CPU).

    Raises ValueError if `num_clusters` does not divide `num_neurons`.
    """
    _check_clusters(num_neurons, num_clusters)
    order_F = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    return _labels(order_F.view(num_clusters, -1))


def grouping_permutation(labels_F: Tensor) -> Tensor:
    """The order_F that makes experts contiguous: `weight_FD[order_F]` starts with expert 0's neurons, and so on.

    Inside an expert, neurons keep their order. int64, on the labels' device.
    Raises ValueError unless each label 0..E-1 occurs equally often.
    """
    if labels_F.ndim != 1 or labels_F.is_floating_point() or labels_F.numel() == 0:
        raise ValueError(f"labels_F must be 1-D integers, got {labels_F.dtype} of shape {tuple(labels_F.shape)}")
    sizes_E = labels_F.bincount() if labels_F.min() >= 0 else None
    if sizes_E is None or (sizes_E != sizes_E[0]).any():
        raise ValueError("labels_F must use each of 0..E-1 equally often: make it with a grouping function")
    return labels_F.argsort(stable=True)


def check_divisible(num_neurons: int, expert_size: int) -> int:
    """Number of experts of `expert_size` neurons; a ValueError names the sizes that would do if it does not."""
    if expert_size > 0 and num_neurons > 0 and num_neurons % expert_size == 0:
        return num_neurons // expert_size
    divisors = _divisors(num_neurons)
    sizes = ", ".join(str(d) for d in [d for d in divisors if 8 <= d <= 256] or divisors)
    raise ValueError(f"expert_size {expert_size} does not divide d_ff {num_neurons}: use one of {sizes}")


def _group_by_gram(gram_FF: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Labels from the rows' inner products: swap from a random start, then reshuffle the loosest experts.

    Swaps alone stop where only a cycle of three would help (three experts, each half of one true cluster and
    half of the next). Such experts are the loosest; dealing their neurons anew and swapping again frees them.
    """
    threads = torch.get_num_threads()
    if gram_FF.device.type == "cpu" and gram_FF.shape[0] <= FEW_NEURONS:
        torch.set_num_threads(1)
    try:
        return _group(gram_FF, num_clusters, seed)
    finally:
        torch.set_num_threads(threads)


def _group(gram_FF: Tensor, num_clusters: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts alike
    order_F = torch.randperm(gram_FF.shape[0], generator=generator).to(gram_FF.device)
    members_EN, cohesion_E = _swap_until_converged(gram_FF, order_F.view(num_clusters, -1))
    loosest = min(num_clusters, max(3, num_clusters // 4))
    for _ in range(RESHUFFLES):
        chosen = cohesion_E.argsort(stable=True)[:loosest]
        pool = members_EN[chosen].flatten()
        dealt = pool[torch.randperm(len(pool), generator=generator).to(pool.device)]
        trial_EN = members_EN.index_copy(0, chosen, dealt.view(loosest, -1))
        trial_EN, trial_cohesion_E = _swap_until_converged(gram_FF, trial_EN)
        if trial_cohesion_E.sum() > cohesion_E.sum():
            members_EN, cohesion_E = trial_EN, trial_cohesion_E
    return _labels(members_EN)


def _swap_until_converged(gram_FF: Tensor, members_EN: Tensor) -> tuple[Tensor, Tensor]:
    """Swap neurons between pairs of experts until no candidate swap gains. Returns members_EN and |S_e|^2.

    In each round the candidates of a pair (a, b) are the neuron of a that most wants to b and the one of b
    that most wants to a. Pairs that are each other's best are taken, at most one an expert, so no swap spoils
    another and every round raises the objective. An expert without a partner swaps with itself: nothing
    changes, and no data-dependent shape makes the device wait.
    """
    E, N = members_EN.shape
    experts = torch.arange(E, device=gram_FF.device)
    members_EN = members_EN.clone()
    one_hot_EF = torch.zeros(E, E * N, device=gram_FF.device).scatter_(1, members_EN, 1.0)
    sums_EF = one_hot_EF @ gram_FF  # x_i . S_e
    square_F = gram_FF.diagonal()
    least_gain = 1e-5 * N  # above the rounding of sums of N products
    for step in range(1, MAX_ROUNDS + 1):
        sums_EEN = sums_EF.index_select(1, members_EN.flatten()).view(E, E, N)
        stay_EN = sums_EEN[experts, experts] - square_F[members_EN]
        want_EE, slot_EE = sums_EEN.sub_(stay_EN).max(dim=2)  # [b, a]: the best of a's neurons for b
        want_EE, slot_EE = want_EE.T, slot_EE.T  # [a, b]
        leaver_EE = members_EN.gather(1, slot_EE)
        gain_EE = want_EE + want_EE.T - 2 * gram_FF[leaver_EE, leaver_EE.T]
        gain_EE = torch.maximum(gain_EE, gain_EE.T).fill_diagonal_(0.0)  # a GEMM may be asymmetric by rounding
        partner_E = _match(gain_EE, least_gain)
        arriving_E, leaving_E = leaver_EE[partner_E, experts], leaver_EE[experts, partner_E]
        sums_EF += gram_FF[arriving_E] - gram_FF[leaving_E]
        members_EN[experts, slot_EE[experts, partner_E]] = arriving_E
        if step % ROUNDS_PER_CHECK == 0 and torch.equal(partner_E, experts):
            break
    return members_EN, sums_EF.gather(1, members_EN).sum(dim=1)


def _match(gain_EE: Tensor, least_gain: float) -> Tensor:
    """A partner for each expert, or itself: pairs that are each other's best, then again among the rest."""
    experts = torch.arange(len(gain_EE), device=gain_EE.device)
    partner_E = experts
    for _ in range(MATCHINGS_PER_ROUND):
        best_E, choice_E = gain_EE.max(dim=1)
        matched_E = (choice_E[choice_E] == experts) & (best_E > least_gain)
        partner_E = torch.where(matched_E, choice_E, partner_E)
        gain_EE = gain_EE.masked_fill(matched_E[:, None] | matched_E, 0.0)
    return partner_E


def _labels(members_EN: Tensor) -> Tensor:
    E, N = members_EN.shape
    experts_F = torch.arange(E, device=members_EN.device).repeat_interleave(N)
    return torch.empty_like(experts_F).scatter_(0, members_EN.flatten(), experts_F)


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
