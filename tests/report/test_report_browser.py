"""The report of a real run in a real browser: every chart has ink, nothing is fetched, and no completion runs."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from numpy.typing import NDArray
from PIL import Image

from paced_fast import train
from paced_fast.report import compare, run_page
from paced_fast.report.read_run import read_run

BROWSER = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), None
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")]

WIDTH, HEIGHT = 1400, 9000

HOSTILE = (
    "</pre></details><script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"
    "\"'><svg onload=document.title='broken'> \x00 \u202e \ud800 &lt; ]]> <!-- \u05d0"
)

PROBE = """<script>
const boxes = [...document.querySelectorAll('.chart svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  return [svg.closest('figure').id, box.left, box.top, box.width, box.height];
});
const first = document.querySelector('#chart-learning_rollouts .chart, #chart-accuracy_rollouts .chart');
const at = first.getBoundingClientRect();
first.dispatchEvent(new PointerEvent('pointermove', {clientX: at.left + at.width / 2, clientY: at.top + 50}));
const tip = document.getElementById('tip').textContent;
const cross = document.getElementById('cross').getBoundingClientRect();
const dots = [...first.querySelectorAll('path[fill="var(--c0)"][transform]')];
const line = Math.min(...dots.map(dot => dot.getBoundingClientRect()).map(
  dot => Math.abs(dot.left + dot.width / 2 - cross.left)));
first.dispatchEvent(new PointerEvent('pointerleave'));
const list = [...document.querySelectorAll('.r')], visible = () => list.filter(r => r.offsetParent).length;
const filtered = {all: visible()};
for (const name of ['right', 'wrong', 'replayed']) {
  const choice = document.getElementById('show-' + name);
  if (choice) { choice.checked = true; filtered[name] = visible(); }
}
if (list.length) document.getElementById('show-all').checked = true;
const tokens = [...document.querySelectorAll('pre span[title]')].map(s => getComputedStyle(s).backgroundColor);
let ran = '';
const late = document.createElement('script');
late.textContent = "ran += 'script '";
const button = document.createElement('button');
button.setAttribute('onclick', "ran += 'handler '");
document.body.append(late, button);
button.click();
late.remove();
button.remove();
try { ran += eval("'eval'"); } catch (error) { }
const found = {boxes, tip, line, ran, filtered, tokens, title: document.title,
  loaded: performance.getEntriesByType('resource').length,
  elements: document.querySelectorAll('img, iframe, object, embed, link, base, form, [src]').length,
  page: getComputedStyle(document.body).backgroundColor,
  color: getComputedStyle(document.querySelector('[stroke="var(--c0)"]')).stroke};
const out = document.createElement('output');
out.id = 'probe';
out.style.display = 'none';
out.textContent = JSON.stringify(found);
document.body.append(out);
</script>"""


def browse(page: Path, *arguments: str) -> str:
    """Opens a page in a browser of its own, without a profile and without a network, and gives what it prints."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={WIDTH},{HEIGHT}",
        "--proxy-server=127.0.0.1:9",
        *arguments,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


