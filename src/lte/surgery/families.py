"""The table of model families: where each Hugging Face architecture has its FFN. One row for each ``model_type``."""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """Where a family has its FFN. Paths are relative to the layer and must match exactly.

    Attributes:
        layer: class name of the module that holds one FFN, e.g. ``"LlamaDecoderLayer"``.
        up, down: the projections into and out of the neurons.
        gate: the gating projection, in a gated FFN. The activation acts on it.
        act: the activation module.
        site: the module that is exactly one FFN, which a ``SparseFFN`` replaces. None if no module is exactly the FFN
            (OPT, BERT): then only the activation is replaced.
        fused_gate_up: the first half of ``up`` is the gate, and the second half is up.
        hidden_dropout, output_dropout: dropout before and after the down projection, inside ``site``:
            a module, or the probability as a number.
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
        """Return whether ``layer`` is of this family and has every path of the row."""
        return type(layer).__name__.removeprefix("FSDP") == self.layer and all(
            _has(layer, path)
            for path in (self.up, self.down, self.act, self.gate, self.hidden_dropout, self.output_dropout)
            if path
        )


def _has(layer: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    try:
        return hasattr(layer.get_submodule(parent), name)
    except AttributeError:
        return False


def _llama_like(layer: str, output_dropout: str | None = None) -> tuple[Family, ...]:
    gate, up, down, act = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn"
    return (Family(layer, site="mlp", gate=gate, up=up, down=down, act=act, output_dropout=output_dropout),)


def _plain(layer: str, up: str, down: str, act: str = "act", site: str = "mlp", dropout: str | None = None) -> Family:
    """Return the row of an FFN without a gate that is one module."""
    up, down, act = f"{site}.{up}", f"{site}.{down}", f"{site}.{act}"
    return Family(layer, site=site, up=up, down=down, act=act, output_dropout=dropout and f"{site}.{dropout}")


def _fused(layer: str, up: str = "gate_up_proj", down: str = "down_proj", act: str = "activation_fn") -> Family:
    """Return the row of an FFN with gate and up in one projection, in that order."""
    return Family(layer, site="mlp", up=f"mlp.{up}", fused_gate_up=True, down=f"mlp.{down}", act=f"mlp.{act}")


def _bert_like(layer: str) -> Family:
    return Family(layer, up="intermediate.dense", act="intermediate.intermediate_act_fn", down="output.dense")


def _bart_like(*layers: str) -> tuple[Family, ...]:
    return tuple(Family(layer, up="fc1", act="activation_fn", down="fc2") for layer in layers)


def _t5_like(layer: str) -> tuple[Family, ...]:
    ffn = "DenseReluDense"
    act, down, dropout = f"{ffn}.act", f"{ffn}.wo", f"{ffn}.dropout"
    return (
        Family(layer, site=ffn, gate=f"{ffn}.wi_0", up=f"{ffn}.wi_1", act=act, down=down, hidden_dropout=dropout),
        Family(layer, site=ffn, up=f"{ffn}.wi", act=act, down=down, hidden_dropout=dropout),
    )


_FAMILIES: dict[str, tuple[Family, ...]] = {
    # gated, three projections
    "llama": _llama_like("LlamaDecoderLayer"),
    "mistral": _llama_like("MistralDecoderLayer"),
    "ministral": _llama_like("MinistralDecoderLayer"),
    "ministral3": _llama_like("Ministral3DecoderLayer"),
    "qwen2": _llama_like("Qwen2DecoderLayer"),
    "qwen3": _llama_like("Qwen3DecoderLayer"),
    "gemma": _llama_like("GemmaDecoderLayer"),
    "gemma2": _llama_like("Gemma2DecoderLayer"),
    "gemma3_text": _llama_like("Gemma3DecoderLayer"),
    "olmo": _llama_like("OlmoDecoderLayer"),
    "olmo2": _llama_like("Olmo2DecoderLayer"),
    "olmo3": _llama_like("Olmo3DecoderLayer"),
    "granite": _llama_like("GraniteDecoderLayer"),
    "smollm3": _llama_like("SmolLM3DecoderLayer"),
    "stablelm": _llama_like("StableLmDecoderLayer"),
    "cohere": _llama_like("CohereDecoderLayer"),
    "cohere2": _llama_like("Cohere2DecoderLayer"),
    "helium": _llama_like("HeliumDecoderLayer"),
    "exaone4": _llama_like("Exaone4DecoderLayer"),
    "ernie4_5": _llama_like("Ernie4_5DecoderLayer"),
    "seed_oss": _llama_like("SeedOssDecoderLayer", output_dropout="mlp.residual_dropout"),
    # gated, gate and up in one projection
    "phi3": (_fused("Phi3DecoderLayer"),),
    "glm": (_fused("GlmDecoderLayer"),),
    "glm4": (_fused("Glm4DecoderLayer"),),
    "modernbert": (
        Family(
            "ModernBertEncoderLayer",
            site="mlp",
            up="mlp.Wi",
            fused_gate_up=True,
            down="mlp.Wo",
            act="mlp.act",
            hidden_dropout="mlp.drop",
        ),
    ),
    # without a gate
    "gpt2": (_plain("GPT2Block", "c_fc", "c_proj", dropout="dropout"),),
    "gpt_bigcode": (_plain("GPTBigCodeBlock", "c_fc", "c_proj", dropout="dropout"),),
    "gpt_neo": (_plain("GPTNeoBlock", "c_fc", "c_proj", dropout="dropout"),),
    "starcoder2": (_plain("Starcoder2DecoderLayer", "c_fc", "c_proj", dropout="residual_dropout"),),
    "gptj": (_plain("GPTJBlock", "fc_in", "fc_out", dropout="dropout"),),
    "codegen": (_plain("CodeGenBlock", "fc_in", "fc_out", dropout="dropout"),),
    "gpt_neox": (_plain("GPTNeoXLayer", "dense_h_to_4h", "dense_4h_to_h"),),
    "falcon": (_plain("FalconDecoderLayer", "dense_h_to_4h", "dense_4h_to_h"),),
    "persimmon": (_plain("PersimmonDecoderLayer", "dense_h_to_4h", "dense_4h_to_h"),),
    "phi": (_plain("PhiDecoderLayer", "fc1", "fc2", act="activation_fn"),),
    "nanochat": (_plain("NanoChatDecoderLayer", "fc1", "fc2", act="activation_fn"),),
    "arcee": (_plain("ArceeDecoderLayer", "up_proj", "down_proj", act="act_fn"),),
    "nemotron": (_plain("NemotronDecoderLayer", "up_proj", "down_proj", act="act_fn"),),
    "distilbert": (_plain("TransformerBlock", "lin1", "lin2", act="activation", site="ffn", dropout="dropout"),),
    # no module that is exactly the FFN: the activation is replaced
    "opt": _bart_like("OPTDecoderLayer"),
    "biogpt": _bart_like("BioGptDecoderLayer"),
    "bloom": (Family("BloomBlock", up="mlp.dense_h_to_4h", act="mlp.gelu_impl", down="mlp.dense_4h_to_h"),),
    "mpt": (Family("MptBlock", up="ffn.up_proj", act="ffn.act", down="ffn.down_proj"),),
    "bert": (_bert_like("BertLayer"),),
    "roberta": (_bert_like("RobertaLayer"),),
    "xlm-roberta": (_bert_like("XLMRobertaLayer"),),
    "camembert": (_bert_like("CamembertLayer"),),
    "electra": (_bert_like("ElectraLayer"),),
    "deberta-v2": (_bert_like("DebertaV2Layer"),),
    # encoder-decoder
    "t5": _t5_like("T5LayerFF"),
    "mt5": _t5_like("MT5LayerFF"),
    "bart": _bart_like("BartEncoderLayer", "BartDecoderLayer"),
    "mbart": _bart_like("MBartEncoderLayer", "MBartDecoderLayer"),
    "pegasus": _bart_like("PegasusEncoderLayer", "PegasusDecoderLayer"),
    "marian": _bart_like("MarianEncoderLayer", "MarianDecoderLayer"),
}


def family_rows(model_type: str) -> tuple[Family, ...]:
    """Return the rows of a model type. A layer takes the first row that fits (T5 has two forms).

    Raises:
        ValueError: the family is unknown. The message says how to register it.
    """
    rows = _FAMILIES.get(model_type)
    if rows is None:
        raise ValueError(
            f"unknown model family {model_type!r}. Known: {', '.join(known_families())}. Register it with "
            f'lte.register_family({model_type!r}, lte.Family(layer="ItsDecoderLayer", site="mlp", '
            'gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", act="mlp.act_fn"))'
        )
    return rows


def check_family(config: PretrainedConfig) -> None:
    """Raise ValueError, with what to do, unless the table has a row for the model's family."""
    if config.model_type not in _FAMILIES and (reason := _never(config)):
        raise ValueError(reason)
    family_rows(config.model_type)


