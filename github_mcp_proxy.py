#!/usr/bin/env python3
"""Give a VM one GitHub repository through GitHub's MCP server, and keep the token outside.

The proxy listens on the host, checks every message against closed tables (tools, parameters,
values), adds the token and passes on what it has rebuilt; nothing that the VM sends is copied.

    GITHUB_MCP_TOKEN=… GITHUB_MCP_OWNER=o GITHUB_MCP_REPO=r github_mcp_proxy.py
    … github_mcp_proxy.py --print-secret --policy policy.ini --audit audit.jsonl
    … github_mcp_proxy.py --check-upstream

The first line on stdout is the port; the endpoint is http://127.0.0.1:PORT/mcp. It talks to the
upstream and to whoever reaches its one listening socket, writes the audit file if one is given,
and starts one program only: the token command, if one is given.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import hashlib
import hmac
import json
import os
import re
import select
import signal
import sys
import time
import unicodedata
from collections.abc import Callable
from collections.abc import Container
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
from typing import Union

__version__ = "0.1.0"

# The server whose tools the table below was made from; `--check-upstream` says what has changed.
TABLE_MADE_FROM = "github-mcp-server v1.10.1"
# Before v0.32 the server matched JSON keys case-insensitively (CVE-2026-27896).
OLDEST_SERVER = (0, 32)

DEFAULT_UPSTREAM = "https://api.githubcopilot.com/mcp/"
DEFAULT_TOOLSETS = "repos,issues,pull_requests,git,labels"

MAX_HEAD = 32 * 1024
MAX_REQUEST = 5 * 1024 * 1024  # the server's own limit
MAX_ANSWER = 64 * 1024 * 1024
MAX_DEPTH = 32
MAX_STRUCTURE = 128 * 1024  # bytes of a large request outside its strings: they grow 20 times
MAX_STRINGS = 20_000
MAX_HELD = 96 * 1024 * 1024  # bytes held of all clients' requests and answers
MAX_TOKEN = 4096
MAX_PACK = 4 * 1024**3  # GitHub refuses more than 2 GiB
MAX_REFUSALS = 100  # in a minute that are recorded one by one
MAX_COMMANDS = 256 * 1024  # bytes of what a push says before its pack
MAX_CLIENTS = 1024
MAX_SESSIONS = 1024
HIGH_WATER = 1024 * 1024  # bytes held of one connection, and what an answer is held whole up to
PAUSE_AT = 128 * 1024  # bytes of a stream that wait before its sender is paused

REQUEST_SECONDS = 15  # to send one request, head and body
KNOWN_SECONDS = 60  # for so long the default branch is believed to be what it was
IDLE_SECONDS = 300  # a connection without a request
STALL_SECONDS = 120  # a client that does not read its answer
CONNECT_SECONDS = 15
TOKEN_MARGIN = 300  # a token is renewed that many seconds before it expires

# JSON-RPC error codes: the standard's, MCP's for mirrored headers, and one of ours.
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS = -32700, -32600, -32601, -32602
HEADER_MISMATCH = -32020
UPSTREAM_FAILED = -32050
SESSION_GONE = -32001

Json = Any
Object = dict[str, Any]
Bytes = Union[bytes, bytearray]


class ProxyError(Exception):
    """A configuration or start-up failure; `main` prints it and exits 2 (usage) or 1."""

    def __init__(self, message: str, hint: str = "", status: int = 2) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


class ProtocolError(Exception):
    """The bytes of a peer are not what HTTP, JSON or JSON-RPC allow."""

    def __init__(self, reason: str, status: int = 400, code: int = INVALID_REQUEST) -> None:
        super().__init__(reason)
        self.status = status
        self.code = code


class Refusal(Exception):
    """Raised by a rule, caught by `decide`: why a value may not pass."""


class UpstreamError(Exception):
    """The upstream gave no usable answer; the text is for the VM, so it holds no secret."""


class AnswerLost(UpstreamError):
    """What was sent may have been carried out."""


# --- nouns ---


class Scope(NamedTuple):
    """The one repository, spelled as configured: that is what the upstream gets."""

    owner: str
    repo: str

    def __str__(self) -> str:
        return f"{self.owner}/{self.repo}"

    def is_named(self, full_name: str) -> bool:
        return full_name.lower() == str(self).lower()


class Policy(NamedTuple):
    """What may be written, and what is opted in to. Keys of the INI file's [policy] section."""

    readonly: bool = False
    branches: tuple[str, ...] = ("**",)
    default_branch: str = ""  # learnt from the upstream when it is needed and not given
    deny_paths: tuple[str, ...] = (
        ".github/workflows/**",
        ".github/actions/**",
        "CODEOWNERS",
        ".github/CODEOWNERS",
        "docs/CODEOWNERS",
        ".gitmodules",
    )
    allow: frozenset[str] = frozenset()
    writes_per_hour: int = 300

    def has(self, word: str) -> bool:
        return not word or word in self.allow


class Bounds(NamedTuple):
    """What a rule may ask about."""

    scope: Scope
    policy: Policy
    defaults: frozenset[str] = frozenset()  # the default branch as the upstream tells it


# The words of `allow`, and what each one opens.
ALLOW = {
    "merge": "merge_pull_request, update_pull_request_branch: they write to branches unnamed here",
    "approve": "approving pull requests",
    "people": "assignees and reviewers (they are notified), the list of collaborators",
    "default-branch": "writing to the default branch",
    "actions": "workflow runs and job logs, reading (logs may hold secrets)",
    "alerts": "code scanning, code quality and Dependabot alerts, reading",
    "advisories": "security advisories of the repository, drafts too, reading",
    "discussions": "discussions, reading",
    "dependencies": "issue dependencies, reading",
}


class Forward(NamedTuple):
    """The message to send: built here, with nothing in it that no table names."""

    message: Object
    tool: str = ""
    write: bool = False
    check: str = ""  # how the answer is checked: Tool.answer
    target: Object | None = None  # what it is about, once it is without arguments


class Refuse(NamedTuple):
    """Why a message does not pass, and how its sender is told."""

    reason: str
    code: int = INVALID_PARAMS
    tool: str = ""  # a refused tool call is answered by a result that the model reads


Verdict = Union[Forward, Refuse]


class Seen(NamedTuple):
    """What `decide` must know of the past."""

    writes: int = 0  # in the last hour
    defaults: frozenset[str] = frozenset()  # the default branch as the upstream tells it
    asked: Container[Json] = ()  # ids of the upstream's requests that this session has to answer


NOTHING_SEEN = Seen()


# --- pure core: JSON, strictly ---


def no_duplicates(pairs: list[tuple[str, Json]]) -> Object:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ProtocolError("a JSON object has the same key twice", code=PARSE_ERROR)
    return result


def refuse_constant(name: str) -> Json:
    raise ProtocolError(f"{name} is not JSON", code=PARSE_ERROR)


def small_int(digits: str) -> int:
    if len(digits) > 17:  # beyond 2**53 other parsers see another number
        raise ProtocolError("a JSON number has too many digits", code=PARSE_ERROR)
    return int(digits)


def finite_float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ProtocolError("a JSON number is too large", code=PARSE_ERROR)
    return number


STRICT = json.JSONDecoder(
    object_pairs_hook=no_duplicates,
    parse_constant=refuse_constant,
    parse_int=small_int,
    parse_float=finite_float,
)


def check_tree(value: Json, depth: int = 0) -> None:
    """Refuse what is nested too deep and strings that are not Unicode (lone surrogates)."""
    if isinstance(value, str):
        if not value.isascii() and SURROGATE.search(value):
            raise ProtocolError("a JSON string has a lone surrogate", code=PARSE_ERROR)
    elif isinstance(value, (dict, list)):
        if depth >= MAX_DEPTH:
            raise ProtocolError(f"JSON nested deeper than {MAX_DEPTH}", code=PARSE_ERROR)
        for item in value:
            check_tree(item, depth + 1)
        for item in value.values() if isinstance(value, dict) else ():
            check_tree(item, depth + 1)


SURROGATE = re.compile("[\ud800-\udfff]")


def check_structure(body: Bytes) -> None:
    """Refuse a large body that is not mostly text: as a tree it would be many times as large."""
    if len(body) <= MAX_STRUCTURE:
        return
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = plain.count(b'"') // 2
    if strings > MAX_STRINGS or sum(map(len, plain.split(b'"')[::2])) > MAX_STRUCTURE:
        raise ProtocolError("a large request may be large in its texts only", 413)


def parse_json(body: Bytes) -> Json:
    """The value of `body`, or ProtocolError. Stricter than json.loads, which guesses encodings."""
    check_structure(body)
    try:
        value = STRICT.decode(body.decode("utf-8"))
        if b"\\u" in body or body.count(b"{") + body.count(b"[") > MAX_DEPTH:
            check_tree(value)
    except UnicodeDecodeError as error:
        raise ProtocolError("the body is not UTF-8", code=PARSE_ERROR) from error
    except RecursionError as error:
        raise ProtocolError("JSON nested too deep", code=PARSE_ERROR) from error
    except ValueError as error:
        raise ProtocolError("the body is not one JSON value", code=PARSE_ERROR) from error
    return value


def is_id(value: Json) -> bool:
    """A number, or a string that every JSON writer spells alike."""
    if isinstance(value, str):
        return bool(ID_STRING(value))
    return isinstance(value, int) and not isinstance(value, bool)


ID_STRING = re.compile(r"""[ !#-%'-;=?-\[\]-~]{0,256}""").fullmatch


ENVELOPES: tuple[tuple[set[str], set[str]], ...] = (
    ({"jsonrpc", "method"}, {"id", "params"}),
    ({"jsonrpc", "id", "result"}, set()),
    ({"jsonrpc", "id", "error"}, set()),
)


def parse_message(body: Bytes) -> Object:
    """One JSON-RPC 2.0 message with exactly the keys of a request, notification or answer."""
    message = parse_json(body)
    if isinstance(message, list):
        raise ProtocolError("batches are not supported: send one message a request")
    if not isinstance(message, dict):
        raise ProtocolError("the body is not a JSON-RPC message")
    keys = set(message)
    if not any(need <= keys <= need | may for need, may in ENVELOPES):
        raise ProtocolError(f"not a JSON-RPC message: keys {quoted(sorted(keys))}")
    if message["jsonrpc"] != "2.0":
        raise ProtocolError('jsonrpc must be "2.0"')
    if "id" in message and not is_id(message["id"]):
        raise ProtocolError("id must be an integer or a string of plain ASCII")
    if not isinstance(message.get("method", ""), str):
        raise ProtocolError("method must be a string")
    if message.get("params", {}) is None:
        del message["params"]
    if not isinstance(message.get("params", {}), dict):
        raise ProtocolError("params must be an object", code=INVALID_PARAMS)
    return message


ENCODER = json.JSONEncoder(separators=(",", ":"))


def dumps(value: Json) -> bytes:
    return ENCODER.encode(value).encode("ascii")


def quoted(value: Json) -> str:
    """A value for an error text: JSON, printable, short, and without anything token-like."""
    text = json.dumps(value)[:1000]  # a token that begins in what is shown is whole enough
    text = redact(text.encode("ascii")).decode("ascii")
    return text if len(text) <= 80 else text[:77] + "…"


# --- pure core: rules for single values ---


class Rule(NamedTuple):
    """What one parameter may be. `check` returns the value to send or raises Refusal."""

    what: str
    check: Callable[[Json, Bounds], Json]
    required: bool = False
    needs: str = ""  # a word of Policy.allow
    choices: tuple[str, ...] = ()
    choice_needs: tuple[tuple[str, str], ...] = ()  # (choice, word of Policy.allow)
    branch: bool = False  # a branch that is written: the default branch must be known
    constant: tuple[Json, ...] = ()  # the one value, sent even when the parameter is left out


def must(rule: Rule) -> Rule:
    return rule._replace(required=True)


def needs(word: str, rule: Rule) -> Rule:
    return rule._replace(needs=word)


def refuse_unless(condition: object, reason: str) -> None:
    if not condition:
        raise Refusal(reason)


def text(limit: int) -> Rule:
    """Free text: anything but NUL, up to `limit` characters."""
    what = f"text of up to {limit} characters without NUL"

    def check(value: Json, _bounds: Bounds) -> Json:
        refuse_unless(isinstance(value, str) and len(value) <= limit and "\0" not in value, what)
        return value

    return Rule(what, check)


def pattern(what: str, regex: str) -> Rule:
    compiled = re.compile(regex)

    def check(value: Json, _bounds: Bounds) -> Json:
        refuse_unless(isinstance(value, str) and compiled.fullmatch(value), what)
        return value

    return Rule(what, check)


DIGITS = re.compile("[0-9]{1,16}", re.ASCII).fullmatch


def integer(low: int, high: int) -> Rule:
    what = f"an integer from {low} to {high}"

    def check(value: Json, _bounds: Bounds) -> Json:
        if type(value) is float and value.is_integer():
            value = int(value)  # models send 5.0, and "5"; what is sent on is the integer
        elif isinstance(value, str) and DIGITS(value):
            value = int(value)
        refuse_unless(type(value) is int and low <= value <= high, what)
        return value

    return Rule(what, check)


def choice(*choices: str, **choice_needs: str) -> Rule:
    """One of `choices`, spelled exactly so; NAME="word" needs that word in Policy.allow."""
    what = "one of " + ", ".join(choices)

    def check(value: Json, bounds: Bounds) -> Json:
        refuse_unless(isinstance(value, str) and value in choices, what)
        word = choice_needs.get(value)
        refuse_unless(
            not word or word in bounds.policy.allow, f"needs `allow = {word}` in the policy"
        )
        return value

    return Rule(what, check, choices=choices, choice_needs=tuple(choice_needs.items()))


def only(constant: Json) -> Rule:
    """A parameter that has one value, and is sent even when it is left out."""
    what = f"only {json.dumps(constant)}"

    def check(value: Json, _bounds: Bounds) -> Json:
        if isinstance(constant, bool):
            value = as_flag(value)
        refuse_unless(value is constant, what)
        return value

    return Rule(what, check, constant=(constant,))


def list_of(rule: Rule, limit: int = 100) -> Rule:
    what = f"a list of up to {limit}, each {rule.what}"

    def check(value: Json, bounds: Bounds) -> Json:
        refuse_unless(isinstance(value, list) and len(value) <= limit, what)
        return [rule.check(item, bounds) for item in value]

    return Rule(what, check, choices=rule.choices)


def is_left_out(rule: Rule, value: Json, bounds: Bounds) -> bool:
    """Whether nothing is meant by an optional value: models send null, "" and [] so.

    Where that is a value of its own (labels: [] takes all labels off) the rule takes it.
    """
    if rule.required or value not in (None, "", []):
        return False
    if not bounds.policy.has(rule.needs):
        return True
    try:
        rule.check(value, bounds)
    except Refusal:
        return True
    return False


def record(**rules: Rule) -> Rule:
    """An object with these keys and no other."""
    what = "an object with " + ", ".join(rules)

    def check(value: Json, bounds: Bounds) -> Json:
        refuse_unless(isinstance(value, dict) and value.keys() <= rules.keys(), what)
        refuse_unless(all(key in value for key, rule in rules.items() if rule.required), what)
        return {
            key: rules[key].check(item, bounds)
            for key, item in value.items()
            if not is_left_out(rules[key], item, bounds)
        }

    return Rule(what, check)


def any_of(*rules: Rule) -> Rule:
    what = " or ".join(rule.what for rule in rules)

    def check(value: Json, bounds: Bounds) -> Json:
        for rule in rules:
            try:
                return rule.check(value, bounds)
            except Refusal:
                pass
        raise Refusal(what)

    return Rule(what, check)


def as_flag(value: Json) -> Json:
    """Models send flags as text, too."""
    return value == "true" if value in ("true", "false") else value


def check_flag(value: Json, _bounds: Bounds) -> Json:
    value = as_flag(value)
    refuse_unless(isinstance(value, bool), "true or false")
    return value


def is_plain(value: Json, limit: int) -> bool:
    """A short string without control and format characters, on one line."""
    return (
        isinstance(value, str)
        and len(value) <= limit
        and (
            (value.isascii() and value.isprintable())
            or not UNSEEN & set(map(unicodedata.category, value))
        )
    )


# Controls, formats (zero width, direction), surrogates, private, unassigned, line ends.
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

PLAIN = "a line of text without control characters"


def check_plain(value: Json, _bounds: Bounds) -> Json:
    refuse_unless(is_plain(value, 256), PLAIN)
    return value


# What git check-ref-format forbids, and what would be more than a path segment in a URL:
# the server puts refs into paths, where `..`, `%2e` and `?` reached other endpoints.
REF_FORBIDDEN = re.compile(r"""[\x00-\x20\x7f~^:?*\[\\%#"'`;&$<>|{}()]|\.\.|@\{|//|\.lock(/|$)""")
REF = "a branch, tag or commit, spelled as git allows and without characters special in a URL"


def check_ref(value: Json, _bounds: Bounds) -> Json:
    refuse_unless(is_plain(value, 255), REF)
    refuse_unless(value not in ("", "@") and not REF_FORBIDDEN.search(value), REF)
    parts = value.split("/")
    refuse_unless(not any(p == "" or p[0] in ".-" or p[-1] == "." for p in parts), REF)
    return value


def check_head(value: Json, bounds: Bounds) -> Json:
    """A pull request's head: `user:branch` would bring a fork in."""
    refuse_unless(":" not in str(value), "a branch of this repository (no `user:branch`)")
    return check_ref(value, bounds)


def check_head_filter(value: Json, bounds: Bounds) -> Json:
    """list_pull_requests' head: it filters, so `user:branch` may be asked for."""
    check_ref(str(value).partition(":")[2] or value, bounds)
    refuse_unless(re.fullmatch(r"([A-Za-z0-9_-]{1,39}:)?[^:]+", value), "branch or user:branch")
    return value


