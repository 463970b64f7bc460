#!/usr/bin/env python3
"""Run AI coding agents with full autonomy in disposable Linux VMs (on stock Lima).

Each run clones a stopped base instance, mounts the current directory, runs the agent in the clone
and deletes it. The exit status is the agent's.

    agent_vm.py setup                    build the base instance (once, some minutes)
    agent_vm.py run -- -p "fix the bug"  run Claude Code on the current directory
    agent_vm.py shell                    a shell in a fresh VM with the current directory

Starts:   limactl, ssh, git, qemu-img, python3, npm, sudo, tar, ps, sysctl
          (python3 for the sides of a run: lima/egress.py, and with --github the GitHub proxy;
          qemu-img, npm, and after asking sudo and tar, in setup only; ps and sysctl on macOS only)
Reads:    ~/.config/agent-vm (config.ini, credential, and setup.sh and runtime.sh, which run in the
          guest: once, and before each agent), ~/.claude-vm.setup.sh (as setup.sh), git's global
          configuration, .git of the project (its config with --github only), the files that its
          options name, /etc/localtime, its environment
Writes:   ~/.local/state/agent-vm, ~/.config/agent-vm, ~/.local/share/agent-vm (Lima, where setup
          gets it), Lima's home ~/.lima, TMPDIR, __pycache__ of the proxy beside this file; never
          the project
Reaches:  the guest, by ssh to a port of 127.0.0.1; QEMU's socket and ssh's, in Lima's home; Lima's
          release, when setup gets it
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import ClassVar
from typing import NamedTuple

__version__ = "0.1.0"

# What `child`, the only door to other programs, lets through.
STARTS = frozenset(
    ("limactl", "ssh", "git", "qemu-img", "python3", "npm", "sudo", "tar", "ps", "sysctl")
)

SSH_FAILED = 255  # ssh's own status; a guest's command may have it, too
# Not through Lima's control master, which a boot or a sleep of the host may end; and one that asks
# whether the guest is still there, and gives up after a minute.
ALIVE = "-oServerAliveInterval=15 -oServerAliveCountMax=4 -oEscapeChar=none".split()
OWN_CONNECTION = ("-oControlMaster=no", "-oControlPath=none", "-oConnectTimeout=60", *ALIVE)

GIB = 1 << 30
LOOK_SECONDS = 2  # between two looks at a VM, and at its sides, while its agent works

# Ports of the guest's own 127.0.0.1, where it reaches the sides of its run. lima/agent-vm.yaml
# keeps Lima from forwarding them, lima/guest/network.sh has two more.
EGRESS_PORT, DNS_PORT, BROKER_PORT, GITHUB_PORT = range(47101, 47105)
BROKER_SIDE, GITHUB_SIDE = f"http://127.0.0.1:{BROKER_PORT}", f"http://127.0.0.1:{GITHUB_PORT}"
API_KEY = "ANTHROPIC_API_KEY"

# A base instance has a name of its own each time it is built; a file says which one is meant.
is_base = re.compile(r"agent-vm-base(-[a-z0-9-]+)?\.[0-9a-f]{6}").fullmatch
is_clone = re.compile(r"agent-vm-[a-z0-9-]*[a-z0-9]-[0-9a-f]{6}").fullmatch

# $LIMA_HOME/NAME/ssh.sock.<16 random> must fit in sockaddr_un.sun_path: 104 bytes on macOS.
SOCKET_PATH_MAX = 104
SOCKET_NAME = "/ssh.sock.1234567890123456"

# The mount types whose limits the host enforces. Under reverse-sshfs the host runs an sftp-server
# that serves every file of the user, and the guest's root holds the other end of it.
CONFINED_MOUNT_TYPE = {"qemu": "9p", "vz": "virtiofs", "krunkit": "virtiofs"}
CLOSABLE = ("qemu x86_64", "qemu aarch64")  # their network: Lima asks QEMU_SYSTEM_<ARCH>

# Of these the guest has its own, and of some the host's would hold its processes.
SYSTEM_DIRS = (
    "/ /bin /boot /dev /etc /home /lib /mnt /opt /proc /root /run /sbin /sys /tmp /usr /var".split()
)

# What reading JSON of another form raises; RecursionError when it is nested very deep.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)

PROXY = re.compile("(https?|ftp|all|no)_proxy", re.IGNORECASE).fullmatch  # of variables
SAVED = ("guest/network.sh", "guest/wake.py", "settle.sh")  # what is run in a VM that is saved
SLOTS = 8  # for folders of the host in a saved VM; with more, it is booted
RESUME_SECONDS = 5  # until a resumed VM answers; ten times as long where it is emulated

# In a base instance's folder of Lima's: the package registries that its programs are set to.
REGISTRIES = "agent-vm-registries"


class AgentVMError(Exception):
    """What failed and what to do next; `main` prints both and exits with the verb's status."""

    def __init__(self, message: str, hint: str = "", details: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.details = details


class ConnectionBroke(AgentVMError):
    """The agent's ssh ended before the agent: its VM is kept."""


class NotResumed(AgentVMError):
    """Why a VM was not resumed: it is to be booted."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP; a BaseException so that no `except Exception` swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum


# --- nouns ---


class Instance(NamedTuple):
    """One line of `limactl list --format json`, as far as it is used here."""

    name: str
    status: str
    dir: Path
    hostname: str = ""  # its name in ssh.config: lima-NAME with its dots made dashes
    vm_type: str = ""
    mount_type: str = ""
    mounts: tuple[tuple[str, bool], ...] = ()  # (location, writable), Lima's defaults merged in
    arch: str = ""
    sizes: tuple[str, ...] = ()  # as limactl's options
    extras: tuple[str, ...] = ()  # what its configuration gives the guest, or the host, besides
    home: str = ""


class Place(NamedTuple):
    """A path of the host, compared twice: as it is spelt, and by the file system's numbers."""

    path: str
    identity: tuple[int, int] | None = None  # device and inode; None when it does not exist
    chain: frozenset[tuple[int, int]] = frozenset()  # of itself and of every folder above it


class Mount(NamedTuple):
    """A host folder in the guest; `target` is its absolute path there."""

    source: Place
    target: str
    writable: bool = False
    as_typed: Sequence[Place] = ()  # the links on the way to the source, and where they lead


class Lease(NamedTuple):
    """Who owns an instance. A lease whose process is gone makes it an orphan."""

    name: str
    pid: int
    start: str  # the process's start time: a pid alone may have been given to another process
    boot_id: str
    project: str
    created: float
    keep: bool = False
    folders: Sequence[str] = ()  # that its agent can write
    lima_home: str = ""


class Credential(NamedTuple):
    """A credential for the model; its value must never be printed."""

    name: str
    value: str
    origin: str

    def __repr__(self) -> str:
        return f"<{self.name} from {self.origin}>"


class Network(NamedTuple):
    """What a guest reaches, beside the sides of its run."""

    mode: str = "open"  # internet, allow, off; open: as Lima has it, with the host's loopback
    allow: Sequence[str] = ()  # HOST, *.HOST, HOST:PORT, or a preset of lima/egress.py
    host_ports: Sequence[int] = ()  # of the host's loopback


class GitHub(NamedTuple):
    """One repository on GitHub, and the proxy that gives it to a guest."""

    repo: str  # OWNER/REPO
    remote: str = ""  # the project's remote as it is written, where it means this repository
    environ: Mapping[str, str] = {}  # the whole environment of the proxy; it may hold the token
    options: Sequence[str] = ()
    # Once the proxy runs:
    secret: str = ""
    probe_secret: str = ""
    readonly: bool = False

    def __repr__(self) -> str:
        return f"<GitHub {self.repo}>"


class Side(NamedTuple):
    """A program of ours on the host, which a guest reaches at a port of its own 127.0.0.1."""

    what: str
    process: subprocess.Popen[bytes]
    said: Sequence[str]  # its first lines
    port: int = 0  # in the guest
    end: str = ""  # where it listens on the host: 127.0.0.1:PORT, or a socket's path
    errors: Any = None  # the file that it writes its words to


class Plan(NamedTuple):
    """All that was decided about a run before anything is started."""

    project: str
    argv: Sequence[str]
    mounts: Sequence[Mount]
    sizes: Sequence[str] = ()  # --cpus=N and --memory=N, where they are not the base instance's
    forward: bool = True
    keep: bool = False
    agent: bool = True  # argv is Claude Code, not a command of the user's
    variables: Mapping[str, str] = {}
    credential: Credential | None = None
    broker: bool = False  # the credential stays on the host
    upstream: str = ""  # the model's API that the broker talks to; "" is the vendor's
    network: Network = Network()
    boot: str = ""  # why it is not resumed
    hooks: Sequence[Path] = ()
    git_settings: Mapping[str, str] = {}  # of the guest's user
    zone: str = ""  # like Europe/Berlin
    github: GitHub | None = None
    briefing: str = ""  # what the agent should know before it tries


# --- pure: what an agent may get ---


def inside(place: Place, folder: Place) -> bool:
    """Whether `place` is `folder` or lies below it, by its path or under another name of it."""
    by_path = place.path == folder.path or place.path.startswith(folder.path.rstrip("/") + "/")
    return by_path or folder.identity in place.chain


def overlaps(place: Place, other: Place) -> bool:
    return inside(place, other) or inside(other, place)


def mount_refusal(place: Place, home: Place, private: Mapping[str, Place]) -> str:
    """Why a folder should not be given to an agent, or ""."""
    if inside(home, place):
        return f"it holds the home directory {home.path}"
    for name, folder in private.items():
        if overlaps(place, folder):
            return f"it overlaps {name} ({folder.path})"
    return ""


def mounts_problem(mounts: Sequence[Mount]) -> str:
    """What is wrong with mounts taken together, or ""."""
    targets = [mount.target for mount in mounts]
    writable = [mount.source for mount in mounts if mount.writable]
    for mount in mounts:
        if targets.count(mount.target) > 1:
            return f"{mount.target} would be mounted twice"
        for folder in writable:
            if not mount.writable and overlaps(mount.source, folder):
                return f"{mount.source.path} would be read-only, but {folder.path} is writable"
    return ""


def unusable_path(path: str) -> str:
    """Why a path cannot be mounted at the same place in a guest, or ""."""
    if path in SYSTEM_DIRS or path.startswith(("/proc/", "/sys/", "/dev/")):
        return "the guest needs its own"
    if re.search("[\x00-\x1f\x7f\udc80-\udcff]", path):  # the last are what is not UTF-8
        return "its name has a control character, or is not UTF-8"
    return ""


def lima_mounts(mounts: Sequence[Mount]) -> list[dict[str, Any]]:
    """The `mounts:` of a clone's YAML, for VMs that are not QEMU's; lima/guest/wake.py binds."""
    return [
        {"location": mount.source.path, "mountPoint": f"/mnt/agent-vm/{slot}",
         "writable": mount.writable}
        for slot, mount in enumerate(mounts)
    ]  # fmt: skip


def yq_value(value: object) -> str:
    """A yq expression for any value. Base64 keeps quotes, `$` and yq's own escapes out of it."""
    encoded = base64.b64encode(json.dumps(value).encode()).decode()
    return f'("{encoded}" | @base64d | from_json)'


def clone_expression(mounts: Sequence[Mapping[str, Any]], mount_type: str, forward: bool) -> str:
    """What `limactl clone --set` changes in the clone's YAML."""
    parts = [
        ".mountTypesUnsupported = []",  # the image lists 9p; setup saw to a kernel that has it
        f'.mountType = "{mount_type}"',
        f".mounts = {yq_value(list(mounts))}",
    ]
    if not forward:
        # Lima reads 0.0.0.0 as "only what listens on 0.0.0.0" unless told otherwise.
        any_ip = {"guestIP": "0.0.0.0", "guestIPMustBeZero": False}
        rule = {**any_ip, "proto": "any", "ignore": True}
        parts.append(f".portForwards = {yq_value([rule])}")
    return " | ".join(parts)


def isolation_faults(instance: Instance, expected: Sequence[Mapping[str, Any]]) -> list[str]:
    """What Lima would do beyond the plan: LIMA_HOME/_config can add mounts to every instance."""
    planned = {(mount["location"], mount["writable"]) for mount in expected}
    faults = [
        f"mounts {location} {'read-write' if writable else 'read-only'}"
        for location, writable in instance.mounts
        if (location, writable) not in planned
    ]
    faults += [f"does not mount {mount}" for mount, _ in sorted(planned - set(instance.mounts))]
    if instance.mount_type != CONFINED_MOUNT_TYPE.get(instance.vm_type):
        faults.append(f"uses the mount type {instance.mount_type or 'unknown'}")
    return [*faults, *instance.extras]


def lease_is_live(lease: Lease, this_boot: str, start: str) -> bool:
    """Whether the process that took the lease still runs: same boot, same pid, same start time.

    `this_boot`: its id; `start`: when the process that has the lease's pid now was started.
    """
    if not this_boot:
        return True  # unknown: nothing may be deleted
    return lease.boot_id == this_boot and bool(lease.start) and start == lease.start


# --- pure: names, and what Lima and git say ---


def clone_name(directory: str, tag: str, lima_home: str, least: int = 1) -> str:
    """`agent-vm-SLUG-TAG`, the slug cut so that Lima's ssh socket path fits; `least` has to."""
    slug = re.sub(r"[^a-z0-9]+", "-", directory.lower()).strip("-") or "project"
    fixed = len(os.fsencode(lima_home)) + len("/agent-vm--") + len(tag) + len(SOCKET_NAME)
    room = SOCKET_PATH_MAX - 1 - fixed
    if room < least:
        problem = f"the path of Lima's home is too long for its sockets: {lima_home}"
        raise AgentVMError(problem, hint="set LIMA_HOME to a shorter path")
    return f"agent-vm-{slug[: min(room, 30)].strip('-') or 'p'}-{tag}"


def session_key(project: str) -> str:
    """The file name for what is kept of a project: readable, and distinct for distinct paths."""
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(project).lower()).strip("-")
    return f"{slug[:30] or 'project'}-{hashlib.sha256(os.fsencode(project)).hexdigest()[:12]}"


def parse_instances(stdout: str) -> list[Instance]:
    """Read `limactl list --format json`: one object a line (limactl 2.x)."""
    try:
        return [instance_from(json.loads(line)) for line in stdout.splitlines() if line.strip()]
    except MALFORMED as error:
        problem = f"limactl list printed something that is not its JSON: {error}"
        raise AgentVMError(problem, hint="check with: limactl list --format json") from error


def instance_from(fields: Mapping[str, Any]) -> Instance:
    config = fields.get("config") or {}
    forwards, ssh = config.get("portForwards") or (), config.get("ssh") or {}
    sound = (config.get("audio") or {}).get("device") not in (None, "", "none")
    ways = [rule.get("hostSocket") or rule.get("reverse") for rule in forwards]
    ways += [rule.get("hostIP") not in (None, "", "127.0.0.1") for rule in forwards]
    extras = {
        "forwards the ssh agent, or X11": ssh.get("forwardAgent") or ssh.get("forwardX11"),
        "copies files to the host": config.get("copyToHost"),
        "has a fixed port for ssh, which may be another VM's": ssh.get("localPort"),
        "forwards sockets, or ports beyond 127.0.0.1": any(ways),
        "has another disk, or the sound, of the host": config.get("additionalDisks") or sound,
    }
    return Instance(
        name=str(fields["name"]),
        status=str(fields["status"]),
        dir=Path(fields["dir"]),
        hostname=str(fields.get("hostname") or f"lima-{fields['name']}"),
        vm_type=str(fields.get("vmType") or ""),
        mount_type=str(config.get("mountType") or ""),
        mounts=tuple((m["location"], bool(m.get("writable"))) for m in config.get("mounts") or ()),
        arch=str(fields.get("arch") or ""),
        sizes=(f"--cpus={fields.get('cpus')}", f"--memory={(fields.get('memory') or 0) >> 30}"),
        extras=tuple(words for words, is_so in extras.items() if is_so),
        home=str((config.get("user") or {}).get("home") or ""),
    )


def limactl_reason(stderr: str) -> str:
    """limactl's own last words: its last error in either form of its logs, else its last line."""
    quoted = r'"((?:[^"\\]|\\.)*)"'
    wrong = rf'level(?:=|":")%s"?[ ,]"?msg"?[=:]{quoted}(?: error={quoted})?'
    fatal, errors = (re.findall(wrong % level, stderr) for level in ("fatal", "error"))
    said = [": ".join(filter(None, words)) for words in (fatal or errors)[-1:]]
    plain = [line for line in stderr.split("\n") if line.strip() and "level=info" not in line]
    return "".join(said or plain[-1:]).replace('\\"', '"').replace("\\n", "; ")


def lease_from(written: str) -> Lease:
    fields = {key: value for key, value in json.loads(written).items() if key in Lease._fields}
    lease = Lease(**{**fields, "created": float(fields["created"])})
    if not is_clone(lease.name) and not is_base(lease.name):
        raise ValueError(f"not a name of ours: {lease.name!r}")
    return lease


def printable(words: str) -> str:
    """Words of others, fit for a terminal: nothing that is invisible or that moves the rest.

    A run of spaces could make a guest's words begin a line of their own on a narrow terminal.
    """
    import unicodedata

    def plain(char: str) -> bool:
        turned = unicodedata.bidirectional(char) in ("NSM", "R", "AL", "AN")
        return char.isprintable() and not turned and char not in "\u2800\u3164\u115f\u1160\uffa0"

    return re.sub(" {2,}", " ", "".join(char if plain(char) else "?" for char in words))


# --- pure: what the guest is told ---


def claude_config(plan: Plan) -> dict[str, Any]:
    """What ~/.claude.json must say so that no wizard or dialog appears (Claude Code 2.1).

    Trust in "/" covers what else is mounted, but not a directory with an entry of its own.
    """
    credential = plan.credential
    trusted = {"hasTrustDialogAccepted": True}
    config: dict[str, Any] = {
        "hasCompletedOnboarding": True,
        "projects": {
            "/": trusted,
            # In a linked worktree the main checkout counts, where the repository lies.
            **{os.path.dirname(mount.target): trusted for mount in plan.mounts},
            plan.project: {**trusted, "hasClaudeMdExternalIncludesApproved": True},
        },
    }
    if credential and credential.name == API_KEY:
        config["customApiKeyResponses"] = {"approved": [credential.value[-20:]], "rejected": []}
    if plan.github:
        headers = {"Authorization": f"Bearer {plan.github.secret}"}
        server = {"type": "http", "url": f"{GITHUB_SIDE}/mcp", "headers": headers}
        config["mcpServers"] = {"github": server}
    return config


def guest_git_config(settings: Mapping[str, str], github: GitHub | None) -> str:
    """The user's settings, and the way to the one repository by its usual addresses. git compares
    prefixes, so OWNER/REPO-docs is led there, too; the proxy refuses it with a reason."""
    lines = []
    for key, value in settings.items():
        section, _, name = key.partition(".")
        lines += [f"[{section}]", f"\t{name} = {json.dumps(value, ensure_ascii=False)}"]
    if github:
        forms = ("https://github.com/", "git@github.com:", "ssh://git@github.com/")
        usual = [f"{form}{github.repo}{end}" for form in forms for end in ("", ".git")]
        addresses = dict.fromkeys([*usual, github.remote] if github.remote else usual)
        lines += [
            f'[http "{GITHUB_SIDE}/"]',
            f'\textraHeader = "Authorization: Bearer {github.secret}"',
            "\tproxy =",
            f'[url "{GITHUB_SIDE}/git/{github.repo}.git"]',
            *(f"\tinsteadOf = {json.dumps(url, ensure_ascii=False)}" for url in addresses),
        ]
    return "\n".join(lines) + "\n"


def refusal_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the way out refused, in words: the name, how often, and what would allow it."""
    lines = []
    for row in sorted(rows, key=lambda row: -row["count"]):
        place = f"{row['host']}:{row['port']}" if row["port"] else row["host"]
        times = f" ({row['count']} times)" if row["count"] > 1 else ""
        flag = f"; {row['flag']}" if row["flag"] else f": {row['reason']}"
        lines.append(printable(f"refused: {place}{times}{flag}")[:300])
    return [*lines[:10], f"and {len(lines) - 10} more: agent-vm log"] if lines[10:] else lines


def receipt_lines(receipt: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the proxy says was done on GitHub, in words: the counts, then a line each."""
    counts, *rest = receipt or ({"reads": "?", "writes": "?", "refused": "?"},)
    lines = ["{reads} reads, {writes} writes, {refused} refused".format(**counts)]
    for entry in rest:
        if "more" in entry:
            lines.append(f"and {entry['more']} more: agent-vm log")
            continue
        times = f"({entry['count']} times)" if entry["count"] > 1 else ""
        words = (f"{entry['verdict']}:", entry["what"], entry["url"], entry["reason"], times)
        lines.append(printable(" ".join(str(word) for word in words if word))[:300])
    return [f"GitHub: {line}" for line in lines]


def asked_of_guest(plan: Plan, texts: Mapping[str, str]) -> dict[str, Any]:
    """What lima/guest/wake.py is to make of a VM; `texts` are the scripts beside it."""
    secret = {plan.credential.name: plan.credential.value} if plan.credential else {}
    github = plan.github or GitHub("")
    sides = {"repo": github.repo, "is_readonly": "y" if github.readonly else ""}
    sides["url"] = GITHUB_SIDE if plan.github else ""
    sides["broker"] = BROKER_SIDE if plan.broker else ""
    return {
        "mode": plan.network.mode,
        "zone": plan.zone,
        "claude": claude_config(plan),
        "briefing": plan.briefing,
        "variables": {"env": plan.variables, "credential": secret, "sides": sides},
        "files": {  # of ~/.agent-vm, as those are
            **texts,
            "gitconfig": guest_git_config(plan.git_settings, plan.github),
            "probe-header": f"Authorization: Bearer {github.probe_secret}\n",
        },
    }


# --- doors: signals, programs ---

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """The first SIGINT, SIGTERM or SIGHUP raises Interrupted, at once or when nothing is held.

    Handlers of ours, never SIG_IGN, which limactl and ssh would inherit.
    """

    holds = waiting = 0
    closing = False  # cleaning up has begun, and no signal may stop it

    def catch(self) -> None:
        for signum in STOP_SIGNALS:
            # A caller that ignores a signal (nohup) keeps it ignored.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self.arrived)

    def arrived(self, signum: int, _frame: object) -> None:
        self.waiting = signum
        if not self.holds and not self.closing:
            self.closing = True
            raise Interrupted(signum)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A signal waits for the end of the block."""
        self.holds += 1
        try:
            yield
        finally:
            self.holds -= 1
            if self.waiting:
                self.arrived(self.waiting, None)


signals = Signals()


class Log:
    """Messages to stderr; progress only with -v, in `setup`, or when stderr is a terminal."""

    verbose = quiet = False
    started = time.monotonic()
    phases: ClassVar[dict[str, float]] = {}  # of a run, in seconds since the start

    def mark(self, phase: str) -> None:
        self.phases[phase] = round(time.monotonic() - self.started, 3)

    def info(self, message: str) -> None:
        with contextlib.suppress(OSError):  # a closed terminal must not stop the clean-up
            print(f"agent-vm: {printable(message)}", file=sys.stderr, flush=True)

    def progress(self, message: str) -> None:
        if self.verbose or (not self.quiet and sys.stderr.isatty()):
            self.step(message)

    def detail(self, message: str) -> None:
        if self.verbose:
            self.info(message)

    def step(self, message: str) -> None:
        if not self.quiet:
            self.info(f"[{time.monotonic() - self.started:.0f} s] {message}")


log = Log()


@contextlib.contextmanager
def child(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The one door to other programs; `options` are Popen's.

    What is started does not outlive the block, whatever ends it. In a session of its own, Ctrl-C at
    the terminal is ours to handle, and its children are asked to end with it.
    """
    name = "python3" if argv[0] == sys.executable else os.path.basename(argv[0])
    if name not in STARTS:
        raise ValueError(f"{name} is not in the list of what this script starts")
    process: subprocess.Popen[bytes] | None = None
    try:
        with signals.held():  # no process that nobody would know of
            process = subprocess.Popen(argv, **options)
        yield process
    finally:
        if process and process.poll() is None:
            with signals.held():
                end_process(process, group=bool(options.get("start_new_session")))


