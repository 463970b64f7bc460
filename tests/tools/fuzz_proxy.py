"""Throw made-up messages at the proxy's judge, and hold what passes against an independent check.

    python3 tests/tools/fuzz_proxy.py [--cases N] [--seed N]
    python3 tests/tools/fuzz_proxy.py --upstream-url http://127.0.0.1:PORT/mcp --secret S

With --upstream-url the messages are also sent through a running proxy, which has to agree.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import random
import re
import string
import sys
import time
import unicodedata
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import github_mcp_proxy as proxy
from github_mcp_proxy import Forward
from github_mcp_proxy import Policy
from github_mcp_proxy import Scope

SCOPE = Scope("good", "r")
POLICIES = (
    Policy(default_branch="main"),
    Policy(default_branch="main", allow=frozenset(proxy.ALLOW), branches=("agent/*",)),
    Policy(default_branch="main", readonly=True),
    Policy(),
)

# --- the independent check: what may leave, said without the proxy's own rules ---

SCOPED_BY_QUERY = {"search_code", "search_commits"}
SEARCHES = {*SCOPED_BY_QUERY, "search_issues", "search_pull_requests"}
METHODS = {"initialize", "ping", "server/discover", "logging/setLevel", "tools/list", "tools/call"}
NOTES = {
    "notifications/initialized", "notifications/cancelled", "notifications/progress",
    "notifications/roots/list_changed",
}  # fmt: skip
NEVER = {
    "get_me", "get_teams", "search_repositories", "search_users", "create_repository",
    "fork_repository", "delete_repository", "create_gist", "sub_issue_write", "projects_write",
    "resolve_review_thread", "discussion_comment_write", "actions_run_trigger",
    "list_secret_scanning_alerts", "get_secret_scanning_alert", "assign_copilot_to_issue",
    "issue_dependency_write", "list_notifications", "star_repository",
}  # fmt: skip
WIDENING_WORDS = {"or"}
JOINERS = "\u200c\u200d"
SCOPE_WORDS = ("repo", "org", "user", "owner", "enterprise", "saved", "team", "project",
               "repository", "organization")  # fmt: skip
IN_A_PATH = ("path", "ref", "sha", "tag", "branch", "from_branch", "tree_sha", "base", "resource_id",
             "head", "path_filter")  # fmt: skip
WRITES_FILES = {"create_or_update_file", "push_files", "delete_file"}


class Violation(AssertionError):
    """A message passed that may not."""


def insist(condition: object, reason: str, value: Any) -> None:
    if not condition:
        raise Violation(f"{reason}: {value!r}")


def query_is_confined(query: str) -> bool:
    """Whether a search stays in good/r, read as naively as an unknown parser could read it."""
    start = "repo:good/r"
    if query != start and not query.startswith(start + " "):
        return False
    rest = query[len(start) :]
    rest = "".join(c for c in rest if c not in JOINERS).replace("[bot]", "")
    without = re.sub(r'"?,"|",', " ", rest).replace('"', "")  # of label:"a b","c d"
    for text in (rest, without, unicodedata.normalize("NFKC", rest)):
        folded = text.replace('"', " ").casefold()
        if any(c in "()[]{}|\\;`" or (c.isspace() and c != " ") for c in text):
            return False
        if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for c in text):
            return False
        squeezed = re.sub(r"\s*:", ":", folded.replace(" ", "  ")).replace("  ", " ")
        squeezed += re.sub(r"[\s\"]*:", ":", text.casefold())
        if any(word + ":" in squeezed for word in SCOPE_WORDS):
            return False
        if set(re.split(r"[^\w-]+", folded)) & WIDENING_WORDS:
            return False
        tokens = (re.sub("^-(?=.)", "", token) for token in text.split(" "))
        if any(token[0] in "-/+,:&" for token in tokens if token):
            return False
    return rest.count('"') % 2 == 0


def check_forward(forward: Forward, policy: Policy, received: Any) -> None:
    """Raises Violation when a message that passed says more than it may."""
    message = forward.message
    insist(message.get("jsonrpc") == "2.0", "not JSON-RPC", message)
    insist(
        set(message) <= {"jsonrpc", "id", "method", "params", "result", "error"}, "keys", message
    )
    insist(message.get("id") == received.get("id"), "another id", message)
    json.loads(proxy.dumps(message))
    method = message.get("method")
    insist(method in METHODS | NOTES, "a method", method)
    insist((method in METHODS) == ("id" in message), "a request without an id", message)
    if method != "tools/call":
        text = json.dumps({**message, "id": 0})
        insist("evil" not in text and '"OWNER"' not in text, "something of another", text)
        return
    params = message["params"]
    insist(set(params) <= {"name", "arguments", "_meta"}, "params", params)
    insist(all(key in proxy.META_PARAMETERS for key in params.get("_meta", {})), "_meta", params)
    check_call(params["name"], params["arguments"], policy)


def check_call(name: str, arguments: Mapping[str, Any], policy: Policy) -> None:
    insist(name in proxy.TOOLS and name not in NEVER, "a tool", name)
    tool = proxy.TOOLS[name]
    own = set() if name in SCOPED_BY_QUERY else {"owner", "repo"}
    insist(own <= set(arguments), "without its repository", arguments)
    insist(set(arguments) <= set(tool.parameters) | own, "a key that no table has", arguments)
    for key in own:
        insist(arguments[key] == getattr(SCOPE, key), "another repository", arguments)
    insist(not (tool.write and policy.readonly), "a write", name)
    insist(not tool.needs or tool.needs in policy.allow, "a tool not opted in to", name)
    if name in SEARCHES:
        insist(query_is_confined(arguments["query"]), "a query", arguments["query"])
    for key in IN_A_PATH:
        if isinstance(arguments.get(key), str) and (name, key) != ("list_pull_requests", "head"):
            check_path_part(arguments[key], "" if key.startswith("path") else "?#%")
    if name in WRITES_FILES or name == "create_branch":
        check_branch(arguments["branch"], policy)
    files = arguments.get("files", [arguments] if name in WRITES_FILES else [])
    for file in files:
        check_path_part(file["path"], "")
        check_written(file["path"])
    insist(arguments.get("event") != "APPROVE" or "approve" in policy.allow, "approval", arguments)
    insist(not arguments.get("assignees") or "people" in policy.allow, "people", arguments)
    insist(not arguments.get("reviewers") or "people" in policy.allow, "people", arguments)
    insist(not arguments.get("allow_symlink_write"), "a symlink", arguments)
    insist(arguments.get("return_content", True) is True, "a signed URL", arguments)


def check_path_part(value: str, of_urls: str = "?#%") -> None:
    parts = value.split("/") if value else []
    insist(not set(parts) & {"", ".", ".."}, "a segment", value)
    insist(not set(value) & set("\\\0\r\n" + of_urls), "a character of URLs", value)
    insist(urllib.parse.unquote(value) == value, "more than one spelling", value)
    seen = value if of_urls else "".join(c for c in value if c not in JOINERS)
    insist(all(unicodedata.category(c) not in ("Cc", "Cf", "Cs") for c in seen), "unseen", value)


def check_branch(value: str, policy: Policy) -> None:
    insist(not re.match(r"(?i)(refs|heads)(/|$)|head$", value), "a ref", value)
    if "default-branch" not in policy.allow:
        insist(policy.default_branch, "the default branch is not known", value)
        insist(value.lower() != policy.default_branch, "the default branch", value)
    if policy.branches != ("**",):
        insist(re.fullmatch(r"(?i)agent/[^/]+", value), "a branch of others", value)


def check_written(path: str) -> None:
    seen = "".join(c for c in unicodedata.normalize("NFKC", path).lower() if c not in JOINERS)
    parts = [part.rstrip(". ") for part in seen.split("/")]
    insist(parts[0] not in (".git", ".gitmodules", "codeowners"), "a denied path", path)
    insist(parts[:2] not in ([".github", "workflows"], [".github", "actions"]), "denied", path)
    insist(parts[-2:] not in ([".github", "codeowners"], ["docs", "codeowners"]) or len(parts) > 2,
           "a denied path", path)  # fmt: skip
    insist(parts not in ([".github"], ["docs"]), "a folder with denied paths", path)


# --- the messages ---

ODD_STRINGS = [
    "", " ", "/", ".", "..", "@", "HEAD", "main", "Main", "refs/heads/main", "heads/main", "evil",
    "evil/secret", "good/r", "GOOD", "R", "../../../../repos/evil/secret", "%2e%2e", "..%2f", "..;/",
    "a/../b", "a//b", "/a/", "x.lock", "a\x00b", "a\nb", "a\u202eb", "a\u200bb", "\ufeffa", "\u212a",
    "\u017f", "ｍａｉｎ", "user:branch", "1", "+1", "APPROVE", "approve", "create", "CREATE", "get",
    "delete", "resolve_thread", ".github/workflows/x.yml", ".GITHUB/Workflows./x", ".github",
    ".github/workflows", ".gitmodules", "CODEOWNERS", "docs/CODEOWNERS", ".git/config", "a" * 300,
    "src/a.py", "agent/x", "agent/x/y", "feature", "0123abc", "a" * 40, "2024-01-01", "true", "null",
    "a#b", "100%", "a?b", ".g\u200cit/x", "CODE\u200dOWNERS", "HEAD/pulls", "a" * 40 + "/x",
    "😀", "é", "e\u0301", "[x](y)", "`x`", "\ud83d", "ghp_0123456789abcdefghij", "-x", "a b",
]  # fmt: skip
QUERY_PARTS = [
    "repo:good/r", "repo:evil/secret", "REPO:evil/x", "-repo:good/r", "repo:good/r,evil/x", "repo:",
    "repo", ":evil/x", '":evil/x"', '"repo:evil/x"', "OR", "or", "Or", "AND", "NOT", "(", ")", "org:evil",
    "user:evil", "owner:evil", "enterprise:e", "saved:x", "team:a/b", "project:a/1", "is:open",
    "is:private", "label:bug", 'label:"good first issue"', "label:do-not-merge", "author:octocat",
    "created:>2024-01-01", "created:2024-01-01..2024-02-01", '"some phrase"', '"a OR b"', "/re/",
    "a|b", "\\", '"', "crash", "panic", "read-only", "ｒｅｐｏ：evil/x", "ＯＲ", "\u00a0", "\u200b", "\n", "\t",
    "ſaved:x", "in:title", "language:go", "path:src", "hash:0123abc", "merge:true", "-label:x", ",x",
    '",evil/x"', "a;b", "x:y", "é", "日本", "field.x:y", "sort:created-asc", "no:label", "andy", "north",
    "-is:draft", "--all", "-", "fix:", "foo()", "f(a,b)", "a::b", "repo::evil", "org():x", 'label:"a b","c d"',
    '"(x) or y"', '"-repo:evil/x"', '"org(:x"', "\u200d", "not", "and", "ORg:evil", "u\u0073er:evil", "user\u00adx", "K", "x" * 90,
]  # fmt: skip
ENVELOPE_KEYS = ["jsonrpc", "id", "method", "params", "result", "error", "Method", "PARAMS", "x"]


class Maker:
    """Makes messages; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tools = sorted(proxy.TOOLS)
        self.other_tools = sorted(NEVER)

    def case(self) -> tuple[bytes, Policy]:
        choose = self.random.random()
        policy = self.random.choice(POLICIES)
        if choose < 0.35:
            message = self.call(self.random.choice(self.tools))
        elif choose < 0.45:
            message = self.write()
        elif choose < 0.7:
            message = self.search()
        elif choose < 0.8:
            message = self.call(self.random.choice(self.tools + self.other_tools))
        else:
            message = self.envelope()
        return self.encoded(message), policy

    def write(self) -> dict[str, Any]:
        """A write that is right but for one string."""
        name = self.random.choice(sorted(WRITES_FILES))
        arguments: dict[str, Any] = {"branch": "agent/x", "message": "m", "path": "src/a.py"}
        arguments[self.random.choice(["branch", "path", "path"])] = self.random.choice(ODD_STRINGS)
        if name == "create_or_update_file":
            arguments["content"] = "x"
        if name == "push_files":
            arguments["files"] = [{"path": arguments.pop("path"), "content": "x"}]
        return self.request("tools/call", {"name": name, "arguments": arguments})

    def search(self) -> dict[str, Any]:
        name = self.random.choice(sorted(SEARCHES))
        arguments: dict[str, Any] = {"query": self.query()}
        if self.random.random() < 0.3:
            arguments["fields"] = self.random.sample(["title", "body", "number", "html_url"], 2)
        return self.request("tools/call", {"name": name, "arguments": arguments})

    def query(self) -> str:
        parts = self.random.choices(QUERY_PARTS, k=self.random.randint(0, 5))
        if self.random.random() < 0.6:
            parts = [part for part in parts if len(part) > 3 and "evil" not in part] or ["crash"]
        if self.random.random() < 0.2:
            parts.append("".join(self.random.choices(string.printable + "é：（＂\u00a0", k=8)))
        query = self.random.choice([" ", " ", " ", "  ", "", "\u00a0"]).join(parts)
        if self.random.random() < 0.1 and query:
            at = self.random.randrange(len(query))
            query = query[:at] + self.random.choice('"()|:- \u200bé') + query[at:]
        return query.upper() if self.random.random() < 0.05 else query

    def call(self, name: str) -> dict[str, Any]:
        tool = proxy.TOOLS.get(name)
        parameters = (
            tool.parameters if tool else proxy.parse_parameters(["owner:line", "path:path"])
        )
        arguments: dict[str, Any] = {}
        strange = self.random.random() < 0.5
        for key, rule in parameters.items():
            if rule.required or self.random.random() < 0.4:
                arguments[self.key(key, strange)] = self.value(key, rule, strange)
        for key, ours in (("owner", "good"), ("repo", "r")):
            if self.random.random() < 0.4:
                variants = [ours.upper(), "evil", [ours], {ours: 1}, None, ours + "/x", "ｇood"]
                given = self.random.choice(variants) if strange else ours
                arguments[self.key(key, strange)] = given
        if strange and self.random.random() < 0.2:
            arguments[self.random.choice(["OWNER", "Repo", "threadId", "_ui_submitted", "organization",
                                          "sub_issue_id", "related_owner"])] = "evil"  # fmt: skip
        params: dict[str, Any] = {"name": name, "arguments": arguments}
        if self.random.random() < 0.1:
            params["_meta"] = {"progressToken": 1, "x": {"owner": "evil"}}
        if strange and self.random.random() < 0.05:
            params[self.random.choice(["task", "Arguments", "requestState"])] = {}
        return self.request("tools/call", params)

    def key(self, key: str, strange: bool) -> str:
        if strange and self.random.random() < 0.06:
            variants = [key.upper(), key.title(), key + "\0", key.replace("s", "\u017f"), " " + key]
            return self.random.choice(variants)
        return key

    def value(self, key: str, rule: proxy.Rule, strange: bool) -> Any:
        if strange and self.random.random() < 0.3:
            return self.odd()
        if rule.constant:
            return rule.constant[0]
        if rule.choices:
            return self.random.choice(rule.choices)
        if key == "query":
            return self.query()
        plain: dict[str, Any] = {
            "files": [{"path": "src/a.py", "content": "x"}], "labels": ["bug"], "fields": ["title"],
            "sha": "0123abc", "commitID": "0123abc", "expectedHeadSha": "0123abc",
            "since": "2024-01-01", "until": "2024-01-01", "color": "ff0000", "draft": True,
            "recursive": True, "failed_only": True, "path": "src/a.py", "branch": "agent/x",
            "head": "agent/x", "base": "main", "milestone": 2, "field_filters": [],
        }  # fmt: skip
        named = ("path", "branch", "head", "base", "ref", "sha", "tag")
        if key in named and strange and self.random.random() < 0.5:
            return self.random.choice(ODD_STRINGS)
        if key in plain:
            return plain[key]
        if rule.what.startswith("an integer"):
            return self.random.choice([1, 2, 77, 100])
        if rule.what.startswith("true"):
            return self.random.random() < 0.5
        return self.random.choice(["feature", "x", "octocat"])

    def odd(self, depth: int = 0) -> Any:
        kind = self.random.randrange(9 if depth < 3 else 6)
        if kind < 3:
            return self.random.choice(ODD_STRINGS)
        if kind == 3:
            return self.random.choice([0, 1, -1, 1.0, 0.5, 2**31, 2**53, 10**16, True, False])
        if kind == 4:
            return None
        if kind == 5:
            return self.random.choice([[], {}, ""])
        if kind == 6:
            return [self.odd(depth + 1) for _ in range(self.random.randint(0, 3))]
        return {self.random.choice(ODD_STRINGS): self.odd(depth + 1) for _ in range(2)}

    def request(self, method: str, params: Any) -> dict[str, Any]:
        id = self.random.choice([1, "a", 0, -5, "x" * 20])
        return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}

    def envelope(self) -> Any:
        methods = [
            *sorted(METHODS | NOTES), "resources/read", "completion/complete", "prompts/get", "tools/Call", "tools/call ",
            "sampling/createMessage", "subscriptions/listen", "tasks/get", "resources/list",
        ]  # fmt: skip
        params: dict[str, Any] = {
            "protocolVersion": "2025-06-18", "capabilities": {"roots": {}, "elicitation": {}},
            "clientInfo": {"name": "c", "version": "1", "x": "evil"},
        }  # fmt: skip
        message = self.request(self.random.choice(methods), self.random.choice([params, {}, {}]))
        if self.random.random() < 0.3:
            message["params"] = {self.random.choice(ODD_STRINGS): self.odd()}
        if self.random.random() < 0.4:
            del message["id"]
        if self.random.random() < 0.3:
            message[self.random.choice(ENVELOPE_KEYS)] = self.odd()
        if self.random.random() < 0.1:
            return self.random.choice([[message], [message, message], self.odd(), None])
        return message

    def encoded(self, message: Any) -> bytes:
        ascii_only = self.random.random() < 0.5
        body = json.dumps(message, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        choose = self.random.random()
        if choose < 0.02:
            body = body.replace(b'"owner"', b'"owner": "evil", "\\u006fwner"', 1)
        elif choose < 0.03:
            body += self.random.choice([b" {}", b"\0", b"]", b"\n\n", b"// x"])
        elif choose < 0.04:
            body = self.random.choice([b"\xef\xbb\xbf" + body, body.decode("utf-8", "replace").encode(
                "utf-16"), body[:-1], b"[" * 4000, body.replace(b"1", b"1e999", 1)])  # fmt: skip
        elif choose < 0.06:
            at = self.random.randrange(len(body))
            body = body[:at] + bytes([self.random.randrange(256)]) + body[at + 1 :]
        return body


class Sender:
    """Sends messages to a running proxy; its answer must agree with the verdict."""

    def __init__(self, url: str, secret: str) -> None:
        self.target = urllib.parse.urlsplit(url)
        self.secret = secret
        self.connection = http.client.HTTPConnection(self.target.netloc, timeout=60)

    def send(self, body: bytes) -> tuple[int, bytes]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            **({"Authorization": f"Bearer {self.secret}"} if self.secret else {}),
        }
        self.connection.request("POST", self.target.path or "/", body, headers)
        response = self.connection.getresponse()
        return response.status, response.read()


