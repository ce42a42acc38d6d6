"""The demo: an embedded broker, the unchanged worker, real reviews sent at a steady rate, a live view, and a final count.

Broker and worker are processes of their own. What happened is counted twice: by the worker (its /metrics) and by the
demo, which reads the output and dead-letter topics with another Kafka client than the worker's. The demo succeeds if both
counts agree and nothing is missing.
"""

import importlib
import sys

from worker.settings.commands import DemoSettings


def run(settings: DemoSettings) -> int:
    """Runs the demo; the exit code is 0 if everything adds up and the worker drained, else 1; 2 without the extra ``demo``.

    Blocks until the end, or with ``keep_running`` until Ctrl-C. Call it from the main thread. Every process that it started
    has ended when it returns.
    """
    try:
        importlib.import_module("confluent_kafka")
    except ImportError:
        sys.stderr.write("The demo's broker is not installed; it comes with: pip install 'sentiment-worker[demo]'\n")
        return 2
    from worker.commands.demo import scenario

    return scenario.run(settings)
