"""What the GitHub proxy lets pass: tables of messages and verdicts, no process and no socket."""

from __future__ import annotations

import json
import re
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any
from typing import ClassVar

import github_mcp_proxy as proxy
from github_mcp_proxy import Forward
from github_mcp_proxy import Policy
from github_mcp_proxy import Refuse
from github_mcp_proxy import Scope
from tests.tools import fuzz_proxy

FAST = True  # tables only
SCOPE = Scope("good", "r")
POLICY = Policy(default_branch="main")
EVERYTHING = Policy(default_branch="main", allow=frozenset(proxy.ALLOW))
SHA = "a" * 40
BOUNDS = proxy.Bounds(SCOPE, POLICY)
OURS = {"owner": "good", "repo": "r"}
MODERN = "2026-07-28"


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    params = {"name": name, "arguments": arguments}
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}


def request(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


def sent(message: dict[str, Any], policy: Policy = POLICY) -> dict[str, Any]:
    """The arguments that go to the upstream; fails when the call is refused."""
    verdict = proxy.decide(proxy.Bounds(SCOPE, policy), message)
    assert isinstance(verdict, Forward), verdict
    arguments: dict[str, Any] = verdict.message["params"]["arguments"]
    return arguments


# --- what must not pass, over all layers ---

# By a word of the reason for which they are refused.
BODIES = {
    "not one JSON value": {
        "empty": b"",
        "not JSON": b"hello",
        "trailing data": b'{"jsonrpc":"2.0","id":1,"method":"ping"} {}',
        "trailing garbage": b'{"jsonrpc":"2.0","id":1,"method":"ping"}x',
        "BOM": b'\xef\xbb\xbf{"jsonrpc":"2.0","id":1,"method":"ping"}',
        "comment": b'{"jsonrpc":"2.0","id":1,"method":"ping"/**/}',
        "trailing comma": b'{"jsonrpc":"2.0","id":1,"method":"ping",}',
        "raw control": b'{"jsonrpc":"2.0","id":1,"method":"pi\nng"}',
    },
    "same key twice": {
        "duplicate key": b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/call"}',
        "duplicate key deep": b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"get_tag",'
        b'"arguments":{"owner":"good","owner":"evil"}}}',
        "duplicate key, escaped": b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":'
        b'"get_tag","arguments":{"owner":"good","\\u006fwner":"evil"}}}',
    },
    "too many digits": {
        "many digits": b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"ping"}'
    },
    "in UTF-8": {
        "raw surrogate": b'{"jsonrpc":"2.0","id":1,"method":"\xed\xa0\x80"}',
        "invalid UTF-8": b'{"jsonrpc":"2.0","id":1,"method":"\xff"}',
        "overlong UTF-8": b'{"jsonrpc":"2.0","id":1,"method":"\xc0\xaf"}',
        "UTF-16": '{"jsonrpc":"2.0","id":1,"method":"ping"}'.encode("utf-16"),
        "UTF-32": '{"jsonrpc":"2.0","id":1,"method":"ping"}'.encode("utf-32"),
    },
    "batches": {"batch": b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', "empty batch": b"[]"},
    "not a JSON-RPC message": {"a string": b'"ping"', "a number": b"1", "null": b"null"},
    "not a JSON-RPC request": {
        "unknown envelope key": b'{"jsonrpc":"2.0","id":1,"method":"ping","extra":1}',
        "Method": b'{"jsonrpc":"2.0","id":1,"Method":"ping"}',
        "Params beside params": b'{"jsonrpc":"2.0","id":1,"method":"ping","Params":{}}',
        "params with NUL": b'{"jsonrpc":"2.0","id":1,"method":"ping","params\\u0000":{}}',
        "no jsonrpc": b'{"id":1,"method":"ping"}',
        "request and answer": b'{"jsonrpc":"2.0","id":1,"method":"ping","result":{}}',
        "result and error": b'{"jsonrpc":"2.0","id":1,"result":{},"error":{}}',
    },
    "jsonrpc must be": {
        "jsonrpc 1.0": b'{"jsonrpc":"1.0","id":1,"method":"ping"}',
        "jsonrpc number": b'{"jsonrpc":2.0,"id":1,"method":"ping"}',
    },
    "id must be": {
        "id null": b'{"jsonrpc":"2.0","id":null,"method":"ping"}',
        "id bool": b'{"jsonrpc":"2.0","id":true,"method":"ping"}',
        "id object": b'{"jsonrpc":"2.0","id":{},"method":"ping"}',
        "id float": b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}',
        "id NaN": b'{"jsonrpc":"2.0","id":NaN,"method":"ping"}',
        "id Infinity": b'{"jsonrpc":"2.0","id":Infinity,"method":"ping"}',
        "id surrogate": b'{"jsonrpc":"2.0","id":"\\ud800","method":"ping"}',
        "id endless": b'{"jsonrpc":"2.0","id":"' + b"x" * 300 + b'","method":"ping"}',
    },
    "params must be": {"params list": b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}'},
    "method must be": {"method number": b'{"jsonrpc":"2.0","id":1,"method":1}'},
    "nested": {"very deep": b"[" * 100_000},
}

METHODS = [
    "completion/complete",
    "prompts/list",
    "prompts/get",
    "resources/list",
    "resources/templates/list",
    "resources/read",
    "resources/subscribe",
    "resources/unsubscribe",
    "subscriptions/listen",
    "roots/list",
    "sampling/createMessage",
    "elicitation/create",
    "tasks/get",
    "tasks/list",
    "tasks/result",
    "tasks/cancel",
    "tasks/update",
    "Tools/call",
    "TOOLS/LIST",
    "tools/call/",
    "tools//call",
    "rpc.discover",
    "notifications/initialized",
]

BLOCKED = [
    "get_me",
    "get_teams",
    "get_team_members",
    "search_repositories",
    "search_users",
    "search_orgs",
    "create_repository",
    "delete_repository",
    "fork_repository",
    "list_starred_repositories",
    "star_repository",
    "sub_issue_write",
    "add_sub_issue",
    "remove_sub_issue",
    "reprioritize_sub_issue",
    "issue_dependency_write",
    "assign_copilot_to_issue",
    "request_copilot_review",
    "get_secret_scanning_alert",
    "list_secret_scanning_alerts",
    "list_notifications",
    "get_notification_details",
    "dismiss_notification",
    "mark_all_notifications_read",
    "manage_notification_subscription",
    "manage_repository_notification_subscription",
    "discussion_comment_write",
    "actions_run_trigger",
    "list_global_security_advisories",
    "get_global_security_advisory",
    "list_org_repository_security_advisories",
    "list_gists",
    "get_gist",
    "create_gist",
    "update_gist",
    "projects_list",
    "projects_get",
    "projects_write",
    "ui_get",
    "resolve_review_thread",
    "unresolve_review_thread",
    "get_copilot_space",
    "github_support_docs_search",
    "create_pull_request_with_copilot",
    "run_secret_scanning",
    "update_issue_comment",
    "create_repository_ruleset",
    "custom_properties_write",
    "GET_TAG",
    "get_tag\x00",
    "get_file_contents/",
    "__class__",
]

OPT_IN = [
    "merge_pull_request",
    "update_pull_request_branch",
    "list_repository_collaborators",
    "actions_list",
    "actions_get",
    "get_job_logs",
    "list_code_scanning_alerts",
    "list_dependabot_alerts",
    "list_repository_security_advisories",
    "list_discussions",
    "get_discussion",
    "get_discussion_comments",
    "list_discussion_categories",
    "get_code_quality_finding",
]

