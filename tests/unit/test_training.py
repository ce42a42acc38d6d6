import csv
import hashlib
import random
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import worker
from worker.corpus import (
    CLASSES,
    Example,
    Source,
    balance,
    is_held_out,
    parse_sources,
    part_of,
    read_source,
    sample_held_out,
)
from worker.evaluation import evaluate
from worker.settings import TrainSettings, WrongSetting, load
from worker.training import Progress, ProgressView, _shuffled_batches, command, train

BUILTIN = Path(worker.__file__).parent / "builtin"
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


def tiny(output: Path, source: Path, **changes: object) -> tuple[TrainSettings, list[Source]]:
    settings: dict[str, object] = {
        "epochs": 6, "batch_texts": 16, "learning_rate": 3e-3, "max_tokens": 16, "token_masking": 0.0, "averaging": 0.5,
        "pretrain_epochs": 2, "pretrain_max_tokens": 16, "vocabulary": 120, "layers": 1, "hidden": 32, "threads": 1,
        "device": "cpu",
    }  # fmt: skip
    return TrainSettings(output=output, **(settings | changes)), [Source("obvious", source)]  # type: ignore[arg-type]


# --- the held-out rule ---


def test_parts_follow_the_last_byte_of_the_sha256() -> None:
    for number in range(500):
        text = f"Отзыв {number}"
        last = int(hashlib.sha256(text.encode("utf-8")).hexdigest()[-2:], 16)
        assert part_of(text) == ("held-out" if last < 26 else "development" if last < 52 else "training")
        assert is_held_out(text) == (last < 26)


def test_the_held_out_sample_is_fixed_and_even() -> None:
    examples = [Example("a", f"отзыв {number}", number % 3) for number in range(600)]
    sample = sample_held_out(examples, 5)
    assert Counter(example.label for example in sample) == {0: 5, 1: 5, 2: 5}
    assert all(is_held_out(example.text) for example in sample)
    assert sample == sample_held_out(examples[::-1], 5)
    with pytest.raises(ValueError, match="500 were asked for"):
        sample_held_out(examples, 500)


# --- balancing ---


def test_balance_gives_each_class_and_in_it_each_source_as_many() -> None:
    sizes = {("a", 0): 90, ("a", 1): 30, ("a", 2): 6, ("b", 0): 4, ("b", 1): 50, ("b", 2): 60}
    examples = [Example(name, f"{name}{label}{n}", label) for (name, label), size in sizes.items() for n in range(size)]
    balanced = balance(examples, random.Random(1), per_class=60)
    assert Counter((example.source, example.label) for example in balanced) == dict.fromkeys(sizes, 30)
    for (name, label), size in sizes.items():
        times = Counter(e.text for e in balanced if (e.source, e.label) == (name, label))
        assert len(times) == min(size, 30)
        assert max(times.values()) - min(times.values()) <= 1
    assert balanced == balance(examples, random.Random(1), per_class=60)


def test_balance_keeps_the_total_and_gives_a_missing_class_to_the_other_sources() -> None:
    examples = [Example("a", f"a{n}", n % 3) for n in range(60)] + [Example("b", f"b{n}", 0) for n in range(30)]
    counts = Counter((example.source, example.label) for example in balance(examples, random.Random(1)))
    assert counts == {("a", 0): 15, ("b", 0): 15, ("a", 1): 30, ("a", 2): 30}


def test_balance_refuses_a_class_without_rows() -> None:
    with pytest.raises(ValueError, match="'positive'"):
        balance([Example("a", "x", 0), Example("a", "y", 1)], random.Random(1))


# --- sources ---


