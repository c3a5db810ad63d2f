"""Prompts that ranks take from a shared queue: the same rollouts whoever samples them, and who takes what when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_policy

from benchmarks.ranks import import_ahead, on_ranks
from paced_fast.config import stream_seed
from paced_fast.data.distributed import ALONE, Queue, World
from paced_fast.data.records import Completion
from paced_fast.errors import TrainingError
from paced_fast.generation import Sampling, TransformersGenerator, VLLMGenerator
from paced_fast.generation.over_ranks import SharedGenerator
from paced_fast.run.plan import idle

import_ahead("pytest", "tiny_policy", "paced_fast.generation.over_ranks")

PROMPTS = [tuple(2 + (7 * i + k) % 9 for k in range(1 + 5 * i % 7)) for i in range(13)]
SAMPLING = Sampling(samples=3, max_completion_tokens=40, temperature=1.3, seed=5)


class Counter:
    """The part of a store that a queue needs, in one process."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, name: str, more: int) -> int:
        self.counts[name] = self.counts.get(name, 0) + more
        assert self.counts[name] < 2**63, "a store counts in 64 bits"
        return self.counts[name]


def test_each_item_goes_to_one_rank_and_a_closed_queue_is_empty() -> None:
    store = Counter()
    one, two, other = (Queue(2, store, name) for name in ("a", "a", "b"))
    assert one.share(7) == 4
    assert [one.take(3, 7), two.take(3, 7), one.take(3, 7), two.take(3, 7)] == [
        *(range(3), range(3, 6), range(6, 7), range(7, 7))
    ]
    assert other.take(2, 7) == range(2)
    for _ in range(500):  # every rank may close it
        Queue(2, store, "a").close()
    assert not two.take(1, 10**6)
    assert not one.take(1, 10**6)
    assert other.take(2, 7) == range(2, 4), "another call's queue is not closed"
    assert ALONE.queue().take(3, 2) == range(2)


def generator(most: int = 6) -> TransformersGenerator:
    """Batches of two prompts."""
    return TransformersGenerator(tiny_policy.model(), stop_ids=[tiny_policy.STOP], max_batch_sequences=most)


def as_lists(completions: Sequence[Completion]) -> list[Any]:
    return [(c.token_ids, c.logprobs, c.stopped) for c in completions]


class Held(TransformersGenerator):
    """On rank 0 the first batch is not begun until the other ranks have taken everything else."""

    rank = 0
    prompts = 0

    def generate_taken(self, queue: Queue, *given: Any, **options: Any) -> dict[int, list[Completion]]:
        take, store, name = queue.take, queue._store, queue._name

        def held(most: int, count: int) -> range:
            if self.rank == 0:
                chosen = take(most, count)
                store.set(f"{name}/begun", "yes")
                while store.add(name, 0) < count:
                    time.sleep(0.01)
                return chosen
            store.wait([f"{name}/begun"])
            return take(most, count)

        queue.take = held  # type: ignore[method-assign]
        found = super().generate_taken(queue, *given, **options)
        self.prompts = len(found)
        return found


def sampled(world: World, deal: Any) -> tuple[list[Any], int, list[Any]]:
    """Completions where rank 0 is held up, the number of prompts that it took, and completions of a second call."""
    own: Any = generator()
    if deal == "queue":
        own.__class__ = Held
        own.rank = world.rank
    shared = SharedGenerator(own, world, deal=deal)
    first = as_lists(shared.generate(PROMPTS, SAMPLING))
    prompts = getattr(own, "prompts", len(world.share(len(PROMPTS))))
    own.__class__ = TransformersGenerator
    again = as_lists(shared.generate(PROMPTS[:5], SAMPLING, first=100))
    return first, prompts, again


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_rollouts_are_the_same_whichever_rank_samples_them(size: int) -> None:
    """To the bit, log-probs included, with lengths from 1 to 40; others take what a rank that is held up does not."""
    alone = generator()
    wanted = as_lists(alone.generate(PROMPTS, SAMPLING))
    lengths = [len(ids) for ids, _, _ in wanted]
    assert min(lengths) <= 3
    assert max(lengths) == 40
    again = as_lists(alone.generate(PROMPTS[:5], SAMPLING, first=100))
    assert again != wanted[:15]
    found = on_ranks(size, sampled, "queue")
    for completions, _, second in found:
        assert completions == wanted
        assert second == again
    taken = [prompts for _, prompts, _ in found]
    assert taken[0] == 2
    assert sum(taken) == len(PROMPTS)


@pytest.mark.slow
def test_equal_parts_are_there_on_demand() -> None:
    found = on_ranks(2, sampled, "parts")
    assert [prompts for _, prompts, _ in found] == [6, 7]
    wanted = generator().generate(PROMPTS, SAMPLING)
    for completions, _, _ in found:
        assert [ids for ids, _, _ in completions] == [c.token_ids for c in wanted]


class Broken(TransformersGenerator):
    def generate_taken(self, queue: Queue, *given: Any, **options: Any) -> dict[int, list[Completion]]:
        raise TrainingError("out of paper")


def broken(world: World) -> tuple[str, list[Any]]:
    """What is said where rank 1 fails, and the completions of the next call, in which it does not."""
    own: Any = generator()
    own.__class__ = Broken if world.rank == 1 else TransformersGenerator
    shared, said = SharedGenerator(own, world), ""
    try:
        shared.generate(PROMPTS, SAMPLING)
    except TrainingError as error:
        said = str(error)
    own.__class__ = TransformersGenerator
    return said, as_lists(shared.generate(PROMPTS, SAMPLING))


