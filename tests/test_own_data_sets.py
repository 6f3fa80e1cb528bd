"""Data sets of one's own: how they get a name, a file, a check."""

import re
from pathlib import Path

import pytest
from PIL import Image

from effad_lib import datasets, runs
from effad_lib.datasets import DatasetError, Sample, Split, dataset_names, load_dataset, register, verify


@pytest.fixture
def registry():
    """Leave the known data sets as they were."""
    before = dict(datasets.LOADERS)
    yield
    datasets.LOADERS.clear()
    datasets.LOADERS.update(before)


def test_known_names_and_the_nearest():
    assert {"mvtec_ad", "folder", "elpv", "synthetic"} <= set(dataset_names())
    with pytest.raises(DatasetError, match=r"folder.*mvtec_ad.*Did you mean 'mvtec_ad'"):
        load_dataset("mvtec-ad")


def samples(prefix, count, label=0):
    return tuple(Sample(Path(f"{prefix}{n}.png"), None, label, "good") for n in range(count))


def test_own_data_set(registry, tmp_path):
    calls = []

    @register("mine")
    def mine(root, category, seed, validation_share):
        calls.append((root, category, seed, validation_share))
        return Split("mine", samples("a", 10), samples("b", 1), ())

    assert load_dataset("mine", root=tmp_path, category="x", seed=3, validation_share=0.5).name == "mine"
    load_dataset("mine")
    load_dataset("mine", root=None)
    assert calls == [(tmp_path.resolve(), "x", 3, 0.5), *[(None, "", 0, 0.1)] * 2]
    assert "mine" in dataset_names()


OWN = """
from effad_lib.datasets import Sample, Split, hold_out, register

@register("cups")
def cups(root, category, seed, validation_share):
    good = [Sample(root / f"{n}.png", None, 0, "good") for n in range(20)]
    return Split("cups", *hold_out(good, seed, validation_share), ())
"""


def test_own_data_set_in_a_file(registry, tmp_path, monkeypatch):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    split = load_dataset(f"{file}:cups", root=tmp_path)
    assert split.name == "cups" and (len(split.train), len(split.validation)) == (17, 3)
    file.write_text(OWN.replace("range(20)", "range(30)"))  # edited, and read again
    assert len(load_dataset(f"{file}:cups", root=tmp_path).train) == 27
    assert "cups" in dataset_names()
    file.write_text(OWN.replace("def cups", "def mugs"))
    assert load_dataset(f"{file}:cups", root=tmp_path).name == "cups"
    with pytest.raises(DatasetError, match=r"no file .*gone\.py"):
        load_dataset(f"{tmp_path}/gone.py:cups")
    with pytest.raises(DatasetError, match=r"own\.py has no 'cubs', it registers cups"):
        load_dataset(f"{file}:cubs")
    file.write_text("1 / 0")
    with pytest.raises(DatasetError, match=r"own\.py stopped with ZeroDivisionError"):
        load_dataset(f"{file}:cups")


def test_the_readmes_example_of_an_own_data_set(registry, tmp_path):
    readme = (runs.PROJECT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(# my_data\.py\n.*?)```", readme, re.DOTALL)
    (tmp_path / "my_data.py").write_text(example)
    for folder in ("ok", "returned"):
        (tmp_path / folder).mkdir()
        for index in range(30):
            Image.new("L", (6, 8), 120).save(tmp_path / folder / f"{index:02d}.png")
    split = load_dataset(f"{tmp_path}/my_data.py:bottles", root=tmp_path)
    assert (len(split.train), len(split.validation)) == (17, 3)
    assert [sample.label for sample in split.test] == [0] * 10 + [1] * 30
    verify(split)


def test_a_taken_name_is_refused_but_a_cell_may_run_again(registry):
    def define(result):
        @register("mine")
        def loader(root, category, seed, validation_share):
            return result

    first, second = (Split(name, samples("a", 10), samples("b", 1), ()) for name in "12")
    define(first)
    define(second)
    assert load_dataset("mine") is second
    with pytest.raises(DatasetError, match=r"'mine' is taken by .*loader"):
        register("mine")(lambda *_: first)
    with pytest.raises(DatasetError, match="'folder' is taken by"):
        register("folder")(lambda *_: first)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1, 2], "must return a Split, it returned list"),
        (Split("x", ("a.png",) * 10, (), ()), "'a.png' is not a Sample"),
        (Split("x", samples("a", 10), samples("b", 1), samples("c", 1, label=2)), "label 0 or 1"),
        (Split("x", samples("a", 10, label=1), samples("b", 1), ()), "a0.png is defective"),
        (Split("x", samples("a", 10), samples("b", 1, label=1), ()), "cannot be in validation"),
        (Split("x", samples("a", 10), samples("b", 1), samples("a", 1)), "a0.png is in train and in test"),
        (Split("x", samples("a", 10), samples("b", 1), samples("b", 1)), "in validation and in test"),
        (Split("x", samples("a", 9), samples("b", 1), ()), "9 good images"),
        (Split("x", samples("a", 10), (), ()), "0 held out"),
    ],
)
def test_results_of_own_data_sets_are_checked(registry, result, message):
    register("mine")(lambda *_: result)
    with pytest.raises(DatasetError, match=message):
        load_dataset("mine")
