"""``uml-fast doctor [--json]``: what is on in this installation and, where something is off, why.

It runs on a broken installation too: torch and every other package are imported only inside the
checks, and a check that fails becomes a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {
    "tyro": ("tyro", "command line"),
    "safetensors": ("safetensors", "export"),
    "sklearn": ("scikit-learn", "digits and the linear probe"),
    "matplotlib": ("matplotlib", "curves in report.html"),
    "tensorboard": ("tensorboard", "TensorBoard events"),
    "wandb": ("wandb", "Weights & Biases, for --wandb PROJECT"),
    "espeakng_loader": ("espeakng-loader", "synthesised speech of the default recipe"),
    "PIL": ("pillow", "images of your own"),
    "simplejpeg": ("simplejpeg", "JPEG images of your own"),
    "soundfile": ("soundfile", "sounds of your own"),
    "webdataset": ("webdataset", "shards of your own data"),
    "timm": ("timm", "pretrained image encoders"),
    "transformers": ("transformers", "pretrained encoders of text, images and sounds"),
    "tokenizers": ("tokenizers", "texts as token ids"),
    "nvidia.dali": ("nvidia-dali-cuda130", "DALI pipelines"),
}
"""Module -> (distribution on PyPI, what it is for)."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve")
"""Capabilities of x86 and ARM processors that decide which kernels run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    """What was looked at."""
    on: bool
    """Whether it is there and used."""
    detail: str
    """Version or figures; where it is off, the reason and what to do."""


def pip_line(module: str) -> str:
    """The command that installs the package which provides ``module``."""
    root = module.partition(".")[0]
    name, _ = PACKAGES.get(module) or PACKAGES.get(root) or (root.replace("_", "-"), "")
    return f"pip install {name}"


def examine() -> list[Finding]:
    """Every finding, in the order they are printed."""
    checks: dict[str, Callable[[], tuple[bool, str]]] = {
        "python": _python,
        "torch": _torch,
        "cpu": _cpu,
        "bf16 on cpu": _bf16,
        "threads": _threads,
        "cuda device": _cuda_device,
        "native extension": _native,
        "cuda extension": _native_cuda,
        "triton": _triton,
    }
    findings = [_finding(name, check) for name, check in checks.items()]
    return findings + [_package(module) for module in PACKAGES]


def main(argv: list[str] | None = None) -> int:
    """Print the report; returns 0, or 1 where torch is missing, without which nothing runs."""
    parser = argparse.ArgumentParser(prog="uml-fast doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args(argv)
    # A missing extension is logged on first use; here it is a line of the report.
    logger = logging.getLogger("uml_fast")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        findings = examine()
    finally:
        logger.setLevel(level)
    if options.json:
        print(json.dumps({f.name: dataclasses.asdict(f) for f in findings}, indent=2))
    else:
        width = max(len(f.name) for f in findings)
        for f in findings:
            print(f"{'on ' if f.on else 'off'}  {f.name:<{width}}  {f.detail}")
    return 0 if next(f for f in findings if f.name == "torch").on else 1


def _finding(name: str, check: Callable[[], tuple[bool, str]]) -> Finding:
    try:
        return Finding(name, *check())
    except Exception as error:  # a broken part is a finding, not the end of the report
        return Finding(name, False, f"{type(error).__name__}: {error}")


def _python() -> tuple[bool, str]:
    return True, f"{platform.python_version()} on {platform.platform()} ({sys.executable})"


def _torch() -> tuple[bool, str]:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return True, f"{torch.__version__} ({built})"


def _cpu() -> tuple[bool, str]:
    flags, model = _cpuinfo()
    found = [f for f in CPU_FLAGS if f in flags]
    return True, f"{model}, {os.cpu_count()} cores; {' '.join(found) or 'no vector flags known'}"


def _bf16() -> tuple[bool, str]:
    import torch

    from uml_fast.runtime.device import has_bf16

    if has_bf16(torch.device("cpu")):
        return True, "matrix products run in bf16 (precision auto)"
    return False, "this processor multiplies no bf16; precision auto is fp32"


def _threads() -> tuple[bool, str]:
    import torch

    given = os.environ.get("OMP_NUM_THREADS")
    return True, f"torch uses {torch.get_num_threads()}" + (
        f" (OMP_NUM_THREADS={given})" if given else ""
    )


def _cuda_device() -> tuple[bool, str]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return True, ", ".join(names)
    if torch.version.cuda is None:
        return False, "torch is a CPU build"
    return False, "torch sees no NVIDIA GPU or driver"


def _native() -> tuple[bool, str]:
    from uml_fast.runtime import native

    return (True, "loaded") if native.available() else (False, native.reason())


def _native_cuda() -> tuple[bool, str]:
    from uml_fast.runtime import native

    extension = native.cuda_module()
    if extension is None:
        return False, native.cuda_reason()
    return True, f"loaded; it sees {extension.device_count()} CUDA devices"


def _triton() -> tuple[bool, str]:
    import torch

    if importlib.util.find_spec("triton") is None:
        return False, f"not installed; {pip_line('triton')} (Linux)"
    version = importlib.metadata.version("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, f"{version}, interpreted (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return False, f"{version} is installed; its kernels need a CUDA device"
    return True, version


def _package(module: str) -> Finding:
    name, purpose = PACKAGES[module]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return Finding(name, False, f"{purpose}: {pip_line(module)}")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    return Finding(name, True, f"{version} ({purpose}{_how(module)})")


def _how(module: str) -> str:
    """What must be said of a package that uml_fast can import and others cannot."""
    if module not in ("timm", "transformers"):
        return ""
    try:
        from uml_fast.runtime.foreign import lacks_ops

        is_odd = lacks_ops()
    except (ImportError, OSError):  # without torch, which has a line of its own
        return ""
    if not is_odd:
        return ""
    return (
        f"; works in uml_fast, which stands in for the ops of torchvision: that is built for CUDA, "
        f"torch is not, and a plain import of {module} may fail"
    )


def _cpuinfo() -> tuple[set[str], str]:
    """Flags and model name of the first processor; both unknown where Linux does not tell."""
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("flags", "features"):
                flags = set(value.split())
            elif key.strip() == "model name":
                model = value.strip()
    return flags, model


if __name__ == "__main__":
    sys.exit(main())
