"""Secrets as the parts of a command get them: those in files are read again when the files change."""

from pydantic import SecretStr

from worker.runtime.file_value import FileValue
from worker.settings.base import Settings
from worker.settings.sources import secret_file, secret_in
from worker.settings.values import revealed


def secret_value(settings: Settings, name: str) -> str | FileValue[str] | None:
    """The setting ``name``, a secret: a FileValue if it comes from a file, else a text; None if it is not set.

    Raises WrongSetting where the file cannot be used any more.
    """
    secret: SecretStr | None = getattr(settings, name)
    file = secret_file(name)
    if secret is None or file is None:
        return revealed(secret)
    return FileValue(lambda: secret_in(type(settings), name, file), [file])