# By a word of the reason for which they are refused.
CALLS: dict[str, dict[str, dict[str, Any]]] = {
    "branch or user:branch": {
        "head filter, two colons": call("list_pull_requests", head="a:b:c"),
        "head filter list": call("list_pull_requests", head=["a:b"]),
        "head filter object": call("list_pull_requests", head={"a": "b"}),
        "head filter number": call("list_pull_requests", head=1),
    },
    "only good/r is served": {
        "other owner": call("get_tag", owner="evil", repo="r", tag="v1"),
        "other repo": call("get_tag", owner="good", repo="secret", tag="v1"),
        "owner list": call("get_tag", owner=["good"], repo="r", tag="v1"),
        "owner blank": call("get_tag", owner="good ", repo="r", tag="v1"),
        "owner slash": call("get_tag", owner="good/r/..", repo="r", tag="v1"),
        "owner a number": call("list_tags", owner=1, repo="r"),
        "owner true": call("list_tags", owner=True, repo=True),
        "owner object": call("list_tags", owner={"good": 1}, repo="r"),
        "owner in full width": call("list_tags", owner="\uff47ood", repo="r"),
        "owner with a dot": call("list_tags", owner="good.", repo="r"),
        "repo with .git": call("list_tags", owner="good", repo="r.git"),
        "repo climbs": call("list_tags", owner="good", repo="r/../../evil/x"),
        "owner/repo in repo": call("list_tags", repo="good/r"),
        "private use": call("list_tags", owner="good\ue000", repo="r"),
    },
    "is not passed": {
        "OWNER besides": call("get_tag", **OURS, OWNER="evil", tag="v1"),
        "Owner alone": call("get_tag", Owner="evil", REPO="secret", tag="v1"),
        "owner with NUL": call("get_tag", **{"owner\0": "evil"}, tag="v1"),
        "long s in a key": call("issue_read", **dict([("i\u017fsue_number", 1)]), method="get"),  # noqa: C406,
        "METHOD": call("pull_request_review_write", METHOD="resolve_thread", method="create", pullNumber=1),
        "threadId": call("pull_request_review_write", method="create", pullNumber=1, threadId="PRRT_x"),
        "_ui_submitted": call("issue_write", method="create", title="t", _ui_submitted=True),
        "Arguments besides": {**call("get_tag"), "params": {"name": "get_tag", "Arguments": {}}},
        "task": {**call("list_tags"), "params": {"name": "list_tags", "task": {}}},
        "inputResponses": {**call("list_tags"), "params": {"name": "list_tags", "inputResponses": {}}},
        "requestState": {**call("list_tags"), "params": {"name": "list_tags", "requestState": "x"}},
        "pull as pullnumber": call("pull_request_read", method="get", pullnumber=1),
        "dotless i in a key": call("list_tags", **dict([("perPag\u0131", 1)])),  # noqa: C406,
    },
    "one of": {
        "resolve_thread": call("pull_request_review_write", method="resolve_thread", pullNumber=1),
        "method case": call("label_write", method="DELETE", name="bug"),
        "enum unknown": call("issue_read", issue_number=1, method="get_everything"),
        "enum blank": call("issue_read", issue_number=1, method="get "),
        "approve in small letters": call("pull_request_review_write", method="create", pullNumber=1, event="approve"),
        "event list": call("pull_request_review_write", method="create", pullNumber=1, event=["APPROVE"]),
        "unresolve_thread": call("pull_request_review_write", method="unresolve_thread", pullNumber=1),
        "reaction unknown": call("add_issue_comment", issue_number=1, reaction="+2"),
        "sort unknown": call("search_code", query="x", sort="stars"),
        "orderBy small": call("list_issues", orderBy="created_at"),
    },
    "without characters special in a URL": {
        "sha climbs": call("get_commit", sha="../../../../user/emails"),
        "sha climbs inside": call("get_commit", sha="HEAD/../../pulls"),
        "sha %2e": call("get_commit", sha="%2e%2e/x"),
        "sha %252e": call("get_commit", sha="%252e%252e"),
        "sha query": call("get_commit", sha="main?x=1"),
        "sha fragment": call("get_commit", sha="main#x"),
        "sha backslash": call("get_commit", sha="..\\x"),
        "sha semicolon": call("get_commit", sha="..;/x"),
        "sha empty": call("get_commit", sha=""),
        "sha newline": call("get_commit", sha="main\nx"),
        "sha @{": call("get_commit", sha="main@{1}"),
        "sha leading dash": call("get_commit", sha="-x"),
        "sha leading slash": call("get_commit", sha="/x"),
        "tag climbs": call("get_release_by_tag", tag="../latest"),
        "tag dot": call("get_release_by_tag", tag="."),
        "tree climbs": call("get_repository_tree", tree_sha="../../x"),
        "@": call("delete_file", branch="@", path="a", message="m"),
        "branch null": call("delete_file", branch=None, path="a", message="m"),
        "branch blank": call("delete_file", branch="main ", path="a", message="m"),
        "branch zero width": call("delete_file", branch="main\u200b", path="a", message="m"),
        "branch.lock": call("create_branch", branch="a.lock"),
        "branch ..": call("create_branch", branch="a..b"),
        "from_branch climbs": call("create_branch", branch="a", from_branch="../../evil"),
        "main with a soft hyphen": call("create_branch", branch="ma\u00adin"),
        "main with a slash": call("create_branch", branch="main/"),
        "main behind a slash": call("create_branch", branch="/main"),
        "main after a climb": call("create_branch", branch="x/../main"),
        "branch ~": call("create_branch", branch="main~0"),
        "branch ^": call("create_branch", branch="main^0"),
        "branch @{0}": call("create_branch", branch="main@{0}"),
        "branch list": call("create_branch", branch=["x"]),
        "branch a template": call("create_branch", branch="${x}"),
        "branch endless": call("create_branch", branch="a" * 256),
        "branch of a tab": call("create_branch", branch="a\tb"),
        "head with user": call("create_pull_request", head="good:fix", base="main", title="t"),
        "head list": call("create_pull_request", head=["fix"], base="main", title="t"),
        "base climbs": call("update_pull_request", pullNumber=1, base="../main"),
        "base with a query": call("update_pull_request", pullNumber=1, base="main?x"),
        "commit of a fork network": call("get_commit", sha="evil:main"),
        "tree with a colon": call("get_repository_tree", tree_sha="main:src"),
        "tag with a wildcard": call("get_tag", tag="v*"),
        "head of a fork": call("create_pull_request", head="evil:x", base="main", title="t"),
        "head climbs": call("create_pull_request", head="../x", base="main", title="t"),
    },
    "is missing": {
        "sha missing": call("get_commit"),
        "name missing": {**call("get_tag"), "params": {"arguments": {}}},
        "no branch": call("push_files", files=[{"path": "a", "content": "x"}], message="m"),
        "path missing": call("delete_file", branch="b", message="m"),
    },
    "a commit or object id": {
        "contents sha a name": call("get_file_contents", path="a", sha="main"),
    },
    "without . and .. segments": {
        "path climbs": call("get_file_contents", path="../../../user"),
        "path climbs inside": call("get_file_contents", path="a/../../b"),
        "path double slash": call("get_file_contents", path="a//b"),
        "path dot": call("get_file_contents", path="./a"),
        "path backslash": call("get_file_contents", path="a\\..\\b"),
        "path %": call("get_file_contents", path="%2e%2e/x"),
        "path % twice": call("get_file_contents", path="%252e%252e/x"),
        "path NUL": call("get_file_contents", path="a\0b"),
        "path zero width": call("get_file_contents", path="a\u200bb"),
        "path number": call("get_file_contents", path=1),
        "workflow, zero width": call("delete_file", branch="b", path=".github/work\u200bflows/x", message="m"),
        "workflow, backslash": call("delete_file", branch="b", path=".github\\workflows\\x", message="m"),
        "workflow, %": call("delete_file", branch="b", path=".github%2fworkflows/x", message="m"),
        "workflow, ..;": call("delete_file", branch="b", path="a/..;/.github/workflows/x", message="m"),
        "workflow, . segment": call("delete_file", branch="b", path=".github/./workflows/x", message="m"),
        "path is a list": call("delete_file", branch="b", path=[".github"], message="m"),
        "path endless": call("delete_file", branch="b", path="a/" * 2049, message="m"),
        "path with a line end": call("delete_file", branch="b", path="a\u2028b", message="m"),
    },
    "an integer from": {
        "number true": call("issue_read", issue_number=True, method="get"),
        "number zero": call("issue_read", issue_number=0, method="get"),
        "number huge": call("issue_read", issue_number=2**40, method="get"),
        "perPage 101": call("list_tags", perPage=101),
        "duplicate_of text": call("issue_write", method="update", issue_number=1, duplicate_of="evil/x#1"),
        "comment_id text": call("add_issue_comment", issue_number=1, comment_id="1/../../x"),
        "perPage below zero": call("list_tags", perPage=-1),
        "perPage negative": call("list_tags", perPage=-1),
    },
    "must be an object": {
        "arguments list": {**call("get_tag"), "params": {"name": "get_tag", "arguments": []}},
        "_meta list": {**call("list_tags"), "params": {"name": "list_tags", "_meta": []}},
    },
    "without control characters": {
        "name list": {**call("get_tag"), "params": {"name": ["get_tag"], "arguments": {}}},
        "labels a string": call("issue_write", method="create", title="t", labels="bug"),
        "labels nested": call("issue_write", method="create", title="t", labels=[["bug"]]),
        "labels too many": call("issue_write", method="create", title="t", labels=["x"] * 101),
        "name NUL": call("list_tags\0"),
        "name with a line": call("list_tags\n"),
        "name in a list of length one": {**call("x"), "params": {"name": {"list_tags": 1}}},
        "params name endless": call("x" * 300),
        "title over lines": call("issue_write", method="create", title="a\nb"),
    },
    "default branch": {
        "main": call("create_or_update_file", branch="main", path="a", content="x", message="m"),
        "MAIN": call("create_or_update_file", branch="MAIN", path="a", content="x", message="m"),
    },
    "plain name": {
        "refs/heads/main": call("delete_file", branch="refs/heads/main", path="a", message="m"),
        "heads/main": call("delete_file", branch="heads/main", path="a", message="m"),
        "Refs/Heads/x": call("delete_file", branch="Refs/Heads/x", path="a", message="m"),
        "HEAD": call("delete_file", branch="HEAD", path="a", message="m"),
        "main, refs in capitals": call("create_branch", branch="REFS/HEADS/main"),
        "main, remotes": call("create_branch", branch="remotes/origin/main"),
        "heads": call("create_branch", branch="heads"),
        "head": call("create_branch", branch="head"),
    },
    "deny_paths": {
        "workflow": call("create_or_update_file", branch="b", path=".github/workflows/x.yml", content=""),
        "Workflow case": call("delete_file", branch="b", path=".GitHub/Workflows/x.yml", message="m"),
        "workflow in slashes": call("delete_file", branch="b", path="/.github/workflows/x/", message="m"),
        "workflow, dots": call("delete_file", branch="b", path=".github./workflows /x", message="m"),
        "workflows replaced": call("delete_file", branch="b", path=".github/workflows", message="m"),
        "workflows' folder replaced": call("create_or_update_file", branch="b", path=".GitHub", content="x"),
        "action": call("delete_file", branch="b", path=".github/actions/a/action.yml", message="m"),
        "CODEOWNERS": call("delete_file", branch="b", path="CODEOWNERS", message="m"),
        "codeowners in docs": call("delete_file", branch="b", path="docs/codeowners", message="m"),
        ".gitmodules": call("delete_file", branch="b", path=".gitmodules", message="m"),
        "GitLab": call("delete_file", branch="b", path=".gitlab-ci.yml", message="m"),
        "CircleCI": call("delete_file", branch="b", path=".circleci/config.yml", message="m"),
        "Dependabot": call("delete_file", branch="b", path=".github/dependabot.yml", message="m"),
        "workflow, joiner": call("delete_file", branch="b", path=".github/work\u200dflows/x", message="m"),
        "CODEOWNERS, joiner": call("delete_file", branch="b", path="CODE\u200cOWNERS", message="m"),
        "all workflows": call("delete_file", branch="b", path=".github/workflows", message="m"),
        "the folder above": call("delete_file", branch="b", path=".github", message="m"),
        "the folder above, case": call("delete_file", branch="b", path="/.GITHUB/", message="m"),
        "a file for a folder": call("push_files", branch="b", message="m", files=[
            {"path": ".github/workflows", "content": "x"}]),
        "a file for the folder above": call("create_or_update_file", branch="b", path=".github",
                                            content="x", message="m"),
        "the owners' folder": call("delete_file", branch="b", path="docs", message="m"),
        "workflow, ligature": call("delete_file", branch="b", path=".github/work\ufb02ows/x", message="m"),
        "workflow, Kelvin": call("delete_file", branch="b", path=".github/wor\u212aflows/x", message="m"),
        "CODEOWNERS, dot": call("delete_file", branch="b", path="CODEOWNERS.", message="m"),
        "CODEOWNERS, long s": call("delete_file", branch="b", path="CODEOWNER\u017f", message="m"),
        "second file": call("push_files", branch="b", message="m", files=[
            {"path": "a", "content": "x"}, {"path": ".github/workflows/x", "content": "x"}]),
    },
    "nothing in .git": {
        ".git": call("delete_file", branch="b", path=".git/config", message="m"),
        ".git, joiner": call("delete_file", branch="b", path="a/.g\u200cit/config", message="m"),
    },
    "a file's path": {
        "root": call("delete_file", branch="b", path="/", message="m"),
    },
    "a line or null": {
        "type a number": call("issue_write", method="create", title="t", type=1),
    },
    "without NUL": {
        "body too long": call("add_issue_comment", issue_number=1, body="x" * 65_537),
        "body NUL": call("add_issue_comment", issue_number=1, body="a\0b"),
        "content with NUL": call("create_or_update_file", branch="b", path="a", content="\0", message="m"),
    },
    "a list of up to": {
        "fields an object": call("search_code", query="x", fields={"a": 1}),
    },
    "a field's name": {
        "fields with a path": call("search_code", query="x", fields=["../x"]),
    },
    "a cursor": {
        "after with a quote": call("list_issues", after='x"'),
        "after": call("list_issues", after='x") { viewer { login } }'),
    },
    "an object with": {
        "field filter with a key more": call("list_issues", field_filters=[
            {"field_name": "a", "value": "b", "id": 1}]),
        "file with a key more": call("push_files", branch="b", message="m", files=[
            {"path": "a", "content": "x", "mode": "120000"}]),
        "file with Path": call("push_files", branch="b", message="m", files=[
            {"path": "a", "Path": ".github/workflows/x", "content": "x"}]),
        "files object": call("push_files", branch="b", message="m", files={"path": "a"}),
        "field with a key more": call("issue_write", method="update", issue_number=1,
                                      issue_fields=[{"field_name": "a", "field_id": 1}]),
    },
    "a user name or an e-mail": {
        "author with a slash": call("list_commits", author="evil/x"),
    },
    "an ISO 8601 date": {
        "until with a query": call("list_commits", until="2024-01-01?x=1"),
        "since": call("list_issues", since="yesterday"),
    },
    "tools/list shows": {
        "name empty": call(""),
    },
    "only false": {
        "symlink": call("create_or_update_file", branch="b", path="a", content="x", message="m",
                        allow_symlink_write=True),
    },
    "allow = people": {
        "reviewers": call("create_pull_request", head="x", base="main", title="t", reviewers=["org/team"]),
        "assignees": call("issue_write", method="create", title="t", assignees=["someone"]),
    },
    "allow = delete-labels": {
        "a label's end": call("label_write", method="delete", name="bug"),
    },
    "allow = approve": {
        "APPROVE": call("pull_request_review_write", method="create", pullNumber=1, event="APPROVE"),
        "APPROVE later": call("pull_request_review_write", method="submit_pending", pullNumber=1, event="APPROVE"),
    },
}  # fmt: skip
# These with all opted in to: without it they would be refused for that.
CALLS_OPTED_IN: dict[str, dict[str, dict[str, Any]]] = {
    "is not passed": {
        "related_owner": call("list_discussions", related_owner="evil"),
    },
    "a list of up to": {
        "reviewers a string": call("update_pull_request", pullNumber=1, reviewers="someone"),
        "assignees an object": call("issue_write", method="create", title="t", assignees={"0": "a"}),
    },
    "no ORG/team": {
        "reviewers a team": call("update_pull_request", pullNumber=1, reviewers=["org/team"]),
    },
}  # fmt: skip

