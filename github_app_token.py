#!/usr/bin/env python3
"""Get a GitHub token for one repository, and prove that it is as narrow as asked.

    github_app_token.py token --profile widgets             print a token
    github_app_token.py login --repo O/R --app-id Iv23…     a user's token, by the device flow
    github_app_token.py status --profile widgets            what is wrong, and the fix

With the private key of a GitHub App, `token` signs a JWT (openssl, or an ssh-agent) and gets an
installation token of an hour; without a key it gives the user's token that `login` got. What
GitHub returns is compared with what was asked: a wider token is revoked and refused.

Starts:   openssl, sh
Reads:    --key, --ca-file, ~/.config/github-app-token.ini, its own cache, GITHUB_APP_PROFILE,
          GITHUB_TOKEN_REFUSED, XDG_CONFIG_HOME, XDG_STATE_HOME, HOME, PATH, SSH_AUTH_SOCK,
          HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR, OPENSSL_CONF, and the variable that
          --key env:NAME names
Writes:   ~/.local/state/github-app-token
Reaches:  GitHub's API and its login, by https; with --key agent the ssh-agent's socket
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

# All that is ever started: openssl holds the key for the time of a signature, sh runs the user's
# own words in `--key command:…`.
STARTS: frozenset[str] = frozenset({"openssl", "sh"})

# Exit statuses say who can help; the message says the rest. 130 and 143 are Ctrl-C and SIGTERM.
FAILED = 1  # nobody here: GitHub's answer has not the documented form, or a fault of this script
USAGE = 2  # who typed it: the command line or the profile (the number is argparse's)
MEND = 10  # who owns the key, the App or this machine: something is to be set right first
LATER = 20  # time: the network, GitHub or a rate limit; the same command may work later
LOGIN = 30  # the user: somebody has to log in

MAX_REPLY = 1024 * 1024
MAX_TEXT = 2000  # characters of foreign text that are looked at for a message
MAX_KEY = 15_000  # fits a pipe everywhere; a 16384-bit key has 13 kB
MIN_LIFE = 5 * 60  # seconds that a token must still live to be given out: time to use it
MAX_LIFE = 70 * 60  # an installation token lives an hour
MAX_TIME = 1e11  # seconds; NaN is not below it
JWT_BEFORE, JWT_AFTER = 60, 300  # seconds around now: GitHub allows 600, clocks are off
CHILD_SECONDS = 60  # somebody may have to unlock what a key's command asks
SECRET = "/dev/fd/SECRET"
REPLY_SECONDS = 60
LOCK_SECONDS = 75  # who holds it may wait for a key's command
PAUSE = 0.5  # seconds before a request is tried again; twice as long before the third time
# A signal ends this within a second: what GitHub is about to give has GRACE to arrive, and then
# GRACE to be taken back. What a handler cannot end (a silent name server, a slow disk) is after
# LAST cut off by a thread.
GRACE = 0.4
LAST = 0.9
FREE, HOLDING, TAKING_BACK = "free", "holding", "taking back"  # no token is under way, or one is

READABLE, WRITABLE = 0o077, 0o022  # mode bits: what others can read, or write at least
PORTAL = "a captive portal, a proxy, or not the address of GitHub's API"
WHICH_APP = "--app-id: the App's settings, General: App ID or Client ID"

Object = dict[str, Any]


class Failure(Exception):
    """Why there is no token; `main` prints it and returns `status`."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.hint = hint


# --- nouns ---


class Config(NamedTuple):
    """What is asked for: flags before the profile."""

    api_url: str
    app_id: str
    repo: str
    repo_id: int  # 0: not said
    permissions: dict[str, str]  # {}: not said
    key: str  # "": the token of a login
    ca_file: str
    accept_new_repo: bool = False


class Token(NamedTuple):
    """A token as it is cached and printed; times in seconds since the epoch, by GitHub's clock."""

    token: str
    expires_at: float
    permissions: dict[str, str]
    clock_offset: float = 0.0  # GitHub's clock minus ours
    repo_id: int = 0
    repo: str = ""
    login: str = ""  # whose it is: the App's slug, or the user
    refresh_token: str = ""
    withheld: bool = False  # not given out: it may be dead, or nobody has looked what it reaches

    def __repr__(self) -> str:
        return f"<token {masked(self.token)}>"

    def left(self, now: float) -> float:
        """Seconds that it lives on; `now` is this machine's time."""
        return self.expires_at - (now + self.clock_offset)


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    data: Object

    def said(self) -> str:
        """GitHub's own words, for an error text."""
        return redact(str(self.data.get("message", "")))[:300]


# --- pure: words and addresses ---

# GitHub's tokens (with the dash that its published pattern lacks), JWTs, keys, passwords in URLs.
SECRETS = re.compile(
    r"gh[a-z]_[A-Za-z0-9._-]{8,}|github_pat_\w{8,}|eyJ[A-Za-z0-9_-]{4,}\.[A-Za-z0-9._-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END[^-]*-----|$)|(?<=://)[^/\s@]+@"
)


def redact(text: str) -> str:
    """One line for people: no secret, no control character, and not longer than people read."""
    shown = SECRETS.sub("[redacted]", text[:MAX_TEXT])
    return "".join(c if c.isprintable() else " " for c in shown)


def masked(token: str) -> str:
    return f"{token[:4]}…{token[-4:]}"


def base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def host_of(url: str) -> str:
    return url.split("/")[2] if "//" in url else url


def oauth_url_of(api_url: str) -> str:
    """Where people log in: https://github.com for https://api.github.com."""
    if api_url.endswith("/api/v3"):
        return api_url[: -len("/api/v3")]
    return api_url.replace("https://api.", "https://", 1)


# --- pure: what was asked and what GitHub returned ---

LEVELS = ("read", "write", "admin")


def missing_permissions(wanted: Mapping[str, str], has: Mapping[str, str]) -> list[str]:
    """What of `wanted` goes beyond `has`; a level that nobody knows is above all others."""
    rank = {level: number for number, level in enumerate(("", *LEVELS))}
    return [
        f"{name}:{level}"
        for name, level in wanted.items()
        if rank.get(level, 9) > rank.get(has.get(name, ""), 9)
    ]


def check_permissions(asked: Mapping[str, str], granted: Mapping[str, str]) -> None:
    """Neither more nor less than asked; metadata:read always comes with it."""
    more = missing_permissions(granted, {"metadata": "read", **asked})
    if more:
        raise Failure(MEND, f"GitHub granted more than asked ({', '.join(more)})")
    less = missing_permissions(asked, granted)
    if less:
        raise Failure(MEND, f"GitHub did not grant {', '.join(less)}")


def check_token(value: Any) -> str:
    """A token is opaque: visible ASCII, of any length below 4096."""
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{8,4096}", value):
        raise ValueError("not a token")
    return value


def parse_installation_token(data: Object, config: Config, pinned: int, now: float) -> Token:
    """The token of GitHub's answer; Failure when it is not exactly what was asked for.

    `pinned` is the repository's number, or 0 when it is not known yet; `now` is GitHub's time.
    """
    from datetime import datetime

    try:
        token = check_token(data["token"])
        expires = datetime.fromisoformat(data["expires_at"].replace("Z", "+00:00")).timestamp()
        granted = {str(name): str(level) for name, level in data["permissions"].items()}
        repositories = data.get("repositories") or []
        reaches = {int(item["id"]): str(item["full_name"]) for item in repositories}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise Failure(FAILED, "GitHub's answer has no usable token") from None
    if not now < expires <= now + MAX_LIFE:
        raise Failure(FAILED, "GitHub's answer has a token that does not live an hour")
    if data.get("repository_selection") != "selected" or len(reaches) != 1:
        shown = ", ".join(sorted(reaches.values())) or "all of the installation"
        raise Failure(MEND, f"GitHub gave a token for {shown}")
    ((number, name),) = reaches.items()
    if number != (pinned or number):
        raise Failure(MEND, f"GitHub gave a token for {name}, number {number} and not {pinned}")
    check_name(name, config)
    check_permissions(config.permissions, granted)
    return Token(token, expires, granted, repo_id=number, repo=name)


