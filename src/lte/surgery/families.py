"""The table of model families: where each Hugging Face architecture keeps its FFN. One row a ``model_type``."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Where a family's FFN lives. Paths are relative to the layer; all are matched exactly, never by suffix.

    Attributes:
        layer: class name of the module that holds one FFN, e.g. ``"LlamaDecoderLayer"``.
        up, down: the projections into and out of the neurons.
        gate: the gating projection, in a gated FFN. The activation acts on it.
        act: the activation module.
        site: the module that is exactly one FFN, to be replaced by a ``SparseFFN``. None where the
            model spreads its FFN over the layer (OPT, BERT): then only the activation is replaced.
        fused_gate_up: ``up`` holds the gate in its first half and up in its second.
        hidden_dropout, output_dropout: dropout before and after the down projection, inside ``site``.
    """

    layer: str
    up: str
    down: str
    act: str
    site: str | None = None
    gate: str | None = None
    fused_gate_up: bool = False
    hidden_dropout: str | None = None
    output_dropout: str | None = None

    def __post_init__(self) -> None:
        if self.site is not None:
            inside = (self.up, self.down, self.act, self.gate, self.hidden_dropout, self.output_dropout)
            outside = [p for p in inside if p and p.rpartition(".")[0] != self.site]
            if outside:
                raise ValueError(
                    f"{', '.join(outside)} must be a direct child of site {self.site!r}, e.g. '{self.site}.up_proj'"
                )

    def fits(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is of this family and has every path the row names."""
        return type(layer).__name__ == self.layer and all(
            _has(layer, path) for path in (self.up, self.down, self.act, self.gate) if path
        )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _llama_like(layer: str) -> Family:
    return Family(layer, site="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", act="mlp.act_fn")


def _bert_like(layer: str) -> Family:
    return Family(layer, up="intermediate.dense", act="intermediate.intermediate_act_fn", down="output.dense")


def _t5_like(layer: str) -> tuple[Family, ...]:
    ffn = "DenseReluDense"
    shared = {"site": ffn, "down": f"{ffn}.wo", "act": f"{ffn}.act", "hidden_dropout": f"{ffn}.dropout"}
    return (
        Family(layer, gate=f"{ffn}.wi_0", up=f"{ffn}.wi_1", **shared),
        Family(layer, up=f"{ffn}.wi", **shared),
    )


_FAMILIES: dict[str, tuple[Family, ...]] = {
    "llama": (_llama_like("LlamaDecoderLayer"),),
    "mistral": (_llama_like("MistralDecoderLayer"),),
    "qwen2": (_llama_like("Qwen2DecoderLayer"),),
    "qwen3": (_llama_like("Qwen3DecoderLayer"),),
    "gemma": (_llama_like("GemmaDecoderLayer"),),
    "gemma2": (_llama_like("Gemma2DecoderLayer"),),
    "gemma3_text": (_llama_like("Gemma3DecoderLayer"),),
    "phi3": (
        Family(
            "Phi3DecoderLayer",
            site="mlp",
            up="mlp.gate_up_proj",
            fused_gate_up=True,
            down="mlp.down_proj",
            act="mlp.activation_fn",
        ),
    ),
    "phi": (Family("PhiDecoderLayer", site="mlp", up="mlp.fc1", down="mlp.fc2", act="mlp.activation_fn"),),
    "gpt_neox": (Family("GPTNeoXLayer", site="mlp", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", act="mlp.act"),),
    "gpt2": (
        Family("GPT2Block", site="mlp", up="mlp.c_fc", down="mlp.c_proj", act="mlp.act", output_dropout="mlp.dropout"),
    ),
    "opt": (Family("OPTDecoderLayer", up="fc1", act="activation_fn", down="fc2"),),
    "bert": (_bert_like("BertLayer"),),
    "roberta": (_bert_like("RobertaLayer"),),
    "t5": _t5_like("T5LayerFF"),
}


def family_rows(model_type: str) -> tuple[Family, ...]:
    """The rows of a model type; a layer takes the first that fits (T5 comes gated and plain).

    Raises:
        ValueError: the family is unknown; the message says how to register it.
    """
    rows = _FAMILIES.get(model_type)
    if rows is None:
        raise ValueError(
            f"unknown model family {model_type!r}. Known: {', '.join(sorted(_FAMILIES))}. Register it with "
            f'lte.register_family({model_type!r}, lte.Family(layer="ItsDecoderLayer", site="mlp", '
            'gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", act="mlp.act_fn"))'
        )
    return rows


def register_family(model_type: str, *rows: Family, replace: bool = False) -> None:
    """Add a family to the table, by its Hugging Face ``model_type``.

    Args:
        model_type: as in the model's ``config.json``.
        rows: where its FFN lives; several when the model type comes in several forms.
        replace: allow overwriting a row that exists.

    Raises:
        ValueError: no row given, or the family exists and ``replace`` is not set.
    """
    if not rows:
        raise ValueError(f"register_family({model_type!r}) needs at least one lte.Family row")
    if model_type in _FAMILIES and not replace:
        raise ValueError(f"family {model_type!r} is in the table already: pass replace=True to overwrite it")
    _FAMILIES[model_type] = rows


def known_families() -> list[str]:
    return sorted(_FAMILIES)
