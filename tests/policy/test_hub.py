"""A hub that cannot be reached: said in one line, whoever needs it; the network is a closed port of this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_policy
from huggingface_hub import constants

from paced_fast import train
from paced_fast.config import ModelConfig
from paced_fast.data import hub, prompts
from paced_fast.data.sources import read_drafts
from paced_fast.errors import InputError
from paced_fast.policy import load_model
from paced_fast.policy.loading import model_settings
from paced_fast.run.start import tables


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture(autouse=True)
def endpoint(listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An address where nobody answers, and an empty cache."""
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.why_out_of_reach.cache_clear()
    return address


def test_whatever_comes_from_the_hub_is_named_in_one_line(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    wanted = {
        "the tokenizer 'some/model'": lambda: prompts.load_tokenizer("some/model"),
        "--model.name 'some/model'": lambda: load_model(ModelConfig(name="some/model"), "some/model"),
        "--model.name 'other/model'": lambda: model_settings(ModelConfig(name="other/model"), 10),
        "hf:some/rows": lambda: read_drafts("hf:some/rows", None),
    }
    asked: list[str] = []
    why = hub.why_out_of_reach
    monkeypatch.setattr(hub, "why_out_of_reach", lambda address: (asked.append(address), why(address))[1])
    for what, load in wanted.items():
        with pytest.raises(InputError) as told:
            load()
        line = str(told.value)
        first = f"{what} is not" if what.startswith("hf:") else f"{what}: there is no such folder, it is not"
        assert line.startswith(f"{first} in the cache, and {endpoint} cannot be reached (ConnectError: ")
        assert "give a local path" in line
        assert "HF_HOME" in line
        assert "HF_HUB_OFFLINE=1" in line
        assert "\n" not in line
    assert asked == [endpoint] * len(wanted)
    assert why.cache_info().misses == 1, "asked once"


def test_the_command_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["tiny", "--model.name", "some/model", "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    words = "error: --model some/model: there is no such folder, it is not in the cache, and http://127.0.0.1:"
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("offline", [False, True])
def test_a_folder_with_a_typing_error_in_its_name(
    endpoint: str, offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    for name, words in (
        ("nomodel", "--model nomodel: there is no such folder, "),
        ("my-mdel", r"--model my-mdel: there is no such folder (did you mean my-model?), "),
        ("./my-mdel", r"--model ./my-mdel: there is no such folder (did you mean my-model?): give the folder"),
    ):
        with pytest.raises(InputError) as told:
            tables.read_tokenizer(name)
        assert str(told.value).startswith(words)
        assert "\n" not in str(told.value)


def test_a_hub_that_takes_calls_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reason = hub.why_out_of_reach(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert reason is not None
    assert reason == "no answer within 0.2 s" or "timed out" in reason.lower() or "Timeout" in reason


def test_a_name_that_is_looked_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_SECONDS", 0.1)
    held = threading.Event()

    class Session:
        def head(self, address: str, timeout: float) -> None:
            held.wait()

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    assert hub.why_out_of_reach("http://nowhere.invalid") == "no answer within 0.1 s"
    held.set()


@pytest.mark.parametrize(("status", "reason"), [(200, None), (401, None), (405, None), (503, "it answers 503")])
def test_an_answer_is_an_answer(monkeypatch: pytest.MonkeyPatch, status: int, reason: str | None) -> None:
    class Session:
        status_code = status

        def head(self, address: str, timeout: float) -> Session:
            return self

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    assert hub.why_out_of_reach("http://here") == reason


def test_what_is_here_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tiny_policy.model().save_pretrained(folder)
    assert load_model(ModelConfig(name=str(folder)), str(folder)) is not None
    for path in ("./a/b", "/a", "~/a", "a/b/c"):
        assert hub.place_of(path, "x") == path
    assert hub.why_out_of_reach.cache_info().misses == 0, "nobody asked"
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / ("0" * 40)
    tiny_policy.model().save_pretrained(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert hub.place_of("some/model", "x") == str(snapshot), "cached, and the hub is away"
    assert load_model(ModelConfig(name="some/model"), "some/model") is not None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.place_of("other/model", "x") == "other/model", "offline the client itself asks nobody"