def check_name(name: str, config: Config) -> None:
    """GitHub calls the repository what it was called when it was asked for."""
    if name.lower() != config.repo.lower():
        why = f"{config.repo} has come to mean another repository: GitHub calls this one {name} now"
        raise Failure(MEND, why, f"--repo {name}; or, if another one is meant, --accept-new-repo")


def usable(token: Token, config: Config, pinned: int, refused: str, now: float) -> bool:
    """Whether a cached token is for this repository still, and lives long enough to be used.

    `refused` is the SHA-256 of one that GitHub does not take any more, whatever is cached of it.
    """
    is_for_this = token.repo_id == (pinned or token.repo_id) and not config.accept_new_repo
    digest = hashlib.sha256(token.token.encode()).hexdigest()
    # One that lives for longer than any does was cached while a clock was wrong.
    longest = MAX_LIFE if config.key else MAX_TIME
    lives = MIN_LIFE < token.left(now) <= longest and not token.withheld and digest != refused
    return is_for_this and lives


def parse_cached(data: Object) -> Token:
    """The token of a file; ValueError or TypeError for what is damaged."""
    token = Token(**{name: data[name] for name in data if name != "refresh_expires_at"})
    example = Token("", 0.0, {})
    if [type(value) for value in token] != [type(value) for value in example]:
        raise TypeError("a value of another kind")
    check_token(token.token)
    return token


def rate_limited(reply: Reply) -> bool:
    spent = reply.headers.get("x-ratelimit-remaining") == "0"
    limited = reply.status == 403 and (spent or "rate limit" in reply.said().lower())
    return limited or reply.status == 429


def checked(reply: Reply, what: str) -> Reply:
    """A reply that succeeded; Failure for the others, by their status."""
    if reply.status < 300:
        return reply
    said = reply.said()
    if reply.status == 403:
        hint = "log in to the organization's SSO first" if "x-github-sso" in reply.headers else ""
        raise Failure(MEND, f"GitHub refuses {what}: {said}", hint)
    raise Failure(FAILED, f"GitHub answered HTTP {reply.status} to {what}: {said}")


# --- pure: keys ---

# How a public key in DER says that it is RSA and nothing else (RFC 8017, A.1: rsaEncryption).
RSA_ALGORITHM = bytes.fromhex("300d06092a864886f70d0101010500")


def bad_key(what: str) -> Failure:
    hint = "GitHub: the App's settings, General, Private keys, Generate; it is a .pem file"
    return Failure(MEND, f"the private key cannot be used: it is {what}", hint)


def pem_of(raw: bytes) -> bytes:
    """The PEM block in `raw`. A BOM, CRLF and a literal \\n are mended, nothing else is."""
    text = raw.decode("utf-8-sig", "replace")
    text = text.replace("\\r", "").replace("\\n", "\n").replace("\r", "")
    block = re.search(r"-----BEGIN ([A-Z0-9 ]+)-----\n.*?-----END \1-----", text, re.DOTALL)
    if not block:
        raise bad_key("no PEM file, or not all of one: from BEGIN to END, line by line")
    if re.search("[ ,]ENCRYPTED", block[0]):  # its label, or a line in it (PKCS#1)
        raise bad_key("encrypted: ssh-add it, and --key agent")
    if block[1] == "OPENSSH PRIVATE KEY":  # all else is openssl's to judge
        raise bad_key("in OpenSSH's format: convert a copy, ssh-keygen -p -m PEM -f COPY")
    return f"{block[0]}\n".encode("ascii", "replace")


def spki_of_numbers(e: bytes, n: bytes) -> bytes:
    """The public key as openssl writes it, of the numbers that ssh writes as DER does, too."""

    def item(tag: int, content: bytes) -> bytes:
        # 0x82: the length has two bytes, as in every key of 2048 bits and more.
        return bytes([tag, 0x82]) + len(content).to_bytes(2, "big") + content

    numbers = item(0x30, item(2, n) + bytes([2, len(e)]) + e)
    return item(0x30, RSA_ALGORITHM + item(3, b"\x00" + numbers))


def fingerprint(spki: bytes) -> str:
    """As GitHub's settings show it: of the SPKI form. (ssh-keygen -l hashes another one.)"""
    return "SHA256:" + base64.b64encode(hashlib.sha256(spki).digest()).decode()


def signing_input(app_id: str, now: float) -> bytes:
    header = {"alg": "RS256", "typ": "JWT"}
    claims = {"iat": int(now) - JWT_BEFORE, "exp": int(now) + JWT_AFTER, "iss": app_id}
    parts = (json.dumps(part, separators=(",", ":")).encode() for part in (header, claims))
    return b".".join(map(base64url, parts))


def packed(data: bytes) -> bytes:
    """A string as SSH writes it: its length first."""
    return len(data).to_bytes(4, "big") + data


def strings(data: bytes) -> list[bytes]:
    """What was packed, one after the other."""
    found = []
    while data:
        end = 4 + int.from_bytes(data[:4], "big")
        if len(data) < end:
            raise Failure(MEND, "the ssh-agent's answer is cut off")
        found.append(data[4:end])
        data = data[end:]
    return found


# --- doors: signals and time ---


