"""Sweeps on a cluster: workers of their own on this machine, killed among them; the same result in the end."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from counting import notebook, planned, wait_for
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from effad_lib.execution import Lock
from effad_lib.execution.process import tasks_of
from effad_lib.runs import PROJECT, RunError
from effad_lib.settings import SettingsError
from effad_lib.sweeps import SweepSettings, load_sweep, run_sweep, state_of
from effad_lib.sweeps.cluster import perform

TRAINS = """from effad_lib.datasets import load_dataset
from effad_lib.runs import Run
from effad_lib.training import TrainingSettings, train
settings = TrainingSettings.from_mapping({"device": "cpu", **dict(
    run_folder=run_folder, dataset=dataset, data_root=data_root, size=size, image_size=image_size, steps=steps,
    seed=seed, validate_every=validate_every, checkpoint_every=checkpoint_every)})
detector = train(settings, load_dataset(dataset, root=data_root, seed=seed))
weights = sum(value.double().sum().item() for value in detector.student.state_dict().values())
Run(run_folder).finish({"weights": weights, "steps": detector.card["steps"], "seconds": detector.card["seconds"]})"""

TRAINING = """run_folder = "runs/training"
dataset = "folder"
data_root = ""
size = "XS"
image_size = [64, 64]
steps = 100
seed = 0
validate_every = 10
checkpoint_every = 10"""


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers on loopback, processes of their own: its address and the workers."""
    pytest.importorskip("distributed")
    dask, file = [sys.executable, "-m", "dask"], tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    loopback = ["--scheduler-file", str(file), "--host", "127.0.0.1", "--no-dashboard"]
    scheduler = subprocess.Popen([*dask, "scheduler", *loopback, "--port", "0"], **quiet)
    workers = []
    try:
        wait_for(file.exists)
        options = [*loopback, "--nthreads", "1", "--no-nanny", "--resources", "GPU=1"]
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen([*dask, "worker", *options], **quiet, env=environment) for _ in range(2)]
        from distributed import Client

        address = json.loads(file.read_text())["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, workers
    finally:
        for process in [*workers, scheduler]:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing_but_time(cluster, tmp_path, picture, capsys):
    """Its run goes on elsewhere from the last checkpoint, and ends bit for bit as if nothing had happened."""
    address, workers = cluster
    for index in range(13):
        picture(tmp_path / "data" / f"{index}.png", size=(64, 64), seed=index)
    folder = tmp_path / "notebooks"
    notebook(folder / "03_training.ipynb", TRAINING, TRAINS)
    text = f"notebooks: [03_training]\nparameters: {{data_root: {tmp_path / 'data'}, steps: 400}}\nseeds: [1, 2]"
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "mine.yaml").write_text(text)
    settings = SweepSettings(sweep="mine", runs=str(tmp_path / "runs"), scheduler=address)
    runs = load_sweep("mine", runs=tmp_path / "runs", notebooks=folder).runs
    killed = []

    def kill():
        history = runs[0].folder / "history.csv"
        wait_for(lambda: history.exists() and len(history.read_text().splitlines()) > 5)
        process = Lock(runs[0].folder / "run.log").owner.pid
        (worker,) = [w for w in workers if w.pid == int(Path(f"/proc/{process}/stat").read_text().split()[3])]
        worker.kill()
        killed.append(len(history.read_text().splitlines()))

    thread = threading.Thread(target=kill)
    thread.start()
    table = run_sweep(settings, notebooks=folder).set_index("run")
    thread.join()
    assert killed and table["state"].tolist() == ["done", "done"]
    assert "2 workers on tcp://127.0.0.1" in capsys.readouterr().out.splitlines()[0]
    hosts = [line for line in (runs[0].folder / "run.log").read_text().splitlines() if line.startswith('{"host"')]
    assert len(hosts) == 2, "the run was started again"
    here = run_sweep(SweepSettings(sweep="mine", runs=str(tmp_path / "here"), threads=1), notebooks=folder).set_index(
        "run"
    )
    assert table["weights"].to_dict() == here["weights"].to_dict()
    assert (table["steps"] == 400).all()
    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs" / "mine"))  # as `tensorboard --logdir` does
    assert {name.split("/")[0] for name in board.Runs()} == {"seed1", "seed2"}


def test_a_task_runs_for_its_sweep_alone(counting):
    """On a machine that does not share the folder it is refused; when the sweep lets go, it stops and saves."""
    sweep = planned(counting("parameters: {count: 40, seconds: 30.0}\nseeds: [1]"))
    (run,) = sweep.runs
    lock = Lock(sweep.folder / "sweep.lock").take()
    lead = {"lock": str(lock.path), "owner": asdict(lock.owner)}
    with pytest.raises(RunError, match="all machines have to share the folder"):
        perform(run.order, lead | {"owner": {"host": "elsewhere"}})
    with pytest.raises(RunError, match="all machines have to share the folder"):
        perform(run.order, lead | {"lock": str(sweep.folder / "nowhere" / "sweep.lock")})

    def let_go():
        wait_for((run.folder / "history.csv").exists)
        lock.leave()

    thread = threading.Thread(target=let_go)
    thread.start()
    assert perform(run.order, lead) == "stopped" and state_of(run) == "stopped"
    thread.join()
    assert 1 < len(json.loads((run.folder / "checkpoint.json").read_text())) < 41


def test_a_process_of_another_library_is_told_so(counting):
    (run,) = planned(counting("seeds: [1]")).runs
    told = run.order
    told["tasks"][0][2] = told["tasks"][0][2] | {"effad": "9.9"}
    with pytest.raises(RunError, match=r"counting.ipynb differs here \(effad\): all machines need the same"):
        tasks_of(told)


def test_a_scheduler_that_does_not_answer_or_is_no_address_is_an_error(counting, monkeypatch):
    pytest.importorskip("distributed")
    with pytest.raises(SettingsError, match=r"scheduler = 'nonsense://1': takes an address such as tcp"):
        run_sweep(**counting("seeds: [1]", scheduler="nonsense://1"))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RunError, match=r"pip install .*effad\[cluster\]"):
        run_sweep(**counting("seeds: [1]", scheduler="tcp://127.0.0.1:1"))
