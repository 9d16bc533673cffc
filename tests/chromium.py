"""A headless Chromium, driven over WebDriver's plain HTTP."""

from __future__ import annotations

import base64
import json
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


ROOT = Path(__file__).parents[1]
AXE = ROOT / "build" / "axe" / "package" / "axe.min.js"
SCREENSHOTS = ROOT / "build" / "screenshots"


class Browser:
    """Drive one browser window."""

    def __init__(self, port: int, profile: Path) -> None:
        self.base = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window of that size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", {"features": scheme})
        self._call("POST", f"{self.session}/url", {"url": path.as_uri()})

    def run(self, script: str) -> Any:
        """Return what a script returns in the page."""
        return self._call("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, seconds: float = 10) -> float:
        """Wait until a script returns something true; return how many seconds that took."""
        started = time.monotonic()
        while not self.run(script):
            if time.monotonic() - started > seconds:
                raise TimeoutError(f"After {seconds} s this is still not so: {script}")
            time.sleep(0.02)
        return time.monotonic() - started

    def faults(self) -> list[dict[str, Any]]:
        """Return what axe-core calls a serious or critical fault of accessibility: its rule and where it is."""
        if not AXE.exists():
            pytest.skip(f"axe-core is not at {AXE}: `make browser` fetches it")
        self.run(AXE.read_text(encoding="utf-8") + ";window.axe = axe;")
        script = """
            const done = arguments[arguments.length - 1];
            const where = (fault) => fault.nodes.slice(0, 3).map((node) => node.target.join(" "));
            axe.run(document, { resultTypes: ["violations"] }).then((found) => done(found.violations
              .filter((fault) => ["serious", "critical"].includes(fault.impact))
              .map((fault) => ({ rule: fault.id, where: where(fault) }))));
        """
        return self._call("POST", f"{self.session}/execute/async", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        """Type into the first element that a CSS selector finds."""
        found = self._call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self._call("POST", f"{self.session}/element/{next(iter(found.values()))}/value", {"text": text})

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        steps = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._call("POST", f"{self.session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def click(self, selector: str) -> None:
        """Click the first element that a CSS selector finds, as a hand would."""
        found = self._call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self._call("POST", f"{self.session}/element/{next(iter(found.values()))}/click", {})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Return the entries of the log "browser" or "performance" since the last call."""
        return self._call("POST", f"{self.session}/se/log", {"type": kind})

    def screenshot(self, path: Path) -> None:
        """Write what the window shows."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("GET", f"{self.session}/screenshot")))

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        """Send a DevTools command."""
        return self._call("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def close(self) -> None:
        """End the session."""
        self._call("DELETE", self.session)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
