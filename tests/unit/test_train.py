import csv
import hashlib
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import worker
from worker.core.sentiment import CARD
from worker.errors import WrongSetting
from worker.model.sentiment_model import SentimentModel
from worker.settings.commands import EvaluateSettings, TrainSettings
from worker.settings.sources import load
from worker.training.best_epoch import BestEpoch
from worker.training.classification_metrics import Floats
from worker.training.dataset import (
    CLASSES,
    Example,
    LabelledFile,
    balanced_counts,
    draw,
    is_held_out,
    near_copy_key,
    parse_sources,
    part_of,
    read_source,
    repetitions,
)
from worker.training.evaluate import evaluate, read_rows
from worker.training.model_card import command
from worker.training.optimisation import WeightMean, shuffled_batches
from worker.training.progress import Progress, ProgressView
from worker.training.train import train
from worker.training.training_run import Diverged, Interrupted

BUILTIN = Path(worker.__file__).parent / "model" / "builtin"
WORDS = {
    "negative": ["плохо", "ужас", "брак"],
    "neutral": ["средне", "сойдёт", "пойдёт"],
    "positive": ["отлично", "супер", "класс"],
}


def write(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def obvious(path: Path, count: int = 150) -> Path:
    """Rows whose words give their class away, and some characters too rare to be learned."""
    rng = random.Random(7)
    rows = []
    for name, words in WORDS.items():
        for number in range(count):
            rare = chr(ord("α") + number) if number < 24 else ""
            rows.append((" ".join([*rng.choices(words, k=3), f"вещь{number}{rare}"]), name))
    return write(path, rows)


def tiny(output: Path, source: Path, **changes: object) -> tuple[TrainSettings, list[LabelledFile]]:
    settings: dict[str, object] = {
        "epochs": 6, "batch_texts": 16, "learning_rate": 3e-3, "max_tokens": 16, "token_masking": 0.0, "averaging": 0.5,
        "pretrain_epochs": 2, "pretrain_max_tokens": 16, "vocabulary": 120, "layers": 1, "hidden": 32, "threads": 1,
        "device": "cpu",
    }  # fmt: skip
    return TrainSettings(output=output, **(settings | changes)), [LabelledFile("obvious", source)]  # type: ignore[arg-type]


# --- the held-out rule ---


def test_parts_follow_the_last_byte_of_the_sha256() -> None:
    for number in range(500):
        text = f"Отзыв {number}"
        last = int(hashlib.sha256(text.encode("utf-8")).hexdigest()[-2:], 16)
        assert part_of(text) == ("held-out" if last < 26 else "development" if last < 52 else "training")
        assert is_held_out(text) == (last < 26)


def test_near_copies_of_a_text_are_held_out_together() -> None:
    copies = [
        "Всё\u00a0было  хорошо, мой друг",
        "все было хорошо, мой друг ",
        "ВСЕ\u0308 БЫ\u0301ЛО ХОРОШО, МОИ\u0306 ДРУГ",
    ]
    assert len({near_copy_key(text) for text in copies}) == 1
    assert near_copy_key("мои друг") != near_copy_key("мой друг")
    for number in range(200):
        assert len({part_of(f"{text} {number}", "normalized") for text in copies}) == 1
        assert part_of(f"все {number}", "normalized") == part_of(f"все {number}")


def test_the_shipped_checkpoint_keeps_its_split() -> None:
    assert EvaluateSettings(model="builtin").rows_held_out_by("builtin") == "exact"
    assert EvaluateSettings(model="./mine").rows_held_out_by("./mine") == "normalized"
    options = TrainSettings(output=Path("x"))
    assert (options.rows_held_out_by(None), options.rows_held_out_by("builtin")) == ("normalized", "exact")
    assert TrainSettings(output=Path("x"), hold_out_by="exact").rows_held_out_by(None) == "exact"


# --- balancing ---


def of_sizes(sizes: dict[tuple[str, int], int]) -> list[Example]:
    return [Example(name, f"{name}{label}{n}", label) for (name, label), size in sizes.items() for n in range(size)]


def test_an_epoch_has_each_class_and_in_it_each_source_as_often() -> None:
    sizes = {("a", 0): 90, ("a", 1): 30, ("a", 2): 6, ("b", 0): 4, ("b", 1): 50, ("b", 2): 60}
    examples = of_sizes(sizes)
    counts = balanced_counts(examples, max_repeats=8, per_class=60)
    assert counts == dict.fromkeys(sizes, 30)
    drawn = [examples[place] for place in draw(examples, counts, random.Random(1))]
    assert Counter((example.source, example.label) for example in drawn) == counts
    for (name, label), size in sizes.items():
        times = Counter(e.text for e in drawn if (e.source, e.label) == (name, label))
        assert len(times) == min(size, 30)
        assert max(times.values()) - min(times.values()) <= 1


def test_each_epoch_is_drawn_anew() -> None:
    examples = of_sizes({("a", 0): 90, ("a", 1): 30, ("a", 2): 60})
    counts, rng = balanced_counts(examples, max_repeats=5), random.Random(1)
    first, second = draw(examples, counts, rng), draw(examples, counts, rng)
    assert Counter(first) != Counter(second)
    assert first == draw(examples, counts, random.Random(1))


def test_an_epoch_keeps_the_total_and_gives_a_missing_class_to_the_other_sources() -> None:
    examples = [Example("a", f"a{n}", n % 3) for n in range(60)] + [Example("b", f"b{n}", 0) for n in range(30)]
    assert balanced_counts(examples, max_repeats=5) == {("a", 0): 15, ("b", 0): 15, ("a", 1): 30, ("a", 2): 30}


def test_no_row_stands_more_than_so_often_and_other_sources_give_what_is_missing() -> None:
    sizes = {("a", 0): 2, ("b", 0): 50, ("c", 0): 7, ("a", 1): 60, ("a", 2): 4}
    counts = balanced_counts(of_sizes(sizes), max_repeats=3, per_class=60)
    assert counts == {("a", 0): 6, ("b", 0): 33, ("c", 0): 21, ("a", 1): 60, ("a", 2): 12}
    drawn = Counter(draw(of_sizes(sizes), counts, random.Random(1)))
    assert max(drawn.values()) == 3


def test_an_epoch_needs_rows_of_each_class() -> None:
    with pytest.raises(ValueError, match="'positive'"):
        balanced_counts([Example("a", "x", 0), Example("a", "y", 1)], max_repeats=5)


def test_repeated_texts_and_those_with_two_labels_are_counted() -> None:
    rows = [("Ещё раз", 0), ("еще  раз", 0), ("нет", 1), ("НЕТ", 2), ("нет", 2), ("один", 1)]
    assert repetitions(Example("a", text, label) for text, label in rows) == (3, 1)


# --- sources ---


def test_sources_are_parsed_from_command_line_words() -> None:
    maps = ["a:-1=negative", "a:x=y=positive", "a:skip="]
    one, two = parse_sources(["a=x/y.csv", "z.csv"], maps, ["body"], ["z=mark"])
    assert one == LabelledFile("a", Path("x/y.csv"), "body", "label", {"-1": "negative", "x=y": "positive", "skip": ""})
    assert two == LabelledFile("z", Path("z.csv"), "body", "mark", {})
    one, two = parse_sources(["a=x/y.csv", "z.csv"], (), ["a=x=y", "body"])
    assert (one.text_column, two.text_column) == ("x=y", "body")


@pytest.mark.parametrize(
    ("sources", "maps", "message"),
    [
        ([], [], "at least one --source"),
        (["=x.csv"], [], "not NAME=PATH"),
        (["a="], [], "not NAME=PATH"),
        (["a=1.csv", "a=2.csv"], [], "'a' twice"),
        (["a=1.csv"], ["-1=negative"], "not NAME:RAW=CLASS"),
        (["a=1.csv"], ["a:-1=bad"], "the classes are negative, neutral, positive"),
        (["a=1.csv"], ["b:-1=negative"], "no --source; there is a"),
        (["a=1.csv"], ["a=skip"], "or reviews:skip= to drop"),
    ],
)
def test_wrong_source_words_say_what_is_right(sources: list[str], maps: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sources(sources, maps)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["b=body"], "--text-column names 'b', which is no --source; there is a"),
        (["a="], "names no column"),
        (["one", "two"], "two columns of the same source"),
        (["a=one", "a=two"], "two columns of the same source"),
    ],
)
def test_wrong_columns_say_what_is_right(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sources(["a=1.csv"], (), words)


def test_columns_are_set_by_flags_and_files(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('text_column = "body"\n')
    flags = ["--output=x", "--label-column=a=mark", "--label-column", "b=x,y", f"--config={tmp_path / 'x.toml'}"]
    settings = load(TrainSettings, flags, "sentiment-worker train", {})
    assert (settings.text_column, settings.label_column) == (["body"], ["a=mark", "b=x,y"])


def test_rows_of_a_dropped_label_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("Хорошо", "positive"), ("???", "skip"), ("плохо", "negative")])
    kept = [Example("a", "Хорошо", 2), Example("a", "плохо", 0)]
    assert read_source(LabelledFile("a", path, label_map={"skip": ""})) == kept
    whole = {"skip": "", "positive": "positive", "negative": "negative"}
    assert read_source(LabelledFile("a", path, label_map=whole)) == kept


