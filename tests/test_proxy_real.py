"""The GitHub proxy before the real github-mcp-server (found on PATH), over a fake GitHub API.

What is asserted is what reaches the API: this repository, and nothing else.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import unittest
import urllib.parse
from pathlib import Path
from typing import Any

import github_mcp_proxy as proxy
from tests.test_proxy_http import SECRET
from tests.test_proxy_http import TIMEOUT
from tests.test_proxy_http import Client
from tests.test_proxy_http import Proxy
from tests.test_proxy_http import request
from tests.tools import fuzz_proxy

SHA = "a" * 40
POLICY = (
    f"[policy]\nallow = {' '.join(proxy.ALLOW)}\ndefault_branch = main\nwrites_per_hour = 100000\n"
)

# A value for each parameter that some tool of the table must have.
EXAMPLES: dict[str, Any] = {
    "alertNumber": 1, "base": "main", "body": "b", "branch": "fix", "commentId": 1, "comment_id": 1,
    "content": "+1", "discussionNumber": 1, "event": "COMMENT", "files": [{"path": "a", "content": "x"}],
    "findingNumber": 1, "head": "fix", "issue_number": 5, "name": "bug", "path": "f.txt", "pullNumber": 1,
    "query": "crash", "resource_id": "1", "sha": SHA, "tag": "v1", "message": "m", "title": "t",
    "subjectType": "FILE", "job_id": 1, "color": "ff0000", "description": "d", "run_id": 1,
}  # fmt: skip


class Api(http.server.BaseHTTPRequestHandler):
    """Enough of GitHub's REST and GraphQL for the tools to go on to what they are about."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, str]] = []  # noqa: RUF012
    more: list[tuple[str, Any]] = []  # noqa: RUF012 - a test's own: (in the path or query, answer)

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.command, urllib.parse.unquote(self.path), body.decode()))
        made = self.answer_of(urllib.parse.urlsplit(self.path).path)
        for part, more in self.more:
            if re.search(part, urllib.parse.unquote(self.path) + body.decode()):
                made = more
        answer = json.dumps(made).encode()
        if isinstance(made, dict) and "Location" in made:
            self.send_response(301 if self.command == "GET" else 307)
            self.send_header("Location", f"http://{self.headers['Host']}{made['Location']}")
        else:
            created = self.command == "POST" and "graphql" not in self.path
            self.send_response(201 if created else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any

    def answer_of(self, path: str) -> Any:
        commit = {"sha": SHA, "type": "commit"}
        if "graphql" in path:
            return {"data": {"repository": {"id": "R_1", "isPrivate": True}}}
        for end, answer in (
            (r"/repos/good/r", {"id": 1, "name": "r", "default_branch": "main"}),
            (r"/git/ref/.*", {"ref": "refs/heads/main", "object": commit}),
            (r"/git/trees.*", {"sha": SHA, "truncated": False, "tree": []}),
            (r"/git/commits.*", {"sha": SHA, "tree": {"sha": SHA}}),
            (r"/search/.*", {"total_count": 0, "incomplete_results": False, "items": []}),
            (r"/(issues|pulls)/\d+", {**issue("good/r", 1), "head": {"sha": SHA}}),
            (r"/(releases|commits|contents|tags)/.*", {"sha": SHA, "id": 1}),
        ):  # fmt: skip
            if re.search(end + "$", path):
                return answer
        return [] if self.command == "GET" else {"id": 1, "number": 1}


def repository(name: str) -> dict[str, Any]:
    return {"id": 1, "full_name": name, "html_url": f"https://github.com/{name}"}


def reference(name: str) -> dict[str, Any]:
    return {"number": 3, "title": name, "state": "OPEN", "url": f"https://github.com/{name}/issues/3",
            "author": {"login": "a"}, "repository": {"nameWithOwner": name}}  # fmt: skip


def issue(name: str, number: int) -> dict[str, Any]:
    """An issue as GitHub's REST API gives it."""
    api = f"https://api.github.com/repos/{name}"
    user = {
        "login": "octo",
        "url": "https://api.github.com/users/octo",
        "html_url": "https://github.com/octo",
    }
    return {
        "number": number, "node_id": f"I_{name}_{number}", "title": f"title of {name}", "state": "open",
        "url": f"{api}/issues/{number}", "repository_url": api, "user": user, "assignees": [user],
        "html_url": f"https://github.com/{name}/issues/{number}",
        "labels": [{"id": 1, "name": "bug", "url": f"{api}/labels/bug"}],
        "milestone": {"number": 1, "url": f"{api}/milestones/1", "creator": user},
        "reactions": {"url": f"{api}/issues/{number}/reactions", "total_count": 0},
    }  # fmt: skip


def is_ours(path: str, body: str) -> bool:
    """Whether a request at the API is about good/r."""
    if "/graphql" in path:
        variables = json.loads(body).get("variables", {})
        named = (variables.get("owner"), variables.get("repo") or variables.get("name"))
        return named == ("good", "r") or set(variables) in (set(), {"ids"}, {"input"})
    if "/search/" in path:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)["q"][0]
        return bool(re.match(r"(is:\S+ )?repo:good/r( |$)", query))
    scopes_of_the_token = "/api/v3/"
    return path == scopes_of_the_token or bool(
        re.match(r"(/api/v3/repos|/raw)/good/r(/|\?|$)", path)
    )


