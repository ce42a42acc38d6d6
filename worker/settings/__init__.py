"""Every option of every command, once: its name, default, bounds, unit and help.

A flag goes before the environment (``WORKER_MAX_BATCH_TEXTS``), which goes before the TOML file (``--config``). Secrets
come from the environment alone, or from the file that ``WORKER_…_FILE`` names.
"""