def judged(body: bytes, policy: Policy) -> str:
    """ "malformed", "refused" or "passed"; raises Violation for what may not pass."""
    try:
        message = proxy.parse_message(body)
    except proxy.ProtocolError:
        return "malformed"
    verdict = proxy.decide(proxy.Bounds(SCOPE, policy), message)
    if isinstance(verdict, proxy.Refuse):
        status, answer = proxy.told_of(message, verdict)
        insist(verdict.reason and status >= 200 and proxy.dumps(answer), "no reason", message)
        return "refused"
    check_forward(verdict, policy, message)
    return "passed"


def run(
    cases: int, seed: int, sender: Sender | None = None, violations: list[str] | None = None
) -> collections.Counter[str]:
    """Judge that many messages; how many came out how.

    Raises Violation at the first bad one, or collects them where there is a list for it.
    """
    maker = Maker(seed)
    counts: collections.Counter[str] = collections.Counter()
    for _ in range(cases):
        body, policy = maker.case()
        if sender:
            policy = POLICIES[0]
        try:
            outcome = judged(body, policy)
        except Exception as error:
            if violations is None or not isinstance(error, Violation):
                error.args = (f"{error} (seed {seed}, policy {policy}, message {body!r})",)
                raise
            violations.append(str(error))
            outcome = "VIOLATION"
        counts[outcome] += 1
        if sender and outcome == "passed":
            status, answer = sender.send(body)
            kind = "error" if b'"error"' in answer or b'"isError"' in answer else "result"
            counts[f"HTTP {status}, {kind}"] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="go on after a violation")
    parser.add_argument("--upstream-url", default="", help="a running proxy's endpoint")
    parser.add_argument("--secret", default="", help="what it wants as Authorization: Bearer")
    options = parser.parse_args()
    sender = Sender(options.upstream_url, options.secret) if options.upstream_url else None
    began = time.monotonic()
    violations: list[str] | None = [] if options.all else None
    counts = run(options.cases, options.seed, sender, violations)
    taken = time.monotonic() - began
    summary = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"{options.cases} cases, seed {options.seed}, {taken:.0f} s: {summary}")
    print("\n".join(sorted(set(violations or []))[:100]))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
