"""Long work in steady memory, and many short runs in one process: no memory, descriptor, thread or process is left.

Half a minute each here. The long version: EFFAD_LONG_SECONDS=3600 EFFAD_LONG_RUNS=1000 EFFAD_LONG_OUT=FOLDER, which
gets `memory.csv` and its picture.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import seaborn as sns

from effad_lib.datasets import load_dataset
from effad_lib.detection import detect, open_model
from effad_lib.evaluation import evaluate_run, finish_run
from effad_lib.plots import as_png
from effad_lib.reports import write_report
from effad_lib.runs import PROJECT, Run, resolve, write_bytes, write_csv
from effad_lib.training import TrainingSettings, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc, which is Linux's"),
]

SECONDS = float(os.environ.get("EFFAD_LONG_SECONDS", "15"))
RUNS = int(os.environ.get("EFFAD_LONG_RUNS", "6"))
OUT = os.environ.get("EFFAD_LONG_OUT", "")

PAGE = os.sysconf("SC_PAGE_SIZE")


def held(process: int) -> dict[str, int]:
    """Return what a process holds: megabytes of memory of its own, open files, threads, processes that it has started.

    Memory that it shares with files, such as its libraries, is the system's to give and take.
    """
    place = Path("/proc") / str(process)
    children = [task.joinpath("children").read_text().split() for task in place.glob("task/*")]
    _, resident, shared, *_ = map(int, (place / "statm").read_text().split())
    return {
        "megabytes": round((resident - shared) * PAGE / 1e6),
        "files": len(list((place / "fd").iterdir())),
        "threads": len(list((place / "task").iterdir())),
        "processes": sum(map(len, children)),
    }


def observed(what: str, command: list[str], work: Callable[[], object], started: Callable[[], object]) -> pd.DataFrame:
    """Run a command, doing some work beside it, until Ctrl-C after so many seconds; return what it held and when."""
    rows: list[dict[str, float]] = []
    log = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-m", "effad_lib.cli", *command], cwd=PROJECT, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while not started():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < SECONDS:
            work()
            assert process.poll() is None
            if passed >= len(rows) * SECONDS / 300:
                rows.append({"minutes": passed / 60, **held(process.pid)})
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) in (0, 130)
    finally:
        process.kill()
        process.wait()
        table = pd.DataFrame(rows)
        if OUT and rows:
            record(table, what)
    return table


def check_steady(table: pd.DataFrame) -> None:
    """The last third of the time takes no more than the one before; the first is left for warming up."""
    third = len(table) // 3
    before, after = table[third : 2 * third].max(), table[2 * third :].max()
    assert after["megabytes"] <= 1.02 * before["megabytes"] + 8, (before, after)
    assert (after[["files", "threads", "processes"]] <= before[["files", "threads", "processes"]] + 1).all(), after


def record(table: pd.DataFrame, what: str) -> None:
    """Add the table to `memory.csv` and draw all that is in it."""
    path = resolve(OUT) / "memory.csv"
    known = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    known = known[known["what"] != what] if len(known) else known
    table = pd.concat([known, table.round(2).assign(what=what)])
    write_csv(path, table)
    parts = {"megabytes": "memory, MB", "files": "open files"}
    long = table.rename(columns=parts).melt(["what", "minutes"], list(parts.values()), "held", "value")
    grid = sns.relplot(
        long,
        x="minutes",
        y="value",
        hue="what",
        col="held",
        kind="line",
        height=3,
        aspect=1.5,
        facet_kws={"sharey": False},
    )
    grid.set(ylim=(0, None), ylabel="").set_titles("{col_name}")
    write_bytes(path.with_suffix(".png"), as_png(grid.figure, 80))


def settings(data: Path, folder: Path, **changes) -> TrainingSettings:
    """A training of few and small steps."""
    given = {"dataset": "folder", "data_root": str(data), "size": "XS", "image_size": [64, 64], "device": "cpu"}
    return TrainingSettings.from_mapping({**given, "run_folder": str(folder), **changes})


def test_a_training_holds_as_much_after_an_hour(stripes_with_dents, tmp_path):
    data, folder = stripes_with_dents, tmp_path / "run"
    made = f"--run-folder {folder} --dataset folder --data-root {data} --size XS --image-size 64 64 --device cpu"
    command = f"train {made} --steps 10000000 --validate-every 25 --checkpoint-every 25".split()
    table = observed("training", command, lambda: None, (folder / "history.csv").is_file)
    check_steady(table)


def test_a_watched_folder_holds_as_much_after_an_hour(model, picture, tmp_path):
    """A machine drops images and takes old ones away. All get a heatmap, so that what drawing holds is held at once."""
    images, out = tmp_path / "in", tmp_path / "out"
    count = 0

    def drop() -> None:
        nonlocal count
        if count - len(list((out / "results").glob("*"))) > 20:
            return
        picture(images / f".{count}.png", (64, 64), seed=count).rename(images / f"{count}.png")
        (images / f"{count - 100}.png").unlink(missing_ok=True)
        count += 1

    drop()
    command = ["detect", str(model), str(images), "--out", str(out), "--watch", "--heatmaps", "all", "--device", "cpu"]
    table = observed("detect --watch", command, drop, (out / "results" / "0.png.json").is_file)
    assert len(list((out / "results").iterdir())) >= count - 21 > 0
    check_steady(table)


def test_many_short_runs_in_one_process_leave_nothing(stripes_with_dents, tmp_path):
    """Trained, measured, reported and used, as a notebook's kernel may do it all day."""
    data = stripes_with_dents
    split, rows = load_dataset("folder", root=data), []
    for number in range(RUNS):
        folder = tmp_path / f"run{number}"
        train(settings(data, folder, steps=2, validate_every=2, seed=number), split)
        detector, _, found = evaluate_run(folder, "cpu")
        result = finish_run(folder, detector, found)
        if number % 10 == 0:
            write_report(folder, found, detector.image_size, result)
        detect(open_model(Run(folder).model, "cpu"), data / "test" / "dent" / "0.png", folder / "detections")
        del detector, found
        gc.collect()
        rows.append({"run": number, **held(os.getpid()), "figures": len(plt.get_fignums())})
    table = pd.DataFrame(rows)
    assert table["figures"].max() == 0
    for name in ("files", "threads", "processes"):
        assert table[name].iloc[-1] <= table[name].iloc[len(table) // 2], table
    if OUT:
        write_csv(resolve(OUT) / "short_runs.csv", table)
    if RUNS >= 100:
        half = len(table) // 2
        assert table["megabytes"].iloc[-1] - table["megabytes"].iloc[half] < 0.1 * half, table