def test_sources_are_parsed_from_command_line_words() -> None:
    one, two = parse_sources(["a=x/y.csv", "z.csv"], ["a:-1=negative", "a:x=y=positive"], "body", "mark")
    assert one == Source("a", Path("x/y.csv"), "body", "mark", {"-1": "negative", "x=y": "positive"})
    assert two == Source("z", Path("z.csv"), "body", "mark", {})


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
    ],
)
def test_wrong_source_words_say_what_is_right(sources: list[str], maps: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sources(sources, maps)


def test_a_source_is_read_with_its_own_columns_and_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("1", "Хорошо,\nда"), ("-1", "плохо"), ("0", "  ")], ("mark", "body"))
    source = Source("a", path, "body", "mark", {"-1": "negative", "0": "neutral", "1": "positive"})
    assert read_source(source) == [Example("a", "Хорошо,\nда", 2), Example("a", "плохо", 0)]


def test_unreadable_sources_name_the_source_and_quote_no_text(tmp_path: Path) -> None:
    def message(content: bytes | None, **changes: object) -> str:
        path = tmp_path / "a.csv"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="'shop'") as error:
            read_source(Source("shop", path, **changes))  # type: ignore[arg-type]
        assert "тайна" not in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "cannot be read" in message(None)
    assert "no column 'label'; it has text, mark" in message("text,mark\nтайна,1\n".encode())
    assert "no column 'text'" in message(b"")
    assert "('2')" in message("text,label\nтайна,2\n".encode())
    assert "--label-map shop:RAW=CLASS" in message("text,label\nтайна,2\n".encode())
    assert "too few columns" in message("text,label\nтайна\n".encode())
    assert "not UTF-8" in message("text,label\nтайна,neutral\n".encode("cp1251"))
    assert "no row" in message(b"text,label\n")
    assert "names 'bad'" in message(b"text,label\nx,1\n", label_map={"1": "bad"})


# --- training ---


def test_batches_hold_every_row_once_and_like_lengths_together() -> None:
    rng = random.Random(3)
    lengths = [rng.randint(2, 100) for _ in range(1000)]
    batches = _shuffled_batches(lengths, 16, rng)
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


def test_training_never_sees_a_held_out_word(tmp_path: Path) -> None:
    source = obvious(tmp_path / "obvious.csv")
    train(*tiny(tmp_path / "one", source, pretrain_epochs=0, epochs=1, consistency=0), lambda progress: None)
    known = "".join(AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab())
    rows = [(example.text, CLASSES[example.label]) for example in read_source(Source("o", source))]
    strange = [(text + " щъыщ", label) if is_held_out(text) else (text, label) for text, label in rows]
    held_out = [row for row in strange if "щъыщ" in row[0] and is_held_out(row[0])]
    assert held_out
    assert "ъ" not in known
    write(source, [row for row in rows if not is_held_out(row[0])] + held_out)
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
    two = read_source(Source("o", source))[:300]
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
    source = Source("a", Path("/secret/place/a.csv"), label_column="mark", label_map={"-1": "negative"})
    options = TrainSettings(output=Path("/secret/out"), seed=3, development=True, vocabulary=500)
    assert command(options, [source]) == (
        "sentiment-worker train --source a=a.csv --label-map a:-1=negative --label-column mark "
        "--seed 3 --vocabulary 500 --development --output out"
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


# --- the built-in checkpoint ---


def test_the_builtin_checkpoint_is_small_complete_and_as_good_as_it_says() -> None:
    assert sum(file.stat().st_size for file in BUILTIN.iterdir() if file.is_file()) <= 4_000_000
    network = AutoModelForSequenceClassification.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)

    def predict(texts: list[str]) -> list[str]:
        labels = [""] * len(texts)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            inputs = tokenizer([texts[place] for place in places], truncation=True, padding=True, return_tensors="pt")
            with torch.inference_mode():
                best = network(**inputs).logits.argmax(-1).tolist()
            for place, label in zip(places, best, strict=True):
                labels[place] = network.config.id2label[label]
        return labels

    demo = Source("demo", BUILTIN / "demo.csv")
    examples = read_source(demo)
    assert len(examples) >= 700
    assert all(is_held_out(example.text) for example in examples)
    assert evaluate(predict, [demo]).macro_f1 >= 0.70
