"""What a run was made with: read from the checkout, the machine and the data themselves."""

import shutil
import subprocess

import pytest
import torch

from effad_lib import __version__
from effad_lib.datasets import load_dataset
from effad_lib.provenance import git_changed, git_commit, note_provenance, provenance_of
from effad_lib.runs import PROJECT


@pytest.fixture
def checkout(tmp_path):
    """A git checkout of one commit, and a function that calls git in it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*arguments, folder=tmp_path / "checkout"):
        command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "checkout").mkdir()
    git("init", "-q")
    (tmp_path / "checkout" / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    return tmp_path / "checkout", git


def test_the_commit_is_read_without_git_wherever_it_is_written(checkout, tmp_path, monkeypatch):
    folder, git = checkout
    commit = git("rev-parse", "HEAD")
    git("worktree", "add", "-qb", "other/branch", str(tmp_path / "second"))
    monkeypatch.setattr(subprocess, "run", None)
    assert git_commit(folder) == git_commit(tmp_path / "second") == commit
    monkeypatch.undo()
    git("pack-refs", "--all")
    assert git_commit(folder) == git_commit(tmp_path / "second") == commit
    git("checkout", "-q", "--detach")
    assert git_commit(folder) == commit
    assert git_commit(tmp_path) is None


def test_changes_to_tracked_files_are_told(checkout, tmp_path, monkeypatch):
    folder, _ = checkout
    (folder / "untracked").touch()
    assert git_changed(folder) is False
    (folder / "file").write_text("2")
    assert git_changed(folder) is True
    assert git_changed(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_changed(folder) is None


def test_a_run_that_is_resumed_with_something_else_says_so(tmp_path):
    device = torch.device("cpu")
    assert provenance_of(tmp_path) == []
    for data in ("one", "one", "two"):
        note_provenance(tmp_path, device, seed=3, data=data, teacher="abc")
    first, second = provenance_of(tmp_path)
    assert (first["data"], second["data"]) == ("one", "two")
    assert first["effad"] == __version__ and first["torch"] == torch.__version__ and "CPU" in first["device"]
    assert (first["seed"], first["teacher"], first["commit"]) == (3, "abc", git_commit(PROJECT))


def test_the_fingerprint_of_data_is_that_of_their_content(tmp_path, picture):
    def split(name, last=19, share=0.25):
        for index in range(20):
            picture(tmp_path / name / "train" / "good" / f"{index}.png", seed=last if index == 19 else index)
        picture(tmp_path / name / "test" / "good" / "0.png", seed=60)
        return load_dataset("folder", root=tmp_path / name, validation_share=share)

    first = split("first")
    assert len(first.fingerprint) == 64
    assert split("second").fingerprint == first.fingerprint, "it does not matter where they are"
    assert split("second", last=99).fingerprint != first.fingerprint
    assert split("second", share=0.4).fingerprint != first.fingerprint, "another split"
    first.test[0].image.unlink()
    assert len({first.fingerprint, split("second").fingerprint}) == 2
