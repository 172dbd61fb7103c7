"""How quantised matrices are stored, made and used."""

import dataclasses

import pytest
import torch
from random_ffn import changed, make_active, make_weights, make_x, quantised, relative_rms

from lte.ops import sparse_ffn as ops
from lte.ops.quantise import quantise
from lte.ops.weights import TENSORS, Affine, Matrix, unflatten

EVERY = [torch.float32, torch.bfloat16, torch.float16]


def rows(R: int = 64, D: int = 10, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(R, D, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", EVERY)
def test_numbers_are_stored_as_the_form_says(dtype):
    eight, four = quantise(rows(dtype=dtype), "int8"), quantise(rows(dtype=dtype), "int4")
    assert (eight.rows.dtype, eight.rows.shape, eight.scales.shape) == (torch.int8, (64, 10), (64,))
    assert (four.rows.dtype, four.rows.shape, four.scales.shape) == (torch.uint8, (64, 5), (2, 10))
    assert (eight.bits, four.bits, Matrix(rows(dtype=dtype)).bits) == (8, 4, 8 * dtype.itemsize)
    assert eight.nbytes == 64 * 10 + 64 * dtype.itemsize
    assert four.nbytes == 64 * 5 + 2 * 10 * dtype.itemsize
    for matrix in (eight, four):
        assert (matrix.shape, matrix.dtype, matrix.scales.dtype) == ((64, 10), dtype, dtype)
        assert matrix.floats(dtype).dtype == dtype
    for r in (0, 31, 32, 63):
        for d in range(10):
            byte = int(four.rows[r, d % 5])
            q = (byte & 15 if d < 5 else byte >> 4) - 8
            assert four.floats(torch.float32)[r, d] == q * four.scales[r // 32, d].float()
            assert eight.floats(torch.float32)[r, d] == int(eight.rows[r, d]) * eight.scales[r].float()


@pytest.mark.parametrize("dtype", EVERY)
def test_int8_rounds_to_the_nearest_number(dtype):
    given = rows(dtype=dtype)
    matrix = quantise(given, "int8")
    error = (matrix.floats(torch.float32) - given.float()).abs()
    scales = matrix.scales.float()[:, None]
    inside = given.float().abs() < 127 * scales  # the scale is rounded to its dtype, so the largest may be outside
    assert bool((error <= 0.5001 * scales)[inside].all())
    assert bool((error <= scales).all())


@pytest.mark.parametrize(("to", "most"), [("int8", 0.0075), ("int4", 0.095)])
def test_error_of_random_weights(to, most):
    given = rows(512, 64)
    found = relative_rms(quantise(given, to).floats(torch.float32), given)
    assert most / 2 < found < most


def test_int4_is_better_than_a_scale_of_the_largest_number():
    given = rows(512, 64)
    groups = given.unflatten(0, (-1, 32))
    scales = groups.abs().amax(1, keepdim=True) / 7
    plain = ((groups / scales).round() * scales).flatten(0, 1)
    assert relative_rms(quantise(given, "int4").floats(torch.float32), given) < 0.9 * relative_rms(plain, given)


def test_int8_of_a_down_projection_has_a_scale_for_each_column():
    given = rows()
    matrix, turned = quantise(given, "int8", transposed=True), quantise(given.T, "int8")
    assert matrix.scales.shape == (1, 10)
    assert torch.equal(matrix.floats(torch.float32), turned.floats(torch.float32).T)
    weights = quantised(make_weights(64, 128), "int8")
    with pytest.raises(ValueError, match=r"down in int8 has scales \(128,\), but .* \(1, 64\)"):
        dataclasses.replace(weights, down=weights.up)
    with pytest.raises(ValueError, match=r"up in int8 has scales \(1, 64\), but .* \(128,\)"):
        dataclasses.replace(weights, up=weights.down)


def test_a_large_weight_of_a_neuron_does_not_round_its_others_away():
    given = rows()
    given[5, 3] = 100
    others = torch.arange(10) != 3
    found = quantise(given, "int8", transposed=True).floats(torch.float32)
    assert relative_rms(found[5, others], given[5, others]) < 0.01


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_zeros_stay_zeros_and_the_same_input_gives_the_same_bits(to):
    given = rows()
    given[32:] = 0
    first, again = quantise(given, to), quantise(given, to)
    assert torch.equal(first.floats(torch.float32)[32:], given[32:])
    assert torch.equal(first.rows, again.rows)
    assert torch.equal(first.scales, again.scales)


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_halves_are_views_of_the_numbers(to):
    matrix = quantise(rows(128), to)
    halves = matrix.halves()
    floats = [half.floats(torch.float32) for half in halves]
    assert torch.equal(torch.cat(floats), matrix.floats(torch.float32))
    assert halves[0].rows.data_ptr() == matrix.rows.data_ptr()


@pytest.mark.parametrize(
    ("stored", "scales", "message"),
    [
        (torch.zeros(64, 10, dtype=torch.int8), None, "without scales"),
        (torch.zeros(64, 10, dtype=torch.int8), torch.zeros(10), r"beside them scales are \(64,\) or \(1, 10\)"),
        (torch.zeros(64, 5, dtype=torch.uint8), torch.zeros(64), r"beside them scales are \(2, 10\)"),
        (torch.zeros(48, 5, dtype=torch.uint8), torch.zeros(1, 10), "multiple of 32"),
        (torch.zeros(64, 10), torch.zeros(64), r"int8 \[R, D\] or uint8"),
        (torch.zeros(64, 10, dtype=torch.int8), torch.zeros(64, dtype=torch.int8), "scales are floats"),
    ],
)
def test_rows_and_scales_that_do_not_fit(stored, scales, message):
    with pytest.raises(ValueError, match=message):
        Matrix(stored, scales)


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("options", [{}, {"gated": False, "act": "relu", "bias": True}, {"expert_size": 16, "rank": 3}])
def test_the_reference_computes_with_the_numbers_that_the_matrix_stands_for(to, options):
    weights = quantised(make_weights(64, 128, **options), to)
    assert weights.quantised
    plain = {f"{name}.matrix.scales": None for name in ("up", "down", "router", "gate")}
    for name in ("up", "down", "router", "gate"):
        part = getattr(weights, name)
        if part is not None:
            plain[f"{name}.matrix.rows"] = part.matrix.floats(torch.float32)
    floats = changed(weights, plain)
    assert not floats.quantised
    x = make_x(5, weights)
    for active in (None, make_active(5, weights, "half")):
        assert torch.equal(
            ops.sparse_ffn(x, weights, active, backend="reference"), ops.sparse_ffn(x, floats, active, "reference")
        )


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_quantised_weights_go_through_the_operator(to):
    weights = quantised(make_weights(64, 128, bias=True, rank=3), to)
    assert len(weights.tensors) == len(TENSORS)
    again = unflatten(weights.tensors, 0.5, "relu")
    assert all(one is other for one, other in zip(again.tensors, weights.tensors, strict=True))
    arguments = (make_x(3, weights), list(weights.tensors), weights.router.threshold, weights.act, None, "reference")
    torch.library.opcheck(ops._opaque, arguments)


def test_parts_of_other_shapes_are_refused():
    weights = quantised(make_weights(64, 128), "int4")
    other = quantised(make_weights(32, 128), "int4")
    with pytest.raises(ValueError, match=r"down is \(128, 32\), but beside up \(128, 64\) it is \(128, 64\)"):
        type(weights)(up=weights.up, down=Affine(other.down.matrix), router=weights.router)
