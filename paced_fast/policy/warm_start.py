"""Supervised warm start on demonstrations, cached by a digest of everything it depends on."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import paced_fast
from paced_fast.config import Config, WarmStartPhase, digest, stream_seed
from paced_fast.data import packing, prompts
from paced_fast.data.records import Completion, PromptTable
from paced_fast.data.sources import find_file, parse_source
from paced_fast.errors import InputError, TrainingError
from paced_fast.policy import Policy, load_model, make_policy, save_model

logger = logging.getLogger(__name__)

# A cached result depends on the code that made it, so these modules are part of its key.
_CODE = ("data/*.py", "data/sources/*.py", "data/prompts/*.py", "policy/*.py")


def cache_folder(config: Config, beside: Sequence[object] = ()) -> Path:
    """Cache folder of the warm start of `config`: its name is a digest of settings, data, code, and inputs `beside`
    them, such as the day in a prompt."""
    package = Path(paced_fast.__file__).parent
    code = [[path.read_text() for path in sorted(package.glob(pattern))] for pattern in _CODE]
    assert all(code), "a pattern that matches no file would drop out of the key"
    phases = (config.warm_start.first, config.warm_start.second)
    sources = [parse_source(spec) for phase in phases for spec in phase.sources]
    files = [find_file(source, config.data.dir) for source in sources if source.kind in ("jsonl", "csv", "parquet")]
    data = ["absent" if path is None else digest(path.read_bytes().hex()) for path in files]
    settings = (config.model, config.warm_start.first, config.warm_start.second, config.warm_start.seed)
    rows = (config.data.template, config.data.max_prompt_tokens, config.data.too_long, config.data.bad_rows)
    chat = (config.data.system_prompt, config.data.template_args)
    key = digest(*settings, *rows, *chat, list(beside), code, data, torch.__version__)
    return Path(config.warm_start.cache_dir).expanduser() / f"warm-start-{key}"


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    *,
    load: Callable[[tuple[str, ...]], PromptTable],
    stops: prompts.Stops,
    report: Callable[[str, int, int], None],
) -> PreTrainedModel:
    """The model after both phases, from the cache when it holds them.

    `load` turns sources into rows; `report` receives what is under way, the steps made and the number of all steps.
    Raises InputError when a row has no demonstration, one that goes on behind a stop token, or a token that the model
    has no embedding for. A KeyboardInterrupt says where it stopped, and that nothing is kept.
    """
    phases = [phase for phase in (config.warm_start.first, config.warm_start.second) if phase.steps > 0]
    if not phases:
        return model
    folder = cache_folder(config, _beside(config, tokenizer, stops))
    if (folder / "config.json").is_file():  # the folder got its name when it was complete
        logger.info("warm start: read from the cache (%s)", folder)
        return load_model(config.model, str(folder))
    with _in_float32(model):
        _teach(make_policy(model, config), tokenizer, config, phases, load=load, stops=stops, report=report)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    save_model(model, temporary)
    tokenizer.save_pretrained(temporary)
    if folder.exists():  # another run stored it first
        shutil.rmtree(temporary)
    else:
        temporary.rename(folder)
    return model


@contextlib.contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Have parameters of another type in float32, as small steps are lost in bfloat16; they have no gradients then."""
    types = [(parameter, parameter.dtype) for parameter in model.parameters()]
    for parameter, _ in types:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in types:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def _teach(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    phases: Sequence[WarmStartPhase],
    *,
    load: Callable[[tuple[str, ...]], PromptTable],
    stops: prompts.Stops,
    report: Callable[[str, int, int], None],
) -> None:
    loaded = [read_demonstrations(phase.sources, tokenizer, load=load, stops=stops) for phase in phases]
    for table, completions in loaded:  # all of them before the first step, which a fault in the second would waste
        _check_embedded(table, completions, tokenizer, policy.model)
        for row, completion in zip(table.rows, completions, strict=True):
            policy.check_length(len(row.token_ids), len(completion.token_ids))
    made, total = 0, sum(phase.steps for phase in phases)

    def reported(text: str) -> None:
        nonlocal made
        made += 1
        report(f"warm start: step {made:,} of {total:,}, {text}", made, total)

    try:
        for number, (phase, (table, completions)) in enumerate(zip(phases, loaded, strict=True), start=1):
            _run_phase(policy, phase, config, number, table, completions, reported)
    except KeyboardInterrupt:
        place = f"in the warm start after {made:,} of {total:,} steps"
        raise KeyboardInterrupt(f"{place}, which are not kept, so that it starts over next time") from None