def probed(
    page: Path, *arguments: str, screenshot: Path | None = None, probe: str = PROBE, text: str | None = None
) -> dict[str, Any]:
    """What a script at the end of a copy of the page, or of `text`, finds; optionally a picture of that same copy."""
    copy = page.with_name("probed.html")
    text = page.read_text(encoding="utf-8") if text is None else text
    digest = base64.b64encode(
        hashlib.sha256(probe.removeprefix("<script>").removesuffix("</script>").encode()).digest()
    )
    text = text.replace("script-src &#39;", f"script-src &#39;sha256-{digest.decode()}&#39; &#39;", 1)
    copy.write_text(text.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    if screenshot is not None:
        browse(copy, *arguments, f"--screenshot={screenshot}")
    dom = browse(copy, *arguments, "--dump-dom")
    (found,) = re.findall(r'<output id="probe"[^>]*>(.*?)</output>', dom, flags=re.DOTALL)
    return json.loads(html.unescape(found))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, whose newest rollout then says what nobody should."""
    root = tmp_path_factory.mktemp("browser")
    config = tiny_run.config(tiny_run.write_rewards(root), steps=6)
    folder = root / "run"
    run = tiny_run.build(config, folder)
    train.train(run, tiny_run.quiet())
    hostile = {"step": 6, "prompt": HOSTILE, "completion": HOSTILE * 2, "reward": 0.0, "slice": HOSTILE, "value": 0.5}
    hostile |= {"tokens": [HOSTILE, "</span>"], "logprobs": [-4.0, -0.1]}
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps(hostile) + "\n")
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Path:
    path = run_dir / "report.html"
    path.write_text(run_page.report_of(read_run(run_dir))[0], encoding="utf-8", errors="backslashreplace")
    return path


@pytest.fixture(scope="module")
def seen(page: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """What the script found, and the picture."""
    picture = tmp_path_factory.mktemp("picture") / "page.png"
    found = probed(page, screenshot=picture)
    return found, np.asarray(Image.open(picture), np.float32) / 255


def test_every_chart_has_ink(seen: tuple[dict[str, Any], NDArray[np.float32]], page: Path) -> None:
    found, pixels = seen
    names = [name for name, *_ in found["boxes"]]
    assert len(names) == page.read_text(encoding="utf-8").count('class="chart"') > 20
    assert {"chart-learning_rollouts", "chart-learning_time", "chart-calibration_first", "chart-selection"} <= set(
        names
    )
    assert {"chart-memory_by_phase", "chart-seconds_by_phase", "chart-replay_ages"} <= set(names)
    for name, left, top, width, height in found["boxes"]:
        assert width > 250, name
        assert top + height < HEIGHT, f"{name} is below the picture"
        part = pixels[int(top) : int(top + height), int(left) : int(left + width), :3]
        # A line, bar or cell is far from grey; text and axes are not.
        colored = np.ptp(part, axis=2) > 0.3
        assert colored.sum() > 30, f"{name} has {colored.sum()} coloured pixels"
        codes = (part * 255).astype(np.int64) @ np.array([65536, 256, 1])
        assert len(np.unique(codes)) > 20, name


def test_nothing_is_fetched_and_no_completion_runs(
    seen: tuple[dict[str, Any], NDArray[np.float32]], page: Path
) -> None:
    found, _ = seen
    assert found["title"] == "run", "the folder's name"
    assert (found["loaded"], found["elements"]) == (0, 0)
    assert found["ran"] == "", "neither a script, nor a handler, nor eval, by a policy that names the page's own"
    text = page.read_text(encoding="utf-8")
    assert "unsafe-eval" not in text
    assert re.search(r"script-src &#39;sha256-[\w+/=]+&#39;\"", text)
    assert "http:" not in text
    assert "https:" not in text
    assert text.count("<script") == 1
    assert "default-src &#39;none&#39;" in text


def test_the_pointer_and_the_choice_of_rollouts_work(seen: tuple[dict[str, Any], NDArray[np.float32]]) -> None:
    found, _ = seen
    assert re.fullmatch(r"rollouts \d+(held-out|\w+): .*", found["tip"])
    assert found["line"] < 1.5, "the line under the pointer goes through a point"
    counts = found["filtered"]
    assert counts["all"] > counts["right"] > 0
    assert counts["all"] == counts["right"] + counts["wrong"]
    assert 0 < counts["replayed"] < counts["all"]
    assert len(set(found["tokens"])) > 1, "tokens have the colours of their probabilities"


def test_dark_and_light_follow_the_reader(seen: tuple[dict[str, Any], NDArray[np.float32]], page: Path) -> None:
    light, _ = seen
    dark = probed(page, "--blink-settings=preferredColorScheme=0")

    def brightness(color: str) -> float:
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    assert brightness(light["page"]) > 230
    assert brightness(dark["page"]) < 40
    assert dark["color"] != light["color"]


RELOADED = """<script>
(function () {
  const visit = Number(sessionStorage.getItem('visits') || 0) + 1;
  sessionStorage.setItem('visits', visit);
  const part = document.querySelectorAll('#health details')[1], wrong = document.getElementById('show-wrong');
  const health = document.getElementById('health');
  addEventListener('load', () => setTimeout(() => {
    if (visit === 1) {
      part.open = wrong.checked = true;
      scrollTo({top: health.offsetTop + 77, behavior: 'instant'});
      document.querySelector('.tiles').insertAdjacentHTML('beforebegin', '<p>a note that the next page lacks</p>');
      return;
    }
    document.getElementById('pause').checked = true;
    const out = document.createElement('output');
    out.id = 'probe';
    out.style.display = 'none';
    out.textContent = JSON.stringify(
      {visit, under: scrollY - health.offsetTop, open: part.open, wrong: wrong.checked});
    document.body.append(out);
  }, 50));
})();
</script>"""


def test_a_page_that_loads_itself_again_stays_where_it_is(run_dir: Path, page: Path) -> None:
    text = run_page.report_of(read_run(run_dir), refresh=1)[0].encode("utf-8", "backslashreplace").decode()
    small = "--window-size=1400,900"  # in the tall one of the other tests there is nothing to scroll
    found = probed(page, small, "--virtual-time-budget=1600", probe=RELOADED, text=text)
    assert found["visit"] == 2
    assert abs(found["under"] - 77) <= 2, "the same section at the same place, though the page above it changed"
    assert (found["open"], found["wrong"]) == (True, True)


def test_nothing_sticks_out_on_a_phone(page: Path, run_dir: Path) -> None:
    # A window of a browser without a head is never narrower than 500, a frame is.
    other = shutil.copytree(run_dir, run_dir.parent / "other", ignore=shutil.ignore_patterns("profile", "checkpoints"))
    pages = [page, compare([run_dir, other], run_dir / "compare.html")]
    measure = "f.contentDocument.documentElement.scrollWidth + ' ' + f.contentWindow.innerWidth"
    for shown in pages:
        frame = run_dir / "phone.html"
        source = html.escape(shown.read_text(encoding="utf-8"))
        frame.write_text(
            f'<meta charset="utf-8"><iframe width="420" height="900" style="border:0" srcdoc="{source}"></iframe>'
            '<p id="w"></p>'
            "<script>const f = document.querySelector('iframe');"
            f"f.onload = () => {{ document.getElementById('w').textContent = {measure}; }};</script>",
            encoding="utf-8",
        )
        dom = browse(frame, "--dump-dom", "--virtual-time-budget=3000")
        assert '<p id="w">420 420</p>' in dom, shown.name


def test_a_comparison_has_ink(run_dir: Path) -> None:
    other = run_dir.parent / "second"
    shutil.copytree(run_dir, other, ignore=shutil.ignore_patterns("profile", "checkpoints"))
    found = probed(compare([run_dir, other], run_dir / "compare.html"))
    assert {"chart-accuracy_rollouts", "chart-accuracy_time", "chart-mixed_group_share"} <= {
        b[0] for b in found["boxes"]
    }
    assert found["tip"].startswith("rollouts")
