"""What people write about images: a verdict and a note for each, in a CSV file that is whole at every moment."""

from __future__ import annotations

import csv
import io
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from effad_lib.runs import RunError, write_text

VERDICTS = ("", "good", "defective", "unclear")
COLUMNS = ("file", "verdict", "note", "changed")
LONGEST = 100_000
"""Of a note in characters; Python's reader of CSV takes no more than 131,072."""


class Note(NamedTuple):
    """What a person holds of an image: one of `VERDICTS`, and free text."""

    verdict: str = ""
    note: str = ""


class Notes:
    """The notes of a run, `notes.csv` with a row for each image that has one: file, verdict, note, changed (UTC).

    Every change is written at once by rename, and what another viewer or a spreadsheet has written since is read first,
    so nothing is lost. Raises `RunError` if the file is no such table or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows = self._read()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, name: str) -> Note:
        row = self._rows.get(name, {})
        return Note(row.get("verdict", ""), row.get("note", ""))

    def change(self, name: str, **parts: str) -> Note:
        """Change the verdict or the note of an image, leave the other as the file has it now, and return both."""
        row = self._read().get(name, {})
        self[name] = Note(**{part: parts.get(part, row.get(part, "")) for part in Note._fields})
        return self[name]

    def __setitem__(self, name: str, note: Note) -> None:
        _check_verdict(note.verdict, "verdict")
        if len(note.note) > LONGEST:
            raise RunError(f"a note of {len(note.note)} characters is too long; it takes {LONGEST} at most.")
        rows = self._read()
        if any(note):
            changed = datetime.now(UTC).isoformat(timespec="seconds")
            rows[name] = dict(zip(COLUMNS, (name, *note, changed), strict=True))
        else:
            rows.pop(name, None)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
        try:
            write_text(self.path, text.getvalue())
        except UnicodeEncodeError as error:
            raise RunError(f"the note of {name!a} holds what is no text ({error.reason}). Type it anew.") from error
        self._rows = rows

    def _read(self) -> dict[str, dict[str, str]]:
        if not self.path.is_file():
            return {}
        try:
            with open(self.path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, strict=True)
                rows, columns = list(reader), reader.fieldnames or COLUMNS
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise RunError(
                f"{self.path} cannot be read ({error}). Mend it or move it away; it is not replaced."
            ) from error
        if set(columns) != set(COLUMNS) or any(None in row or None in row.values() for row in rows):
            got = ", ".join(columns)
            raise RunError(f"{self.path}: columns {got}; it takes {', '.join(COLUMNS)}. Mend it or move it away.")
        if twice := [file for file, times in Counter(row["file"] for row in rows).items() if times > 1]:
            raise RunError(f"{self.path}: {twice[0]} is there twice. Join the two rows: one of them would be lost.")
        for row in rows:
            _check_verdict(row["verdict"], f"{self.path}: the verdict of {row['file']}")
        return {row["file"]: row for row in rows}


def _check_verdict(verdict: str, name: str) -> None:
    if verdict not in VERDICTS:
        raise RunError(f"{name} = {verdict!r}: takes one of {', '.join(map(repr, VERDICTS))}.")