# By a word of the reason, too.
QUERIES = {
    "without the word or": [
        "a OR b", "a or b", '"OR"', '"or b"', '"a or"', '"a or or b"', '-"a or b"', "-or",
        'label:"a or b"', 'label:bug,"or"', "and/or", "OR", "foo() OR b", "NOT or", "(a) OR (b)",
        "a;or;b", "a ＯＲ b", "a O\u200cR b", "(or)", "a) OR (b", "a\nor\nb", "a\u00a0or b",
    ],
    "goes without ": [
        'label:"a (b)"', "label:(a", "author:a|b", "label:a;b", "label:`a`", "label:{a}", "label:[a]",
    ],
    "begins with / , : ; & + or -": ['label:"-a"', 'label:"a",-b', 'label:"/a"', "author::x"],
    "only repo:good/r is searched": [
        "repo:evil/x", "REPO:evil/x", "repo:good/r,evil/x", "repo:good", "repo：evil/x",
        'repo:good/r,"evil/x"', 'repo:"good/r","evil/x"', "author:a\u00a0repo:evil/x",
        'repo:"good/r"x', "-repo:good/r", "-repo:evil/x", "ｒepo:evil/x", 'repo:"evil/x"',
    ],
    "leave user: out": ["uſer:x", "user::x", "user:evil", "-user:evil", 'USER:"evil"'],
    "leave org: out": ["org::evil", "org:evil", "-org:evil", 'is:open org:"a b"'],
    "leave": [
        "owner:evil", "enterprise:evil", "saved:x", "team:a/b", "project:a/1", "fork:true",
        "topic:x", "stars:>1", "visibility:private",
    ],
    "name no scope": [
        '"repo:evil/x" bug', "label:repo:evil/x", 'label:"repo:evil/x"', '"uſer:evil"',
        "in:title,repo:x", "repo: evil/x", '"REPO : evil/x"', '"-repo:evil/x"', '"(repo:evil/x)"',
        'label:"a","user:evil"', '"a( org:evil"', "team: a", '-"user:evil"', "x(org:evil)",
        "https://repo:evil/x",
    ],
    "a state only": ["is:private", "is:public", "-is:private"],
    "256 visible characters": [
        "a\u200bb", "a\ufeffb", "\u202ea", "\ud7ff\u0378", "a\u0000b",
    ],
}  # fmt: skip

QUERIES_THAT_PASS = {
    "parser crash": "repo:good/r parser crash",
    "": "repo:good/r",
    "repo:good/r bug": "repo:good/r bug",
    "REPO:GOOD/R bug": "repo:good/r bug",
    '"a phrase of words" is:open': 'repo:good/r "a phrase of words" is:open',
    '"TypeError: x is undefined"': 'repo:good/r "TypeError x is undefined"',
    'label:do-not-merge label:"help wanted"': 'repo:good/r label:do-not-merge label:"help wanted"',
    "author:@me created:>2024-01-01": "repo:good/r author:@me created:>2024-01-01",
    "updated:2024-01-01T10:00:00Z..2024-02-01": "repo:good/r updated:2024-01-01T10:00:00Z..2024-02-01",
    "ordinary android notes": "repo:good/r ordinary android notes",
    "é ünïcode 日本語": "repo:good/r é ünïcode 日本語",
    'label:do-not-merge is:open "some phrase" author:octocat created:>2024-01-01': 'repo:good/r label:do-not-merge is:open "some phrase" author:octocat created:>2024-01-01',
    'is:closed reason:"not planned"': 'repo:good/r is:closed reason:"not planned"',
    'label:"area: parser" in:title,body': 'repo:good/r label:"area: parser" in:title,body',
    "comments:>=5 sort:created-asc no:assignee": "repo:good/r comments:>=5 sort:created-asc no:assignee",
    "label:bug,enhancement milestone:v1.0": "repo:good/r label:bug,enhancement milestone:v1.0",
    "  two   blanks  ": "repo:good/r two blanks",
    "user_id owners organisation": "repo:good/r user_id owners organisation",
    # A minus, and the words and, not: they take away from what is found.
    "is:open -label:wontfix -is:draft": "repo:good/r is:open -label:wontfix -is:draft",
    "-author:app/dependabot is:merged": "repo:good/r -author:app/dependabot is:merged",
    '-label:"needs triage" -crash': 'repo:good/r -label:"needs triage" -crash',
    "does not work": "repo:good/r does not work",
    '"not found"': 'repo:good/r "not found"',
    '"a" and b NOT c': 'repo:good/r "a" and b NOT c',
    'label:"a b","c d" label:bug,"e f"': 'repo:good/r label:"a b","c d" label:bug,"e f"',
    # What text search takes for a blank anyway.
    "fix: crash": "repo:good/r fix crash",
    "TypeError: x is undefined": "repo:good/r TypeError x is undefined",
    "feat(ui)!: add foo() std::vector": "repo:good/r feat ui ! add foo std vector",
    "--verbose foo - bar & c": "repo:good/r verbose foo bar c",
    '"--verbose" "/api/v1" "foo(bar)"': 'repo:good/r "verbose" "api/v1" "foo bar"',
    "\"undefined (reading 'map')\"": "repo:good/r \"undefined reading 'map'\"",
    '"No such file or directory"': 'repo:good/r "No such file" "directory"',
    "[Bug] fix(ui) (#12): error[E0382]": "repo:good/r Bug fix ui #12 error E0382",
    "null pointer; segfault | `x` {": "repo:good/r null pointer segfault x",
    'console.log("a b") foo(x=1, y)': 'repo:good/r console.log "a b" foo x=1 y',
    "-foo() re()po:evil/x": "repo:good/r -foo re po evil/x",
    "https://github.com/o/r/issues/1 at localhost:3000": "repo:good/r https github.com/o/r/issues/1 at localhost 3000",
    "fix:crash 12:30 closes:#1 field.x:1": "repo:good/r fix crash 12 30 closes #1 field.x 1",
    "GET /users ^1.2 ,x &y +z a&&b": "repo:good/r GET users 1.2 x y z a b",
    'a"b c" d"e': 'repo:good/r a "b c" d e',
    "a\tb\u00a0c\n": "repo:good/r a b c",
    "错误：无法（登录）": "repo:good/r 错误 无法 登录",
    'label:type:bug symbol:A::b label:"a"b': 'repo:good/r label:"type:bug" symbol:"A::b" label:"ab"',
    "author:dependabot[bot] user-review-requested:@me": "repo:good/r author:dependabot[bot] user-review-requested:@me",
    'repo:"good/r" x': "repo:good/r x",
    "👨\u200d💻 نمی\u200cخواهم": "repo:good/r 👨\u200d💻 نمی\u200cخواهم",
}


