"""A headless Chromium, driven by selenium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@contextmanager
def chromium() -> Iterator:
    """A browser window of a laptop's size. Skips the test where there is none."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra `test`")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # No sandbox: tests may run as root, and open nothing but files that they wrote.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver, path: Path) -> None:
    """Open a file; what the console says counts from here."""
    driver.get_log("browser")
    driver.get(path.as_uri())


def console(driver) -> list[str]:
    """Errors and warnings since the page was opened."""
    return [entry["message"] for entry in driver.get_log("browser")]
