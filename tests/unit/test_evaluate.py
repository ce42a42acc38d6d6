import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

import worker
from worker.commands.evaluate import run
from worker.errors import WrongSetting
from worker.settings.commands import EvaluateSettings
from worker.settings.sources import load
from worker.training.classification_metrics import Floats, Matrix, macro_f1
from worker.training.dataset import CLASSES, Example, HoldOutBy, LabelledFile, is_held_out
from worker.training.evaluate import evaluate, in_order, read_rows
from worker.training.evaluation_report import Comparison, EvaluationReport, Predictions
from worker.training.predictions_file import check_predictions_path, write_predictions

HAND_COUNTED = np.array([[3, 1, 0], [1, 2, 1], [0, 0, 2]])


def write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def sure_of(labels: Sequence[int], classes: int = 3, confidence: float = 0.9) -> Floats:
    return np.where(np.arange(classes) == np.array(labels, int).reshape(-1, 1), confidence, 0.1)


def predictions(matrix: Matrix, source: str = "a") -> Predictions:
    """Rows and answers that have this confusion matrix."""
    cells = [(true, guess) for (true, guess), count in np.ndenumerate(matrix) for _ in range(int(count))]
    examples = [Example(source, f"text {number}", true) for number, (true, _) in enumerate(cells)]
    return Predictions(examples, sure_of([guess for _, guess in cells], len(matrix)))


def shown(renderable: RenderableType, width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


# --- the report ---


def test_report_sums_sources_and_speaks_table_markdown_and_json() -> None:
    report = EvaluationReport({"a": predictions(HAND_COUNTED), "b": predictions(np.diag([1, 1, 1]), "b")})
    assert report.overall.tolist() == (HAND_COUNTED + np.eye(3, dtype=int)).tolist()
    assert report.macro_f1 == macro_f1(report.overall)
    assert report.markdown().splitlines() == [
        "| Source | Macro F1 |",
        "| ----------- | ----------- |",
        "| a | 0.7071 |",
        "| b | 1.0000 |",
    ]
    figures = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert figures["sources"]["a"]["macro_f1"] == 0.707143
    assert figures["sources"]["a"]["f1"] == {"negative": 0.75, "neutral": 0.571429, "positive": 0.8}
    assert figures["sources"]["a"]["calibration_error"] == pytest.approx(0.9 - 7 / 10, abs=1e-6)
    assert figures["sources"]["b"]["calibration_error"] == pytest.approx(0.1)
    assert figures["overall"]["confusion"] == report.overall.tolist()
    assert figures["overall"]["texts"] == 13
    assert [part in shown(report.table()) for part in ("0.7071", "overall", "true \\ predicted", "0.2000")] == [
        True
    ] * 4


def test_a_source_without_a_class_says_so_in_each_form() -> None:
    report = EvaluationReport(
        {"two": predictions(np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1]])), "all": predictions(HAND_COUNTED)}
    )
    figures = report.as_json()["sources"]
    assert figures["two"]["f1"] == {"negative": 1.0, "neutral": None, "positive": 1.0}
    assert (figures["two"]["missing_classes"], figures["all"]["missing_classes"]) == (["neutral"], [])
    remark = "The macro F1 of two is over 2 of 3 classes: it has no row of neutral."
    assert report.remarks() == [remark]
    assert remark in shown(report.table())
    assert report.markdown().endswith("\n\n" + remark)


def test_many_classes_are_rows_of_a_table_and_few_are_columns() -> None:
    many = [f"emotion{number}" for number in range(28)]
    text = shown(EvaluationReport({"a": predictions(np.eye(28, dtype=int))}, many).table(), 60)
    assert all(name in text for name in many)
    assert "true \\ predicted" not in text


# --- asking the model ---


def test_evaluate_maps_labels_and_predicts_once_per_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("плохо", "-1"), ("хорошо", "1"), ("никак", "0")])
    source = LabelledFile("a", path, label_map={"-1": "negative", "0": "neutral", "1": "positive"})
    calls = []

    def predict(texts: list[str]) -> Floats:
        calls.append(texts)
        return sure_of([0, 2, 2])

    report = evaluate(predict, read_rows([source]))
    assert calls == [["плохо", "хорошо", "никак"]]
    assert report.overall.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_evaluate_can_look_at_held_out_rows_alone(tmp_path: Path) -> None:
    texts = [f"текст {number}" for number in range(200)]
    source = LabelledFile("a", write(tmp_path / "a.csv", [(text, "neutral") for text in texts]))
    rows = read_rows([source], held_out_by=["exact"])
    assert [row.text for row in rows["a"]] == [text for text in texts if is_held_out(text)]
    kept = next(text for text in texts if not is_held_out(text))
    with pytest.raises(ValueError, match="'b' has no held-out row"):
        read_rows([LabelledFile("b", write(tmp_path / "b.csv", [(kept, "neutral")]))], held_out_by=["exact"])


