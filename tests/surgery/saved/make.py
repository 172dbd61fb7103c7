"""Make the models that ``test_saved_before.py`` loads: one of each kind, saved by the version of lte that runs this.

``python tests/surgery/saved/make.py FOLDER`` writes each with what it computed. They were made once, at 9a456b9, and
stay: a model that was saved then has to compute the same for good. A kind that is new gets a folder of its own.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

import lte
from lte.surgery.convert import install_routers_

IDS = torch.tensor([[5, 9, 3, 14, 20, 2, 7, 11], [8, 4, 23, 6, 17, 12, 19, 10]])
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 24, "max_position_embeddings": 16}


def dense(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(7)
    if family == "opt":
        sizes = {**SIZES, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2}
        model = OPTForCausalLM(OPTConfig(**sizes, activation_function="gelu"))
    else:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **heads, intermediate_size=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def sparse(config: object, family: str = "llama", mode: str = "hard") -> PreTrainedModel:
    model = lte.sparsify_(dense(family), config, data=[{"input_ids": IDS}] * 4)
    for name, parameter in model.named_parameters():
        if "router" in name or "compensation" in name:
            torch.manual_seed(len(name))
            parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
    lte.set_mode_(model, mode)
    return model


def kinds() -> dict[str, PreTrainedModel]:
    half = {"target_sparsity": 0.5}
    return {
        "lte": sparse(lte.LTEConfig(expert_size=4)),
        "lte-soft": sparse(lte.LTEConfig(expert_size=4, tau=0.4, grouping="coactivation"), mode="soft"),
        "lte-compensation": sparse(lte.LTEConfig(expert_size=8, compensation_rank=2, grouping="random")),
        "lte-opt": sparse(lte.LTEConfig(expert_size=4, compensation_rank=2), "opt"),
        "lte-dense-not-grouped": install_routers_(dense(), lte.LTEConfig(expert_size=4)),
        "moefication": sparse(lte.MoEficationConfig(expert_size=4, **half)),
        "deja-vu": sparse(lte.DejaVuConfig(expert_size=4, rank=4, **half)),
        "cats": sparse(lte.CATSConfig(**half)),
        "static-pruning": sparse(lte.StaticPruningConfig(**half)),
        "relufication": sparse(lte.ReLUficationConfig(**half)),
        "topk-moe": sparse(lte.TopKMoEConfig(expert_size=4, **half)),
        "noisy-topk": sparse(lte.NoisyTopKConfig(expert_size=4, **half)),
        "sigma-moe": sparse(lte.SigmaMoEConfig(expert_size=4, **half)),
        "teal": lte.teal_(dense(), lte.TEALConfig(**half), [{"input_ids": IDS}]),
        "wanda": lte.prune_(dense(), lte.WandaConfig(**half), [{"input_ids": IDS}]),
    }


@torch.no_grad()
def main(folder: str) -> None:
    for kind, model in kinds().items():
        if (Path(folder) / kind).exists():
            continue
        model.bfloat16().save_pretrained(Path(folder) / kind)
        for name in ("generation_config.json", *(["modeling_lte.py"] if kind != "lte" else [])):
            (Path(folder) / kind / name).unlink(missing_ok=True)
        read = AutoModelForCausalLM.from_pretrained(Path(folder) / kind, dtype=torch.float32).eval()
        save_file({"logits": read(input_ids=IDS).logits}, Path(folder) / kind / "computed.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
