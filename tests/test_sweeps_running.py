"""Sweeps at work: skipped, resumed, failed, stopped, killed; the same result in the end."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from breaking import KILLS, processes_of
from counting import COUNTS, FINISHES, PARAMETERS, WORKS, notebook, numbers, planned, starts, wait_for
from trust import fixed

from effad_lib import sweeps
from effad_lib.execution import Lock
from effad_lib.runs import PROJECT, Run, RunError
from effad_lib.settings import cores
from effad_lib.sweeps import LockError, run_sweep, state_of
from effad_lib.sweeps.local import slots


def test_runs_are_executed_once_failed_ones_are_marked_and_tried_again_on_demand(counting, capsys):
    text = "cases: {good: {}, bad: {fails: true}}\nseeds: [1]"
    table = run_sweep(**counting(text)).set_index("run")
    assert table["state"].to_dict() == {"good-seed1": "done", "bad-seed1": "failed"}
    assert table.loc["good-seed1", "last"] == numbers(1)[-1] and table.loc["good-seed1", "sum"] == sum(numbers(1))
    assert table.loc["bad-seed1", "error"] == "counting.ipynb, cell 5: ValueError: a <b>bad</b> case"
    good, bad = planned(counting(text)).runs
    assert json.loads((bad.folder / "failed.json").read_text())["cell"] == 5
    executed = nbformat.read(bad.folder / "counting.ipynb", 4)
    assert any(output["output_type"] == "error" for cell in executed.cells for output in cell.get("outputs", []))
    said = capsys.readouterr().out
    assert "good-seed1 done" in said and "bad-seed1 failed: counting.ipynb, cell 5" in said
    page = (good.folder.parent / "report.html").read_text()
    assert "a &lt;b&gt;bad&lt;/b&gt; case" in page and 'href="good-seed1/counting.ipynb"' in page
    summary = pd.read_csv(good.folder.parent / "summary.csv").set_index("run")
    assert summary["state"].to_dict() == table["state"].to_dict() and summary["last"].iloc[0] == numbers(1)[-1]
    # Half of the cores for each of two workers, but never more than the surroundings allow.
    threads = [line.split()[1] for line in (good.folder / "starts.txt").read_text().splitlines()]
    assert threads == [slots(2)[0]["OMP_NUM_THREADS"]]

    # Once more: nothing to do, and the failed one is left alone, which is said.
    run_sweep(**counting(text))
    assert len(starts(good.folder)) == len(starts(bad.folder)) == 1
    assert "Failed before and not tried again: bad-seed1" in capsys.readouterr().out
    (bad.folder / "mended").touch()
    table = run_sweep(**counting(text, retry_failed=True)).set_index("run")
    assert table["state"].to_dict() == {"good-seed1": "done", "bad-seed1": "done"}
    assert starts(good.folder) == [1] and not (bad.folder / "failed.json").exists()

    # Other parameters in the same folders are refused before anything runs; with force they are done anew.
    text = text.replace("seeds", "parameters: {count: 4}\nseeds")
    with pytest.raises(RunError, match=r"count: None there, 4 now(?s:.)*effad sweep mine --force"):
        run_sweep(**counting(text))
    (good.folder.parent / "other").mkdir()
    (bad.folder / "mended").unlink()
    table = run_sweep(**counting(text, force=True, only="good*")).set_index("run")
    assert table.loc["good-seed1", "last"] == numbers(1, 4)[-1] and starts(good.folder) == [1]
    assert len(starts(bad.folder)) == 2 and (good.folder.parent / "other").is_dir()


def test_a_sweep_that_is_asked_what_it_would_do_does_nothing(counting, capsys, tmp_path):
    table = run_sweep(**counting("seeds: [1, 2]", dry_run=True, gpu_minutes=30.0, gpu_source="a paper"))
    assert table["state"].tolist() == ["waiting", "waiting"] and not (tmp_path / "runs").exists()
    said = capsys.readouterr().out
    assert "mine: 2 runs, 2 waiting" in said and said.count("not measured yet") == 2
    assert "8 × GPU" in said and "a paper" in said


def test_a_run_that_leaves_no_metrics_is_no_finished_run(counting, tmp_path):
    arguments = counting("seeds: [1]")
    notebook(tmp_path / "notebooks" / "counting.ipynb", PARAMETERS, COUNTS, WORKS)
    table = run_sweep(**arguments)
    assert table["state"].tolist() == ["failed"] and "left no metrics.json" in table["error"][0]
    # A notebook that was changed is executed again; what it had computed is there.
    notebook(tmp_path / "notebooks" / "counting.ipynb", PARAMETERS, COUNTS, WORKS, FINISHES)
    table = run_sweep(**counting("seeds: [1]", retry_failed=True))
    assert table["state"].tolist() == ["done"] and starts(planned(arguments).runs[0].folder) == [1, 4]


def test_a_run_whose_process_dies_is_marked(counting, tmp_path):
    arguments = counting("seeds: [1]")
    dies = "import signal\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"
    notebook(tmp_path / "notebooks" / "counting.ipynb", PARAMETERS, COUNTS, dies)
    table = run_sweep(**arguments)
    assert table["state"].tolist() == ["failed"]
    assert table["error"][0] == "its process was ended by SIGKILL, perhaps for want of memory"


def test_a_kernel_that_dies_is_started_once_more(counting, tmp_path):
    arguments = counting("seeds: [1]")
    dies = 'if len(list(open(Path(run_folder) / "starts.txt"))) == 1:\n    os._exit(3)'
    notebook(tmp_path / "notebooks" / "counting.ipynb", PARAMETERS, COUNTS, WORKS, dies, FINISHES)
    table = run_sweep(**arguments)
    assert table["state"].tolist() == ["done"] and starts(planned(arguments).runs[0].folder) == [1, 4]


def test_a_full_disk_stops_the_sweep_and_no_run_has_failed(counting, tmp_path):
    arguments = counting("seeds: [1]")
    full = 'if not (Path(run_folder) / "room").exists():\n    raise OSError(28, os.strerror(28))'
    notebook(tmp_path / "notebooks" / "counting.ipynb", PARAMETERS, COUNTS, WORKS, full, FINISHES)
    (run,) = planned(arguments).runs
    with pytest.raises(RunError, match=r"seed1 met a full disk \(.*No space left on device\). Make room"):
        run_sweep(**arguments)
    assert state_of(run) == "stopped"
    (run.folder / "room").touch()
    assert run_sweep(**arguments)["state"].tolist() == ["done"] and starts(run.folder) == [1, 4]


def test_folders_that_become_read_only_stop_the_sweep_and_no_run_has_failed(counting, tmp_path):
    if not (fixed("+i", tmp_path) and fixed("-i", tmp_path)):
        pytest.skip("only root makes folders immutable, on file systems that know it")
    arguments = counting("parameters: {count: 40, seconds: 8.0}\nseeds: [1, 2]", workers=1)
    runs = planned(arguments).runs
    folders = runs[0].folder, runs[0].folder.parent
    with ThreadPoolExecutor() as threads:
        at_work = threads.submit(run_sweep, **arguments)
        wait_for(lambda: (runs[0].folder / "history.csv").exists())
        try:
            assert fixed("+i", *folders)
            with pytest.raises(RunError, match=r"cannot write .*seed1.*: Operation not permitted. Choose another fold"):
                at_work.result()
        finally:
            assert fixed("-i", *folders)
    assert [state_of(run) for run in runs] == ["stopped", "waiting"]
    table = run_sweep(**arguments)
    assert table["state"].tolist() == ["done", "done"]
    assert table["last"].tolist() == [numbers(seed, 40)[-1] for seed in (1, 2)]
    assert starts(runs[0].folder)[1] > 1 and starts(runs[1].folder) == [1]


def test_two_sweeps_do_not_work_in_one_folder(counting):
    arguments = counting("seeds: [1]")
    sweep = planned(arguments)
    with Lock(sweep.folder / "sweep.lock"), pytest.raises(LockError, match=rf"in use by process {os.getpid()} on"):
        run_sweep(**arguments)
    for name in ("run.log", ".lock"):
        with Lock(sweep.runs[0].folder / name), pytest.raises(LockError, match=r"seed1 is in use by process"):
            run_sweep(**counting("seeds: [1]", force=True))
    assert starts(sweep.runs[0].folder) == [] and state_of(sweep.runs[0]) == "stopped"


def test_a_run_waits_for_who_else_works_in_its_folder(counting):
    """A last kernel of a sweep that died, say, which may still be writing."""
    arguments = counting("seeds: [1]")
    (run,) = planned(arguments).runs
    with ThreadPoolExecutor() as threads, Lock(run.folder / ".lock") as other:
        # The sweep is one of this process, its run in another: which begins, and waits.
        at_work = threads.submit(run_sweep, **arguments)
        wait_for(lambda: Lock(run.folder / "run.log").is_held)
        time.sleep(1)
        assert starts(run.folder) == [] and not (run.folder / "order.json").exists()
        other.leave()
        assert at_work.result()["state"].tolist() == ["done"] and starts(run.folder) == [1]


def test_ctrl_c_stops_the_runs_and_they_are_resumed(counting):
    arguments = counting("parameters: {count: 40, seconds: 10.0}\nseeds: [1, 2]")
    runs = planned(arguments).runs

    def press():
        wait_for(lambda: all((run.folder / "history.csv").exists() for run in runs))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(**arguments)
    thread.join()
    assert [state_of(run) for run in runs] == ["stopped", "stopped"]
    for run in runs:
        reached = len(json.loads((run.folder / "checkpoint.json").read_text()))
        kernel = int((run.folder / "starts.txt").read_text().split()[-1])
        assert 1 < reached < 41 and not Path(f"/proc/{kernel}").exists()
    table = run_sweep(**arguments)
    assert table["state"].tolist() == ["done", "done"]
    assert table["last"].tolist() == [numbers(seed, 40)[-1] for seed in (1, 2)]
    assert all(starts(run.folder)[1] > 1 for run in runs)


def test_the_workers_divide_cores_and_graphics_cards(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("effad_lib.sweeps.local.cores", lambda: 12)
    assert [slot["OMP_NUM_THREADS"] for slot in slots(5)] == ["2"] * 5
    assert slots(1, 3)[0]["OMP_NUM_THREADS"] == "3" and 1 <= len(slots()) <= 12
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [slot["OMP_NUM_THREADS"] for slot in slots(5)] == ["1"] * 5
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots()] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(3)] == ["3", "5", "3"]


# --- killed ---------------------------------------------------------------------------------------------------------

DRIVER = """
import sys
from effad_lib.sweeps import SweepSettings, run_sweep
run_sweep(SweepSettings(sweep="mine", runs=sys.argv[1], workers=3), notebooks=sys.argv[2])
"""


def counted(folder):
    """How many numbers the runs of a sweep have saved so far."""
    return sum(len(json.loads(path.read_text())) for path in folder.rglob("checkpoint.json"))


def owner_of(folder):
    """The process that holds a sweep, or held it last."""
    owner = Lock(folder / "sweep.lock").owner
    return owner and owner.pid


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks for processes in /proc")
def test_killed_at_any_moment_a_sweep_ends_as_if_undisturbed(counting, tmp_path):
    arguments = counting("parameters: {count: 60, seconds: 9.0}\nseeds: [1, 2, 3]", workers=3)
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "runs"), str(arguments["notebooks"])]
    rng, folder = random.Random(7), tmp_path / "runs" / "mine"
    moments = []
    for number in range(5 * KILLS):
        process = subprocess.Popen(command, cwd=PROJECT, start_new_session=True, stdout=subprocess.DEVNULL)
        # From the moment at which it has the lock: planning only reads, and takes a while that depends on the machine.
        wait_for(lambda process=process: process.poll() is not None or owner_of(folder) == process.pid)
        if number % 3 == 0:  # so that some moments lie within runs, however long a kernel takes to start
            before = counted(folder)
            wait_for(lambda process=process, before=before: process.poll() is not None or counted(folder) > before)
        moments.append(rng.uniform(0.0, 6.0 if number % 3 else 1.0))
        time.sleep(moments[-1])
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        if number % 2:  # half of the times everything dies, half of the times only what a shell's job consists of
            for pid in processes_of(folder):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        for path in folder.rglob("[!.]*.json"):
            json.loads(path.read_text())
    table = run_sweep(**arguments)
    undisturbed = run_sweep(
        **counting("parameters: {count: 60, seconds: 9.0}\nseeds: [1, 2, 3]", runs=str(tmp_path / "b"), workers=3)
    )
    columns = ["run", "state", "seed", "last", "sum", "notebook", "error"]
    assert table["state"].tolist() == ["done"] * 3
    pd.testing.assert_frame_equal(table[columns], undisturbed[columns])
    assert pd.read_csv(folder / "summary.csv")["last"].tolist() == [numbers(seed, 60)[-1] for seed in (1, 2, 3)]
    # It was killed in the middle of runs indeed, and what had been computed was not computed again.
    resumed = [start for run in planned(arguments).runs for start in starts(run.folder) if start > 1]
    assert len(resumed) >= 2, moments  # the first and the fourth time, at the least
    assert not processes_of(folder)


def test_the_public_face_has_what_notebook_and_command_line_use():
    assert cores() >= 1 and all(hasattr(sweeps, name) for name in sweeps.__all__)
    assert isinstance(Run("runs/nothing").done, bool)
