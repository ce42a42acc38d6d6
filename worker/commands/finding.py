"""What ``check`` has found out about one thing: a line of its output."""

from typing import Literal, NamedTuple

from worker.errors import WrongSetting
from worker.printable import printable

Verdict = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """One line: what was looked at, how it is, and what to do if it is not well."""

    subject: str
    verdict: Verdict
    sentence: str
    exit_code: int = 1
    """The command's, where the verdict is fail: 2 for a wrong setting, else 1."""

    def __str__(self) -> str:
        return f"{self.verdict:<5} {self.subject:<12} {printable(self.sentence)}"


def wrong_setting(subject: str, error: WrongSetting) -> Finding:
    return Finding(subject, "fail", str(error), error.exit_code)
