"""The GitHub proxy under peers that break the rules: none may stop it, fill it or mix up answers."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import github_mcp_proxy as proxy
from tests.fakes import mcp_upstream as fake
from tests.support import ROOT
from tests.support import wait_for
from tests.test_proxy_http import BARE
from tests.test_proxy_http import INITIALIZE
from tests.test_proxy_http import SCRIPT
from tests.test_proxy_http import SECRET
from tests.test_proxy_http import TOKEN
from tests.test_proxy_http import Client
from tests.test_proxy_http import Proxy
from tests.test_proxy_http import call
from tests.test_proxy_http import request
from tests.test_proxy_http import text_of

QUICK = 5.0  # seconds in which an answer must have come that needs milliseconds
MIB = 1 << 20
PROC = Path("/proc/self/fd").exists()
RST = struct.pack("ii", 1, 0)


def vm_rss(pid: int) -> int:
    """Bytes of memory in use."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


class WorldTest(unittest.TestCase):
    """An upstream and a proxy for each test; whatever state the proxy is in, it ends with it."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.upstream = self.start_upstream()

    def start_upstream(self) -> fake.Upstream:
        upstream = fake.Upstream()
        upstream.__enter__()
        self.addCleanup(upstream.__exit__)
        return upstream

    def start(
        self, *argv: str, lines: int = 1, constants: dict[str, Any] | None = None, **env: str
    ) -> Proxy:
        """A proxy; with `constants`, one whose limits are lower."""
        script = SCRIPT
        if constants:
            script = self.folder / "lowered.py"
            script.write_text(
                f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                f"import github_mcp_proxy as p; vars(p).update({constants!r}); sys.exit(p.main())\n"
            )
        upstream = env.pop("upstream", self.upstream.url)
        running = Proxy(upstream, *argv, script=script, lines=lines, **env)
        self.addCleanup(self.end, running)
        return running

    def end(self, running: Proxy) -> None:
        running.process.kill()
        running.stop()

    def connect(self, running: Proxy, timeout: float = QUICK) -> Client:
        client = Client(running.port)
        client.socket.settimeout(timeout)
        self.addCleanup(client.close)
        return client

    def outcome(self, client: Client) -> str:
        """What became of a request: "error CODE", "result", "closed" or "silence"."""
        try:
            _, _, body = client.read()
            data = body.rpartition(b"data: ")[2] if b"data: " in body else body
            answer = json.loads(data)
        except socket.timeout:
            return "silence"
        except (OSError, ValueError, KeyError):
            return "closed"
        return f"error {answer['error']['code']}" if "error" in answer else "result"

    def assert_still_serves(self, running: Proxy) -> None:
        client = self.connect(running)
        self.upstream.handlers.clear()
        self.assertEqual(client.ask(request("ping"))["result"], {})
        self.assertNotIn("Traceback", running.stderr())
        self.assertNotIn("never retrieved", running.stderr())


class HostileClientTest(WorldTest):
    def test_a_long_run_of_question_marks_takes_no_time(self) -> None:
        """In what is refused, and so quoted; in an answer; and the signals are still heard."""
        marks = "?" * 200_000
        running = self.start()
        for message in (
            request(marks),
            call("", name=marks),
            call(marks),
            call("", name="add_issue_comment", issue_number=1, body=marks),
            {**request("ping"), marks: 1},
        ):
            with self.subTest(str(message)[:60]):
                client = self.connect(running)
                try:
                    client.ask(message)
                except socket.timeout:
                    self.fail(f"no answer in {QUICK} s")
        self.assertEqual(running.stop(), 0)

    def test_a_long_run_of_question_marks_in_an_answer_takes_no_time(self) -> None:
        running = self.start()
        for marks in ("?" * 65_536, "?a" * 32_768, "\\u0026?" * 10_000, "?\\" * 30_000):
            with self.subTest(marks[:8]):
                self.upstream.on("README.md", fake.text(marks))
                begun = time.monotonic()
                client = self.connect(running)
                self.assertEqual(text_of(client.ask(call())), marks)
                self.assertLess(time.monotonic() - begun, QUICK)

    def test_a_client_that_pipelines_and_never_reads_is_not_answered_on_and_on(self) -> None:
        running = self.start()
        self.upstream.on("README.md", fake.big(MIB, sse=False))
        client = self.connect(running)
        for number in range(300):
            client.send(call(id=number))
        calls = 0
        while len(self.upstream.calls()) > calls:  # until it takes no more
            calls = len(self.upstream.calls())
            time.sleep(0.5)
        self.assertLess(calls, 30, "the answers that nobody reads are held in memory")
        self.assertEqual(client.read()[0], 200)

    def test_a_client_that_never_reads_its_last_answer_is_closed(self) -> None:
        """`Connection: close`, an answer larger than the socket's buffers, and no reading."""
        if not PROC:
            self.skipTest("no /proc")
        limits = {"STALL_SECONDS": 1, "IDLE_SECONDS": 1, "REQUEST_SECONDS": 1}
        running = self.start(constants=limits)
        self.upstream.on("README.md", fake.big(20 * MIB, sse=False))
        for line in ("Connection: keep-alive", "Connection: close"):
            with self.subTest(line):
                before = running.descriptors()
                client = self.connect(running)
                client.send(call(), line)
                self.upstream.wait_for_calls(1)
                deadline = time.monotonic() + QUICK
                self.upstream.drop_connections()
                while running.descriptors() > before and time.monotonic() < deadline:
                    time.sleep(0.05)
                    self.upstream.drop_connections()
                self.assertLessEqual(running.descriptors(), before)

    def test_a_stream_that_is_not_read_is_held_back_and_then_closed(self) -> None:
        sent = 0

        def flood(x: fake.Exchange) -> None:
            nonlocal sent
            x.stream()
            message = {**fake.note(1), "params": {"progressToken": "p", "message": "m" * 50_000}}
            while True:
                x.event(message)
                sent += 50_000

        running = self.start(constants={"STALL_SECONDS": 1})
        self.upstream.on("README.md", flood)
        client = self.connect(running)
        client.send(call())
        self.upstream.wait_for_calls(1)
        self.upstream.wait_until_free()
        self.assertLess(sent, 40 * MIB)
        self.assert_still_serves(running)

    def test_a_client_that_sends_on_and_goes_away_is_noticed(self) -> None:
        """A stream of GET, then more bytes than are held, so that nothing more is read."""
        self.upstream.stateful = True
        running = self.start()
        client = self.connect(running)
        client.send(request("initialize", **INITIALIZE))
        session = f"Mcp-Session-Id: {client.read()[1]['mcp-session-id']}"
        client.socket.sendall(client.head("GET", "/mcp", "Accept: text/event-stream", session))
        client.read_head()
        client.socket.setblocking(False)
        try:
            while client.socket.send(b"x" * MIB):
                time.sleep(0.02)
        except BlockingIOError:
            pass
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        client.close()
        deadline = time.monotonic() + QUICK
        while self.upstream.busy() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(self.upstream.busy(), [])

    def test_the_refusal_of_a_large_body_arrives(self) -> None:
        """A client that writes its body first must be able to read why it is refused."""
        running = self.start()
        for _ in range(5):
            client = self.connect(running)
            body = b"x" * (6 * MIB)
            try:
                client.socket.sendall(client.head("POST", "/mcp", length=len(body)) + body)
            except OSError:
                pass  # closed while it was still writing
            self.assertEqual(client.read()[0], 413)

    def test_more_clients_than_the_limit_are_told(self) -> None:
        running = self.start(constants={"MAX_CLIENTS": 3})
        clients = [self.connect(running) for _ in range(3)]
        self.assertEqual(clients[2].ask(request("ping"))["result"], {})
        refused = self.connect(running)
        self.assertEqual(refused.read()[0], 503)
        self.assertTrue(refused.is_closed())
        clients[0].close()
        wait_for(lambda: self.outcome_of_ping(running) == "result", "there is room again")

    def outcome_of_ping(self, running: Proxy) -> str:
        client = self.connect(running)
        try:
            client.send(request("ping"))
            return self.outcome(client)
        except OSError:
            return "closed"

    def test_the_log_has_no_line_that_a_client_wrote(self) -> None:
        running = self.start()
        client = self.connect(running)
        forged = "x\ngithub_mcp_proxy: forged \x1b[2J"
        client.ask(request(forged))
        client.ask(call("", name=forged))
        client.ask(call("", name="get_me\u202e\u2028"))
        client.send({"jsonrpc": "2.0", "method": forged})
        client.read()
        text = running.stderr()
        self.assertNotIn("\x1b", text)
        self.assertNotIn("\u202e", text)
        self.assertNotIn("github_mcp_proxy: forged", text.splitlines())
        self.assertNotRegex(text, r"(?m)^github_mcp_proxy: forged")

    def test_one_that_leaves_at_any_moment_leaves_nothing_behind(self) -> None:
        running = self.start()
        self.upstream.on("README.md", fake.hang_in_stream)
        self.upstream.on("other", fake.hang)
        for number in range(200):
            client = self.connect(running)
            client.send(call("README.md" if number % 2 else "other"))
            time.sleep(0.0001 * (number % 40))
            if number % 3:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
            client.close()
        self.upstream.wait_until_free()
        self.assert_still_serves(running)

    def test_an_answer_does_not_go_to_the_next_client(self) -> None:
        """One leaves in the middle of its call; those who come then get their own answers."""
        running = self.start()
        gate = fake.Gate(1)
        self.upstream.on("first", gate)
        first = self.connect(running)
        first.send(call("first", id=1))
        gate.step()
        first.read_head()
        first.chunk()
        first.close()
        second = self.connect(running)
        self.upstream.on("second", fake.text("for the second"))
        gate.step()
        self.assertEqual(text_of(second.ask(call("second", id=1))), "for the second")
        self.upstream.wait_until_free()


