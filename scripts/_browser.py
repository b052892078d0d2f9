"""Headless Chromium through its DevTools pipe: opens pages, measures them, takes screenshots."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60  # that an answer may take
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"]
# Widths of window, page and content, and the elements that end to the right of the page, except those inside an element
# that scrolls sideways. A phone zooms out where the content is wider, so that its window is wider than the page.
WIDER = """
(() => {
  const page = document.documentElement.clientWidth;
  const scrolls = e => e && (['auto', 'scroll'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const found = [...document.body.querySelectorAll('*')].filter(
    e => e.getBoundingClientRect().right > page + 0.5 && !scrolls(e.parentElement));
  return {window: innerWidth, page, content: document.documentElement.scrollWidth,
          wider: found.map(e => e.outerHTML.slice(0, 120))};
})()
"""


def find_browser() -> str | None:
    """Returns the path of Chromium or Chrome; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A Chromium with one open page. A context manager; it ends the browser."""

    def __init__(self, program: str, folder: Path):
        """Starts it with a profile in an empty folder."""
        # Chromium reads commands from descriptor 3 and answers on 4; bash moves the pipes there.
        reads, self._commands = os.pipe()
        self._answers, writes = os.pipe()
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{reads} 4>&{writes}', program, *FLAGS, f"--user-data-dir={folder}"]
        none = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [*command, "about:blank"], pass_fds=(reads, writes), stdin=none, stdout=none, stderr=none
        )
        for end in (reads, writes):
            os.close(end)
        self._buffer, self._count, self._session = b"", 0, ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(SECONDS)
        for end in (self._commands, self._answers):
            os.close(end)

    def open(self, page: Path, width: int, height: int = 800, dark: bool = False) -> None:
        """Opens a file in a window of `width` times `height` CSS pixels, as a phone if it is narrow."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=page.resolve().as_uri())
        self._wait("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self, height: int | None = None) -> bytes:
        """Returns a PNG of the page, of its first `height` CSS pixels if given."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(answer["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self._count)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _wait(self, event: str) -> None:
        self._until(lambda found: found.get("method") == event)

    def _until(self, wanted: Any) -> dict[str, Any]:
        """Returns the first message that is wanted; drops those before it."""
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" in self._buffer:
                message, _, self._buffer = self._buffer.partition(b"\0")
                if wanted(found := json.loads(message)):
                    return found
            if not select.select([self._answers], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no answer of the browser in {SECONDS} s")
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            self._buffer += part
