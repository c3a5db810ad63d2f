"""A `PacedTrainer` that compares every micro-batch with the formula, and engines that stand in for vLLM's.

As a program: `trl_checked.py FOLDER JSON` trains the model in FOLDER with a real vLLM in this process; JSON
are settings of PacedConfig.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import tiny_policy
import tiny_trl
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.generation import vllm_generation


class Checked(tiny_trl.Recorder):
    """Loss and gradients of each micro-batch against full logits of rows without padding.

    The old policy is a copy of the weights that a batch was generated with; the ratio to the sampler is taken from that
    copy and the log-probs that the sampler returned.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.ratios: list[float] = []
        self.log_ratios: list[float] = []
        self.trained_tokens: list[int] = []
        super().__init__(*args, **options)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        model: Any = self.accelerator.unwrap_model(self.model)
        self.old = copy.deepcopy(model.base_model), model.lm_head.weight.detach().clone()
        return super()._generate_and_score_completions(inputs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Of TRL, and then the check."""
        before = tiny_policy.gradients(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        after = tiny_policy.gradients(model)
        inputs = self._buffered_inputs[(self._step - 1) % self.args.steps_per_generation]
        held = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        expected = self.expected(model, inputs)
        expected.backward()
        wanted = tiny_policy.gradients(model)
        for name, p in model.named_parameters():
            p.grad = held[name]
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
        scale = max(float(g.abs().max()) for g in wanted.values())
        for name, gradient in wanted.items():
            torch.testing.assert_close(after[name] - before[name], gradient, rtol=0, atol=1e-4 * scale + 1e-6, msg=name)
        return loss

    def expected(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The loss from its definition."""
        args = self.args
        total = torch.zeros(())
        log_z = inputs["log_z"] if self.memory is None else self.memory.log_z(inputs).detach()
        for i in range(len(inputs["rewards"])):
            if not inputs["weights"][i]:
                continue
            shown = inputs["completion_mask"][i].bool()
            mask = shown if "tool_mask" not in inputs else shown & inputs["tool_mask"][i].bool()
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
            completion = inputs["completion_ids"][i][shown]
            new = self.row(model.base_model, model.lm_head.weight, prompt, completion)[mask[shown]]
            with torch.no_grad():
                old = self.row(*self.old, prompt, completion)[mask[shown]]
            ratio = 1.0
            if args.use_vllm and args.vllm_importance_sampling_correction:
                ratio = float((old - inputs["sampling_per_token_logps"][i][mask]).sum().exp())
                high, low = args.vllm_importance_sampling_clip_max, args.vllm_importance_sampling_clip_min or 0.0
                if args.vllm_importance_sampling_mode == "sequence_mask":
                    ratio = ratio if low <= ratio <= high else 0.0
                else:
                    ratio = min(max(ratio, low), high)
            log_ratio = (new - old).sum()
            weight = ratio * float(log_ratio.detach().exp().clamp(max=args.importance_cap))
            residual = args.tb_beta * (log_z[i] + log_ratio) - inputs["rewards"][i]
            total = total + weight * residual.square() / (2 * args.tb_beta)
            self.ratios.append(ratio)
            self.log_ratios.append(float(log_ratio.detach()))
            self.trained_tokens.append(int(mask.sum()))
        # All of a generation batch share the steps that it is trained on; a step is a mean over its share.
        trained = float(self.batches[-1]["weights"].sum())
        return total / (trained * args.gradient_accumulation_steps / args.steps_per_generation)

    def row(self, base: Any, weight: Tensor, prompt: Tensor, completion: Tensor) -> Tensor:
        """Log-probs [c] of one completion."""
        ids = torch.cat([prompt, completion])[None]
        hidden = base(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        logits = hidden @ weight.T / self.temperature
        return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


class Engine:
    """Samples with weights of its own, which come only by its calls; every call is written down.

    `noise` is added to the log-probs it returns, as if it computed otherwise than the trainer.
    """

    def __init__(self, model: Any, noise: float) -> None:
        self.model, self.noise = copy.deepcopy(model), noise
        self.source = torch.Generator().manual_seed(0)
        self.calls: list[Any] = []

    def load(self, name: str, values: Tensor) -> None:
        """One parameter."""
        self.calls.append(("load", name))
        with torch.no_grad():
            self.model.get_parameter(name).copy_(values)

    def lose(self) -> None:
        """What sleep level 2 does to the weights."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(torch.nan)

    @torch.no_grad()
    def sample(self, prompt: list[int], *, max_tokens: int, temperature: float) -> tuple[list[int], list[float]]:
        """One completion and its log-probs."""
        ids, logprobs = list(prompt), []
        while len(logprobs) < max_tokens and (not logprobs or ids[-1] != tiny_policy.STOP):
            hidden = self.model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
            table = (self.model.lm_head(hidden) / temperature).log_softmax(-1)
            ids.append(int(torch.multinomial(table.exp(), 1, generator=self.source)))
            shift = self.noise * (float(torch.rand((), generator=self.source)) - 0.5)
            logprobs.append(float(table[ids[-1]]) + shift)
        return ids[len(prompt) :], logprobs


def server_client(engine: Engine) -> Any:
    """In place of TRL's VLLMClient."""

    class Client:
        def __init__(self, **options: Any) -> None:
            engine.calls.append(("connect", options["base_url"]))

        def init_communicator(self, device: Any) -> None:
            engine.calls.append(("communicator", str(device)))

        def get_server_info(self) -> dict[str, Any]:
            return {"model_config": {"logprobs_mode": "processed_logprobs"}}

        def update_named_params(self, metadata: list[Any], parameters: Iterator[tuple[str, Tensor]]) -> None:
            engine.calls.append(("metadata", [tuple(entry[:2]) for entry in metadata]))
            for name, values in parameters:
                engine.load(name, values)

        def reset_prefix_cache(self) -> None:
            engine.calls.append("reset")

        def generate(self, prompts: list[list[int]], n: int, **options: Any) -> dict[str, Any]:
            engine.calls.append(("generate", len(prompts), n, sorted(options)))
            kept = {name: options[name] for name in ("max_tokens", "temperature")}
            made = [engine.sample(prompt, **kept) for prompt in prompts for _ in range(n)]
            return {
                "prompt_ids": prompts,
                "completion_ids": [ids for ids, _ in made],
                "logprobs": [[[x] for x in logprobs] for _, logprobs in made],
            }

    return Client


def colocated(engine: Engine) -> Any:
    """In place of vLLM's LLM."""

    class LLM:
        def __init__(self, **options: Any) -> None:
            engine.calls.append(("start", sorted(options)))
            runner = SimpleNamespace(model=SimpleNamespace(load_weights=lambda pairs: engine.load(*pairs[0])))
            worker = SimpleNamespace(model_runner=runner)
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

        def sleep(self, level: int) -> None:
            engine.calls.append(("sleep", level))
            engine.lose()

        def wake_up(self, tags: list[str]) -> None:
            engine.calls.append(("wake", tags))

        def reset_prefix_cache(self) -> None:
            engine.calls.append("reset")

        def generate(self, prompts: list[Any], sampling_params: Any, **_: Any) -> list[Any]:
            engine.calls.append(("generate", len(prompts), sorted(vars(sampling_params))))
            wanted = {"max_tokens": sampling_params.max_tokens, "temperature": sampling_params.temperature}
            outputs = []
            for prompt in prompts:
                ids, logprobs = engine.sample(prompt["prompt_token_ids"], **wanted)
                found = [{token: SimpleNamespace(rank=1, logprob=x)} for token, x in zip(ids, logprobs, strict=True)]
                output = SimpleNamespace(token_ids=ids, logprobs=found)
                outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
            return outputs

    return LLM


@contextmanager
def stand_in(engine: Engine) -> Iterator[None]:
    """TRL with that engine in both modes; the variables of a launcher that it sets are taken back."""
    names = {
        "is_vllm_available": lambda *_, **__: True,
        "VLLMClient": server_client(engine),
        "LLM": colocated(engine),
        "SamplingParams": SimpleNamespace,
    }
    with mock.patch.dict(os.environ):
        missing = [name for name in names if not hasattr(vllm_generation, name)]
        kept = {name: getattr(vllm_generation, name) for name in names if name not in missing}
        vllm_generation.__dict__.update(names)
        try:
            yield
        finally:
            vllm_generation.__dict__.update(kept)
            for name in missing:
                del vllm_generation.__dict__[name]


def wide_model() -> LlamaForCausalLM:
    """The vocabulary of `tiny_trl.tokenizer`, with heads of width 32, which vLLM has attention for on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny_policy.VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=tiny_policy.STOP,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    return made


def main() -> None:
    """Write what was found: the log, the ratios, whether parameters moved."""
    folder = Path(sys.argv[1])
    changes = json.loads(sys.argv[2])
    made = Checked(
        str(folder),
        tiny_trl.reward,
        tiny_trl.settings(folder / "out", use_vllm=True, **changes),
        train_dataset=tiny_trl.data(),
        processing_class=tiny_trl.tokenizer(),
    )
    engine = made.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    # What TRL writes new weights by; an engine that packs has neither, on the processors for which it packs.
    packed = [
        name
        for name, p in engine.named_parameters()
        if not p.numel() or (p.dim() > 1 and not hasattr(p, "weight_loader"))
    ]
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    moved = max(float((p - q).abs().max()) for p, q in zip(made.model.parameters(), before, strict=True))
    found = {"log": made.state.log_history, "ratios": made.ratios, "batches": len(made.batches), "moved": moved}
    found["packed"] = packed
    Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