def test_rows_are_held_out_by_the_text_its_normal_form_or_both(tmp_path: Path) -> None:
    texts = [f"ТЕКСТ {number}" for number in range(2000)]
    source = LabelledFile("a", write(tmp_path / "a.csv", [(text, "neutral") for text in texts]))

    def held_out(*rules: HoldOutBy) -> set[str]:
        return {row.text for row in read_rows([source], held_out_by=rules)["a"]}

    assert held_out("normalized") == {text for text in texts if is_held_out(text.lower())}
    assert held_out("exact", "normalized") == held_out("exact") & held_out("normalized") != held_out("exact")


def test_what_is_compared_is_held_out_of_both() -> None:
    assert EvaluateSettings(model="builtin", against="./mine").held_out_rules() == {"exact", "normalized"}
    assert EvaluateSettings(model="builtin").held_out_rules() == {"exact"}
    assert EvaluateSettings(model="builtin", against="./mine", hold_out_by="exact").held_out_rules() == {"exact"}


def test_columns_follow_the_names_of_labels_and_other_labels_are_refused() -> None:
    predict = in_order(lambda texts: np.array([[1.0, 2.0, 3.0]]), ["c", "a", "b"], ["a", "b", "c"])
    assert predict(["x"]).tolist() == [[2.0, 3.0, 1.0]]
    with pytest.raises(ValueError, match="its labels are a, b, and what it is compared with has a, c"):
        in_order(predict, ["a", "b"], ["a", "c"])


def test_a_model_that_answers_with_no_numbers_is_refused_with_a_sentence() -> None:
    def predict(texts: list[str]) -> Floats:
        raise FloatingPointError("the network answered with a logit that is not finite")

    with pytest.raises(ValueError, match="source 'a': the model does not answer with finite numbers"):
        evaluate(predict, {"a": [Example("a", "плохо", 0)]})


# --- two models ---


def test_a_comparison_says_which_model_is_better_or_that_it_cannot_be_said() -> None:
    rows = [Example("a", str(place), place % 3) for place in range(300)]
    truth = [row.label for row in rows]
    right = EvaluationReport({"a": Predictions(rows, sure_of(truth))})
    worse = EvaluationReport({"a": Predictions(rows, sure_of([*truth[:200], *[0] * 100]))})
    doubtful = EvaluationReport({"a": Predictions(rows, sure_of([*truth[:299], 0]))})
    assert "one is better than two on these rows" in shown(Comparison(right, worse, ("one", "two")).table())
    assert "two is worse than one" in Comparison(worse, right, ("two", "one")).verdict()
    assert "do not say which of one and two is better" in Comparison(right, doubtful, ("one", "two")).verdict()
    figures = json.loads(json.dumps(Comparison(right, worse, ("one", "two")).as_json()))
    assert figures["model"] == "two"
    assert figures["overall"]["difference"] == pytest.approx(1 - worse.macro_f1, abs=1e-6)
    low, high = figures["sources"]["a"]["interval"]
    assert 0 < low < figures["sources"]["a"]["difference"] < high


# --- predictions ---

ROWS = [
    Example("a", "верно", 0),
    Example("a", "совсем,\nневерно", 1),
    Example("b", "почти", 2),
    Example("b", "едва", 2),
]
ANSWERS = np.array([[0.9, 0.2, 0.1], [0.95, 0.05, 0.1], [0.1, 0.5, 0.4], [0.1, 0.4, 0.5]])
REPORT = EvaluationReport({"a": Predictions(ROWS[:2], ANSWERS[:2]), "b": Predictions(ROWS[2:], ANSWERS[2:])})


