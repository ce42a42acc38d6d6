"""The longest texts that are read, of the kinds that a tokenizer likes least: what each costs the batch that it is in.

`python -m benchmarks.worst_texts [CHECKPOINT] [--long-text windows]`; asked is at most 200 ms a text for the tokenizer.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from worker.model.sentiment_model import SentimentModel

CHARACTERS = 100_000
ASKED_MS = 200
ROUNDS = 5
KINDS = {
    "words": "слово ",
    "one word": "а",
    "combining marks": "\u0301",
    "a letter and 50 marks": "е" + "\u0301" * 50,
    "zero width": "\u200b",
    "CJK": "漢",
    "emoji": "😀",
    "emoji families": "👩\u200d👩\u200d👧 ",
    "Hangul": "각",
    "white space": "a" + " " * 499,
    "words of 101": "а" * 101 + " ",
    "ligatures": "ﷺ",
    "dotted capital I": "İ",
    "digits": "1",
    "NUL": "\0",
    "private use": "\ue000",
}


def texts() -> dict[str, str]:
    filled = {name: (unit * CHARACTERS)[:CHARACTERS] for name, unit in KINDS.items()}
    end = "а б " * 400  # where the text that seemed to have no end in tokens becomes too long after all
    return filled | {
        f"{name}, words at the end": filled[name][: -len(end)] + end for name in ("emoji", "ligatures", "Hangul")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="builtin", help="folder or name (default: builtin)")
    parser.add_argument("--long-text", choices=["truncate", "windows"], default="truncate", help="as in settings")
    options = parser.parse_args()
    model = SentimentModel.load(
        options.checkpoint, long_text=options.long_text, cpu_threads=1, max_batch_tokens=512, backend="onnx"
    )
    print(f"| {CHARACTERS:,} characters | tokens | median CPU ms | worst CPU ms | ms to score |\n{'| --- ' * 5}|")
    worst = 0.0
    for name, text in texts().items():
        tokens = model.tokenize([text]).ids
        took = cpu_ms(lambda text=text: model.tokenize([text]))  # type: ignore[misc]
        scored = cpu_ms(lambda tokens=tokens: model._probabilities_of(tokens))  # type: ignore[misc]
        median = statistics.median(took)
        worst = max(worst, median)
        print(f"| {name} | {len(tokens[0])} | {median:.0f} | {max(took):.0f} | {statistics.median(scored):.0f} |")
    print(f"\nasked: at most {ASKED_MS} ms; measured: {worst:.0f} ms (the worst median)")


def cpu_ms(work: Callable[[], object]) -> list[float]:
    """CPU time of each of ROUNDS calls, which other processes on the machine do not disturb."""
    took = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        took.append((time.process_time() - began) * 1000)
    return took


if __name__ == "__main__":
    main()
