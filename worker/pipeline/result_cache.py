"""The results of the newest texts, so that a text that comes again is neither tokenized nor scored again."""

from hashlib import blake2b
from struct import Struct

from worker.core.sentiment import CARD, LabelSet, Sentiment


class ResultCache:
    """Sentiments by their text's digest. Holds at most ``size`` of them, and always the newest half of that many.

    There are two generations. An entry that is put or asked for moves to the young one. Once the young one holds half of
    ``size``, it becomes the old one, and the entries of the former old one are freed, one or two with each new entry. Unlike
    an order by last use, this keeps memory level once both generations have been full.

    Texts may be long, so entries are kept by digest. They are packed into bytes because Python's garbage collector would
    walk through tuples, tens of thousands of them after a backlog.

    Belongs to the event loop; nothing here blocks.
    """

    def __init__(self, size: int, labels: LabelSet = CARD) -> None:
        """``size`` is in texts; 0 switches the cache off. As there are two generations, 1 is the same as 2.

        ``labels``: those of the model whose results are kept.
        """
        self.is_off = size == 0
        self._names = labels.names
        self._has_scores = labels.weights is not None
        # The label's index, whether the text was truncated, its windows, the score and the probabilities.
        self._entry = Struct(f"<{'B' if len(labels.names) <= 256 else 'H'}?B{1 + len(labels.names)}d")
        self._half = max(1, size // 2)
        self._young: dict[bytes, bytes] = {}
        self._old: dict[bytes, bytes] = {}
        self._to_free: dict[bytes, bytes] = {}

    def get(self, digest: bytes) -> tuple[Sentiment, bool, int] | None:
        """The text's sentiment, whether it was truncated, and its windows; None where the cache does not have it."""
        entry = self._young.get(digest)
        if entry is None:
            entry = self._old.pop(digest, None)
            if entry is None:
                return None
            self._keep(digest, entry)
        label, truncated, windows, score, *probabilities = self._entry.unpack(entry)
        sentiment = Sentiment(self._names[label], score if self._has_scores else None, tuple(probabilities))
        return sentiment, truncated, windows

    def put(self, digest: bytes, sentiment: Sentiment, truncated: bool, windows: int = 1) -> None:
        if not self.is_off:
            self._old.pop(digest, None)
            label, score, probabilities = sentiment
            self._keep(
                digest, self._entry.pack(self._names.index(label), truncated, windows, score or 0.0, *probabilities)
            )

    def _keep(self, digest: bytes, entry: bytes) -> None:
        if len(self._young) >= self._half and digest not in self._young:
            self._young, self._old, self._to_free = {}, self._young, self._old
        self._young[digest] = entry
        for _ in range(min(2, len(self._to_free))):  # to free all of them at once would hold up the event loop
            self._to_free.popitem()


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text; half a surrogate pair in it is no error."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
