"""Options that several commands share."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
import tyro
from transformers import PreTrainedModel

from lte.cli.console import err
from lte.inference.optimize import optimize_
from lte.ops.sparse_ffn import BackendName
from lte.surgery.loading import Head, load_model
from lte.training.data import DataConfig, Task, load_dataset_for

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class DataOptions:
    """What to read, and as what."""

    text: tuple[str, ...] = ()
    """Data: .txt, .jsonl, .csv, .tsv (each also .gz), .parquet, .npy of token ids, or a hub id[:name][:split]."""
    task: Task = "language_modelling"
    """What the data is: running text, prompts with completions, or texts with labels."""
    data: DataConfig = field(default_factory=DataConfig)

    def head(self, model_config: Any) -> Head:
        return "classification" if self.task == "classification" else generating_head(model_config)

    def load(self, sources: tuple[str, ...], tokenizer: Any, model_config: Any, data: DataConfig | None = None) -> Any:
        if not sources:
            raise ValueError("no data: give --text FILE (or a hub data set id)")
        data = data or self.data
        text_config = model_config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None) or data.sequence_length
        longest = min(positions, tokenizer.model_max_length)  # RoBERTa has two positions more than it can use
        dataset = load_dataset_for(
            self.task,
            sources,
            tokenizer,
            replace(data, sequence_length=min(longest, data.sequence_length)),
            is_encoder_decoder=bool(model_config.is_encoder_decoder),
            vocab_size=text_config.vocab_size,
        )
        if data.sequence_length > longest:
            err.print(f"sequence_length {data.sequence_length} is beyond the model's {longest} positions: used those")
        return dataset


@dataclass
class DeviceOptions:
    """Where and in what precision."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Dtype = "auto"
    """Of the weights; auto keeps the checkpoint's."""

    def resolve(self) -> tuple[torch.device, torch.dtype | str]:
        if self.device != "auto":
            try:
                device = torch.device(self.device)
                torch.empty(0, device=device)
            except (RuntimeError, AssertionError) as error:
                raise ValueError(f"device {self.device!r} cannot be used here: {str(error).splitlines()[0]}") from None
        else:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return device, self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)


def generating_head(model_config: Any) -> Head:
    return "seq2seq" if model_config.is_encoder_decoder else "causal"


def open_model(name: str, head: Head, device: torch.device, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model on its device, with a word on the terminal while it loads."""
    with err.status("loading the model"):
        return load_model(name, head, dtype).to(device)  # pyright: ignore[reportArgumentType]


def optimize_where_possible_(model: PreTrainedModel, backend: BackendName) -> None:
    """Skip idle experts. With ``auto``, a model that cannot be optimised runs as it is, and says so."""
    try:
        optimize_(model, backend)
    except ValueError as error:
        if backend != "auto":
            raise
        err.print(f"idle experts are computed too: {error}")


Output = Annotated[str, tyro.conf.arg(aliases=("-o",))]
Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