class Signals:
    """Ctrl-C and SIGTERM end this within a second, and no token is lost by it.

    phase        a signal meanwhile                      what is begun after it
    FREE         ends it at once                         nothing
    HOLDING      gives GitHub's answer GRACE to arrive   writing to the disk; no request
    TAKING_BACK  gives GitHub's answer GRACE to arrive   the request that revokes, for GRACE
    """

    caught = 0  # the number of the first one
    phase = FREE  # changed by `held` alone

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and `&` have it
                signal.signal(number, self.handle)
        signal.signal(signal.SIGALRM, self.expire)
        for number in (signal.SIGTTIN, signal.SIGTTOU):  # asking from behind is an error
            signal.signal(number, signal.SIG_IGN)
        sys.unraisablehook = lambda _: None  # what they leave half made would complain at its end

    def handle(self, number: int, _: object) -> None:
        if self.caught:
            return  # the first one ends it within a second
        self.caught = number
        if self.phase == FREE:
            self.stop()
        if signal.getitimer(signal.ITIMER_REAL)[0]:  # in `limit`: the disk is not interrupted
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def expire(self, *_: object) -> None:
        if self.caught and self.phase == HOLDING:
            warn("GitHub did not answer in time: if it gave a token, nobody has it, and it expires")
            self.stop()
        raise TimeoutError("too slow")

    def stop(self) -> None:
        """End the process, if a signal has come."""
        if self.caught:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise SystemExit(128 + self.caught)

    @contextlib.contextmanager
    def held(self, phase: str = HOLDING) -> Iterator[None]:
        """From before a token is asked for until it is stored; or while one is taken back."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before
            if before == FREE:
                self.stop()

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """TimeoutError after so many seconds; see `phase` for what is begun after a signal."""
        if self.phase == HOLDING:
            self.stop()
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            if self.caught:
                signal.setitimer(signal.ITIMER_REAL, GRACE)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def watch(self) -> None:
        """Python calls no handler while a name server is silent: a thread then ends the process."""
        import threading

        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

        def end() -> None:
            # Signals are for the main thread, whose waiting they end.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            number = 0
            while number not in (signal.SIGINT, signal.SIGTERM):
                number = os.read(read_end, 1)[0]
            threading.Event().wait(LAST)  # else the handlers have ended it by now
            if self.phase != FREE:
                with contextlib.suppress(OSError):
                    warn("stopped while a token was in hand: it may live on, and nobody has it")
            os._exit(128 + number)

        threading.Thread(target=end, daemon=True).start()


SIGNALS = Signals()


def warn(text: str, hint: str = "") -> None:
    shown = f"{text} ({hint})" if hint else text
    print(f"github_app_token: warning: {redact(shown)}", file=sys.stderr)


# --- doors: programs ---


def run_child(
    argv: Sequence[str], data: bytes = b"", secret: bytes = b"",
    env: Mapping[str, str] | None = None,
) -> bytes:  # fmt: skip
    """The stdout of a program; the word SECRET in argv is a file that holds the secret.

    One that has our environment is the user's own: it has our terminal too, to ask and complain.
    """
    import subprocess
    import termios

    name = os.path.basename(argv[0])
    if name not in STARTS:
        raise ValueError("a program that the docstring does not name")
    stderr = subprocess.DEVNULL if env else sys.stderr.fileno()
    modes = termios.tcgetattr(2) if os.isatty(2) and os.tcgetpgrp(2) == os.getpgrp() else None
    read_end, write_end = os.pipe()
    os.write(write_end, secret)
    os.close(write_end)
    argv = [f"/dev/fd/{read_end}" if word == SECRET else word for word in argv]
    child = None
    try:
        with SIGNALS.held():  # or a signal that comes now would leave it alone
            child = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                pass_fds=[read_end], env=env,
            )  # fmt: skip
        output, _ = child.communicate(data, timeout=CHILD_SECONDS)
    except BaseException as error:
        if child:
            child.kill()
            child.wait()
        if modes:  # it may have switched the echo off
            termios.tcsetattr(2, termios.TCSANOW, modes)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failure(MEND, f"{name} did not end in {CHILD_SECONDS} s") from None
        raise
    finally:
        os.close(read_end)
    if child.returncode:
        raise Failure(MEND, f"{name} failed (status {child.returncode})")
    return output


# --- doors: files ---


def what_exists(path: str) -> tuple[str, int]:
    """An absolute path, or the nearest folder above it that can be seen; and whose that is."""
    if os.path.exists(path):
        return path, os.stat(path).st_uid
    return what_exists(os.path.dirname(path))


def cannot(use: str, path: str, error: OSError) -> Failure:
    """Why a path is of no use: after a run under sudo it is root's, or a folder above it is."""
    place, owner = what_exists(os.path.abspath(path))
    mine = os.geteuid()
    if not isinstance(error, PermissionError) or owner == mine:
        # A key that was given in the place of its file's name is not to be shown.
        shown = path if len(path) < 200 else "the file that it names"
        return Failure(MEND, f"cannot {use} {shown}: {error.strerror or 'not yours'}")
    hint = "run this as that user"
    if mine and place.startswith(os.path.expanduser("~/")):
        hint = f"sudo chown -R {mine} {place}"
    return Failure(MEND, f"{place} belongs to user {owner} (0 is root)", hint)


def read_file(path: str, forbidden: int, flags: int = 0) -> bytes:
    """A file's bytes, or FileNotFoundError; `forbidden` mode bits give others a hand in it."""
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags), "rb")
    except OSError as error:
        is_absent = isinstance(error, FileNotFoundError)
        raise (error if is_absent else cannot("read", path, error)) from None
    with file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise Failure(MEND, f"{path} is not a file")
        if info.st_uid not in (0, os.geteuid()):
            raise cannot("read", path, PermissionError())
        if info.st_mode & forbidden:
            raise Failure(MEND, f"{path} is open to others", f"chmod go-rwx {path}")
        return file.read(MAX_REPLY)


def xdg_home(variable: str, default: str) -> str:
    """A relative path is ignored, as XDG says: it would lie in whatever folder this is run in."""
    given = os.environ.get(variable, "")
    path = given if os.path.isabs(given) else os.path.expanduser(default)
    if not os.path.isabs(path):
        raise Failure(USAGE, f"HOME is no absolute path, and {variable} is not set")
    return path


class Cache:
    """One folder of ours (0700) with files (0600): tokens, and the numbers of repositories."""

    def __init__(self) -> None:
        self.folder = os.path.join(xdg_home("XDG_STATE_HOME", "~/.local/state"), "github-app-token")

    def path(self, kind: str, *what: Any) -> str:
        """The file of what a token is for: another host, App, permission or repository, another."""
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
        return os.path.join(self.folder, f"{kind}-{name}.json")

    def token_path(self, config: Config) -> str:
        what = (config.api_url, config.app_id, config.repo.lower())
        if config.key:
            return self.path("installation", *what, config.permissions, config.repo_id)
        return self.path("user", *what)

    def id_path(self, config: Config) -> str:
        return self.path("repository", config.api_url, config.repo.lower())

    def check_folder(self) -> None:
        """Make the folder, or say why it cannot be used."""
        try:
            # Root makes nothing in a user's home: it would lock the user's other programs out.
            if what_exists(self.folder)[1] not in (0, os.geteuid()):
                raise PermissionError
            os.makedirs(self.folder, 0o700, exist_ok=True)
            info = os.lstat(self.folder)
            if info.st_uid != os.geteuid():
                raise PermissionError
        except OSError as error:
            raise cannot("use", self.folder, error) from None
        if not stat.S_ISDIR(info.st_mode) or info.st_mode & READABLE:
            raise Failure(MEND, f"{self.folder} is not yours alone", f"chmod 700 {self.folder}")

    def read_token(self, path: str, forbidden: int = READABLE) -> Token | None:
        """The token of a file, None when there is no file; Failure when it cannot be used."""
        try:
            return parse_cached(json.loads(read_file(path, forbidden, os.O_NOFOLLOW)))
        except FileNotFoundError:
            return None
        except (TypeError, ValueError, RecursionError):
            raise Failure(MEND, f"{path} is damaged", f"rm {path}") from None

    def find_token(self, path: str) -> Token | None:
        """The same, but what cannot be used is as good as absent."""
        try:
            return self.read_token(path)
        except Failure as failure:
            warn(f"ignoring what is cached: {failure}", failure.hint)
        return None

    def withhold(self, path: str, token: Token) -> None:
        """From now on it is not given out, whatever happens next; it can be taken back still."""
        self.write(path, token._replace(withheld=True)._asdict())

    def write(self, path: str, value: Object) -> None:
        """All of it or nothing: a new file in place of the old one, on disk before it is named."""
        import tempfile

        self.check_folder()
        with contextlib.suppress(OSError):  # of who was killed in here, an hour ago or earlier
            for entry in list(os.scandir(self.folder)):
                if entry.name.startswith(".new-") and entry.stat().st_mtime < time.time() - 3600:
                    os.unlink(entry.path)
        try:
            fd, temporary = tempfile.mkstemp(prefix=".new-", dir=self.folder)  # 0600
            try:
                with open(fd, "w") as file:
                    json.dump(value, file)
                    file.flush()
                    os.fsync(fd)
                os.replace(temporary, path)
            finally:
                self.remove(temporary)
        except OSError as error:
            raise cannot("write", path, error) from None

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    @contextlib.contextmanager
    def lock(self, path: str) -> Iterator[None]:
        """One process at a time; the kernel lets go of it when a process dies."""
        self.check_folder()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(os.open(f"{path}.lock", flags, 0o600), "w"))
                with SIGNALS.limit(LOCK_SECONDS):
                    fcntl.flock(file, fcntl.LOCK_EX)
            except TimeoutError:
                raise Failure(LATER, f"another process holds {path}.lock") from None
            except OSError as error:
                raise cannot("lock", f"{path}.lock", error) from None
            yield


# --- doors: keys ---


