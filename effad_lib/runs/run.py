"""One run: its settings, sources, checkpoints and metrics in a folder, and how it goes on."""

from __future__ import annotations

import contextlib
import io
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from effad_lib.documents import (
    DocumentError,
    Takes,
    are_numbers,
    fault,
    is_number,
    is_seconds,
    is_share,
    is_text,
    is_whole,
    read_json,
    read_yaml,
)
from effad_lib.runs.files import RunError, check_links, remove_forsaken, resolve, write_bytes, write_json, write_text
from effad_lib.tensors import read_torch

if TYPE_CHECKING:
    from effad_lib.settings import Settings

SHARES = (
    "image_auroc image_auroc_logical image_auroc_structural image_auroc_mean image_auroc_unnormalised image_ap "
    "image_f1_max pixel_auroc pixel_ap pixel_f1_max au_pro au_pro_05 au_spro_05 au_spro_05_logical "
    "au_spro_05_structural au_spro_05_mean"
).split()

METRICS: Takes = {
    "data": (is_text, "a name"),
    "size": (is_text, "the name of a network"),
    **dict.fromkeys(SHARES, (is_share, "a share from 0 to 1, or null")),
    "latency_ms": (is_number, "a number"),
    "latency_on": (is_text, "the name of a device"),
    "seconds": (lambda value: value is None or is_seconds(value), "seconds, or null"),
    "steps": (lambda value: value is None or is_whole(value), "a whole number, or null"),
    **dict.fromkeys(("loss", "held_out_loss"), (lambda value: value is None or is_number(value), "a number, or null")),
    **dict.fromkeys(
        ("losses", "explained_variance"), (lambda value: is_number(value) or are_numbers(value), "numbers")
    ),
}
"""What values of `metrics.json` take, in evaluations and distillations; a notebook of one's own may add others."""


class Run:
    """A run folder: `parameters.yaml`, `sources.json`, `provenance.json`, `model.safetensors`, `checkpoints/`, `maps/`,
    `figures/`, `tensorboard/` and `metrics.json`, which is written last: a run that has it is done, any other can be
    resumed. Its lock is the hidden `.lock`, see `execution.alone_in`.

    Raises `RunError` as `check_links`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = resolve(folder)
        check_links(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {'done' if self.done else 'open'})"

    @property
    def done(self) -> bool:
        """Whether the run has its `metrics.json`."""
        return (self.folder / "metrics.json").is_file()

    @property
    def model(self) -> Path:
        """The trained detector with its card."""
        return self.folder / "model.safetensors"

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`. Raises `RunError` if the run is not done, `DocumentError` if it is broken or a
        value of it is not what it takes in `METRICS`.
        """
        if not self.done:
            raise RunError(f"{self.folder} has no metrics.json: the run is not finished. Evaluate it first.")
        return read_json(self.folder / "metrics.json", takes=METRICS)

    @property
    def parameters(self) -> dict[str, Any]:
        """The content of `parameters.yaml`. Raises `DocumentError` if that is not there or is broken."""
        path = self.folder / "parameters.yaml"
        content = read_yaml(path)
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise DocumentError(f"{path} takes names, each with its value. Restore it or delete the run.")
        return content

    @property
    def sources(self) -> dict[str, str]:
        """Hashes by name of the files that the run is made from, such as its teacher; {} if none are known.

        Raises `DocumentError` if the file is broken.
        """
        path = self.folder / "sources.json"
        found = read_json(path) if path.is_file() else {}
        if not all(map(is_text, found.values())):
            raise DocumentError(f"{path} takes names, each with a hash. Restore or delete it.")
        return found

    def check(self, settings: Settings, sources: dict[str, str] | None = None) -> None:
        """Raise `RunError` naming each difference if the folder holds a run of other settings or from other `sources`.

        Fields in the settings' `MAY_CHANGE`, which do not change the result, may differ. `sources` are hashes by name
        of the files that a run is made from; None leaves them unchecked.
        """
        path = self.folder / "parameters.yaml"
        if not path.is_file():
            if self.model.is_file():
                raise RunError(
                    f"{self.folder} holds a {self.model.name} and no {path.name}, which would tell how it was trained. "
                    f"Choose another run folder."
                )
            return
        new = settings.as_dict()
        old = dict(settings.BEFORE) | self.parameters
        changed = {n for n in new.keys() | old.keys() if old.get(n) != new.get(n)} - settings.MAY_CHANGE
        what = [f"{n}: {old.get(n)!r} there, {new.get(n)!r} now" for n in sorted(changed)]
        for name, digest in (sources or {}).items():
            if (made := self.sources.get(name, "unknown")) != digest:
                what.append(f"{name}: {made[:12]} there, {digest[:12]} now")
        if what:
            raise RunError(
                f"{self.folder} holds a run with other settings ({'; '.join(what)}). Choose another run folder, or "
                f"delete it."
            )

    def start(self, settings: Settings, sources: dict[str, str] | None = None) -> None:
        """`check` the folder, then write `sources.json` and `parameters.yaml`: a resumed run never mixes settings.

        The settings come last: only with them does a folder count as that of a run. What a killed process left half
        made in it is removed.
        """
        self.check(settings, sources)
        for folder in (self.folder, self.folder / "checkpoints"):
            remove_forsaken(folder)
        write_json(self.folder / "sources.json", sources or {})
        write_text(self.folder / "parameters.yaml", yaml.safe_dump(settings.as_dict(), sort_keys=False))

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> Path:
        """Save `state` (tensors and plain types only) as `checkpoints/<name>.pt`, whole or not at all."""
        import torch  # what only reads and writes files starts without it

        buffer = io.BytesIO()
        torch.save(state, buffer)
        return write_bytes(self.folder / "checkpoints" / f"{name}.pt", buffer.getbuffer())

    def load_checkpoint(self, name: str = "last") -> dict[str, Any] | None:
        """Return the checkpoint `name`, or None if there is none; nothing is unpickled (`weights_only=True`)."""
        path = self.folder / "checkpoints" / f"{name}.pt"
        if not path.is_file():
            return None
        remedy = "Delete it to start this run anew."
        try:
            state = read_torch(path)
        except ValueError as error:
            raise RunError(f"{path} cannot be read as a checkpoint ({error}). {remedy}") from error
        if not isinstance(state, dict):
            raise RunError(f"{path} cannot be read as a checkpoint, it holds {type(state).__name__}. {remedy}")
        return state

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write `metrics.json`: from now on the run counts as done.

        Raises `RunError` for a value that is not what its name takes in `METRICS`; other names are free.
        """
        if wrong := fault(metrics, METRICS):
            raise RunError(f"metrics.json of {self.folder} {wrong}. Give that value another name.")
        write_json(self.folder / "metrics.json", metrics)


@contextlib.contextmanager
def finish_step_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Let a loop end its step and save before Ctrl-C or SIGTERM takes effect: yields whether one of them has come.

    The loop saves and raises `KeyboardInterrupt` itself, for both: the exit code is 130. Outside the main thread
    signals cannot be caught and act as usual.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
