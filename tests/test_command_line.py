"""The command line as a person meets it: a process, its exit code and what it prints."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support.checkpoint import POISON, Oracle
from tests.support.process import environment, forked
from worker.settings.run import RunSettings
from worker.settings.sources import load

MODULE = (sys.executable, "-m", "worker")
COMMANDS = ("run", "check", "classify", "bench", "demo", "evaluate", "train", "schema")
HEAVY = ("torch", "transformers", "aiokafka", "numpy", "pydantic", "aiohttp", "prometheus_client")
FIELDS = [
    "id", "label", "score", "probabilities", "truncated", "model", "source", "event_time", "processed_at",
]  # fmt: skip


def call(
    *arguments: object,
    program: tuple[str, ...] = MODULE,
    stdin: bytes | None = None,
    folder: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*program, *map(str, arguments)], input=stdin or b"", capture_output=True, timeout=150, check=False,
        env=environment() | variables, cwd=folder,
    )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def refused(*arguments: object, **variables: str) -> str:
    """The one sentence of a process that does not begin; of a command whose logs are JSON a line of the log."""
    done = forked(*arguments, **variables)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    if not line.startswith("{"):
        assert line.startswith("sentiment-worker: ")
        return line.removeprefix("sentiment-worker: ")
    said = json.loads(line)
    assert (said["level"], said["exit_code"]) == ("ERROR", 2)
    return str(said["message"])


def shell(redirections: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """The command with redirections of a shell, such as ``2>&-``."""
    command = ["sh", "-c", f'"$@" {redirections}', "sh", *MODULE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=150, check=False, env=environment() | variables)


def call_into_a_closed_pipe(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    """The reader of its standard output has gone before it writes."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as output:
        return run_into(output, *arguments)


def run_into(output: IO[bytes], *arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*MODULE, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, timeout=150,
        check=False, env=environment(),
    )  # fmt: skip


