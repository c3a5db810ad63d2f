"""The Slurm recipe with Slurm played by small programs: who is signalled, what is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from steady import LIMIT_SECONDS, wait_for

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "slurm.sh"

# A step runs on this machine; its words up to `bash` are options.
SRUN = '#!/bin/bash\nwhile [[ $1 != bash ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\n[[ $1 == show ]] && printf "one\\ntwo\\n"\necho "scontrol $*" >> "$LOG"\n'
# torchrun with two ranks: it says what it was given and dies of USR1, as the real one does.
TORCHRUN = """#!/bin/bash
echo "torchrun $*" >> "$LOG"
for rank in 0 1; do
  bash -c 'trap "echo rank stops >> $LOG; exit 0" USR1; touch "$LOG.ready.$0"; while :; do sleep 0.1; done' $rank &
done
wait
echo "torchrun leaves" >> "$LOG"
exit "${RANKS_END_WITH:-0}"
"""


def begin(folder: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = str(10**9 + os.getpid())
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LOG": str(folder / "log"),
        "SLURM_JOB_ID": job,
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
        **more,
    }
    return subprocess.Popen(["bash", str(SCRIPT), *words], env=environment, text=True, stderr=subprocess.PIPE)


@pytest.mark.process
def test_the_recipe_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.process
def test_without_a_run_folder_it_says_how_it_is_used(tmp_path: Path) -> None:
    script = begin(tmp_path, "qwen_math_7b")
    _, complaint = script.communicate(timeout=LIMIT_SECONDS)
    assert script.returncode == 2
    assert "--run-dir FOLDER" in complaint


@pytest.mark.process
@pytest.mark.parametrize("status", ["0", "3"])
def test_the_ranks_are_asked_to_stop_and_the_job_is_queued_again(tmp_path: Path, status: str) -> None:
    script = begin(tmp_path, "qwen_math_7b", "--run-dir", "runs/x", RANKS_END_WITH=status)
    try:
        wait_for(lambda: all((tmp_path / f"log.ready.{rank}").exists() for rank in (0, 1)))  # their traps are set
        script.send_signal(signal.SIGUSR1)
        script.communicate(timeout=LIMIT_SECONDS)
    finally:
        script.kill()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines.count("rank stops") == 2
    assert "torchrun leaves" in lines, "the launcher itself was not signalled"
    command = next(line for line in lines if line.startswith("torchrun --"))
    assert "--nnodes=1 --nproc-per-node=4 --max-restarts=0" in command
    assert "--rdzv-endpoint=one:" in command
    assert command.endswith("-m paced_fast train qwen_math_7b --run-dir runs/x --resume auto")
    assert script.returncode == int(status)
    requeued = [line for line in lines if line.startswith("scontrol requeue")]
    assert len(requeued) == (status == "0"), "what failed is not tried again for ever"
