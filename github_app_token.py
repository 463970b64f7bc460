#!/usr/bin/env python3
"""Get a GitHub token for one repository, and prove that it is as narrow as asked.

    github_app_token.py token --repo O/R --app-id ID --key app.pem --permissions dev
    github_app_token.py login --repo O/R --app-id Iv23…    a user's token, by the device flow
    github_app_token.py status --profile widgets           what is wrong, and the fix

With the private key of a GitHub App, `token` signs a JWT (openssl, or an ssh-agent) and gets an
installation token of an hour; without a key it gives the user's token that `login` got. What
GitHub returns is compared with what was asked: a wider token is revoked and refused.

It talks to GitHub alone, reads the key, starts openssl and the command that prints the key if one
is given, and writes one folder: $XDG_STATE_HOME/github-app-token (~/.local/state/…).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import NoReturn

__version__ = "0.1.0"

# Exit statuses. The tens say who can help: 1x the host's user, 2x time, 3x a login.
USAGE, KEY, SIGNER, REJECTED, NOT_INSTALLED, BLOCKED, PERMISSION, TOO_WIDE, OTHER_REPO = (
    2, 10, 11, 12, 13, 14, 15, 16, 17,
)  # fmt: skip
NETWORK, SERVER, RATE, CACHE = 20, 21, 22, 23
LOGIN, DENIED, EXPIRED, DEVICE_FLOW = 30, 31, 32, 33

MAX_REPLY = 1024 * 1024
MAX_KEY = 15_000  # fits a pipe everywhere; a 16384-bit key has 13 kB
CHILD_SECONDS = 15
REPLY_SECONDS = 60
LOCK_SECONDS = 30
JWT_BEFORE, JWT_AFTER = 60, 300  # seconds around now: GitHub allows 600, clocks are off
MAX_TIME = 1e11  # seconds; NaN is not below it
MAX_LIFE = 70 * 60  # an installation token lives an hour

Json = Any
Object = dict[str, Any]


class Failure(Exception):
    """Why there is no token; `main` prints it and returns `status`."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.hint = hint


# --- nouns ---


class Config(NamedTuple):
    """What is asked for: flags, then the environment, then the profile."""

    api_url: str
    app_id: str
    repos: tuple[str, ...]
    repo_id: int
    permissions: tuple[tuple[str, str], ...] | None  # None: not said; (): all that the App has
    key: str
    passphrase: str
    ca_file: str
    min_ttl: int
    accept_new_repo: bool = False

    @property
    def kind(self) -> str:
        return "installation" if self.key else "user"

    @property
    def oauth_url(self) -> str:
        """Where people log in: https://github.com for https://api.github.com."""
        return oauth_url_of(self.api_url)


class Token(NamedTuple):
    """A token as it is cached and printed; times in seconds since the epoch, by GitHub's clock."""

    token: str
    type: str
    expires_at: float
    clock_offset: float  # GitHub's clock minus ours
    api_url: str
    repositories: list[Object]  # {"id", "full_name"}
    permissions: dict[str, str]
    login: str = ""  # whose it is: the App's slug, or the user
    refresh_token: str = ""
    refresh_expires_at: float = 0
    refreshing: bool = False  # a refresh has begun, and is not over until the scope is checked
    unchecked: bool = False  # what it reaches has not been looked at yet: never given out

    def __repr__(self) -> str:
        return f"<token {masked(self.token)}>"

    def left(self) -> float:
        return self.expires_at - (time.time() + self.clock_offset)


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    def json(self) -> Json:
        """The body; a web page where JSON is due means that something stands in between."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise Failure(
                NETWORK, f"{host_of(self.url)} sent no JSON (HTTP {self.status})",
                "a captive portal or a proxy may answer in GitHub's place",
            ) from None  # fmt: skip

    def object(self) -> Object:
        value = self.json()
        return value if isinstance(value, dict) else {}

    def message(self) -> str:
        """GitHub's own words, for an error text."""
        try:
            said = self.object().get("message") or self.object().get("error_description") or ""
        except Failure:
            said = ""
        return redact(str(said))[:300]


class PublicKey(NamedTuple):
    n: int
    e: int


# --- pure core: text ---

# GitHub's tokens (with the dash that its published pattern lacks), JWTs, keys.
SECRETS = re.compile(
    r"gh[a-z]_[A-Za-z0-9._-]{8,}|github_pat_\w{8,}|eyJ[A-Za-z0-9_-]{4,}\.[A-Za-z0-9._-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END[^-]*-----|$)|(?<=://)[^/\s@]+@"
)


def redact(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in SECRETS.sub("[redacted]", text))


def masked(token: str) -> str:
    return f"{token[:4]}…{token[-4:]}"


def base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def host_of(url: str) -> str:
    return url.split("/")[2] if url.count("/") >= 2 else url


def origin_of(url: str) -> str:
    return "/".join(url.split("/")[:3]).lower()


PRESETS = {
    "read": {"contents": "read", "issues": "read", "pull_requests": "read"},
    "dev": {"contents": "write", "issues": "write", "pull_requests": "write"},
}
LEVELS = ("read", "write", "admin")


def parse_permissions(spec: str) -> tuple[tuple[str, str], ...] | None:
    """`dev,checks:read` → sorted pairs; () for `inherit`; None when nothing is said."""
    if not spec.strip():
        return None
    if spec.strip() == "inherit":
        return ()
    wanted: dict[str, str] = {}
    for word in re.split(r"[,\s]+", spec.strip()):
        name, colon, level = word.partition(":")
        if word in PRESETS:
            wanted.update(PRESETS[word])
        elif colon and re.fullmatch("[a-z_]+", name) and level in LEVELS:
            wanted[name] = level
        else:
            raise Failure(
                USAGE, f"{word!r} is not a permission",
                "read, dev, inherit, or a list like contents:write,issues:read",
            )  # fmt: skip
    return tuple(sorted(wanted.items()))


def parse_api_url(text: str) -> str:
    """The base of the REST API: from github.com, SUB.ghe.com, a GHES host, or their API's URLs."""
    match = re.fullmatch(
        r"(?:(https?)://)?([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?(/api/v3)?/?",
        text.strip(),
    )
    if not match:
        raise Failure(USAGE, f"not an address of GitHub: {redact(text)!r}", "github.com, for one")
    scheme, host = match[1] or "https", match[2].lower()
    loopback = host in ("127.0.0.1", "localhost", "[::1]")
    if scheme == "http" and not loopback:
        raise Failure(USAGE, "GitHub must be reached by https: a token would go in clear")
    name = host[4:] if host.startswith("api.") else host
    if name == "github.com" or name.endswith(".ghe.com"):
        return f"https://api.{name}"
    return f"{scheme}://{host}{match[3] or ''}/api/v3"


def oauth_url_of(api_url: str) -> str:
    if api_url.endswith("/api/v3"):
        return api_url[: -len("/api/v3")]
    return api_url.replace("https://api.", "https://", 1)


def parse_repo(text: str) -> str:
    """O/R of O/R or of an address of the repository."""
    name = re.sub(r"^https?://[^/]+/|(\.git)?/?$", "", text.strip())
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,38}/(?!\.+$)[A-Za-z0-9._-]{1,100}", name):
        raise Failure(USAGE, f"not a repository: {redact(text)!r}", "OWNER/NAME")
    return name


def parse_seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,6})([smh]?)", text.strip())
    if not match:
        raise Failure(USAGE, f"not a time: {text!r}", "90, 90s, 5m or 1h")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parse_time(text: Json) -> float:
    """Seconds since the epoch of GitHub's 2026-01-31T10:00:00Z; ValueError."""
    from datetime import datetime

    return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()


# --- pure core: keys ---

RSA_OID = bytes.fromhex("2a864886f70d010101")
OTHER_KEYS = {
    bytes.fromhex("2a864886f70d01010a"): "RSA-PSS",
    bytes.fromhex("2a8648ce3d0201"): "EC",
    bytes.fromhex("2b6570"): "Ed25519",
}
OTHER_BLOCKS = {
    "OPENSSH PRIVATE KEY": "in OpenSSH's format: convert a copy, ssh-keygen -p -m PEM -f COPY",
    "EC PRIVATE KEY": "an EC key, and GitHub wants RSA",
    "PUBLIC KEY": "the public key, and the private one is needed",
    "RSA PUBLIC KEY": "the public key, and the private one is needed",
    "CERTIFICATE": "a certificate, and the private key is needed",
}
WHERE_KEYS_ARE = "GitHub: the App's settings, General, Private keys, Generate; it is a .pem file"


def bad_key(what: str, hint: str = WHERE_KEYS_ARE) -> Failure:
    return Failure(KEY, f"the private key cannot be used: it is {what}", hint)