def read_key(source: str) -> bytes:
    """The private key that a source names: FILE, -, env:NAME or command:CMD."""
    kind, _, rest = source.partition(":")
    if kind == "command":
        return run_child(["/bin/sh", "-c", rest])[:MAX_KEY]
    if kind == "env":
        return os.environb.pop(os.fsencode(rest), b"")[:MAX_KEY]  # children do not inherit it
    if source == "-":
        return sys.stdin.buffer.read(MAX_KEY)
    try:
        return read_file(os.path.expanduser(source), READABLE)[:MAX_KEY]
    except FileNotFoundError as error:
        raise cannot("read", source, error) from None


class OpensslKey:
    """A key in PEM that the openssl command signs with."""

    def __init__(self, raw: bytes) -> None:
        import shutil

        self.pem = pem_of(raw)
        self.openssl = shutil.which("openssl") or ""
        if not os.path.isabs(self.openssl):
            raise Failure(MEND, "openssl is not on PATH", "install it, or use --key agent")
        try:
            self.spki = self.run("rsa", "-in", SECRET, "-pubout", "-outform", "DER")
        except Failure as failure:
            raise bad_key(f"no RSA key that openssl can read ({failure})") from None

    def run(self, *argv: str, data: bytes = b"") -> bytes:
        """openssl, with the key through a pipe: not in argv, files or the environment.

        That is made from nothing: OPENSSL_CONF and LD_PRELOAD must not reach what holds the key.
        """
        env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
        command = [self.openssl, *argv, "-passin", "pass:"]  # or it may ask the terminal
        return run_child(command, data, self.pem, env)

    def sign(self, data: bytes) -> bytes:
        """RS256 (PKCS#1 v1.5)."""
        return self.run("dgst", "-sha256", "-sign", SECRET, data=data)


class AgentKey:
    """A key that an ssh-agent holds; it signs, the key stays there."""

    def __init__(self, wanted: str) -> None:
        known, chosen = [], []
        found = strings(self.call(b"\x0b", 12)[4:])  # SSH_AGENTC_REQUEST_IDENTITIES
        for blob in found[::2]:  # after each its comment
            if blob.startswith(packed(b"ssh-rsa")):
                _, e, n = strings(blob)
                spki = spki_of_numbers(e, n)
                known.append(fingerprint(spki))
                names = (known[-1], fingerprint(blob))  # GitHub's, and what ssh-add -l shows
                if not wanted or wanted.rstrip("=") in [name.rstrip("=") for name in names]:
                    chosen.append((blob, spki))
        if len(chosen) != 1:
            hint = f"--key agent:FINGERPRINT; its RSA keys: {', '.join(known) or 'none'}"
            raise Failure(MEND, f"the ssh-agent has {len(chosen)} such keys", hint)
        ((self.blob, self.spki),) = chosen

    def sign(self, data: bytes) -> bytes:
        flags = (2).to_bytes(4, "big")  # SSH_AGENT_RSA_SHA2_256
        answer = self.call(b"\x0d" + packed(self.blob) + packed(data) + flags, 14)
        return strings(strings(answer)[0])[1]  # after its kind

    def call(self, message: bytes, expected: int) -> bytes:
        """The body of the agent's answer (draft-ietf-sshm-ssh-agent)."""
        import socket

        try:
            with SIGNALS.limit(REPLY_SECONDS), socket.socket(socket.AF_UNIX) as agent:
                agent.connect(os.environ["SSH_AUTH_SOCK"])
                agent.sendall(packed(message))
                with agent.makefile("rb") as file:
                    answer = file.read(int.from_bytes(file.read(4), "big"))
        except (OSError, KeyError):
            raise Failure(MEND, "no ssh-agent answers (SSH_AUTH_SOCK)", "ssh-add app.pem") from None
        if answer[:1] != bytes([expected]):
            raise Failure(MEND, "the ssh-agent refused", "it may be locked, or a question declined")
        return answer[1:]


# --- doors: sockets ---


class GitHub:
    """Requests to one GitHub: its API, and the site where people log in."""

    def __init__(self, config: Config) -> None:
        import ssl
        import urllib.request

        self.root = config.api_url
        self.oauth = oauth_url_of(config.api_url)
        self.installation = bool(config.key)  # its tokens are revoked in another way than a login's
        # No handler follows a redirect: urllib's would send the Authorization on to wherever the
        # answer points.
        self.opener = urllib.request.OpenerDirector()
        if self.root.startswith("http:"):  # loopback: no proxy, and no certificates
            self.opener.add_handler(urllib.request.HTTPHandler())
        else:
            os.environ.pop("SSLKEYLOGFILE", None)  # or whoever reads that file could read all
            try:
                tls = ssl.create_default_context(cafile=config.ca_file or None)
            except OSError as error:
                raise cannot("use", config.ca_file, error) from None
            if config.ca_file:  # Python 3.13 is strict about the form of CAs, companies are not
                tls.verify_flags &= ~ssl.VERIFY_X509_STRICT
            self.opener.add_handler(urllib.request.ProxyHandler())
            self.opener.add_handler(urllib.request.HTTPSHandler(context=tls))
        self.offset = 0.0  # GitHub's clock minus ours, by the last answer's Date
        SIGNALS.watch()

    def now(self) -> float:
        return time.time() + self.offset

    def api(self, method: str, path: str, token: str = "", body: Object | None = None) -> Reply:
        data = json.dumps(body).encode() if body else None
        return self.request(method, self.root + path, token, data)

    def request(
        self, method: str, url: str, token: str, data: bytes | None, again: bool = True
    ) -> Reply:
        """An answer; asked for up to three times while the network or GitHub fails."""
        for pause in (PAUSE, 2 * PAUSE, 0):
            try:
                reply = self.send(method, url, token, data)
                break
            except Failure as failure:
                if failure.status != LATER or not again or not pause or SIGNALS.caught:
                    raise
            for _ in range(10):  # in steps: a signal ends the pause, and sleep is resumed after it
                time.sleep(0 if SIGNALS.caught else pause / 10)
        if 300 <= reply.status < 400:  # followed by nobody
            target = reply.headers.get("location", "")
            shape = re.escape(self.root) + r"/repos(?:/[\w.-]+/[\w.-]+|itories/[0-9]+)"
            found, name = re.match(shape, target), "O/R"
            if found:
                with contextlib.suppress(Failure):  # everybody can have the name of a public one
                    name = str(self.send("GET", found[0], "", None).data.get("full_name", name))
                raise Failure(MEND, f"GitHub calls this repository {name} now", f"--repo {name}")
            raise Failure(LATER, f"{host_of(url)} redirects to {host_of(target)}", PORTAL)
        if rate_limited(reply):
            reset = reply.headers.get("x-ratelimit-reset", "")
            spent = reply.headers.get("x-ratelimit-remaining") == "0" and reset.isdecimal()
            wait = f"{max(0, int(reset) - self.now()):.0f}" if spent else "60"  # by its clock
            after = reply.headers.get("retry-after", wait)
            when = f"in {after} s" if after.isdecimal() else f"at {after}"  # RFC 9110 has dates too
            hint = f"try again {when}, or later"
            raise Failure(LATER, f"GitHub's rate limit is reached: {reply.said()}", hint)
        return reply

    def send(self, method: str, url: str, token: str, content: bytes | None) -> Reply:
        import http.client
        import urllib.request
        from email.utils import parsedate_to_datetime

        request = urllib.request.Request(url, data=content, method=method)
        request.add_header("User-Agent", f"agent-vm-github-app-token/{__version__}")
        request.add_header("Accept", "application/json")
        request.add_header("X-GitHub-Api-Version", "2022-11-28")
        if content and url.startswith(f"{self.root}/"):  # else urllib says that it is a form
            request.add_header("Content-Type", "application/json")
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            with SIGNALS.limit(REPLY_SECONDS), self.opener.open(request, timeout=30) as response:
                body = response.read(MAX_REPLY)  # what is cut off is no JSON
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = getattr(error, "reason", error)
            said = str(cause) if isinstance(cause, OSError) else ""  # else of HTTPS_PROXY, maybe
            reason = redact(said) or type(cause).__name__
            status, hint = LATER, ""
            if "CERTIFICATE" in reason.upper():
                status, hint = MEND, "--ca-file with the company's CA, if the network opens TLS"
            elif "failed: 407" in reason:  # http.client's words for CONNECT
                status, hint = MEND, "HTTPS_PROXY must hold the proxy's user and password"
            raise Failure(status, f"cannot reach {host_of(url)}: {reason[:200]}", hint) from None
        headers = {name.lower(): value for name, value in response.headers.items()}
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            self.offset = parsedate_to_datetime(headers["date"]).timestamp() - time.time()
        if response.status >= 500:
            raise Failure(LATER, f"GitHub answered HTTP {response.status}", "see githubstatus.com")
        try:
            data = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            data = None
            if response.status < 300:
                raise Failure(LATER, f"{host_of(url)} sent no JSON", PORTAL) from None
        return Reply(response.status, headers, data if isinstance(data, dict) else {})


