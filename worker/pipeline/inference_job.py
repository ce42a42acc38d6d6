"""One micro-batch's texts on their way through inference: which need it, and where the answers belong."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from worker.core.batching import TokenIds
from worker.core.sentiment import Sentiment
from worker.pipeline.model_runner import Model, ModelRunner
from worker.pipeline.result_cache import ResultCache, text_digest
from worker.runtime.loop_budget import TurnBudget


@dataclass(slots=True)
class Job:
    """N texts: those that the cache has need nothing, each other distinct text is tokenized once and scored once.

    The per-text lists ``texts`` to ``failures`` cover only the distinct texts that the cache missed. Once the job has ended,
    ``answers`` has for each of the N texts, in order, its sentiment, or why it could not be scored, ``truncated`` whether a
    part of the text was left out, and ``windows`` how many it has; that list is None where long texts are truncated. A job
    keeps the model and the cache that it began with, whatever is reloaded meanwhile.
    """

    runner: ModelRunner
    cache: ResultCache
    texts: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # none where the cache is off
    token_ids: list[TokenIds] = field(default_factory=list)
    are_truncated: list[bool] = field(default_factory=list)
    failures: list[str | None] = field(default_factory=list)  # why a text could not be tokenized
    hits: list[tuple[Sentiment, bool, int]] = field(default_factory=list)
    # of each of the N: its index in [*texts, *hits], negative for a hit
    places: list[int] = field(default_factory=list)
    answers: list[Sentiment | str] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    windows: list[int] | None = None

    @property
    def model(self) -> Model:
        return self.runner.model

    def to_score(self) -> list[TokenIds]:
        """The token ids of the texts that could be tokenized."""
        if not any(self.failures):
            return self.token_ids
        return [ids for ids, failure in zip(self.token_ids, self.failures, strict=True) if failure is None]

    def finish(self, scored: Sequence[Sentiment | str]) -> None:
        """Takes the answers to what ``to_score`` has, in order; keeps them in the cache, and sets ``answers``."""
        if len(scored) < len(self.failures):
            rest = iter(scored)
            scored = [next(rest) if failure is None else failure for failure in self.failures]
        windowing = self.model.windowing
        counts = list(map(windowing.count, self.token_ids)) if windowing else [1] * len(scored)
        if self.digests:
            for digest, answer, is_truncated, count in zip(
                self.digests, scored, self.are_truncated, counts, strict=True
            ):
                if isinstance(answer, Sentiment):
                    self.cache.put(digest, answer, is_truncated, count)
        answers = [*scored, *(sentiment for sentiment, _, _ in self.hits)]
        truncated = [*self.are_truncated, *(is_truncated for _, is_truncated, _ in self.hits)]
        self.answers = [answers[place] for place in self.places]
        self.truncated = [truncated[place] for place in self.places]
        if windowing:
            counts += [count for _, _, count in self.hits]
            self.windows = [counts[place] for place in self.places]


async def begin_job(texts: Sequence[str], runner: ModelRunner, cache: ResultCache, turn_budget: TurnBudget) -> Job:
    """A job for N texts, looked up in the cache, which is that of the runner's model."""
    job = Job(runner, cache)
    if cache.is_off:
        distinct: dict[str, int] = {}
        job.places = [distinct.setdefault(text, len(distinct)) for text in texts]
        job.texts = list(distinct)
        return job
    firsts: dict[bytes, int] = {}
    async for some in turn_budget.slices(texts):
        for text in some:
            digest = text_digest(text)
            entry = cache.get(digest)
            if entry:
                job.hits.append(entry)
                job.places.append(-len(job.hits))
            elif digest in firsts:
                job.places.append(firsts[digest])
            else:
                firsts[digest] = len(job.texts)
                job.places.append(len(job.texts))
                job.texts.append(text)
    job.hits.reverse()  # the first hit comes last, at -1, however many texts and hits stand before it
    job.digests = list(firsts)
    return job
