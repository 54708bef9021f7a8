"""A headless Chromium, driven over the pipe of its DevTools protocol; needs no package.

``python tests/report/browser.py`` says which browser the tests take, and fails where there is none.
https://chromedevtools.github.io/devtools-protocol describes the methods and events.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60  # for an answer; a loaded machine starts a browser in ten


def find_browser() -> str | None:
    """PYPKG_BROWSER, or a Chromium or Chrome on PATH."""
    given = os.environ.get("PYPKG_BROWSER")
    return given or next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """A browser with one tab. ``complaints`` holds errors and warnings of the console."""

    def __init__(self, program: str, profile: Path) -> None:
        commands_in, self._commands = os.pipe()
        self._answers, answers_out = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4.
        line = f'exec "$0" "$@" 3<&{commands_in} 4>&{answers_out}'
        options = [
            *("--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}"),
            *("--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--disable-background-networking", "--hide-scrollbars", "about:blank"),
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", line, program, *options], pass_fds=(commands_in, answers_out),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands_in)
        os.close(answers_out)
        self._number, self._buffer, self._session = 0, b"", None
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=_SECONDS)
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def open(self, url: str) -> None:
        """Loads a page and waits for the end of its scripts."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._note(self._next())

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON holds it."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + _SECONDS
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} stays false"
            time.sleep(0.05)

    def look(self, width: int, height: int, *, dark: bool = False, mobile: bool = False) -> None:
        """Sets the size of the window in CSS pixels and the colours that the user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=mobile,
            deviceScaleFactor=2 if mobile else 1,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses the left button at ``start`` and releases it at ``end``."""
        for kind, (x, y) in (
            ("mouseMoved", start), ("mousePressed", start), ("mouseMoved", end),
            ("mouseReleased", end),
        ):  # fmt: skip
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=1,
                button="none" if kind == "mouseMoved" else "left",
                buttons=1 if (x, y) == end and kind == "mouseMoved" else 0,
            )  # fmt: skip

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(base64.b64decode(found["data"]))

    def print(self, file: Path) -> None:
        """The page on paper, as a PDF."""
        found = self.call("Page.printToPDF", printBackground=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], _SECONDS)[0]:
                raise TimeoutError(f"the browser has not answered for {_SECONDS} s")
            read = os.read(self._answers, 1 << 16)
            if not read:
                raise RuntimeError("the browser has ended")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        parameters = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif event["method"] == "Runtime.consoleAPICalled":
            if parameters["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(parameters["args"]))
        elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in (
            "error",
            "warning",
        ):
            self.complaints.append(json.dumps(parameters["entry"]))


if __name__ == "__main__":
    found = find_browser()
    if found is None:
        sys.exit(
            "tests/report/test_browser.py needs Chromium or Chrome. On Debian: apt-get install "
            "chromium. Another place: PYPKG_BROWSER=FILE."
        )
    print(f"tests of the run's page: {found}")