# --- the story: one mint ---


class App:
    """The App as GitHub knows it: requests signed with its key."""

    def __init__(self, config: Config, github: GitHub) -> None:
        self.app_id = config.app_id
        self.github = github
        kind, _, wanted = config.key.partition(":")
        self.key = AgentKey(wanted) if kind == "agent" else OpensslKey(read_key(config.key))
        self.sign()

    def sign(self) -> None:
        data = signing_input(self.app_id, self.github.now())
        self.jwt = (data + b"." + base64url(self.key.sign(data))).decode()
        self.signed_at = self.github.offset

    def call(self, method: str, path: str, body: Object | None = None) -> Reply:
        """An answer other than 401; when only the clock is wrong, signed once more by GitHub's."""
        reply = self.github.api(method, path, self.jwt, body)
        said = reply.said()
        if "Integration not found" in said:  # with a 404, as of a repository without the App
            raise Failure(MEND, f"App {self.app_id} is not known to GitHub: {said}", WHICH_APP)
        if reply.status != 401:
            return reply
        if not re.search("'iat'|'exp'", said):
            hint = f"is {fingerprint(self.key.spki)} among the keys of App {self.app_id}?"
            if "'iss'" in said:
                hint = "--app-id: this server wants the App's numeric id (or the client id)"
            raise Failure(MEND, f"GitHub does not know this App with this key: {said}", hint)
        if abs(self.github.offset - self.signed_at) < JWT_BEFORE / 2:
            raise Failure(MEND, f"GitHub does not accept the JWT's time: {said}", "set the clock")
        warn(f"this machine's clock is off by {-self.github.offset:.0f} s")
        self.sign()
        return self.call(method, path, body)


def token_for(config: Config, refused: str, renew: Callable[..., Token]) -> tuple[Token, bool]:
    """(a token for these settings, whether it was cached). `refused`: see `usable`."""
    cache = Cache()
    pinned = pinned_id(config, cache)
    path = cache.token_path(config)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(cache.lock(path))
        except Failure as failure:
            if not config.key:
                raise  # two that refresh a login at once lose it
            warn(f"{failure}: going on without its lock", failure.hint)
        token = cache.find_token(path)  # who held the lock may have got one
        if token and abs(token.clock_offset) > JWT_BEFORE:  # the clock may have been set since
            github = GitHub(config)
            github.api("GET", "/rate_limit")  # any answer has a Date
            token = token._replace(clock_offset=github.offset)
        if token and usable(token, config, pinned, refused, time.time()):
            return token, True
        return renew(config, cache, pinned, token), False


def pinned_id(config: Config, cache: Cache) -> int:
    """The number that the repository had when it was first used; 0 before that."""
    if config.repo_id or config.accept_new_repo:
        return config.repo_id
    path = cache.id_path(config)
    try:
        number = json.loads(read_file(path, READABLE, os.O_NOFOLLOW))["id"]
        if type(number) is int and 0 < number < 10**18:
            return number
    except FileNotFoundError:
        return 0
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # damaged is not as good as absent: the name may mean another repository by now
    raise Failure(MEND, f"{path} does not say what {config.repo} is", "--accept-new-repo")


def mint(config: Config, cache: Cache, pinned: int, earlier: Token | None) -> Token:
    """A new installation token for exactly the repository and the permissions asked for."""
    if not config.permissions:
        hint = "--permissions read, dev, or a list like contents:write,issues:read"
        raise Failure(USAGE, "say what the token may do", hint)
    github = GitHub(config)
    app = App(config, github)
    installation = installation_of(app, config)
    if earlier and earlier.withheld and not taken_back(github, earlier.token):
        warn("an earlier token could not be taken back: it lives on, for an hour at the most")

    # By number as soon as that is known: GitHub then gives no token for another of this name.
    name = config.repo.partition("/")[2]
    which: Object = {"repository_ids": [pinned]} if pinned else {"repositories": [name]}
    path = f"/app/installations/{int(installation['id'])}/access_tokens"
    with SIGNALS.held():
        reply = app.call("POST", path, {**which, "permissions": config.permissions})
        if reply.status == 422:
            raise not_granted(config, installation, reply.said())
        grant = checked(reply, "the token").data
        # From here on a token lives that only this process knows.
        with given_out_or(lambda: taken_back(github, grant.get("token"))):
            token = parse_installation_token(grant, config, pinned, github.now())
            slug = str(installation.get("app_slug", ""))
            token = token._replace(clock_offset=github.offset, login=slug)
            try:
                if not config.repo_id:
                    cache.write(cache.id_path(config), {"id": token.repo_id})
                cache.write(cache.token_path(config), token._asdict())
            except Failure as failure:  # that costs time, not the token
                warn(f"{failure}: not cached, so nobody has it but who gets it now")
                SIGNALS.stop()  # but neither stored nor printed, it is taken back
    return token


@contextlib.contextmanager
def given_out_or(take_back: Callable[[], bool | None]) -> Iterator[None]:
    """A token that is not given out does not live on: whatever goes wrong, `take_back` is called.

    It returns whether GitHub took the token back, or None when there is none; a warning says it.
    """
    try:
        yield
    except BaseException:
        with SIGNALS.held(TAKING_BACK):
            revoked: bool | None = False
            with contextlib.suppress(Failure):
                revoked = take_back()
            if revoked is not None:
                fate = "it is revoked" if revoked else "GitHub did not revoke it: it lives on"
                warn(f"a token that is not given out: {fate}")
            raise


def taken_back(github: GitHub, *tokens: Any) -> bool | None:
    """Whether GitHub took them back, None when there is none; a login's may come from anybody."""
    known = [token for token in tokens if token and isinstance(token, str)]
    if not known:
        return None
    if github.installation:
        # 401: it was not valid any more, because an earlier try came through, maybe.
        return github.api("DELETE", "/installation/token", known[0]).status in (204, 401)
    return github.api("POST", "/credentials/revoke", "", {"credentials": known}).status < 300


def installation_of(app: App, config: Config) -> Object:
    """The installation that covers the repository, or why there is none."""
    reply = app.call("GET", f"/repos/{config.repo}/installation")
    if reply.status == 404:
        hint = "the App's settings, Install App: there, or add the repository"
        raise Failure(MEND, f"the App is not installed for {config.repo}", hint)
    found = checked(reply, "the App's installation").data
    if found.get("suspended_at"):
        raise Failure(MEND, f"the App is suspended for {config.repo}", str(found.get("html_url")))
    return found


def not_granted(config: Config, installation: Object, said: str) -> Failure:
    """Why a 422: GitHub has one for a repository and one for permissions."""
    missing = missing_permissions(config.permissions, installation.get("permissions") or {})
    where = installation.get("html_url", "")
    if missing:
        hint = f"give it to the App, then accept it: {where}"
        return Failure(MEND, f"the App's installation does not have {', '.join(missing)}", hint)
    hint = f"is it selected? {where} (made anew? --accept-new-repo)"
    return Failure(MEND, f"GitHub refuses this repository: {said}", hint)


