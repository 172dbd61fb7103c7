"""Sites: the places of a model where a conversion works. They are its FFNs, or each linear layer of its blocks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lte.modules.router import Reads
from lte.modules.sparse_ffn import Selecting
from lte.surgery.families import Family, check_family, family_rows
from lte.surgery.linears import Linear, check_plain, reorder_, rows_of, sizes_of


@dataclass(frozen=True)
class Site:
    """A place of a model whose projections are divided into parts. A token leaves some of these parts out.

    Attributes:
        name: its name in the model.
    """

    name: str

    def projections(self) -> dict[str, nn.Module]:
        """Return the linear layers of the site, by their names in the model."""
        raise NotImplementedError

    @property
    def num_weights(self) -> int:
        """The number of weights of all matrices, without biases."""
        sizes = (sizes_of(linear) for linear in self.projections().values())
        return sum(d_in * d_out for d_in, d_out in sizes)

    def check_projections(self) -> None:
        """Raise ValueError unless the projections are plain linear layers, neither wrapped nor quantised."""
        for where, linear in self.projections().items():
            check_plain(where, linear)


@dataclass(frozen=True)
class LinearSite(Site):
    """One linear layer of a block.

    Attributes:
        linear: the layer.
        in_ffn: whether the layer is a projection of an FFN, not of attention.
    """

    linear: Linear
    in_ffn: bool

    def projections(self) -> dict[str, nn.Module]:
        return {self.name: self.linear}


@dataclass(frozen=True)
class FFNSite(Site):
    """One FFN. Its projections are divided into experts.

    Attributes:
        layer: the module that holds the FFN. ``name`` is the name of this module.
        family: the row that describes the FFN.
    """

    layer: nn.Module
    family: Family

    def module(self, path: str) -> nn.Module:
        return self.layer.get_submodule(path)

    @property
    def place(self) -> str:
        """The path of the module that a conversion replaces: the FFN, or its activation if the FFN is no module."""
        return self.family.site or self.family.act

    @property
    def installed(self) -> Selecting:
        """The sparse module in this place. The model must be sparse."""
        module = self.module(self.place)
        assert isinstance(module, Selecting)
        return module

    @property
    def first(self) -> nn.Module:
        """The projection whose rows are the neurons' features: the gate in a gated FFN."""
        return self.module(self.family.gate or self.family.up)

    @property
    def down(self) -> nn.Module:
        return self.module(self.family.down)

    @property
    def d_ff(self) -> int:
        return sizes_of(self.down)[0]

    @property
    def d_model(self) -> int:
        return sizes_of(self.first)[0]

    @property
    def gated(self) -> bool:
        return self.family.gate is not None or self.family.fused_gate_up

    def weights_before(self, reads: Reads) -> int:
        """Return the number of weights that compute a router's argument, for all neurons."""
        if reads == "input":
            return 0
        return self.d_model * self.d_ff * (2 if reads == "neurons" and self.gated else 1)

    def projections(self) -> dict[str, nn.Module]:
        return {f"{self.name}.{path}": self.module(path) for path in self.paths}

    def modules(self) -> list[str]:
        """Return the names of the modules that make up the FFN: one module, or activation and projections."""
        family = self.family
        return [f"{self.name}.{path}" for path in ([family.site] if family.site else [family.act, *self.paths])]

    @property
    def paths(self) -> list[str]:
        """The paths of the projections: gate if there is one, up, down."""
        return [path for path in (self.family.gate, self.family.up, self.family.down) if path]

    def check(self) -> None:
        """Raise ValueError unless the FFN is as its family's row says and its weights can be reordered.

        In addition to :meth:`check_projections`, sizes must match, and the row must name all parts.
        """
        family = self.family
        self.check_projections()
        widths = {path: sizes_of(self.module(path))[1] for path in self.paths[:-1]}
        expected = {path: self.d_ff * (2 if family.fused_gate_up else 1) for path in widths}
        if widths != expected:
            raise ValueError(f"{self.name} has a down projection of {self.d_ff} neurons, but widths {widths}")
        if family.site is None:
            place, named = self.module(family.act), set()
        else:
            roles = (family.act, family.hidden_dropout, family.output_dropout, *self.paths)
            place, named = self.module(family.site), {path.rpartition(".")[2] for path in roles if path}
        unnamed = {name for name, _ in place.named_parameters() if name.partition(".")[0] not in named}
        unnamed |= {name for name, child in place.named_children() if name not in named and not _is_nothing(child)}
        if unnamed:
            raise ValueError(
                f"{self.name}: the row of {family.layer} names no role for {', '.join(sorted(unnamed))}, "
                "so converting would change what the model computes"
            )

    def feature_rows(self) -> Tensor:
        """Return ``[F, D]``: a row for each neuron, from the first FFN weight (of a fused one, the gate's half)."""
        return rows_of(self.first)[: self.d_ff]

    def down_rows(self) -> Tensor:
        """Return ``[F, D]``: the output of each neuron with value 1."""
        return rows_of(self.down).T

    @torch.no_grad()
    def permute_neurons(self, order_F: Tensor) -> None:
        """Reorder the neurons in every projection. The FFN computes the same function."""
        family = self.family
        up_order = torch.cat([order_F, order_F + self.d_ff]) if family.fused_gate_up else order_F
        if family.gate:
            reorder_(self.module(family.gate), order_F, "out")
        reorder_(self.module(family.up), up_order, "out")
        reorder_(self.down, order_F, "in")


def find_sites(model: nn.Module, model_type: str) -> list[FFNSite]:
    """Return the FFNs of a dense model, in the order of its layers.

    Raises:
        ValueError: the family is unknown, or its FFNs are not where its row says.
    """
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig) and config.model_type == model_type:
        check_family(config)
    rows = family_rows(model_type)
    sites = list(_matching(model, rows))
    if not sites:
        raise ValueError(
            f"no FFN found in {type(model).__name__}: no layer of class "
            f"{' or '.join(sorted({row.layer for row in rows}))} has {rows[0].up}, {rows[0].down} and {rows[0].act}; "
            f"correct the row with lte.register_family({model_type!r}, ..., replace=True)"
        )
    return sites


def linear_sites(model: nn.Module, model_type: str) -> list[LinearSite]:
    """Return every linear layer of the blocks with an FFN: of attention and FFN, without head and embedding.

    Raises:
        ValueError: as :func:`find_sites`.
    """
    ffns = find_sites(model, model_type)
    blocks = tuple({f"{block_of(site.name)}.": None for site in ffns})
    of_ffns = {name for site in ffns for name in site.projections()}
    return [
        LinearSite(name, module, name in of_ffns)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith(blocks)
    ]


def check_linears(model: nn.Module, model_type: str) -> None:
    """Raise ValueError unless all linear layers of the blocks are plain (:meth:`Site.check_projections`)."""
    for site in (
        *find_sites(model, model_type),
        *linear_sites(model, model_type),
    ):  # FFNs name layers that are not plain
        site.check_projections()


def block_of(name: str) -> str:
    """Return the name up to the first number: ``model.layers.3`` of ``model.layers.3.mlp``."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _matching(model: nn.Module, rows: tuple[Family, ...]) -> Iterator[FFNSite]:
    for name, module in model.named_modules():
        row = next((row for row in rows if row.fits(module)), None)
        if row is not None:
            yield FFNSite(name, module, row)


def _is_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)
