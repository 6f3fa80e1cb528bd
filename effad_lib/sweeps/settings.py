"""Settings of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

from effad_lib.settings import Settings, check_threads


@dataclass(frozen=True)
class SweepSettings(Settings):
    """Settings of a sweep: what to run, and where."""

    sweep: str = "quick"  # a file of notebooks/sweeps, or the path of a YAML file of your own
    runs: str = "runs/sweeps"  # gets a folder for each sweep
    only: str = ""  # runs whose names match a pattern such as "screw-*-seed0"; "" takes all
    workers: int = (
        0  # runs at the same time; 0 takes one for each GPU or, without one, for each core with 4 GB of memory
    )
    threads: int = 0  # CPU threads of each run; 0 divides the cores by the workers
    scheduler: str = ""  # address of a Dask scheduler, "local" starts a cluster here; "" does without Dask
    retry_failed: bool = False  # run those again that failed
    force: bool = False  # delete the runs of this sweep first
    dry_run: bool = False  # list the runs and what is known of each, and run nothing
    gpu_minutes: float = 0.0  # of a run on one GPU, for the estimate of the cost if none was measured; 0 leaves it out
    gpu_source: str = ""  # where that figure is from, such as a paper

    def check(self) -> None:
        check_threads(self.threads)
        self.require(self.workers >= 0, "workers", "a whole number of at least 0")
        self.require(self.gpu_minutes >= 0, "gpu_minutes", "minutes, or 0 if they are not known")
        sourced = not self.gpu_minutes or self.gpu_source
        self.require(bool(sourced), "gpu_source", "the source of gpu_minutes: a figure without one says nothing")
