"""An aiokafka that is not as this worker needs it is refused at the start, in one sentence."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import aiokafka
import pytest
from aiokafka.client import AIOKafkaClient

from worker.kafka import aiokafka_compat
from worker.kafka.aiokafka_compat.installed import SERIES, USED, UnsupportedAiokafka, check_installed


def test_the_installed_one_has_all_that_is_used() -> None:
    check_installed()


def test_a_missing_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(AIOKafkaClient, "_get_conn")
    with pytest.raises(UnsupportedAiokafka) as refused:
        check_installed()
    assert f"aiokafka {aiokafka.__version__} is installed" in str(refused.value)
    assert ": aiokafka.client.AIOKafkaClient._get_conn; install a version 0.14" in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("where", USED)
def test_each_place_is_looked_into(where: str) -> None:
    with pytest.raises(UnsupportedAiokafka) as refused:
        check_installed({where: "_no_such_name"})
    assert f": {where.replace(':', '.')}._no_such_name;" in str(refused.value)


@pytest.mark.parametrize("where", ["aiokafka.no_such_module", "aiokafka.client:NoSuchClass"])
def test_a_missing_module_or_class_is_named(where: str) -> None:
    with pytest.raises(UnsupportedAiokafka, match=where.replace(":", r"\.")):
        check_installed({where: "name"})


@pytest.mark.parametrize(("version", "is_refused"), [("0.15.0", True), ("0.1.4", True), (f"{SERIES}.9", False)])
def test_another_series_is_refused_though_nothing_is_missing(
    version: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiokafka, "__version__", version)
    if is_refused:
        with pytest.raises(UnsupportedAiokafka, match=f"aiokafka {version} is installed"):
            check_installed()
    else:
        check_installed()


@pytest.mark.parametrize("command", ["run", "check", "replay"])
def test_a_command_ends_with_2_and_one_sentence(command: str) -> None:
    program = (
        "from aiokafka.client import AIOKafkaClient; del AIOKafkaClient._get_conn; "
        f"from worker.cli import main; main([{command!r}])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 2
    (line,) = (ended.stdout + ended.stderr).splitlines()
    assert "aiokafka.client.AIOKafkaClient._get_conn" in line


PACKAGE = Path(aiokafka_compat.__file__).parent
ASYNCIOS = {"_transport"}


def private_names(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Names with one underscore of what is not ``self``, nor a class of the same file; with their file."""
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        own = {"self", "cls"} | {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        for node in (node for node in nodes if isinstance(node, ast.Attribute)):
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            if is_private and not (isinstance(node.value, ast.Name) and node.value.id in own):
                yield file.name, node.attr


def test_every_private_name_that_is_used_is_looked_for() -> None:
    looked_for = {name for names in USED.values() for name in names.split()} | ASYNCIOS
    assert [found for found in private_names(PACKAGE.glob("*.py")) if found[1] not in looked_for] == []


def test_no_other_module_uses_one() -> None:
    others = PACKAGE.parent.glob("*.py")
    assert list(private_names(others)) == []
