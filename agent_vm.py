#!/usr/bin/env python3
"""Run AI coding agents with full autonomy in disposable Linux VMs (on stock Lima).

Each run clones a stopped base instance, mounts the current directory, runs the agent in the clone
and deletes it. The exit status is the agent's.

    agent_vm.py setup                    build the base instance (once, some minutes)
    agent_vm.py run -- -p "fix the bug"  run Claude Code on the current directory
    agent_vm.py shell                    a shell in a fresh VM with the current directory

It starts limactl, ssh and git (in `setup` also npm, and sudo or brew after asking); it writes below
its state, config and data folders (`info` shows them) and into Lima's home, never into the project.
It needs the network only in `setup`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import stat
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple
from typing import NoReturn

__version__ = "0.1.0"

# Modules that few commands need are imported in the functions that use them: `shell-init` runs at
# every start of a shell, and each of them costs it some milliseconds.

# Docker's convention: 125 is a failure of ours around the guest's command, never the command's.
EXIT_OURS = 125

MIN_LIMA = (2, 0)  # `limactl clone` with --mount-only/--set, and protect, as used here
LIMA_RELEASE = "2.2.0"
LIMA_URL = f"https://github.com/lima-vm/lima/releases/download/v{LIMA_RELEASE}"

BASE = "agent-vm-base"
CLONE_NAME = re.compile(r"agent-vm-[a-z0-9-]*[a-z0-9]-[0-9a-f]{6}")
BASE_NAME = re.compile(r"agent-vm-base(-[a-z0-9-]+)?(\.new|\.old|\.swap)?")

# $LIMA_HOME/NAME/ssh.sock.<16 random> must fit in sockaddr_un.sun_path: 104 bytes on macOS.
SOCKET_PATH_MAX = 104
SOCKET_NAME = "/ssh.sock.1234567890123456"

# The mount types whose limits the host enforces. Under reverse-sshfs the host runs an sftp-server
# that serves every file of the user, and the guest's root holds the other end of it.
CONFINED_MOUNT_TYPE = {"qemu": "9p", "vz": "virtiofs", "krunkit": "virtiofs"}

# What Lima refuses as a mount point (limayaml/validate.go), said before anything is created.
SYSTEM_DIRS = ("/bin", "/dev", "/etc", "/home", "/opt", "/sbin", "/tmp", "/usr", "/var")

# Paths of these characters survive cloud-init's YAML, fstab and QEMU's option syntax; others are
# mounted through a link under /mnt/agent-vm.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./+-]*")

CREDENTIALS = ("CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_API_KEY")
CREDENTIAL_PREFIX = {"sk-ant-oat": CREDENTIALS[0], "sk-ant-api": CREDENTIALS[1]}

# Passed from the host's environment into the guest: how the terminal looks, which model answers.
PASSED_ENV = (
    "COLORTERM", "NO_COLOR", "FORCE_COLOR", "TERM_PROGRAM", "LANG",
    "ANTHROPIC_BASE_URL", "ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL",
)  # fmt: skip

GITHUB_TOKEN = "GITHUB_MCP_TOKEN"  # for the proxy alone
GITHUB_PROXY = "github_mcp_proxy.py"
# GitHub takes no repository that is called so: "." and "..", or x.git and x.wiki.
OWNER_REPO = r"([A-Za-z0-9][A-Za-z0-9_-]*/(?!\.{1,2}/?$)[A-Za-z0-9._-]+?(?<!\.git)(?<!\.wiki))"
GITHUB_URL = re.compile(
    r"(?:https?://(?:[^@/]*@)?(?:www\.)?github\.com(?::443)?/"
    r"|ssh://git@(?:ssh\.)?github\.com(?::\d+)?/|git@(?:ssh\.)?github\.com:/?)"
    + OWNER_REPO + r"(?:\.git)?/?",
    re.IGNORECASE,
)  # fmt: skip
# The ways to write a repository's address; each is led to the proxy in the guest.
GITHUB_FORMS = ("https://github.com/", "git@github.com:", "ssh://git@github.com/")

PROXY = re.compile(r"(https?|all|no)_proxy", re.IGNORECASE)

PROVISION_LOG = "/var/log/agent-vm-provision.log"
PROVISION_DONE = "/var/lib/agent-vm/done/50-finish"
PROJECT_HOOK = ".claude-vm.runtime.sh"
AGENT = ("claude", "--dangerously-skip-permissions")


class AgentVMError(Exception):
    """What failed and what to do next; `main` prints both and exits with the verb's status."""

    def __init__(self, message: str, hint: str = "", details: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.details = details


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
    hostname: str = ""  # its name in ssh.config: NAME with its dots made dashes
    vm_type: str = ""
    mount_type: str = ""
    mounts: tuple[tuple[str, bool], ...] = ()  # (location, writable), Lima's defaults merged in
    forward_agent: bool = False
    writes_host: bool = False  # copyToHost, or a forward that makes a socket on the host
    home: str = ""
    cpus: int = 0
    memory: int = 0
    protected: bool = False


class Mount(NamedTuple):
    """A host folder in the guest: `source` on the host, `target` in the guest, both absolute."""

    source: str
    target: str
    writable: bool = False
    written: str = ""  # the source before links were followed


class Lease(NamedTuple):
    """Who owns a clone. A lease whose process is gone makes its clone an orphan."""

    name: str
    pid: int
    start: str  # the process's start time: a pid alone may have been given to another process
    boot_id: str
    project: str
    created: float
    keep: bool = False


class Credential(NamedTuple):
    name: str
    value: str
    origin: str

    def __repr__(self) -> str:
        return f"<{self.name} from {self.origin}>"


class GitHub(NamedTuple):
    """A running GitHub proxy, as far as its guest must know it."""

    repo: str  # OWNER/REPO
    port: int
    secret: str
    readonly: bool
    remote: str  # the project's remote as it is written, "" when it is not from there
    asking: subprocess.Popen[bytes] | None = None  # the proxy, with --confirm-writes

    def __repr__(self) -> str:
        return f"<proxy for {self.repo} on port {self.port}>"

    @property
    def url(self) -> str:
        return f"http://host.lima.internal:{self.port}"


class HostFacts(NamedTuple):
    """What the checks before a setup look at; sizes in bytes."""

    system: str
    machine: str
    root: bool
    cpus: int
    memory: int
    disk_free: int
    kvm: bool
    qemu: bool
    qemu_img: bool
    os_release: Mapping[str, str]


# --- pure core: data in, data out ---


def parse_instances(stdout: str) -> list[Instance]:
    """Read `limactl list --format json`: one object a line (limactl 2.x)."""
    try:
        return [instance_from(json.loads(line)) for line in stdout.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AgentVMError(
            f"limactl list printed something that is not its JSON: {error}",
            hint="check with: limactl list --format json",
        ) from error


def instance_from(fields: Mapping[str, Any]) -> Instance:
    config = fields.get("config") or {}
    return Instance(
        name=str(fields["name"]),
        status=str(fields["status"]),
        dir=Path(fields["dir"]),
        hostname=str(fields.get("hostname") or f"lima-{fields['name']}"),
        vm_type=str(fields.get("vmType") or ""),
        mount_type=str(config.get("mountType") or ""),
        mounts=tuple((m["location"], bool(m.get("writable"))) for m in config.get("mounts") or ()),
        writes_host=bool(config.get("copyToHost"))
        or any(
            rule.get("hostSocket") or rule.get("reverse")
            for rule in config.get("portForwards") or ()
        ),
        forward_agent=bool((config.get("ssh") or {}).get("forwardAgent")),
        home=str((config.get("user") or {}).get("home") or ""),
        cpus=int(fields.get("cpus") or 0),
        memory=int(fields.get("memory") or 0),
        protected=bool(fields.get("protected")),
    )


def parse_lima_version(text: str) -> tuple[int, ...]:
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if not match:
        raise AgentVMError(f"limactl --version printed {text.strip()[:80]!r}")
    return tuple(int(part) for part in match.groups(default="0"))


def base_name(suffix: str) -> str:
    return f"{BASE}-{suffix}" if suffix else BASE


def is_clone(name: str) -> bool:
    return CLONE_NAME.fullmatch(name) is not None


def is_base(name: str) -> bool:
    """A base instance, one being built (.new) or the previous one (.old)."""
    return BASE_NAME.fullmatch(name) is not None and not is_clone(name)


def clone_name(directory: str, tag: str, lima_home: str) -> str:
    """`agent-vm-SLUG-TAG`, the slug cut so that Lima's ssh socket path fits."""
    slug = re.sub(r"[^a-z0-9]+", "-", directory.lower()).strip("-") or "project"
    fixed = len(os.fsencode(lima_home)) + len("/agent-vm--") + len(tag) + len(SOCKET_NAME)
    room = SOCKET_PATH_MAX - 1 - fixed
    if room < 1:
        raise AgentVMError(
            f"the path of Lima's home is too long for its sockets: {lima_home}",
            hint="set LIMA_HOME to a shorter path",
        )
    return f"agent-vm-{slug[: min(room, 30)].strip('-') or 'p'}-{tag}"


def session_key(project: str) -> str:
    """The folder name of a project's transcripts: readable, and distinct for distinct paths."""
    import hashlib

    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(project).lower()).strip("-")
    return f"{slug[:30] or 'project'}-{hashlib.sha256(os.fsencode(project)).hexdigest()[:12]}"


def inside(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies below it, under whatever spelling of its name."""
    if path == folder or path.startswith(folder.rstrip("/") + "/"):
        return True
    try:
        wanted = os.stat(folder)
        return any(
            os.path.samestat(parent.stat(), wanted) for parent in (Path(path), *Path(path).parents)
        )
    except OSError:
        return False


def overlaps(path: str, other: str) -> bool:
    return inside(path, other) or inside(other, path)


def mount_refusal(path: str, home: str, private: Mapping[str, str]) -> str:
    """Why `path` should not be given to an agent, or "". All paths are resolved."""
    if path == "/":
        return "it is the root of the file system"
    if inside(home, path):
        return f"it holds the home directory {home}"
    for name, folder in private.items():
        if overlaps(path, folder):
            return f"it overlaps {name} ({folder})"
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
                return f"{mount.source} would be read-only, but {folder} is writable"
            if mount.written and inside(mount.written, folder) and not inside(mount.source, folder):
                return f"{mount.written} leads out of {folder}: an agent may have made that link"
    return ""


def unusable_path(path: str) -> str:
    """Why a path cannot be mounted at the same place in a guest, or ""."""
    if path in SYSTEM_DIRS:
        return "the guest needs its own"
    if any(ord(char) < 32 or ord(char) == 127 for char in path):
        return "it contains a control character"
    if not path.isprintable() and any(0xDC80 <= ord(char) <= 0xDCFF for char in path):
        return "its name is not UTF-8"
    return ""


def parse_mount(spec: str) -> Mount:
    """DIR[:ro|:rw][:GUESTPATH]; read-only unless said, and at the same path unless said."""
    match = re.fullmatch(r"(.+?)(?::(ro|rw))?(?::(/.*))?", spec, re.DOTALL)
    written = os.path.abspath(os.path.expanduser(match[1] if match else spec))
    source = os.path.realpath(written)
    if not match or not os.path.isdir(source):
        raise argparse.ArgumentTypeError(f"{spec!r}: {source} is not a directory")
    return Mount(source, os.path.normpath(match[3] or source), match[2] == "rw", written)


def lima_mounts(mounts: Sequence[Mount], links: Path) -> list[dict[str, Any]]:
    """The `mounts:` of the clone's YAML; awkward paths go through `links/N` and /mnt/agent-vm/N."""
    result = []
    for index, mount in enumerate(mounts):
        plain = PLAIN_PATH.fullmatch(mount.source)
        result.append({
            "location": mount.source if plain else str(links / str(index)),
            "mountPoint": guest_mount_point(mount, index),
            "writable": mount.writable,
            # Lima's default for read-only mounts, fscache, shows old contents for minutes after
            # the host has written a file anew.
            "9p": {"cache": "mmap"},
        })  # fmt: skip
    return result


def guest_mount_point(mount: Mount, index: int) -> str:
    """Where Lima mounts it; the home of the guest's user is filled by a bind mount later."""
    direct = PLAIN_PATH.fullmatch(mount.target) and mount.target == mount.source
    return mount.target if direct else f"/mnt/agent-vm/{index}"


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
    if instance.forward_agent:
        faults.append("forwards the ssh agent")
    if instance.writes_host:
        faults.append("copies files or sockets to the host")
    return faults


def clamp(value: int, host_total: int) -> int:
    """At most half of what the host has, at least 1."""
    return max(1, min(value, host_total // 2))


def qemu_install_command(os_release: Mapping[str, str], machine: str) -> str:
    """The one line that installs QEMU on this Linux distribution, or "" when unknown."""
    arm = machine in ("aarch64", "arm64")
    families = f"{os_release.get('ID', '')} {os_release.get('ID_LIKE', '')}".split()
    short, long = ("arm", "aarch64") if arm else ("x86", "x86")
    commands = {
        "debian": f"apt-get install -y qemu-system-{short} qemu-utils openssh-client",
        "fedora": f"dnf install -y qemu-system-{long} qemu-img openssh-clients",
        "rhel": "dnf install -y qemu-kvm qemu-img openssh-clients",
        "arch": f"pacman -S --noconfirm qemu-system-{long} qemu-img openssh",
        "suse": f"zypper --non-interactive install qemu-{short} qemu-tools openssh-clients",
        "alpine": f"apk add qemu-system-{'aarch64' if arm else 'x86_64'} qemu-img openssh-client",
    }
    return next((f"sudo {commands[name]}" for name in families if name in commands), "")


def trusted_path(path: str, project: str) -> str:
    """PATH without what an agent can write (a project's .venv/bin) and without relative entries."""

    def planted(entry: str) -> bool:
        real = os.path.realpath(entry)
        chain = [
            parent for parent in (real, *map(str, Path(real).parents)) if inside(parent, project)
        ]
        return any(os.access(folder, os.W_OK) for folder in chain)

    entries = path.split(os.pathsep)
    return os.pathsep.join(e for e in entries if os.path.isabs(e) and not (project and planted(e)))


def parse_os_release(text: str) -> dict[str, str]:
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key: value.strip("\"'") for key, value in pairs}


def setup_problems(host: HostFacts, minimal: bool, memory: int) -> list[tuple[str, str]]:
    """(problem, next step) for everything that would make a setup fail later; memory in GiB."""
    need = (4 if minimal else 10) << 30
    problems = []
    if host.root:
        problems.append(("running as root: limactl refuses it", "run as an ordinary user"))
    if host.system == "Linux" and not (host.qemu and host.qemu_img):
        install = qemu_install_command(host.os_release, host.machine)
        missing = "QEMU" if not host.qemu else "qemu-img"
        problems.append((f"{missing} is not installed", install or "install QEMU with its tools"))
    if host.disk_free < need:
        problems.append((
            f"{host.disk_free >> 30} GiB free in Lima's home; setup needs {need >> 30}",
            "free some space, or set LIMA_HOME to another disk",
        ))  # fmt: skip
    if memory << 30 > host.memory:
        problems.append((
            f"--memory {memory}: the host has {host.memory >> 30} GiB", "ask for less memory"
        ))  # fmt: skip
    return problems


def lease_is_live(lease: Lease, boot_id: str, start_of: Callable[[int], str]) -> bool:
    """The process that took the lease still runs: same boot, same pid, same start time."""
    if not boot_id:
        return True  # unknown: nothing may be deleted
    return lease.boot_id == boot_id and bool(lease.start) and start_of(lease.pid) == lease.start


def lease_from(text: str) -> Lease:
    fields = json.loads(text)
    lease = Lease(
        str(fields["name"]), int(fields["pid"]), str(fields["start"]), str(fields["boot_id"]),
        str(fields["project"]), float(fields["created"]), bool(fields.get("keep")),
    )  # fmt: skip
    if not is_clone(lease.name) and not (is_base(lease.name) and lease.name.endswith(".new")):
        raise ValueError(f"not a name of ours: {lease.name!r}")
    return lease


def claude_config(
    project: str, credential: Credential | None, github: GitHub | None = None
) -> dict[str, Any]:
    """What ~/.claude.json must say so that no wizard or dialog appears (Claude Code 2.1).

    Trust in "/" covers what else is mounted, but not a directory with an entry of its own.
    """
    trusted = {"hasTrustDialogAccepted": True}
    config: dict[str, Any] = {
        "hasCompletedOnboarding": True,
        "projects": {
            "/": trusted,
            project: {**trusted, "hasClaudeMdExternalIncludesApproved": True},
        },
    }
    if credential and credential.name == "ANTHROPIC_API_KEY":
        config["customApiKeyResponses"] = {"approved": [credential.value[-20:]], "rejected": []}
    if github:
        headers = {"Authorization": f"Bearer {github.secret}"}
        server = {"type": "http", "url": f"{github.url}/mcp", "headers": headers}
        config["mcpServers"] = {"github": server}
    return config


def github_repository(url: str) -> str:
    """OWNER/REPO of a remote on github.com, "" for any other."""
    match = GITHUB_URL.fullmatch(url)
    return match[1] if match else ""


def git_remote(settings: Sequence[tuple[str, str]], head: str) -> str:
    """The URL of the remote that the branch in HEAD tracks, else of origin, else ""; as written.

    `settings`: (key, value) as git prints them: section and last name in lower case.
    """
    values: dict[str, str] = {}
    for key, value in settings:
        values.setdefault(key, value)
    branch = head[len("ref: refs/heads/") :] if head.startswith("ref: refs/heads/") else ""
    tracked = dict(settings).get(f"branch.{branch}.remote", "")
    return values.get(f"remote.{tracked}.url") or values.get("remote.origin.url", "")


def instead_of(url: str, settings: Sequence[tuple[str, str]]) -> str:
    """`url` as git rewrites it: the longest url.BASE.insteadOf that it starts with (git-config)."""
    rules = [
        (value, key[len("url.") : -len(".insteadof")])
        for key, value in settings
        if key.startswith("url.") and key.endswith(".insteadof") and url.startswith(value)
    ]
    old, new = max(rules, key=lambda rule: len(rule[0]), default=("", ""))
    return new + url[len(old) :]


def guest_git_config(github: GitHub) -> str:
    """The guest's way to the one repository: its usual addresses lead to the proxy.

    git compares prefixes, the longest wins, and OWNER/REPO is one of OWNER/REPO-docs (as .git is of
    .github.io): longer ones keep those as they are.
    """
    served = f"{github.url}/git/{github.repo}.git"
    lines = [
        f'[http "{github.url}/"]',
        f'\textraHeader = "Authorization: Bearer {github.secret}"',
        "\tproxy =",
        f'[url "{served}"]',
    ]
    written = [f"{form}{github.repo}{end}" for form in GITHUB_FORMS for end in ("", ".git")]
    lines += [
        f"\tinsteadOf = {json.dumps(url, ensure_ascii=False)}"
        for url in dict.fromkeys([*written, github.remote])
        if url
    ]
    more = f"-._{string.digits}{string.ascii_letters}"
    others = (url + char for url in written for char in more)
    lines += [f'[url "{url}"]\n\tinsteadOf = {url}' for url in others if url not in written]
    return "\n".join(lines) + "\n"


def github_briefing(github: GitHub) -> str:
    """What the agent should know before it tries; it goes into its memory file in the guest."""
    write = (
        "Everything there is read-only in this session."
        if github.readonly
        else "Write to a branch other than the default one, and open a pull request."
    )
    return f"""
# GitHub in this VM

You reach exactly one GitHub repository, {github.repo}, through a proxy on the user's machine.
There is no GitHub credential in this VM.

- Issues, pull requests, files: the tools of the MCP server `github` (mcp__github__*); `owner` and
  `repo` may be left out.
- `git fetch`, `pull`, `clone` and `push` work with the usual addresses of {github.repo}.
- {write}
  Refused: pushes to the default branch (unless the user's policy allows them), deletions, tags,
  LFS, the wiki.
- `gh` and api.github.com have no credential: use the tools. Of other repositories only public ones
  can be read, by https.
- A refusal says its reason. It is a decision, not a fault: tell the user, look for no way round.
- What listens on a port here is forwarded to the user's 127.0.0.1, unless forwarding is off.
"""


def github_probe(github: GitHub) -> str:
    """Shell for the guest: silent when the proxy refuses all that it must refuse, else says what.

    The secret comes from a file: it must not be in an argv.
    """
    other = "agent-vm-probe/other"
    served = f"only {github.repo} is served here"
    mcp = f"{github.url}/mcp"

    def call(name: str, **arguments: str) -> str:
        params = {"name": name, "arguments": arguments}
        return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})

    def pack(repo: str, service: str) -> str:
        return f"{github.url}/git/{repo}.git/info/refs?service=git-{service}"

    foreign = call("get_file_contents", owner=other.split("/")[0], repo="other", path="x")
    probes = [
        ("another repository over MCP", served, "github-header", [mcp, "-d", foreign]),
        ("another repository over git", served, "github-header", [pack(other, "upload-pack")]),
        ("a wrong secret", "secret is missing or wrong", "wrong-header", [mcp, "-d", foreign]),
    ]
    if github.readonly:
        write = call("create_branch", branch="agent-vm-probe")
        probes += [
            ("a write over MCP", "the policy is read-only", "github-header", [mcp, "-d", write]),
            (
                "a push",
                "the policy is read-only",
                "github-header",
                [pack(github.repo, "receive-pack")],
            ),
        ]
    lines = [PROBE]
    for what, words, header, arguments in probes:
        lines.append(shlex.join(["refused", what, words, header, *arguments]))
    return "\n".join(lines) + "\n"


def github_receipt(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the proxy's audit says was done: a line for each write, and for each kind of refusal."""
    calls = [line for line in lines if line["method"] in ("tools/call", "git")]
    sent = [audit_words(line) for line in calls if line["verdict"] == "forward"]
    writes = [words for words in sent if not READS.match(words)]
    result, unanswered = [], list(writes)
    stopped: dict[str, int] = {}
    for line in lines:
        words, verdict = audit_words(line), line["verdict"]
        if verdict in ("done", "failed", "unknown") and words in unanswered:
            unanswered.remove(words)
        if verdict == "done":
            result.append(f"done: {words} {(line['target'] or {}).get('url', '')}".rstrip())
        elif verdict in NOT_PASSED:
            text = f"{NOT_PASSED[verdict]}: {words}: {line['reason']}"
            stopped[text] = stopped.get(text, 0) + 1
    result += [f"{NOT_PASSED['unknown']}: {words}" for words in unanswered]
    result += [text + (f" ({count} times)" if count > 1 else "") for text, count in stopped.items()]
    refused = sum(line["verdict"] in ("refuse", "withheld") for line in lines)
    more = "at least " * any("left out" in line["reason"] for line in lines)
    reads = number(len(sent) - len(writes), "read")
    counts = f"{reads}, {number(len(writes), 'write')}, {more}{refused} refused"
    if len(result) > MAX_RECEIPT:
        result[MAX_RECEIPT:] = [f"and {len(result) - MAX_RECEIPT} more: agent-vm log"]
    return [line[:300] for line in (counts, *result)]


def audit_words(line: Mapping[str, Any]) -> str:
    """What a line of the audit is about: the call and its target, but for what came of it.

    What the guest chose is quoted, so that it does not read like words of ours.
    """
    name = str(line["tool"] or line["method"])
    target = (line["target"] or {}).items()
    pairs = (
        f"{key}={value if PLAIN_WORD(str(value)) else json.dumps(value)}"
        for key, value in target
        if key != "url"
    )
    return " ".join([GIT_SERVICES.get(name, name), *pairs])


def number(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


PLAIN_WORD = re.compile(r"[\w./@+-]+", re.ASCII).fullmatch
MAX_RECEIPT = 20  # lines
NOT_PASSED = {
    "refuse": "refused", "withheld": "withheld", "failed": "failed",
    "unknown": "not known what became of it",
}  # fmt: skip
GIT_SERVICES = {"git-upload-pack": "git fetch", "git-receive-pack": "git push"}
# What the audit calls a read; whatever is not known to be one counts as a write.
READS = re.compile(r"get_|list_|search_|\w+_read( |$)|git fetch|git push$")

PROBE = r"""
cd ~/.agent-vm
printf 'Authorization: Bearer not-the-secret-of-this-proxy-0000000' > wrong-header
refused() {
  answer=$(curl -sS -m 20 --noproxy '*' -H @"$3" -H 'Content-Type: application/json' \
    -H 'Accept: application/json, text/event-stream' "${@:4}" 2>&1)
  case $answer in
    *"$2"*) ;;
    *) echo "$1 is not refused as it should be: ${answer:0:300}"; exit 1 ;;
  esac
}
"""


def exports(variables: Mapping[str, str]) -> str:
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def pipe(command: str, text: str) -> str:
    """Shell that gives `text` to a command's stdin; base64 keeps every byte as it is."""
    data = text.encode("utf-8", "surrogateescape")
    return f"base64 -d <<'END' | {command}\n{base64.b64encode(data).decode()}\nEND"


# Runs what it is given in the project, with the environment of the host's terminal. Not `exec`:
# a shell turns death by a signal into a status, and syncs so that the VM can be cut off after it.
LAUNCH = r"""#!/bin/bash -l
. ~/.agent-vm/env
. ~/.agent-vm/credential
infocmp > /dev/null 2>&1 || export TERM=xterm-256color
locale 2>&1 | grep -q 'Cannot set' && export LC_ALL=C.UTF-8
cd -- "$1" || exit 125
shift
"$@"
status=$?
sync
exit "$status"
"""


# Deep-merges the JSON on stdin into a file that may not exist yet.
MERGE = r"""
merge() {
  [ -s "$1" ] || echo '{}' > "$1"
  jq -s '.[0] * .[1]' "$1" /dev/stdin > ~/.agent-vm/merged
  cat ~/.agent-vm/merged > "$1"
  rm ~/.agent-vm/merged
}
"""


def prepare_script(
    mounts: Sequence[Mount],
    project: str,
    variables: Mapping[str, str],
    credential: Credential | None,
    git_identity: Mapping[str, str],
    zone: str,
    github: GitHub | None = None,
) -> str:
    """The script that makes a booted clone a place to work; it travels on stdin, never in argv."""
    zone_file = shlex.quote(f"/usr/share/zoneinfo/{zone}")
    secret = {credential.name: credential.value} if credential else {}
    settings = {"skipDangerousModePermissionPrompt": True}
    parts = ["set -eu -o pipefail\nmkdir -p ~/.agent-vm ~/.claude/projects"]
    parts += [mount_line(mount, index) for index, mount in enumerate(mounts)]
    parts.append("umask 077")  # from here on: not for the folders on the way to a mount
    parts += [
        f"git config --global {key} {shlex.quote(value)}" for key, value in git_identity.items()
    ]
    if zone:
        parts.append(f"[ ! -e {zone_file} ] || sudo ln -sf {zone_file} /etc/localtime")
    parts += [
        MERGE,
        pipe("merge ~/.claude.json", json.dumps(claude_config(project, credential, github))),
        pipe("merge ~/.claude/settings.json", json.dumps(settings)),
        pipe("cat > ~/.agent-vm/env", exports(variables)),
        pipe("cat > ~/.agent-vm/credential", exports(secret)),
        pipe("cat > ~/.agent-vm/launch", LAUNCH),
        "chmod 700 ~/.agent-vm/launch",
    ]
    if github:
        parts += [
            "chmod 600 ~/.claude.json",
            pipe("cat > ~/.agent-vm/github-header", f"Authorization: Bearer {github.secret}"),
            pipe("cat > ~/.agent-vm/gitconfig", guest_git_config(github)),
            "git config --global --add include.path '~/.agent-vm/gitconfig'",
            pipe("cat >> ~/.claude/CLAUDE.md", github_briefing(github)),
        ]
    return "\n".join(parts) + "\n"


def mount_line(mount: Mount, index: int) -> str:
    """Check one mount in the guest (an agent in an empty folder would lose its work), bind it."""
    point, target = guest_mount_point(mount, index), shlex.quote(mount.target)
    check = f"mountpoint -q {point} || {{ echo 'not mounted: {point}' >&2; exit 1; }}"
    if point == mount.target:
        return check
    return f"{check}\n[ -d {target} ] || sudo mkdir -p {target}\nsudo mount --bind {point} {target}"


# --- settings: flag > environment > config file > default ---


def whole_number(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def instance_suffix(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?", text) or is_clone(base_name(text)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: up to 20 of a-z 0-9 -, not ending in six hexadecimal digits"
        )
    return text


def web_address(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s@'\"\\]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an http(s) address without a password")
    return text


def existing_file(text: str) -> str:
    path = os.path.abspath(os.path.expanduser(text))
    if not os.access(path, os.R_OK) or not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"{path} is not a readable file")
    return path


def certificate(text: str) -> str:
    path = existing_file(text)
    if b"-----BEGIN CERTIFICATE-----" not in Path(path).read_bytes():
        raise argparse.ArgumentTypeError(f"{path} holds no PEM certificate")
    return path


def image_location(text: str) -> str:
    return web_address(text) if re.match(r"https?:", text) else existing_file(text)


def image_digest(text: str) -> str:
    if not re.fullmatch(r"sha(256:[0-9a-f]{64}|512:[0-9a-f]{128})", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not sha256:HEX or sha512:HEX")
    return text


def variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(=.*)?", text, re.DOTALL):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or NAME=VALUE")
    return text


def yes_or_no(text: str) -> bool:
    import configparser

    values = configparser.ConfigParser.BOOLEAN_STATES
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not yes or no")
    return values[text.lower()]


def github_choice(text: str) -> str:
    if text in ("off", "on", "auto") or re.fullmatch(OWNER_REPO, text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not off, auto or OWNER/REPO")


class Setting(NamedTuple):
    """A value that a flag, AGENT_VM_NAME, config.ini or the default gives, in that order."""

    parse: Callable[[str], Any]
    default: Any
    help: str
    metavar: str = ""
    many: bool = False


SETTINGS = {
    "name": Setting(instance_suffix, "", "use the base instance agent-vm-base-NAME", "NAME"),
    "minimal": Setting(yes_or_no, False, "only git, curl, jq and Claude Code in the VM"),
    "disk": Setting(whole_number, 20, "size of the VM's disk (default 20)", "GB"),
    "memory": Setting(
        whole_number, 8, "memory of the VM (default 8, at most half of the host's)", "GB"
    ),
    "cpus": Setting(whole_number, 4, "CPUs of the VM (default 4, at most half of the host's)", "N"),
    "template": Setting(existing_file, "", "another Lima template than lima/agent-vm.yaml", "FILE"),
    "image": Setting(image_location, "", "another Debian 13 disk image", "FILE|URL"),
    "image-digest": Setting(image_digest, "", "the image's digest, checked by Lima", "SHA256:HEX"),
    "ca-cert": Setting(certificate, (), "trust a CA in the VM (repeatable)", "FILE", many=True),
    "apt-mirror": Setting(web_address, "", "Debian mirror for the guest's apt", "URL"),
    "npm-registry": Setting(web_address, "", "npm registry of the guest (else the host's)", "URL"),
    "lima-url": Setting(web_address, LIMA_URL, "where to get Lima when it is missing", "URL"),
    "timeout": Setting(whole_number, 600, "how long limactl may take (default 600)", "SECONDS"),
    "mount": Setting(
        parse_mount, (), "mount another folder, read-only unless :rw (repeatable)",
        "DIR[:ro|:rw][:GUESTPATH]", many=True,
    ),
    "env": Setting(variable, (), "pass a variable (repeatable)", "NAME[=VALUE]", many=True),
    "readonly": Setting(
        yes_or_no, False, "mount the project read-only, enforced on the host by 9p and virtiofs"
    ),
    "github": Setting(
        github_choice, "off", "give the agent one GitHub repository, by default that of the"
        " remote; auto: when there is one and a token (default off)", "off|auto|OWNER/REPO",
    ),
    "github-profile": Setting(str, "", "tokens from github_app_token.py's profile NAME", "NAME"),
    "github-policy": Setting(existing_file, "", "what may be written, see the proxy", "FILE"),
    "confirm-writes": Setting(
        yes_or_no, False, "ask at the terminal before each write to GitHub"
    ),
    "forward": Setting(yes_or_no, True, "forward the guest's ports to the host (default)"),
}  # fmt: skip


def read_setting(name: str, text: str, origin: str) -> Any:
    setting = SETTINGS[name]
    try:
        if setting.many:
            return tuple(setting.parse(word) for word in shlex.split(text))
        return setting.parse(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise AgentVMError(f"{origin}: {name}: {error}") from error


def resolve_setting(
    name: str, flags: Mapping[str, Any], environ: Mapping[str, str], config: Mapping[str, str]
) -> tuple[Any, str]:
    """(value, where it is from). What a command does not ask for cannot fail it."""
    setting, env_name = SETTINGS[name], "AGENT_VM_" + name.upper().replace("-", "_")
    flag = flags.get(name.replace("-", "_"))
    if flag is not None:
        return (tuple(flag) if setting.many else flag), "flag"
    if environ.get(env_name):
        return read_setting(name, environ[env_name], env_name), "environment"
    if name in config:
        return read_setting(name, config[name], "config.ini"), "config"
    return setting.default, "default"


# --- shell: what touches processes and files ---


class Log:
    """Messages to stderr; progress only with -v, in `setup`, or when stderr is a terminal."""

    def __init__(self) -> None:
        self.verbose = False
        self.quiet = False
        self.started = time.monotonic()

    def info(self, message: str) -> None:
        with contextlib.suppress(OSError):  # a closed terminal must not stop the clean-up
            print(f"agent-vm: {message}", file=sys.stderr, flush=True)

    def progress(self, message: str) -> None:
        if self.verbose or (not self.quiet and sys.stderr.isatty()):
            self.step(message)

    def step(self, message: str) -> None:
        if not self.quiet:
            self.info(f"[{time.monotonic() - self.started:3.0f} s] {message}")

    def warn(self, message: str) -> None:
        self.info(f"warning: {message}")


log = Log()


class Folders(NamedTuple):
    """Where agent-vm keeps things, by the XDG rules."""

    state: Path
    config: Path
    data: Path
    lima_home: Path

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Folders:
        home = Path(os.path.expanduser("~"))

        def xdg(name: str, default: str) -> Path:
            value = environ.get(name, "")
            return (Path(value) if os.path.isabs(value) else home / default) / "agent-vm"

        return cls(
            xdg("XDG_STATE_HOME", ".local/state"),
            xdg("XDG_CONFIG_HOME", ".config"),
            xdg("XDG_DATA_HOME", ".local/share"),
            Path(os.path.abspath(environ.get("LIMA_HOME") or home / ".lima")),
        )

    def make_state(self) -> None:
        try:
            for name in ("leases", "sessions", "links", "logs", "audit", "github", "written"):
                (self.state / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            self.state.chmod(0o700)
        except OSError as error:
            raise AgentVMError(
                f"the state folder is not writable: {error}",
                hint="set XDG_STATE_HOME to a folder of yours",
            ) from error

    def config_values(self) -> dict[str, str]:
        import configparser

        path = self.config / "config.ini"
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text())
            values = dict(parser["agent-vm"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, configparser.Error) as error:
            first_line = str(error).splitlines()[0]
            raise AgentVMError(
                f"{path}: {first_line}", hint="it needs one section, [agent-vm]"
            ) from error
        unknown = sorted(set(values) - set(SETTINGS))
        if unknown:
            raise AgentVMError(
                f"{path}: unknown key {unknown[0]!r}", hint="keys: " + " ".join(SETTINGS)
            )
        return values


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def raise_interrupted(signum: int, _frame: object) -> NoReturn:
    """The first signal ends the run; a second one must not end its clean-up."""
    ignore_signals()
    raise Interrupted(signum)


def ignore_signal(_signum: int, _frame: object) -> None:
    """Not SIG_IGN, which limactl and ssh would inherit."""


def ignore_signals() -> None:
    for signum in STOP_SIGNALS:
        signal.signal(signum, ignore_signal)


def catch_signals() -> None:
    for signum in STOP_SIGNALS:
        # A caller that ignores a signal (nohup) keeps it ignored.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, raise_interrupted)


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = [signal.signal(signum, handler) for signum in STOP_SIGNALS]
    try:
        yield
    finally:
        for signum, old in zip(STOP_SIGNALS, before):
            signal.signal(signum, old)


def shielded() -> contextlib.AbstractContextManager[None]:
    """No signal interrupts what must be finished: deleting a clone, swapping base instances."""
    return handling(ignore_signal)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A signal waits for the end of the block: a child that starts must not be lost sight of."""
    seen: list[int] = []
    with handling(lambda signum, _frame: seen.append(signum)):
        yield
    if seen:
        os.kill(os.getpid(), seen[0])


def stop_process(process: subprocess.Popen[Any], group: bool = False) -> None:
    """Ask a child of ours to end, insist after five seconds."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum) if group else process.send_signal(signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return


@contextlib.contextmanager
def child(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block, whatever ends it; options are Popen's."""
    process: subprocess.Popen[bytes] | None = None
    try:
        with deferred():
            process = subprocess.Popen(argv, **options)
        yield process
    finally:
        if process and process.poll() is None:
            with shielded():
                stop_process(process, group=bool(options.get("start_new_session")))


def last_bytes(path: Path, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read(size)
    except OSError:
        return b""


def tail(path: Path, lines: int = 10) -> str:
    """The last lines of a log of Lima's, fit for a terminal: a guest writes its serial console."""
    text = last_bytes(path, 50_000).decode(errors="replace")
    clean = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n\t -~\u00a0-\uffff]", "", text)
    shown = [line[:300] for line in clean.splitlines() if '"level":"debug"' not in line]
    return "\n".join(shown[-lines:])


class Lima:
    """limactl, a method a verb. Its own terminal messages go to a log that errors quote."""

    def __init__(self, binary: str, timeout: int) -> None:
        self.binary = binary
        self.timeout = timeout

    def _run(self, *args: str, timeout: int = 0) -> str:
        """The only door to limactl. Returns its stdout."""
        import tempfile

        if log.verbose:
            log.info("+ " + shlex.join(("limactl", *args)))
        limit = timeout or self.timeout
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            reason = ""
            with self._child(args, out, None if log.verbose else err) as process:
                try:
                    process.wait(timeout=limit)
                except subprocess.TimeoutExpired:
                    reason = f"no answer within {limit} s"
            out.seek(0)
            err.seek(0)
            status = process.returncode
            if status or reason:
                raise self._error(args, reason or f"status {status}", err.read())
            return out.read().decode(errors="replace")

    @contextlib.contextmanager
    def _child(self, args: Sequence[str], out: Any, err: Any) -> Iterator[subprocess.Popen[bytes]]:
        # A session of its own: Ctrl-C at the terminal is ours to handle, not limactl's.
        options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        try:
            with child([self.binary, *args], **options, start_new_session=True) as process:
                yield process
        except OSError as error:
            raise AgentVMError(
                f"{self.binary} cannot be started: {error.strerror}", hint="agent-vm doctor"
            ) from error

    def _error(self, args: Sequence[str], reason: str, stderr: bytes) -> AgentVMError:
        """limactl's own last words (logrus lines) instead of its status, when there are any."""
        text = stderr.decode(errors="replace")
        messages = re.findall(r'level=(?:error|fatal) msg="((?:[^"\\]|\\.)*)"', text)
        lines = [line for line in text.splitlines() if line.strip()]
        if reason.startswith("status"):
            last = lines[-1] if lines else reason
            reason = messages[-1].replace('\\"', '"').replace("\\n", "; ") if messages else last
        return AgentVMError(f"limactl {args[0]} failed: {reason}", details="\n".join(lines[-8:]))

    def version(self) -> tuple[int, ...]:
        return parse_lima_version(self._run("--version", timeout=30))

    def list(self) -> list[Instance]:
        return parse_instances(self._run("list", "--format", "json", timeout=min(60, self.timeout)))

    def find(self, name: str) -> Instance | None:
        return next((instance for instance in self.list() if instance.name == name), None)

    def create(self, name: str, template: str, *options: str) -> None:
        self._run("create", "--tty=false", f"--name={name}", *options, template)

    def clone(self, source: str, name: str, expression: str, *options: str) -> None:
        self._run("clone", "--tty=false", source, name, *options, "--set", expression)

    def start(self, name: str, timeout: int) -> None:
        # Lima's own limit a little shorter than ours, so that its message is the one shown.
        limit = f"{max(1, timeout - 5)}s"
        self._run("start", "--tty=false", f"--timeout={limit}", name, timeout=timeout)

    def stop(self, name: str) -> None:
        self._run("stop", name)

    def delete(self, name: str) -> None:
        self._run("delete", "-f", name)

    def rename(self, name: str, new: str) -> None:
        self._run("rename", "--tty=false", name, new)

    def protect(self, name: str) -> None:
        self._run("protect", name)

    def unprotect(self, name: str) -> None:
        self._run("unprotect", name)


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


class Guest:
    """A running instance over ssh, through Lima's control master (0.1 s a call)."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.ssh = ["ssh", "-F", str(instance.dir / "ssh.config"), "-a", "-x", "-q"]
        self.host = instance.hostname

    def run(
        self, command: str, stdin: str = "", timeout: int = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command; its output is returned, stderr merged into stdout."""
        if log.verbose:
            log.info(f"+ ssh {self.host} {command[:200]}")
        try:
            return subprocess.run(
                [*self.ssh, self.host, command],
                input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
                encoding="utf-8", errors="replace", start_new_session=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise AgentVMError(f"{self.host} did not answer within {timeout} s") from error

    def attach(
        self, argv: Sequence[str], tty: bool, stdin: int | None = None,
        asking: subprocess.Popen[bytes] | None = None,
    ) -> int:  # fmt: skip
        """Run argv with our terminal or pipes; its status. ssh joins its arguments: quote them."""
        # Lima's control master would go on reading the terminal while a question is asked there.
        own = ("-S", "none") if asking else ()
        command = [*self.ssh, *own, "-t" if tty else "-T", self.host, shlex.join(argv)]
        with (
            kept_terminal(tty),
            child(command, stdin=stdin) as process,
            confirming(asking, process),
        ):
            return process.wait()

    def alive(self) -> bool:
        with contextlib.suppress(AgentVMError):
            return self.run("true", timeout=20).returncode == 0
        return False


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # macOS
        return output_of("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")


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
    return output_of(
        "/usr/bin/env", "TZ=UTC0", "LC_ALL=C", "/bin/ps", "-o", "lstart=", "-p", str(pid)
    )


def output_of(*argv: str) -> str:
    """First line that a host command prints, or "" when it fails or is missing."""
    try:
        result = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="utf-8", errors="replace", timeout=20, cwd="/", check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else ""


class Leases:
    """Files that say which process owns which clone."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.dir = folders.state / "leases"

    def path(self, name: str) -> Path:
        return self.dir / f"{name}.json"

    def take(self, name: str, project: str, keep: bool = False) -> None:
        pid = os.getpid()
        lease = Lease(name, pid, process_start(pid), boot_id(), project, time.time(), keep)
        path = self.path(name)
        with open(path.with_suffix(".tmp"), "w") as file:
            file.write(json.dumps(lease._asdict()) + "\n")
            file.flush()
            os.fsync(file.fileno())  # an empty lease after a power cut would own nothing
        path.with_suffix(".tmp").replace(path)

    def drop(self, name: str) -> None:
        shutil.rmtree(self.folders.state / "links" / name, ignore_errors=True)
        self.path(name).unlink(missing_ok=True)

    def all(self) -> list[Lease]:
        leases = []
        for path in sorted(self.dir.glob("*.json")):
            try:
                leases.append(lease_from(path.read_text()))
            except FileNotFoundError:
                continue  # its run has just ended
            except (OSError, ValueError, KeyError, TypeError) as error:
                if is_clone(path.stem):  # nobody can own it any more: an orphan
                    leases.append(Lease(path.stem, 0, "", "", "", path.lstat().st_mtime))
                    continue
                log.warn(
                    f"{path} is not a lease ({error}); remove it after checking `agent-vm list`"
                )
        return leases

    def orphans(self) -> list[Lease]:
        return [lease for lease in self.all() if self.is_orphan(lease)]

    def is_orphan(self, lease: Lease) -> bool:
        return not lease.keep and not lease_is_live(lease, boot_id(), process_start)


def remove_clone(lima: Lima, leases: Leases, name: str) -> None:
    """Delete an instance and what belongs to it; its lease goes last, so a failure is retried."""
    instance_dir = leases.folders.lima_home / name
    try:
        lima.delete(name)
    except AgentVMError:
        # limactl 2.2 refuses a directory without lima.yaml: a clone that was cut off half-way.
        if not instance_dir.is_dir() or (instance_dir / "lima.yaml").exists():
            raise
    shutil.rmtree(instance_dir, ignore_errors=True)
    if instance_dir.exists():
        raise AgentVMError(f"{instance_dir} could not be removed")
    leases.drop(name)


def try_remove(lima: Lima, leases: Leases, name: str) -> bool:
    """A failure must not replace what the command is for; the lease makes the next one retry."""
    try:
        remove_clone(lima, leases, name)
    except AgentVMError as error:
        log.warn(f"{name} could not be deleted ({error}); the next command tries again")
        return False
    return True


CLONE_SECONDS = 120  # until `limactl clone` has made a folder, on any host


def collect_garbage(lima: Lima, leases: Leases) -> list[str]:
    """Remove the clones whose run is gone (kill -9, crash, power loss) and say so."""
    removed = []
    for lease in leases.orphans():
        base = lease.name.partition(".")[0]
        lock = leases.folders.state / (f"{base}.setup.lock" if is_base(base) else "gc.lock")
        with shielded(), file_lock(lock, wait=not is_base(base)) as free:
            # Asked again under the lock: a setup takes the same name for its instance each time.
            if not free or lease.name not in {orphan.name for orphan in leases.orphans()}:
                continue
            existed = (leases.folders.lima_home / lease.name).is_dir()
            if not existed and 0 <= time.time() - lease.created < CLONE_SECONDS:
                continue  # its limactl may have outlived it, and be about to make it
            if try_remove(lima, leases, lease.name) and existed:
                log.info(f"removed {lease.name}: its run ended without cleaning up")
                removed.append(lease.name)
    return removed


@contextlib.contextmanager
def file_lock(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """flock(2) on `path`; yields whether it was obtained. The kernel frees it with the process."""
    with open(path, "a") as file:
        flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(file, flags)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def lima_dir() -> Iterator[Path]:
    """The folder of templates: lima/ beside the resolved script, else the embedded copy."""
    import tempfile

    beside = Path(__file__).resolve().parent / "lima"
    if (beside / "agent-vm.yaml").is_file():
        yield beside
        return
    with tempfile.TemporaryDirectory(prefix="agent-vm-lima-") as folder:
        write_embedded(Path(folder))
        yield Path(folder)


def write_embedded(folder: Path) -> None:
    for name, text in EMBEDDED.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if name.endswith(".sh") else 0o644)


# --- what the commands share ---


class Context(NamedTuple):
    """Everything a command works with, opened once."""

    folders: Folders
    flags: Mapping[str, Any]
    config: Mapping[str, str]
    secrets: Mapping[str, str]  # taken out of os.environ, so that no child inherits them
    lima: Lima
    leases: Leases

    @classmethod
    def open(
        cls, args: argparse.Namespace, need_lima: bool = True, collect: bool = False
    ) -> Context:
        folders = Folders.of(os.environ)
        flags, config = vars(args), folders.config_values()
        os.environ["PATH"] = trusted_path(os.environ.get("PATH", os.defpath), possible_project())
        binary = find_limactl(folders)
        if need_lima and not binary:
            raise AgentVMError("limactl is not installed", hint="agent-vm setup installs it")
        folders.make_state()
        timeout, _ = resolve_setting("timeout", flags, os.environ, config)
        lima, leases = Lima(binary, timeout), Leases(folders)
        if collect and binary:
            collect_garbage(lima, leases)
        return cls(folders, flags, config, args.secrets, lima, leases)

    def setting(self, name: str) -> tuple[Any, str]:
        return resolve_setting(name, self.flags, os.environ, self.config)

    def get(self, name: str) -> Any:
        return self.setting(name)[0]

    def chosen(self, name: str) -> bool:
        return self.setting(name)[1] != "default"

    @property
    def base(self) -> str:
        return base_name(self.get("name"))

    def lock(
        self, name: str, shared: bool = False, wait: bool = True
    ) -> contextlib.AbstractContextManager[bool]:
        return file_lock(self.folders.state / name, shared, wait)

    def private_paths(self) -> dict[str, str]:
        """What no agent may be given by a mount: what confines it, and the keys of the user."""
        paths = {
            "agent-vm's state": self.folders.state,
            "agent-vm's configuration": self.folders.config,
            "agent-vm's data": self.folders.data,
            "Lima's home": self.folders.lima_home,
            "your ssh keys": Path(os.path.expanduser("~/.ssh")),
            "your GitHub tokens": self.folders.state.parent / "github-app-token",
            "agent-vm itself": Path(__file__),
            "limactl": Path(self.lima.binary or "/nonexistent"),
        }
        beside = Path(__file__).resolve().parent / "lima"
        if (beside / "agent-vm.yaml").exists():
            paths["agent-vm's templates"] = beside
        return {name: os.path.realpath(path) for name, path in paths.items()}


def possible_project() -> str:
    """The current directory, when a run would mount it: an agent may have written there."""
    try:
        cwd = os.getcwd()
    except OSError:
        return ""
    return "" if mount_refusal(cwd, os.path.realpath(os.path.expanduser("~")), {}) else cwd


def find_limactl(folders: Folders) -> str:
    own = folders.data / "lima/bin/limactl"
    return shutil.which("limactl") or (str(own) if os.access(own, os.X_OK) else "")


def check_lima_version(lima: Lima) -> None:
    version = lima.version()
    if version[:2] < MIN_LIMA:
        raise AgentVMError(
            f"limactl {'.'.join(map(str, version))} is too old",
            hint=f"agent-vm needs Lima {MIN_LIMA[0]}.{MIN_LIMA[1]} or newer",
        )


def need_ssh() -> None:
    if not shutil.which("ssh"):
        raise AgentVMError("ssh is not installed", hint="install your system's OpenSSH client")


def confirm(question: str, yes: bool) -> bool:
    """Ask on the terminal; --yes answers, and without a terminal nobody can."""
    if yes or not (os.isatty(0) and os.isatty(2)):
        return yes
    print(f"agent-vm: {question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def find_credential(context: Context) -> Credential | None:
    """The credential that a run would use: the environment's, else the stored one."""
    for name in CREDENTIALS:
        if context.secrets.get(name):
            return Credential(name, context.secrets[name], "the environment")
    path = context.folders.config / "credential"
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            name, _, value = file.read(10_000).strip().partition("=")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AgentVMError(f"{path} cannot be read: {type(error).__name__}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise AgentVMError(
            f"{path} can be read by others", hint=f"chmod 600 {shlex.quote(str(path))}"
        )
    if name not in CREDENTIALS or not value:
        raise AgentVMError(f"{path} is not what auth set writes", hint="agent-vm auth set")
    return Credential(name, value, str(path))


def recover_base(context: Context) -> None:
    """Finish what a setup or rollback that was killed between two renames has left."""
    base, old, swap = context.base, context.base + ".old", context.base + ".swap"
    with context.lock(f"{base}.lock"):
        names = {instance.name for instance in context.lima.list()}
        if base not in names and old in names:
            context.lima.rename(old, base)
            context.lima.protect(base)
            names -= {old}
            log.info(f"restored {base}: a setup was cut off while it replaced it")
        if swap in names and old not in names:
            context.lima.rename(swap, old)
            context.lima.protect(old)


def find_base(context: Context) -> Instance | None:
    """The base instance, not running, or None when there is none."""
    base = context.lima.find(context.base)
    home = context.folders.lima_home
    half = base is None and (home / f"{context.base}.old").exists()
    if half or (home / f"{context.base}.swap").exists():
        recover_base(context)
        base = context.lima.find(context.base)
    if base and base.status == "Running":
        raise AgentVMError(
            f"the base instance {base.name} is running, so it cannot be cloned or replaced",
            hint=f"agent-vm stop {base.name}",
        )
    return base


def ensure_base(context: Context, args: argparse.Namespace) -> Instance:
    """The base instance; on a first run, offer to build it."""
    need_ssh()
    base = find_base(context) if context.lima.binary else None
    if base is None and confirm(
        f"there is no base instance {context.base} yet: set it up now?", args.yes
    ):
        build_base(context, args)
        base = find_base(context)
    if base is None:
        raise AgentVMError(f"there is no base instance {context.base}", hint="agent-vm setup")
    if base.status != "Stopped":
        raise AgentVMError(
            f"the base instance {base.name} is {base.status.lower()}", hint="agent-vm setup"
        )
    return base


# --- run: a clone for one agent ---


def project_dir() -> str:
    try:
        project = os.getcwd()  # without symlinks: the same path must be found again by --resume
    except OSError as error:
        raise AgentVMError("the current directory does not exist any more") from error
    typed = os.environ.get("PWD", project)
    if typed != project and os.path.realpath(typed) == project:
        log.info(f"{typed} is a link: {project} is mounted")
    return project


def read_line(path: str) -> str:
    """First line of a small text file, "" when there is none; the agent may have written it."""
    if not os.path.isfile(path):  # a named pipe would block
        return ""
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline(4096).strip().replace("\0", "")
    except (OSError, ValueError):
        return ""


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
    return "" if overlaps(common, project) else common


def plan_mounts(context: Context, project: str, force: bool) -> list[Mount]:
    """The project first, then a worktree's repository, then what --mount adds; refusals raise."""
    mounts = [Mount(project, project, not context.get("readonly"))]
    common = worktree_git_dir(project)
    if common:
        mounts.append(Mount(common, common, not context.get("readonly")))
    mounts += context.get("mount")
    home = os.path.realpath(os.path.expanduser("~"))
    for mount in mounts:
        for path in (mount.source, mount.target):
            reason = unusable_path(path)
            if reason:
                raise AgentVMError(
                    f"{path!a} cannot be mounted: {reason}", hint="use another folder"
                )
        reason = mount_refusal(mount.source, home, context.private_paths())
        if reason and not force:
            raise AgentVMError(
                f"{mount.source} is not given to an agent: {reason}",
                hint="cd to a project below it, or say --force-mount",
            )
    problem = mounts_problem(mounts) or live_parent(context, project)
    if problem and not force:
        raise AgentVMError(problem, hint="mount something else, or say --force-mount")
    return mounts


def live_parent(context: Context, project: str) -> str:
    """An agent that is running in a folder above could put a link in the project's place."""
    for lease in context.leases.all():
        below = lease.project not in ("", project) and inside(project, lease.project)
        if below and not context.leases.is_orphan(lease):
            return f"{project} lies in {lease.project}, where {lease.name} is running"
    return ""


def session_mount(context: Context, project: str, home: str) -> Mount:
    """The project's transcripts on the host, where the agent looks for them in the guest."""
    folder = context.folders.state / "sessions" / session_key(project)
    folder.mkdir(mode=0o700, exist_ok=True)
    return Mount(str(folder), f"{home}/.claude/projects", True)


def guest_variables(context: Context, environ: Mapping[str, str]) -> dict[str, str]:
    passed = [name for name in environ if name in PASSED_ENV or re.fullmatch(r"LC_[A-Z]+", name)]
    variables = {name: environ[name] for name in passed if environ[name]}
    variables["DISABLE_AUTOUPDATER"] = "1"  # the clone is thrown away; `setup` updates
    for item in context.get("env"):
        name, equals, value = item.partition("=")
        if not equals and name not in environ and name not in context.secrets:
            raise AgentVMError(f"--env {name}: it is not set on the host")
        variables[name] = value if equals else environ.get(name, context.secrets.get(name, ""))
    return variables


def host_zone(environ: Mapping[str, str]) -> str:
    """The host's time zone as a name like Europe/Berlin, "" when it has none."""
    zone = environ.get("TZ", "").lstrip(":")
    if not zone:
        zone = os.path.realpath("/etc/localtime").rpartition("/zoneinfo/")[2]
    return zone if re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", zone) else ""


def git_identity() -> dict[str, str]:
    """The user's own user.name and user.email; the project's git config is read in the guest.

    Not `git -C project`: its config, which the agent writes, can include any file of the host.
    """
    command = ("git", "config", "--global", "--includes", "--get")
    values = {key: output_of(*command, key) for key in ("user.name", "user.email")}
    return {key: value for key, value in values.items() if value}


def readable_hooks(*paths: Path) -> list[Path]:
    """Those hooks that exist; one that exists and cannot be read raises."""
    hooks = [path for path in paths if os.path.lexists(path)]
    for path in hooks:
        if not os.access(path, os.R_OK) or not path.is_file():
            raise AgentVMError(
                f"the hook {path} is not a readable file", hint=f"chmod +r {path}, or remove it"
            )
    return hooks


def run_hook(guest: Guest, path: Path, inside: bool, workdir: str = ".") -> None:
    """Run a hook in the guest; `inside`: it is mounted there, else its text is sent.

    The project's own hook is never read on the host: it may be the agent's link to a file of yours.
    """
    log.progress(f"running {path}")
    script = shlex.quote(str(path)) if inside else "~/.agent-vm/hook"
    text = "" if inside else path.read_text(encoding="utf-8", errors="replace")
    steps = [
        "mkdir -p ~/.agent-vm",
        "" if inside else f"cat > {script}",
        f"cd {shlex.quote(workdir)}",
        "if [ -e ~/.agent-vm/env ]; then . ~/.agent-vm/env; fi",
        f"exec bash -l {script} < /dev/null",
    ]
    result = guest.run(" && ".join(filter(None, steps)), stdin=text, timeout=3600)
    if log.verbose:
        sys.stderr.write(result.stdout)
    if result.returncode:
        lines = "\n".join(result.stdout.splitlines()[-15:])
        raise AgentVMError(f"the hook {path} ended with status {result.returncode}", details=lines)


def prune_logs(
    folder: Path, pattern: str = "agent-vm-*.log", keep: int = 20, spare: Collection[str] = ()
) -> None:
    """Keep the newest files (of a failure there are two logs), and those of the names to spare."""
    for old in sorted(folder.glob(pattern), key=changed)[:-keep]:
        if old.stem not in spare:
            old.unlink(missing_ok=True)


def changed(path: Path) -> float:
    """When; 0 of what has gone meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def failure_logs(context: Context, name: str) -> str:
    """Keep the logs of an instance that will be deleted; their tails and where the rest is."""
    parts = []
    for file in ("ha.stderr.log", "serial.log"):
        source = context.folders.lima_home / name / file
        kept = context.folders.state / "logs" / f"{name}.{file}"
        end = tail(source)
        if end:
            with contextlib.suppress(OSError):
                kept.write_bytes(last_bytes(source, 1 << 20))
                prune_logs(kept.parent)
            parts.append(f"--- the end of {file} (all of it: {kept})\n{end}")
    return "\n".join(parts)


def start_instance(context: Context, name: str, timeout: int) -> None:
    try:
        context.lima.start(name, timeout)
    except AgentVMError as error:
        error.details = f"{error.details}\n{failure_logs(context, name)}".strip()
        raise


def free_name(context: Context, project: str) -> str:
    """A name that nobody has: what has our name at the end of the run is deleted."""
    home = context.folders.lima_home
    while True:
        name = clone_name(os.path.basename(project), os.urandom(3).hex(), str(home))
        if not (home / name).exists() and not context.leases.path(name).exists():
            return name


@contextlib.contextmanager
def disposable(context: Context, project: str, keep: bool) -> Iterator[str]:
    """The name of a clone to be, leased; whatever happens, the clone is deleted at the end."""
    name = free_name(context, project)
    context.leases.take(name, project)
    ended_well = False
    try:
        yield name
        ended_well = True
    finally:
        with shielded():
            if keep and ended_well:
                context.leases.take(name, project, keep=True)
                log.info(
                    f"kept {name}; reach it: limactl shell {name}; remove it: agent-vm rm {name}"
                )
            else:
                try_remove(context.lima, context.leases, name)


def make_clone(context: Context, base: Instance, name: str, mounts: Sequence[Mount]) -> Instance:
    """Clone the base instance and refuse what Lima's own defaults would add to it."""
    links = context.folders.state / "links" / name
    planned = lima_mounts(mounts, links)
    for mount, plan in zip(mounts, planned):
        if plan["location"] != mount.source:
            links.mkdir(mode=0o700, exist_ok=True)
            os.symlink(mount.source, plan["location"])
    mount_type = CONFINED_MOUNT_TYPE.get(base.vm_type)
    if not mount_type:
        raise AgentVMError(
            f"{base.name} is a {base.vm_type} instance: no mount type of it is confined by the host"
        )
    sizes = [f"--{key}={context.get(key)}" for key in ("cpus", "memory") if context.chosen(key)]
    expression = clone_expression(planned, mount_type, context.get("forward"))
    with context.lock(f"{context.base}.lock", shared=True):  # a setup must not swap it meanwhile
        context.lima.clone(base.name, name, expression, *sizes)
    clone = context.lima.find(name)
    faults = isolation_faults(clone, planned) if clone else ["is not listed by limactl"]
    if clone is None or faults:
        raise AgentVMError(
            f"the clone would not be confined: it {'; it '.join(faults)}",
            hint=f"look into {context.folders.lima_home}/_config/default.yaml and override.yaml",
        )
    return clone


def check_status(context: Context, guest: Guest, status: int) -> int:
    """ssh says 255 for a lost connection, but so may an agent: ask whether the VM is there."""
    if status == 255 and not guest.alive():
        raise AgentVMError(
            "the VM was lost while it ran", details=failure_logs(context, guest.instance.name)
        )
    return status


def run_in_clone(context: Context, args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Clone, start, prepare, run argv in the project, delete. Returns argv's status."""
    project = project_dir()
    mounts = plan_mounts(context, project, args.force_mount)
    hooks = readable_hooks(context.folders.config / "runtime.sh", Path(project, PROJECT_HOOK))
    credential = find_credential(context)
    variables = guest_variables(context, os.environ)
    base = ensure_base(context, args)
    chosen = choose_github(context, project, mounts)
    for mount in mounts:
        if mount.writable:
            mark_written(context, mount.source)
    mounts.append(session_mount(context, project, base.home))
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(disposable(context, project, args.keep))
        github = stack.enter_context(github_proxy(context, chosen, name)) if chosen else None
        script = prepare_script(
            mounts, project, variables, credential, git_identity(), host_zone(os.environ), github
        )
        log.progress(f"starting {name}")
        guest = Guest(make_clone(context, base, name, mounts))
        start_instance(context, name, context.lima.timeout)
        prepared = guest.run("bash -s", stdin=script)
        if prepared.returncode:
            logs = "" if prepared.stdout else failure_logs(context, name)
            raise AgentVMError("the VM could not be prepared", details=prepared.stdout + logs)
        if github:
            stack.enter_context(armed(context, guest, github))
        asking = github.asking if github else None
        with confirming(asking, None):
            for path in hooks:
                run_hook(guest, path, path.parent == Path(project), project)
        return attach_agent(context, guest, project, argv, asking)


def attach_agent(
    context: Context, guest: Guest, project: str, argv: Sequence[str],
    asking: subprocess.Popen[bytes] | None,
) -> int:  # fmt: skip
    tty = os.isatty(0) and os.isatty(1)
    # An agent whose output goes to a file must not wait for a terminal that it does not have.
    stdin = subprocess.DEVNULL if os.isatty(0) and not tty and tuple(argv[:2]) == AGENT else None
    launch = f"{guest.instance.home}/.agent-vm/launch"
    try:
        status = guest.attach([launch, project, *argv], tty, stdin, asking)
    except Interrupted:
        with shielded(), contextlib.suppress(AgentVMError):
            guest.run("sync", timeout=20)  # what the agent wrote so far is kept
        raise
    return check_status(context, guest, status)


# --- GitHub: one repository, through a proxy on this host ---


class GitHubChoice(NamedTuple):
    """What a proxy is started with: the repository, and where its token is from."""

    repo: str
    remote: str  # as written in the project, "" when it names another repository
    environ: Mapping[str, str]
    options: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<GitHub {self.repo}>"


def choose_github(context: Context, project: str, mounts: Sequence[Mount]) -> GitHubChoice | None:
    """The repository and the token of this run; None without GitHub. What is missing raises."""
    wanted = context.get("github")
    if wanted == "off":
        for name in ("github-profile", "github-policy", "confirm-writes"):
            if context.setting(name)[1] == "flag":
                log.warn(f"--{name} does nothing without --github")
        return None
    found, remote = project_repository(context, project)
    named = "/" in wanted
    repo = wanted if named else found
    if not repo:
        if wanted == "auto":
            return None
        looked = f"the remote {masked(remote)} is not" if remote else "there is no remote"
        raise AgentVMError(f"{looked} on github.com", hint="--github=OWNER/REPO")
    token = find_github_token(context, repo, ask=wanted != "auto")
    if token is None:
        if wanted == "auto":
            log.progress(f"without GitHub: there is no token for {repo}")
            return None
        raise AgentVMError(
            f"there is no GitHub token for {repo}",
            hint=f"set {GITHUB_TOKEN}, or --github-profile NAME (see github_app_token.py --help),"
            " or say yes to gh's at a terminal",
        )
    if context.get("confirm-writes"):
        need_terminal()
    writable = [mount.source for mount in mounts if mount.writable]
    check_policy(context, [project, str(context.folders.state / "sessions"), *writable])
    if not named:
        check_remote(context, project, repo)
    if repo.lower() != found.lower():
        return GitHubChoice(repo, "", *token)
    accept_remote(context, project, repo)
    return GitHubChoice(repo, remote, *token)


def check_policy(context: Context, folders: Sequence[str]) -> None:
    """What an agent can write must not say what it may write."""
    policy = context.get("github-policy")
    for place in trail(policy) if policy else ():
        if was_written(context, place) or any(inside(place, folder) for folder in folders):
            raise AgentVMError(
                f"the policy {policy} is reached by {place}, which an agent can write",
                hint=f"put it into {context.folders.config}",
            )


def trail(path: str) -> Iterator[str]:
    """Every place on the way to a file, through links."""
    todo, here = os.path.abspath(path).split("/"), "/"
    links = 0
    while todo:
        name = todo.pop(0)
        here = os.path.normpath(os.path.join(here, name))
        yield here
        if os.path.islink(here) and links < 40:
            links += 1
            target = os.readlink(here)
            todo = [*target.split("/"), *todo]
            here = "/" if target.startswith("/") else os.path.dirname(here)


def project_repository(context: Context, project: str) -> tuple[str, str]:
    """(OWNER/REPO, the remote's URL as written) of the project's git remote, each "" if none is.

    The remote that the branch tracks, else origin.
    Only the config file itself is read, without includes: an agent may have written it.
    """
    common = worktree_git_dir(project)
    git_dir = os.path.join(project, ".git")
    if common:
        git_dir = os.path.join(project, read_line(git_dir)[len("gitdir: ") :])
    file = os.path.join(common or git_dir, "config")
    if os.path.realpath(file) != file or not os.path.isfile(file):
        return "", ""
    if os.path.getsize(file) > MAX_GIT_CONFIG:
        log.warn(f"{file} is not read: it is larger than any that git writes")
        return "", ""
    settings = git_settings("--file", file, "--no-includes")
    remote = git_remote(settings, read_line(os.path.join(git_dir, "HEAD")))
    repo = github_repository(instead_of(remote, [*git_settings("--global"), *settings]))
    if repo and re.match(r"https?://[^/]*@", remote):
        log.warn("the remote's URL has a credential in it, which the agent can read")
    return repo, remote


MAX_GIT_CONFIG = 1 << 20  # bytes; git takes 4 times as much memory


def git_settings(*where: str) -> list[tuple[str, str]]:
    argv = ("git", "config", *where, "-z", "--get-regexp", r"^(remote|branch|url)\.")
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="utf-8", errors="replace", timeout=20, cwd="/", check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    pairs = (item.partition("\n") for item in done.stdout.split("\0") if item)
    return [(key, value) for key, _, value in pairs]


def identities(folder: str) -> tuple[str, str]:
    """File names for a folder, by its path and by its inode: it may be renamed, or mounted anew."""
    info = os.stat(folder)
    return session_key(folder), f"{info.st_dev}-{info.st_ino}"


def mark_written(context: Context, folder: str) -> None:
    """From now on an agent may have written all that is in the folder."""
    for name in identities(folder):
        (context.folders.state / "written" / name).touch()


def was_written(context: Context, folder: str) -> bool:
    """Whether an agent could ever write the folder, or one that it lies in."""
    marks = context.folders.state / "written"
    places = [place for place in (Path(folder), *Path(folder).parents) if place.is_dir()]
    return any((marks / name).exists() for place in places for name in identities(str(place)))


def git_dir_of(project: str) -> str:
    return worktree_git_dir(project) or os.path.join(project, ".git")


def accepted_remotes(context: Context, folder: str) -> set[str]:
    """The repositories that its remotes named when a run was given them."""
    found: set[str] = set()
    for name in identities(folder):
        with contextlib.suppress(OSError):
            found.update((context.folders.state / "github" / name).read_text().split())
    return found


def accept_remote(context: Context, project: str, repo: str) -> None:
    for folder in (project, git_dir_of(project)):
        accepted = sorted({*accepted_remotes(context, folder), repo.lower()})
        for name in identities(folder):
            (context.folders.state / "github" / name).write_text("\n".join(accepted) + "\n")


def check_remote(context: Context, project: str, repo: str) -> None:
    """An agent can write the remotes of a project, or make one below its own: then you name it.

    What its git dir's other worktrees were given counts for a project that no agent could write:
    who can write it can lead its .git to another repository's.
    """
    own, git_dir = accepted_remotes(context, project), git_dir_of(project)
    here = was_written(context, project)
    shared = set() if own or here else accepted_remotes(context, git_dir)
    if repo.lower() in own | shared or not (here or was_written(context, git_dir)):
        return
    if own:
        were = ", ".join(sorted(own))
        why = f"the remote says {repo}, and it was {were} before; an agent can change that"
    else:
        why = f"the remote says {repo}; an agent was here before, and can have written that"
    raise AgentVMError(why, hint=f"--github={repo}, when it is right")


def find_github_token(
    context: Context, repo: str, ask: bool
) -> tuple[dict[str, str], tuple[str, ...]] | None:
    """(environment, options) that give the proxy its token, or None. gh is asked for only once."""
    if context.secrets.get(GITHUB_TOKEN):
        return {GITHUB_TOKEN: context.secrets[GITHUB_TOKEN]}, ()
    profile = context.get("github-profile")
    if profile:
        script = str(beside("github_app_token.py"))
        command = [sys.executable, "-I", script, "token", "--profile", profile, "--repo", repo]
        return {}, ("--token-command", shlex.join([*command, "--format", "json"]))
    allowed = context.folders.config / "gh-token-allowed"
    if not shutil.which("gh") or not (allowed.exists() or ask):
        return None
    question = "use gh's token? It reaches all your repositories; only the proxy sees it, and this"
    if not allowed.exists():
        if not confirm(f"{question} is asked once", yes=False):
            return None
        allowed.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        allowed.touch(0o600)
    token = output_of("gh", "auth", "token", "--hostname", "github.com")
    return ({GITHUB_TOKEN: token}, ()) if token else None


def beside(name: str) -> Path:
    """Another script of ours, in the folder of this one."""
    path = Path(__file__).resolve().parent / name
    if not path.is_file():
        raise AgentVMError(f"{name} is missing", hint=f"put it beside {Path(__file__).resolve()}")
    return path


# Of the host's environment, what the proxy does not need; the names are gh's.
OTHER_SECRETS = (
    "GITHUB_MCP_SECRET", "GH_TOKEN", "GITHUB_TOKEN", "GH_ENTERPRISE_TOKEN",
    "GITHUB_ENTERPRISE_TOKEN",
)  # fmt: skip
# A module that is run as a script keeps its syntax tree as long as it runs: 8 MB. With -I: a
# PYTHONPATH into the project must not choose the modules that run on the host.
IMPORTED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import github_mcp_proxy
sys.exit(github_mcp_proxy.main())
"""


def proxy_environ(context: Context, choice: GitHubChoice) -> dict[str, str]:
    owner, _, repo = choice.repo.partition("/")
    environ = {"GITHUB_MCP_GIT": "https://github.com", **os.environ, **choice.environ}
    for other in OTHER_SECRETS:
        environ.pop(other, None)
    environ.update(GITHUB_MCP_OWNER=owner, GITHUB_MCP_REPO=repo)
    if context.chosen("readonly"):
        environ["GITHUB_MCP_READONLY"] = "1" if context.get("readonly") else "0"
    return environ


@contextlib.contextmanager
def github_proxy(context: Context, choice: GitHubChoice, name: str) -> Iterator[GitHub]:
    """A proxy for one VM. It ends with the block, and when this process is killed: its stdin."""
    policy, confirm = context.get("github-policy"), context.get("confirm-writes")
    audit, errors = audit_path(context, name), context.folders.state / "logs" / f"{name}.github.log"
    argv = [
        sys.executable, "-I", "-c", IMPORTED, str(beside(GITHUB_PROXY).parent), "--print-secret",
        "--listen", "127.0.0.1:0", "--exit-with-stdin", "--audit", str(audit), *choice.options,
        *(("--policy", policy) if policy else ()), *(("--confirm-writes",) if confirm else ()),
    ]  # fmt: skip
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0, "cwd": "/"}
    options.update(env=proxy_environ(context, choice), start_new_session=True)
    with open(errors, "wb") as file, child(argv, **options, stderr=file) as process:
        assert process.stdin and process.stdout
        with process.stdin, process.stdout as lines:
            port, secret, rights = (lines.readline().decode().strip() for _ in range(3))
            if not port.isdigit() or not secret:
                prune_logs(errors.parent)
                raise AgentVMError("the GitHub proxy did not start", details=tail(errors))
            asking = process if confirm else None
            readonly = rights == "read-only"
            log.info(f"GitHub: {choice.repo}{', read-only' if readonly else ''}")
            try:
                yield GitHub(choice.repo, int(port), secret, readonly, choice.remote, asking)
            finally:
                if process.poll() is None:
                    errors.unlink(missing_ok=True)  # the audit has what is worth keeping
                else:
                    log.warn(f"the GitHub proxy ended before the agent: {errors}")
                    prune_logs(errors.parent)


@contextlib.contextmanager
def armed(context: Context, guest: Guest, github: GitHub) -> Iterator[None]:
    """Refuse to go on unless the guest is refused what it must be; afterwards say what was done."""
    probe = guest.run("bash -s", stdin=github_probe(github))
    if probe.returncode:
        raise AgentVMError(
            "the GitHub proxy does not protect this VM", details=probe.stdout.strip()
        )
    audit = audit_path(context, guest.instance.name)
    with open(audit, "a") as file:
        file.write(json.dumps(dict.fromkeys(AUDIT_KEYS, "")) + "\n")  # the agent's begin here
    try:
        yield
    finally:
        with shielded(), contextlib.suppress(OSError):
            counts, *lines = github_receipt(of_the_agent(read_audit(audit)))
            log.info(f"GitHub: {counts} (agent-vm log {guest.instance.name})")
            for line in lines:
                log.info(f"GitHub: {guest_words(line)}")
            live = {lease.name for lease in context.leases.all()}
            prune_logs(audit.parent, "*.jsonl", keep=100, spare=live)


@contextlib.contextmanager
def confirming(
    proxy: subprocess.Popen[bytes] | None, agent: subprocess.Popen[bytes] | None
) -> Iterator[None]:
    """Meanwhile the proxy's questions are asked at the terminal; `agent`: who else reads there."""
    if proxy is None:
        yield
        return
    import select

    ended, end = os.pipe()

    def answer_all() -> None:
        assert proxy and proxy.stdin and proxy.stdout
        with contextlib.suppress(OSError, ValueError):  # the proxy has gone
            while ended not in select.select([proxy.stdout.fileno(), ended], [], [])[0]:
                question = json.loads(proxy.stdout.readline())
                answer = {"id": question["id"], "refused": ask_user(question, agent, ended)}
                proxy.stdin.write(json.dumps(answer).encode() + b"\n")

    thread = threading.Thread(target=answer_all, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with shielded():
            os.close(end)
            thread.join()
            os.close(ended)


def open_terminal() -> int:
    return os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)


def need_terminal() -> None:
    try:
        os.close(open_terminal())
    except OSError:
        raise AgentVMError("--confirm-writes: there is no terminal to ask at") from None


# The guest has drawn on the terminal and set its modes. Ends a sequence that is open, takes back
# encoding, margins, scroll region, origin mode, character sets, colours, and clears the screen:
# what the question says is to be read as it is meant.
FRESH_SCREEN = (
    "\x18\x1b\\\x1b%G\x1b[!p\x1b[?69l\x1b[r\x1b[?6l\x1b[?7h\x1b(B\x0f\x1b[0m"
    "\x1b]104\x1b\\\x1b]110\x1b\\\x1b]111\x1b\\\x1b[2J\x1b[H\x1b[?25h"
)


ALLOW = "allow? y/n (Ctrl-C ends the run) "


def ask_user(question: Mapping[str, Any], agent: subprocess.Popen[bytes] | None, ended: int) -> str:
    """Why a write may not pass, "" when it may. The agent's ssh stops reading the terminal."""
    import termios

    try:
        terminal = open_terminal()
    except OSError:
        return "there is no terminal to ask at"
    text = f"The agent wants to: {question['tool']} {question['about']}"
    text = guest_words(text.encode("ascii", "backslashreplace").decode())
    stopped = None
    try:
        columns, rows = os.get_terminal_size(terminal)
        if os.tcgetpgrp(terminal) != os.getpgrp():
            return "agent-vm is in the background and cannot ask"
        columns, rows = columns or 80, rows or 24  # 0 when a terminal does not say
        if sum(-(-len(line) // columns) for line in (text, ALLOW)) >= rows:
            return "the question does not fit the user's terminal"
        if agent:
            agent.send_signal(signal.SIGSTOP)
            stopped = agent
        with line_mode(terminal):
            return read_answer(terminal, text, question["until"], ended)
    except (OSError, termios.error):
        return "the terminal has gone"
    finally:
        if stopped:
            stopped.send_signal(signal.SIGCONT)
            with contextlib.suppress(OSError):
                redraw(terminal)
        os.close(terminal)


def redraw(terminal: int) -> None:
    """A size that changes makes the guest's program draw anew; the same size would not."""
    import termios

    size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
    rows = int.from_bytes(size[:2], sys.byteorder)
    other = max(rows - 1, 1).to_bytes(2, sys.byteorder) + size[2:]
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, other)
    time.sleep(0.2)
    if fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8)) == other:  # nobody resized it meanwhile
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)


@contextlib.contextmanager
def line_mode(terminal: int) -> Iterator[None]:
    """A terminal that ssh has made raw takes lines; Ctrl-C is a character, which is read here."""
    import termios

    before = termios.tcgetattr(terminal)
    lines = [*before[:6], list(before[6])]
    lines[0] |= termios.ICRNL
    lines[1] |= termios.OPOST | termios.ONLCR
    lines[3] = (lines[3] | termios.ICANON | termios.ECHO | termios.ECHOE) & ~termios.ISIG
    lines[6][termios.VEOL] = b"\x03"  # ends a line, as Enter does
    time.sleep(0.3)  # whoever was typing to the agent has not meant this
    termios.tcsetattr(terminal, termios.TCSAFLUSH, lines)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def read_answer(terminal: int, text: str, until: float, ended: int) -> str:
    """`until` in time.monotonic() seconds; `ended` can be read when the agent has ended."""
    import select

    while True:  # what is no answer is asked anew, on a fresh screen
        asked = f"{FRESH_SCREEN}\a{text}\n{ALLOW}"
        os.write(terminal, asked.encode())
        left = max(0, until - time.monotonic())
        ready = select.select([terminal, ended], [], [], left)[0]
        if terminal not in ready:
            os.write(terminal, b"\n")
            return "the run has ended" if ready else "the user did not answer"
        data = os.read(terminal, 1000)
        word = re.sub(rb"\x1b\[[0-9;?<>]*[A-Za-z~]", b"", data).strip().lower()
        if word in (b"y", b"yes"):
            return ""
        if b"\x03" in data:
            os.kill(os.getpid(), signal.SIGINT)
        if word in (b"n", b"no") or b"\x03" in data or not data:
            return "the user said no"


def audit_path(context: Context, name: str) -> Path:
    return context.folders.state / "audit" / f"{name}.jsonl"


def of_the_agent(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what the probe before it caused, which ends with a line of nothing."""
    ends = [at for at, line in enumerate(lines) if not line["verdict"]]
    return list(lines[max(ends, default=-1) + 1 :])


AUDIT_KEYS = ("time", "method", "tool", "verdict", "reason", "target")


def read_audit(path: Path) -> list[dict[str, Any]]:
    """The proxy's decisions; a line that is torn (a full disk) is left out."""
    result = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                result.append({key: entry[key] for key in AUDIT_KEYS})
    return result


def cmd_log(args: argparse.Namespace) -> int:
    """The audit of a run; the newest unless one is named."""
    context = Context.open(args, need_lima=False)
    folder = context.folders.state / "audit"
    found = sorted(folder.glob("*.jsonl"), key=changed)
    found = [path for path in found if args.run in ("", path.stem)]
    if not found:
        raise AgentVMError(
            f"no run {args.run} with GitHub" if args.run else "no run with GitHub yet",
            hint=f"{folder} has: " + " ".join(sorted(path.stem for path in folder.glob("*.jsonl"))),
        )
    if not args.json:
        log.info(found[-1].stem)
    for line in of_the_agent(read_audit(found[-1])):
        if args.json:
            print(json.dumps(line))
            continue
        url = (line["target"] or {}).get("url", "")
        words = (line["time"], line["verdict"], audit_words(line), url, line["reason"])
        print("  ".join(guest_words(str(word)) for word in words if word))
    return 0


# --- setup: the base instance ---


def host_facts(folders: Folders) -> HostFacts:
    import platform

    machine = platform.machine()
    qemu = "qemu-system-" + {"arm64": "aarch64"}.get(machine, machine)
    existing = next(
        path for path in (folders.lima_home, *folders.lima_home.parents) if path.exists()
    )
    os_release = ""
    with contextlib.suppress(OSError):
        os_release = Path("/etc/os-release").read_text()
    return HostFacts(
        system=platform.system(),
        machine=machine,
        root=os.geteuid() == 0,
        cpus=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_free=shutil.disk_usage(existing).free,
        kvm=os.access("/dev/kvm", os.R_OK | os.W_OK),
        qemu=shutil.which(qemu) is not None or shutil.which("qemu-kvm") is not None,
        qemu_img=shutil.which("qemu-img") is not None,
        os_release=parse_os_release(os_release),
    )


def sizes_for(context: Context, host: HostFacts) -> dict[str, int]:
    """cpus, memory (GiB), disk (GB); defaults are clamped to half of the host's, and it is said."""
    sizes = {"disk": context.get("disk")}
    for name, total in (("cpus", host.cpus), ("memory", host.memory >> 30)):
        wanted = context.get(name)
        sizes[name] = wanted if context.chosen(name) else clamp(wanted, total)
        if sizes[name] != wanted:
            log.info(f"{name}: {sizes[name]}, half of this host's (the default is {wanted})")
    return sizes


def preflight(context: Context, args: argparse.Namespace) -> dict[str, int]:
    """Everything that can be known before anything is created; returns the sizes."""
    need_ssh()
    host = host_facts(context.folders)
    if host.root:
        raise AgentVMError(*setup_problems(host, False, 0)[0])
    install = qemu_install_command(host.os_release, host.machine)
    if host.system == "Linux" and install and not (host.qemu and host.qemu_img):
        log.info(f"QEMU is not installed. This installs it: {install}")
        if confirm("run it?", args.yes):
            subprocess.run(shlex.split(install), stdout=sys.stderr, check=False)
            host = host_facts(context.folders)
    problems = setup_problems(
        host, context.get("minimal"), context.get("memory") if context.chosen("memory") else 0
    )
    if problems:
        more = "".join(f"\nalso: {problem} ({step})" for problem, step in problems[1:])
        raise AgentVMError(problems[0][0], hint=problems[0][1] + more)
    if host.system == "Linux" and not host.kvm:
        log.warn("no usable /dev/kvm: the VM is emulated and slow (is your user in the group kvm?)")
    if not context.lima.binary:
        context.lima.binary = install_lima(context, args.yes)
    check_lima_version(context.lima)
    return sizes_for(context, host)


def install_lima(context: Context, yes: bool) -> str:
    """Install Lima with Homebrew, else from its release below our data folder; limactl's path."""
    if shutil.which("brew"):
        if not confirm("Lima is not installed: run `brew install lima`?", yes):
            raise AgentVMError("Lima is not installed", hint="brew install lima, or setup --yes")
        subprocess.run(["brew", "install", "lima"], stdout=sys.stderr, check=False)
    else:
        url, target = context.get("lima-url"), context.folders.data / "lima"
        if not confirm(f"Lima is not installed: get it from {url} into {target}?", yes):
            raise AgentVMError("Lima is not installed", hint="install it, or setup --yes")
        download_lima(url.rstrip("/"), target)
    binary = find_limactl(context.folders)
    if not binary:
        raise AgentVMError(
            "Lima could not be installed", hint="see https://lima-vm.io/docs/installation/"
        )
    return binary


def lima_archive_name(system: str, machine: str, version: str) -> str:
    arch = {"arm64": "arm64" if system == "Darwin" else "aarch64"}.get(machine, machine)
    return f"lima-{version}-{system}-{arch}.tar.gz"


def download_lima(url: str, target: Path) -> None:
    """The release archive, checked against the release's SHA256SUMS, unpacked as `target`."""
    import hashlib
    import platform
    import tarfile
    import tempfile

    name = lima_archive_name(platform.system(), platform.machine(), LIMA_RELEASE)
    sums = fetch(f"{url}/SHA256SUMS").decode(errors="replace")
    wanted = next(
        (line.split()[0] for line in sums.splitlines() if line.endswith((f" {name}", f"*{name}"))),
        "",
    )
    if not wanted:
        raise AgentVMError(f"{url}/SHA256SUMS does not name {name}", hint="install Lima by hand")
    log.step(f"getting {name}")
    archive = fetch(f"{url}/{name}")
    if hashlib.sha256(archive).hexdigest() != wanted.lower():
        raise AgentVMError(
            f"{name} does not have the checksum of {url}/SHA256SUMS", hint="try another --lima-url"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        archive_path = Path(folder, name)
        archive_path.write_bytes(archive)
        # The filter is in Python 3.9.17 and later; the checksum has vouched for the archive before.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        try:
            with tarfile.open(archive_path) as tar:
                tar.extractall(Path(folder, "lima"), **safe)
        except (OSError, tarfile.TarError) as error:
            raise AgentVMError(f"{name} cannot be unpacked: {error}") from error
        shutil.rmtree(target, ignore_errors=True)
        Path(folder, "lima").replace(target)


def fetch(url: str) -> bytes:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return bytes(response.read())
    except (OSError, ValueError) as error:
        raise AgentVMError(
            f"{url}: {getattr(error, 'reason', error)}", hint="--lima-url takes a mirror"
        ) from error


def npm_registry(context: Context) -> str:
    """--npm-registry, else what npm on the host is configured with, else "". No passwords."""
    if context.get("npm-registry"):
        return str(context.get("npm-registry"))
    with contextlib.suppress(argparse.ArgumentTypeError):
        return web_address(output_of("npm", "config", "get", "registry"))
    return ""


def create_expression(
    params: Mapping[str, str], image: str, digest: str, arch: str, certificates: Sequence[str]
) -> str:
    """What `limactl create --set` changes in the template; pure."""
    parts = [".mountTypesUnsupported = []"]
    parts += [f".param.{name} = {yq_value(value)}" for name, value in params.items() if value]
    if image:
        entry = {"location": image, "arch": arch, **({"digest": digest} if digest else {})}
        parts.append(f".images = {yq_value([entry])}")
    if certificates:
        parts.append(f".caCerts.certs = (.caCerts.certs // []) + {yq_value(list(certificates))}")
    return " | ".join(parts)


def template_expression(context: Context, environ: Mapping[str, str]) -> str:
    import platform

    params = {
        "minimal": "true" if context.get("minimal") else "",
        "aptMirror": context.get("apt-mirror"),
        "npmRegistry": npm_registry(context),
        "locale": ""
        if context.get("template")
        else environ.get("LC_ALL") or environ.get("LANG", ""),
    }
    arch = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine(), platform.machine())
    certificates = [Path(path).read_text(errors="replace") for path in context.get("ca-cert")]
    return create_expression(
        params, context.get("image"), context.get("image-digest"), arch, certificates
    )


class ProvisionLog:
    """Follows the guest's provisioning log while `limactl start` waits, and shows its steps."""

    def __init__(self, instance: Instance) -> None:
        config = str(instance.dir / "ssh.config")
        # Not through Lima's control master: boot ends the first user session, and it with it.
        self.command = [
            "ssh", "-F", config, "-q", "-o", "ControlMaster=no", "-o", "ControlPath=none",
            instance.hostname, f"tail -n +1 -F {PROVISION_LOG} 2> /dev/null",
        ]  # fmt: skip
        self.config = config
        self.seen: set[str] = set()
        self.process: subprocess.Popen[str] | None = None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.follow, daemon=True)

    def follow(self) -> None:
        while not self.done.wait(2):
            if not os.path.exists(self.config):
                continue
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace",
                start_new_session=True,
            )  # fmt: skip
            assert self.process.stdout
            for line in self.process.stdout:
                self.take(line.rstrip("\n"))
            self.process.wait()

    def take(self, line: str) -> None:
        if line.startswith("agent-vm: ") and line not in self.seen:
            log.step(line[len("agent-vm: ") :])
            self.seen.add(line)
        elif log.verbose:
            print(line, file=sys.stderr)

    def __enter__(self) -> ProvisionLog:
        self.thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.done.set()
        if self.process and self.process.poll() is None:
            stop_process(self.process)
        self.thread.join(timeout=5)


ESSENTIAL_CHECKS = ("claude --version", "git --version", "jq --version")
FULL_CHECKS = (
    *(f"{tool} --version" for tool in ("curl", "gcc", "node", "npm", "rg", "fd", "gh")),
    "python3 -m venv /tmp/smoke",
    "docker compose version",
    "docker buildx version",
    "sg docker -c 'docker version'",
    "chromium --headless --disable-gpu --dump-dom data:text/html,smoke-test | grep smoke-test",
)
# The next boot may take any installed kernel; each must have the mount type that the host confines.
KERNEL_CHECK = 'for k in /boot/vmlinuz-*; do /sbin/modinfo -k "${k#*/vmlinuz-}" 9p; done'


def smoke_test(guest: Guest, minimal: bool, provisioned: bool) -> None:
    """What a run needs answers in the guest; a template of the user's own owes the essentials."""
    checks = [*ESSENTIAL_CHECKS]
    if provisioned and not minimal:
        checks += FULL_CHECKS
    if guest.instance.vm_type == "qemu":
        checks.append(KERNEL_CHECK)
    for check in checks:
        result = guest.run(f"bash -lc {shlex.quote('set -e -o pipefail; ' + check)}", timeout=600)
        if result.returncode:
            raise AgentVMError(
                f"the new base instance failed its smoke test: {check}",
                details="\n".join(result.stdout.splitlines()[-10:]),
            )


def check_provisioned(context: Context, guest: Guest, provision_log: ProvisionLog) -> bool:
    """Whether our scripts ran. Lima does not report a failed one, so look for their last marker."""
    kept_log = context.folders.state / "logs" / "setup.log"
    result = guest.run(f"cat {PROVISION_LOG}")
    if result.returncode and not provision_log.seen:
        return False  # a template of the user's own
    kept_log.write_text(result.stdout)
    if guest.run(f"test -e {PROVISION_DONE}").returncode:
        errors = re.findall(r"^agent-vm: error: (.*)", result.stdout, re.MULTILINE)
        raise AgentVMError(
            f"provisioning failed{': ' + errors[0] if errors else ''}",
            details="\n".join([*result.stdout.splitlines()[-15:], f"--- all of it: {kept_log}"]),
        )
    return True


def log_in(context: Context, guest: Guest) -> None:
    """Without a credential on the host: log in once, in the guest, when somebody is there."""
    if find_credential(context):
        return
    if not (os.isatty(0) and os.isatty(1)):
        log.info(
            "no credential yet: `agent-vm auth set` stores one, or set CLAUDE_CODE_OAUTH_TOKEN"
        )
        return
    log.info(
        "Claude starts now for its login, which is kept in the base instance: every VM has it."
    )
    log.info("To keep it out: Ctrl-C here, then `claude setup-token` and `agent-vm auth set`.")
    if guest.attach(["bash", "-lc", "claude auth login"], tty=True):
        log.warn("nobody is logged in: `agent-vm auth set` stores a token, or run setup again")


@contextlib.contextmanager
def setup_lock(context: Context) -> Iterator[None]:
    with context.lock(f"{context.base}.setup.lock", wait=False) as free:
        if not free:
            raise AgentVMError(
                f"another setup of {context.base} is running", hint="wait for it to end"
            )
        yield


def build_base(context: Context, args: argparse.Namespace) -> None:
    """Build NAME.new beside the base instance, test it, then let it take the name."""
    sizes = preflight(context, args)
    own_hook = Path(os.path.expanduser("~/.claude-vm.setup.sh"))
    hooks = readable_hooks(own_hook, context.folders.config / "setup.sh")
    with setup_lock(context):
        base = find_base(context)  # one that runs could not be replaced at the end
        new = context.base + ".new"
        if (context.folders.lima_home / new).exists():
            log.info(f"removing {new}, left by a setup that was cut off")
            remove_clone(context.lima, context.leases, new)
        context.leases.take(new, "")
        try:
            notes = provision(context, new, sizes, hooks)
            swap_base(context)
        finally:
            with shielded():
                if (context.folders.lima_home / new).exists():
                    try_remove(context.lima, context.leases, new)
                context.leases.drop(new)
    report_setup(context, notes, replaced=base is not None)


def create_new(
    context: Context, new: str, sizes: Mapping[str, int], default_template: Path
) -> Instance:
    log.step(f"creating {new} (Lima gets the disk image on the first time)")
    options = [f"--{name}={value}" for name, value in sizes.items()]
    template = context.get("template") or str(default_template)
    context.lima.create(new, template, *options, "--set", template_expression(context, os.environ))
    instance = context.lima.find(new)
    if instance is None or instance.mounts:
        raise AgentVMError(
            f"{new} would mount {instance.mounts[0][0]}" if instance else f"{new} is not there",
            hint=f"look into the template and {context.folders.lima_home}/_config",
        )
    return instance


def first_start(context: Context, instance: Instance) -> None:
    """Start, and wait for provisioning: Lima itself gives up on a running VM after ten minutes."""
    deadline = time.monotonic() + 9 * context.lima.timeout
    try:
        start_instance(context, instance.name, 9 * context.lima.timeout)
    except AgentVMError:
        # "boot scripts must have finished" is polled 200 times (Lima's hostagent/requirements.go).
        guest = Guest(instance)
        while guest.alive() and time.monotonic() < deadline:
            if guest.run("test -s /run/lima-boot-done").returncode == 0:
                return
            time.sleep(5)
        raise


def restart_for_kernel(context: Context, guest: Guest) -> None:
    """Provisioning may have replaced the running kernel; without its modules no Docker starts."""
    if guest.run("test -d /lib/modules/$(uname -r)/kernel").returncode:
        log.step("restarting it with its new kernel")
        context.lima.stop(guest.instance.name)
        start_instance(context, guest.instance.name, context.lima.timeout)


def provision(
    context: Context, new: str, sizes: Mapping[str, int], hooks: Sequence[Path]
) -> list[str]:
    """Create, boot, provision, test and stop the instance `new`; the fall-backs that it noted."""
    with lima_dir() as folder:
        instance = create_new(context, new, sizes, folder / "agent-vm.yaml")
    guest = Guest(instance)
    log.step(f"starting {new}")
    with ProvisionLog(instance) as provision_log:
        first_start(context, instance)
    provisioned = check_provisioned(context, guest, provision_log)
    restart_for_kernel(context, guest)
    for path in hooks:
        log.step(f"running {path}")
        run_hook(guest, path, inside=False)
    log.step("testing it")
    smoke_test(guest, context.get("minimal"), provisioned)
    notes = guest.run("cat /var/lib/agent-vm/notes 2> /dev/null").stdout.splitlines()
    log_in(context, guest)
    log.step("stopping it")
    context.lima.stop(new)
    return notes


def swap_base(context: Context) -> None:
    """NAME becomes NAME.old, NAME.new becomes NAME; recover_base() repairs half a swap."""
    base, new, old = context.base, context.base + ".new", context.base + ".old"
    with shielded(), context.lock(f"{base}.lock"):
        names = {instance.name: instance.status for instance in context.lima.list()}
        if names.get(base) == "Broken":  # nothing that could be cloned or rolled back to
            remove_clone(context.lima, context.leases, base)
            del names[base]
        if base in names:
            if old in names:
                context.lima.unprotect(old)
                context.lima.delete(old)
            context.lima.rename(base, old)
        context.lima.rename(new, base)
        context.lima.protect(base)  # a rename drops the protection
        if base in names:
            context.lima.protect(old)


def report_setup(context: Context, notes: Sequence[str], replaced: bool) -> None:
    log.step(f"{context.base} is ready")
    for note in notes:
        log.info(f"note: {note}")
    if replaced:
        log.info("the previous one is kept until the next setup: agent-vm setup --rollback")


def roll_back(context: Context) -> None:
    """Exchange the base instance and the previous one."""
    base, old, swap = context.base, context.base + ".old", context.base + ".swap"
    with setup_lock(context):
        find_base(context)
        with shielded(), context.lock(f"{base}.lock"):
            names = {instance.name for instance in context.lima.list()}
            if not {base, old} <= names:
                raise AgentVMError(f"there is no {old} to go back to", hint="agent-vm list")
            for source, target in ((base, swap), (old, base), (swap, old)):
                context.lima.rename(source, target)
            context.lima.protect(base)
            context.lima.protect(old)
    log.info(f"{base} is the previous one again; {old} is the one that it replaces")


# --- commands ---


def cmd_setup(args: argparse.Namespace) -> int:
    context = Context.open(args, need_lima=args.rollback, collect=True)
    if args.rollback:
        roll_back(context)
    else:
        build_base(context, args)
    return 0


def cmd_run(args: argparse.Namespace) -> int:
    return start_run(args, [*AGENT, *args.command])


def cmd_shell(args: argparse.Namespace) -> int:
    return start_run(args, args.command or ["bash", "-l"])


def start_run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    return run_in_clone(Context.open(args, need_lima=False, collect=True), args, argv)


def our_instances(context: Context) -> list[dict[str, Any]]:
    """What `list` shows, a dict an instance; also what --json prints."""
    leases = {lease.name: lease for lease in context.leases.all()}
    rows = []
    for instance in context.lima.list():
        lease = leases.get(instance.name)
        if not is_base(instance.name) and not is_clone(instance.name):
            continue
        role = "base" if is_base(instance.name) else "clone"
        if lease and role == "clone":
            orphan = context.leases.is_orphan(lease)
            role = "kept" if lease.keep else "orphan" if orphan else "running"
        rows.append({
            "name": instance.name,
            "status": instance.status,
            "role": role,
            "project": lease.project if lease else "",
            "age_seconds": round(time.time() - (lease.created if lease else created(instance))),
            "cpus": instance.cpus,
            "memory_bytes": instance.memory,
            "disk_bytes": disk_usage(instance.dir),
        })  # fmt: skip
    return rows


def created(instance: Instance) -> float:
    try:
        return (instance.dir / "lima-version").stat().st_mtime
    except OSError:
        return time.time()


def disk_usage(folder: Path) -> int:
    """Bytes that the files of a folder occupy; sparse disks count what they hold."""
    total = 0
    with contextlib.suppress(OSError):
        total = sum(path.lstat().st_blocks * 512 for path in folder.iterdir())
    return total


def human_age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def human_size(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 29 else f"{size / (1 << 20):.0f} MiB"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def cmd_list(args: argparse.Namespace) -> int:
    rows = our_instances(Context.open(args, collect=True))
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return 0
    table = [("NAME", "STATUS", "ROLE", "AGE", "DISK", "PROJECT")]
    table += [
        (
            *(row[key] for key in ("name", "status", "role")),
            human_age(row["age_seconds"]),
            human_size(row["disk_bytes"]),
            printable(row["project"]),
        )
        for row in rows
    ]
    print_table(table)
    return 0


def printable(text: str) -> str:
    """Text for a terminal that shows what it says: nothing that is invisible or moves the rest."""
    return "".join(char if is_plain(char) else "?" for char in text)


def guest_words(text: str) -> str:
    """`printable`, and without the runs of spaces that would begin a line with a guest's words."""
    return re.sub(" {2,}", " ", printable(text))


def is_plain(char: str) -> bool:
    if char.isascii():
        return char.isprintable()
    import unicodedata

    blank = char in "\u2800\u3164\u115f\u1160\uffa0"
    turned = unicodedata.bidirectional(char) in ("NSM", "R", "AL", "AN")
    return char.isprintable() and not blank and not turned


def instance_named(context: Context, name: str) -> Instance:
    if not is_clone(name) and not is_base(name):
        raise AgentVMError(f"{name!r} is not an instance of agent-vm", hint="agent-vm list")
    instance = context.lima.find(name)
    if instance is None:
        raise AgentVMError(f"instance {name} does not exist", hint="agent-vm list")
    return instance


def cmd_stop(args: argparse.Namespace) -> int:
    context = Context.open(args)
    instance = instance_named(context, args.instance)
    if instance.status == "Running":
        context.lima.stop(instance.name)
    return 0


def cmd_rm(args: argparse.Namespace) -> int:
    context = Context.open(args)
    instance = instance_named(context, args.instance)
    lease = next((lease for lease in context.leases.all() if lease.name == instance.name), None)
    if is_base(instance.name) and not args.force:
        raise AgentVMError(f"{instance.name} is a base instance", hint="rm --force removes it")
    in_use = lease and not lease.keep and not context.leases.is_orphan(lease)
    if lease and in_use and not args.force:
        raise AgentVMError(
            f"{instance.name} is in use by process {lease.pid}", hint="end that run, or rm --force"
        )
    if instance.protected:
        context.lima.unprotect(instance.name)
    remove_clone(context.lima, context.leases, instance.name)
    return 0


def cmd_gc(args: argparse.Namespace) -> int:
    context = Context.open(args)
    sizes = {
        lease.name: disk_usage(context.folders.lima_home / lease.name)
        for lease in context.leases.orphans()
    }
    if args.dry_run:
        for name, size in sizes.items():
            print(f"{name}  {human_size(size)}")
        return 0
    for name in collect_garbage(context.lima, context.leases):
        print(f"{name}  {human_size(sizes.get(name, 0))}")
    return 1 if context.leases.orphans() else 0


def cmd_ssh_config(args: argparse.Namespace) -> int:
    instance = instance_named(Context.open(args), args.instance)
    if instance.status != "Running":
        raise AgentVMError(f"{instance.name} is {instance.status.lower()}: it has no ssh port")
    print((instance.dir / "ssh.config").read_text(), end="")
    return 0


def cmd_auth(args: argparse.Namespace) -> int:
    context = Context.open(args, need_lima=False)
    actions = {"set": auth_set, "status": auth_status, "clear": auth_clear}
    return actions[args.action](context)


def recognise(text: str) -> tuple[str, str]:
    """The (variable, credential) in what `claude setup-token` prints, an export line, or a key."""
    found = set(re.findall(r"(sk-ant-(?:oat|api))([\w-]{16,})", text, re.ASCII))
    if len(found) != 1:
        raise AgentVMError(
            "stdin holds neither an OAuth token (sk-ant-oat…) nor an API key (sk-ant-api…)",
            hint="run `claude setup-token` on any machine and paste the token that it prints",
        )
    prefix, rest = found.pop()
    return CREDENTIAL_PREFIX[prefix], prefix + rest


def auth_set(context: Context) -> int:
    """Store what stdin holds: an OAuth token of `claude setup-token`, or an API key."""
    if os.isatty(0):
        import getpass

        text = ""
        with contextlib.suppress(EOFError):
            text = getpass.getpass("token from `claude setup-token`, or API key (not shown): ")
    else:
        text = sys.stdin.read(10_000)
    name, value = recognise(text)
    path = context.folders.config / "credential"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name("credential.part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(f"{name}={value}\n")
    part.replace(path)
    log.info(f"stored as {name} in {path}")
    return 0


def auth_status(context: Context) -> int:
    credential = find_credential(context)
    if credential is None:
        print("none on the host; an agent uses the login in the base instance, if there is one")
        print("that login, if any, is copied into every VM")
        return 1
    print(f"{credential.name} from {credential.origin}")
    print("it enters the guest: the agent there can read it")
    return 0


def auth_clear(context: Context) -> int:
    (context.folders.config / "credential").unlink(missing_ok=True)
    return 0


def masked(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", url)


def shown_setting(name: str, value: Any) -> str:
    if name == "env":  # a value may be a secret
        return " ".join(item.partition("=")[0] for item in value)
    if name == "mount":
        return " ".join(f"{m.source}:{'rw' if m.writable else 'ro'}:{m.target}" for m in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def cmd_info(args: argparse.Namespace) -> int:
    context = Context.open(args, need_lima=False)
    with lima_dir() as folder:
        beside = folder.parent == Path(__file__).resolve().parent
        template = context.get("template") or (
            str(folder) if beside else "the copy inside the script"
        )
    rows = [("SETTING", "VALUE", "FROM")]
    for name in SETTINGS:
        value, origin = context.setting(name)
        rows.append((name, shown_setting(name, value) or "-", origin))
    print_table(rows)
    print()
    print_table([
        ("agent-vm", f"{__version__}, {Path(__file__).resolve()}"),
        ("limactl", context.lima.binary or "not installed"),
        ("template", template),
        ("base instance", context.base),
        ("state", str(context.folders.state)),
        ("config", str(context.folders.config)),
        ("data", str(context.folders.data)),
        ("Lima's home", str(context.folders.lima_home)),
        ("npm registry", npm_registry(context) or "npm's own"),
        *((name, masked(os.environ[name])) for name in sorted(os.environ) if PROXY.fullmatch(name)),
    ])  # fmt: skip
    return 0


class Check(NamedTuple):
    name: str
    level: str  # ok, warn or fail
    message: str
    fix: str = ""


def cmd_doctor(args: argparse.Namespace) -> int:
    context = Context.open(args, need_lima=False)
    checks = [
        *host_checks(context), *lima_checks(context), *run_checks(context),
        *github_checks(context),
    ]  # fmt: skip
    for check in checks:
        if args.json:
            print(json.dumps(check._asdict()))
        else:
            print(
                f"{check.level:<5} {check.name}: {check.message}"
                + (f"\n      fix: {check.fix}" if check.fix else "")
            )
    return 1 if any(check.level == "fail" for check in checks) else 0


def verdict(name: str, ok: str, problem: str, fix: str, level: str = "warn") -> Check:
    """ok with what is well, unless that is empty."""
    return Check(name, "ok", ok) if ok else Check(name, level, problem, fix)


def host_checks(context: Context) -> Iterator[Check]:
    host = host_facts(context.folders)
    problems = setup_problems(host, context.get("minimal"), 0)
    for problem, fix in problems:
        yield Check("host", "fail", problem, fix)
    if not problems:
        free = f"{human_size(host.disk_free)} free below {context.folders.lima_home}"
        yield Check("host", "ok", f"{host.cpus} CPUs, {human_size(host.memory)} memory")
        yield Check("disk", "ok", free)
    if host.system == "Linux":
        if host.qemu and host.qemu_img:
            yield Check("qemu", "ok", "installed")
        usable = "/dev/kvm is usable" if host.kvm else ""
        fix = "sudo usermod -aG kvm $USER, then log in again"
        yield verdict("kvm", usable, "no usable /dev/kvm: VMs are slow", fix)
    for tool, level in (("ssh", "fail"), ("git", "warn"), ("openssl", "warn")):
        yield verdict(tool, shutil.which(tool) or "", "not installed", f"install {tool}", level)


def lima_checks(context: Context) -> Iterator[Check]:
    if not context.lima.binary:
        yield Check("lima", "fail", "limactl is not installed", "agent-vm setup installs it")
        return
    try:
        check_lima_version(context.lima)
        version = ".".join(map(str, context.lima.version()))
        yield Check("lima", "ok", f"{version} ({context.lima.binary})")
        instances = context.lima.list()
    except AgentVMError as error:
        yield Check("lima", "fail", str(error), error.hint)
        instances = None
    yield from half_made(context.folders.lima_home)
    if instances is None:
        return
    base = next((instance for instance in instances if instance.name == context.base), None)
    if base is None:
        yield Check("base instance", "fail", f"there is no {context.base}", "agent-vm setup")
    elif base.status != "Stopped":
        fix = f"agent-vm stop {base.name}" if base.status == "Running" else "agent-vm setup"
        yield Check("base instance", "fail", f"{base.name} is {base.status.lower()}", fix)
    else:
        days = (time.time() - created(base)) / 86400
        fix = "agent-vm setup brings it up to date" if days > 30 else ""
        yield Check(
            "base instance", "warn" if fix else "ok", f"{base.name}, {days:.0f} days old", fix
        )


def half_made(lima_home: Path) -> Iterator[Check]:
    """Instance folders without lima.yaml: an older limactl fails on every verb because of one."""
    for folder in sorted(lima_home.glob("[!_.]*")):
        if folder.is_dir() and not (folder / "lima.yaml").exists():
            fix = f"rm -r {shlex.quote(str(folder))}  (when no limactl is working on it)"
            yield Check("lima", "warn", f"{folder} is half-made", fix)


def run_checks(context: Context) -> Iterator[Check]:
    orphans = ", ".join(lease.name for lease in context.leases.orphans())
    ok = "" if orphans else "none"
    yield verdict("orphans", ok, f"{orphans}: their runs are gone", "agent-vm gc")
    leased = {lease.name for lease in context.leases.all()}
    for path in context.folders.lima_home.glob("agent-vm-*"):
        if is_clone(path.name) and path.name not in leased:
            yield Check("orphans", "warn", f"{path.name} has no lease", f"agent-vm rm {path.name}")
    try:
        credential = find_credential(context)
    except AgentVMError as error:
        yield Check("credential", "fail", str(error), error.hint)
        return
    ok = f"{credential.name} from {credential.origin}; it enters the guest" if credential else ""
    fix = "agent-vm auth set, unless the base instance is logged in"
    yield verdict("credential", ok, "none on the host", fix)


def github_checks(context: Context) -> Iterator[Check]:
    """What a run with GitHub needs, where config.ini or the environment asks for it."""
    try:
        if context.get("github") == "off":
            return
        context.get("github-policy")
        profile = context.get("github-profile")
        for script in (GITHUB_PROXY, *(["github_app_token.py"] if profile else [])):
            beside(script)
    except AgentVMError as error:
        yield Check("GitHub", "fail", str(error), error.hint)
        return
    gh = "gh" if (context.folders.config / "gh-token-allowed").exists() else ""
    source = GITHUB_TOKEN if context.secrets.get(GITHUB_TOKEN) else profile or gh
    ok = f"{context.get('github')}, with the token of {source}" if source else ""
    yield verdict("GitHub", ok, "there is no token", f"{GITHUB_TOKEN} or github-profile")


def cmd_template(args: argparse.Namespace) -> int:
    with lima_dir() as folder:
        if args.action == "show":
            print((folder / "agent-vm.yaml").read_text(), end="")
            return 0
        if not args.directory:
            raise AgentVMError(
                "template export: which directory?", hint="agent-vm template export DIR"
            )
        target = Path(args.directory)
        try:
            shutil.copytree(folder, target)
        except FileExistsError as error:
            raise AgentVMError(f"{target} exists", hint="name a new directory") from error
        except OSError as error:
            raise AgentVMError(f"cannot write {target}: {error}") from error
    log.info(f"edit {target}/agent-vm.yaml, then: agent-vm setup --template {target}/agent-vm.yaml")
    return 0


SHELL_FUNCTIONS = {
    "agent-vm": "",
    "claude-vm-setup": "setup",
    "claude-vm": "run --",
    "claude-vm-shell": "shell",
}


def cmd_shell_init(args: argparse.Namespace) -> int:
    """Shell functions; all that follows `claude-vm` is the agent's, so no flag of ours clashes."""
    # -I: a PYTHONPATH into the project must not choose the modules that run on the host.
    command = shlex.join([sys.executable, "-I", os.path.realpath(__file__)])
    for name, verb in SHELL_FUNCTIONS.items():
        line = f"{command} {verb}".rstrip()
        if args.shell == "fish":
            print(f"function {name}; {line} $argv; end")
        else:
            print(f'{name}() {{ {line} "$@"; }}')
    return 0


def parser_words(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """verb -> its options; "" -> the verbs. What completion offers, read from the parser."""
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    words = {"": [*verbs]}
    for verb, sub in verbs.items():
        words[verb] = [option for action in sub._actions for option in action.option_strings]
        words[verb] += [str(choice) for action in sub._actions for choice in action.choices or ()]
    return words


def cmd_completion(args: argparse.Namespace) -> int:
    words = parser_words(build_parser())
    render = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}
    print(render[args.shell](words))
    return 0


def bash_completion(words: Mapping[str, Sequence[str]]) -> str:
    cases = "\n".join(
        f"    {verb}) words={shlex.quote(' '.join(of))} ;;" for verb, of in words.items() if verb
    )
    return f"""# shellcheck shell=bash
_agent_vm() {{
  local words
  COMPREPLY=()
  case "${{COMP_WORDS[1]}}" in
{cases}
    *) words={shlex.quote(" ".join(words[""]))} ;;
  esac
  local word current="${{COMP_WORDS[COMP_CWORD]}}"
  while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -W "$words" -- "$current")
}}
complete -o default -F _agent_vm agent-vm agent_vm.py"""


def zsh_completion(words: Mapping[str, Sequence[str]]) -> str:
    cases = "\n".join(
        f"    {verb}) compadd -- {' '.join(of)} ;;" for verb, of in words.items() if verb
    )
    return f"""_agent_vm() {{
  if (( CURRENT == 2 )); then compadd -- {" ".join(words[""])}; return; fi
  case "$words[2]" in
{cases}
  esac
  _files
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
compdef _agent_vm agent-vm agent_vm.py"""


def fish_completion(words: Mapping[str, Sequence[str]]) -> str:
    lines = [
        f"complete -c agent-vm -n __fish_use_subcommand -f -a {shlex.quote(' '.join(words['']))}"
    ]
    for verb, of in words.items():
        for word in of if verb else ():
            option = (
                f"-l {word[2:]}"
                if word.startswith("--")
                else f"-a {word}"
                if word[0] != "-"
                else ""
            )
            if option:
                lines.append(
                    f"complete -c agent-vm -n '__fish_seen_subcommand_from {verb}' {option}"
                )
    return "\n".join(lines)


EPILOG = """\
examples:
  agent_vm.py setup                         build the base instance
  cd my-project && agent_vm.py run          the agent in this directory, in a VM of its own
  agent_vm.py run -- -p "fix the tests"     everything after -- is the agent's
  agent_vm.py run --mount ~/data:ro --memory 16 -- --resume
  agent_vm.py shell -- make test            a command instead of the agent
  eval "$(agent_vm.py shell-init)"          defines claude-vm, claude-vm-shell, claude-vm-setup

environment:
  CLAUDE_CODE_OAUTH_TOKEN, ANTHROPIC_API_KEY  the agent's credential; it enters the guest
  GITHUB_MCP_TOKEN                            the GitHub proxy's; it stays on the host
  ANTHROPIC_BASE_URL, ANTHROPIC_MODEL, LANG, COLORTERM …  passed to the agent
  AGENT_VM_<SETTING>                          a setting, e.g. AGENT_VM_MEMORY=16
  LIMA_HOME, XDG_STATE_HOME, XDG_CONFIG_HOME, XDG_DATA_HOME

files:
  ~/.config/agent-vm/config.ini     settings, in a section [agent-vm]
  ~/.config/agent-vm/credential     written by `auth set`
  ~/.claude-vm.setup.sh, ~/.config/agent-vm/setup.sh    run in the guest, once, by setup
  ~/.config/agent-vm/runtime.sh, .claude-vm.runtime.sh  run in the guest, before the agent
  ~/.local/state/agent-vm/          leases, transcripts, logs

exit status:
  run and shell: the guest's command's; 125 when agent-vm failed; 130 after
  Ctrl-C, 128 + N after signal N
  other commands: 0 ok, 1 failed, 2 usage; setup fails with 125
"""


def add_settings(parser: argparse.ArgumentParser, *names: str) -> None:
    """Flags for settings; absent flags are None, so that environment and config are asked."""
    for name in names:
        setting = SETTINGS[name]
        if setting.parse is yes_or_no:
            parser.add_argument(
                f"--{name}", action=argparse.BooleanOptionalAction, help=setting.help
            )
            continue
        parser.add_argument(
            f"--{name}",
            type=setting.parse,
            action="append" if setting.many else "store",
            help=setting.help,
            metavar=setting.metavar,
        )


SETUP_SETTINGS = (
    "name", "minimal", "disk", "memory", "cpus", "template", "image", "image-digest", "ca-cert",
    "apt-mirror", "npm-registry", "lima-url", "timeout",
)  # fmt: skip
RUN_SETTINGS = (
    "name", "memory", "cpus", "mount", "readonly", "github", "github-profile", "github-policy",
    "confirm-writes", "forward", "env", "timeout",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    import platform

    parser = argparse.ArgumentParser(
        prog="agent-vm", description=__doc__, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    version = f"agent-vm {__version__}, Python {platform.python_version()}"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    def verb(
        name: str, func: Callable[..., int], text: str, failure: int = 1
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument(
            "-v", "--verbose", action="store_true", help="show commands and their output"
        )
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress messages")
        sub.set_defaults(func=func, failure=failure)
        return sub

    setup = verb("setup", cmd_setup, "build the base instance, or build it anew", failure=EXIT_OURS)
    add_settings(setup, *SETUP_SETTINGS)
    setup.add_argument("--yes", action="store_true", help="install what is missing without asking")
    setup.add_argument(
        "--rollback", action="store_true", help="go back to the previous base instance"
    )
    for name, func, text in (
        ("run", cmd_run, "run Claude Code on the current directory in a VM of its own"),
        ("shell", cmd_shell, "a shell, or a command, in a VM of its own"),
    ):
        run = verb(name, func, text, failure=EXIT_OURS)
        add_settings(run, *RUN_SETTINGS)
        run.add_argument("--keep", action="store_true", help="keep the VM afterwards")
        run.add_argument(
            "--force-mount", action="store_true", help="mount a directory that is refused otherwise"
        )
        run.add_argument(
            "--yes",
            action="store_true",
            help="set up without asking when there is no base instance",
        )
        run.add_argument(
            "command", nargs=argparse.REMAINDER, metavar="[--] ARG", help="passed on untouched"
        )
    add_other_verbs(verb)
    return parser


def add_other_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    listing = verb("list", cmd_list, "list base instances and clones")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    verb("stop", cmd_stop, "stop an instance").add_argument("instance")
    remove = verb("rm", cmd_rm, "delete an instance")
    remove.add_argument("instance")
    remove.add_argument("--force", action="store_true", help="also one in use, or a base instance")
    gc = verb("gc", cmd_gc, "remove clones whose run is gone")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    verb("ssh-config", cmd_ssh_config, "print the ssh configuration of a running VM").add_argument(
        "instance"
    )
    doctor = verb("doctor", cmd_doctor, "check the host, Lima and the base instance")
    doctor.add_argument("--json", action="store_true", help="one JSON object a line")
    audit = verb("log", cmd_log, "show what a run did on GitHub")
    audit.add_argument("run", nargs="?", default="", help="a VM's name (default: the newest)")
    audit.add_argument("--json", action="store_true", help="one JSON object a line")
    verb("info", cmd_info, "show the settings in force and where they come from")
    auth = verb("auth", cmd_auth, "store, show or remove the agent's credential")
    auth.add_argument(
        "action", choices=("set", "status", "clear"), help="set reads the credential from stdin"
    )
    template = verb("template", cmd_template, "show or export the Lima template")
    template.add_argument("action", choices=("show", "export"))
    template.add_argument("directory", nargs="?")
    shell_init = verb(
        "shell-init",
        cmd_shell_init,
        "print shell functions: claude-vm, claude-vm-shell, claude-vm-setup",
    )
    shell_init.add_argument("shell", nargs="?", default="bash", choices=("bash", "zsh", "fish"))
    completion = verb("completion", cmd_completion, "print shell completion")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def open_standard_streams() -> None:
    """A closed stdin, stdout or stderr would give its number to the next file that is opened."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python made these None; print() would take stdout in place of stderr.
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """argparse, except that everything after the first `--` is taken as it is (run, shell)."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = build_parser()
    # Not nargs="?", which would take the agent's first word for the repository.
    ours = ["--github=on" if word == "--github" else word for word in argv[:at]]
    for word, after in zip(argv[:at], argv[1:at]):
        if word == "--github" and (after in ("off", "auto") or re.fullmatch(OWNER_REPO, after)):
            parser.error(f"--github={after}, in one word; the agent's own words go after --")
    args, unknown = parser.parse_known_args(ours)
    rest = argv[at:]
    if unknown:
        note = "; the agent's own go after --" if hasattr(args, "command") else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{note}")
    if rest and not hasattr(args, "command"):
        parser.error("-- is for run and shell")
    if hasattr(args, "command"):
        args.command = [*args.command, *(rest if args.command else rest[1:])]
    return args


def report(error: AgentVMError) -> None:
    hint = error.hint
    # Who types the script's path has no function agent-vm; shell-init's use the whole path.
    if "agent-vm " in hint and not os.path.isabs(sys.argv[0]):
        hint += f"  (agent-vm is: python3 {sys.argv[0]})"
    lines = [error.details, f"agent-vm: error: {error}", hint and f"agent-vm: hint: {hint}"]
    with contextlib.suppress(OSError):
        print("\n".join(filter(None, lines)), file=sys.stderr, flush=True)


def host_error(error: OSError | UnicodeError) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"cannot use {error.filename}: {error.strerror}"
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    open_standard_streams()
    failure = EXIT_OURS
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        secret = (*CREDENTIALS, GITHUB_TOKEN)
        args.secrets = {name: os.environ.pop(name) for name in secret if name in os.environ}
        log.verbose, log.quiet, failure = args.verbose, args.quiet, args.failure
        catch_signals()
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
    except (
        OSError,
        UnicodeError,
    ) as error:  # a full disk, a missing directory: the host's fault, not a bug
        report(AgentVMError(host_error(error), hint="" if log.verbose else "more with -v"))
        if log.verbose:
            raise
    finally:
        ignore_signals()  # the status is settled; Python's own shutdown is not to be interrupted
    return int(failure)


# BEGIN GENERATED by "make embed"
EMBEDDED: dict[str, str] = {
    "agent-vm.yaml": r"""# Try it: limactl start --tty=false --name=try lima/agent-vm.yaml
#
# The base instance of agent-vm: Debian 13 with Claude Code and what it works with. No directory of
# the host is mounted here; a clone mounts the project. Values come from `param`: limactl start
# --set '.param.minimal = "true"' ...

minimumLimaVersion: 2.0.0

base: template:_images/debian-13

mounts: []

containerd:
  system: false
  user: false

# Nothing of the user's own SSH set-up goes in: neither the agent nor the keys of ~/.ssh.
ssh:
  forwardAgent: false
  loadDotSSHPubKeys: false

# Of the guest's own services, mDNS and LLMNR are not for the host's loopback.
portForwards:
- guestIP: 0.0.0.0
  guestIPMustBeZero: false
  guestPortRange: [5353, 5355]
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
packages=(ca-certificates curl git jq)
if [ "$PARAM_minimal" != true ]; then
  packages+=(
    build-essential file less openssh-client procps iproute2 rsync sudo tzdata unzip wget
    python3 python3-pip python3-venv
    fd-find gh ripgrep
    kitty-terminfo locales ncurses-term
    chromium fonts-liberation xauth xvfb
  )
  ln -sf /usr/bin/fdfind /usr/local/bin/fd  # Debian's name, because another package has fd
fi
apt_install "${packages[@]}"
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
rm -rf /var/lib/apt/lists/*
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
}
# END GENERATED

if __name__ == "__main__":
    sys.exit(main())
