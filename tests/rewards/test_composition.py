"""Rewards put together: sums, async and foreign functions, no verdict, shaping, and what a step makes of each."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from steady import takes_less
from tiny_run import build, config

from paced_fast.config import ReplayConfig, RewardConfig, SchedulerConfig
from paced_fast.config.resolve import resolve
from paced_fast.config.reward_terms import parse_reward, parse_terms
from paced_fast.data import packing
from paced_fast.data.records import Completion, PromptRow, Targets
from paced_fast.errors import InputError, TrainingError
from paced_fast.paced.replay import ReplayBuffer
from paced_fast.paced.scheduler import PromptScheduler
from paced_fast.paced.targets import group_accuracy, group_advantage
from paced_fast.paced.update import make_optimizer, update_policy
from paced_fast.rewards import Scorer, Shaper
from paced_fast.rewards.loading import import_function, load_reward
from paced_fast.rewards.shaping import centred

FUNCTIONS = '''
import asyncio, time

def length(prompts, completions, **columns):
    return [min(1.0, len(text) / 10) for text in completions]

def vowels(completions):
    return [float(all(c in "aeiou" for c in text)) for text in completions]

def shy(completions):
    return [None if "?" in text else float(text == "a") for text in completions]

def mute(completions):
    return [None] * len(completions)

async def slow(completions, delay):
    await asyncio.sleep(max(delay))
    return [1.0] * len(completions)

async def other_slow(completions, **columns):
    await asyncio.sleep(0.4)
    return [0.5] * len(completions)

async def broken(completions):
    raise KeyError("token")

class Judge:
    async def __call__(self, completions, **columns):
        return [0.25] * len(completions)

judge = Judge()

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "gsm8k" and extra_info == {"index": 3}
    return {"score": float(solution_str == ground_truth), "acc": True}

def compute_plain(solution_str, ground_truth):
    return solution_str == ground_truth

def compute_minus(data_source, solution_str, ground_truth, extra_info):
    return -1

def compute_nameless(answer, text):
    return 1.0

def chat(prompts, completions, answer, **columns):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]

async def async_chat(completions):
    return [float(c[0]["content"] == "b") for c in completions]

def shouting(completions, num_tokens, stopped, max_completion_tokens):
    assert len(num_tokens) == len(stopped) == len(completions)
    return [1.0 if text.isupper() else -1.0 for text in completions]

def half_a_verdict(prompts, completions, **columns):
    """No verdict on a seventh of what a model that knows nothing says; a third of the rest is right."""
    codes = [sum(map(ord, p + c)) for p, c in zip(prompts, completions)]
    return [None if code % 7 == 0 else float(code % 3 == 0) for code in codes]

def shortness(completions, num_tokens, max_completion_tokens):
    return [-n / m for n, m in zip(num_tokens, max_completion_tokens)]
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(FUNCTIONS)
    return path


def row(reward: str, prompt: str = "p", **columns: Any) -> PromptRow:
    return PromptRow(prompt=prompt, token_ids=(0,), reward=reward, slice="s", columns=columns)


def judged(reward: str, *texts: str, settings: RewardConfig | None = None, **columns: Any) -> list[float | None]:
    return Scorer(settings=settings).score([row(reward, **columns)] * len(texts), texts)


# Sums


def test_a_sum_is_a_mean_with_its_weights(own: Path) -> None:
    found = judged(f"3*{own}:vowels+{own}:length", "aaaaa", "xxxxx", "aaaaaaaaaaaa")
    assert found == pytest.approx([0.875, 0.125, 1.0])
    assert judged("exact+number", "it is 4", "4", answer=4) == [0.5, 1.0]


def test_a_function_is_called_once_for_all_sums_that_name_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer()
    rows = [row("exact", answer="a"), row("2*exact+number", answer="1"), row("number", answer="1")]
    scorer.problem("exact+number", {})
    calls = []
    real = scorer._functions["exact"]
    scorer._functions["exact"] = lambda **given: calls.append(len(given["completions"])) or real(**given)
    assert scorer.score(rows, ["a", "one 1", "1"]) == [1.0, pytest.approx(1 / 3), 1.0]
    assert calls == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exact+", "'' is neither a name nor weight"),
        ("x*exact", "'x.exact' is neither a name"),
        ("nan*exact", "finite weight"),
        ("0*exact+number", "other than 0"),
        ("-1*exact", "the weight of 'exact' is negative"),
        ("exact+0.2*exact", "names 'exact' twice"),
        ("1e308*exact+1e308*number", "too large for a number"),
        ("1_0*exact", "is neither a name"),
        ("\u0663*exact", "is neither a name"),
        ("0.5*exakt", "unknown reward 'exakt' .did you mean 'exact'"),
    ],
)
def test_what_is_no_sum(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scorer([text])


def test_terms_and_paths(tmp_path: Path) -> None:
    assert [(t.weight, t.name) for t in parse_terms("0.5*a + -2*b:c")] == [(0.5, "a"), (-2.0, "b:c")]
    assert [t.weight for t in parse_reward("1*a+3*b")] == [0.25, 0.75]
    (tmp_path / "own.py").write_text("def f(completions): return [1.0] * len(completions)")
    assert judged(f"{tmp_path}/own.py:f+exact", "x", answer="y") == [0.5]
    odd = tmp_path / "a+b*c.py"
    odd.write_text("def f(completions): return [1.0] * len(completions)")
    assert judged(f"{odd}:f", "x") == [1.0]


# No verdict


def test_none_is_no_verdict_in_a_sum_too(own: Path) -> None:
    assert judged(f"{own}:shy", "a", "?", "b") == [1.0, None, 0.0]
    assert judged(f"{own}:shy+{own}:vowels", "a", "?", "b") == [1.0, None, 0.0]


def test_unscored_are_counted(own: Path) -> None:
    scorer = Scorer()
    name = f"{own}:shy"
    scorer.score([row(name), row(name), row("exact", answer="c")], ["?", "a", "c"])
    assert scorer.take_counts() == {name: {"unscored": 1}}
    assert scorer.take_counts() == {}


def test_too_many_without_a_verdict_stop_the_run_by_name(own: Path) -> None:
    name = f"{own}:shy"
    scorer = Scorer(settings=RewardConfig(max_unscored_share=0.1))
    for _ in range(40):
        scorer.score([row(name)] * 16, ["?"] + ["a"] * 15)  # a sixteenth: below the bound
        scorer.check_failures()
    scorer.score([row(name)] * 16, ["?"] * 12 + ["a"] * 4)
    with pytest.raises(
        TrainingError, match=r"own.py:shy' left 27 of the last 256 completions unscored, .*max-unscored-share 0.1"
    ):
        scorer.check_failures()
    for _ in range(16):
        scorer.score([row(name)] * 16, ["a"] * 16)
    scorer.check_failures()  # what is long ago does not count
    strict = Scorer(settings=RewardConfig(max_unscored_share=0.0))
    strict.score([row(name)] * 2, ["?", "a"])
    with pytest.raises(TrainingError, match=r"1 of the last 2"):
        strict.check_failures()


# Async


def test_async_functions_wait_together_and_beside_the_others(own: Path) -> None:
    rows = [row(f"{own}:slow", delay=0.4), row(f"{own}:other_slow"), row(f"{own}:judge"), row("exact", answer="x")]
    assert Scorer().score(rows, ["x"] * 4) == [1.0, 0.5, 0.25, 1.0]
    assert takes_less(0.75, lambda: Scorer().score(rows, ["x"] * 4), time.monotonic)


def test_async_functions_under_a_running_loop_and_in_threads(own: Path) -> None:
    async def main() -> list[float | None]:
        return judged(f"{own}:judge", "x")

    assert asyncio.run(main()) == [0.25]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(judged(f"{own}:judge", "x"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0.25]] * 4


def test_an_async_function_without_an_answer_leaves_its_own_unscored(own: Path) -> None:
    scorer = Scorer(settings=RewardConfig(async_seconds=0.1))
    rows = [row(f"{own}:slow", delay=600.0), row("exact", answer="x")]
    assert scorer.score(rows, ["x", "x"]) == [None, 1.0]
    with pytest.raises(InputError, match=r"own.py:broken' failed: KeyError: 'token'"):
        judged(f"{own}:broken", "x")


# Functions of other trainers


def test_verl(own: Path) -> None:
    columns = {"data_source": "gsm8k", "reward_model": {"ground_truth": "4"}, "extra_info": {"index": 3}}
    assert judged(f"verl:{own}:compute_score", "4", "5", **columns) == [1.0, 0.0]
    assert judged(f"verl:{own}:compute_plain", "4", answer="4") == [1.0]
    assert judged(f"0.5*verl:{own}:compute_plain+0.5*exact", "4", answer="4") == [1.0]
    with pytest.raises(InputError, match=r"compute_minus' returned -1 for completion 0: return a number in .0, 1."):
        judged(f"verl:{own}:compute_minus", "4", answer="4")
    with pytest.raises(InputError, match=r"lacks 'ground_truth'"):
        judged(f"verl:{own}:compute_nameless", "4", answer="4")
    problem = Scorer().problem(f"verl:{own}:compute_plain", {"question": "?"})
    assert problem is not None
    assert "needs reward_model.ground_truth, ground_truth or answer" in problem


AWKWARD = """
class Judge:
    def __call__(self, completions): return [1.0] * len(completions)

