"""A real Chromium for the tests, driven through its own driver."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which does not work as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--no-first-run",
)


class Browser:
    """One window with one page."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, url: str) -> None:
        self._driver.get(url)

    def emulate(self, *, width: int, height: int, scheme: str, reduced_motion: bool = False) -> None:
        """A screen of this size, in CSS pixels, and the person's preferences."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
        ]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the script returns; it runs as a person's in the developer tools would, beside the page's policy."""
        return self._driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)", selector))

    def press(self, selector: str, *keys: str) -> None:
        """Keys for the element that has the focus after this selector's was focused."""
        self.run("document.querySelector(arguments[0]).focus()", selector)
        self._driver.switch_to.active_element.send_keys(*keys)

    def complaints(self, *, network: bool = True) -> list[str]:
        """Console errors and warnings since the last time, without the network's own where a server was away."""
        entries: Sequence[dict[str, Any]] = self._driver.get_log("browser")
        return [entry["message"] for entry in entries if network or entry["source"] != "network"]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A Chromium of its own; without one the test is skipped, and on CI it fails."""
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        reason = f"no browser to test with: {' and '.join(missing)} not found (Debian: chromium, chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths["chromedriver"]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
