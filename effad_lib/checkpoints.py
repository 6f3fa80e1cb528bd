"""What a checkpoint holds is taken over only if it is what a training or distillation of these settings could hold."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effad_lib.documents import Takes, fault, is_number, is_whole, short
from effad_lib.runs import Run, RunError
from effad_lib.tensors import leaves

LEARNED = {"Adam": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("average",)}
"""What an optimiser keeps of each weight: the number of its steps, and means of the weight's shape."""

FREE = frozenset({"lr", "fused", "foreach"})
"""Plain values of an optimiser that may differ: the rate, which each step sets anew, and how a device computes."""


@contextlib.contextmanager
def readable(run: Run, state: Any) -> Iterator[None]:
    """Turn what fails while a checkpoint's state is taken over into a `RunError`: it is of another version, or altered.

    A state with NaN or infinite values is refused too: before each save a training stops if its state is `broken`.
    """
    try:
        if not (wrong := "holds NaN or infinite values" if broken(state) else ""):
            yield
    except RunError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        wrong = f"is not of this version or was altered ({reason})"
    if wrong:
        raise RunError(f"{run.folder}: its checkpoint {wrong}. Delete the run's checkpoints to start it anew.")


def not_finite(run: Run, what: str, where: str, lower: str) -> RunError:
    """Return what to say of a training or distillation that stops since something of it is not finite.

    lower: the settings that had better be lower.
    """
    saved = (run.folder / "checkpoints" / "last.pt").is_file()
    kept = "The last checkpoint is from before" if saved else "No checkpoint was saved before"
    return RunError(
        f"{run.folder}: {what} is not finite {where}. {kept}; lower {lower}, or use precision "
        f"float32, in a new run folder."
    )


def check_plain(state: dict[str, Any], takes: Takes) -> None:
    """Raise `ValueError` that names the first plain value of a checkpoint's state that is missing or unsound."""
    if wrong := fault(state, takes, needed=takes):
        raise ValueError(f"it {wrong}")


def broken(value: Any) -> bool:
    """Whether a tensor or a number anywhere in a state is not finite: such a state is neither saved nor continued."""
    return any(
        not math.isfinite(leaf) if isinstance(leaf, float) else isinstance(leaf, Tensor) and not leaf.isfinite().all()
        for leaf in leaves(value)
    )


def restore_optimiser(optimiser: torch.optim.Optimizer, kept: dict[str, Any], steps: int, *, skips: bool) -> None:
    """Take over what an optimiser has learned in so many steps; its plain values stay those of the settings.

    kept: its state in a checkpoint; skips: whether some of the steps may have been left out, as float16 does. Raises
    `ValueError` for plain values other than those of the settings, and for what cannot have been learned of these
    weights.
    """
    own = optimiser.state_dict()["param_groups"]
    for number, (group, theirs) in enumerate(zip(own, kept["param_groups"], strict=True)):
        plain = {name: value for name, value in group.items() if name not in FREE}
        if wrong := fault(theirs, _same(plain)):
            raise ValueError(f"group {number} of its optimiser {wrong}")

    def is_count(value: Any) -> bool:
        return _is_like(torch.zeros(()), value) and (skips or value == steps) and 0 <= value <= steps

    learned = kept["state"]
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    for number, weight in enumerate(weights if learned or not skips else ()):
        takes = dict.fromkeys(LEARNED[type(optimiser).__name__], like(weight))
        if "step" in takes:
            takes["step"] = (is_count, f"the {steps} steps that were taken")
        if wrong := fault(learned[number], takes, needed=takes):
            raise ValueError(f"of weight {number} its optimiser {wrong}")
    optimiser.load_state_dict({"state": learned, "param_groups": own})


def restore_scaler(scaler: torch.amp.GradScaler, kept: dict[str, Any]) -> None:
    """Take over the factor that keeps float16 gradients in range; a scaler of another precision stays as it is.

    Raises `ValueError` for plain values that such a scaler cannot have.
    """
    if not (own := scaler.state_dict()) or not kept:
        return
    takes = _same(own) | {
        "scale": (lambda value: is_number(value) and value > 0, "a number above 0"),
        "_growth_tracker": (partial(is_whole, most=own["growth_interval"]), "a whole number of steps"),
    }
    if wrong := fault(kept, takes, needed=takes):
        raise ValueError(f"its scaler {wrong}")
    scaler.load_state_dict(kept)


def like(weight: Tensor) -> tuple[Callable[[Any], bool], str]:
    """That a value takes the place of a tensor: numbers of its shape, which nothing would stretch."""
    return partial(_is_like, weight), f"numbers of shape {tuple(weight.shape)}"


def _same(values: dict[str, Any]) -> Takes:
    """That each value is the one it is here."""
    return {name: (partial(_is_same, value), short(value)) for name, value in values.items()}


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def _is_like(weight: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point()