def end_process(process: subprocess.Popen[bytes], group: bool) -> None:
    """Ask a child of ours to end, insist after five seconds."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(-process.pid if group else process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return


MAX_OUTPUT = 4 << 20  # bytes of what a program, or a guest, prints
PIPES: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0, "cwd": "/",
              "start_new_session": True}  # fmt: skip


def unnamed_file() -> Any:
    from tempfile import TemporaryFile

    return TemporaryFile(dir=os.environ.get("TMPDIR") or "/tmp")  # else a signal could leave a file


def end_of(file: Any) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_OUTPUT))
    return str(file.read().decode(errors="replace"))


class Finished(NamedTuple):
    """How a program ended: its status, None when it did not end in time; what it printed last."""

    status: int | None
    out: str
    err: str = ""


def captured(
    argv: Sequence[str], contents: str = "", timeout: float = 20,
    meanwhile: Callable[[], None] | None = None, **options: Any,
) -> Finished:  # fmt: skip
    """Run a program without a terminal; `meanwhile` is called every two seconds.

    With files, not pipes: a host agent that limactl leaves behind would hold a pipe open.
    """
    deadline = time.monotonic() + timeout
    with unnamed_file() as given, unnamed_file() as out, unnamed_file() as err:
        given.write(contents.encode("utf-8", "surrogateescape"))
        given.seek(0)
        files = {"stdin": given, "stdout": out, "stderr": err, **options}
        try:
            with child(argv, **files, cwd="/", start_new_session=True) as process:
                while process.poll() is None and time.monotonic() < deadline:
                    left = max(0.01, deadline - time.monotonic())
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=min(2, left))
                    if meanwhile:
                        meanwhile()
                status = process.poll()
        except OSError as error:
            return Finished(127, "", f"{argv[0]} cannot be started: {error.strerror}")
        return Finished(status, end_of(out), end_of(err))


def first_lines(process: subprocess.Popen[bytes], count: int, timeout: float) -> list[str]:
    """What a running program prints first, "" where it says nothing in time, or ends."""
    assert process.stdout
    said = []
    for _ in range(count):
        ready = select.select([process.stdout], [], [], timeout)[0]
        said.append(process.stdout.readline().decode().strip() if ready else "")
    return said


def first_line_of(*argv: str, **options: Any) -> str:
    """What a program of the host prints first, or "" when it fails or is missing."""
    finished = captured(argv, **options)
    return finished.out.strip().split("\n")[0] if finished.status == 0 else ""


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # macOS
        return first_line_of("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")


def kvm_is_missing() -> bool:
    return sys.platform == "linux" and not os.access("/dev/kvm", os.R_OK | os.W_OK)


def process_start(pid: int) -> str:
    """When a process started, as the kernel says it; "" when there is none."""
    try:
        # After the command name, which may hold anything: state is field 3, starttime 22 (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        if os.path.exists("/proc/self/stat"):
            return ""
    # macOS; ps would write the time in the caller's zone and language.
    zone = {"TZ": "UTC0", "LC_ALL": "C"}
    return first_line_of("/bin/ps", "-o", "lstart=", "-p", str(pid), env=zone)


# --- doors: files ---


class Folders(NamedTuple):
    """Where agent-vm keeps things, by the XDG rules."""

    state: Path
    config: Path
    data: Path
    lima_home: Path


def place_of(path: str | Path) -> Place:
    """A path that may not exist, as it is spelt; `stat` follows links for the rest."""
    spelt = Path(os.path.abspath(path))
    infos = [folder.stat() for folder in (spelt, *spelt.parents) if os.path.exists(folder)]
    identities = [(info.st_dev, info.st_ino) for info in infos]
    own = identities[0] if os.path.exists(spelt) else None
    return Place(str(spelt), own, frozenset(identities))


def real_place(path: str | Path) -> Place:
    return place_of(os.path.realpath(os.path.expanduser(path)))


def spellings(path: str) -> list[Place]:
    """Each link that is passed on the way to where a path leads, and its end."""
    whole = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
    done, left = "/", whole.split("/")
    places: list[Place] = []
    while left and len(places) < 40:  # the kernel gives up then, too
        part = left.pop(0)
        if part == "..":
            done = os.path.dirname(done)
        elif part not in ("", "."):
            done = os.path.join(done, part)
        if os.path.islink(done):
            places.append(place_of(done))
            left = os.readlink(done).split("/") + left
            done = "/" if not left[0] else os.path.dirname(done)
    return [*places, place_of(done)]


def agents_folders(state: Path, place: Place, mounted: Sequence[Place] = ()) -> list[str]:
    """In which folders that an agent can or could write a path lies.

    That is what is mounted for one, the transcripts, and the projects of earlier runs.
    """
    sessions = state / "sessions"
    now = [folder.path for folder in (*mounted, real_place(sessions)) if inside(place, folder)]
    above = (place.path, *map(str, Path(place.path).parents))
    return now + [path for path in above if (sessions / session_key(path)).is_dir()]


def write_file(path: Path, contents: str, mode: int = 0o600) -> None:
    """All of it or nothing, on the disk when this returns, for the user alone."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with signals.held(), open(os.open(part, flags, mode), "w") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())  # an empty lease after a power cut would own nothing
        part.replace(path)


def remove_path(path: Path) -> None:
    """A file, or a folder that an agent filled: nested deeper than a path may be long, or closed.

    Its folders are moved up and emptied one by one; nobody else may write there any more.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    folders = [str(path)]
    for folder in folders:  # it grows
        os.chmod(folder, 0o700)
        for entry in list(os.scandir(folder)):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry)
            else:
                os.chmod(entry, 0o700)
                folders.append(f"{path}/{os.urandom(8).hex()}")
                os.rename(entry, folders[-1])
    for folder in reversed(folders):
        os.rmdir(folder)


def make_private_folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """flock(2) on `path`; yields whether it was obtained. The kernel frees it with the process."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def read_line(path: str) -> str:
    """First line of a small text file, "" when there is none; the agent may have written it."""
    if not os.path.isfile(path):  # a named pipe would block
        return ""
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        return file.readline(4096).strip().replace("\0", "")
    return ""


def last_bytes(path: Path, size: int) -> bytes:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read(size)
    return b""


def tail(path: Path, lines: int = 10) -> str:
    """The last lines of a log of Lima's, fit for a terminal: a guest writes its serial console."""
    end = last_bytes(path, 50_000).decode(errors="replace")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", end)  # colours
    shown = [line[:300] for line in plain.split("\n") if line and '"level":"debug"' not in line]
    return "\n".join(shown[-lines:])


def get_url(url: str) -> bytes:
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return bytes(response.read())
    except (OSError, ValueError) as error:
        problem = f"{url}: {getattr(error, 'reason', error)}"
        raise AgentVMError(problem, hint="--lima-url takes a mirror") from error


def unpack(archive: bytes, target: Path) -> None:
    """Replace the folder `target` by what a compressed tar archive holds."""
    import tempfile

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        Path(folder, "archive").write_bytes(archive)
        Path(folder, "new").mkdir()
        argv = ["tar", "-xzf", f"{folder}/archive", "-C", f"{folder}/new"]
        if captured(argv, timeout=300).status != 0:
            raise AgentVMError("tar cannot unpack the archive")
        shutil.rmtree(target, ignore_errors=True)
        Path(folder, "new").replace(target)


# --- doors: Lima and the guest ---


def raise_fault(start: Side) -> None:
    """Raise the failure of `limactl start`, once there is one."""
    if start.process.poll():
        raise limactl_error("start", Finished(start.process.returncode, "", end_of(start.errors)))


def limactl_error(verb: str, finished: Finished, limit: float = 0) -> AgentVMError:
    """limactl's failure, in its own last words."""
    late = f"no answer within {limit:.0f} s" if finished.status is None else ""
    reason = late or limactl_reason(finished.err) or f"status {finished.status}"
    last = [line for line in finished.err.split("\n") if line.strip()][-8:]
    offline = verb == "create" and re.search("download|dial|lookup|https?:", reason)
    hint = "offline: setup --image FILE, or --template FILE" if offline else ""
    return AgentVMError(f"limactl {verb} failed: {reason}", hint, "\n".join(last))


class Lima:
    """limactl, a method a verb. Its own terminal messages go to a log that errors quote."""

    def __init__(self, binary: str, timeout: int) -> None:
        self.binary = binary
        self.timeout = timeout

    def _run(
        self, *args: str, timeout: float = 0, meanwhile: Callable[[], None] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> str:  # fmt: skip
        """Run limactl; its stdout."""
        log.detail("+ " + shlex.join(("limactl", *args)))
        shown = {"stderr": None} if log.verbose else {}
        limit = timeout or self.timeout
        finished = captured([self.binary, *args], "", limit, meanwhile, env=environ, **shown)
        if finished.status != 0:
            raise limactl_error(args[0], finished, limit)
        return finished.out

    def list(self) -> list[Instance]:
        return parse_instances(self._run("list", "--format", "json", timeout=min(60, self.timeout)))

    def find(self, name: str) -> Instance | None:
        return next((instance for instance in self.list() if instance.name == name), None)

    def create(self, name: str, template: str, *options: str) -> None:
        self._run("create", "--tty=false", f"--name={name}", *options, template)

    def clone(self, source: str, name: str, expression: str, *options: str) -> None:
        self._run("clone", "--tty=false", source, name, *options, "--set", expression)

    def start(self, name: str, timeout: int = 0, **more: Any) -> None:
        limit = timeout or self.timeout
        # Lima's own limit a little shorter than ours, so that its message is the one shown.
        lima_limit = f"--timeout={max(1, limit - 5)}s"
        self._run("start", "--tty=false", lima_limit, name, timeout=limit, **more)

    @contextlib.contextmanager
    def starting(self, instance: Instance, environ: Mapping[str, str] | None) -> Iterator[Side]:
        """`limactl start`, which goes on beside the block."""
        argv = ["start", "--tty=false", f"--timeout={self.timeout}s", instance.name]
        log.detail("+ " + shlex.join(("limactl", *argv)))
        with unnamed_file() as errors:
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "cwd": "/"}
            options.update(stderr=None if log.verbose else errors, start_new_session=True)
            with child([self.binary, *argv], **options, env=environ) as process:
                try:
                    yield Side("limactl start that forwards its ports", process, (), errors=errors)
                finally:  # before it has this file, nobody would find its host agent to end it
                    for _ in range(100):
                        if (instance.dir / "ha.pid").exists() or process.poll() is not None:
                            break
                        time.sleep(0.05)

    def tell(self, verb: str, name: str, *options: str) -> None:
        """stop, delete, protect or unprotect an instance."""
        self._run(verb, *options, name)


def saved_folder(folders: Folders, base: str) -> Path:
    """Where a base instance's frozen disk and saved memory are: beside it, Lima passes over it."""
    return folders.lima_home / "_agent-vm" / base


def freeze(host: Host, base: Instance) -> str:
    """Make its disk a layer over what is there now, which its clones share; why it is not."""
    disk, frozen = base.dir / "disk", saved_folder(host.folders, base.name) / "disk"
    disk.replace(frozen)
    below = os.path.relpath(frozen, base.dir)  # Lima's home may be moved
    layer = captured(["qemu-img", "create", "-q", "-fqcow2", "-Fqcow2", f"-b{below}", str(disk)])
    if layer.status:
        frozen.replace(disk)
        return f"qemu-img create failed: {layer.err.strip()}"
    frozen.chmod(0o400)
    return ""


# Starts lima/guest/wake.py, which is its stdin.
WAKER = "sudo python3 -IS -X utf8 -"
# In a VM that boots: Lima ends the user's sessions as long as it changes their environment.
ONCE_STABLE = "until [ -s /run/lima-ssh-ready ]; do sleep 0.1; done; echo ready; exec cat"


class Guest:
    """A running instance over ssh; commands go through a control master, Lima's or one of ours."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.ssh = ["ssh", "-F", str(instance.dir / "ssh.config"), "-a", "-x", "-q"]
        self.way: Sequence[str] = ()

    def run(self, command: str, contents: str = "", timeout: float = 120) -> Finished:
        """Run a shell command (see `captured`); stderr is merged into what it prints."""
        log.detail(f"+ ssh {self.instance.hostname} {command[:200]}")
        argv = [*self.ssh, *self.way, self.instance.hostname, command]
        finished = captured(argv, contents, timeout, stderr=subprocess.STDOUT)
        if finished.status is None:
            raise AgentVMError(f"{self.instance.hostname} did not answer within {timeout:.0f} s")
        return finished

    def attach(
        self, argv: Sequence[str], tty: bool, stdin: int | None, sides: Sequence[Side]
    ) -> int:
        """Run argv with our terminal or pipes; its status. ssh joins its arguments: quote them."""
        there = [self.instance.hostname, shlex.join(argv)]
        command = [*self.ssh, *self.way, "-t" if tty else "-T", *there]
        state, lost = "running", set[str]()
        with kept_terminal(tty), child(command, stdin=stdin) as process:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(LOOK_SECONDS)
                for side in sides:
                    if side.process.poll() and side.what not in lost:
                        lost.add(side.what)
                        log.info(f"warning: the {side.what} has ended; the VM goes on without it")
                before, state = state, qemu_state(self.instance)
                if state not in ("running", before):  # of which ssh knows nothing
                    end = f"agent-vm rm --force {self.instance.name}, in another terminal"
                    log.info(f"the VM stands still ({state}); it is ended by: {end}")

    @contextlib.contextmanager
    def reached(
        self, start: Side, sides: Sequence[Side], seconds: float, boots: bool
    ) -> Iterator[Side]:
        """Connect to a VM that starts as soon as it answers. This ssh brings the host's ends of the
        sides to their ports in the guest (`-R`), and the guest's wake.py to wake.sock, and is the
        control master of what else the run does there.
        """
        woken, config = self.instance.dir / "wake.sock", Path(self.ssh[2])
        master, each = f"-oControlPath={self.instance.dir}/run.sock", 5 if boots else seconds
        argv = [*self.ssh, "-oControlMaster=yes", master, f"-oConnectTimeout={each:.0f}", *ALIVE]
        argv += [f"-R127.0.0.1:{side.port}:{side.end}" for side in sides]
        argv += ["-oExitOnForwardFailure=yes", f"-L{woken}:/run/agent-vm/wake.sock"]
        there = self.instance.hostname
        argv += ["-T", there, ONCE_STABLE] if boots else ["-N", there]
        deadline, ended = time.monotonic() + seconds, None
        while time.monotonic() < deadline and ended != 0:
            ended = start.process.poll()  # if Lima has reached it, this is the last time
            raise_fault(start)
            time.sleep(0.05)
            woken.unlink(missing_ok=True)
            if not config.exists():  # Lima writes it when it has chosen a port
                continue
            with child(argv, **PIPES) as process:
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.02)
                    # ssh is logged in when it has made this socket.
                    if woken.exists() and (not boots or first_lines(process, 1, 2) == ["ready"]):
                        self.way = ("-oControlMaster=no", master, "-oConnectTimeout=60", *ALIVE)
                        yield Side("ssh connection that brings the sides into the VM", process, ())
                        return
        late = f"the VM does not answer ssh within {seconds:.0f} s"
        raise AgentVMError("ssh cannot bring the sides of the run into it" if ended == 0 else late)

    def woken(self, asked: Mapping[str, Any], start: Side, seconds: float) -> str:
        """What the guest's wake.py says: "done", or what the VM is not."""
        said, deadline = b"", time.monotonic() + seconds
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{self.instance.dir}/wake.sock")
            while said.count(b"\n") < 2 and len(said) < MAX_OUTPUT:
                raise_fault(start)
                if time.monotonic() > deadline:
                    raise AgentVMError(f"the VM is not prepared within {seconds:.0f} s")
                if not select.select([sock], [], [], 1)[0]:
                    continue
                data = sock.recv(65536)
                if not data:
                    raise AgentVMError("what prepares the VM has ended, or cannot be reached")
                said += data
                if said == b"ready\n":
                    sock.sendall(json.dumps({"now": time.time(), **asked}).encode() + b"\n")
        return said.decode(errors="replace").split("\n")[1]


def qmp(folder: Path, *commands: Mapping[str, Any]) -> list[Any]:
    """What the QEMU of a VM answers to commands on its control socket; errors are ValueErrors."""
    answers = []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(f"{folder}/qmp.sock")
        lines = sock.makefile()
        for command in ({"execute": "qmp_capabilities"}, *commands):
            sock.sendall(json.dumps(command).encode())
            answer: dict[str, Any] = {}
            while not answer.keys() & {"return", "error"}:  # but a greeting, or an event
                line = lines.readline()
                if not line:
                    raise ConnectionError("QEMU has ended")
                answer = json.loads(line)
            if "error" in answer:
                raise ValueError(f"QEMU: {answer['error']['desc']}")
            answers.append(answer["return"])
    return answers[1:]


IGNORE_SHARED = {"capability": "x-ignore-shared", "state": True}  # what is in the memory's file
MIGRATION = {"execute": "migrate-set-capabilities", "arguments": {"capabilities": [IGNORE_SHARED]}}


def awake(vm: Instance, state: Path | None, start: Side, seconds: float) -> None:
    """Wait for a VM's QEMU, which has its port for ssh then; let it go on from a saved `state`."""
    load = {"execute": "migrate-incoming", "arguments": {"uri": f"file:{state}"}}
    is_asked, deadline = not state, time.monotonic() + seconds
    while not is_asked or qemu_state(vm) != "running":
        raise_fault(start)
        if time.monotonic() > deadline:
            raise AgentVMError("QEMU does not answer, or does not let the VM run")
        time.sleep(0.01)
        with contextlib.suppress(OSError):  # not there yet
            if not is_asked:
                qmp(vm.dir, MIGRATION, load)
                is_asked = True


def qemu_state(vm: Instance) -> str:
    """What a VM does, in QEMU's words; one that stopped as its disk was full goes on with room."""
    if vm.vm_type != "qemu":  # nobody can be asked
        return "running"
    with contextlib.suppress(OSError, *MALFORMED):
        (said,) = qmp(vm.dir, {"execute": "query-status"})
        if said["status"] == "io-error" and shutil.disk_usage(vm.dir).free > GIB:
            qmp(vm.dir, {"execute": "cont"})
            return "running"
        return str(said["status"])
    return "no answer"


@contextlib.contextmanager
def kept_terminal(tty: bool) -> Iterator[None]:
    """An ssh that is killed leaves the terminal raw."""
    import termios

    before = termios.tcgetattr(0) if tty else None
    try:
        yield
    finally:
        with contextlib.suppress(termios.error, OSError):
            if before and os.tcgetpgrp(0) == os.getpgrp():
                termios.tcsetattr(0, termios.TCSADRAIN, before)


# --- doors: who owns what ---


class Leases:
    """Files that say which process owns which instance; the orphans of another home stay its."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.dir = folders.state / "leases"

    def path(self, name: str) -> Path:
        return self.dir / f"{name}.json"

    def take(
        self, name: str, project: str = "", folders: Sequence[str] = (), keep: bool = False
    ) -> None:
        pid, now, home = os.getpid(), time.time(), os.path.realpath(self.folders.lima_home)
        lease = Lease(name, pid, process_start(pid), boot_id(), project, now, keep, folders, home)
        write_file(self.path(name), json.dumps(lease._asdict()) + "\n")

    def drop(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def all(self) -> list[Lease]:
        leases = []
        for path in sorted(self.dir.glob("*.json")):
            try:
                leases.append(lease_from(path.read_text()))
            except FileNotFoundError:
                continue  # its run has just ended
            except (OSError, *MALFORMED):
                # Nobody can own what it names any more: an orphan, if it is ours at all.
                if is_clone(path.stem) or is_base(path.stem):
                    leases.append(Lease(path.stem, 0, "", "", "", path.lstat().st_mtime))
        return leases

    def orphans(self) -> list[Lease]:
        home = os.path.realpath(self.folders.lima_home)
        ours = [one for one in self.all() if os.path.realpath(one.lima_home or home) == home]
        return list(filter(self.is_orphan, ours))

    def is_orphan(self, lease: Lease) -> bool:
        if lease.keep:
            return not (self.folders.lima_home / lease.name).is_dir()  # deleted by limactl
        return not lease_is_live(lease, boot_id(), process_start(lease.pid))


class Host(NamedTuple):
    """Everything that a command works with on this side, opened once."""

    folders: Folders
    lima: Lima
    leases: Leases
    secrets: Mapping[str, str]  # taken out of os.environ, so that no child inherits them

    def private_places(self) -> dict[str, Place]:
        """What no agent may be given by a mount: what confines it, and the keys of the user."""
        places: dict[str, str | Path] = {
            "agent-vm's state": self.folders.state,
            "agent-vm's configuration": self.folders.config,
            "agent-vm's data": self.folders.data,
            "Lima's home": self.folders.lima_home,
            "your ssh keys": "~/.ssh",
            "your GitHub tokens": self.folders.state.parent / "github-app-token",
            "agent-vm itself": __file__,
            "agent-vm's templates": Path(__file__).resolve().parent / "lima",
            "limactl": self.lima.binary or "/nonexistent",
        }
        return {name: real_place(path) for name, path in places.items()}


def remove_instance(host: Host, name: str) -> bool:
    """Delete an instance; its lease goes last, so that a failure, which is said, is retried."""
    folder = host.folders.lima_home / name
    try:
        if (folder / "lima.yaml").exists():
            if is_base(name):
                host.lima.tell("unprotect", name)
            host.lima.tell("delete", name, "-f")
        if folder.is_dir():  # a clone that was cut off half-way, say
            shutil.rmtree(folder)
        host.leases.drop(name)
    except (AgentVMError, OSError) as error:
        log.info(f"warning: {name} could not be deleted ({error}); the next command tries again")
        return False
    return True


# --- the story: a run ---


@contextlib.contextmanager
def disposable(host: Host, plan: Plan) -> Iterator[str]:
    """The name of a clone to be, leased; whatever happens, the clone is deleted at the end."""
    home, name = host.folders.lima_home, ""
    # A name that nobody has: what has our name at the end of the run is deleted.
    while not name or (home / name).exists() or host.leases.path(name).exists():
        name = clone_name(os.path.basename(plan.project), os.urandom(3).hex(), str(home))
    folders = [mount.source.path for mount in plan.mounts if mount.writable]
    host.leases.take(name, plan.project, folders)
    keep = False
    try:
        yield name
        keep = plan.keep
    except ConnectionBroke:
        keep = True
        with contextlib.suppress(AgentVMError):  # its disk is kept; an agent does not work on
            host.lima.tell("stop", name)
        raise
    finally:
        signals.closing = True
        if keep:
            host.leases.take(name, plan.project, folders, keep=True)
            reach = f"limactl shell {name}; later agent-vm start {name} (limactl start would open"
            log.info(f"kept {name}: {reach} its network, without folders); agent-vm rm {name}")
        else:
            remove_instance(host, name)


def failure_logs(host: Host, name: str) -> str:
    """Keep the logs of an instance that will be deleted; their tails and where the rest is."""
    parts = []
    for file in ("ha.stderr.log", "serial.log"):
        source = host.folders.lima_home / name / file
        kept = host.folders.state / "logs" / f"{name}.{file}"
        end = tail(source)
        if end:
            with contextlib.suppress(OSError):
                kept.write_bytes(last_bytes(source, 1 << 20))
            parts.append(f"--- the end of {file} (all of it: {kept})\n{end}")
    return "\n".join(parts)


def boot_failure(host: Host, name: str, error: Exception) -> AgentVMError:
    """Lima says to look into ha.stderr.log, which goes with the VM: the cause is in there."""
    problem, log_file = str(error), host.folders.lima_home / name / "ha.stderr.log"
    logged = last_bytes(log_file, 50_000).decode(errors="replace")
    said = re.findall(r'"qemu\[stderr\]: ((?:[^"\\]|\\.)*)"', logged)  # QEMU's, or lima/qemu.py's
    if said or log_file.name in problem:
        problem = f"limactl start failed: {said[-1] if said else limactl_reason(logged) or problem}"
    details = f"{getattr(error, 'details', '')}\n{failure_logs(host, name)}".strip()
    return AgentVMError(problem, getattr(error, "hint", ""), details)


def run_hook(guest: Guest, path: Path, mounted: bool, workdir: str = ".") -> None:
    """Run a hook in the guest; `mounted`: it is there already, else its text is sent.

    The project's own hook is never read on the host: it may be the agent's link to a file of yours.
    """
    log.progress(f"running {path}")
    script, contents, steps = shlex.quote(str(path)), "", ["mkdir -p ~/.agent-vm"]
    if not mounted:
        script, contents = "~/.agent-vm/hook", path.read_text("utf-8", errors="replace")
        steps.append(f"cat > {script}")
    steps += [
        f"cd {shlex.quote(workdir)}",
        "if [ -e ~/.agent-vm/env ]; then . ~/.agent-vm/env; fi",
        # To a file: what the hook leaves in the background would hold ssh's pipe open.
        f"bash -l {script} < /dev/null > ~/.agent-vm/hook.log 2>&1",
    ]
    command = f"{' && '.join(steps)}; status=$?; tail -n 99 ~/.agent-vm/hook.log; exit $status"
    finished = guest.run(command, contents, timeout=3600)
    if log.verbose:
        sys.stderr.write(finished.out)
    if finished.status:
        end = "\n".join(finished.out.splitlines()[-15:])
        raise AgentVMError(f"the hook {path} ended with status {finished.status}", details=end)


# A module that is run as a script keeps its syntax tree as long as it runs: 8 MB. With -I: a
# PYTHONPATH into the project must not choose the modules that run on the host.
RUN_PROXY = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import github_mcp_proxy;"
    " sys.exit(github_mcp_proxy.main())"
)


@contextlib.contextmanager
def started_side(
    host: Host, name: str, what: str, argv: Sequence[str], environ: Mapping[str, str],
    tell: Callable[[Sequence[Mapping[str, Any]]], list[str]], line: str = "", count: int = 1,
) -> Iterator[Side]:  # fmt: skip
    """A side of the VM `name`. It takes a `line` on stdin, says in `count` lines where it listens,
    and lives until stdin closes: with the block, and when this process is killed. Then it says in
    JSON Lines what it did, which `tell` puts into words.
    """
    errors = host.folders.state / "logs" / f"{name}.{what.replace(' ', '-')}.log"
    argv = [*argv, "--audit", f"{host.folders.state}/audit/{name}.jsonl"]
    with open(errors, "wb") as file, child(argv, stderr=file, env=environ, **PIPES) as process:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line.encode())  # type: ignore[union-attr]
        said = first_lines(process, count, host.lima.timeout)
        if not all(said):
            raise AgentVMError(f"the {what} did not start", details=tail(errors))
        try:
            yield Side(what, process, said)
        finally:
            if process.poll() is not None:
                log.info(f"warning: the {what} ended before the agent: {errors}")
            else:
                errors.unlink(missing_ok=True)  # the audit has what is worth keeping
            is_said = False
            with signals.held(), contextlib.suppress(subprocess.TimeoutExpired, *MALFORMED):
                printed, _ = process.communicate(timeout=10)  # it closes stdin first
                lines = printed.decode(errors="replace").splitlines()
                for told in tell([json.loads(line) for line in lines]):
                    log.info(told)
                is_said = True
            if not is_said:
                log.info(f"warning: the {what} has not said what it did: agent-vm log {name}")


@contextlib.contextmanager
def github_side(host: Host, asked: GitHub, name: str) -> Iterator[tuple[GitHub, Side]]:
    """The GitHub proxy: one repository, with a secret for this VM alone."""
    secret, probe_secret = os.urandom(32).hex(), os.urandom(32).hex()
    own = {"GITHUB_MCP_SECRET": secret, "GITHUB_MCP_PROBE_SECRET": probe_secret}
    argv = [sys.executable, "-I", "-c", RUN_PROXY, str(Path(__file__).resolve().parent)]
    argv += ["--listen", "127.0.0.1:0", "--exit-with-stdin", *asked.options]
    environ = {**asked.environ, **own}
    with started_side(host, name, "GitHub proxy", argv, environ, receipt_lines, count=2) as proxy:
        port, rights = proxy.said
        github = asked._replace(environ={}, secret=secret, probe_secret=probe_secret)
        github = github._replace(readonly=rights == "read-only")
        log.info(f"GitHub: {github.repo}{', read-only' if github.readonly else ''}")
        yield github, proxy._replace(port=GITHUB_PORT, end=f"127.0.0.1:{int(port)}")


@contextlib.contextmanager
def egress_sides(
    host: Host, network: Network, name: str, registries: Sequence[str]
) -> Iterator[list[Side]]:
    """The VM's way out, and DNS, by two ends of one program."""
    ends = [f"{host.folders.lima_home / name}/{what}.sock" for what in ("egress", "dns")]
    argv = [sys.executable, "-IS", str(lima_folder(host.folders) / "egress.py")]
    argv += ["--listen", f"unix:{ends[0]}", "--dns", f"unix:{ends[1]}"]
    argv += ["--internet"] if network.mode == "internet" else []
    for word in (*network.allow, *registries):
        argv += ["--allow", word]
    for port in network.host_ports:
        argv += ["--host-port", str(port)]
    with started_side(host, name, "way out", argv, os.environ, refusal_lines, count=2) as way:
        proxy, dns = (way._replace(end=end) for end in ends)
        yield [proxy._replace(port=EGRESS_PORT), dns._replace(port=DNS_PORT)]