def real_server(
    test: unittest.TestCase | type[unittest.TestCase],
) -> tuple[str, subprocess.Popen[bytes]]:
    """The URL and the process of a github-mcp-server over the Api, for as long as the test, or the
    class of tests, lasts."""
    cleanup = test.addClassCleanup if isinstance(test, type) else test.addCleanup
    api = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=api.serve_forever, daemon=True).start()
    cleanup(api.server_close)
    cleanup(api.shutdown)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        ["github-mcp-server", "http", "--listen-host", "127.0.0.1", "--port", str(port),
         "--gh-host", f"http://127.0.0.1:{api.server_address[1]}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    cleanup(server.wait)
    cleanup(server.terminate)
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return f"http://127.0.0.1:{port}/", server
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@unittest.skipUnless(shutil.which("github-mcp-server"), "github-mcp-server is not on PATH")
class RealServerTest(unittest.TestCase):
    upstream: str
    server: subprocess.Popen[bytes]
    running: Proxy

    @classmethod
    def setUpClass(cls) -> None:
        cls.upstream, cls.server = real_server(cls)
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        policy = Path(folder.name, "policy.ini")
        policy.write_text(POLICY)
        cls.running = Proxy(
            cls.upstream, "--policy", str(policy),
            GITHUB_MCP_LOCKDOWN="0", GITHUB_MCP_TOKEN="github_pat_" + "t" * 30,
        )  # fmt: skip
        cls.addClassCleanup(cls.running.stop)

    def setUp(self) -> None:
        Api.seen.clear()
        Api.more.clear()
        self.client = Client(self.running.port)
        self.addCleanup(self.client.close)

    def assert_only_ours(self) -> None:
        self.assertEqual([x for x in Api.seen if not is_ours(x[1], x[2])], [])

    def test_every_tool_reaches_this_repository_and_no_other(self) -> None:
        self.client.ask(request("initialize", protocolVersion="2025-11-25", capabilities={},
                                clientInfo={"name": "t", "version": "1"}))  # fmt: skip
        listed = self.client.ask(request("tools/list"))["result"]["tools"]
        self.assertGreater(len(listed), 45)
        silent = []
        for tool in listed:
            schema = tool["inputSchema"]
            self.assertNotIn("owner", schema.get("required", []))
            methods = schema["properties"].get("method", {}).get("enum", [None])
            for method in methods:
                arguments = {
                    key: EXAMPLES[key] for key in schema.get("required", []) if key != "method"
                }
                arguments.update({"method": method} if method else {})
                if tool["name"] in ("issue_write", "add_issue_comment", "label_write", "get_job_logs",
                                    "add_reply_to_pull_request_comment", "update_pull_request", "actions_list"):  # fmt: skip
                    for key in (
                        "title",
                        "body",
                        "issue_number",
                        "color",
                        "job_id",
                        "pullNumber",
                        "resource_id",
                    ):
                        if key in schema["properties"]:
                            arguments.setdefault(key, EXAMPLES[key])
                if tool["name"] == "create_or_update_file":
                    arguments["content"] = "x"
                before = len(Api.seen)
                answer = self.client.ask(
                    request("tools/call", name=tool["name"], arguments=arguments)
                )
                self.assertNotIn("Refused by", json.dumps(answer), (tool["name"], arguments))
                if len(Api.seen) == before:
                    silent.append(f"{tool['name']} {method}: {json.dumps(answer)[:150]}")
        self.assert_only_ours()
        self.assertEqual(silent, [], "calls that did not reach the API")
        self.assertGreater(len(Api.seen), 80)

    def tool(self, name: str, **arguments: Any) -> str:
        answer = self.client.ask(request("tools/call", name=name, arguments=arguments))
        text: str = answer["result"]["content"][0]["text"]
        return text

    def test_answers_about_this_repository_pass_whole(self) -> None:
        """The shapes are the server's own; what is of other repositories is not in what is left."""
        ours, others = issue("good/r", 1), issue("evil/secret", 2)
        commits = [{"sha": SHA, "html_url": f"https://github.com/{name}/commit/{SHA}", "commit": {
            "message": name}, "repository": repository(name)} for name in ("good/r", "evil/secret")]  # fmt: skip
        codes = [{"name": "a", "path": "src/a", "sha": SHA, "repository": repository(name)}
                 for name in ("good/r", "evil/secret")]  # fmt: skip
        found = {"total_count": 2, "incomplete_results": False}
        node = {"id": "I_good/r_1", "issueFieldValues": {"nodes": []}}
        relatives = {**node, "id": "I_good/r_5", "parent": reference("evil/secret"),
                     "subIssuesSummary": {"total": 1}, "closedByPullRequestsReferences": {
                         "totalCount": 2, "nodes": [reference("good/r"), reference("evil/secret")]}}  # fmt: skip
        parent = {"issue": {"parent": reference("evil/secret")}}
        Api.more[:] = [
            ("/search/issues", {**found, "items": [ours, others]}),
            ("/search/commits", {**found, "items": commits}),
            ("/search/code", {**found, "items": codes}),
            ("/issues/5$", issue("good/r", 5)),
            ("/issues/5/sub_issues", [ours, others]),
            ("/issues/77/comments", {"Location": "/api/v3/repositories/99/issues/1/comments"}),
            (
                "/repositories/99/issues/1/comments",
                [
                    {
                        "id": 1,
                        "body": "secret",
                        "html_url": "https://github.com/evil/secret/issues/1#issuecomment-1",
                    }
                ],
            ),
            ("/issues/77$", {"Location": "/api/v3/repositories/99/issues/1"}),
            ("/repositories/99/issues/1$", issue("evil/secret", 1)),
            (r"graphql.*nodes\(ids", {"data": {"nodes": [node]}}),
            (r"graphql.*\bparent\{", {"data": {"repository": parent}}),
            (r"graphql.*nodes\(ids.*closedBy", {"data": {"nodes": [relatives]}}),
        ]
        for name in ("search_issues", "search_pull_requests", "search_commits", "search_code"):
            with self.subTest(name):
                shown = json.loads(self.tool(name, query="crash"))
                self.assertEqual(len(shown["items"]), 1)
                self.assertNotIn("total_count", shown)
                self.assertIn("good/r", json.dumps(shown))
                self.assertNotIn("secret", json.dumps(shown))
        few = json.loads(self.tool("search_issues", query="crash", fields=["title"]))
        self.assertEqual(few["items"][0]["title"], "title of good/r")
        shown = json.loads(self.tool("issue_read", issue_number=5, method="get"))
        self.assertEqual((shown["title"], shown["has_parent"]), ("title of good/r", True))
        self.assertEqual(len(shown["closed_by_pull_requests"]["references"]), 1)
        self.assertNotIn("secret", json.dumps(shown))
        subs = json.loads(self.tool("issue_read", issue_number=5, method="get_sub_issues"))
        self.assertEqual([one["number"] for one in subs], [1])
        self.assertNotIn("secret", self.tool("issue_read", issue_number=5, method="get_parent"))
        self.assertIn("is not of good/r", self.tool("issue_read", issue_number=77, method="get"))
        for name, number in (("issue_read", "issue_number"), ("pull_request_read", "pullNumber")):
            moved = self.tool(name, **{"method": "get_comments", number: 77})
            self.assertEqual(json.loads(moved), [], name)
        asked = [path.partition("?")[0] for _, path, _ in Api.seen]
        self.assertIn("/api/v3/repositories/99/issues/1/comments", asked)
        Api.more[:] = [("/search/", found)]
        for name in ("search_issues", "search_pull_requests", "search_commits", "search_code"):
            self.assertEqual(json.loads(self.tool(name, query="crash")), {"items": []})

    def test_lockdown_is_named_where_it_hides_something(self) -> None:
        stranger = {"login": "stranger", "type": "User"}
        url = "https://github.com/good/r/issues/5#issuecomment-1"
        Api.more[:] = [
            ("graphql", {"data": {"repository": {"isPrivate": False}}}),
            (r"\{viewer", {"data": {"viewer": {"login": "me"}}}),
            ("/issues/5$", {**issue("good/r", 5), "user": stranger}),
            ("/issues/5/comments", [{"id": 1, "body": "b", "user": stranger, "html_url": url}]),
            ("/permission", {"permission": "read", "role_name": "read"}),
        ]
        running = Proxy(self.upstream, GITHUB_MCP_TOKEN="github_pat_" + "t" * 30)
        self.addCleanup(running.stop)
        client = Client(running.port)
        self.addCleanup(client.close)
        for method, said in (("get", "restricted by lockdown mode"), ("get_comments", "[]")):
            arguments = {"method": method, "issue_number": 5}
            asked = request("tools/call", name="issue_read", arguments=arguments)
            texts = [block["text"] for block in client.ask(asked)["result"]["content"]]
            self.assertIn(said, texts[0])
            self.assertEqual(texts[1:], [proxy.HIDDEN])

    def test_queries_reach_the_api_as_they_were_judged(self) -> None:
        for query, expected in (
            ('"a phrase" is:open', {"is:issue repo:good/r a phrase is:open",
                                    'is:issue repo:good/r "a phrase" is:open'}),
            ('label:"good first issue" crash', {'is:issue repo:good/r label:"good first issue" crash'}),
            ("is:issue field.x", {"repo:good/r is:issue field.x"}),
        ):  # fmt: skip
            self.tool("search_issues", query=query)
            paths = [path for _, path, _ in Api.seen if "/search/issues" in path]
            (asked,) = urllib.parse.parse_qs(urllib.parse.urlsplit(paths[-1]).query)["q"]
            self.assertIn(asked, expected)

    def test_what_is_made_up_reaches_no_other_repository(self) -> None:
        sender = fuzz_proxy.Sender(f"http://127.0.0.1:{self.running.port}/mcp", SECRET)
        self.addCleanup(sender.connection.close)
        fuzz_proxy.run(400, 5, sender)
        self.assertIsNone(self.server.poll(), "the server lives")
        self.assertGreater(len(Api.seen), 20)
        self.assert_only_ours()


if __name__ == "__main__":
    unittest.main()