def check_fraction(value: Json, _bounds: Bounds) -> Json:
    refuse_unless(type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1")
    return value


def fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def check_branch(value: Json, bounds: Bounds) -> Json:
    """A branch that may be written: not the default one, and within the policy's globs."""
    check_ref(value, bounds)
    policy = bounds.policy
    name = fold(value)
    # GitHub takes "refs/heads/main" for "main" in places.
    special = name in ("head", "refs", "heads") or name.startswith(("refs/", "heads/", "remotes/"))
    refuse_unless(not special, "a branch's plain name")
    if "default-branch" not in policy.allow:
        # What the policy names is protected besides: it may be wrong, or of another day.
        defaults = bounds.defaults | {policy.default_branch} - {""}
        refuse_unless(
            defaults,
            "known not to be the default branch, and the upstream did not tell which that is: "
            "the host's user can set default_branch in the policy file",
        )
        refuse_unless(
            name not in {fold(default) for default in defaults},
            "a branch other than the default one: write to a branch and open a pull request",
        )
    globs = ", ".join(policy.branches)
    refuse_unless(any(glob_match(g, name) for g in policy.branches), f"a branch matching {globs}")
    return value


FILE = "a path inside the repository, without . and .. segments, controls, \\ ? # %"


def check_file(value: Json, _bounds: Bounds) -> Json:
    """A path; slashes around it are taken off, so "/" is the root."""
    refuse_unless(is_plain(value, 4096), FILE)
    path: str = value.strip("/")
    refuse_unless(not FILE_FORBIDDEN.search(path), FILE)
    refuse_unless(all(part not in ("", ".", "..") for part in path.split("/") if path), FILE)
    return path


FILE_FORBIDDEN = re.compile(r"[\\?#%]|\.\.;")


def check_written_file(value: Json, bounds: Bounds) -> Json:
    path: str = check_file(value, bounds)
    refuse_unless(path, "a file's path")
    folded = "/".join(part.rstrip(". ") for part in fold(path).split("/"))
    for glob in bounds.policy.deny_paths:
        parts = glob.split("/")
        # A file in place of a folder above, or a folder in place of the file, removes what is
        # denied.
        above = ("/".join(parts[:n]) for n in range(1, len(parts)) if parts[n - 1] != "**")
        denied = any(glob_match(g, folded) for g in (glob, glob + "/**", *above))
        refuse_unless(not denied, f"a path outside {glob} (deny_paths)")
    refuse_unless(not {".git", "git~1"} & set(folded.split("/")), "a path outside .git")
    return path


def glob_match(glob: str, name: str) -> bool:
    """`*` and `?` stay within a segment, `**` spans any number; case does not count.

    No regular expression: `*a*a*a*` would take time without bound. Here each part of the glob
    makes, of the places in the name that the parts before it reach, those that it reaches.
    """
    reached = {0}
    for part in GLOB_PARTS.split(fold(glob)):
        if part == "**":
            reached = set(range(min(reached), len(name) + 1))
        elif part == "**/":
            first = min(reached)
            reached |= {at + 1 for at in range(first, len(name)) if name[at] == "/"}
        elif part == "*":
            for at in range(min(reached), len(name)):
                if at in reached and name[at] != "/":
                    reached.add(at + 1)
        elif part == "?":
            reached = {at + 1 for at in reached if name[at : at + 1] not in ("", "/")}
        else:
            reached = {at + len(part) for at in reached if name.startswith(part, at)}
        if not reached:
            return False
    return len(name) in reached


GLOB_PARTS = re.compile(r"(\*\*/?|\*|\?)")


NUMBER = integer(1, 2**31 - 1)
ID = integer(1, 2**53)
PAGE = integer(1, 100_000)
PER_PAGE = integer(1, 100)
FLAG = Rule("true or false", check_flag)
FRACTION = Rule("a number from 0 to 1", check_fraction)
LINE = Rule(PLAIN, check_plain)  # titles, labels, names
BODY = text(65_536)  # GitHub's limit
CONTENT = text(MAX_REQUEST)
CURSOR = pattern("a cursor", r"[A-Za-z0-9+/=_:.-]{0,512}")
DATE = pattern(
    "an ISO 8601 date", r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9:.]{4,15}(Z|[+-][0-9:]{4,6})?)?"
)
WHO = pattern("a user name or an e-mail address", r"[A-Za-z0-9._+@\[\]-]{1,100}")
SHA = pattern("a commit or object id, 7 to 64 hex digits", r"[0-9a-fA-F]{7,64}")
SEGMENT = pattern("a name or a number", r"(?!\.+$)[A-Za-z0-9._-]{1,100}")
COLOR = pattern("six hex digits", r"#?[0-9a-fA-F]{6}")
COMMITISH = Rule(REF, check_ref)
HEAD = Rule(REF, check_head)
HEAD_FILTER = Rule("branch or user:branch", check_head_filter)
BRANCH = Rule("a branch that may be written", check_branch, branch=True)
PATH = Rule(FILE, check_file)
WRITTEN_PATH = Rule(FILE, check_written_file)
ORDER = choice("asc", "desc")
ORDER_CAPS = choice("ASC", "DESC")
SIDE = choice("LEFT", "RIGHT")
STATE = choice("open", "closed")
REACTION = choice("+1", "-1", "laugh", "confused", "heart", "hooray", "rocket", "eyes")
CONFIDENCE = choice("LOW", "MEDIUM", "HIGH")
EVENT = choice("COMMENT", "REQUEST_CHANGES", "APPROVE", APPROVE="approve")
PEOPLE = needs("people", list_of(WHO))
FIELDS = list_of(pattern("a field's name", r"[a-z_]{1,40}"))
NO_TEAM = needs(
    "people", list_of(pattern("a user's name (no ORG/team)", r"[A-Za-z0-9_\[\]-]{1,100}"))
)


# --- pure core: search queries ---

# Which qualifiers a query may have. What names a scope (org:, user:, enterprise:, …), or could tell
# of other repositories (project:, team:, is:private, …), is absent.
ISSUE_QUALIFIERS = frozenset(
    (
        "is type state reason label author assignee mentions commenter involves in linked "
        "milestone created updated closed merged comments interactions reactions draft review "
        "reviewed-by review-requested head base status no sort archived sha"
    ).split()
)
CODE_QUALIFIERS = frozenset("language path filename extension in size symbol content".split())
COMMIT_QUALIFIERS = frozenset(
    (
        "author committer author-name author-email committer-name committer-email author-date "
        "committer-date merge hash parent tree sort"
    ).split()
)
SCOPES = "repo|repository|org|organization|user|owner|enterprise|saved|team|project"
SCOPE_IN_TEXT = re.compile(rf"(?:{SCOPES})\s*:")
QUERY_FORBIDDEN = re.compile(r"[()\\|;{}\[\]`^]")
QUERY_TOKEN = re.compile(r'(?:([A-Za-z][A-Za-z-]*):)?("[^"]*"|[^\s"]+)(?= |$)')
QUERY_DATE = re.compile(r"[<>=.*\d:TZ+-]+")
WIDENING = re.compile(r"(?<!\w)(?<!\w-)(?:or|and|not)(?!\w|-\w)")  # but not do-not-merge
IS_VALUES = frozenset("open closed issue pr merged unmerged draft queued locked unlocked".split())


def narrow_query(scope: Scope, query: Json, qualifiers: Container[str]) -> str:
    """The query confined to the repository, or Refusal.

    `OR`, parentheses, negation and a second scope all lead out of `repo:O/R`; github.com takes
    quotes off before it parses, so quoted text is held to the same rules. The hits are checked as
    well: this layer stops queries from being oracles, that one holds if the grammar changes.
    """
    what = "a search text of up to 256 visible characters"
    refuse_unless(is_plain(query, 256), what)
    refuse_unless(all(c == " " or not c.isspace() for c in query), what)
    kept = query_tokens(scope, query, qualifiers)
    normal = unicodedata.normalize("NFKC", query)
    if normal != query:
        refuse_unless(is_plain(normal, 1024), what)
        query_tokens(scope, normal, qualifiers)
    return " ".join([f"repo:{scope}", *kept])


def query_tokens(scope: Scope, query: str, qualifiers: Container[str]) -> list[str]:
    found = QUERY_FORBIDDEN.search(query)
    refuse_unless(not found, f"without {found and found[0]}")
    kept = []
    for name, value, whole in iter_tokens(query):
        if name == "repo":
            refuse_unless(scope.is_named(value), f"only repo:{scope}, which is added anyway")
            continue
        if (name, value.lower()) != ("reason", '"not planned"'):
            check_query_text(value.strip('"').casefold())
        if name:
            refuse_unless(name in qualifiers, f"without the qualifier {name}:")
            quoted_value = value.startswith('"')
            dated = QUERY_DATE.fullmatch(value)
            refuse_unless(quoted_value or ":" not in value or dated, f"without : in {name}:")
            refuse_unless(name != "is" or value.lower() in IS_VALUES, "is: with a state only")
        elif ":" in value and not value.startswith('"'):
            raise Refusal(f"with {quoted(value)} in quotes, or without the colon")
        kept.append(whole)
    return kept


def iter_tokens(query: str) -> Iterator[tuple[str, str, str]]:
    """(qualifier in lower case or "", value, the token as written) of each word of a query."""
    position = 0
    while position < len(query):
        if query[position] == " ":
            position += 1
            continue
        match = QUERY_TOKEN.match(query, position)
        if not match:
            raise Refusal('with quotes only around a whole word or phrase, or after "name:"')
        position = match.end()
        yield (match[1] or "").lower(), match[2], match[0]


def check_query_text(folded: str) -> None:
    """What a word or a phrase may say: github.com sees a phrase's words without the quotes."""
    starts = {word[0] for word in folded.split()} or {":"}
    refuse_unless(not starts & set("/,:;&+-"), "of words that do not begin with / , : ; & + -")
    refuse_unless(not WIDENING.search(folded), "without the words and, or, not")
    refuse_unless(not SCOPE_IN_TEXT.search(folded), "without the name of a scope and a colon")


def search(qualifiers: frozenset[str]) -> Rule:
    def check(value: Json, bounds: Bounds) -> Json:
        return narrow_query(bounds.scope, value, qualifiers)

    return must(Rule("a search text", check))


# --- pure core: the tools ---


class Tool(NamedTuple):
    """A row of the table. `owner` and `repo` are added where the tool has them."""

    rules: Mapping[str, Rule]
    write: bool = False
    needs: str = ""  # a word of Policy.allow
    scoped: bool = True  # has owner and repo; else the query is the only scope
    answer: str = ""  # "hits": what is not known to be ours is dropped; "items": what is not ours
    answer_of: str = ""  # the one method whose answer is checked; else all


Rules = Mapping[str, Rule]


def read(
    *groups: Rules, needs: str = "", answer: str = "", answer_of: str = "", scoped: bool = True,
    **rules: Rule,
) -> Tool:  # fmt: skip
    return Tool(merged(*groups, rules), False, needs, scoped, answer, answer_of)


def write(*groups: Rules, needs: str = "", **rules: Rule) -> Tool:
    return Tool(merged(*groups, rules), True, needs)


def merged(*groups: Rules) -> dict[str, Rule]:
    return {name: rule for group in groups for name, rule in group.items()}


PAGES = {"page": PAGE, "perPage": PER_PAGE}
CURSORS = {"after": CURSOR, "perPage": PER_PAGE}
ISSUE = {"issue_number": must(NUMBER)}
PULL = {"pullNumber": must(NUMBER)}
SORTED_HITS = {"order": ORDER, **PAGES}
ISSUE_HITS = {
    "fields": FIELDS,
    "query": search(ISSUE_QUALIFIERS),
    "sort": choice(
        "comments", "reactions", "reactions-+1", "reactions--1", "reactions-smile",
        "reactions-thinking_face", "reactions-heart", "reactions-tada", "interactions",
        "created", "updated",
    ),
    **SORTED_HITS,
}  # fmt: skip
INTENT = {"confidence": CONFIDENCE, "is_suggestion": FLAG, "rationale": BODY}
ISSUE_TYPE = any_of(LINE, only(None))
STATE_REASON = choice("completed", "not_planned", "duplicate")
REVIEW_COMMENT = {
    "body": must(BODY),
    "path": must(PATH),
    "line": NUMBER,
    "side": SIDE,
    "startLine": NUMBER,
    "startSide": SIDE,
    "subjectType": choice("FILE", "LINE"),
}
FIELD_VALUE = record(
    field_name=must(LINE),
    field_option_name=LINE,
    value=any_of(LINE, integer(-(2**53), 2**53), FLAG),
    delete=FLAG,
)

# What is not in this table does not pass: no other tool, parameter, spelling or value. Left out on
# purpose: what is not bound to one repository (get_me, search_repositories, create_repository,
# fork_repository, gists, projects, notifications, stars, teams, users, global advisories), what
# takes ids that are valid everywhere (review threads, sub-issues, discussion comments), what runs
# code or spends money (actions_run_trigger, Copilot), and secret scanning, which returns secrets.
# fmt: off
TOOLS: dict[str, Tool] = {
    # repos
    "get_file_contents": read(path=PATH, ref=COMMITISH, sha=SHA, fields=FIELDS),
    "get_file_blame": read(
        CURSORS, path=must(PATH), ref=COMMITISH, start_line=NUMBER, end_line=NUMBER,
    ),
    "list_commits": read(
        PAGES, author=WHO, path=PATH, sha=COMMITISH, since=DATE, until=DATE, fields=FIELDS,
    ),
    "get_commit": read(PAGES, sha=must(COMMITISH), detail=choice("none", "stats", "full_patch")),
    "list_branches": read(PAGES),
    "list_tags": read(PAGES),
    "get_tag": read(tag=must(COMMITISH)),
    "list_releases": read(PAGES, fields=FIELDS),
    "get_latest_release": read(),
    "get_release_by_tag": read(tag=must(COMMITISH)),
    "search_code": read(
        SORTED_HITS, scoped=False, answer="hits", query=search(CODE_QUALIFIERS),
        fields=FIELDS, sort=choice("indexed"),
    ),
    "search_commits": read(
        SORTED_HITS, scoped=False, answer="hits", query=search(COMMIT_QUALIFIERS),
        sort=choice("author-date", "committer-date"),
    ),
    "create_branch": write(branch=must(BRANCH), from_branch=COMMITISH),
    "create_or_update_file": write(
        branch=must(BRANCH), path=must(WRITTEN_PATH), content=CONTENT, message=BODY,
        sha=SHA, allow_symlink_write=only(False),
    ),
    "push_files": write(
        branch=must(BRANCH), message=BODY,
        files=must(list_of(record(path=must(WRITTEN_PATH), content=must(CONTENT)))),
    ),
    "delete_file": write(branch=must(BRANCH), path=must(WRITTEN_PATH), message=BODY),
    "list_repository_collaborators": read(
        PAGES, needs="people", affiliation=choice("outside", "direct", "all"),
    ),
    "get_repository_tree": read(tree_sha=COMMITISH, path_filter=PATH, recursive=FLAG),
    # issues
    "issue_read": read(
        ISSUE, PAGES, answer="items", method=must(choice("get", "get_comments",
        "get_sub_issues", "get_parent")),  # get_labels does not say of which issue
    ),
    "list_issues": read(
        CURSORS, direction=ORDER_CAPS, fields=FIELDS, labels=list_of(LINE), since=DATE,
        orderBy=choice("CREATED_AT", "UPDATED_AT", "COMMENTS"), state=choice("OPEN",
        "CLOSED"), field_filters=list_of(record(field_name=must(LINE), value=must(LINE))),
    ),
    "search_issues": read(ISSUE_HITS, answer="hits"),
    "list_issue_types": read(),
    "list_issue_fields": read(),
    "find_duplicate": read(ISSUE, PAGES, answer="items", confidence_threshold=FRACTION),
    "issue_write": write(
        method=must(choice("create", "update")), issue_number=NUMBER, title=LINE, body=BODY,
        labels=list_of(LINE), assignees=PEOPLE, milestone=NUMBER, type=ISSUE_TYPE,
        state=STATE, state_reason=STATE_REASON, duplicate_of=NUMBER,
        issue_fields=list_of(FIELD_VALUE),
    ),
    "add_issue_comment": write(ISSUE, body=BODY, comment_id=ID, reaction=REACTION),
    "issue_dependency_read": read(
        ISSUE, PAGES, needs="dependencies", answer="items",
        method=must(choice("get_blocked_by", "get_blocking")),
    ),
    # issues, where the upstream has the small tools in place of issue_write
    "create_issue": write(title=must(LINE), body=BODY),
    "update_issue_title": write(ISSUE, title=must(LINE)),
    "update_issue_body": write(ISSUE, body=must(BODY)),
    "update_issue_assignees": write(ISSUE, needs="people", assignees=must(list_of(WHO))),
    "update_issue_labels": write(ISSUE, labels=must(list_of(LINE))),
    "update_issue_milestone": write(ISSUE, milestone=must(NUMBER)),
    "update_issue_type": write(INTENT, ISSUE, issue_type=must(ISSUE_TYPE)),
    "update_issue_state": write(
        INTENT, ISSUE, state=must(STATE), state_reason=STATE_REASON, duplicate_of=NUMBER,
    ),
    "add_issue_reaction": write(ISSUE, content=must(REACTION)),
    "add_issue_comment_reaction": write(comment_id=must(ID), content=must(REACTION)),
    # labels
    "get_label": read(name=must(LINE)),
    "list_label": read(),
    "label_write": write(
        method=must(choice("create", "update", "delete")), name=must(LINE), new_name=LINE,
        color=COLOR, description=LINE,
    ),
    # pull requests
    # get_comments asks for those of an issue, which may have been transferred
    "pull_request_read": read(
        PULL, PAGES, answer="items", answer_of="get_comments", method=must(choice("get",
        "get_diff", "get_status", "get_files", "get_commits", "get_review_comments",
        "get_reviews", "get_comments", "get_check_runs")), after=CURSOR,
    ),
    "list_pull_requests": read(
        PAGES, base=COMMITISH, head=HEAD_FILTER, direction=ORDER, fields=FIELDS,
        sort=choice("created", "updated", "popularity", "long-running"),
        state=choice("open", "closed", "all"),
    ),
    "search_pull_requests": read(ISSUE_HITS, answer="hits"),
    "merge_pull_request": write(
        PULL, needs="merge", commit_message=BODY, commit_title=LINE,
        merge_method=choice("merge", "squash", "rebase"),
    ),
    "update_pull_request_branch": write(PULL, needs="merge", expectedHeadSha=SHA),
    "create_pull_request": write(
        head=must(HEAD), base=must(COMMITISH), title=LINE, body=BODY, draft=FLAG,
        maintainer_can_modify=FLAG, reviewers=NO_TEAM,
    ),
    "update_pull_request": write(
        PULL, base=COMMITISH, title=LINE, body=BODY, draft=FLAG, state=STATE,
        maintainer_can_modify=FLAG, reviewers=NO_TEAM,
    ),
    "pull_request_review_write": write(
        PULL, method=must(choice("create", "submit_pending", "delete_pending")), body=BODY,
        commitID=SHA, event=EVENT,
    ),
    "add_comment_to_pending_review": write(REVIEW_COMMENT, PULL),
    "add_reply_to_pull_request_comment": write(
        commentId=must(ID), body=BODY, pullNumber=NUMBER, reaction=REACTION,
    ),
    # pull requests, where the upstream has the small tools
    "update_pull_request_title": write(PULL, title=must(LINE)),
    "update_pull_request_body": write(PULL, body=must(BODY)),
    "update_pull_request_state": write(PULL, state=must(STATE)),
    "update_pull_request_draft_state": write(PULL, draft=must(FLAG)),
    "request_pull_request_reviewers": write(PULL, needs="people", reviewers=must(NO_TEAM)),
    "create_pull_request_review": write(PULL, body=BODY, commitID=SHA, event=EVENT),
    "submit_pending_pull_request_review": write(PULL, body=BODY, event=must(EVENT)),
    "delete_pending_pull_request_review": write(PULL),
    "add_pull_request_review_comment": write(REVIEW_COMMENT, PULL),
    "add_pull_request_review_comment_reaction": write(comment_id=must(ID), content=must(REACTION)),
    # opt-in
    "actions_list": read(
        needs="actions", resource_id=SEGMENT, page=PAGE, per_page=PER_PAGE,
        method=must(choice("list_workflows", "list_workflow_runs", "list_workflow_jobs",
        "list_workflow_run_artifacts")), workflow_jobs_filter=record(filter=choice("latest",
        "all")), workflow_runs_filter=record(actor=WHO, branch=COMMITISH, event=SEGMENT,
        status=SEGMENT),
    ),
    # actions_get: without the two methods that hand out signed URLs
    "actions_get": read(
        needs="actions", resource_id=must(SEGMENT), method=must(choice("get_workflow",
        "get_workflow_run", "get_workflow_job", "get_workflow_run_usage")),
    ),
    # get_job_logs: false hands out a signed URL
    "get_job_logs": read(
        needs="actions", job_id=ID, run_id=ID, failed_only=FLAG, tail_lines=NUMBER,
        return_content=only(True),
    ),
    "get_code_quality_finding": read(needs="alerts", findingNumber=must(NUMBER)),
    "get_code_scanning_alert": read(needs="alerts", alertNumber=must(NUMBER)),
    "list_code_scanning_alerts": read(
        PAGES, needs="alerts", ref=COMMITISH, tool_name=LINE, severity=choice("critical",
        "high", "medium", "low", "warning", "note", "error"), state=choice("open", "closed",
        "dismissed", "fixed"),
    ),
    "get_dependabot_alert": read(needs="alerts", alertNumber=must(NUMBER)),
    "list_dependabot_alerts": read(
        CURSORS, needs="alerts", severity=choice("low", "medium", "high", "critical"),
        state=choice("open", "fixed", "dismissed", "auto_dismissed"),
    ),
    "list_repository_security_advisories": read(
        needs="advisories", direction=ORDER, sort=choice("created", "updated", "published"),
        state=choice("triage", "draft", "published", "closed"),
    ),
    "list_discussions": read(
        CURSORS, needs="discussions", category=CURSOR, direction=ORDER_CAPS,
        orderBy=choice("CREATED_AT", "UPDATED_AT"),
    ),
    "get_discussion": read(needs="discussions", discussionNumber=must(NUMBER)),
    "get_discussion_comments": read(
        CURSORS, needs="discussions", discussionNumber=must(NUMBER), includeReplies=FLAG,
    ),
    "list_discussion_categories": read(needs="discussions"),
}
# fmt: on