@contextlib.contextmanager
def broker_side(host: Host, plan: Plan, name: str) -> Iterator[tuple[Credential, Side]]:
    """The model's credential stays in a process of the host; the guest has a placeholder for it."""
    real = plan.credential
    assert real
    form = "sk-ant-api03-" if real.name == API_KEY else "sk-ant-oat01-"
    placeholder = real._replace(value=form + os.urandom(48).hex()[:95])
    end = f"{host.folders.lima_home / name}/broker.sock"
    argv = [sys.executable, "-IS", str(lima_folder(host.folders) / "egress.py")]
    argv += ["--broker", "anthropic", "--listen", f"unix:{end}"]
    argv += ["--upstream", plan.upstream] if plan.upstream else []
    header = "x-api-key" if real.name == API_KEY else "authorization"
    given = {"placeholder": placeholder.value, "credential": real.value, "header": header}
    line, what = json.dumps(given) + "\n", "credential broker"
    with started_side(host, name, what, argv, os.environ, refusal_lines, line) as broker:
        yield placeholder, broker._replace(port=BROKER_PORT, end=end)


@functools.cache  # a copied script would compare its files at each question
def lima_folder(folders: Folders) -> Path:
    """The folder of lima/: beside the resolved script, else the copy that is in the script."""
    checkout = Path(__file__).resolve().parent / "lima"
    if (checkout / "agent-vm.yaml").is_file():
        return checkout
    for name, contents in EMBEDDED.items():
        path = folders.state / "lima" / name
        make_private_folder(path.parent)
        if not path.is_file() or path.read_text() != contents:
            write_file(path, contents)
    return folders.state / "lima"


def qemu_environment(
    host: Host, instance: Instance, is_open: bool, slots: Sequence[Sequence[Any]], **saved: Any
) -> dict[str, str] | None:
    """limactl's, in which lima/qemu.py is started as QEMU; None where the VM is not QEMU's.

    `slots` are (path, writable) of folders; `saved` and `resume` say what becomes of the VM's
    memory, with which it has a fixed number of them: the rest is an empty one.
    """
    if instance.vm_type != "qemu":
        return None
    key = f"QEMU_SYSTEM_{instance.arch.upper()}"
    name, *words = shlex.split(os.environ.get(key) or f"qemu-system-{instance.arch}")
    program = shutil.which(name)
    if not program:
        raise AgentVMError(f"{name} is not installed", "agent-vm doctor")
    script = host.folders.state / "qemu"
    _, _, rest = (lima_folder(host.folders) / "qemu.py").read_text().partition("\n")
    write_file(script, f"#!{sys.executable} -IS\n{rest}", mode=0o700)
    empty = [(str(host.folders.state / "empty"), False)] * (SLOTS - len(slots) if saved else 0)
    asked = {"program": os.path.abspath(program), "restrict": not is_open, **saved}
    asked["mounts"] = [*slots, *empty]
    # Words of the user's stay where Lima sees them: it adds no option that they hold already.
    more = {key: shlex.join([str(script), *words]), "AGENT_VM_QEMU": json.dumps(asked)}
    return {**os.environ, **more}


def check_confined(
    host: Host, instance: Instance, planned: Sequence[Mapping[str, Any]], is_open: bool
) -> None:
    """Raise unless Lima would give a clone what was planned, no more; `is_open`: its network."""
    faults = isolation_faults(instance, planned)
    if not is_open and f"{instance.vm_type} {instance.arch}" not in CLOSABLE:
        faults.append("has a network that only QEMU closes (setup --vm-type qemu)")
    if faults:
        problem = f"{instance.name} would not be confined: it {'; it '.join(faults)}"
        raise AgentVMError(problem, f"look into {host.folders.lima_home}/_config/default.yaml")


def stamps(host: Host, base: Instance) -> dict[str, Any]:
    """What has changed when what was saved does not fit any more: sizes, times in ns, texts."""
    folder, lima = saved_folder(host.folders, base.name), lima_folder(host.folders)
    # The last is its clones' disk, until it is started itself.
    infos = {path: path.stat() for path in (folder / "memory", folder / "state", base.dir / "disk")}
    texts = b"".join((lima / name).read_bytes() for name in SAVED)
    seen = {path.name: [info.st_size, info.st_mtime_ns] for path, info in infos.items()}
    return {**seen, "agent-vm": hashlib.sha256(texts).hexdigest()}


def why_boot(host: Host, base: Instance, plan: Plan, folders: int) -> str:
    """Why a VM has to be booted, or ""; whether its machine is the same, lima/qemu.py decides."""
    saved = saved_folder(host.folders, base.name)
    if plan.boot or not (saved / "saved.json").exists():
        return plan.boot or "no state of it was saved (agent-vm doctor)"
    if plan.network.mode == "open" and any(map(PROXY, os.environ)):
        return "Lima gives it the host's proxies as it boots"
    with contextlib.suppress(OSError, *MALFORMED):
        if json.loads((saved / "saved.json").read_text()) == stamps(host, base):
            return "it has more folders" if folders > SLOTS else "".join(plan.sizes)
    return f"{base.name} has been started, or changed, since it was saved, or agent-vm has"


def cloned(host: Host, base: Instance, name: str, *options: str) -> Instance:
    """A clone that has nothing of how its base instance was reached."""
    host.lima.clone(base.name, name, *options)
    folder = host.folders.lima_home / name
    for stale in (*folder.glob("*.log"), *folder.glob("ssh.config")):
        stale.unlink()
    clone = host.lima.find(name)
    if clone is None:
        raise AgentVMError(f"the clone {name} is not listed by limactl", "limactl list")
    return clone


@contextlib.contextmanager
def sides_of(
    host: Host, base: Instance, plan: Plan, name: str
) -> Iterator[tuple[Plan, list[Side]]]:
    """The sides of a run, and its plan, which has placeholders and secrets of theirs now."""
    mode, sides = plan.network.mode, list[Side]()  # their sockets lie in the clone's folder
    with contextlib.ExitStack() as stack:
        if mode in ("internet", "allow"):
            registries = read_line(str(base.dir / REGISTRIES)).split() if mode == "allow" else ()
            sides += stack.enter_context(egress_sides(host, plan.network, name, registries))
        if plan.broker:
            placeholder, broker = stack.enter_context(broker_side(host, plan, name))
            variables = {**plan.variables, "ANTHROPIC_BASE_URL": BROKER_SIDE}
            plan = plan._replace(credential=placeholder, variables=variables)
            sides.append(broker)
        if plan.github:
            github, proxy = stack.enter_context(github_side(host, plan.github, name))
            plan = plan._replace(github=github)
            sides.append(proxy)
        yield plan, sides


def prepare(
    host: Host, guest: Guest, plan: Plan, places: Sequence[Any], start: Side, boots: bool
) -> None:
    """Make a VM that answers a place to work, and see that it is confined."""
    folder = lima_folder(host.folders) / "guest"
    texts = {path.name: path.read_text() for path in folder.glob("*.sh")}
    port = re.search(r"^\s*Port (\d+)$", (guest.instance.dir / "ssh.config").read_text(), re.M)
    if not port:
        raise AgentVMError("Lima's ssh.config names no port of the VM")
    if boots:
        started = guest.run(WAKER, (folder / "wake.py").read_text())
        if started.status:
            raise AgentVMError("the VM could not be prepared", details=started.out.strip())
    asked = {**asked_of_guest(plan, texts), "port": int(port[1]), "mounts": places}
    answer = guest.woken(asked, start, host.lima.timeout if boots else 120)
    if answer != "done":
        raise AgentVMError(f"the VM {answer}")
    if plan.broker or plan.github:
        probed = guest.run("bash ~/.agent-vm/probe.sh")
        if probed.status:
            what = "is not confined" if probed.status == 1 else "cannot be probed"
            raise AgentVMError(f"the VM {what}", details=probed.out.strip())


def run(host: Host, base: Instance, plan: Plan) -> int:
    """Clone, check, start, prepare, run plan.argv in the project, delete. Returns its status."""
    folders, lima, mode = host.folders, host.lima, plan.network.mode
    log.phases.clear()
    # The project's transcripts on the host, where the agent looks for them in the guest.
    sessions = folders.state / "sessions" / session_key(plan.project)
    for mount in plan.mounts:  # what an agent can write is known by a folder of this name
        if mount.writable:
            make_private_folder(sessions.with_name(session_key(mount.source.path)))
    make_private_folder(sessions)
    readonly = not plan.mounts[0].writable  # a copy, then: nothing that it writes outlives it
    target = ".agent-vm/copied" if readonly else ".claude/projects"
    transcripts = Mount(place_of(sessions), f"{base.home}/{target}", writable=not readonly)
    mounts = [*plan.mounts, transcripts]
    planned = [] if base.vm_type == "qemu" else lima_mounts(mounts)
    slots = [(mount.source.path, mount.writable) for mount in mounts]
    places = [(slot, mount.target, mount.writable) for slot, mount in enumerate(mounts)]
    expression = clone_expression(planned, CONFINED_MOUNT_TYPE.get(base.vm_type, ""), plan.forward)
    if mode != "open":  # Lima would copy the host's proxies, with their passwords
        expression += " | .propagateProxyEnv = false"
    saved, boot = saved_folder(folders, base.name), why_boot(host, base, plan, len(mounts))

    with contextlib.ExitStack() as stack:
        name = stack.enter_context(disposable(host, plan))
        log.progress(f"{'booting' if boot else 'resuming'} {name}")
        log.detail(f"it is not resumed: {boot}" if boot else f"from {saved}")
        clone = cloned(host, base, name, expression, *plan.sizes)
        log.mark("cloned")
        check_confined(host, clone, planned, mode == "open")
        write_file(
            clone.dir / "run.json", json.dumps({"mode": mode, "slots": slots, "places": places})
        )
        memory = {} if boot else {"saved": str(saved), "resume": True}
        environ = qemu_environment(host, clone, mode == "open", slots, **memory)
        start = stack.enter_context(lima.starting(clone, environ))
        plan, sides = stack.enter_context(sides_of(host, base, plan, name))
        guest = Guest(clone)
        try:
            seconds = lima.timeout if boot else RESUME_SECONDS * (10 if kvm_is_missing() else 1)
            awake(clone, None if boot else saved / "state", start, seconds)
            log.mark("booting" if boot else "resumed")
            sides.append(stack.enter_context(guest.reached(start, sides, seconds, bool(boot))))
            log.mark("ssh")
            prepare(host, guest, plan, places, start, bool(boot))
        except (AgentVMError, OSError, *MALFORMED) as error:
            failed = boot_failure(host, name, error)
            raise failed if boot else NotResumed(str(failed)) from error
        for path in plan.hooks:
            run_hook(guest, path, path.parent == Path(plan.project), plan.project)
        log.mark("prepared")

        tty = os.isatty(0) and os.isatty(1)
        # An agent whose output goes to a file must not wait for a terminal that it does not have.
        deaf = plan.agent and os.isatty(0) and not tty
        launch = [f"{clone.home}/.agent-vm/launch.sh", plan.project, *plan.argv]
        sides.append(start)
        try:
            status = guest.attach(launch, tty, subprocess.DEVNULL if deaf else None, sides)
        except Interrupted:
            with signals.held(), contextlib.suppress(AgentVMError):
                guest.run("sync", timeout=20)  # what the agent wrote so far is kept
            raise
        log.mark("ended")
        if 0 <= status != SSH_FAILED:
            return status
        # ssh failed, or died, or an agent has ended with ssh's status: the guest knows.
        said = guest.run("cat ~/.agent-vm/status", timeout=60)
        if said.status == SSH_FAILED:
            raise AgentVMError("the VM was lost while it ran", details=failure_logs(host, name))
        if not re.fullmatch(r"[0-9]{1,3}\n", said.out):
            go_on = "agent-vm run -- --continue" if plan.agent and not readonly else ""
            raise ConnectionBroke("the connection to the VM broke", go_on)
        return int(said.out)


# --- you may stop here: what follows only calls what is above ---

# --- settings: flag > environment > config file > default ---

# Docker's convention: 125 is a failure of ours around the guest's command, never the command's.
EXIT_OURS = 125
BASE = "agent-vm-base"
AGENT = ("claude", "--dangerously-skip-permissions")
TOKEN_LENGTH = 108  # of both kinds
CREDENTIALS = ("ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", API_KEY)
GITHUB_TOKEN = "GITHUB_MCP_TOKEN"  # for the proxy alone
# Taken out of the environment, so that no child inherits them; the last four are gh's.
SECRETS = (*CREDENTIALS, GITHUB_TOKEN, "GH_TOKEN", "GITHUB_TOKEN", "GH_ENTERPRISE_TOKEN",
           "GITHUB_ENTERPRISE_TOKEN")  # fmt: skip

# GitHub takes no repository that is called so: "." and "..", or x.git and x.wiki.
OWNER_REPO = r"([A-Za-z0-9][A-Za-z0-9_-]*/(?!\.{1,2}/?$)[A-Za-z0-9._-]+?(?<!\.git)(?<!\.wiki))"

LIMA_RELEASE = "2.2.0"
LIMA_URL = f"https://github.com/lima-vm/lima/releases/download/v{LIMA_RELEASE}"


def words_like(pattern: str, what: str) -> Callable[[str], str]:
    """A parser for values of one form."""

    def parse(word: str) -> str:
        if not re.fullmatch(pattern, word, re.DOTALL):
            shown = re.sub(r"=.*|//[^/@]*@", "…", word, flags=re.DOTALL)  # what may be a secret
            raise argparse.ArgumentTypeError(f"{shown!r} is not {what}")
        return word

    return parse


web_address = words_like(r"https?://[^\s@'\"\\]+", "an http(s) address without a password")
owner_and_repo = words_like(OWNER_REPO, "OWNER/REPO")


def whole_number(word: str) -> int:
    return int(words_like(r"[1-9]\d{0,5}", "a whole number above 0")(word))


def port_number(word: str) -> int:
    number = whole_number(word)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{word} is no port")
    return number


PLACE = r"((?:\*\.)?\w[\w-]*(?:\.\w[\w-]*)*\.?|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?"
THIS_HOST = r"(.*\.)?localhost\.?|127\..*|0\.0\.0\.0|\[::1?\]|169\.254\..*|host\.lima\.internal"


def allowed_place(word: str) -> str:
    """HOST[:PORT]; what is never reached is refused before anything is started."""
    match = re.fullmatch(PLACE, word)
    if not match:
        raise argparse.ArgumentTypeError(f"{word!r} is not HOST, *.HOST or HOST:PORT")
    if match[2]:
        port_number(match[2])
    if re.fullmatch(THIS_HOST, match[1]):
        hint = f"--host-port {match[2] or 'PORT'} opens a port of this host"
        raise argparse.ArgumentTypeError(f"{word} is never reached by its name: {hint}")
    return word


def memory_size(word: str) -> int:
    size, there = whole_number(word), host_memory() // GIB
    if size > there:
        raise argparse.ArgumentTypeError(f"the host has {there} GB")
    return size


def existing_file(word: str) -> str:
    path = os.path.abspath(os.path.expanduser(word))
    if not os.access(path, os.R_OK) or not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"{path} is not a readable file")
    return path


def image_location(word: str) -> str:
    return web_address(word) if "://" in word else existing_file(word)


def yes_or_no(word: str) -> bool:
    known = words_like("(?i:yes|true|on|1|no|false|off|0)", "yes or no")
    return known(word).lower() in ("yes", "true", "on", "1")


def yes_no_or_auto(word: str) -> bool | str:
    return word if word == "auto" else yes_or_no(word)


def mount_option(word: str) -> Mount:
    """DIR[:ro|:rw][:GUESTPATH]; read-only unless said, and at the same path unless said."""
    match = re.fullmatch(r"(.+?)(?::(ro|rw))?(?::(/.*))?", word, re.DOTALL)
    typed = os.path.expanduser(match[1] if match else word)
    source = real_place(typed)
    if not (match and os.path.isdir(source.path) and os.access(source.path, os.R_OK | os.X_OK)):
        raise argparse.ArgumentTypeError(f"{source.path} is not a directory that can be read")
    target = "/" + os.path.normpath(match[3] or source.path).lstrip("/")
    return Mount(source, target, writable=match[2] == "rw", as_typed=spellings(typed))


class Setting(NamedTuple):
    """A value that a flag, AGENT_VM_NAME, config.ini or the default gives, in that order."""

    parse: Callable[[str], Any]
    default: Any
    help: str
    metavar: str = ""
    many: bool = False


base_suffix = words_like("[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?", "a name: up to 20 of a-z 0-9 -")
variable = words_like("[A-Za-z_][A-Za-z0-9_]*(=.*)?", "NAME or NAME=VALUE")
network_mode = words_like("internet|allow|off|open", "internet, allow, off or open")
keeper = words_like("broker|guest", "broker or guest")
vm_type = words_like("qemu|vz", "qemu or vz")
SETTINGS = {
    "name": Setting(base_suffix, "", "use the base instance agent-vm-base-NAME", "NAME"),
    "minimal": Setting(yes_or_no, False, "only git, curl, jq and Claude Code in the VM"),
    "disk": Setting(whole_number, 20, "size of the VM's disk", "GB"),
    "memory": Setting(memory_size, 8, "the VM's memory, by default at most half the host's", "GB"),
    "cpus": Setting(whole_number, 4, "the VM's CPUs, by default at most half the host's", "N"),
    "vm-type": Setting(vm_type, "", "what Lima runs the VM with (else Lima's choice)", "TYPE"),
    "resume": Setting(yes_or_no, True, "save the VM as it runs, for runs to resume it"),
    "template": Setting(existing_file, "", "another Lima template than lima/agent-vm.yaml", "FILE"),
    "image": Setting(image_location, "", "another Debian 13 disk image", "FILE|URL"),
    "ca-cert": Setting(existing_file, (), "trust a CA in the VM (repeatable)", "FILE", many=True),
    "apt-mirror": Setting(web_address, "", "Debian mirror for the guest's apt", "URL"),
    "npm-registry": Setting(web_address, "", "npm registry of the guest (else the host's)", "URL"),
    "lima-url": Setting(web_address, LIMA_URL, "where to get Lima when it is missing", "URL"),
    "timeout": Setting(whole_number, 600, "how long one limactl command may take", "SECONDS"),
    "mount": Setting(mount_option, (), "mount another folder, read-only unless :rw (repeatable)",
                     "DIR[:ro|:rw][:GUESTPATH]", many=True),
    "env": Setting(variable, (), "pass a variable (repeatable)", "NAME[=VALUE]", many=True),
    "network": Setting(network_mode, "", "what the VM reaches: internet, all that is public; allow,"
                       " what --allow lists and its package registries; off, only the model and"
                       " GitHub; open, your LAN and this host's ports, too (default internet; under"
                       " vz open)", "MODE"),
    "allow": Setting(allowed_place, (), "let the VM reach a host, in your LAN too (repeatable):"
                     " HOST, *.HOST (ports 80 and 443), HOST:PORT; github, anthropic, openai,"
                     " nodesource, docker",
                     "HOST[:PORT]", many=True),
    "host-port": Setting(port_number, (), "let the VM reach this port of the host's loopback, as"
                         " host.lima.internal:PORT (repeatable)", "PORT", many=True),
    "credential": Setting(keeper, "broker", "where the model's credential is: with a broker on the"
                          " host, or in the guest", "PLACE"),
    "readonly": Setting(yes_or_no, False, "mount the project read-only; the host enforces it"),
    "github": Setting(yes_no_or_auto, False, "give the agent the project's GitHub repository"
                      " (auto: when one was chosen before, and there is a token)"),
    "github-profile": Setting(str, "", "tokens from github_app_token.py's profile NAME", "NAME"),
    "github-policy": Setting(existing_file, "", "what may be written, see the proxy", "FILE"),
    "github-lockdown": Setting(yes_or_no, True, "hide what outsiders wrote (best effort)"),
    "forward": Setting(yes_or_no, True, "forward the guest's ports to the host"),
}  # fmt: skip
SETUP_SETTINGS = (
    "name minimal disk memory cpus vm-type resume template image ca-cert apt-mirror npm-registry "
    "lima-url timeout"
).split()
RUN_SETTINGS = (
    "name memory cpus mount readonly network allow host-port credential github github-profile "
    "github-policy github-lockdown forward env timeout"
).split()


def env_name(name: str) -> str:
    return "AGENT_VM_" + name.upper().replace("-", "_")


class Settings(NamedTuple):
    """What a command was told. What it does not ask for cannot fail it."""

    flags: Mapping[str, Any]
    environ: Mapping[str, str]
    config: Mapping[str, str]

    def find(self, name: str) -> tuple[Any, str]:
        """(value, where it is from: flag, environment, config or default)."""
        setting, flag = SETTINGS[name], self.flags.get(name.replace("-", "_"))
        if flag is not None:
            return (tuple(flag) if setting.many else flag), "flag"
        said_by = env_name(name)
        if self.environ.get(said_by):
            words, origin = self.environ[said_by], "environment"
        elif name in self.config:
            words, origin, said_by = self.config[name], "config", "config.ini"
        else:
            return setting.default, "default"
        try:
            if setting.many:
                return tuple(setting.parse(word) for word in shlex.split(words)), origin
            return setting.parse(words), origin
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise AgentVMError(f"{said_by}: {name}: {error}") from error

    def get(self, name: str) -> Any:
        return self.find(name)[0]

    def chosen(self, name: str) -> bool:
        return self.find(name)[1] != "default"


def config_values(path: Path, project: str) -> dict[str, str]:
    """The section [agent-vm], and over it those that name the project's folder or one above it."""
    import configparser

    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
        values, known = dict(parser["agent-vm"]), set(parser["agent-vm"])
        paths = {one: os.path.realpath(os.path.expanduser(one)) for one in parser.sections()}
        for section in sorted(paths, key=lambda one: len(paths[one])):  # the nearest counts most
            known |= set(parser[section])
            if not section.startswith(("/", "~")) and section != "agent-vm":
                raise ValueError(f"[{section}] is neither [agent-vm] nor a project's path")
            if section != "agent-vm" and f"{project}/".startswith(paths[section].rstrip("/") + "/"):
                values.update(parser[section])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, configparser.Error) as error:
        first_line = str(error).splitlines()[0]
        hint = "a section [agent-vm], and one [/PATH/OF/A/PROJECT] where it differs; each key once"
        raise AgentVMError(f"{path}: {first_line}", hint) from error
    unknown = sorted(known - set(SETTINGS))
    if unknown:
        raise AgentVMError(f"{path}: unknown key {unknown[0]!r}", "keys: " + " ".join(SETTINGS))
    return values


# --- opening: this host, its base instances, its garbage ---

CLONE_SECONDS = 120  # until `limactl clone` has made a folder, on any host


def folders_of(environ: Mapping[str, str]) -> Folders:
    """By the XDG rules, which say that a relative path does not count."""
    home = Path(os.path.expanduser("~"))

    def xdg(name: str, default: str) -> Path:
        value = environ.get(name, "")
        return (Path(value) if os.path.isabs(value) else home / default) / "agent-vm"

    return Folders(
        state=xdg("XDG_STATE_HOME", ".local/state"),
        config=xdg("XDG_CONFIG_HOME", ".config"),
        data=xdg("XDG_DATA_HOME", ".local/share"),
        lima_home=Path(os.path.abspath(environ.get("LIMA_HOME") or home / ".lima")),
    )


def open_host(
    args: argparse.Namespace, need_lima: bool = True, collect: bool = False, given: bool = True
) -> tuple[Host, Settings]:
    """`given`: the settings of the environment and of config.ini count."""
    folders, project = folders_of(os.environ), ""
    with contextlib.suppress(OSError):
        project = os.getcwd()
    config = config_values(folders.config / "config.ini", project) if given else {}
    settings = Settings(vars(args), os.environ if given else {}, config)
    known = set(map(env_name, SETTINGS))
    for name in settings.environ:
        if name.upper().startswith("AGENT_VM_") and name not in known:
            raise AgentVMError(f"{name} is not a setting", "settings: " + " ".join(SETTINGS))
    os.environ["PATH"] = safe_search_path(os.environ.get("PATH", os.defpath), folders.state)
    os.environ["PATH"] += f"{os.pathsep}{folders.data}/lima/bin"  # where setup puts Lima
    binary = shutil.which("limactl") or ""
    if need_lima and not binary:
        raise AgentVMError("limactl is not installed", hint="agent-vm setup installs it")
    for name in ("", "leases", "bases", "sessions", "empty", "logs", "audit", "github"):
        make_private_folder(folders.state / name)
    host = Host(folders, Lima(binary, settings.get("timeout")), Leases(folders), args.secrets)
    if collect and binary:
        collect_garbage(host)
    return host, settings


def safe_search_path(path: str, state: Path) -> str:
    """PATH without relative entries, and without what an agent can have made.

    A project's .venv/bin, say: its programs are for the guest.
    """
    entries = [entry for entry in path.split(os.pathsep) if os.path.isabs(entry)]
    mounted = []
    with contextlib.suppress(OSError):
        here = place_of(os.getcwd())
        mounted = [] if mount_refusal(here, real_place("~"), {}) else [here]
    return os.pathsep.join(
        entry for entry in entries
        if not any(agents_folders(state, place, mounted) for place in spellings(entry))
    )  # fmt: skip


