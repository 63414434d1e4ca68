"""Chromium without a window, for the pages of this project; what it shows is kept beside them in `.artefacts`."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Dialog, Page, expect, sync_playwright

from tests.processes import ROOT

ARTEFACTS = ROOT / ".artefacts"
_PATIENCE_MS = 60_000


@dataclass
class Shown:
    """A page, and what its console said."""

    page: Page
    said: list[str] = field(default_factory=list)

    def refuse(self, dialog: Dialog) -> None:
        """What only somebody else's script would open."""
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def keep(self, name: str) -> None:
        """A picture of all of it."""
        ARTEFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)


def chromium() -> str:
    """The program; a test that needs it is skipped where there is none, but not in CI, which installs it."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("there is no chromium; .ci/run installs it")
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    return program


@contextmanager
def shown(url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Shown]:
    """The page behind an address."""
    program = chromium()
    expect.set_options(timeout=_PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        page.set_default_timeout(_PATIENCE_MS)
        found = Shown(page)
        page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: found.said.append(f"error: {error}"))
        page.on("dialog", found.refuse)
        page.goto(url)
        try:
            yield found
        finally:
            browser.close()
