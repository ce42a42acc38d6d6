"""What is made of files is made anew when they change, and stays as it was while they cannot be used."""

import logging
import os
from pathlib import Path

import pytest

from worker.errors import UserError
from worker.runtime.file_value import FileValue, present


class Pair:
    """Two files that belong together; a value can be made of them where both have the same text."""

    def __init__(self, folder: Path) -> None:
        self.files = folder / "one", folder / "two"
        self.made = 0
        self.reason = "the two do not fit"

    def write(self, *texts: str) -> None:
        for file, text in zip(self.files, texts, strict=False):
            file.write_text(text)

    def make(self) -> str:
        self.made += 1
        one, two = (file.read_text() if file.exists() else "" for file in self.files)
        if one != two:
            raise UserError(self.reason)
        return one


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    pair = Pair(tmp_path)
    pair.write("old", "old")
    return pair


def test_files_that_stay_are_read_once(pair: Pair) -> None:
    value = FileValue(pair.make, pair.files)
    assert [value.value for _ in range(3)] == ["old"] * 3
    assert pair.made == 1


def test_files_that_change_are_read_again(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    value = FileValue(pair.make, pair.files)
    pair.write("new one", "new one")
    assert [value.value for _ in range(3)] == ["new one"] * 3
    assert pair.made == 2
    assert [(record.levelname, str(pair.files[1]) in record.getMessage()) for record in caplog.records] == [
        ("INFO", True)
    ]


@pytest.mark.parametrize("kept", ["size", "time"])
def test_a_change_of_size_or_time_alone_is_noticed(pair: Pair, kept: str) -> None:
    value = FileValue(pair.make, pair.files)
    if kept == "size":
        pair.write("new", "new")
        for file in pair.files:
            os.utime(file, ns=(1, 1))
    else:
        times = [file.stat().st_mtime_ns for file in pair.files]
        pair.write("longer", "longer")
        for file, time_ns in zip(pair.files, times, strict=True):
            os.utime(file, ns=(time_ns, time_ns))
    assert value.value in ("new", "longer")


def test_a_link_that_leads_elsewhere_is_noticed(pair: Pair, tmp_path: Path) -> None:
    """As Kubernetes changes the files of a Secret."""
    (tmp_path / "1").mkdir()
    link = tmp_path / "now"
    link.symlink_to(tmp_path / "1")
    (tmp_path / "1" / "secret").write_text("old")
    value = FileValue((link / "secret").read_text, [link / "secret"])
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "secret").write_text("new")
    (tmp_path / "next").symlink_to(tmp_path / "2")
    (tmp_path / "next").replace(link)
    assert value.value == "new"


def test_files_that_cannot_be_used_change_nothing_and_are_told_once(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    value = FileValue(pair.make, pair.files)
    pair.write("half")
    assert [value.value for _ in range(3)] == ["old"] * 3
    pair.write("more")
    assert value.value == "old"
    pair.files[1].unlink()
    assert value.value == "old"
    assert [record.getMessage() for record in caplog.records] == [
        "the two do not fit; what was read before stays in use"
    ]
    pair.write("more", "more")
    assert value.value == "more"
    pair.write("again")
    assert value.value == "more"
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 2


def test_another_reason_is_told_too(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """Else the log would have the first one, of a file that was half written, long after somebody has mended that."""
    value = FileValue(pair.make, pair.files)
    for text in ("one", "two"):
        pair.reason = f"{text} is wrong"
        pair.write(text)
        assert [value.value for _ in range(3)] == ["old"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{text} is wrong; what was read before stays in use" for text in ("one", "two")
    ]


def test_a_copy_that_keeps_the_time_is_noticed(pair: Pair) -> None:
    """As of ``cp --preserve``, which writes into the file that is there."""
    value = FileValue(pair.make, pair.files)
    times = [file.stat().st_mtime_ns for file in pair.files]
    pair.write("new", "new")
    for file, time_ns in zip(pair.files, times, strict=True):
        os.utime(file, ns=(time_ns, time_ns))
    assert value.value == "new"


def test_the_first_value_has_to_be_right(pair: Pair) -> None:
    pair.write("half")
    with pytest.raises(UserError, match="the two do not fit"):
        FileValue(pair.make, pair.files)


def test_a_value_of_no_file_is_itself(pair: Pair) -> None:
    assert present("plain") == "plain"
    assert present(None) is None
    assert present(FileValue(pair.make, pair.files)) == "old"


def test_what_it_holds_is_not_shown(pair: Pair) -> None:
    assert "old" not in repr(FileValue(pair.make, pair.files)).replace("object", "")
