"""The longest texts that are read, of the kinds that a tokenizer likes least: what each costs the batch that it is in.

`python -m benchmarks.worst_texts [CHECKPOINT]`; asked is at most 200 ms a text.
"""

import statistics
import sys
import time

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
    model = SentimentModel.load(sys.argv[1] if len(sys.argv) > 1 else "builtin", cpu_threads=1, max_batch_tokens=512)
    print(f"| {CHARACTERS:,} characters | tokens | median CPU ms | worst CPU ms |\n| --- | --- | --- | --- |")
    worst = 0.0
    for name, text in texts().items():
        took = []
        for _ in range(ROUNDS):
            began = time.process_time()  # not what other processes on the machine cost
            tokens = model.tokenize([text])
            took.append((time.process_time() - began) * 1000)
        worst = max(worst, statistics.median(took))
        print(f"| {name} | {len(tokens.ids[0])} | {statistics.median(took):.0f} | {max(took):.0f} |")
    print(f"\nasked: at most {ASKED_MS} ms; measured: {worst:.0f} ms (the worst median)")


if __name__ == "__main__":
    main()
