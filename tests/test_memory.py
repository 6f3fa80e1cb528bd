"""Memory that is kept inside the `with` and given back after it."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from effad_lib.memory import OutOfMemory, enough_memory, kept_memory, peak_memory

HELD = """
import numpy as np
from effad_lib.memory import kept_memory

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def work():
    return [np.ones(5_000_000) for _ in range(8)]  # 320 MB in blocks of 40, which glibc never keeps by itself

before = held()
with kept_memory():
    work()
    inside = held() - before
after = held() - before
work()
print(inside > 200e6, after < 50e6, held() - before < 50e6)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_freed_blocks_stay_inside_only():
    answer = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["True", "True", "True"]


def test_an_error_inside_is_passed_on():
    with pytest.raises(KeyError), kept_memory():
        raise KeyError("inside")


def test_peak_is_in_bytes():
    before = peak_memory()
    block = bytearray(before // 2 + 10_000_000)  # more than what is free of what was ever held
    block[::4096] = b"1" * len(block[::4096])
    assert peak_memory() >= before > 10_000_000


@pytest.mark.parametrize("take", [torch.empty, np.empty])
def test_running_out_names_what_to_make_smaller(take):
    with (
        pytest.raises(
            OutOfMemory, match=r"runs/a: out of memory for [\d.]+ ?\w+ more with size = S, batch_size = 7\. Make"
        ),
        enough_memory("runs/a", {"size": "S", "batch_size": 7}),
    ):
        take(2**50)


@pytest.mark.parametrize("size", [(2**62, 4), (2**62, 3, 64, 64)])
def test_more_than_any_machine_has_is_running_out(size):
    with (
        pytest.raises(OutOfMemory, match=r"runs/a: out of memory with batch_size = 9\."),
        enough_memory("runs/a", {"batch_size": 9}),
    ):
        torch.empty(size)


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught, enough_memory("runs/a", {}):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(caught.value, OutOfMemory)