def blocked_tool(name: str) -> str:
    """Why a tool that the table lacks, or the policy holds back, may not be called."""
    tool = TOOLS.get(name)
    if tool is None:
        return f"the proxy does not pass {quoted(name)}: tools/list shows what it passes"
    return f"{name} needs `allow = {tool.needs}` in the host's policy file"


def tool_arguments(name: str, tool: Tool, arguments: Object, bounds: Bounds) -> Object:
    """The arguments to send, or Refusal. owner and repo are always the configured ones."""
    scope = bounds.scope
    for key, given in arguments.items():
        if key in ("owner", "repo"):
            ours = getattr(scope, key)
            if given in (None, "", []):
                continue  # left out
            if not isinstance(given, str) or given.lower() != ours.lower():
                raise Refusal(
                    f"{name}: {key} is {quoted(given)}, but only {scope} is served here; "
                    f"leave owner and repo out, or give {scope.owner} and {scope.repo}"
                )
        elif key not in tool.rules:
            known = ["owner", "repo", *tool.rules]
            near = [k for k in known if k.lower() == key.lower()]
            hint = f" (spelled {near[0]})" if near else f"; {name} takes {', '.join(known)}"
            raise Refusal(f"{name}: the parameter {quoted(key)} is not passed{hint}")
    checked: Object = {"owner": scope.owner, "repo": scope.repo} if tool.scoped else {}
    for key, rule in tool.rules.items():
        if key in arguments and not is_left_out(rule, arguments[key], bounds):
            checked[key] = checked_value(name, key, rule, arguments[key], bounds)
        elif rule.constant:
            checked[key] = rule.constant[0]
        elif rule.required:
            raise Refusal(f"{name}: the parameter {key} is missing: {rule.what}")
    if tool.answer == "hits" and checked.get("fields"):
        checked["fields"] = list(dict.fromkeys([*checked["fields"], *IDENTITY[name]]))
    return checked


# The fields of a hit that say where it is from; they are asked for even when the VM does not.
IDENTITY = {
    "search_code": ("repository",),
    "search_issues": ("html_url", "repository_url"),
    "search_pull_requests": ("html_url", "repository_url"),
}


def checked_value(name: str, key: str, rule: Rule, value: Json, bounds: Bounds) -> Json:
    if not bounds.policy.has(rule.needs):
        raise Refusal(f"{name}: {key} needs `allow = {rule.needs}` in the host's policy file")
    try:
        return rule.check(value, bounds)
    except Refusal as refusal:
        raise Refusal(f"{name}: {key} is {quoted(value)}, but must be {refusal}") from None


# --- pure core: methods ---

VERSION = pattern("a protocol version", r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
META = "io.modelcontextprotocol/"
MODERN = META + "protocolVersion"  # in _meta of every request since 2026-07-28


def check_progress(value: Json, _bounds: Bounds) -> Json:
    refuse_unless(type(value) in (int, float) and 0 <= value <= 2**53, "a number")
    return value


def check_client_info(value: Json, _bounds: Bounds) -> Json:
    refuse_unless(isinstance(value, dict), "an object")
    return {
        key: value[key] for key in ("name", "title", "version") if is_plain(value.get(key), 100)
    }


def check_capabilities(value: Json, _bounds: Bounds) -> Json:
    """Of what the client offers, only to be asked: sampling and roots would hand things out."""
    refuse_unless(isinstance(value, dict), "an object")
    return {"elicitation": {}} if "elicitation" in value else {}


def check_id(value: Json, _bounds: Bounds) -> Json:
    refuse_unless(is_id(value), "a string or an integer")
    return value


PROGRESS = Rule("a number", check_progress)
CLIENT_INFO = Rule("an object", check_client_info)
CAPABILITIES = Rule("an object", check_capabilities)
TOKEN_ID = Rule("a string or an integer", check_id)
LEVEL = choice(
    "debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"
)  # fmt: skip

# Requests and notifications that pass, with all that their params may hold. completion/complete
# (names other repositories), prompts and resources (any owner and repo), tasks, subscriptions and
# whatever comes next are not here.
REQUESTS: dict[str, Mapping[str, Rule]] = {
    "initialize": {
        "protocolVersion": must(VERSION),
        "capabilities": must(CAPABILITIES),
        "clientInfo": CLIENT_INFO,
    },
    "ping": {},
    "server/discover": {},
    "logging/setLevel": {"level": must(LEVEL)},
    "tools/list": {"cursor": CURSOR},
    "tools/call": {"name": must(LINE), "arguments": record()},
}
NOTIFICATIONS: dict[str, Mapping[str, Rule]] = {
    "notifications/initialized": {},
    "notifications/cancelled": {"requestId": must(TOKEN_ID), "reason": text(1024)},
    "notifications/progress": {
        "progressToken": must(TOKEN_ID),
        "progress": must(PROGRESS),
        "total": PROGRESS,
        "message": text(1024),
    },
    "notifications/roots/list_changed": {},
}
META_RULES = {
    "progressToken": TOKEN_ID,
    MODERN: VERSION,
    META + "clientInfo": CLIENT_INFO,
    META + "clientCapabilities": Rule("an object", lambda value, _bounds: {}),
    META + "logLevel": LEVEL,
}
# An answer to a question of the upstream: ping, or a form that the agent's user filled in.
FLAT = any_of(text(65_536), integer(-(2**53), 2**53), FLAG, list_of(text(1024)))


def check_form(value: Json, bounds: Bounds) -> Json:
    refuse_unless(isinstance(value, dict) and len(value) <= 100, "a flat object")
    return {key: FLAT.check(item, bounds) for key, item in value.items() if is_plain(key, 100)}


FORM_ANSWER = record(
    action=choice("accept", "decline", "cancel"), content=Rule("a flat object", check_form)
)


def is_modern(message: Object) -> bool:
    """Whether a request says its protocol version itself: 2026-07-28 and later."""
    return MODERN in as_object(as_object(message.get("params")).get("_meta"))


def as_object(value: Json) -> Object:
    return value if isinstance(value, dict) else {}


def decide(scope: Scope, policy: Policy, message: Object, seen: Seen = NOTHING_SEEN) -> Verdict:
    """Whether a well-formed message (`parse_message`) passes, and as what. Pure; the only judge."""
    bounds = Bounds(scope, policy, seen.defaults)
    method = message.get("method")
    tool = ""
    try:
        if method is None:
            return Forward(answer_to_upstream(message, bounds, seen))
        if "id" not in message:
            return decide_notification(method, message, bounds)
        if method == "tools/call":
            tool = str((message.get("params") or {}).get("name"))
            return decide_call(message, bounds, seen)
        if method not in REQUESTS:
            return Refuse(f"the proxy does not pass the method {quoted(method)}", NO_METHOD)
        return Forward(rebuilt(message, checked_params(method, REQUESTS[method], message, bounds)))
    except Refusal as refusal:
        return Refuse(str(refusal), INVALID_PARAMS, tool)


def decide_notification(method: str, message: Object, bounds: Bounds) -> Verdict:
    if method not in NOTIFICATIONS:
        return Refuse(f"the proxy does not pass the notification {quoted(method)}", NO_METHOD)
    params = checked_params(method, NOTIFICATIONS[method], message, bounds)
    return Forward(rebuilt(message, params))


def decide_call(message: Object, bounds: Bounds, seen: Seen) -> Verdict:
    policy = bounds.policy
    params = dict(message.get("params") or {})
    arguments = params.pop("arguments", None)
    arguments = {} if arguments is None else arguments
    outer = checked_params("tools/call", REQUESTS["tools/call"], {"params": params}, bounds)
    name = outer["name"]
    tool = TOOLS.get(name)
    if tool is None or not policy.has(tool.needs):
        return Refuse(blocked_tool(name), tool=name)
    if tool.write and policy.readonly:
        return Refuse(f"{name} writes, and the policy is read-only", tool=name)
    if tool.write and seen.writes >= policy.writes_per_hour:
        limit = policy.writes_per_hour
        return Refuse(f"{name}: {limit} writes in the last hour, the policy's limit", tool=name)
    refuse_unless(isinstance(arguments, dict), f"{name}: arguments must be an object")
    outer["arguments"] = arguments = tool_arguments(name, tool, arguments, bounds)
    is_checked = not tool.answer_of or arguments.get("method") == tool.answer_of
    return Forward(rebuilt(message, outer), name, tool.write, tool.answer if is_checked else "")


def answer_to_upstream(message: Object, bounds: Bounds, seen: Seen) -> Object:
    """An answer passes only to a question that the upstream asked this session."""
    refuse_unless(message["id"] in seen.asked, "an answer that the upstream has not asked for")
    if "error" in message:
        error = {"code": INVALID_REQUEST, "message": "declined by the client"}
        return {"jsonrpc": "2.0", "id": message["id"], "error": error}
    result = FORM_ANSWER.check(message["result"], bounds)
    return {"jsonrpc": "2.0", "id": message["id"], "result": result}


def checked_params(
    method: str, rules: Mapping[str, Rule], message: Object, bounds: Bounds
) -> Object:
    """The params to send. Of _meta, what no rule names is dropped: clients put all sorts there."""
    params = dict(message.get("params") or {})
    meta = params.pop("_meta", None)
    meta = {} if meta is None else meta
    if not isinstance(meta, dict):
        raise Refusal(f"{method}: _meta must be an object")
    for key in params.keys() - rules.keys():
        if method == "initialize":  # clients put all sorts there; it is not sent
            del params[key]
            continue
        raise Refusal(f"{method}: the parameter {quoted(key)} is not passed")
    for key, rule in rules.items():
        if key in params and is_left_out(rule, params[key], bounds):
            del params[key]
        elif key in params:
            params[key] = checked_value(method, key, rule, params[key], bounds)
        elif rule.required:
            raise Refusal(f"{method}: {key} is missing")
    known = META_RULES.keys() & meta.keys()
    if known:
        kept = {k: checked_value(method, k, META_RULES[k], meta[k], bounds) for k in known}
        params["_meta"] = kept
    return params


def rebuilt(message: Object, params: Object) -> Object:
    made: Object = {"jsonrpc": "2.0", "method": message["method"]}
    if "id" in message:
        made["id"] = message["id"]
    if params:
        made["params"] = params
    return made


def without_arguments(forward: Forward) -> Forward:
    """What is needed of a request once it is sent: to know its answer."""
    kept = {key: value for key, value in forward.message.items() if key != "params"}
    params = forward.message.get("params") or {}
    if "_meta" in params:
        kept["params"] = {"_meta": params["_meta"]}
    return forward._replace(message=kept, target=target_of(forward.message))


def writes_branch(message: Object, policy: Policy) -> bool:
    """Whether `decide` will have to know the default branch."""
    if "default-branch" in policy.allow or policy.readonly:
        return False
    tool = TOOLS.get(str((message.get("params") or {}).get("name")))
    return bool(tool and any(rule.branch for rule in tool.rules.values()))


# --- pure core: git over HTTP (gitprotocol-http, gitprotocol-pack) ---

GIT = "/git/"
GIT_SERVICE = re.compile(
    r"/git/([^/?]+)/([^/?]+?)(?:\.git)?/"
    r"(?:info/refs\?service=(git-upload-pack|git-receive-pack)|(git-upload-pack|git-receive-pack))"
)
NO_OBJECT = re.compile("0+").fullmatch
OBJECT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}").fullmatch
GIT_PROTOCOL = re.compile("version=[0-2]").fullmatch


class GitRefusal(Exception):
    """Why a request of git's is not served; git prints the text."""


class Command(NamedTuple):
    """One line of a push: what a ref is to become."""

    old: str
    new: str
    ref: str


class Push(NamedTuple):
    """A push, as far as it is read: its commands are whole."""

    begun: bytes = b""
    refs: tuple[str, ...] = ()
    side_band: bool = False


def git_service(scope: Scope, policy: Policy, method: str, target: str) -> str:
    """The service that a request asks for, of this repository; GitRefusal for all others."""
    match = GIT_SERVICE.fullmatch(target)
    if not match:
        what = "LFS" if "/info/lfs" in target else "this request (git's smart HTTP is)"
        raise GitRefusal(f"{what} is not served here")
    owner, repo, advertised, service = match.groups()
    if repo.lower().endswith(".wiki"):
        raise GitRefusal("the wiki is not served here")
    if not scope.is_named(f"{owner}/{repo}"):
        raise GitRefusal(f"only {scope} is served here")
    service = service or advertised
    if method != ("GET" if advertised else "POST"):
        raise GitRefusal(f"{method} is not served here")
    if service == "git-receive-pack" and policy.readonly:
        raise GitRefusal("the policy is read-only: nothing is pushed")
    return service


def parse_commands(data: Bytes) -> tuple[list[Command], str, int] | None:
    """(commands, capabilities, where the pack or the push options begin); None: more is to come.

    Raises GitRefusal for what is no push: signed ones too, whose commands are wrapped.
    """
    commands: list[Command] = []
    capabilities, at = "", 0
    while len(data) >= at + 4:
        digits = bytes(data[at : at + 4])
        if not re.fullmatch(b"[0-9a-f]{4}", digits) or int(digits, 16) in (1, 2, 3, 4):
            break
        size = int(digits, 16)
        if not size:
            return commands, capabilities, at + 4
        if len(data) < at + size:
            return None
        line, nul, rest = bytes(data[at + 4 : at + size]).partition(b"\0")
        line = line[:-1] if line.endswith(b"\n") else line
        try:
            words = line.decode().split(" ", 2)
        except UnicodeDecodeError:
            break
        capabilities = rest.decode("ascii", "replace") if nul else capabilities
        at += size
        if words[0] == "shallow":
            continue
        if len(words) != 3 or not OBJECT(words[0]) or not OBJECT(words[1]):
            break
        commands.append(Command(*words))
    else:
        return None
    raise GitRefusal("this is not a push that can be checked (signed pushes are not)")


