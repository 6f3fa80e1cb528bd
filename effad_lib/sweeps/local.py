"""The runs of a sweep on this machine: a process for each worker, one on each GPU, the cores divided fairly."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence

import torch

from effad_lib.execution import process
from effad_lib.settings import cores
from effad_lib.sweeps.plan import SweepRun

APART = 1.0
"""Seconds between two starts: kernels that start at the same instant may draw the same ports."""

MEMORY = 4 * 2**30
"""Bytes that a run on a CPU may take: a kernel, the images, and two gigabytes of the teacher's features."""

Ended = list[tuple[SweepRun, str]]


def slots(workers: int = 0, threads: int = 0) -> list[dict[str, str]]:
    """Return for each worker what its runs get as environment: its share of the cores, and its GPU if there is one.

    Zero workers take one for each GPU or, without any, one for each core with 4 GB of memory. Zero threads divide the
    cores by the workers. `OMP_NUM_THREADS` and `CUDA_VISIBLE_DEVICES` that are set limit both.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [name.strip() for name in named.split(",")] if named else [str(k) for k in range(torch.cuda.device_count())]
    gpus = gpus[: torch.cuda.device_count()]
    if not workers:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEMORY
        workers = len(gpus) or max(1, min(cores(), room))
    if not threads:
        limit = os.environ.get("OMP_NUM_THREADS", "")
        threads = max(1, cores() // workers)
        threads = min(threads, int(limit)) if limit.isdigit() and int(limit) else threads
    share = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return [share | ({"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]} if gpus else {}) for k in range(workers)]


def run_here(runs: Sequence[SweepRun], workers: int = 0, threads: int = 0) -> Iterator[Ended]:
    """Execute runs, each in a process of its own; yield twice a second those that have ended, each with its outcome.

    Closing the iterator stops the runs that are still going, so that they can be resumed.
    """
    waiting, free = list(runs), slots(min(workers, len(runs)), threads)
    running: dict[str, tuple[SweepRun, subprocess.Popen[bytes], dict[str, str]]] = {}
    last_start = 0.0
    try:
        while waiting or running:
            if waiting and free and time.monotonic() - last_start >= APART:
                run, slot = waiting.pop(0), free.pop(0)
                running[run.name] = run, process.start(run.order, slot), slot
                last_start = time.monotonic()
            ended: Ended = []
            for run, started, slot in list(running.values()):
                if started.poll() is not None:
                    del running[run.name]
                    free.append(slot)
                    ended.append((run, process.outcome(started, run.folder)))
            yield ended
            time.sleep(0.5)
    finally:
        process.stop([started for _, started, _ in running.values()])
