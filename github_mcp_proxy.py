#!/usr/bin/env python3
"""Give a VM one GitHub repository, by MCP and git, and keep the token outside.

The proxy listens on the host, checks every message against closed tables (tools, parameters,
values), adds the token and passes on what it has rebuilt; nothing that the VM sends is copied.

    GITHUB_MCP_TOKEN=… GITHUB_MCP_OWNER=o GITHUB_MCP_REPO=r github_mcp_proxy.py
    … github_mcp_proxy.py --git https://github.com --policy policy.ini --audit audit.jsonl

The first line on stdout is the port, the second read-only or read-write; the endpoint is
http://127.0.0.1:PORT/mcp. Commands of yours that sh runs: --token-command, the policy's `approve`.

Starts:   sh
Reads:    its environment (GITHUB_MCP_…), the files of --policy and --ca-file
Writes:   the file of --audit
Reaches:  --upstream and --git with the token; its one listening socket (--listen)
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import resource
import select
import signal
import ssl
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any
from typing import NamedTuple
from typing import NoReturn
from typing import Union
from urllib.parse import SplitResult
from urllib.parse import unquote
from urllib.parse import urlsplit

__version__ = "0.1.0"

STARTS: frozenset[str] = frozenset(["sh"])

MAX_REQUEST = 5 * 1024 * 1024  # the server's own limit
MAX_CONTAINERS = 250_000  # objects and lists of a message: as a tree they take 250 bytes each
MAX_COMMANDS = 256 * 1024  # bytes of what a push says before its pack

CONNECT_SECONDS = 15
KNOWN_SECONDS = 60  # for so long the default branch is believed to be what it was
RETRY_SECONDS = 5  # until it is asked for again, when it is not known
TOKEN_SECONDS = 120  # for the token command
TOKEN_MARGIN = 60  # a token is renewed that many seconds before it expires

# JSON-RPC error codes: the standard's, and one of ours.
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS = -32700, -32600, -32601, -32602
UPSTREAM_FAILED = -32050

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


def demand(condition: object, reason: str, status: int = 400, code: int = INVALID_REQUEST) -> None:
    if not condition:
        raise ProtocolError(reason, status, code)


class Refusal(Exception):
    """Why a value, an answer or a push may not pass: a sentence for the model that sent it."""


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


DENIED = (
    ".github/workflows/** .github/actions/** .github/dependabot.yml .github/dependabot.yaml "
    ".gitlab-ci.yml .circleci/** CODEOWNERS .github/CODEOWNERS docs/CODEOWNERS .gitmodules"
)


class Policy(NamedTuple):
    """What may be written, and what is opted in to. Keys of the INI file's [policy] section."""

    readonly: bool = False
    branches: tuple[str, ...] = ("**",)
    default_branch: str = ""  # protected besides the one that the upstream tells
    deny_paths: tuple[str, ...] = tuple(DENIED.split())
    allow: frozenset[str] = frozenset()
    writes_per_hour: int = 300
    approve: str = ""  # a command that is asked before each write
    lockdown: bool = True  # the upstream is asked to hide what outsiders wrote

    def has(self, word: str) -> bool:
        return not word or word in self.allow


# What can be opted in to, and the toolsets that the upstream is asked for then.
ALLOW = {"merge": "", "approve": "", "people": "", "default-branch": "", "delete-labels": "",
         "actions": "actions", "alerts": "code_security,code_quality,dependabot",
         "discussions": "discussions", "advisories": "security_advisories"}  # fmt: skip


class Bounds(NamedTuple):
    """What a judge or a rule may ask about: what is configured, and what is known by now."""

    scope: Scope
    policy: Policy
    writes: int = 0  # in the last hour
    defaults: frozenset[str] = frozenset()  # the default branch, as the upstream tells it
    is_asked: bool = True  # whether it has answered, be it that it knows of none
    tags: frozenset[str] = frozenset()  # where git tells them
    made: frozenset[str] = frozenset()  # refs that were created here
    moved: str = ""  # why nothing passes: the repository has another name now, or its name another


class Forward(NamedTuple):
    """The message to send: built here, with nothing in it that no table names."""

    message: Object
    tool: str = ""
    write: bool = False
    check: str = ""  # how the answer is checked: Tool.check


class Refuse(NamedTuple):
    """Why a message does not pass, and how its sender is told."""

    reason: str
    code: int = INVALID_PARAMS
    tool: str = ""  # a refused tool call is answered by a result that the model reads


Verdict = Union[Forward, Refuse]


# --- pure: JSON, strictly ---

# An id is a number, or a string that every JSON writer spells alike.
ID_STRING = re.compile(r"""[ !#-%'-;=?-\[\]-~]{0,256}""").fullmatch
ENCODER = json.JSONEncoder(separators=(",", ":"))


def no_duplicates(pairs: list[tuple[str, Json]]) -> Object:
    found = dict(pairs)
    demand(len(found) == len(pairs), "a JSON object has the same key twice", code=PARSE_ERROR)
    return found


def small_int(digits: str) -> int:
    demand(len(digits) <= 17, "a number of too many digits", code=PARSE_ERROR)  # others round it
    return int(digits)


STRICT = json.JSONDecoder(object_pairs_hook=no_duplicates, parse_int=small_int)


def parse_json(body: Bytes) -> Json:
    """The value of `body`, or ProtocolError. What is in it has still to meet the rules below."""
    demand(body.count(b"{") + body.count(b"[") <= MAX_CONTAINERS, "it has too many parts", 413)
    try:
        return STRICT.decode(body.decode("utf-8"))
    except (ValueError, RecursionError):
        reason = "the body is not one JSON value in UTF-8, or nested too deep"
        raise ProtocolError(reason, code=PARSE_ERROR) from None


def is_id(value: Json) -> bool:
    if isinstance(value, str):
        return bool(ID_STRING(value))
    return isinstance(value, int) and not isinstance(value, bool)


def parse_message(body: Bytes) -> Object:
    """One JSON-RPC 2.0 request or notification, with exactly the keys of one.

    An answer is none: no question of the upstream reaches a client.
    """
    message = parse_json(body)
    demand(not isinstance(message, list), "batches are not supported: send one message a request")
    demand(isinstance(message, dict), "the body is not a JSON-RPC message")
    if not {"jsonrpc", "method"} <= message.keys() <= {"jsonrpc", "method", "id", "params"}:
        raise ProtocolError(f"not a JSON-RPC request: keys {quoted(sorted(message))}")
    demand(message["jsonrpc"] == "2.0", 'jsonrpc must be "2.0"')
    demand("id" not in message or is_id(message["id"]), "id must be an integer or plain ASCII")
    demand(isinstance(message["method"], str), "method must be a string")
    if message.get("params", {}) is None:
        del message["params"]
    is_object = isinstance(message.get("params", {}), dict)
    demand(is_object, "params must be an object", code=INVALID_PARAMS)
    return as_object(message)


def dumps(value: Json) -> bytes:
    return ENCODER.encode(value).encode("ascii")


def as_object(value: Json) -> Object:
    return value if isinstance(value, dict) else {}


# --- pure: rules for single values ---

# Controls, formats (zero width, direction), surrogates, private, unassigned, line ends.
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # of Persian, and of emoji
MARKS = JOINERS + "\u061c\u200b\u200e\u200f\u2060\ufeff"  # and of others; no override
# What GitHub's tokens look like.
TOKEN_LIKE = re.compile(r"g(?:h[pousr]_|hs-|ithub_pat_)[A-Za-z0-9._-]{30,}")
DIGITS = re.compile(r"([0-9]{1,16})(\.0+)?", re.ASCII).fullmatch
# What git check-ref-format forbids, and what shells and workflows would run.
NO_BRANCH = re.compile(
    r'[\x00-\x20\x7f~^:?*\[\\"`;$<>|{}]|\.\.|@\{|\.lock(/|$)|\.(/|$)|(^|/)([./-]|$)|^@$'
)
# And what would be more than a path segment in a URL: the server puts refs into paths, where `..`,
# `%2e`, `?` and HEAD/pulls reached other endpoints.
REF_FORBIDDEN = re.compile(rf"[%#'&()]|^(HEAD|[0-9a-fA-F]{{40}})/|{NO_BRANCH.pattern}")
REF = "a branch, tag or commit, not user:branch, as git allows, without characters special in a URL"
UNTOLD = "GitHub did not tell the default branch: the user can set default_branch in the policy"
OTHER_BRANCH = "write to a branch other than the default one and open a pull request"
NEEDS = "needs `allow = %s` in the host's policy file"
FILE_FORBIDDEN = re.compile(r"\\|%[0-9a-fA-F]{2}|\.\.;|(^|/)\.{0,2}(/|$)")
FILE = "a path inside the repository, without . and .. segments, controls, \\ and %2e"
HEAD_FILTER = r"([A-Za-z0-9_-]{1,39}:)?(?!.*\.\.)[\w./+@-]{1,255}"


def quoted(value: Json) -> str:
    """A value for an error text: JSON, printable, short, and without anything token-like."""
    shown = TOKEN_LIKE.sub("[redacted]", json.dumps(value)[:1000])
    return shown if len(shown) <= 80 else shown[:77] + "…"


class Rule(NamedTuple):
    """What one parameter may be. `check` returns the value to send, or raises Refusal."""

    what: str
    check: Callable[[Json, Bounds], Json]
    needs: str = ""  # a word of Policy.allow
    choices: tuple[str, ...] = ()
    constant: tuple[Json, ...] = ()  # the one value, sent even when the parameter is left out
    required: bool = False  # a parameter that must be given


def insist(condition: object, sentence: str) -> None:
    if not condition:
        raise Refusal(sentence)


def as_integer(value: Json) -> Json:
    """Models send 5.0, and "5"; what is sent on is the integer."""
    match = DIGITS(value) if isinstance(value, str) else None
    is_whole = type(value) is float and value.is_integer()
    return int(match[1]) if match else int(value) if is_whole else value


def as_flag(value: Json) -> Json:
    """Models send flags as text, too."""
    word = value.lower() if isinstance(value, str) else ""
    return word == "true" if word in ("true", "false") else value


def simple(
    what: str, is_one: Callable[[Json], object], convert: Callable[[Json], Json] | None = None
) -> Rule:
    """A rule that asks nothing but the value."""

    def check(value: Json, _bounds: Bounds) -> Json:
        value = convert(value) if convert else value
        insist(is_one(value), f"it has to be {what}")
        return value

    return Rule(what, check)


def pattern(what: str, regex: str) -> Rule:
    fits = re.compile(regex).fullmatch
    return simple(what, lambda value: isinstance(value, str) and fits(value))


def free_text(limit: int) -> Rule:
    what = f"text of up to {limit} characters without NUL and lone surrogates"
    return pattern(what, rf"[^\0\ud800-\udfff]{{0,{limit}}}")


def integer(low: int, high: int) -> Rule:
    what = f"an integer from {low} to {high}"
    return simple(what, lambda value: type(value) is int and low <= value <= high, as_integer)


def only(constant: bool) -> Rule:
    """A parameter that has one value, and is sent even when it is left out."""
    rule = simple(f"only {json.dumps(constant)}", lambda value: value is constant, as_flag)
    return rule._replace(constant=(constant,))


def choice(*choices: str, **opt_ins: str) -> Rule:
    """One of `choices`, spelled exactly so; NAME="word" needs that word in Policy.allow."""
    what = "one of " + ", ".join(choices)

    def check(value: Json, bounds: Bounds) -> Json:
        insist(isinstance(value, str) and value in choices, f"it has to be {what}")
        word = opt_ins.get(value, "")
        insist(bounds.policy.has(word), f"it {NEEDS % word}")
        return value

    return Rule(what, check, choices=choices)


def list_of(rule: Rule, limit: int = 100) -> Rule:
    what = f"a list of up to {limit}, each {rule.what}"

    def check(value: Json, bounds: Bounds) -> Json:
        insist(isinstance(value, list) and len(value) <= limit, f"it has to be {what}")
        return [rule.check(item, bounds) for item in value]

    return Rule(what, check, choices=rule.choices)


def record(required: str = "", **rules: Rule) -> Rule:
    """An object with these keys and no other; those in `required` must be there."""
    what = "an object with " + ", ".join(rules)

    def check(value: Json, bounds: Bounds) -> Json:
        known = isinstance(value, dict) and value.keys() <= rules.keys()
        insist(known and value.keys() >= set(required.split()), f"it has to be {what}")
        return {
            key: rules[key].check(item, bounds)
            for key, item in value.items()
            if key in required.split() or not is_left_out(rules[key], item, bounds)
        }

    return Rule(what, check)


def is_left_out(rule: Rule, value: Json, bounds: Bounds) -> bool:
    """Whether nothing is meant by the value of an optional parameter: null, "", [] or 0.

    Where that is a value of its own (labels: [] takes all labels off) the rule takes it.
    """
    if as_integer(value) not in (None, "", [], 0):
        return False
    try:
        rule.check(value, bounds)
    except Refusal:
        return True
    return not bounds.policy.has(rule.needs)  # nobody means an empty value of what is not open


def is_plain(value: Json, limit: int, besides: str = "") -> bool:
    """A short string on one line, without control and format characters but for `besides`."""
    if not isinstance(value, str) or len(value) > limit:
        return False
    return not UNSEEN & set(map(unicodedata.category, set(value).difference(besides)))


def check_ref(value: Json, _bounds: Bounds, forbidden: re.Pattern[str] = REF_FORBIDDEN) -> Json:
    insist(is_plain(value, 255) and not forbidden.search(value), f"it has to be {REF}")
    return value


def fold(name: str) -> str:
    """As file systems see it that know no case, and no joiners."""
    return re.sub(f"[{JOINERS}]", "", unicodedata.normalize("NFC", name)).casefold()


def check_branch(value: Json, bounds: Bounds, forbidden: re.Pattern[str] = REF_FORBIDDEN) -> Json:
    """A branch that may be written: not the default one, and within the policy's globs."""
    check_ref(value, bounds, forbidden)
    policy = bounds.policy
    name = fold(value)
    # GitHub takes "refs/heads/main" for "main" in places.
    special = name in ("head", "refs", "heads") or name.startswith(("refs/", "heads/", "remotes/"))
    insist(not special, "it has to be a branch's plain name, without refs/ or heads/ before it")
    if "default-branch" not in policy.allow:
        # What the policy names is protected besides: it may be wrong, or of another day.
        defaults = bounds.defaults | {policy.default_branch} - {""}
        insist(bounds.is_asked and defaults, UNTOLD)
        is_default = name in {fold(default) for default in defaults}
        insist(not is_default, f"{value} is the default branch: {OTHER_BRANCH}")
    matches = any(glob_match(glob, name) for glob in policy.branches)
    insist(matches, f"only branches matching {', '.join(policy.branches)} are written")
    insist(value not in bounds.tags, f"{value} is a tag: who asks for it would get the branch")
    return value


def check_file(value: Json, _bounds: Bounds) -> Json:
    """A path; slashes around it are taken off, so "/" is the root."""
    path: str = value.strip("/") if is_plain(value, 4096, JOINERS) else ".."
    insist(not path or not FILE_FORBIDDEN.search(path), f"it has to be {FILE}")
    marks = "" if path.isascii() else "".join("-m"[unicodedata.combining(c) > 0] for c in path)
    insist("m" * 31 not in marks, f"it has to be {FILE}")  # to sort so many takes long
    return path