class HostileUpstreamTest(WorldTest):
    def test_every_fault_ends_in_an_error_or_a_closed_connection(self) -> None:
        running = self.start("--timeout", "2")
        for name, handler in fake.FAULTS.items():
            with self.subTest(name):
                self.upstream.on("README.md", handler)
                client = self.connect(running)
                client.send(call())
                self.assertRegex(self.outcome(client), r"^(error -?\d+|closed)$")
                self.assert_still_serves(running)

    def test_answers_of_the_wrong_shape_are_errors(self) -> None:
        """Whatever JSON it is, whoever asked gets an answer; no exception is left over."""

        def result(value: Any) -> fake.Handler:
            return lambda x: x.json(x.result(value))

        def raw(text: str) -> fake.Handler:
            return fake.status(200, text.encode())

        def event(message: Any) -> fake.Handler:
            return fake.events(fake.event(message))

        deep = "[" * 50_000 + "]" * 50_000
        search = call("", name="search_issues", query="crash")
        initialize = request("initialize", **INITIALIZE)
        huge = '{"jsonrpc":"2.0","id":1,"error":{"code":1e999,"message":"x"}}'
        table: Sequence[tuple[Any, fake.Handler]] = [
            (request("tools/list"), result({"tools": [{"name": ["x"], "inputSchema": {}}]})),
            (request("tools/list"), result({"tools": 5})),
            (request("tools/list"), result({"tools": {"a": 1}})),
            (request("tools/list"), result({"tools": [{"name": "get_tag", "inputSchema": {"required": None}}]})),
            (request("tools/list"), result({"tools": [{"name": "get_tag", "inputSchema": {"required": [[]]}}]})),
            (request("tools/list"), result({"tools": [{"name": "get_tag", "inputSchema": {"properties": 7}}]})),
            (request("tools/list"), result({"tools": [{"name": "issue_read", "inputSchema": {"properties": {"method": {"enum": 1}}}}]})),
            (initialize, result({"serverInfo": "github"})),
            (initialize, result({"capabilities": ["tools"]})),
            (call(), event({"jsonrpc": "2.0", "method": ["x"]})),
            (call(), event({"jsonrpc": "2.0", "id": [1], "method": "ping"})),
            (call(), event({"jsonrpc": "2.0", "id": {}, "result": {}})),
            (call(), event(7)),
            (call(), fake.status(400, huge.encode())),
            (call(), fake.status(404, deep.encode())),
            (search, lambda x: x.json(x.text(deep))),
            (search, lambda x: x.json(x.text('{"items":' + "[" * 900 + "]" * 900 + "}"))),
            (search, lambda x: x.json(x.text('{"items":[{"repository":[1],"url":{}}]}'))),
            (search, lambda x: x.json(x.result({"content": [{"type": "text", "text": None}]}))),
            (search, lambda x: x.json(x.result({"content": [None]}))),
        ]  # fmt: skip
        running = self.start("--timeout", "2")
        for number, (message, handler) in enumerate(table):
            with self.subTest(f"{number}: {message['method']}"):
                self.upstream.on(message["params"].get("path", ""), handler)
                self.upstream.on("README.md", handler)
                self.upstream.on(message["params"].get("name", message["method"]), handler)
                client = self.connect(running)
                client.send(message)
                self.assertNotEqual(self.outcome(client), "silence")
                self.upstream.reset()
        self.assert_still_serves(running)

    def test_what_it_says_of_the_repository_may_be_anything(self) -> None:
        """A write waits for that answer; it must not wait for ever."""
        for said in (
            '{"items":[{"full_name":null,"id":1}]}',
            '{"items":[{"full_name":"good/r","id":1e999}]}',
            '{"items":[{"full_name":"good/r","id":null}]}',
            '{"items":' + "[" * 50_000 + "]" * 50_000 + "}",
            '{"items":{"a":1}}',
            "7",
        ):
            with self.subTest(said[:60]):
                upstream = self.upstream = Learning(said)
                upstream.__enter__()
                self.addCleanup(upstream.__exit__)
                running = self.start("--timeout", "2")
                client = self.connect(running)
                client.send(call("", name="create_branch", branch="fix"))
                self.assertNotEqual(self.outcome(client), "silence")
                self.assert_still_serves(running)

    def test_bytes_after_an_answer_are_not_the_next_answer(self) -> None:
        """Two answers for one request, in one piece, in two, and inside the stream."""
        running = self.start()

        def poisoned(pause: float) -> fake.Handler:
            def handler(x: fake.Exchange) -> None:
                body = fake.dumps(x.text("first"))
                more = fake.dumps({**x.text("POISON"), "id": 1})
                answer, second = (
                    x.head_of(200, "Content-Type: application/json", f"Content-Length: {len(b)}") + b
                    for b in (body, more)
                )  # fmt: skip
                if pause:
                    x.send(answer)
                    time.sleep(pause)
                    x.send(second)
                else:
                    x.send(answer + second)

            return handler

        for pause in (0, 0.05):
            self.upstream.on("poison", poisoned(pause))
            client = self.connect(running)
            self.assertEqual(text_of(client.ask(call("poison"))), "first")
            time.sleep(3 * pause)  # the bytes are there before the next request is
            for _ in range(3):
                self.assertEqual(text_of(client.ask(call())), "ok get_file_contents")

    def test_a_stream_that_goes_on_after_its_answer_is_not_used_again(self) -> None:
        running = self.start()

        def endless(x: fake.Exchange) -> None:
            x.stream()
            x.event(x.text("answer"))
            for _ in range(20):
                x.event({"jsonrpc": "2.0", "id": 1, "result": {"content": []}})
                time.sleep(0.01)
            x.hang()

        self.upstream.on("endless", endless)
        client = self.connect(running)
        self.assertEqual(text_of(client.ask(call("endless"))), "answer")
        for _ in range(5):
            self.assertEqual(text_of(client.ask(call())), "ok get_file_contents")
        self.upstream.wait_until_free()

    def test_a_large_answer_leaves_its_connection_in_order(self) -> None:
        running = self.start()
        self.upstream.on("big", fake.big(5 * MIB, sse=False))
        client = self.connect(running)
        for _ in range(3):
            self.assertGreater(len(text_of(client.ask(call("big")))), 4 * MIB)
            self.assertEqual(text_of(client.ask(call())), "ok get_file_contents")
        self.assertLessEqual(self.upstream.accepted, 3)

    def test_a_large_answer_is_json_or_an_error(self) -> None:
        running = self.start()
        begin = b'{"jsonrpc":"2.0","id":1,'
        for rest in (
            b"x" * 2 * MIB,
            b'"result":{"a":"' + b"x" * 2 * MIB,
            b'"method":"ping"}' * 200_000,
        ):
            with self.subTest(rest[:20]):
                self.upstream.on("README.md", fake.status(200, begin + rest))
                client = self.connect(running)
                client.send(call())
                self.assertRegex(self.outcome(client), "^error")

    def test_data_of_several_lines_stays_whole_when_it_is_redacted(self) -> None:
        running = self.start()
        text = json.dumps(
            {**fake.note(1), "params": {"progressToken": "p", "message": TOKEN}}, indent=1
        )
        data = "".join(f"data: {line}\n" for line in text.splitlines()) + "\n"
        self.upstream.on("README.md", fake.events(data.encode()))
        client = self.connect(running)
        client.send(call())
        client.read_head()
        note = json.loads(proxy.event_data(client.chunk()))
        self.assertEqual(note["params"]["message"], "[redacted]")

    def test_line_ends_of_an_event_may_differ(self) -> None:
        """A blank line is two line ends, of whatever kind."""
        running = self.start()
        for end in (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\r\n\r"):
            with self.subTest(end):
                gate = threading.Event()

                def handler(
                    x: fake.Exchange, end: bytes = end, gate: threading.Event = gate
                ) -> None:
                    x.stream()
                    x.send(fake.chunk(b"data: " + fake.dumps(fake.note(1)) + end))
                    x.send(fake.chunk(b"data: " + fake.dumps(x.text("done")) + end))
                    gate.wait(QUICK)
                    x.end()

                self.upstream.on("README.md", handler)
                client = self.connect(running, 2)
                client.send(call())
                _, _, body = client.read()
                gate.set()
                self.assertIn(b"done", body)
                self.assertIn(b'"progress":1', body)

    def test_a_session_that_ends_while_its_stream_is_open(self) -> None:
        """Then the upstream asks something on that stream."""
        running = self.start("--timeout", "2")
        self.upstream.stateful = True
        client = self.connect(running)
        client.send(request("initialize", **INITIALIZE))
        session = f"Mcp-Session-Id: {client.read()[1]['mcp-session-id']}"
        go_on = threading.Event()

        def handler(x: fake.Exchange) -> None:
            x.stream()
            x.event(fake.note(1))
            go_on.wait(fake.PATIENCE)
            x.event({"jsonrpc": "2.0", "id": "q", "method": "elicitation/create", "params": {}})
            x.event(x.text("done"))
            x.end()

        self.upstream.on("README.md", handler)
        client.send(call(), session)
        client.read_head()
        client.chunk()
        other = self.connect(running)
        self.assertEqual(other.raw(other.head("DELETE", "/mcp", session))[0], 204)
        go_on.set()
        try:
            rest = b"".join(iter(client.chunk, b""))
        except ValueError:  # closed
            rest = b"closed"
        self.assertTrue(rest)
        self.assert_still_serves(running)

    def test_a_timeout_is_not_tried_again(self) -> None:
        """Neither a second time, nor once for every idle connection."""
        running = self.start("--timeout", "1")
        gates = [fake.Gate(0) for _ in range(3)]
        clients = [self.connect(running, 15) for _ in gates]
        for number, (gate, client) in enumerate(zip(gates, clients)):
            self.upstream.on(f"file{number}", gate)
            client.send(call(f"file{number}"))
        self.upstream.wait_for_calls(3)
        for gate in gates:
            gate.step()
        for client in clients:
            client.read()  # three idle connections are there now
        self.upstream.on("hang", fake.hang)
        self.assertIn("in time", clients[0].ask(call("hang"))["error"]["message"])
        self.assertEqual(len(self.upstream.calls("hang")), 1)

    def test_a_write_after_the_upstream_closed_its_idle_connections(self) -> None:
        running = self.start()
        client = self.connect(running)
        self.assertIn("result", client.ask(call()))
        self.upstream.drop_connections()
        self.upstream.wait(lambda: not self.upstream.open, "all are closed")
        comment = call("", name="add_issue_comment", issue_number=1, body="b")
        wait_for(lambda: running.descriptors() < 10 if PROC else True, "it has noticed")
        self.assertEqual(text_of(client.ask(comment)), "ok add_issue_comment")
        self.assertEqual(len(self.upstream.calls("add_issue_comment")), 1)

    def test_questions_that_were_never_answered_do_not_stop_later_ones(self) -> None:
        running = self.start()
        question = {"jsonrpc": "2.0", "method": "elicitation/create", "params": {"message": "?"}}
        for number in range(110):
            asked = fake.event({**question, "id": f"q{number}"})
            self.upstream.on("README.md", fake.events(asked))
            client = self.connect(running)
            client.send(call())
            _, _, body = client.read()
            client.close()
        self.assertIn(b"elicitation/create", body)

    def test_what_it_answers_to_delete_has_no_length(self) -> None:
        """RFC 9110, 8.6: no Content-Length in a 204."""
        self.upstream.stateful = True
        running = self.start()
        client = self.connect(running)
        client.send(request("initialize", **INITIALIZE))
        session = f"Mcp-Session-Id: {client.read()[1]['mcp-session-id']}"
        client.socket.sendall(client.head("DELETE", "/mcp", session))
        status, headers = client.read_head()
        self.assertEqual((status, headers), (204, {}))
        self.assertEqual(client.ask(request("ping"))["result"], {})


class Learning(fake.Upstream):
    """One that says `said` when it is asked which repository this is."""

    def __init__(self, said: str) -> None:
        super().__init__()
        self.said = said

    def call(self, x: fake.Exchange) -> None:
        if x.own:
            return x.answer(x.text(self.said))
        return super().call(x)


class ErrorTest(WorldTest):
    def test_a_mismatch_has_the_requests_id(self) -> None:
        running = self.start()
        message = call(id="mine")
        message["params"]["_meta"] = {fake.MODERN_META: fake.MODERN}
        client = self.connect(running)
        client.send(message, f"MCP-Protocol-Version: {fake.MODERN}", "Mcp-Method: tools/list")
        status, _, body = client.read()
        answer = json.loads(body)
        self.assertEqual((status, answer["error"]["code"], answer["id"]), (400, -32020, "mine"))

    def test_a_method_that_is_not_served_is_told_which_are(self) -> None:
        """RFC 9110, 15.5.6: a 405 must have Allow."""
        running = self.start()
        client = self.connect(running)
        status, headers, _ = client.raw(client.head("PUT"))
        self.assertEqual((status, headers.get("allow")), (405, "POST, GET, DELETE"))

    def test_chunk_sizes_are_read_strictly(self) -> None:
        head = b"POST /mcp HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        for line in (
            b"\n1",
            b" 1",
            b"1\n",
            b"1\x0b",
            b"1\t",
            b"1;a\nb",
            b"1;\0",
            b"1;a\rb",
            b";1",
            b"",
        ):
            with self.subTest(line):
                incoming = proxy.Incoming(request=True, max_body=1000)
                with self.assertRaises(proxy.ProtocolError):
                    incoming.feed(head + line + b"\r\na\r\n0\r\n\r\n")


