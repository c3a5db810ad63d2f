"""`PacedTrainer` takes the arguments and rows that GRPOTrainer takes, and knows each row by its number."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")

import tiny_policy
import tiny_trl
from datasets import Dataset
from trl import GRPOTrainer, TrlParser

from paced_fast.errors import InputError
from paced_fast.integrations.trl import PacedConfig, PacedTrainer
from paced_fast.integrations.trl_config import REFUSED
from paced_fast.integrations.trl_data import INDEX, Numbered

LEARNED = {"log_z": "learned"}
PACED = {"prompt_sampling": "paced"}


def half(completions: list[str], **_: Any) -> list[float]:
    return [0.5 + 0.1 * (i % 2) for i in range(len(completions))]


def build(folder: Path, data: Any, *, reward_funcs: Any = half, kind: Any = tiny_trl.Recorder, **changes: Any) -> Any:
    names = ("rollout_func", "eval_dataset", "environment_factory")
    options = {name: changes.pop(name) for name in names if name in changes}
    return kind(
        tiny_policy.model(sharpness=2.0),
        reward_funcs,
        tiny_trl.settings(folder, **changes),
        train_dataset=data,
        processing_class=tiny_trl.tokenizer(),
        **options,
    )


# ---- rows keep their numbers ----------------------------------------------------------------------------------------


def only_prompts(batch: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": batch["prompt"]}


HIDING = {
    "transform": lambda data: data.with_transform(only_prompts),
    "transform of columns": lambda data: data.with_transform(only_prompts, columns=["prompt"]),
    "format": lambda data: data.with_format(None, columns=["prompt"]),
    "torch": lambda data: data.with_format("torch", columns=["prompt"]),
    "shuffled": lambda data: data.shuffle(seed=1).with_transform(only_prompts),
    "selected": lambda data: data.select([3, 2, 1, 0, 5, 4]).with_transform(only_prompts),
}


@pytest.mark.parametrize("memory", [LEARNED, PACED, {**LEARNED, **PACED}], ids=["learned", "paced", "both"])
@pytest.mark.parametrize("hiding", HIDING)
def test_rows_are_numbered_whatever_hides_columns(tmp_path: Path, hiding: str, memory: dict[str, Any]) -> None:
    data = HIDING[hiding](tiny_trl.data())
    made = build(tmp_path, data, max_steps=2, **memory)
    made.train()
    prompts = [tiny_trl.tokenizer()(str(data[i]["prompt"]))["input_ids"] for i in range(len(data))]
    seen = set()
    for batch in made.batches:
        for ids, mask, number in zip(batch["prompt_ids"], batch["prompt_mask"], batch["prompt_index"], strict=True):
            assert ids[mask.bool()].tolist() == prompts[int(number)]
            seen.add(int(number))
    assert len(seen) > 2
    assert int(made.memory.scheduler.visits.sum()) == 4  # two prompts per step
    assert {i for i in range(len(data)) if made.memory.scheduler.visits[i]} == seen


def test_a_transform_makes_what_reward_functions_see(tmp_path: Path) -> None:
    def with_double(batch: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": [p + p for p in batch["question"]], "double": [p * 2 for p in batch["question"]]}

    seen: list[Any] = []

    def told(prompts: list[str], completions: list[str], double: list[str], **columns: Any) -> list[float]:
        assert double == prompts
        assert INDEX not in columns
        seen.extend(double)
        return half(completions)

    data = tiny_trl.data().rename_column("prompt", "question").with_transform(with_double)
    made = build(tmp_path, data, reward_funcs=told, max_steps=1, eval_dataset=data, **LEARNED)
    made.train()
    made.evaluate()
    assert len(seen) == 8 + 4 * 12
    assert made.batches[0]["prompt_index"].unique().numel() == 2


def test_evaluation_needs_no_numbers_of_the_same_rows(tmp_path: Path) -> None:
    data = tiny_trl.data()
    made = build(tmp_path, data, eval_dataset=data, max_steps=1, **LEARNED, **PACED)
    before = made.evaluate()
    assert before["eval_reward"] == pytest.approx(0.55)
    assert int(made.memory.scheduler.visits.sum()) == 0


def test_a_transform_that_makes_other_numbers_of_rows_is_refused() -> None:
    data = tiny_trl.data().with_transform(lambda batch: {"prompt": batch["prompt"] * 2})
    with pytest.raises(InputError, match=r"makes 4 rows of 2, .* keep the number of rows"):
        Numbered(data).__getitems__([3, 4])


def test_a_column_of_the_same_name_is_refused() -> None:
    data = tiny_trl.data().add_column(INDEX, list(range(12)))
    with pytest.raises(InputError, match="rename the column"):
        Numbered(data)[0]


def test_rows_of_another_loader_are_refused(tmp_path: Path) -> None:
    class Own(tiny_trl.Recorder):
        def get_train_dataloader(self) -> Any:
            memory, self.memory = self.memory, None
            loader = super().get_train_dataloader()
            self.memory = memory
            return loader

    with pytest.raises(InputError, match="do not override get_train_dataloader"):
        build(tmp_path, tiny_trl.data(), kind=Own, **LEARNED).train()


# ---- rewards --------------------------------------------------------------------------------------------------------


def far(completions: list[str], **_: Any) -> list[float]:
    return [41.0 + i for i in range(len(completions))]


def below(completions: list[str], **_: Any) -> list[float]:
    return [-1.0 + i % 2 for i in range(len(completions))]


@pytest.mark.parametrize(("function", "shown"), [(far, "from 41 to 48"), (below, "from -1 to 0")])
@pytest.mark.parametrize("memory", [LEARNED, PACED], ids=["learned", "paced"])
def test_rewards_that_are_no_accuracies_are_refused_by_what_takes_them_for_such(
    tmp_path: Path, memory: dict[str, Any], function: Any, shown: str
) -> None:
    option = "=".join(map(repr, *memory.items())).replace("'", "", 2)
    made = build(tmp_path, tiny_trl.data(), reward_funcs=function, **memory)
    with pytest.raises(InputError, match=rf"^{option} needs rewards in .0, 1., .* and these go {shown}: scale them"):
        made.train()
    assert made.state.global_step == 0


def test_a_weighted_mean_may_round(tmp_path: Path) -> None:
    def one(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    weights = [0.1] * 10
    assert float((torch.ones(10) * torch.tensor(weights)).sum()) != 1.0
    made = build(tmp_path, tiny_trl.data(), reward_funcs=[one] * 10, reward_weights=weights, max_steps=1, **LEARNED)
    made.train()
    assert made.state.global_step == 1


def with_extra(prompts: list[str], trainer: Any) -> dict[str, Any]:
    ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
    made = [[2 + i % 9, 3, tiny_policy.STOP] for i in range(len(prompts))]
    return {
        "prompt_ids": ids,
        "completion_ids": made,
        "logprobs": [[-1.0] * 3 for _ in made],
        "won": [i % 3 / 2 for i in range(len(made))],
        "game": "go",
    }


def test_fields_of_a_rollout_function_feed_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def reward(completions: list[str], won: list[float], game: list[str], **_: Any) -> list[float]:
        assert set(game) == {"go"}
        return won

    made = build(tmp_path, tiny_trl.data(), reward_funcs=reward, rollout_func=with_extra, max_steps=1, **LEARNED)
    made.train()
    assert made.batches[0]["rewards"].tolist() == [i % 3 / 2 for i in range(8)]


def supplied(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        return function(*args, scale=0.5, **options)

    return wrapper


@supplied
def decorated(completions: list[str], scale: float, **_: Any) -> list[float]:
    return [scale * (i % 2) for i in range(len(completions))]


class Judge:
    """As reward models behind an interface are."""

    __name__ = "judge"

    def __init__(self) -> None:
        self.scale = 0.5

    @supplied
    def __call__(self, completions: list[str], scale: float, **_: Any) -> list[float]:
        return [scale * (i % 2) for i in range(len(completions))]


def partial(completions: list[str], scale: float, **_: Any) -> list[float]:
    return [scale * (i % 2) for i in range(len(completions))]


@pytest.mark.parametrize(
    "function",
    [decorated, Judge(), functools.partial(partial, scale=0.5), Judge().__call__],
    ids=["wraps", "object", "partial", "method"],
)
def test_decorated_reward_functions_are_asked_for_what_they_take_themselves(tmp_path: Path, function: Any) -> None:
    made = build(tmp_path, tiny_trl.data(), reward_funcs=function, max_steps=1)
    made.train()
    assert made.batches[0]["rewards"].tolist() == [0.0, 0.5] * 4


def needs_solution(completions: list[str], solution: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (lambda rows: rows, {}),
        (lambda rows: rows.with_transform(only_prompts), {}),
        (lambda rows: rows.add_column("solution", ["1"] * 12), {"remove_unused_columns": True}),
        (lambda rows: rows.add_column("solution", ["1"] * 12).with_format(None, columns=["prompt"]), {}),
    ],
    ids=["columns", "transform", "removed", "format"],
)
def test_a_column_that_a_reward_misses_is_named_before_anything_is_generated(
    tmp_path: Path, data: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda *_: pytest.fail("generated"))
    with pytest.raises(InputError, match="reward function needs_solution needs the column 'solution'"):
        build(tmp_path, data(tiny_trl.data()), reward_funcs=needs_solution, **changes).train()


def test_rows_of_a_transform_without_prompts_are_refused(tmp_path: Path) -> None:
    data = tiny_trl.data().with_transform(lambda batch: {"question": batch["prompt"]})
    with pytest.raises(InputError, match="a row of the train dataset has no column 'prompt', only question"):
        build(tmp_path, data).train()


# ---- empty prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_an_empty_prompt_is_named_at_the_start(tmp_path: Path, part: str) -> None:
    rows = Dataset.from_dict({"prompt": ["1", "2", "", "3"]})
    data = {"train_dataset": tiny_trl.data(), "eval_dataset": None, part: rows}
    with pytest.raises(InputError, match=f"row 2 of {part} has an empty prompt"):
        build(tmp_path, data["train_dataset"], eval_dataset=data["eval_dataset"])


def test_a_prompt_that_turns_out_to_have_no_tokens_is_named(tmp_path: Path) -> None:
    data = tiny_trl.data().with_transform(lambda batch: {"prompt": ["" for _ in batch["prompt"]]})
    with pytest.raises(InputError, match="the prompt '' has no tokens"):
        build(tmp_path, data).train()


def test_empty_prompts_of_a_rollout_function_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def starts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        found = with_extra(prompts, trainer)
        return {**found, "prompt_ids": [[5] for _ in prompts]}

    rows = Dataset.from_dict({"prompt": [""] * 4})
    made = build(tmp_path, rows, rollout_func=starts, max_steps=1)
    made.train()
    assert made.batches[0]["prompt_ids"].tolist() == [[5]] * 8
    with pytest.raises(InputError, match="the prompt '' has no tokens"):
        build(tmp_path, rows, rollout_func=with_extra, max_steps=1).train()


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_the_signature_is_that_of_the_installed_grpo_trainer() -> None:
    assert inspect.signature(PacedTrainer.__init__) == inspect.signature(GRPOTrainer.__init__)
    assert inspect.signature(PacedTrainer) == inspect.signature(GRPOTrainer)


def test_every_argument_may_be_positional(tmp_path: Path) -> None:
    made = tiny_trl.Recorder(
        tiny_policy.model(sharpness=2.0),
        half,
        tiny_trl.settings(tmp_path, max_steps=1, **LEARNED),
        tiny_trl.data(),
        {"small": tiny_trl.data(2)},
        tiny_trl.tokenizer(),
        None,
        [],
        (None, None),
    )
    made.train()
    assert made.batches[0]["prompt_index"].unique().numel() == 2
    assert set(made.eval_dataset) == {"small"}
    with pytest.raises(InputError, match=r"eval_dataset\['bad'\] has no column 'prompt'"):
        PacedTrainer(
            tiny_policy.model(),
            half,
            tiny_trl.settings(tmp_path),
            tiny_trl.data(),
            {"bad": Dataset.from_dict({"question": ["1"]})},
            tiny_trl.tokenizer(),
        )


def test_settings_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # TRL's default is bfloat16, which transformers allows on a CPU only where it is asked for.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model = tiny_policy.model(sharpness=2.0)
    model.config._name_or_path = "maker/small"
    made = PacedTrainer(model, half, train_dataset=tiny_trl.data(), processing_class=tiny_trl.tokenizer())
    assert isinstance(made.args, PacedConfig)
    assert made.args.output_dir == "small-PACED-RL"
    assert made.args.tb_beta == 0.05


def test_a_wrong_argument_is_a_type_error_as_in_trl(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'train_data'"):
        PacedTrainer(tiny_policy.model(), half, tiny_trl.settings(tmp_path), train_data=tiny_trl.data())


def test_settings_are_read_by_trls_parser(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--tb_beta", "0.1", "--no_fused", "--log_z", "learned", "--use_cpu"]
    (found,) = TrlParser((PacedConfig,)).parse_args_and_config([*words, "--bf16", "false"])
    assert (found.tb_beta, found.fused, found.log_z) == (0.1, False, "learned")


@pytest.mark.parametrize(
    "changes",
    [{"scale_rewards": False}, {"scale_rewards": "none"}, {"importance_sampling_level": "sequence"}],
    ids=str,
)
def test_options_that_ask_for_what_the_loss_does_change_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = tiny_trl.trainer(tmp_path, max_steps=1)
    plain.train()
    made = tiny_trl.trainer(tmp_path, max_steps=1, **changes)
    made.train()
    assert torch.equal(made.batches[0]["completion_ids"], plain.batches[0]["completion_ids"])
    for p, q in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_page_of_other_trainers_names_every_option_that_is_refused() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "other-trainers.md").read_text(encoding="utf-8")
    section = text[text.index("## TRL") : text.index("## verl")]
    assert [name for name in REFUSED if f"`{name}`" not in section] == []
