"""Pictures that are uploaded into a viewer: scored, named and shown, or refused without a change."""

import datetime

import pytest
from viewing import redrawn, size, text

from effad_lib.viewer.state import ALL


def upload(viewer, name, content):
    """What the front end sends for one file."""
    when = datetime.datetime.now()
    file = {"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": when}
    viewer.controls["upload"].value = (file,)


def test_one_picture_is_uploaded_scored_and_shown(viewer, picture, tmp_path):
    content = picture(tmp_path / "x.png", size=(70, 90), seed=9).read_bytes()
    viewer.controls["defect"].value = "good"
    upload(viewer, "..\\..\\C:/etc/my <i>.PNG", content)
    assert viewer.state.index == 6 and viewer.findings.names[6] == "my <i>.PNG" and viewer.state.defect == ALL
    assert viewer.controls["list"].value == 6 and size(viewer) == (90 * 5, 70 * 5)
    assert "my &lt;i&gt;.PNG: score" in text(viewer, "message")


@pytest.mark.parametrize("name", ["broken.png", "../../up.png", "a" * 300 + ".png", "x." + "p" * 300, "odd.svg", ""])
def test_a_broken_upload_is_named_and_changes_nothing(viewer, name, tmp_path):
    before = viewer.state
    assert redrawn(viewer, lambda: upload(viewer, name, b"no image")) == set()
    assert viewer.state == before and len(viewer.findings) == 6
    why = "cannot be read" if name.endswith(".png") else "no known ending"
    assert f">{name.split('/')[-1]}: {why}" in text(viewer, "message")


def test_a_type_of_defect_that_comes_later_can_be_chosen(viewer, picture, tmp_path):
    choice, content = viewer.controls["defect"], picture(tmp_path / "mine.png").read_bytes()
    assert "not known" not in [label for label, _ in choice.options]
    viewer._upload(({"name": "mine.png", "content": content},))
    assert "not known" in [label for label, _ in choice.options] and choice.value == ALL == viewer.state.defect
    choice.value = ""
    assert len(viewer.controls["list"].options) == 1 and viewer.findings.names[viewer.state.index] == "mine.png"


def test_the_same_picture_can_be_uploaded_twice_and_each_has_its_note(viewer, picture, tmp_path):
    content = picture(tmp_path / "mine.png").read_bytes()
    for _ in range(2):
        upload(viewer, "mine.png", content)
        assert viewer.controls["upload"].value == ()
    assert viewer.findings.names[-2:] == ["mine.png", "mine (2).png"]