def check_written_file(value: Json, bounds: Bounds) -> Json:
    path: str = check_file(value, bounds)
    insist(path, "it has to be a file's path")
    folded = "/".join(part.rstrip(". ") for part in fold(path).split("/"))
    for glob in bounds.policy.deny_paths:
        parts = glob.split("/")
        # A file in place of a folder above, or a folder in place of the file, removes what is
        # denied.
        above = ("/".join(parts[:n]) for n in range(1, len(parts)) if parts[n - 1] != "**")
        denied = any(glob_match(g, folded) for g in (glob, glob + "/**", *above))
        insist(not denied, f"the policy does not let {glob} be written (deny_paths)")
    insist(not {".git", "git~1"} & set(folded.split("/")), "nothing in .git is written")
    return path


def glob_match(glob: str, name: str) -> bool:
    """Of a folded name: `*` and `?` stay within a segment, `**` spans any number of them."""
    segments, reached = name.split("/"), {0}  # as many of them may be matched by now
    for part in re.sub(r"(?<![^/])\*\*$", "**/*", fold(glob)).split("/"):
        if part == "**":
            reached = set(range(min(reached), len(segments)))
        else:
            like = part.replace("[", "[[]")  # no set of characters
            left = reached - {len(segments)}
            reached = {at + 1 for at in left if fnmatchcase(segments[at], like)}
        if not reached:
            return False
    return len(segments) in reached


# --- pure: search queries ---

# Which qualifiers a query may have, be it of issues, code or commits. What names a scope (org:,
# user:, enterprise:, …), or could tell of other repositories (project:, team:, is:private, …), is
# absent.
QUALIFIERS = frozenset(
    """
    is type state reason label author assignee mentions commenter involves in linked milestone
    created updated closed merged comments interactions reactions draft review reviewed-by
    review-requested user-review-requested head base status no sort archived sha language path
    filename extension size symbol content
    committer author-name author-email committer-name committer-email author-date committer-date
    merge hash parent tree
    """.split()
)
SCOPES = "repo|repository|org|organization|user|owner|enterprise|saved|team|project"
SCOPE_IN_TEXT = re.compile(rf"(?:{SCOPES})\s*:")
FOREIGN_NAME = re.compile(rf"{SCOPES}|forks?|topics?|stars|followers|visibility|license").fullmatch
# -name:value, -"a phrase", a word; or a quotation mark that has no other.
QUERY_TOKEN = re.compile(r'(-?)(?:([A-Za-z][A-Za-z-]*):((?:"[^"]*"|[^\s"])+)|"([^"]*)")|[^\s"]+|"')
# What a search of text takes for a blank, and its grammar may not.
SIGNS = re.compile(r"[()\[\]{}\\|;:,`^&]")
VALUE_FORBIDDEN = re.compile(r"[()\\|;{}`^]|\[(?!bot\])|(?<!\[bot)\]")
VALUE_LIST = re.compile(r'(?:[^\s",]+|"[^"]*")(?:,(?:[^\s",]+|"[^"]*"))*').fullmatch
QUERY_DATE = re.compile(r"[<>=.*\d:TZ+-]+").fullmatch
QUOTED = re.compile('"[^"]*"')
# AND and NOT take away from what repo: has found, OR alone adds to it. In a phrase, of which
# github.com takes the quotes off, it makes two that must both be there.
WIDENING = re.compile(r"(?<!\w)(?<!\w-)or(?!\w|-\w)", re.IGNORECASE)  # but not this-or-that
OR_IN_PHRASE = re.compile(r"(?<=[^ ]) or (?=[^ ])", re.IGNORECASE)
IS_VALUES = frozenset("open closed issue pr merged unmerged draft queued locked unlocked".split())
SEARCHED = "it has to be a search text of up to 256 visible characters"


def narrow_query(query: Json, bounds: Bounds) -> str:
    """The query confined to the repository, or Refusal.

    `OR`, parentheses and a second scope lead out of `repo:O/R`; github.com takes quotes off before
    it parses, so quoted text is held to the same rules. The hits are checked as well: this layer
    stops queries from being oracles, that one holds if the grammar changes.
    """
    # As it looks: full-width signs are signs, and line ends are blanks.
    insist(isinstance(query, str) and len(query) <= 256, SEARCHED)
    query = unicodedata.normalize("NFKC", " ".join(query.split()))
    insist(is_plain(query, 1024, JOINERS), SEARCHED)
    narrowed = " ".join(query_tokens(bounds.scope, query))
    # How two readers could see two queries: by what is not seen.
    seen = "".join(c for c in narrowed if c not in JOINERS)
    insist(" ".join(query_tokens(bounds.scope, seen)) == seen, SEARCHED)
    return f"repo:{bounds.scope} {narrowed}".rstrip()


def query_tokens(scope: Scope, query: str) -> Iterator[str]:
    for match in QUERY_TOKEN.finditer(query):
        minus, name, value, phrase = match.groups()
        known = (name or "").lower()
        ours = known == "repo" and not minus and scope.is_named(value.replace('"', ""))
        elsewhere = FOREIGN_NAME(known) and not ours
        insist(not elsewhere, f"only repo:{scope} is searched; leave {known}: out")
        if known in QUALIFIERS:
            yield f"{minus}{name}:{qualifier_value(known, value)}"
        elif not ours:
            yield from text_tokens(match[0], phrase)


def qualifier_value(name: str, value: str) -> str:
    if not VALUE_LIST(value) or (":" in QUOTED.sub("", value) and not QUERY_DATE(value)):
        value = '"' + value.replace('"', "") + '"'
    text = re.sub(r'"?,"|",|"', " ", value)
    found = VALUE_FORBIDDEN.search(value)
    insist(not found, f"{name}: goes without {found and found[0]}")
    starts = {word[0] for word in text.split()} or {":"}
    insist(not starts & set("/,:;&+-"), f"no word of {name}: begins with / , : ; & + or -")
    check_words(text)
    insist(name != "is" or value.lower() in IS_VALUES, "is: goes with a state only")
    return value


def text_tokens(text: str, phrase: str | None) -> Iterator[str]:
    """The words, or the phrases, of what is searched for; signs are blanks."""
    words = [word.lstrip("-+/") for word in SIGNS.sub(" ", text.replace('"', " ")).split()]
    minus = "-" if re.match(r'-["\w]', text) else ""
    cleaned = " ".join(filter(None, words))
    if phrase and cleaned:
        parts = [cleaned] if minus else OR_IN_PHRASE.split(cleaned)
        cleaned = '"' + '" "'.join(parts) + '"'
    check_words(cleaned, given=text)
    if cleaned:
        yield minus + cleaned


def check_words(text: str, given: str = "") -> None:
    insist(not WIDENING.search(text), "searches here go without the word or, but for a phrase")
    scoped = SCOPE_IN_TEXT.search(f"{given} {text}".casefold())
    insist(not scoped, "searches here name no scope with a colon")


# --- pure: the tables of what passes ---

LINE = simple("a line of text without control characters", lambda it: is_plain(it, 256, MARKS))
FLAG = simple("true or false", lambda value: isinstance(value, bool), as_flag)
CONTENT = free_text(MAX_REQUEST)
WRITTEN = Rule(FILE, check_written_file)
COMMITISH = Rule(REF, check_ref)
WHO = pattern("a user name or an e-mail address (no ORG/team)", r"[A-Za-z0-9._+@\[\]-]{1,100}")
SEGMENT = pattern("a name or a number", r"(?!\.+$)[A-Za-z0-9._-]{1,100}")
DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9:.]{4,15}(Z|[+-][0-9:]{4,6})?)?"
ANY_VALUE = simple(
    "a line, a number or a flag",
    lambda value: is_plain(value, 256) or (isinstance(value, (int, float)) and abs(value) <= 2**53),
)
EMPTIED = Rule("an object", lambda _value, _bounds: {})  # whatever is in it is not sent
FIELD = record("field_name", field_name=LINE, field_option_name=LINE, value=ANY_VALUE, delete=FLAG)

