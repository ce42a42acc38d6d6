"""The commands in the documents: whatever a reader may copy is one that there is, with options that there are."""

import ast
import importlib.util
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from tests.deploy.manifests import CHART
from tests.test_documents import PAGES, ROOT, text_of
from worker.cli import COMMANDS
from worker.settings.base import Settings
from worker.settings.run import RunSettings
from worker.settings.sources import load

KINDS: dict[str, type[Settings]] = {"run": RunSettings, **runpy.run_path(str(ROOT / "docs" / "reference.py"))["KINDS"]}
FLAGS = {
    f"--{(field.alias or name).replace('_', '-')}"
    for kind in KINDS.values()
    for name, field in kind.model_fields.items()
}
OURS = ("sentiment-worker", "make", "python")
KAFKAS = tuple(
    f"kafka-{name}.sh" for name in ("topics", "consumer-groups", "acls", "console-producer", "console-consumer")
)
OTHERS = (*KAFKAS, "kubectl", "helm", "docker", "go", "base.sh", "cp", "chmod", "curl", "pip", "echo")
OTHERS_FLAGS = {"--help", "--version", "--execute", "--read-only", "--gpus"}
OTHERS_SETTINGS = ("acks",)
SHELL = ("for", "do", "done", "if", "then", "fi")
PATHS = ("/", "/metrics", "/livez", "/readyz", "/reload")
MAKEFILE = text_of(ROOT / "Makefile")
TARGETS = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
METHODS = {
    (node.name, part.name)
    for path in (ROOT / "worker").rglob("*.py")
    for node in ast.walk(ast.parse(text_of(path)))
    if isinstance(node, ast.ClassDef)
    for part in node.body
    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
}
TREES = {path.name for path in ROOT.iterdir() if path.is_dir()}


def blocks() -> list[Any]:
    """Every fenced block for a shell, with a name for the test."""
    found = []
    for page in PAGES:
        for match in re.finditer(r"^```sh\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL):
            line = text_of(page)[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def commands(block: str) -> list[list[str]]:
    """The words of each simple command, without variables that are set before it and where its output goes."""
    found: list[list[str]] = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        found.append([])
        for word in lexer:
            if set(word) <= set(";&|") or word in SHELL:
                found.append([])
            elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
                found[-1].append(word)
    simple = [words[: words.index(">")] if ">" in words else words for words in found if words]
    return [words for words in simple if words[1:2] != ["in"]]  # the head of a for


def check_ours(name: str, arguments: list[str]) -> None:
    """Raises what is wrong with a command of this project, without doing it."""
    if name == "make":
        for argument in arguments:
            variable, is_set, _ = argument.partition("=")
            assert argument in TARGETS or (is_set and f"$({variable})" in MAKEFILE), argument
    elif name == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1]), arguments[1]
    else:
        load(KINDS[arguments[0]], arguments[1:], arguments[0], {})


def check_resources(arguments: list[str]) -> None:
    """What kubectl is asked about is what the chart makes of a release named sentiment-worker."""
    templates = "".join(text_of(path) for path in (CHART / "templates").glob("*.*"))
    kinds = {*re.findall(r"^kind: (\w+)$", templates, re.MULTILINE), "Deployment", "StatefulSet"}
    there = {f"{kind.lower()}/sentiment-worker" for kind in kinds}
    asked = {word for word in arguments if re.fullmatch(r"[a-z]+/[a-z-]+", word)}
    assert asked <= there, asked - there


@pytest.mark.parametrize("block", blocks())
def test_a_block_is_what_a_shell_takes(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks())
def test_each_command_of_a_block_is_one(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "worker.toml" in block:
        (tmp_path / "worker.toml").write_text("max_batch_texts = 256\n")
    for word, *arguments in commands(block):
        name = Path(word).name
        assert name in OURS or name in OTHERS, f"{name}: say in this test that it is known, and run it once by hand"
        if name in OURS:
            check_ours(name, arguments)
        if name == "kubectl":
            check_resources(arguments)
        for argument in arguments:
            if argument.split("/")[0] in TREES and "/" in argument:
                assert (ROOT / argument).exists(), argument
            if argument.startswith("http://"):
                assert "/" + argument.split("/", 3)[3] in PATHS, argument


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_stand_in_fenced_blocks(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    firsts = [line.split()[0] for line in re.findall(r"^    \S.*$", text, re.MULTILINE)]
    assert not {Path(word).name for word in firsts} & {*OURS, *OTHERS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_sentence_names_is_there(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)):
        words = code.split()
        if words[0] == "make" and len(words) > 1:
            check_ours("make", shlex.split(code)[1:])
        elif words[0] == "sentiment-worker" and len(words) > 1:
            assert words[1] in COMMANDS or words[1].startswith("--"), code
        elif re.fullmatch(r"--[a-z-]+", code):
            assert code in FLAGS | OTHERS_FLAGS, code
        elif (match := re.fullmatch(r"([a-z_]+)=([\w.-]+)", code)) and match[1] not in OTHERS_SETTINGS:
            field = RunSettings.model_fields[match[1]]
            TypeAdapter(field.rebuild_annotation()).validate_strings(match[2])
        elif match := re.fullmatch(r"([A-Z]\w+)\.([a-z_]\w*)", code):
            assert match.groups() in METHODS, code
        elif len(words) == 1 and words[0].split("/")[0] in TREES and "/" in code and "…" not in code:
            assert (ROOT / code).exists() or (page.parent / code).exists(), code
