"""Inputs of a run: tokenizer and prompts, checked against each other and against the rewards."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paced_fast.config import Config, DataConfig
from paced_fast.config.resolve import writes_chats
from paced_fast.config.saved import load_config
from paced_fast.data import prompts
from paced_fast.data.distributed import World
from paced_fast.data.records import Completion, PromptRow, PromptTable
from paced_fast.data.sources import drop_missing
from paced_fast.errors import InputError, counted
from paced_fast.evaluation.held_out import check_headline
from paced_fast.policy import smollm2_folder
from paced_fast.rewards import Scorer, Shaper
from paced_fast.rewards.loading import RewardFunction
from paced_fast.run import checkpoint
from paced_fast.run.record.rollouts_file import RecordedRollouts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Inputs read before the model exists, and the settings completed from the data."""

    config: Config
    path: str  # of the model
    tokenizer: PreTrainedTokenizerBase
    stops: prompts.Stops
    decode: prompts.Decoder
    scorer: Scorer
    shaper: Shaper
    table: PromptTable
    eval_table: PromptTable
    repeated: Mapping[str, int]  # training prompts that are held-out prompts, by their slice
    recorded: RecordedRollouts | None  # in place of sampling
    identity: dict[str, str]  # of data, tokenizer and stop tokens


def read_data(
    config: Config,
    folder: Path,
    world: World,
    replay: Path | None = None,
    functions: Mapping[str, RewardFunction] | None = None,
) -> Data:
    """Read tokenizer, prompts and rewards of a run, and with `replay` the rollouts that were recorded there.

    `functions` are rewards that Python handed over, by the names that sources have for them.

    Raises InputError for what cannot be read or does not go together, on every rank.
    """
    path = config.model.name
    if path == "smollm2":
        path = str(path_from_rank0(world, lambda: smollm2_folder(Path(config.warm_start.cache_dir).expanduser())))
    with world.agreement():
        tokenizer = read_tokenizer(path, config.model.alphabet)
        config = _with_template(config, tokenizer)
    config = _dated(config, folder, tokenizer, world)
    with world.agreement():
        config, stops, decode = read_ends(config, path, tokenizer)
    scorer, shaper = Scorer(settings=config.reward, functions=functions), Shaper(config.reward)
    logger.info("reading and tokenizing the prompts")
    with world.agreement():
        table, eval_table, repeated = read_tables(config, tokenizer, scorer, shaper)
    logger.info("%s to train on, %d held out", counted(len(table), "prompt"), len(eval_table))
    with world.agreement():
        ids = prompts.num_ids(tokenizer)
        recorded = None if replay is None else RecordedRollouts(replay, config, table, ids)
    return Data(
        config=config,
        path=path,
        tokenizer=tokenizer,
        stops=stops,
        decode=decode,
        scorer=scorer,
        shaper=shaper,
        table=table,
        eval_table=eval_table,
        repeated=repeated,
        recorded=recorded,
        identity=checkpoint.identity(table, eval_table, tokenizer) | {"stop tokens": str(stops)},
    )


def _with_template(config: Config, tokenizer: PreTrainedTokenizerBase) -> Config:
    """Settings with the template that `auto` stands for: the chat template of the tokenizer, if it has one.

    Raises InputError for settings of a chat where there is none.
    """
    data = config.data
    if data.template != "auto":
        return config
    template = "chat" if tokenizer.chat_template else "plain"
    if template == "plain":
        for option, value in (("system-prompt", data.system_prompt), ("template-args", data.template_args or None)):
            if value is not None:
                raise InputError(
                    f"--data.{option} needs a chat template, and the tokenizer of {config.model.name} has none: leave "
                    "it out, or give --data.template 'a text with {prompt} in it'"
                )
    logger.info("prompts are written by %s", "the chat template" if template == "chat" else "no template: text alone")
    return dataclasses.replace(config, data=dataclasses.replace(data, template=template))


def path_from_rank0(world: World, find: Callable[[], Path | None]) -> Path | None:
    """Path that `find` returns on rank 0, broadcast to every rank; the other ranks do not call it."""
    found = None
    with world.agreement(patient=True):
        if world.is_rank0:
            found = find()
    told = world.gather_text("" if found is None else str(found))[0]
    return Path(told) if told else None