# The rules by the names that the tables below use.
RULES: dict[str, Rule] = {
    "always": only(True),
    "author": pattern("a user name or an e-mail address, or a name", r"[\w.+@\[\]' -]{1,100}"),
    "body": free_text(65_536),  # GitHub's limit
    "branch": Rule("a branch that may be written", check_branch),
    "color": pattern("six hex digits", r"#?[0-9a-fA-F]{6}"),
    "content": CONTENT,
    "cursor": pattern("a cursor", r"[A-Za-z0-9+/=_:.-]{0,512}"),
    "date": pattern("an ISO 8601 date", DATE),
    "event": choice("COMMENT", "REQUEST_CHANGES", "APPROVE", APPROVE="approve"),
    "fields": list_of(pattern("a field's name", r"[a-z_]{1,40}")),
    "files": list_of(record("path content", path=WRITTEN, content=CONTENT)),
    "filters": list_of(record("field_name value", field_name=LINE, value=LINE)),
    "flag": FLAG,
    "head_filter": pattern("branch or user:branch", HEAD_FILTER),
    "id": integer(1, 2**53),
    "issue_fields": list_of(FIELD),
    "jobs_filter": record(filter=choice("latest", "all")),
    "label_method": choice("create", "update", "delete", delete="delete-labels"),
    "labels": list_of(LINE),
    "line": LINE,
    "never": only(False),
    "no_capabilities": EMPTIED._replace(constant=({},)),
    "number": integer(1, 2**31 - 1),
    "page": integer(1, 100_000),
    "path": Rule(FILE, check_file),
    "people": list_of(WHO)._replace(needs="people"),
    "per_page": integer(1, 100),
    "query": Rule("a search text", narrow_query),
    "reaction": choice("+1", "-1", "laugh", "confused", "heart", "hooray", "rocket", "eyes"),
    "ref": COMMITISH,
    "runs_filter": record(actor=WHO, branch=COMMITISH, event=SEGMENT, status=SEGMENT),
    "segment": SEGMENT,
    "sha": pattern("a commit or object id, 7 to 64 hex digits", r"[0-9a-fA-F]{7,64}"),
    "title": simple(LINE.what, lambda it: it and is_plain(it, 256, MARKS)),
    "type": simple("a line or null", lambda value: value is None or is_plain(value, 256)),
    "who": WHO,
    "written": WRITTEN,
    # Of the protocol. What a client says of itself is not sent: the proxy is the client, and can do
    # nothing that an upstream may ask for. A tool's arguments have rules of their own.
    "arguments": EMPTIED,
    "capabilities": EMPTIED,
    "client": Rule("an object", lambda _it, _bounds: {"name": "agent-vm", "version": __version__}),
    "level": choice(*"debug info notice warning error critical alert emergency".split()),
    "progress": simple("a number", lambda n: type(n) in (int, float) and 0 <= n <= 2**53),
    "protocol": pattern("a protocol version", r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "remark": free_text(1024),
    "request_id": simple("a string or an integer", is_id),
}
# Parameters that several tools share, by a name that stands for them.
GROUPS = {
    "@pages": "page:page perPage:per_page",
    "@cursors": "after:cursor perPage:per_page",
    "@issue": "issue_number!:number",
    "@pull": "pullNumber!:number",
    "@pull_methods": "method!=get|get_diff|get_status|get_files|get_commits|get_review_comments|"
    "get_reviews|get_comments|get_check_runs",
    "@found": "query!:query fields:fields order=asc|desc sort=comments|reactions|"
    "reactions-+1|reactions--1|reactions-smile|reactions-thinking_face|reactions-heart|"
    "reactions-tada|interactions|created|updated @pages",
}

# What is not in this table does not pass: no other tool, parameter, spelling or value. Left out on
# purpose: what is not bound to one repository (get_me, search_repositories, create_repository,
# fork_repository, gists, projects, notifications, stars, teams, users, global advisories), what
# takes ids that are valid everywhere (review threads, sub-issues, discussion comments), what runs
# code or spends money (actions_run_trigger, Copilot), secret scanning, which returns secrets, and
# what GitHub's server has behind feature flags, which are not asked for: small tools in place of
# issue_write, update_pull_request and reviews, file_blame, find_duplicate, issue_dependency_read.
#
# Columns: the tool; read or write, or a read whose answer is checked (hits: what is not known to be
# ours is dropped; query: the same, of a tool without owner and repo; items: what is not ours is
# dropped; comments: the same, for get_comments alone); the word of `allow` that it needs, or -; its
# parameters besides owner and repo. key:rule, key!:rule where it must be given, key=a|b for one of
# these; a line that begins with blanks goes on.
TABLE = """
get_file_contents          read     -  path:path ref:ref sha:sha fields:fields
list_commits               read     -  author:author path:path sha:ref since:date until:date
    fields:fields @pages
get_commit                 read     -  sha!:ref detail=none|stats|full_patch @pages
list_branches              read     -  @pages
list_tags                  read     -  @pages
get_tag                    read     -  tag!:ref
list_releases              read     -  fields:fields @pages
get_latest_release         read     -
get_release_by_tag         read     -  tag!:ref
get_repository_tree        read     -  tree_sha:ref path_filter:path recursive:flag
search_code                query    -  query!:query fields:fields sort=indexed order=asc|desc
    @pages
search_commits             query    -  query!:query sort=author-date|committer-date
    order=asc|desc @pages
create_branch              write    -  branch!:branch from_branch:ref
create_or_update_file      write    -  branch!:branch path!:written content:content message:body
    sha:sha allow_symlink_write:never
push_files                 write    -  branch!:branch message:body files!:files
delete_file                write    -  branch!:branch path!:written message:body
list_repository_collaborators read     people affiliation=outside|direct|all @pages
# issue_read: get_labels does not say of which issue
issue_read                 items    -  method!=get|get_comments|get_sub_issues|get_parent @issue
    @pages
list_issues                read     -  state=OPEN|CLOSED labels:labels since:date
    orderBy=CREATED_AT|UPDATED_AT|COMMENTS direction=ASC|DESC field_filters:filters fields:fields
    @cursors
search_issues              hits     -  @found
list_issue_types           read     -
list_issue_fields          read     -
issue_write                write    -  method!=create|update issue_number:number title:title
    body:body labels:labels assignees:people milestone:number type:type state=open|closed
    state_reason=completed|not_planned|duplicate duplicate_of:number issue_fields:issue_fields
add_issue_comment          write    -  body:body comment_id:id reaction:reaction @issue
get_label                  read     -  name!:line
list_label                 read     -
label_write                write    -  method!:label_method name!:line new_name:line color:color
    description:line
# pull_request_read: get_comments asks for those of an issue, which may have been transferred
pull_request_read          comments -  @pull_methods after:cursor @pull @pages
list_pull_requests         read     -  state=open|closed|all head:head_filter base:ref
    sort=created|updated|popularity|long-running direction=asc|desc fields:fields @pages
search_pull_requests       hits     -  @found
create_pull_request        write    -  head!:ref base!:ref title:title body:body draft:flag
    maintainer_can_modify:flag reviewers:people
update_pull_request        write    -  base:ref title:title body:body draft:flag state=open|closed
    maintainer_can_modify:flag reviewers:people @pull
merge_pull_request         write    merge commit_message:body commit_title:line
    merge_method=merge|squash|rebase @pull
update_pull_request_branch write    merge expectedHeadSha:sha @pull
pull_request_review_write  write    -  method!=create|submit_pending|delete_pending body:body
    commitID:sha event:event @pull
add_comment_to_pending_review write    -  body!:body path!:path line:number side=LEFT|RIGHT
    startLine:number startSide=LEFT|RIGHT subjectType=FILE|LINE @pull
add_reply_to_pull_request_comment write    -  commentId!:id body:body pullNumber:number
    reaction:reaction
# actions_get: without the two methods that hand out signed URLs; get_job_logs: false hands one out
actions_list               read     actions
    method!=list_workflows|list_workflow_runs|list_workflow_jobs|list_workflow_run_artifacts
    resource_id:segment page:page per_page:per_page workflow_jobs_filter:jobs_filter
    workflow_runs_filter:runs_filter
actions_get                read     actions
    method!=get_workflow|get_workflow_run|get_workflow_job|get_workflow_run_usage
    resource_id!:segment
get_job_logs               read     actions job_id:id run_id:id failed_only:flag tail_lines:number
    return_content:always
get_code_quality_finding   read     alerts findingNumber!:number
get_code_scanning_alert    read     alerts alertNumber!:number
list_code_scanning_alerts  read     alerts ref:ref tool_name:line
    severity=critical|high|medium|low|warning|note|error state=open|closed|dismissed|fixed @pages
get_dependabot_alert       read     alerts alertNumber!:number
list_dependabot_alerts     read     alerts severity=low|medium|high|critical
    state=open|fixed|dismissed|auto_dismissed @cursors
list_repository_security_advisories read     advisories direction=asc|desc
    sort=created|updated|published state=triage|draft|published|closed
list_discussions           read     discussions category:cursor direction=ASC|DESC
    orderBy=CREATED_AT|UPDATED_AT @cursors
get_discussion             read     discussions discussionNumber!:number
get_discussion_comments    read     discussions discussionNumber!:number includeReplies:flag
    @cursors
list_discussion_categories read     discussions
"""
# Requests and notifications that pass, with all that their params may hold. completion/complete
# (names other repositories), prompts and resources (any owner and repo), tasks, subscriptions and
# whatever comes next are not here.
PROTOCOL = """
initialize                protocolVersion!:protocol capabilities:no_capabilities clientInfo:client
ping
server/discover
logging/setLevel          level!:level
tools/list                cursor:cursor
tools/call                name!:line arguments:arguments
notifications/initialized
notifications/cancelled   requestId!:request_id reason:remark
notifications/progress    progressToken!:request_id progress!:progress total:progress message:remark
notifications/roots/list_changed
"""


class Tool(NamedTuple):
    """A row of the table."""

    parameters: Mapping[str, Rule]
    write: bool
    needs: str  # a word of Policy.allow
    scoped: bool  # it has owner and repo; else the query is the only scope
    check: str  # "hits": what is not known to be ours is dropped; "items": what is not ours
    checked_method: str  # the one method whose answer is checked; "": all


def parse_rows(table: str) -> Iterator[list[str]]:
    """The words of each row; a line that begins with a blank belongs to the row above it."""
    lines = (line for line in table.splitlines() if not line.startswith("#"))
    for row in re.split(r"\n(?=\S)", "\n".join(lines).strip()):
        yield row.split()


def parse_parameters(words: Sequence[str]) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for word in words:
        if word in GROUPS:
            rules.update(parse_parameters(GROUPS[word].split()))
            continue
        key, how, value = re.split("([:=])", word, maxsplit=1)
        rule = RULES[value] if how == ":" else choice(*value.split("|"))
        rules[key.rstrip("!")] = rule._replace(required=key.endswith("!"))
    return rules


def parse_tool(kind: str, needs: str, *words: str) -> Tool:
    checks = {"hits": "hits", "query": "hits", "items": "items", "comments": "items"}
    return Tool(
        parameters=parse_parameters(words),
        write=kind == "write",
        needs=needs.strip("-"),
        scoped=kind != "query",
        check=checks.get(kind, ""),
        checked_method="get_comments" if kind == "comments" else "",
    )


TOOLS: dict[str, Tool] = {name: parse_tool(*words) for name, *words in parse_rows(TABLE)}
# The fields of a hit that say where it is from; they are asked for even when the VM does not.
IDENTITY = ("html_url", "repository_url", "repository")

METHODS = {name: parse_parameters(words) for name, *words in parse_rows(PROTOCOL)}
META = "io.modelcontextprotocol/"
MODERN = META + "protocolVersion"  # in _meta of every request since 2026-07-28
META_PARAMETERS = parse_parameters(
    (
        f"progressToken:request_id {MODERN}:protocol {META}clientInfo:client "
        f"{META}clientCapabilities:capabilities {META}logLevel:level"
    ).split()
)


# --- pure: the judge ---


def decide(bounds: Bounds, message: Object) -> Verdict:
    """Whether a well-formed message (`parse_message`) passes, and as what. Pure; the only judge."""
    method = message["method"]
    tool = ""
    try:
        is_note = "id" not in message
        if method not in METHODS or is_note != method.startswith("notifications/"):
            kind = "notification" if is_note else "method"
            return Refuse(f"the proxy does not pass the {kind} {quoted(method)}", NO_METHOD)
        if method == "tools/call":
            tool = str(as_object(message.get("params")).get("name"))
            return decide_call(message, bounds)
        return Forward(rebuilt(message, checked_params(message, bounds)))
    except (Refusal, RecursionError) as refusal:  # the latter of what cannot even be quoted
        return Refuse(str(refusal), INVALID_PARAMS, tool)


def decide_call(message: Object, bounds: Bounds) -> Verdict:
    policy, params = bounds.policy, dict(message.get("params") or {})
    arguments = params.pop("arguments", None)
    outer = checked_params({"method": "tools/call", "params": params}, bounds)
    name = outer["name"]
    tool = TOOLS.get(name)
    insist(not bounds.moved, bounds.moved)
    if not tool:
        raise Refusal(f"the proxy does not pass {quoted(name)}: tools/list shows what it passes")
    insist(policy.has(tool.needs), f"{name} {NEEDS % tool.needs}")
    insist(not (tool.write and policy.readonly), f"{name} writes, and the policy is read-only")
    too_many = tool.write and bounds.writes >= policy.writes_per_hour
    insist(not too_many, f"{name}: {bounds.writes} writes in the last hour, the policy's limit")
    arguments = {} if arguments is None else arguments
    insist(isinstance(arguments, dict), f"{name}: arguments must be an object")
    outer["arguments"] = sent = tool_arguments(name, tool, arguments, bounds)
    check = tool.check if tool.checked_method in ("", sent.get("method")) else ""
    return Forward(rebuilt(message, outer), tool=name, write=tool.write, check=check)


def tool_arguments(name: str, tool: Tool, arguments: Object, bounds: Bounds) -> Object:
    """The arguments to send, or Refusal. owner and repo are always the configured ones."""
    scope = bounds.scope
    known = ("owner", "repo", *tool.parameters)
    for key, given in arguments.items():
        if key not in known and given is not None:
            takes = f"{name} takes {', '.join(known)}"
            raise Refusal(f"{name}: the parameter {quoted(key)} is not passed; {takes}")
        served = getattr(scope, key).lower() if key in ("owner", "repo") else ""
        if served and given not in (None, "", []) and str(given).lower() != served:
            other = f"{name}: {key} is {quoted(given)}, but only {scope} is served here"
            ours = f"leave owner and repo out, or give {scope.owner} and {scope.repo}"
            raise Refusal(f"{other}; {ours}")
    checked: Object = {"owner": scope.owner, "repo": scope.repo} if tool.scoped else {}
    checked.update(checked_values(name, tool.parameters, arguments, bounds))
    if tool.check == "hits" and checked.get("fields"):
        checked["fields"] = list(dict.fromkeys([*checked["fields"], *IDENTITY]))
    return checked


def checked_values(name: str, rules: Mapping[str, Rule], given: Object, bounds: Bounds) -> Object:
    """The values to send, each as its rule makes it, and no other."""
    checked: Object = {}
    for key, rule in rules.items():
        if key in given and (rule.required or not is_left_out(rule, given[key], bounds)):
            if not bounds.policy.has(rule.needs):
                raise Refusal(f"{name}: {key} {NEEDS % rule.needs}")
            try:
                checked[key] = rule.check(given[key], bounds)
            except Refusal as refusal:
                raise Refusal(f"{name}: {key} is {quoted(given[key])}: {refusal}") from None
        elif rule.constant:
            checked[key] = rule.constant[0]
        else:
            insist(not rule.required, f"{name}: the parameter {key} is missing: {rule.what}")
    return checked


def checked_params(message: Object, bounds: Bounds) -> Object:
    """The params to send. Of _meta, what no rule names is dropped: clients put all sorts there."""
    method = message["method"]
    given = dict(message.get("params") or {})
    meta = given.pop("_meta", None)
    meta = {} if meta is None else meta
    insist(isinstance(meta, dict), f"{method}: _meta must be an object")
    for key in given.keys() - METHODS[method].keys():
        if method != "initialize" and given[key] is not None:  # clients put all sorts there
            raise Refusal(f"{method}: the parameter {quoted(key)} is not passed")
    params = checked_values(method, METHODS[method], given, bounds)
    kept = checked_values(method, META_PARAMETERS, meta, bounds)
    return {**params, "_meta": kept} if kept else params


def rebuilt(message: Object, params: Object) -> Object:
    made: Object = {"jsonrpc": "2.0", "method": message["method"]}
    made.update({"id": message["id"]} if "id" in message else {})
    made.update({"params": params} if params else {})
    return made


# --- pure: what an answer may say ---

HTTP_URL = re.compile(r"https?://([^/?#]*)/(?:api/v3/)?([^?#]*)", re.IGNORECASE).match
# First segments that are no owners in addresses of GitHub's.
NOT_OWNERS = frozenset(
    "apps avatars enterprises features login marketplace notifications orgs search settings "
    "sponsors teams topics u user-attachments users".split()
)
RENAMED_MAYBE = "(does GitHub call it so? If not, the host's user has to give its new name: --repo)"
FOREIGN = object()  # in place of what is left out
PLAIN_URL = re.compile(r"https?://[!-~]{1,200}").fullmatch


def repository_in(address: Json) -> str:
    """The repository ("owner/name", lower case) that an address lies in; "" for none."""
    match = HTTP_URL(address) if isinstance(address, str) else None
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


def own_hits(value: Json, scope: Scope) -> Json:
    """A search answer with only the hits that are known to be of this repository."""
    items: Any = value.get("items", []) if isinstance(value, dict) else None  # left out if empty
    insist(isinstance(items, list), "the search answer could not be checked")
    ours = {str(scope).lower()}
    own = [item for item in items if isinstance(item, dict) and repository_of(item) == ours]
    kept: Object = {"items": [without_foreign(item, scope) for item in own]}
    if len(own) == len(items) and (items or not value.get("total_count")):
        # Else the total would count hits of other repositories.
        kept["total_count"] = value.get("total_count")
        kept["incomplete_results"] = value.get("incomplete_results")
    return kept


def checked_result(scope: Scope, check: str, result: Object) -> Object:
    """The result of a tool call, without what belongs to other repositories."""
    if not check or result.get("isError"):
        return result
    blocks = result.get("content")
    insist(blocks and isinstance(blocks, list), "the answer could not be checked")
    content: list[Json] = []
    for block in blocks or ():
        is_text = as_object(block).get("type") == "text"
        insist(is_text, "the answer has a part that could not be checked")
        try:
            data = json.loads(block["text"])
        except (KeyError, TypeError, ValueError):
            raise Refusal("the answer could not be checked") from None
        ours = own_hits(data, scope) if check == "hits" else without_foreign(data, scope)
        insist(ours is not FOREIGN, f"it is not of {scope}, or does not say so {RENAMED_MAYBE}")
        content.append({"type": "text", "text": json.dumps(ours)})
        had, left = (one.get("items") if isinstance(one, dict) else one for one in (data, ours))
        if had and not left:
            said = f"Left out: all of it, as not known to be of {scope} {RENAMED_MAYBE}"
            content.append({"type": "text", "text": said})
    kept: Object = {key: result[key] for key in ("resultType",) if key in result}
    return {**kept, "content": content}


def outcome(message: Object) -> tuple[str, str, str]:
    """What became of a write: ("done", "", an address if the answer has one), or "failed" and why.

    The answers are github-mcp-server's: {"id", "url"} of what was made, or GitHub's own objects.
    """
    result = message.get("result")
    if not isinstance(result, dict) or result.get("isError"):
        return "failed", "GitHub's server answered with an error, perhaps half-way", ""
    try:
        made = json.loads(result["content"][0]["text"])
        found = [part.get("html_url") or part.get("url") for part in (made, made.get("commit", {}))]
        url = next(str(url) for url in found if url)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
        url = ""
    return "done", "", url if PLAIN_URL(url) else ""


# --- pure: what git may do (gitprotocol-http, gitprotocol-pack) ---

GIT = "/git/"
GIT_SERVICE = re.compile(
    r"/git/([^/?]+)/([^/?]+?)(?:\.git)?/"
    r"(?:info/refs\?service=(git-upload-pack|git-receive-pack)|(git-upload-pack|git-receive-pack))"
)
MOVED_TO = re.compile(r"(?:https?://[^/]+)?/([\w.-]+/[\w.-]+?)(?:\.git)?/(?:info/refs|git-)").match
RENAMED = "GitHub calls this repository {0} now: the host's user has to give --repo {0}"
ANOTHER = "the repository's name has come to mean another one: nothing passes"
WHOLE = "not pushed, because another ref of this push is refused"
NO_OBJECT = re.compile("0+").fullmatch
OBJECT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}").fullmatch
PKT_SIZE = re.compile(b"[0-9a-f]{4}").fullmatch
NO_PUSH = "this is not a push that can be checked (signed pushes are not)"


class Command(NamedTuple):
    """One line of a push: what a ref is to become."""

    old: str
    new: str
    ref: str


class Push(NamedTuple):
    """A push, as far as it is read: its commands are whole."""

    begun: bytes = b""
    commands: tuple[Command, ...] = ()
    capabilities: str = ""
    shallow: bytes = b""  # the lines before the commands
    pack: bytes = b""  # what has come of what follows them
    left_out: Mapping[str, str] = {}  # tags, and why they are not passed on


def git_service(bounds: Bounds, method: str, target: str) -> str:
    """The service that a request asks for, of this repository; Refusal for all others."""
    scope = bounds.scope
    match = GIT_SERVICE.fullmatch(target)
    if not match:
        what = "LFS" if "/info/lfs" in target else "this request (git's smart HTTP is)"
        raise Refusal(f"{what} is not served here")
    owner, repo, advertised, called = match.groups()
    insist(not repo.lower().endswith(".wiki"), "the wiki is not served here")
    insist(scope.is_named(f"{owner}/{repo}"), f"only {scope} is served here")
    insist(method == ("GET" if advertised else "POST"), f"{method} is not served here")
    service: str = called or advertised
    writes = service == "git-receive-pack"
    insist(not (writes and bounds.policy.readonly), "the policy is read-only: nothing is pushed")
    insist(not bounds.moved, bounds.moved)
    return service