def normal_key(raw: bytes) -> tuple[str, bytes]:
    """(label, PEM) of the first key in `raw`, whatever was done to its lines."""
    if raw[:2] == b"\x30\x82":
        raise bad_key("in DER form", "openssl rsa -inform DER -in FILE -out key.pem")
    text = raw.decode("utf-8-sig", "replace")
    if "-----BEGIN" not in text:
        text = decoded_key(text)
    text = text.replace("\\r", "").replace("\\n", "\n")
    match = re.search(r"-----BEGIN ([A-Z0-9 ]+)-----(.*?)-----END \1-----", text, re.S)
    if not match:
        raise bad_key("cut off: its END line is missing")
    label, lines = match[1], match[2].split()
    headers: list[str] = []
    if "Proc-Type:" in match[2]:  # encrypted PKCS#1: two headers, then a blank line
        headers = [line.strip() for line in match[2].splitlines() if ":" in line] + [""]
        lines = [line.strip() for line in match[2].splitlines() if ":" not in line]
    if label in OTHER_BLOCKS:
        raise bad_key(OTHER_BLOCKS[label])
    if label not in ("RSA PRIVATE KEY", "PRIVATE KEY", "ENCRYPTED PRIVATE KEY"):
        raise bad_key(f"a block of {label}")
    body = "".join(lines)
    wrapped = [body[at : at + 64] for at in range(0, len(body), 64)]
    pem = [f"-----BEGIN {label}-----", *headers, *wrapped, f"-----END {label}-----", ""]
    return label, "\n".join(pem).encode("ascii", "replace")


def decoded_key(text: str) -> str:
    """A PEM that was put into base64 once more, or why the text is none."""
    packed = "".join(text.split())
    if packed.startswith(("SHA256:", "MD5:")):
        raise bad_key("its fingerprint")
    if re.fullmatch("[0-9a-f]{40}", packed):
        raise bad_key("the App's client secret")
    if not packed:
        raise bad_key("empty")
    try:
        text = base64.b64decode(packed, validate=True).decode("utf-8")
    except ValueError:
        text = ""
    if "-----BEGIN" not in text:
        raise bad_key("not a PEM file")
    return text


def is_encrypted(pem: bytes) -> bool:
    return b"ENCRYPTED" in pem


def der_items(data: bytes) -> list[tuple[int, bytes]]:
    """(tag, content) of the DER values in a row; ValueError or IndexError when they are cut off."""
    items, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(data[at : at + size], "big"), at + size
        if at + length > len(data):
            raise ValueError("cut off")
        items.append((tag, data[at : at + length]))
        at += length
    return items


