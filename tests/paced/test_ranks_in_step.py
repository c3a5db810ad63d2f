"""What several ranks decide, push, check and load: alike on all of them, and all together where one of them fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny_policy
import tiny_run
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ranks import import_ahead, on_ranks
from paced_fast.config import Config, LoraConfig, WeightSyncConfig
from paced_fast.config.resolve import resolve
from paced_fast.data import distributed
from paced_fast.data.distributed import World
from paced_fast.data.records import Completion
from paced_fast.errors import TrainingError
from paced_fast.generation import Sampling
from paced_fast.generation.parity import ParityGuard
from paced_fast.generation.weight_sync import connect
from paced_fast.paced.log_z import LogZ
from paced_fast.policy import Policy, adapt, plain_state
from paced_fast.policy.shape import shape_of
from paced_fast.policy.sharding import shards_mesh
from paced_fast.run.plan import memory
from paced_fast.run.start import build
from paced_fast.run.start import model as model_of_run
from paced_fast.run.step import Stepper

import_ahead("pytest", "paced_fast.train.loop", "tiny_run")


class Engine:
    """Keeps what is pushed to it; one that is `broken` takes two weights and fails."""

    tensor_parallel_size = 1

    def __init__(self) -> None:
        self.taken: dict[str, Tensor] = {}
        self.broken = False

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.taken = {}
        for name, tensor in weights:
            self.taken[name] = tensor.clone()
            if self.broken and len(self.taken) == 2:
                raise TrainingError("vllm failed while loading the pushed weights")


class Gathered(TorchDispatchMode):
    """Counts the bytes that this rank gives to gathers."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_gather" in str(func):
            self.num_bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def sharded_policy(world: World, *, lora_rank: int = 0) -> tuple[Policy, dict[str, Tensor]]:
    """A policy in bfloat16 in shards of float32, and its weights as they were, whole and merged."""
    model = tiny_policy.model(sharpness=4.0)
    if lora_rank:
        adapt(model, LoraConfig(rank=lora_rank, alpha=4), seed=3)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.5)
    before = {name: tensor.clone() for name, tensor in plain_state(model).items()}
    policy = Policy(model, max_tokens=4096)
    policy.shard(shards_mesh(world, policy.device), torch.bfloat16)
    return policy, before


def push(policy: Policy, engine: Engine, dtype: Any) -> tuple[dict[str, Tensor], int, float]:
    """What the engine got, the bytes this rank gave to gathers, and those the push says it handed over."""
    sync = connect(engine, policy.model, WeightSyncConfig(mode="push", dtype=dtype, bucket_mib=1))
    with Gathered() as gathered:
        figures = sync.after_update()
    return engine.taken, gathered.num_bytes, figures["bytes"]


def check_push(world: World, lora_rank: int) -> None:
    policy, before = sharded_policy(world, lora_rank=lora_rank)
    assert all(isinstance(parameter, DTensor) for parameter in policy.named_parameters().values())
    whole, plain_traffic, plain_bytes = push(policy, Engine(), "float32")
    rounded, traffic, num_bytes = push(policy, Engine(), "bfloat16")
    assert whole.keys() == rounded.keys() == before.keys()
    for name, tensor in whole.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-6)
        expected = tensor.bfloat16() if tensor.ndim > 1 else tensor
        assert rounded[name].dtype == expected.dtype
        assert torch.equal(rounded[name], expected), f"{name}: rounding before the gather is rounding after"
    vectors = sum(tensor.nbytes for tensor in whole.values() if tensor.ndim < 2)
    assert num_bytes == (plain_bytes + vectors) / 2
    if lora_rank == 0:  # to merge, the low-rank matrices are exchanged in float32 first
        assert traffic == (plain_traffic + vectors / world.size) / 2 > 0
    assert 0 < traffic < 0.75 * plain_traffic


@pytest.mark.process
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_sharded_weights_travel_as_small_as_the_engine_keeps_them(lora_rank: int) -> None:
    on_ranks(2, check_push, lora_rank)


