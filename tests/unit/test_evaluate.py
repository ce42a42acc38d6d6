import csv
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from worker.training.dataset import LabelledFile, is_held_out
from worker.training.evaluate import EvaluationReport, class_f1, confusion, evaluate, macro_f1

HAND_COUNTED = np.array([[3, 1, 0], [1, 2, 1], [0, 0, 2]])


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def test_f1_is_what_the_hand_computes() -> None:
    # negative: 3 of 4 found, 3 of 4 right; neutral: 2 of 4, 2 of 3; positive: 2 of 2, 2 of 3.
    assert class_f1(HAND_COUNTED) == pytest.approx([6 / 8, 4 / 7, 4 / 5])
    assert macro_f1(HAND_COUNTED) == pytest.approx((6 / 8 + 4 / 7 + 4 / 5) / 3)


def test_a_class_that_is_never_right_counts_as_zero_and_one_without_rows_not_at_all() -> None:
    assert macro_f1(np.array([[4, 0, 0], [4, 0, 0], [4, 0, 0]])) == pytest.approx((8 / 16) / 3)
    assert macro_f1(np.array([[3, 0, 1], [0, 0, 0], [0, 1, 3]])) == pytest.approx((6 / 7 + 6 / 8) / 2)
    assert np.isnan(macro_f1(np.zeros((3, 3), np.int64)))


def test_confusion_counts_true_rows_and_predicted_columns() -> None:
    assert confusion([0, 0, 1, 2], [0, 2, 1, 2]).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="longer"):
        confusion([0], [0, 1])


def test_report_sums_sources_and_speaks_table_markdown_and_json() -> None:
    report = EvaluationReport({"a": HAND_COUNTED, "b": np.diag([1, 1, 1])})
    assert report.overall.tolist() == (HAND_COUNTED + np.eye(3, dtype=int)).tolist()
    assert report.macro_f1 == macro_f1(report.overall)
    assert report.markdown().splitlines()[0] == "| Source | Macro F1 |"
    assert report.markdown().splitlines()[2:] == ["| a | 0.7071 |", "| b | 1.0000 |"]
    figures = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert figures["sources"]["a"]["macro_f1"] == 0.707143
    assert figures["overall"]["confusion"] == report.overall.tolist()
    assert figures["overall"]["texts"] == 13
    console = Console(width=100)
    with console.capture() as shown:
        console.print(report.table())
    assert [part in shown.get() for part in ("0.7071", "overall", "true \\ predicted")] == [True] * 3


def test_a_source_without_a_class_is_json_without_nan() -> None:
    figures = EvaluationReport({"two": np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1]])}).as_json()
    assert figures["sources"]["two"]["f1"] == {"negative": 1.0, "neutral": None, "positive": 1.0}


def test_evaluate_maps_labels_and_predicts_once_per_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("плохо", "-1"), ("хорошо", "1"), ("никак", "0")])
    source = LabelledFile("a", path, label_map={"-1": "negative", "0": "neutral", "1": "positive"})
    calls = []

    def predict(texts: list[str]) -> list[str]:
        calls.append(texts)
        return ["NEGATIVE", "positive", "positive"]

    report = evaluate(predict, [source])
    assert calls == [["плохо", "хорошо", "никак"]]
    assert report.matrices["a"].tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_evaluate_can_look_at_held_out_rows_alone(tmp_path: Path) -> None:
    texts = [f"текст {number}" for number in range(200)]
    source = LabelledFile("a", write(tmp_path / "a.csv", [(text, "neutral") for text in texts]))
    report = evaluate(lambda asked: ["neutral"] * len(asked), [source], held_out_only=True)
    assert report.overall.sum() == sum(map(is_held_out, texts)) > 0
    kept = next(text for text in texts if not is_held_out(text))
    with pytest.raises(ValueError, match="'b' has no held-out row"):
        evaluate(
            lambda asked: [], [LabelledFile("b", write(tmp_path / "b.csv", [(kept, "neutral")]))], held_out_only=True
        )


def test_a_label_that_is_no_class_is_refused(tmp_path: Path) -> None:
    source = LabelledFile("a", write(tmp_path / "a.csv", [("плохо", "negative")]))
    with pytest.raises(ValueError, match="'LABEL_0'"):
        evaluate(lambda texts: ["LABEL_0"], [source])


def test_a_model_that_answers_with_no_numbers_is_refused_with_a_sentence(tmp_path: Path) -> None:
    def predict(texts: list[str]) -> list[str]:
        raise FloatingPointError("the network answered with a logit that is not finite")

    with pytest.raises(ValueError, match="source 'a': the model does not answer with finite numbers"):
        evaluate(predict, [LabelledFile("a", write(tmp_path / "a.csv", [("плохо", "negative")]))])


def test_evaluate_holds_out_by_the_text_or_its_normal_form(tmp_path: Path) -> None:
    texts = [f"ТЕКСТ {number}" for number in range(200)]
    source = LabelledFile("a", write(tmp_path / "a.csv", [(text, "neutral") for text in texts]))
    for by in ("exact", "normalized"):
        seen: list[str] = []

        def predict(asked: list[str], seen: list[str] = seen) -> list[str]:
            seen += asked
            return ["neutral"] * len(asked)

        evaluate(predict, [source], held_out_only=True, hold_out_by=by)
        assert seen == [text for text in texts if is_held_out(text if by == "exact" else text.lower())]
