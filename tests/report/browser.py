"""A headless Chromium that tests ask through its debugging pipe: messages of JSON, ended by a zero byte. No driver, no port, no network."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""How long an answer may take on a busy machine."""

AWAKE = ("disable-background-timer-throttling", "disable-renderer-backgrounding", "disable-backgrounding-occluded-windows")
"""Switches without which a page behind another draws nothing."""

INSTALL = "the tests of pages need Chromium: apt-get install --no-install-recommends chromium"


class Browser:
    """One Chromium process."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        assert program is not None, INSTALL
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads from 3 and writes to 4; neither may be what they are copied from.
        high = [fcntl.fcntl(number, fcntl.F_DUPFD, 20) for number in (to_read, to_write)]
        switches = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars", "no-first-run", "remote-debugging-pipe", *AWAKE)
        options = [f"--{switch}" for switch in switches]
        command = ["/bin/bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "bash", program, *options, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": str(profile)})
        for number in (to_read, to_write, *high):
            os.close(number)
        self._number, self._buffer, self.events = 0, b"", list[dict[str, Any]]()

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and wait for its answer; what else arrives goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> "Tab":
        """A page from a file, drawn."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.ask(f"{domain}.enable")
        tab.resize(width, height)
        tab.scheme("dark" if dark else "light")
        tab.ask("Page.navigate", url=page.resolve().as_uri())
        tab.wait("document.documentElement?.dataset.ready === 'yes'")
        return tab

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(timeout=SECONDS)
        os.close(self._write)
        os.close(self._read)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            assert part, f"Chromium ended with {self._process.wait(timeout=SECONDS)}"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)


class Tab:
    """A page in it."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self.browser, self._target, self._session = browser, target, session

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.ask(method, self._session, **parameters)

    def value(self, expression: str) -> Any:
        """What a script of the page gives; promises are waited for."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until `expression` is true."""
        deadline = time.monotonic() + SECONDS
        while not self.value(expression):
            assert time.monotonic() < deadline, f"{expression} did not come; {self.problems()}"
            time.sleep(0.02)

    def resize(self, width: int, height: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def scheme(self, name: str) -> None:
        """light or dark, as the system would say; a page behind another would not hear it."""
        self.ask("Page.bringToFront")
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, path: Path | None = None, *, whole: bool = True) -> bytes:
        """A PNG of the page."""
        self.ask("Page.bringToFront")
        height = self.value("document.documentElement.scrollHeight") if whole else self.value("innerHeight")
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        data = base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole, clip=clip)["data"])
        if path is not None:
            path.write_bytes(data)
        return data

    def problems(self) -> list[str]:
        """Errors and warnings that the page gave so far."""
        found = []
        for event in self._events():
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(parameters["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(parameters["args"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(json.dumps(parameters["entry"]))
        return found

    def requests(self) -> list[str]:
        """Every address that the page asked for."""
        return [event["params"]["request"]["url"] for event in self._events() if event["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        self.browser.ask("Target.closeTarget", targetId=self._target)

    def _events(self) -> list[dict[str, Any]]:
        return [event for event in self.browser.events if event.get("sessionId") == self._session]
