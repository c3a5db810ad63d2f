"""Sampling by a vLLM engine that lives in the trainer's process."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from paced_fast.config import stream_seed
from paced_fast.data.records import Completion
from paced_fast.errors import InputError, TrainingError
from paced_fast.generation import vllm_engine
from paced_fast.generation.interface import Sampling

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 30.0


class Sync(Protocol):
    """How the engine learns of an update; `weight_sync` has the two ways."""

    mode: str

    def after_update(self) -> dict[str, float]:
        """Make the engine see the new weights; figures for the metrics record."""
        ...


class VLLMGenerator:
    """vLLM in the trainer's process. Its weights are shared or pushed by what `attach` is given.

    Every sample has its own seed, so what it draws does not depend on its group or on the order of requests. The
    samples of a prompt are requests of their own that read the prompt's keys and values from the prefix cache.
    """

    def __init__(self, settings: vllm_engine.EngineSettings, *, stop_ids: Sequence[int]) -> None:
        """Start the engine, which takes 10 to 60 s. Raises InputError when it does not start, naming the knob."""
        self.settings, self.stop_ids = settings, list(stop_ids)
        self.can_sleep = settings.device == "cuda"
        self.sync: Sync | None = None
        self.calls = 0
        self.progress: Callable[[], object] = lambda: None
        self._buffers: dict[str, Tensor] = {}
        started = time.perf_counter()
        try:
            self.engine = vllm_engine.start(settings)
            self.tensor_parallel_size = int(self.engine.vllm_config.parallel_config.tensor_parallel_size)
            # A kernel that does not know this model fails at its first token: now, not after the first evaluation.
            probe = Sampling(samples=1, max_completion_tokens=1, temperature=0.0)
            self._run([(0,)], [self._options(probe, probe.seed)])
        except vllm_engine.FAILURES as error:
            raise InputError(vllm_engine.start_failure(error, settings)) from error
        logger.info("vllm: ready after %.0f s", time.perf_counter() - started)

    def attach(self, sync: Sync) -> None:
        """Use `sync` after every update."""
        self.sync = sync

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        *,
        first: int = 0,
        keep_cache: bool = False,
    ) -> list[Completion]:
        """See `Generator.generate`. With `keep_cache`, for a check, the prefix cache stays as earlier calls left it.

        Raises InputError for a prompt that does not fit, TrainingError when the engine fails midway.
        """
        for prompt in prompts:
            if len(prompt) + sampling.max_completion_tokens > self.settings.max_tokens:
                raise InputError(
                    f"a prompt of {len(prompt)} tokens and a completion of {sampling.max_completion_tokens} are longer "
                    f"than the engine's {self.settings.max_tokens}: lower --generation.max-completion-tokens or "
                    "--data.max-prompt-tokens"
                )
        if not keep_cache:
            # What earlier calls left in the prefix cache would make a call depend on them, after a resume above all.
            self.reset_prefix_cache()
        places, each = range(first, first + len(prompts)), range(sampling.samples)
        seeds = [stream_seed(sampling.seed, i, f"sample/{j}") for i in places for j in each]
        options = [self._options(sampling, seed) for seed in seeds]
        outputs = self._answer([prompt for prompt in prompts for _ in each], options)
        return [self._completion(output.outputs[0]) for output in outputs]

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Log-probs of every token but the first, at temperature 1; the prefix cache has no part in it."""
        outputs = self._answer(sequences, [vllm_engine.scoring()] * len(sequences))
        return [
            [float(output.prompt_logprobs[t][ids[t]].logprob) for t in range(1, len(ids))]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def before_training(self) -> None:
        """See `Generator.before_training`: on a GPU the keys and values go, and the weights at sleep levels 1 and 2."""
        if not self.can_sleep:
            return
        vllm_engine.settle(self.engine)
        level = self.settings.sleep_level
        if level == 2:  # vLLM restores parameters by loading them; what is not a parameter would stay lost
            self._buffers = self._of_model(
                lambda model: {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers()}
            )
        self.engine.sleep(level)
        if level == 0:
            self.engine.release_kv_cache_memory()

    def after_update(self) -> dict[str, float]:
        """See `Generator.after_update`: wake, synchronise, and forget every key and value of the old weights."""
        if self.can_sleep and self.settings.sleep_level > 0:
            with self._named("taking its weights back"):
                self.engine.wake_up(["weights"])
                self._of_model(self._restore_buffers)
        figures = self.sync.after_update() if self.sync is not None else {}
        if self.can_sleep:
            # What torch keeps of freed gradients is memory that the engine, which has a pool of its own, lacks.
            torch.cuda.empty_cache()
            with self._named("taking its key-value cache back"):
                self.engine.wake_up(["kv_cache"])
                self.engine.wake_up(["scheduling"])
        self.reset_prefix_cache()
        return figures

    def close(self) -> None:
        """See `Generator.close`. An engine that joined the trainer's process group ends it too."""
        self.engine.engine_core.shutdown()

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values. vLLM refuses while a request lives, so the refusal is an error here."""
        with self._named("emptying its prefix cache"):
            vllm_engine.settle(self.engine)
            done = self.engine.reset_prefix_cache()
        if not done:
            raise TrainingError("vllm kept its prefix cache, so it would sample from old weights: update vllm")

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """A failure of the engine between samplings as one line that says what it was doing and which knob helps."""
        try:
            yield
        except vllm_engine.FAILURES as error:
            raise TrainingError(
                f"vllm failed at {what} ({vllm_engine.first_line(error)}): --resume auto continues from the last "
                "checkpoint; where memory ran out, lower --weight-sync.kv-cache-gib or --optimizer.micro-batch-tokens"
            ) from error

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The engine's own parameters by name, tied ones once."""
        return self._of_model(lambda model: dict(model.named_parameters()))

    def reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy weights in the Hugging Face layout into the engine's, packed or fused as it keeps them."""
        with self._named("loading the pushed weights"):
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _of_model(self, function: Any) -> Any:
        return self.engine.apply_model(function)[0]

    def _restore_buffers(self, model: torch.nn.Module) -> None:
        for name, buffer in model.named_buffers():
            if name in self._buffers:
                buffer.data.copy_(self._buffers[name])

    def _options(self, sampling: Sampling, seed: int) -> Any:
        return vllm_engine.sampling(
            self.stop_ids,
            max_tokens=sampling.max_completion_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
        )

    def _answer(self, prompts: Sequence[tuple[int, ...]], options: Sequence[Any]) -> list[Any]:
        """As `_run`; a failure becomes one line, and what was under way is dropped."""
        try:
            return self._run(prompts, options)
        except vllm_engine.FAILURES as error:
            with contextlib.suppress(*vllm_engine.FAILURES):  # an engine past that too is reported by what broke it
                self.engine.abort_request([f"{self.calls}-{i}" for i in range(len(prompts))])
            raise TrainingError(
                f"vllm failed while sampling ({vllm_engine.first_line(error)}): nothing of this step is kept; "
                "--resume auto continues from the last checkpoint, and fewer --generation.max-batch-sequences need "
                "less memory"
            ) from error

    def _completion(self, output: Any) -> Completion:
        flat, ids = output.logprobs, list(output.token_ids)
        return Completion(
            token_ids=ids,
            logprobs=[float(flat.logprobs[start]) for start in flat.start_indices],
            stopped=output.finish_reason == "stop" or (bool(ids) and ids[-1] in self.stop_ids),
        )

    def _run(self, prompts: Sequence[tuple[int, ...]], options: Sequence[Any]) -> list[Any]:
        """The finished request of every prompt, in order."""
        self.calls += 1
        found: dict[int, Any] = {}
        for i, (prompt, asked) in enumerate(zip(prompts, options, strict=True)):
            self.engine.add_request(f"{self.calls}-{i}", vllm_engine.rendered(self.engine, prompt), asked)
        started = told = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.progress()
            for output in self.engine.step():
                if output.finished:
                    found[int(output.request_id.split("-")[1])] = output
            now = time.perf_counter()
            if now - told > _PROGRESS_SECONDS:
                told = now
                logger.info("vllm: %d of %d completions after %.0f s", len(found), len(prompts), now - started)
        return [found[i] for i in range(len(prompts))]
