"""One process of a run of all stages with parameters divided by FSDP2, on the CPU: ``tiny_fsdp.py FOLDER JSON``.

accelerate takes FSDP for GPUs alone and divides data on a CPU. So its state is changed here, and all else is as it is.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny_training import arguments, dense_llama, markov_blocks
from transformers import TrainerCallback

import lte
from lte.data.batches import PackedBlocks
from lte.modules.recording import sparse_layers
from lte.modules.sharding import is_sharded, whole_state
from lte.training.trainer import LTETrainer


class OnCPU(LTETrainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
            self.is_fsdp_enabled = True
            # torch leaves tensors here that wait for their collective, because nothing moves to the CPU
            self.accelerator.get_state_dict = lambda model, **_: whole_state(model, self.args.should_save)


class Gradients(TrainerCallback):
    """Keeps the routers' gradients of each step, before they are clipped."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        norms = []
        for layer in sparse_layers(model).values():
            for parameter in layer.router.parameters():
                gradient = parameter.grad
                gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                norms.append(0.0 if gradient is None else float(gradient.norm()))
        self.seen.append(norms)


def main(folder: str, options: str) -> None:
    torch.set_num_threads(1)
    given, ranks = json.loads(options), int(os.environ.get("WORLD_SIZE", 1))
    tied = given.pop("tied", False)
    method = lte.LTEConfig(expert_size=8, compensation_rank=given.pop("rank", 4), attention_sparsity=0.25)
    gradients = Gradients()
    trainer = OnCPU(
        model=dense_llama(tie_word_embeddings=tied),
        method=method,
        args=arguments(
            folder,
            per_device_train_batch_size=8 // ranks,
            **({"ddp_backend": "gloo"} if ranks > 1 else {}),
            **given,
        ),
        train_dataset=markov_blocks(200),
        data_collator=PackedBlocks.collator,
        callbacks=[gradients],
    )
    trainer.train()
    assert is_sharded(trainer.plain) == bool(given.get("fsdp"))
    trainer.save_model(folder)
    if trainer.args.should_save:
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        Path(folder, "run.json").write_text(json.dumps({"log": log, "gradients": gradients.seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
