"""What is said of a wrong setting: one sentence, with how to set it and without the values of secrets."""

import difflib
import re
from collections.abc import Callable, Iterable

from pydantic_core import ErrorDetails

from worker.settings.base import POSITIONAL, PREFIX, SECRETS, Settings, is_list_of_words, unquoted

USER = re.compile(r"//[^/]*@")  # and password, in an address that should have neither


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    return PREFIX + name.upper()


def suggestion(written: str, names: Iterable[str], shown: Callable[[str], str]) -> str:
    """What to add to a sentence about an unknown name: the known name that is most like it, as ``shown`` writes it."""
    name = written.removeprefix(PREFIX).strip("-").replace("-", "_").lower()
    known = {each.strip("-").replace("-", "_") for each in names}
    (close,) = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8) or ("",)
    if close in SECRETS and shown is not variable_of:
        return f"; {secret_sentence(close)}"
    return f"; perhaps {shown(close)} is meant" if close else ""


def secret_sentence(name: str) -> str:
    return f"{name} is a secret: set {variable_of(name)} or {variable_of(name)}_FILE"


def sentences(kind: type[Settings], errors: list[ErrorDetails]) -> list[str]:
    """One sentence for each setting that pydantic found wrong, in the order of its errors."""
    firsts = {error["loc"][:1] or error["msg"]: at for at, error in reversed(list(enumerate(errors)))}
    return [_sentence(kind, errors[at:]) for at in sorted(firsts.values())]


def _sentence(kind: type[Settings], errors: list[ErrorDetails]) -> str:
    """The first of these errors, and all others of the same setting, as one sentence. A secret's value is left out."""
    first = errors[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    requirements = " or ".join(
        dict.fromkeys(_requirement(error) for error in errors if error["loc"][:1] == first["loc"][:1])
    )
    if name not in kind.model_fields:
        return f"{name} is no setting; `--help` lists them"
    given = "" if name in SECRETS or first["type"] == "missing" else f" = {_as_given(first['input'])}"
    variable = variable_of(name)
    flag = "the word behind the command" if name in POSITIONAL else f"flag {flag_of(name)}"
    where = f"variable {variable} or {variable}_FILE" if name in SECRETS else f"{flag}, variable {variable}"
    return f"{name}{given} is wrong: {requirements} ({where})"


def _as_given(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return USER.sub("//…@", repr(unquoted(value) if is_list_of_words(value) else value))


_REQUIREMENTS = {  # by pydantic's types of errors
    "bool_parsing": "it should be true or false",
    "bool_type": "it should be true or false",
    "finite_number": "it should be a finite number",
    "float_parsing": "it should be a number",
    "float_type": "it should be a number",
    "greater_than": "it should be greater than {gt:g}",
    "greater_than_equal": "it should be greater than or equal to {ge:.15g}",
    "int_from_float": "it should be a whole number",
    "int_parsing": "it should be a whole number",
    "int_parsing_size": "it should be a whole number",
    "int_type": "it should be a whole number",
    "less_than": "it should be less than {lt:g}",
    "less_than_equal": "it should be less than or equal to {le:.15g}",
    "list_type": "it should be a list",
    "literal_error": "it should be {expected}",
    "missing": "it has to be given",
    "path_type": "it should be a path",
    "string_pattern_mismatch": "it should be auto, cpu, cuda or cuda:N",  # the one pattern that there is
    "string_type": "it should be text",
    "string_unicode": "it should be text in UTF-8",
    "value_error": "{error}",
}


def _requirement(error: ErrorDetails) -> str:
    requirement = _REQUIREMENTS.get(error["type"], "it should be another value").format(**error.get("ctx", {}))
    is_true_or_false = requirement.endswith("number") and str(error["input"]) in ("true", "false")
    return f"{requirement}, not {error['input']}" if is_true_or_false else requirement