def judge_push(
    scope: Scope, policy: Policy, commands: list[Command], seen: Seen = NOTHING_SEEN
) -> dict[str, str]:
    """Why refs may not be pushed, by ref: the same policy as for the tools. Empty: all may."""
    return {c.ref: why for c in commands for why in [push_refusal(scope, policy, c, seen)] if why}


def push_refusal(scope: Scope, policy: Policy, command: Command, seen: Seen) -> str:
    kind, _, branch = command.ref.partition("refs/heads/")
    if kind or not branch:
        return "only branches are pushed here"
    if NO_OBJECT(command.new):
        return "branches are not deleted here"
    try:
        check_branch(branch, Bounds(scope, policy, seen.defaults))
    except Refusal as refusal:
        return f"must be {refusal}"
    return ""


def pkt(data: bytes) -> bytes:
    return b"%04x%b" % (len(data) + 4, data)


def push_report(commands: list[Command], refusals: Mapping[str, str], capabilities: str) -> bytes:
    """The answer to a push that is refused: git shows why, at each ref and as `remote:` lines."""
    whole = "not pushed, because another ref of this push is refused"
    rows = [(c.ref, refusals.get(c.ref, whole)) for c in commands]
    status = pkt(b"unpack ok\n")
    for ref, why in rows:
        status += pkt(f"ng {ref} refused: {why}\n".encode()[:1000])
    status += b"0000"
    if "side-band-64k" not in capabilities:
        return status
    remarks = "".join(f"refused: {ref}: {why}\n" for ref, why in rows if ref in refusals)
    return pkt(b"\x02" + remarks.encode()[:60_000]) + pkt(b"\x01" + status[:60_000]) + b"0000"


def pkt_lines(data: bytes) -> Iterator[bytes]:
    """The payloads of pkt-lines, as far as they are whole (gitprotocol-common)."""
    at = 0
    while re.fullmatch(b"[0-9a-f]{4}", data[at : at + 4]):
        size = max(4, int(data[at : at + 4], 16))
        if at + size > len(data):
            return
        yield data[at + 4 : at + size]
        at += size


def pushed_refs(report: bytes, push: Push) -> list[tuple[str, str]]:
    """(ref, why it was not taken or "") of the upstream's answer to a push (gitprotocol-pack).

    The side-band's other bands have what the upstream says of file names: the pusher's words.
    """
    if push.side_band:
        report = b"".join(line[1:] for line in pkt_lines(report) if line[:1] == b"\x01")
    found: dict[str, str] = {}
    for line in pkt_lines(report):
        word, _, rest = line.decode(errors="replace").rstrip("\n").partition(" ")
        ref, _, why = rest.partition(" ")
        if word in ("ok", "ng") and ref in push.refs:
            found.setdefault(ref, (why or "?") * (word == "ng"))
    return list(found.items())


# --- pure core: mirrored headers (2026-07-28) ---


PLAIN_HEADER = re.compile(r"[!-~]([ -~]*[!-~])?").fullmatch


def encode_header(value: str) -> str:
    """A value as Mcp-Name and Mcp-Param-* carry it: base64 when it is not plain ASCII."""
    if PLAIN_HEADER(value) and not value.startswith("=?base64?"):
        return value
    import base64

    return "=?base64?" + base64.b64encode(value.encode()).decode() + "?="


def decode_header(value: str) -> str:
    if not (value.startswith("=?base64?") and value.endswith("?=")):
        return value
    import base64

    try:
        return base64.b64decode(value[9:-2], validate=True).decode()
    except ValueError as error:
        raise ProtocolError("a mirrored header is not base64", code=HEADER_MISMATCH) from error


def check_mirrored(headers: Mapping[str, str], message: Object) -> None:
    """The client's headers must say what its body says, or two readers see two messages."""
    params = message["params"]
    arguments = as_object(params.get("arguments"))
    expected = {"mcp-protocol-version": params["_meta"][MODERN], "mcp-method": message["method"]}
    if "name" in params:
        expected["mcp-name"] = params["name"]
    for key in ("owner", "repo"):
        if f"mcp-param-{key}" in headers:
            expected[f"mcp-param-{key}"] = arguments.get(key)
    for name, value in expected.items():
        if decode_header(headers.get(name, "")) != value:
            raise ProtocolError(f"{name} differs from the body", code=HEADER_MISMATCH)


def mirror_headers(headers: Mapping[str, str], message: Object) -> dict[str, str]:
    """The headers for an outgoing modern request, made from the outgoing message alone."""
    params = message.get("params") or {}
    made = {"MCP-Protocol-Version": params["_meta"][MODERN], "Mcp-Method": message["method"]}
    if "name" in params:
        made["Mcp-Name"] = encode_header(params["name"])
    for key in ("owner", "repo"):
        if key in params.get("arguments", {}):
            made[f"Mcp-Param-{key}"] = encode_header(params["arguments"][key])
    return made


# --- pure core: answers ---

# What GitHub's tokens look like, and the parameters of URLs that carry their own permission, from
# the first one on (6 ends \u0026). Strangers write what is searched here: each of the patterns
# takes time in proportion to the text, so none looks back, and none ends in what may not follow.
TOKENS = re.compile(rb"g(?:h[pousr]_|hs-|ithub_pat_)[A-Za-z0-9._-]{30,}")
URL = re.compile(rb"://(?:[^\s\"\\<>']|\\+u0026)+")
SIGNED = re.compile(
    rb"([?&6])(?:token|sig|signature|jwt|x-amz-[a-z-]{1,40})=[A-Za-z0-9%._~+/=-]{20}[^)]*",
    re.IGNORECASE,
)
# Files are read, changed and written back: what only looks like a secret has to stay as it is.
IN_A_WORD = re.compile(rb"[A-Za-z0-9](?<!\\[nrtbf])(?<!\\u[0-9a-fA-F]{4})$")


def blank(size: int) -> bytes:
    return b"[redacted]".ljust(size, b"*")


def redact(data: Bytes, *tokens: bytes) -> Bytes:
    """`data`, as long as it was, without the tokens given, what looks like one, and signed URLs."""

    def token_like(match: re.Match[bytes]) -> bytes:
        before = match.string[max(0, match.start() - 6) : match.start()]
        return match[0] if IN_A_WORD.search(before) else blank(len(match[0]))

    def unsigned(match: re.Match[bytes]) -> bytes:
        return match[1] + blank(len(match[0]) - 1)

    def url(match: re.Match[bytes]) -> bytes:
        return SIGNED.sub(unsigned, match[0]) if b"=" in match[0] else match[0]

    for token in tokens:
        if len(token) >= 16 and token in data:
            data = data.replace(token, blank(len(token)))
    if TOKENS.search(data):
        data = TOKENS.sub(token_like, data)
    if b"=" in data:
        data = URL.sub(url, data)
    return data


HTTP_URL = re.compile(r"https?://([^/?#]*)/(?:api/v3/)?([^?#]*)", re.IGNORECASE).match
# First segments that are no owners in addresses of GitHub's.
NOT_OWNERS = frozenset(
    "apps avatars enterprises features login marketplace notifications orgs search settings "
    "sponsors teams topics u user-attachments users".split()
)


def repository_in(url: Json) -> str:
    """The repository ("owner/name", lower case) that an address lies in; "" for none."""
    match = HTTP_URL(url) if isinstance(url, str) else None
    if not match:
        return ""
    first, *rest = match[2].lower().rstrip("/").split("/")
    if first == "repos" and len(rest) > 1:  # the API
        return "/".join(rest[:2])
    if not rest or first in NOT_OWNERS or match[1].lower().startswith("avatars."):
        return ""
    return first + "/" + rest[0]  # of the API too: repositories/ID


def repository_of(item: Object) -> set[str]:
    """The repositories ("owner/name", lower case) that an item of an answer says it belongs to."""
    repository = item.get("repository")
    if isinstance(repository, dict):
        repository = repository.get("full_name") or repository.get("nameWithOwner")
    names = {repository_in(item.get(key)) for key in ("repository_url", "html_url", "url")}
    if isinstance(repository, str):
        names.add(repository.lower())
    return names - {""}


def foreign(item: Object, scope: Scope) -> bool:
    """Whether it is of another repository, or an issue or a comment that does not say of which."""
    names = repository_of(item)
    ours = {str(scope).lower()}
    return names != ours if {"number", "body"} & item.keys() else bool(names - ours)


def without_foreign(value: Json, scope: Scope) -> Json:
    """A copy of an answer's data without the objects, at any depth, of other repositories."""
    if isinstance(value, list):
        kept = (without_foreign(item, scope) for item in value)
        return [item for item in kept if item is not FOREIGN]
    if not isinstance(value, dict):
        return value
    if foreign(value, scope):
        return FOREIGN
    own = {}
    for key, item in value.items():
        where = repository_in(item) if key.endswith("_url") else ""
        if where not in ("", str(scope).lower()) and not where.startswith("repositories/"):
            continue  # parent_issue_url, say
        item = without_foreign(item, scope)
        if item is not FOREIGN:
            own[key] = item
    if any(isinstance(item, list) and len(item) < len(value[key]) for key, item in own.items()):
        own.pop("total_count", None)  # it would count what is left out
    return own


FOREIGN = object()


def own_hits(value: Json, scope: Scope) -> Json:
    """A search answer with only the hits that are known to be of this repository."""
    items = value.get("items", []) if isinstance(value, dict) else None  # left out when empty
    if not isinstance(items, list):
        raise Refusal("the search answer could not be checked")
    own = [
        item
        for item in items
        if isinstance(item, dict) and repository_of(item) == {str(scope).lower()}
    ]
    kept: Object = {"items": [without_foreign(item, scope) for item in own]}
    if len(own) == len(items) and (items or not value.get("total_count")):
        # Else the total would count hits of other repositories.
        kept["total_count"] = value.get("total_count")
        kept["incomplete_results"] = value.get("incomplete_results")
    return kept


def checked_answer(scope: Scope, kind: str, result: Object) -> Object:
    """The result of a tool call, without what belongs to other repositories."""
    if not kind or result.get("isError"):
        return result
    if not isinstance(result.get("content"), list):
        raise Refusal("the answer could not be checked")
    content: list[Json] = []
    for block in result["content"]:
        if not isinstance(block, dict) or block.get("type") != "text":
            raise Refusal("the answer has a part that could not be checked")
        try:
            data = json.loads(block["text"])
        except (KeyError, TypeError, ValueError):
            raise Refusal("the answer could not be checked") from None
        data = own_hits(data, scope) if kind == "hits" else without_foreign(data, scope)
        if data is FOREIGN:
            raise Refusal(f"the item is not of {scope}, or does not say of which repository")
        content.append({"type": "text", "text": json.dumps(data)})
    kept: Object = {key: result[key] for key in ("resultType",) if key in result}
    return {**kept, "content": content}


def narrow_tools(scope: Scope, policy: Policy, tools: list[Object]) -> list[Object]:
    """Of the upstream's tools those that may be called, their schemas narrowed to what passes."""
    narrowed = (narrow_tool(tool, policy) for tool in tools if isinstance(tool, dict))
    return [tool for tool in narrowed if tool]


def narrow_tool(offered: Object, policy: Policy) -> Object | None:
    tool = TOOLS.get(offered.get("name", ""))
    if tool is None or not policy.has(tool.needs):
        return None
    if tool.write and policy.readonly:
        return None
    schema = offered.get("inputSchema")
    if not isinstance(schema, dict):
        return None
    offered_properties = schema.get("properties") or {}
    required = [key for key in schema.get("required", []) if key not in ("owner", "repo")]
    if not tool.rules.keys() >= set(required):
        return None  # it needs what the table does not know; --check-upstream reports it
    properties = {
        key: narrow_property(prop, tool.rules.get(key), policy)
        for key, prop in offered_properties.items()
        if key in ("owner", "repo") or (key in tool.rules and policy.has(tool.rules[key].needs))
    }
    kept: Object = {
        key: offered[key]
        for key in ("name", "title", "description", "annotations")
        if key in offered
    }
    narrow = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        narrow["required"] = required
    return {**kept, "inputSchema": narrow}


def narrow_property(prop: Json, rule: Rule | None, policy: Policy) -> Json:
    """A property's schema; its enum holds only the choices that pass."""
    if not isinstance(prop, dict):
        return prop
    prop = {key: value for key, value in prop.items() if key != "x-mcp-header"}
    if rule and rule.choices:
        held_back = {value for value, word in rule.choice_needs if word not in policy.allow}
        choices = [value for value in rule.choices if value not in held_back]
        if "enum" in prop:
            prop["enum"] = [value for value in choices if value in prop["enum"]]
    return prop


def instructions(
    scope: Scope, policy: Policy, defaults: frozenset[str] = frozenset()
) -> str:
    """What the agent is told of the server: in place of the upstream's own text."""
    lines = [
        f"This server gives access to one GitHub repository, {scope}, and to nothing else.",
        "Leave out owner and repo: they are filled in.",
    ]
    if policy.readonly:
        lines.append("It is read-only.")
    else:
        if "default-branch" not in policy.allow:
            names = defaults | {policy.default_branch} - {""}
            name = " and ".join(sorted(names)) or "the default branch"
            lines.append(f"{name} cannot be written: use a branch and open a pull request.")
        if policy.branches != Policy().branches:
            lines.append("Branches that can be written: " + ", ".join(policy.branches) + ".")
        lines.append("Paths that cannot be written: " + ", ".join(policy.deny_paths) + ".")
        if "merge" not in policy.allow:
            lines.append("Pull requests cannot be merged here.")
    lines.append("Search takes plain words and qualifiers; and, or, not and ( ) are refused.")
    return "\n".join(lines)


def server_version(result: Object) -> tuple[int, ...]:
    """(major, minor, …) of a self-hosted github-mcp-server; () of any other."""
    info = result.get("serverInfo") or {}
    match = re.match(r"v?(\d+)\.(\d+)", str(info.get("version")))
    return tuple(map(int, match.groups())) if match and "github" in str(info.get("name")) else ()


def answer(
    scope: Scope, policy: Policy, forward: Forward, message: Object,
    defaults: frozenset[str] = frozenset(),
) -> Object:  # fmt: skip
    """The upstream's answer to `forward` as the VM gets it; the same object when nothing changes.

    Raises Refusal when it cannot be shown.
    """
    result = message.get("result")
    method = forward.message.get("method")
    if not isinstance(result, dict):
        return message
    if method in ("initialize", "server/discover"):
        if method == "initialize" and () < server_version(result) < OLDEST_SERVER:
            raise Refusal("the upstream's github-mcp-server is older than v0.32 and is not safe")
        offered = result.get("capabilities") or {}
        kept: Object = {key: offered[key] for key in ("tools", "logging") if key in offered}
        changed: Object = {"capabilities": kept, "instructions": instructions(scope, policy, defaults)}
    elif method == "tools/list":
        changed = {"tools": narrow_tools(scope, policy, result.get("tools") or [])}
        if "cacheScope" in result:
            changed["cacheScope"] = "private"
    elif method == "tools/call":
        checked = checked_answer(scope, forward.check, result)
        return message if checked is result else {**message, "result": checked}
    else:
        return message
    return {**message, "result": {**result, **changed}}


def outcome(message: Object) -> tuple[str, Object]:
    """What became of a write, for the audit: ("done", {"url": …} if it says one) or ("failed", {}).

    The answers are github-mcp-server's: {"id", "url"} of what was made, or GitHub's own objects.
    """
    result = message.get("result")
    if not isinstance(result, dict) or result.get("isError"):
        return "failed", {}
    try:
        made = json.loads(result["content"][0]["text"])
        found = [part.get("html_url") or part.get("url") for part in (made, made.get("commit", {}))]
        url = next(str(url) for url in found if url)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
        url = ""
    return "done", {"url": url} if re.fullmatch(r"https?://[!-~]{1,200}", url) else {}


# What the upstream may send besides answers: these notifications, and these questions.
PASSED_NOTIFICATIONS = {
    "notifications/progress",
    "notifications/message",
    "notifications/cancelled",
    "notifications/tools/list_changed",
    "notifications/elicitation/complete",
}
PASSED_QUESTIONS = {"ping", "elicitation/create"}


def kind_of(message: Json, forward: Forward | None) -> str:
    """What an upstream's message is: "answer", "question", "note", or "" for what does not pass."""
    if not isinstance(message, dict):
        return ""
    method = message.get("method")
    if method is None:
        sent = forward.message if forward else {}
        whole = "id" in sent and ("result" in message or "error" in message)
        return "answer" if whole and message.get("id") == sent["id"] else ""
    if "id" in message:
        return "question" if method in PASSED_QUESTIONS and is_id(message["id"]) else ""
    return "note" if method in PASSED_NOTIFICATIONS else ""


def is_plain_answer(data: Bytes, forward: Forward | None) -> bool:
    """Whether the bytes begin as the answer to a tool call that nothing needs to be taken from."""
    if forward is None or not forward.tool or forward.check or forward.write:
        return False
    return data.startswith(b'{"jsonrpc":"2.0","id":' + dumps(forward.message["id"]) + b",")


def error_message(id: Json, code: int, reason: str) -> Object:
    return {"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": reason}}


def refusal_message(message: Object, refuse: Refuse) -> tuple[int, Object]:
    """(HTTP status, body) of a refusal. A tool's goes where the model reads it: in a result."""
    modern = is_modern(message)
    if "id" not in message or "method" not in message:
        return 400, error_message(None, refuse.code, "refused: " + refuse.reason)
    if refuse.tool:
        text = "Refused by the GitHub proxy: " + refuse.reason
        result: Object = {"content": [{"type": "text", "text": text}], "isError": True}
        if modern:
            result["resultType"] = "complete"
        answered: Object = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        return 200, answered
    status = (404 if refuse.code == NO_METHOD else 400) if modern else 200
    return status, error_message(message["id"], refuse.code, "refused: " + refuse.reason)


# --- pure core: HTTP/1.1 without I/O ---

HEADERS = re.compile(
    r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*"
).fullmatch  # no folding, no space before the colon, no controls
VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*").fullmatch
VISIBLE = re.compile("[!-~]{0,256}").fullmatch
VERSION_HEADER = re.compile("[A-Za-z0-9.-]{0,32}").fullmatch
PORT = re.compile(r":[0-9]{0,5}$")
STATUS = re.compile("[2-5][0-9][0-9]").fullmatch
CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,8}").fullmatch
# Given twice, these make two readers see two messages (RFC 9112, 11.2).
SINGLE = {"host", "content-length", "transfer-encoding", "authorization", "content-type", "origin",
          "mcp-session-id", "mcp-protocol-version", "mcp-method", "mcp-name"}  # fmt: skip