class HostTest(WorldTest):
    """What is wrong on the proxy's own side."""

    def run_script(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {**BARE, "GITHUB_MCP_TOKEN": TOKEN, "GITHUB_MCP_OWNER": "o",
                       "GITHUB_MCP_REPO": "r", "GITHUB_MCP_UPSTREAM": self.upstream.url, **env}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--exit-with-stdin", *argv], env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = process.communicate(timeout=20)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def test_settings_that_cannot_work_are_refused_at_once(self) -> None:
        garbage = self.folder / "ca.pem"
        garbage.write_text("this is no certificate\n")
        for argv in (
            ["--ca-file", str(garbage), "--upstream", "https://localhost:1/"],
            ["--ca-file", str(self.folder), "--upstream", "https://localhost:1/"],
            ["--upstream", "http://127.0.0.1:99999/"],
            ["--upstream", "https://a..b/"],
            ["--upstream", f"https://{'a' * 64}.com/"],
        ):
            with self.subTest(argv):
                done = self.run_script(*argv)
                self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_policy_files_that_cannot_be_read_as_meant(self) -> None:
        policy = self.folder / "policy.ini"
        for text in (
            b"readonly = 1\n",
            b"[policy]\nread_only = 1\n",
            b"[policy]\nallow = everything\n",
            b"[policy]\nreadonly = 1\nreadonly = 0\n",
            b"[policy]\nwrites_per_hour = -1\n",
            b"[policy]\nbranches\n",
            b"\xff\xfe",
        ):
            with self.subTest(text):
                policy.write_bytes(text)
                done = self.run_script("--policy", str(policy))
                self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
                self.assertIn("error: ", done.stderr.splitlines()[0])
                self.assertNotIn("Traceback", done.stderr)

    def test_a_check_of_what_is_no_mcp_server(self) -> None:
        for handler in (fake.status(200, b"<html>"), fake.status(200, b"{}"), fake.status(500),
                        fake.status(200, b"[]"), fake.status(404)):  # fmt: skip
            with Rude(handler) as upstream:
                done = self.run_script("--check-upstream", "--upstream", upstream.url)
                self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)
                self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)

    def test_it_ends_while_the_token_command_still_runs(self) -> None:
        pids = self.folder / "pid"
        script = self.folder / "command.py"
        script.write_text(
            "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
        )
        running = self.start("--token-command", f"{sys.executable} {script} {pids}")
        wait_for(lambda: pids.exists() and pids.read_text(), "the command runs")
        pid = int(pids.read_text())
        self.addCleanup(kill_if_alive, pid)
        running.process.terminate()
        try:
            self.assertEqual(running.process.wait(QUICK), 0)
        except subprocess.TimeoutExpired:
            self.fail("it waits for the command")

    def test_clients_that_leave_during_the_token_command(self) -> None:
        counter, go_on = self.folder / "count", self.folder / "go"
        script = self.folder / "command.py"
        script.write_text(
            "import json, os, sys, time\n"
            f"open({str(counter)!r}, 'a').write('x')\n"
            f"while not os.path.exists({str(go_on)!r}): time.sleep(0.01)\n"
            "print(json.dumps({'token': 'token-of-the-command-0123456789'}))\n"
        )
        running = self.start("--token-command", f"{sys.executable} {script}")
        clients = [self.connect(running) for _ in range(20)]
        for client in clients:
            client.send(call())
        wait_for(counter.exists, "the command runs")
        for client in clients[:19]:
            client.close()
        go_on.touch()
        self.assertEqual(json.loads(clients[19].read()[2])["id"], 1)
        self.assertEqual(counter.read_text(), "x")
        self.upstream.wait_until_free()
        self.assert_still_serves(running)

    def test_a_failing_token_command_is_run_once_for_a_request(self) -> None:
        """However many connections to the upstream are idle."""
        counter = self.folder / "count"
        script = self.folder / "command.py"
        script.write_text(
            "import json, os, sys, time\n"
            f"open({str(counter)!r}, 'a').write('x')\n"
            f"if os.path.getsize({str(counter)!r}) > 1: sys.exit(1)\n"
            "print(json.dumps({'token': 'token-of-the-command-0123456789', 'expires_at': time.time() + 3}))\n"
        )
        running = self.start(
            "--token-command", f"{sys.executable} {script}", constants={"TOKEN_MARGIN": 1}
        )
        clients = [self.connect(running) for _ in range(3)]
        gates = [fake.Gate(0) for _ in clients]
        for number, (gate, client) in enumerate(zip(gates, clients)):
            self.upstream.on(f"file{number}", gate)
            client.send(call(f"file{number}"))
        self.upstream.wait_for_calls(3)
        for gate in gates:
            gate.step()
        for client in clients:
            client.read()
        time.sleep(3.1)  # the token expires
        self.assertIn("token command", clients[0].ask(call())["error"]["message"])
        self.assertEqual(counter.read_text(), "xx")

    def test_a_late_refusal_of_the_old_token_does_not_ask_for_another(self) -> None:
        counter = self.folder / "count"
        script = self.folder / "command.py"
        script.write_text(
            "import json, os\n"
            f"open({str(counter)!r}, 'a').write('x')\n"
            f"n = os.path.getsize({str(counter)!r})\n"
            "print(json.dumps({'token': f'token-of-the-command-{n:010}'}))\n"
        )
        running = self.start("--token-command", f"{sys.executable} {script}")
        late = threading.Event()
        old = "Bearer token-of-the-command-0000000001"

        def refuse(wait: bool) -> fake.Handler:
            def handler(x: fake.Exchange) -> None:
                if x.headers["authorization"] == old:
                    if wait:
                        late.wait(fake.PATIENCE)
                    return x.body_of(401, b"no")
                return x.answer(x.text("with the new one"))

            return handler

        self.upstream.on("late", refuse(True))
        self.upstream.on("soon", refuse(False))
        one, two = self.connect(running), self.connect(running)
        one.send(call("late"))
        self.upstream.wait_for_calls(1)
        self.assertEqual(text_of(two.ask(call("soon"))), "with the new one")
        late.set()
        self.assertEqual(text_of(json.loads(one.read()[2])), "with the new one")
        self.assertEqual(counter.read_text(), "xx")

    def test_text_of_refused_calls_is_neither_logged_nor_audited(self) -> None:
        audit = self.folder / "audit.jsonl"
        running = self.start("--audit", str(audit), GITHUB_MCP_PROXY_DEBUG="1")
        client = self.connect(running)
        words = "words that the agent wrote"
        for message in (
            call("", name="add_issue_comment", issue_number=1, body=words + "\0"),
            call("", name="add_issue_comment", issue_number=1, body=[words]),
            call("p", name="create_or_update_file", branch="b", content={"x": words}),
            call("", name="issue_write", method="create", title=words + "\n"),
            call("", name="add_issue_comment", issue_number=0, body=words),
        ):
            self.assertTrue(client.ask(message)["result"]["isError"])
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        self.assertEqual([line["verdict"] for line in lines], ["refuse"] * 5)
        self.assertNotIn(words, audit.read_text())
        self.assertNotIn(words, running.stderr())

    def test_an_audit_file_that_cannot_be_written_is_no_silence(self) -> None:
        """The disk is full: nothing passes unrecorded, and the client is told or closed."""
        audit = self.folder / "audit.jsonl"
        script = self.folder / "small.py"
        script.write_text(
            f"import resource, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
            "import github_mcp_proxy as p; sys.exit(p.main())\n"
        )
        running = Proxy(self.upstream.url, "--audit", str(audit), script=script)
        self.addCleanup(self.end, running)
        outcomes = []
        for _ in range(6):
            client = self.connect(running, 2)
            client.send(call())
            outcomes.append(self.outcome(client))
            client.close()
        self.assertNotIn("silence", outcomes)
        recorded = [json.loads(line) for line in audit.read_text().splitlines() if line[-1] == "}"]
        self.assertLessEqual(len(self.upstream.calls()), len(recorded))

    def test_nobody_reads_its_messages(self) -> None:
        """stderr is closed at the other end; requests are answered all the same."""
        environment = {**BARE, "GITHUB_MCP_TOKEN": TOKEN, "GITHUB_MCP_OWNER": "good",
                       "GITHUB_MCP_REPO": "r", "GITHUB_MCP_UPSTREAM": self.upstream.url,
                       "GITHUB_MCP_SECRET": SECRET}  # fmt: skip
        reader, writer = os.pipe()
        process = subprocess.Popen([sys.executable, str(SCRIPT)], env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=writer)  # fmt: skip
        os.close(writer)
        os.close(reader)
        try:
            assert process.stdout
            client = Client(int(process.stdout.readline()))
            client.socket.settimeout(QUICK)
            with client.socket, client.file:
                client.send(request("completion/complete"))
                self.assertRegex(self.outcome(client), "^error")
                self.assertEqual(client.ask(request("ping"))["result"], {})
        finally:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


