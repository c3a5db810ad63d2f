"""The competitors of `end_to_end`, each in a process of its own: `python -m benchmarks.training.whole_step_methods`.

A turn is one whole step on the same prompts: completions of exactly `tokens` tokens, rewards, log-probs of the old
policy, and `updates` optimiser steps. Ours takes it as a run does (`Stepper.step`), TRL in its own loop.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.training.phase_clock import PhaseClock
from benchmarks.turns import Turns

OURS, TRL, PACED = "paced_fast", "trl GRPOTrainer", "PacedTrainer"
CHECKPOINTED = ", gradient checkpointing"
METHODS = (OURS, TRL, TRL + CHECKPOINTED, PACED, PACED + CHECKPOINTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What every method does in a step."""

    model: str
    """Folder of model and tokenizer."""
    rows: str
    """JSONL file of P prompts."""
    prompts: int
    completions: int
    tokens: int
    updates: int
    sequences: int
    device: str


def reward(completions: list[str], **_: Any) -> list[float]:
    """1 where the sum of the characters' codes is odd, else 0: about half of any group, whatever the policy."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def run_ours(task: Task) -> None:
    """Serve steps of a run of the default algorithm without replay, so that it trains on what the others train on."""
    import torch
    from rich.console import Console

    from paced_fast.config.presets import preset
    from paced_fast.config.resolve import resolve
    from paced_fast.generation import TransformersGenerator
    from paced_fast.run.start.build import build

    device = environment.choose_device(task.device)
    turns, clock = Turns(device), PhaseClock(device)
    config = preset("own")
    threads = torch.get_num_threads()
    config = dataclasses.replace(
        config,
        algorithm="paced",
        run_dir=str(Path(task.rows).parent / "ours"),
        generator="transformers",
        model=dataclasses.replace(config.model, name=task.model, device=device.type, dtype=_dtype(device)),
        data=dataclasses.replace(config.data, train=(f"{task.rows}?reward=parity",), template="{prompt}"),
        generation=dataclasses.replace(
            config.generation,
            prompts_per_step=task.prompts,
            group_size=task.completions,
            max_completion_tokens=task.tokens,
        ),
        optimizer=dataclasses.replace(config.optimizer, minibatches=task.updates),
        replay=dataclasses.replace(config.replay, mode="off"),
        evaluation=dataclasses.replace(config.evaluation, every=0),
        run=dataclasses.replace(config.run, threads=threads, loggers=()),
    )
    run = build(resolve(config), Console(quiet=True), functions={"parity": reward})
    trainer, collector = run.trainer, run.collector
    longest = max(len(row.token_ids) for row in collector.table.rows)
    limit = task.sequences * (longest + task.tokens)
    trainer.config = dataclasses.replace(
        trainer.config, optimizer=dataclasses.replace(trainer.config.optimizer, micro_batch_tokens=limit)
    )
    trainer.policy.max_tokens = limit
    size = collector.config.generation.batch_sequences()
    collector.generator = TransformersGenerator(trainer.policy.model, stop_ids=[], max_batch_sequences=size)
    trainer.phase = collector.phase = clock.phase
    turns.ready(prompt_tokens=sum(len(row.token_ids) for row in collector.table.rows) * task.completions)
    while True:
        turns.begin()
        clock.begin("other")
        stepped = run.stepper.step()
        lengths = stepped.result.fresh.rollouts.lengths
        turns.end(phases=clock.take(), completion_tokens=sum(lengths), updates=int(stepped.result.update.taken))


def run_trl(task: Task, *, ours: bool, gradient_checkpointing: bool) -> None:
    """Run TRL's loop with GRPOTrainer or PacedTrainer; it waits for a turn before each batch."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from paced_fast.integrations.trl import PacedConfig, PacedTrainer

    device = environment.choose_device(task.device)
    turns, clock, on_gpu = Turns(device), PhaseClock(device), device.type == "cuda"
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(task.model, padding_side="left")
    texts = [json.loads(line)["prompt"] for line in Path(task.rows).read_text().splitlines()]
    micro_batches = task.prompts * task.completions // task.sequences
    base: Any = PacedTrainer if ours else GRPOTrainer

    class Timed(base):
        """The trainer, with the phases of a step told apart; what is in none of them is the update."""

        seen_tokens = 0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with clock.phase("other"):
                output = super()._generate_and_score_completions(inputs)
            self.seen_tokens = int(output["completion_mask"].sum())
            return output

        def _generate(self, prompts: Any) -> Any:
            with clock.phase("generate"):
                return super()._generate(prompts)

        def _calculate_rewards(self, *args: Any, **options: Any) -> Any:
            with clock.phase("reward"):
                return super()._calculate_rewards(*args, **options)

    class TakeTurns(TrainerCallback):
        """Begin and end a turn around the optimiser steps of a batch."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % task.updates == 0:
                turns.begin()
                clock.begin("update")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % task.updates == 0:
                turns.end(phases=clock.take(), completion_tokens=trainer.seen_tokens, updates=task.updates)

    trainer = Timed(
        model,
        reward,
        (PacedConfig if ours else GRPOConfig)(
            output_dir=str(Path(task.rows).parent / "trl"),
            per_device_train_batch_size=task.sequences,
            num_generations=task.completions,
            max_completion_length=task.tokens,
            steps_per_generation=micro_batches,
            gradient_accumulation_steps=micro_batches // task.updates,
            gradient_checkpointing=gradient_checkpointing,
            generation_kwargs={"min_new_tokens": task.tokens},
            max_steps=10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=on_gpu,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[TakeTurns()],
    )

    def before_forward(*_: Any) -> None:
        # Neither sampling nor a loss: the old policy scores its completions.
        if clock.current in ("other", "update") and not torch.is_grad_enabled():
            clock.enter("old_logprobs")

    def after_forward(*_: Any) -> None:
        if clock.current == "old_logprobs":
            clock.leave()

    model.register_forward_pre_hook(before_forward)
    model.register_forward_hook(after_forward)
    turns.ready(prompt_tokens=sum(map(len, tokenizer(texts)["input_ids"])) * task.completions)
    trainer.train()


def _dtype(device: Any) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def main() -> None:
    """Run one competitor; command line: METHOD JSON."""
    name, task = sys.argv[1], Task(**json.loads(sys.argv[2]))
    if name == OURS:
        run_ours(task)
    else:
        run_trl(task, ours=name.startswith(PACED), gradient_checkpointing=name.endswith(CHECKPOINTED))


if __name__ == "__main__":
    main()
