"""What the tests of commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from varprop.__main__ import main


def assert_refused(words: Sequence[object], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input: exit code 2, one line that holds `message`, and nothing new in `folder`."""
    before = sorted(path.name for path in folder.iterdir())
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before
