"""The run folder: files whole or not at all, no mixed settings, nothing unpickled."""

import errno
import os
import pickle
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from effad_lib import runs
from effad_lib.runs import PROJECT, Run, RunError, finish_step_on_interrupt, resolve, write_json, write_text, write_with
from effad_lib.settings import Settings


@dataclass(frozen=True)
class Example(Settings):
    steps: int = 10
    device: str = "cpu"


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_relative_paths_are_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/x") == PROJECT / "runs" / "x"
    assert resolve(tmp_path) == tmp_path.resolve()
    assert resolve("~") == Path.home().resolve()


def test_writing_makes_folders_and_leaves_nothing_else(tmp_path):
    path = write_text(tmp_path / "a" / "b.txt", "ä")
    assert path.read_text(encoding="utf-8") == "ä"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure", [full_disk, KeyboardInterrupt], ids=["full disk", "Ctrl-C"])
def test_a_failed_write_leaves_the_old_file(tmp_path, failure):
    path = write_text(tmp_path / "kept.txt", "old")

    def write(partial):
        partial.write_text("half of the ne")
        full_disk() if failure is full_disk else (_ for _ in ()).throw(failure())

    with pytest.raises(RunError if failure is full_disk else KeyboardInterrupt) as error:
        write_with(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    if failure is full_disk:
        assert "kept.txt" in str(error.value) and "No space left" in str(error.value) and "MB free" in str(error.value)


def test_a_disk_that_is_full_only_at_the_end_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_text(tmp_path / "kept.txt", "old")
    monkeypatch.setattr(runs.os, "fsync", full_disk)
    with pytest.raises(RunError, match="No space left"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


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
    run.start(Example(device="cuda"), may_change=("device",))


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


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save_checkpoint("last", {"step": 1})

    def half(_, partial):
        partial.write_bytes(b"half")
        full_disk()

    monkeypatch.setattr(runs.torch, "save", half)
    with pytest.raises(RunError, match=r"cannot write .*last.pt"):
        run.save_checkpoint("last", {"step": 2})
    monkeypatch.undo()
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


def test_ctrl_c_waits_for_the_end_of_the_step():
    before = signal.getsignal(signal.SIGINT)
    with finish_step_on_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is before
