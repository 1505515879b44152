"""A headless Chromium, driven over its DevTools protocol: what a person sees in the Prefect UI, as a picture.

By hand: `python -m tests.e2e.screenshot URL "text to wait for" picture.png`.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

START_TIMEOUT_S = 30.0
WAIT_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 30.0
# fmt: off
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-port=0", "--window-size=1400,1000",
)
# fmt: on
# What a person would look for: the innermost visible element whose own words are, or contain, these.
FIND = """(text, exact) => [...document.querySelectorAll('*')].reverse().find(e => e.getClientRects().length &&
  (exact ? e.innerText?.trim() === text : e.innerText?.includes(text)))"""


class Page:
    """One page of a running browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._calls = socket, 0

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def text(self) -> str:
        """Return the words on the page."""
        return str(self.evaluate("document.body?.innerText ?? ''"))

    def wait_for(self, *texts: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until the page shows all `texts`; fail with what it shows instead."""
        deadline = time.monotonic() + timeout_s
        while missing := [text for text in texts if text not in self.text()]:
            assert time.monotonic() < deadline, f"the page does not show {missing} but:\n{self.text()[:3000]}"
            time.sleep(0.2)

    def click(self, text: str, *, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Click where `text`, alone, is written, with the mouse."""
        self._click(f"({FIND})({json.dumps(text)}, true)", text, timeout_s)

    def press(self, label: str, *, row: str = "", timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Click what shows no words, by its accessible name; `row`: in the row of a table that has these words."""
        within = f"[...document.querySelectorAll('tr')].find(e => e.innerText.includes({json.dumps(row)}))"
        place = within if row else "document"
        self._click(f"{place}?.querySelector('[aria-label=' + {json.dumps(json.dumps(label))} + ']')", label, timeout_s)

    def _click(self, element: str, what: str, timeout_s: float) -> None:
        spot = f"""(() => {{ const e = {element}; e?.scrollIntoView({{block: 'center'}});
          const r = e?.getBoundingClientRect(); return r && [r.x + r.width / 2, r.y + r.height / 2] }})()"""
        deadline = time.monotonic() + timeout_s
        while not (place := self._at_rest(spot)):
            assert time.monotonic() < deadline, f"nothing on the page reads {what!r}:\n{self.text()[:3000]}"
        for kind in ("mousePressed", "mouseReleased"):
            self._call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", buttons=1, clickCount=1
            )

    def _at_rest(self, spot: str) -> Any:
        """Return where something is that stays there: a page that was resized, or opens a dialog, still moves it."""
        place = self.evaluate(spot)
        time.sleep(0.2)
        return place if place == self.evaluate(spot) else None

    def fill(self, label: str, text: str) -> None:
        """Type into the first field after where `label` is written."""
        focus = f"""(() => {{ const label = ({FIND})({json.dumps(label)}, true);
          const field = [...document.querySelectorAll('input, textarea')].find(
            e => label?.compareDocumentPosition(e) & Node.DOCUMENT_POSITION_FOLLOWING);
          field?.focus(); return !!field }})()"""
        assert self.evaluate(focus), f"no field {label!r} on the page:\n{self.text()[:3000]}"
        self._call("Input.insertText", text=text)

    def evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """Save the whole page, also what is below the fold, as a PNG."""
        self._call("Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1, mobile=False)
        time.sleep(0.5)  # transitions
        tall = self.evaluate("Math.max(1000, ...[...document.querySelectorAll('*')].map(e => e.scrollHeight))")
        self._call("Emulation.setDeviceMetricsOverride", width=1400, height=tall, deviceScaleFactor=1, mobile=False)
        time.sleep(0.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))
        self._call("Emulation.clearDeviceMetricsOverride")

    def _call(self, method: str, **parameters: Any) -> Any:
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(ANSWER_TIMEOUT_S))
            if answer.get("id") == self._calls:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]


@contextmanager
def browser() -> Iterator[Page]:
    """A page in a fresh browser, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="hyper2kvm-chromium-", ignore_cleanup_errors=True) as profile:
        argv = ["setpriv", "--pdeathsig", "KILL", "chromium", *FLAGS, f"--user-data-dir={profile}"]
        with (Path(profile) / "log").open("w") as log:
            process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            with connect(_page_socket(Path(profile)), max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            process.wait(20)


def _page_socket(profile: Path) -> str:
    """Return the address of the browser's first page, once it says on which port it listens."""
    deadline, told = time.monotonic() + START_TIMEOUT_S, profile / "DevToolsActivePort"
    while not (told.exists() and told.read_text().count("\n")):
        assert time.monotonic() < deadline, (profile / "log").read_text()
        time.sleep(0.1)
    pages = httpx.get(f"http://127.0.0.1:{told.read_text().split()[0]}/json/list", trust_env=False).json()
    return str(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"))


if __name__ == "__main__":
    with browser() as page:
        page.open(sys.argv[1])
        page.wait_for(sys.argv[2])
        page.picture(Path(sys.argv[3]))
