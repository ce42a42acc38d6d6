"""A real Prometheus that scrapes a real worker: every expression of every rule and panel returns data."""

import json
import math
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.manifests import RULES, expressions_of_panels, expressions_of_rules
from tests.support.broker import free_port
from tests.support.process import WorkerProcess, Workers
from tests.support.topics import Kafka, Load, Topics
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (Debian's package has it)"
    ),
]
WINDOW = "10s"  # in place of minutes, hours and days, which a test cannot wait for
RATE = 100
STARTING = 503
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [rules.yaml]
scrape_configs:
  - job_name: sentiment-worker
    static_configs: [{{targets: ["{target}"]}}]
"""


def with_short_windows(text: str) -> str:
    return re.sub(r"\[(?:\d+[smhdw]|\$__rate_interval)\]", f"[{WINDOW}]", text)


def of_every_worker(expression: str) -> str:
    """A panel's expression with All chosen on top."""
    return expression.replace("$job", ".*").replace("$instance", ".*")


def without_threshold(expression: str) -> str:
    """An alert's expression as 0 or 1: it has data wherever both of its sides have some, whether it fires or not."""
    return re.sub(r" (>|<|==|>=|<=|!=) ", r" \1 bool ", expression)


class Prometheus:
    """This machine's Prometheus with the rules of deploy/, on one worker."""

    def __init__(self, folder: Path, worker: WorkerProcess) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        (folder / "rules.yaml").write_text(with_short_windows(RULES.read_text()))
        (folder / "prometheus.yaml").write_text(CONFIG.format(target=worker.url.removeprefix("http://")))
        self._log = folder / "prometheus.log"
        command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, f"--web.listen-address={self.url.removeprefix('http://')}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def values(self, expression: str) -> list[float]:
        """The numbers that an expression has now; none before Prometheus has started."""
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=10) as answer:
                data = json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code != STARTING:
                pytest.fail(f"{expression}: {error.read().decode()}")
            return []
        except OSError:
            assert self._process.poll() is None, self._log.read_text()
            return []
        numbers = [float(sample["value"][1]) for sample in data["result"]]
        return [number for number in numbers if not math.isnan(number)]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def prometheus(kafka: Kafka, workers: Workers, topics: Topics, tmp_path: Path) -> Iterator[Prometheus]:
    kafka.create_all(topics)
    worker = workers.start(topics, cache_size=100).wait_until_ready()
    server = Prometheus(tmp_path, worker)
    load = Load(kafka, topics.input, RATE)
    load.start()
    yield server
    load.stop()
    server.close()


def test_every_expression_returns_data(prometheus: Prometheus) -> None:
    expressions = [without_threshold(with_short_windows(expression)) for expression in expressions_of_rules()]
    expressions += [of_every_worker(with_short_windows(expression)) for expression in expressions_of_panels()]
    assert not any("$" in expression for expression in expressions)
    silent = set(expressions)

    def all_answered() -> bool:
        silent.difference_update([expression for expression in silent if prometheus.values(expression)])
        return not silent

    wait_for(all_answered, "data of", 90, 1, lambda: "\n".join(sorted(silent)))

    share = prometheus.values("job:sentiment_worker_results_late:share5m")
    assert len(share) == 1
    assert 0 <= share[0] <= 1
    assert prometheus.values('ALERTS{alertname="SentimentWorkerNoneReady"}') == []


def test_the_mean_score_of_the_buckets_is_that_of_the_results(
    prometheus: Prometheus, kafka: Kafka, topics: Topics
) -> None:
    (expression,) = [text for text in expressions_of_panels() if text.startswith("0.95 - ")]
    shown = of_every_worker(with_short_windows(expression))
    wait_for(lambda: kafka.count(topics.output) > 15 * RATE, "more results than of one window", 60, 1)
    mean, *_ = wait_for(lambda: prometheus.values(shown), "a mean score", 60, 1)
    scores = [json.loads(record.value or b"{}")["score"] for record in kafka.read(topics.output)]
    # The last ten seconds against all of them; a bucket is 0.1 wide, and the same texts come again and again.
    assert mean == pytest.approx(sum(scores) / len(scores), abs=0.1)
