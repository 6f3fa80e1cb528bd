"""The runs of a sweep on a Dask cluster, whose machines share the sweep's folder."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from effad_lib.execution import Lock, process
from effad_lib.execution.lock import STALE
from effad_lib.runs import RunError, from_project, resolve
from effad_lib.settings import SettingsError
from effad_lib.sweeps.local import Ended, slots
from effad_lib.sweeps.plan import SWEEP_LOCK, Sweep, SweepRun

GPU = "GPU"
"""The resource that a worker with a graphics card announces: `dask worker ADDRESS --nthreads 1 --resources GPU=1`."""


def run_on_cluster(
    sweep: Sweep, runs: Sequence[SweepRun], scheduler: str, workers: int = 0, threads: int = 0
) -> Iterator[Ended]:
    """Execute runs as Dask tasks, as `run_here` does on this machine; the sweep's lock has to be held.

    scheduler: an address such as "tcp://host:8786", or "local" for a cluster of so many workers on this machine. Every
    worker executes as many runs at a time as it has threads. If one of them announces the resource GPU, a run takes one
    of it. The runs of a worker that dies are given to others, which resume them from their last checkpoint. Closing the
    iterator, or dying, stops the runs. Raises `RunError` without the package or without an answer from the scheduler.
    """
    with _client(scheduler, min(workers, len(runs)), threads) as client:
        there = client.scheduler_info(n_workers=-1)["workers"]
        needs = {GPU: 1} if any(GPU in worker.get("resources", {}) for worker in there.values()) else None
        print(f"{len(there)} workers on {client.scheduler.address}{f', one {GPU} a run' if needs else ''}", flush=True)
        if scheduler == "local":
            threads = int(slots(min(workers, len(runs)), threads)[0]["OMP_NUM_THREADS"])
        owner = Lock(sweep.folder / SWEEP_LOCK).owner
        lead = {"lock": from_project(sweep.folder / SWEEP_LOCK), "owner": asdict(owner)}
        tasks = {}
        for number, run in enumerate(runs):
            key = f"{sweep.name}/{run.name} {owner.since}"
            tasks[run.name] = (
                run,
                client.submit(
                    perform, run.order, lead, threads, key=key, priority=-number, resources=needs, pure=False
                ),
            )
        try:
            while tasks:
                ended: Ended = []
                for run, future in list(tasks.values()):
                    if future.done():
                        del tasks[run.name]
                        ended.append((run, _outcome(run, future)))
                yield ended
                time.sleep(0.5)
        finally:
            client.cancel([future for _, future in tasks.values()], force=True)


def perform(told: Mapping[str, Any], lead: Mapping[str, Any], threads: int = 0) -> str:
    """Execute a run on the machine of a worker, in a process of its own, and return its outcome.

    told: an `order`; lead: the sweep's lock and its owner. The run is stopped when the sweep gives the lock back or has
    given no sign of life for long. Raises `RunError` on a machine that does not see the sweep's folder.
    """
    lock = Lock(resolve(lead["lock"]))
    if lock.owner is None or asdict(lock.owner) != lead["owner"]:
        raise RunError(f"{lock.path} is not the sweep's here: all machines have to share the folder of the runs.")
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if threads else ()
    started = process.start(told, dict.fromkeys(names, str(threads)))
    try:
        while started.poll() is None:
            if lock.owner is None or asdict(lock.owner) != lead["owner"] or lock.age >= STALE:
                process.stop([started])
            time.sleep(0.5)
    finally:
        process.stop([started])
    return process.outcome(started, resolve(told["folder"]))


def _outcome(run: SweepRun, future: Any) -> str:
    """Return how a task that is over left its run; one that Dask gave up is marked as failed."""
    if future.status == "finished":
        return future.result()
    if future.status == "error":
        error = future.exception()
        process.mark_failed(run.folder, "", str(error), error=type(error).__name__)
        return "failed"
    return "stopped"


def _import_distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise RunError('sweeps on a cluster need Dask: pip install "effad[cluster]"') from error
    return distributed


@contextlib.contextmanager
def _client(scheduler: str, workers: int, threads: int) -> Iterator[Any]:
    """Yield a client of the scheduler at an address, or of one started here."""
    distributed = _import_distributed()
    with contextlib.ExitStack() as stack:
        address = scheduler
        if scheduler == "local":
            address = stack.enter_context(_local_cluster(distributed, slots(workers, threads)))
        try:
            client = stack.enter_context(distributed.Client(address, timeout="20s", set_as_default=False))
        except (OSError, TimeoutError) as error:
            raise RunError(f"scheduler = {scheduler!r} does not answer: {error}") from error
        except ValueError as error:
            raise SettingsError(f"scheduler = {scheduler!r}: takes an address such as tcp://host:8786.") from error
        yield client


def _local_cluster(distributed: Any, environments: Sequence[dict[str, str]]) -> Any:
    """Return a scheduler and a worker for each environment, on this machine only, to be entered."""
    spec = {}
    for number, environment in enumerate(environments):
        has_gpu = "CUDA_VISIBLE_DEVICES" in environment
        options = {"nthreads": 1, "env": environment, "resources": {GPU: 1} if has_gpu else {}, "host": "127.0.0.1"}
        options |= {"silence_logs": logging.CRITICAL}
        spec[number] = {"cls": distributed.Nanny, "options": options}
    scheduler = {"cls": distributed.Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard": False}}
    return distributed.SpecCluster(workers=spec, scheduler=scheduler, silence_logs=logging.CRITICAL)