def pkt(data: bytes) -> bytes:
    insist(len(data) <= 65_516, NO_PUSH)
    return b"%04x%b" % (len(data) + 4, data)


def pkt_lines(data: Bytes, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """(size, payload) of pkt-lines, as far as they are whole; at last size -1 for what is none."""
    size = 0
    while size >= 0 and len(data) >= at + 4:
        digits = bytes(data[at : at + 4])
        size = int(digits, 16) if PKT_SIZE(digits) else -1
        end = at + max(size, 4)
        if end > len(data):
            return
        yield size, bytes(data[at + 4 : end])
        at = end


def parse_push(data: bytes) -> Push:
    """The push that begins so; Refusal for what is none: a signed one too, which is wrapped."""
    commands: list[Command] = []
    capabilities, shallow, at = "", b"", 0
    for size, payload in pkt_lines(data):
        insist(size == 0 or size > 4, NO_PUSH)
        at += max(size, 4)
        if not size:
            return Push(data, tuple(commands), capabilities, shallow, pack=data[at:])
        line, nul, rest = payload.partition(b"\0")
        capabilities = rest.decode("ascii", "replace") if nul else capabilities
        words = line.decode("utf-8", "replace").rstrip("\n").split(" ", 2)
        if words[0] == "shallow":
            shallow += pkt(payload)
            continue
        insist(len(words) == 3 and "\ufffd" not in words[2], NO_PUSH)
        insist(OBJECT(words[0]) and OBJECT(words[1]), NO_PUSH)
        commands.append(Command(old=words[0], new=words[1], ref=words[2]))
    raise Refusal(NO_PUSH)


def judge_push(bounds: Bounds, commands: Sequence[Command]) -> dict[str, str]:
    """Why refs may not be pushed, by ref: the same policy as for the tools. Empty: all may."""
    if bounds.writes + len(commands) > bounds.policy.writes_per_hour:
        return {command.ref: "too many writes in the last hour" for command in commands}
    refused = {}
    for command in commands:
        kind, _, branch = command.ref.partition("refs/heads/")
        try:
            insist(not kind and branch, "only branches are pushed here: --no-follow-tags")
            deletes = NO_OBJECT(command.new) and command.ref not in bounds.made
            insist(not deletes, "branches are not deleted here, but for what was created here")
            check_branch(branch, bounds, NO_BRANCH)
        except Refusal as refusal:
            refused[command.ref] = str(refusal)
    return refused


def without_tags(push: Push, refused: Mapping[str, str]) -> Push:
    """The push without its tags, where they alone are refused: push.followTags sends them along."""
    kept = tuple(command for command in push.commands if command.ref not in refused)
    are_tags = all(ref.startswith("refs/tags/") for ref in refused)
    if not (kept and refused and are_tags) or "atomic" in push.capabilities.split():
        return push
    lines = [" ".join(command) for command in kept]  # old, new, ref
    lines[0] += f"\0{push.capabilities}"
    begun = b"".join([push.shallow, *(pkt(line.encode()) for line in lines), b"0000", push.pack])
    return push._replace(begun=begun, commands=kept, left_out=refused)


# --- doors: programs, sockets, the token, the audit's file ---


async def start(
    command: str, given: bytes, seconds: float, *, cwd: str | None, env: Mapping[str, str]
) -> tuple[int | None, bytes]:
    """Run a command of the user's by sh: (exit status, output), (None, b"") when it is too slow.

    Nothing of it outlives this: it has a process group of its own.
    """
    argv = ("/bin/sh", "-c", command)
    if os.path.basename(argv[0]) not in STARTS:
        raise AssertionError(f"{argv[0]} is not started here")
    pipe = subprocess.PIPE
    # At once, so that there is no moment at which it runs and nobody knows its number.
    child = subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, cwd=cwd, env=env, start_new_session=True
    )
    loop = asyncio.get_running_loop()
    try:
        output, _ = await loop.run_in_executor(None, child.communicate, given, seconds)
        return child.returncode, output
    except subprocess.TimeoutExpired:
        return None, b""
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


async def open_connection(
    host: str, port: int, tls: ssl.SSLContext | None, proxy: SplitResult | None,
    made: Callable[[], Exchange],
) -> Exchange:  # fmt: skip
    """A connection to an upstream; `tls`: the context, None on loopback; `proxy`: the company's."""
    loop = asyncio.get_running_loop()

    async def connect() -> Exchange:
        if not proxy or not tls:
            name = host if tls else None
            opening = loop.create_connection(made, host, port, ssl=tls, server_hostname=name)
            return (await opening)[1]
        transport, exchange = await loop.create_connection(
            made, str(proxy.hostname), proxy.port or 80
        )
        try:
            await exchange.tunnel(f"{host}:{port}", proxy)
            secured = await loop.start_tls(transport, exchange, tls, server_hostname=host)
        except BaseException:
            exchange.abort()
            raise
        assert isinstance(secured, asyncio.Transport)
        exchange.transport = secured
        return exchange

    try:
        return await asyncio.wait_for(connect(), CONNECT_SECONDS)
    except AnswerLost as error:  # nothing was sent yet but CONNECT
        raise UpstreamError(f"HTTPS_PROXY: {error}") from None
    except asyncio.TimeoutError:
        raise UpstreamError("it does not accept connections") from None
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", error.reason)
        raise UpstreamError(f"no TLS, or no certificate to trust (--ca-file): {why}") from None
    except OSError as error:
        raise UpstreamError(f"it cannot be reached: {error.strerror or error}") from None


def request_head(
    method: str, address: SplitResult, path: str, headers: Mapping[str, str], credential: str
) -> bytes:
    """The head of a request: nothing is in it that is not made here, and the token is."""
    target = address.path.rstrip("/") + path if path else address.path or "/"
    lines = [
        f"{method} {target} HTTP/1.1",
        f"Host: {address.netloc}",
        f"User-Agent: agent-vm-github-mcp-proxy/{__version__}",
        "Accept-Encoding: identity",
        *(f"{name}: {value}" for name, value in headers.items() if value),
        f"Authorization: {credential}",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def listen(address: str, port: int, made: Callable[[], Client]) -> asyncio.Server:
    """The one listening socket."""
    return await asyncio.get_running_loop().create_server(made, address, port, backlog=512)


def open_audit(path: str) -> int:
    """A descriptor that appends to a file of the user's alone, which is no link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def log(said: str) -> None:
    """A line on stderr; dropped rather than to wait for a reader: the VM chooses when it comes."""
    shown = "".join(c if c.isprintable() else "?" for c in said[:1000])  # some of it, too
    with contextlib.suppress(OSError, ValueError, TypeError):
        if select.select([], [sys.stderr], [], 0)[1]:
            print(f"github_mcp_proxy: {shown}", file=sys.stderr, flush=True)


TOKEN_TEXT = re.compile("[!-~]{1,4096}").fullmatch


def check_token(value: Json) -> str:
    if not isinstance(value, str) or not TOKEN_TEXT(value):
        raise ProxyError("the GitHub token has characters that no token has (it is not shown)")
    return value


class Token:
    """GitHub's token: given once, or asked of a command again and again. Never printed."""

    def __init__(self, value: str, command: str) -> None:
        self.value = value
        self.command = command
        self.expires = 0.0 if command else float("inf")  # seconds since the epoch
        self.renewing: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return "<token>"

    async def fresh(self) -> str:
        """The token, renewed in time."""
        if self.command and self.expires - time.time() < TOKEN_MARGIN:
            await self.renew()
        return self.value

    async def renew(self) -> None:
        """Ask the command, once for all who wait."""
        if self.renewing is None or self.renewing.done():
            self.renewing = asyncio.ensure_future(self.ask())
        await asyncio.shield(self.renewing)

    async def ask(self) -> None:
        # The command's cache may still have the token that was refused: it is told which that is.
        refused = hashlib.sha256(self.value.encode()).hexdigest() if self.value else ""
        env = {**os.environ, "GITHUB_TOKEN_REFUSED": refused}
        status, output = await start(self.command, b"", TOKEN_SECONDS, cwd=None, env=env)
        if status != 0:
            raise UpstreamError("the host's token command failed: its user has to look at it")
        try:
            said = json.loads(output)
            value, expires = check_token(said["token"]), said.get("expires_at")
            if isinstance(expires, str):
                from datetime import datetime

                expires = datetime.fromisoformat(expires.replace("Z", "+00:00")).timestamp()
            self.expires = float(expires) if expires else float("inf")
        except (ValueError, KeyError, TypeError, AttributeError, ProxyError):
            raise UpstreamError("the host's token command gave no usable token") from None
        self.value = value


# --- the story: what both kinds of request share ---

APPROVE_SECONDS = 60  # the TypeScript SDK's clients give a call up then, too
# Of the environment, what a command that only says yes or no has no need of.
SECRET_NAME = re.compile("GITHUB_MCP_|TOKEN|SECRET|PASSW|PASSP|API_?KEY|ACCESS_?KEY", re.I)
UNRECORDED = "the proxy cannot write its audit file: the host's user has to look at it"


class Repository:
    """The one repository: what may be done with it, what is known of it, and what was done."""

    def __init__(
        self, scope: Scope, policy: Policy, upstream: Upstream, git: Upstream | None, audit: Audit,
    ) -> None:  # fmt: skip
        self.scope = scope
        self.policy = policy
        self.upstream = upstream
        self.git = git
        self.audit = audit
        self.known = Bounds(scope, policy, is_asked=False)
        self.writes: list[float] = []  # when, in the last hour
        self.id = 0
        self.asked_at = float("-inf")
        self.learning: asyncio.Future[None] | None = None
        self.turn = asyncio.Lock()  # a person is asked: one question at a time

    def bounds(self) -> Bounds:
        self.writes = [when for when in self.writes if when > time.monotonic() - 3600]
        return self.known._replace(writes=len(self.writes))

    def learnt(self, **facts: Json) -> None:
        self.known = self.known._replace(**facts)

    async def know(self, *, wait: bool) -> None:
        """Learn the repository's id and default branch, anew each minute that it is used."""
        age = time.monotonic() - self.asked_at
        if self.learning is None or age > (KNOWN_SECONDS if self.known.defaults else RETRY_SECONDS):
            self.asked_at = time.monotonic()
            self.learning = asyncio.ensure_future(self.upstream.learn(self))
        if wait:
            await asyncio.shield(self.learning)

    async def ask_user(self, question: Object) -> str:
        """Why the host's user does not allow a write; "" when they do."""
        if self.turn.locked():
            return "the host's user is asked about another write: write one after the other"
        env = {key: value for key, value in os.environ.items() if not SECRET_NAME.search(key)}
        given = dumps({"repository": str(self.scope), **question})
        command = self.policy.approve
        async with self.turn:
            status, output = await start(command, given, APPROVE_SECONDS, cwd="/", env=env)
        if status == 0:
            return ""
        if status is None:
            return f"the host's user did not allow it within {APPROVE_SECONDS} s"
        said = "".join(c if c.isprintable() else " " for c in output.decode(errors="replace"))
        return said.strip()[:300] or "the host's user did not allow it"


# --- the story: a message of MCP ---


async def serve_mcp(repository: Repository, client: Client) -> None:
    """Read a message, judge it, send on what was rebuilt of it, and give back the answer."""
    audit, policy, upstream = repository.audit, repository.policy, repository.upstream
    if client.head.first[0] == "DELETE":
        return await end_session(repository, client)
    async with upstream.places:
        message = parse_message(await client.receive())
        method = message["method"]
        headers = client.mcp_headers(message)
        # A first look, as if the default branch were HEAD, as none is called: of what may pass the
        # rebuilt message is small, and only that is held until the real one is known.
        verdict = decide(Bounds(repository.scope, policy, defaults=frozenset(["HEAD"])), message)
        if isinstance(verdict, Forward):
            message = verdict.message
            if method == "tools/call":
                await repository.know(wait=verdict.write)
            verdict = decide(repository.bounds(), message)
    arguments = as_object(as_object(message.get("params")).get("arguments"))
    is_write = isinstance(verdict, Forward) and verdict.write
    deed = audit.about(method, verdict.tool, arguments, is_write)
    if isinstance(verdict, Forward) and client.is_probe:
        verdict = Refuse("a probe is not passed on", UPSTREAM_FAILED, verdict.tool)
    if isinstance(verdict, Forward) and is_write and policy.approve:
        asked = {"tool": verdict.tool, "target": deed.target, "arguments": arguments}
        reason = await repository.ask_user(asked)
        refused = Refuse(reason, tool=verdict.tool) if reason else None
        verdict = refused or decide(repository.bounds(), message)
    if isinstance(verdict, Forward) and not audit.record(deed, "forward"):
        verdict = Refuse(UNRECORDED, UPSTREAM_FAILED, verdict.tool)
    if isinstance(verdict, Refuse):
        if not client.is_probe:
            audit.record(deed, "refuse", verdict.reason)
        return client.tell(message, verdict)
    if verdict.write:
        repository.writes.append(time.monotonic())
    try:
        with contextlib.closing(await upstream.post(verdict, headers)) as exchange:
            await relay_mcp(repository, client, exchange, verdict, deed)
    except UpstreamError as error:
        lost = deed.write and isinstance(error, AnswerLost)
        audit.record(deed, "unknown" if lost else "failed", str(error))
        failed = f"GitHub's MCP server cannot be used: {error}"
        client.tell(message, Refuse(failed, UPSTREAM_FAILED))


async def end_session(repository: Repository, client: Client) -> None:
    """Pass on that a client is done with its session."""
    session = client.head.headers.get("mcp-session-id", "")
    demand(session and not client.is_probe, "there is no session to end")
    demand(not client.head.length, "a DELETE has no body")  # nor a place for one
    await client.receive()
    try:
        exchange = await repository.upstream.send("DELETE", "", {"Mcp-Session-Id": session})
        exchange.abort()  # what it says besides is of no use
        client.answer(200 if exchange.status < 300 else exchange.status, b"")
    except UpstreamError as error:
        client.tell({}, Refuse(f"GitHub's MCP server cannot be used: {error}", UPSTREAM_FAILED))


async def relay_mcp(
    repository: Repository, client: Client, exchange: Exchange, forward: Forward, deed: Deed
) -> None:
    """Give the upstream's answer to the client, checked; what comes before it as it comes."""
    audit, upstream, hide = repository.audit, repository.upstream, repository.upstream.hide
    message = forward.message
    if exchange.status >= 300:
        audit.record(deed, "failed", f"HTTP {exchange.status}")
        refuse = Refuse("by the upstream", INVALID_REQUEST)
        return client.tell(message, refuse, hide(await exchange.whole()), exchange.status)
    if exchange.status != 200 or "id" not in forward.message:
        return client.answer(202, b"")
    headers = [f"Mcp-Session-Id: {exchange.session}"] if exchange.session else []
    kind = ""
    while kind != "answer":
        await exchange.is_coming()
        async with upstream.places:
            kind, message, data = await exchange.next_message(forward)
            if kind == "note":
                client.event(hide(data), *headers)
            elif kind == "answer":
                if forward.write:
                    became = outcome(message)
                    audit.record(deed, *became)
                    if forward.tool == "create_branch" and became[0] == "done":
                        made = {f"refs/heads/{deed.target['branch']}"}
                        repository.learnt(made=repository.known.made | made)
                try:
                    shown = client.shown(repository.bounds(), forward, message)
                    client.answer(200, hide(data if shown is message else dumps(shown)), *headers)
                except Exception as error:  # whatever is wrong with it: then it is not shown
                    is_known = isinstance(error, Refusal)
                    reason = str(error) if is_known else "the answer is malformed"
                    audit.record(deed, "withheld", reason)
                    client.tell(forward.message, Refuse(reason, UPSTREAM_FAILED, forward.tool))
            await client.drain()
    return await exchange.finish()


# --- the story: a request of git ---


async def serve_git(repository: Repository, client: Client) -> None:
    """Pass a fetch, or a push that is within the policy, on both ways as it comes."""
    client.is_last = True  # the rest of a body that is not wanted is not read
    method, target, _ = client.head.first
    audit = repository.audit
    service, push = "", Push()
    deeds: list[Deed] = []
    try:
        insist(repository.git, "git is not served here (--git)")
        assert repository.git
        await repository.know(wait=False)
        service = git_service(repository.bounds(), method, target)
        lengths = client.head.headers.keys() & {"content-length", "transfer-encoding"}
        insist(bool(lengths) == (method == "POST"), "a POST has a body, and a GET has none")
        if method == "POST" and service == "git-receive-pack":
            push = await read_push(client)
            push, refused = await judged(repository, client, push)
            if refused:
                while await client.part():
                    pass  # git reads no answer before it has sent all
                whole = {command.ref: WHOLE for command in push.commands}
                return client.report_push({**whole, **push.left_out, **refused})
        insist(not client.is_probe, "a probe is not passed on")
        targets = [{"ref": command.ref} for command in push.commands]
        deeds = [audit.about("git", service, about, bool(targets)) for about in targets or [{}]]
        insist(all(audit.record(deed, "forward") for deed in deeds), UNRECORDED)
        repository.writes += [time.monotonic() for _ in targets]
        await repository.git.relay(client, repository, service, push, deeds)
    except Refusal as refusal:
        if not client.is_probe:
            deed = audit.about("git", service, {"path": target[:200]})
            audit.record(deed, "refuse", str(refusal))
        for deed in deeds:  # those before the one that could not be recorded
            audit.record(deed, "failed", str(refusal))
        client.answer(403, f"refused: {refusal}\n".encode(), kind="text/plain")
    except UpstreamError as error:
        lost = bool(push.commands) and isinstance(error, AnswerLost)
        for deed in deeds:
            audit.record(deed, "unknown" if lost else "failed", str(error))
        client.answer(502, f"GitHub: {error}\n".encode(), kind="text/plain")


async def read_push(client: Client) -> Push:
    """A push, read as far as its commands go; what follows them is still to come."""
    insist("content-encoding" not in client.head.headers, "a push must not be compressed whole")
    begun, at, size = bytearray(), 0, -1  # at: of the first line that is not whole yet
    while size:  # 0 ends the commands; all of them are parsed once, when they are there
        more = await client.part()
        insist(more and len(begun) <= MAX_COMMANDS, "this push has no end of its commands")
        begun += more
        for size, _ in pkt_lines(begun, at):
            insist(size >= 0, NO_PUSH)
            at += max(4, size)
            if not size:
                break
    push = parse_push(bytes(begun))
    if not push.commands:  # git asks so whether it may, before it sends much
        alone = begun == b"0000" and not await client.part()
        insist(alone, "this push has no commands")
    return push


async def judged(repository: Repository, client: Client, push: Push) -> tuple[Push, dict[str, str]]:
    """(the push without tags that come along, why refs of it may not be pushed): where one may not,
    none is. The user is asked about what is left."""
    if not push.commands:
        return push, {}
    await repository.know(wait=True)
    refused = judge_push(repository.bounds(), push.commands)
    left = without_tags(push, refused)
    refused = {} if left.left_out else refused
    if not refused and repository.policy.approve and not client.is_probe:
        moves = [command._asdict() for command in left.commands]
        refs = " ".join(command.ref for command in left.commands)
        asked = {"tool": "git push", "target": {"ref": refs}, "refs": moves}
        reason = await repository.ask_user(asked)
        refused = judge_push(repository.bounds(), left.commands)
        if reason:
            refused = {command.ref: reason for command in left.commands}
    why = {**left.left_out, **refused}
    if why and not client.is_probe:
        said = "; ".join(f"{quoted(ref)}: {reason}" for ref, reason in why.items())
        deed = repository.audit.about("git", "git-receive-pack", {"ref": " ".join(why)})
        repository.audit.record(deed, "refuse", said[:1000])
    return left, refused


async def serve_client(repository: Repository, gate: Gate, client: Client) -> None:
    """The requests of one connection, one after the other, each checked anew."""
    try:
        while not client.is_last:
            try:
                await client.next_request()
                client.is_probe = gate.is_probe(client.head)
                gate.check(client.head)
                client.is_known = True
                is_git = client.head.first[1].startswith(GIT)
                await (serve_git if is_git else serve_mcp)(repository, client)
            except ProtocolError as error:
                if not client.is_probe:
                    audit = repository.audit
                    audit.record(audit.about("", "", {}), "refuse", str(error))
                # Where it cannot be read to its end, it is the last.
                client.is_last = client.is_last or client.left != 0
                client.tell({}, Refuse(str(error), error.code), status=error.status)
            await client.drain()
    except UpstreamError:
        pass  # it is the client that has gone
    except Exception as error:
        log(f"a fault of the proxy: {type(error).__name__}")  # no text: it may hold a value
        client.abort()
    client.close()


# --- you may stop here: what follows only calls what is above ---


# --- pure: HTTP/1.1, event streams and JSON-RPC, as they are written ---

MAX_HEAD = 32 * 1024
MAX_ANSWER = 16 * 1024 * 1024  # GitHub serves files of up to 10 MB this way, in base64
HEADERS = re.compile(
    r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*"
).fullmatch  # no folding, no space before the colon, no controls
VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*").fullmatch
LENGTH = re.compile("[0-9]{1,12}", re.ASCII).fullmatch
CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,8}").fullmatch
POSTED = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
JSON_TYPE = "application/json"
EVENT_STREAM = "text/event-stream"
EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
LINE_END = re.compile(rb"\r\n|\n|\r")
CHUNKED = -1  # the length of a body that does not say its own
LAST_CHUNK = b"0\r\n\r\n"
BAD_CHUNK = "a malformed chunk"


