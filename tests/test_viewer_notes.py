"""Notes: what people write is never lost, and a file that is not theirs to replace is left alone."""

import csv
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from effad_lib.runs import RunError
from effad_lib.viewer import VERDICTS, Note, Notes, of_run, open_viewer

HEADER = "file,verdict,note,changed\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "notes.csv"


@pytest.mark.parametrize(
    "text",
    [
        'a "quoted" word',
        "two\nlines, and\r\na third",
        "Grüße, 検査 ✓ 🔩",
        ",;\t'",
        '"',
        "=1+1",
        " spaces around ",
        "\0",
    ],
)
def test_a_note_comes_back_as_it_was_written(path, text):
    notes = Notes(path)
    notes['odd, "name" ä\n.png'] = Note("defective", text)
    notes["other.png"] = Note("", text)
    again = Notes(path)
    assert len(again) == 2
    assert again['odd, "name" ä\n.png'] == Note("defective", text) and again["other.png"] == Note("", text)
    assert again["unknown.png"] == Note("", "")


def test_a_note_that_could_not_be_read_again_is_not_written(path):
    notes = Notes(path)
    notes["a.png"] = Note("", "x" * 100_000)
    with pytest.raises(RunError, match="a note of 200000 characters is too long; it takes 100000"):
        notes["a.png"] = Note("", "x" * 200_000)
    assert Notes(path)["a.png"].note == "x" * 100_000


def test_the_file_is_a_sorted_table_with_the_time_of_each_change(path):
    before = datetime.now(UTC).replace(microsecond=0)
    notes = Notes(path)
    for name, verdict in (("b.png", "good"), ("a.png", "unclear")):
        notes[name] = Note(verdict)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "verdict", "note", "changed"]
    assert [row[:3] for row in rows[1:]] == [["a.png", "unclear", ""], ["b.png", "good", ""]]
    assert all(before <= datetime.fromisoformat(row[3]) <= datetime.now(UTC) for row in rows[1:])


def test_two_viewers_of_one_run_lose_nothing(path):
    first, second = Notes(path), Notes(path)
    first["a.png"] = Note("good", "by the first")
    second["b.png"] = Note("defective", "by the second")
    first["c.png"] = Note("unclear")
    assert first["b.png"].note == "by the second"  # read before it was written again
    assert {name: Notes(path)[name].verdict for name in ("a.png", "b.png", "c.png")} == {
        "a.png": "good",
        "b.png": "defective",
        "c.png": "unclear",
    }


def test_an_emptied_note_leaves_the_file(path):
    notes = Notes(path)
    notes["a.png"], notes["b.png"] = Note("good"), Note("", "a scratch")
    notes["a.png"] = Note()
    assert len(notes) == len(Notes(path)) == 1 and "a.png" not in path.read_text(encoding="utf-8")
    notes["b.png"] = Note()
    notes["never.png"] = Note()
    assert path.read_text(encoding="utf-8").replace('"', "") == HEADER and not len(Notes(path))


def test_what_a_spreadsheet_saved_is_read(path):
    path.parent.mkdir()
    path.write_bytes(b'\xef\xbb\xbfverdict,file,note,changed\r\ngood,a.png,"x, y",2026-01-01T00:00:00+00:00\r\n')
    notes = Notes(path)
    assert notes["a.png"] == Note("good", "x, y")
    notes["b.png"] = Note("defective")
    assert Notes(path)["a.png"] == Note("good", "x, y")


