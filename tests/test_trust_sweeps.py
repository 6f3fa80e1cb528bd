"""What the folder of a sweep says of its runs, altered: told by name, or passed over as no state."""

from __future__ import annotations

import json
import math
import os
import socket

import nbformat
import pandas as pd
import pytest
import yaml
from trust import BROKEN, refused

from effad_lib.execution import Lock
from effad_lib.runs import Run
from effad_lib.sweeps import Spent, load_sweep, means, state_of, write_page
from effad_lib.sweeps.results import evaluated, summary_row, write_summary
from effad_lib.sweeps.state import progress_of
from effad_lib.training import TrainingSettings


@pytest.fixture
def sweep(tmp_path):
    """A sweep of one run that is done, and its run."""
    folder = tmp_path / "notebooks"
    (folder / "sweeps").mkdir(parents=True)
    cell = nbformat.v4.new_code_cell('run_folder = "x"\nrate = 0.1', metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "one.ipynb")
    (folder / "sweeps" / "mine.yaml").write_text("{notebooks: [one], parameters: {rate: 0.5}}")
    plan = load_sweep("mine", runs=tmp_path / "runs", notebooks=folder)
    (only,) = plan.runs
    only.folder.mkdir(parents=True)
    made = nbformat.read(folder / "one.ipynb", 4)
    made.metadata |= {"effad": only.steps[0].record, "papermill": {"duration": 3.0}}
    nbformat.write(made, only.folder / "one.ipynb")
    (only.folder / "order.json").write_text(json.dumps(only.identity))
    Run(only.folder).finish({"image_auroc": 0.9})
    return plan, only


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        *((kind, r"order\.json (is not JSON|holds)|of effad None") for kind in BROKEN),
        ({"effad": "0.0"}, r"holds a run of effad 0\.0"),
        ({"parameters": []}, "does not tell the parameters"),
        ({"parameters": {"one": 3}}, "does not tell the parameters"),
        ({"parameters": {"one": {"rate": "0.5"}}}, "rate: '0.5' there, 0.5 now"),
    ],
    ids=str,
)
def test_the_order_of_a_run_that_was_altered(sweep, kind, says):
    _, run = sweep
    run.check()
    content = json.dumps(run.identity | kind).encode() if isinstance(kind, dict) else BROKEN[kind]
    (run.folder / "order.json").write_bytes(content)
    refused(run.check, says)


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["failed.json", "one.ipynb", "run.log"])
def test_state_files_of_a_run_that_are_broken_are_no_state(sweep, name, kind):
    plan, run = sweep
    assert state_of(run) == "done"
    if name != "one.ipynb":
        (run.folder / "metrics.json").unlink()
    (run.folder / name).write_bytes(BROKEN[kind])
    state = state_of(run)
    assert state in ("waiting", "stopped", "failed") and Lock(run.folder / "run.log").owner is None
    row = {"run": run.name, "state": state, "error": "x"}
    assert write_page(plan, [], {run.name: row}).is_file()


@pytest.mark.parametrize(
    ("name", "value"),
    [("data", 3), ("size", []), ("image_auroc", "high"), ("au_pro", {}), ("seconds", "long"), ("seconds", 1e308)],
)
def test_metrics_of_a_run_that_make_no_sense(sweep, name, value):
    plan, run = sweep
    found = {"data": "mvtec_ad/screw", "size": "S", "image_auroc": 0.9, name: value}
    (run.folder / "metrics.json").write_text(json.dumps(found))
    (run.folder / "parameters.yaml").write_text(yaml.safe_dump(TrainingSettings().as_dict()))
    for work in (lambda: summary_row(plan, run, "done"), lambda: means([run]), lambda: write_page(plan, [run], {})):
        refused(work, rf"metrics\.json has {name} = .*, which takes .*Restore or delete it")
    assert not (plan.folder / "report.html").exists()