class Incoming:
    """Receives one HTTP message: `feed` it bytes; strict, since a lenient reader can be split."""

    def __init__(self, *, request: bool, max_body: int) -> None:
        self.request = request
        self.max_body = max_body
        self.start: tuple[str, str, str] | None = None  # the first line; None until the head is in
        self.headers: dict[str, str] = {}
        self.body = bytearray()  # decoded, not yet taken
        self.complete = False
        self.rest = bytearray()  # received, not yet decoded; after `complete`: the next message
        self.left = 0  # bytes to come of the body, or of the chunk
        self.size = 0
        self.decode = self.decode_head

    def feed(self, data: bytes) -> None:
        if self.decode == self.decode_sized and len(data) <= self.left:
            self.body += data  # most of a large body: straight to its place
            self.left -= len(data)
            self.complete = not self.left
            return
        self.rest += data
        while not self.complete and self.decode():
            pass

    def eof(self) -> None:
        """The peer has closed: the end of a body without a length, an error anywhere else."""
        if self.decode == self.decode_to_eof:
            self.complete = True
        elif not self.complete:
            raise ProtocolError("the connection was closed in the middle of a message", 502)

    def take(self) -> Bytes:
        data, self.body = self.body, bytearray()
        return data

    def decode_head(self) -> bool:
        end = self.rest.find(b"\r\n\r\n", 0, MAX_HEAD)
        if end < 0:
            if len(self.rest) >= MAX_HEAD:
                raise ProtocolError(f"a head of more than {MAX_HEAD} bytes", 431)
            return False
        first, _, block = self.rest[: end + 2].decode("latin-1").partition("\r\n")
        del self.rest[: end + 4]
        start = first.split(" ", 2)
        if len(start) != 3 or not VALUE(first):
            raise ProtocolError("not an HTTP request" if self.request else "not an HTTP answer")
        self.headers = self.parse_headers(block)
        if self.request and start[1].startswith(GIT):
            self.max_body = MAX_PACK  # it is passed on as it comes
        if not self.request and start[1].startswith("1") and start[1] != "101":
            return True  # 100 Continue, 103 Early Hints: the answer follows
        self.start = (start[0], start[1], start[2])
        self.decode = self.body_decoder()
        return True

    def parse_headers(self, block: str) -> dict[str, str]:
        if not HEADERS(block):
            raise ProtocolError("a malformed header")
        headers: dict[str, str] = {}
        for line in block.split("\r\n")[:-1]:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            if name in headers:
                if name in SINGLE and self.request:
                    raise ProtocolError(f"the header {name} is given twice")
                value = headers[name] + ", " + value
            headers[name] = value
        return headers

    def body_decoder(self) -> Callable[[], bool]:
        coding = self.headers.get("transfer-encoding")
        length = self.headers.get("content-length")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise ProtocolError("a body with an unknown or a double length")
            return self.decode_chunk_size
        if length is not None:
            if not re.fullmatch("[0-9]{1,12}", length):
                raise ProtocolError("a Content-Length that is not a number")
            self.left = int(length)
            self.count(self.left)
            return self.decode_sized
        bodiless = self.request or (self.start or "   ")[1] in ("204", "304")
        return self.decode_sized if bodiless else self.decode_to_eof

    def count(self, size: int) -> None:
        self.size += size
        if self.size > self.max_body:
            raise ProtocolError(f"a body of more than {self.max_body} bytes", 413)

    def move(self) -> bool:
        """Move what has come of the current stretch into the body; True when it is whole."""
        data = self.rest[: self.left]
        self.body += data
        del self.rest[: len(data)]
        self.left -= len(data)
        return not self.left

    def decode_sized(self) -> bool:
        self.complete = self.move()
        return False

    def decode_to_eof(self) -> bool:
        self.left = len(self.rest)
        self.count(self.left)
        self.move()
        return False

    def decode_chunk_size(self) -> bool:
        end = self.rest.find(b"\r\n", 0, 64)
        if end < 0:
            if len(self.rest) >= 64:
                raise ProtocolError("a malformed chunk")
            return False
        size = bytes(self.rest[:end]).partition(b";")[0].strip()
        if not CHUNK_SIZE(size):
            raise ProtocolError("a malformed chunk")
        del self.rest[: end + 2]
        self.left = int(size, 16)
        self.count(self.left)
        self.decode = self.decode_chunk if self.left else self.decode_trailer
        return True

    def decode_chunk(self) -> bool:
        if self.left and not self.move():
            return False
        if len(self.rest) < 2:
            return False
        if self.rest[:2] != b"\r\n":
            raise ProtocolError("a malformed chunk")
        del self.rest[:2]
        self.decode = self.decode_chunk_size
        return True

    def decode_trailer(self) -> bool:
        end = self.rest.find(b"\r\n", 0, MAX_HEAD)
        if end < 0:
            if len(self.rest) >= MAX_HEAD:
                raise ProtocolError("a malformed trailer")
            return False
        self.complete = not end  # trailers are dropped
        del self.rest[: end + 2]
        return not self.complete


LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "host.lima.internal")
PATHS = ("/mcp", "/mcp/", "/")


def host_name(authority: str) -> str:
    return PORT.sub("", authority).lower()


def check_request(request: Incoming, hosts: Container[str], secret: bytes) -> None:
    """Refuse what is not for this endpoint, or not from who may use it; ProtocolError says why."""
    method, target, version = request.start or ("", "", "")
    headers = request.headers
    if version != "HTTP/1.1":
        raise ProtocolError("HTTP/1.1 is spoken here", 505)
    if host_name(headers.get("host", "")) not in hosts:
        raise ProtocolError("Host is not a name of this proxy", 403)
    origin = headers.get("origin")
    if origin is not None:
        scheme, _, authority = origin.partition("://")
        if scheme not in ("http", "https") or host_name(authority) not in hosts:
            raise ProtocolError("requests from other origins are refused", 403)
    is_git = target.startswith(GIT)
    if target not in PATHS and not is_git:
        raise ProtocolError("the endpoint is /mcp", 404)
    if secret:
        # Bytes of any value: compare_digest takes no non-ASCII str.
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + secret):
            raise ProtocolError("the proxy's secret is missing or wrong (Authorization)", 403)
    if method not in ("POST", "GET", "DELETE"):
        raise ProtocolError(f"the method {quoted(method)} is not served", 405)
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and not is_git and content_type != "application/json":
        raise ProtocolError("Content-Type must be application/json", 415)
    session = headers.get("mcp-session-id", "")
    if not VISIBLE(session):
        raise ProtocolError("Mcp-Session-Id is malformed")


EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class Events:
    """Splits a text/event-stream into its events, each with the blank line that ends it."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.scanned = 0

    def feed(self, data: Bytes) -> Iterator[bytes]:
        self.buffer += data
        while True:
            end = EVENT_END.search(self.buffer, max(0, self.scanned - 3))
            if not end:
                self.scanned = len(self.buffer)
                if self.scanned > MAX_ANSWER:
                    raise ProtocolError("an event is too large", 502)
                return
            event = bytes(self.buffer[: end.end()])
            del self.buffer[: end.end()]
            self.scanned = 0
            yield event


def event_data(event: bytes) -> bytes:
    """The data of an event: its data lines, joined. Empty for comments and priming events."""
    if event.startswith(b"event: message\ndata: ") and event.count(b"\n") == 3:
        return event[21:-2]  # what nearly all events look like
    lines = re.split(rb"\r\n|\n|\r", event)
    data = [line[5:] for line in lines if line.startswith(b"data:")]
    return b"\n".join(line[1:] if line.startswith(b" ") else line for line in data)


def event_with(event: bytes, data: Bytes) -> bytes:
    """The event with other data, its id and retry kept."""
    lines = re.split(rb"\r\n|\n|\r", event)
    kept = [line for line in lines if line and not line.startswith((b"data:", b":"))]
    return b"\n".join([*kept, b"data: " + data, b"", b""])


REASONS = {200: "OK", 202: "Accepted", 204: "No Content", 400: "Bad Request", 403: "Forbidden",
           404: "Not Found", 405: "Method Not Allowed", 413: "Content Too Large"}  # fmt: skip


def response_head(status: int, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


JSON_TYPE = "application/json"


def answer_head(status: int, length: int, *headers: str, kind: str = JSON_TYPE) -> bytes:
    kinds = (f"Content-Type: {kind}",) if length else ()
    return response_head(status, *headers, *kinds, f"Content-Length: {length}")


EVENT_STREAM = "text/event-stream"
STREAM_HEAD = (
    "Cache-Control: no-cache, no-transform",
    "X-Accel-Buffering: no",
    "Transfer-Encoding: chunked",
)


def chunk(data: Bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), bytes(data))


def log(text: str) -> None:
    """A line on stderr; dropped rather than to wait for a reader: the VM chooses when it comes."""
    shown = "".join(
        c if c.isprintable() else "?" for c in text[:1000]
    )  # it chooses some of it, too
    with contextlib.suppress(OSError, ValueError, TypeError):
        if select.select([], [sys.stderr], [], 0)[1]:
            print(f"github_mcp_proxy: {shown}", file=sys.stderr, flush=True)


# --- shell: the token ---


class Token:
    """GitHub's token: given once, or asked of a command again and again. Never printed."""

    def __init__(self, value: str, command: str = "") -> None:
        self.value = check_token(value) if value else ""
        self.earlier = ""  # the one before: still to be redacted
        self.command = command
        self.expires = float("inf")  # seconds since the epoch
        self.renewing: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return "<token>"

    async def fresh(self) -> str:
        """The token; renewed in the background when it expires soon, before use when it has."""
        left = self.expires - time.time()
        if self.command and (not self.value or left < TOKEN_MARGIN):
            renewal = self.renew()
            if not self.value or left <= 0:
                await asyncio.shield(renewal)
        return self.value

    def renew(self) -> asyncio.Future[None]:
        """Ask the command, once for all who wait."""
        if self.renewing is None or self.renewing.done():
            self.renewing = asyncio.ensure_future(self.ask())
            self.renewing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self.renewing

    async def ask(self) -> None:
        loop = asyncio.get_running_loop()
        refused = hashlib.sha256(self.value.encode()).hexdigest() if self.value else ""
        output = await loop.run_in_executor(None, run_token_command, self.command, refused)
        value, self.expires = parse_token_output(output)
        if value != self.value:
            self.earlier, self.value = self.value, value


def check_token(value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value) or len(value) > MAX_TOKEN:
        raise ProxyError(
            "the GitHub token has characters that no token has (its value is not shown)"
        )
    return value


def parse_token_output(output: bytes) -> tuple[str, float]:
    """(token, when it expires) from {"token": …, "expires_at": ISO 8601 or seconds}."""
    try:
        answer = json.loads(output)
        value, expires = answer["token"], answer.get("expires_at")
        if isinstance(expires, str):
            from datetime import datetime

            expires = datetime.fromisoformat(expires.replace("Z", "+00:00")).timestamp()
        return check_token(value), float(expires) if expires else float("inf")
    except (ValueError, KeyError, TypeError, AttributeError, ProxyError):
        raise UpstreamError("the host's token command gave no usable token") from None


TOKEN_COMMANDS: set[int] = set()  # process groups that run: none of them outlives the proxy


def end_token_commands() -> None:
    for pid in set(TOKEN_COMMANDS):
        end_group(pid)


