"""The environment of a measurement: the device, the versions of libraries, and the commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def environment(device: torch.device) -> dict[str, str]:
    """Return the environment for a row of results."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"device": where, **{name: version(name) for name in ("lte", "torch", "transformers")}}


def device_name(device: torch.device) -> str:
    """Return the name of a device; for a CPU with its model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip() if names else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Return the versions of everything that takes part in a measurement of time."""
    found = {
        "lte": _installed("lte") or "not installed",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found | {
        name: found_version for name in ("transformers", "triton", "numba") if (found_version := _installed(name))
    }


def commit() -> str | None:
    """Return the commit of this code's checkout, with + if it was changed; None outside a checkout."""
    folder = Path(__file__).parents[1]
    try:
        one = ["git", "-C", str(folder)]
        tracked = [
            *one,
            "ls-files",
            "--error-unmatch",
            "__init__.py",
        ]  # a checkout may only contain the environment in which lte is installed
        subprocess.run(tracked, capture_output=True, check=True)
        head = subprocess.run([*one, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*one, "status", "--porcelain", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