def test_a_source_is_read_with_its_own_columns_and_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("1", "Хорошо,\nда"), ("-1", "плохо"), ("0", "  ")], ("mark", "body"))
    source = LabelledFile("a", path, "body", "mark", {"-1": "negative", "0": "neutral", "1": "positive"})
    assert read_source(source) == [Example("a", "Хорошо,\nда", 2), Example("a", "плохо", 0)]


def test_unreadable_sources_name_the_source_and_quote_no_text(tmp_path: Path) -> None:
    def message(content: bytes | None, **changes: object) -> str:
        path = tmp_path / "a.csv"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="'shop'") as error:
            read_source(LabelledFile("shop", path, **changes))  # type: ignore[arg-type]
        assert "тайна" not in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "cannot be read" in message(None)
    assert "no column 'label'; it has text, mark" in message("text,mark\nтайна,1\n".encode())
    assert "no column 'text'" in message(b"")
    assert "('2')" in message("text,label\nтайна,2\n".encode())
    assert "--label-map shop:RAW=CLASS, or drop its rows" in message("text,label\nтайна,2\n".encode())
    assert "too few columns" in message("text,label\nтайна\n".encode())
    assert "not UTF-8" in message("text,label\nтайна,neutral\n".encode("cp1251"))
    assert "no row" in message(b"text,label\n")
    assert "names 'bad'" in message(b"text,label\nx,1\n", label_map={"1": "bad"})


