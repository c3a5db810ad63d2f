"""A process that has loaded torch and vLLM and copies itself for each run: loading takes longer than a run's steps.

Reads a line of JSON per run: `words` of the command line, variables `env`, the file `log` for what it writes, and
`code` to execute in place of the command. Answers with the exit status, once all runs of a line have ended.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

from paced_fast import train

LOADED = """
import vllm.v1.engine.llm_engine, vllm.v1.executor.uniproc_executor
import vllm.v1.worker.cpu_worker, vllm.v1.worker.cpu_model_runner
import vllm.model_executor.models.llama
import transformers.models.llama.modeling_llama, torch.optim, torch._dynamo
import paced_fast.train.loop
"""
"""Modules that a run loads when it needs them; one that a version lacks is loaded there."""


def run(job: dict[str, Any]) -> int:
    """Run in this copy of the process; the exit status."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(job["env"])
    sys.argv = ["paced_fast.train", *job["words"]]
    try:
        exec(job["code"], {}) if job["code"] else train.main(job["words"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Serve until the input ends."""
    for line in LOADED.replace(",", "\nimport").splitlines():
        try:
            exec(line, {})
        except ImportError:
            continue
    gc.freeze()
    for line in sys.stdin:
        pids = []
        for job in json.loads(line):
            if pid := os.fork():
                pids.append(pid)
            else:
                sys.exit(run(job))  # and no shorter way: an engine unlinks its shared memory at the exit
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        sys.stdout.write(json.dumps(statuses) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