FOREIGN = {
    "other columns": b"image,remark\na.png,fine\n",
    "semicolons": b"file;verdict;note;changed\na.png;good;;\n",
    "a column too many": HEADER.encode() + b"a.png,good,,2026,more\n",
    "a column too few": HEADER.encode() + b"a.png,good\n",
    "no text": b"\xff\xfe\x00\x80",
    "an open quote": HEADER.encode() + b'a.png,good,"never closed\n',
    "one line of prose": b"what I saw on Monday",
    "other columns alone": b"image,remark\n",
    "a verdict of its own": HEADER.encode() + b"a.png,rework,,2026\n",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_by_name_and_left_as_it_was(path, kind):
    notes = Notes(path)
    path.parent.mkdir()
    path.write_bytes(FOREIGN[kind])
    for write in (lambda: Notes(path), lambda: notes.__setitem__("b.png", Note("good"))):
        with pytest.raises(RunError, match=r"notes\.csv"):
            write()
    assert path.read_bytes() == FOREIGN[kind]


def test_a_verdict_is_one_of_four(path):
    notes = Notes(path)
    with pytest.raises(RunError, match=r"verdict = 'bad': takes one of '', 'good', 'defective', 'unclear'"):
        notes["a.png"] = Note("bad")
    assert not path.exists() and not len(notes)
    for verdict in VERDICTS[1:]:
        notes[verdict] = Note(verdict)
    assert len(Notes(path)) == 3


def test_a_full_disk_leaves_the_notes_as_they_were(path, full_disk):
    notes = Notes(path)
    notes["a.png"] = Note("good", "kept")
    before = path.read_bytes()
    with full_disk(100), pytest.raises(RunError, match=r"cannot write .*notes\.csv"):
        notes["b.png"] = Note("defective", "x" * 200)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["notes.csv"]
    assert notes["b.png"] == Note() and notes["a.png"].note == "kept"  # nor is it shown as if it were written
    notes["b.png"] = Note("defective")
    assert len(Notes(path)) == 2


def test_a_folder_in_the_place_of_the_file_is_an_error(path):
    path.mkdir(parents=True)
    with pytest.raises(RunError, match=r"cannot write .*notes\.csv"):
        Notes(path)["a.png"] = Note("good")
    assert not list(path.parent.glob("*.partial"))


@pytest.fixture
def run(evaluated_run, tmp_path):
    """The evaluated run with notes of its own."""
    return shutil.copytree(evaluated_run, tmp_path / "run")


def test_verdicts_and_notes_are_written_at_once_and_shown_again(run):
    viewer = open_viewer(of_run(run))
    viewer.controls["verdict"].value = "unclear"
    viewer.controls["note"].value = "a <scratch>\nor dust?"
    viewer.controls["next"].click()
    assert viewer.controls["verdict"].value == viewer.controls["note"].value == ""
    viewer.controls["verdict"].value = "good"
    names = viewer.findings.names
    assert Notes(run / "notes.csv")[names[0]] == Note("unclear", "a <scratch>\nor dust?")
    again = open_viewer(of_run(run))
    assert again.controls["verdict"].value == "unclear" and again.controls["note"].value == "a <scratch>\nor dust?"
    again.controls["next"].click()
    assert again.controls["verdict"].value == "good" and "2 notes in notes.csv" in again._shell.texts["noted"].value
    again.controls["verdict"].value = ""
    assert len(Notes(run / "notes.csv")) == 1 and "1 notes" in again._shell.texts["noted"].value


def test_notes_that_cannot_be_written_are_said_to_be(run):
    viewer = open_viewer(of_run(run))
    (run / "notes.csv").write_text("somebody's,table\n1,2\n")
    viewer.controls["note"].value = "a scratch"
    assert "notes.csv" in viewer._shell.texts["message"].value and "somebody" in (run / "notes.csv").read_text()
    with pytest.raises(RunError, match=r"notes\.csv"):
        open_viewer(of_run(run))


def test_an_image_that_is_gone_does_not_inherit_the_note_of_the_one_before(run):
    viewer = open_viewer(of_run(run))
    viewer.controls["note"].value = "a scratch"
    viewer._display.picture.cache_clear()
    viewer.findings.samples[1] = replace(viewer.findings.samples[1], image=run / "gone.png")
    viewer.show(1)
    viewer.controls["verdict"].value = "unclear"
    assert Notes(run / "notes.csv")[viewer.findings.names[1]] == Note("unclear", "")


def test_a_view_is_saved_as_png_beside_the_notes(run):
    viewer = open_viewer(of_run(run))
    viewer.controls["save"].click()
    saved = run / "views" / "00000_0_combined.png"
    assert saved.read_bytes()[:4] == b"\x89PNG" and str(saved) in viewer._shell.texts["message"].value
    (run / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        viewer.save(run / "file" / "view.png")


def test_two_people_change_one_note_and_neither_loses(tmp_path):
    one, other = Notes(tmp_path / "notes.csv"), Notes(tmp_path / "notes.csv")
    one.change("a.png", note="a long text")
    assert other.change("a.png", verdict="defective") == Note("defective", "a long text")
    assert Notes(one.path)["a.png"] == ("defective", "a long text")
    assert other.change("a.png", note="") == ("defective", "")


def test_a_verdict_leaves_the_text_that_another_viewer_wrote_and_shows_it(run):
    viewer, other = open_viewer(of_run(run)), open_viewer(of_run(run))
    other.controls["note"].value = "a long text"
    viewer.controls["verdict"].value = "defective"
    assert viewer.controls["note"].value == "a long text"
    assert Notes(run / "notes.csv")[viewer.findings.names[viewer.state.index]] == ("defective", "a long text")