# --- you may stop here: what follows only calls what is above ---


# --- pure: what a login returns ---

SECRET_FIELDS = ("access_token", "refresh_token")
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


def parse_login_token(grant: Object, now: float) -> Token:
    """The token of a login or a refresh; Failure for one that cannot be limited.

    Which repository it reaches is not said there: it is withheld. `now` is GitHub's time.
    """
    try:
        token = check_token(grant["access_token"])
        refresh = check_token(grant["refresh_token"]) if grant.get("refresh_token") else ""
        life = float(grant.get("expires_in") or 0)
        if not 0 <= life < MAX_TIME:
            raise ValueError("not a time")
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Failure(FAILED, "GitHub's answer has no usable token") from None
    if not life or not refresh:  # an OAuth App's are so, too; no repository limits those
        hint = "the App's settings, Optional features, opt in to expiration"
        raise Failure(MEND, "this token is refused: it would never expire", hint)
    return Token(token, now + life, {}, refresh_token=refresh, withheld=True)


def check_reach(reaches: Mapping[int, str], number: int, config: Config) -> str:
    """The repository's name, when a login reaches it and no other.

    GitHub ignores a repository_id that the user cannot reach, and then the login reaches all.
    """
    if reaches.keys() != {number}:
        why = f"the login reaches {len(reaches)} repositories, not {config.repo} alone"
        hint = "can this user reach it, is the App installed there? (SSO: log in to that first)"
        raise Failure(MEND, why, hint)
    check_name(reaches[number], config)
    return reaches[number]


def device_step(data: Mapping[str, Any], interval: float) -> tuple[str, float]:
    """("wait", seconds between polls) or ("done", 0) of an answer to a poll (RFC 8628, 3.5)."""
    error = data.get("error")
    if error is None:
        return "done", 0
    if error == "authorization_pending":
        return "wait", interval
    if error == "slow_down":
        return "wait", min(interval + 5, 300.0)
    if error in ("access_denied", "expired_token", "token_expired"):
        raise Failure(LOGIN, f"nobody has logged in: {error.replace('_', ' ')}", "login again")
    raise device_flow_failure(data)


def device_flow_failure(data: Mapping[str, Any]) -> Failure:
    said = redact(f"{data.get('error', '')} {data.get('error_description', '')}".strip())[:200]
    hint = "--app-id must be the client id (Iv…), and Device Flow enabled: the App's settings"
    return Failure(MEND, f"GitHub refused the login: {said}", hint)


# --- the story: a login, and its refresh ---


def form(github: GitHub, path: str, fields: Mapping[str, str], again: bool = True) -> Object:
    """The answer of an OAuth endpoint. Its errors come with HTTP 200."""
    from urllib.parse import urlencode

    content = urlencode(fields).encode()
    return github.request("POST", f"{github.oauth}/login/{path}", "", content, again).data


def device_login(config: Config, cache: Cache) -> Token:
    """RFC 8628: show a code, wait until it is entered in a browser, and check what came of it."""
    github = GitHub(config)
    number = repository_id(config, cache, github)
    cache.check_folder()  # what would fail afterwards fails now
    data = form(github, "device/code", {"client_id": config.app_id})
    if "error" in data or "device_code" not in data:
        raise device_flow_failure(data)
    where = str(data.get("verification_uri", ""))
    if not where.lower().startswith(f"{github.oauth}/"):
        raise Failure(LATER, f"the code would have to be entered at {host_of(where)}, not GitHub")
    expires = float(data.get("expires_in", 900))
    interval = float(data.get("interval", 5))
    code = redact(str(data["user_code"]))
    print(f"Enter {code} at {redact(where)} within {expires / 60:.0f} min,", file=sys.stderr)
    print(f"as the user whose rights the token shall have: {config.repo} alone.", file=sys.stderr)
    deadline = time.monotonic() + expires
    asked = {
        "client_id": config.app_id, "repository_id": str(number), "grant_type": DEVICE_GRANT,
        "device_code": str(data["device_code"]),
    }  # fmt: skip
    while True:
        time.sleep(interval * 1.2)  # the clocks of VMs run fast, and GitHub counts
        if time.monotonic() > deadline:
            raise Failure(LOGIN, "the code expired before it was entered", "login again")
        with SIGNALS.held():
            try:
                answer = form(github, "oauth/access_token", asked)
            except Failure as failure:
                if failure.status != LATER:
                    raise
                continue
            step, interval = device_step(answer, interval)
            if step == "done":
                return stored_login(answer, config, cache, github, number)


def stored_login(grant: Object, config: Config, cache: Cache, github: GitHub, number: int) -> Token:
    """The token of a login, checked and stored; the login before is over."""
    with given_out_or(lambda: taken_back(github, *map(grant.get, SECRET_FIELDS))):
        token = parse_login_token(grant, github.now())
        name = check_reach(reach_of(token, github), number, config)
        user = checked(github.api("GET", "/user", token.token), "the user's name").data
        token = token._replace(
            clock_offset=github.offset, repo_id=number, repo=name, withheld=False,
            login=str(user.get("login", "")),
        )  # fmt: skip
        path = cache.token_path(config)
        with cache.lock(path):
            before = cache.find_token(path)
            if before:
                cache.withhold(path, before)  # it is over; and a full disk is noticed now
                revoked: bool | None = False
                with SIGNALS.held(TAKING_BACK), contextlib.suppress(Failure):
                    revoked = taken_back(github, before.token, before.refresh_token)
                if not revoked:
                    warn(f"GitHub did not revoke the login before, {masked(before.token)}")
            cache.write(path, token._asdict())
    return token


def reach_of(token: Token, github: GitHub) -> dict[int, str]:
    """All that a user's token reaches: the names of repositories by their numbers."""
    found: dict[int, str] = {}

    def listed(name: str, path: str) -> list[Object]:
        reply = github.api("GET", f"{path}?per_page=100", token.token)
        data = checked(reply, f"the {name}").data
        items: list[Object] = data.get(name, [])
        if data.get("total_count", len(items)) != len(items):
            found[0] = "what is on the next page"  # the number of none: it is too much anyway
        return items

    for installation in listed("installations", "/user/installations"):
        path = f"/user/installations/{int(installation['id'])}/repositories"
        for item in listed("repositories", path):
            found[item["id"]] = str(item["full_name"])
    return found


def repository_id(config: Config, cache: Cache, github: GitHub) -> int:
    """What a login is limited to: given, known, or public."""
    known = pinned_id(config, cache)
    if known:
        return known
    reply = github.api("GET", f"/repos/{config.repo}")
    if reply.status != 200:
        hint = f"--repo-id N; gh api repos/{config.repo} --jq .id shows it"
        raise Failure(USAGE, f"the id of {config.repo} is not known, and it is not public", hint)
    number = int(reply.data.get("id", 0))
    cache.write(cache.id_path(config), {"id": number})
    return number


def refreshed(config: Config, cache: Cache, pinned: int, token: Token | None) -> Token:
    """A new token for an old one; the refresh token works once, and ends the old access token."""
    if token is None:
        raise login_needed(config, "nobody has logged in for this repository")
    # A login is for the repository that it was made for, whatever its name means by now.
    if config.accept_new_repo or token.repo_id != (pinned or token.repo_id):
        why = f"the login is for repository {token.repo_id}; is that {config.repo} still?"
        raise Failure(MEND, why, login_needed(config, "").hint)
    github = GitHub(config)
    path = cache.token_path(config)
    asked = {
        "client_id": config.app_id, "grant_type": "refresh_token",
        "refresh_token": token.refresh_token,
    }  # fmt: skip
    with SIGNALS.held():
        cache.withhold(path, token)
        grant = form(github, "oauth/access_token", asked, again=False)
        if grant.get("error") == "bad_refresh_token":
            cache.remove(path)
            raise login_needed(config, "GitHub does not know the login any more")
        if "error" in grant:
            raise device_flow_failure(grant)
        with given_out_or(lambda: taken_back(github, *map(grant.get, SECRET_FIELDS))):
            new = parse_login_token(grant, github.now())
            new = new._replace(
                clock_offset=github.offset, repo_id=token.repo_id, repo=token.repo,
                login=token.login,
            )  # fmt: skip
            cache.write(path, new._asdict())  # known, and not given out
    reaches = reach_of(new, github)
    with given_out_or(lambda: taken_back(github, *map(grant.get, SECRET_FIELDS))):
        check_reach(reaches, new.repo_id, config)
    new = new._replace(withheld=False)
    cache.write(path, new._asdict())
    return new


