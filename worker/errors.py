"""What a user can put right, as one sentence and an exit code. Every other module may raise these."""

from worker.printable import printable


class UserError(Exception):
    """Something that the user can put right; the message is one sentence that says what."""

    exit_code = 2

    def __str__(self) -> str:
        """One line, whatever file or broker the words are from."""
        return printable(super().__str__())


class WrongSetting(UserError):
    """A setting, a flag or a file of settings is wrong; ``sentences`` has what else is, too."""

    def __init__(self, sentence: str, *others: str) -> None:
        super().__init__(sentence)
        self.sentences = (sentence, *others)
