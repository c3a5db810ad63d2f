"""Runs from Python: rows, a function and a model in memory to a result, in one process that is left as it was."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from steady import wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from paced_fast.api import Comparison, Result, compare, evaluate, report, train
from paced_fast.api.settings import in_python
from paced_fast.api.tables import table as as_table
from paced_fast.config.given import in_words
from paced_fast.errors import InputError
from paced_fast.run.start import signals

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"question": f"{a}+{b}=", "answer": str(a + b), "level": a} for a in range(5) for b in range(4)]
HELD_OUT = [{"question": f"{a}-1=", "answer": str(a - 1)} for a in range(6)]
SMALL: dict[str, Any] = {
    "optimizer.learning_rate": 1e-2,
    "generation": {"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 5},
    "evaluation": {"every": 0, "final_samples": 2},
    "run.threads": 1,
    "run.report": False,
}


def odd(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A third of what a model says that knows nothing."""
    return [float(sum(map(ord, p + c)) % 3 == 0) for p, c in zip(prompts, completions, strict=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small chat model."""
    return tiny_chat.save(tmp_path_factory.mktemp("models") / "mine", tiny_chat.tokenizer(), stops=[256])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def result(model: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Three steps with rows and a local function, and an evaluation before and after them."""
    seen = []

    def reward(prompts: list[str], completions: list[str], answer: list[str], level: Any = None) -> list[float]:
        seen.append((prompts, answer, level))
        return odd(prompts, completions)

    folder = tmp_path_factory.mktemp("runs") / "first"
    made = train(
        model, ROWS, reward=reward, eval_data=HELD_OUT, steps=3, run_dir=folder, progress=False, settings=SMALL
    )
    assert seen[-1][1] is not None
    return made


@pytest.mark.process
def test_the_result_has_figures_charts_rollouts_and_the_policy(result: Result, tmp_path: Path) -> None:
    metrics = result.metrics
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    assert isinstance(metrics, pandas.DataFrame)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics["step"].tolist() == [0, 1, 2, 3]
    assert metrics["reward_mean"].tolist()[1:] == [line["reward_mean"] for line in lines[1:]]
    assert metrics["eval.accuracy"].iloc[-1] == result.summary["accuracy_after"] == lines[-1]["eval"]["accuracy"]
    assert {"step", "prompt", "completion", "reward"} <= set(result.rollouts.columns)
    assert result.plot().save(tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "3 steps, 48 rollouts" in repr(result)
    assert report(result) == result.folder / "report.html"
    assert result.export(tmp_path / "exported").is_dir()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert exported.config.vocab_size == result.model.config.vocab_size


def test_printed_tables_have_the_columns_that_matter(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    head = str(result.metrics).splitlines()[0]
    assert head.split() == ["step", "rollouts", "reward_mean", "eval.accuracy", "loss", "mixed_group_share"]
    assert str(result.rollouts).splitlines()[0].split()[:5] == ["step", "prompt", "completion", "reward", "value"]
    evaluated = evaluate(result, samples=1, progress=False)
    assert str(evaluated.table).splitlines()[0].split()[:3] == ["slice", "prompts", "accuracy"]
    assert str(evaluated.samples).splitlines()[0].split()[:4] == ["slice", "prompt", "completion", "reward"]


def test_the_policy_answers_in_the_template_of_its_run(result: Result) -> None:
    one = result.generate("1+2=", max_completion_tokens=6)
    assert isinstance(one, str)
    assert one == result.generate([{"role": "user", "content": "1+2="}], max_completion_tokens=6)
    assert one == result.generate(["1+2=", "4+4="], max_completion_tokens=6)[0]
    assert len(result.generate("1+2=", samples=3)) == 3
    # The likeliest tokens, by the model itself.
    chat = [{"role": "user", "content": "1+2="}]
    ids = result.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = result.model.generate(**ids, max_new_tokens=4, do_sample=False, eos_token_id=256, pad_token_id=256)
    new = whole[0, ids["input_ids"].shape[1] :]
    assert result.generate("1+2=", temperature=0, max_completion_tokens=4) == result.tokenizer.decode(new)
    with pytest.raises(InputError, match="the prompt is 3: give a text, a list of texts, or a list of messages"):
        result.generate(3)  # pyright: ignore[reportArgumentType]


def test_no_setting_of_a_demonstration_is_in_a_run(result: Result) -> None:
    config = result.config
    assert (config.preset, config.warm_start.first.steps, config.warm_start.second.steps) == ("own", 0, 0)
    assert config.data.template == "chat"
    assert config.model.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert config.optimizer.learning_rate == 1e-2
    assert config.data.headline == ()


def test_evaluation_takes_the_function_of_its_run_or_another(result: Result) -> None:
    own = evaluate(result, samples=2, progress=False)
    assert own.figures["prompts"] == len(HELD_OUT)
    assert len(own.samples) == 2 * len(HELD_OUT)
    wanted = odd(list(own.samples["prompt"]), list(own.samples["completion"]))
    assert own.samples["reward"].tolist() == wanted
    assert own.accuracy == pytest.approx(sum(wanted) / len(wanted))
    other = evaluate(
        result.folder, HELD_OUT, reward=lambda completions, **_: [1.0] * len(completions), samples=1, progress=False
    )
    assert other.accuracy == 1.0
    assert other.table["prompts"].tolist() == [6, 6]
    with pytest.raises(InputError, match=r"reward 'reward' is a function that was handed over from Python .*: give it"):
        evaluate(result.folder, samples=1, progress=False)
    with pytest.raises(InputError, match=r"evaluate has no option 'temprature' \(did you mean 'temperature'\?\)"):
        evaluate(result, temprature=1.0)


@pytest.mark.process
def test_a_model_object_is_copied_and_left_as_it_is(model: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    before = {name: weight.clone() for name, weight in mine.state_dict().items()}
    capfd.readouterr()
    made = train(mine, ROWS, reward=odd, tokenizer=tokenizer, steps=1, progress=False, settings=SMALL)
    told = capfd.readouterr()
    assert "it/s" not in told.out + told.err, "a progress bar of another package leaked"
    assert "INFO" not in told.out
    assert made.folder == Path("runs/LlamaForCausalLM-paced-0")
    assert all(torch.equal(weight, before[name]) for name, weight in mine.state_dict().items())
    trained = made.model.state_dict()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    assert not list((made.folder / "given").rglob("*.safetensors")), "the run has its own copy"
    again = train(mine, ROWS, reward=odd, tokenizer=tokenizer, steps=1, progress=False, settings=SMALL)
    assert again.folder == Path("runs/LlamaForCausalLM-paced-0-2")
    assert all(torch.equal(weight, again.model.state_dict()[name]) for name, weight in trained.items())
    found = compare(made, again.folder)
    assert found.page == (here / "runs" / "compare.html")
    assert found.table["steps"].tolist() == [1, 1]
    resumed = train(
        mine, ROWS, reward=odd, tokenizer=tokenizer, steps=2, run_dir=made.folder, resume=True, progress=False,
        settings=SMALL,
    )  # fmt: skip
    assert resumed.summary["steps"] == 2
    with pytest.raises(InputError, match=r": data has other rows than in that run: give the same to continue it, or"):
        train(mine, ROWS[1:], reward=odd, tokenizer=tokenizer, run_dir=made.folder, resume=True, settings=SMALL)


def test_the_process_is_left_as_it_was(model: str, here: Path) -> None:
    package = logging.getLogger("paced_fast")
    torch.set_float32_matmul_precision("high")
    try:
        before = (torch.get_num_threads(), list(package.handlers), package.level, package.propagate)
        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        train(model, ROWS, reward=odd, steps=1, progress=False, settings={**SMALL, "run.threads": 2})
        assert torch.equal(torch.rand(3), wanted)
        assert (torch.get_num_threads(), list(package.handlers), package.level, package.propagate) == before
        assert torch.get_float32_matmul_precision() == "high"
        assert float(torch.tensor(1e-40) * 1.0) != 0.0
    finally:
        torch.set_float32_matmul_precision("highest")


def test_progress_is_told(model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(model, ROWS, reward=odd, steps=1, settings=SMALL)
    told = capsys.readouterr().out
    assert "step 1/1" in told
    assert "run folder" in told


@pytest.mark.process
def test_what_python_handed_over_is_told_in_its_words(
    model: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the files that rows and models are written into, nor the names made for functions."""

    def even(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return odd(prompts, completions)

    mine, its = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    made = train(
        mine, ROWS, tokenizer=its, reward=even, eval_data=ROWS[:5], steps=1, settings=SMALL | {"run.report": True}
    )
    told = " ".join(capsys.readouterr().out.split())
    exported = made.export(here / "exported")
    card, page = (path.read_text() for path in (exported / "README.md", made.folder / "report.html"))
    log = told + card + page
    for made_up in (str(here), "given:", "jsonl:"):
        assert made_up not in log.replace(f"{exported}", ""), log[max(0, log.find(made_up) - 200) : log.find(made_up)]
    assert "first training row, data, row 1 (slice data)" in told
    assert "training prompts are also held-out prompts (data, row 1 is eval_data, row 1;" in told
    assert "reward even of this answer" in told
    for place in (card, page):
        assert "a model from Python" in place
        assert "rows from Python, given/data-" in place
        assert "even (a function from Python)" in place
    assert "base_model" not in card, "there is no such repository"


def test_a_path_in_a_folder_of_that_name_is_left_alone() -> None:
    for value in ("jsonl:/mine/given/train.jsonl?reward=number", "/mine/given/model-7b", None, 3, ("a.csv",)):
        assert in_words(value) == (list(value) if isinstance(value, tuple) else value)
    assert in_words("a.csv?reward=given:mine&rows=0:3") == "a.csv?reward=mine (a function from Python)&rows=0:3"
    assert in_words("given:mine") == "mine (a function from Python)"
    older = "jsonl:runs/a/given/data-0123456789abcdef.jsonl?slice=data&reward=given:mine"
    assert in_words(older) == "rows from Python, given/data-0123456789abcdef.jsonl in the run folder, reward mine"


@pytest.mark.parametrize(
    ("told", "in_words_of_python"),
    [
        ("give --model and --data, and a reward", "give model and data, and a reward"),
        (
            "give --benchmarks gsm8k,amc23, or --data 'x.jsonl?a=b'",
            "give benchmarks='gsm8k,amc23', or data='x.jsonl?a=b'",
        ),
        ("as in --data FILE --eval-data 'FILE?rows=0:3'", "as in data='FILE' eval_data='FILE?rows=0:3'"),
    ],
)
def test_options_of_lists_become_arguments(told: str, in_words_of_python: str) -> None:
    assert in_python(told) == in_words_of_python


def test_an_evaluation_prints_its_tables_once(result: Result, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated = evaluate(result, samples=2)
    assert "pass@k" not in capsys.readouterr().out, "they are in what is returned"
    first, *tables = repr(evaluated).splitlines()
    assert first.startswith(
        f"Evaluated({evaluated.figures['model']!r}): accuracy {evaluated.accuracy:.3f} (95 % interval "
    )
    shown = "\n".join(tables)
    assert [shown.count(title) for title in ("held-out accuracy, 95 % intervals", "pass@k: ", "maj@k: ")] == [1, 1, 1]
    assert f"eval_data {len(HELD_OUT)} " in " ".join(shown.split())
    assert max(map(len, tables)) <= 100


def test_a_run_in_another_thread(model: str, here: Path) -> None:
    made: list[Result] = []
    thread = threading.Thread(
        target=lambda: made.append(train(model, ROWS, reward=odd, steps=1, progress=False, settings=SMALL))
    )
    thread.start()
    thread.join()
    assert made[0].summary["steps"] == 1


def test_an_interrupt_saves_and_returns_the_result_so_far(model: str, here: Path) -> None:
    steps = []

    def interrupted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if len(completions) == 16:  # fewer only try the function
            steps.append(len(steps) + 1)
            if len(steps) == 2:
                os.kill(os.getpid(), signal.SIGINT)
        return odd(prompts, completions)

    settings = {**SMALL, "steps": 5}
    made = train(model, ROWS, reward=interrupted, progress=False, settings=settings)
    assert made.stopped == f"interrupted after step 2: train(..., run_dir={str(made.folder)!r}, resume=True) continues"
    assert made.metrics["step"].tolist()[-1] == 2
    assert made.summary["steps"] == 2
    assert isinstance(made.generate("1+1=", max_completion_tokens=2), str)
    rest = train(model, ROWS, reward=interrupted, run_dir=made.folder, resume=True, progress=False, settings=settings)
    assert rest.stopped == ""
    straight = train(model, ROWS, reward=interrupted, progress=False, settings=settings)
    columns = ["step", "reward_mean", "loss", "grad_norm"]
    assert rest.metrics[columns].equals(straight.metrics[columns])


def test_a_second_interrupt_leaves_the_process_alive(model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)

    def hangs(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if len(completions) == 16:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: False)  # the exception ends it
        return odd(prompts, completions)

    with pytest.raises(KeyboardInterrupt):
        train(model, ROWS, reward=hangs, steps=2, progress=False, settings=SMALL)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = train(model, ROWS, reward=odd, steps=1, progress=False, settings=SMALL)
    assert again.summary["steps"] == 1


def test_rows_come_from_many_places(model: str, here: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install -e '.[data]'")
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = set()
    for data in (
        datasets.Dataset.from_list(ROWS),
        pandas.DataFrame(ROWS),
        (dict(row) for row in ROWS),
        ["jsonl:rows.jsonl?rows=0:10&prompt=question", "jsonl:rows.jsonl?rows=10:20&prompt=question"],
        Path("rows.jsonl"),
    ):
        made = train(model, data, reward="exact", steps=1, progress=False, settings=SMALL)
        assert made.config.reward.name == "exact"
        assert "reward=" not in " ".join(made.config.data.train), "sources stay as they were given"
        files |= {path.name for path in made.folder.glob("given/data-*.jsonl")}
    assert len(files) == 1, "the same rows are the same file"


@pytest.mark.process
def test_importing_is_light() -> None:
    heavy = ("torch", "transformers", "numpy", "pandas", "rich", "datasets", "tyro", "triton")
    code = (
        "import sys\nimport paced_fast\nfrom paced_fast.api import train, evaluate, compare, report\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def fails(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("level")


def by_answer(completions: list[str], answer: list[str]) -> list[float]:
    return [0.0] * len(completions)


class Judge:
    """A class, where an instance is asked for."""

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)


def bad(**changes: Any) -> dict[str, Any]:
    return {"data": ROWS, "reward": odd, "steps": 1, "progress": False, **SMALL, **changes}


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "setting": (lambda: bad(lerning_rate=1), r"unknown setting 'lerning_rate': did you mean 'optimizer.learning_rate'"),
    "setting of another room": (
        lambda: bad(learning_rate=1e-5),
        r"unknown setting 'learning_rate': did you mean 'optimizer.learning_rate'\? docs/settings.md lists",
    ),
    "option of another trainer": (
        lambda: bad(num_generations=4),
        r"unknown setting 'num_generations': did you mean 'generation.group_size'\? docs/settings.md lists",
    ),
    "option of another trainer inside a room": (
        lambda: bad(optimizer={"lr": 1e-5}),
        r"unknown setting 'optimizer.lr': did you mean 'optimizer.learning_rate'\? docs",
    ),
    "option of PEFT": (lambda: bad(lora={"r": 8}), r"unknown setting 'lora.r': did you mean 'lora.rank'\? docs"),
    "several": (
        lambda: bad(num_generations=4, num_workers=4, x=1),
        r"unknown settings: 'num_generations' \(did you mean 'generation.group_size'\?\); 'num_workers', 'x': docs",
    ),
    "option that is an argument here": (lambda: bad(model_id="a"), r"'model_id': did you mean 'model'\? docs"),
    "option that nothing stands for": (
        lambda: bad(load_in_4bit=True),
        "'load_in_4bit': Quantised weights .*; lora.rank",
    ),
    "nothing near": (lambda: bad(num_workers=4), "unknown setting 'num_workers': docs/settings.md lists all"),
    "kind": (lambda: bad(steps="many"), 'steps is "many", not int'),
    "range": (lambda: bad(**{"optimizer.learning_rate": 5.0}), r"^optimizer.learning_rate is 5.0: give a value from 0"),
    "argument": (lambda: bad(**{"data.train": ["x"]}), "'data.train' is an argument of train: give data"),
    "split": (
        lambda: bad(data={"train": ROWS}),
        r"data is a dictionary: give one split of it, such as data\['train'\]",
    ),
    "number": (lambda: bad(data=3), "data is a int: give a source, or rows as a list of dictionaries"),
    "texts": (lambda: bad(data=[*ROWS, "a"]), r"data\[20\] is a str: give one dictionary per row"),
    "prompts": (lambda: bad(data=["a", "What is 1/2?"]), r"data\[0\] is the text 'a', .*: give one dictionary per row"),
    "prompts with a slash": (
        lambda: bad(data=["Is 1/2 < 1?"]),
        r"data\[0\] is the text 'Is 1/2 < 1\?', which names no",
    ),
    "mistyped kind": (lambda: bad(data=["jsnl:a"]), r"source 'jsnl:a' must start with one of"),
    "row without an answer": (
        lambda: bad(data=[*ROWS, {"question": "a"}], reward="math"),
        r"^data, row 21 has no field 'answer', only question: name its column 'answer'$",
    ),
    "row that a function cannot judge": (
        lambda: bad(data=[*ROWS, {"question": "a"}], reward=by_answer),
        r"^data, row 21 has no field 'answer', only question: the reward '\S+:by_answer' has the parameter",
    ),
    "held-out row": (
        lambda: bad(eval_data=[*HELD_OUT, {"answer": "a"}]),
        r"^eval_data, row 7 has no field 'question', only answer: name its column 'prompt'$",
    ),
    "unknown columns": (
        lambda: bad(data=[{"text": "a"}], reward="math"),
        r"^source data: no known format has the fields text: name the fields .* and answer 'prompt' and 'answer'$",
    ),
    "list as answer": (
        lambda: bad(data=[{"question": "a", "answer": ["b"]}], reward="math"),
        r"^data, row 1: the answer in 'answer' is a list, not one text or number: give one of its parts$",
    ),
    "nothing": (lambda: bad(data=[]), "data has no rows: give at least one"),
    "object in a row": (
        lambda: bad(data=[{"prompt": "a", "image": object()}]),
        r"data\[0\]: column 'image' holds a object, which is no text.*: leave the column out",
    ),
    "no prompt": (lambda: bad(data=[{"text": "a"}]), r"data has no column with the prompt .*text\): name it 'prompt'"),
    "held-out rows": (lambda: bad(eval_data=[{"text": "a"}]), "eval_data has no column with the prompt"),
    "class": (lambda: bad(reward=Judge), "reward is <class .*Judge'>: create an instance of it"),
    "reward": (lambda: bad(reward=3), "reward is 3: give a name, or a function"),
    "name": (lambda: bad(reward="mathe"), "unknown reward 'mathe' .*did you mean 'math'"),
    "reward that raises": (lambda: bad(reward=fails), r"failed: KeyError: 'level' \(at .*test_api.py:\d+ in fails\)"),
    "tokenizer": (lambda: bad(tokenizer=object()), "tokenizer= is for a model object, .*: leave it out"),
    "model": (lambda: bad(model=torch.nn.Linear(2, 2)), "model is a Linear: give a causal language model"),
    "path": (lambda: bad(model="./nowhere"), "nowhere"),
    "resume": (lambda: bad(resume=True), 'resume=True continues a run: give its folder, as in run_dir="runs/first"'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_with_its_remedy_and_leaves_nothing(case: str, model: str, here: Path) -> None:
    make, message = WRONG[case]
    with pytest.raises(InputError, match=message) as caught:
        train(**{"model": model, **make()})
    assert "\n" not in str(caught.value)
    assert not list(here.glob("runs/*")), "nothing of the run is left"


@pytest.mark.parametrize(
    ("option", "ours"),
    [("num_samples", "samples"), ("max_new_tokens", "max_completion_tokens"), ("sampels", "samples")],
)
def test_an_option_of_another_trainer_leads_to_one_of_evaluate(option: str, ours: str) -> None:
    with pytest.raises(
        InputError, match=rf"evaluate has no option '{option}' \(did you mean '{ours}'\?\): the options"
    ):
        evaluate("nowhere", ROWS, **{option: 3})
    two = rf"evaluate has no option '{option}' \(did you mean '{ours}'\?\), 'zz': the options are data_dir"
    with pytest.raises(InputError, match=two):
        evaluate("nowhere", ROWS, **{option: 3, "zz": 1})


def test_a_model_object_needs_its_tokenizer(model: str, here: Path) -> None:
    mine = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(InputError, match="model is an object, which has no tokenizer: give tokenizer=AutoTokenizer"):
        train(mine, ROWS, reward=odd, steps=1)


def test_a_folder_that_is_taken_is_refused_in_words_of_python(result: Result, model: str) -> None:
    with pytest.raises(
        InputError,
        match=r"already holds a run \(it has .*: resume=True continues it, {'run.overwrite': True} replaces it, an",
    ):
        train(model, ROWS, reward=odd, run_dir=result.folder, progress=False)


def test_a_comparison_shows_every_figure_of_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"run": "runs/a<b", "steps": 10, "accuracy_after": 0.123456, **{f"figure {i}": i for i in range(40)}},
        {"run": f"runs/{'long' * 20}", "steps": 20, "accuracy_after": None},
    ]
    for table in (rows, as_table(rows, list(rows[0]))):
        found = Comparison(page=tmp_path / "compare.html", table=table)
        first, runs, *figures = repr(found).splitlines()
        assert first == f"Comparison of 2 runs, {tmp_path}/compare.html"
        assert runs.split() == ["run", "runs/a<b", f"runs/{'long' * 20}"]
        assert [line.split() for line in figures[:2]] == [["steps", "10", "20"], ["accuracy_after", "0.1235", "-"]]
        assert len(figures) == 42
        shown = found._repr_html_()
        assert f'<a href="{tmp_path}/compare.html">' in shown
        with monkeypatch.context() as here:
            here.chdir(tmp_path)
            assert '<a href="compare.html">compare.html</a>' in found._repr_html_(), (
                "links begin at the notebook's folder"
            )
        assert "<th>runs/a&lt;b</th>" in shown
        assert "<tr><th>accuracy_after</th><td>0.1235</td><td>-</td></tr>" in shown


def test_a_rank_of_several_is_refused(model: str, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"one of several ranks, and paced_fast.api runs in one: train by torchrun"):
        train(model, ROWS, reward=odd, steps=1)


def test_without_pandas_a_table_is_a_list_of_dictionaries(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "pandas" else plain(name, *more))
    metrics = result.metrics
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert metrics[-1]["eval.accuracy"] == result.summary["accuracy_after"]


def test_a_preset_is_where_settings_begin(model: str, here: Path) -> None:
    settings = {**SMALL, "warm_start": {"first": {"steps": 0}, "second": {"steps": 0}}, "data.headline": []}
    run = train(model, ROWS, reward=odd, preset="tiny", steps=1, progress=False, settings=settings)
    assert (run.config.preset, run.config.data.template) == ("tiny", "{prompt}")
    with pytest.raises(InputError, match="unknown preset 'tinny': did you mean tiny"):
        train(model, ROWS, reward=odd, preset="tinny")


def test_pictures_are_named(result: Result) -> None:
    with pytest.raises(InputError, match=r"no picture 'learning' .*did you mean 'learning_curve'.*the pictures are"):
        result.plot("learning")
    with pytest.raises(InputError, match="compare is given 1 runs: give two run folders"):
        compare(result)


def test_a_run_without_held_out_rows_is_told_how_to_evaluate_it_in_python(model: str, here: Path) -> None:
    made = train(model, ROWS, reward=lambda completions, **_: odd(completions, completions), steps=1, settings=SMALL)
    with pytest.raises(InputError, match="because this run has no held-out prompts") as caught:
        evaluate(made, progress=False)
    remedy = "give benchmarks='gsm8k,math500,aime24,aime25,amc23', or prompts of yours, as in data="
    assert str(caught.value).endswith(f"{remedy}'held_out.jsonl?prompt=question'")
    Path("held_out.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in HELD_OUT))
    assert evaluate(made, "held_out.jsonl?prompt=question", samples=1, progress=False).figures["prompts"] == 6
