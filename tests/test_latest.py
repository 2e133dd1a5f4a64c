"""The lane with the newest releases says what is newer and what broke."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import latest


def test_pins_are_read() -> None:
    text = "# a comment\ntorch==2.13.0\nPy_YAML==6.0 ; python_version > '3'\n\nnumpy==2.4  # why\n"
    assert latest.locked(text) == {"torch": "2.13.0", "py-yaml": "6.0", "numpy": "2.4"}


def test_other_versions_are_listed() -> None:
    assert latest.changed({"pytest": pytest.__version__, "no-such-package": "1"}) == []
    assert latest.changed({"pytest": "0.1"}) == [f"pytest 0.1 -> {pytest.__version__}"]
    assert latest.public("2.13.0+cpu") == latest.public("2.13.0") == "2.13.0"


@pytest.mark.slow
def test_what_broke_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_a.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'not the same'\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    assert latest.main([str(tmp_path), "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini")]) != 0
    out = capfd.readouterr().out
    assert "test_a::test_bad  AssertionError: not the same" in out.split("broke:")[1]
    assert "test_good" not in out.split("broke:")[1]