def read_tokenizer(path: str, alphabet: str = "signed_sums") -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or id; of `tiny`, the characters of `alphabet`."""
    if path == "tiny":
        return prompts.alphabet_tokenizer(alphabet)
    return prompts.load_tokenizer(path, f"--model {path}")


def read_ends(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Config, prompts.Stops, prompts.Decoder]:
    """Find the stop tokens of the model at `path`, also in the settings, and make the decoder of completions.

    Raises:
        InputError: a setting names what is no token, or nothing ends a completion.
    """
    declared = () if path == "tiny" else prompts.declared_stop_ids(path)
    stops = prompts.find_stops(tokenizer, config.generation.stop_tokens, declared)
    logger.info("stop tokens of completions: %s", stops)
    if config.data.date is not None and prompts.reads_date(tokenizer):
        logger.info("the chat template is given %s as today's date", config.data.date)
    decode = prompts.Decoder(tokenizer, stops.ids, config.data.keep_special_tokens)
    generation = dataclasses.replace(config.generation, stop_tokens=stops.names)
    return dataclasses.replace(config, generation=generation), stops, decode


def without_missing(config: Config) -> Config:
    """The settings without optional sources whose file is absent; one log line names the files."""
    data, warm = config.data, config.warm_start
    names, slices = set[str](), set[str]()

    def present(sources: tuple[str, ...]) -> tuple[str, ...]:
        kept, missing = drop_missing(sources, data.dir)
        names.update(source.name for source in missing)
        slices.update(source.slice_name for source in missing)
        return kept

    first, second = (dataclasses.replace(phase, sources=present(phase.sources)) for phase in (warm.first, warm.second))
    train_sources, eval_sources = present(data.train), present(data.eval)
    if not names:
        return config
    headline = tuple(name for name in data.headline if name not in slices)
    logger.warning("continuing without %s: --data.dir names the folder of these files", ", ".join(sorted(names)))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, train=train_sources, eval=eval_sources, headline=headline),
        warm_start=dataclasses.replace(warm, first=first, second=second),
    )


def read_tables(
    config: Config, tokenizer: PreTrainedTokenizerBase, scorer: Scorer, shaper: Shaper
) -> tuple[PromptTable, PromptTable, Mapping[str, int]]:
    """Prompts to train on, held-out prompts, and how many of the former are among the latter, by slice; all rewards
    tried."""
    table, eval_table = (
        read_table(sources, tokenizer, config, scorer) for sources in (config.data.train, config.data.eval)
    )
    table, repeated = _apart(table, eval_table, config.data, drawn=config.generation.prompts_per_step)
    if config.scheduler.max_visits and config.generation.prompts_per_step > len(table):
        raise InputError(
            f"--scheduler.max-visits: each step draws {config.generation.prompts_per_step} prompts from {len(table)}, "
            "so some would repeat: lower --generation.prompts-per-step, or leave out --scheduler.max-visits"
        )
    _try_rewards(scorer, shaper, (*table.rows, *eval_table.rows))
    check_headline(config.data.headline, eval_table)
    return table, eval_table, repeated


def read_table(
    sources: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, config: Config, scorer: Scorer | None = None
) -> PromptTable:
    """The prompts of `sources`; with a `scorer` each row must be one that its reward can judge."""
    if not sources:
        return PromptTable(rows=())
    return prompts.load_table(
        sources,
        tokenizer=tokenizer,
        template=config.data.template,
        chat=prompts.ChatSettings.parsed(
            system_prompt=config.data.system_prompt,
            template_args=config.data.template_args,
            date=config.data.date,
        ),
        max_prompt_tokens=config.data.max_prompt_tokens,
        data_dir=config.data.dir,
        too_long=config.data.too_long,
        bad_rows=config.data.bad_rows,
        max_bad_share=config.data.max_bad_share,
        check=None if scorer is None else scorer.problem,
        reward=None if scorer is None else config.reward.name,
    )


def _apart(
    train: PromptTable, held_out: PromptTable, data: DataConfig, *, drawn: int = 1
) -> tuple[PromptTable, Mapping[str, int]]:
    """The training rows, without those that are held-out prompts where the settings drop them, and by slice how many
    are left that are held-out prompts; the log counts repeats among the rows, and says so when fewer different prompts
    are left than a step draws, `drawn`."""
    same, policy = prompts.overlap(train, held_out), data.overlap
    repeated = same.by_slice
    if same.train and policy == "error":
        raise InputError(f"{same}: remove them, or set --data.overlap drop")
    if same.train and policy == "warn":
        if not data.headline or not same.slices.isdisjoint(data.headline):
            logger.warning("%s: --data.overlap drop leaves them out of training", same)
        else:  # slices beside the headline may share small problems
            logger.info("%s: only of %s, which the headline leaves out", same, ", ".join(sorted(same.slices)))
    if same.train and policy == "drop":
        if len(same.train) == len(train):
            raise InputError(
                "--data.overlap drop leaves nothing to train on: every training prompt is also a held-out prompt"
            )
        logger.warning("%s: left out of training", same)
        dropped = set(same.train)
        train = PromptTable(rows=tuple(row for i, row in enumerate(train.rows) if i not in dropped))
        repeated = {}
    if repeats := prompts.duplicates(train):
        one, first = (train.rows[i].where for i in repeats[0])
        logger.info(
            "%d of %d training prompts repeat an earlier one (%s repeats %s)", len(repeats), len(train), one, first
        )
    different = len(train) - len(repeats)
    if different < drawn:
        logger.warning(
            "%s to train on, but a step draws %d, so that it has the same ones several times: give more prompts, or "
            "--generation.prompts-per-step %d",
            *(counted(different, "different prompt"), drawn, different),
        )
    return train, repeated


def _try_rewards(scorer: Scorer, shaper: Shaper, rows: Sequence[PromptRow]) -> None:
    """Score two empty completions of one row per reward, so that a reward that cannot be used fails early, and one
    that returns a number for the first completion alone too."""
    first = [row for row in {row.reward: row for row in reversed(rows)}.values() for _ in range(2)]
    scorer.try_out(first, [""] * len(first))
    empty = Completion(token_ids=[], logprobs=[], stopped=True)
    shaper.shape(first, [""] * len(first), [empty] * len(first), 1)


def _dated(config: Config, folder: Path, tokenizer: PreTrainedTokenizerBase, world: World) -> Config:
    """Settings with the date of the run, if prompts depend on it: the date of the resumed run, else today."""
    if config.data.date is not None or not (writes_chats(config) and prompts.reads_date(tokenizer)):
        return config
    today = ""
    if world.is_rank0:
        today = datetime.date.today().isoformat()
        if config.resume == "auto" and (folder / "config.json").is_file():
            today = load_config(folder).data.date or today
    date = world.gather_text(today)[0]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))