def parse_head(data: Bytes, *, is_request: bool) -> Head:
    """The head of a message, without the empty line that ends it; strict, since a lenient reader
    can be made to see another message than the next one."""
    line, _, block = data.decode("latin-1").partition("\r\n")
    words = line.split(" ", 2)
    demand(len(words) == 3 and VALUE(line), "not an HTTP request, or no answer to one")
    demand(HEADERS(block), "a malformed header")
    headers: dict[str, str] = {}
    for row in block.split("\r\n")[:-1]:
        name, _, value = row.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            # It makes two readers see two messages (RFC 9112, 11.2).
            demand(not is_request, f"the header {name} is given twice")
            value = headers[name] + ", " + value
        headers[name] = value
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    first, size = (words[0], words[1], words[2]), 0
    if coding is not None:
        known = coding.lower() == "chunked" and length is None
        demand(known, "a body with an unknown or a double length")
        size = CHUNKED
    elif length is not None:
        demand(LENGTH(length), "a Content-Length that is not a number")
        size = int(length)
    else:
        # One that ends with its connection could not be told from half of it.
        demand(is_request or first[1] in ("204", "304"), "a body without a length")
    return Head(first, headers, size)


def chunk_of(data: Bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), bytes(data))


def event_data(event: bytes) -> bytes:
    """The data of an event: its data lines, joined. Empty for comments and priming events."""
    data = [line[5:] for line in LINE_END.split(event) if line.startswith(b"data:")]
    return b" ".join(line[1:] if line.startswith(b" ") else line for line in data)


# What the upstream may send besides answers. It was told that nobody here takes questions.
NOTES = frozenset(
    "notifications/progress notifications/message notifications/cancelled "
    "notifications/tools/list_changed".split()
)


def kind_of(message: Json, forward: Forward) -> str:
    """What a message is: "answer", "note", "" for what does not pass; AnswerLost for a question."""
    if not isinstance(message, dict):
        return ""
    method, result = message.get("method"), as_object(message.get("result"))
    asks = result.get("resultType", "complete") != "complete"  # since 2026-07-28 so
    if asks or (method is not None and method != "ping" and "id" in message):
        raise AnswerLost("it asks what nobody here answers")
    if method is not None:
        return "note" if str(method) in NOTES else ""
    whole = "id" in forward.message and ("result" in message or "error" in message)
    return "answer" if whole and message.get("id") == forward.message["id"] else ""


def told_of(message: Object, refuse: Refuse) -> tuple[int, Object]:
    """(HTTP status, body) of why a message has no answer. A tool's goes where the model reads it:
    in a result."""
    modern = is_modern(message)
    made: Object = {"jsonrpc": "2.0", "id": message.get("id")}
    if refuse.tool and "id" in message:
        said = "Refused by the GitHub proxy: " + refuse.reason
        made["result"] = {"content": [{"type": "text", "text": said}], "isError": True}
        made["result"].update({"resultType": "complete"} if modern else {})
        return 200, made
    failed = refuse.code == UPSTREAM_FAILED
    reason = refuse.reason if failed else "refused: " + refuse.reason
    made["error"] = {"code": refuse.code, "message": reason}
    if "id" in message and (failed or not modern):
        return 200, made
    return 404 if modern and refuse.code == NO_METHOD else 400, made


def is_modern(message: Object) -> bool:
    """Whether a request says its protocol version itself: 2026-07-28 and later."""
    return MODERN in as_object(as_object(message.get("params")).get("_meta"))


# --- pure: who may ask ---

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "host.lima.internal")
PATHS = ("/mcp", "/mcp/", "/")
PORT = re.compile(r":[0-9]{0,5}$")
VISIBLE = re.compile("[!-~]{0,256}").fullmatch


class Head(NamedTuple):
    """What an HTTP message begins with: its first line, in three words, and its headers."""

    first: tuple[str, str, str]
    headers: Mapping[str, str]  # names in lower case
    length: int  # of the body, or CHUNKED


class Gate(NamedTuple):
    """Who may ask: the names that the proxy is called by, and what Authorization: Bearer has."""

    hosts: set[str]
    secret: bytes  # b"": nothing is asked for
    probe: bytes  # whose requests are judged like others, never passed on, and not recorded

    def is_probe(self, head: Head) -> bool:
        """A probe's wrong secret is the right one and something more."""
        return bool(self.probe) and self.given(head).startswith(b"Bearer " + self.probe)

    def given(self, head: Head) -> bytes:
        """What a request carries; of git also as a password, of any user."""
        # Bytes of any value: compare_digest takes no non-ASCII str.
        given = head.headers.get("authorization", "").encode("latin-1")
        if head.first[1].startswith(GIT) and given[:6].lower() == b"basic ":
            with contextlib.suppress(ValueError):
                return b"Bearer " + base64.b64decode(given[6:]).partition(b":")[2]
        return given

    def check(self, head: Head) -> None:
        """ProtocolError when a request is not for this endpoint, or not from who may use it."""
        method, target, version = head.first
        headers = head.headers
        demand(version == "HTTP/1.1", "HTTP/1.1 is spoken here", 505)
        is_ours = PORT.sub("", headers.get("host", "")).lower() in self.hosts
        demand(is_ours, "Host is not a name of this proxy", 403)
        if "origin" in headers:
            scheme, _, authority = headers["origin"].partition("://")
            is_ours = PORT.sub("", authority).lower() in self.hosts and scheme in ("http", "https")
            demand(is_ours, "requests from other origins are refused", 403)
        is_git = target.startswith(GIT)
        demand(is_git or target in PATHS, "the endpoint is /mcp", 404)
        given = self.given(head)
        known = [b"Bearer " + secret for secret in (self.secret, self.probe) if secret]
        allowed = not self.secret or any(hmac.compare_digest(given, secret) for secret in known)
        # git sends a password only where it is asked for one, and MCP's clients begin a login then.
        status = 401 if is_git and not given else 403
        demand(allowed, "the proxy's secret is missing or wrong (Authorization)", status)
        methods = ("GET", "POST") if is_git else ("DELETE", "POST")
        demand(method in methods, f"here are served {' and '.join(methods)}", 405)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        is_json = is_git or method == "DELETE" or kind == JSON_TYPE
        demand(is_json, "Content-Type must be application/json", 415)
        demand(VISIBLE(headers.get("mcp-session-id", "")), "Mcp-Session-Id is malformed")


# --- pure: mirrored headers (2026-07-28) ---

HEADER_MISMATCH = -32020
VERSION_HEADER = re.compile("[A-Za-z0-9.-]{0,32}").fullmatch


def version_headers_of(headers: Mapping[str, str], message: Object) -> Object:
    """The header that says an older request's version. A newer one's headers must say what its
    body says, or two readers see two messages; what passes needs no base64."""
    if not is_modern(message):
        value = headers.get("mcp-protocol-version", "")
        demand(VERSION_HEADER(value), "MCP-Protocol-Version is malformed")
        return {"MCP-Protocol-Version": value}
    expected = mirrored_headers(message)
    for name in {*expected, "mcp-param-owner", "mcp-param-repo"}:
        left_out = name.startswith("mcp-param-") and name not in headers  # tools/list says which
        same = left_out or headers.get(name) == expected.get(name)
        demand(same, f"{name} differs from the body", code=HEADER_MISMATCH)
    return {}


def mirrored_headers(message: Object) -> Object:
    """The headers of a modern request, made from what it says alone; {} for an older one."""
    if not is_modern(message):
        return {}
    params = message["params"]
    made = {"mcp-protocol-version": params["_meta"][MODERN], "mcp-method": message["method"]}
    made.update({"mcp-name": params["name"]} if "name" in params else {})
    for key, value in as_object(params.get("arguments")).items():
        made.update({f"mcp-param-{key}": value} if key in ("owner", "repo") else {})
    return made


# --- pure: secrets in text ---

# What GitHub's tokens look like, and the parameters of URLs that carry their own permission, with
# all that follows them (6 ends \u0026). Strangers write what is searched here: each of the patterns
# takes time in proportion to the text, so none looks back, and none ends in what may not follow.
TOKENS = re.compile(TOKEN_LIKE.pattern.encode())
SIGNED = re.compile(
    rb"[?&6](?=[tsjx])(?:token|sig|signature|jwt|x-amz-[a-z-]{1,40})=[A-Za-z0-9%._~+/=-]{20}",
    re.IGNORECASE,
).finditer
IN_URL = re.compile(rb"[^\s\"\\<>']*(?:\\+u0026[^\s\"\\<>']*)*").fullmatch
TO_END = re.compile(rb"[^\s\"\\<>')]*(?:\\+u0026[^\s\"\\<>')]*)*").match
# Files are read, changed and written back: what only looks like a secret has to stay as it is.
IN_A_WORD = re.compile(rb"[A-Za-z0-9](?<!\\[nrtbf])(?<!\\u[0-9a-fA-F]{4})$")