def told(function: Any) -> str:
    """The message that `function` ends with on this rank."""
    try:
        function()
    except TrainingError as error:
        return str(error)
    return ""


def agreed(world: World, function: Callable[[], object]) -> None:
    with world.agreement():
        function()


def failing_push(world: World) -> tuple[str, int, str]:
    """What is said of a push in which rank 1's engine fails midway; weights of the next one, and what is said then."""
    policy, before = sharded_policy(world)
    engine = Engine()
    config = WeightSyncConfig(mode="push", dtype="bfloat16", bucket_mib=1)
    sync = connect(engine, policy.model, config)
    cast(Any, sync).bucket_bytes = 1  # so that gathers are still to come when it fails
    engine.broken = world.rank == 1
    first = told(lambda: agreed(world, sync.after_update))
    engine.broken = False
    second = told(lambda: agreed(world, sync.after_update))
    return first, len(before) - len(engine.taken), second


@pytest.mark.process
def test_an_engine_that_fails_in_a_push_fails_on_all_ranks_and_leaves_them_in_step() -> None:
    assert on_ranks(2, failing_push) == [("rank 1: vllm failed while loading the pushed weights", 0, "")] * 2


class ScoringEngine:
    """An engine whose log-probs are all -1, or no numbers."""

    fails_at = ""

    def generate(self, prompts: Sequence[Any], sampling: Sampling, **_: Any) -> list[Completion]:
        if self.fails_at == "generate":
            raise TrainingError("vllm failed while sampling")
        count = sampling.samples * len(prompts)
        return [Completion(token_ids=[3, 4], logprobs=[-1.0, -1.0], stopped=False) for _ in range(count)]

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        if self.fails_at == "score":
            raise TrainingError("vllm failed while scoring")
        value = float("nan") if self.fails_at == "judge" else -1.0
        return [[value] * (len(sequence) - 1) for sequence in sequences]


def failing_checks(world: World) -> dict[str, str]:
    """What this rank says of a check that goes wrong on rank 1, by where."""
    policy, _ = sharded_policy(world)  # so that ranks compute what they judge by together
    config = tiny_policy.settings(weight_sync__max_mean_difference=1e3)
    engine = ScoringEngine()
    guard = ParityGuard(engine, policy, config, sequences=[tuple(range(2, 10)) * 3, tuple(range(9, 1, -1)) * 3])
    stepper = cast(Any, SimpleNamespace(parity=guard, world=world, counters=SimpleNamespace(step=3)))
    found = {}
    for where in ("generate", "score", "judge", "nowhere"):
        engine.fails_at = where if world.rank == 1 else ""
        found[where] = told(lambda: Stepper.check_parity(stepper))
    return found


@pytest.mark.process
def test_a_check_that_goes_wrong_on_one_rank_goes_wrong_on_all_and_they_stay_in_step() -> None:
    zero, one = on_ranks(2, failing_checks)
    assert zero == one
    assert zero["generate"] == "rank 1: vllm failed while sampling"
    assert zero["score"] == "rank 1: vllm failed while scoring"
    assert zero["judge"].startswith("rank 1: trainer and engine disagree after step 3")
    assert zero["nowhere"] == ""


def chosen_mode(world: World, folder: Path) -> tuple[str, int | None]:
    """How a run would be spread where rank 1 has little memory."""
    config = resolve(tiny_run.config(folder / "rewards.py"))
    memory.available = lambda device: (1 << 40) if world.rank == 0 else 200_000
    layout = model_of_run._fit(config, shape_of(tiny_policy.model()), 40, world).layout
    return layout.mode, layout.device_bytes


@pytest.mark.process
def test_the_least_memory_of_the_ranks_decides_for_all(tmp_path: Path) -> None:
    tiny_run.write_rewards(tmp_path)
    assert on_ranks(2, chosen_mode, tmp_path) == [("sharded", 100_000)] * 2


