"""Where the runbook is, by the package's metadata."""

from importlib.metadata import PackageNotFoundError, metadata


def project_urls() -> list[str]:
    """The package's ``name, address`` lines, as pyproject.toml has them under ``project.urls``."""
    try:
        return metadata("sentiment-worker").get_all("Project-URL", [])
    except PackageNotFoundError:
        return []


def runbook(urls: list[str]) -> str | None:
    """What to do where the worker is not ready: an address, if one of the project's URLs is named ``Runbook``."""
    found = (url.removeprefix("Runbook, ") for url in urls if url.startswith("Runbook, "))
    return next((f"{url}#sentimentworkernotready" for url in found), None)