def blank(size: int) -> bytes:
    return b"[redacted]".ljust(size, b"*")


def redact(data: Bytes, *tokens: bytes) -> Bytes:
    """`data`, as long as it was, without the tokens given, what looks like one, and signed URLs."""

    def token_like(match: re.Match[bytes]) -> bytes:
        before = match.string[max(0, match.start() - 6) : match.start()]
        return match[0] if IN_A_WORD.search(before) else blank(len(match[0]))

    for token in tokens:
        if len(token) >= 16 and token in data:
            data = data.replace(token, blank(len(token)))
    if TOKENS.search(data):
        data = TOKENS.sub(token_like, data)
    return unsigned(data) if b"://" in data and b"=" in data else data


def unsigned(data: Bytes) -> Bytes:
    """`data` with the permissions in addresses blanked: what stands outside of one stays."""
    spans, looked, in_url = [], 0, False  # looked: as far as it is known what the text is
    for match in SIGNED(data):
        at = match.start() + 1
        if at >= looked:
            begun = data.rfind(b"://", looked, at)
            in_url = bool((in_url or begun >= 0) and IN_URL(data, max(begun, looked), at))
            rest = TO_END(data, at) if in_url else None
            looked = rest.end() if rest else at
            spans += [(at, looked)] if rest else []
    if not spans:
        return data
    made = bytearray(data)
    for at, end in spans:
        made[at:end] = blank(end - at)
    return made


# --- pure: the list of tools, and what the agent is told ---

HIDDEN = "Lockdown can hide what outsiders wrote: GITHUB_MCP_LOCKDOWN=0, on the host, shows it."
# Of github-mcp-server, what may be so by it: it says nothing of what it leaves out of a list.
LOCKED = ("restricted by lockdown mode", '"comments":[]', '"parent":null')


def checked_answer(bounds: Bounds, forward: Forward, message: Object) -> Object:
    """The upstream's answer to `forward` as the VM gets it, the same object when nothing changes;
    Refusal when it cannot be shown."""
    result = message.get("result")
    if not isinstance(result, dict):
        return message
    shown, method = result, forward.message["method"]
    if method == "tools/call":
        shown = checked_result(bounds.scope, forward.check, result)
        if bounds.policy.lockdown and forward.tool.endswith("_read"):
            text = str(as_object((result.get("content") or [{}])[0]).get("text"))
            if text == "[]" or any(shape in text for shape in LOCKED):
                shown = {**shown, "content": [*shown["content"], {"type": "text", "text": HIDDEN}]}
    elif method == "tools/list":
        shown = listed_tools(bounds.policy, result)
    elif method in ("initialize", "server/discover"):
        offered = result.get("capabilities") or {}
        kept = {key: offered[key] for key in ("tools", "logging") if key in offered}
        shown = {**result, "capabilities": kept, "instructions": instructions(bounds)}
    return message if shown is result else {**message, "result": shown}


def listed_tools(policy: Policy, result: Object) -> Object:
    """Of the upstream's tools those that may be called, their schemas narrowed to what passes."""
    narrowed = [narrow_tool(tool, policy) for tool in result.get("tools") or []]
    scope = {"cacheScope": "private"} if "cacheScope" in result else {}
    return {**result, "tools": [tool for tool in narrowed if tool], **scope}


def narrow_tool(offered: Object, policy: Policy) -> Object:
    """A tool as it may be called; {} where it may not, or needs what the table does not know."""
    tool = TOOLS.get(offered["name"])
    if tool is None or not policy.has(tool.needs) or (tool.write and policy.readonly):
        return {}
    schema = offered["inputSchema"]
    rules = {key: rule for key, rule in tool.parameters.items() if policy.has(rule.needs)}
    required = [key for key in schema.get("required", []) if key not in ("owner", "repo")]
    properties = {}
    for key, rule in {"owner": LINE, "repo": LINE, **rules}.items():
        if key in schema.get("properties", {}):
            properties[key] = prop = dict(schema["properties"][key])
            if rule.choices and "enum" in prop:
                prop["enum"] = [value for value in prop["enum"] if value in rule.choices]
    if not rules.keys() >= set(required):
        return {}
    told = ("name", "title", "description", "annotations")
    kept = {key: value for key, value in offered.items() if key in told}
    narrow = {"type": "object", "properties": properties, "required": required}
    return {**kept, "inputSchema": {**narrow, "additionalProperties": False}}


def instructions(bounds: Bounds) -> str:
    """What the agent is told of the server: in place of the upstream's own text."""
    scope, policy = bounds.scope, bounds.policy
    defaults = " and ".join(sorted(bounds.defaults | {policy.default_branch} - {""}))
    defaults = defaults or "the default branch"
    branches, paths = ", ".join(policy.branches), ", ".join(policy.deny_paths)
    writes = not policy.readonly
    told = {
        f"This server gives access to one GitHub repository, {scope}, and to nothing else.": True,
        "Leave out owner and repo: they are filled in.": True,
        "It is read-only.": policy.readonly,
        f"{defaults} cannot be written: use a branch and open a pull request.": writes
        and "default-branch" not in policy.allow,
        f"Branches that can be written: {branches}.": writes and branches != "**",
        f"Paths that cannot be written: {paths}.": writes,
        HIDDEN: policy.lockdown,
        "Pull requests cannot be merged here.": writes and "merge" not in policy.allow,
        "Search takes words, phrases in quotes and qualifiers, also with -; or is refused.": True,
    }
    return "\n".join(sentence for sentence, holds in told.items() if holds)


# --- pure: git's answers to a push (gitprotocol-common, gitprotocol-pack) ---

GIT_PROTOCOL = re.compile("version=[0-2]").fullmatch


def pushed_refs(report: Bytes, push: Push) -> dict[str, str]:
    """Ref -> why it was not taken, or "", of the upstream's answer to a push.

    The side-band's other bands have what the upstream says of file names: the pusher's words.
    """
    if "side-band" in push.capabilities:
        report = b"".join(line[1:] for _, line in pkt_lines(report) if line[:1] == b"\x01")
    refs = {command.ref for command in push.commands}
    found: dict[str, str] = {}
    for _, line in pkt_lines(report):
        word, _, rest = line.decode(errors="replace").rstrip("\n").partition(" ")
        ref, _, why = rest.partition(" ")
        if word in ("ok", "ng") and ref in refs:
            found.setdefault(ref, (why or "?") if word == "ng" else "")
    return found


# --- pure: what the audit and the receipt say ---

TARGETS = (
    "method issue_number pullNumber discussionNumber commentId comment_id branch from_branch path "
    "ref sha tag head base name state"
).split()
PLAIN_WORD = re.compile(r"[\w./@+-]+", re.ASCII).fullmatch
PLAIN_NAME = re.compile(r"[\w/$-]{0,64}", re.ASCII).fullmatch
GIT_NAMES = {"git-upload-pack": "git fetch", "git-receive-pack": "git push"}
MAX_RECEIPT = 20  # lines about what was done and refused
MAX_REFUSED = 1000  # kinds of refusals that are told apart; the rest is one: memory has an end


# --- the audit ---


class Deed(NamedTuple):
    """Something that is asked for: what it is, and what the receipt says of it if it writes."""

    method: str
    tool: str
    target: Object
    write: bool
    line: Object


class Audit:
    """Every decision: a line of JSON in a file, on stderr when it is worth one; and the receipt."""

    def __init__(self, fd: int = -1) -> None:
        self.fd = fd  # -1: no file
        self.counts = {"reads": 0, "writes": 0, "refused": 0}
        self.lines: dict[object, Object] = {}  # of the receipt: each write, each kind of refusal

    def receipt(self) -> str:
        """In JSON Lines: the counts, what was written, what was refused, how much is left out.

        Writes go first: none is hidden by refusals, of which there may be many.
        """
        refusals = ("refused", "withheld")
        lines = sorted(self.lines.values(), key=lambda line: line["verdict"] in refusals)
        more = len(lines[MAX_RECEIPT:])
        rows = [self.counts, *lines[:MAX_RECEIPT], *([{"more": more}] if more else [])]
        return "".join(json.dumps(row) + "\n" for row in rows)

    def about(self, method: str, tool: str, arguments: Object, write: bool = False) -> Deed:
        """What is asked for: its numbers, names and paths; never text."""
        tool = tool if PLAIN_NAME(tool) else "?"  # the guest's word for no tool of ours
        method = method if PLAIN_NAME(method) else "?"
        target: Object = {
            key: value if isinstance(value, int) or len(value) <= 300 else value[:299] + "…"
            for key, value in arguments.items()
            if key in TARGETS and isinstance(value, (int, str))
        }
        files = arguments.get("files")
        if isinstance(files, list):
            target["paths"] = [str(as_object(file).get("path"))[:200] for file in files[:20]]
        # What the guest chose is quoted, so that it does not read like words of ours.
        what = GIT_NAMES.get(tool, tool) or method or "a request"
        for key, value in target.items():
            what += f" {key}={value if PLAIN_WORD(str(value)) else json.dumps(value)}"
        line = {"verdict": "unknown", "what": what[:300], "reason": "", "url": "", "count": 1}
        return Deed(method=method, tool=tool, target=target, write=write, line=line)

    def record(self, deed: Deed, verdict: str, reason: str = "", url: str = "") -> bool:
        """Record that it is let pass ("forward") or not ("refuse"), or what became of it: done,
        failed, unknown, or its answer withheld. False when it cannot be: then it may not pass."""
        is_flood = verdict == "refuse" and self.counts["refused"] >= MAX_REFUSED
        if not (is_flood or self.append(deed, verdict, reason, url)) and verdict == "forward":
            return False
        if verdict in ("refuse", "withheld"):
            self.counts["refused"] += 1
            said = "refused" if verdict == "refuse" else verdict
            kind = (verdict, deed.line["what"], reason)
            if kind not in self.lines and len(self.lines) >= MAX_REFUSED:
                kind = (verdict, "others", "")
            line = {**deed.line, "what": kind[1], "verdict": said, "reason": kind[2], "count": 0}
            self.lines.setdefault(kind, line)["count"] += 1
        elif verdict != "forward":
            deed.line.update(verdict=verdict, reason=reason, url=url)
        elif deed.write:
            self.counts["writes"] += 1
            self.lines[object()] = deed.line
        elif deed.method in ("tools/call", "git"):
            self.counts["reads"] += 1
        return True

    def append(self, deed: Deed, verdict: str, reason: str, url: str) -> bool:
        """Whether the line could be written."""
        if verdict not in ("forward", "done"):
            log(f"{' '.join(filter(None, [deed.method, deed.tool, verdict]))}: {reason}")
        if self.fd < 0:
            return True
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        line = {
            "time": f"{stamp}.{int(now % 1 * 1000):03d}Z",
            "method": deed.method,
            "tool": deed.tool,
            "verdict": verdict,
            "reason": reason,
            "target": {**deed.target, **({"url": url} if url else {})},
        }
        data = redact(dumps(line)) + b"\n"
        try:
            return os.write(self.fd, data) == len(data)
        except OSError as error:
            log(f"cannot write the audit file: {error.strerror}")
            return False


# --- plumbing: connections, bodies and answers; nothing is decided here ---

PAUSE_AT = 128 * 1024  # bytes that wait before their sender is paused
REQUEST_SECONDS = 15  # a whole request of MCP, from its first byte on
READ_SECONDS = 30  # a client that does not read its answer, and so takes a place
IDLE_SECONDS = 300  # a connection without a request
STALL_SECONDS = 120  # each wait for a client that pushes or fetches
LINGER_SECONDS = 0.5  # for the end of a stream whose answer is there
POOL_SECONDS = 60  # shorter than servers keep idle connections
MAX_PACK = 4 * 1024**3  # GitHub refuses more than 2 GiB
MAX_REPORT = 1024 * 1024  # bytes of GitHub's answer to a push that are looked at
MAX_PLACES = 8  # messages that are held whole at the same time; the rest wait
MAX_CLIENTS = 250  # each may have a connection to the upstream


