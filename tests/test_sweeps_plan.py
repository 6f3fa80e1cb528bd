"""Sweeps: a YAML file stands for the runs that one would write down by hand, and a faulty one for none."""

import itertools

import nbformat
import pytest

from effad_lib import batch, sweeps
from effad_lib.datasets import DatasetError
from effad_lib.profiles import NOTEBOOKS, ProfileError
from effad_lib.runs import RunError, write_json
from effad_lib.settings import SettingsError
from effad_lib.sweeps import SweepSettings, load_sweep
from effad_lib.sweeps.plan import MOST_RUNS, find_data
from effad_lib.training import TrainingSettings

FIRST = """run_folder = "runs/one"
category = "gasket"
rate = 1e-3
sizes = [64, 64]
seed = 0
text = ""
flag = False
"""
SECOND = """run_folder = "runs/one"
least = 0.5
text = "b"
"""


@pytest.fixture
def written(tmp_path):
    """A function that writes a sweep file beside two notebooks and returns its plan."""
    folder = tmp_path / "notebooks"
    (folder / "sweeps").mkdir(parents=True)
    for name, cell in {"one": FIRST, "two": SECOND}.items():
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})],
        )
        nbformat.write(notebook, folder / f"{name}.ipynb")

    def load(text):
        (folder / "sweeps" / "mine.yaml").write_text(text, encoding="utf-8")
        return load_sweep("mine", runs=tmp_path / "runs", notebooks=folder)

    return load


def test_every_combination_is_a_run_that_is_named_by_its_settings(written, tmp_path):
    sweep = written("""
notebooks: [one, two]
parameters: {least: 0.7, text: "{runs}/data and {run}"}
grid: {category: [screw, metal_nut], rate: [1.0e-3, 0.01]}
cases:
  plain:
  wide: {sizes: [64, 128], flag: true}
seeds: [3, 4]
""")
    expected = [
        f"{category}-rate{rate}-{case}-seed{seed}"
        for category, rate, case, seed in itertools.product(
            ["screw", "metal_nut"], [0.001, 0.01], ["plain", "wide"], [3, 4]
        )
    ]
    assert [run.name for run in sweep.runs] == expected
    run = sweep.runs[-1]
    folder = (tmp_path / "runs" / "mine").resolve()
    assert run.varied == {"category": "metal_nut", "rate": 0.01, "case": "wide", "seed": 4}
    first, second = run.steps
    assert first.parameters == {
        "text": f"{folder}/data and {folder}/{run.name}",
        "category": "metal_nut",
        "rate": 0.01,
        "sizes": [64, 128],
        "flag": True,
        "seed": 4,
        "run_folder": f"{folder}/{run.name}",
    }
    # Of all these the second notebook has two.
    assert second.parameters.keys() == {"least", "text", "run_folder"} and second.parameters["least"] == 0.7
    assert first.settings.as_dict()["category"] == "metal_nut" and second.folder == folder / run.name


def test_a_case_wins_over_what_all_share_and_a_sweep_may_be_a_single_run(written):
    sweep = written("{notebooks: [one], parameters: {rate: 0.5}, cases: {a: , b: {rate: 0.25}}}")
    assert [run.steps[0].parameters["rate"] for run in sweep.runs] == [0.5, 0.25]
    (run,) = written("{notebooks: [one]}").runs
    assert run.name == "run" and not run.varied


