"""Settings that reject what they do not know: frozen, checked dataclasses whose fields are papermill parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import platform
import re
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from effad_lib.documents import MOST_BITS, is_text, short

if TYPE_CHECKING:
    import torch

NOTEBOOK_NAMES = frozenset({"In", "Out", "exit", "quit", "open", "get_ipython"})

PRECISIONS = ("float32", "bfloat16", "float16")
"""Names of torch's types in which networks may be trained."""


SEEDS = range(2**63)
"""Seeds that every generator of random numbers takes."""


MOST_THREADS = 1024
"""Threads of the CPU that may be asked for; the runtimes start as many, whatever there is."""


class SettingsError(ValueError):
    """A setting with an unknown name, a wrong type or an impossible value."""


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return the half sentence of an error that lists the known names and the one that was probably meant."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"known are {', '.join(known)}.{hint}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all settings: frozen, typed, checked; field names are the papermill parameter names.

    A field is annotated `int`, `float`, `str`, `bool`, `list[...]` or `tuple[...]`; an int is accepted where a float is
    asked for, a list where a tuple is. Subclasses check values in `check`. Raises `SettingsError`.
    """

    MAY_CHANGE: typing.ClassVar[frozenset[str]] = frozenset()
    """Names of fields that do not change a run's result: a run may be continued with others."""

    RECIPES: typing.ClassVar[typing.Mapping[str, typing.Mapping[str, Any]]] = types.MappingProxyType({"paper": {}})
    """Values to start from, by name; "paper" are the defaults."""

    BEFORE: typing.ClassVar[typing.Mapping[str, Any]] = types.MappingProxyType({})
    """Of fields that were added later, the value that runs from before were made with, unasked."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _checked(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        self.require(getattr(self, "run_folder", ".") != "", "run_folder", "the name of a folder")
        self.check()

    def check(self) -> None:
        """Raise `SettingsError` for values that no run could use; called when the settings are made."""

    @classmethod
    def from_mapping(cls, values: typing.Mapping[str, Any]) -> Self:
        """Make settings from a mapping of names to values; an unknown name is an error that lists the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise SettingsError(f"unknown parameter {name!r}: {nearest(name, known)}")
        return cls(**values)

    @classmethod
    def recipe(cls, name: str) -> dict[str, Any]:
        """Return the values of a recipe by its name. Raises `SettingsError` that lists the known ones."""
        if name not in cls.RECIPES:
            raise SettingsError(f"unknown recipe {name!r}: {nearest(name, cls.RECIPES)}")
        return dict(cls.RECIPES[name])

    @classmethod
    def from_notebook(cls, names: typing.Mapping[str, Any]) -> Self:
        """Make settings from a notebook's `globals()`, called in the cell after `parameters`, before any other plain
        variable is set: so a name that papermill injected and that no setting has is caught too (papermill only warns).
        """
        plain = (bool, int, float, str, list, tuple, dict, types.NoneType)
        values = {
            name: value
            for name, value in names.items()
            if not name.startswith("_") and name not in NOTEBOOK_NAMES and isinstance(value, plain)
        }
        return cls.from_mapping(values)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain types that YAML and JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    def as_options(self, *, leave_out: typing.Container[str] = ()) -> str:
        """Return the command-line options that differ from the defaults, as `effad` takes them."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            default = list(field.default) if isinstance(field.default, (list, tuple)) else [field.default]
            if field.name in leave_out or values == default:
                continue
            name = field.name.replace("_", "-")
            words += (
                [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", *map(str, values)]
            )
        return " ".join(words)

    def require(self, condition: bool, name: str, takes: str) -> None:
        """Raise a `SettingsError` that names the field, what it got and what it takes, unless `condition` holds."""
        if not condition:
            raise SettingsError(f"{name} = {getattr(self, name)!r}: {name} takes {takes}.")


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type or raise; text is never turned into a number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{name} = {short(value)}: {name} takes a list of {inner[0].__name__}.")
        return origin(_checked(name, item, inner[0]) for item in value)
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise SettingsError(f"{name} = {short(value)}: {name} takes no whole number of more than {MOST_BITS} bits.")
    if isinstance(value, str) and not is_text(value):
        raise SettingsError(f"{name} = {short(value)}: {name} takes text that UTF-8 can encode.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{name} = {value}: {name} takes a finite number.")
    if type(value) is hint:
        return value
    remedy = ""
    if isinstance(value, str) and hint in (int, float):
        with contextlib.suppress(ValueError):
            float(value)
            remedy = " YAML reads 1e-4 as text: write 1.0e-4." if "e" in value.lower() else " Remove the quotes."
    raise SettingsError(f"{name} = {short(value)}: {name} takes {hint.__name__}, not {type(value).__name__}.{remedy}")


def pick_device(name: str = "auto") -> torch.device:
    """Return the device for `name`: "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises `SettingsError` if the named device is not there.
    """
    import torch  # which settings alone, and an exported model, do without

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if there[device])
    kind, _, number = name.partition(":")
    last = torch.cuda.device_count() if kind == "cuda" else 1
    if there.get(kind, False) and (not number or number in map(str, range(last))):
        if kind == "cuda":  # float32 means float32: torch's own default cuts it to ten bits in convolutions
            torch.backends.cudnn.allow_tf32 = False
        return torch.device(name)
    here = ", ".join(device for device, is_there in there.items() if is_there)
    raise SettingsError(f"device = {name!r}: not available here. Use 'auto' or one of: {here}.")


def cores() -> int:
    """Return how many cores of the CPU this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return what Linux calls the processor; elsewhere, and where it has no name for it, its architecture."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = ""
    name = re.search(r"^model name\s*: *(\S.*)$", told, re.MULTILINE)
    return " ".join(name[1].split()) if name else platform.machine()


def check_threads(threads: int) -> None:
    """Raise `SettingsError` for a number of threads that cannot be."""
    if not 0 <= threads <= MOST_THREADS:
        raise SettingsError(f"threads = {threads}: threads takes a number up to {MOST_THREADS}, or 0 for the default.")


def device_name(device: torch.device) -> str:
    """Return what a device is called, such as "CPU (AMD EPYC), 2 threads" or the name of a graphics card."""
    import torch

    if device.type == "cpu":
        return f"CPU ({processor()}), {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
