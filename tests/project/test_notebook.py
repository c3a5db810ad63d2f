"""The notebook of examples/ is run by a kernel, and shows what it promises."""

from __future__ import annotations

import base64
import copy
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "own_data.ipynb"
_CELL_SECONDS = 1800
"""Limit of a cell, far above what it takes."""
_ENDS = """import asyncio
asyncio.get_running_loop()  # a notebook has one
small = settings | {"steps": 1, "evaluation": {"every": 0, "final_samples": 1}, "run.report": False}


async def later(completions, answer, **columns):
    await asyncio.sleep(0)
    return right(completions, answer)


runs = [train(MODEL, rows, reward=reward, progress=False, **small) for reward in (later, "math", right)]
[run.metrics["reward_mean"].iloc[-1] for run in runs]"""
"""Rewards that a script runs otherwise: one in an event loop, one in processes of its own."""


def test_the_notebook_is_kept_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install -e '.[dev]'")
    found = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(found)
    assert [cell for cell in found.cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The code cells of the notebook after it was run, and one more."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install -e '.[dev]'")
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install -e '.[dev]'")
    import nbformat

    place = tmp_path_factory.mktemp("notebook")
    found = nbformat.read(NOTEBOOK, 4)
    found.cells.append(nbformat.v4.new_code_cell(_ENDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(place / name))
        (place / "work").mkdir()
        client = nbclient.NotebookClient(
            found, timeout=_CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(place / "work")}}
        )
        client.execute()
    return [cell for cell in copy.deepcopy(found.cells) if cell.cell_type == "code"]


def of(cells: list[Any], source: str) -> Any:
    """The cell that is `source`, else one with a line that begins so."""
    exact = [cell for cell in cells if cell.source == source]
    return (
        exact[0]
        if exact
        else next(cell for cell in cells if re.search(rf"^{re.escape(source)}", cell.source, re.MULTILINE))
    )


def text(cell: Any) -> str:
    """Everything that a cell shows as text."""
    return "".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)


def result(cell: Any) -> dict[str, Any]:
    """The value of a cell by the kinds of its display; a cell that only has a value shows nothing else."""
    (found,) = [out for out in cell.outputs if out.output_type == "execute_result"]
    return found.data


@pytest.mark.process
@pytest.mark.slow
class TestNotebook:
    def test_training_tells_what_it_does_in_plain_lines(self, cells: list[Any]) -> None:
        shown = text(of(cells, "result = train("))
        assert shown.startswith("loading PyTorch and transformers\n"), "the first import takes seconds"
        for line in (
            "rows from Python, given/data-",
            "right (a function from Python)",
            "first training row, data, row 1",
        ):
            assert line in shown
        assert "reward right of this answer: 1, as it should be" in shown
        assert re.search(r"INFO step 20/20, reward 0\.\d+, accuracy 0\.\d+", shown)
        everything = "".join(map(text, cells))
        assert "it/s" not in everything, "a bar of tqdm"
        assert "IProgress" not in everything
        assert [out.name for cell in cells for out in cell.outputs if out.output_type == "stream"].count("stderr") == 0

    def test_the_figures_are_a_table_with_every_step(self, cells: list[Any]) -> None:
        shown = result(of(cells, "result.metrics"))
        rows = re.findall(r"<th>\d+</th>\s*<td>(\d+)</td>", shown["text/html"])
        assert rows == [str(step) for step in range(21)]
        assert "<th>eval.accuracy</th>" in shown["text/html"]
        assert re.search(r"held-out accuracy 0\.\d+ -> 0\.\d+", result(of(cells, "result"))["text/plain"])

    def test_the_plot_is_an_image(self, cells: list[Any]) -> None:
        image = pytest.importorskip("PIL.Image", reason="needs pillow: pip install -e '.[dev]'")
        with image.open(io.BytesIO(base64.b64decode(result(of(cells, "result.plot"))["image/png"]))) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10, "something is drawn"

    def test_the_policy_answers(self, cells: list[Any]) -> None:
        answers = eval(result(of(cells, "result.generate"))["text/plain"])
        assert [len(one) for one in answers] == [4, 4]
        assert all(re.fullmatch(r"\d{1,4}", answer) for one in answers for answer in one)

    def test_an_evaluation_is_its_tables(self, cells: list[Any]) -> None:
        cell = of(cells, "evaluate(")
        shown = result(cell)["text/plain"]
        assert "pass@k: one of k samples is correct" in shown
        assert "\x1b" not in shown, "no codes of a terminal"
        assert {out.output_type for out in cell.outputs} == {"stream", "execute_result"}, "nothing empty is displayed"

    def test_without_progress_nothing_is_shown(self, cells: list[Any]) -> None:
        cell = of(cells, "grpo = train(")
        (only,) = cell.outputs
        assert '<a href="runs/compare.html">' in only.data["text/html"], "a link that a browser can follow"
        assert "<th>algorithm</th><td>paced</td><td>grpo</td>" in only.data["text/html"]

    def test_report_and_export_are_there(self, cells: list[Any]) -> None:
        assert "runs/tiny-paced-0/report.html" in result(of(cells, "report("))["text/plain"]
        assert {"README.md", "model.safetensors", "report.html"} <= set(
            eval(result(of(cells, "exported"))["text/plain"])
        )

    def test_rewards_in_a_loop_and_in_processes_judge_as_in_a_script(self, cells: list[Any]) -> None:
        (only,) = cells[-1].outputs
        *found, expected = map(float, re.findall(r"\d\.\d+", only.data["text/plain"]))
        assert 0.2 < expected < 0.8
        assert found == [expected, expected], "the same prompts, completions and verdicts"
