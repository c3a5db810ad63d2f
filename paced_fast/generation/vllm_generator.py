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
from paced_fast.data.distributed import Queue
from paced_fast.data.records import Completion
from paced_fast.errors import InputError, TrainingError
from paced_fast.generation import vllm_engine
from paced_fast.generation.interface import Sampling

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 30.0
_Request = tuple[tuple[int, ...], Any]
"""A prompt and the parameters of its sample."""


class Sync(Protocol):
    """Interface to bring an engine's weights up to date; `weight_sync` has the two implementations."""

    mode: str

    def after_update(self) -> dict[str, float]:
        """Make the engine use the new weights; returns figures for the metrics record."""
        ...


class VLLMGenerator:
    """Samples with a vLLM engine in the trainer's process; its weights are shared or pushed, by the object given to
    `attach`.

    Every sample has its own seed, so it does not depend on its group or on the order of requests. Each sample is a
    separate request, which reads the prompt's keys and values from the prefix cache.
    """

    def __init__(self, settings: vllm_engine.EngineSettings, *, stop_ids: Sequence[int]) -> None:
        """Start the engine, which takes 10 to 60 s. Raises InputError when it does not start, naming the setting to
        change."""
        self.settings, self.stop_ids = settings, list(stop_ids)
        self.can_sleep = settings.device == "cuda"
        self.sync: Sync | None = None
        self.calls = self.begun = 0
        self.progress: Callable[[], object] = lambda: None
        self._buffers: dict[str, Tensor] = {}
        started = time.perf_counter()
        try:
            self.engine = vllm_engine.start(settings)
            self.tensor_parallel_size = int(self.engine.vllm_config.parallel_config.tensor_parallel_size)
            # A kernel that does not support this model fails at its first token, so sample one before the run starts.
            probe = Sampling(samples=1, max_completion_tokens=1, temperature=0.0)
            requests = [[((0,), self._options(probe, probe.seed))]]
            self._run(lambda _: requests.pop() if requests else [])
        except vllm_engine.FAILURES as error:
            raise InputError(vllm_engine.start_failure(error, settings)) from error
        logger.info("vllm: ready after %.0f s", time.perf_counter() - started)

    def attach(self, sync: Sync) -> None:
        """Use `sync` in every `after_update`."""
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
        found = self._sample(Queue(), prompts, sampling, first=first, keep_cache=keep_cache)
        return [completion for i in range(len(prompts)) for completion in found[i]]

    def generate_taken(
        self, queue: Queue, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, first: int = 0
    ) -> dict[int, list[Completion]]:
        """See `Generator.generate_taken`. Which prompts are decoded side by side depends on when the ranks take them,
        and rounding depends on that.

        Raises InputError for a prompt that does not fit, TrainingError when the engine fails midway.
        """
        return self._sample(queue, prompts, sampling, first=first)

    def _sample(
        self,
        queue: Queue,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        *,
        first: int,
        keep_cache: bool = False,
    ) -> dict[int, list[Completion]]:
        for prompt in prompts:
            if len(prompt) + sampling.max_completion_tokens > self.settings.max_tokens:
                raise InputError(
                    f"a prompt of {len(prompt)} tokens and a completion of up to {sampling.max_completion_tokens} "
                    "exceed "
                    f"the engine's limit of {self.settings.max_tokens}: lower --generation.max-completion-tokens or "
                    "--data.max-prompt-tokens"
                )
        if not keep_cache:
            # Otherwise a call would depend on earlier calls through the prefix cache, and a resumed run would differ.
            self.reset_prefix_cache()
        samples, most = sampling.samples, len(prompts)
        if queue.ranks > 1:
            most = max(1, min(queue.share(len(prompts)), self._room(prompts, sampling) // samples))
        taken: list[int] = []

        def more(in_flight: int) -> list[_Request]:
            """Requests of the prompts that there is room for, `in_flight` requests being unfinished."""
            room = most - -(-in_flight // samples)
            if room <= 0 or (in_flight and vllm_engine.num_waiting(self.engine)):
                return []
            new = queue.take(room, len(prompts))
            taken.extend(new)
            return [
                (prompts[i], self._options(sampling, stream_seed(sampling.seed, first + i, f"sample/{j}")))
                for i in new
                for j in range(samples)
            ]

        completions = [self._completion(output.outputs[0]) for output in self._answer(more)]  # fills `taken`
        return {i: completions[k * samples : (k + 1) * samples] for k, i in enumerate(taken)}

    def _room(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> int:
        """Sequences that can be decoded at once: those that the batch has room for and, at half of a completion's
        length on average, the key-value cache."""
        tokens = vllm_engine.cache_tokens(self.engine)
        longest = max(map(len, prompts), default=0) + -(-sampling.max_completion_tokens // 2)
        return min(self.settings.max_sequences, self.settings.max_sequences if tokens is None else tokens // longest)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Log-probs of every token but the first, at temperature 1, computed without the prefix cache."""
        requests = [[(sequence, vllm_engine.scoring()) for sequence in sequences]]
        outputs = self._answer(lambda _: requests.pop() if requests else [])
        return [
            [float(output.prompt_logprobs[t][ids[t]].logprob) for t in range(1, len(ids))]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def before_training(self) -> None:
        """See `Generator.before_training`: on a GPU the key-value cache is freed, at sleep levels 1 and 2 the weights
        too."""
        if not self.can_sleep:
            return
        vllm_engine.settle(self.engine)
        level = self.settings.sleep_level
        if level == 2:  # vLLM restores parameters by loading them, but not buffers
            self._buffers = self._of_model(
                lambda model: {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers()}
            )
        self.engine.sleep(level)
        if level == 0:
            self.engine.release_kv_cache_memory()

    def after_update(self) -> dict[str, float]:
        """See `Generator.after_update`: wake the engine, synchronise its weights, and clear the prefix cache, which
        holds keys and values of the old weights."""
        if self.can_sleep and self.settings.sleep_level > 0:
            with self._named("restoring its weights"):
                self.engine.wake_up(["weights"])
                self._of_model(self._restore_buffers)
        figures = self.sync.after_update() if self.sync is not None else {}
        if self.can_sleep:
            # The engine has its own memory pool, so memory that torch caches from freed gradients must be returned.
            torch.cuda.empty_cache()
            with self._named("restoring its key-value cache"):
                self.engine.wake_up(["kv_cache"])
                self.engine.wake_up(["scheduling"])
        self.reset_prefix_cache()
        return figures

    def close(self) -> None:
        """See `Generator.close`. An engine that joined the trainer's process group destroys it too."""
        self.engine.engine_core.shutdown()

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache. vLLM refuses while a request is in flight; raises TrainingError then."""
        with self._named("clearing its prefix cache"):
            vllm_engine.settle(self.engine)
            done = self.engine.reset_prefix_cache()
        if not done:
            raise TrainingError("vllm did not clear its prefix cache, so it would sample from old weights: update vllm")

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turn an engine failure between calls into a TrainingError of one line, with what it was doing and a setting
        that helps."""
        try:
            yield
        except vllm_engine.FAILURES as error:
            raise TrainingError(
                f"vllm failed while {what} ({vllm_engine.first_line(error)}): --resume auto continues from the last "
                "checkpoint; if memory ran out, lower --weight-sync.kv-cache-gib or --optimizer.micro-batch-tokens"
            ) from error

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of the engine by name, tied ones once."""
        return self._of_model(lambda model: dict(model.named_parameters()))

    def reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy weights in the Hugging Face layout into the engine's packed or fused parameters."""
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

    def _answer(self, more: Callable[[int], list[_Request]]) -> list[Any]:
        """Call `_run`; on a failure, drop the requests in flight and raise a TrainingError of one line."""
        try:
            return self._run(more)
        except vllm_engine.FAILURES as error:
            with contextlib.suppress(*vllm_engine.FAILURES):  # the first failure is the one to report
                self.engine.abort_request([f"{self.calls}-{i}" for i in range(self.begun)])
            raise TrainingError(
                f"vllm failed while sampling ({vllm_engine.first_line(error)}): this step is discarded; "
                "--resume auto continues from the last checkpoint, and a lower --generation.max-batch-sequences needs "
                "less memory"
            ) from error

    def _completion(self, output: Any) -> Completion:
        flat, ids = output.logprobs, list(output.token_ids)
        return Completion(
            token_ids=ids,
            logprobs=[float(flat.logprobs[start]) for start in flat.start_indices],
            stopped=output.finish_reason == "stop" or (bool(ids) and ids[-1] in self.stop_ids),
        )

    def _run(self, more: Callable[[int], list[_Request]]) -> list[Any]:
        """Finished requests, in the order in which `more` gave them; it is told the number of unfinished ones, before
        every pass."""
        self.calls, self.begun = self.calls + 1, 0
        found: dict[int, Any] = {}
        started = told = time.perf_counter()
        while True:
            for prompt, asked in more(self.begun - len(found)):
                request = vllm_engine.rendered(self.engine, prompt)
                self.engine.add_request(f"{self.calls}-{self.begun}", request, asked)
                self.begun += 1
            if not self.engine.has_unfinished_requests():
                break
            self.progress()
            for output in self.engine.step():
                if output.finished:
                    found[int(output.request_id.split("-")[1])] = output
            now = time.perf_counter()
            if now - told > _PROGRESS_SECONDS:
                told = now
                logger.info("vllm: %d of %d completions after %.0f s", len(found), self.begun, now - started)
        return [found[i] for i in range(self.begun)]
