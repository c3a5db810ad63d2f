"""The run folder: its name, whether it is free, and a lock, so that two runs never write into one."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import shlex
import shutil
import socket
from pathlib import Path

from paced_fast.config import Config
from paced_fast.errors import InputError
from paced_fast.run.record import files
from paced_fast.run.record.groups_file import GROUPS_FILE
from paced_fast.run.record.origin import ORIGIN_FILE
from paced_fast.run.record.rollouts_file import FILE_NAME
from paced_fast.run.record.sinks import ID_FILES

logger = logging.getLogger(__name__)

OWN_NAMES = (
    *("metrics.jsonl", "checkpoints", "config.json", "initial", "rollouts.jsonl", FILE_NAME),
    *("summary.json", "report.html", GROUPS_FILE, ORIGIN_FILE, *ID_FILES),
)
"""Files of a run folder; a folder with any of these is not written into unless the user says so."""

LOCK_NAME = ".lock"
"""Lock file; it is no sign of an earlier run, and stays."""


class RunLock:
    """Held from `take` to the end of the `with` block, or to the end of the process.

    It is a POSIX record lock: it ends with its process, however that dies, and processes forked from it, such as those
    that score rewards, do not inherit it. A process is never shut out by itself,
    and loses the lock when it opens the file and closes it: nothing in it may read the file.
    """

    def __init__(self) -> None:
        """Start without a lock."""
        self._descriptor: int | None = None
        self._is_impossible = False
        self._reserved: tuple[Path, ...] = ()

    def take(self, folder: Path) -> None:
        """Lock `folder`, which exists; where the file system has no locks, the log says so and the run goes on.

        Raises InputError when another process holds the lock.
        """
        if self._descriptor is not None or self._is_impossible:
            return
        descriptor = None
        try:
            descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            holder = b""
            if descriptor is not None:
                holder = os.pread(descriptor, 200, 0)
                os.close(descriptor)
            if descriptor is not None and error.errno in (errno.EAGAIN, errno.EACCES):
                who = holder.decode(errors="replace").strip() or "a process that is just starting"
                raise InputError(
                    f"--run-dir {folder} is in use by another run ({who}): wait until it ends, or give another "
                    "--run-dir"
                ) from error
            logger.warning(
                "%s cannot be locked (%s): make sure that no other run writes to it", folder, error.strerror or error
            )
            self._is_impossible = True
            return
        self._descriptor = descriptor

    def reserve(self, folder: Path) -> bool:
        """Make `folder` and lock it, unless it exists; if nothing is written into it, it is removed at the end.

        Raises InputError when it cannot be made.
        """
        made = tuple(one for one in (folder, *folder.parents) if not one.exists())
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as error:
            if isinstance(error, FileExistsError) and folder.parent.is_dir():
                return False
            raise InputError(
                f"the run folder {folder} cannot be created ({error.strerror}): give another by --run-dir"
            ) from error
        self._reserved = made
        self.take(folder)
        return True

    def __enter__(self) -> RunLock:
        """Release at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the folder; its lock file stays, because removing it could remove another run's, but in a folder that
        was reserved and is empty."""
        with contextlib.suppress(OSError):  # another run's folder is beside it, or it is gone already
            if self._reserved and os.listdir(self._reserved[0]) in ([], [LOCK_NAME]):
                (self._reserved[0] / LOCK_NAME).unlink(missing_ok=True)
                for folder in self._reserved:
                    folder.rmdir()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def run_folder(config: Config, lock: RunLock) -> Path:
    """The folder of the run; an automatic name gets a number when it is taken and nothing is to be resumed.

    A folder with an automatic name is made and locked at once, so that two runs never choose the same. Another that is
    there is locked, unless it may be another run's to continue: that is looked at first. One that is not is locked when
    `claim` makes it.
    """
    if config.run_dir is None and config.resume == "never":
        return _reserved(config, lock)
    folder = Path("runs", config.label) if config.run_dir is None else Path(config.run_dir)
    _require_free(folder, config)
    if config.resume == "never" and folder.is_dir():
        lock.take(folder)
    return folder


def _reserved(config: Config, lock: RunLock) -> Path:
    base = Path("runs", config.label)
    folder, number = base, 1
    while not lock.reserve(folder):
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _require_free(folder: Path, config: Config) -> None:
    found = [name for name in OWN_NAMES if (folder / name).exists()]
    if config.resume == "never" and found and not config.run.overwrite:
        raise InputError(
            f"--run-dir {folder} already holds a run (it has {found[0]}): --resume {shlex.quote(str(folder))} "
            "continues it, --run.overwrite replaces it, another --run-dir keeps both"
        )


def claim(folder: Path, config: Config, lock: RunLock) -> None:
    """Make the run folder and write the settings; what an earlier run left in it is removed.

    Nothing is there to be resumed, or another run has come and gone since this one looked, which is refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run-dir {folder} cannot be created ({error.strerror}): give another folder") from error
    lock.take(folder)
    _require_free(folder, config)
    if config.resume == "auto" and any(folder.glob("checkpoints/step_*")):
        raise InputError(
            f"another run wrote to --run-dir {folder} while this one was starting: run this command again to continue "
            "it"
        )
    for path in (folder / name for name in OWN_NAMES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    files.write_json_atomic(folder / "config.json", dataclasses.asdict(config))
