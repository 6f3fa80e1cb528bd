"""What the tests of the command line share: how a command fails."""

from effad_lib.cli import main


def failure(capsys, *arguments, code=2):
    """Run a command that must fail with one line on stderr; returns the line."""
    try:
        assert main([str(argument) for argument in arguments]) == code
    except SystemExit as error:
        assert error.code == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    lines = said.err.strip().splitlines()
    assert lines[-1].startswith("effad: ") or lines[0].startswith("effad: ")
    return said.err