def _never(config: PretrainedConfig) -> str | None:
    """Return why no row can help to convert a config's model, with a cure; None if a row can."""
    kind, text = config.model_type, config.get_text_config()
    if text is not config and text.model_type != kind:
        known = f" (of type {text.model_type}, say)" if text.model_type in _FAMILIES else ""
        return f"{kind} reads more than text: give a checkpoint of its language model alone{known}"
    experts = next((name for name in _OF_EXPERTS if (getattr(config, name, None) or 0) > 1), None)
    if experts or "moe" in kind:
        return (
            f"{kind} is a mixture of experts already: only a dense model can be converted. Give one, or run this "
            "model as it is"
        )
    if kind == "albert":
        return "albert shares one FFN between all layers: give a model whose layers have FFNs of their own, e.g. bert"
    return None


_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def register_family(model_type: str, *rows: Family, replace: bool = False) -> None:
    """Add a family to the table, by its Hugging Face ``model_type``.

    Args:
        model_type: as in the model's ``config.json``.
        rows: where its FFN is. Give several rows if the model type has several forms.
        replace: whether an existing row may be overwritten.

    Raises:
        ValueError: no row is given, or the family exists and ``replace`` is false.
    """
    if not rows:
        raise ValueError(f"register_family({model_type!r}) needs at least one lte.Family row")
    if model_type in _FAMILIES and not replace:
        raise ValueError(f"family {model_type!r} is in the table already: pass replace=True to overwrite it")
    _FAMILIES[model_type] = rows


def known_families() -> list[str]:
    return sorted(_FAMILIES)