@pytest.mark.slow
def test_a_rank_that_fails_fails_on_all_and_the_next_call_has_a_queue_of_its_own() -> None:
    wanted = as_lists(generator().generate(PROMPTS, SAMPLING))
    assert on_ranks(2, broken) == [("rank 1: out of paper", wanted)] * 2


class Engine:
    """An engine in which a request lasts as many passes as its prompt has tokens; another rank takes in between."""

    def __init__(self, others: dict[int, int], queue: Queue, count: int, cache: int | None = None) -> None:
        self.others, self.queue, self.count = others, queue, count
        self.live: dict[str, list[Any]] = {}
        self.seeds: dict[str, int] = {}
        self.passes, self.most = 0, 0
        counts = SimpleNamespace(get_request_counts=lambda: (len(self.live), 0))
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=counts))
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=cache, block_size=1, kv_cache_size_tokens=None)
        )

    def add_request(self, name: str, prompt: Any, options: Any) -> None:
        self.live[name] = [len(prompt["prompt_token_ids"]), prompt["prompt_token_ids"]]
        self.seeds[name] = options
        self.most = max(self.most, len(self.live))

    def has_unfinished_requests(self) -> bool:
        return bool(self.live)

    def step(self) -> list[Any]:
        self.passes += 1
        if self.passes in self.others:
            self.queue.take(self.others[self.passes], self.count)
        done = []
        for name, state in list(self.live.items()):
            state[0] -= 1
            if state[0] == 0:
                del self.live[name]
                flat = SimpleNamespace(logprobs=[], start_indices=[])
                output = SimpleNamespace(token_ids=state[1], logprobs=flat, finish_reason="length")
                done.append(SimpleNamespace(finished=True, request_id=name, outputs=[output]))
        return done


def engine_generator(engine: Any, most: int) -> VLLMGenerator:
    made: Any = VLLMGenerator.__new__(VLLMGenerator)
    made.engine, made.stop_ids, made.calls, made.begun = engine, [], 0, 0
    made.settings = SimpleNamespace(max_tokens=100, max_sequences=most)
    made.progress, made.reset_prefix_cache = lambda: None, lambda: None
    made._options = lambda sampling, seed: seed
    return made


def test_an_engine_takes_a_prompt_when_a_group_has_ended_and_not_before() -> None:
    """Two groups of two at once, of 2, 5, 1, ... passes; the other rank takes two prompts in pass 4."""
    prompts = [(9,) * n for n in (2, 5, 1, 4, 3, 3, 2)]
    queue = Queue(2, Counter(), "q")
    engine = Engine({4: 2}, queue, len(prompts))
    sampling = Sampling(samples=2, max_completion_tokens=9, temperature=1.0, seed=3)
    found = engine_generator(engine, 5).generate_taken(queue, prompts, sampling, first=50)
    # 0 and 1 from pass 1, 2 in pass 3, 3 from pass 4 on, before the other rank has 4 and 5; 6 when 1 has ended.
    assert sorted(found) == [0, 1, 2, 3, 6]
    assert engine.most == 4
    for i, completions in found.items():
        assert [c.token_ids for c in completions] == [list(prompts[i])] * 2
    names = {f"1-{2 * k + j}": (50 + i, j) for k, i in enumerate([0, 1, 2, 3, 6]) for j in range(2)}
    assert engine.seeds == {name: stream_seed(3, place, f"sample/{j}") for name, (place, j) in names.items()}


def test_an_engine_takes_no_more_than_its_share_or_its_cache_has_room_for() -> None:
    prompts = [(9,) * 4 for _ in range(12)]
    sampling = Sampling(samples=2, max_completion_tokens=8, temperature=1.0, seed=3)
    for ranks, cache, most in ((3, None, 8), (3, 48, 6), (1, 48, 24)):  # sequences of 4 + 8 / 2 tokens
        queue = Queue(ranks, Counter(), "q")
        engine = Engine({}, queue, len(prompts), cache)
        found = engine_generator(engine, 100).generate_taken(queue, prompts, sampling)
        assert sorted(found) == list(range(12))
        assert engine.most == most


def test_idle_ranks_by_hand() -> None:
    """Prompts of one completion, two ranks, one at a time: parts end at 9 and 3, taken in turn at 6 and 6."""
    lengths = [[5], [4], [1], [1], [1]]
    one = idle.Sampler(1, refills=True)
    assert idle.ends(lengths[::-1], 2, one, queued=False) == [2, 10]
    assert idle.ends(lengths, 2, one, queued=True) == [6, 6]
    assert idle.share([2, 10]) == pytest.approx(8 / 20)
    # Two at once: 5 and 4 on one rank, two of 1 on the other, which then has the last. Batches wait for their longest.
    assert idle.ends(lengths, 2, idle.Sampler(2, refills=True), queued=True) == [5, 2]
    assert idle.ends([[5, 1], [1, 1], [2, 2]], 1, idle.Sampler(1, refills=False), queued=True) == [8]
    assert idle.ends([[3, 1], [1, 1], [2, 2]], 1, idle.Sampler(2, refills=True), queued=True) == [3]


def test_a_queue_halves_what_ranks_wait_where_prompts_wait() -> None:
    """64 prompts of 4, two of them at once on each of 2 and 4 ranks; with room for all there is no difference."""
    config = tiny_policy.settings(
        generation__prompts_per_step=64, generation__group_size=4, generation__max_completion_tokens=1000
    )
    for ranks in (2, 4):
        found = idle.shares(config, ranks, 8)
        assert found["queue"] < 0.5 * found["parts"], (ranks, found)
        whole = idle.shares(config, ranks, 1000)
        assert whole["queue"] == whole["parts"]
