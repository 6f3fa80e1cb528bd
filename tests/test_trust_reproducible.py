"""The same seed, the same result, in another process and with another number of workers."""

import json
import os
import subprocess
import sys

import pytest

from effad_lib.runs import PROJECT


@pytest.mark.slow
def test_a_seed_gives_the_same_in_every_process_and_with_any_number_of_workers():
    """A data set, a distillation, a training and its scores; the order of Python's sets differs between the two."""

    def found(workers: int) -> dict[str, str]:
        command = [sys.executable, "tests/fingerprint.py", "--workers", str(workers)]
        environment = os.environ | {"PYTHONHASHSEED": str(workers)}
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        return json.loads(subprocess.run(command, cwd=PROJECT, env=environment, check=True, **quiet).stdout)

    assert (once := found(1)) == found(2)
    assert len({once[name] for name in ("synthesis", "distillation", "training", "scores")}) == 4