class Careless(Judge):
    def problem(self, columns): return columns["no such column"]

class Odd(Judge):
    problem = "text"

careless, odd = Careless(), Odd()

def needs(completions, gold): return [1.0] * len(completions)
"""


OWN = """
def judge(completions, **columns): return [1.0] * len(completions)
async def slow(completions): return [1.0] * len(completions)
def _help(text): return text
"""


@pytest.mark.parametrize("prefix", ["", "trl:", "verl:"])
@pytest.mark.parametrize("end", ["", ":"])
def test_a_file_without_a_function_names_those_it_has(tmp_path: Path, prefix: str, end: str) -> None:
    own, gone = tmp_path / "own.py", tmp_path / "gone.py"
    own.write_text(OWN)
    with pytest.raises(InputError) as raised:
        load_reward(f"{prefix}{own}{end}")
    assert str(raised.value) == (
        f"reward '{prefix}{own}{end}' names no function: give {prefix}{own}:judge (the file has judge, slow)"
    )
    with pytest.raises(InputError, match=rf"gone.py{end}': no such file '{gone}'$"):
        load_reward(f"{prefix}{gone}{end}")
    with pytest.raises(InputError, match=r"has no function 'juge' \(did you mean 'judge'\?\): it has judge, slow$"):
        load_reward(f"{prefix}{own}:juge")
    own.write_text("rate = None")
    with pytest.raises(InputError, match=rf"give {prefix}{own}:FUNCTION \(the file has no function yet\)$"):
        load_reward(f"{prefix}{own}{end}")
    with pytest.raises(InputError, match=r"shaping '.*own.py' names no function: give"):
        import_function(str(own), "shaping")


CHATS = """
def content(completions, **columns): return [float("5" in one[0]["content"]) for one in completions]
def last(completions, **columns): return [float("5" in one[-1].get("content")) for one in completions]
def other(completions, **columns): return [[1.0][3] for one in completions]
"""


def test_a_function_that_reads_messages_is_led_to_its_adapter(tmp_path: Path) -> None:
    own = tmp_path / "chats.py"
    own.write_text(CHATS)
    for name in ("content", "last"):
        for text in ("", "it is 5"):
            with pytest.raises(InputError, match=rf": completions are texts here; .* is named trl:{own}:{name}$"):
                judged(f"{own}:{name}", text)
        assert judged(f"trl:{own}:{name}", "it is 5") == [1.0]
    with pytest.raises(InputError, match=r"IndexError: list index out of range \(at [^)]*\): correct it"):
        judged(f"{own}:other", "x")
    with pytest.raises(InputError, match=r"completions are texts here; .* is named trl:FILE.py:FUNCTION$"):
        Scorer(functions={"given:f": lambda completions, **_: [one[0]["content"] for one in completions]}).score(
            [row("given:f")], ["a"]
        )


def test_what_cannot_judge_a_row_is_known_when_rows_are_read(tmp_path: Path) -> None:
    own = tmp_path / "awkward.py"
    own.write_text(AWKWARD)
    scorer = Scorer()
    for name in (f"{own}:needs", f"trl:{own}:needs"):
        assert scorer.problem(name, {"answer": 1}) == (name, "gold")
    assert scorer.problem(f"{own}:needs", {"gold": 1}) is None
    assert scorer.problem(f"{own}:odd", {}) is None
    with pytest.raises(InputError, match=r"careless': its method `problem` failed: KeyError"):
        scorer.problem(f"{own}:careless", {})
    with pytest.raises(InputError, match=r"awkward.py:Judge' is a class: name an instance of it"):
        scorer.problem(f"{own}:Judge", {})
    for name in ("verl:", "trl:"):
        with pytest.raises(InputError, match=rf"reward '{name}' names no function"):
            Scorer([name])
    leaving = tmp_path / "leaving.py"
    leaving.write_text("raise SystemExit(3)")
    with pytest.raises(InputError, match=r"cannot import .*leaving.py': SystemExit: 3"):
        Scorer([f"{leaving}:f"])


@pytest.mark.parametrize("reward", ["exact", "number", "verl:{own}:compute_plain", "trl:{own}:chat"])
def test_a_field_called_self_is_no_argument(own: Path, reward: str) -> None:
    assert judged(reward.format(own=own), "4", answer="4", self=3) == [1.0]


def test_trl_chats(own: Path) -> None:
    assert judged(f"trl:{own}:chat", "b", "c", answer="b") == [1.0, 0.0]
    assert judged(f"trl:{own}:async_chat", "b", "c") == [1.0, 0.0]


# Shaping


def completion(length: int, *, stopped: bool = True) -> Completion:
    return Completion(token_ids=[0] * length, logprobs=[0.0] * length, stopped=stopped)


def shaped(*terms: str, texts: list[str], lengths: list[int], limit: int = 100, **settings: Any) -> list[float]:
    shaper = Shaper(RewardConfig(shaping=terms, **settings))
    completions = [completion(length, stopped=length < limit) for length in lengths]
    return shaper.shape([row("exact")] * len(texts), texts, completions, limit)


def test_shaping_terms() -> None:
    assert shaped("overlong", texts=[""] * 4, lengths=[0, 80, 90, 100]) == pytest.approx([0.0, 0.0, -0.5, -1.0])
    assert shaped("overlong", texts=[""], lengths=[75], overlong_share=0.5) == pytest.approx([-0.5])
    assert shaped("0.5*length", "truncated", texts=["", ""], lengths=[50, 100]) == pytest.approx([-0.25, -1.5])
    assert shaped("boxed", texts=["\\boxed{1}", "1", "\\boxed{1} \\boxed{2}"], lengths=[1, 1, 1]) == [1.0, 0.0, 0.0]


def test_a_shaping_function_of_ones_own(own: Path) -> None:
    assert shaped(f"-0.1*{own}:shouting", texts=["LOUD", "low"], lengths=[1, 2]) == pytest.approx([-0.1, 0.1])
    with pytest.raises(InputError, match=r"unknown shaping 'lenght' .did you mean 'length'"):
        Shaper(RewardConfig(shaping=("lenght",)))
    with pytest.raises(InputError, match=r"no such file"):
        Shaper(RewardConfig(shaping=("0.1*no.py:f",)))
    assert not Shaper(RewardConfig())


def test_shaping_is_centred_over_the_scored_ones() -> None:
    assert centred([1.0, 0.0, 5.0, 2.0], [True, True, False, True]) == [0.0, -1.0, 0.0, 1.0]
    assert centred([1.0, 2.0], [False, False]) == [0.0, 0.0]


# What a step makes of it


def test_statistics_are_those_of_the_scored_completions() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    scored = torch.tensor([True, False, True, True, False, False])
    assert group_accuracy(rewards, scored, 3).tolist() == pytest.approx([0.5, 1.0])
    advantage = group_advantage(rewards, scored, 3)
    assert advantage.tolist() == pytest.approx([0.5**0.5, 0.0, -(0.5**0.5), 0.0, 0.0, 0.0], abs=1e-4)
    nobody = torch.zeros(3, dtype=torch.bool)
    assert group_accuracy(rewards[:3], nobody, 3).tolist() == [0.0]
    assert group_advantage(rewards[:3], nobody, 3).tolist() == [0.0] * 3


@pytest.mark.parametrize("algorithm", ["paced", "grpo"])
def test_an_update_with_unscored_completions_is_that_without_them(algorithm: str) -> None:
    lengths, verdicts = [3, 5, 1, 2, 4, 1, 2, 6], [1.0, None, 0.0, 0.0, None, 1.0, 0.0, None]
    kept = [i for i, verdict in enumerate(verdicts) if verdict is not None]
    settings = tiny_policy.settings(algorithm, optimizer__minibatches=1)
    after = []
    for chosen in (range(8), kept):
        policy = tiny_policy.policy()
        batch = tiny_policy.rollouts(lengths, group_size=4, rewards=[0.0] * 8)
        batch = packing.select(batch, list(chosen))
        object.__setattr__(batch, "scored", tuple(verdicts[i] is not None for i in chosen))
        signal = torch.tensor([verdicts[i] or 0.0 for i in chosen]) - 0.3
        old = policy.logprobs(batch, 1.0)
        targets = Targets(
            signal=signal,
            intercept=torch.full_like(signal, 0.4),
            old_logprobs=old,
            ref_logprobs=old,
            weights=torch.ones_like(signal),
        )
        optimizer = make_optimizer(policy, settings.optimizer)
        result = update_policy(policy, optimizer, batch, targets, settings, step=1, num_updates=100)
        assert result.weight.gt(0).tolist() == list(batch.scored)
        after.append(([p.detach().clone() for p in policy.parameters()], result.loss))
    (one, first_loss), (two, second_loss) = after
    torch.testing.assert_close(first_loss, second_loss, rtol=1e-5, atol=0)
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_the_replay_ring_takes_nothing_without_a_verdict_and_keeps_the_shaping() -> None:
    settings = ReplayConfig(mode="on", capacity=8, insert_per_step=8, draw_per_step=8)
    ring = ReplayBuffer(settings, max_completion_tokens=6, seed=0, device=torch.device("cpu"))
    completions = [completion(2), completion(3), completion(1), completion(4)]
    batch = packing.pack(
        completions, [(5,)] * 4, [0] * 4, [1.0, None, 1.0, None], 1, torch.device("cpu"), [0.5, 0, -0.5, 0]
    )
    assert int(ring.insert(batch, torch.tensor([0.5]), torch.full((4,), 0.5))) == 2
    slots, lengths, prompts = ring.choose(1, 2).tolist()

    class Table:
        rows = (row("exact"),)

    taken = ring.take(slots, lengths, prompts, Table())  # type: ignore[arg-type]
    assert taken is not None
    assert sorted(zip(taken.lengths, taken.rewards.tolist(), taken.shaping.tolist(), strict=True)) == [
        (1, 1.0, -0.5),
        (2, 1.0, 0.5),
    ]
    assert taken.scored == (True, True)


def test_the_schedule_learns_nothing_from_a_group_without_a_verdict() -> None:
    scheduler = PromptScheduler(4, SchedulerConfig(rule="history"), seed=0, device=torch.device("cpu"))
    index, known = torch.tensor([1, 3]), torch.tensor([True, False])
    scheduler.observe(index, torch.tensor([0.9, 0.0]), known)
    assert scheduler.last_accuracy.tolist() == pytest.approx([0.5, 0.9, 0.5, 0.5])
    assert scheduler.visits.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("algorithm", ["paced", "flowrl", "grpo"])
def test_a_run_with_shaping_and_missing_verdicts(own: Path, tmp_path: Path, algorithm: str) -> None:
    settings = config(
        own,
        algorithm,
        reward="half_a_verdict",
        reward__shaping=(f"0.2*{own}:shortness",),
        reward__max_unscored_share=0.5,
    )
    run = build(settings, tmp_path / "run")
    missing = shapes = 0.0
    for _ in range(4):
        record, shown, _ = run.stepper.step()
        missing += record.unscored_share
        shapes += abs(record.shaping_mean)
        assert record.loss == record.loss
        counted = sum(kinds["unscored"] for kinds in record.verdicts.values())
        assert counted == pytest.approx(record.unscored_share * 16)
        json.dumps(shown)
    assert 0 < missing < 2
    assert shapes > 0


def test_log_z_learns_from_scored_completions_alone(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(config(own, "tb", reward="half_a_verdict", reward__max_unscored_share=0.9), tmp_path / "run")
    head = run.trainer.log_z
    assert head is not None
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(head, "fit", watched(head.fit, seen))
    records = [run.stepper.step().record for _ in range(4)]
    k = next(i for i, record in enumerate(records) if record.unscored_share > 0)
    record, (target, weight) = records[k], seen[k]
    missing = weight == 0
    assert 0 < missing.float().mean() == pytest.approx(record.unscored_share)
    assert float(weight.mean()) == pytest.approx(1.0)
    assert weight[~missing].unique().numel() == 1
    assert target[missing].abs().max() == 0


def test_log_z_never_sees_the_shaping(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step from the same start: the head gets the same targets with and without shaping, the policy does not."""
    targets, heads, policies = [], [], []
    for name, shaping in (("without", ()), ("with", (f"{own}:shortness",))):
        settings = config(own, "tb", reward="length", reward__shaping=shaping, log_z__loss="bce")
        run = build(settings, tmp_path / name)
        head = run.trainer.log_z
        assert head is not None
        monkeypatch.setattr(head, "fit", watched(head.fit, targets))
        run.stepper.step()
        heads.append(head.all_values().clone())
        policies.append([p.detach().clone() for p in run.trainer.policy.parameters()])
    assert torch.equal(targets[0][0], targets[1][0])
    assert torch.equal(*heads)
    assert not all(torch.equal(left, right) for left, right in zip(*policies, strict=True))


def watched(fit: Any, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """`fit` of a head, with its targets and weights kept in `seen`."""

    def record(index: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, *, groups: int) -> Any:
        seen.append((target.clone(), weight.clone()))
        return fit(index, target, weight, groups=groups)

    return record


def test_a_step_without_any_verdict_stops_and_so_does_a_wrong_shaping_name(own: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown shaping 'lenght'"):
        build(config(own, reward="length", reward__shaping=("lenght",)), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    run = build(config(own, reward="mute", reward__max_unscored_share=1.0), tmp_path / "mute")
    with pytest.raises(TrainingError, match=r"no completion of step 1 could be scored"):
        run.stepper.step()
    assert run.stepper.counters.step == 0
    run = build(config(own, reward="mute"), tmp_path / "bound")
    with pytest.raises(
        TrainingError, match=r"mute' left 1. of the last 1. .* allows: it returned None for all: return a number"
    ):
        run.stepper.step()


def test_settings_out_of_range() -> None:
    with pytest.raises(InputError, match=r"reward.max-unscored-share is 1.5"):
        resolve(tiny_policy.replaced(tiny_policy.settings(), reward__max_unscored_share=1.5))
