"""What a run was made with: commit, versions, device, seed, data and teacher, in the run's `provenance.json`."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from effad_lib import __version__
from effad_lib.documents import DocumentError, read_json
from effad_lib.runs import PROJECT, resolve, write_json
from effad_lib.settings import device_name

NAME = "provenance.json"


def note_provenance(folder: str | Path, device: torch.device, *, seed: int, data: str, **hashes: str) -> None:
    """Write down with what a run is made, before it is; a run resumed with something else gets a further entry.

    data: the fingerprint of the data set; hashes: by name, of what else it is made from, such as its teacher. Each
    entry has `commit` (None outside a git checkout), `changed` (whether tracked files differ from it; None if git is
    not installed), the versions `effad`, `python` and `torch`, and `device`, `seed`, `data` and the hashes.
    """
    commit = git_commit(PROJECT)
    entry = {
        "commit": commit,
        "changed": git_changed(PROJECT) if commit else None,
        "effad": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "seed": seed,
        "data": data,
        **hashes,
    }
    made = provenance_of(folder)
    if made[-1:] != [entry]:
        write_json(resolve(folder) / NAME, [*made, entry])


def provenance_of(folder: str | Path) -> list[dict[str, Any]]:
    """Return the entries of a run, an empty list if it has none. Raises `DocumentError` for a broken file."""
    path = resolve(folder) / NAME
    made = read_json(path, list) if path.is_file() else []
    if not all(isinstance(entry, dict) for entry in made):
        raise DocumentError(f"{path} holds what is no entry of a run. Restore or delete it.")
    return made


def git_commit(folder: Path) -> str | None:
    """Return the commit that is checked out in a folder, None if it is no checkout; git need not be installed."""
    place = folder / ".git"
    try:
        if place.is_file():  # a further worktree names the folder of its own
            place = folder / place.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (place / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else None
        name, shared = head.removeprefix("ref: "), place / "commondir"
        common = place / shared.read_text(encoding="utf-8").strip() if shared.is_file() else place
        for candidate in (place / name, common / name):
            if candidate.is_file():
                return candidate.read_text(encoding="utf-8").strip()
        packed = (common / "packed-refs").read_text(encoding="utf-8")
        found = re.search(rf"^([0-9a-f]{{40,64}}) {re.escape(name)}$", packed, re.MULTILINE)
        return found[1] if found else None
    except OSError:
        return None


def git_changed(folder: Path) -> bool | None:
    """Return whether tracked files differ from the commit; None if git cannot tell."""
    command = ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return bool(answer.stdout.strip())
