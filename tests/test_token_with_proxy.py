"""github_mcp_proxy.py with its --token-command: the upstream takes live tokens only."""

from __future__ import annotations

import http.client
import json
import shlex
import subprocess
import sys
import time
import unittest
from pathlib import Path
from typing import Any

from tests.fakes import mcp_upstream
from tests.quick import BARE
from tests.support import ROOT
from tests.token_case import SCRIPT
from tests.token_case import Case

PROXY = ROOT / "github_mcp_proxy.py"
SECRET = "a-secret-of-this-test-0123456789abcdef"
CALL = {
    "jsonrpc": "2.0", "id": 1, "method": "tools/call",
    "params": {"name": "get_file_contents", "arguments": {"owner": "octo", "repo": "widgets", "path": "x"}},
}  # fmt: skip


class WithProxyTest(Case):
    def setUp(self) -> None:
        super().setUp()
        self.profile(key=str(self.key), permissions="dev")
        self.upstream = mcp_upstream.Upstream()
        self.upstream.__enter__()
        self.addCleanup(self.upstream.__exit__, None, None, None)
        self.used: set[str] = set()

        def live() -> set[str]:
            tokens = list(self.github.tokens.items())
            lines = {f"Bearer {token}" for token, end in tokens if end > time.time()}
            self.used.update(lines)
            return lines

        self.upstream.tokens = set()
        self.upstream.accepted_lines = live  # type: ignore[method-assign]

    def started(self, script: Path, *, quick_ends: str = "") -> int:
        """The port of a proxy whose tokens come from the profile `w`."""
        token_script = SCRIPT
        if quick_ends:
            token_script = self.prepared("quick_token.py", "github_app_token", quick_ends)
        command = [sys.executable, str(token_script), "token", "--profile", "w", "--format", "json"]
        env = {
            **BARE, "HOME": str(self.home), "GITHUB_MCP_OWNER": "octo", "GITHUB_MCP_REPO": "widgets",
            "GITHUB_MCP_SECRET": SECRET, "GITHUB_MCP_UPSTREAM": self.upstream.url,
        }  # fmt: skip
        argv = [sys.executable, str(script), "--token-command", shlex.join(command)]
        self.errors = open(self.home / "errors", "w+")
        self.addCleanup(self.errors.close)
        process = subprocess.Popen(
            argv,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        assert process.stdin and process.stdout
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.stdin.close)
        self.addCleanup(process.terminate)
        line = process.stdout.readline()
        self.assertTrue(line, (self.home / "errors").read_text())
        return int(line)

    def prepared(self, name: str, module: str, line: str) -> Path:
        text = (
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {module} as m\n"
            f"{line}\nsys.exit(m.main())\n"
        )
        return self.write(name, text.encode())

    def ask(self, port: int) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        headers = {
            "Authorization": f"Bearer {SECRET}", "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-06-18",
        }  # fmt: skip
        connection.request("POST", "/mcp", json.dumps(CALL), headers)
        body = connection.getresponse().read().decode()
        connection.close()
        line = next(line for line in body.splitlines() if "jsonrpc" in line)
        answer: Any = json.loads(line.partition("data: ")[2] or line)
        return str(answer.get("result", answer)["content"][0]["text"])

    def test_the_vm_does_not_notice_that_a_token_expires(self) -> None:
        """Tokens that live two seconds, for an hour's; each is dead when it has expired."""
        self.github.life = 2.0
        proxy = self.prepared("quick_proxy.py", "github_mcp_proxy", "m.TOKEN_MARGIN = 1")
        port = self.started(proxy, quick_ends="m.MIN_LIFE = 1")
        until = time.monotonic() + 30
        while len(self.used) < 3 and time.monotonic() < until:
            self.assertEqual(self.ask(port), "ok get_file_contents")
            time.sleep(0.05)
        self.assertEqual(len(self.used), 3)
        self.assertNotIn("failed", (self.home / "errors").read_text())

    def test_a_token_that_github_revoked_is_replaced(self) -> None:
        """The cache still has it; the proxy says that it is dead."""
        port = self.started(PROXY)
        self.assertEqual(self.ask(port), "ok get_file_contents")
        self.github.tokens.clear()
        self.assertEqual(self.ask(port), "ok get_file_contents")
        self.assertEqual(len(self.github.paths("POST")), 2)


if __name__ == "__main__":
    unittest.main()