def end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def run_token_command(command: str, refused: str) -> bytes:
    """Its output; `refused` is the SHA-256 of the last token, which its cache may still have."""
    import shlex
    import subprocess

    env = {**os.environ, "GITHUB_TOKEN_REFUSED": refused}
    try:
        with subprocess.Popen(
            shlex.split(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env,
            start_new_session=True,
        ) as child:  # fmt: skip
            TOKEN_COMMANDS.add(child.pid)
            try:
                output, _ = child.communicate(timeout=120)
            finally:
                TOKEN_COMMANDS.discard(child.pid)
                end_group(child.pid)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        log(f"token command: {type(error).__name__}")
        raise UpstreamError("the host's token command could not be run") from None
    if child.returncode:
        log(f"token command: exit status {child.returncode}")
        raise UpstreamError("the host's token command failed: its user has to look at it")
    return output


# --- shell: connections ---


class Connection(asyncio.Protocol):
    """What both sides share: a transport, a deadline, and waiting for room to write."""

    transport: asyncio.Transport

    def __init__(self, all_connections: set[Connection]) -> None:
        self.all = all_connections
        self.deadline = float("inf")  # monotonic time at which `expire` is called
        self.closed = False
        self.room: asyncio.Future[None] | None = None  # set while the peer reads too slowly

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.all.discard(self)
        self.resume_writing()

    def pause_writing(self) -> None:
        self.room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self.room and not self.room.done():
            self.room.set_result(None)
        self.room = None

    def set_deadline(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def expire(self) -> None:
        self.transport.abort()


class UpstreamConnection(Connection):
    """One keep-alive connection to the upstream; one exchange at a time."""

    def __init__(self, all_connections: set[Connection], pool: list[UpstreamConnection]) -> None:
        super().__init__(all_connections)
        self.pool = pool
        self.incoming = Incoming(request=False, max_body=MAX_ANSWER)
        self.waiter: asyncio.Future[None] | None = None
        self.failure = ""
        self.used = False  # an exchange has succeeded: it may have gone stale since
        self.idle = False  # in the pool
        self.paused = False
        self.lingering = False  # answered; only the end of the body is to come

    def data_received(self, data: bytes) -> None:
        if self.idle:
            self.transport.abort()  # bytes that nobody asked for
            return
        try:
            self.incoming.feed(data)
        except ProtocolError as error:
            self.failure = f"its answer is malformed: {error}"
            self.transport.abort()
        if self.lingering:
            self.incoming.take()
            if self.incoming.complete:
                self.release()
        elif not self.wake() and len(self.incoming.body) > PAUSE_AT:
            self.paused = True
            self.transport.pause_reading()

    def eof_received(self) -> None:
        self.connection_ended()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.idle:
            self.pool.remove(self)
        self.connection_ended()

    def connection_ended(self) -> None:
        try:
            self.incoming.eof()
        except ProtocolError:
            self.failure = self.failure or "it closed the connection"
        self.closed = True
        self.wake()

    def expire(self) -> None:
        self.failure = "it did not answer in time"
        super().expire()

    def wake(self) -> bool:
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)
            return True
        return False

    async def more(self) -> None:
        """Wait for the next bytes; UpstreamError when there will be none."""
        if self.failure or self.closed:
            raise AnswerLost(self.failure or "it closed the connection")
        if self.paused:
            self.paused = False
            self.transport.resume_reading()
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None
        if self.failure and not self.incoming.body:
            raise AnswerLost(self.failure)

    def release(self, *, answered: bool = False) -> None:
        """Back to the pool when the exchange is over; closed at once when it was broken off."""
        closing = self.incoming.headers.get("connection", "").lower() == "close"
        if answered and not self.incoming.complete and not self.closed:
            self.lingering = True
            self.set_deadline(1)
            return
        if not self.incoming.complete or self.incoming.rest or self.closed or closing:
            self.transport.abort()
            return
        self.lingering = False
        self.incoming = Incoming(request=False, max_body=MAX_ANSWER)
        self.used = self.idle = True
        self.set_deadline(60)  # shorter than servers keep idle connections
        self.pool.append(self)


class Upstream:
    """The one server that requests go to, with the one path and the headers made here."""

    def __init__(
        self, url: str, token: Token, headers: Mapping[str, str], ca_file: str, timeout: float,
        option: str = "--upstream",
    ) -> None:  # fmt: skip
        self.secure, self.host, self.port, self.path = parse_upstream(url, option)
        self.token = token
        self.timeout = timeout
        self.ca_file = ca_file
        self.tls: Any = None
        self.pool: list[UpstreamConnection] = []
        self.connections: set[Connection] = set()
        default_port = 443 if self.secure else 80
        name = self.host if self.port == default_port else f"{self.host}:{self.port}"
        self.fixed = [
            f"Host: {name}",
            f"User-Agent: agent-vm-github-mcp-proxy/{__version__}",
            "Accept-Encoding: identity",
        ]
        self.headers = headers

    async def connect(self) -> UpstreamConnection:
        if self.secure and not self.tls:
            import ssl

            self.tls = ssl.create_default_context(cafile=self.ca_file or None)
        loop = asyncio.get_running_loop()
        try:
            _, connection = await asyncio.wait_for(
                loop.create_connection(
                    lambda: UpstreamConnection(self.connections, self.pool),
                    self.host, self.port, ssl=self.tls,
                    server_hostname=self.host if self.secure else None,
                ),
                CONNECT_SECONDS,
            )  # fmt: skip
        except asyncio.TimeoutError:
            raise UpstreamError("it does not accept connections") from None
        except OSError as error:
            log(f"upstream {self.host}:{self.port}: {error}")
            kind = "its certificate is not trusted" if "certificate" in str(error).lower() else ""
            raise UpstreamError(kind or "it cannot be reached") from None
        return connection

    async def exchange(
        self, method: str, body: bytes, headers: Mapping[str, str], *, again: bool
    ) -> UpstreamConnection:
        """Send one request; the connection, with the head of its answer in. `release` it.

        `again`: whether the request may be repeated on a fresh connection when an idle one turns
        out to be dead. A write may not: it could have been done.
        """
        while True:
            connection = self.pool.pop() if self.pool else await self.connect()
            connection.idle = False
            stale = connection.used
            try:
                await self.send(connection, method, body, headers)
                return connection
            except UpstreamError:
                connection.transport.abort()
                if not (stale and again) or connection.incoming.rest:
                    raise
            except BaseException:
                connection.transport.abort()
                raise

    async def begin(self, method: str, path: str, headers: Mapping[str, str]) -> UpstreamConnection:
        """A connection of its own with the head of a request sent; the body is for the caller."""
        import base64

        connection = await self.connect()
        connection.incoming.max_body = MAX_PACK
        user = f"x-access-token:{await self.token.fresh()}"
        basic = base64.b64encode(user.encode()).decode()
        lines = [f"{method} {self.path.rstrip('/')}{path} HTTP/1.1", *self.fixed]
        lines += [f"{name}: {value}" for name, value in headers.items() if value]
        lines += [f"Authorization: Basic {basic}", "Connection: close"]
        connection.set_deadline(self.timeout)
        connection.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        return connection

    async def send(
        self, connection: UpstreamConnection, method: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        lines = [f"{method} {self.path} HTTP/1.1", *self.fixed]
        lines += [f"{name}: {value}" for name, value in headers.items() if value]
        lines.append(f"Authorization: Bearer {await self.token.fresh()}")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        connection.set_deadline(self.timeout)
        connection.transport.write(head + body)
        while connection.incoming.start is None:
            await connection.more()

    async def receive(
        self, connection: UpstreamConnection, client: Client | None, enough: int = MAX_ANSWER
    ) -> None:
        """Wait for the body of an answer, or `enough` of it; counted as held by the client."""
        incoming = connection.incoming
        while not incoming.complete and len(incoming.body) <= enough:
            connection.set_deadline(self.timeout)
            await connection.more()
            if client:
                client.hold(len(incoming.body))


def parse_upstream(url: str, option: str) -> tuple[bool, str, int, str]:
    """(TLS, host, port, path). https, or http to loopback; no user, query or fragment.

    `option`: what is wrong when the URL is.
    """
    match = re.fullmatch(
        r"(https?)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(?::([0-9]{1,5}))?(/[!-~]*)?", url
    )
    if not match or re.search(r"[?#%\\]|/\.", match[4] or ""):
        raise ProxyError(f"{option} is not an address like https://HOST[:PORT]/PATH")
    secure = match[1] == "https"
    if not secure and match[2].lower() not in ("127.0.0.1", "localhost", "[::1]"):
        raise ProxyError(f"{option} must be https: the token would go over the network in clear")
    port = int(match[3] or (443 if secure else 80))
    return secure, match[2].strip("[]").lower(), port, match[4] or "/"


class Client(Connection):
    """A connection of the VM's: one request at a time, each checked anew."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__(proxy.clients)
        self.proxy = proxy
        self.incoming = self.next_request()
        self.later = bytearray()  # received while a request was served
        self.size = self.held = 0  # bytes, of MAX_HELD
        self.begun = 0  # bytes of a push that are read and not passed on
        self.task: asyncio.Task[None] | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.streaming = False
        self.last = False  # close after this answer

    def next_request(self) -> Incoming:
        return Incoming(request=True, max_body=MAX_REQUEST)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.set_deadline(IDLE_SECONDS)
        if len(self.all) > MAX_CLIENTS:
            self.last = True
            self.answer(503, error_message(None, INVALID_REQUEST, "too many clients"))

    def data_received(self, data: bytes) -> None:
        if self.task and self.incoming.complete:
            self.keep_for_later(data)
            return
        if not self.incoming.rest and not self.incoming.start:
            self.set_deadline(REQUEST_SECONDS)
        incoming = self.incoming
        known = incoming.start
        try:
            incoming.feed(data)
            is_git = bool(incoming.start and incoming.start[1].startswith(GIT))
            self.hold(self.begun + len(incoming.body) if is_git else incoming.size)
            if incoming.start and not known:
                check_request(incoming, self.proxy.hosts, self.proxy.secret)
                if not incoming.complete and incoming.headers.get("expect"):
                    self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        except ProtocolError as error:
            self.last = True
            self.refuse(error)
            return
        if self.task:  # which takes the body as it comes
            self.deadline = float("inf")
            if not self.wake() and len(incoming.body) > PAUSE_AT:
                self.transport.pause_reading()
        elif incoming.complete or is_git:
            self.deadline = float("inf")
            self.last = incoming.headers.get("connection", "").lower() == "close"
            self.task = asyncio.ensure_future(self.serve(incoming))

    async def serve(self, request: Incoming) -> None:
        try:
            await self.proxy.handle(self, request)
        except ProtocolError as error:
            self.refuse(error)
        except Exception as error:
            log(f"a fault of the proxy: {type(error).__name__}")  # no text: it may hold a value
            self.transport.abort()
        if self.closed or self.transport.is_closing():
            return
        await self.drain()  # no next request before the answer to this one is read
        self.task = None
        self.streaming = False
        self.set_deadline(IDLE_SECONDS)
        self.incoming = self.next_request()
        later, self.later = bytes(request.rest + self.later), bytearray()
        self.hold(0)
        if later:
            self.data_received(later)

    def wake(self) -> bool:
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)
            return True
        return False

    async def more(self) -> None:
        """Wait for more of a body that is passed on as it comes."""
        self.transport.resume_reading()
        self.set_deadline(STALL_SECONDS)
        self.waiter = asyncio.get_running_loop().create_future()
        await self.waiter
        self.deadline = float("inf")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.proxy.held -= self.held
        self.held = 0
        if self.task:
            self.task.cancel()

    def hold(self, size: int) -> None:
        """Count what is held for this client: of a request or an answer, and what came after it.

        ProtocolError when all clients together have too much.
        """
        if self.closed:
            return
        self.size = size
        held = size + len(self.incoming.rest) + len(self.later)
        self.proxy.held += held - self.held
        self.held = held
        if held and self.proxy.held > MAX_HELD:
            raise ProtocolError("too much is under way at once: try again", 503, UPSTREAM_FAILED)

    def keep_for_later(self, data: bytes) -> None:
        """A request sent before the last one is answered waits, but not megabytes of them.

        Reading goes on all the same: nothing else tells that the client has gone.
        """
        self.later += data
        try:
            self.hold(self.size)
        except ProtocolError:
            self.transport.abort()
        if len(self.later) > HIGH_WATER:
            self.transport.abort()

    def refuse(self, error: ProtocolError) -> None:
        """Say what is wrong with what came."""
        self.proxy.record("", "", "refuse", str(error))
        if self.streaming:
            self.transport.abort()
            return
        allow = ("Allow: POST, GET, DELETE",) if error.status == 405 else ()
        self.answer(error.status, error_message(None, error.code, str(error)), *allow)

    def write(self, data: Bytes) -> None:
        if not self.closed:
            self.transport.write(data)

    def answer(self, status: int, message: Object, *headers: str) -> None:
        self.answer_bytes(status, dumps(message), *headers)

    def answer_bytes(self, status: int, body: Bytes, *headers: str, kind: str = JSON_TYPE) -> None:
        if self.last:
            headers = (*headers, "Connection: close")
        head = answer_head(status, len(body), *headers, kind=kind)
        if len(body) > HIGH_WATER:
            self.write(head)  # rather than to copy the body once more
            self.write(body)
        else:
            self.write(head + body)
        self.end()

    def start_stream(self, *headers: str, kind: str = EVENT_STREAM) -> None:
        if not self.streaming:
            self.streaming = True
            closing = ("Connection: close",) if self.last else ()
            kinds = (f"Content-Type: {kind}", *STREAM_HEAD, *closing)
            self.write(response_head(200, *kinds, *headers))

    def end_stream(self) -> None:
        self.write(b"0\r\n\r\n")
        self.end()

    def end(self) -> None:
        if self.last:
            self.set_deadline(STALL_SECONDS)  # to read what was written
            self.transport.close()

    async def drain(self) -> None:
        """Wait until the client has read what was written, for a while."""
        if self.room:
            self.set_deadline(STALL_SECONDS)
            await self.room
            self.deadline = float("inf")


# --- shell: the proxy ---


class Proxy:
    """Joins the parts: what a client sends is judged, sent on, and its answer checked."""

    def __init__(
        self, scope: Scope, policy: Policy, upstream: Upstream, secret: str, audit: Audit,
        git: Upstream | None = None,
    ) -> None:  # fmt: skip
        self.git = git
        self.questions: Questions | None = None  # with --confirm-writes
        self.scope = scope
        self.policy = policy
        self.upstream = upstream
        self.secret = secret.encode()
        self.audit = audit
        self.hosts: set[str] = set(LOOPBACK)
        self.clients: set[Connection] = set()
        self.held = 0  # bytes, by all clients
        # Mcp-Session-Id -> ids of the upstream's questions that it has to answer. "" is no session.
        self.sessions: collections.OrderedDict[str, set[Json]] = collections.OrderedDict(
            {"": set()}
        )
        self.writes: collections.deque[float] = collections.deque()
        self.listed: tuple[Bytes, Bytes] = (
            b"",
            b"",
        )  # an answer to tools/list, and what it was narrowed to
        self.repository_id = 0
        self.defaults: frozenset[str] = frozenset()
        self.moved = False  # the name now belongs to another repository
        self.asked_at = float("-inf")

    def connections(self) -> list[Connection]:
        git = self.git.connections if self.git else ()
        return [*self.clients, *self.upstream.connections, *git]

    async def handle(self, client: Client, request: Incoming) -> None:
        method, target, _ = request.start or ("", "", "")
        if target.startswith(GIT):
            return await self.serve_git(client, request, method, target)
        session = request.headers.get("mcp-session-id", "")
        try:
            if method == "POST":
                await self.post(client, request, session)
            else:
                self.asked(session)
                await self.get_or_delete(client, method, request, session)
        except UpstreamError as error:
            self.record(method, "", "failed", str(error))
            reason = f"GitHub's MCP server cannot be used: {error}"
            if client.streaming:
                client.last = True
                client.end_stream()
            else:
                client.answer(502, error_message(None, UPSTREAM_FAILED, reason))

    def asked(self, session: str) -> set[Json]:
        """What a session has been asked and not answered; ProtocolError when it is no session."""
        if session not in self.sessions:
            reason = "the session is not known here: initialize anew"
            raise ProtocolError(reason, 404, SESSION_GONE)
        return self.sessions[session]

    async def post(self, client: Client, request: Incoming, session: str) -> None:
        data = request.take()
        message = parse_message(data)
        if message.get("method") == "initialize":
            session = ""  # a stale one: this begins a new one
        self.asked(session)
        if message.get("method") == "tools/call":
            await self.know_repository(wait=False)
            if writes_branch(message, self.policy):
                message = {}  # as a tree it is many times as large: it is not held while waiting
                await self.know_repository(wait=True)
                message = parse_message(data)
        modern = is_modern(message)
        if modern:
            check_mirrored(request.headers, message)
        reason = ""
        tool, about = self.question(message, session)
        if tool and self.questions:
            message = {}
            reason = await self.questions.ask(tool, about)
            message = parse_message(data)
        del data
        refuse = Refuse(reason, tool=tool)
        verdict = self.recorded(message, refuse) if reason else self.judge(message, session)
        if isinstance(verdict, Refuse):
            return client.answer(*refusal_message(message, verdict))
        headers = {**self.upstream.headers, "Accept": BOTH, "Mcp-Session-Id": session}
        if modern:
            headers.update(mirror_headers(request.headers, verdict.message))
        else:
            headers["MCP-Protocol-Version"] = legacy_version(request.headers)
        body = dumps(verdict.message)
        client.hold(len(body))  # \u0080 is three times as long as it came
        message, verdict = {}, without_arguments(verdict)  # megabytes, maybe: not held any longer
        try:
            await self.forward(client, verdict, body, headers, session)
        except UpstreamError as error:
            if "id" not in verdict.message or "method" not in verdict.message:
                raise
            lost = verdict.write and isinstance(error, AnswerLost)
            method, became = verdict.message["method"], "unknown" if lost else "failed"
            self.record(method, verdict.tool, became, str(error), verdict.target)
            self.fail(client, verdict, f"GitHub's MCP server cannot be used: {error}")

    def fail(self, client: Client, forward: Forward, reason: str) -> None:
        """Answer a request with an error, in the stream if it has begun."""
        error = error_message(forward.message["id"], UPSTREAM_FAILED, reason)
        if client.streaming:
            client.write(chunk(b"event: message\ndata: " + dumps(error) + b"\n\n"))
            client.end_stream()
        else:
            client.answer(200, error)

    def question(self, message: Object, session: str) -> tuple[str, str]:
        """(tool, its arguments) of a write that the host's user has to allow, else ("", "")."""
        if not self.questions or self.moved:
            return "", ""
        seen = Seen(self.recent_writes(), self.defaults, self.asked(session))
        verdict = decide(self.scope, self.policy, message, seen)
        if isinstance(verdict, Refuse) or not verdict.write:
            return "", ""
        return verdict.tool, question_text(verdict.message)

    def judge(self, message: Object, session: str) -> Verdict:
        """`decide` with what it must know, its verdict recorded and counted."""
        if self.moved and message.get("method") == "tools/call":
            reason = f"the name {self.scope} has come to mean another repository: nothing passes"
            return self.recorded(message, Refuse(reason, tool="any"))
        asked = self.asked(session)  # it may have ended meanwhile
        seen = Seen(self.recent_writes(), self.defaults, asked)
        verdict = decide(self.scope, self.policy, message, seen)
        if isinstance(verdict, Forward):
            if verdict.write:
                self.writes.append(time.monotonic())
            if "method" not in message:
                asked.discard(message["id"])
        return self.recorded(message, verdict)

    def recent_writes(self) -> int:
        """How many there were in the last hour."""
        while self.writes and self.writes[0] < time.monotonic() - 3600:
            self.writes.popleft()
        return len(self.writes)

    def recorded(self, message: Object, verdict: Verdict) -> Verdict:
        """The verdict, once it is in the audit: what cannot be recorded does not pass."""
        method = str(message.get("method", "answer"))
        if isinstance(verdict, Refuse):
            self.record(method, verdict.tool, "refuse", verdict.reason, asked_for(message))
        elif method != "ping" and not self.record(
            method, verdict.tool, "forward", "", target_of(verdict.message)
        ):
            return Refuse(UNRECORDED, UPSTREAM_FAILED, verdict.tool)
        return verdict

    def record(
        self, method: str, tool: str, verdict: str, reason: str, target: Object | None = None
    ) -> bool:
        return self.audit.write(method[:64], tool[:64], verdict, reason, target or {})

    async def forward(
        self, client: Client, forward: Forward, body: bytes, headers: Mapping[str, str],
        session: str,
    ) -> None:  # fmt: skip
        connection = await self.exchange("POST", body, headers, again=not forward.write)
        answered = False
        try:
            answered = await self.relay(client, connection, forward, session)
        finally:
            connection.release(answered=answered)

    async def exchange(
        self, method: str, body: bytes, headers: Mapping[str, str], *, again: bool
    ) -> UpstreamConnection:
        """One exchange; after a 401, once more with a new token (it was not carried out)."""
        connection = await self.upstream.exchange(method, body, headers, again=again)
        if status_of(connection) == 401 and self.upstream.token.command:
            connection.transport.abort()
            await asyncio.shield(self.upstream.token.renew())
            connection = await self.upstream.exchange(method, body, headers, again=again)
        return connection

    async def get_or_delete(
        self, client: Client, method: str, request: Incoming, session: str
    ) -> None:
        headers = {
            **self.upstream.headers,
            "Accept": "text/event-stream" if method == "GET" else "",
            "Mcp-Session-Id": session,
            "MCP-Protocol-Version": legacy_version(request.headers),
            "Last-Event-ID": safe_header(request.headers.get("last-event-id", "")),
        }
        if not self.record(method, "", "forward", ""):
            raise ProtocolError(UNRECORDED, 503, UPSTREAM_FAILED)
        connection = await self.exchange(method, b"", headers, again=True)
        answered = False
        try:
            answered = await self.relay(client, connection, None, session)
        finally:
            connection.release(answered=answered)
        if method == "DELETE" and session:
            self.sessions.pop(session, None)

    async def relay(
        self, client: Client, connection: UpstreamConnection, forward: Forward | None, session: str
    ) -> bool:
        """Give the upstream's answer to the client; True when the exchange is over."""
        incoming = connection.incoming
        status = status_of(connection)
        check_status(status, forward)
        headers = self.session_headers(forward, incoming)
        if status == 200 and "text/event-stream" in incoming.headers.get("content-type", ""):
            return await self.relay_events(client, connection, forward, session, headers)
        await self.upstream.receive(connection, client, enough=HIGH_WATER)
        if status == 200 and not incoming.complete and is_plain_answer(incoming.body, forward):
            await self.relay_large(client, connection)
            return True
        await self.upstream.receive(connection, client)
        body = incoming.take()
        request = forward is not None and "id" in forward.message and "method" in forward.message
        if status == 200 and forward and request:
            out, final = self.convert(body, forward, session)
            if not final:
                raise AnswerLost("its answer does not belong to the request")
            client.answer_bytes(200, out, *headers)
        elif status < 300:
            client.answer_bytes(status if status in (202, 204) else 200, b"")
        else:
            allow = ("Allow: POST",) if status == 405 else ()
            if forward and forward.write:
                self.record("tools/call", forward.tool, "failed", f"HTTP {status}", forward.target)
            client.answer(status, relayed_error(body, forward, self.redact), *allow)
        return True

    async def relay_large(self, client: Client, connection: UpstreamConnection) -> None:
        """Pass on megabytes that nothing needs to be taken from, as they come.

        What a secret could begin in waits for more; where one is seen, all waits for the end.
        """
        incoming = connection.incoming
        sized = "content-length" in incoming.headers  # it stays so long: see redact
        if sized:
            client.streaming = True
            client.write(answer_head(200, incoming.size))
        else:
            client.start_stream(kind=JSON_TYPE)
        held = bytearray()
        clean = True
        while True:
            over = incoming.complete
            held += incoming.take()
            if over:
                break
            clean = clean and self.redact(held) == held
            if clean and len(held) > MAX_TOKEN:
                client.write(held[:-MAX_TOKEN] if sized else chunk(held[:-MAX_TOKEN]))
                del held[:-MAX_TOKEN]
            client.hold(len(held))
            await client.drain()
            if incoming.body or incoming.complete:
                continue  # it came while the client read
            connection.set_deadline(self.upstream.timeout)
            try:
                await connection.more()
            except UpstreamError as error:
                self.record("", "", "failed", str(error))
                return client.transport.abort()  # half an answer is none
        held = bytearray(self.redact(held))
        client.write(held if sized else chunk(held))
        return client.end() if sized else client.end_stream()

    async def serve_git(self, client: Client, request: Incoming, method: str, target: str) -> None:
        """A fetch, or a push that is within the policy, passed on both ways as it comes."""
        client.last = True  # the rest of a body that is not wanted is not read
        service, push = "", Push()
        try:
            if self.git is None:
                raise GitRefusal("git is not served here (--git)")
            await self.know_repository(wait=False)
            if self.moved:
                raise GitRefusal(f"the name {self.scope} has come to mean another repository")
            service = git_service(self.scope, self.policy, method, target)
            lengths = request.headers.keys() & {"content-length", "transfer-encoding"}
            if method == "GET" and lengths:
                raise GitRefusal("a GET has no body")
            if service == "git-receive-pack" and method == "POST":
                push, refused = await self.read_push(client, request)
                if refused is not None:
                    return client.answer_bytes(200, refused, kind=f"application/x-{service}-result")
            elif not self.record("git", service, "forward", ""):
                raise GitRefusal(UNRECORDED)
            await self.relay_git(client, request, service, push)
        except (GitRefusal, UpstreamError) as error:
            refused_here = isinstance(error, GitRefusal)
            lost = bool(push.refs) and isinstance(error, AnswerLost)
            verdict = "refuse" if refused_here else "unknown" if lost else "failed"
            about: list[Object] = [{"ref": ref} for ref in push.refs] or [{"path": target[:200]}]
            for one in about:
                self.record("git", service, verdict, str(error), one)
            if client.streaming:
                return client.transport.abort()
            text = f"{'refused' if refused_here else 'GitHub'}: {error}\n"
            client.answer_bytes(403 if refused_here else 502, text.encode(), kind="text/plain")
        return None

    async def read_push(self, client: Client, request: Incoming) -> tuple[Push, bytes | None]:
        """(the push as far as it is read, the answer of a refusal); a refused one is read whole."""
        if "content-encoding" in request.headers:
            raise GitRefusal("a push must not be compressed as a whole")
        begun = bytearray()
        parsed = None
        while parsed is None:
            begun += request.take()
            client.begun = len(begun)
            parsed = parse_commands(begun)
            if parsed is None and (request.complete or len(begun) > MAX_COMMANDS):
                raise GitRefusal("this push has no end of its commands")
            if parsed is None:
                await client.more()
        commands, capabilities, _ = parsed
        push = Push(bytes(begun), tuple(c.ref for c in commands), "side-band" in capabilities)
        if not commands:  # git asks so whether it may, before it sends much
            if begun != b"0000" or not request.complete:
                raise GitRefusal("this push has no commands")
            return push, None
        await self.know_repository(wait=True)
        refusals = self.refused_refs(commands)
        if self.questions and not refusals:
            moves = (f"{c.ref} {c.old[:12]}..{c.new[:12]}" for c in commands)
            reason = await self.questions.ask("git push", ", ".join(moves))
            refusals = dict.fromkeys(push.refs, reason) if reason else self.refused_refs(commands)
        if not refusals:
            for ref in push.refs:
                if not self.record("git", "git-receive-pack", "forward", "", {"ref": ref}):
                    raise GitRefusal(UNRECORDED)
            self.writes.extend([time.monotonic()] * len(commands))
            return push, None
        refs = " ".join(push.refs)[:1000]
        why = "; ".join(f"{quoted(ref)}: {why}" for ref, why in refusals.items())[:1000]
        self.record("git", "git-receive-pack", "refuse", why, {"ref": refs})
        while not request.complete:
            request.take()
            await client.more()
        request.take()
        return push, push_report(commands, refusals, capabilities)

    def refused_refs(self, commands: list[Command]) -> dict[str, str]:
        """`judge_push` with what is only known now."""
        if self.moved:
            raise GitRefusal(f"the name {self.scope} has come to mean another repository")
        if self.recent_writes() + len(commands) > self.policy.writes_per_hour:
            return {c.ref: "too many writes in the last hour" for c in commands}
        return judge_push(self.scope, self.policy, commands, Seen(defaults=self.defaults))

    async def relay_git(self, client: Client, request: Incoming, service: str, push: Push) -> None:
        assert self.git
        sent = request.headers
        length = sent.get("content-length", "")
        method = (request.start or ("",))[0]
        protocol = sent.get("git-protocol", "")
        headers = {
            "Accept": "*/*",
            "Git-Protocol": protocol if GIT_PROTOCOL(protocol) else "",
            "Content-Type": f"application/x-{service}-request" if method == "POST" else "",
            "Content-Encoding": "gzip" if sent.get("content-encoding") == "gzip" else "",
            "Content-Length": length if method == "POST" else "",
            "Transfer-Encoding": "chunked" if method == "POST" and not length else "",
        }
        asked = f"info/refs?service={service}" if method == "GET" else service
        connection = await self.git.begin(method, f"/{self.scope}.git/{asked}", headers)
        if method == "GET" and self.git.token.command:
            while connection.incoming.start is None:
                await connection.more()
            if status_of(connection) == 401:  # each fetch and push begins with a GET
                connection.transport.abort()
                await asyncio.shield(self.git.token.renew())
                connection = await self.git.begin(method, f"/{self.scope}.git/{asked}", headers)
        try:
            if method == "POST":
                await self.send_body(client, request, connection, push.begun, chunked=not length)
            await self.answer_git(client, connection, service, push)
        finally:
            connection.transport.abort()

    async def send_body(
        self, client: Client, request: Incoming, connection: UpstreamConnection, begun: bytes,
        *, chunked: bool,
    ) -> None:  # fmt: skip
        """Pass on a request's body, until it ends or the upstream has answered."""
        while not connection.incoming.start and not connection.closed:
            over = request.complete
            data, begun = begun + request.take(), b""
            client.begun = 0
            if data:
                connection.transport.write(chunk(data) if chunked else data)
            if over:
                connection.transport.write(b"0\r\n\r\n" if chunked else b"")
                return
            client.hold(0)
            connection.set_deadline(self.git.timeout if self.git else 0)
            if connection.room:
                await connection.room
            if not request.body and not request.complete:
                await client.more()

    async def answer_git(
        self, client: Client, connection: UpstreamConnection, service: str, push: Push
    ) -> None:
        incoming = connection.incoming
        while incoming.start is None:
            await connection.more()
        status = status_of(connection)
        check_status(status, None)
        if status != 200:
            raise UpstreamError(f"HTTP {status}" + (", is it there?" if status == 404 else ""))
        kind = incoming.headers.get("content-type", "")
        if not kind.startswith(f"application/x-{service}-"):
            raise UpstreamError("its answer is not git's")
        client.start_stream(kind=kind.partition(";")[0])
        report = b""  # the beginning of what became of a push
        while True:
            over = incoming.complete
            data = incoming.take()
            if push.refs and len(report) < HIGH_WATER:
                report += data
            if data:
                client.write(chunk(data))
            if over:
                for ref, why in pushed_refs(report, push):
                    verdict = "failed" if why else "done"
                    self.record("git", service, verdict, why, {"ref": ref})
                return client.end_stream()
            await client.drain()
            connection.set_deadline(self.upstream.timeout)
            if not incoming.body and not incoming.complete:
                await connection.more()

    def session_headers(self, forward: Forward | None, incoming: Incoming) -> tuple[str, ...]:
        """The header for a session that the upstream has begun; the session is remembered."""
        session = safe_header(incoming.headers.get("mcp-session-id", ""))
        if not session or not forward or forward.message.get("method") != "initialize":
            return ()
        self.sessions[session] = set()
        while len(self.sessions) > MAX_SESSIONS:
            oldest = next(name for name in self.sessions if name)
            del self.sessions[oldest]
        return (f"Mcp-Session-Id: {session}",)

    async def relay_events(
        self, client: Client, connection: UpstreamConnection, forward: Forward | None, session: str,
        headers: tuple[str, ...],
    ) -> bool:  # fmt: skip
        """Pass a stream on, event by event. An answer that comes first goes as plain JSON: an SSE
        event of more than 1 MiB is refused by the Python SDK 2.x."""
        incoming = connection.incoming
        events = Events()
        resumable = False  # the client may come back for the rest of a stream with event ids
        if forward is None:  # of a GET: no answer passes, since what it answers is not known here
            client.start_stream(*headers)
        over = False
        while not over:
            over = incoming.complete
            for event in events.feed(incoming.take()):
                data: Bytes = event_data(event)
                resumable = resumable or event.startswith(b"id:") or b"\nid:" in event
                out, final = self.convert(data, forward, session) if data else (b"", False)
                if final and not client.streaming:
                    client.answer_bytes(200, out, *headers)
                    return True
                if out != data:
                    event = event_with(event, out) if out else b""
                if out or (not data and (client.streaming or resumable)):
                    client.start_stream(*headers)
                    client.write(chunk(event))
                if final:
                    client.end_stream()
                    return True
            client.hold(len(events.buffer))
            await client.drain()
            if not over and not incoming.body and not incoming.complete:
                connection.set_deadline(self.upstream.timeout if forward else float("inf"))
                await connection.more()
        if forward and not resumable:
            raise AnswerLost("it ended the stream without an answer")
        client.start_stream(*headers)
        client.end_stream()
        return True

    def convert(self, data: Bytes, forward: Forward | None, session: str) -> tuple[Bytes, bool]:
        """(what the client gets for one message of the upstream, whether that is the answer).

        Nothing (b"") for what does not pass.
        """
        key: Bytes = b""
        if forward and forward.message.get("method") == "tools/list":
            ours = b'"id":' + dumps(forward.message["id"])
            key = data.replace(ours, b'"id":0', 1)
            if key == self.listed[0]:
                return self.listed[1].replace(b'"id":0', ours, 1), True
        if len(data) > HIGH_WATER and is_plain_answer(data, forward):
            return self.redact(data), True  # megabytes are not parsed for nothing
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            raise AnswerLost("its answer is not JSON") from None
        kind = kind_of(message, forward)
        if kind == "question":
            asked = self.asked(session)
            if len(asked) >= 100:
                return b"", False
            asked.add(message["id"])
        elif kind == "answer" and forward:
            checked = self.checked(forward, message)
            if key:
                narrowed = {"jsonrpc": "2.0", "id": 0, "result": checked.get("result")}
                if "result" in checked:
                    self.listed = (key, self.redact(dumps(narrowed)))
            if checked is not message:
                data = dumps(checked)
        elif not kind:
            return b"", False
        return self.redact(data), kind == "answer"

    def checked(self, forward: Forward, message: Object) -> Object:
        """The upstream's answer as the VM gets it; whatever is wrong with it, it is not shown."""
        if forward.write:
            verdict, target = outcome(message)
            reason = "GitHub's server answered with an error" if verdict == "failed" else ""
            target = {**(forward.target or {}), **target}
            self.record("tools/call", forward.tool, verdict, reason, target)
        try:
            return answer(self.scope, self.policy, forward, message, self.defaults)
        except Exception as error:
            reason = str(error) if isinstance(error, Refusal) else "the answer is malformed"
        self.record(forward.message["method"], forward.tool, "withheld", reason)
        return refusal_message(forward.message, Refuse(reason, UPSTREAM_FAILED, forward.tool))[1]

    def redact(self, data: Bytes) -> Bytes:
        token = self.upstream.token
        return redact(data, token.value.encode(), token.earlier.encode())

    async def know_repository(self, *, wait: bool) -> None:
        """Learn the repository's id and default branch, anew every minute that it is used."""
        now = time.monotonic()
        if now - self.asked_at > (KNOWN_SECONDS if self.defaults else 5):
            self.asked_at = now
            self.learning = asyncio.ensure_future(self.learn_repository())
        if wait:
            await asyncio.shield(self.learning)

    async def learn_repository(self) -> None:
        found: set[str] = set()  # what a search finds may be older than what git says: both
        for learn in (self.learn_from_search, self.learn_from_git):
            try:
                found.add(await learn())
            except (UpstreamError, ProtocolError) as error:
                log(f"{self.upstream.host}: {error}")
            except Exception:  # whatever the upstream made of its answer: then it is not known
                if self.audit.debug:
                    log(f"the upstream did not say which repository {self.scope} is")
        names = {name for name in found if name and is_plain(name, 255)}
        self.defaults = frozenset(names) or self.defaults

    async def learn_from_search(self) -> str:
        """Forks are left out of a search that does not ask for them."""
        query = {"query": f"repo:{self.scope} fork:true", "perPage": 5}
        result = await self.own_call("search_repositories", query)
        for item in json.loads(result["content"][0]["text"])["items"]:
            if self.scope.is_named(item["full_name"]):
                self.found(int(item["id"]))
                return str(item.get("default_branch") or "")
        return ""

    async def learn_from_git(self) -> str:
        """A search does not find all repositories; HEAD is the default branch (gitprotocol-v2)."""
        if self.git is None:
            return ""
        arguments = (b"symrefs\n", b"ref-prefix HEAD\n")
        body = pkt(b"command=ls-refs\n") + b"0001" + b"".join(map(pkt, arguments)) + b"0000"
        headers = {
            "Git-Protocol": "version=2",
            "Content-Type": "application/x-git-upload-pack-request",
            "Content-Length": str(len(body)),
        }
        connection = await self.git.begin("POST", f"/{self.scope}.git/git-upload-pack", headers)
        try:
            connection.transport.write(body)
            await self.git.receive(connection, None)
            check_status(status_of(connection), None)
            head = re.search(
                rb" HEAD symref-target:refs/heads/([^\n ]+)", connection.incoming.take()
            )
            return head[1].decode() if head else ""
        finally:
            connection.transport.abort()

    def found(self, id: int) -> None:
        self.moved = bool(self.repository_id and self.repository_id != id)
        self.repository_id = self.repository_id or id

    async def own_call(self, tool: str, arguments: Object) -> Object:
        headers = {"X-MCP-Toolsets": "repos", "X-MCP-Readonly": "true"}
        session = await self.own_request("initialize", OWN_INITIALIZE, headers)
        headers["Mcp-Session-Id"] = str(session.get("session", ""))
        params = {"name": tool, "arguments": arguments}
        return await self.own_request("tools/call", params, headers)

    async def own_request(self, method: str, params: Object, headers: Mapping[str, str]) -> Object:
        """A request of the proxy's own; its result, and the session's id as "session"."""
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        headers = {
            "Accept": BOTH,
            "MCP-Protocol-Version": "" if method == "initialize" else OWN_VERSION,
            **headers,
        }
        connection = await self.exchange("POST", dumps(message), headers, again=True)
        try:
            check_status(status_of(connection), Forward(message))
            await self.upstream.receive(connection, None)
            body = connection.incoming.take()
            session = safe_header(connection.incoming.headers.get("mcp-session-id", ""))
        finally:
            connection.release()
        if body.startswith((b"event:", b"data:", b"id:", b":")):
            found = [event_data(event) for event in Events().feed(body)]
            body = next((data for data in found if b'"result"' in data), b"null")
        result = json.loads(body)["result"]
        return {**result, "session": session}


BOTH = "application/json, text/event-stream"
UNRECORDED = "the proxy cannot write its audit file: the host's user has to look at it"
OWN_VERSION = "2025-06-18"
OWN_INITIALIZE: Object = {
    "protocolVersion": OWN_VERSION,
    "capabilities": {},
    "clientInfo": {"name": "agent-vm-github-mcp-proxy", "version": __version__},
}


def status_of(connection: UpstreamConnection) -> int:
    status = (connection.incoming.start or ("", "0", ""))[1]
    return int(status) if STATUS(status) else 502


def check_status(status: int, forward: Forward | None) -> None:
    """UpstreamError for the answers that are between the proxy and the upstream."""
    if 300 <= status < 400:
        raise UpstreamError("it redirects elsewhere, which is not followed")
    if status in (401, 403):
        raise UpstreamError(f"it does not accept the host's token (HTTP {status})")
    if status == 429:
        raise UpstreamError("its rate limit is reached (HTTP 429): try again in some minutes")
    if status >= 500:
        raise AnswerLost(f"it answered HTTP {status}")


def relayed_error(body: Bytes, forward: Forward | None, clean: Callable[[Bytes], Bytes]) -> Object:
    """An upstream's 4xx as JSON-RPC: clients tell the protocol's era from its body."""
    id = forward.message.get("id") if forward else None
    try:
        error = json.loads(clean(body))["error"]
        made = {"code": int(error["code"]), "message": str(error["message"])[:1000]}
        if "data" in error:
            made["data"] = error["data"]
        return {"jsonrpc": "2.0", "id": id, "error": made}
    except (ValueError, KeyError, TypeError, RecursionError):
        return error_message(id, INVALID_REQUEST, "the upstream refused the request")


def safe_header(value: str) -> str:
    return value if VISIBLE(value) else ""


def legacy_version(headers: Mapping[str, str]) -> str:
    value = headers.get("mcp-protocol-version", "")
    if not VERSION_HEADER(value):
        raise ProtocolError("MCP-Protocol-Version is malformed")
    return value


class Questions:
    """Asks whoever started the proxy whether a write may pass, one question at a time.

    On stdout {"id", "tool", "about", "until"}, until: when it lapses, in time.monotonic() seconds,
    which all processes share. On stdin {"id", "refused"}: why not, "" to let it pass.
    """

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.id = 0
        self.answer: asyncio.Future[str] | None = None

    async def ask(self, tool: str, about: str) -> str:
        """Why the write may not pass, "" when it may."""
        if len(about) > MAX_QUESTION:
            return "it names more than one question to the user can show: write less at a time"
        until = time.monotonic() + CONFIRM_SECONDS
        try:
            return await asyncio.wait_for(self.ask_in_turn(tool, about, until), CONFIRM_SECONDS)
        except asyncio.TimeoutError:
            return f"the user did not allow it within {CONFIRM_SECONDS} s"
        except OSError:
            return "nobody is there to allow it"

    async def ask_in_turn(self, tool: str, about: str, until: float) -> str:
        async with self.turn:
            self.id += 1
            self.answer = asyncio.get_running_loop().create_future()
            question = {"id": self.id, "tool": tool, "about": about, "until": until}
            line = json.dumps(question, ensure_ascii=False) + "\n"
            os.write(1, line.encode(errors="replace"))  # less than PIPE_BUF: whole, or not at all
            return await self.answer

    def answered(self, line: bytes) -> None:
        """What came on stdin; anything but an answer to the question that is open is ignored."""
        try:
            answer = json.loads(line)
            known, refused = answer["id"] == self.id, str(answer["refused"])[:200]
        except (ValueError, LookupError, TypeError, RecursionError):
            return
        if known and self.answer and not self.answer.done():
            self.answer.set_result(refused)


MAX_QUESTION = 900  # characters: with what is around them less than PIPE_BUF, 4096 bytes
# Less than the 60 s after which the TypeScript SDK's clients give a call up.
CONFIRM_SECONDS = 50


# --- shell: the audit ---

TARGETS = (
    "method issue_number pullNumber discussionNumber commentId comment_id branch from_branch path "
    "ref sha tag head base name state"
).split()


def target_of(message: Object) -> Object:
    """What a call is about: numbers, names and paths; never text."""
    arguments = (message.get("params") or {}).get("arguments") or {}
    target = {key: arguments[key] for key in TARGETS if key in arguments}
    if "files" in arguments:
        target["paths"] = [item["path"] for item in arguments["files"]]
    return target


TEXTS = {"body", "content", "message", "commit_message", "description", "rationale"}


def asked_for(message: Object) -> Object:
    """The target of a call that is refused, as far as it is of short and simple values."""
    params = message.get("params")
    arguments = params.get("arguments") if isinstance(params, dict) else None
    if not isinstance(arguments, dict):
        return {}
    return {key: value for key in TARGETS for value in [arguments.get(key)]
            if isinstance(value, (int, str)) and len(str(value)) <= 200}  # fmt: skip


def shortened(value: Json) -> Json:
    """What a guest may make long, for the audit."""
    if isinstance(value, list):
        return [shortened(item) for item in value[:100]]
    return value[:299] + "…" if isinstance(value, str) and len(value) > 300 else value


def question_text(message: Object) -> str:
    """A call's arguments for the user who has to allow it: all in full but long texts.

    The shortest come first, so that no text hides what else is asked for.
    """
    target = target_of(message)
    arguments = {**target, **message["params"]["arguments"]}
    for key in ("owner", "repo", "files"):  # the one repository; the files are there by their paths
        arguments.pop(key, None)
    for key in arguments.keys() & TEXTS:
        text = str(arguments[key])
        if len(text) > 120:
            arguments[key] = f"{text[:100]}… (+{len(text) - 100} characters)"
    shown = sorted(arguments.items(), key=lambda item: (item[0] not in target, len(str(item[1]))))
    return json.dumps(dict(shown), ensure_ascii=False)


class Audit:
    """Every decision: a line of JSON in the audit file, and on stderr when it is worth one."""

    def __init__(self, path: str, debug: bool) -> None:
        self.debug = debug
        self.fd = -1
        self.torn = False  # the last line is there in part
        self.minute, self.refused = 0.0, 0  # its beginning, the refusals in it
        if path:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                self.fd = os.open(path, flags, 0o600)
                os.fchmod(self.fd, 0o600)
            except OSError as error:
                raise ProxyError(f"cannot write the audit file {path}: {error.strerror}") from None

    def write(self, method: str, tool: str, verdict: str, reason: str, target: Object) -> bool:
        """False when the file cannot take it: a disk is full, say."""
        if verdict == "refuse":
            self.refused = self.refused + 1 if time.monotonic() < self.minute + 60 else 1
            self.minute = self.minute if self.refused > 1 else time.monotonic()
            if self.refused > MAX_REFUSALS:
                return True
            if self.refused == MAX_REFUSALS:
                tool, target, reason = "", {}, "too many: the next of this minute are left out"
        if not re.fullmatch(r"[\w-]*", tool, re.ASCII):
            tool = "?"  # the guest's word for no tool of ours
        if not re.fullmatch(r"[\w/$-]*", method, re.ASCII):
            method = "?"
        target = {key: shortened(value) for key, value in target.items()}
        if self.debug or verdict not in ("forward", "done"):
            what = " ".join(filter(None, [method, tool, verdict]))
            log(f"{what}: {reason}" if reason else what)
        if self.fd < 0:
            return True
        now = time.time()
        stamp = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        )
        line = {"time": stamp, "method": method, "tool": tool, "verdict": verdict,
                "reason": reason, "target": target}  # fmt: skip
        data = b"\n" * self.torn + redact(dumps(line)) + b"\n"
        try:
            written = os.write(self.fd, data)
        except OSError as error:
            log(f"cannot write the audit file: {error.strerror}")
            return False
        self.torn = written < len(data)  # then the next line has one of its own
        return not self.torn


# --- commands ---


async def serve(proxy: Proxy, options: argparse.Namespace) -> int:
    """Listen until stdin closes (with --exit-with-stdin), SIGTERM or Ctrl-C."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(status: int) -> None:
        if not stopped.done():
            stopped.set_result(status)

    loop.add_signal_handler(signal.SIGTERM, stop, 0)
    loop.add_signal_handler(signal.SIGINT, stop, 130)
    if options.confirm_writes:
        proxy.questions = Questions()
    if options.exit_with_stdin or proxy.questions:
        watch_stdin(loop, stop, proxy.questions)
    try:
        if proxy.upstream.token.command:  # what does not work is said at once
            fresh = asyncio.ensure_future(proxy.upstream.token.fresh())
            either: set[asyncio.Future[Any]] = {fresh, stopped}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return stopped.result()
            fresh.result()
        return await listen(proxy, options, stopped)
    finally:
        end_token_commands()


async def listen(proxy: Proxy, options: argparse.Namespace, stopped: asyncio.Future[int]) -> int:
    """Serve whoever connects until there is a status to stop with."""
    loop = asyncio.get_running_loop()
    address, port = options.listen
    try:
        server = await loop.create_server(lambda: Client(proxy), address, port, backlog=512)
    except OSError as error:
        raise ProxyError(f"cannot listen on {address}:{port}: {error.strerror}", status=1) from None
    proxy.hosts.add(f"[{address}]" if ":" in address else address)
    announce(server.sockets[0].getsockname()[1], options, proxy.policy.readonly)
    gc.freeze()  # the tables stay: no collection has to look at them
    if proxy.questions:
        os.set_blocking(1, False)  # whoever does not read cannot stop the proxy
    await proxy.know_repository(wait=False)
    sweeper = asyncio.ensure_future(sweep(proxy))
    try:
        return await stopped
    finally:
        sweeper.cancel()
        server.close()
        for connection in proxy.connections():
            connection.transport.abort()


def announce(port: int, options: argparse.Namespace, readonly: bool) -> None:
    lines = [str(port)]
    if options.print_secret:
        lines += [options.secret, "read-only" if readonly else "read-write"]
    if not options.secret:
        log("no secret is set: every process and VM that can reach the port can use the token")
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again at its end
        raise ProxyError(f"cannot write to stdout: {error.strerror}", status=1) from None


def watch_stdin(
    loop: asyncio.AbstractEventLoop, stop: Callable[[int], None], questions: Questions | None
) -> None:
    """Stop when stdin is closed: then whoever started this is gone. Its lines are answers."""
    import threading

    def watch() -> None:
        rest = b""
        try:
            while data := os.read(0, 4096):
                *lines, rest = (rest[-4096:] + data).split(b"\n")
                if questions:
                    for line in lines:
                        loop.call_soon_threadsafe(questions.answered, line)
        except OSError:
            pass
        loop.call_soon_threadsafe(stop, 0)

    threading.Thread(target=watch, daemon=True).start()


async def sweep(proxy: Proxy) -> None:
    """Every limit of time is kept here, so that no request needs a timer."""
    while True:
        await asyncio.sleep(1)
        now = time.monotonic()
        for connection in proxy.connections():
            if connection.deadline < now:
                connection.expire()


async def check_upstream(proxy: Proxy) -> int:
    """Print how the upstream's tools differ from the table; 1 when a row of it is concerned."""
    headers = {"X-MCP-Toolsets": "all"}
    session = await proxy.own_request("initialize", OWN_INITIALIZE, headers)
    headers["Mcp-Session-Id"] = session["session"]
    listed = await proxy.own_request("tools/list", {}, headers)
    version = (session.get("serverInfo") or {}).get("version")
    print(f"upstream {version}, table made from {TABLE_MADE_FROM}")
    offered = {
        tool["name"]: set(tool["inputSchema"].get("properties", {})) for tool in listed["tools"]
    }
    print("blocked, not in the table: " + ", ".join(sorted(offered.keys() - TOOLS.keys())))
    print("not offered now: " + ", ".join(sorted(TOOLS.keys() - offered.keys())))
    differs = 0
    for name in sorted(offered.keys() & TOOLS.keys()):
        known = {*TOOLS[name].rules, *(("owner", "repo") if TOOLS[name].scoped else ())}
        for mark, keys in (("+", offered[name] - known), ("-", known - offered[name])):
            for key in sorted(keys):
                differs = 1
                print(f"{mark} {name}: {key}")
    return differs


# --- settings ---


def listen_address(value: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", value)
    if not match or int(match[2]) > 65535:
        raise argparse.ArgumentTypeError(f"{value!r} is not ADDRESS:PORT")
    return match[1].strip("[]"), int(match[2])


def given(value: str) -> str:
    """Not empty: as a shell's unset variable is."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty")
    return value


def seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", value) or not float(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of seconds")
    return float(value)


def read_policy(path: str) -> Policy:
    """The [policy] section of an INI file; what it leaves out keeps its default."""
    import configparser

    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#",))
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
        if not parser.has_section("policy"):
            raise ProxyError(f"{path} has no section [policy]")
        section = dict(parser["policy"])
    except OSError as error:
        raise ProxyError(f"cannot read the policy file {path}: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ProxyError(f"{path} is not an INI file with a section [policy]: {error}") from None
    policy = Policy()
    for key, value in section.items():
        policy = policy._replace(**{key: policy_value(path, key, value)})
    return policy


def policy_value(path: str, key: str, value: str) -> Json:
    words = tuple(re.split(r"[,\s]+", value.strip())) if value.strip() else ()
    if key in ("branches", "deny_paths"):
        return words
    if key == "allow":
        for word in words:
            if word not in ALLOW:
                raise ProxyError(f"{path}: allow = {word}: only {', '.join(ALLOW)} are known")
        return frozenset(words)
    if key == "default_branch":
        return value.strip()
    if key == "readonly" and value.lower() in FLAGS:
        return FLAGS[value.lower()]
    if key == "writes_per_hour" and re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    if key in Policy._fields:
        raise ProxyError(f"{path}: {key} = {value!r:.100} is not a value that it can have")
    known = ", ".join(Policy._fields)
    raise ProxyError(f"{path}: {key} = {value!r} is not a policy setting", f"known: {known}")


FLAGS = {"1": True, "true": True, "yes": True, "on": True,
         "0": False, "false": False, "no": False, "off": False, "": False}  # fmt: skip


def env_flag(name: str, default: str) -> bool:
    value = os.environ.get(name, default).lower()
    if value not in FLAGS:
        raise ProxyError(f"{name} must be 0 or 1")
    return FLAGS[value]


def env_scope() -> Scope:
    owner = os.environ.get("GITHUB_MCP_OWNER", "")
    repo = os.environ.get("GITHUB_MCP_REPO", "")
    for name, value in (("GITHUB_MCP_OWNER", owner), ("GITHUB_MCP_REPO", repo)):
        if not value:
            raise ProxyError(f"{name} is not set", "it names the one repository to serve")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", owner):
        raise ProxyError(f"GITHUB_MCP_OWNER is not a user or an organization: {owner!r}")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", repo) or repo in (".", ".."):
        raise ProxyError(f"GITHUB_MCP_REPO is not a repository's name: {repo!r}")
    return Scope(owner, repo)


def env_names(name: str, default: str) -> str:
    value = os.environ.get(name, default).strip()
    if not re.fullmatch(r"([a-z0-9_-]+(,\s*[a-z0-9_-]+)*)?", value):
        raise ProxyError(f"{name} is not a list of names with commas: {value!r}")
    return value


def env_token(command: str) -> Token:
    value = os.environ.pop("GITHUB_MCP_TOKEN", "").strip()  # out of the children's environment
    if not value and not command:
        raise ProxyError("GITHUB_MCP_TOKEN is not set", "or give --token-command")
    return Token("" if command else value, command)


def read_secret(options: argparse.Namespace) -> str:
    """The secret that requests must carry; "" for none."""
    secret = os.environ.pop("GITHUB_MCP_SECRET", "").strip()
    if options.secret_file:
        try:
            with open(options.secret_file, encoding="ascii") as file:
                secret = file.read(4096).strip()
        except (OSError, UnicodeDecodeError):
            raise ProxyError(f"cannot read the secret from {options.secret_file}") from None
    if options.print_secret:
        import secrets

        return secrets.token_urlsafe(32)
    if (secret or options.secret_file) and not re.fullmatch(r"[!-~]{16,256}", secret):
        raise ProxyError("the secret must have 16 to 256 visible ASCII characters")
    return secret


def upstream_headers(policy: Policy) -> dict[str, str]:
    """The headers that tell GitHub's server what to offer; a second line behind the table."""
    return {
        "X-MCP-Toolsets": env_names("GITHUB_MCP_TOOLSETS", DEFAULT_TOOLSETS),
        "X-MCP-Tools": env_names("GITHUB_MCP_TOOLS", ""),
        "X-MCP-Readonly": "true" if policy.readonly else "",
        "X-MCP-Lockdown": "true" if env_flag("GITHUB_MCP_LOCKDOWN", "1") else "",
    }


EPILOG = """\
environment:
  GITHUB_MCP_TOKEN      GitHub's token (or --token-command)
  GITHUB_MCP_OWNER, GITHUB_MCP_REPO   the repository
  GITHUB_MCP_TOOLSETS   offered by the upstream (default repos,issues,pull_requests,git,labels)
  GITHUB_MCP_TOOLS      single tools besides
  GITHUB_MCP_READONLY   1: no writes (default 0)
  GITHUB_MCP_LOCKDOWN   1: ask the upstream to hide what outsiders wrote (default 1; best effort)
  GITHUB_MCP_UPSTREAM   as --upstream
  GITHUB_MCP_GIT        as --git
  GITHUB_MCP_SECRET     the secret that requests must carry as Authorization: Bearer
  GITHUB_MCP_PROXY_DEBUG  1: a line on stderr for every request (default 0: refusals only)

exit status:
  0 stopped as asked · 1 failed (or --check-upstream found differences) · 2 usage · 130 Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="github_mcp_proxy.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    upstream = os.environ.get("GITHUB_MCP_UPSTREAM") or DEFAULT_UPSTREAM
    add("--upstream", metavar="URL", default=upstream, help=f"default {DEFAULT_UPSTREAM}")
    add("--listen", metavar="ADDR:PORT", type=listen_address, default=("127.0.0.1", 0),
        help="default 127.0.0.1:0, any free port")  # fmt: skip
    add("--token-command", metavar="CMD", default="",
        help='a program that prints {"token": …, "expires_at": …}; again in time')  # fmt: skip
    add("--secret-file", metavar="FILE", type=given,
        help="the secret that requests must carry")  # fmt: skip
    add("--print-secret", action="store_true",
        help="make one; the second line, before read-only or read-write")  # fmt: skip
    add("--policy", metavar="FILE", type=given, help="what may be written: an INI file")
    add("--audit", metavar="FILE", type=given,
        help="append every decision to FILE, as JSON Lines")  # fmt: skip
    add("--ca-file", metavar="FILE", default="", help="CA certificates for the upstream")
    add("--timeout", metavar="SECONDS", type=seconds, default=300.0,
        help="how long the upstream may be silent in a call (default 300)")  # fmt: skip
    add("--git", metavar="URL", default=os.environ.get("GITHUB_MCP_GIT", ""),
        help="serve git at /git/OWNER/REPO.git too, from URL (https://github.com)")  # fmt: skip
    add("--exit-with-stdin", action="store_true", help="stop when stdin is closed")
    add("--confirm-writes", action="store_true",
        help="ask on stdout before each write, in JSON; the answers come on stdin")  # fmt: skip
    add("--check-upstream", action="store_true", help="compare its tools with the table, and exit")
    version = f"%(prog)s {__version__} (Python {sys.version.split()[0]})"
    add("--version", action="version", version=version)
    return parser


def build_proxy(options: argparse.Namespace) -> Proxy:
    scope = env_scope()
    policy = read_policy(options.policy) if options.policy else Policy()
    if env_flag("GITHUB_MCP_READONLY", "0"):
        policy = policy._replace(readonly=True)
    debug = env_flag("GITHUB_MCP_PROXY_DEBUG", "0")
    token = env_token(options.token_command)
    options.secret = read_secret(options)
    if options.ca_file:
        import ssl

        try:
            ssl.create_default_context(cafile=options.ca_file)
        except OSError:  # ssl.SSLError is one
            raise ProxyError(f"cannot read certificates from {options.ca_file}") from None
    headers = upstream_headers(policy)
    upstream = Upstream(options.upstream, token, headers, options.ca_file, options.timeout)
    git = None
    if options.git:
        git = Upstream(options.git, token, {}, options.ca_file, options.timeout, option="--git")
    return Proxy(scope, policy, upstream, options.secret, Audit(options.audit, debug), git)


def allow_many_files() -> None:
    """Each client may need two sockets, and some hosts allow 256 files by default."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = 2 * MAX_CLIENTS + 64
    if hard != resource.RLIM_INFINITY:
        want = min(want, hard)
    if soft != resource.RLIM_INFINITY and soft < want:
        resource.setrlimit(resource.RLIMIT_NOFILE, (want, hard))


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        proxy = build_proxy(options)
        allow_many_files()
        if options.check_upstream:
            return asyncio.run(check_upstream(proxy))
        return asyncio.run(serve(proxy, options))
    except ProxyError as error:
        log(f"error: {error}")
        if error.hint:
            log(f"hint: {error.hint}")
        return error.status
    except UpstreamError as error:
        log(f"error: {options.upstream}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
