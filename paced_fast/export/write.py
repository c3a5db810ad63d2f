"""The policy of a run as a folder: read, written and read back."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from paced_fast.config import ModelConfig
from paced_fast.errors import InputError
from paced_fast.export.arguments import ExportArguments
from paced_fast.policy import load_model, save_model
from paced_fast.run import checkpoint
from paced_fast.run.record.model_card import CARD_FILE, model_card

logger = logging.getLogger("paced_fast.export")


def export(arguments: ExportArguments) -> Path:
    """Write the folder, read it back, and return it.

    Raises InputError, and leaves no folder, for what cannot be read or written, or is not the policy when read back.
    """
    source = _source(Path(arguments.run_or_checkpoint).expanduser(), arguments.step)
    target = _target(arguments.folder)
    # Everything is read before anything is written, so that an error is clearly about one of the two.
    with _reading(source):
        dtype = _most_exact(source) if arguments.dtype == "auto" else arguments.dtype
        model = load_model(ModelConfig(device="cpu", dtype=dtype), str(source))
        if _is_checkpoint(source):
            _take_exact(source.parent / "tensors", model)
        others = {path.name: path.read_bytes() for path in source.iterdir() if not _holds_weights(path)}
        others |= _about(source, target.name, dtype)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_model(model, partial, generation=others.get("generation_config.json"))
        for name, content in others.items():
            if not (partial / name).exists():
                (partial / name).write_bytes(content)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target} cannot be written ({_reason(error)}): give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def stored_dtype(folder: Path) -> Literal["bfloat16", "float32"]:
    """Data type of the weights in a folder that a run or an export wrote."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if any(file.get_slice(name).get_dtype() == "F32" for name in file.keys()):  # noqa: SIM118 (no mapping)
                return "float32"
    return "bfloat16"


def _most_exact(source: Path) -> Literal["bfloat16", "float32"]:
    """Data type in which a run has the weights of a policy: float32 where the optimiser's are kept."""
    if _is_checkpoint(source):
        masters = [one for one in checkpoint.tensor_shapes(source.parent / "tensors") if one.startswith("policy.")]
        if masters and not any(".lora_" in one for one in masters):  # adapters are stored merged into the weights
            return "float32"
    return stored_dtype(source)


def _about(source: Path, name: str, dtype: str) -> dict[str, bytes]:
    """The model card and the report of the run that a policy comes from, as far as it has them."""
    run, step = (source.parents[2], int(source.parent.name[5:])) if _is_checkpoint(source) else (source.parent, 0)
    found: dict[str, bytes] = {}
    card = model_card(run, step, name, dtype)
    if card is not None:
        found[CARD_FILE] = card.encode("utf-8", "backslashreplace")
    page = run / "report.html"
    if page.is_file():  # that of a run that was stopped would still load itself again
        found[page.name] = re.sub(rb'<body data-refresh="\d+">', b"<body>", page.read_bytes(), count=1)
    return found


def _source(given: Path, step: int | None) -> Path:
    """Folder of the policy in the given run or checkpoint."""
    if not given.is_dir():
        raise InputError(f"no such folder {given}: give a run folder or a checkpoint")
    if not re.fullmatch(r"step_\d{6,}", given.name):
        return checkpoint.policy_folder(given, step)
    if step is not None:
        raise InputError(f"--step {step}: {given} is one checkpoint: leave --step out, or give the run folder")
    if (problem := checkpoint.verify(given)) is not None:
        raise InputError(f"checkpoint {given} is damaged ({problem}): export another checkpoint")
    return given / "policy"


def _target(given: str) -> Path:
    """Absolute path of the output folder; raises InputError if it, or a parent, cannot be one."""
    try:
        target = Path(given).expanduser().resolve()
        if target == Path.cwd():
            raise InputError(
                f"{target} is the working directory, which would be replaced: give a folder in it, such as ./model"
            )
        if inside := [folder for folder in (target, *target.parents) if _belongs_to_run(folder)]:
            raise InputError(f"{target} is inside {inside[0]}, which belongs to a run: give a folder elsewhere")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target} exists already: give a folder that is empty or does not exist")
    except OSError as error:
        raise InputError(f"{given} cannot be written ({_reason(error)}): give another folder") from error
    return target


def _belongs_to_run(folder: Path) -> bool:
    """Whether the folder is a checkpoint, the checkpoints of a run, or its policy from before training."""
    if re.fullmatch(r"step_\d{6,}", folder.name) and (folder / "manifest.json").is_file():
        return True
    if folder.name == "checkpoints" and checkpoint.folders(folder):
        return True
    return folder.name in ("checkpoints", "initial") and folder.is_dir() and (folder.parent / "config.json").is_file()


def _is_checkpoint(source: Path) -> bool:
    return source.name == "policy"  # the policy from before training is `initial`


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Tells a source that goes away while it is read, as a running training removes old ones, from an unreadable one.

    It is removed by another name first, so one that is there at the end was whole when it was read.
    """
    try:
        yield
    except (InputError, OSError, SafetensorError) as error:
        _check_there(source)
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source} cannot be read: {_reason(error)}") from error
    _check_there(source)


def _check_there(source: Path) -> None:
    needed = (source, source.parent / "tensors") if _is_checkpoint(source) else (source,)
    if not all(folder.is_dir() for folder in needed):
        what = f"checkpoint {source.parent}" if _is_checkpoint(source) else f"{source}"
        raise InputError(
            f"{what} was removed while it was read, because its run keeps only the newest checkpoints: export again"
        )


def _holds_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name.endswith(".index.json")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def _take_exact(tensors: Path, model: torch.nn.Module) -> None:
    """Put the float32 parameters of the checkpoint, where it has them, into the `model`, rounded to its type."""
    own = checkpoint.prefixed("policy", model.state_dict())
    exact = {name: own[name] for name in checkpoint.tensor_shapes(tensors) if name in own}
    checkpoint.read_tensors(tensors, exact, partly=True)