def results(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The JSON lines of a classify that went well."""
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" or done.stdout.endswith("\n")
    return [json.loads(line) for line in done.stdout.splitlines()]


def installed_command() -> str:
    found = shutil.which("sentiment-worker", path=sysconfig.get_path("scripts"))
    assert found, "the package is not installed: its command is missing"
    return found


# --- Help ---


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    done = call(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: sentiment-worker COMMAND")
    for command in COMMANDS:
        assert re.search(rf"^  {command}  ", done.stdout, re.MULTILINE)


def test_the_installed_command_is_the_module() -> None:
    command = (installed_command(),)
    for arguments in (["--help"], ["--version"], ["nosuch"], ["run", "--linger-ms", "-1", "--log-format", "console"]):
        by_name, by_module = call(*arguments, program=command), call(*arguments)
        assert (by_name.returncode, by_name.stdout) == (by_module.returncode, by_module.stdout)
        assert re.sub(r'"time":"[^"]*"', "", by_name.stderr) == re.sub(r'"time":"[^"]*"', "", by_module.stderr)


def test_version_is_the_packages() -> None:
    done = call("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_help(command: str) -> None:
    done = call(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: sentiment-worker {command} ")


def imported(*arguments: str) -> set[str]:
    """The modules that a command imports."""
    done = call(*arguments, program=(sys.executable, "-X", "importtime", "-m", "worker"))
    assert done.returncode == 0
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_help_imports_nothing_that_takes_long() -> None:
    modules = imported("--help")
    assert "worker.cli" in modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_imports_no_torch(command: str) -> None:
    assert not imported(command, "--help") & {"torch", "transformers", "aiokafka"}


# --- Schemas ---


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ([], "result.schema.json"),
        (["result", "--format", "avro"], "result.avsc"),
        (["dead-letter"], "dead-letter.schema.json"),
        (["--format", "avro", "dead-letter"], "dead-letter.avsc"),
    ],
)
def test_schema_prints_what_the_documents_have(arguments: list[str], file: str) -> None:
    done = forked("schema", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (Path(__file__).parents[1] / "docs" / "schemas" / file).read_text(encoding="utf-8")


def test_schema_imports_nothing_that_it_does_not_need() -> None:
    assert not imported("schema") & (set(HEAVY) - {"pydantic"})


def test_schema_takes_one_of_the_records_that_there_are() -> None:
    sentence = "it should be 'result' or 'dead-letter' (the word behind the command, variable WORKER_RECORD)"
    assert refused("schema", "results") == f"record = 'results' is wrong: {sentence}"
    assert "no flag" in refused("schema", "--record", "result")


# --- Terminals, pipes and disks ---


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_locale_cannot_show_is_replaced(command: str) -> None:
    done = shell("", command, "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(f"usage: sentiment-worker {command} ".encode())


def test_help_is_shown_in_the_locale_c_too() -> None:
    done = shell("", "run", "--help", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("redirections", "arguments", "code"),
    [
        ("2>&-", ["run", "--nope"], 2),
        ("2>&-", ["nosuch"], 2),
        (">&-", ["--help"], 0),
        ("<&- >&- 2>&-", ["run", "--help"], 0),
    ],
)
def test_a_closed_stream_takes_what_is_said_and_changes_no_exit_code(
    redirections: str, arguments: list[str], code: int
) -> None:
    done = shell(redirections, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_classify_goes_without_standard_streams(checkpoint: Path) -> None:
    done = shell("<&-", "classify", "--model", checkpoint, "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = shell(">&-", "classify", "--model", checkpoint, "да")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--http-port", "0"]])
def test_a_reader_that_has_gone_ends_a_command_quietly(arguments: list[str]) -> None:
    done = call_into_a_closed_pipe(*arguments)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["--help"], ["check", "--http-port", "0", "--log-format", "console"]])
def test_a_full_disk_is_told_in_a_sentence(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run_into(full, *arguments)
    assert done.returncode == 1
    assert done.stderr == b"sentiment-worker: cannot read or write: No space left on device\n"


def test_who_has_no_home_keeps_nothing() -> None:
    code = (
        "import os, pwd; os.environ.pop('HOME', None); pwd.getpwuid = lambda _: {}['nobody'];"
        "from worker import cli; cli.COMMANDS['run'] = lambda _: print(*map(check._disk, ('org/name', 'builtin'))) or 0;"
        "from worker.commands import check; cli.main(['run'])"
    )
    done = call("-c", code, program=(sys.executable,), XDG_CACHE_HOME="", HF_HOME="")
    assert (done.returncode, done.stderr) == (0, "")
    assert "/dev/null/.cache/huggingface cannot be written (Not a directory); set HF_HOME" in done.stdout
    assert "nothing is written to disk" in done.stdout


# --- What is refused ---


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["--log-format", "json"], {}),
        (["--log-format=json"], {}),
        ([], {"WORKER_LOG_FORMAT": "json"}),
        ([], {}),
    ],
)
def test_why_it_ends_is_a_line_of_the_log_where_logs_are_json(arguments: list[str], variables: dict[str, str]) -> None:
    done = call("run", *arguments, "--linger-ms", "-1", **variables)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (done.returncode, line["level"], line["exit_code"]) == (2, "ERROR", 2)
    assert line["message"].startswith("linger_ms = '-1' is wrong: ")


def test_why_it_ends_is_a_plain_sentence_where_logs_are_not_json() -> None:
    done = call("run", "--log-format", "console", "--linger-ms", "-1")
    assert done.returncode == 2
    assert done.stderr.startswith("sentiment-worker: linger_ms = '-1' is wrong: ")


@pytest.mark.parametrize("arguments", [["nope"], ["train", "--nope"], ["demo", "--nope"], ["run", "--nope"]])
@pytest.mark.parametrize("chosen", ["", "json"])
def test_every_command_says_on_a_terminal_why_it_ends_unless_json_is_asked_for(
    arguments: list[str], chosen: str
) -> None:
    terminal, stderr = pty.openpty()
    done = subprocess.run(
        [*MODULE, *arguments],
        stderr=stderr,
        timeout=150,
        check=False,
        env=environment() | {"WORKER_LOG_FORMAT": chosen},
    )
    os.close(stderr)
    with os.fdopen(terminal, "rb") as said:
        line = said.readline().decode()
    assert done.returncode == 2
    assert line.startswith("{" if chosen else "sentiment-worker: ")


def test_a_file_of_settings_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "worker.toml").write_text("linger_ms = -1\n", encoding="utf-8-sig")
    assert refused("run", "--config", tmp_path / "worker.toml").startswith("linger_ms = -1 is wrong: ")


@pytest.mark.parametrize("name", ["nosuch", "Run", "--linger-ms", ""])
def test_an_unknown_command_is_refused(name: str) -> None:
    assert refused(name) == f"{name!r} is no command; `sentiment-worker --help` lists them"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--linger-ms", "soon"],
            "linger_ms = 'soon' is wrong: it should be a number (flag --linger-ms, variable WORKER_LINGER_MS)",
        ),
        (["--nosuch", "1"], "--nosuch is no flag; `sentiment-worker run --help` lists the flags"),
        (
            ["--CONFIG=missing.toml"],
            "--CONFIG is no flag; perhaps --config is meant; `sentiment-worker run --help` lists the flags",
        ),
        (
            ["--config", "missing.toml"],
            "config: missing.toml cannot be read (No such file or directory); it should be a TOML file",
        ),
        (
            ["--output-mode", "enrich", "--input-format", "text"],
            "output_mode enrich needs input_format json: a field can be added to a JSON object alone",
        ),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(arguments: list[str], sentence: str) -> None:
    assert refused("run", *arguments) == sentence


def test_a_wrong_variable_is_refused_in_one_line() -> None:
    assert refused("run", WORKER_HTTP_PORT="tcp://10.0.0.1:80").startswith("http_port = 'tcp://10.0.0.1:80' is wrong")


def test_sigterm_is_heard_before_the_worker_has_begun() -> None:
    """Process 1 of a container misses each signal that it has no handler for."""
    code = (
        "import os, signal, worker.settings.sources as sources; from worker.cli import main;"
        "sources.load = lambda *_: os.kill(os.getpid(), signal.SIGTERM); main(['run'])"
    )
    assert call("-c", code, program=(sys.executable,)).returncode == 0


@pytest.mark.parametrize("flag", [["--sasl-password", "hunter2"], ["--SASL-PASSWORD=hunter2"]])
def test_a_secret_is_refused_as_a_flag_without_repeating_it(flag: list[str]) -> None:
    sentence = refused("run", *flag)
    assert "WORKER_SASL_PASSWORD" in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize("arguments", [[], ["да", "--file", "texts.txt"], ["--file", "texts.txt", "-"]])
def test_classify_takes_one_source_of_texts(arguments: list[str]) -> None:
    assert refused("classify", *arguments) == (
        "classify takes one of: texts as arguments, --file FILE, or - for standard input"
    )


def test_classify_refuses_a_file_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    sentence = refused("classify", "--model", checkpoint, "--file", missing)
    assert sentence == f"file = {missing} cannot be read: No such file or directory"


def test_a_model_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    sentence = refused("classify", "--model", missing, "да")
    assert sentence.startswith(f"model is {missing}, but there is no such folder")


def test_a_checkpoint_with_other_labels_has_them_in_results(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "stars")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "one star", "1": "two stars", "2": "three stars"}
    (folder / "config.json").write_text(json.dumps(config))
    (result,) = results(forked("classify", "--model", folder, "--label-scores", "one star=-1", "да"))
    assert list(result["probabilities"]) == ["one star", "two stars", "three stars"]
    assert sum(result["probabilities"].values()) == pytest.approx(1, abs=2e-6), "softmax"
    assert result["score"] == -result["probabilities"]["one star"]
    assert result["model"].endswith("+label_scores=one star=-1,two stars=0,three stars=0")
    sentence = refused("classify", "--model", folder, "--model-labels", "1 star=bad", "да")
    assert sentence == (
        f"model_labels renames 1 star, which model {folder} does not have; it has: one star, two stars, three stars"
    )


def test_labels_of_a_checkpoint_reach_the_terminal_escaped(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "hostile")
    config = json.loads((folder / "config.json").read_text())
    label = '\x1b]0;gone\x07\n{"level": "INFO", "message": "forged"}\x9b31m'
    (folder / "config.json").write_text(
        json.dumps(config | {"id2label": {"0": label, "1": "neutral", "2": "positive"}})
    )
    sentence = refused("classify", "--model", folder, "да")
    assert sentence.isprintable()
    assert r"\u001b]0;gone\u0007\n{" in sentence


# --- Classify ---


def test_classify_scores_its_arguments_as_the_card_does(checkpoint: Path, oracle: Oracle) -> None:
    texts = ["Хорошо, но дорого", "", "  ", 'Не "очень", но [ладно', POISON, "слово " * 600]
    done = call("classify", "--model", checkpoint, *texts)
    lines = results(done)
    assert [line["id"] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    assert lines[1:3] == [{"id": "2", "reason": "empty_text"}, {"id": "3", "reason": "empty_text"}]
    assert lines[4] == {"id": "5", "reason": "inference_failed"}
    for line in (lines[0], lines[3], lines[5]):
        check_result(line, texts[int(line["id"]) - 1], checkpoint, oracle)
    assert done.stderr == ""


def check_result(line: dict[str, Any], text: str, checkpoint: Path, oracle: Oracle) -> None:
    probabilities = oracle.probabilities(text)
    assert list(line) == FIELDS
    assert list(line["probabilities"].values()) == pytest.approx(probabilities.tolist(), abs=1e-5)
    assert line["label"] == oracle.label(probabilities)
    assert line["score"] == pytest.approx(oracle.score(probabilities), abs=1e-5)
    assert line["truncated"] is oracle.is_truncated(text)
    assert re.fullmatch(rf"{re.escape(str(checkpoint))}@[0-9a-f]{{12}}", line["model"])
    assert (line["source"], line["event_time"]) == (None, None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["processed_at"])


def test_classify_evaluate_and_bench_score_long_texts_in_windows(checkpoint: Path, tmp_path: Path) -> None:
    windows = ("--model", checkpoint, "--long-text", "windows", "--max-windows", "3", "--cpu-threads", "1")
    name = re.compile(rf"{re.escape(str(checkpoint))}@[0-9a-f]{{12}}\+long_text=windows\+max_windows=3")
    texts = ["день", "день " * 600, "день " * 2_000]
    lines = results(forked("classify", *windows, *texts))
    assert [(line["windows"], line["truncated"]) for line in lines] == [(1, False), (2, False), (3, True)]
    assert list(lines[0]) == [*FIELDS[:5], "windows", *FIELDS[5:]]
    assert name.fullmatch(lines[0]["model"])
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"{text},{line['label']}\n" for text, line in zip(texts, lines, strict=True))
    )
    report = json.loads(
        forked("evaluate", *windows, "--source", f"long={tmp_path / 'rows.csv'}", "--format", "json").stdout
    )
    assert (report["overall"]["macro_f1"], report["overall"]["texts"]) == (1, 3)
    assert name.fullmatch(report["model"])
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    report = json.loads(
        forked("bench", *windows, "--file", tmp_path / "texts.txt", "--seconds", "0.01", "--json").stdout
    )
    assert name.fullmatch(report["model"])


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "processed_at"} for line in lines]


def test_classify_reads_the_lines_of_a_file_and_of_standard_input_alike(
    checkpoint: Path, oracle: Oracle, tmp_path: Path
) -> None:
    content = "Хорошо, но дорого\r\n\n  \n".encode() + b"\xff\n" + "«плохо»".encode()
    (tmp_path / "texts.txt").write_bytes(content)
    from_file = results(forked("classify", "--model", checkpoint, "--file", "texts.txt", folder=tmp_path))
    from_input = results(forked("classify", "--model", checkpoint, "-", stdin=content))
    assert without_time(from_file) == without_time(from_input)
    outcomes = [line.get("reason", "scored") for line in from_file]
    assert outcomes == ["scored", "empty_text", "empty_text", "invalid_utf8", "scored"]
    assert [line["id"] for line in from_file] == ["1", "2", "3", "4", "5"]
    check_result(from_file[0], "Хорошо, но дорого", checkpoint, oracle)
    check_result(from_file[4], "«плохо»", checkpoint, oracle)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_classify_reads_what_a_byte_order_mark_names(
    encoding: str, checkpoint: Path, oracle: Oracle, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("Хорошо, но дорого\r\n«плохо»", encoding=encoding, newline="")
    lines = results(forked("classify", "--model", checkpoint, "--file", tmp_path / "texts.txt"))
    assert len(lines) == 2
    check_result(lines[0], "Хорошо, но дорого", checkpoint, oracle)
    check_result(lines[1], "«плохо»", checkpoint, oracle)


def test_classify_fails_where_no_text_could_be_scored(checkpoint: Path) -> None:
    done = forked("classify", "--model", checkpoint, "-", stdin=b"\xff\n \n", WORKER_LOG_FORMAT="console")
    assert [json.loads(line)["reason"] for line in done.stdout.splitlines()] == ["invalid_utf8", "empty_text"]
    assert (done.returncode, done.stderr) == (
        1,
        "sentiment-worker: no text could be scored; the reason of each is in its line of the output\n",
    )


def test_a_line_of_a_slow_pipe_is_answered_before_the_next_one_comes(checkpoint: Path) -> None:
    command = [*MODULE, "classify", "--model", str(checkpoint), "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in ("1", "2"):
            process.stdin.write("да\n".encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == number
        process.stdin.close()
    assert process.returncode == 0


def test_texts_and_standard_input_do_not_mix() -> None:
    assert "one of" in refused("classify", "-", "Хорошо")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_is_full_is_told_in_a_line(checkpoint: Path) -> None:
    command = [*MODULE, "classify", "--model", str(checkpoint), "да"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment(), check=False, timeout=150)
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_misspelt_variable_is_told_by_every_command(checkpoint: Path) -> None:
    done = forked("classify", "да", WORKER_MODEL=str(checkpoint), WORKER_ACTIVATON="softmax", WORKER_LINGER_MS="5")
    assert json.loads(done.stderr)["message"] == (
        "the variable WORKER_ACTIVATON sets nothing; perhaps WORKER_ACTIVATION is meant"
    )
    assert len(results(done)) == 1


def test_settings_come_from_variables_too(checkpoint: Path) -> None:
    (line,) = results(forked("classify", "да", WORKER_MODEL=str(checkpoint), WORKER_ACTIVATION="softmax"))
    assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_a_reader_that_has_seen_enough_hears_no_complaint(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("да\n" * 5_000)
    command = [*MODULE, "classify", "--model", str(checkpoint), "--file", str(tmp_path / "texts.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["id"] == "1"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --- Bench ---


def test_bench_measures_every_engine_and_prints_settings_that_the_worker_takes(
    checkpoint: Path, tmp_path: Path
) -> None:
    done = forked("bench", "--model", "builtin", "--seconds", "0.05", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    engines = {(engine["backend"], engine["dtype"]) for engine in report["engines"]}
    assert {("torch", "float32"), ("onnx", "float32"), ("onnx", "int8")} <= engines
    exact = [engine for engine in report["engines"] if engine["is_exact"]]
    assert all(engine["agreement"] == 1 for engine in exact)
    assert all(speed > 0 for engine in report["engines"] for speed in engine["texts_per_s"].values())
    assert list(report["latency_ms"]) == ["1", "8", "32", "128", "512"]
    assert report["hours_per_million"] > 0
    (tmp_path / "worker.toml").write_text(report["settings"])
    load(RunSettings, ["--config", str(tmp_path / "worker.toml")], "sentiment-worker run")
    of_the_model = [line for line in report["settings"].splitlines() if not line.startswith("max_batch_texts")]
    (tmp_path / "model.toml").write_text("\n".join(of_the_model))
    with_settings = forked("classify", "--config", tmp_path / "model.toml", "--model", checkpoint, "да")
    assert results(with_settings)[0]["id"] == "1"


def test_bench_shows_a_table_and_lines_to_paste(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Хорошо, но дорого\n\nплохо\n")
    done = forked("bench", "--model", checkpoint, "--seconds", "0.05", "--file", tmp_path / "texts.txt")
    assert done.returncode == 0, done.stderr
    assert re.search(r"torch float32 +│", done.stdout)
    assert re.search(r"^max_batch_tokens = \d+$", done.stdout, re.MULTILINE)
    assert "A million texts take" in done.stdout
    assert "no line with a text" in refused("bench", "--model", checkpoint, "--file", "/dev/null")