def embedded(world: World, prompts: list[tuple[int, ...]]) -> tuple[list[int], list[list[float]]]:
    """Prompts that this rank has embedded, by length, and the embeddings of all."""
    policy, calls = tiny_policy.policy(), []
    embed = policy.embed

    def counted(own: Sequence[tuple[int, ...]], **options: Any) -> Any:
        calls.extend(map(len, own))
        return embed(own, **options)

    policy.embed = cast(Any, counted)
    return calls, model_of_run._embeddings(policy, prompts, world, with_last=True).tolist()


@pytest.mark.process
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_each_rank_embeds_a_part_of_the_prompts(ranks: int) -> None:
    """They begin alike, so that each rank computes their prefix."""
    prompts = [(*[2, 9, 5] * 50, *range(1, 2 + i)) for i in range(7)]
    wanted = tiny_policy.policy().embed(prompts, with_last=True)
    found = on_ranks(ranks, embedded, prompts)
    assert [calls for calls, _ in found] == [[151 + i for i in range(7)][rank::ranks] for rank in range(ranks)]
    assert all(values == found[0][1] for _, values in found), "to the bit"
    torch.testing.assert_close(torch.tensor(found[0][1]), wanted, rtol=0, atol=2e-6)


def first_home(world: World, config: Config) -> tuple[str, list[str]]:
    """Where a rank has the whole model before it is split, and where it was moved. `meta` stands for the device."""
    moves: list[str] = []
    begin = model_of_run._begin

    def begun(*arguments: Any) -> Any:
        model = begin(*arguments)
        model.to = lambda device: moves.append(str(device))  # after a warm start it comes from the device
        return model

    def stop(_: Config, model: Any, *__: Any, **___: Any) -> Any:
        raise TrainingError(str(model.device))

    model_of_run._begin, model_of_run._policies = begun, cast(Any, stop)
    return told(lambda: build.build(resolve(config), tiny_run.quiet(), world)), moves


@pytest.mark.process
def test_the_whole_model_is_on_no_device_where_it_may_be_sharded(tmp_path: Path) -> None:
    config = tiny_run.config(
        tiny_run.write_rewards(tmp_path),
        run_dir=str(tmp_path / "run"),
        model__device="meta",
        generator="transformers",
        distributed__mode="sharded",
    )
    lead, other = on_ranks(2, first_home, config)
    assert lead == ("cpu", ["cpu"])
    assert other == ("cpu", [])


def drifting_heads(world: World, config: Config) -> list[list[float]]:
    """Every rank's values after a step in which their heads' last bits came out different."""
    rescore = LogZ.rescore

    def drifted(self: LogZ, prompt_index: Tensor) -> None:
        rescore(self, prompt_index)
        self.values[prompt_index] += 0.01 * world.rank

    LogZ.rescore = drifted
    stepper = build.build(resolve(config), tiny_run.quiet(), world).stepper
    trainer = stepper.trainer
    assert trainer.log_z is not None
    stepper.step()
    return [part.tolist() for part in world.gather(trainer.log_z.values)]


@pytest.mark.process
def test_values_brought_up_to_date_are_the_leads_on_every_rank(tmp_path: Path) -> None:
    rewards = tiny_run.write_rewards(tmp_path)
    config = tiny_run.config(rewards, run_dir=str(tmp_path / "run"), log_z__scored_per_step=7)
    for lead, other in on_ranks(2, drifting_heads, config):
        assert lead == other


def test_threads_are_those_asked_for_else_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "usable_cores", lambda: 6)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [distributed.threads_of(0), distributed.threads_of(0, 4), distributed.threads_of(0, 9)] == [6, 1, 1]
    assert distributed.threads_of(3, 2) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [distributed.threads_of(0), distributed.threads_of(5)] == [2, 5]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun set the variable
    assert distributed.threads_of(0, 2) == 3
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")  # of nested regions, which torch has none of
    assert distributed.threads_of(0) == 6


def test_cores_are_those_that_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert distributed.usable_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert distributed.usable_cores() == 5
