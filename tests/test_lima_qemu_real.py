"""With QEMU itself: the network device that lima/qemu.py gives it passes nothing on to the host.

No VM is started. The test is the guest: QEMU's hub takes its Ethernet frames to the device. The
control is the device as Lima writes it, by which the same frames reach the host's loopback.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from ipaddress import ip_address
from pathlib import Path

from lima import qemu
from tests.test_lima_qemu import MACHINE

PROGRAM = shutil.which("qemu-system-x86_64") or ""
OF_LIMA = [word.replace("127.0.0.1:37447", "127.0.0.1:0") for word in MACHINE]  # any free port
SECONDS = 20.0  # for QEMU to start, or to answer
MAC, ROUTER = bytes.fromhex("525555000001"), bytes.fromhex("525500000000")
GUEST = {4: ip_address("192.168.5.15").packed, 6: ip_address("fec0::15").packed}
ICMP, TCP, UDP, ICMP6 = 1, 6, 17, 58
# The open device takes these to the host's loopback; what the control sends goes no further.
HOST = ("192.168.5.2", "127.0.0.1", "fec0::2", "::1")
ELSEWHERE = (
    "192.168.5.3", "192.168.5.9", "192.168.5.255", "255.255.255.255", "0.0.0.0", "127.0.0.53",
    "10.0.2.2", "10.0.2.3", "192.168.1.1", "169.254.169.254", "192.0.2.1", "fec0::3", "fec0::9",
    "fe80::2", "ff02::1", "::", "::ffff:127.0.0.1", "::ffff:192.168.5.2", "2001:db8::1",
)  # fmt: skip


def arp(target: str) -> bytes:
    question = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + MAC + GUEST[4]
    return b"\xff" * 6 + MAC + b"\x08\x06" + question + bytes(6) + ip_address(target).packed


def checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)


def frame(target: str, protocol: int, body: bytes, at: int) -> bytes:
    """An Ethernet frame with an IP packet; `at` is where its body has the checksum."""
    to = ip_address(target)
    ends = GUEST[to.version] + to.packed
    pseudo = b"" if protocol == ICMP else ends + struct.pack(">II", len(body), protocol)
    body = body[:at] + checksum(pseudo + body) + body[at + 2 :]
    if to.version == 6:
        header = struct.pack(">IHBB", 0x60000000, len(body), protocol, 255)
        return ROUTER + MAC + b"\x86\xdd" + header + ends + body
    header = struct.pack(">BBHHHBB", 0x45, 0, 20 + len(body), 1, 0, 255, protocol)
    return ROUTER + MAC + b"\x08\0" + header + checksum(header + ends) + ends + body


def sockets(process: subprocess.Popen[bytes]) -> set[str]:
    """Those that it has open; on Linux, which says so in /proc, elsewhere none."""
    links = (os.path.realpath(one) for one in Path(f"/proc/{process.pid}/fd").glob("*"))
    return {link for link in links if "socket:" in link}


@unittest.skipUnless(PROGRAM, "qemu-system-x86_64 is not on PATH")
class RealTest(unittest.TestCase):
    COST = 2

    def setUp(self) -> None:
        argv = [PROGRAM, "-M", "none", "-netdev", "help"]
        known = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()
        if not {"user", "dgram"} <= set(known):
            self.skipTest("QEMU has no netdev user, or no dgram: it is older than 7.2")
        self.open = contextlib.ExitStack()
        self.addCleanup(self.open.close)
        folder = self.open.enter_context(tempfile.TemporaryDirectory())
        self.device, self.guest = Path(folder, "device"), Path(folder, "guest")
        self.wire = self.open.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.wire.bind(str(self.guest))
        self.wire.settimeout(SECONDS)
        self.servers: dict[tuple[int, int], socket.socket] = {}
        for version, family, host in (4, socket.AF_INET, "127.0.0.1"), (6, socket.AF_INET6, "::1"):
            for protocol, kind in (UDP, socket.SOCK_DGRAM), (TCP, socket.SOCK_STREAM):
                with contextlib.suppress(OSError):  # a host without ::1
                    server = self.open.enter_context(socket.socket(family, kind))
                    server.bind((host, 0))
                    if protocol == TCP:
                        server.listen()
                    self.servers[version, protocol] = server

    def start(self, machine: list[str]) -> subprocess.Popen[bytes]:
        """QEMU with the machine's network device, and the wire to it; no machine."""
        ends = f"local.type=unix,local.path={self.device},remote.type=unix,remote.path={self.guest}"
        argv = [PROGRAM, "-M", "none", "-nodefaults", "-display", "none"]
        for netdev in (
            machine[machine.index("-netdev") + 1], f"dgram,id=wire,{ends}",
            "hubport,id=one,hubid=0,netdev=net0", "hubport,id=two,hubid=0,netdev=wire",
        ):  # fmt: skip
            argv += ["-netdev", netdev]
        log = self.open.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.open.callback(process.wait)
        self.open.callback(process.kill)
        end = time.monotonic() + SECONDS
        while not self.device.exists():
            if process.poll() is not None or time.monotonic() > end:
                log.seek(0)
                self.fail(f"QEMU did not start: {log.read()!r}")
            time.sleep(0.01)
        return process

    def tries(self, target: str) -> list[bytes]:
        """A datagram of UDP, a SYN of TCP and an echo request."""
        version = ip_address(target).version
        ports = {key: server.getsockname()[1] for key, server in self.servers.items()}
        udp = struct.pack(">4H", 4000, ports.get((version, UDP), 53), 8 + 5, 0) + b"guest"
        tcp = struct.pack(">HHII", 4001, ports.get((version, TCP), 80), 1000, 0)
        tcp += struct.pack(">BBHHH", 0x50, 2, 65535, 0, 0)
        icmp, echo = (ICMP, b"\x08") if version == 4 else (ICMP6, b"\x80")
        echo += bytes(3) + b"\0\1\0\1"
        return [
            frame(target, UDP, udp, 6), frame(target, TCP, tcp, 16), frame(target, icmp, echo, 2),
        ]  # fmt: skip

    def resets(self, frames: list[bytes]) -> set[str]:
        """Send frames; who of IPv4 resets at once: before the answer to a question that follows."""
        for one in (*frames, arp("192.168.5.2")):
            self.wire.sendto(one, str(self.device))
        found = set()
        while (answer := self.wire.recv(2000))[12:14] != b"\x08\x06":
            if (answer[12:14], answer[23], answer[47:48]) == (b"\x08\0", TCP, b"\x14"):
                found.add(str(ip_address(answer[26:30])))
        return found

    def arrived(self) -> set[tuple[int, int]]:
        """IP version and protocol of those servers to which anything has come."""
        found: set[tuple[int, int]] = set()
        keys = {server: key for key, server in self.servers.items()}
        while keys and (ready := select.select(keys, [], [], 0.3)[0]):
            found |= {keys.pop(server) for server in ready}
        return found

    def send(self, machine: list[str], targets: tuple[str, ...]) -> tuple[set[str], set[str]]:
        """Make all tries; the sockets that QEMU has open for them, and who has reset TCP."""
        process = self.start(machine)
        self.resets([])  # QEMU is at work, all of its own is open
        before = sockets(process)
        found = {who for one in targets for who in self.resets(self.tries(one))}
        return sockets(process) - before, found

    def test_as_lima_has_it_the_host_is_reached(self) -> None:
        self.assertIn((4, TCP), self.servers)
        opened, _ = self.send(OF_LIMA, HOST)
        self.assertEqual(self.arrived(), set(self.servers))
        self.assertEqual(bool(opened), sys.platform == "linux")

    def test_restricted_nothing_gets_past_the_device(self) -> None:
        opened, resets = self.send(qemu.restricted(OF_LIMA), HOST + ELSEWHERE)
        self.assertEqual(self.arrived(), set())
        self.assertEqual(opened, set())
        # lima/guest/network.sh counts on it: programs without a way out do not wait.
        self.assertEqual(resets, {one for one in HOST + ELSEWHERE if ":" not in one})
