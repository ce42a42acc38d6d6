"""Every option of every command, once: its name, default, bounds, unit and help.

A flag goes before the environment (``WORKER_MAX_BATCH_TEXTS``), which goes before the TOML file (``--config``). Secrets
come from the environment alone, or from the file that ``WORKER_…_FILE`` names.
"""

from worker.settings.base import PREFIX, SECRETS, Settings
from worker.settings.commands import (
    BenchSettings,
    ClassifySettings,
    CorpusSettings,
    DemoSettings,
    EvaluateSettings,
    ReplaySettings,
    TrainSettings,
)
from worker.settings.run import RunSettings
from worker.settings.shared import DEFAULT_MODEL, ConnectionSettings, LogSettings, ModelSettings
from worker.settings.sources import load, unknown_variables
from worker.settings.values import (
    ip_address,
    is_folder,
    moment_ms,
    revealed,
    revision_fault,
    split_names,
    text_fields,
    whole_name,
)

__all__ = [
    "DEFAULT_MODEL", "PREFIX", "SECRETS", "BenchSettings", "ClassifySettings", "ConnectionSettings", "CorpusSettings",
    "DemoSettings", "EvaluateSettings", "LogSettings", "ModelSettings", "ReplaySettings", "RunSettings", "Settings",
    "TrainSettings", "ip_address", "is_folder", "load", "moment_ms", "revealed", "revision_fault", "split_names",
    "text_fields", "unknown_variables", "whole_name",
]  # fmt: skip
