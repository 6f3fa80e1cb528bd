"""The run folder: files whole or not at all, no mixed settings, nothing unpickled."""

import csv
import errno
import math
import os
import pickle
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

from effad_lib import runs
from effad_lib.runs import (
    PROJECT,
    Run,
    RunError,
    finish_step_on_interrupt,
    harmless,
    here,
    resolve,
    write_bytes,
    write_csv,
    write_json,
    write_text,
)
from effad_lib.settings import Settings


@dataclass(frozen=True)
class Example(Settings):
    steps: int = 10
    device: str = "cpu"


@dataclass(frozen=True)
class Movable(Example):
    MAY_CHANGE = frozenset({"device"})


def test_relative_paths_are_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/x") == PROJECT / "runs" / "x"
    assert resolve(tmp_path) == tmp_path.resolve()
    assert resolve("~") == Path.home().resolve()


def test_whoever_is_in_a_folder_that_was_deleted_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RunError, match="the folder that one is in was deleted"):
        here("run")


def test_writing_makes_folders_and_leaves_nothing_else(tmp_path):
    path = write_text(tmp_path / "a" / "b.txt", "ä")
    assert path.read_text(encoding="utf-8") == "ä"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_the_umask_says_who_may_read_a_file(tmp_path, umask, mode):
    path = write_text(tmp_path / "a.txt", "old")
    before = os.umask(umask)
    try:
        write_text(path, "new")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_link_in_the_place_of_the_neighbour_goes_and_its_target_stays(tmp_path):
    path, mine = tmp_path / "a.txt", tmp_path / "mine.txt"
    mine.write_text("mine")
    runs.partial_of(path).symlink_to(mine)
    write_text(path, "new")
    assert (path.read_text(), mine.read_text(), path.is_symlink()) == ("new", "mine", False)


@pytest.mark.parametrize("name", ["a\rb.png", "a\r\nb.png", "\rb.png", 'a\r"b,c.png', "a\nb.png"])
def test_tables_hold_names_with_ends_of_lines_as_they_are(tmp_path, name):
    table = pd.DataFrame({"file": [name, "c.png"], "score": [0.25, 1e-9], "count": [1, 2], "error": ["", "no\rimage"]})
    path = write_csv(tmp_path / "a.csv", table)
    found = pd.read_csv(path, dtype={"file": str}, na_filter=False)
    assert found.to_dict("list") == table.map(harmless).to_dict("list")
    with open(path, newline="", encoding="utf-8") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [harmless(name), "c.png"]


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    path = write_text(tmp_path / "kept.txt", "old")
    with (
        full_disk(1000),
        pytest.raises(RunError, match=r"cannot write .*kept.txt: File too large. Choose another"),
    ):
        write_bytes(path, bytes(10_000))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, r"No space left on device \(\d+ MB free there\). Free some space or choose another"),
        (errno.EDQUOT, r"Disk quota exceeded \(\d+ MB free there\). Free some space or choose another"),
        (errno.EACCES, "Permission denied. Choose another folder, then start again: what was finished before is kept"),
        (errno.ENAMETOOLONG, "File name too long. Shorten the name"),
    ],
    ids=errno.errorcode.get,
)
def test_a_remedy_fits_the_reason(tmp_path, number, says):
    error = runs.unwritable(tmp_path / "none" / "a.txt", OSError(number, os.strerror(number)))
    assert re.search(f"cannot write .*a.txt: {says}", str(error))
    assert isinstance(error, runs.BadNameError) == (number == errno.ENAMETOOLONG)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_write_that_fails_only_at_the_end_leaves_the_old_file(tmp_path, monkeypatch, failure):
    def fail(_):
        raise failure

    path = write_text(tmp_path / "kept.txt", "old")
    monkeypatch.setattr(runs.files.os, "fsync", fail)
    with pytest.raises(RunError if isinstance(failure, OSError) else KeyboardInterrupt) as error:
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert not isinstance(failure, OSError) or "No space left" in str(error.value)