def test_metrics_name_no_other_run_or_state_and_inject_nothing(sweep):
    plan, run = sweep
    found = {"data": "<script>", "size": "<b>", "image_auroc": None, "=1+1": "=1+1"}
    found |= {"run": "<script>", "state": "<script>", "error": "<script>", "notebook": "<script>", "device": "<script>"}
    (run.folder / "metrics.json").write_text(json.dumps(found))
    (run.folder / "parameters.yaml").write_text(yaml.safe_dump(TrainingSettings().as_dict()))
    row = summary_row(plan, run, "done")
    assert (row["run"], row["state"], row["notebook"], row["error"]) == ("run", "done", "run/one.ipynb", None)
    assert evaluated([run]) == [run]
    page = write_page(plan, [run], {run.name: row}).read_text()
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page and "nan" not in page.lower()
    write_summary(plan, [row])
    (table,) = pd.read_csv(plan.folder / "summary.csv").to_dict("records")
    assert table["'=1+1"] == "'=1+1"


@pytest.mark.parametrize(
    "papermill",
    [
        {"duration": "long"},
        {"duration": -1e10},
        {"duration": 1e308},
        {"duration": math.nan},
        {"duration": [3]},
        {"start_time": "noon", "end_time": "2026-01-02T03:04:05"},
        {"start_time": "2026-01-02T03:04:05", "end_time": 3},
    ],
    ids=str,
)
def test_an_executed_notebook_that_says_what_cannot_be(sweep, papermill):
    _, run = sweep
    output = run.steps[0].output
    assert Spent.of(run).seconds == 3.0
    executed = json.loads(output.read_text())
    executed["metadata"]["papermill"] = papermill
    output.write_text(json.dumps(executed))
    assert state_of(run) == "done"
    name = next(name for name, value in papermill.items() if value != "2026-01-02T03:04:05")
    refused(lambda: Spent.of(run), rf"one\.ipynb has {name} = .*, which takes .*, or null. Restore it, or delete it")


@pytest.mark.parametrize("content", [3, [], "x", None, [[]]], ids=str)
def test_an_executed_notebook_that_says_nothing_took_no_time(sweep, content):
    _, run = sweep
    executed = json.loads(run.steps[0].output.read_text())
    executed["metadata"]["papermill"] = content
    run.steps[0].output.write_text(json.dumps(executed))
    assert Spent.of(run).seconds == 0.0


@pytest.mark.parametrize(
    "rows",
    [
        "a,b,c",
        "inf,1,1",
        "1e400,1,1",
        "nan,1,1",
        "-3,1,1",
        "5,x,1",
        "5,1,x",
        "5,inf,1",
        "1,1,1\n5,1e308,1",
        "1,1,1\n5,1,-inf",
        "1,1",
        "x" * 10**5,
    ],
    ids=lambda rows: rows[:20],
)
def test_a_history_that_is_none_is_no_progress(sweep, rows):
    _, run = sweep
    for rest in ("", "\n1,1,1"):
        (run.folder / "history.csv").write_text(f"step,seconds,validation\n{rows}{rest}\n")
        found = progress_of(run, "running")
        assert found.step == 0 and math.isnan(found.loss) and math.isnan(found.left)


OWNER = {"host": socket.gethostname(), "pid": 9, "since": "2026-01-02T03:04:05+00:00"}


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "9"},
        {"pid": -1},
        {"pid": 0},
        {"pid": True},
        {"pid": 1.0},
        {"pid": None},
        {"pid": [9]},
        {"pid": 2**31},
        {"pid": 10**400},
        {"host": 3},
        {"host": None},
        {"since": 3},
        {"since": ["2026"]},
        {"more": 1},
        {"pid": math.nan},
    ],
    ids=lambda change: str(change)[:30],
)
def test_a_lock_whose_line_names_no_process_is_nobodys(sweep, monkeypatch, change):
    _, run = sweep
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a process was asked for"))
    path = run.folder / "run.log"
    path.write_text(json.dumps(OWNER | change) + "\n")
    assert Lock(path).owner is None and not Lock(path).is_held and state_of(run) == "done"
    assert progress_of(run, "running").note == ""
    Lock(path).take().leave()
    for name in OWNER:
        path.write_text(json.dumps({key: value for key, value in OWNER.items() if key != name}) + "\n")
        assert Lock(path).owner is None