def test_names_are_those_of_folders_whatever_the_values(written):
    sweep = written(
        "{notebooks: [one], grid: {text: [a/b/photos, '../..', ''], flag: [true, false], sizes: [[64, 96]]}}"
    )
    assert [run.name for run in sweep.runs][::2] == [
        "textphotos-flag-sizes64x96",
        "text..-flag-sizes64x96",
        "text-flag-sizes64x96",
    ]
    assert all(run.folder.parent == sweep.folder for run in sweep.runs)
    assert sweep.runs[1].name == "textphotos-no_flag-sizes64x96"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "takes entries with the names notebooks, parameters"),
        ("- one", "takes entries"),
        ("notebooks: [", "mine.yaml is not YAML"),
        ("{notebooks: one}", "notebooks = 'one': takes a list"),
        ("{notebooks: [one, one]}", "each of them once"),
        ("{notebooks: [oone]}", "unknown notebook 'oone'.*Did you mean 'one'"),
        ("{notebooks: [../one]}", "unknown notebook"),
        ("{notebooks: [[one]]}", "unknown notebook"),
        ("{notebooks: [one], seed: [1]}", "unknown entry 'seed'.*Did you mean 'seeds'"),
        ("{notebooks: [one], parameters: [1]}", "parameters = .*takes names"),
        ("{notebooks: [one], parameters: {3: 1}}", "parameters = .*takes names"),
        ("{notebooks: [one], parameters: {ratte: 1}}", "unknown parameter 'ratte' of one.*Did you mean 'rate'"),
        ("{notebooks: [one], grid: {ratte: [1]}}", "unknown parameter 'ratte'"),
        ("{notebooks: [one], cases: {a: {ratte: 1}}}", "unknown parameter 'ratte'"),
        ("{notebooks: [two], seeds: [1]}", "unknown parameter 'seed' of two"),
        ("{notebooks: [one], parameters: {run_folder: x}}", "unknown parameter 'run_folder'"),
        ("{notebooks: [one], parameters: {rate: 1e-4}}", r"run run: rate = '1e-4'.*write 1\.0e-4"),
        ("{notebooks: [one], grid: {rate: [0.1, 1e-4]}}", r"run rate1e_4: rate = '1e-4'.*write 1\.0e-4"),
        ("{notebooks: [one], grid: {flag: [1]}}", "flag takes bool, not int"),
        ("{notebooks: [one], grid: {category: [1]}}", "category takes str, not int"),
        ("{notebooks: [one], grid: {category: [{a: 1}]}}", "category takes str, not dict"),
        ("{notebooks: [one], grid: {sizes: [64, 96]}}", "sizes takes a list of int"),
        ("{notebooks: [one], grid: {rate: 0.1}}", r"grid: rate = 0.1: takes a list of values, such as \[0.1\]"),
        ("{notebooks: [one], grid: {rate: []}}", r"grid: rate = \[\]: takes a list"),
        ("{notebooks: [one], cases: [a]}", "cases = .*takes names"),
        ("{notebooks: [one], cases: {a: 3}}", "cases: a = 3: takes names of parameters"),
        ("{notebooks: [one], seeds: 3}", "seeds = 3: takes a list of whole numbers"),
        ("{notebooks: [one], seeds: [true]}", "seeds = .*takes a list of whole numbers"),
        ("{notebooks: [one], seeds: [-1]}", "seeds = .*from 0"),
        ("{notebooks: [one], seeds: [1, 1]}", "two runs would be called 'seed1'"),
        ("{notebooks: [one], grid: {text: [a b, a_b]}}", "two runs would be called 'texta_b'"),
        ("{notebooks: [one], parameters: {rate: 0.1}, grid: {rate: [0.1]}}", "rate is in `parameters` and in `grid`"),
        ("{notebooks: [one], cases: {a: {rate: 0.1}}, grid: {rate: [0.1]}}", "rate is in `grid` and in the case 'a'"),
        ("{notebooks: [one], parameters: {seed: 1}, seeds: [1]}", "in `seeds`: leave one"),
        ("{notebooks: [one], cases: {'..': {}}}", "cannot be the name of a folder"),
        ("{notebooks: [one], cases: {" + "尺" * 67 + ": {}}}", "letters, digits, '-', '_' and '.', 200 bytes at most"),
        ("{notebooks: [one], cases: {summary.csv: {}}}", "'summary.csv' cannot be the name of a folder"),
        ("{notebooks: [one], parameters: {rate: 0.1, rate: 0.2}}", "line 1: 'rate' is given twice"),
        (
            f"{{notebooks: [one], seeds: {list(range(50))}, grid: {{rate: {list(range(1, 51))}}}}}",
            "stands for 2,500 runs",
        ),
    ],
)
def test_a_faulty_file_is_refused_and_names_the_fault(written, tmp_path, text, says):
    with pytest.raises(ProfileError, match=says) as error:
        written(text)
    assert str(error.value).count("mine.yaml") == 1
    assert not (tmp_path / "runs").exists()
    assert MOST_RUNS < 2500


def test_a_sweep_is_found_by_its_name_or_by_its_path(written, tmp_path):
    by_name = written("{notebooks: [one], seeds: [1, 2]}")
    folder = tmp_path / "notebooks"
    by_path = load_sweep(str(folder / "sweeps" / "mine.yaml"), runs=tmp_path / "runs", notebooks=folder)
    assert [run.identity for run in by_path.runs] == [run.identity for run in by_name.runs]
    with pytest.raises(ProfileError, match=r"unknown sweep 'mien'.*Did you mean 'mine'.*ends in .yaml"):
        load_sweep("mien", notebooks=folder)
    with pytest.raises(ProfileError, match=r"there is no file"):
        load_sweep("nowhere.yaml", notebooks=folder)