def _run_phase(
    policy: Policy,
    phase: WarmStartPhase,
    config: Config,
    number: int,
    table: PromptTable,
    completions: Sequence[Completion],
    report: Callable[[str], None],
) -> None:
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=phase.learning_rate, betas=(0.9, phase.beta2), weight_decay=0.01
    )
    source = torch.Generator().manual_seed(stream_seed(config.warm_start.seed, number, "warm start"))
    order = torch.cat(
        [torch.randperm(len(table), generator=source) for _ in range(-(-phase.steps * phase.batch_size // len(table)))]
    ).tolist()
    for step in range(phase.steps):
        rising = min(1.0, (step + 1) / max(phase.warmup_steps, 1))
        falling = 1.0 - 0.95 * max(0.0, (step - phase.warmup_steps) / max(phase.steps - phase.warmup_steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * min(rising, falling)
        chosen = order[step * phase.batch_size : (step + 1) * phase.batch_size]
        rollouts = packing.pack(
            [completions[i] for i in chosen],
            [table.rows[i].token_ids for i in chosen],
            chosen,
            [0.0] * len(chosen),
            0,
            policy.device,
        )
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for sequences in policy.micro_batches(rollouts, range(len(chosen))):
            micro = packing.select(rollouts, sequences)
            logprobs = policy.token_logprobs(policy.hidden(micro), micro.token_ids, 1.0)
            part = -logprobs.sum() / rollouts.num_tokens
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if not math.isfinite(loss):
            raise TrainingError(
                f"warm start: the loss of phase {number} is {loss} at step {step + 1}: lower the phase's learning_rate"
            )
        optimizer.step()
        report(f"phase {number}, loss {loss:.3f} nat per token")


def _beside(config: Config, tokenizer: PreTrainedTokenizerBase, stops: prompts.Stops) -> list[object]:
    """Inputs of the demonstrations that neither settings nor model name: the day, and unusual stop tokens."""
    today = [config.data.date] if prompts.reads_date(tokenizer) else []
    ends = [end for end in (stops.text_end, stops.turn_end) if end != tokenizer.eos_token_id]
    return [*today, *ends]


def read_demonstrations(
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    load: Callable[[tuple[str, ...]], PromptTable],
    stops: prompts.Stops,
) -> tuple[PromptTable, list[Completion]]:
    """The rows of `sources` and the demonstration of each, as a completion.

    Raises InputError as `warm_start` does, whatever the model.
    """
    try:
        table = load(sources)
    except InputError as error:
        raise InputError(f"warm start: {error}") from error
    return table, _demonstrations(table, tokenizer, stops)


def _demonstrations(table: PromptTable, tokenizer: PreTrainedTokenizerBase, stops: prompts.Stops) -> list[Completion]:
    """The demonstrations as completions that end with the stop token of their kind of prompt, once."""
    texts = [row.demonstration for row in table.rows if row.demonstration is not None]
    if len(texts) < len(table):
        raise InputError(
            f"warm start: {len(table) - len(texts)} of {len(table)} rows have no demonstration: "
            "name the field that holds it with demonstration=FIELD"
        )
    completions: list[Completion] = []
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for row, ids in zip(table.rows, encoded, strict=True):
        while ids and ids[-1] in stops.ids:  # written out at the end of the text already
            ids = ids[:-1]
        early = next((token for token in ids if token in stops.ids), None)
        if early is not None:
            raise InputError(
                f"warm start: the demonstration of {row.where or 'a row'} continues after the stop token "
                f"{tokenizer.convert_ids_to_tokens(early)}, which ends a completion: cut it there"
            )
        ids = [*ids, stops.turn_end if row.in_chat else stops.text_end]
        completions.append(Completion(token_ids=ids, logprobs=[0.0] * len(ids), stopped=True))
    return completions


def _check_embedded(
    table: PromptTable, completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    sequences = [(row.where, [*row.token_ids, *c.token_ids]) for row, c in zip(table.rows, completions, strict=True)]
    prompts.check_embedded(sequences, tokenizer, prompts.num_embedded(model))