def login_needed(config: Config, why: str) -> Failure:
    hint = f"github_app_token.py login --repo {config.repo} --app-id {config.app_id}"
    return Failure(LOGIN, why, hint + "; or give the App's --key")


# --- commands ---


def cmd_token(config: Config, options: argparse.Namespace) -> int:
    refused = os.environ.get("GITHUB_TOKEN_REFUSED", "").lower()
    token, cached = token_for(config, refused, mint if config.key else refreshed)
    if sys.stdout.isatty() and not options.show:
        print(f"{described(token)} (a pipe gets it as it is; --show prints it here)")
    elif options.format == "json":
        ends = token.expires_at - token.clock_offset  # its readers compare it with this clock
        print(json.dumps({
            "version": 1,
            "token": token.token,
            "type": "installation" if config.key else "user",
            "repositories": [{"id": token.repo_id, "full_name": token.repo}],
            "permissions": token.permissions,
            "expires_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ends)),
            "api_url": config.api_url,
            "login": token.login,
            "cached": cached,
        }))  # fmt: skip
    else:
        print(token.token)
    return 0


def described(token: Token) -> str:
    """One line for people, without the token."""
    rights = ",".join(f"{name}:{level}" for name, level in sorted(token.permissions.items()))
    left = token.left(time.time()) / 60
    until = f"expires in {left:.0f} min" if left > 0 else "expired"
    return f"{masked(token.token)}, {until}, {token.repo}: {rights or 'as the user ' + token.login}"


def cmd_login(config: Config, options: argparse.Namespace) -> int:
    token = device_login(config, Cache())
    print(f"github_app_token: logged in: {described(token)}", file=sys.stderr)
    return 0


def cmd_revoke(config: Config, options: argparse.Namespace) -> int:
    """Take back what is cached for these settings. An expired token is none: that is success."""
    cache = Cache()
    path = cache.token_path(config)
    with cache.lock(path), SIGNALS.held(TAKING_BACK):
        token = cache.read_token(path, WRITABLE)  # who can read it does not keep it alive
        if token is None:
            print("github_app_token: nothing is cached for these settings", file=sys.stderr)
            return 0
        with contextlib.suppress(Failure):  # a full disk does not keep it alive either
            cache.withhold(path, token)
        github = GitHub(config)
        # A GitHub that cannot be asked raises: then this is to be done again.
        revoked = taken_back(github, token.token, token.refresh_token)
        cache.remove(path)
        if not revoked:
            hint = f"{github.oauth}/settings/apps/authorizations does; an App's ends in an hour"
            raise Failure(FAILED, "it is forgotten here, but GitHub did not revoke it", hint)
    print(f"github_app_token: not valid any more: {masked(token.token)}", file=sys.stderr)
    return 0


def cmd_git_credential(config: Config, options: argparse.Namespace) -> int:
    """git's helper: answers for the repository alone, and for no other is there an answer."""
    text = sys.stdin.read(64 * 1024)
    asked = dict(line.split("=", 1) for line in text.split("\n") if "=" in line)
    repo = re.sub(r"(\.wiki)?(\.git)?(/info/lfs)?/?$", "", asked.get("path", ""))
    site = f"{asked.get('protocol')}://{asked.get('host', '').lower()}"
    if site != oauth_url_of(config.api_url) or repo.lower() != config.repo.lower():
        if site == oauth_url_of(config.api_url) and not asked.get("path"):
            warn(f"git must send the path: git config credential.{site}.useHttpPath true")
        return 0
    if options.action == "erase":
        cache = Cache()
        path = cache.token_path(config)
        with cache.lock(path):
            token = cache.find_token(path)
            if token and token.token == asked.get("password"):  # git was refused with it
                cache.withhold(path, token)
    elif options.action == "get":
        token, _ = token_for(config, "", mint if config.key else refreshed)
        ends = int(token.expires_at - token.clock_offset)
        print(f"username=x-access-token\npassword={token.token}\npassword_expiry_utc={ends}")
    return 0


# --- status ---


def cmd_status(config: Config, options: argparse.Namespace) -> int:
    """What is set, cached and wrong; the exit status is that of the first fault."""
    cache = Cache()
    status = 0
    for look in (look_at_settings, look_at_key if config.key else look_at_login):
        try:
            for finding in look(config, cache):
                print(f"ok   {redact(finding)}")
        except Failure as failure:
            print(f"FAIL {redact(str(failure))}")
            if failure.hint:
                print(f"     fix: {redact(failure.hint)}")
            status = status or failure.status
    return status


def look_at_settings(config: Config, cache: Cache) -> Iterator[str]:
    asked = ",".join(f"{name}:{level}" for name, level in config.permissions.items())
    where = f"{config.repo}, App {config.app_id} at {host_of(config.api_url)}"
    yield f"settings: {where}, {asked or 'no permissions'}"
    cache.check_folder()
    yield f"cache: {cache.folder}"


def look_at_key(config: Config, cache: Cache) -> Iterator[str]:
    github = GitHub(config)
    app = App(config, github)
    yield f"key: {fingerprint(app.key.spki)}"
    slug = checked(app.call("GET", "/app"), "the App").data.get("slug")
    yield f"App: {slug}, clock offset {round(github.offset)} s"
    token = cache.read_token(cache.token_path(config))
    if token:
        yield f"cached: {described(token._replace(clock_offset=github.offset))}"
    installation = installation_of(app, config)
    which = installation.get("repository_selection")
    yield f"installation: {installation.get('id')}, {which} repositories"
    if missing_permissions(config.permissions, installation.get("permissions") or {}):
        raise not_granted(config, installation, "")


def look_at_login(config: Config, cache: Cache) -> Iterator[str]:
    token = cache.read_token(cache.token_path(config))
    if token is None:
        raise login_needed(config, "no key is given, and nobody has logged in")
    github = GitHub(config)
    reply = github.api("GET", "/user", token.token)
    token = token._replace(clock_offset=github.offset)
    if reply.status == 401 and token.left(time.time()) > 0:
        raise login_needed(config, "GitHub does not accept the login's token any more")
    yield f"login: {described(token)}"


# --- settings ---

SETTINGS = ("repo", "app_id", "permissions", "key", "api_url", "ca_file", "repo_id")


def read_profile(name: str) -> dict[str, str]:
    import configparser

    path = os.path.join(xdg_home("XDG_CONFIG_HOME", "~/.config"), "github-app-token.ini")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(read_file(path, WRITABLE).decode("utf-8-sig"))
        section = dict(parser[name])
    except FileNotFoundError:
        raise Failure(USAGE, f"there is no {path}") from None
    except KeyError:
        raise Failure(USAGE, f"{path} has no section [{name}]") from None
    except UnicodeDecodeError:
        raise Failure(USAGE, f"{path} is not in UTF-8", "save it as UTF-8") from None
    except configparser.Error as error:
        # Not its text, which quotes the line: that may be of a key that was pasted there.
        option = getattr(error, "option", "")  # what is there twice
        shown = f" {option}" if option in SETTINGS else ""
        raise Failure(USAGE, f"{path} is not an INI file: {type(error).__name__}{shown}") from None
    for key in section.keys() - set(SETTINGS):
        shown = key if re.fullmatch("[a-z_-]{1,20}", key) else "a line"  # maybe of a pasted key
        raise Failure(USAGE, f"{path}: {shown} is not a setting", "known: " + ", ".join(SETTINGS))
    for key, value in section.items():  # in quotes, and with a note, as other INI files have it
        if not value.startswith("command:"):  # whose quotes and ; are the shell's
            section[key] = re.sub(r"""^(["']?)(.*?)\1(\s+[;#].*)?$""", r"\2", value)
    return section


