"""As root in a VM: makes it the VM of a run, and sees that it is confined.

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