# --- training ---


def test_batches_hold_every_row_once_and_like_lengths_together() -> None:
    rng = random.Random(3)
    lengths = [rng.randint(2, 100) for _ in range(1000)]
    batches = shuffled_batches(lengths, 16, rng)
    assert sorted(place for batch in batches for place in batch) == list(range(1000))
    assert max(map(len, batches)) == 16
    padded = sum(max(lengths[place] for place in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


def test_a_tiny_training_learns_loads_and_repeats_itself(tmp_path: Path) -> None:
    source = obvious(tmp_path / "obvious.csv")
    seen: list[Progress] = []
    result = train(*tiny(tmp_path / "one", source), seen.append)
    assert result.report.macro_f1 > 0.9
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == ["masked tokens", "fine-tuning", "measuring"]
    assert all(progress.done <= progress.total for progress in seen)

    train(*tiny(tmp_path / "two", source), seen.append)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert network.config.id2label == dict(enumerate(CLASSES))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.model_max_length == 16
    assert tokenizer.backend_tokenizer.truncation is None
    logits = network(**tokenizer(["ужас брак плохо", "супер класс отлично"], padding=True, return_tensors="pt")).logits
    scores = torch.sigmoid(logits) @ torch.tensor([-1.0, 0.0, 1.0])
    assert scores[0] < -0.2 < 0.2 < scores[1]
    card = (tmp_path / "one" / "README.md").read_text()
    assert "| Source | Macro F1 |" in card
    assert "--source obvious=obvious.csv" in card
    assert str(tmp_path) not in card

    # The checkpoint is itself a base to go on from.
    again = tiny(tmp_path / "tuned", source, base=str(tmp_path / "one"), epochs=1, storage="float32")
    tuned = train(*again, seen.append)
    assert tuned.report.macro_f1 > 0.9
    assert "one fine-tuned" in (tmp_path / "tuned" / "README.md").read_text()


QUICK = {"pretrain_epochs": 0, "consistency": 0.0, "storage": "float32"}


def quiet(progress: Progress) -> None:
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows the obvious rows."""
    folder = tmp_path_factory.mktemp("base")
    train(*tiny(folder / "base", obvious(folder / "obvious.csv"), **QUICK), quiet)
    return folder / "base"


def changed(base: Path, folder: Path, labels: list[str], change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint with other names of labels and other weights."""
    shutil.copytree(base, folder)
    config = json.loads((base / "config.json").read_text())
    config |= {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def permute(weights: dict[str, Tensor]) -> None:
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][[2, 0, 1]].clone()


def head_of(folder: Path) -> Tensor:
    return load_file(folder / "model.safetensors")["classifier.weight"]


def test_the_heads_rows_follow_the_names_of_the_bases_labels(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = changed(base, tmp_path / "other", ["Positive", "negative", "neutral"], permute)
    options, sources = tiny(
        tmp_path / "tuned", base.parent / "obvious.csv", base=str(other), **QUICK | {"epochs": 1, "learning_rate": 1e-9}
    )
    assert train(options, sources, quiet).report.macro_f1 > 0.9
    assert torch.allclose(head_of(options.output), head_of(base), atol=1e-4)
    config = json.loads((options.output / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in enumerate(CLASSES)}
    assert not caplog.messages
    assert SentimentModel.load(str(options.output), cpu_threads=1, max_batch_tokens=512).labels == CARD, (
        "sigmoid by auto"
    )


@pytest.mark.parametrize("labels", [["toxic", "so so", "\x1b[31mfine"], ["1 star", "2 stars", "3 stars", "4 stars"]])
def test_a_head_of_other_labels_is_made_new_and_that_is_said(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture, labels: list[str]
) -> None:
    def of_as_many(weights: dict[str, Tensor]) -> None:
        weights["classifier.weight"] = torch.full((len(labels), 32), 3.0)
        weights["classifier.bias"] = torch.zeros(len(labels))

    other = changed(base, tmp_path / "other", labels, of_as_many)
    options, sources = tiny(
        tmp_path / "tuned", base.parent / "obvious.csv", base=str(other), **QUICK | {"epochs": 1, "learning_rate": 1e-9}
    )
    train(options, sources, quiet)
    assert head_of(options.output).abs().max() < 1
    (said,) = caplog.messages
    assert repr(labels[0]) in said
    assert "made new, and not taken from it: classifier.bias, classifier.weight" in said
    assert "\x1b" not in said
    assert said in (options.output / "README.md").read_text()


def test_a_training_that_diverges_ends_at_once_and_writes_nothing(tmp_path: Path) -> None:
    source, steps = obvious(tmp_path / "obvious.csv"), list[Progress]()
    for changes, stage in (
        ({"learning_rate": 1e30, "pretrain_epochs": 0}, "fine-tuning"),
        ({"pretrain_learning_rate": 1e30}, "masked tokens"),
    ):
        options, sources = tiny(tmp_path / "out", source, **changes)
        with pytest.raises(
            Diverged, match=rf"at step \d+ of \d+ \({stage}\) the loss is no finite number; take a lower"
        ) as end:
            train(options, sources, steps.append)
        assert end.value.exit_code == 1
        assert len(steps) < 10
        assert not list(options.output.iterdir())
        steps.clear()


def test_weights_that_their_storage_cannot_hold_are_not_written(tmp_path: Path, base: Path) -> None:
    def enlarge(weights: dict[str, Tensor]) -> None:
        weights["bert.embeddings.word_embeddings.weight"] *= 1e6

    large = changed(base, tmp_path / "large", list(CLASSES), enlarge)
    changes = QUICK | {"base": str(large), "epochs": 1, "learning_rate": 1e-9, "storage": "float16"}
    options, sources = tiny(tmp_path / "out", base.parent / "obvious.csv", **changes)
    with pytest.raises(Diverged, match=r"word_embeddings.weight holds what is no finite number in float16.*float32"):
        train(options, sources, quiet)
    assert not list(options.output.iterdir())


def test_weights_that_are_no_numbers_are_no_base(tmp_path: Path, base: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["bert.pooler.dense.bias"][3] = torch.nan

    broken = changed(base, tmp_path / "broken", list(CLASSES), damage)
    with pytest.raises(ValueError, match=r"weights that are no finite numbers \(bert.pooler.dense.bias\)"):
        train(*tiny(tmp_path / "out", base.parent / "obvious.csv", base=str(broken)), quiet)


def test_a_base_chooses_no_attention_of_the_hub(tmp_path: Path, base: Path) -> None:
    other = changed(base, tmp_path / "other", list(CLASSES), lambda _: None)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"_attn_implementation": "kernels-community/evil@main"}))
    options, sources = tiny(
        tmp_path / "tuned", base.parent / "obvious.csv", base=str(other), **QUICK | {"epochs": 1, "learning_rate": 1e-9}
    )
    train(options, sources, quiet)  # it would have asked for the package kernels, or loaded it
    assert torch.allclose(head_of(options.output), head_of(base), atol=1e-4)


def test_a_damaged_base_is_refused_with_a_sentence(tmp_path: Path, base: Path) -> None:
    shutil.copytree(base, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"--base .*cut cannot be loaded"):
        train(*tiny(tmp_path / "out", base.parent / "obvious.csv", base=str(tmp_path / "cut")), quiet)


def interrupt_at(stage: str, done: int) -> Callable[[Progress], None]:
    """Ctrl-C after that step of that stage."""

    def report(progress: Progress) -> None:
        if (progress.stage, progress.done) == (stage, done):
            signal.raise_signal(signal.SIGINT)

    return report


def test_ctrl_c_keeps_and_measures_the_weights_so_far(tmp_path: Path) -> None:
    options, sources = tiny(tmp_path / "out", obvious(tmp_path / "obvious.csv"), **QUICK)
    result = train(options, sources, interrupt_at("fine-tuning", 80))
    assert result.interrupted
    assert result.report.macro_f1 > 0.9
    card = (options.output / "README.md").read_text()
    assert "Fine-tuning was interrupted after 80 of " in card
    assert f"| obvious | {result.report.macro_f1:.4f} |" in card
    AutoModelForSequenceClassification.from_pretrained(options.output)


# --- epochs and averages ---


def test_the_mean_after_the_best_epoch_is_kept_and_training_stops_after_so_many_worse_ones() -> None:
    parameter = torch.zeros(3)
    scores, measured = [0.5, 0.7, 0.7, 0.6, 0.9], list[float]()
    mean = WeightMean([parameter], 0.0)

    def measure() -> float:
        measured.append(float(parameter[0]))
        return scores[len(measured) - 1]

    best = BestEpoch(mean, steps=20, epochs=5, measure=measure, patience=2)
    ended = next(step for step in range(1, 21) if parameter.fill_(step) is not None and best.stepped(step))
    assert ended == 16  # the fourth epoch: the third is no better than the second, only as good
    assert measured == [4, 8, 12, 16]
    assert best.best_epoch == 2
    assert best.weights()[0].tolist() == [8, 8, 8]
    assert parameter.tolist() == [16, 16, 16]


def test_without_patience_the_last_epoch_is_kept() -> None:
    parameter = torch.zeros(1)
    scores = iter([0.9, 0.1, 0.1])
    best = BestEpoch(WeightMean([parameter], 0.0), 6, 3, lambda: next(scores))
    assert not any(best.stepped(step) for step in range(1, 7) if parameter.fill_(step) is not None)
    assert best.scores == [0.9, 0.1, 0.1]
    assert best.weights()[0].item() == 6


def test_measuring_sees_the_mean_and_leaves_the_weights_as_they_were() -> None:
    parameter = torch.tensor([1.0])
    mean = WeightMean([parameter], 0.9)
    for step, value in enumerate((3.0, 5.0), 1):
        parameter.fill_(value)
        mean.add(step)
    (expected,) = mean.values()
    with mean.in_place():
        assert parameter.item() == expected.item() != 5.0
    assert parameter.item() == 5.0


def test_patience_trains_without_development_rows_and_says_what_it_chose(tmp_path: Path) -> None:
    source = obvious(tmp_path / "obvious.csv")
    rows = [(example.text, CLASSES[example.label]) for example in read_source(LabelledFile("o", source))]
    marked = [(text + " ъъ" * (part_of(text + " ъъ", "normalized") == "development"), label) for text, label in rows]
    assert sum("ъъ" in text for text, _ in marked) > 10
    write(source, marked)
    seen: list[Progress] = []
    options, sources = tiny(tmp_path / "out", source, **QUICK | {"epochs": 8, "patience": 2})
    result = train(options, sources, seen.append)
    assert result.report.macro_f1 > 0.9
    assert not result.interrupted
    lines = [progress.line for progress in seen if progress.line]
    epochs = [line for line in lines if "epoch" in line and "development macro F1" in line]
    assert 3 <= len(epochs) < 8
    assert epochs[0].startswith("Fine-tuning, epoch 1: development macro F1 0.")
    best = max(range(len(epochs)), key=lambda place: float(epochs[place].split()[-1][:-1])) + 1
    assert f"Fine-tuning: the weights after epoch {best} are kept." in lines
    card = (options.output / "README.md").read_text()
    assert all(line in card for line in lines)
    assert "were put aside, and the epoch was chosen by them." in card
    assert "--patience 2" in card
    assert "ъ" not in "".join(AutoTokenizer.from_pretrained(options.output).get_vocab())


def test_an_average_is_the_mean_of_fine_tunings_from_one_start(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[list[Tensor]] = []
    weights_of = BestEpoch.weights

    def recorded(self: BestEpoch) -> list[Tensor]:
        results.append(weights_of(self))
        return results[-1]

    monkeypatch.setattr(BestEpoch, "weights", recorded)
    source = base.parent / "obvious.csv"
    changes = QUICK | {"epochs": 1, "development": True}
    seen: list[Progress] = []
    options, sources = tiny(tmp_path / "one", source, base=str(base), **changes)
    train(options, sources, quiet)
    options, sources = tiny(tmp_path / "three", source, base=str(base), fine_tunings=3, **changes)
    assert train(options, sources, seen.append).report.macro_f1 > 0.9
    alone, first, second, third = results
    assert all(torch.equal(one, other) for one, other in zip(alone, first, strict=True))
    assert not torch.equal(second[0], first[0])
    head = (first[-2] + second[-2] + third[-2]) / 3
    assert torch.allclose(head_of(options.output), head, atol=1e-6)
    # All begin at the base, so that none is much further from it than the first.
    start = [weights.data for weights in AutoModelForSequenceClassification.from_pretrained(base).parameters()]
    moved = [float((result[0] - start[0]).norm()) for result in (first, second, third)]
    assert max(moved) < 1.5 * min(moved)
    stages = list(dict.fromkeys(p.stage for p in seen if p.stage.startswith("fine-tuning")))
    assert stages == ["fine-tuning 1 of 3", "fine-tuning 2 of 3", "fine-tuning 3 of 3"]
    assert any(progress.line.startswith("Mean of 3 fine-tunings: development macro F1") for progress in seen)
    card = (options.output / "README.md").read_text()
    assert "the mean of 3 fine-tunings from the same start" in card
    assert "--fine-tunings 3" in card


def test_an_average_repeats_itself(tmp_path: Path) -> None:
    source = obvious(tmp_path / "obvious.csv")
    for name in ("one", "two"):
        train(*tiny(tmp_path / name, source, **QUICK | {"epochs": 2, "fine_tunings": 2, "patience": 1}), quiet)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_ctrl_c_in_a_later_fine_tuning_keeps_those_before_it(tmp_path: Path, base: Path) -> None:
    changes = QUICK | {"epochs": 1, "base": str(base)}
    source = base.parent / "obvious.csv"
    alone, sources = tiny(tmp_path / "one", source, **changes)
    train(alone, sources, quiet)
    options, sources = tiny(tmp_path / "three", source, fine_tunings=3, **changes)
    assert train(options, sources, interrupt_at("fine-tuning 2 of 3", 3)).interrupted
    assert torch.equal(head_of(options.output), head_of(alone.output))
    card = (options.output / "README.md").read_text()
    assert "Fine-tuning 2 of 3 was interrupted after 3 of " in card
    assert "the mean of the finished ones (1) is kept" in card


def test_ctrl_c_at_the_last_step_of_a_fine_tuning_ends_an_average_and_not_a_training_of_one(
    tmp_path: Path, base: Path
) -> None:
    def at_the_last_step(progress: Progress) -> None:
        if progress.stage.startswith("fine-tuning") and progress.done == progress.total:
            signal.raise_signal(signal.SIGINT)

    changes = QUICK | {"epochs": 1, "base": str(base)}
    source = base.parent / "obvious.csv"
    assert not train(*tiny(tmp_path / "one", source, **changes), at_the_last_step).interrupted
    assert train(*tiny(tmp_path / "two", source, fine_tunings=2, **changes), at_the_last_step).interrupted
    assert torch.equal(head_of(tmp_path / "one"), head_of(tmp_path / "two"))


def test_patience_needs_development_rows(tmp_path: Path) -> None:
    source = obvious(tmp_path / "obvious.csv")
    rows = [(example.text, CLASSES[example.label]) for example in read_source(LabelledFile("o", source))]
    write(source, [row for row in rows if part_of(row[0], "normalized") != "development"])
    with pytest.raises(ValueError, match="no row is a development row, which --patience measures on"):
        train(*tiny(tmp_path / "out", source, patience=1), quiet)


def test_ctrl_c_where_nothing_can_be_kept_or_measured_says_so(tmp_path: Path) -> None:
    options, sources = tiny(tmp_path / "out", obvious(tmp_path / "obvious.csv"), epochs=1)
    with pytest.raises(Interrupted, match="nothing to keep yet") as end:
        train(options, sources, interrupt_at("masked tokens", 2))
    assert end.value.exit_code == 130
    assert not list(options.output.iterdir())
    options.output.joinpath("README.md").write_text("the card of another training")
    with pytest.raises(Interrupted, match="may be incomplete, and has no card"):
        train(options, sources, interrupt_at("measuring", 16))
    assert (options.output / "model.safetensors").exists()
    assert not (options.output / "README.md").exists()


def test_the_card_says_how_rows_were_balanced_and_what_is_odd_about_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = obvious(tmp_path / "obvious.csv")
    rows = [(example.text, CLASSES[example.label]) for example in read_source(LabelledFile("o", source))]
    kept = [row for row in rows if not is_held_out(row[0], "normalized")]
    few = [row for row in kept if row[1] == "negative"][:10]
    copies = [(few[0][0].upper() + " ", "negative"), (few[1][0].replace("ё", "е"), "positive")]
    write(source, [row for row in rows if row[1] != "negative"] + few + copies)
    options, sources = tiny(tmp_path / "out", source, **QUICK | {"epochs": 1})
    train(options, sources, quiet)
    there = Counter(label for _, label in kept if label != "negative") + Counter(negative=11, positive=1)
    wanted = there.total() // 3
    card = (options.output / "README.md").read_text()
    assert (
        f"| obvious | {there.total()} → {55 + 2 * wanted} | 11 → 55 | {there['neutral']} → {wanted} | "
        f"{there['positive']} → {wanted} |"
    ) in card
    assert "no row more than 5 times" in card
    assert f"Of {there.total()} training rows 2 repeat the text of another" in card
    assert "and 1 texts have more than one label" in card
    assert f"The classes are not balanced: negative has 55 rows an epoch and another class {wanted}" in card
    assert all(message in card for message in caplog.messages)
    assert len(caplog.messages) == 2


def test_near_copies_of_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    source = obvious(tmp_path / "obvious.csv")
    rows = [(example.text, CLASSES[example.label]) for example in read_source(LabelledFile("o", source))]
    copies = [(text.upper() + " ЪЪ", label) for text, label in rows if is_held_out(text + " ъъ", "normalized")]
    assert sum(not is_held_out(text) for text, _ in copies) > 10
    write(source, rows + copies)
    train(*tiny(tmp_path / "out", source, **QUICK | {"epochs": 1}), quiet)
    assert "ъ" not in "".join(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab())


def test_training_never_sees_a_held_out_word(tmp_path: Path) -> None:
    source = obvious(tmp_path / "obvious.csv")
    train(*tiny(tmp_path / "one", source, pretrain_epochs=0, epochs=1, consistency=0), lambda progress: None)
    known = "".join(AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab())
    rows = [(example.text, CLASSES[example.label]) for example in read_source(LabelledFile("o", source))]
    strange = [(text + " щъыщ", label) if is_held_out(text, "normalized") else (text, label) for text, label in rows]
    held_out = [row for row in strange if "щъыщ" in row[0] and is_held_out(row[0], "normalized")]
    assert held_out
    assert "ъ" not in known
    write(source, [row for row in rows if not is_held_out(row[0], "normalized")] + held_out)
    train(*tiny(tmp_path / "two", source, pretrain_epochs=0, epochs=1, consistency=0), lambda progress: None)
    assert "ъ" not in "".join(AutoTokenizer.from_pretrained(tmp_path / "two").get_vocab())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs=0"], "greater than or equal to 1"),
        (["--token-masking=1.0"], "less than 1"),
        (["--hidden=200"], "a multiple of 64"),
        (["--storage=int8"], "'float16' or 'float32'"),
        (["--learning-rate=-1"], "greater than 0"),
    ],
)
def test_options_out_of_range_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(WrongSetting, match=message):
        load(TrainSettings, ["--output=out", *flags], "sentiment-worker train")


def test_training_without_the_means_is_refused(tmp_path: Path) -> None:
    source = obvious(tmp_path / "obvious.csv")
    (tmp_path / "file").touch()
    two = read_source(LabelledFile("o", source))[:300]
    part = write(tmp_path / "part.csv", [(example.text, CLASSES[example.label]) for example in two])
    few = next(text for text in (f"отзыв {n}" for n in range(100)) if not is_held_out(text))
    for options, message in (
        (tiny(tmp_path / "x", source, base=str(tmp_path / "nothing")), "--base .* cannot be loaded"),
        (tiny(tmp_path / "file", source), "output folder .* cannot be made"),
        (tiny(tmp_path / "x", part), "no training row has the class 'positive'"),
        (tiny(tmp_path / "x", source, device="cuda:7"), "--device cuda:7 is not here"),
        (tiny(tmp_path / "x", write(tmp_path / "few.csv", [(few, "neutral")])), "no row is held-out"),
    ):
        with pytest.raises(ValueError, match=message):
            train(*options, lambda progress: None)


def test_the_command_of_a_card_names_what_differs_and_no_path() -> None:
    source = LabelledFile(
        "a", Path("/secret/place/a.csv"), label_column="mark", label_map={"-1": "negative", "skip": ""}
    )
    options = TrainSettings(
        output=Path("/secret/out"),
        seed=3,
        development=True,
        vocabulary=500,
        hold_out_by="exact",
        source=["a=/secret/a"],
    )
    assert command(options, [source]) == (
        "sentiment-worker train --source a=a.csv --label-map a:-1=negative --label-map a:skip= --label-column a=mark "
        "--hold-out-by exact --seed 3 --vocabulary 500 --development --output out"
    )


def test_progress_is_a_line_at_each_tenth_without_a_terminal() -> None:
    out = StringIO()
    with ProgressView(Console(file=out)) as view:
        for done in range(101):
            view(Progress("fine-tuning", done, 100, "loss 1.0"))
    assert len(out.getvalue().splitlines()) == 11
    terminal = StringIO()
    with ProgressView(Console(file=terminal, force_terminal=True, width=120)) as view:
        view(Progress("fine-tuning", 100, 100, "loss 1.0"))
    assert "fine-tuning" in terminal.getvalue()
    assert "100/100" in terminal.getvalue()


def test_a_sentence_of_progress_is_a_line_of_its_own() -> None:
    out = StringIO()
    with ProgressView(Console(file=out, width=120)) as view:
        for epoch in range(12):
            view(Progress("fine-tuning", 1, 1, line=f"epoch {epoch}"))
    assert out.getvalue().splitlines() == [f"epoch {epoch}" for epoch in range(12)]


# --- the built-in checkpoint ---


def test_the_builtin_checkpoint_is_small_complete_and_as_good_as_it_says() -> None:
    assert sum(file.stat().st_size for file in BUILTIN.iterdir() if file.is_file()) <= 4_000_000
    network = AutoModelForSequenceClassification.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)

    def predict(texts: list[str]) -> Floats:
        probabilities = np.zeros((len(texts), len(CLASSES)))
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            inputs = tokenizer([texts[place] for place in places], truncation=True, padding=True, return_tensors="pt")
            with torch.inference_mode():
                probabilities[places] = network(**inputs).logits.sigmoid()
        return probabilities

    assert network.config.id2label == dict(enumerate(CLASSES))
    demo = LabelledFile("demo", BUILTIN / "demo.csv")
    examples = read_source(demo)
    assert len(examples) >= 700
    assert all(is_held_out(example.text) for example in examples)
    assert evaluate(predict, read_rows([demo])).macro_f1 >= 0.70