class Rude(fake.Upstream):
    """One that answers everything in one way, the proxy's own requests too."""

    def __init__(self, handler: fake.Handler) -> None:
        super().__init__()
        self.handler = handler

    def dispatch(self, x: fake.Exchange) -> None:
        self.handler(x)


def kill_if_alive(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        pass


class LeakTest(WorldTest):
    def test_a_thousand_requests_leave_no_descriptor_and_little_memory(self) -> None:
        if not PROC:
            self.skipTest("no /proc")
        running = self.start()
        self.upstream.on("hang", fake.hang_in_stream)
        self.exchange(running, 100)
        self.settle(running)
        before = running.descriptors(), vm_rss(running.process.pid)
        self.exchange(running, 1000)
        self.settle(running)
        after = running.descriptors(), vm_rss(running.process.pid)
        self.assertLessEqual(after[0], before[0])
        self.assertLess(after[1] - before[1], 8 * MIB)
        self.assert_still_serves(running)

    def exchange(self, running: Proxy, count: int) -> None:
        """Whole requests on one connection, refused ones, and every tenth broken off."""
        client = self.connect(running)
        for number in range(count):
            if number % 10 == 0:
                rude = self.connect(running)
                rude.send(call("hang"))
                rude.close()
            client.send(call("../x") if number % 3 == 0 else call())
            self.assertEqual(client.read()[0], 200)
        client.close()

    def settle(self, running: Proxy) -> None:
        """Until nothing is open any more: idle connections to the upstream are dropped."""
        self.upstream.wait_until_free()

        def is_free() -> bool:
            self.upstream.drop_connections()
            return not self.upstream.open

        wait_for(is_free, "the connections to the upstream are closed")
        wait_for(lambda: running.descriptors() <= 9, "its sockets are closed")


if __name__ == "__main__":
    unittest.main()