def confirm(question: str, yes: bool = False) -> bool:
    """Ask on the terminal; --yes answers, and without a terminal nobody can."""
    if yes or not (os.isatty(0) and os.isatty(2)):
        return yes
    print(f"agent-vm: {question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def base_name(settings: Settings) -> str:
    return "-".join(filter(None, (BASE, settings.get("name"))))


def read_base(folders: Folders, name: str) -> tuple[str, str]:
    """(current, previous): the instances that a base name means, each "" when there is none."""
    current, _, previous = read_line(str(folders.state / "bases" / name)).partition(" ")
    return (current if is_base(current) else ""), (previous if is_base(previous) else "")


def write_base(folders: Folders, name: str, current: str, previous: str) -> None:
    write_file(folders.state / "bases" / name, f"{current or '-'} {previous or '-'}\n")


def base_roles(folders: Folders) -> dict[str, str]:
    """instance -> "base" or "previous", of all that a base name means."""
    roles = {}
    for path in (folders.state / "bases").glob(f"{BASE}*"):
        current, previous = read_base(folders, path.name)
        roles.update({previous: "previous", current: "base"})
    roles.pop("", None)
    return roles


def usable_base(host: Host, name: str) -> Instance:
    """The stopped instance that is cloned; what keeps it from that raises."""
    if not shutil.which("ssh"):
        raise AgentVMError("ssh is not installed", hint="install your system's OpenSSH client")
    base = host.lima.find(read_base(host.folders, name)[0]) if host.lima.binary else None
    setup = "agent-vm setup" + name[len(BASE) :].replace("-", " --name ", 1)
    if base is None:
        building = [one.name for one in host.leases.all() if one.name.startswith(f"{name}.")]
        hint = f"wait until its setup has ended ({building[0]})" if building else setup
        raise AgentVMError(f"there is no base instance {name}", hint)
    if base.status != "Stopped":
        running = base.status == "Running"
        problem = f"the base instance {base.name} is {base.status.lower()}: it cannot be cloned"
        raise AgentVMError(problem, f"agent-vm stop {base.name}" if running else setup)
    return base


def collect_garbage(host: Host, wait: bool = False) -> list[str]:
    """Remove the instances whose owner is gone (kill -9, crash, power loss) and say so."""
    removed = []
    with file_lock(host.folders.state / "gc.lock", wait) as free:
        for path in host.folders.state.glob("*/.*"):
            if changed(path) < time.time() - 86400:  # a file that a kill -9 left half written
                remove_path(path)
        roles = base_roles(host.folders)
        for lease in host.leases.orphans() if free else ():
            if lease.name in roles:  # its setup died right after it had become a base instance
                host.leases.drop(lease.name)
                continue
            existed = (host.folders.lima_home / lease.name).is_dir()
            if not existed and 0 <= time.time() - lease.created < CLONE_SECONDS:
                log.info(f"{lease.name}: its limactl may be about to make it; again later")
                continue
            with signals.held():
                gone = remove_instance(host, lease.name)
            if gone and existed:
                log.info(f"removed {lease.name}: its run ended without cleaning up")
                removed.append(lease.name)
        if free:
            remove_unused_disks(host)
    for folder in ("logs", "audit"):  # of the newest hundred some may be in use
        for path in sorted((host.folders.state / folder).glob("agent-vm-*"), key=changed)[:-100]:
            remove_path(path)
    return removed


def changed(path: Path) -> float:
    """When; 0 of what has gone meanwhile."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


# --- the plan of a run ---

# Passed from the host's environment into the guest: how the terminal looks, which model answers.
PASSED_ENV = re.compile(
    "COLORTERM|NO_COLOR|FORCE_COLOR|TERM_PROGRAM|LANG|LC_[A-Z]+"
    "|ANTHROPIC_BASE_URL|ANTHROPIC_MODEL|ANTHROPIC_SMALL_FAST_MODEL|ANTHROPIC_CUSTOM_HEADERS"
)
PROJECT_HOOK = ".claude-vm.runtime.sh"
# Inodes differ on the two sides of a mount: git would hash every file anew at each crossing.
GIT_SETTINGS = {"core.checkStat": "minimal", "core.trustctime": "false"}


def worktree_git_dir(project: str) -> str:
    """The main repository's git dir when `project` is a linked worktree, else "".

    The agent can write `project/.git`. So the git dir counts only when it points back: git keeps
    COMMON/worktrees/ID/gitdir with the worktree's path (gitrepository-layout(5)), which an agent
    that has only the worktree cannot have written.
    """
    dot_git = os.path.join(project, ".git")
    if os.path.islink(dot_git):  # to a worktree elsewhere, which would point back to itself
        return ""
    pointer = read_line(dot_git)
    if not pointer.startswith("gitdir: "):
        return ""
    git_dir = os.path.realpath(os.path.join(project, pointer[len("gitdir: ") :]))
    parent, _, _ = git_dir.rpartition("/")
    common, _, name = parent.rpartition("/")
    back = os.path.join(git_dir, read_line(os.path.join(git_dir, "gitdir")))
    points_back = os.path.realpath(back) == dot_git
    if name != "worktrees" or not points_back or not os.path.isfile(common + "/HEAD"):
        return ""
    return "" if overlaps(real_place(common), real_place(project)) else common


def plan_mounts(
    host: Host, project: str, readonly: bool, more: Sequence[Mount], force: bool
) -> list[Mount]:
    """The project first, then a worktree's repository, then what --mount adds; refusals raise."""
    common, state = worktree_git_dir(project), host.folders.state
    pwd = os.environ.get("PWD", "")  # as the shell went there, through links
    typed = spellings(pwd if os.path.realpath(pwd) == project else project)
    mounts = [Mount(real_place(project), project, not readonly, typed), *more]
    if common:
        log.info(f"{common} is mounted, too: it is this worktree's repository")
        mounts.insert(1, Mount(real_place(common), common, not readonly))
    home, private = real_place("~"), host.private_places()
    writable = [mount.source for mount in mounts if mount.writable]
    problem = mounts_problem(mounts) or running_above(host, mounts)
    for mount in mounts:
        for path in (mount.source.path, mount.target):
            reason = unusable_path(path)
            if reason:
                raise AgentVMError(f"{path!a} cannot be mounted: {reason}", "use another folder")
        reason = mount_refusal(mount.source, home, private)
        if reason:
            problem = f"{mount.source.path} is not given to an agent: {reason}"
        for place in mount.as_typed:
            for folder in agents_folders(state, place, writable):
                if not inside(mount.source, real_place(folder)):
                    problem = f"{place.path} leads out of {folder}: an agent may have made it"
    if problem and not force:
        raise AgentVMError(problem, "cd to another folder, mount another, or say --force-mount")
    return mounts


def running_above(host: Host, mounts: Sequence[Mount]) -> str:
    """An agent that runs now and can write a folder above could put a link in a mount's place."""
    for lease in host.leases.all():
        stopped = lease.keep and not (host.folders.lima_home / lease.name / "ha.pid").exists()
        for folder in () if stopped or host.leases.is_orphan(lease) else lease.folders:
            above = real_place(folder)
            for mount in mounts:
                if mount.source.path != folder and inside(mount.source, above):
                    return f"{mount.source.path} lies in {folder}, where {lease.name} is running"
    return ""


def find_credential(host: Host) -> Credential | None:
    """The credential that a run would use: the environment's, else the stored one."""
    for name in CREDENTIALS:
        value = host.secrets.get(name, "").strip()
        if value:
            return Credential(name, value, "the environment")
    path = host.folders.config / "credential"
    if not path.exists():
        return None
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        problem = f"{path} can be read by others"
        raise AgentVMError(problem, hint=f"chmod 600 {shlex.quote(str(path))}")
    name, _, value = read_line(str(path)).partition("=")
    if name not in CREDENTIALS or not value:
        raise AgentVMError(f"{path} is not what auth set writes", hint="agent-vm auth set")
    return Credential(name, value, str(path))


def guest_variables(host: Host, settings: Settings, network: Network) -> dict[str, str]:
    given = {**host.secrets, **os.environ}
    passed = filter(PASSED_ENV.fullmatch, os.environ)
    variables = {name: os.environ[name] for name in passed if os.environ[name]}
    variables["DISABLE_AUTOUPDATER"] = "1"  # the clone is thrown away; `setup` updates
    # No key is in the VM to sign with; the environment goes before a repository's configuration.
    for number, key in enumerate(("commit.gpgSign", "tag.gpgSign")):
        variables.update({f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": "false"})
    variables["GIT_CONFIG_COUNT"] = "2"
    for item in settings.get("env"):
        name, equals, value = item.partition("=")
        if not equals and name not in given:
            raise AgentVMError(f"--env {name}: it is not set on the host")
        variables[name] = value if equals else given[name]
    way, near = f"http://127.0.0.1:{EGRESS_PORT}", "localhost,127.0.0.1"
    if network.mode in ("allow", "off"):  # what Claude Code sends elsewhere would be refused
        variables["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"] = "1"
    if network.mode in ("internet", "allow"):  # whoever asks no proxy is led there all the same
        proxies = "http_proxy https_proxy HTTP_PROXY HTTPS_PROXY".split()
        variables = {**dict.fromkeys(proxies, way), "NODE_USE_ENV_PROXY": "1", **variables}
    else:  # Lima copies the host's proxies
        near += ",host.lima.internal"
    asked = {**os.environ, **variables}
    direct = asked.get("no_proxy") or asked.get("NO_PROXY") or ""
    if direct != "*":  # that counts alone
        direct = ",".join(filter(None, (direct, near)))
    variables.update(no_proxy=direct, NO_PROXY=direct)
    return variables


def plan_network(settings: Settings, base: Instance, without: Sequence[str]) -> Network:
    """What the VM may reach; `without` a broker the agent needs these hosts as well."""
    mode = settings.get("network") or ("internet" if base.vm_type == "qemu" else "open")
    if base.vm_type != "qemu":
        if mode != "open":
            problem = f"the network of {base.name} cannot be held: it is no VM of QEMU's"
            raise AgentVMError(problem, "agent-vm setup --vm-type qemu, or --network open")
        log.info("the VM's network is open, your LAN and this host's ports too: it is not QEMU's")
    if mode in ("off", "open"):
        if "flag" in (settings.find("allow")[1], settings.find("host-port")[1]):
            raise AgentVMError(f"--allow and --host-port say nothing under --network {mode}")
        return Network(mode)
    allow = (*settings.get("allow"), *(without if mode == "allow" else ()))
    return Network(mode, allow, settings.get("host-port"))


def readable_hooks(*paths: Path) -> list[Path]:
    """Those hooks that exist; one that exists and cannot be read raises."""
    hooks = [path for path in paths if os.path.lexists(path)]
    for path in hooks:
        if not os.access(path, os.R_OK) or not path.is_file():
            problem = f"the hook {path} is not a readable file"
            raise AgentVMError(problem, hint=f"chmod +r {path}, or remove it")
    return hooks


# --- the plan's part for GitHub: which repository, whose token ---

GITHUB_URL = re.compile(
    r"(?:https?://(?:[^@/]*@)?(?:www\.)?github\.com(?::443)?/"
    r"|ssh://git@(?:ssh\.)?github\.com(?::\d+)?/|git@(?:ssh\.)?github\.com:/?)"
    + OWNER_REPO + r"(?:\.git)?/?",
    re.IGNORECASE,
)  # fmt: skip
NETWORK_BRIEFINGS = {
    "internet": "You reach any public address, by TCP alone (no UDP, no ping).",
    "allow": "You reach, by TCP alone, only hosts that the user has listed, and the registries that"
    " apt, npm, pip, cargo and go were set to.",
    "off": "You reach no network.",
}


def github_repository(url: str) -> str:
    """OWNER/REPO of a remote on github.com, "" for any other."""
    match = GITHUB_URL.fullmatch(url)
    return match[1] if match else ""


def project_remote(project: str) -> str:
    """The URL of the project's remote `origin` as it is written, or "".

    Only the config file itself is read, without includes: an agent may have written it. So what
    it says is a proposal to the user, never a decision.
    """
    file = os.path.join(worktree_git_dir(project) or os.path.join(project, ".git"), "config")
    plain = os.path.realpath(file) == file and os.path.isfile(file)
    if not plain or os.path.getsize(file) > 1 << 20:  # git takes four times as much memory
        return ""
    command = ("git", "config", "--file", file, "--no-includes", "--get", "remote.origin.url")
    return first_line_of(*command)


def choose_repository(host: Host, settings: Settings, project: str, named: str) -> tuple[str, str]:
    """(OWNER/REPO, the remote as written where it means that repository); "" is no GitHub.

    The user chooses a project's repository once, by --repo or by a yes; it is kept in the state
    folder. What the remote says later changes nothing.
    """
    implied = [settings.find(name)[1] for name in ("github-profile", "github-policy")]
    wanted = settings.get("github") or named or "flag" in implied
    if not wanted:
        return "", ""
    kept = host.folders.state / "github" / session_key(project)
    remote = project_remote(project)
    proposed = github_repository(remote)
    hint = f"--repo {proposed or 'OWNER/REPO'}"
    repo = named or github_repository("https://github.com/" + read_line(str(kept)))
    if not repo and wanted == "auto":
        log.progress(f"without GitHub: no repository was chosen for this project; {hint}")
        return "", ""
    question = f"give the agent the GitHub repository {proposed}, as the remote says?"
    if not repo and proposed and confirm(question):
        repo = proposed
    if not repo:
        raise AgentVMError("no GitHub repository was chosen for this project", hint)
    write_file(kept, f"{repo}\n")
    same = proposed.lower() == repo.lower()
    if proposed and not same:
        renamed = f"if that is its old name: git remote set-url origin https://github.com/{repo}"
        log.info(f"the agent gets {repo}, the remote says {proposed}; {renamed}; else {hint}")
    return repo, remote if same else ""


def plan_github(
    host: Host, settings: Settings, project: str, mounts: Sequence[Mount], named: str
) -> GitHub | None:
    """The repository and the token of this run; None without GitHub. What is missing raises."""
    repo, remote = choose_repository(host, settings, project, named)
    if not repo:
        return None
    policy, profile = settings.get("github-policy"), settings.get("github-profile")
    for place in spellings(policy) if policy else ():
        for folder in agents_folders(host.folders.state, place, [m.source for m in mounts]):
            problem = f"the policy {place.path} lies in {folder}, which an agent can write"
            raise AgentVMError(problem, hint=f"put it into {host.folders.config}")
    options = ["--policy", policy] if policy else []
    token = host.secrets.get(GITHUB_TOKEN, "")
    here = Path(__file__).resolve().parent
    for script in ("github_mcp_proxy.py", "github_app_token.py")[: 2 if profile else 1]:
        if not (here / script).is_file():
            raise AgentVMError(f"{script} is missing", hint=f"put it into {here}")
    if not token and profile:
        command = [sys.executable, "-I", str(here / "github_app_token.py"), "token"]
        command += ["--profile", profile, "--repo", repo, "--format", "json"]
        options += ["--token-command", shlex.join(command)]
    elif not token and settings.get("github") == "auto" and not named:
        log.progress(f"without GitHub: there is no token for {repo}")
        return None
    elif not token:
        hint = f"--github-profile NAME (see github_app_token.py --help), or set {GITHUB_TOKEN}"
        raise AgentVMError(f"there is no GitHub token for {repo}", hint)
    environ = {"GITHUB_MCP_GIT": "https://github.com", **os.environ}
    environ["GITHUB_MCP_OWNER"], _, environ["GITHUB_MCP_REPO"] = repo.partition("/")
    if token:
        environ[GITHUB_TOKEN] = token
    if settings.chosen("readonly"):
        environ["GITHUB_MCP_READONLY"] = "1" if settings.get("readonly") else "0"
    if settings.chosen("github-lockdown"):
        environ["GITHUB_MCP_LOCKDOWN"] = "1" if settings.get("github-lockdown") else "0"
    return GitHub(repo=repo, remote=remote, environ=environ, options=options)


# --- setup: the base instance ---

PROVISION_LOG = "/var/log/agent-vm-provision.log"
PROVISION_DONE = "/var/lib/agent-vm/done/20-test"
SILENCE = 300  # seconds until a VM that does not answer ssh is given up

# What installs QEMU, by the program that does it, on x86_64 and on aarch64.
QEMU_PACKAGES = {
    "apt-get": ("install -y qemu-utils openssh-client qemu-system-", "x86 ovmf",
                "arm qemu-efi-aarch64"),
    "dnf": ("install -y qemu-img openssh-clients qemu-system-", "x86 edk2-ovmf",
            "aarch64 edk2-aarch64"),
}  # fmt: skip


def missing_qemu() -> tuple[str, str]:
    """(the program that is missing, the command that installs it, "" when unknown), or ("", "")."""
    system, _, _, _, machine = os.uname()
    missing = [name for name in (f"qemu-system-{machine}", "qemu-img") if not shutil.which(name)]
    if system != "Linux" or not missing:
        return "", ""
    for program, (words, x86_64, aarch64) in QEMU_PACKAGES.items():
        if shutil.which(program):
            return missing[0], f"sudo {program} {words}{x86_64 if machine == 'x86_64' else aarch64}"
    return missing[0], ""


def setup_problems(host: Host, settings: Settings) -> list[tuple[str, str]]:
    """(problem, next step) for everything that would make a setup fail later."""
    problems = []
    if os.geteuid() == 0:
        problems.append(("running as root: limactl refuses it", "run as an ordinary user"))
    if not shutil.which("ssh"):
        problems.append(("ssh is not installed", "install your system's OpenSSH client"))
    missing, install = missing_qemu()
    if missing:
        problems.append((f"{missing} is not installed", install or "install QEMU with its tools"))
    home = host.folders.lima_home
    need = (4 if settings.get("minimal") else 10) * GIB
    free = shutil.disk_usage(next(path for path in (home, *home.parents) if path.exists())).free
    if free < need:
        problem = f"{free // GIB} GiB free in Lima's home; setup needs {need // GIB}"
        problems.append((problem, "free some space, or set LIMA_HOME to another disk"))
    return problems


def host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def preflight(host: Host, settings: Settings, yes: bool) -> None:
    """Everything that can be known before anything is created."""
    # Raises when the base instance, agent-vm-base[-NAME].XXXXXX, could have no sockets, or no run.
    least = len(base_name(settings)) - len("agent-vm-")
    clone_name("project", "0" * 6, str(host.folders.lima_home), least)
    missing, install = missing_qemu()
    if install and os.geteuid() != 0:
        log.info(f"{missing} is not installed. This installs it: {install}")
        if confirm("run it?", yes):
            with child(shlex.split(install), stdout=sys.stderr) as process:
                process.wait()
    problems = setup_problems(host, settings)
    if problems:
        more = "".join(f"\nalso: {problem} ({step})" for problem, step in problems[1:])
        raise AgentVMError(problems[0][0], hint=problems[0][1] + more)
    if kvm_is_missing():
        log.info("warning: no usable /dev/kvm: the VM is emulated, and slow (the group is kvm)")
    if not host.lima.binary:
        host.lima.binary = install_lima(host.folders, settings.get("lima-url").rstrip("/"), yes)


def install_lima(folders: Folders, url: str, yes: bool) -> str:
    """Lima's release, checked against its SHA256SUMS, unpacked in our data folder; its limactl."""
    target = folders.data / "lima"
    if not confirm(f"Lima is not installed: get it from {url} into {target}?", yes):
        raise AgentVMError("Lima is not installed", hint="install it, or setup --yes")
    system, _, _, _, machine = os.uname()
    name = f"lima-{LIMA_RELEASE}-{system}-{machine}.tar.gz"
    sums = get_url(f"{url}/SHA256SUMS").decode(errors="replace")
    lines = [line for line in sums.splitlines() if line.endswith((f" {name}", f"*{name}"))]
    if not lines:
        raise AgentVMError(f"{url}/SHA256SUMS does not name {name}", hint="install Lima by hand")
    log.step(f"getting {name}")
    archive = get_url(f"{url}/{name}")
    if hashlib.sha256(archive).hexdigest() != lines[0].split()[0].lower():
        problem = f"{name} does not have the checksum of {url}/SHA256SUMS"
        raise AgentVMError(problem, hint="try another --lima-url")
    unpack(archive, target)
    return shutil.which("limactl") or ""


def create_options(settings: Settings) -> list[str]:
    """What `limactl create` is told besides the template."""
    # The default sizes are at most half of the host's, and that is said.
    options = [f"--disk={settings.get('disk')}"]
    options += [f"--vm-type={settings.get('vm-type')}"] if settings.chosen("vm-type") else []
    for name, total in (("cpus", os.cpu_count() or 1), ("memory", host_memory() // GIB)):
        size, half = settings.get(name), max(1, total // 2)
        if size > half and not settings.chosen(name):
            log.info(f"{name}: {half}, half of this host's (the default is {size})")
            size = half
        options.append(f"--{name}={size}")

    registry = settings.get("npm-registry")
    if not registry:
        with contextlib.suppress(argparse.ArgumentTypeError):  # one with a password stays here
            registry = web_address(first_line_of("npm", "config", "get", "registry"))
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG", "")
    params = {
        "minimal": "true" if settings.get("minimal") else "",
        "aptMirror": settings.get("apt-mirror"),
        "npmRegistry": registry,
        "locale": "" if settings.get("template") else locale,
    }
    parts = [".mountTypesUnsupported = []"]
    parts += [f".param.{name} = {yq_value(value)}" for name, value in params.items() if value]
    if settings.get("image"):
        location = settings.get("image")
        arch = {"arm64": "aarch64"}.get(os.uname().machine, os.uname().machine)
        parts.append(f".images = {yq_value([{'location': location, 'arch': arch}])}")
    certificates = [Path(path).read_text(errors="replace") for path in settings.get("ca-cert")]
    if not all("-----BEGIN CERTIFICATE-----" in pem for pem in certificates):
        raise AgentVMError("--ca-cert: not every file holds a PEM certificate")
    if certificates:
        parts.append(f".caCerts.certs = (.caCerts.certs // []) + {yq_value(certificates)}")
    return [*options, "--set", " | ".join(parts)]


class ProvisionLog:
    """The guest's provisioning log, whose steps are shown while `limactl start` waits."""

    def __init__(self, guest: Guest) -> None:
        self.ssh = [*guest.ssh, *OWN_CONNECTION, guest.instance.hostname]
        self.lines: list[str] = []
        self.reached = self.said = time.monotonic()

    def show(self) -> None:
        """Show what has come since the last call; give up when ssh has not answered for long."""
        new = f"tail -n +{len(self.lines) + 1} {PROVISION_LOG}"
        finished = captured([*self.ssh, new], timeout=20)
        now = time.monotonic()
        if finished.status not in (None, SSH_FAILED):
            self.reached = now
        elif now - self.reached > SILENCE:
            problem = f"the VM has not answered ssh for {SILENCE} s"
            raise AgentVMError(problem, "is the image one of Debian 13 with cloud-init?")
        elif now - self.said > 60:
            log.step("waiting for the VM to answer ssh")
            self.said = now
        whole_lines = finished.out.split("\n")[:-1] if finished.status == 0 else []
        for line in whole_lines:
            if line.startswith("agent-vm: "):
                log.step(line[len("agent-vm: ") :])
            elif log.verbose:
                print(line, file=sys.stderr)
        self.lines += whole_lines


def boot_for_setup(host: Host, guest: Guest, provision_log: ProvisionLog) -> None:
    """Start it and wait for provisioning; Lima itself gives up on it after ten minutes."""
    limit = 9 * host.lima.timeout
    deadline = time.monotonic() + limit
    try:
        host.lima.start(guest.instance.name, limit, meanwhile=provision_log.show)
    except AgentVMError as error:
        # "boot scripts must have finished" is polled 200 times (Lima's hostagent/requirements.go).
        while guest.run("test -s /run/lima-boot-done").status != 0:
            if time.monotonic() > deadline or guest.run("true").status:
                raise boot_failure(host, guest.instance.name, error) from error
            provision_log.show()
            time.sleep(5)
    provision_log.show()


def provision(host: Host, settings: Settings, name: str, hooks: Sequence[Path]) -> list[str]:
    """Create, boot, provision, test and stop the instance; the fall-backs that it noted."""
    log.step(f"creating {name} (Lima gets the disk image on the first time)")
    template = settings.get("template") or str(lima_folder(host.folders) / "agent-vm.yaml")
    host.lima.create(name, template, *create_options(settings))
    instance = host.lima.find(name)
    if instance is None or instance.mounts or instance.extras:
        faults = "; it ".join(isolation_faults(instance, ()) if instance else ["is not there"])
        hint = f"look into the template and {host.folders.lima_home}/_config"
        raise AgentVMError(f"{name} would not be confined: it {faults}", hint)
    guest = Guest(instance)
    provision_log = ProvisionLog(guest)
    log.step(f"starting {name}")
    boot_for_setup(host, guest, provision_log)
    # Provisioning may have replaced the running kernel; without its modules no Docker starts. The
    # tests wait for the next boot.
    if guest.run("test -d /lib/modules/$(uname -r)/kernel").status:
        log.step("restarting it with its new kernel")
        host.lima.tell("stop", name)
        boot_for_setup(host, guest, provision_log)
    # Lima does not report a script that failed: look for the marker of the last one. No line at
    # all is a template of the user's own.
    lines, kept = provision_log.lines, host.folders.state / "logs" / "setup.log"
    write_file(kept, "\n".join(lines) + "\n")
    if lines and guest.run(f"test -e {PROVISION_DONE}").status:
        errors = [line for line in lines if line.startswith("agent-vm: error: ")]
        cause = errors[0][len("agent-vm: error: ") :] if errors else "no script says why"
        end = "\n".join([*lines[-15:], f"--- all of it: {kept}"])
        raise AgentVMError(f"provisioning failed: {cause}", details=end)
    for path in hooks:
        log.step(f"running {path}")
        run_hook(guest, path, mounted=False)
    notes = guest.run("cat /var/lib/agent-vm/notes 2> /dev/null").out.splitlines()
    finish = (lima_folder(host.folders) / "finish.sh").read_text()
    registries = guest.run("bash -s", finish)
    write_file(instance.dir / REGISTRIES, registries.out)
    log.step("stopping it")
    host.lima.tell("stop", name)
    folder = saved_folder(host.folders, name)
    make_private_folder(folder)
    info = ("qemu-img", "info", "--output=json", str(instance.dir / "disk"))
    if '"format": "qcow2"' not in captured(info).out:
        why = "qemu-img finds no disk in QEMU's format"
    else:
        why = save(host, instance) if settings.get("resume") else "setup --no-resume"
        why = freeze(host, instance) or why
    if why:
        notes.append(f"VMs of it are booted, not resumed: {why}")
    else:  # last, as power may be lost at any moment
        write_file(folder / "saved.json", json.dumps(stamps(host, instance)))
    host.lima.tell("protect", name)
    return notes


def save(host: Host, base: Instance) -> str:
    """Boot it once more, as a run does, and save the VM as it runs; why that is not to be had."""
    log.step("booting it to save its state")
    folder = saved_folder(host.folders, base.name)
    try:
        environ = qemu_environment(host, base, True, (), saved=str(folder), resume=False) or {}
        # Lima would write the host's proxies, with their passwords, into what is saved.
        plain = {name: value for name, value in environ.items() if not PROXY(name)}
        host.lima.start(base.name, environ=plain)
        guest, scripts = Guest(base), lima_folder(host.folders)
        for name in SAVED:
            command = WAKER if name == "guest/wake.py" else "sudo bash -s"
            done = guest.run(command, (scripts / name).read_text(), timeout=600)
            if done.status:
                return f"it does not settle: {done.out.strip()}"
        captured([*guest.ssh, "-O", "exit", base.hostname])  # its end must not go on in each clone
        time.sleep(5)
        to = {"uri": f"file:{folder}/state"}
        qmp(base.dir, MIGRATION, {"execute": "migrate", "arguments": to})
        status = "setup"
        while status in ("setup", "active", "device"):
            time.sleep(0.1)
            status = qmp(base.dir, {"execute": "query-migrate"})[0].get("status")
        if status != "completed":
            return f"QEMU could not save it ({status})"
        qmp(base.dir, {"execute": "quit"})
        for name in ("memory", "state"):
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
    except (AgentVMError, OSError, *MALFORMED) as error:
        return str(boot_failure(host, base.name, error))
    finally:
        host.lima.tell("stop", base.name, "-f")
    return ""


def remove_unused_disks(host: Host) -> None:
    """Frozen disks, with what was saved, that no instance's disk names and no setup works on."""
    home = host.folders.lima_home
    for folder in (home / "_agent-vm").glob("*"):
        if (home / folder.name).exists() or host.leases.path(folder.name).exists():
            continue
        try:
            if not is_below(home, folder.name):
                remove_path(folder)
        except OSError as error:
            log.info(f"warning: {folder} stays for now: {error}")


def is_below(home: Path, name: str) -> bool:
    """Whether a disk in Lima's home names it: QEMU writes at its beginning what is below it."""
    for disk in home.glob("*/*disk"):
        with open(disk, "rb") as file:
            if os.fsencode(name) in file.read(4096):
                return True
    return False


def build_base(host: Host, settings: Settings, args: argparse.Namespace) -> None:
    """Build an instance, test it, and only then let the base name mean it."""
    preflight(host, settings, args.yes)
    own_hook = Path(os.path.expanduser("~/.claude-vm.setup.sh"))
    hooks = readable_hooks(own_hook, host.folders.config / "setup.sh")
    name = base_name(settings)
    instance, oldest = f"{name}.{os.urandom(3).hex()}", ""
    host.leases.take(instance)
    try:
        notes = provision(host, settings, instance, hooks)
        with signals.held(), file_lock(host.folders.state / "bases.lock"):
            current, oldest = read_base(host.folders, name)
            if oldest:  # who is killed from here on leaves it to the next command
                host.leases.take(oldest)
            write_base(host.folders, name, current=instance, previous=current)
            host.leases.drop(instance)
    finally:
        with signals.held():
            for unused in {instance, oldest} - {"", *base_roles(host.folders)}:
                remove_instance(host, unused)
    log.step(f"{name} is ready" + ("; setup --rollback goes back" if current else ""))
    if not find_credential(host):
        log.info("no credential yet: `claude setup-token` makes one, `agent-vm auth set` stores it")
    for note in notes:
        log.info(f"note: {note}")


# --- commands ---


def cmd_setup(args: argparse.Namespace) -> int:
    host, settings = open_host(args, need_lima=args.rollback, collect=True)
    if not args.rollback:
        build_base(host, settings, args)
        return 0
    name = base_name(settings)
    with file_lock(host.folders.state / "bases.lock"):
        current, previous = read_base(host.folders, name)
        if not previous or host.lima.find(previous) is None:
            raise AgentVMError(f"there is no previous {name} to go back to", hint="agent-vm list")
        write_base(host.folders, name, current=previous, previous=current)
    log.info(f"{name} is the previous one again: {previous}")
    return 0


def cmd_run(args: argparse.Namespace) -> int:
    return start_run(args, [*AGENT, *args.command], agent=True)


def cmd_shell(args: argparse.Namespace) -> int:
    return start_run(args, args.command or ["bash", "-l"], agent=False)


def say_what_git_lacks(project: str) -> None:
    """In the guest: its git is Debian 13's, 2.47, and has what is mounted."""
    mounted = worktree_git_dir(project)
    common = mounted or os.path.realpath(os.path.join(project, ".git"))
    if os.path.isfile(common):
        common = os.path.realpath(os.path.join(project, read_line(common).partition("gitdir: ")[2]))
    config = os.path.join(common, "config")
    known = last_bytes(Path(config), 1 << 16).lower() if os.path.isfile(config) else b""
    is_there = mounted or inside(real_place(common), real_place(project))
    if os.path.lexists(".git") and not is_there:
        log.info(f"warning: git cannot work in the VM: {common} is not mounted")
    if b"relativeworktrees" in known:
        log.info("warning: git cannot work in the VM: it knows no extensions.relativeWorktrees")
    if re.search(rb"gpgsign\s*=\s*true", known):
        log.info("commits are not signed in the VM: no key is there")


def check_room(host: Host) -> None:
    free = shutil.disk_usage(host.folders.lima_home).free
    if free < 2 * GIB:  # QEMU stops a VM whose disk cannot grow, without a word
        raise AgentVMError(f"{free / GIB:.1f} GiB free in Lima's home: a VM needs 2", "free some")


def start_run(args: argparse.Namespace, argv: Sequence[str], agent: bool) -> int:
    host, settings = open_host(args, need_lima=False, collect=True)
    try:
        project = os.getcwd()  # without symlinks: the same path must be found again by --resume
    except OSError as error:
        raise AgentVMError("the current directory does not exist any more") from error
    readonly, more = settings.get("readonly"), settings.get("mount")
    mounts = plan_mounts(host, project, readonly, more, args.force_mount)
    say_what_git_lacks(project)
    hooks = readable_hooks(host.folders.config / "runtime.sh", Path(project, PROJECT_HOOK))
    credential = find_credential(host)
    # Not `git -C project`: its config, which the agent writes, can include any file of the host.
    ask_git = ("git", "config", "--global", "--includes", "--get-regexp", r"^user\.(name|email)$")
    rows = [line.partition(" ") for line in captured(ask_git).out.splitlines()]
    localtime = os.path.realpath("/etc/localtime").rpartition("/zoneinfo/")[2]
    zone = os.environ.get("TZ", "").lstrip(":") or localtime
    name = base_name(settings)
    question = f"there is no base instance {name} yet: set it up now?"
    if not read_base(host.folders, name)[0] and confirm(question, args.yes):
        build_base(host, settings, args)
    base = usable_base(host, name)
    chosen = [f"--{key}={settings.get(key)}" for key in ("cpus", "memory") if settings.chosen(key)]
    check_room(host)
    github = plan_github(host, settings, project, mounts, args.repo or "")
    broker = credential is not None and settings.get("credential") == "broker"
    network = plan_network(settings, base, () if broker or not agent else ["anthropic"])
    variables = guest_variables(host, settings, network)
    upstream = variables.pop("ANTHROPIC_BASE_URL", "") if broker else ""
    if "@" in upstream:
        raise AgentVMError("ANTHROPIC_BASE_URL holds a password", "--credential guest passes it on")
    mode = NETWORK_BRIEFINGS.get(network.mode, "")
    ports = "".join(f" host.lima.internal:{port} is open." for port in network.host_ports)
    texts = lima_folder(host.folders) / "guest"
    briefing = (texts / "network.md").read_text().format(mode=mode, ports=ports) if mode else ""
    if github:
        briefing += (texts / "github.md").read_text().format(repo=github.repo)
    plan = Plan(
        project=project,
        argv=argv,
        mounts=mounts,
        sizes=[size for size in chosen if size not in base.sizes],
        forward=settings.get("forward"),
        keep=args.keep,
        agent=agent,
        variables=variables,
        credential=credential,
        broker=broker,
        boot="--boot" if args.boot else "",
        upstream=upstream,
        network=network,
        hooks=hooks,
        git_settings={
            **GIT_SETTINGS,
            **{key: value for key, _, value in rows if value.isprintable() and value},
        },
        zone=zone if re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", zone) else "",
        github=github,
        briefing=briefing,
    )
    began = time.time()
    try:
        status = run(host, base, plan)
    except NotResumed as error:
        signals.closing = False
        with signals.held():  # whose end is that of the run if a signal has come meanwhile
            log.detail(f"booting it, as it could not be resumed: {error}")
        status = run(host, base, plan._replace(boot="it could not be resumed"))
    log.mark("deleted")
    if args.timing:
        log.info(f"timing: {json.dumps(log.phases)}")
    if agent and not readonly and os.isatty(0) and os.isatty(2):
        # Claude Code has just said another command, which would run it on the host.
        transcripts = (host.folders.state / "sessions" / session_key(project)).glob("*/*.jsonl")
        with contextlib.suppress(OSError):  # an agent may have put anything there
            newest = max(transcripts, key=changed, default=Path("none.jsonl"))
            if re.fullmatch(r"[0-9a-f-]{36}", newest.stem) and changed(newest) >= began:
                log.info(f"resume this session: claude-vm --resume {newest.stem}")
    return status


def disk_usage(folder: Path) -> int:
    """Bytes that the files of a folder occupy; sparse disks count what they hold."""
    with contextlib.suppress(OSError):
        return sum(path.lstat().st_blocks * 512 for path in folder.iterdir())
    return 0


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def cmd_list(args: argparse.Namespace) -> int:
    host, _ = open_host(args, collect=True)
    leases = {lease.name: lease for lease in host.leases.all()}
    roles = base_roles(host.folders)
    table = [("NAME", "STATUS", "ROLE", "AGE", "DISK", "PROJECT")]
    for instance in host.lima.list():
        if not is_base(instance.name) and not is_clone(instance.name):
            continue
        lease, role = leases.get(instance.name), roles.get(instance.name, "")
        if not role and lease:
            busy = "building" if is_base(instance.name) else "running"
            role = "kept" if lease.keep else "orphan" if host.leases.is_orphan(lease) else busy
        born = lease.created if lease else changed(instance.dir / "lima-version") or time.time()
        row: dict[str, Any] = {
            "name": instance.name,
            "status": instance.status,
            "role": role or "unused",
            "project": lease.project if lease else "",
            "age_seconds": round(time.time() - born),
            "disk_bytes": disk_usage(instance.dir)
            + disk_usage(saved_folder(host.folders, instance.name)),
        }
        if args.json:
            print(json.dumps(row))
        age, size = f"{row['age_seconds'] / 86400:.1f}d", f"{row['disk_bytes'] / GIB:.1f} GiB"
        cells = (row["name"], row["status"], row["role"], age, size, printable(row["project"]))
        table.append(cells)
    if not args.json:
        print_table(table)
    return 0


def instance_named(host: Host, name: str) -> Instance:
    if not is_clone(name) and not is_base(name):
        raise AgentVMError(f"{name!r} is not an instance of agent-vm", hint="agent-vm list")
    instance = host.lima.find(name)
    if instance is None:
        raise AgentVMError(f"instance {name} does not exist", hint="agent-vm list")
    return instance


def refuse_in_use(host: Host, name: str, verb: str, force: bool) -> None:
    for lease in host.leases.all():
        if lease.name == name and not (force or lease.keep or host.leases.is_orphan(lease)):
            problem = f"{name} is in use by process {lease.pid}"
            raise AgentVMError(problem, hint=f"end that run, or: agent-vm {verb} --force {name}")


def cmd_start(args: argparse.Namespace) -> int:
    """Start a kept VM again, with the folders that it had."""
    host, _ = open_host(args)
    instance = instance_named(host, args.instance)
    if is_base(instance.name):
        raise AgentVMError(f"{instance.name} is a base instance: it is cloned", "agent-vm shell")
    refuse_in_use(host, instance.name, "stop", False)
    if instance.status != "Stopped":
        hint = f"agent-vm stop {instance.name}, if it is to have its own network"
        raise AgentVMError(f"{instance.name} is {instance.status.lower()}", hint)
    try:
        kept, problem = json.loads((instance.dir / "run.json").read_text()), ""
        slots, places, is_open = kept["slots"], kept["places"], kept["mode"] == "open"
        planned = [{"location": path, "writable": writable} for path, writable in slots]
    except (OSError, *MALFORMED) as error:
        raise AgentVMError(f"{instance.name} was not kept by a run", "agent-vm list") from error
    ours = f"{host.folders.state}/sessions/"  # where no agent makes links
    for path, _ in slots:
        if os.path.realpath(path) != path and not path.startswith(ours):
            problem = f"would mount {path}, which leads elsewhere now"
    problem = problem or running_above(host, [Mount(real_place(path), path) for path, _ in slots])
    if problem:
        problem = f"{instance.name} would not be confined: it {problem}"
        raise AgentVMError(problem, f"agent-vm rm {instance.name}")
    check_room(host)
    check_confined(host, instance, [] if instance.vm_type == "qemu" else planned, is_open)
    try:
        host.lima.start(instance.name, environ=qemu_environment(host, instance, is_open, slots))
    except AgentVMError as error:
        raise boot_failure(host, instance.name, error) from error
    waker = (lima_folder(host.folders) / "guest/wake.py").read_text()
    bound = Guest(instance).run(f"{WAKER} {shlex.quote(json.dumps(places))}", waker)
    if bound.status:
        host.lima.tell("stop", instance.name, "-f")
        raise AgentVMError("its folders could not be mounted", details=bound.out)
    without = "" if is_open else " (it has no network: its run, which held that, is over)"
    log.info(f"reach it: limactl shell {instance.name}{without}")
    return 0


def cmd_stop(args: argparse.Namespace) -> int:
    host, _ = open_host(args)
    instance = instance_named(host, args.instance)
    refuse_in_use(host, instance.name, "stop", args.force)
    if instance.status != "Stopped":
        host.lima.tell("stop", instance.name)
    return 0


def cmd_rm(args: argparse.Namespace) -> int:
    host, _ = open_host(args)
    instance = instance_named(host, args.instance)
    if is_base(instance.name) and not args.force:
        problem = f"{instance.name} is a base instance"
        raise AgentVMError(problem, f"agent-vm rm --force {args.instance}")
    refuse_in_use(host, instance.name, "rm", args.force)
    # First: whatever becomes of the deletion, the next command goes on with it.
    host.leases.take(instance.name)
    with file_lock(host.folders.state / "bases.lock"):
        name = instance.name.partition(".")[0]
        names = read_base(host.folders, name)
        if instance.name in names:
            current, previous = ("" if one == instance.name else one for one in names)
            write_base(host.folders, name, current, previous)
    return 0 if remove_instance(host, instance.name) else 1


def cmd_gc(args: argparse.Namespace) -> int:
    host, _ = open_host(args)
    orphans = [lease.name for lease in host.leases.orphans()]
    found = orphans if args.dry_run else collect_garbage(host, wait=True)
    for name in found:
        print(name)
    if not found and not orphans:
        log.info("there is nothing to remove")
    return 1 if host.leases.orphans() and not args.dry_run else 0


def cmd_log(args: argparse.Namespace) -> int:
    """What the sides of a run decided, as they wrote it; the newest run unless one is named."""
    host, _ = open_host(args, need_lima=False)
    files = sorted((host.folders.state / "audit").glob("*.jsonl"), key=changed)
    chosen = [path for path in files if args.run in ("", path.stem)]
    if not chosen:
        hint = f"there are: {' '.join(path.stem for path in files) or 'none'}"
        raise AgentVMError(f"no audit of {args.run or 'any run'}", hint)
    log.info(chosen[-1].stem)
    print(chosen[-1].read_text(errors="replace"), end="")
    return 0


def cmd_forget(args: argparse.Namespace) -> int:
    """Remove what is kept of the project: its transcripts, Claude's memory, its repository."""
    host, _ = open_host(args, need_lima=False, collect=True)
    project, key = os.getcwd(), session_key(os.getcwd())
    if not (host.folders.state / "sessions" / key).is_dir():
        raise AgentVMError("nothing is kept of this directory", "cd to where the agent was run")
    for lease in host.leases.all():
        if lease.project == project:
            hint = f"agent-vm rm {lease.name}" if lease.keep else "end that run first"
            raise AgentVMError(f"an agent works on this project, in {lease.name}", hint)
    remove_path(host.folders.state / "sessions" / key)
    remove_path(host.folders.state / "github" / key)
    return 0


def cmd_auth(args: argparse.Namespace) -> int:
    host, settings = open_host(args, need_lima=False)
    path = host.folders.config / "credential"
    if args.action == "set":
        given = pasted() if os.isatty(0) else sys.stdin.read(10_000)
        name, value = recognised_credential(given)
        make_private_folder(path.parent)
        write_file(path, f"{name}={value}\n")
        log.info(f"stored as {name} in {path}")
        return 0
    if args.action == "clear":
        remove_path(path)
        return 0
    credential = find_credential(host)
    if not credential:
        print("no credential: agent-vm auth set")
        return 1
    broker = settings.get("credential") == "broker"
    place = "it stays on the host" if broker else "it enters the guest"
    print(f"{credential.name} from {credential.origin}; {place}")
    return 0


def pasted() -> str:
    """All lines of what is typed without an echo, of which getpass would discard all but one."""
    import termios

    given = b""
    with kept_terminal(tty=True):
        mode = termios.tcgetattr(0)
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(0, termios.TCSADRAIN, mode)
        log.info("paste the token of `claude setup-token`, or an API key (it is not shown)")
        # In short waits: a signal that comes right before a read would wait with it.
        while not select.select([0], [], [], 0.2)[0]:
            pass
        while select.select([0], [], [], 0.2)[0] and (line := os.read(0, 10_000)):
            given += line
    return given.decode(errors="replace")


def recognised_credential(words: str) -> tuple[str, str]:
    """The (variable, credential) in what `claude setup-token` prints, an export line, or a key."""
    tokens: list[str] = []
    is_open = False  # the last one reached the end of its line
    for line in re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", words).splitlines():
        line = line.strip("\"'│| \t")
        begun = re.findall(r"sk-ant-(?:oat|api)[\w-]*", line, re.ASCII)
        if begun:
            tokens += begun
            is_open = line.endswith(begun[-1])
        elif is_open and len(tokens[-1]) < TOKEN_LENGTH and re.fullmatch(r"[\w-]+", line, re.ASCII):
            tokens[-1] += line  # a terminal wraps what is longer than it is wide
    found = {token for token in tokens if len(token) >= 80}
    if len(found) != 1:
        hint = "run `claude setup-token` on any machine and paste the token that it prints"
        problem = "stdin holds no whole OAuth token (sk-ant-oat…) or API key (sk-ant-api…), or two"
        raise AgentVMError(problem, hint)
    token = found.pop()
    return CREDENTIALS[1] if token.startswith("sk-ant-oat") else CREDENTIALS[2], token


def cmd_doctor(args: argparse.Namespace) -> int:
    broken: AgentVMError | None = None
    try:
        host, settings = open_host(args, need_lima=False)
        list(map(settings.find, SETTINGS))
    except AgentVMError as error:
        host, settings = open_host(args, need_lima=False, given=False)
        broken = error
    failed = False
    for name, look in looks(host, settings, broken).items():
        try:
            level, message, fix = "ok", look(), ""
        except AgentVMError as error:
            needed = name not in ("network", "leftovers")
            level, message, fix = "fail" if needed else "warn", str(error), error.hint
        failed = failed or level == "fail"
        if args.json:
            print(json.dumps({"name": name, "level": level, "message": message, "fix": fix}))
        else:
            print(f"{level:<5} {name}: {message}" + (f"\n      fix: {fix}" if fix else ""))
    if args.verbose and not args.json:
        rows = [("SETTING", "VALUE", "FROM")]
        for name in SETTINGS:
            value, origin = settings.find(name)
            rows.append((name, shown_setting(name, value) or "-", origin))
        places = {"template": lima_folder(host.folders), **host.folders._asdict()}
        rows += [(name, str(path), "") for name, path in places.items()]
        print_table(rows)
    return 1 if failed else 0


def looks(
    host: Host, settings: Settings, broken: AgentVMError | None
) -> dict[str, Callable[[], str]]:
    """What doctor looks at: each says what is well, or raises what is not and what mends it."""

    def all_settings() -> str:
        if broken:
            raise broken
        return " ".join(filter(settings.chosen, SETTINGS)) or "none"

    def ready_host() -> str:
        for problem, fix in setup_problems(host, settings):
            raise AgentVMError(problem, fix)
        kvm = ", no usable /dev/kvm: VMs are emulated and slow" if kvm_is_missing() else ""
        return f"{os.cpu_count()} CPUs, {host_memory() / GIB:.0f} GiB memory{kvm}"

    def lima() -> str:
        if not host.lima.binary:
            raise AgentVMError("limactl is not installed", "agent-vm setup installs it")
        printed = first_line_of(host.lima.binary, "--version") or "no version"
        return f"{printable(printed[:80])} ({host.lima.binary})"

    def base_instance() -> str:
        name = usable_base(host, base_name(settings)).name
        saved = saved_folder(host.folders, name)
        how = "resumed" if (saved / "saved.json").exists() else "booted"
        return f"{name}; VMs are {how}, from {disk_usage(saved) / GIB:.1f} GiB"

    def network() -> str:
        base = usable_base(host, base_name(settings))
        if base.vm_type != "qemu":
            fix = "setup --vm-type qemu"
            raise AgentVMError("open, your LAN and this host's ports too: no QEMU to close it", fix)
        return str(settings.get("network") or "internet")

    def leftovers() -> str:
        leases = {lease.name for lease in host.leases.all()}
        for path in sorted(host.folders.lima_home.glob("agent-vm-*")):
            if path.name not in leases | base_roles(host.folders).keys():
                raise AgentVMError(f"nothing names {path.name}", f"agent-vm rm --force {path.name}")
        for lease in host.leases.orphans():
            raise AgentVMError(f"{lease.name}: its run is gone", "agent-vm gc")
        return "none"

    return {
        "settings": all_settings,
        "host": ready_host,
        "lima": lima,
        "base instance": base_instance,
        "network": network,
        "leftovers": leftovers,
    }


def shown_setting(name: str, value: Any) -> str:
    if name == "env":  # a value may be a secret
        return " ".join(item.partition("=")[0] for item in value)
    if name == "mount":
        return " ".join(f"{mount.source.path}:{mount.target}" for mount in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def cmd_shell_init(args: argparse.Namespace) -> int:
    """Shell functions; all that follows `claude-vm` is the agent's, so no flag of ours clashes."""
    # -I: a PYTHONPATH into the project must not choose the modules that run on the host.
    # Nor a virtual environment's python3, which an agent may have made.
    script = shlex.join([os.path.realpath(sys.executable), "-I", os.path.realpath(__file__)])
    form = "function {}; {} $argv; end" if args.shell == "fish" else '{}() {{ {} "$@"; }}'
    print(form.format("agent-vm", script))
    print(form.format("claude-vm-setup", f"{script} setup"))
    print(form.format("claude-vm", f"{script} run --"))
    print(form.format("claude-vm-shell", f"{script} shell"))
    return 0


COMPLETION = """\
if [ -n "${{ZSH_VERSION-}}" ]; then autoload -Uz compinit bashcompinit; compinit; bashcompinit; fi
complete -o default -W '{}' agent-vm"""


def cmd_completion(args: argparse.Namespace) -> int:
    """For bash, and for zsh by its bashcompinit: the verbs, and the options of them all."""
    usages = " ".join(sub.format_usage() for sub in args.verbs.values())
    options = sorted(set(re.findall(r"--[a-z-]+", usages)))
    print(COMPLETION.format(" ".join([*args.verbs, *options])))
    return 0


# --- help, parser, main ---

EPILOG = """\
examples:
  cd my-project && agent_vm.py run          the agent in this directory, in a VM of its own
  agent_vm.py shell-init >> ~/.bashrc       defines claude-vm, claude-vm-shell, claude-vm-setup

environment:
  CLAUDE_CODE_OAUTH_TOKEN, ANTHROPIC_API_KEY, ANTHROPIC_AUTH_TOKEN  the model's: with the broker
                                              it stays on the host
  GITHUB_MCP_TOKEN                            the GitHub proxy's: it stays on the host
  ANTHROPIC_BASE_URL                          where the broker, or without one the agent, finds it
  ANTHROPIC_CUSTOM_HEADERS, ANTHROPIC_MODEL, LANG, COLORTERM …  passed to the agent
  AGENT_VM_<SETTING>                          a setting, e.g. AGENT_VM_MEMORY=16
  LIMA_HOME, XDG_STATE_HOME, XDG_CONFIG_HOME, XDG_DATA_HOME

exit status:
  run and shell: the guest's command's; 125 when agent-vm failed; 130 after Ctrl-C, 128 + N after
  signal N; other commands: 0 ok, 1 failed, 2 usage; setup fails with 125
"""


def add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Flags for settings; absent flags are None, so that environment and config are asked."""
    for name in names:
        setting = SETTINGS[name]
        shown = shown_setting(name, setting.default)
        options: dict[str, Any] = {"type": setting.parse, "metavar": setting.metavar}
        if setting.many:
            options["action"] = "append"
        if setting.parse in (yes_or_no, yes_no_or_auto):
            options = {"action": argparse.BooleanOptionalAction, "default": None}
        explained = f"{setting.help} (default {shown})" if shown else setting.help
        parser.add_argument(f"--{name}", help=explained, **options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agent-vm", description=__doc__, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    version = f"agent-vm {__version__}, Python {sys.version.split()[0]}"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    def flag(sub: argparse.ArgumentParser, name: str, summary: str) -> None:
        sub.add_argument(name, action="store_true", help=summary)

    def verb(func: Callable[..., int], summary: str, failure: int = 1) -> argparse.ArgumentParser:
        name = func.__name__.replace("cmd_", "").replace("_", "-")
        sub = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("-v", "--verbose", action="store_true", help="show commands and output")
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress messages")
        sub.set_defaults(func=func, failure=failure)
        return sub

    setup = verb(cmd_setup, "build the base instance, or build it anew", failure=EXIT_OURS)
    add_settings(setup, SETUP_SETTINGS)
    flag(setup, "--yes", "install what is missing without asking")
    flag(setup, "--rollback", "go back to the previous base instance")
    for sub in (
        verb(cmd_run, "run Claude Code on the current directory in a VM of its own", EXIT_OURS),
        verb(cmd_shell, "a shell, or a command, in a VM of its own", EXIT_OURS),
    ):
        add_settings(sub, RUN_SETTINGS)
        repo_help = "give the agent this GitHub repository; kept for the project"
        sub.add_argument("--repo", type=owner_and_repo, metavar="OWNER/REPO", help=repo_help)
        flag(sub, "--keep", "keep the VM afterwards")
        flag(sub, "--boot", "boot the VM, do not resume it")
        flag(sub, "--timing", "say at the end when what was reached, in seconds, as JSON")
        flag(sub, "--force-mount", "mount a directory that is refused otherwise")
        flag(sub, "--yes", "set up without asking when there is no base instance")
        words = sub.add_argument("command", nargs=argparse.REMAINDER, help="passed on untouched")
        words.metavar = "[--] ARG"
    flag(verb(cmd_list, "list base instances and clones"), "--json", "one JSON object a line")
    verb(cmd_start, "start a kept VM again").add_argument("instance")
    for sub in (verb(cmd_stop, "stop an instance"), verb(cmd_rm, "delete an instance")):
        sub.add_argument("instance")
        flag(sub, "--force", "also one in use, or a base instance")
    flag(verb(cmd_gc, "remove VMs whose run is gone"), "--dry-run", "only say which")
    summary = "check the host, Lima and the base instance; -v: settings"
    flag(verb(cmd_doctor, summary), "--json", "one JSON object a line")
    audit = verb(cmd_log, "what a run did on GitHub and in the network, one JSON object a line")
    audit.add_argument("run", nargs="?", default="", help="a VM's name (default: the newest)")
    verb(cmd_forget, "remove what is kept of this directory's project, its transcripts above all")
    auth = verb(cmd_auth, "store, show or remove the agent's credential")
    auth.add_argument("action", choices=("set", "status", "clear"), help="set reads it from stdin")
    shell_init = verb(cmd_shell_init, "print claude-vm and its companions, for your shell's file")
    shell_init.add_argument("shell", nargs="?", default="bash", choices=("bash", "zsh", "fish"))
    verb(cmd_completion, "print completion for bash and zsh").set_defaults(verbs=verbs.choices)
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """argparse, except that everything after the first `--` is taken as it is (run, shell)."""
    ours = next(
        (at for at, word in enumerate(argv) if not re.fullmatch("-[vq]|--verbose|--quiet", word)), 0
    )
    argv = [*argv[ours : ours + 1], *argv[:ours], *argv[ours + 1 :]]
    at = argv.index("--") if "--" in argv else len(argv)
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv[:at])
    rest = list(argv[at:])
    if unknown:
        own = "; the agent's own go after --" if hasattr(args, "command") else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{own}")
    if hasattr(args, "command"):
        args.command = [*args.command, *(rest if args.command else rest[1:])]
    elif rest:
        parser.error("-- is for run and shell")
    return args


def open_standard_streams() -> None:
    """A closed stdin, stdout or stderr would give its number to the next file that is opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def report(error: AgentVMError) -> None:
    hint = error.hint
    # Who types the script's path has no function agent-vm; shell-init's run it with -I.
    if "agent-vm " in hint and not sys.flags.isolated:
        hint += f"  (agent-vm is: python3 {shlex.quote(sys.argv[0])})"
    lines = [error.details, f"agent-vm: error: {error}", hint and f"agent-vm: hint: {hint}"]
    shown = [printable(line) for text in lines if text for line in text.split("\n")]
    with contextlib.suppress(OSError):
        print("\n".join(shown), file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    open_standard_streams()
    failure = EXIT_OURS
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        args.secrets = {name: os.environ.pop(name) for name in SECRETS if name in os.environ}
        log.verbose, log.quiet, failure = args.verbose, args.quiet, args.failure
        signals.catch()
        status = int(args.func(args))
        sys.stdout.flush()
        return status
    except AgentVMError as error:
        report(error)
    except Interrupted as error:
        return error.status
    except BrokenPipeError:  # the reader of our stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (OSError, UnicodeError) as error:
        # A full disk, a missing directory: the host's fault, not a bug.
        problem = str(error)
        if isinstance(error, OSError) and error.filename:
            problem = f"cannot use {error.filename}: {error.strerror}"
        report(AgentVMError(problem))
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # Python's shutdown has its status
    return int(failure)


# BEGIN GENERATED by "make embed"
EMBEDDED: dict[str, str] = {
    "agent-vm.yaml": r"""# Try it: limactl start --tty=false --name=try lima/agent-vm.yaml
#
# The base instance of agent-vm: Debian 13 with Claude Code and what it works with. No directory of
# the host is mounted here; a clone mounts the project. Values come from `param`: limactl start
# --set '.param.minimal = "true"' ...

minimumLimaVersion: 2.2.0

base: template:_images/debian-13

mounts: []

containerd:
  system: false
  user: false

# Nothing of the user's own SSH set-up goes in: neither the agent nor the keys of ~/.ssh.
ssh:
  forwardAgent: false
  loadDotSSHPubKeys: false

# Of the guest's own services, mDNS and LLMNR are not for the host's loopback; nor are the ports of
# 127.0.0.1 by which the guest reaches the sides of its run.
portForwards:
- guestIP: 0.0.0.0
  guestIPMustBeZero: false
  guestPortRange: [5353, 5355]
  proto: any
  ignore: true
- guestIP: 0.0.0.0
  guestIPMustBeZero: false
  guestPortRange: [47101, 47109]
  proto: any
  ignore: true

# Node.js and Python's requests bring their own CA lists. The system's list also holds the CAs
# given as `caCerts`.
env:
  NODE_EXTRA_CA_CERTS: /etc/ssl/certs/ca-certificates.crt
  REQUESTS_CA_BUNDLE: /etc/ssl/certs/ca-certificates.crt

param:
  minimal: "false"  # "true": only git, curl, jq, ca-certificates and Claude Code
  npmRegistry: ""   # URL in place of npm's default
  aptMirror: ""     # URL in place of the image's Debian mirror
  locale: ""        # a locale to generate, e.g. en_US.UTF-8

# Each script writes /var/log/agent-vm-provision.log, and /var/lib/agent-vm/done/NAME when all of
# it went well. The marker of the last one means that the base instance is complete; the status of
# `limactl start` does not: it is 0 when a script failed, and 1 (DEGRADED) when the scripts, still
# running, take more than about ten minutes. Never `mode: user`: with it, Lima waits for the user's
# systemd on every boot.
provision:
- mode: system
  file: provision/10-base.sh
- mode: system
  file: provision/20-test.sh
""",
    "egress.py": r'''#!/usr/bin/env python3
"""The VM's way out, and the model's credential, both held by the host.

    egress.py --listen unix:PATH|127.0.0.1:PORT [--dns …] [--internet] [--allow HOST[:PORT]]…
    egress.py --broker anthropic --listen … < {"placeholder": …, "credential": …, "header": …}

The first is an HTTP proxy and answers DNS over TCP; flags say what passes. The second swaps a
placeholder for the credential. Each says where it listens and, when stdin closes, what it refused.

Starts:   nothing
Reads:    its environment (HTTPS_PROXY, HTTP_PROXY, NO_PROXY, NODE_EXTRA_CA_CERTS), stdin
Writes:   the file of --audit, its unix sockets
Reaches:  what is permitted, the host's resolver and proxy; --upstream with the credential
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import hmac
import ipaddress
import json
import os
import re
import resource
import signal
import socket
import ssl
import struct
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from typing import NamedTuple

STARTS: frozenset[str] = frozenset()
HOST_NAME, HOST_ADDRESS = "host.lima.internal", "192.168.5.2"  # of the host, in the guest
LOOPBACK = ("127.0.0.1", "::1")  # what they are here
WEB, SMTP, ANY_PORT = frozenset([80, 443]), 25, 0  # a name in DNS has no port yet
SECONDS = 15.0  # for a resolver's answer, a connection, a head
MAX_HEAD, CHUNK = 32 * 1024, 64 * 1024  # bytes; a reader holds some chunks that nobody takes
DROPPED = re.compile(  # the last are another method, path or host for some gateways
    "(proxy-)?authorization|x-api-key|cookie|forwarded|x-(http-)?(method|original|rewrite|forw).*"
).fullmatch
Addresses = tuple[str, ...]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Failure(Exception):
    """(reason, HTTP status): why a request is not served, for its sender; it holds no secret."""


class Permissions(NamedTuple):  # by default nothing may pass
    internet: bool = False
    allow: tuple[tuple[str, frozenset[int]], ...] = ()  # (name, *.name or address; ports)
    host_ports: frozenset[int] = frozenset()


class Refused(NamedTuple):
    reason: str
    flag: str = ""  # what would allow it, if anything does


# --- pure: what may pass ---


def networks(words: str) -> tuple[Any, ...]:
    return tuple(map(ipaddress.ip_network, words.split()))


CLOSED = {  # never reached, whatever is listed; both tables are from IANA's registries
    "loopback": networks("127.0.0.0/8 ::1/128"),
    "link-local": networks("169.254.0.0/16 fe80::/10"),
    "multicast": networks("224.0.0.0/4 ff00::/8"),
    "unspecified or reserved": networks("0.0.0.0/8 ::/128 240.0.0.0/4"),
    "a cloud's own service": networks("168.63.129.16/32 fd00:ec2::/32"),
}
EMBEDDING = networks("::/96 ::ffff:0:0/96 64:ff9b::/96")  # IPv4 in the last 32 bits
NOT_PUBLIC = {  # these only by a name that is listed
    "private": networks("10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 fc00::/7 fec0::/10"),
    "benchmark": networks("198.18.0.0/15 2001:2::/48"),
    "documentation": networks("192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32"),
    "IPv4 in IPv6": (*EMBEDDING, *networks("64:ff9b:1::/48 2002::/16 2001::/32")),
    "protocol assignments": networks("192.0.0.0/24 192.88.99.0/24 2001::/23 3fff::/20"),
    "not assigned": networks("::/3 4000::/2 8000::/1"),  # public IPv6 is in 2000::/3
}


def kind_of(address: str, table: dict[str, tuple[Any, ...]]) -> str:
    """The first row of the table that the address, or the one in it, belongs to; "" for none."""
    seen = [ipaddress.ip_address(address)]
    if any(seen[0] in network for network in EMBEDDING):
        seen.append(ipaddress.IPv4Address(int(seen[0]) & 0xFFFFFFFF))
    for kind, members in table.items():
        if any(one in network for one in seen for network in members):
            return kind
    return ""


def is_address(name: str) -> bool:
    return ":" in name or name.rpartition(".")[2].isdigit()  # no name's last label is


def spelled(name: str, port: int, usual: frozenset[int] = frozenset([ANY_PORT])) -> str:
    host = f"[{name}]" if ":" in name else name
    return host if port in usual else f"{host}:{port}"


def is_listed(permissions: Permissions, name: str, port: int) -> bool:
    for pattern, ports in permissions.allow:
        below = pattern.startswith("*.") and name.endswith(pattern[1:])
        if (name == pattern or below) and (port in ports or port == ANY_PORT):
            return True
    return False


def decide(
    permissions: Permissions, name: str, port: int, found: Addresses | None, own: Addresses = ()
) -> Addresses | Refused:
    """At which of the addresses that were found a name, in its normal form, may be reached; () for
    None, where only the name is judged and may pass. `own` are addresses of this host."""
    place, flag = spelled(name, port), f"--allow {spelled(name, port, WEB | {ANY_PORT})}"
    if name == HOST_NAME:
        if port in permissions.host_ports or (port == ANY_PORT and permissions.host_ports):
            return LOOPBACK
        flag = f"--host-port {port or 'PORT'}"
        return Refused(f"{place} is a port of the host that is not opened", flag)
    is_local = f".{name}".endswith(".localhost")
    closed = "loopback" if is_local else kind_of(name, CLOSED) if is_address(name) else ""
    if closed:
        return Refused(f"{place} is not public: {closed}")
    listed = is_listed(permissions, name, port)
    if not listed and not permissions.internet:
        return Refused(f"{place} is not listed", flag)
    if not listed and port == SMTP:
        return Refused(f"{place} is a port for mail, which is closed", flag)
    passing, refused = [], Refused(f"{place} has no address")
    for address in found or ():
        closed = kind_of(address, CLOSED) or ("the host's own" if address in own else "")
        kind = closed or kind_of(address, NOT_PUBLIC)
        if closed or (kind and not listed):
            where = place if address == name else f"{place} is {address}, which"
            refused = Refused(f"{where} is not public: {kind}", "" if closed else flag)
        else:
            passing.append(address)
    return tuple(passing) if passing or found is None else refused


# --- doors: sockets, the resolver, the audit's file ---


async def listen(where: str, welcome: Any) -> str:
    """Welcome who connects there; returned is the path, or the port."""
    host, _, rest = where.partition(":")
    if host == "unix":
        await asyncio.start_unix_server(welcome, rest, limit=MAX_HEAD, backlog=512)
        return rest
    server = await asyncio.start_server(welcome, host, int(rest), limit=MAX_HEAD, backlog=512)
    return str(server.sockets[0].getsockname()[1])


def open_audit(path: str) -> int:
    """A descriptor that appends to a file of this user's alone, which is no link."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def is_own(address: str) -> bool:
    """Whether this host has the address: a socket can be bound to no other."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


async def resolve(name: str, has_to: bool = True) -> Addresses:
    """The addresses that the host's resolver has for it now; none where it does not have to."""
    asking = asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.wait_for(asking, SECONDS)
    except (OSError, UnicodeError, asyncio.TimeoutError) as error:
        late = not error.args or error.args[0] == socket.EAI_AGAIN
        if not has_to:
            return ()
        raise Failure(f"the host knows no address of {name}", 504 if late else 502) from None
    return tuple(dict.fromkeys(str(row[4][0]) for row in found))[:4]


async def dial(addresses: Addresses, port: int) -> socket.socket:
    """A connection to the first address that takes it."""
    why = "no address"
    for address in addresses:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        sock.setblocking(False)
        try:
            connecting = asyncio.get_running_loop().sock_connect(sock, (address, port))
            await asyncio.wait_for(connecting, SECONDS)
            return sock
        except (OSError, asyncio.TimeoutError) as error:
            sock.close()
            why = getattr(error, "strerror", "") or "no answer"
    raise Failure(f"no connection to port {port}: {why}", 502)


async def secure(sock: socket.socket, context: ssl.SSLContext | None, name: str | None) -> Streams:
    return await asyncio.open_connection(sock=sock, ssl=context, server_hostname=name, limit=CHUNK)


# --- the story: how a request is judged ---


async def permit(side: Side, scheme: str, name: str, port: int) -> Addresses:
    """The addresses that it may be reached at; none where the host's proxy is told the name."""
    verdict = decide(side.permissions, name, port, None)
    proxy = side.proxy_for(scheme, name, port)
    # What a proxy elsewhere finds is there; one on this host could be led to this host's loopback.
    is_here = not proxy or is_address(name) or proxy[0] in ("localhost", *LOOPBACK)
    if verdict == () and is_here:
        found = (name,) if is_address(name) else await resolve(name, has_to=not proxy)
        verdict = decide(side.permissions, name, port, found or None, tuple(filter(is_own, found)))
    if isinstance(verdict, Refused):
        side.refuse(name, port, verdict)
        raise Failure("refused: " + "; ".join(filter(None, verdict)), 403)
    return () if proxy else verdict


async def judge(side: Side, request: Request) -> tuple[Request, Addresses]:
    """What is passed on, and at which addresses; () for a broker's place, which is a setting."""
    broker = side.broker
    if not broker:
        name = side.names.get(request.name, request.name)  # of an address that DNS gave out
        return request._replace(name=name), await permit(side, request.scheme, name, request.port)
    if not broker.passes(request):
        raise Failure(f"{request.method} {request.path} is not passed on", 404)
    headers = [row for row in request.headers if not DROPPED(row[0])]
    if request.method != "HEAD":  # with that, Claude Code asks whether somebody is there
        given = dict(request.headers).get(broker.header, "")
        if not hmac.compare_digest(given.encode(), broker.placeholder):
            raise Failure("this is not the placeholder of the credential", 401)
        headers.append((broker.header, broker.credential))
    return request._replace(headers=headers, path=broker.prefix + request.path, **broker.place), ()


# --- you may stop here: what follows only calls what is above ---

# --- pure: names, requests and DNS, strictly ---

NAME = re.compile(r"(?=.{1,253}\Z)(?:(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!\Z)|\Z))+").fullmatch
NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)", re.ASCII).fullmatch
PLACE = re.compile(r"(\[[^][]*\]|[^][:]*)(?::([1-9][0-9]{0,4}))?", re.ASCII).fullmatch
# Strict, as a lenient reader can be made to see another message than the next (RFC 9112, 11.2).
HEAD = re.compile(
    r"([A-Z-]{1,30}) ([!-~]+) (HTTP/1\.[01])\r\n"
    r"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*)\r\n"
).fullmatch
URL = re.compile(r"(?i:http)://([^/?#@\\]+)((?:[/?][^#]*)?)").fullmatch
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade"}
ERRORS = {401: "authentication_error", 404: "not_found_error", 502: "api_error", 504: "api_error"}
A, AAAA, SERVER_FAILED, NO_NAME, TTL = 1, 28, 2, 3, 60  # RFC 1035


class Request(NamedTuple):
    method: str
    name: str  # in its normal form; none where the request is for a broker
    port: int
    path: str  # none of CONNECT
    version: str
    headers: list[tuple[str, str]]
    length: int
    scheme: str = "http"


def normal_host(text: str) -> str:
    """The one spelling of a name or address, however it came; Failure when it is neither."""
    name = text[:-1].lower() if text.endswith(".") else text.lower()
    try:
        # No zone, as that names an interface of this host; 0x7f.1, 0177.0.0.1 and 2130706433 are
        # what a resolver makes of them.
        if text[:1] + text[-1:] == "[]" and "%" not in text:
            return str(ipaddress.IPv6Address(text[1:-1]))
        if NUMBER(name):
            return socket.inet_ntoa(socket.inet_aton(name))
    except (OSError, ValueError):
        name = ""
    if not NAME(name):
        raise Failure(f"{text!a:.80} is no name or address of a host", 400)
    return name


def host_and_port(text: str, default: int = 0) -> tuple[str, int]:
    match = PLACE(text)
    port = int(match[2] or default) if match else 0
    if not match or not 0 < port < 65536:
        raise Failure(f"{text!a:.80} is not HOST:PORT", 400)
    return normal_host(match[1]), port


def parse_request(data: bytes, is_proxy: bool) -> Request:
    match = HEAD(data.decode("latin-1"))
    if not match:
        raise Failure("a malformed head", 400)
    method, target, version, block = match.groups()
    rows = [row.partition(":") for row in block.split("\r\n")[:-1]]
    headers = [(name.lower(), value.strip(" \t")) for name, _, value in rows]
    once, names = dict(headers), [name for name, _ in headers]
    for name in names:
        if names.count(name) > 1 and (name in ("host", "content-length") or DROPPED(name)):
            raise Failure(f"{name} is given twice", 400)
    size = once.get("content-length", "0")
    if "transfer-encoding" in once or not re.fullmatch("[0-9]{1,15}", size, re.ASCII):
        raise Failure("a body has to say its Content-Length", 411)
    if not is_proxy:
        return Request(method, "", 0, target, version, headers, int(size))
    if method == "CONNECT" and not int(size):
        name, port = host_and_port(target)
        return Request(method, name, port, "", version, headers, 0, "https")
    url = URL(target)
    if not url or method == "CONNECT":
        raise Failure("this is a proxy: CONNECT HOST:PORT, or a method and http://HOST/…", 400)
    name, port = host_and_port(url[1], 80)
    host = once.get("host", url[1] if version == "HTTP/1.0" else None)
    if host is None or host_and_port(host, 80) != (name, port):
        raise Failure("Host is another one than that of the address", 400)
    path = url[2] if url[2].startswith("/") else f"/{url[2]}"
    return Request(method, name, port, path, version, headers, int(size))


def head_of(request: Request, target: str, host: str, more: str = "") -> bytes:
    """The head of the request that is sent on: nothing in it is for one hop (RFC 9110, 7.6.1)."""
    named = ",".join(value.lower() for name, value in request.headers if name == "connection")
    gone = {*(word.strip() for word in named.split(","))} - {"content-length"}
    gone |= {*HOP_BY_HOP, "host", "proxy-authorization"}
    rows = [f"{name}: {value}\r\n" for name, value in request.headers if name not in gone]
    first = f"{request.method} {target} {request.version}\r\nhost: {host}\r\n{more}"
    return "".join([first, *rows, "connection: close\r\n\r\n"]).encode("latin-1")


def parse_query(data: bytes) -> tuple[str, int, int]:
    """(name, type, where the question ends) of a query for one name (RFC 1035, 4.1)."""
    at, labels = 12, []
    while data[at : at + 1] not in (b"", b"\0"):
        labels.append(data[at + 1 : at + 1 + data[at]].decode("latin-1"))
        at += 1 + data[at]  # a pointer is taken for a length that no label has
    is_query = len(data) >= at + 5 and not data[2] & 0xF8 and data[4:11] == b"\0\1\0\0\0\0\0"
    if not is_query or data[11] > 1 or data[at + 3 : at + 5] != b"\0\1" or "." in "".join(labels):
        raise Failure("no query for one name", 400)
    return ".".join(labels), int.from_bytes(data[at + 1 : at + 3], "big"), at + 5


def answer_to(query: bytes, end: int, code: int, address: str) -> bytes:
    """With the address, if there is one; end: of the question."""
    row = b""
    if address:
        row = b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", TTL, 4) + socket.inet_aton(address)
    head = bytes([0x80 | query[2] & 1, 0x80 | code, 0, 1, 0, 1 if row else 0, 0, 0, 0, 0])
    packet = query[:2] + head + query[12:end] + row
    return struct.pack(">H", len(packet)) + packet


def told(reason: str, status: int, is_api: bool) -> bytes:
    """Why a request is not served: in the status line, which most programs show, and whole."""
    kind, body = "text/plain", f"agent-vm: {reason}\n"
    if is_api:
        error = {"type": ERRORS.get(status, "invalid_request_error"), "message": body.strip()}
        kind, body = "application/json", json.dumps({"type": "error", "error": error}) + "\n"
    size = f"content-type: {kind}\r\ncontent-length: {len(body.encode())}\r\n"
    head = f"HTTP/1.1 {status} {ascii(reason)[1:-1]}\r\n{size}connection: close\r\n\r\n"
    return (head + body).encode()


# --- what the connections share ---

# What Claude Code 2.1.332 asks ANTHROPIC_BASE_URL for; * is one part of a path.
PROVIDERS = {
    "anthropic": (
        "https://api.anthropic.com",
        ("HEAD /api/hello", "POST /v1/messages", "POST /v1/messages/count_tokens",
         "GET /v1/models", "GET /v1/models/*", "POST /v1/files", "GET /v1/files",
         "GET /v1/files/*", "GET /v1/files/*/content"),
    )
}  # fmt: skip
MAX_REFUSALS, MAX_STAND_INS = 4096, 65534  # told apart; given out by DNS


class Broker:
    """What a guest may ask of a model's API. It has the placeholder; this has the credential."""

    context: ssl.SSLContext | None = None

    def __init__(self, line: bytes, provider: str, url: str) -> None:
        default, self.routes = PROVIDERS[provider]
        address = urllib.parse.urlsplit(url or default)
        name, port = host_and_port(address.netloc, 443 if address.scheme == "https" else 80)
        self.place: dict[str, Any] = {"scheme": address.scheme, "name": name, "port": port}
        self.prefix = address.path.rstrip("/")
        if address.scheme == "https":
            self.context = ssl.create_default_context()
            more = os.environ.get("NODE_EXTRA_CA_CERTS")  # as Claude Code does
            try:
                if more:
                    self.context.load_verify_locations(more)
            except OSError as error:
                raise Failure(f"NODE_EXTRA_CA_CERTS, {more}: {error.strerror or error}") from None
        elif address.scheme != "http" or name not in ("localhost", *LOOPBACK):
            raise Failure("--upstream must be https: the credential would go in clear")
        try:
            given = json.loads(line)
            schemes = {"authorization": "Bearer ", "x-api-key": ""}
            self.header, scheme = given["header"], schemes[given["header"]]
            self.credential = scheme + given["credential"]
            self.placeholder = (scheme + given["placeholder"]).encode()
            if not all(re.fullmatch("[!-~]+", given[key]) for key in ("credential", "placeholder")):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise Failure("stdin holds no placeholder, credential and header") from None

    def passes(self, request: Request) -> bool:
        path, _, query = request.path.partition("?")
        asked, part = f"{request.method} {path}", "[A-Za-z0-9_][A-Za-z0-9._:-]*"
        known = any(re.fullmatch(route.replace("*", part), asked) for route in self.routes)
        return known and re.fullmatch("[A-Za-z0-9_.~%&=,:-]*", query) is not None


class Side:
    """One side of a run: what it may do, and what its connections share."""

    def __init__(self, permissions: Permissions, audit: int, broker: Broker | None) -> None:
        self.permissions, self.audit, self.broker = permissions, audit, broker
        self.refused: dict[tuple[str, int, Refused], int] = {}
        # Both ways: what DNS gives out for a name, and what it means from then on.
        self.stand_ins, self.names = {HOST_NAME: HOST_ADDRESS}, {HOST_ADDRESS: HOST_NAME}
        self.clients: set[Any] = set()
        self.proxies: dict[str, tuple[str, int, str] | None] = {}  # the host's own, by scheme
        if any(name.lower().endswith("_proxy") for name in os.environ):
            from urllib.request import getproxies_environment  # late, as it takes 50 ms

            found = getproxies_environment()
            if found.get("no") != "*":  # else none is asked
                self.proxies = {one: parse_proxy(found.get(one, "")) for one in ("http", "https")}

    def proxy_for(self, scheme: str, name: str, port: int) -> tuple[str, int, str] | None:
        """(host, port, header) of the host's own proxy; None where it is not to be asked."""
        if not self.proxies or name in (HOST_NAME, "localhost", *LOOPBACK):
            return None
        from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

        return None if proxy_bypass_environment(spelled(name, port)) else self.proxies[scheme]

    def record(self, host: str, port: int, verdict: str, reason: str = "", size: int = 0) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row = {"time": now, "host": host, "port": port, "verdict": verdict, "reason": reason}
        try:
            if self.audit >= 0:
                os.write(self.audit, json.dumps({**row, "bytes": size}).encode() + b"\n")
        except OSError as error:
            raise Failure(f"the audit cannot be written: {error.strerror}", 503) from None

    def refuse(self, host: str, port: int, refused: Refused) -> None:
        key = (host, port, refused)
        if key not in self.refused and len(self.refused) >= MAX_REFUSALS:
            key = ("", 0, Refused("others"))
        self.refused[key] = self.refused.get(key, 0) + 1
        self.record(host, port, "refused", refused.reason)

    def stand_in(self, name: str) -> str:
        """An address that nobody has, and that is the name here from now on."""
        if name not in self.stand_ins:
            if len(self.names) > MAX_STAND_INS:
                raise Failure("all addresses are given out", 503)
            address = str(ipaddress.IPv4Address("198.18.0.0") + len(self.names))
            self.stand_ins[name], self.names[address] = address, name
        return self.stand_ins[name]


# --- connections ---

IDLE_SECONDS = 600.0  # for an answer, as Claude Code waits; for more on a way that is left alone
LINGER_SECONDS = 5.0  # for a client to read what it was sent
MAX_CLIENTS, MAX_LOOKUPS = 1000, 32  # at once
FIRST = asyncio.FIRST_COMPLETED
UP, DOWN = 0, 1  # how many bytes have passed to the upstream, and from there


async def read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
    except asyncio.TimeoutError:
        raise Failure("no head in time", 408) from None
    except (EOFError, asyncio.LimitOverrunError):
        raise Failure("half a head, or one that is too long", 400) from None


async def connect(side: Side, request: Request, to: Addresses) -> Streams:
    """A connection to what was judged, or to the host's proxy; a request's head has been sent."""
    scheme, name, port = request.scheme, request.name, request.port
    proxy = side.proxy_for(scheme, name, port)
    if proxy or not to:
        to = await resolve(proxy[0] if proxy else name)
    sock = await dial(to, proxy[1] if proxy else port)
    try:
        if proxy and scheme == "https":
            await ask_proxy(sock, spelled(name, port), proxy[2])
        context = side.broker.context if side.broker else None
        upstream = await secure(sock, context, name if context else None)
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise Failure(f"no TLS with {name}: {error.strerror or error}", 502) from None
        raise
    upstream[1].transport.set_write_buffer_limits(0)
    if request.path:
        host = spelled(name, port, frozenset([443 if scheme == "https" else 80]))
        whole, more = (f"http://{host}", proxy[2]) if proxy and scheme == "http" else ("", "")
        upstream[1].write(head_of(request, whole + request.path, host, more))
    return upstream


async def ask_proxy(sock: socket.socket, place: str, header: str) -> None:
    """Let the host's proxy connect to a place; read no byte of what is behind its answer."""
    loop, said = asyncio.get_running_loop(), b""
    head = f"CONNECT {place} HTTP/1.1\r\nhost: {place}\r\n{header}\r\n"
    await loop.sock_sendall(sock, head.encode())
    while not said.endswith(b"\r\n\r\n"):
        byte = await asyncio.wait_for(loop.sock_recv(sock, 1), SECONDS)
        if not byte or len(said) > MAX_HEAD:
            raise Failure("the host's proxy does not answer", 502)
        said += byte
    if not re.match(rb"HTTP/1\.[01] 2", said):
        status = said.decode("latin-1").split("\r\n")[0].partition(" ")[2]
        raise Failure(f"the host's proxy says {status}", 502)


async def pump(
    source: asyncio.StreamReader, target: asyncio.StreamWriter, passed: list[int], way: int,
    left: int = sys.maxsize,
) -> None:  # fmt: skip
    """Pass on what comes, or so many bytes of it, until it ends."""
    while left and (data := await source.read(min(left, CHUNK))):
        target.write(data)
        await target.drain()
        passed[way] += len(data)
        left -= len(data)


def finish(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.write_eof()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close it so that the other end is told that more should have come."""
    with contextlib.suppress(OSError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def drain(reader: asyncio.StreamReader) -> None:
    while await reader.read(CHUNK):
        pass


async def exchange(
    side: Side, request: Request, client: Streams, upstream: Streams, passed: list[int]
) -> None:
    """Both ways of a tunnel, until both have ended; or the body of a request, and the answer."""
    is_tunnel = not request.path

    async def down() -> None:
        await pump(upstream[0], client[1], passed, DOWN)
        if is_tunnel:
            finish(client[1])
        elif not passed[DOWN]:
            raise Failure("the server has ended without an answer", 502)

    async def up() -> None:
        if is_tunnel:
            await pump(client[0], upstream[1], passed, UP)
            finish(upstream[1])
            return
        with contextlib.suppress(OSError):  # an early answer is an answer
            await pump(client[0], upstream[1], passed, UP, request.length)
            if passed[UP] < request.length:
                raise Failure("half a body", 400)
        if side.broker:  # what an agent asked for that was interrupted costs money
            await drain(client[0])
            raise Failure("the client has left", 400)

    ways = [asyncio.ensure_future(down()), asyncio.ensure_future(up())]
    waiting, last, seen = set(ways), set(ways if is_tunnel else ways[:1]), -1
    try:
        while waiting & last:
            seconds = None if is_tunnel and len(waiting) == 2 else IDLE_SECONDS
            done, waiting = await asyncio.wait(waiting, timeout=seconds, return_when=FIRST)
            for way in done:
                way.result()
            if not done and seen == sum(passed):
                raise Failure("nothing comes any more", 504)
            seen = sum(passed)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def serve_request(side: Side, client: Streams) -> None:
    """What is refused can be read; what was cut off is seen to be."""
    passed, upstream, is_tunnel = [0, 0], None, False
    try:
        request = parse_request(await read_head(client[0]), is_proxy=not side.broker)
        request, addresses = await judge(side, request)
        side.record(request.name, request.port, "allowed")
        upstream, is_tunnel = await connect(side, request, addresses), not request.path
        if is_tunnel:
            client[1].write(b"HTTP/1.1 200 OK\r\n\r\n")
        await exchange(side, request, client, upstream, passed)
    except (OSError, Failure) as error:
        if upstream:
            reset(upstream[1])
        if passed[DOWN] or is_tunnel:
            reset(client[1])
        else:
            reason, status = error.args if isinstance(error, Failure) else (str(error), 502)
            client[1].write(told(reason, status, is_api=side.broker is not None))
    finally:
        if upstream:
            upstream[1].close()
            side.record(request.name, request.port, "closed", size=sum(passed))
    finish(client[1])
    await asyncio.wait_for(drain(client[0]), LINGER_SECONDS)


async def serve_names(side: Side, client: Streams) -> None:
    """DNS over TCP (RFC 7766): a query is answered when it can be, whatever came before it."""
    lookups: set[Any] = set()

    async def answer(query: bytes, text: str, kind: int, at: int) -> None:
        code, address = 0, ""
        try:
            if kind in (A, AAAA):
                name = normal_host(text)
                await permit(side, "https", name, ANY_PORT)
                address = side.stand_in(name) if kind == A else ""
        except Failure as failure:
            code = SERVER_FAILED if failure.args[1] in (503, 504) else NO_NAME
        client[1].write(answer_to(query, at, code, address))

    while True:
        size = await asyncio.wait_for(client[0].readexactly(2), IDLE_SECONDS)
        asked = client[0].readexactly(int.from_bytes(size, "big"))
        query = await asyncio.wait_for(asked, SECONDS)
        if len(lookups) >= MAX_LOOKUPS:
            await asyncio.wait(lookups, return_when=FIRST)
        task = asyncio.ensure_future(answer(query, *parse_query(query)))
        lookups.add(task)
        task.add_done_callback(lookups.discard)
        await client[1].drain()


async def attend(side: Side, story: Any, *client: Any) -> None:
    """A client, to its end."""
    task = asyncio.current_task()
    side.clients.add(task)
    client[1].transport.set_write_buffer_limits(0)  # what is drained has left
    try:
        if len(side.clients) <= MAX_CLIENTS:
            await story(side, client)
    # It has been told, or has left; of a cancelled task Python 3.11 and 3.12 would complain.
    except (Failure, EOFError, OSError, asyncio.TimeoutError, asyncio.CancelledError):
        pass
    finally:
        client[1].close()
        side.clients.discard(task)


# --- settings ---

# What a vendor's programs ask for. Package registries are not here: a guest's settings name them.
PRESETS = {
    "github": "github.com *.github.com *.githubusercontent.com *.githubassets.com ghcr.io",
    "anthropic": "anthropic.com *.anthropic.com claude.ai *.claude.ai claude.com *.claude.com",
    "openai": "openai.com *.openai.com chatgpt.com *.chatgpt.com",
    "nodesource": "deb.nodesource.com rpm.nodesource.com",
    "docker": "docker.com *.docker.com docker.io *.docker.io "
    "docker-images-prod.6aa30f8b08e16409b46e0173d6de2f56.r2.cloudflarestorage.com",
}


def parse_proxy(url: str) -> tuple[str, int, str] | None:
    """(host, port, the header with its credentials) of the host's own proxy, if it has one."""
    if not url:
        return None
    try:
        address = urllib.parse.urlsplit(url if "//" in url else f"//{url}", "http")
        host, port = address.hostname, address.port or 80
    except ValueError:
        host, port = None, 0
    if not host or address.scheme != "http":
        raise Failure("HTTP_PROXY or HTTPS_PROXY is not http://[USER:PASSWORD@]HOST:PORT", 502)
    if address.username is None:
        return host, port, ""
    user = f"{address.username}:{address.password or ''}"
    token = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
    return host, port, f"proxy-authorization: Basic {token}\r\n"


def listen_place(value: str) -> str:
    if not re.fullmatch(r"unix:.+|127\.0\.0\.1:[0-9]{1,5}", value):
        raise argparse.ArgumentTypeError(f"{value!r} is not unix:PATH or 127.0.0.1:PORT")
    return value


def allowed(value: str) -> list[tuple[str, frozenset[int]]]:
    """The rows of a name, *.name or address, or of a preset; PORT instead of 80 and 443."""
    if value in PRESETS:
        return [(pattern, WEB) for pattern in PRESETS[value].split()]
    star, text = ("*.", value[2:]) if value.startswith("*.") else ("", value)
    try:
        name, port = host_and_port(text.encode("idna").decode() if not text.isascii() else text, 1)
    except (Failure, UnicodeError):
        name, port = "", 1
    if not name or (star and is_address(name)):
        raise argparse.ArgumentTypeError(f"{value!r} is not HOST, *.HOST, HOST:PORT or a preset")
    return [(star + name, frozenset([port]) if text.endswith(f":{port}") else WEB)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="egress.py", description=__doc__)
    # With a width it need not ask the terminal, for which it would import ten modules.
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
    add = parser.add_argument
    place: dict[str, Any] = {"metavar": "PLACE", "type": listen_place}
    add("--listen", **place, required=True, help="unix:PATH or 127.0.0.1:PORT")
    add("--dns", **place, help="answer DNS over TCP there")
    add("--internet", action="store_true", help="any public address; every port but 25")
    add("--allow", metavar="HOST[:PORT]", type=allowed, action="append", default=[],
        help=f"also at a private address; ports 80 and 443; or {', '.join(PRESETS)}")  # fmt: skip
    add("--host-port", metavar="PORT", type=int, action="append", default=[],
        help=f"a port of the host's loopback, as {HOST_NAME}:PORT")  # fmt: skip
    add("--audit", metavar="FILE", help="append what is asked for, as JSON Lines")
    add("--broker", choices=PROVIDERS, help="hold the credential of a model's API")
    add("--upstream", metavar="URL", default="", help="that API's address")
    return parser


async def run(options: argparse.Namespace) -> None:
    """Serve until stdin is closed, or a signal comes; then say what was refused."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(MAX_LOOKUPS))
    rows = tuple(row for rows in options.allow for row in rows)
    permissions = Permissions(options.internet, rows, frozenset(options.host_port))
    broker = None
    if options.broker:
        broker = Broker(sys.stdin.buffer.readline(), options.broker, options.upstream)
    side = Side(permissions, open_audit(options.audit) if options.audit else -1, broker)
    for where, story in ((options.listen, serve_request), (options.dns, serve_names)):
        if where:
            place = await listen(where, functools.partial(attend, side, story))
            os.write(1, f"{place}\n".encode())
    end = loop.run_in_executor(None, sys.stdin.buffer.read)
    loop.add_signal_handler(signal.SIGTERM, end.cancel)
    loop.add_signal_handler(signal.SIGINT, end.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await end
    for task in side.clients:
        task.cancel()
    if side.clients:
        await asyncio.wait(side.clients, timeout=1)
    for (host, port, refused), count in side.refused.items():
        row = {"host": host, "port": port, **refused._asdict(), "count": count}
        os.write(1, json.dumps(row).encode() + b"\n")
    os._exit(0)  # Python would wait for its threads: one reads stdin, others look up names


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    os.umask(0o077)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    try:
        asyncio.run(run(options))
    except (Failure, OSError) as error:
        why = error.args[0] if isinstance(error, Failure) else error
        print(f"egress: error: {why}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
''',
    "finish.sh": r"""#!/bin/bash
# Sent by setup into the base instance, as its user, when all is installed. Prints the hosts of the
# package registries that its own programs are set to: `--network allow` lets these through, and no
# registry is named anywhere in agent-vm. Then forgets what setup's boots have written down of the
# host's proxies, whose passwords are not for a VM that cannot reach them.
{
  grep -hv '^ *#' /etc/apt/sources.list /etc/apt/sources.list.d/* /etc/apt/mirrors/*
  npm config get registry
  python3 -m pip config list
  python3 -c 'from pip._internal.models.index import PyPI as index
print(index.simple_url, f"https://{index.file_storage_domain}/")'  # unless pip is told otherwise
  grep -hv '^ *#' ~/.cargo/config.toml /etc/uv/uv.toml ~/.config/uv/uv.toml
  go env GOPROXY
  go env GOSUMDB | sed 's#^#https://#'
} 2> /dev/null | grep -oE 'https?://([^/@" ]*@)?[A-Za-z0-9.-]+(:[0-9]+)?' | sed -E 's#.*(//|@)##' |
  sort -u | tr '\n' ' '
sudo sed -i '/_proxy=/Id' /etc/environment
sudo rm -f /var/log/cloud-init*.log
sudo journalctl -q --rotate --vacuum-time=1s > /dev/null 2>&1 || true
""",
    "guest/github.md": r"""
# GitHub in this VM
You reach exactly one GitHub repository, {repo}, through a proxy on the user's machine; there is no
GitHub credential in this VM, and `gh` has none.

- Issues, pull requests, files: the tools of the MCP server `github` (mcp__github__*); `owner` and
  `repo` may be left out. `git fetch`, `pull`, `clone` and `push` work with the usual addresses.
- Write to a branch other than the default one, and open a pull request. Refused: pushes to the
  default branch (unless the user's policy allows them), tags, LFS, the wiki, the deletion of what
  was not made in this session; in a read-only session everything.
- What outsiders wrote may be hidden: the user shows it by agent-vm run --no-github-lockdown.
- A refusal says its reason. It is a decision, not a fault: tell the user, look for no way round.
""",
    "guest/launch.sh": r"""#!/bin/bash -l
# Runs what it is given in the project, with the environment of the host's terminal. Not `exec`: a
# shell turns death by a signal into a status, and syncs so that the VM can be cut off after it. At
# a terminal the agent is a job: Ctrl-Z stops it alone, and as nobody can resume it, it goes on.
# usage: launch.sh PROJECT PROGRAM ARGUMENT…
# shellcheck disable=SC1090,SC2015,SC2016
. ~/.agent-vm/env
. ~/.agent-vm/credential
infocmp > /dev/null 2>&1 || export TERM=xterm-256color
cd -- "$1" || exit 125
shift
command -v -- "$1" > /dev/null || set -- sh -c 'echo "$0: not found" >&2; exit 127' "$1"
trap : HUP TERM  # of an agent's `kill 0`
[ -t 0 ] && set -m || trap : INT
"$@"
status=$?
go_on() { [ -z "$(jobs -s)" ] || { fg > /dev/null; status=$?; go_on; }; }  # a loop would be stopped
go_on
sync
echo "$status" > ~/.agent-vm/status
[ -t 0 ] || { (sleep 3; kill "$PPID") < /dev/null > /dev/null 2>&1 & }  # pipes held by what is left
exit "$status"
""",
    "guest/network.md": r"""
# The network of this VM
{mode} Other hosts, the user's own network and machine are closed, from outside of the VM.{ports}
A refusal is a 403 whose reason names the flag that would allow it (curl -v shows it); programs that
ask no proxy see a connection that is closed at once, or a name that is not found. It is a decision,
not a fault: tell the user, look for no way round.
""",
    "guest/network.sh": r"""#!/bin/bash
# As root in a VM whose network the host holds: leads every program to the host's egress.py, at
# ports of 127.0.0.1 that ssh brings here. That is convenience, for what knows no proxy: who undoes
# it has no network at all. Sent by setup before the VM is saved, and by a run into one that boots.
# usage: network.sh [off]
set -eu -o pipefail
proxy=47101 names=47102 tcp=47105 udp=47106

if [ "${1-}" = off ]; then  # in one that was resumed
  nft delete table ip agent-vm
  rm /run/agent-vm/led
  exit
fi
for tool in redsocks nft; do
  command -v "$tool" > /dev/null || {
    echo "the base instance has no $tool, it is older than this agent-vm: agent-vm setup"
    exit 1
  }
done
mkdir -p /run/agent-vm
cat > /run/agent-vm/redsocks.conf <<CONF
base { daemon = on; log_info = off; log = "file:/run/agent-vm/redsocks.log"; redirector = iptables;
  redsocks_conn_max = 1000; rlimit_nofile = 8192; }
redsocks { local_ip = 127.0.0.1; local_port = $tcp; ip = 127.0.0.1; port = $proxy;
  type = http-connect; }
CONF
redsocks -c /run/agent-vm/redsocks.conf
# DNS over UDP, asked again over TCP. (What redsocks has for it answers "truncated", offering no
# recursion: glibc takes that for no answer, and containers would find no name.)
setsid -f python3 -IS - $names $udp > /dev/null 2>&1 <<'PYTHON'
import socket, sys, threading

def answer(query, client):
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20) as tcp:
        tcp.sendall(len(query).to_bytes(2, "big") + query)
        failed = query[:2] + b"\x81\x82" + query[4:]
        udp.sendto(tcp.recv(4096)[2:] or failed, client)

udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", int(sys.argv[2])))
while True:
    threading.Thread(target=answer, args=udp.recvfrom(4096)).start()
PYTHON
resolvectl dns eth0 192.168.5.3 && resolvectl domain eth0 '~.' ||
  echo "nameserver 192.168.5.3" > /etc/resolv.conf  # an address that the rules below lead
# TCP that would leave the VM goes to redsocks, DNS to egress.py. Containers come by the second
# chain. What has the mark is wake.py's probe. What leaves port 22 answers ssh, which the kernel may
# not have followed from its beginning: it would be taken for a new connection.
echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
nft -f - <<RULES
table ip agent-vm
delete table ip agent-vm
table ip agent-vm {
  chain own {
    type nat hook output priority -110;
    meta mark 47 return
    oifname != "eth0" return
    tcp sport 22 return
    udp dport 53 dnat to 127.0.0.1:$udp
    tcp dport 53 dnat to 127.0.0.1:$names
    meta l4proto tcp dnat to 127.0.0.1:$tcp
  }
  chain containers {
    type nat hook prerouting priority -110;
    iifname { "eth0", "lo" } return
    fib daddr oifname != "eth0" return
    udp dport 53 dnat to 127.0.0.1:$udp
    tcp dport 53 dnat to 127.0.0.1:$names
    meta l4proto tcp dnat to 127.0.0.1:$tcp
  }
}
RULES
# Also when DHCP, which a closed-in VM asks in vain for a router, has taken away its own.
ip route replace default via 192.168.5.2 dev eth0
touch /run/agent-vm/led
""",
    "guest/probe.sh": r"""#!/bin/bash
# Sent by a run into its VM, as its user, before the agent starts: what the sides of the run must
# refuse is seen to be refused, from in here. Silent then; else it says what is not, and fails.
# ~/.agent-vm/sides has: broker (a URL, or nothing), url, repo and is_readonly of the GitHub proxy.
# What carries the probe's secret is judged like the agent's own, but neither passed on nor counted.
# shellcheck disable=SC1091,SC2154
set -u
cd ~/.agent-vm || exit
. ./env  # the agent's
. ./sides
refused() {  # WHAT WORDS-OF-THE-REFUSAL CURL-ARGUMENT...
  answer=$(curl -sS -m 20 -H 'Content-Type: application/json' \
    -H 'Accept: application/json, text/event-stream' "${@:3}" 2>&1)
  case $answer in
    *"$2"*) ;;
    *) echo "$1 is not refused as it should be: ${answer:0:300}"; exit 1 ;;
  esac
}
call() {  # TOOL ARGUMENTS-AS-JSON
  echo '{"jsonrpc": "2.0", "id": 1, "method": "tools/call",' \
    '"params": {"name": "'"$1"'", "arguments": '"$2"'}}'
}

[ -z "$broker" ] ||
  refused 'a wrong placeholder' 'not the placeholder' -H 'x-api-key: wrong' -d '{}' \
    "$broker/v1/messages"

[ -n "$url" ] || exit 0
sed 's/$/-not/' probe-header > wrong-header  # in files: a secret must not be in an argv
ours=(-H @probe-header)
served="only $repo is served here"
foreign=$(call get_file_contents '{"owner": "agent-vm-probe", "repo": "other", "path": "x"}')
other="$url/git/agent-vm-probe/other.git/info/refs?service=git-upload-pack"
refused 'another repository over MCP' "$served" "${ours[@]}" "$url/mcp" -d "$foreign"
refused 'another repository over git' "$served" "${ours[@]}" "$other"
refused 'a wrong secret' 'secret is missing or wrong' -H @wrong-header "$url/mcp" -d "$foreign"
[ -n "$is_readonly" ] || exit 0
write=$(call create_branch '{"branch": "agent-vm-probe"}')
push="$url/git/$repo.git/info/refs?service=git-receive-pack"
refused 'a write over MCP' 'the policy is read-only' "${ours[@]}" "$url/mcp" -d "$write"
refused 'a push' 'the policy is read-only' "${ours[@]}" "$push"
""",
    "guest/wake.py": r'''"""As root in a VM: makes it the VM of a run, and sees that it is confined.

Setup starts it in the base instance right before that is saved as it runs: in a VM that is resumed
it waits, with nothing to load. In one that boots, the run starts it. The run comes by ssh to its
socket, hears "ready", asks in a line of JSON and hears "done", or what the VM is not. With an
argument, the folders as JSON, it mounts those and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import locale
import os
import pwd
import select
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

OURS, CIDATA, PROXY = "/run/agent-vm", "/mnt/lima-cidata", ("127.0.0.1", 47101)
RDONLY, BIND = 1, 4096  # mount(2)
# Other ways to cache show old contents for minutes after the host has written a file anew.
BY_9P = "trans=virtio,version=9p2000.L,msize=131072,cache=mmap"
MARK = 47  # goes past the rules of network.sh
# A closed-in VM reaches nothing, by TCP at these ports, nor by UDP; the VM's own port for ssh is on
# the host's loopback, and answers in an open one at those of port 0.
CLOSED = {
    0: "192.168.5.2 10.0.2.2 fec0::2",
    53: "192.168.5.3",
    80: "192.168.0.1 192.168.1.1 10.0.0.1 172.16.0.1 169.254.169.254",
    443: "1.1.1.1 2606:4700:4700::1111",
}
CLOSED_UDP = "192.168.5.2 192.168.5.3 10.0.2.2 fec0::2 1.1.1.1 8.8.8.8"
DNS = b"\0\1\1\0\0\1\0\0\0\0\0\0\7example\3com\0\0\1\0\1"  # A of example.com
NTP, ECHO = b"\x1b" + bytes(47), b"\x08\0\xf7\xfd\0\1\0\1"
libc = ctypes.CDLL(None, use_errno=True)


class Open(Exception):
    """What the VM reaches, or may reach, that it must not."""


def read(path: str) -> str:
    with open(path, errors="surrogateescape") as file:
        return file.read()


def write(path: str, text: str, mode: str = "w") -> None:
    with open(path, mode, errors="surrogateescape") as file:
        file.write(text)


def run(*words: str) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{words[0]}: {done.stdout}{done.stderr}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2), as a program is slow to start in a VM that has just begun."""
    words = [os.fsencode(word) for word in (source, target, kind)]
    if libc.mount(*words, ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def mount_folders(folders: list[tuple[int, str, bool]]) -> None:
    """The host's folders, each in its place: an agent in an empty one would lose its work. QEMU has
    one in a slot with a tag; in another VM Lima has mounted it.
    """
    for slot, target, writable in sorted(folders, key=lambda row: row[1]):  # before those in it
        os.makedirs(target, exist_ok=True)
        if os.path.ismount(f"/mnt/agent-vm/{slot}"):
            mount(f"/mnt/agent-vm/{slot}", target, flags=BIND)
        else:
            mount(f"agent-vm-{slot}", target, "9p", 0 if writable else RDONLY, BY_9P)


# --- a machine of its own ---


def meta_data() -> dict[str, str]:
    """What Lima says of this instance."""
    lines = read(f"{CIDATA}/meta-data").splitlines()
    return {key: value.strip(' "') for key, _, value in (line.partition(":") for line in lines)}


def wait_for_scripts() -> None:
    """Until Lima's boot scripts have ended, where some are the user's own. What Lima's do is on a
    base instance's disk already: they go on beside the agent.
    """
    scripts = glob.glob(f"{CIDATA}/provision.*/*")
    if not all("/var/lib/agent-vm/done" in read(script) for script in scripts):
        while True:
            with contextlib.suppress(OSError):
                if meta_data()["instance-id"] in read("/run/lima-boot-done").split():
                    return
            time.sleep(0.1)


def become_another() -> None:
    """Another machine than the saved one and its other clones. The kernel's random numbers are
    others already: settle.sh has seen that it has vmgenid."""
    for_root = "overriderockperm,uid=0,mode=0700,dmode=0700"  # as Lima has it
    mount("/dev/disk/by-label/cidata", CIDATA, "iso9660", RDONLY, for_root)
    name, random = meta_data()["local-hostname"], "/proc/sys/kernel/random"
    write("/etc/hosts", read("/etc/hosts").replace(socket.gethostname(), name))
    write("/etc/hostname", f"{name}\n")
    socket.sethostname(name)
    write("/etc/machine-id", read(f"{random}/uuid").replace("-", ""))
    write(f"{OURS}/boot-id", read(f"{random}/uuid"))
    mount(f"{OURS}/boot-id", f"{random}/boot_id", flags=BIND)
    restart = read(f"{OURS}/restart").split()
    if restart:
        run("systemctl", "restart", *restart)
    os.unlink(f"{OURS}/saved")


def end_as_a_boot_does() -> None:
    """What `limactl start` waits for, as it looks around then; and a journal of the machine's."""
    time.sleep(1)  # the agent is first
    for name in ("lima-ssh-ready", "lima-boot-done"):
        write(f"/run/{name}", meta_data()["instance-id"] + "\n")
    run("systemctl", "restart", "systemd-journald")


def set_clock(now: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME, now)


# --- a place to work ---


@contextlib.contextmanager
def acting_as(user: pwd.struct_passwd) -> Iterator[None]:
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
        os.seteuid(os.getuid())
        os.setegid(os.getgid())


def merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}


def merge(path: str, new: dict[str, Any]) -> None:
    """Deep-merge into a file of JSON that may not exist yet."""
    text = read(path) if os.path.exists(path) else ""
    try:
        old = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write(path, json.dumps(merged(old, new), indent=2) + "\n")
    os.chmod(path, 0o600)


def known_locale(variables: dict[str, str]) -> dict[str, str]:
    """Those variables; under a locale that the guest lacks every shell warns."""
    asked = {"LANG", *(name for name in dir(locale) if name[:3] == "LC_")} & variables.keys()
    before = locale.setlocale(locale.LC_ALL)
    try:
        for name in {"LC_ALL"} & asked or asked:
            locale.setlocale(locale.LC_ALL, variables[name] or "C")
        return variables
    except locale.Error:
        rest = {name: value for name, value in variables.items() if name not in asked}
        return {**rest, "LC_ALL": "C.UTF-8"}
    finally:
        locale.setlocale(locale.LC_ALL, before)


def exports(variables: dict[str, str]) -> str:
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def furnish(user: pwd.struct_passwd, asked: dict[str, Any]) -> None:
    """The files of the run, as the VM's user."""
    home, env = user.pw_dir, known_locale(asked["variables"]["env"])
    scripts = {name: exports(row) for name, row in {**asked["variables"], "env": env}.items()}
    with acting_as(user):
        os.makedirs(f"{home}/.agent-vm", exist_ok=True)
        for name, text in {**asked["files"], **scripts}.items():
            write(f"{home}/.agent-vm/{name}", text)
        os.chmod(f"{home}/.agent-vm/launch.sh", 0o700)
        os.makedirs(f"{home}/.claude/projects", exist_ok=True)
        write(f"{home}/.gitconfig", "\n[include]\n\tpath = ~/.agent-vm/gitconfig\n", "a")
        merge(f"{home}/.claude.json", asked["claude"])
        merge(f"{home}/.claude/settings.json", {"skipDangerousModePermissionPrompt": True})
        write(f"{home}/.claude/CLAUDE.md", "\n" + asked["briefing"], "a")


# --- closed in ---


class Probe:
    """All that is closed, tried at once. QEMU answers each TCP connection of a closed-in VM with a
    reset, at once: a silence is no proof.
    """

    def __init__(self, ssh_port: int) -> None:
        self.began, self.silent = time.monotonic(), dict[socket.socket, tuple[str, int]]()
        self.has_to_refuse = {"192.168.5.2", "1.1.1.1"}  # whatever the guest's own routes are
        for port, addresses in CLOSED.items():
            for address in addresses.split():
                self.try_it(socket.SOCK_STREAM, address, port or ssh_port)
        for address in CLOSED_UDP.split():
            self.try_it(socket.SOCK_DGRAM, address, 53, DNS)
            self.try_it(socket.SOCK_DGRAM, address, 123, NTP)
        self.try_it(socket.SOCK_RAW, "1.1.1.1", 0, ECHO, protocol=socket.IPPROTO_ICMP)

    def try_it(
        self, kind: int, address: str, port: int, data: bytes = b"", protocol: int = 0
    ) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
            fault = sock.connect_ex((address, port))
            if fault not in (0, errno.EINPROGRESS):
                raise OSError(fault, "")
            if data:
                sock.send(data)
            self.silent[sock] = (address, port)
        except OSError as error:  # no route, or refused already
            if kind == socket.SOCK_STREAM and error.errno == errno.ECONNREFUSED:
                self.has_to_refuse.discard(address)

    def found(self) -> str:
        """What is not closed."""
        wrong, seconds = [], 0.0
        while seconds < 0.3 or (seconds < 10 and self.has_to_refuse):
            streams = [sock for sock in self.silent if sock.type == socket.SOCK_STREAM]
            heard, connected, _ = select.select(self.silent, streams, [], 0.05)
            for sock in {*heard, *connected}:
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                address, port = self.silent.pop(sock)
                if sock.type == socket.SOCK_STREAM and error == errno.ECONNREFUSED:
                    self.has_to_refuse.discard(address)
                elif not error:
                    wrong.append(f"{address} port {port} answers")
            seconds = time.monotonic() - self.began
        wrong += [f"{address} does not refuse" for address in self.has_to_refuse]
        return ", ".join(wrong)


def begin_probe(mode: str, ssh_port: int) -> Probe | None:
    if mode == "open":
        return None
    if "00000000" not in [row.split()[1] for row in read("/proc/net/route").splitlines()]:
        # QEMU tells a closed-in VM no router; with one it is seen who answers.
        run("ip", "route", "add", "default", "via", "192.168.5.2", "dev", "eth0")
    return Probe(ssh_port)


def lead(has_way_out: bool, script: str) -> None:
    """Lead the VM's programs to the way out, where that is not done yet, or not any more."""
    is_led = os.path.exists(f"{OURS}/led")
    if is_led != has_way_out:
        words = ["bash", "-s"] + ["off"] * is_led
        done = subprocess.run(words, input=script, capture_output=True, text=True)
        if done.returncode:
            raise Open(done.stdout + done.stderr)


def show_the_way_out() -> None:
    """To services, and programs that do ask a proxy: it says why it refuses."""
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    lines = [f"{name}=http://127.0.0.1:{PROXY[1]}\n" for name in names]
    write("/etc/environment", "".join(lines) + "no_proxy=localhost,127.0.0.1\n", "a")
    said = b""
    with contextlib.suppress(OSError), socket.create_connection(PROXY, 10) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while b"agent-vm:" not in said and (data := sock.recv(4096)):
            said += data
    if b"agent-vm:" not in said:  # no proxy, or not ours
        raise Open(f"the way out does not answer: {said[:300]!r}")


# --- the story ---


def wake(user: pwd.struct_passwd, asked: dict[str, Any], resumed: bool) -> None:
    mode, zone = asked["mode"], f"/usr/share/zoneinfo/{asked['zone']}"
    has_way_out = mode in ("internet", "allow")
    probe = begin_probe(mode, asked["port"])
    if resumed:
        become_another()
    furnish(user, asked)
    lead(has_way_out, asked["files"]["network.sh"])
    mount_folders(asked["mounts"])
    if os.path.isfile(zone) and os.path.realpath(zone) != os.path.realpath("/etc/localtime"):
        run("ln", "-sf", zone, "/etc/localtime")
    if os.path.isdir(f"{user.pw_dir}/.agent-vm/copied"):  # transcripts that the run may not write
        copy = ["cp", "-Rn", ".agent-vm/copied/.", ".claude/projects"]
        subprocess.run(copy, cwd=user.pw_dir, user=user.pw_uid, group=user.pw_gid)
    if has_way_out:
        show_the_way_out()
    if probe and (found := probe.found()):
        raise Open(f"the network is not closed: {found}")
    if not resumed:
        wait_for_scripts()
    if mode == "off":  # programs need not wait for it
        run("ip", "route", "flush", "exact", "default")


def serve(client: socket.socket, user: pwd.struct_passwd) -> bool:
    """One run; whether the VM was resumed for it."""
    resumed = os.path.exists(f"{OURS}/saved")
    client.sendall(b"ready\n")
    lines = client.makefile("rb")
    lines.peek()
    arrived, answer = time.time(), "done"
    try:
        asked = json.loads(lines.readline())
        set_clock(asked["now"] + time.time() - arrived)
        wake(user, asked, resumed)
    except Open as error:
        answer = f"is not confined: {error}"
    except Exception as error:  # whatever it is, the run says it
        answer = f"could not be prepared: {type(error).__name__}: {error}"
    client.sendall(" ".join(answer.split()).encode() + b"\n")
    return resumed


def main(argv: list[str]) -> None:
    os.umask(0o022)
    if argv:
        try:
            mount_folders(json.loads(argv[0]))
        except OSError as error:
            sys.exit(str(error))
        return
    user, path = pwd.getpwnam(os.environ["SUDO_USER"]), f"{OURS}/wake.sock"
    os.makedirs(OURS, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        os.chmod(path, 0o600)
        os.chown(path, user.pw_uid, user.pw_gid)
        server.listen()
        if os.fork():
            os._exit(0)  # who has sent it need not wait
        os.setsid()
        for stream in (0, 1, 2):
            os.dup2(os.open("/dev/null", os.O_RDWR), stream)
        with server.accept()[0] as client:
            os.unlink(path)
            resumed = serve(client, user)
    if resumed:
        end_as_a_boot_does()


if __name__ == "__main__":
    main(sys.argv[1:])
''',
    "provision/10-base.sh": r"""#!/bin/bash
# Run by Lima in the guest, as root, at every boot; does its work once.
# All that is installed, read from top to bottom. The first failure ends it, so the error that the
# log shows is the cause.
set -eux -o pipefail
marker=/var/lib/agent-vm/done/10-base
[ ! -e "$marker" ] || exit 0
mkdir -p "${marker%/*}"
exec > >(tee -a /var/log/agent-vm-provision.log) 2>&1
: "${PARAM_minimal:=false}" "${PARAM_npmRegistry:=}" "${PARAM_aptMirror:=}" "${PARAM_locale:=}"
user='{{.User}}' home='{{.Home}}'  # Lima fills them in
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
export DEBIAN_FRONTEND=noninteractive

say() { { set +x; } 2>/dev/null; echo "agent-vm: $1"; set -x; }
step() { doing=$1; say "$1"; }
fail() { doing=; say "error: $1"; exit 1; }
note() { echo "$1" >> /var/lib/agent-vm/notes; }
fetch() { curl -fsSL --connect-timeout 10 --speed-time 60 --retry 2 "$@"; }
apt_install() { apt-get install -y --no-install-recommends "$@"; }
# runuser keeps the environment, and with it the proxy variables.
as_user() { runuser -u "$user" -- env HOME="$home" "$@"; }

work=$(mktemp -d -p /var/tmp)  # /tmp is memory
# What fails without words of its own ends here.
ended() { rm -rf "$work"; [ -z "$doing" ] || say "error: $doing failed"; }
trap ended EXIT

step "setting up apt"
cat > /etc/apt/apt.conf.d/90agent-vm <<'CONF'
Acquire::Retries "3";
Acquire::http::Timeout "15";
DPkg::Lock::Timeout "300";
CONF
# No need to survive a power cut while installing: an unfinished base instance is built anew.
echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/agent-vm
# A disposable VM must not spend its first minutes, and apt's lock, on upgrades.
systemctl mask --now apt-daily.timer apt-daily-upgrade.timer

if [ -n "$PARAM_aptMirror" ]; then
  mirror=${PARAM_aptMirror%/}
  security=${mirror%/*}/debian-security
  # The cloud image names mirror lists (mirror+file:/etc/apt/mirrors/debian.list), others name URLs.
  old='(https?|mirror\+file):/[^ ]*/debian' end='(\.list|/)?( |$)'
  mapfile -t sources < <(
    grep -lsE "$old$end" /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources)
  [ "${#sources[@]}" -gt 0 ] || fail "no Debian mirror to replace in /etc/apt/sources.list*"
  sed -E -i "s#$old$end#$mirror\3#" "${sources[@]}"
  # Mirrors keep the security suite beside the archive, as debian-security. When this one does not,
  # security updates still come from where the image has them: better slow than silently missing.
  if fetch -o /dev/null "$security/dists/$codename-security/InRelease"; then
    sed -E -i "s#$old-security$end#$security\3#" "${sources[@]}"
  else
    note "Security updates from the image's own mirror: --apt-mirror has none."
  fi
fi
apt-get update --error-on=any || note "Some package lists are missing: apt-get update failed."

step "installing packages"
packages=(ca-certificates curl git jq nftables python3-minimal redsocks)  # see guest/network.sh
if [ "$PARAM_minimal" != true ]; then
  packages+=(
    build-essential file less openssh-client procps iproute2 rsync sudo unzip wget
    tzdata tzdata-legacy python3 python3-pip python3-venv
    fd-find gh ripgrep
    kitty-terminfo locales ncurses-term
    chromium fonts-liberation xauth xvfb
  )
  ln -sf /usr/bin/fdfind /usr/local/bin/fd  # Debian's name, because another package has fd
fi
apt_install "${packages[@]}"
systemctl disable --now redsocks.service  # a run starts its own
# The value is the host's LANG, whatever that holds: only a whole line of Debian's list counts.
if grep -sqxF -e "$PARAM_locale UTF-8" /usr/share/i18n/SUPPORTED; then
  echo "$PARAM_locale UTF-8" > /etc/locale.gen
  locale-gen
fi
# The project belongs to the host's user id: git would call that "dubious ownership" and refuse.
git config --system --replace-all safe.directory '*'

# Packages of a vendor's own; when that fails, Debian's are taken, and apt knows the vendor no more.
from_vendor() {  # NAME KEY-URL "URL SUITE COMPONENT" PACKAGE …
  local key=/etc/apt/keyrings/$1.asc list=/etc/apt/sources.list.d/$1.list
  fetch -o "$key" "$2" && echo "deb [signed-by=$key] $3" > "$list" &&
    apt-get update && apt_install "${@:4}" && return
  rm -f "$key" "$list"
  return 1
}

if [ "$PARAM_minimal" != true ]; then
  step "installing Node.js"
  url=https://deb.nodesource.com
  if ! from_vendor nodesource $url/gpgkey/nodesource-repo.gpg.key \
    "$url/node_22.x nodistro main" 'nodejs=22.*'; then
    apt_install nodejs npm
    note "Node.js $(node --version) from Debian: NodeSource could not be reached."
  fi
  [ -z "$PARAM_npmRegistry" ] ||
    npm config set --location=global registry "${PARAM_npmRegistry%/}/"

  step "installing Docker"
  url=https://download.docker.com/linux/debian
  if ! from_vendor docker $url/gpg "$url $codename stable" \
    docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin; then
    apt_install docker.io docker-cli docker-buildx docker-compose
    note "Docker Engine from Debian: Docker's repository could not be reached."
  fi
  usermod -aG docker "$user"
  # Pulls need the host's proxy variables, which Lima writes to /etc/environment.
  printf '[Service]\nEnvironmentFile=-/etc/environment\n' |
    install -D -m 644 /dev/stdin /etc/systemd/system/docker.service.d/environment.conf
  # The daemon starts with the first docker command: a clone that does not use it boots faster.
  systemctl daemon-reload
  systemctl disable --now docker.service containerd.service
  systemctl enable --now docker.socket
fi

claude_from_vendor() {
  fetch -o "$work/install.sh" https://claude.ai/install.sh &&
    as_user timeout 900 bash < "$work/install.sh" &&
    as_user "$home/.local/bin/claude" --version &&
    ln -sf "$home/.local/bin/claude" /usr/local/bin/claude
}

# The package holds one native binary, so neither Node.js nor npm is needed.
claude_from_npm() {
  local registry=${PARAM_npmRegistry%/} package tarball integrity
  [ -n "$registry" ] || registry=$(npm config get registry | sed 's#/$##') ||
    fail "Claude Code's installer could not be reached and no npm registry is known: --npm-registry"
  package=claude-code-linux-$(dpkg --print-architecture | sed 's/amd64/x64/')
  fetch -o "$work/package.json" "$registry/@anthropic-ai%2f$package" ||
    fail "the npm registry gives no $package"
  read -r tarball integrity < <(
    jq -r '.versions[."dist-tags".latest].dist | "\(.tarball) \(.integrity)"' "$work/package.json")
  fetch -o "$work/claude.tgz" "$tarball" || fail "the npm registry gives no tarball of $package"
  echo "$(base64 -d <<< "${integrity#sha512-}" | basenc --base16 -w0)  $work/claude.tgz" |
    sha512sum --check --strict ||
    fail "the tarball of $package is not what the npm registry promised"
  tar -xzf "$work/claude.tgz" -C /usr/local/bin --no-same-owner --strip-components=1 package/claude
  as_user claude --version
  note "Claude Code from npm: its installer could not be reached."
}

step "installing Claude Code"
claude_from_vendor || claude_from_npm
if [ "$PARAM_minimal" != true ]; then
  step "installing the Chrome DevTools MCP server"
  if npm install -g --cache "$work/npm" --no-audit --no-fund --fetch-retries=1 \
    chrome-devtools-mcp; then
    as_user claude mcp add --scope user chrome-devtools -- \
      chrome-devtools-mcp --headless --isolated --executablePath /usr/bin/chromium \
      --no-usage-statistics --no-performance-crux
  else
    note "No Chrome DevTools MCP server: npm could not install it."
  fi
fi

# Under QEMU the project is mounted over 9p, which Debian's cloud kernel lacks. The next boot uses
# the generic one.
if ! modprobe -n -q 9p && [[ $(systemd-detect-virt) =~ ^(qemu|kvm)$ ]]; then
  step "installing a kernel with 9p"
  apt_install "linux-image-$(dpkg --print-architecture)"
  apt-get purge -y '?installed?name(^linux-image-.*cloud)'
fi

step "cleaning up"
apt-get clean
fstrim / || true  # gives the freed blocks back to the host's disk file

touch "$marker"
doing=
""",
    "provision/20-test.sh": r"""#!/bin/bash
# Run by Lima in the guest, as root, at every boot; does its work once, after 10-base.sh.
# What a run needs answers. The marker says that the base instance is complete.
set -eux -o pipefail
marker=/var/lib/agent-vm/done/20-test
[ ! -e "$marker" ] || exit 0
[ -e "${marker%/*}/10-base" ] || exit 1  # its error is in the log
# Once 10-base.sh has replaced the kernel, the running one has no modules, and no Docker starts.
[ -d "/lib/modules/$(uname -r)/kernel" ] || exit 0
exec > >(tee -a /var/log/agent-vm-provision.log) 2>&1
: "${PARAM_minimal:=false}"
user='{{.User}}' home='{{.Home}}'  # Lima fills them in

say() { { set +x; } 2>/dev/null; echo "agent-vm: $1"; set -x; }
check() {
  runuser -u "$user" -- env -C "$home" HOME="$home" \
    timeout 600 bash -lc "set -e -o pipefail; $1" ||
    { say "error: smoke test failed: $1"; exit 1; }
}

say "testing it"
for tool in claude git jq; do check "$tool --version"; done
if [ "$PARAM_minimal" != true ]; then
  for tool in curl gcc node npm rg fd gh; do check "$tool --version"; done
  check "python3 -m venv /tmp/smoke"
  check "docker compose version"
  check "docker buildx version"
  check "sg docker -c 'docker version'"
  check "chromium --headless --disable-gpu --dump-dom data:text/html,smoke-test | grep smoke-test"
fi
# The next boot may take any installed kernel; each must have the mount type that the host confines.
if [[ $(systemd-detect-virt) =~ ^(qemu|kvm)$ ]]; then
  check "for k in /boot/vmlinuz-*; do /sbin/modinfo -k \"\${k#*/vmlinuz-}\" 9p; done"
fi

say "the base instance is complete"
touch "$marker"
""",
    "qemu.py": r'''#!/usr/bin/env python3
"""What Lima starts in place of QEMU: QEMU itself, as the run of agent-vm asks.

Lima finds this file by QEMU_SYSTEM_<ARCH>. AGENT_VM_QEMU holds JSON: {"program": "/PATH/OF/QEMU",
"restrict": true, "mounts": [["/PATH", writable], …]}, and to save or resume a machine {"saved":
"/FOLDER", "resume": true}. Questions about features are passed on. A closed machine has only the
one network device that Lima writes, with `restrict=on`: QEMU passes no packet between the guest and
the host, its network or the internet, whatever the guest's root does; ssh comes in by `hostfwd`.

Starts:   QEMU, in its own place
Reads:    AGENT_VM_QEMU, /proc/cpuinfo, machine.json of a saved machine
Writes:   that file, of a machine that is going to be saved
Reaches:  nothing
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

# All of it, as Lima 2.2 writes it (pkg/driver/qemu/qemu.go): not a word more may be in it.
NETDEV = re.compile(
    r"user,id=net0,net=[0-9.]+/[0-9]+,dhcpstart=[0-9.]+,hostfwd=tcp:127\.0\.0\.1:[0-9]+-:22"
).fullmatch
# Other ways to a network, and options that read options from elsewhere.
CLOSED = ("nic", "net", "readconfig", "set", "redir", "smb", "tftp", "bootp", "nodefconfig")
CPU = re.compile("^(?:model name|flags|Features|CPU p).*", re.MULTILINE).findall  # of cpuinfo
OWN = re.compile(r"mac=[0-9a-f:]+|127\.0\.0\.1:[0-9]+|^lima-.*")  # of each clone


class Refused(Exception):
    """Why no machine is started."""


# --- pure: what is started ---


def is_question(words: list[str]) -> bool:
    """Whether it is one of Lima's about QEMU (`-M none -netdev help`), which starts no machine."""
    return words == ["--version"] or (len(words) <= 4 and "help" in words)


def restricted(words: list[str]) -> list[str]:
    """A machine's arguments with its network closed; Refused when they are not what Lima writes.
    QEMU takes each option with one dash or two, and of one that is given twice both."""
    options = [re.sub("^--?", "", word) if word[:1] == "-" else "" for word in words]
    for option in set(options).intersection(CLOSED):
        raise Refused(f"-{option} is not one of its options")
    places = [at for at, option in enumerate(options) if option == "netdev"]
    if len(places) != 1:
        raise Refused(f"it has {len(places)} network devices, not one")
    value = "".join(words[places[0] + 1 : places[0] + 2])
    if not NETDEV(value):
        raise Refused(f"its network device is not the one that Lima writes: {value!a}")
    return [*words[: places[0] + 1], f"{value},restrict=on", *words[places[0] + 2 :]]


def added(words: list[str], asked: dict[str, Any]) -> list[str]:
    """The host's folders, in slots that the guest knows by their tags, and the memory's file, whose
    pages resumed machines share until they write; by vmgenid the guest knows it is another.
    """
    more = []
    for slot, (path, writable) in enumerate(asked["mounts"]):
        shared = f"local,mount_tag=agent-vm-{slot},path={path.replace(',', ',,')}"
        more += ["-virtfs", f"{shared},security_model=none{'' if writable else ',readonly=on'}"]
    if "saved" in asked:
        size, share = words[words.index("-m") + 1], "off" if asked["resume"] else "on"
        file = f"{asked['saved']}/memory".replace(",", ",,")
        backend = f"memory-backend-file,id=mem,size={size}M,mem-path={file},share={share}"
        more += ["-object", backend, "-machine", "memory-backend=mem"]
        more += ["-device", "vmgenid,guid=auto", *(["-incoming", "defer"] * asked["resume"])]
    return more


# --- the story: one start ---


def compared(words: list[str], asked: dict[str, Any]) -> None:
    """Note which machine is going to be saved; Refused when one to be resumed is another by now."""
    folder, info = os.path.dirname(words[words.index("-pidfile") + 1]), os.stat(asked["program"])
    cpu = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    now = {
        "what Lima gives to QEMU": [OWN.sub("", word.replace(folder, "")) for word in words],
        "QEMU itself": [asked["program"], info.st_size, info.st_mtime_ns],
        "the host's kernel or CPU": [os.uname().release, *sorted(set(CPU(cpu)))],
        "the number of folders": len(asked["mounts"]),
    }
    with open(f"{asked['saved']}/machine.json", "r" if asked["resume"] else "w") as file:
        if not asked["resume"]:
            json.dump(now, file)
            return
        before = json.load(file)
    for what in now:
        if now[what] != before[what]:
            raise Refused(f"{what} is not as it was saved")


def main(argv: list[str]) -> int:
    try:
        asked = json.loads(os.environ.pop("AGENT_VM_QEMU", "{}"))
        words, is_open = argv, asked["restrict"] is False
        if not is_question(argv):
            words = [*(argv if is_open else restricted(argv)), *added(argv, asked)]
            if "saved" in asked:
                compared(argv, asked)
        os.execv(asked["program"], [asked["program"], *words])
    except (ValueError, LookupError, TypeError):
        print("agent-vm: AGENT_VM_QEMU is not what a run of agent-vm sets", file=sys.stderr)
    except (Refused, OSError) as error:
        print(f"agent-vm: the VM is not started: {error}", file=sys.stderr)
    return 1


# --- you may stop here: what follows only calls what is above ---

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
''',
    "settle.sh": r"""#!/bin/bash
# Sent by setup into the base instance, as root, right before it is saved as it runs. Its clones
# go on from here: guest/wake.py waits already, guest/network.sh has led their programs to the way
# out, what they need runs, and nothing else is about to begin.
set -eu
compgen -G '/sys/bus/*/drivers/vmgenid/*:*' > /dev/null || {
  echo "its kernel would make the same random numbers in each clone: it has no vmgenid"
  exit 1
}
systemctl is-system-running --wait > /dev/null || true
if systemctl cat docker.service > /dev/null 2>&1; then
  systemctl start docker.service
fi
# When a state of days ago goes on, all would be due at once.
systemctl stop '*.timer' apt-daily.service apt-daily-upgrade.service
journalctl -q --rotate --vacuum-time=1s > /dev/null 2>&1
# What has a generator of random numbers in its memory draws the same in each clone, as OpenSSL's
# does: a clone starts it anew. These services ask the kernel, whose numbers are others.
systemctl list-units -t service --state=running --plain --no-legend | cut -d ' ' -f 1 |
  grep -vE '^(systemd-|dbus|ssh|docker\.|containerd\.|getty@|serial-|user@|lima-|cron\.|polkit)' \
    > /run/agent-vm/restart || true
[ -z "$(docker ps -q 2> /dev/null)" ] || echo docker.service >> /run/agent-vm/restart
modprobe -a 9p 9pnet_virtio
rm -rf /etc/update-motd.d  # sshd would start what is there at each log-in
umount /mnt/lima-cidata
rm -f /run/lima-ssh-ready /run/lima-boot-done
touch /run/agent-vm/saved
fstrim -a || true
sync
# What each run starts is in memory from the beginning.
{
  for program in curl claude; do "$program" --version; done
  for program in /usr/lib/openssh/sshd-*; do "$program" -?; done
  sudo -u "$SUDO_USER" bash -lc true
} < /dev/null > /dev/null 2>&1 || true
""",
}
# END GENERATED

if __name__ == "__main__":
    sys.exit(main())