def test_json_without_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_run_is_done_with_its_metrics(tmp_path):
    run = Run(tmp_path / "run")
    assert not run.done
    with pytest.raises(RunError, match=r"no metrics.json.*Evaluate"):
        _ = run.metrics
    run.finish({"image_auroc": 0.9, "au_pro": None})
    assert run.done
    assert run.metrics == {"image_auroc": 0.9, "au_pro": None}


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"size": 64}, "size = 64, which takes the name of a network. Give that value another name"),
        ({"pixel_auroc": 97.5}, "pixel_auroc = 97.5, which takes a share"),
        ({"loss": math.inf}, "loss = inf, which takes a number, or null"),
    ],
)
def test_names_of_metrics_mean_one_thing(tmp_path, metrics, says):
    run = Run(tmp_path)
    with pytest.raises(RunError, match=re.escape(says)):
        run.finish(metrics)
    assert not run.done
    run.finish({"side": 64, "sum": [1, {"a": "b"}], "loss": None})
    assert run.metrics["side"] == 64


def test_a_run_is_continued_with_its_own_settings_only(tmp_path):
    run = Run(tmp_path)
    run.start(Example())
    run.start(Example())
    before = (tmp_path / "parameters.yaml").read_text()
    with pytest.raises(RunError, match="steps: 10 there, 20 now"):
        run.start(Example(steps=20))
    with pytest.raises(RunError, match="device"):
        run.start(Example(device="cuda"))
    assert (tmp_path / "parameters.yaml").read_text() == before
    run.start(Movable(device="cpu"))
    run.start(Movable(device="cuda"))


def test_a_run_is_continued_from_its_own_sources_only(tmp_path):
    run = Run(tmp_path)
    run.start(Example(), {"teacher": "a" * 64})
    run.start(Example(), {"teacher": "a" * 64})
    with pytest.raises(RunError, match="teacher: aaaaaaaaaaaa there, bbbbbbbbbbbb now"):
        run.start(Example(), {"teacher": "b" * 64})
    assert run.sources == {"teacher": "a" * 64}
    (tmp_path / "sources.json").unlink()
    with pytest.raises(RunError, match="teacher: unknown there"):
        run.start(Example(), {"teacher": "a" * 64})


def test_a_run_that_was_stopped_between_its_first_files_is_begun_again(tmp_path, monkeypatch):
    run, write = Run(tmp_path), runs.write_bytes
    for count in (0, 1):
        left = iter([None] * count)
        monkeypatch.setattr(runs.files, "write_bytes", lambda *args, left=left: (next(left), write(*args))[1])
        with pytest.raises(StopIteration):
            run.start(Example(), {"teacher": "a" * 64})
    monkeypatch.undo()
    run.start(Example(), {"teacher": "a" * 64})
    assert run.parameters == Example().as_dict() and run.sources == {"teacher": "a" * 64}


def test_what_a_killed_process_left_half_written_goes_after_an_hour(tmp_path):
    run = Run(tmp_path)
    old, young = tmp_path / "checkpoints" / ".last.pt.1.partial", tmp_path / ".history.csv.2.partial"
    old.parent.mkdir()
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    run.start(Example())
    assert young.is_file() and not old.exists()


def test_a_parameter_that_did_not_exist_then_is_another_setting(tmp_path):
    (tmp_path / "parameters.yaml").write_text("steps: 10\n")
    with pytest.raises(RunError, match="device: None there, 'cpu' now"):
        Run(tmp_path).start(Example())


def test_checkpoints_come_back_as_they_were(tmp_path):
    run = Run(tmp_path)
    assert run.load_checkpoint() is None
    state = {"step": 3, "weights": torch.rand(4), "kept": [(0.5, 3)], "generator": torch.Generator().get_state()}
    run.save_checkpoint("last", state)
    back = run.load_checkpoint("last")
    assert back["step"] == 3 and back["kept"] == [(0.5, 3)]
    assert torch.equal(back["weights"], state["weights"]) and torch.equal(back["generator"], state["generator"])


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, full_disk):
    run = Run(tmp_path)
    run.save_checkpoint("last", {"step": 1})
    with full_disk(10_000), pytest.raises(RunError, match=r"cannot write .*last.pt"):
        run.save_checkpoint("last", {"step": 2, "weights": torch.zeros(10_000)})
    assert run.load_checkpoint("last") == {"step": 1}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.pt"]


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_checkpoint_executes_nothing(tmp_path, save):
    run = Run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    path, trace = tmp_path / "checkpoints" / "last.pt", tmp_path / "executed"
    save({"step": Malicious(trace)}, path)
    with pytest.raises(RunError, match=r"last.pt cannot be read.*Delete it"):
        run.load_checkpoint("last")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"last.pt cannot be read"):
        Run(tmp_path).load_checkpoint("last")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_request_to_stop_waits_for_the_end_of_the_step(number):
    before = signal.getsignal(number)
    with finish_step_on_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted()
    assert signal.getsignal(number) is before