def test_a_pattern_chooses_among_the_runs(written):
    sweep = written("{notebooks: [one], grid: {category: [screw, nut]}, seeds: [1, 12]}")
    assert [run.name for run in sweep.matching("*-seed1")] == ["screw-seed1", "nut-seed1"]
    assert sweep.matching("") == list(sweep.runs)
    with pytest.raises(ProfileError, match=r"no run of mine.yaml has such a name; its runs are screw-seed1, "):
        sweep.matching("bolt*")


@pytest.mark.parametrize(
    ("values", "says"),
    [({"workers": -1}, "workers"), ({"gpu_minutes": 20.0}, "gpu_source"), ({"gpu_minutes": -1.0}, "gpu_minutes")],
)
def test_impossible_settings_of_a_sweep_are_refused(values, says):
    with pytest.raises(SettingsError, match=says):
        SweepSettings(**values)


def test_a_folder_of_other_parameters_or_another_version_is_not_continued(written, monkeypatch):
    text = "{notebooks: [one, two], parameters: {rate: 0.5}}"
    (run,) = written(text).runs
    run.check()
    write_json(run.folder / "order.json", run.identity)
    run.check()
    (other,) = written(text.replace("0.5", "0.25, least: 0.1")).runs
    with pytest.raises(RunError, match=r"other parameters of one \(rate: 0.5 there, 0.25 now\)"):
        other.check()
    monkeypatch.setattr("effad_lib.sweeps.plan.__version__", "9.9")
    with pytest.raises(RunError, match=r"a run of effad .*, this is 9\.9"):
        run.check()


# --- the sweeps that are shipped ------------------------------------------------------------------------------------

SHIPPED = {
    "mvtec": 15 * 2 * 5,
    "visa": 12 * 2 * 5,
    "loco": 5 * 2 * 5,
    "ablations": 15 * 4 * 5,
    "severity": 20,
    "sizes": 120,
    "screw": 9,
    "quick": 4,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_sweeps_fit_the_notebooks(name, tmp_path):
    sweep = load_sweep(name, runs=tmp_path)
    assert len(sweep.runs) == SHIPPED[name]
    assert {path.stem for path in (NOTEBOOKS / "sweeps").glob("*.yaml")} == SHIPPED.keys()
    if name in ("mvtec", "visa", "loco"):
        # As the paper trains: every setting that it speaks of has its value, on every category, with five seeds.
        paper = TrainingSettings().as_dict()
        for run in sweep.runs:
            here = run.training.as_dict()
            assert {n for n in here if here[n] != paper[n]} - batch.OURS <= {"size"}
        assert {run.training.size for run in sweep.runs} == {"S", "M"}
        assert {run.training.seed for run in sweep.runs} == set(range(5))


def test_the_ablations_are_the_papers(tmp_path):
    runs = [
        run
        for run in load_sweep("ablations", runs=tmp_path).runs
        if run.name.startswith("screw") and "seed0" in run.name
    ]
    told = [(run.training.hard_quantile, run.training.weight_penalty, run.training.size) for run in runs]
    assert told == [(0.0, 0.0, "S"), (0.999, 0.0, "S"), (0.999, 1.0, "S"), (0.999, 1.0, "M")]


def test_data_that_are_missing_are_told_with_where_to_get_them(tmp_path):
    sweep = load_sweep("mvtec", runs=tmp_path)
    runs = [run for run in sweep.matching("bottle-S-*")]
    try:
        find_data(runs)
    except DatasetError as error:
        assert "mvtec.com" in str(error) or "is not in" in str(error)
    else:
        pytest.skip("MVTec AD is here")
    with pytest.raises(DatasetError):
        sweeps.run_sweep(SweepSettings(sweep="mvtec", only="bottle-S-*", runs=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("effad_lib.distillation.teachers.TEACHERS", tmp_path)
    with pytest.raises(SettingsError, match=r"run bottle-M-seed0: teacher 'M'.*effad distill"):
        find_data(load_sweep("mvtec", runs=tmp_path).matching("bottle-M-seed0"))