class AttackTest(unittest.TestCase):
    """Nothing here passes, and each refusal says why."""

    def refused(
        self, word: str, message: dict[str, Any], policy: Policy = POLICY,
        bounds: proxy.Bounds = BOUNDS,
    ) -> str:  # fmt: skip
        """The reason, which has the word in it."""
        verdict = proxy.decide(bounds._replace(policy=policy), message)
        self.assertIsInstance(verdict, Refuse, message)
        assert isinstance(verdict, Refuse)
        reason = verdict.reason
        self.assertTrue(10 < len(reason) < 1000 and reason.isprintable(), reason)
        self.assertIsNone(proxy.TOKENS.search(reason.encode()), reason)
        status, told = proxy.told_of(message, verdict)
        self.assertIn(json.dumps(reason)[1:-1], proxy.dumps(told).decode())
        self.assertLess(status, 500)
        self.assertIn(word, reason)
        return reason

    def test_bodies(self) -> None:
        for word, bodies in BODIES.items():
            for name, body in bodies.items():
                caught = self.assertRaisesRegex(proxy.ProtocolError, re.escape(word))
                with self.subTest(name), caught:
                    proxy.parse_message(body)

    def test_methods(self) -> None:
        for method in METHODS:
            with self.subTest(method):
                self.refused("does not pass the method", request(method))
                note = {"jsonrpc": "2.0", "method": method, "params": {"x": 1}}
                known = method == "notifications/initialized"
                self.refused('"x" is not passed' if known else "does not pass", note)

    def test_a_call_as_a_notification(self) -> None:
        message = call("list_tags")
        del message["id"]
        self.refused("does not pass the notification", message)

    def test_blocked_tools(self) -> None:
        for name in BLOCKED:
            with self.subTest(name):
                word = "does not pass" if name.isprintable() else "without control characters"
                self.refused(word, call(name, **OURS), EVERYTHING)

    def test_tools_to_be_opted_in_to(self) -> None:
        for name in OPT_IN:
            with self.subTest(name):
                self.refused(f"{name} needs `allow = ", call(name, **OURS))

    def test_calls(self) -> None:
        for policy, table in ((POLICY, CALLS), (EVERYTHING, CALLS_OPTED_IN)):
            for word, cases in table.items():
                for name, message in cases.items():
                    with self.subTest(name):
                        self.refused(word, message, policy)

    def test_what_json_can_say_and_no_rule_takes(self) -> None:
        nested = ("[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40)
        for name, tool in proxy.TOOLS.items():
            for key in tool.parameters:
                for value in ("NaN", "-Infinity", "1e999", '"\\ud800"', '"a\\udfff"', *nested):
                    body = json.dumps(call(name, **{key: 0})).replace(": 0}", f": {value}}}")
                    with self.subTest(name, key=key, value=value):
                        self.refused("", proxy.parse_message(body.encode()), EVERYTHING)
        self.refused("", proxy.parse_message(json.dumps(call("x\ud800")).encode()))
        self.refused("", proxy.parse_message(json.dumps(call("ping", **{"\ud800": 1})).encode()))
        self.refused("", request("notifications/progress", progressToken=1, progress=float("nan")))

    def test_however_deep_it_is_nested_it_is_refused(self) -> None:
        """At one depth it can be read, and not be quoted."""
        for depth in (*range(900, 1010), 5000, 9990, 20_000):
            body = json.dumps(call("list_tags", page=0)).replace(
                ": 0}", f": {'[' * depth + ']' * depth}}}"
            )
            try:
                message = proxy.parse_message(body.encode())
            except proxy.ProtocolError:
                continue
            self.assertIsInstance(proxy.decide(BOUNDS, message), Refuse)

    def test_queries(self) -> None:
        for tool in ("search_issues", "search_pull_requests", "search_code", "search_commits"):
            for word, queries in QUERIES.items():
                for query in queries:
                    with self.subTest(f"{tool}: {query!r}"):
                        reason = self.refused("", call(tool, query=query))
                        qualifier = tool != "search_issues" and "without the qualifier" in reason
                        self.assertTrue(word in reason or qualifier, reason)
            self.refused("256 visible", call(tool, query="x" * 257))
            self.refused("256 visible", call(tool, query=["x"]))
            self.refused("is missing", call(tool))

    def test_every_tool_refuses_another_repository_and_an_unknown_parameter(self) -> None:
        for name in proxy.TOOLS:
            with self.subTest(name):
                self.refused("only good/r is served", call(name, owner="evil"), EVERYTHING)
                self.refused("only good/r is served", call(name, repo="secret"), EVERYTHING)
                self.refused('"unknown" is not passed', call(name, unknown=1), EVERYTHING)
                self.refused("takes owner, repo", call(name, Owner="good"), EVERYTHING)

    def test_what_writes_when_it_is_read_only(self) -> None:
        for name, tool in proxy.TOOLS.items():
            if tool.write:
                self.refused("read-only", call(name), EVERYTHING._replace(readonly=True))

    def test_a_branch_when_the_default_one_is_not_known(self) -> None:
        self.refused("can set default_branch", call("create_branch", branch="x"), Policy())

    def test_a_branch_outside_the_globs(self) -> None:
        policy = POLICY._replace(branches=("agent/*",))
        self.refused("matching agent/*", call("create_branch", branch="fix"), policy)
        self.refused("matching agent/*", call("create_branch", branch="agent/a/b"), policy)
        self.assertEqual(sent(call("create_branch", branch="agent/a"), policy)["branch"], "agent/a")

    def test_one_write_too_many(self) -> None:
        message = call("create_branch", branch="x")
        self.refused("300 writes", message, POLICY, BOUNDS._replace(writes=300))
        self.assertIsInstance(proxy.decide(BOUNDS._replace(writes=299), message), Forward)
        self.assertIsInstance(proxy.decide(BOUNDS._replace(writes=300), call("list_tags")), Forward)

    def test_answers(self) -> None:
        """No question of the upstream reaches a client: so there is nothing to be answered."""
        given = {"jsonrpc": "2.0", "id": 5, "result": {"action": "accept"}}
        for message in (given, {"jsonrpc": "2.0", "id": 5, "error": {"code": 1, "message": "x"}}):
            with self.assertRaises(proxy.ProtocolError):
                proxy.parse_message(json.dumps(message).encode())

    def test_a_refusal_does_not_repeat_a_token(self) -> None:
        secret = "ghp_" + "x" * 36
        self.assertNotIn(
            secret, self.refused("not passed", call("get_tag", tag="v", **{secret: 1}))
        )
        self.assertNotIn(secret, self.refused("redacted", call("get_tag", tag=secret + " ")))

    def test_what_is_made_up(self) -> None:
        counts = fuzz_proxy.run(3000, seed=3)
        self.assertGreater(min(counts["passed"], counts["refused"], counts["malformed"]), 100)


class PassTest(unittest.TestCase):
    """What an agent needs passes, and is sent as configured."""

    def test_owner_and_repo_are_added_and_spelled_as_configured(self) -> None:
        self.assertEqual(sent(call("list_tags")), OURS)
        self.assertEqual(sent(call("list_tags", owner="GOOD", repo="R")), OURS)
        self.assertEqual(sent(call("search_code", query="x"))["query"], "repo:good/r x")
        self.assertNotIn("owner", sent(call("search_code", query="x", **OURS)))

    def test_arguments(self) -> None:
        for name, arguments in (
            ("get_file_contents", {"path": "src/a b/ünï.py", "ref": "refs/heads/feature/x"}),
            ("get_commit", {"sha": "feature/x-1", "detail": "full_patch", "perPage": 100}),
            ("list_commits", {"sha": SHA, "author": "octo@example.com", "since": "2024-01-01T00:00:00Z"}),
            ("issue_read", {"issue_number": 5, "method": "get_comments", "page": 2}),
            ("issue_write", {"method": "create", "title": "Crash: (a) or b?", "body": "l1\nl2\t|", "labels": ["bug"]}),
            ("issue_write", {"method": "update", "issue_number": 1, "type": None, "state": "closed"}),
            ("create_branch", {"branch": "fix/a", "from_branch": "main"}),
            ("push_files", {"branch": "fix", "message": "m", "files": [{"path": "a/b.c", "content": "\x1b\f"}]}),
            ("create_pull_request", {"head": "fix", "base": "main", "title": "t", "draft": True}),
            ("list_pull_requests", {"head": "someone:fix", "state": "all"}),
            ("pull_request_review_write", {"method": "create", "pullNumber": 1, "event": "COMMENT"}),
            ("add_comment_to_pending_review", {"pullNumber": 1, "body": "b", "path": "a", "line": 3, "side": "RIGHT"}),
            ("delete_file", {"branch": "b", "path": "docs/workflows/x.yml", "message": "m"}),
        ):  # fmt: skip
            with self.subTest(name):
                self.assertEqual(sent(call(name, **arguments)), {**OURS, **arguments})

    def test_other_ways_to_say_it(self) -> None:
        """Numbers and flags as text and floats; what is left out as null, "" or []."""
        for name, given, expected in (
            ("issue_read", {"method": "get", "issue_number": "5"}, {"issue_number": 5}),
            ("issue_read", {"method": "get", "issue_number": 5.0}, {"issue_number": 5}),
            ("issue_read", {"method": "get", "issue_number": 5, "page": None, "perPage": ""}, {}),
            ("list_tags", {"owner": None, "repo": "", "page": []}, {}),
            ("list_tags", {"owner": [], "repo": None, "perPage": "100"}, {"perPage": 100}),
            ("list_tags", {"page": "2.0", "perPage": 0, "task": None}, {"page": 2}),
            ("issue_write", {"method": "create", "title": "t", "issue_number": 0, "milestone": 0.0,
                             "duplicate_of": 0}, {"title": "t"}),
            ("update_pull_request", {"pullNumber": 1, "title": "", "draft": "FALSE"}, {"draft": False}),
            ("list_commits", {"author": "Jane O'Neil"}, {"author": "Jane O'Neil"}),
            ("list_issues", {"state": "", "after": None, "labels": [], "since": ""}, {"labels": []}),
            ("get_repository_tree", {"recursive": "true", "tree_sha": ""}, {"recursive": True}),
            ("create_pull_request", {"head": "a", "base": "b", "title": "t", "draft": "false",
                                     "body": "", "reviewers": None}, {"draft": False, "body": ""}),
            ("issue_write", {"method": "update", "issue_number": 1, "type": None, "labels": [],
                             "milestone": None, "assignees": []}, {"type": None, "labels": []}),
            ("issue_write", {"method": "update", "issue_number": 1, "issue_fields": [
                {"field_name": "a", "value": "5", "delete": None}]},
                {"issue_fields": [{"field_name": "a", "value": "5"}]}),
            ("create_or_update_file", {"branch": "b", "path": "a", "content": "", "message": "m",
                                       "sha": "", "allow_symlink_write": "false"},
             {"content": "", "allow_symlink_write": False}),
        ):  # fmt: skip
            with self.subTest(name, given=given):
                got = sent(call(name, **given))
                for key in given.keys() | expected.keys():
                    if key in expected:
                        self.assertEqual(
                            (type(got[key]), got[key]), (type(expected[key]), expected[key])
                        )
                    elif given[key] in (None, "", [], 0) and key not in OURS:
                        self.assertNotIn(key, got)
                self.assertEqual({**got, **OURS}, got)

    def test_other_envelopes(self) -> None:
        body = b'{"jsonrpc":"2.0","id":1,"method":"ping","params":null}'
        self.assertEqual(proxy.parse_message(body), {"jsonrpc": "2.0", "id": 1, "method": "ping"})
        start = {"protocolVersion": "2025-11-25", "capabilities": {}}
        progress = {"progressToken": 1, "progress": 0.5, "total": None}
        note = {"jsonrpc": "2.0", "method": "notifications/progress", "params": progress}
        for message, params in (
            (request("tools/list", cursor=None), None),
            (request("initialize", **start, extra={"x": 1}), start),
            ({**call("list_tags"), "params": {"name": "list_tags", "arguments": None, "_meta": None}},
             {"name": "list_tags", "arguments": OURS}),
            (note, {"progressToken": 1, "progress": 0.5}),
        ):  # fmt: skip
            verdict = proxy.decide(BOUNDS, message)
            assert isinstance(verdict, Forward), verdict
            self.assertEqual(verdict.message.get("params"), params)

    def test_slashes_around_a_path_are_taken_off(self) -> None:
        for given, path in (("/", ""), ("/src/", "src"), ("", "")):
            self.assertEqual(sent(call("get_file_contents", path=given))["path"], path)

    def test_constants_are_sent_though_left_out(self) -> None:
        file = call("create_or_update_file", branch="b", path="a", content="x", message="m")
        self.assertIs(sent(file)["allow_symlink_write"], False)
        self.assertIs(sent(call("get_job_logs", job_id=1), EVERYTHING)["return_content"], True)

    def test_queries(self) -> None:
        for query, expected in QUERIES_THAT_PASS.items():
            with self.subTest(query):
                arguments = sent(call("search_issues", query=query))
                self.assertEqual(arguments, {**OURS, "query": expected})

    def test_no_fields_are_all_fields(self) -> None:
        for tool in ("search_issues", "search_pull_requests", "search_code"):
            self.assertEqual(sent(call(tool, query="x", fields=[])).get("fields", []), [])

    def test_a_hit_always_says_where_it_is_from(self) -> None:
        fields = sent(call("search_code", query="x", fields=["path"]))["fields"]
        self.assertEqual(fields, ["path", *proxy.IDENTITY])

    def test_what_is_opted_in_to(self) -> None:
        sent(call("merge_pull_request", pullNumber=1), EVERYTHING)
        sent(call("create_branch", branch="main"), EVERYTHING)
        sent(call("pull_request_review_write", method="create", pullNumber=1, event="APPROVE"), EVERYTHING)  # fmt: skip
        sent(call("issue_write", method="create", assignees=["a"]), EVERYTHING)

    def test_of_meta_only_what_is_known_passes(self) -> None:
        meta = {"progressToken": "p", "claudecode/toolUseId": "x", "io.modelcontextprotocol/protocolVersion": MODERN,
                "io.modelcontextprotocol/clientCapabilities": {"sampling": {}}}  # fmt: skip
        message = request("tools/list", _meta=meta)
        verdict = proxy.decide(BOUNDS, message)
        assert isinstance(verdict, Forward)
        del meta["claudecode/toolUseId"]
        meta["io.modelcontextprotocol/clientCapabilities"] = {}
        self.assertEqual(verdict.message["params"], {"_meta": meta})

    def test_nothing_that_a_client_can_be_asked_for_is_offered(self) -> None:
        capabilities = {"sampling": {}, "roots": {"listChanged": True}, "elicitation": {"url": {}}}
        info = {"name": "c", "version": "1", "websiteUrl": "x"}
        message = request(
            "initialize", protocolVersion="2025-11-25", capabilities=capabilities, clientInfo=info
        )
        verdict = proxy.decide(BOUNDS, message)
        assert isinstance(verdict, Forward)
        params = verdict.message["params"]
        self.assertEqual(params["capabilities"], {})
        self.assertEqual(params["clientInfo"]["name"], "agent-vm")


class AnswerTest(unittest.TestCase):
    """What comes back: of this repository only, and without secrets."""

    def shown(self, tool: str, data: Any) -> Any:
        text = {"type": "text", "text": data if isinstance(data, str) else json.dumps(data)}
        result = proxy.checked_result(SCOPE, proxy.TOOLS[tool].check, {"content": [text]})
        return json.loads(result["content"][0]["text"])

    def test_hits_of_other_repositories_are_dropped_and_the_total_with_them(self) -> None:
        ours = {"number": 1, "html_url": "https://github.com/Good/R/issues/1"}
        others = [
            {"number": 2, "html_url": "https://github.com/evil/secret/issues/2"},
            {"number": 3, "repository_url": "https://api.github.com/repos/evil/secret"},
            {"number": 4},
            {"number": 5, "repository": "good/r-x"},
            {**ours, "repository_url": "https://api.github.com/repos/evil/secret"},
            "x",
        ]
        found = {"total_count": 7, "incomplete_results": False, "items": [ours, *others]}
        self.assertEqual(self.shown("search_issues", found), {"items": [ours]})
        beyond = {"total_count": 4711, "incomplete_results": False, "items": []}
        self.assertEqual(self.shown("search_issues", beyond), {"items": []})
        none = {"total_count": 0, "incomplete_results": False}
        self.assertEqual(self.shown("search_issues", none), {**none, "items": []})
        only_ours = {"total_count": 1, "incomplete_results": False, "items": [ours]}
        self.assertEqual(self.shown("search_issues", only_ours), only_ours)

    def test_a_list_of_which_nothing_is_left_says_so(self) -> None:
        other = issue("evil/secret", 2)
        ours = issue("good/r", 1)
        for tool, data, said in (
            ("search_issues", {"total_count": 1, "items": [other]}, True),
            ("search_issues", {"total_count": 2, "items": [other, ours]}, False),
            ("search_issues", {"total_count": 0, "items": []}, False),
            ("issue_read", [other], True),
            ("issue_read", [other, ours], False),
            ("issue_read", [], False),
            ("issue_read", ours, False),
        ):
            text = {"type": "text", "text": json.dumps(data)}
            result = proxy.checked_result(SCOPE, proxy.TOOLS[tool].check, {"content": [text]})
            notes = [block["text"] for block in result["content"][1:]]
            self.assertEqual(["not known to be of good/r" in note for note in notes], [True] * said)
            self.assertNotIn("secret", str(notes))

    def test_hits_in_code_and_commits(self) -> None:
        code = {"total_count": 1, "incomplete_results": False, "items": [{"repository": "good/r"}]}
        self.assertEqual(self.shown("search_code", code), code)
        commit = {"sha": SHA, "html_url": f"https://github.com/good/r/commit/{SHA}",
                  "repository": {"full_name": "good/r"},
                  "author": {"login": "a", "html_url": "https://github.com/apps/dependabot"}}  # fmt: skip
        found = {"total_count": 1, "incomplete_results": False, "items": [commit]}
        self.assertEqual(self.shown("search_commits", found), found)

    def test_an_answer_that_cannot_be_checked_is_withheld(self) -> None:
        for data in ("not JSON", "[]", '{"items":1}', "null"):
            with self.subTest(data), self.assertRaises(proxy.Refusal):
                self.shown("search_code", data)
        with self.assertRaises(proxy.Refusal):
            proxy.checked_result(SCOPE, "hits", {"content": [{"type": "image"}]})

    def test_what_lockdown_may_have_emptied_says_so(self) -> None:
        """The shapes are github-mcp-server's, in lockdown."""
        restricted = "access to issue details is restricted by lockdown mode"
        thread = '{"review_threads":[{"id":"T","comments":[],"total_count":0}],"totalCount":1}'
        ours = json.dumps(issue("good/r", 5)).replace(": ", ":")
        get, comments, reviews, threads, diff = (
            call("issue_read", method="get", issue_number=5),
            call("issue_read", method="get_comments", issue_number=5),
            call("pull_request_read", method="get_reviews", pullNumber=7),
            call("pull_request_read", method="get_review_comments", pullNumber=7),
            call("pull_request_read", method="get_diff", pullNumber=7),
        )
        for message, text, more, says in (
            (get, restricted, {"isError": True}, True), (get, ours, {}, False),
            (comments, "[]", {}, True), (reviews, "[]", {}, True), (reviews, "[1]", {}, False),
            (threads, thread, {}, True), (diff, "+a = []", {}, False), (call("list_issues"), "[]", {}, False),
        ):  # fmt: skip
            for lockdown in (True, False):
                bounds = BOUNDS._replace(policy=POLICY._replace(lockdown=lockdown))
                forward = proxy.decide(bounds, message)
                assert isinstance(forward, Forward)
                result = {"content": [{"type": "text", "text": text}], **more}
                answer = proxy.checked_answer(bounds, forward, {"id": 1, "result": result})[
                    "result"
                ]
                with self.subTest(text, lockdown=lockdown):
                    notes = [block["text"] for block in answer["content"][1:]]
                    self.assertEqual(notes, [proxy.HIDDEN] if says and lockdown else [])
                    self.assertEqual(answer.get("isError"), more.get("isError"))
                told = proxy.instructions(bounds)
                self.assertEqual("GITHUB_MCP_LOCKDOWN=0" in told, lockdown)

    def test_an_answer_without_text_is_withheld(self) -> None:
        structured = {"items": [{"html_url": "https://github.com/good/r/issues/1"}]}
        for check in ("hits", "items"):
            with self.assertRaises(proxy.Refusal):
                proxy.checked_result(SCOPE, check, {"content": [], "structuredContent": structured})

    def test_a_transferred_issue_is_withheld(self) -> None:
        issue = {"number": 1, "html_url": "https://github.com/evil/secret/issues/1", "body": "s"}
        with self.assertRaises(proxy.Refusal):
            self.shown("issue_read", issue)

    def test_an_item_that_does_not_say_where_it_is_from_is_withheld(self) -> None:
        for item in (
            {"number": 1, "title": "s"},
            {"id": 1, "body": "s"},
            {"number": 1, "url": "x"},
        ):
            with self.subTest(item):
                with self.assertRaises(proxy.Refusal):
                    self.shown("issue_read", item)
                self.assertEqual(self.shown("issue_read", [item]), [])
                self.assertEqual(self.shown("issue_read", {"parent": item}), {})

    def test_no_address_and_no_count_tells_of_other_repositories(self) -> None:
        api = "https://api.github.com/repos"
        ours = {"number": 1, "html_url": "https://github.com/good/r/issues/1",
                "comments_url": f"{api}/good/r/issues/1/comments"}  # fmt: skip
        issue = {**ours, "parent_issue_url": f"{api}/evil/secret/issues/7"}
        self.assertEqual(self.shown("issue_read", issue), ours)
        found = {"total_count": 1, "incomplete_results": False, "items": [issue]}
        self.assertEqual(self.shown("search_issues", found), {**found, "items": [ours]})
        other = reference("evil/secret", 2)
        closed_by = {"total_count": 2, "references": [reference("good/r", 1), other]}
        shown = self.shown("issue_read", {**ours, "closed_by_pull_requests": closed_by})
        self.assertNotIn("total_count", shown["closed_by_pull_requests"])
        result = {"content": [{"type": "text", "text": "[]"}], "_meta": {"found": ["secret"]}}
        self.assertNotIn("_meta", proxy.checked_result(SCOPE, "hits", {**result, "content": [
            {"type": "text", "text": "{}"}]}))  # fmt: skip

    def test_relatives_in_other_repositories_are_dropped(self) -> None:
        other = {"number": 9, "title": "s", "repository": "good/other", "url": "x"}
        issue = {"number": 1, "html_url": "https://ghe.example/good/r/issues/1", "parent": other,
                 "closed_by_pull_requests": {"total_count": 1, "references": [other]}}  # fmt: skip
        shown = self.shown("issue_read", issue)
        self.assertNotIn("parent", shown)
        self.assertEqual(shown["closed_by_pull_requests"]["references"], [])
        sub = [{"repository_url": "https://api.github.com/repos/good/other", "title": "s"}]
        self.assertEqual(self.shown("issue_read", sub), [])

    def test_structured_content_alone_is_not_shown(self) -> None:
        hit = {"html_url": "https://github.com/evil/secret/issues/1", "title": "s"}
        results: list[dict[str, Any]] = [
            {"structuredContent": {"items": [hit]}},
            {"structuredContent": hit, "content": {}},
        ]
        for tool in ("search_issues", "issue_read"):
            for result in results:
                with self.subTest(tool, result=result):
                    try:
                        shown = json.dumps(
                            proxy.checked_result(SCOPE, proxy.TOOLS[tool].check, result)
                        )
                    except proxy.Refusal:
                        continue
                    self.assertNotIn("secret", shown)

    def test_redacting_takes_time_in_proportion_to_the_text(self) -> None:
        """A file or an argument full of question marks must not hold the proxy up."""
        for text in (
            b"?" * 6000,
            b"?a" * 4000,
            b"a?\\u0026" * 2000,
            b"ghp_" * 4000,
            b"?token" * 2000,
        ):
            began = time.perf_counter()
            proxy.redact(text, b"")
            self.assertLess(time.perf_counter() - began, 0.3, text[:10])
        began = time.perf_counter()
        verdict = proxy.decide(BOUNDS, call("list_tags", owner="?" * 6000))
        self.assertIsInstance(verdict, Refuse)
        self.assertLess(time.perf_counter() - began, 0.3)

    def test_structured_content_does_not_go_around_the_check(self) -> None:
        text = {"type": "text", "text": '{"items":[]}'}
        result = {
            "content": [text],
            "structuredContent": {"items": ["secret"]},
            "resultType": "complete",
        }
        checked = proxy.checked_result(SCOPE, "hits", result)
        self.assertEqual(set(checked), {"content", "resultType"})

    def test_tokens_and_signed_urls_are_redacted(self) -> None:
        for secret in (
            b"ghp_" + b"a" * 36, b"gho_" + b"B" * 36, b"ghu_" + b"1" * 36, b"ghr_" + b"x" * 40,
            b"ghs_" + b"a.b-c" * 20, b"github_pat_" + b"A1_" * 20,
        ):  # fmt: skip
            blank = proxy.blank(len(secret))
            self.assertEqual(proxy.redact(b'a "' + secret + b'" b'), b'a "' + blank + b'" b')
        for query in (
            b"token=" + b"ABC" * 8,
            b"sig=" + b"a%2Fb" * 5 + b"&sv=2020",
            b"sig=" + b"x" * 20 + b"\\\\u0026se=3",
            b"X-Amz-Signature=" + b"00" * 32,
        ):
            url = b'"https://raw.example/good/r/f' + b"?" + query + b'"'
            blank = proxy.blank(len(query))
            self.assertEqual(proxy.redact(url), b'"https://raw.example/good/r/f?' + blank + b'"')
        self.assertEqual(
            proxy.redact(b"is my-own-token-0123 here?", b"my-own-token-0123"),
            b"is [redacted]******* here?",
        )
        # Files are read, changed and written back: what only looks like a URL with a token stays.
        for name in (b"weighs_at_least_as_much_as_the_other_one", b"highp_precision_value_of_the_shader_x",
                     b"f(x&sig=another_variable_name_here);y=2", b"if a?token=a_long_default_value:b"):  # fmt: skip
            self.assertEqual(proxy.redact(name), name)
        token = b"ghp_" + b"a" * 36
        for before in (b"\\n", b"\\t", b"\\u003c", b"=", b"(", b"x-"):
            self.assertEqual(proxy.redact(before + token), before + proxy.blank(40))
        plain = (
            b'what? "https://x/y?page=2" github_pat ghp_short a?b:c `/api?token=${t}` ?token=TOKEN'
        )
        self.assertEqual(proxy.redact(plain), plain)
        tokens = (b"the-token-before-01", b"the-token-of-now-02")
        self.assertEqual(
            proxy.redact(b" ".join(tokens), *reversed(tokens)),
            b"[redacted]********* [redacted]*********",
        )

    def offered(self, name: str, **properties: Any) -> dict[str, Any]:
        own = {key: {"type": "string", "x-mcp-header": key} for key in OURS}
        schema = {
            "type": "object",
            "properties": {**own, **properties},
            "required": ["owner", "repo", *properties],
        }
        return {"name": name, "description": "d", "icons": [1], "inputSchema": schema}

    def test_tools_are_narrowed_to_what_passes(self) -> None:
        methods = {
            "type": "string",
            "enum": ["create", "submit_pending", "delete_pending", "resolve_thread"],
        }
        review = self.offered(
            "pull_request_review_write", method=methods, pullNumber={"type": "number"}
        )
        review["inputSchema"]["properties"]["threadId"] = {"type": "string"}
        tools = [review, self.offered("get_me"), self.offered("merge_pull_request"),
                 self.offered("get_tag", tag={}, namespace={})]  # fmt: skip
        (tool,) = proxy.listed_tools(POLICY, {"tools": tools})["tools"]
        schema = tool["inputSchema"]
        self.assertEqual(set(tool), {"name", "description", "inputSchema"})
        self.assertEqual(schema["required"], ["method", "pullNumber"])
        self.assertNotIn("threadId", schema["properties"])
        self.assertEqual(
            schema["properties"]["method"]["enum"], ["create", "submit_pending", "delete_pending"]
        )
        self.assertEqual(len(methods["enum"]), 4, "the upstream's own object is changed")
        self.assertEqual(
            proxy.listed_tools(POLICY._replace(readonly=True), {"tools": tools})["tools"], []
        )

    def test_initialize_says_what_is_served(self) -> None:
        forward = Forward(request("initialize"))
        result = {"capabilities": {"tools": {}, "prompts": {}, "resources": {}, "completions": {}},
                  "instructions": "call get_me", "serverInfo": {"name": "github-mcp-server", "version": "v1.10.1"}}  # fmt: skip
        shown = proxy.checked_answer(BOUNDS, forward, {"id": 1, "result": result})["result"]
        self.assertEqual(shown["capabilities"], {"tools": {}})
        self.assertIn("good/r", shown["instructions"])
        self.assertNotIn("get_me", shown["instructions"])

    def test_which_answers_are_checked(self) -> None:
        """get_comments is asked of the issue of that number, and that may have been transferred."""
        for message, check in (
            (call("search_code", query="x"), "hits"),
            (call("issue_read", method="get", issue_number=1), "items"),
            (call("pull_request_read", method="get_comments", pullNumber=1), "items"),
            (call("pull_request_read", method="get_diff", pullNumber=1), ""),
            (call("list_tags"), ""),
        ):
            verdict = proxy.decide(BOUNDS, message)
            assert isinstance(verdict, Forward)
            self.assertEqual(verdict.check, check, message)
        labels = call("issue_read", method="get_labels", issue_number=1)
        self.assertIsInstance(proxy.decide(BOUNDS, labels), Refuse)

    def test_ids_that_have_more_than_one_spelling_are_refused(self) -> None:
        for id in ("<", "&", "é", '"', "\\", "a\n", "x" * 257, 1.5, True, None):
            with self.subTest(id), self.assertRaises(proxy.ProtocolError):
                proxy.parse_message(json.dumps({**request("ping"), "id": id}).encode())

    def test_what_an_upstream_may_send(self) -> None:
        forward = Forward(call("list_tags"))
        for message, kind in (
            ({"id": 1, "result": {}}, "answer"),
            ({"id": "1", "result": {}}, ""),
            ({"id": 2, "result": {}}, ""),
            ({"id": 1}, ""),
            ({"id": 7, "method": "ping"}, ""),
            ({"method": "notifications/progress"}, "note"),
            ({"method": "notifications/unknown"}, ""),
            ([], ""),
        ):
            self.assertEqual(proxy.kind_of(message, forward), kind, message)
        for method in ("elicitation/create", "sampling/createMessage", "roots/list"):
            with self.assertRaisesRegex(proxy.AnswerLost, "nobody here answers"):
                proxy.kind_of({"id": 7, "method": method}, forward)


def issue(repository: str, number: int, kind: str = "issues") -> dict[str, Any]:
    """An issue with the keys that searches and lists of sub-issues give."""
    api = f"https://api.github.com/repos/{repository}"
    user = {"login": "octo", "id": 1, "type": "User", "html_url": "https://github.com/octo",
            "url": "https://api.github.com/users/octo",
            "repos_url": "https://api.github.com/users/octo/repos"}  # fmt: skip
    return {
        "id": number, "number": number, "state": "open", "title": "t", "body": f"{repository} OR (x)",
        "user": user, "assignee": user, "assignees": [user], "closed_by": user, "score": 1,
        "labels": [{"id": 1, "url": f"{api}/labels/bug", "name": "bug"}],
        "milestone": {"url": f"{api}/milestones/1", "number": 1, "creator": user,
                      "html_url": f"https://github.com/{repository}/milestone/1"},
        "url": f"{api}/issues/{number}", "repository_url": api, "comments_url": f"{api}/issues/{number}/comments",
        "html_url": f"https://github.com/{repository}/{kind}/{number}", "node_id": "I_1",
        "reactions": {"url": f"{api}/issues/{number}/reactions", "total_count": 0},
        "performed_via_github_app": {"id": 1, "owner": user, "html_url": "https://github.com/apps/x"},
        "pull_request": {"url": f"{api}/pulls/{number}", "html_url": f"https://github.com/{repository}/pull/{number}"},
        "text_matches": [{"object_url": "https://api.github.com/repositories/5/issues/1", "fragment": "t"}],
        "field_values": [{"field": "Priority", "value": "P1"}],
    }  # fmt: skip


def reference(repository: str, number: int) -> dict[str, Any]:
    url = f"https://github.com/{repository}/issues/{number}"
    return {
        "number": number,
        "title": repository,
        "state": "OPEN",
        "url": url,
        "repository": repository,
    }


class ShapeTest(unittest.TestCase):
    """Answers in the shapes that github-mcp-server gives: ours come whole, others not at all."""

    def shown(self, tool: str, data: Any) -> Any:
        content = [{"type": "text", "text": json.dumps(data)}]
        return json.loads(
            proxy.checked_result(SCOPE, proxy.TOOLS[tool].check, {"content": content})["content"][
                0
            ]["text"]
        )

    def test_found_issues_and_pull_requests(self) -> None:
        for tool, kind in (("search_issues", "issues"), ("search_pull_requests", "pull")):
            own = [issue("good/r", 1, kind), issue("Good/R", 2, kind)]
            ours = {"total_count": 2, "incomplete_results": False, "items": own}
            self.assertEqual(self.shown(tool, ours), ours)
            mixed = {**ours, "items": [*own, issue("evil/secret", 3, kind)]}
            self.assertEqual(self.shown(tool, mixed), {"items": own})

    def test_found_issues_with_few_fields(self) -> None:
        few = ["title", *proxy.IDENTITY[:2]]
        ours = {key: issue("good/r", 1)[key] for key in few}
        others = {key: issue("evil/x", 1)[key] for key in few}
        found = {"total_count": 2, "incomplete_results": False, "items": [ours, others]}
        self.assertEqual(self.shown("search_issues", found), {"items": [ours]})

    def test_found_code(self) -> None:
        hit = {"name": "a", "path": "src/a", "sha": SHA, "repository": "good/r", "text_matches": [
            {"object_url": "https://api.github.com/repositories/5/contents/a?ref=x", "fragment": "n",
             "object_type": "FileContent", "property": "content", "matches": []}]}  # fmt: skip
        found = {"total_count": 1, "incomplete_results": False, "items": [hit]}
        self.assertEqual(self.shown("search_code", found), found)
        other = {**found, "items": [{**hit, "repository": "good/r2"}, {**hit, "repository": ""}]}
        self.assertEqual(self.shown("search_code", other), {"items": []})

    def test_found_commits(self) -> None:
        user = {"login": "o", "id": 1, "profile_url": "https://github.com/o"}
        hits = [
            {"sha": SHA, "html_url": f"https://github.com/{name}/commit/{SHA}", "author": user,
             "committer": user, "commit": {"message": "m", "author": {"name": "o"}},
             "repository": {"full_name": name, "html_url": f"https://github.com/{name}", "private": True}}
            for name in ("good/r", "evil/secret")
        ]  # fmt: skip
        found = {"total_count": 2, "incomplete_results": False, "items": hits}
        self.assertEqual(self.shown("search_commits", found), {"items": hits[:1]})

    def test_an_issue_and_its_relatives(self) -> None:
        data = {
            "number": 5, "title": "t", "html_url": "https://github.com/good/r/issues/5", "labels": ["bug"],
            "user": {"login": "o", "profile_url": "https://github.com/o"}, "assignees": [],
            "has_parent": True, "has_children": True, "parent": reference("good/other", 3),
            "sub_issues_summary": {"total": 2, "completed": 1, "percent_completed": 50},
            "closed_by_pull_requests": {
                "total_count": 2, "references": [reference("good/r", 8), reference("good/other", 9)]},
        }  # fmt: skip
        shown = self.shown("issue_read", data)
        self.assertNotIn("good/other", json.dumps(shown))
        self.assertEqual(shown["closed_by_pull_requests"]["references"], [reference("good/r", 8)])
        ours = {**data, "parent": reference("good/r", 3), "closed_by_pull_requests": {
            "total_count": 1, "references": [reference("good/r", 8)]}}  # fmt: skip
        self.assertEqual(self.shown("issue_read", ours), ours)

    def test_the_parent(self) -> None:
        ours = {"parent": reference("good/r", 3)}
        self.assertEqual(self.shown("issue_read", ours), ours)
        self.assertEqual(self.shown("issue_read", {"parent": None}), {"parent": None})
        self.assertNotIn(
            "other", json.dumps(self.shown("issue_read", {"parent": reference("good/other", 3)}))
        )

    def test_sub_issues(self) -> None:
        data = [issue("good/r", 6), issue("good/other", 7), issue("GOOD/R", 8)]
        self.assertEqual(self.shown("issue_read", data), [data[0], data[2]])

    def test_comments_and_labels(self) -> None:
        comments = [
            {"id": n, "body": "b", "html_url": f"https://github.com/{name}/issues/1#issuecomment-{n}",
             "user": {"login": "o"}, "reactions": {"total_count": 0}}
            for n, name in enumerate(("good/r", "evil/secret"))
        ]  # fmt: skip
        self.assertEqual(self.shown("issue_read", comments), comments[:1])
        labels = {
            "labels": [{"id": "L", "name": "bug", "color": "f", "description": ""}],
            "totalCount": 1,
        }
        self.assertEqual(self.shown("issue_read", labels), labels)

    def test_addresses(self) -> None:
        for url, name in (
            ("https://api.github.com/repos/evil/x/issues/1", "evil/x"),
            ("https://api.github.com/repos/evil/x", "evil/x"),
            ("https://ghe.example/api/v3/repos/evil/x", "evil/x"),
            ("https://ghe.example:8443/evil/x/pull/3", "evil/x"),
            ("https://github.com/evil/x/issues/1?q=/good/r/issues/2", "evil/x"),
            ("https://github.com/evil/x/issues/1#/repos/good/r", "evil/x"),
            ("https://github.com/evil/x/discussions/4#discussioncomment-1", "evil/x"),
            ("https://github.com/evil/x/tree/good/r/issues/1", "evil/x"),
            ("https://api.github.com/repositories/99/issues/1", "repositories/99"),
            ("https://api.github.com/repos/Evil/X/pulls/1/files", "evil/x"),
            ("https://github.com/evil/x/releases/tag/repos/good/r", "evil/x"),
            ("https://github.com/evil/x/security/advisories/1", "evil/x"),
            ("HTTPS://GITHUB.COM/evil/x/wiki", "evil/x"),
            ("https://raw.githubusercontent.com/evil/x/main/a", "evil/x"),
            ("https://ghe.example/api/v3/repos/evil/x/repos/good/r", "evil/x"),
            ("https://github.com/evil/x", "evil/x"),
        ):
            with self.subTest(url):
                self.assertEqual(proxy.repository_of({"url": url}), {name})
                self.assertTrue(proxy.foreign({"html_url": url}, SCOPE))
        for none in ("https://github.com/octo", "https://github.com/apps/x", "", "issues/1", None, 7,
                    "https://api.github.com/users/octo/repos", "https://github.com/octo/",
                    "https://avatars.githubusercontent.com/u/1?v=4", "https://ghe.example/avatars/u/1"):  # fmt: skip
            self.assertEqual(proxy.repository_of({"url": none}), set())

    def test_errors_pass_as_they_are(self) -> None:
        failed = {"isError": True, "content": [{"type": "text", "text": "404 Not Found []"}]}
        for tool in ("search_issues", "issue_read", "list_tags"):
            self.assertEqual(proxy.checked_result(SCOPE, proxy.TOOLS[tool].check, failed), failed)

    def test_a_part_that_is_not_text_is_withheld(self) -> None:
        blocks: list[Any] = [{"type": "resource"}, {"type": "text"}, {"type": "text", "text": 1}]
        for block in [*blocks, None, [], "x"]:
            for tool in ("search_issues", "issue_read"):
                with self.subTest(block), self.assertRaises(proxy.Refusal):
                    proxy.checked_result(SCOPE, proxy.TOOLS[tool].check, {"content": [block]})


class EveryToolTest(unittest.TestCase):
    """Each row of the table lets a plain call through, and says exactly that to the upstream."""

    PLAIN: ClassVar[dict[str, Any]] = {
        "alertNumber": 1, "base": "main", "body": "b", "branch": "fix", "commentId": 1, "comment_id": 1,
        "content": "+1", "discussionNumber": 1, "draft": False, "event": "COMMENT", "findingNumber": 1,
        "files": [{"path": "a", "content": "x"}], "head": "fix", "issue_number": 5, "issue_type": "Bug",
        "labels": ["bug"], "milestone": 1, "name": "bug", "path": "f.txt", "pullNumber": 1, "assignees": ["a"],
        "resource_id": "ci.yml", "reviewers": ["a"], "sha": SHA, "state": "closed", "tag": "v1", "title": "t",
    }  # fmt: skip

    def test_what_must_be_given(self) -> None:
        for name, tool in proxy.TOOLS.items():
            required = {key: rule for key, rule in tool.parameters.items() if rule.required}
            methods = required["method"].choices if "method" in required else ("",)
            for method in methods:
                with self.subTest(name, method=method):
                    given = {key: self.PLAIN.get(key) for key in required}
                    given.update({"query": "x"} if "query" in given else {})
                    given.update({"method": method} if method else {})
                    expected = {**given, **(OURS if tool.scoped else {})}
                    expected.update({"query": "repo:good/r x"} if "query" in given else {})
                    expected.update(
                        {k: r.constant[0] for k, r in tool.parameters.items() if r.constant}
                    )
                    self.assertEqual(sent(call(name, **given), EVERYTHING), expected)
                    self.assertEqual(sent(call(name, **OURS, **given), EVERYTHING), expected)
                    for key in required:
                        less = {k: v for k, v in given.items() if k != key}
                        verdict = proxy.decide(proxy.Bounds(SCOPE, EVERYTHING), call(name, **less))
                        self.assertIsInstance(verdict, Refuse, key)

    def test_no_parameter_takes_what_is_odd(self) -> None:
        """An object where the table has none, and a list of lists, pass nowhere."""
        for name, tool in proxy.TOOLS.items():
            for key in tool.parameters:
                for value in ({"a": {"b": 1}}, [[1]], 10**16, "a\0b"):
                    with self.subTest(name, key=key, value=value):
                        verdict = proxy.decide(
                            proxy.Bounds(SCOPE, EVERYTHING), call(name, **{key: value})
                        )
                        self.assertIsInstance(verdict, Refuse)

    def test_what_writes_is_marked(self) -> None:
        for name, tool in proxy.TOOLS.items():
            reads = name.startswith(("get_", "list_", "search_", "find_")) or name.endswith(
                ("_read", "_list", "_get")
            )
            self.assertEqual(tool.write, not reads, name)


class RuleTest(unittest.TestCase):
    """Each kind of rule: what it takes, and what not."""

    def test_kinds(self) -> None:
        record = proxy.record("a", a=proxy.RULES["number"], b=proxy.LINE)
        rows: list[tuple[proxy.Rule, list[Any], list[Any]]] = [
            (proxy.free_text(3), ["", "abc", "a\nb"], ["abcd", "a\0", 1, None, ["a"]]),
            (proxy.pattern("x", "[a-z]+"), ["ab"], ["", "A", "a\n", "a b", 1, None, ["a"]]),
            (proxy.integer(1, 5), [1, 5], [0, 6, 1.5, "", "1.5", "1.", ".0", "+1", "\u0661", "6", True, None, [1]]),
            (proxy.choice("a", "b"), ["a", "b"], ["A", "a ", "", "ab", None, 0, ["a"]]),
            (proxy.only(True), [True], [1, "yes", "1", False, "false", None, 1.0]),
            (proxy.RULES["type"], [None, "Bug"], [0, False, "a\n"]),
            (proxy.list_of(proxy.RULES["number"], 2), [[], [1], [1, 2]], [[1, 2, 3], [0], 1, "1", {}, None]),
            (record, [{"a": 1}, {"a": 1, "b": "x"}], [{}, {"b": "x"}, {"a": 1, "c": 1}, {"A": 1}, []]),
            (proxy.FLAG, [True, False], [0, 1, "truE ", "yes", "", None]),
            (proxy.LINE, ["", "a b", "é", "x" * 256, "👨\u200d💻", "می\u200cروم", "\u200fא\u200e", "ไทย\u200bไทย"],
             ["x" * 257, "a\n", "a\u202e", "a\u2067", "a\u00ad", "\ue000", 1, "\u2028"]),
            (proxy.COMMITISH, ["main", "HEAD", "head/x", "1234567/x", "a/HEAD/b", "a/b", "v1.0", SHA, "refs/pull/1/head", "é"],
             ["", "@", "a..b", "a.", ".a", "a/.b", "a//b", "a b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b",
              "HEAD/pulls", SHA + "/pulls", "A" * 40 + "/x", "a.", "a./b", "/a", "a/", "a'b", "a(b)", "a&b",
              "a@{1}", "a.lock", "a.lock/b", "-a", "a%2f", "a#b", "a\u200b", 1, None, ["a"], "x" * 256]),
            (proxy.RULES["head_filter"], ["fix", "user:fix", "user:a/b"], [":fix", "a:b:c", "a/b:c", "user:..", 1, ["a:b"]]),
            (proxy.RULES["path"], ["", "a", "a/b.c", "a b", ".a", "..a", "é", "a?b", "C#/100% x", "نمی\u200cخواهم/👨\u200d💻", "...", "a.."],
             ["a//b", "..", "a/..", "./a", "a\\b", "a%2e", "a\n", 1, None, "..;/a", "a" * 4097, "a/./b", "a/../b"]),
            (proxy.RULES["cursor"], ["", "Y3Vyc29yOnYyOpHOAA==", "a:1"], ["a b", 'a"', "a\n", 1, "x" * 513]),
            (proxy.RULES["date"], ["2024-01-01", "2024-01-01T10:00:00Z", "2024-01-01T10:00:00+02:00"],
             ["", "2024", "today", "2024-01-01 OR x", "2024-01-01\n", 20240101]),
            (proxy.WHO, ["octocat", "a@b.example", "dependabot[bot]"], ["", "a/b", "a b", "a:b", 1]),
            (proxy.RULES["sha"], ["0123abc", SHA], ["main", "012", "g" * 40, SHA + "\n", "0" * 65, 1]),
            (proxy.SEGMENT, ["ci.yml", "123"], ["", ".", "..", "...", "a/b", "a%2f", 1, "é"]),
            (proxy.RULES["color"], ["ff0000", "#FF0000"], ["red", "ff000", "ff00000", 1]),
            (proxy.RULES["reaction"], ["+1", "eyes"], ["1", "EYES"]),
            (proxy.RULES["people"], [["octocat"]], [["org/team"], ["a", "b/c"], "octocat"]),
        ]  # fmt: skip
        bounds = proxy.Bounds(SCOPE, EVERYTHING)
        for rule, passing, refused in rows:
            for value in passing:
                with self.subTest(rule.what, value=value):
                    self.assertEqual(rule.check(value, bounds), value)
            for value in refused:
                with self.subTest(rule.what, value=value), self.assertRaises(proxy.Refusal):
                    rule.check(value, bounds)


class MessageTest(unittest.TestCase):
    """What is parsed, and what the other methods say to the upstream."""

    def test_what_is_parsed(self) -> None:
        for body in (
            b'{"jsonrpc":"2.0","id":1,"method":"ping"}',
            b' \r\n{"jsonrpc":"2.0","id":"a","method":"ping","params":{}} \n',
            b'{"jsonrpc":"2.0","id":0,"method":"ping"}',
            b'{"jsonrpc":"2.0","id":-9007199254740991,"method":"ping"}',
            b'{"jsonrpc":"2.0","method":"notifications/initialized"}',
            b'{"jsonrpc":"2.0","id":"a b-1/2:3","method":"x","params":{"a":[1.5,null,true,"\\ud83d\\ude00"]}}',
        ):
            with self.subTest(body):
                self.assertEqual(proxy.parse_message(body), json.loads(body))
                self.assertEqual(proxy.parse_message(bytearray(body)), json.loads(body))

    def test_a_message_of_too_many_parts(self) -> None:
        def size(value: Any) -> None:
            proxy.parse_message(json.dumps(request("x", a=value)).encode())

        source = 'if (a["x"]) { return [1, 2, "\\", \'"\'] }\n' * 20_000
        size([{"path": str(n), "content": source if not n else "x"} for n in range(100)])
        many: list[Any] = [[{}] * 300_000, ["x" * 10**6, [[]] * 300_000]]
        for value in many:
            with self.subTest(str(value)[-20:]), self.assertRaises(proxy.ProtocolError) as caught:
                size(value)
            self.assertEqual(caught.exception.status, 413)

    def test_what_other_methods_send(self) -> None:
        note = {
            "jsonrpc": "2.0",
            "method": "notifications/cancelled",
            "params": {"requestId": 1, "reason": "x"},
        }
        for message in (
            {"jsonrpc": "2.0", "id": 1, "method": "ping"},
            {"jsonrpc": "2.0", "id": "a", "method": "tools/list"},
            request("tools/list", cursor="abc"),
            request("logging/setLevel", level="debug"),
            {"jsonrpc": "2.0", "method": "notifications/initialized"},
            note,
        ):  # fmt: skip
            self.assertEqual(proxy.decide(BOUNDS, message), Forward(message))
        for word, message in (
            ("a cursor", request("tools/list", cursor="a b")),
            ('"owner" is not passed', request("tools/list", owner="evil")),
            ("one of debug", request("logging/setLevel", level="all")),
            ("level is missing", request("logging/setLevel")),
            ("a protocol version", request("initialize", protocolVersion="1", capabilities={})),
            ("protocolVersion is missing", request("initialize")),
            ("a string or an integer", {**note, "params": {"requestId": {"a": 1}}}),
            ('"x" is not passed', {**note, "params": {"requestId": 1, "x": 1}}),
            ("does not pass the method", {**note, "id": 1}),
            ("a string or an integer", request("ping", _meta={"progressToken": [1]})),
            (
                "a protocol version",
                request("ping", _meta={f"{proxy.META}protocolVersion": "x\r\nX: z"}),
            ),
        ):
            with self.subTest(message):
                verdict = proxy.decide(BOUNDS, message)
                assert isinstance(verdict, Refuse)
                self.assertIn(word, verdict.reason)

    def test_where_a_refusal_is_told(self) -> None:
        refuse = Refuse("because", proxy.INVALID_PARAMS, "list_tags")
        status, told = proxy.told_of(call("list_tags"), refuse)
        self.assertEqual((status, told["id"], told["result"]["isError"]), (200, 1, True))
        status, told = proxy.told_of(request("x"), Refuse("because", proxy.NO_METHOD))
        self.assertEqual((status, told["error"]["code"]), (200, proxy.NO_METHOD))
        note = {"jsonrpc": "2.0", "method": "x"}
        status, told = proxy.told_of(note, Refuse("because", proxy.NO_METHOD))
        self.assertEqual((status, told["id"]), (400, None))

    def test_the_default_branch_is_what_is_given_and_what_is_learnt(self) -> None:
        policy = Policy(default_branch="main")
        for branch in ("main", "trunk", "Master"):
            bounds = proxy.Bounds(SCOPE, policy, defaults=frozenset(["trunk", "master"]))
            verdict = proxy.decide(bounds, call("create_branch", branch=branch))
            assert isinstance(verdict, Refuse), branch
            self.assertIn("other than the default one", verdict.reason)

    def test_what_a_write_made(self) -> None:
        def became(made: Any, **more: Any) -> Any:
            content = [{"type": "text", "text": json.dumps(made)}]
            return proxy.outcome({"id": 1, "result": {"content": content, **more}})

        url = "https://github.com/good/r/commit/abc"
        made: Any
        for made in ({"url": url}, {"html_url": url, "url": "https://api.github.com/x"},
                     {"content": None, "commit": {"html_url": url}}):  # fmt: skip
            self.assertEqual(became(made), ("done", "", url))
        for made in (1, [], None, "x", {}, {"url": 1}, {"url": "javascript:x"}, {"commit": 1},
                     {"url": url + "\n"}, {"url": url + "\x1b[2J"}, {"url": url + "x" * 300}):  # fmt: skip
            self.assertEqual(became(made), ("done", "", ""), made)
        failed = ("failed", "GitHub's server answered with an error, perhaps half-way", "")
        self.assertEqual(became({"url": url}, isError=True), failed)
        self.assertEqual(proxy.outcome({"id": 1, "error": {"code": 1}}), failed)
        self.assertEqual(proxy.outcome({"id": 1, "result": {}}), ("done", "", ""))

    def test_a_name_that_becomes_another_repository(self) -> None:
        for message in (call("list_tags"), call("search_issues", query="x")):
            verdict = proxy.decide(BOUNDS._replace(moved="it is elsewhere"), message)
            assert isinstance(verdict, Refuse)
            self.assertEqual(verdict.reason, "it is elsewhere")

    def test_instructions_say_what_is_refused(self) -> None:
        self.assertIn("main cannot be written", proxy.instructions(BOUNDS))
        self.assertIn(
            "read-only", proxy.instructions(BOUNDS._replace(policy=POLICY._replace(readonly=True)))
        )
        self.assertIn(
            "agent/*",
            proxy.instructions(BOUNDS._replace(policy=POLICY._replace(branches=("agent/*",)))),
        )
        told = proxy.instructions(BOUNDS._replace(policy=EVERYTHING))
        self.assertNotIn("cannot be merged", told)
        self.assertNotIn("main cannot", told)


class MirrorTest(unittest.TestCase):
    def message(self, **arguments: Any) -> dict[str, Any]:
        made = call("get_file_contents", **arguments)
        made["params"]["_meta"] = {"io.modelcontextprotocol/protocolVersion": MODERN}
        return made

    def headers(self, **more: str) -> dict[str, str]:
        return {"mcp-protocol-version": MODERN, "mcp-method": "tools/call", "mcp-name": "get_file_contents",
                **{f"mcp-param-{key}": value for key, value in more.items()}}  # fmt: skip

    def test_headers_that_agree(self) -> None:
        for headers, message in (
            (self.headers(owner="GOOD"), self.message(owner="GOOD")),
            (self.headers(), self.message(owner="good")),
        ):
            self.assertEqual(proxy.version_headers_of(headers, message), {})

    def test_headers_that_differ(self) -> None:
        for headers, message in (
            (self.headers(owner="good"), self.message(owner="evil")),
            (self.headers(owner="good"), self.message()),
            ({**self.headers(), "mcp-name": "get_me"}, self.message()),
            ({**self.headers(), "mcp-method": "tools/list"}, self.message()),
            ({**self.headers(), "mcp-protocol-version": "2025-11-25"}, self.message()),
            ({}, self.message()),
            (self.headers(owner="=?base64?!!?="), self.message(owner="good")),
        ):
            with self.subTest(headers), self.assertRaises(proxy.ProtocolError) as caught:
                proxy.version_headers_of(headers, message)
            self.assertEqual(caught.exception.code, -32020)

    def test_headers_are_made_from_what_is_sent(self) -> None:
        verdict = proxy.decide(BOUNDS, self.message(owner="GOOD"))
        assert isinstance(verdict, Forward)
        self.assertEqual(
            proxy.mirrored_headers(verdict.message),
            {"mcp-protocol-version": MODERN, "mcp-method": "tools/call",
             "mcp-name": "get_file_contents", "mcp-param-owner": "good", "mcp-param-repo": "r"},
        )  # fmt: skip


class PolicyTest(unittest.TestCase):
    def read(self, text: str) -> Policy:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "policy.ini")
            path.write_text(text)
            return proxy.read_policy(str(path))

    def test_a_file(self) -> None:
        text = "[policy]\nbranches = agent/*, fix/**\nallow = merge people\nreadonly = no\nwrites_per_hour = 5\nlockdown = off\n"
        policy = self.read(text)
        self.assertEqual(policy.branches, ("agent/*", "fix/**"))
        self.assertEqual(policy.allow, {"merge", "people"})
        self.assertEqual((policy.lockdown, Policy().lockdown), (False, True))
        self.assertEqual((policy.writes_per_hour, policy.deny_paths), (5, Policy().deny_paths))

    def test_what_is_wrong_is_said(self) -> None:
        for word, text in (
            ("no section", ""),
            ("not an INI file", "x"),
            ("no section", "[other]\n"),
            ("not a value", "[policy]\nallow = all\n"),
            ("not a policy setting", "[policy]\nbranch = x\n"),
            ("not a value", "[policy]\nreadonly = maybe\n"),
            ("not a value", "[policy]\ndeny_paths = docs/**, **.pem\n"),
            ("not a value", "[policy]\nbranches = agent**\n"),
            ("not a value", "[policy]\ndefault_branch = refs/heads/main\n"),
            ("not a value", "[policy]\nwrites_per_hour = many\n"),
        ):
            with self.subTest(text), self.assertRaisesRegex(proxy.ProxyError, word):
                self.read(text)

    def test_a_denied_folder_is_not_replaced_either(self) -> None:
        for glob, paths in (
            ("config/*/secrets/**", ("config", "config/prod", "config/prod/secrets")),
            ("**/secrets/**", ("secrets", "a/secrets", "a/b/Secrets/")),
            ("keys/*.pem", ("keys", "keys/a.pem")),
        ):
            policy = POLICY._replace(deny_paths=(glob,))
            for path in paths:
                with self.subTest(glob, path=path):
                    message = call("delete_file", branch="b", path=path, message="m")
                    self.assertIsInstance(
                        proxy.decide(proxy.Bounds(SCOPE, policy), message), Refuse
                    )
        policy = POLICY._replace(deny_paths=("config/*/secrets/**", "keys/*.pem"))
        for path in ("config/prod/public", "keys/a.txt", "key", "confi", "src/keys"):
            sent(call("delete_file", branch="b", path=path, message="m"), policy)

    def test_a_denied_file_does_not_become_a_folder(self) -> None:
        for path in ("CODEOWNERS/x", ".gitmodules/a/b", "docs/codeowners/x", "a/.git/config",
                     "a/.GIT. /hooks/x", "vendor/GIT~1/config"):  # fmt: skip
            with self.subTest(path):
                message = call("delete_file", branch="b", path=path, message="m")
                self.assertIsInstance(proxy.decide(BOUNDS, message), Refuse)
        for path in ("a/CODEOWNERS/x", "CODEOWNERS.md", ".gitignore", "a/.github/x"):
            sent(call("delete_file", branch="b", path=path, message="m"))

    def test_nobody_is_assigned_or_taken_off_unless_people_is_allowed(self) -> None:
        values: list[Any] = [[], None]
        for value in values:
            message = call("issue_write", method="update", issue_number=1, assignees=value)
            self.assertNotIn("assignees", sent(message))
        message = call("issue_write", method="update", issue_number=1, assignees=[])
        self.assertEqual(sent(message, EVERYTHING)["assignees"], [])

    def test_globs(self) -> None:
        for glob, name, expected in (
            ("**", "a/b", True), ("*", "a", True), ("*", "a/b", False), ("a/**", "a/b/c", True),
            ("a/**", "a", False), ("**/x", "x", True), ("**/x", "a/b/x", True), ("a?", "ab", True),
            ("a.b", "axb", False), ("A/*", "a/b", True), ("a[b]/*", "a[b]/c", True), ("[ab]", "a", False),
            ("a/**/b", "a/b", True), ("a/**/b", "a/x/y/b", True), ("a/**/b", "a/b/c", False),
        ):  # fmt: skip
            self.assertIs(proxy.glob_match(glob, name), expected, (glob, name))


if __name__ == "__main__":
    unittest.main()