class Wire(asyncio.Protocol):
    """A connection of either side: what has come of a message, and who waits for more."""

    transport: asyncio.Transport
    head: Head

    def __init__(self, wires: set[Any], patience: float, story: Any = None) -> None:
        self.wires = wires  # all of its side
        self.patience = patience  # seconds that one wait may take
        self.story = story  # what is done with a client's, once it is there
        self.task: asyncio.Future[Any] | None = None
        self.buffer = bytearray()
        self.reader: asyncio.Future[None] | None = None  # set while somebody waits for more
        self.room = asyncio.Event()  # not set while the peer reads too slowly
        self.room.set()
        self.ended = False
        self.failure = "it closed the connection"
        self.is_busy = False  # nothing reads: what comes is early
        self.timer: asyncio.TimerHandle | None = None
        self.left = 0  # bytes of the body, or of its chunk; CHUNKED: a chunk's size is next

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.wires.add(self)
        self.task = asyncio.ensure_future(self.story(self)) if self.story else None

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) > PAUSE_AT and self.is_busy:
            self.abort()  # to pause it would hide that the client leaves
        elif len(self.buffer) > PAUSE_AT:
            self.transport.pause_reading()
        self.wake()

    def wake(self) -> None:
        if self.reader and not self.reader.done():
            self.reader.set_result(None)

    def eof_received(self) -> None:
        self.ended = True
        self.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.eof_received()
        self.wires.discard(self)
        self.room.set()
        self.allow(0)
        if self.task:
            self.task.cancel()

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()

    def allow(self, seconds: float) -> None:
        """Give the connection up when it lasts longer than that from now; 0: however long."""
        if self.timer:
            self.timer.cancel()
        loop = asyncio.get_running_loop()
        self.timer = loop.call_later(seconds, self.expire) if seconds else None

    def expire(self) -> None:
        self.failure = "it did not answer in time"
        self.abort()

    def abort(self) -> None:
        self.ended = True
        self.transport.abort()

    async def more(self) -> None:
        """Wait for more; AnswerLost when there will be none."""
        had = len(self.buffer)
        if not self.ended:
            self.reader = asyncio.get_running_loop().create_future()
            timer = asyncio.get_running_loop().call_later(self.patience, self.expire)
            try:
                await self.reader
            finally:
                timer.cancel()
        if len(self.buffer) == had:
            raise AnswerLost(self.failure)

    def take(self, size: int) -> bytes:
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        if len(self.buffer) < PAUSE_AT:
            self.transport.resume_reading()
        return data

    def fault(self, reason: str, status: int = 400) -> Exception:
        if self.story:
            return ProtocolError(reason, status)
        return AnswerLost(f"its answer is malformed: {reason}")

    async def until(self, end: bytes, limit: int, reason: str, status: int = 400) -> bytes:
        """What comes before `end`, which is taken off."""
        while (at := self.buffer.find(end, 0, limit)) < 0:
            if len(self.buffer) >= limit:
                raise self.fault(reason, status)
            await self.more()
        return self.take(at + len(end))[: -len(end)]

    async def read_head(self, limit: float) -> None:
        """Read a head; a body of up to `limit` bytes is next."""
        data = await self.until(b"\r\n\r\n", MAX_HEAD, f"a head of more than {MAX_HEAD} bytes", 431)
        try:
            self.head = parse_head(data + b"\r\n", is_request=bool(self.story))
        except ProtocolError as error:
            raise self.fault(str(error), error.status) from None
        self.limit, self.left = limit, self.head.length
        self.size = max(0, self.left)  # as far as it is known

    async def part(self) -> bytes:
        """Some more of the body; b"" when it is over."""
        if self.left == CHUNKED:
            size = (await self.until(b"\r\n", 64, BAD_CHUNK)).partition(b";")[0].strip()
            if not CHUNK_SIZE(size):
                raise self.fault(BAD_CHUNK)
            self.left = int(size, 16)
            self.size += self.left
            while not self.left and await self.until(b"\r\n", MAX_HEAD, BAD_CHUNK):
                pass  # trailers are dropped
        if self.size > self.limit:
            raise self.fault(f"a body of more than {self.limit} bytes", 413)
        if not self.left:
            return b""
        if not self.buffer:
            await self.more()
        data = self.take(self.left)
        self.left -= len(data)
        if not self.left and self.head.length == CHUNKED:
            self.left = CHUNKED  # not over, even if what follows is malformed
            await self.until(b"\r\n", 2, BAD_CHUNK)
        return data

    async def whole(self) -> Bytes:
        whole = bytearray()  # a list of what came in chunks of a byte would take 50 times as much
        while data := await self.part():
            whole += data
        return whole

    def write(self, data: Bytes) -> None:
        if not self.ended:
            self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the peer has read what was written, for a while."""
        if not self.room.is_set():
            self.allow(self.patience)
            await self.room.wait()
            self.allow(0)


class Client(Wire):
    """What a client of the VM's asks, one request at a time, and how it is answered."""

    def __init__(self, wires: set[Any], story: Callable[[Client], Any]) -> None:
        super().__init__(wires, IDLE_SECONDS, story)
        self.is_probe = False
        self.is_known = False  # it has shown the secret
        self.is_last = False  # close after this answer

    async def next_request(self) -> None:
        self.is_streaming = self.is_busy = False
        self.is_last = True  # unless it can be read to its end
        self.allow(0)
        self.patience = IDLE_SECONDS if self.is_known else REQUEST_SECONDS
        demand(self.is_known or len(self.wires) <= MAX_CLIENTS, "too many clients", 503)
        if not self.buffer:
            await self.more()
        self.allow(REQUEST_SECONDS)
        await self.read_head(MAX_REQUEST)
        self.is_last = self.head.headers.get("connection", "").lower() == "close"
        if self.head.first[1].startswith(GIT):  # however long it takes, while it goes on
            self.allow(0)
            self.limit, self.patience = MAX_PACK, STALL_SECONDS

    async def receive(self) -> Bytes:
        """The whole body; afterwards the client waits for its answer."""
        data = await self.whole()
        self.allow(0)
        self.is_busy, self.patience = True, READ_SECONDS
        return data

    def mcp_headers(self, message: Object) -> Object:
        """Of its headers, those of the protocol; a session is the upstream's word, passed on."""
        made = version_headers_of(self.head.headers, message)
        if message["method"] != "initialize":  # that begins anew, whatever was before
            made["Mcp-Session-Id"] = self.head.headers.get("mcp-session-id", "")
        return made

    def begin(self, status: int, kind: str, *headers: str, body: Bytes = b"") -> None:
        lines = [f"HTTP/1.1 {status} ", *headers]  # no reason phrase: RFC 9112, 4
        lines += [f"Content-Type: {kind}"] if kind else []
        lines += ["Connection: close"] if self.is_last else []
        lines += ["Allow: POST, DELETE"] if status == 405 else []
        lines += ['WWW-Authenticate: Basic realm="agent-vm"'] if status == 401 else []
        self.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def answer(self, status: int, body: Bytes, *headers: str, kind: str = JSON_TYPE) -> None:
        """The answer. One that comes first goes as plain JSON: an SSE event of more than 1 MiB is
        refused by the Python SDK 2.x."""
        if self.is_streaming and kind != JSON_TYPE:
            self.abort()  # half an answer of git's is none
        elif self.is_streaming:
            self.event(body)
            self.write(LAST_CHUNK)
        else:
            length = f"Content-Length: {len(body)}"
            self.begin(status, kind if body else "", length, *headers, body=body)

    def stream(self, kind: str, *headers: str) -> None:
        self.is_streaming = True
        self.begin(200, kind, "Transfer-Encoding: chunked", *headers)

    def event(self, data: Bytes, *headers: str) -> None:
        """A message that comes before the answer, or ends a stream."""
        if not self.is_streaming:
            self.stream(EVENT_STREAM, *headers)
        self.write(chunk_of(b"event: message\ndata: " + data.replace(b"\n", b" ") + b"\n\n"))

    def tell(self, message: Object, refuse: Refuse, said: Bytes = b"", status: int = 0) -> None:
        """Why there is no answer: in the stream, where one has begun. `said`: by the upstream."""
        usual, made = told_of(message, refuse)
        # The error of an upstream's 4xx: clients tell the protocol's era from it.
        with contextlib.suppress(Exception):  # whatever else it said
            error = json.loads(said)["error"]
            more = {"data": error["data"]} if "data" in error else {}
            code, text = int(error["code"]), str(error["message"])[:1000]
            made["error"] = {"code": code, "message": text, **more}
        self.answer(status or usual, dumps(made))

    def report_push(self, became: Mapping[str, str]) -> None:
        """The answer to a push, in place of GitHub's: ref -> why it is not taken, "" if it is."""
        status = pkt(b"unpack ok\n")
        for ref, why in became.items():
            line = f"ng {ref} refused: {why}" if why else f"ok {ref}"
            status += pkt(f"{line}\n".encode()[:65_000])
        status += b"0000"
        parts = [pkt(b"\x01" + status[at : at + 60_000]) for at in range(0, len(status), 60_000)]
        self.answer(200, b"".join(parts) + b"0000", kind="application/x-git-receive-pack-result")

    # (bounds, forward, message): the answer as the VM gets it; Refusal when it cannot be shown.
    shown = staticmethod(checked_answer)

    def close(self) -> None:
        if not self.ended:
            self.allow(STALL_SECONDS)  # to read what was written
        self.transport.close()


class Exchange(Wire):
    """A connection to an upstream, and the answer to what was sent on it."""

    def __init__(self, upstream: Upstream) -> None:
        super().__init__(upstream.wires, upstream.timeout)
        self.upstream = upstream
        self.status = 0
        self.is_half = False  # it answered before it had the whole request

    async def tunnel(self, target: str, proxy: SplitResult) -> None:
        """Have the company's proxy connect this to `target` (RFC 9110, 9.3.6)."""
        head = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if proxy.username:
            user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            credential = base64.b64encode(user.encode()).decode()
            head.append(f"Proxy-Authorization: Basic {credential}")
        self.write("\r\n".join([*head, "", ""]).encode())
        said = await self.until(b"\r\n\r\n", MAX_HEAD, "a head that is too long")
        status = said[9:12].decode("latin-1")
        if status != "200":
            needs = ": its address needs the right USER:PASSWORD@" if status == "407" else ""
            raise UpstreamError(f"HTTPS_PROXY ({proxy.hostname}) answers {status!a}{needs}")
        if self.buffer:  # in clear text, it would be taken for what GitHub says
            raise UpstreamError(f"HTTPS_PROXY ({proxy.hostname}) says more than it was asked")

    async def begin(self) -> None:
        """Wait for the answer's head."""
        self.status = 0
        await self.read_head(MAX_ANSWER)
        self.status = int(self.head.first[1]) if LENGTH(self.head.first[1]) else 502
        self.events = bytearray()
        self.scanned = 0
        self.session = self.head.headers.get("mcp-session-id", "")
        self.is_stream = EVENT_STREAM in self.head.headers.get("content-type", "")
        if self.is_stream:
            self.limit = float("inf")  # each event has a limit of its own

    async def is_coming(self, limit: int = PAUSE_AT) -> int:
        """Read a stream on until an event is whole: its length, or 0 when there is no more of it,
        or more than `limit` bytes."""
        while self.is_stream:
            found = EVENT_END.search(self.events, max(0, self.scanned - 3))
            if found:
                return found.end()
            self.scanned = len(self.events)
            more = await self.part() if self.scanned <= limit else b""
            if not more:
                break
            self.events += more
        return 0

    async def next_message(self, forward: Forward) -> tuple[str, Json, Bytes]:
        """(`kind_of`, message, its bytes) of the next one of an answer, be it JSON or a stream."""
        size = await self.is_coming(MAX_ANSWER)
        if len(self.events) > MAX_ANSWER:
            raise AnswerLost(f"an event of more than {MAX_ANSWER} bytes")
        data = event_data(bytes(self.events[:size])) if self.is_stream else await self.whole()
        del self.events[:size]
        self.scanned = 0
        if size and not data:
            return "", None, b""  # a comment in a stream
        if not data:
            raise AnswerLost("it ended without an answer to the request")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            raise AnswerLost("its answer is not JSON") from None
        return kind_of(message, forward), message, data

    async def finish(self) -> None:
        """After the answer only the end of a stream is to come: for that a moment is waited."""
        self.allow(LINGER_SECONDS)
        self.limit = self.size + MAX_HEAD
        with contextlib.suppress(UpstreamError):
            await self.whole()

    def close(self) -> None:
        """Back to the pool when the exchange is over; closed at once when it was broken off."""
        closing = self.head.headers.get("connection", "").lower() == "close"
        if not (self.left or self.is_half or closing or self.buffer or self.ended):
            self.allow(POOL_SECONDS)
            self.upstream.pool.append(self)
        else:
            self.abort()


class Upstream:
    """A server that requests go to: its address, its connections, and what they have in common."""

    def __init__(
        self, address: SplitResult, token: Token, headers: Mapping[str, str],
        tls: ssl.SSLContext | None, timeout: float, *, is_git: bool = False,
    ) -> None:  # fmt: skip
        self.address = address
        self.token = token
        self.headers = headers
        secured = tls if address.scheme == "https" else None
        port, proxy = address.port or (443 if secured else 80), company_proxy(address)
        self.opened = (str(address.hostname), port, secured, proxy, lambda: Exchange(self))
        self.timeout = timeout  # seconds that it may be silent
        self.is_git = is_git
        self.wires: set[Exchange] = set()
        self.pool: list[Exchange] = []  # those that are open and free
        # Whoever holds a message whole needs a place: that bounds the memory.
        self.places = asyncio.Semaphore(MAX_PLACES)

    def hide(self, data: Bytes) -> Bytes:
        """What came, without tokens and signed URLs."""
        return redact(data, self.token.value.encode())

    async def post(self, forward: Forward, headers: Mapping[str, str]) -> Exchange:
        sent = {**POSTED, **headers, **mirrored_headers(forward.message)}
        return await self.send("POST", "", sent, dumps(forward.message), again=not forward.write)

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"", *,
        again: bool = True, upload: Callable[[Exchange], Any] | None = None,
    ) -> Exchange:  # fmt: skip
        """Send a request: the exchange, with the head of its answer in. Close it.

        `again`: whether it may be repeated on a fresh connection when an idle one turns out to be
        dead. A write may not: it could have been done. `upload` sends a body that is not held.
        After a 401 anything else may be sent with a new token: it was not carried out.
        """
        sent = {**self.headers, **headers, **({"Content-Length": str(len(body))} if body else {})}
        renewed = False
        while True:
            token = await self.token.fresh()
            as_user = base64.b64encode(f"x-access-token:{token}".encode()).decode()
            credential = f"Basic {as_user}" if self.is_git else f"Bearer {token}"
            self.pool = [wire for wire in self.pool if not (wire.buffer or wire.ended)]
            used = bool(self.pool) and not upload
            exchange = self.pool.pop() if used else await open_connection(*self.opened)
            exchange.allow(0)
            try:
                exchange.write(request_head(method, self.address, path, sent, credential) + body)
                if upload:
                    await upload(exchange)
                await exchange.begin()
                stale = exchange.status == 401 and self.token.command and not (renewed or upload)
                if not stale:
                    check_status(exchange)
                    return exchange
            except BaseException as error:
                exchange.abort()
                dead = isinstance(error, AnswerLost) and exchange.status == 0
                if not (dead and used and again and not exchange.buffer):
                    raise
                continue
            renewed = True
            exchange.abort()
            await self.token.renew()

    async def relay(
        self, client: Client, repository: Repository, service: str, push: Push,
        deeds: Sequence[Deed],
    ) -> None:  # fmt: skip
        """Pass a request of git on, and its answer; of neither more than a little is held."""
        method, given = client.head.first[0], client.head.headers
        is_post, protocol = method == "POST", given.get("git-protocol", "")
        is_chunked = client.head.length == CHUNKED or bool(push.left_out)
        headers = {
            "Accept": "*/*",
            "Git-Protocol": protocol if GIT_PROTOCOL(protocol) else "",
            "Content-Type": f"application/x-{service}-request" if is_post else "",
            "Content-Encoding": "gzip" if given.get("content-encoding") == "gzip" else "",
            "Content-Length": given.get("content-length", "") if is_post and not is_chunked else "",
            "Transfer-Encoding": "chunked" if is_post and is_chunked else "",
        }
        path = f"/{repository.scope}.git/"
        path += service if is_post else f"info/refs?service={service}"

        async def upload(exchange: Exchange) -> None:
            """Until it ends, or the upstream has answered."""
            data = push.begun or await client.part()
            while data and not (exchange.buffer or exchange.ended):
                exchange.write(chunk_of(data) if is_chunked else data)
                await exchange.drain()
                data = await client.part()
            exchange.is_half = bool(data)
            if is_chunked and not data:
                exchange.write(LAST_CHUNK)

        sent = await self.send(method, path, headers, upload=upload if is_post else None)
        with contextlib.closing(sent) as exchange:
            if exchange.status != 200:
                hint = ", is it there?" if exchange.status == 404 else ""
                raise UpstreamError(f"HTTP {exchange.status}{hint}")
            kind = exchange.head.headers.get("content-type", "").partition(";")[0]
            if not kind.startswith(f"application/x-{service}-"):
                raise AnswerLost("its answer is not git's")
            if not push.left_out:
                client.stream(kind)
            exchange.limit = MAX_PACK
            report = bytearray()  # the beginning of what became of a push
            while data := await exchange.part():
                if push.commands and len(report) < MAX_REPORT:
                    report += data
                if not push.left_out:
                    client.write(chunk_of(data))
                    await client.drain()
            became = pushed_refs(report, push)
            new = {command.ref for command in push.commands if NO_OBJECT(command.old)}
            made = {ref for ref in new if became.get(ref) == ""}
            repository.learnt(made=repository.known.made | made)
            for deed in deeds:
                why = became.get(deed.target.get("ref", ""))
                if why is not None:
                    repository.audit.record(deed, "failed" if why else "done", why)
            if push.left_out:
                client.report_push({**became, **push.left_out})
            else:
                client.write(LAST_CHUNK)

    async def learn(self, repository: Repository) -> None:
        """Ask GitHub's search, which does not find every repository and may be behind, and git.

        The default branch is what either says.
        """
        names: set[str] = set()
        for ask in (ask_search, ask_git) if repository.git else (ask_search,):
            try:
                found, default_branch = await asyncio.wait_for(ask(repository), CONNECT_SECONDS)
            except Exception as error:  # whatever came: then it is not known
                if isinstance(error, Refusal):
                    repository.learnt(moved=str(error))
                is_down = isinstance(error, (UpstreamError, asyncio.TimeoutError))
                repository.learnt(is_asked=repository.known.is_asked or not is_down)
                said = str(error) if isinstance(error, (UpstreamError, Refusal)) else "no answer"
                log(f"{self.address.netloc}: {said}")
                continue
            repository.learnt(is_asked=True)
            if found:
                repository.learnt(moved=ANOTHER if repository.id not in (0, found) else "")
                repository.id = repository.id or found
            if is_plain(default_branch, 255):
                names |= {default_branch} - {""}
        repository.learnt(defaults=frozenset(names) or repository.known.defaults)


