"""Settings: what papermill lets through must be caught here."""

import platform
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

from effad_lib import settings
from effad_lib.settings import Settings, SettingsError, nearest, pick_device


@dataclass(frozen=True)
class Example(Settings):
    steps: int = 10
    learning_rate: float = 1e-4
    image_size: list[int] = (64, 64)
    padding: bool = False
    teacher: str = ""

    def check(self) -> None:
        self.require(self.steps > 0, "steps", "a positive number")


def notebook(**injected):
    """The globals of a kernel after the parameters cell: what IPython puts there, and what papermill injected."""
    modules = {"In": ["", "x"], "Out": {}, "_": "", "_i1": "steps = 3", "__name__": "__main__", "exit": object()}
    return {**modules, "torch": pytest, "Example": Example, "quit": object(), **injected}


def test_defaults_are_checked_and_frozen():
    example = Example()
    assert example.as_dict() == {
        "steps": 10,
        "learning_rate": 1e-4,
        "image_size": [64, 64],
        "padding": False,
        "teacher": "",
    }
    with pytest.raises(FrozenInstanceError):
        example.steps = 3


def test_a_notebook_gives_what_its_parameters_cells_set():
    example = Example.from_notebook(notebook(steps=3, image_size=[96, 128]))
    assert (example.steps, example.image_size, example.learning_rate) == (3, [96, 128], 1e-4)


def test_a_notebook_with_an_unknown_parameter_names_it_and_the_nearest():
    with pytest.raises(SettingsError, match=r"'learing_rate'.*known are .*steps.*Did you mean 'learning_rate'"):
        Example.from_notebook(notebook(learing_rate=0.1))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", "3", "takes int, not str. Remove the quotes"),
        ("steps", "many", "takes int, not str.$"),
        ("steps", 3.0, "takes int, not float"),
        ("steps", True, "takes int, not bool"),
        ("steps", None, "takes int, not NoneType"),
        ("learning_rate", "1e-4", "write 1.0e-4"),
        ("learning_rate", float("nan"), "takes a finite number"),
        ("learning_rate", True, "takes float, not bool"),
        ("image_size", 64, "takes a list of int"),
        ("image_size", "64", "takes a list of int"),
        ("image_size", [64, "64"], "takes int, not str"),
        ("padding", 1, "takes bool, not int"),
        ("teacher", None, "takes str"),
        ("steps", 0, "steps = 0: steps takes a positive number"),
    ],
)
def test_a_wrong_type_or_value_is_named(name, value, says):
    with pytest.raises(SettingsError, match=says) as error:
        Example.from_notebook(notebook(**{name: value}))
    assert str(error.value).startswith(name)


def test_an_int_is_a_float_and_a_tuple_a_list():
    example = Example(learning_rate=1, image_size=(64, 64))
    assert isinstance(example.learning_rate, float)
    assert example.image_size == [64, 64]


def test_nearest_says_nothing_when_nothing_is_near():
    assert nearest("zzz", ["steps", "seed"]) == "known are seed, steps."


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpuu", ""])
def test_a_device_that_is_not_here(name):
    with pytest.raises(SettingsError, match=r"not available here.*cpu"):
        pick_device(name)


def test_auto_takes_a_device_that_works():
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    assert pick_device("cpu").type == "cpu"


def test_on_graphics_cards_float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    pick_device("cpu")
    assert torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda").type == "cuda"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    "told, name",
    [
        ("processor\t: 0\nmodel name\t: Some  Chip @ 2 GHz \nflags\t: fpu\n", "Some Chip @ 2 GHz"),
        ("model name\t: \nflags\t: fpu\n", platform.machine()),
        ("Features\t: neon\n", platform.machine()),  # as ARM's say
        (None, platform.machine()),
    ],
)
def test_the_processor_has_a_name(told, name, monkeypatch):
    def read(path):
        if told is None:
            raise FileNotFoundError(path)
        return told

    monkeypatch.setattr(settings.Path, "read_text", read)
    assert settings.processor() == name
    assert settings.device_name(torch.device("cpu")).startswith(f"CPU ({name}), ")
