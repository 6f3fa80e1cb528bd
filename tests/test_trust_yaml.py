"""Profiles and sweeps that somebody sent: plain values within limits, known names, and nothing that a tag asks for."""

from __future__ import annotations

import pytest
from trust import command_refused, files, notebook_folder, refused

from effad_lib.documents import read_yaml
from effad_lib.profiles import load_profile
from effad_lib.sweeps import load_sweep


@pytest.fixture
def load(tmp_path):
    """A function that writes a text or bytes as profile and as sweep, and returns what loads each of them."""
    folder = notebook_folder(tmp_path)

    def write(content):
        for kind in ("profiles", "sweeps"):
            content = content.encode() if isinstance(content, str) else content
            (folder / kind / "mine.yaml").write_bytes(content)
        places = {"runs": tmp_path / "runs", "notebooks": folder}
        return lambda: load_profile("mine", **places), lambda: load_sweep("mine", **places)

    return write


LAUGHS = "\n".join(["a0: &a0 [1, 2]"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)])

DOCUMENTS = {
    "a billion laughs": (LAUGHS, "stands for more than 100,000 values: too many aliases"),
    "an alias to itself": ("a: &a [1, *a]", "line 1: an alias stands for what it is part of"),
    "an alias to a mapping around it": ("&a {b: *a}", "an alias stands for what it is part of"),
    "an unknown alias": ("a: *b", "is not YAML: .*undefined alias"),
    "a key twice": ("a: 1\nb: 2\na: 3", "line 1: 'a' is given twice"),
    "a key twice, deep": ("- x: [{b: 1, b: 2}]", "'b' is given twice"),
    "a list as key": ("{[1, 2]: 3}", "takes a list of steps|names|unknown entry|not YAML"),
    "a mapping as key": ("? {a: 1}\n: 2", "is not YAML: .*unhashable"),
    "5,000 brackets": ("[" * 5000, "is not YAML"),
    "5,000 mappings": ("{a: " * 5000, "is not YAML"),
    "a mebibyte": ("a: " + "x" * 2**20, "is longer than 65,536 bytes"),
    "5,000 keys": ("\n".join(f"k{k}: 1" for k in range(5_000)), "takes a list of steps|unknown entry"),
    "no text": (b"\xff\xfe\x00\x80", "is not YAML"),
    "UTF-16": ("a: 1".encode("utf-16"), "is not YAML"),
    "a control letter": ("a: \x07", "is not YAML"),
    "null bytes": (b"a: \0\0", "is not YAML"),
    "tabs": ("a:\n\t- 1", "is not YAML"),
    "two documents": ("- a\n---\n- b", "is not YAML: .*single document"),
    "an open quote": ("a: 'b", "is not YAML"),
    "nothing": ("", "takes a list of steps|takes entries with the names"),
    "a comment alone": ("# nothing", "takes a list of steps|takes entries"),
    "a word": ("profile", "takes a list of steps|takes entries"),
    "a number": ("3", "takes a list of steps|takes entries"),
    "null": ("~", "takes a list of steps|takes entries"),
    "a date": ("2026-01-01", "takes a list of steps|takes entries"),
    "an impossible date": ("2026-99-99", "is not YAML: it holds an impossible value .*month"),
    "an impossible number": ("!!int many", "is not YAML: it holds an impossible value"),
    "an impossible truth": ("!!bool perhaps", "is not YAML: it holds an impossible value"),
    "an impossible moment": ("!!timestamp yesterday", "is not YAML: it holds an impossible value"),
    "impossible bytes": ("!!binary é", "is not YAML"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "line 1: the whole number 99999999999999999999… has more than 64"),
    "huge seeds": (f"notebooks: [one]\nseeds: [0x{'f' * 6000}]", "line 2: the whole number 0xffffffffffffffffff… has"),
    "a huge notebook": (f"notebooks: [0x{'f' * 6000}]", "line 1: the whole number .* has more than 64 bits"),
    "a huge grid": (f"{{notebooks: [one], grid: {{steps: [{2**64}]}}}}", "has more than 64 bits"),
    "a huge rate": (f"{{notebooks: [one], parameters: {{rate: {'9' * 400}}}}}", "has more than 64 bits"),
    "an object": ("!!python/object:os.system {}", "is not YAML: could not determine a constructor"),
    "a call": ("!!python/object/apply:os.system ['touch executed']", "could not determine a constructor"),
    "a call with new": ("!!python/object/new:os.system ['touch executed']", "could not determine a constructor"),
    "a module": ("!!python/module:os", "could not determine a constructor"),
    "a name": ("!!python/name:os.system", "could not determine a constructor"),
    "a tuple": ("!!python/tuple [1, 2]", "could not determine a constructor"),
    "a tag of one's own": ("!mine {a: 1}", "could not determine a constructor"),
    "a merge of what is no mapping": ("{<<: 3}", "is not YAML"),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents_that_are_none_are_refused_as_profile_and_as_sweep(load, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, says = DOCUMENTS[kind]
    for work in load(content):
        assert refused(work, says).count("mine.yaml") == 1
    assert not (tmp_path / "executed").exists() and not (tmp_path / "runs").exists()


def test_what_yaml_has_beyond_json_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "base: &base {x: 1, y: 2}\nother: {<<: *base, y: 3}\nlist: [*base, *base]\ntext: |\n  a\n"
        f"most: {2**64 - 1}\n"
    )
    found = read_yaml(path)
    assert found["most"] == 2**64 - 1
    assert found["other"] == {"x": 1, "y": 3} and found["list"] == [{"x": 1, "y": 2}] * 2 and found["text"] == "a\n"


VALUES = {  # values of a parameter, and what is said of them; a name that is unknown is told with the nearest
    "steps: 10.0": "steps takes int, not float",
    "steps: '10'": "steps takes int, not str. Remove the quotes",
    "steps: 1e9": "steps takes int, not str. YAML reads 1e-4 as text",
    "steps: true": "steps takes int, not bool",
    "steps: yes": "steps takes int, not bool",
    "steps: ~": "steps takes int, not NoneType",
    "steps: [1]": "steps takes int, not list",
    "steps: 2026-01-01": "steps takes int, not date",
    "rate: .nan": "rate = nan: rate takes a finite number",
    "rate: 1e-4": r"write 1\.0e-4",
    "rate: high": "rate takes float, not str",
    "rate: 0x": "rate takes float, not str",
    "sizes: 64": "sizes takes a list of int",
    "sizes: 64, 64": "unknown parameter 64|takes names, each with its value",
    "sizes: [64, 64.5]": "sizes takes int, not float",
    "sizes: [[64]]": "sizes takes int, not list",
    "sizes: {a: 1}": "sizes takes a list of int",
    "text: 3": "text takes str, not int",
    "text: !!binary aGk=": "text takes str, not bytes",
    "text: !!set {a, b}": "text takes str, not set",
    "flag: 1": "flag takes bool, not int",
    "flag: maybe": "flag takes bool, not str",
    "stepz: 1": "unknown parameter 'stepz'.*Did you mean 'steps'",
    "__class__: x": "unknown parameter '__class__'",
    "'': x": "unknown parameter ''",
    "run_folder: ../elsewhere": "no run_folder|unknown parameter 'run_folder'",
    "dataset: elsewhere/evil.py:x": "is code, .*evil.py, which was named by a file and not by you",
}


@pytest.mark.parametrize("line", VALUES)
def test_values_that_a_notebook_does_not_take_are_refused(load, tmp_path, line):
    refused(load(f"- {{notebook: one, run: a, parameters: {{{line}}}}}")[0], VALUES[line])
    refused(load(f"{{notebooks: [one], parameters: {{{line}}}}}")[1], VALUES[line])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep", "../sweeps/mvtec"], "unknown sweep"),
        (["sweep", "folder.yaml"], "there is no file"),
        (["sweep", "link.yaml"], "there is no file|no path that can be followed"),
        (["sweep", "a name.yaml"], "becomes that of a folder: letters, digits"),
        (["sweep", "$(x).yaml"], "becomes that of a folder"),
        (["sweep", ".yaml"], "unknown sweep|becomes that of a folder|there is no file"),
        (["run", "--profile", "../sweeps/quick"], "unknown profile"),
        (["run", "--profile", "quick.yaml"], "unknown profile"),
        (["run", "--profile", ""], "unknown profile ''"),
    ],
)
def test_names_of_files_that_lead_elsewhere(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to(tmp_path / "link.yaml")
    for name in ("a name.yaml", "$(x).yaml"):
        (tmp_path / name).write_text("{notebooks: [03_training]}")
    before = files(tmp_path)
    command_refused(capsys, arguments, says)
    assert files(tmp_path) == before