PRESETS = {
    "read": {"contents": "read", "issues": "read", "pull_requests": "read"},
    "dev": {"contents": "write", "issues": "write", "pull_requests": "write"},
}


def parse_permissions(spec: str) -> dict[str, str]:
    """`dev,checks:read` → the permissions by name; {} when nothing is said."""
    wanted: dict[str, str] = {}
    for word in spec.replace(",", " ").split():
        name, _, level = word.partition(":")
        if word in PRESETS:
            wanted.update(PRESETS[word])
        elif re.fullmatch("[a-z_]+", name) and level in LEVELS:
            wanted[name] = level
        else:
            raise Failure(USAGE, f"{word!r} is not a permission", "for one: dev,checks:read")
    return wanted


def parse_api_url(text: str) -> str:
    """The base of the REST API: from github.com, SUB.ghe.com, a GHES host, or their API's URLs."""
    address = r"(?:(https?)://)?([A-Za-z0-9.-]+)(:[0-9]{1,5})?(/api/v3)?/?"
    match = re.fullmatch(address, text.strip())
    if not match:
        raise Failure(USAGE, f"not an address of GitHub: {redact(text)!r}", "github.com, for one")
    scheme, host = match[1] or "https", match[2].lower()
    if scheme == "http" and host not in ("127.0.0.1", "localhost"):
        raise Failure(USAGE, "GitHub must be reached by https: a token would go in clear")
    name = host[4:] if host.startswith("api.") else host
    if name == "github.com" or name.endswith(".ghe.com"):
        return f"https://api.{name}"
    return f"{scheme}://{host}{match[3] or ''}/api/v3"


def build_config(options: argparse.Namespace) -> Config:
    """Flags before the profile."""
    values = read_profile(options.profile) if options.profile else {}
    for name in SETTINGS:
        given = getattr(options, name)
        if given is not None:
            values[name] = given
    if values.get("key") == "":
        raise Failure(USAGE, "the key is empty", "leave it out to use the login")
    repo, app_id = values.get("repo", ""), values.get("app_id", "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,38}/(?!\.+$)[A-Za-z0-9._-]{1,100}", repo):
        raise Failure(USAGE, f"not a repository: {redact(repo)!r}", "--repo OWNER/NAME")
    if not re.fullmatch(r"[A-Za-z0-9._]{1,64}", app_id):
        raise Failure(USAGE, "which App?", WHICH_APP)
    permissions = parse_permissions(values.get("permissions", ""))
    if permissions and (options.verb == "login" or not values.get("key")):
        hint = "without it, a login may do what the App and the user both may"
        raise Failure(USAGE, "--permissions narrow a token only with --key", hint)
    repo_id = values.get("repo_id") or "0"
    if not re.fullmatch(r"0|[1-9][0-9]{0,17}", repo_id):
        raise Failure(USAGE, "--repo-id is a number")
    return Config(
        api_url=parse_api_url(values.get("api_url") or "github.com"),
        app_id=app_id,
        repo=repo,
        repo_id=int(repo_id),
        permissions=permissions,
        key="" if options.verb in ("login", "logout") else values.get("key", ""),
        ca_file=os.path.expanduser(values.get("ca_file", "")),
        accept_new_repo=options.accept_new_repo,
    )


# --- parser, main ---

EPILOG = """\
exit status:
  0  ok; 130 Ctrl-C, 143 SIGTERM
  1  GitHub's answer is not as documented, or a fault of this script
  2  usage: the command line or the profile
  10 something is to be set right first, or GitHub gave more than was asked for (it is revoked)
  20 later it may work: network, GitHub is down, rate limit
  30 a login is needed, or was denied
"""


class Parser(argparse.ArgumentParser):
    """argparse quotes what it does not know: a token that was pasted, maybe."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def build_parser() -> argparse.ArgumentParser:
    # Without a width argparse imports shutil: a tenth of what a cached token costs.
    shape: Any = {
        "formatter_class": lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=96),
        "epilog": EPILOG,
    }
    parser = Parser(prog="github_app_token.py", description=__doc__, **shape)
    version = f"%(prog)s {__version__} (Python {sys.version.split()[0]})"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, function, purpose in (
        ("token", cmd_token, "print a token"),
        ("login", cmd_login, "get a user's token by the device flow"),
        ("logout", cmd_revoke, "revoke and forget the user's token"),
        ("status", cmd_status, "what is set and cached, what is wrong, and the fix"),
        ("revoke", cmd_revoke, "revoke and forget the cached token"),
        ("git-credential", cmd_git_credential, "git's credential helper, for the repository alone"),
    ):
        verb = verbs.add_parser(name, help=purpose, description=purpose, **shape)
        verb.set_defaults(function=function)
        add_settings(verb)
        if name == "token":
            verb.add_argument("--format", choices=("plain", "json"), default="plain", help="of it")
            verb.add_argument("--show", action="store_true", help="print it on a terminal too")
        if name == "git-credential":
            verb.add_argument("action", choices=("get", "store", "erase"), help="as git says")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    profile = os.environ.get("GITHUB_APP_PROFILE", "")
    section = "a section of the INI file, with these names as keys (GITHUB_APP_PROFILE)"
    parser.add_argument("--profile", metavar="NAME", default=profile, help=section)
    for flag, value, purpose in (
        ("--repo", "O/R", "the repository"),
        ("--repo-id", "N", "its number, known and kept after the first token"),
        ("--app-id", "ID", "the App's id or client id; login needs the client id"),
        ("--permissions", "SPEC", "read, dev, or a list like contents:write"),
        ("--key", "SOURCE", "the private key: FILE, -, env:NAME, command:CMD, agent[:FINGERPRINT]"),
        ("--api-url", "URL", "github.com (default), SUB.ghe.com, or a GHES host"),
        ("--ca-file", "FILE", "CA certificates for GitHub"),
    ):
        parser.add_argument(flag, metavar=value, help=purpose)
    parser.add_argument("--accept-new-repo", action="store_true", help="REPO is another one now")


def main(argv: list[str] | None = None) -> int:
    if not (sys.stdin and sys.stdout and sys.stderr):
        return USAGE  # closed: what is opened next would take their places
    stdout: Any = sys.stdout
    stdout.reconfigure(errors="replace")  # a terminal may not know each letter
    SIGNALS.install()
    options = build_parser().parse_args(argv)
    os.umask(0o077)
    try:
        try:
            status: int = options.function(build_config(options), options)
        except BaseException:
            if options.function is cmd_git_credential:
                # Or git would ask the terminal, or a helper with a wider token.
                print("quit=1", flush=True)
            raise
        sys.stdout.flush()
        return status
    except Failure as failure:
        print(f"github_app_token: error: {redact(str(failure))}", file=sys.stderr)
        if failure.hint:
            print(f"github_app_token: hint: {redact(failure.hint)}", file=sys.stderr)
        return failure.status
    except OSError as error:
        print(f"github_app_token: error: {redact(str(error))}", file=sys.stderr)
        os._exit(FAILED)  # or Python would write to stdout once more, and complain
    except Exception as error:  # no text of it: that may hold a secret
        what = f"GitHub's answer is not as documented, or a fault of mine: {type(error).__name__}"
        print(f"github_app_token: error: {what}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