def der(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def der_integer(number: int) -> bytes:
    return der(2, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def rsa_numbers(data: bytes) -> PublicKey:
    """n and e of a private key (PKCS#1, PKCS#8) or a public one (SPKI) in DER."""
    try:
        items = der_items(der_items(data)[0][1])
        if (
            items[0][0] == 0x30 or items[1][0] == 0x30
        ):  # an algorithm: SPKI has it first, PKCS#8 second
            at = 0 if items[0][0] == 0x30 else 1
            oid = der_items(items[at][1])[0][1]
            if oid != RSA_OID:
                kind = OTHER_KEYS.get(oid, "another kind of")
                raise bad_key(f"an {kind} key, and GitHub wants RSA")
            inner = items[at + 1][1]
            items = der_items(der_items(inner[1:] if at == 0 else inner)[0][1])
            items = items if at else [(0, b""), *items]
        key = PublicKey(int.from_bytes(items[1][1], "big"), int.from_bytes(items[2][1], "big"))
    except (ValueError, IndexError):
        raise bad_key("damaged or cut off") from None
    if key.n.bit_length() < 2048:
        raise bad_key(f"too short: {key.n.bit_length()} bits, and GitHub's have 2048")
    return key


def fingerprint(key: PublicKey) -> str:
    """As GitHub's settings show it: of the SPKI form. (ssh-keygen -l hashes another one.)"""
    numbers = der(0x30, der_integer(key.n), der_integer(key.e))
    spki = der(0x30, der(0x30, der(6, RSA_OID), b"\x05\x00"), der(3, b"\x00", numbers))
    return "SHA256:" + base64.b64encode(hashlib.sha256(spki).digest()).decode()


def is_signature(signature: bytes, data: bytes, key: PublicKey) -> bool:
    """RS256, PKCS#1 v1.5: openssl signs with EC and PSS keys as well, and says nothing."""
    size = (key.n.bit_length() + 7) // 8
    if len(signature) != size:
        return False
    digest = bytes.fromhex("3031300d060960864801650304020105000420") + hashlib.sha256(data).digest()
    padded = b"\x00\x01" + b"\xff" * (size - len(digest) - 3) + b"\x00" + digest
    return pow(int.from_bytes(signature, "big"), key.e, key.n) == int.from_bytes(padded, "big")


def signing_input(app_id: str, now: float) -> bytes:
    header = {"alg": "RS256", "typ": "JWT"}
    claims = {"iat": int(now) - JWT_BEFORE, "exp": int(now) + JWT_AFTER, "iss": app_id}
    parts = (json.dumps(part, separators=(",", ":")).encode() for part in (header, claims))
    return b".".join(map(base64url, parts))


# --- pure core: what GitHub returned ---


def parse_installation_token(reply: Reply, config: Config, ids: Sequence[int], now: float) -> Token:
    """The token of a 201; Failure when it is not what was asked for.

    `ids` are the repositories' pinned ids, or none yet; `now` is GitHub's time.
    """
    data = reply.object()
    try:
        token = check_token(data["token"])
        expires = parse_time(data["expires_at"])
        granted = {str(k): str(v) for k, v in data["permissions"].items()}
        repositories = [
            {"id": int(item["id"]), "full_name": str(item["full_name"])}
            for item in data.get("repositories") or []
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Failure(1, "GitHub's answer has no usable token") from None
    if not now < expires <= now + MAX_LIFE:
        raise Failure(1, "GitHub's answer has a token that does not live an hour")
    found = {item["id"] for item in repositories}
    names = {str(item["full_name"]).lower() for item in repositories}
    exact = found == set(ids) if ids else names == {name.lower() for name in config.repos}
    if data.get("repository_selection") != "selected" or not exact:
        shown = ", ".join(sorted(names)) or "all of the installation"
        raise Failure(TOO_WIDE, f"GitHub gave a token for {shown}")
    check_permissions(dict(config.permissions or ()), granted)
    return Token(token, "installation", expires, 0.0, config.api_url, repositories, granted)


def check_token(value: Json) -> str:
    """A token is opaque: visible ASCII, of any length below 4096."""
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{8,4096}", value):
        raise ValueError("not a token")
    return value


def check_permissions(asked: Mapping[str, str], granted: Mapping[str, str]) -> None:
    """Neither more nor less than asked ({}: anything); metadata:read always comes with it."""
    if not asked:
        return
    more = missing_permissions(granted, {"metadata": "read", **asked})
    if more:
        raise Failure(TOO_WIDE, f"GitHub granted more than asked ({', '.join(more)})")
    less = missing_permissions(asked, granted)
    if less:
        raise Failure(PERMISSION, f"GitHub did not grant {', '.join(less)}")


def missing_permissions(wanted: Mapping[str, str], has: Mapping[str, str]) -> list[str]:
    rank = {level: number for number, level in enumerate(("", *LEVELS))}
    return [
        f"{name}:{level}"
        for name, level in wanted.items()
        if rank.get(level, 9) > rank.get(has.get(name, ""), 9)
    ]


def device_step(data: Mapping[str, Json], interval: float) -> tuple[str, float]:
    """("wait", seconds between polls) or ("done", 0) of an answer to a poll (RFC 8628, 3.5)."""
    error = data.get("error")
    if error is None:
        return "done", 0
    if error == "authorization_pending":
        return "wait", interval
    if error == "slow_down":
        given = data.get("interval")
        longer = given if isinstance(given, (int, float)) and given > interval else interval + 5
        return "wait", min(float(longer), 300.0)
    if error == "access_denied":
        raise Failure(DENIED, "the login was denied in the browser")
    if error in ("expired_token", "token_expired"):
        raise Failure(EXPIRED, "the code expired before it was entered", "login again")
    raise device_flow_failure(str(error), str(data.get("error_description", "")))


def device_flow_failure(error: str, description: str) -> Failure:
    hints = {
        "device_flow_disabled": "the App's settings, General: Enable Device Flow",
        "incorrect_client_credentials": "--app-id must be the client id (Iv…) of an App there",
        "unauthorized_client": "--app-id must be the client id (Iv…) of an App there",
    }
    known = error in hints
    said = redact(f"{error} {description}".strip())[:200]
    return Failure(DEVICE_FLOW if known else 1, f"GitHub refused the login: {said}",
                   hints.get(error, ""))  # fmt: skip


# --- shell: secrets from outside ---


def read_secret(source: str, what: str) -> bytes:
    """The bytes that a source names: FILE, -, fd:N, env:NAME or command:CMD."""
    kind, colon, rest = source.partition(":")
    if "-----BEGIN" in source:
        raise Failure(
            USAGE, f"{what}: give where it is, not itself", "--key FILE, env:NAME, fd:N, …"
        )
    if colon and kind == "command":
        return run_child(split_command(rest), KEY)[:MAX_KEY]
    try:
        with time_limit(CHILD_SECONDS):
            if source == "-" or (colon and kind == "fd" and rest.isdecimal()):
                with open(int(rest or 0), "rb", closefd=False) as file:
                    return file.read(MAX_KEY)
            if colon and kind == "env":
                return os.environb.pop(os.fsencode(rest), b"")  # children do not inherit it
            return read_private_file(source)
    except TimeoutError:
        raise Failure(KEY, f"{what}: nothing came from {kind}") from None
    except OSError as error:
        # A key or passphrase that was given in the place of its file's name is not to be shown.
        named = os.path.isdir(os.path.dirname(source)) or ("key" in what and len(source) < 200)
        shown = source if named else "the file that it names"
        raise Failure(KEY, f"{what}: cannot read {shown}: {error.strerror}") from None


def read_private_file(path: str) -> bytes:
    fd = os.open(os.path.expanduser(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise Failure(KEY, f"{path} is not a file")
        if info.st_uid not in (0, os.geteuid()):
            raise Failure(KEY, f"{path} belongs to another user")
        if info.st_mode & 0o077:
            raise Failure(KEY, f"{path} can be read by others", f"chmod 600 {path}")
        return file.read(MAX_KEY)


def split_command(text: str) -> list[str]:
    import shlex

    try:
        return shlex.split(text)
    except ValueError as error:
        raise Failure(USAGE, f"command: {error}") from None


def run_child(
    argv: Sequence[str], status: int, data: bytes = b"", secrets: Sequence[bytes] = (),
    env: Mapping[str, str] | None = None,
) -> bytes:  # fmt: skip
    """The stdout of a program; each {N} in argv is the descriptor that secrets[N] comes through."""
    import subprocess

    pipes = [os.pipe() for _ in secrets]
    for (_, write_end), secret in zip(pipes, secrets):
        os.write(write_end, secret)
        os.close(write_end)
    for number, (read_end, _) in enumerate(pipes):
        argv = [word.replace(f"{{{number}}}", str(read_end)) for word in argv]
    name = os.path.basename(argv[0]) if argv else "command"
    try:
        child = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            pass_fds=[read_end for read_end, _ in pipes], start_new_session=True,
            env=env,
        )  # fmt: skip
    except (OSError, IndexError) as error:
        raise Failure(status, f"cannot run {name}: {getattr(error, 'strerror', error)}") from None
    finally:
        for read_end, _ in pipes:
            os.close(read_end)
    try:
        output, _ = child.communicate(data, timeout=CHILD_SECONDS)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failure(status, f"{name} did not end in {CHILD_SECONDS} s") from None
        raise
    if child.returncode:
        raise Failure(status, f"{name} failed (status {child.returncode})")
    return output


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds, whatever is being waited for."""

    def expire(*_: object) -> None:
        raise TimeoutError("too slow")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- shell: signing ---


class OpensslKey:
    """A key in PEM that the openssl CLI signs with."""

    def __init__(self, raw: bytes, passphrase: Callable[[], bytes]) -> None:
        import shutil

        _, pem = normal_key(raw)
        self.secrets = [pem]
        self.passin = "pass:"
        self.openssl = shutil.which("openssl") or ""
        if not os.path.isabs(self.openssl):
            raise Failure(SIGNER, "openssl is not on PATH", "install it, or use --key agent")
        if is_encrypted(pem):
            self.secrets.append(passphrase().rstrip(b"\r\n") + b"\n")
            self.passin = "fd:{1}"
            try:
                public = self.run("rsa", "-in", "/dev/fd/{0}", "-pubout", "-outform", "DER")
            except Failure as failure:
                raise bad_key("not opened by this passphrase", str(failure)) from None
        else:
            body = b"".join(pem.split(b"\n")[1:-2])
            try:
                public = base64.b64decode(body + b"=" * (-len(body) % 4))
            except ValueError:
                raise bad_key("damaged or cut off") from None
        self.public = rsa_numbers(public)

    def run(self, *argv: str, data: bytes = b"") -> bytes:
        """openssl, with its secrets through pipes: not in argv, files or the environment.

        That is made from nothing: OPENSSL_CONF and LD_PRELOAD must not reach what holds the key.
        """
        env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
        command = [self.openssl, *argv, "-passin", self.passin]
        return run_child(command, SIGNER, data, self.secrets, env)

    def sign(self, data: bytes) -> bytes:
        return self.run("dgst", "-sha256", "-sign", "/dev/fd/{0}", data=data)


class AgentKey:
    """A key that an ssh-agent holds; it signs, the key stays there."""

    def __init__(self, wanted: str) -> None:
        found = [(blob, comment) for blob, comment in self.identities() if blob[4:11] == b"ssh-rsa"]
        keys = [(blob, comment, rsa_of_blob(blob)) for blob, comment in found]
        chosen = [key for key in keys if not wanted or wanted in self.names(*key)]
        if len(chosen) != 1:
            known = ", ".join(fingerprint(key) for _, _, key in keys) or "none"
            raise Failure(KEY, f"the ssh-agent has {len(chosen)} such keys",
                          f"--key agent:FINGERPRINT; its RSA keys: {known}")  # fmt: skip
        self.blob, _, self.public = chosen[0]

    def names(self, blob: bytes, comment: str, key: PublicKey) -> set[str]:
        ssh = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
        ours = fingerprint(key)
        return {ours, ours.rstrip("="), "SHA256:" + ssh, comment}

    def identities(self) -> list[tuple[bytes, str]]:
        reader = Strings(self.call(b"\x0b", 12)[4:])
        found = []
        while reader.data:
            found.append((reader.next(), reader.next().decode("utf-8", "replace")))
        return found

    def sign(self, data: bytes) -> bytes:
        flags = (2).to_bytes(4, "big")  # SSH_AGENT_RSA_SHA2_256
        answer = Strings(self.call(b"\x0d" + packed(self.blob) + packed(data) + flags, 14))
        signature = Strings(answer.next())
        if signature.next() != b"rsa-sha2-256":
            raise Failure(SIGNER, "the ssh-agent signs with SHA-1 only")
        return signature.next()

    def call(self, message: bytes, expected: int) -> bytes:
        """The body of the agent's answer (draft-ietf-sshm-ssh-agent)."""
        import socket

        try:
            with time_limit(REPLY_SECONDS), socket.socket(socket.AF_UNIX) as agent:
                agent.connect(os.environ["SSH_AUTH_SOCK"])
                agent.sendall(packed(message))
                with agent.makefile("rb") as file:
                    answer = file.read(int.from_bytes(file.read(4), "big"))
        except (OSError, KeyError):
            raise Failure(KEY, "no ssh-agent answers (SSH_AUTH_SOCK)", "ssh-add app.pem") from None
        if answer[:1] != bytes([expected]):
            raise Failure(KEY, "the ssh-agent refused", "it may be locked, or a question declined")
        return answer[1:]


class Strings:
    """Reads SSH's strings, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def next(self) -> bytes:
        end = 4 + int.from_bytes(self.data[:4], "big")
        if len(self.data) < max(4, end):
            raise Failure(KEY, "the ssh-agent's answer is cut off")
        value, self.data = self.data[4:end], self.data[end:]
        return value


def packed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def rsa_of_blob(blob: bytes) -> PublicKey:
    reader = Strings(blob)
    reader.next()
    e, n = (int.from_bytes(reader.next(), "big") for _ in range(2))
    return PublicKey(n, e)


def load_key(config: Config) -> OpensslKey | AgentKey:
    if config.key == "agent" or config.key.startswith("agent:"):
        return AgentKey(config.key[6:])
    source, first = config.passphrase, b""
    if source.startswith("env:"):  # the command that prints the key must not inherit it
        first = read_secret(source, "the passphrase")
    raw = read_secret(config.key, "the private key")

    def passphrase() -> bytes:
        if not source:
            raise bad_key("encrypted", "--passphrase FILE, fd:N, env:NAME or command:CMD")
        return first or read_secret(source, "the passphrase")

    return OpensslKey(raw, passphrase)


# --- shell: HTTP ---


class GitHub:
    """Requests to one GitHub: its API, and the site where people log in."""

    def __init__(self, config: Config) -> None:
        import ssl
        import urllib.request

        class NoRedirects(urllib.request.HTTPRedirectHandler):
            """urllib would send the Authorization on to wherever the answer points."""

            def redirect_request(self, *_: object) -> None:
                return None

        self.api = config.api_url
        self.oauth = config.oauth_url
        try:
            tls = ssl.create_default_context(cafile=config.ca_file or None)
        except OSError as error:
            reason = error.strerror or "it holds no certificates"
            raise Failure(USAGE, f"cannot use the CA file {config.ca_file}: {reason}") from None
        handlers = [NoRedirects(), urllib.request.HTTPSHandler(context=tls)]
        if self.api.startswith("http:"):
            handlers.append(urllib.request.ProxyHandler({}))  # loopback stays on this machine
        self.opener = urllib.request.build_opener(*handlers)
        self.offset = 0.0  # GitHub's clock minus ours
        self.renamed = False  # a redirect was followed

    def now(self) -> float:
        return time.time() + self.offset

    def get(self, path: str, token: str = "") -> Reply:
        reply = self.request("GET", self.api + path, token)
        for _ in range(3):
            if reply.status not in (301, 302, 307, 308):
                return reply
            self.renamed = True
            reply = self.request("GET", self.redirected(reply), token)
        raise Failure(NETWORK, f"{host_of(self.api)} redirects in a circle")

    def redirected(self, reply: Reply) -> str:
        from urllib.parse import urljoin

        target = urljoin(reply.url, reply.headers.get("location", ""))
        if origin_of(target) != origin_of(self.api):
            raise redirects_elsewhere(reply)
        return target

    def post(self, path: str, token: str, body: Object) -> Reply:
        return no_redirect(self.request("POST", self.api + path, token, json.dumps(body).encode()))

    def delete(self, path: str, token: str) -> Reply:
        return no_redirect(self.request("DELETE", self.api + path, token))

    def form(self, path: str, *, again: bool = True, **fields: str) -> Object:
        """The answer of an OAuth endpoint. Its errors come with HTTP 200."""
        from urllib.parse import urlencode

        body = urlencode(fields).encode()
        return no_redirect(self.request("POST", self.oauth + path, "", body, again=again)).object()

    def request(
        self, method: str, url: str, token: str, body: bytes | None = None, *, again: bool = True
    ) -> Reply:
        """One request, repeated when GitHub is down or asks to wait for some seconds."""
        for pause in (0.5, 1.0, 2.0):
            try:
                reply = self.send(method, url, token, body)
            except Failure:
                if not again or pause == 2.0:
                    raise
            else:
                wait = retry_after(reply)
                if wait > 30:
                    raise rate_limited(reply, wait)
                if not (wait or reply.status >= 500) or not again or pause == 2.0:
                    break
                pause = max(pause, wait)
            time.sleep(pause)
        if reply.status >= 500:
            raise Failure(SERVER, f"GitHub answered HTTP {reply.status}", "see githubstatus.com")
        if retry_after(reply):
            raise rate_limited(reply, retry_after(reply))
        return reply

    def send(self, method: str, url: str, token: str, body: bytes | None) -> Reply:
        import http.client
        import urllib.error
        import urllib.request

        oauth = not url.startswith(self.api + "/")
        headers = {
            "User-Agent": f"agent-vm-github-app-token/{__version__}",
            "Accept": "application/json" if oauth else "application/vnd.github+json",
        }
        if body:
            kind = "x-www-form-urlencoded" if oauth else "json"
            headers["Content-Type"] = f"application/{kind}"
        if not oauth:
            headers["X-GitHub-Api-Version"] = "2022-11-28"
        request = urllib.request.Request(url, data=body, headers=headers, method=method)
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            with time_limit(REPLY_SECONDS):
                try:
                    response = self.opener.open(request, timeout=30)
                except urllib.error.HTTPError as error:
                    response = error
                with response:
                    data = response.read(MAX_REPLY + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise network_failure(url, error) from None
        if len(data) > MAX_REPLY:
            raise Failure(1, f"{host_of(url)} sent more than {MAX_REPLY} bytes")
        lower = {name.lower(): value for name, value in response.headers.items()}
        return Reply(response.status or 0, lower, data, url)

    def take_time(self, reply: Reply) -> bool:
        """Set the clock's offset from the answer's Date; False when there is none."""
        from email.utils import parsedate_to_datetime

        try:
            self.offset = parsedate_to_datetime(reply.headers["date"]).timestamp() - time.time()
        except (KeyError, TypeError, ValueError):
            return False
        return True


def no_redirect(reply: Reply) -> Reply:
    if 300 <= reply.status < 400:
        raise redirects_elsewhere(reply)
    return reply


def redirects_elsewhere(reply: Reply) -> Failure:
    target = host_of(redact(reply.headers.get("location", "")))
    return Failure(NETWORK, f"{host_of(reply.url)} redirects to {target or 'nowhere'}",
                   "a captive portal, a proxy, or not the address of GitHub's API")  # fmt: skip


def network_failure(url: str, error: Exception) -> Failure:
    reason = getattr(error, "reason", error)
    text = redact(str(reason)) or type(reason).__name__
    hint = "--ca-file, if the host's network opens TLS" if "CERTIFICATE" in text.upper() else ""
    return Failure(NETWORK, f"{host_of(url)} cannot be reached: {text[:200]}", hint)


def retry_after(reply: Reply) -> float:
    """Seconds that a rate limit asks to wait; 0 for other answers."""
    if reply.status not in (403, 429):
        return 0
    with contextlib.suppress(KeyError, ValueError):
        return min(max(1.0, float(reply.headers["retry-after"])), 86400)
    if reply.headers.get("x-ratelimit-remaining") == "0":
        with contextlib.suppress(KeyError, ValueError):
            left = float(reply.headers["x-ratelimit-reset"]) - time.time()
            return min(max(1.0, left), 86400)
    limited = reply.status == 429 or "rate limit" in reply.message().lower()
    return 60 if limited else 0


def rate_limited(reply: Reply, wait: float) -> Failure:
    return Failure(RATE, f"GitHub's rate limit is reached: {reply.message()}",
                   f"try again in {int(wait)} s")  # fmt: skip


# --- shell: the cache ---


def xdg_home(variable: str, default: str) -> str:
    """A relative path is ignored, as XDG says: it would lie in whatever folder this is run in."""
    given = os.environ.get(variable, "")
    path = given if os.path.isabs(given) else os.path.expanduser(default)
    if not os.path.isabs(path):
        raise Failure(USAGE, f"HOME is no absolute path, and {variable} is not set")
    return path


class Cache:
    """One folder of ours (0700) with files (0600): tokens, and the ids of repositories."""

    def __init__(self) -> None:
        self.folder = os.path.join(xdg_home("XDG_STATE_HOME", "~/.local/state"), "github-app-token")

    def path(self, kind: str, **what: Json) -> str:
        """The file of what a token is for: another host, App, permission or repository, another."""
        text = json.dumps(what, sort_keys=True)
        return os.path.join(
            self.folder, f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        )

    def token_path(self, config: Config) -> str:
        what: Object = {"api": config.api_url, "app": config.app_id,
                        "repos": sorted(name.lower() for name in config.repos)}  # fmt: skip
        if config.kind == "installation":
            what.update(permissions=config.permissions, ids=config.repo_id)
        return self.path(config.kind, **what)

    def id_path(self, config: Config, repo: str) -> str:
        return self.path("repository", api=config.api_url, repo=repo.lower())

    def check_folder(self) -> None:
        """Make the folder, or say why it cannot be used."""
        try:
            os.makedirs(self.folder, 0o700, exist_ok=True)
            info = os.lstat(self.folder)
        except OSError as error:
            raise Failure(CACHE, f"cannot use {self.folder}: {error.strerror}") from None
        ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
        if not ours or info.st_mode & 0o077:
            raise Failure(CACHE, f"{self.folder} is not a folder for this user alone",
                          f"chmod 700 {self.folder}")  # fmt: skip

    def read(self, path: str) -> Object | None:
        """A file's object. What is corrupt, or could be another's, is as good as absent."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            warn(f"ignoring {path}: {error.strerror}")
            return None
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if (
                not stat.S_ISREG(info.st_mode)
                or info.st_uid != os.geteuid()
                or info.st_mode & 0o077
            ):
                warn(f"ignoring {path}: others may have written it")
                return None
            try:
                value = json.loads(file.read(MAX_REPLY))
            except (ValueError, RecursionError):
                warn(f"ignoring {path}: it is damaged")
                return None
        return value if isinstance(value, dict) else None

    def is_absent(self, path: str) -> bool:
        """False also when nobody can tell."""
        try:
            os.lstat(path)
        except FileNotFoundError:
            return True
        except OSError:
            pass
        return False

    def read_token(self, path: str) -> Token | None:
        data = self.read(path)
        if data is None:
            return None
        try:
            token = Token(**data)
            check_token(token.token)
            for seconds in (token.expires_at, token.clock_offset, token.refresh_expires_at):
                if not abs(seconds) < MAX_TIME:
                    raise ValueError("not a time")
            if not all(type(item["id"]) is int for item in token.repositories or [{}]):
                raise ValueError("of no repository")
            described(token)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            warn(f"ignoring {path}: it is damaged")
            return None
        return token

    def write(self, path: str, value: Object) -> None:
        """All of it or nothing: a new file in place of the old one, on disk before it is named."""
        import tempfile

        self.check_folder()
        self.remove_left_over()
        try:
            fd, temporary = tempfile.mkstemp(prefix=".new-", dir=self.folder)  # 0600
            try:
                with open(fd, "w") as file:
                    json.dump(value, file)
                    file.flush()
                    os.fsync(fd)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise Failure(CACHE, f"cannot write {path}: {error.strerror}") from None

    def remove_left_over(self) -> None:
        """What a process that was killed in `write` left an hour ago or earlier."""
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(self.folder)):
                if entry.name.startswith(".new-") and entry.stat().st_mtime < time.time() - 3600:
                    os.unlink(entry.path)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def tokens(self) -> dict[str, Token]:
        """All that is cached, by path."""
        found = {}
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self.folder)):
                path = os.path.join(self.folder, name)
                if name.startswith(("installation-", "user-")) and name.endswith(".json"):
                    token = self.read_token(path)
                    if token:
                        found[path] = token
        return found

    @contextlib.contextmanager
    def lock(self, path: str) -> Iterator[None]:
        """One process at a time; the kernel lets go of it when a process dies."""
        self.check_folder()
        deadline = time.monotonic() + LOCK_SECONDS
        try:
            fd = os.open(
                f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise Failure(CACHE, f"cannot open {path}.lock: {error.strerror}") from None
        with open(fd, "w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if not isinstance(error, BlockingIOError):
                        raise Failure(CACHE, f"{path}.lock: {error.strerror}") from None
                    if time.monotonic() > deadline:
                        raise Failure(CACHE, f"another process holds {path}.lock") from None
                    time.sleep(0.05)
            yield


def warn(text: str) -> None:
    print(f"github_app_token: warning: {redact(text)}", file=sys.stderr)


# --- tokens of an App's installation ---


class App:
    """The App as GitHub knows it: requests signed with its key."""

    def __init__(self, config: Config, github: GitHub) -> None:
        self.config = config
        self.github = github
        self.key = load_key(config)
        self.jwt = ""
        self.signed_anew = False

    def sign(self) -> None:
        data = signing_input(self.config.app_id, self.github.now())
        signature = self.key.sign(data)
        if not is_signature(signature, data, self.key.public):
            raise Failure(SIGNER, "the signature is not one of this key")
        self.jwt = (data + b"." + base64url(signature)).decode()

    def call(self, method: str, path: str, body: Object | None = None) -> Reply:
        """An answer other than 401; when only the clock is wrong, signed once more by GitHub's."""
        if not self.jwt:
            self.sign()
        if method == "GET":
            reply = self.github.get(path, self.jwt)
        else:
            reply = self.github.post(path, self.jwt, body or {})
        if reply.status != 401:
            return reply
        said = reply.message()
        clock = "'iat'" in said or "'exp'" in said or "claim" in said
        if clock and not self.signed_anew and self.github.take_time(reply):
            self.signed_anew = True
            warn(f"this machine's clock is off by {-self.github.offset:.0f} s")
            self.sign()
            return self.call(method, path, body)
        if clock:
            raise Failure(
                REJECTED, f"GitHub does not accept the JWT's time: {said}", "set the clock"
            )
        shown = fingerprint(self.key.public)
        raise Failure(
            REJECTED,
            f"GitHub does not know this App with this key: {said}",
            f"is {shown} among the private keys of App {self.config.app_id}?",
        )

    def installation(self, repo: str) -> Object:
        """The installation that covers the repository, or why there is none."""
        reply = self.call("GET", f"/repos/{repo}/installation")
        if reply.status == 404:
            raise self.not_installed(repo)
        found = checked(reply, "the App's installation").object()
        if found.get("suspended_at"):
            raise Failure(BLOCKED, f"the App's installation on {repo} is suspended",
                          str(found.get("html_url", "")))  # fmt: skip
        return found

    def not_installed(self, repo: str) -> Failure:
        owner = repo.partition("/")[0]
        reply = self.call("GET", f"/users/{owner}/installation")
        if reply.status == 200:
            where = redact(str(reply.object().get("html_url", "")))
            return Failure(NOT_INSTALLED, f"the App is installed on {owner}, but not for {repo}",
                           f"add the repository there: {where}")  # fmt: skip
        slug = self.call("GET", "/app").object().get("slug", "APP")
        url = f"{self.config.oauth_url}/apps/{slug}/installations/new"
        return Failure(NOT_INSTALLED, f"the App is not installed on {owner}", f"install it: {url}")


def checked(reply: Reply, what: str) -> Reply:
    """A reply that succeeded; Failure for the others, by their status."""
    if reply.status < 300:
        return reply
    said = reply.message()
    if reply.status == 403:
        hint = "log in to the organization's SSO first" if "x-github-sso" in reply.headers else ""
        raise Failure(BLOCKED, f"GitHub refuses {what}: {said}", hint)
    raise Failure(1, f"GitHub answered HTTP {reply.status} to {what}: {said}")


@contextlib.contextmanager
def well_formed() -> Iterator[None]:
    """Failure when an answer of GitHub's has not the documented form: a null for a number, say."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = type(error).__name__
        raise Failure(1, f"GitHub's answer has not the documented form ({what})") from None


@well_formed()
def mint(config: Config, cache: Cache) -> Token:
    """A new installation token for exactly the repositories and permissions asked for."""
    if config.permissions is None:
        raise Failure(USAGE, "say what the token may do: --permissions",
                      "read, dev, a list like contents:write,issues:read, or inherit")  # fmt: skip
    github = GitHub(config)
    app = App(config, github)
    installation = app.installation(config.repos[0])
    pins = pinned_ids(config, cache)
    ids = list(pins.values()) if len(pins) == len(config.repos) else []
    wanted: Object = (
        {"repository_ids": ids}
        if ids
        else {"repositories": [r.split("/")[1] for r in config.repos]}
    )
    if config.permissions:
        wanted["permissions"] = dict(config.permissions)
    with no_signals():
        path = f"/app/installations/{int(installation['id'])}/access_tokens"
        reply = app.call("POST", path, wanted)
        if reply.status == 422:
            raise not_granted(config, installation, reply)
        checked(reply, "the token")
        github.take_time(reply)
        with given_out_or(lambda: revoked_installation(github, reply)):
            token = parse_installation_token(reply, config, ids, github.now())
            check_names(config, token, pins, github)
            remember_ids(config, cache, token)
        app_slug = str(installation.get("app_slug", ""))
        token = token._replace(clock_offset=github.offset, login=app_slug)
        with warned():
            cache.write(cache.token_path(config), token._asdict())
    return token


def revoked_installation(github: GitHub, reply: Reply) -> bool | None:
    try:
        token = check_token(reply.object()["token"])
    except (Failure, KeyError, ValueError):
        return None
    return github.delete("/installation/token", token).status == 204


@contextlib.contextmanager
def given_out_or(take_back: Callable[[], bool | None]) -> Iterator[None]:
    """A token that is not given out does not live on: whatever goes wrong, `take_back` is called.

    It returns whether GitHub took the token back, or None when there is none; the error says it.
    """
    try:
        yield
    except BaseException as error:
        revoked: bool | None = False
        with contextlib.suppress(Failure):
            revoked = take_back()
        if revoked is None or not isinstance(error, Failure):
            raise
        fate = "it is revoked" if revoked else "GitHub did not revoke it: it lives on"
        raise Failure(error.status, f"{error}; {fate}", error.hint) from None


def not_granted(config: Config, installation: Object, reply: Reply) -> Failure:
    """Why a 422: GitHub has one for a repository and one for permissions."""
    said = reply.message()
    wanted = dict(config.permissions or ())
    missing = missing_permissions(wanted, installation.get("permissions") or {})
    where = redact(str(installation.get("html_url", "")))
    if missing:
        return Failure(PERMISSION, f"the App's installation does not have {', '.join(missing)}",
                       f"give it to the App, then accept it: {where}")  # fmt: skip
    return Failure(NOT_INSTALLED, f"GitHub refuses these repositories: {said}",
                   f"are they selected? {where} (made anew? --accept-new-repo)")  # fmt: skip


def pinned_ids(config: Config, cache: Cache) -> dict[str, int]:
    """The ids that the repositories had when they were first used, by name in lower case.

    A file that says it and cannot be read is not as good as absent: the name may mean another now.
    """
    if config.repo_id:
        return {config.repos[0].lower(): config.repo_id}
    pins = {}
    for repo in () if config.accept_new_repo else config.repos:
        path = cache.id_path(config, repo)
        id = (cache.read(path) or {}).get("id")
        if type(id) is int and id > 0:
            pins[repo.lower()] = id
        elif not cache.is_absent(path):
            raise Failure(
                CACHE, f"{path} should say which repository {repo} is", "--accept-new-repo"
            )
    return pins


def check_names(config: Config, token: Token, pins: Mapping[str, int], github: GitHub) -> None:
    """A pinned id under another name is a renamed repository, if GitHub redirects the old name."""
    for item in token.repositories:
        if pins.get(item["full_name"].lower(), item["id"]) != item["id"]:
            raise Failure(
                OTHER_REPO,
                f"{item['full_name']} has come to mean another repository",
                "--accept-new-repo",
            )
    asked = {name.lower() for name in config.repos}
    other = [
        item["full_name"] for item in token.repositories if item["full_name"].lower() not in asked
    ]
    if other and not (github.renamed and len(config.repos) == 1):
        raise Failure(
            OTHER_REPO,
            f"{', '.join(config.repos)} has come to mean another repository; "
            f"the one that was used is now {', '.join(other)}",
            "--accept-new-repo",
        )
    if other:
        warn(f"the repository is now called {', '.join(other)}: change the settings")


def remember_ids(config: Config, cache: Cache, token: Token) -> None:
    for repo in config.repos:
        for item in token.repositories:
            if item["full_name"].lower() == repo.lower() and not config.repo_id:
                with warned():
                    cache.write(cache.id_path(config, repo), item)


@contextlib.contextmanager
def warned() -> Iterator[None]:
    """A cache that cannot be written costs time, not the token."""
    try:
        yield
    except Failure as failure:
        warn(f"{failure}: not cached")


# --- tokens of a user ---

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


@well_formed()
def device_login(config: Config, cache: Cache) -> Token:
    """RFC 8628: show a code, wait until it is entered in a browser, and check what came of it."""
    github = GitHub(config)
    if config.app_id.isdecimal():
        raise Failure(DEVICE_FLOW, "login needs the App's client id (Iv…), not its number",
                      "the App's settings, General, Client ID")  # fmt: skip
    id = repository_id(config, cache, github)
    cache.check_folder()
    with cache.lock(cache.token_path(config)):
        pass  # what would fail afterwards fails now
    data = github.form("/login/device/code", client_id=config.app_id)
    if "error" in data or "device_code" not in data:
        raise device_flow_failure(str(data.get("error", "unauthorized_client")),
                                  str(data.get("error_description", "")))  # fmt: skip
    where = str(data.get("verification_uri", ""))
    if origin_of(where) != origin_of(github.oauth):
        raise Failure(NETWORK, f"the code would have to be entered at {host_of(where)}, not GitHub")
    expires = float(data.get("expires_in", 900))
    code = redact(str(data.get("user_code", "")))
    print(
        f"Enter {code} at {redact(where)} (within {expires / 60:.0f} min), as the user whose\n"
        f"rights the token shall have. It will be for {config.repos[0]} alone.",
        file=sys.stderr,
    )
    return poll(github, data, expires, config, cache, id)


def poll(
    github: GitHub, data: Object, expires: float, config: Config, cache: Cache, id: int
) -> Token:
    """Wait for the code to be entered; a grant is stored or revoked before a signal counts."""
    deadline = time.monotonic() + expires
    interval = float(data.get("interval", 5))
    while True:
        time.sleep(interval * 1.2)  # the clocks of VMs run fast, and GitHub counts
        if time.monotonic() > deadline:
            raise Failure(EXPIRED, "the code expired before it was entered", "login again")
        with no_signals():
            try:
                answer = github.form(
                    "/login/oauth/access_token",
                    client_id=config.app_id,
                    repository_id=str(id),
                    device_code=str(data["device_code"]),
                    grant_type=DEVICE_GRANT,
                )
            except Failure as failure:
                if failure.status not in (NETWORK, SERVER, RATE):
                    raise
                continue
            step, interval = device_step(answer, interval)
            if step == "done":
                return logged_in(answer, config, cache, github, id)


def logged_in(grant: Object, config: Config, cache: Cache, github: GitHub, id: int) -> Token:
    """The token of a login, checked and stored; the login before is over."""
    token = user_token(grant, config, github)
    with given_out_or(lambda: revoked_login(github, token.token, token.refresh_token)):
        name = check_user_scope(token, id, config.repos[0], github)
        if name.lower() != config.repos[0].lower():
            raise Failure(OTHER_REPO, f"{config.repos[0]} was {id}, which is now {name}",
                          "--accept-new-repo, or the new name")  # fmt: skip
        who = checked(github.get("/user", token.token), "the user's name").object()
        repository = {"id": id, "full_name": name}
        token = token._replace(login=str(who.get("login", "")), repositories=[repository])
        path = cache.token_path(config)
        with cache.lock(path):
            before = cache.read_token(path)
            cache.write(path, token._asdict())
    if before and not revoked_login(github, before.token, before.refresh_token):
        warn(f"GitHub did not revoke the login before, {masked(before.token)}")
    return token


def user_token(grant: Object, config: Config, github: GitHub) -> Token:
    """What a login or a refresh returned; Failure for what cannot be limited."""
    try:
        token = check_token(grant["access_token"])
    except (KeyError, TypeError, ValueError):
        raise Failure(1, "GitHub's answer has no usable token") from None
    problem, refresh, life, refresh_life = "", "", 0.0, 0.0
    try:
        refresh = check_token(grant["refresh_token"]) if grant.get("refresh_token") else ""
        life = float(grant.get("expires_in") or 0)
        refresh_life = float(grant.get("refresh_token_expires_in") or 0)
    except (TypeError, ValueError, OverflowError):
        life = -1.0
    if not (0 <= life < MAX_TIME and 0 <= refresh_life < MAX_TIME):
        problem = "GitHub's answer has not the documented form"
    elif token.startswith("gho_"):
        problem = "it is an OAuth App's, which no repository limits: use a GitHub App"
    elif not life or not refresh:
        problem = (
            "it would never expire: the App's settings, Optional features, opt in to expiration"
        )
    if problem:
        with given_out_or(lambda: revoked_login(github, token, refresh)):
            raise Failure(TOO_WIDE, f"this token is refused: {problem}")
    now = github.now()
    return Token(token, "user", now + life, github.offset, config.api_url, [], {},
                 refresh_token=refresh, refresh_expires_at=now + refresh_life)  # fmt: skip


def check_user_scope(token: Token, id: int, repo: str, github: GitHub) -> str:
    """GitHub ignores a repository_id that the user cannot reach: look what the token reaches.

    Its name there.
    """
    found = {}
    for installation in whole_list("installations", "/user/installations", token, github):
        path = f"/user/installations/{int(installation['id'])}/repositories"
        for item in whole_list("repositories", path, token, github):
            found[item["id"]] = str(item["full_name"])
    if not found:
        raise Failure(
            NOT_INSTALLED,
            f"the login reaches no repository, not {repo} either",
            "install the App there; for an organization with SSO, log in to that first",
        )
    if found.keys() != {id}:
        raise Failure(
            TOO_WIDE,
            f"the login reaches {len(found)} repositories, not {repo} alone",
            "can this user reach the repository, and is the App installed for it?",
        )
    return found[id]


def whole_list(name: str, path: str, token: Token, github: GitHub) -> list[Object]:
    """A list of GitHub's; Failure when there is more of it than one page holds."""
    listed = checked(github.get(f"{path}?per_page=100", token.token), f"the {name}").object()
    found: list[Object] = listed.get(name, [])
    if listed.get("total_count", len(found)) != len(found):
        raise Failure(TOO_WIDE, f"the login reaches more {name} than one page of GitHub's lists")
    return found


def repository_id(config: Config, cache: Cache, github: GitHub) -> int:
    """What a login is limited to: given, known, or public."""
    known = pinned_ids(config, cache).get(config.repos[0].lower())
    if known:
        return known
    reply = github.get(f"/repos/{config.repos[0]}")
    if reply.status != 200:
        raise Failure(USAGE, f"the id of {config.repos[0]} is not known, and it is not public",
                      f"--repo-id N; gh api repos/{config.repos[0]} --jq .id shows it")  # fmt: skip
    id = int(reply.object().get("id", 0))
    cache.write(cache.id_path(config, config.repos[0]), {"id": id, "full_name": config.repos[0]})
    return id


@well_formed()
def refreshed(config: Config, cache: Cache, path: str, token: Token, refused: str) -> Token:
    """A new token for an old one; the refresh token works once, and ends the old access token.

    The file says that a refresh has begun before the request is sent: if the answer is lost, the
    next run knows why the refresh token is dead.
    """
    if token.refresh_expires_at < time.time() + token.clock_offset:
        raise login_needed(config, "the login has expired")
    github = GitHub(config)
    with no_signals():
        cache.write(path, token._replace(refreshing=True)._asdict())
        try:
            grant = github.form(
                "/login/oauth/access_token",
                again=False,
                client_id=config.app_id,
                grant_type="refresh_token",
                refresh_token=token.refresh_token,
            )
        except Failure as failure:
            if alive(token, refused) and failure.status in (NETWORK, SERVER, RATE):
                warn(f"{failure}: the token is not renewed yet")
                return token
            raise
        if "error" in grant:
            cache.remove(path)
            lost = " after a refresh whose answer was lost" if token.refreshing else ""
            raise login_needed(config, f"GitHub does not know the login any more{lost}")
        new = user_token(grant, config, github)
        new = new._replace(login=token.login, repositories=token.repositories)
        with given_out_or(lambda: revoked_login(github, new.token, new.refresh_token)):
            cache.write(path, new._replace(refreshing=True, unchecked=True)._asdict())
    try:
        check_user_scope(new, new.repositories[0]["id"], config.repos[0], github)
    except Failure as failure:
        if failure.status in (TOO_WIDE, NOT_INSTALLED):
            cache.remove(path)
            with given_out_or(lambda: revoked_login(github, new.token, new.refresh_token)):
                raise
        raise
    cache.write(path, new._asdict())  # from now on it is given out
    return new


@contextlib.contextmanager
def no_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until what has begun is on disk."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def login_needed(config: Config, why: str) -> Failure:
    hint = f"github_app_token.py login --repo {config.repos[0]} --app-id {config.app_id}"
    return Failure(LOGIN, why, hint + "; or give the App's --key")


def take_back(github: GitHub, *tokens: str) -> bool:
    """Whether GitHub took them back: github.com does, without anyone's authority."""
    reply = github.post("/credentials/revoke", "", {"credentials": [t for t in tokens if t]})
    return reply.status < 300


def revoked_login(github: GitHub, token: str, refresh_token: str) -> bool:
    """`take_back`, where nothing can be done about a GitHub that does not answer."""
    try:
        return take_back(github, token, refresh_token)
    except Failure as failure:
        warn(f"not revoked: {failure}")
        return False


# --- commands ---


def alive(token: Token, refused: str) -> bool:
    """May be given out, as far as is known: checked, and not the one that GitHub refused."""
    digest = hashlib.sha256(token.token.encode()).hexdigest()
    return token.left() > 0 and not token.unchecked and digest != refused


def get_token(config: Config, cache: Cache, refused: str = "") -> tuple[Token, bool]:
    """(a token that lives for min_ttl, whether it was cached). `refused`: SHA-256 of a dead one."""

    def usable(token: Token | None) -> bool:
        return bool(token and token.left() > config.min_ttl and not token.refreshing
                    and is_for(token, config, pins) and alive(token, refused))  # fmt: skip

    if config.kind == "user":
        check_for_login(config)
    pins = pinned_ids(config, cache)
    path = cache.token_path(config)
    token = cache.read_token(path)
    if config.kind == "user" and token:
        check_login(config, pins, token)
    if token and usable(token) and not config.accept_new_repo:
        return token, True
    if config.kind == "installation":
        with contextlib.ExitStack() as stack:
            with warned():
                stack.enter_context(cache.lock(path))
                token = None if config.accept_new_repo else cache.read_token(path)
                if token and usable(token):
                    return token, True
            return mint(config, cache), False
    with cache.lock(path):
        token = cache.read_token(path)
        if not token:
            raise login_needed(config, "nobody has logged in for this repository")
        if usable(token):
            return token, True
        return refreshed(config, cache, path, token, refused), False


def formatted(token: Token, format: str, cached: bool) -> str:
    if format == "json":
        data = {
            key: getattr(token, key) for key in ("token", "type", "repositories", "permissions")
        }
        expires = time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(token.expires_at - token.clock_offset)
        )
        return json.dumps({"version": 1, **data, "expires_at": expires, "api_url": token.api_url,
                           "login": token.login, "cached": cached})  # fmt: skip
    return {"plain": "{}", "env": "GH_TOKEN={}", "header": "Authorization: Bearer {}"}[
        format
    ].format(token.token)


def described(token: Token) -> str:
    """One line for people, without the token."""
    names = ", ".join(item["full_name"] for item in token.repositories) or "?"
    rights = ",".join(f"{name}:{level}" for name, level in sorted(token.permissions.items()))
    left = token.left() / 60
    until = f"expires in {left:.0f} min" if left > 0 else "expired"
    return f"{masked(token.token)}, {until}, {names}: {rights or 'as the user ' + token.login}"


def cmd_token(config: Config, options: argparse.Namespace) -> int:
    refused = os.environ.get("GITHUB_TOKEN_REFUSED", "")
    token, cached = get_token(config, Cache(), refused)
    if sys.stdout.isatty() and not options.show:
        print(described(token))
        print(
            "github_app_token: hint: it goes to a pipe as it is; --show prints it here",
            file=sys.stderr,
        )
    else:
        print(formatted(token, options.format, cached))
    return 0


def is_for(token: Token, config: Config, pins: Mapping[str, int]) -> bool:
    """Whether a cached token is what its file's name says."""
    ids = {item["id"] for item in token.repositories}
    known = len(pins) == len(config.repos)
    same = (token.api_url, token.type) == (config.api_url, config.kind)
    return same and (not known or ids == set(pins.values()))


def check_login(config: Config, pins: Mapping[str, int], token: Token) -> None:
    """A login is for the repository that it was made for, whatever its name means by now."""
    repo = config.repos[0]
    id = token.repositories[0]["id"]
    if config.accept_new_repo or pins.get(repo.lower(), id) != id:
        why = f"the login is for the repository {id}, which may not be {repo} any more"
        raise Failure(OTHER_REPO, why, login_needed(config, "").hint)


def check_for_login(config: Config) -> None:
    """A login has the rights that the App and the user share: nothing narrows them."""
    if len(config.repos) > 1:
        raise Failure(USAGE, "a login is for one repository", "--key, for a token of several")
    if config.permissions:
        raise Failure(USAGE, "--permissions narrow a token only with --key",
                      "--permissions inherit: all that the login may do")  # fmt: skip


def cmd_login(config: Config, options: argparse.Namespace) -> int:
    check_for_login(config)
    token = device_login(config._replace(key=""), Cache())
    print(f"github_app_token: logged in: {described(token)}", file=sys.stderr)
    return 0


def cmd_logout(config: Config, options: argparse.Namespace) -> int:
    return revoke(config._replace(key=""), "logged out")


def cmd_revoke(config: Config, options: argparse.Namespace) -> int:
    return revoke(config, "revoked")


def revoke(config: Config, done: str) -> int:
    """Take back what is cached for these settings. An expired token is none: that is success."""
    cache = Cache()
    path = cache.token_path(config)
    cache.check_folder()
    with cache.lock(path):
        token = cache.read_token(path)
        if token is None:
            print("github_app_token: nothing is cached for these settings", file=sys.stderr)
            return 0
        github = GitHub(config)
        if token.type == "installation":
            reply = github.delete("/installation/token", token.token)
            if reply.status == 401:
                done = "it was not valid any more"
            elif reply.status != 204:
                raise Failure(1, f"GitHub did not revoke the token: HTTP {reply.status}")
        # A GitHub that cannot be asked raises: then this is to be done again.
        elif not take_back(github, token.token, token.refresh_token):
            cache.remove(path)
            raise Failure(1, "it is forgotten here, but GitHub did not revoke it",
                          f"{config.oauth_url}/settings/apps/authorizations does")  # fmt: skip
        cache.remove(path)
    print(f"github_app_token: {done}: {masked(token.token)}", file=sys.stderr)
    return 0


def cmd_git_credential(config: Config, options: argparse.Namespace) -> int:
    """git's helper: answers for the repository alone, and for no other is there an answer."""
    asked = read_credential(sys.stdin.read(64 * 1024))
    repo = re.sub(r"(\.wiki)?(\.git)?(/info/lfs)?/?$", "", asked.get("path", ""))
    site = f"{asked.get('protocol')}://{asked.get('host', '').lower()}"
    if site != config.oauth_url or repo.lower() not in [name.lower() for name in config.repos]:
        if site == config.oauth_url and not asked.get("path") and options.action == "get":
            warn(f"git must send the path: git config --global credential.{site}.useHttpPath true")
        return 0
    cache = Cache()
    if options.action == "erase":
        path = cache.token_path(config)
        token = cache.read_token(path)
        if token and token.token == asked.get("password"):  # git was refused with it
            if token.type == "installation":
                cache.remove(path)
            else:
                cache.write(path, token._replace(refreshing=True)._asdict())
    elif options.action == "get":
        token, _ = get_token(config, cache)
        print(f"username=x-access-token\npassword={token.token}\n"
              f"password_expiry_utc={int(token.expires_at - token.clock_offset)}")  # fmt: skip
    return 0


def read_credential(text: str) -> dict[str, str]:
    if "\r" in text or "\0" in text:
        raise Failure(USAGE, "git's request has characters that none has")
    return dict(line.split("=", 1) for line in text.split("\n") if "=" in line)


# --- status ---


class Finding(NamedTuple):
    name: str
    ok: bool
    text: str
    hint: str = ""
    status: int = 0


def cmd_status(config: Config, options: argparse.Namespace) -> int:
    """What is set, cached and wrong; the exit status is that of the first fault."""
    cache = Cache()
    findings = list(findings_of(config, cache))
    if options.format == "json":
        print(json.dumps({"findings": [finding._asdict() for finding in findings]}))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name}: {finding.text}")
            if finding.hint:
                print(f"     fix: {finding.hint}")
    return next((finding.status for finding in findings if not finding.ok), 0)


def findings_of(config: Config, cache: Cache) -> Iterator[Finding]:
    asked = (
        "inherit" if config.permissions == () else ",".join(map(":".join, config.permissions or ()))
    )
    where = f"{', '.join(config.repos)}, App {config.app_id} at {host_of(config.api_url)}"
    yield Finding("settings", True, f"{where}, {asked or 'no permissions'}")
    try:
        cache.check_folder()
        yield Finding("cache", True, cache.folder)
    except Failure as failure:
        yield failed("cache", failure)
    for token in cache.tokens().values():
        yield Finding(
            "cached",
            True,
            f"{token.type} {described(token)}, clock offset {token.clock_offset:.0f} s",
        )
    try:
        with well_formed():
            yield from key_findings(config) if config.key else login_findings(config, cache)
    except Failure as failure:
        yield failed("GitHub", failure)


def failed(name: str, failure: Failure) -> Finding:
    return Finding(name, False, str(failure), failure.hint, failure.status)


def key_findings(config: Config) -> Iterator[Finding]:
    github = GitHub(config)
    app = App(config, github)
    public = app.key.public
    yield Finding("key", True, f"RSA {public.n.bit_length()}, {fingerprint(public)}")
    reply = checked(app.call("GET", "/app"), "the App")
    github.take_time(reply)
    yield Finding("App", True, f"{reply.object().get('slug')}, clock offset {github.offset:.0f} s")
    installation = app.installation(config.repos[0])
    selection = installation.get("repository_selection")
    yield Finding("installation", True, f"{installation.get('id')}, {selection} repositories")
    wanted = dict(config.permissions or ())
    missing = missing_permissions(wanted, installation.get("permissions") or {})
    if missing:
        yield failed("permissions", not_granted(config, installation, Reply(422, {}, b"{}", "")))


def login_findings(config: Config, cache: Cache) -> Iterator[Finding]:
    token = cache.read_token(cache.token_path(config))
    if token is None:
        raise login_needed(config, "no key is given, and nobody has logged in")
    github = GitHub(config)
    reply = github.get("/user", token.token) if token.left() > 0 else None
    if reply and reply.status == 401:
        raise login_needed(config, "GitHub does not accept the login's token any more")
    days = (token.refresh_expires_at - time.time()) / 86400
    yield Finding("login", True, f"{token.login}, can be refreshed for {days:.0f} days")


# --- settings ---

SETTINGS = (
    "repo",
    "app_id",
    "permissions",
    "key",
    "passphrase",
    "api_url",
    "ca_file",
    "min_ttl",
    "repo_id",
)

EPILOG = """\
environment:
  GITHUB_APP_REPO, GITHUB_APP_ID, GITHUB_APP_PERMISSIONS, GITHUB_APP_KEY, GITHUB_APP_PASSPHRASE,
  GITHUB_APP_API_URL, GITHUB_APP_CA_FILE, GITHUB_APP_MIN_TTL, GITHUB_APP_REPO_ID   as the flags
  GITHUB_APP_PROFILE   as --profile
  GITHUB_TOKEN_REFUSED   SHA-256 (hex) of a token that is dead, whatever the cache says of it
  HTTPS_PROXY, NO_PROXY   the way out

files:
  ~/.config/github-app-token.ini   a section for each profile, with the flags' names as keys
  ~/.local/state/github-app-token/   tokens, and the ids of repositories

exit status:
  0 ok · 1 unexpected · 2 usage
  somebody must mend it: 10 key · 11 signing · 12 App rejected · 13 not installed · 14 blocked
    15 permission · 16 wider than asked (revoked) · 17 another repository
  later it may work: 20 network · 21 GitHub is down · 22 rate limit · 23 cache
  a login is needed: 30 · 31 denied · 32 code expired · 33 device flow is off · 130 Ctrl-C
"""


class Parser(argparse.ArgumentParser):
    """argparse quotes what it does not know: a token that was pasted, maybe."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="github_app_token.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"%(prog)s {__version__} (Python {sys.version.split()[0]})"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, function, help in (
        ("token", cmd_token, "print a token"),
        ("login", cmd_login, "get a user's token by the device flow"),
        ("logout", cmd_logout, "revoke and forget the user's token"),
        ("status", cmd_status, "what is set and cached, what is wrong, and the fix"),
        ("revoke", cmd_revoke, "revoke and forget the cached token"),
        ("git-credential", cmd_git_credential, "git's credential helper, for the repository alone"),
    ):
        verb = verbs.add_parser(name, help=help, description=help, epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        verb.set_defaults(function=function)
        add_settings(verb)
        if name == "token":
            formats = ("plain", "json", "env", "header")
            verb.add_argument("--format", choices=formats, default="plain", help="default plain")
            verb.add_argument("--show", action="store_true", help="print it on a terminal too")
        if name == "status":
            verb.add_argument(
                "--format", choices=("text", "json"), default="text", help="default text"
            )
        if name == "git-credential":
            verb.add_argument("action", choices=("get", "store", "erase"), help="as git says")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--profile", metavar="NAME", default=os.environ.get("GITHUB_APP_PROFILE", ""),
        help="a section of the INI file")  # fmt: skip
    add(
        "--repo",
        metavar="O/R",
        action="append",
        help="the repository (again for more of one owner)",
    )
    add("--repo-id", metavar="N", help="its id, known and kept after the first token")
    add("--app-id", metavar="ID", help="the App's id or client id; login needs the client id")
    add("--permissions", metavar="SPEC", help="read, dev, a list like contents:write, or inherit")
    add(
        "--key",
        metavar="SOURCE",
        help="the App's private key: FILE, -, fd:N, env:NAME, command:CMD, agent[:FINGERPRINT]",
    )
    add(
        "--passphrase",
        metavar="SOURCE",
        help="of an encrypted key: FILE, fd:N, env:NAME, command:CMD",
    )
    add("--min-ttl", metavar="TIME", help="how long the token must live at least (default 5m)")
    add("--api-url", metavar="URL", help="github.com (default), SUB.ghe.com, or a GHES host")
    add("--ca-file", metavar="FILE", help="CA certificates for GitHub")
    add("--accept-new-repo", action="store_true", help="the name means another repository now")


def read_profile(name: str) -> dict[str, str]:
    import configparser

    path = os.path.join(xdg_home("XDG_CONFIG_HOME", "~/.config"), "github-app-token.ini")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, encoding="utf-8") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise Failure(USAGE, f"{path} is not a file")
            if info.st_mode & 0o022 or info.st_uid not in (0, os.geteuid()):
                raise Failure(USAGE, f"others can write {path}", f"chmod go-w {path}")
            parser.read_file(file)
        section = dict(parser[name])
    except OSError as error:
        raise Failure(USAGE, f"cannot read {path}: {error.strerror}") from None
    except KeyError:
        raise Failure(USAGE, f"{path} has no section [{name}]") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        # Not its text, which quotes the line: that may be of a key that was pasted there.
        lines = [number for number, _ in getattr(error, "errors", ())]
        line = getattr(error, "lineno", None) or (lines[0] if lines else "?")
        raise Failure(
            USAGE, f"{path} is not an INI file: {type(error).__name__}, line {line}"
        ) from None
    for key in section.keys() - set(SETTINGS):
        shown = key if re.fullmatch("[a-z_-]{1,20}", key) else "a line"  # maybe of a pasted key
        raise Failure(USAGE, f"{path}: {shown} is not a setting", "known: " + ", ".join(SETTINGS))
    return section


def build_config(options: argparse.Namespace) -> Config:
    """Flags before the environment before the profile."""
    values = read_profile(options.profile) if options.profile else {}
    for name in SETTINGS:
        variable = "GITHUB_APP_ID" if name == "app_id" else "GITHUB_APP_" + name.upper()
        values[name] = os.environ.get(variable) or values.get(name, "")
        if name == "key" and os.environ.get(variable) == "" and not options.key:
            raise Failure(USAGE, "GITHUB_APP_KEY is set and empty", "unset it to use the login")
        given = getattr(options, name)
        if given is not None:
            values[name] = " ".join(given) if name == "repo" else given
    api_url = parse_api_url(values["api_url"] or "github.com")
    host = host_of(oauth_url_of(api_url))
    by_name: dict[str, str] = {}  # as GitHub compares them
    for word in re.split(r"[,\s]+", values["repo"]):
        if "://" in word and host_of(word) != host:
            raise Failure(USAGE, f"{host_of(word)} is not {host}", "--api-url")
        if word:
            name = parse_repo(word)
            by_name.setdefault(name.lower(), name)
    repos = tuple(by_name.values())
    if not repos:
        raise Failure(USAGE, "for which repository? --repo OWNER/NAME")
    if len({repo.split("/")[0].lower() for repo in repos}) > 1:
        raise Failure(USAGE, "a token is for the repositories of one owner")
    if not re.fullmatch(r"[A-Za-z0-9._]{1,64}", values["app_id"]):
        raise Failure(
            USAGE, "which App? --app-id ID", "the App's settings, General: App ID or Client ID"
        )
    id_is_good = re.fullmatch(r"[1-9][0-9]{0,17}", values["repo_id"]) and len(repos) == 1
    if values["repo_id"] and not id_is_good:
        raise Failure(USAGE, "--repo-id is a number, and for one repository")
    return Config(
        api_url=api_url,
        app_id=values["app_id"],
        repos=repos,
        repo_id=int(values["repo_id"] or 0),
        permissions=parse_permissions(values["permissions"]),
        key=values["key"],
        passphrase=values["passphrase"],
        ca_file=values["ca_file"],
        min_ttl=parse_seconds(values["min_ttl"] or "5m"),
        accept_new_repo=options.accept_new_repo,
    )


def main(argv: list[str] | None = None) -> int:
    if not (sys.stdin and sys.stdout and sys.stderr):
        return USAGE  # closed: what is opened next would take their places
    options = build_parser().parse_args(argv)
    os.umask(0o077)
    try:
        try:
            status: int = options.function(build_config(options), options)
        except BaseException:
            if options.function is cmd_git_credential:
                print("quit=1")  # or git would ask the terminal, or a helper with a wider token
            raise
        sys.stdout.flush()
        return status
    except Failure as failure:
        print(f"github_app_token: error: {redact(str(failure))}", file=sys.stderr)
        if failure.hint:
            print(f"github_app_token: hint: {redact(failure.hint)}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again at its end
        if not isinstance(error, BrokenPipeError):
            print(f"github_app_token: error: {redact(str(error))}", file=sys.stderr)
        return 1
    except Exception as error:  # no text of it: that may hold a secret
        print(f"github_app_token: error: a fault of mine: {type(error).__name__}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
