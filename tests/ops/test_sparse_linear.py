"""Linear layers that skip small inputs: compiled on a GPU, elsewhere through Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from random_ffn import relative_rms

from lte.ops import sparse_linear as op
from lte.ops.sparse_linear import LinearWeights, reference, sparse_linear, sparse_linears
from lte.ops.triton_linear import Tuning, products

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 9e-3}
SHAPES = [(96, (48,)), (100, (77, 33)), (160, (70, 16, 40))]
CUTS = (0.5, 0.0, 1.2)


def make(d_in, outs, dtype=torch.float32, bias=True):
    """An input, and layers with NaN in each row that must not be read."""
    generator = torch.Generator().manual_seed(d_in)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x, layers = normal(1, d_in), []
    x[:, ::5] = 0
    for d_out, size in zip(outs, CUTS, strict=False):
        cut = torch.tensor(size, device=DEVICE, dtype=dtype)
        rows = normal(d_in, d_out).masked_fill((x.abs() <= cut).T, torch.nan)
        layers.append(LinearWeights(rows, normal(d_out) if bias else None, cut))
    return x, layers


def expected(x, layer):
    bias = None if layer.bias_O is None else layer.bias_O.double()
    return reference(x.double(), LinearWeights(layer.rows_IO.double().nan_to_num(), bias, layer.cut.double()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_parity_and_the_same_bits_again(dtype, shape):
    x, layers = make(*shape, dtype)
    found = sparse_linears(x, layers, "triton")
    again = sparse_linears(x, layers, "triton")
    for one, other, layer in zip(found, again, layers, strict=True):
        assert one.dtype == dtype
        assert relative_rms(one, expected(x, layer)) < TOLERANCE[dtype]
        assert torch.equal(one, other)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_parts_that_do_not_divide_the_inputs(parts):
    x, layers = make(300, (70, 16), bias=False)
    tuning = Tuning(outputs=16, warps=4, parts=parts, lots=2)
    y = products(x, [one.rows_IO for one in layers], [one.cut for one in layers], tuning)
    want = torch.cat([expected(x, one) for one in layers], -1)
    assert relative_rms(y, want) < TOLERANCE[torch.float32]


def test_without_a_cut_only_zeros_are_skipped():
    x, (layer,) = make(96, (48,))
    x[x.abs() <= layer.cut] = 0
    found = sparse_linear(x, layer.rows_IO, layer.bias_O, backend="triton")
    assert relative_rms(found, expected(x, layer)) < TOLERANCE[torch.float32]


def test_an_input_that_is_not_a_number_is_not_hidden():
    x, layers = make(96, (48,))
    x[0, 7] = torch.nan
    assert sparse_linears(x, layers, "triton")[0][0].isnan().all()


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)], ids=str)
def test_shapes_of_x(shape):
    _, layers = make(96, (48, 16))
    layers = [LinearWeights(one.rows_IO.nan_to_num(), one.bias_O, one.cut) for one in layers]
    x = torch.randn(shape, device=DEVICE)
    for found, want in zip(sparse_linears(x, layers, "triton"), sparse_linears(x, layers, "reference"), strict=True):
        assert found.shape == want.shape
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_auto_takes_the_kernel_on_a_gpu_and_the_reference_elsewhere():
    x, layers = make(96, (48,))
    assert op.choose(x, layers, "auto") == ("triton" if ON_GPU else "reference")
    assert op.choose(x.repeat(2, 1), layers, "auto") == "reference"  # two tokens
    found = sparse_linear(x, layers[0].rows_IO.nan_to_num(), layers[0].bias_O, layers[0].cut)
    assert relative_rms(found, expected(x, layers[0])) < TOLERANCE[torch.float32]


def test_gradients_are_the_reference_s():
    x, layers = make(96, (48,))
    rows = layers[0].rows_IO.nan_to_num().requires_grad_()
    with torch.enable_grad():
        sparse_linear(x, rows, None, layers[0].cut).sum().backward()
    idle = (x.abs() <= layers[0].cut).all(0)
    assert idle.any()
    assert (rows.grad[idle] == 0).all()
    assert (rows.grad[~idle] != 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "one of auto, reference, triton, cpu"),
        ({"backend": "cpu"}, "no kernel for a CPU"),
        ({"x": torch.zeros(2, 96)}, "one token"),
        ({"x": torch.zeros(0, 96)}, "one token"),
        ({"x": torch.zeros(1, 90)}, r"takes \[..., 96\]"),
        ({"x": torch.zeros(1, 96, dtype=torch.float16)}, "convert one of them"),
        ({"rows_IO": torch.zeros(48, 96).t()}, "not contiguous"),
        ({"bias_O": torch.zeros(96)}, "bias is"),
        ({"cut": torch.zeros(2)}, "one number"),
    ],
)
def test_refusals_say_why(change, message):
    given = {"x": torch.zeros(1, 96), "rows_IO": torch.zeros(96, 48), "backend": "triton", **change}
    moved = {name: one.to(DEVICE) if isinstance(one, torch.Tensor) else one for name, one in given.items()}
    with pytest.raises(ValueError, match=message):
        sparse_linear(**moved)


def test_a_gradient_is_refused_by_name():
    x, rows = torch.zeros(1, 96, device=DEVICE), torch.zeros(96, 48, device=DEVICE, requires_grad=True)
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        sparse_linear(x, rows, backend="triton")


def test_the_op_is_what_a_compiler_expects():
    x, layers = make(96, (48, 16))
    rows, cuts = [one.rows_IO.nan_to_num() for one in layers], [layers[0].cut, None]
    torch.library.opcheck(op._products, (x, rows, cuts))


def test_compiles_without_graph_breaks():
    x, layers = make(96, (48, 16))
    compiled = torch.compile(lambda x: sparse_linears(x, layers, "triton"), fullgraph=True, backend="eager")
    for found, want in zip(compiled(x), sparse_linears(x, layers, "triton"), strict=True):
        assert torch.equal(found, want)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_layers_and_a_graph(dtype):
    for shape in ((4096, (4096, 1024, 1024)), (11008, (4096,)), (576, (576, 192, 192))):
        x, layers = make(*shape, dtype)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            sparse_linears(x, layers)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = sparse_linears(x, layers)
        graph.replay()
        for one, layer in zip(found, layers, strict=True):
            assert relative_rms(one, expected(x, layer)) < TOLERANCE[dtype]