def test_predictions_are_csv_that_can_be_read_as_a_source_worst_first(tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    write_predictions(path, REPORT)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["совсем,\nневерно", "почти", "едва", "верно"]
    assert rows[0] == {
        "source": "a", "text": "совсем,\nневерно", "label": "neutral", "predicted": "negative",
        "probability_negative": "0.95", "probability_neutral": "0.05", "probability_positive": "0.1",
    }  # fmt: skip
    assert {row.label for row in read_rows([LabelledFile("again", path)])["again"]} == {0, 1, 2}


def test_predictions_are_json_lines_with_the_other_models_label(tmp_path: Path) -> None:
    path = tmp_path / "all.JSONL"
    other = EvaluationReport({name: Predictions(e.examples, sure_of([2, 2])) for name, e in REPORT.predictions.items()})
    write_predictions(path, REPORT, other)
    first, *_, last = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first == {
        "source": "a", "text": "совсем,\nневерно", "label": "neutral", "predicted": "negative", "against": "positive",
        "probabilities": {"negative": 0.95, "neutral": 0.05, "positive": 0.1},
    }  # fmt: skip
    assert last["text"] == "верно"


def test_a_place_for_predictions_is_checked_before_anything_is_measured(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "x.txt", "should end in .csv or .jsonl"),
        (tmp_path / "nowhere" / "x.csv", "cannot be written: No such file or directory"),
    ):
        with pytest.raises(ValueError, match=message):
            check_predictions_path(path)
    check_predictions_path(tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists(), "what fails later leaves no empty file"
    (tmp_path / "x.csv").write_text("before")
    check_predictions_path(tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "before"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against-revision", "v2"], "against_revision goes with against"),
        (["--against", "builtin", "--against-revision", "v2"], "against_revision is of the hub, and model builtin"),
    ],
)
def test_a_revision_needs_a_model_of_the_hub(flags: list[str], message: str) -> None:
    with pytest.raises(WrongSetting, match=message):
        load(EvaluateSettings, flags, "sentiment-worker evaluate", {})


def test_the_classes_of_a_report_are_those_of_training() -> None:
    assert EvaluationReport({}).classes == CLASSES
    assert np.isnan(EvaluationReport({}).macro_f1)


# --- the command ---

BUILTIN = Path(worker.__file__).parent / "model" / "builtin"
QUICK = {"model": "builtin", "cpu_threads": 1, "max_batch_tokens": 1024}


def test_the_command_compares_two_checkpoints_and_writes_what_the_first_says(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    other = shutil.copytree(BUILTIN, tmp_path / "other")
    with (BUILTIN / "demo.csv").open(encoding="utf-8", newline="") as file:
        source = write(tmp_path / "rows.csv", [(row["text"], row["label"]) for row in csv.DictReader(file)][:60])
    asked = {"source": [f"demo={source}"], "against": str(other), "predictions": tmp_path / "said.jsonl"}
    assert run(EvaluateSettings(format="json", **QUICK, **asked)) == 0  # type: ignore[arg-type]
    figures = json.loads(capfdbinary.readouterr().out)
    assert figures["model"].startswith("builtin@")
    assert figures["against"]["model"].startswith(f"{other}@")
    assert figures["overall"]["macro_f1"] == figures["against"]["overall"]["macro_f1"]
    assert figures["against"]["overall"]["interval"] == [0.0, 0.0]
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == figures["overall"]["texts"] == 60
    wrong = [line["label"] != line["predicted"] for line in lines]
    assert wrong == sorted(wrong, reverse=True)
    assert {line["against"] == line["predicted"] for line in lines} == {True}
    assert run(EvaluateSettings(**QUICK, **asked)) == 0  # type: ignore[arg-type]
    assert b"is better: the interval holds 0." in b" ".join(capfdbinary.readouterr().out.split())


def test_the_command_refuses_a_place_for_predictions_before_it_loads_a_model(tmp_path: Path) -> None:
    asked = {"source": [f"demo={BUILTIN / 'demo.csv'}"], "predictions": tmp_path / "said.txt"}
    with pytest.raises(WrongSetting, match=r"said.txt should end in .csv or .jsonl"):
        run(EvaluateSettings(model="./nowhere", **asked))  # type: ignore[arg-type]


def test_the_command_does_not_overwrite_its_rows_with_predictions(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.csv", [("хорошо", "positive")])
    (tmp_path / "link.csv").symlink_to(source)
    before = source.read_bytes()
    for path in (source, tmp_path / "link.csv"):
        asked = {"source": [str(source)], "predictions": path}
        with pytest.raises(WrongSetting, match=r"--predictions .* is a source, whose rows would be overwritten"):
            run(EvaluateSettings(**QUICK, **asked))  # type: ignore[arg-type]
    assert source.read_bytes() == before


def test_a_checkpoint_whose_labels_are_renamed_is_compared_with_one_that_has_these_names(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    other = shutil.copytree(BUILTIN, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    (other / "config.json").write_text(json.dumps(config))
    rows = write(tmp_path / "rows.csv", [("хорошо", "positive"), ("плохо", "negative")])
    names = "LABEL_0=negative,LABEL_1=neutral,LABEL_2=positive"
    asked = {**QUICK, "model": str(other), "model_labels": names, "against": "builtin", "source": [str(rows)]}
    assert run(EvaluateSettings(format="json", **asked)) == 0  # type: ignore[arg-type]
    figures = json.loads(capfdbinary.readouterr().out)
    assert figures["model"].endswith(f"+model_labels={names}")
    assert "+" not in figures["against"]["model"]
    assert figures["against"]["overall"]["difference"] == 0