def check_status(exchange: Exchange) -> None:
    """UpstreamError for the answers that are between the proxy and the upstream."""
    if 300 <= exchange.status < 400:
        renamed = MOVED_TO(exchange.head.headers.get("location", ""))
        if renamed and exchange.upstream.is_git:
            raise Refusal(RENAMED.format(renamed[1]))
        raise UpstreamError("it redirects elsewhere, which is not followed")
    if exchange.status in (401, 403):
        raise UpstreamError(f"it does not accept the host's token (HTTP {exchange.status})")
    if exchange.status == 429:
        raise UpstreamError("its rate limit is reached (HTTP 429): try again in some minutes")
    if not 200 <= exchange.status < 500:
        raise AnswerLost(f"it answered HTTP {exchange.status}")


# --- plumbing: what is asked of the upstream ---

# GitHub's server keeps no sessions: a request needs no initialize before it.
OWN_HEADERS = {
    "MCP-Protocol-Version": "2025-06-18", "X-MCP-Toolsets": "repos", "X-MCP-Readonly": "true",
}  # fmt: skip
TAG_REF = re.compile(rb" refs/tags/([^\n ]+)")
HEAD_REF = re.compile(rb" HEAD symref-target:refs/heads/([^\n ]+)")


async def ask_search(repository: Repository) -> tuple[int, str]:
    """(id, default branch), 0 and "" where it is not found. Forks are left out of a search that
    does not ask for them."""
    arguments = {"query": f"repo:{repository.scope} fork:true", "perPage": 5}
    params = {"name": "search_repositories", "arguments": arguments}
    forward = Forward({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    kind, found = "", forward.message
    with contextlib.closing(await repository.upstream.post(forward, OWN_HEADERS)) as exchange:
        while kind != "answer":
            kind, found, _ = await exchange.next_message(forward)
        await exchange.finish()
    text = found["result"]["content"][0]["text"]
    if found["result"].get("isError") and "failed to" in text:  # the server's words for GitHub's
        raise UpstreamError("the search failed")
    items = json.loads(text)["items"]
    for item in items:
        if repository.scope.is_named(item["full_name"]):
            return int(item["id"]), item.get("default_branch") or ""
    if items:
        raise Refusal(RENAMED.format(items[0]["full_name"]))
    return 0, ""


async def ask_git(repository: Repository) -> tuple[int, str]:
    """0 and the default branch: that is git's HEAD (gitprotocol-v2)."""
    assert repository.git
    body = pkt(b"command=ls-refs\n") + b"0001" + pkt(b"symrefs\n") + pkt(b"ref-prefix HEAD\n")
    body += pkt(b"ref-prefix refs/tags/\n") + b"0000"
    headers = {"Git-Protocol": "version=2", "Content-Type": "application/x-git-upload-pack-request"}
    path = f"/{repository.scope}.git/git-upload-pack"
    asked = await repository.git.send("POST", path, headers, body)
    with contextlib.closing(asked) as exchange:
        refs = bytes(await exchange.whole())
    tags = frozenset(tag.decode(errors="replace") for tag in TAG_REF.findall(refs))
    repository.learnt(tags=tags)
    head = HEAD_REF.search(refs)
    return 0, head[1].decode() if head else ""


# --- settings ---

DEFAULT_UPSTREAM = "https://api.githubcopilot.com/mcp/"
TOOLSETS = "repos,issues,pull_requests,git,labels"
FLAGS = {"1": True, "true": True, "yes": True, "on": True,
         "0": False, "false": False, "no": False, "off": False, "": False}  # fmt: skip
HOST = r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)"


def listen_address(value: str) -> tuple[str, int]:
    match = re.fullmatch(HOST + r":([0-9]{1,5})", value)
    if not match or int(match[2]) > 65535:
        raise argparse.ArgumentTypeError(f"{value!r} is not ADDRESS:PORT")
    return match[1].strip("[]"), int(match[2])


def positive_seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", value) or not float(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of seconds")
    return float(value)


def parse_address(url: str, option: str) -> SplitResult:
    """https, or http to loopback; no user, query or fragment. `option`: what is wrong if it is."""
    try:
        address = urlsplit(url)
        known = address.port != 0 and re.fullmatch(rf"https?://{HOST}(:[0-9]+)?(/[!-~]*)?", url)
    except ValueError:  # no port, or no IPv6 address
        known = None
    if not known or re.search(r"[?#%\\]|/\.", url):
        raise ProxyError(f"{option} is not an address like https://HOST[:PORT]/PATH")
    if address.scheme == "http" and address.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ProxyError(f"{option} must be https: the token would go over the network in clear")
    return address


def company_proxy(address: SplitResult) -> SplitResult | None:
    """What HTTPS_PROXY and NO_PROXY say of an address; http is loopback's, and needs none."""
    if address.scheme == "http" or not {"https_proxy", "HTTPS_PROXY"} & os.environ.keys():
        return None
    from urllib.request import getproxies
    from urllib.request import proxy_bypass

    url = "" if proxy_bypass(str(address.hostname)) else getproxies().get("https", "")
    known = re.fullmatch(rf"http://([^@/?#\s]*@)?{HOST}(:([0-9]{{1,5}}))?/?", url)
    if url and (not known or int(known[4] or 80) > 65535):
        raise ProxyError("HTTPS_PROXY is not an address like http://[USER:PASSWORD@]HOST:PORT")
    return urlsplit(url) if url else None


def read_policy(path: str) -> Policy:
    """The [policy] section of an INI file; what it leaves out keeps its default."""
    import configparser

    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#",))
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
    except OSError as error:
        raise ProxyError(f"cannot read the policy file {path}: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ProxyError(f"{path} is not an INI file with a section [policy]: {error}") from None
    if not parser.has_section("policy"):
        raise ProxyError(f"{path} has no section [policy]")
    section = parser["policy"]
    return Policy()._replace(**{key: policy_value(path, key, section[key]) for key in section})


def policy_value(path: str, key: str, value: str) -> Json:
    words = tuple(re.split(r"[,\s]+", value.strip())) if value.strip() else ()
    if key in ("branches", "deny_paths") and not re.search(r"[^/,\s]\*\*|\*\*[^/,\s]", value):
        return words
    if key == "allow" and ALLOW.keys() >= set(words):
        return frozenset(words)
    if key == "approve" or (key == "default_branch" and not value.startswith(("refs/", "heads/"))):
        return value.strip()
    if key in ("readonly", "lockdown") and value.lower() in FLAGS:
        return FLAGS[value.lower()]
    if key == "writes_per_hour" and re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    known = ", ".join(sorted(ALLOW) if key == "allow" else Policy._fields)
    wrong = "a value that it can have" if key in Policy._fields else "a policy setting"
    raise ProxyError(f"{path}: {key} = {value!r:.100} is not {wrong}", f"known: {known}")


def variable(name: str, what: str, regex: str, default: str = "") -> str:
    value = os.environ.get(name, default).strip()
    if not re.fullmatch(regex, value):
        wrong = f"is not {what}: {value!r}" if value else "is not set"
        raise ProxyError(f"{name} {wrong}", f"it is {what}")
    return value


def env_flag(name: str, default: str) -> bool:
    return FLAGS[variable(name, "0 or 1", f"(?i:{'|'.join(FLAGS)})", default).lower()]


def env_secret(name: str) -> bytes:
    """What requests must carry; b"" for none. Taken out of the children's environment."""
    secret = os.environ.pop(name, "").strip()
    if secret and not re.fullmatch(r"[!-~]{16,256}", secret):
        raise ProxyError(f"{name} must have 16 to 256 visible ASCII characters")
    return secret.encode()


# --- the command line ---

EPILOG = """\
environment:
  GITHUB_MCP_OWNER, GITHUB_MCP_REPO   the repository
  GITHUB_MCP_TOKEN      GitHub's token (or --token-command)
  GITHUB_MCP_SECRET     the secret that requests must carry as Authorization: Bearer
  GITHUB_MCP_PROBE_SECRET  another one: its requests are judged, and neither passed on nor recorded
  GITHUB_MCP_READONLY   1: no writes (default 0)
  GITHUB_MCP_LOCKDOWN   1: ask the upstream to hide what outsiders wrote (default 1; best effort)
  GITHUB_MCP_UPSTREAM, GITHUB_MCP_GIT   as --upstream and --git

exit status:
  0 stopped as asked · 1 failed · 2 usage · 130 Ctrl-C
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
        help='prints {"token": …, "expires_at": …}; asked again in time')  # fmt: skip
    add("--policy", metavar="FILE", help="what may be written: an INI file")
    add("--audit", metavar="FILE", help="append every decision to FILE, as JSON Lines")
    add("--ca-file", metavar="FILE", default="", help="CA certificates for the upstream")
    add("--timeout", metavar="SECONDS", type=positive_seconds, default=300.0,
        help="how long the upstream may be silent in a call (default 300)")  # fmt: skip
    add("--git", metavar="URL", default=os.environ.get("GITHUB_MCP_GIT", ""),
        help="serve git at /git/OWNER/REPO.git too, from URL (https://github.com)")  # fmt: skip
    add("--exit-with-stdin", action="store_true",
        help="stop when stdin is closed, and print what was done, as JSON Lines")  # fmt: skip
    version = f"%(prog)s {__version__} (Python {sys.version.split()[0]})"
    add("--version", action="version", version=version)
    return parser


def build_repository(options: argparse.Namespace) -> Repository:
    owner = variable("GITHUB_MCP_OWNER", "a user or an organization", "[A-Za-z0-9_-]{1,100}")
    repo = variable("GITHUB_MCP_REPO", "a repository's name", r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}")
    policy = Policy() if options.policy is None else read_policy(options.policy)
    policy = policy._replace(
        readonly=policy.readonly or env_flag("GITHUB_MCP_READONLY", "0"),
        lockdown=policy.lockdown and env_flag("GITHUB_MCP_LOCKDOWN", "1"),
    )
    # What GitHub's server is told to offer; a second line behind the table.
    toolsets = [TOOLSETS, *filter(None, map(ALLOW.get, sorted(policy.allow)))]
    headers = {
        "X-MCP-Toolsets": ",".join(toolsets),
        "X-MCP-Readonly": "true" if policy.readonly else "",
        "X-MCP-Lockdown": "true" if policy.lockdown else "",
    }
    value = os.environ.pop("GITHUB_MCP_TOKEN", "").strip()  # out of the children's environment
    if not value and not options.token_command:
        raise ProxyError("GITHUB_MCP_TOKEN is not set", "or give --token-command")
    token = Token("" if options.token_command else check_token(value), options.token_command)
    address, path = parse_address(options.upstream, "--upstream"), options.audit
    served = parse_address(options.git, "--git") if options.git else None
    tls = None
    try:
        if options.ca_file or "https" in (address.scheme, served and served.scheme):
            tls = ssl.create_default_context(cafile=options.ca_file or None)
            if options.ca_file:  # Python 3.13 is strict about forms that many a CA does not have
                tls.verify_flags &= ~ssl.VERIFY_X509_STRICT
    except OSError:  # ssl.SSLError is one
        raise ProxyError(f"cannot read certificates from {options.ca_file}") from None
    upstream = Upstream(address, token, headers, tls, options.timeout)
    git = Upstream(served, token, {}, tls, options.timeout, is_git=True) if served else None
    try:
        audit = Audit(-1 if path is None else open_audit(path))
    except OSError as error:
        raise ProxyError(f"cannot write the audit file {path}: {error.strerror}") from None
    return Repository(Scope(owner, repo), policy, upstream, git, audit)


async def run_proxy(options: argparse.Namespace) -> NoReturn:
    """Listen until stdin closes (with --exit-with-stdin), SIGTERM or Ctrl-C."""
    loop = asyncio.get_running_loop()
    address = options.listen[0]
    gate = Gate(
        hosts={*LOOPBACK, f"[{address}]" if ":" in address else address},
        secret=env_secret("GITHUB_MCP_SECRET"),
        probe=env_secret("GITHUB_MCP_PROBE_SECRET"),
    )
    repository = build_repository(options)
    serving = asyncio.ensure_future(serve(options, repository, gate))
    statuses: list[int] = []

    def stop(status: int) -> None:
        statuses.append(status)
        serving.cancel()

    def read_stdin() -> None:
        with contextlib.suppress(OSError):
            if os.read(0, 4096):
                return
        loop.remove_reader(0)
        stop(0)

    # asyncio's own shows a traceback, of too many open files for example.
    loop.set_exception_handler(lambda _loop, context: log(str(context["message"])))
    loop.add_signal_handler(signal.SIGTERM, stop, 0)
    loop.add_signal_handler(signal.SIGINT, stop, 130)
    if options.exit_with_stdin:  # when it is closed, whoever started this is gone
        try:
            loop.add_reader(0, read_stdin)
        except OSError:  # a file, or /dev/null: nobody is there
            stop(0)
    with contextlib.suppress(asyncio.CancelledError):
        await serving  # or why it could not begin
    status = statuses[0]
    if options.exit_with_stdin and status == 0:
        with contextlib.suppress(OSError):
            os.write(1, repository.audit.receipt().encode())
    others = asyncio.all_tasks() - {serving, asyncio.current_task()}
    for task in others:  # so that the commands are ended
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=1)
    # Python would wait for its threads: for a name that is looked up, or for a reader of the
    # output of what a command left behind.
    os._exit(status)


async def serve(options: argparse.Namespace, repository: Repository, gate: Gate) -> None:
    """Say where it listens, and serve who comes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # some hosts allow 256 by default
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, most), most))
    await repository.upstream.token.fresh()  # what does not work is said at once
    address, port = options.listen
    clients: set[Client] = set()

    def made() -> Client:
        return Client(clients, lambda client: serve_client(repository, gate, client))

    try:
        server = await listen(address, port, made)
    except OSError as error:
        raise ProxyError(f"cannot listen on {address}:{port}: {error.strerror}", status=1) from None
    if not gate.secret:
        log("no secret is set: every process and VM that can reach the port can use the token")
    mode = "read-only" if repository.policy.readonly else "read-write"
    said = f"{server.sockets[0].getsockname()[1]}\n{mode}\n"
    try:
        os.write(1, said.encode())  # print would try again at Python's end
    except OSError as error:
        raise ProxyError(f"cannot write to stdout: {error.strerror}", status=1) from None
    await repository.know(wait=False)
    # Until this is cancelled; serve_forever would then wait for all clients to leave.
    await asyncio.get_running_loop().create_future()


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        return asyncio.run(run_proxy(options))
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
