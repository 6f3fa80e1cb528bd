"""The project as a whole: one list of packages, rooms that import downwards only, nothing of this machine in it."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from effad_lib.runs import PROJECT

ROOMS = (
    "documents tensors settings memory progress reading cards images runs checkpoints consent execution provenance "
    "synthesis convolution networks optimisers metrics losses backbones datasets engines tiling detector distillation "
    "calibration training plots charts diagrams evaluation probing designs detection watching export latency "
    "benchmark viewer published profiles batch reports sweeps cli"
).split()
"""The rooms of effad_lib, ground floor first: each may import only those before it."""

WIDGETS = ("controls.py", "display.py", "speed.py", "widgets.py")
"""Modules of the viewer that need Jupyter; they are imported when a viewer is opened."""

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted((PROJECT / "effad_lib").rglob("*.py"))
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


def code(path: Path) -> ast.Module:
    """The syntax tree of a module or of a notebook's code cells, without shell lines and magics."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = "\n".join(line for cell in cells for line in cell.splitlines() if not re.match(r"\s*[%!]", line))
    return ast.parse(text)


def imports(nodes) -> set[str]:
    """The dotted names that these nodes import, absolute; `from effad_lib import runs` as effad_lib.runs."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import of {node.module}"
            if node.module == "effad_lib":
                names |= {f"effad_lib.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def room(path: Path) -> str:
    """The room of a module: a file or a folder of effad_lib."""
    return path.relative_to(PROJECT / "effad_lib").parts[0].removesuffix(".py")


def distributions(requirements) -> set[str]:
    """The normalised names of a list of requirements."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in requirements}


PACKAGES = {module: distributions(names) for module, names in packages_distributions().items()}
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
CORE = distributions(PYPROJECT["project"]["dependencies"])
DECLARED = CORE.union(*(distributions(extra) for extra in EXTRAS.values()))


def undeclared(names: set[str], declared: set[str]) -> set[str]:
    """Those imported names that are neither ours, nor Python's, nor of a declared package."""
    modules = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"effad_lib"}
    return {module for module in modules if not PACKAGES.get(module, set()) & declared}


# --- one list of packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*SOURCES, *NOTEBOOKS], ids=lambda path: path.name)
def test_every_import_is_declared(path):
    tree = code(path)
    assert not undeclared(imports(ast.walk(tree)), DECLARED)
    if path.suffix == ".py":
        # What loads with the room itself must be there without any extra: Jupyter is not needed for the library.
        widgets = distributions(EXTRAS["notebooks"]) if path.name in WIDGETS else set()
        assert not undeclared(imports(tree.body), CORE | widgets)


def test_an_undeclared_import_would_be_found():
    names = imports(ast.walk(ast.parse("def f():\n    import yaml, sklearn.metrics\n    from IPython.core import x")))
    assert undeclared(names, {"pyyaml"}) == {"sklearn", "IPython"}
    assert undeclared({"no_such_package"}, DECLARED) == {"no_such_package"}


def test_conda_users_get_the_same_list():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert conda == [f"python{PYPROJECT['project']['requires-python']}", "pip"]
    (project,) = pip["pip"]
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", project)[1].split(",")
    assert sorted(extras) == sorted(EXTRAS)


def test_make_installs_the_same_list():
    text = (PROJECT / "Makefile").read_text(encoding="utf-8")
    extras = re.search(r'-e "\.\[([\w,]+)\]"', text)[1].split(",")
    assert sorted(extras) == sorted(EXTRAS)
    versions = {f">={major}.{minor}" for major, minor in re.findall(r"sys.version_info < \((\d+), (\d+)\)", text)}
    assert versions == {PYPROJECT["project"]["requires-python"]}


@pytest.mark.parametrize("name", ["Makefile", "environment.yml", "pyproject.toml", ".ci/run"])
def test_packages_come_from_pypi_alone(name):
    text = (PROJECT / name).read_text(encoding="utf-8")
    assert not re.search(r"index-url|find-links|git\+|https?://(?!.*github\.com)", text)


def test_every_package_of_the_library_is_installed_and_none_is_left_out():
    there = {".".join(path.parent.relative_to(PROJECT).parts) for path in SOURCES if path.name == "__init__.py"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == there


def test_the_check_of_every_change_is_the_readmes_test_command():
    commands = (PROJECT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[-1] == "make test"
    assert "make test" in (PROJECT / "README.md").read_text(encoding="utf-8")


# --- rooms ----------------------------------------------------------------------------------------------------------


def test_every_room_has_its_floor():
    there = {room(path) for path in SOURCES} - {"__init__", "__pycache__"}
    assert there == set(ROOMS)


@pytest.mark.parametrize("path", [path for path in SOURCES if room(path) != "__init__"], ids=lambda path: path.name)
def test_nothing_imports_upward(path):
    own = room(path)
    for name in imports(ast.walk(code(path))):
        package, _, other = name.partition(".")
        other = other.partition(".")[0]
        if package == "effad_lib" and other not in ("", "__version__", own):
            assert ROOMS.index(other) < ROOMS.index(own), f"{own} imports {other}, which is above it"


def test_there_is_one_progress_bar():
    """Another one, drawn ten times a second, would flood a notebook's front end."""
    makers = [path.name for path in SOURCES if any(name.startswith("tqdm") for name in imports(ast.walk(code(path))))]
    assert makers == ["progress.py"]


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("effad_lib", {"numpy", "torch", "pandas", "matplotlib"}),
        ("effad_lib.training", {"torchvision", "sklearn", "scipy.stats", "matplotlib", "tensorboard", "triton"}),
        ("effad_lib.viewer", {"torchvision", "sklearn", "effad_lib.viewer.widgets"}),
        ("effad_lib.charts", {"torchvision", "sklearn", "seaborn", "scipy.stats"}),
        ("effad_lib.latency", {"torchvision", "sklearn", "onnxruntime", "openvino", "nncf"}),
    ],
)
def test_what_a_start_does_not_wait_for(module, heavy):
    """Imports of seconds are made where they are used; what belongs to Jupyter need not be installed at all."""
    script = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_notebooks_import_the_library_and_not_each_other():
    for path in NOTEBOOKS:
        ours = {name.split(".")[1] for name in imports(ast.walk(code(path))) if name.startswith("effad_lib.")}
        assert ours <= set(ROOMS) - {"cli"}, path.name


# --- what must not be committed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*SOURCES, *NOTEBOOKS, *(PROJECT / "notebooks").rglob("*.yaml")], ids=lambda path: path.name
)
def test_nothing_names_a_machine(path):
    found = re.search(r"(?<![\w.])/(work|root|home|Users|tmp|opt)/\w+", path.read_text(encoding="utf-8"))
    assert not found, f"{path.name} says {found[0]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_small_and_without_widgets(path):
    assert path.stat().st_size < 1.5e6
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"] and "papermill" not in notebook["metadata"]
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["cell_type"] == "code"
