"""A headless Chromium for tests, controlled over its DevTools socket with aiohttp, which Ray installs.

with Chromium() as browser:
    page = browser.open(path)
    page.run("document.title")          # a JSON value
    page.press("j")
    page.problems                       # console errors, exceptions, policy violations
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_S = 30.0
ANSWER_S = 20.0
_KEYS = {
    "/": ("Slash", 191),
    "Enter": ("Enter", 13),
    "Escape": ("Escape", 27),
    "Tab": ("Tab", 9),
    "ArrowDown": ("ArrowDown", 40),
    "ArrowUp": ("ArrowUp", 38),
    "ArrowRight": ("ArrowRight", 39),
    "ArrowLeft": ("ArrowLeft", 37),
    "Home": ("Home", 36),
    "End": ("End", 35),
}


def find_chromium() -> str | None:
    """The browser's program, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser process with one tab, for the length of a with block."""

    def __init__(self) -> None:
        program = find_chromium()
        assert program is not None, f"none of {NAMES} is installed"
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        command = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._folder}",
            "about:blank",
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._loop = asyncio.new_event_loop()
        self._next_id, self._session_id = 0, None
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        self._loop.run_until_complete(self._connect(self._address()))
        target = self.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session_id = self.ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.run_until_complete(self._disconnect())
        self._loop.close()
        self._process.terminate()
        self._process.wait(10)
        shutil.rmtree(self._folder, ignore_errors=True)

    def ask(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come meanwhile are kept."""
        return self._loop.run_until_complete(asyncio.wait_for(self._ask(method, parameters or {}), ANSWER_S))

    def open(
        self, place: Path | str, *, fragment: str = "", width: int = 1200, height: int = 900, dark: bool = False
    ) -> Page:
        """Open a file, or an address, in the tab, anew."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        self.ask(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        self.ask("Page.navigate", {"url": "about:blank"})
        self.events.clear()
        self.ask("Page.navigate", {"url": (place if isinstance(place, str) else place.absolute().as_uri()) + fragment})
        page = Page(self)
        page.wait_for("document.readyState === 'complete'")
        return page

    def _address(self) -> str:
        path, until = Path(self._folder) / "DevToolsActivePort", time.monotonic() + START_S
        while not (path.exists() and path.read_text().count("\n")):
            assert self._process.poll() is None, f"Chromium ended with status {self._process.returncode}"
            assert time.monotonic() < until, f"Chromium gave no DevTools port within {START_S} s"
            time.sleep(0.05)
        port, address = path.read_text().splitlines()[:2]
        return f"ws://127.0.0.1:{port}{address}"

    async def _connect(self, address: str) -> None:
        self._client = aiohttp.ClientSession()
        self._socket = await self._client.ws_connect(address, max_msg_size=0)

    async def _disconnect(self) -> None:
        await self._socket.close()
        await self._client.close()

    async def _ask(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": self._session_id} if self._session_id else {}))
        while True:
            answer = json.loads((await self._socket.receive()).data)
            if answer.get("id") != message["id"]:
                self.events.append(answer)
                continue
            assert "error" not in answer, f"{method}: {answer['error']}"
            return answer["result"]


class Page:
    """What is open in the tab."""

    def __init__(self, browser: Chromium) -> None:
        self._browser = browser

    def run(self, script: str) -> Any:
        """The value of a script's last expression, as JSON types."""
        asked = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self._browser.ask("Runtime.evaluate", asked)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 10.0) -> None:
        """Wait until a script is true."""
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < until, f"{script} did not become true within {seconds} s"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What an element shows."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def count(self, selector: str) -> int:
        """How many elements there are."""
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def press(self, key: str) -> None:
        """Press and release a key as a person would."""
        code, number = _KEYS[key] if key in _KEYS else (f"Key{key.upper()}", ord(key.upper()))
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        shared = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        self._browser.ask("Input.dispatchKeyEvent", {"type": "keyDown", **shared, **text})
        self._browser.ask("Input.dispatchKeyEvent", {"type": "keyUp", **shared})

    def choose(self, label: str, value: str, within: str = "body") -> None:
        """Choose a value in the select box under a label."""
        self.run(
            f"{{ const label = [...document.querySelectorAll({json.dumps(within + ' label')})]"
            f".find((l) => l.textContent === {json.dumps(label)});"
            f" const box = document.getElementById(label.htmlFor); box.value = {json.dumps(value)}; "
            f"box.dispatchEvent(new Event('change')); }}"
        )

    def picture(self, path: Path, selector: str | None = None) -> None:
        """Save what is seen, or one element wholly, as PNG."""
        options: dict[str, Any] = {"format": "png"}
        if selector:
            box = (
                f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
                f"return [b.x + scrollX, b.y + scrollY, b.width, b.height]; }})()"
            )
            x, y, width, height = self.run(box)
            options |= {
                "captureBeyondViewport": True,
                "clip": {"x": x, "y": y, "width": width, "height": height, "scale": 1},
            }
        path.write_bytes(base64.b64decode(self._browser.ask("Page.captureScreenshot", options)["data"]))

    @property
    def problems(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and dialogs, since the page was opened."""
        self.run("0")  # receives what has been sent
        found = []
        for event in self._browser.events:
            method, facts = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(
                    facts["exceptionDetails"].get("exception", {}).get("description")
                    or facts["exceptionDetails"]["text"]
                )
            if method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
                found.append(str([argument.get("value") for argument in facts["args"]]))
            if method == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
                found.append(facts["entry"]["text"])
            if method == "Page.javascriptDialogOpening":
                found.append(f"dialog: {facts['message']}")
        return found
