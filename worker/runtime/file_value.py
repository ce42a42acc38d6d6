"""A value that is made of files, such as a password or a TLS context, and is made anew when they change."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from worker.errors import UserError

log = logging.getLogger(__name__)

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)
_Stamp = tuple[int, int, int] | None


class FileValue(Generic[Value_co]):
    """``value`` is what ``make`` has made of ``files``; it is made anew where one of them has changed since.

    ``make`` reads the files, and raises a UserError where they cannot be used. The constructor raises it, too. Later each
    reason is logged once, as for a file that is half written, or a key whose certificate is not there yet, and the value
    before stays in use until the files can be used.

    ``value`` asks for the files' times and sizes each time, which takes some microseconds, and reads them on the caller's
    thread. Only one thread may use it.
    """

    def __init__(self, make: Callable[[], Value_co], files: Iterable[Path]) -> None:
        self._make = make
        self._files = tuple(files)
        self._stamps = self._present_stamps()
        self._value = make()
        self._refusal = ""

    @property
    def value(self) -> Value_co:
        stamps = self._present_stamps()  # before they are read, so that a change meanwhile is seen the next time
        if stamps != self._stamps:
            try:
                self._value = self._make()
            except UserError as error:
                if str(error) != self._refusal:
                    log.warning("%s; what was read before stays in use", error)
                self._refusal = str(error)
            else:
                log.info("read again: %s", ", ".join(map(str, self._files)))
                self._stamps, self._refusal = stamps, ""
        return self._value

    def _present_stamps(self) -> list[_Stamp]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> _Stamp:
    """What changes when a file is written or replaced; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ctime_ns, status.st_size, status.st_ino  # mtime stays as it was where a copy keeps it


def present(value: Value | FileValue[Value]) -> Value:
    """The value itself, read again first if it is made of files that have changed."""
    return value.value if isinstance(value, FileValue) else value
