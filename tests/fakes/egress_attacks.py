#!/usr/bin/env python3
"""Attempts to get out of a VM, made in it by its root for vm_network.py: a line each.

usage: egress_attacks.py SETTINGS [direct]

SETTINGS is a JSON file that says where the host's canary listens, which answers CANARY to whatever
comes, and what else there is to reach. A line ends in "nothing: WHY" or "REACHED: WHAT"; the host
knows better, as its canary counts. `direct`: only what asks no side.
"""

from __future__ import annotations

import contextlib
import glob
import json
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

SETTINGS = json.loads(Path(sys.argv[1]).read_text())
CANARY, OPEN = SETTINGS["canary"], SETTINGS["open"]  # ports of the host's loopback
LAN, LAN6, OUTSIDE, HOST = (SETTINGS[key] for key in ("lan", "lan6", "outside", "hostname"))
WAY_OUT, DNS, BROKER = 47101, 47102, 47103
WORD = b"CANARY"
SECONDS = 3.0
Attempt = Callable[[], bytes]  # what came; nothing, or OSError, is as it should be


def is_refusal(answer: bytes) -> bool:
    return bool(re.match(rb"HTTP/1\.1 [45]", answer)) and b"agent-vm: " in answer


# --- without the sides ---


def tcp(host: str, port: int = CANARY, source: str = "") -> bytes:
    """Connected is reached already."""
    near = (source, 0) if source else None
    with socket.create_connection((host, port), SECONDS, near) as client:
        client.settimeout(1)
        with contextlib.suppress(OSError):
            return b"connected, " + client.recv(99)
        return b"connected"


def led(host: str, port: int = CANARY) -> bytes:
    """While what leaves the VM is led to a side, which takes every connection: what comes back."""
    with socket.create_connection((host, port), SECONDS) as client:
        client.settimeout(SECONDS)
        return client.recv(99)


def udp(host: str, port: int, data: bytes = b"who is there?") -> bytes:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.connect((host, port))
        client.send(data)
        answer = client.recv(999)
        return b"" if answer[:2] == b"\0\5" and port == 69 else answer  # an error of TFTP's


def ping(host: str) -> bytes:
    is_new = ":" in host
    family, protocol = (socket.AF_INET6, 58) if is_new else (socket.AF_INET, 1)
    with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        raw.connect((host, 0))
        echo = struct.pack(">BBHHH", 128 if is_new else 8, 0, 0 if is_new else 0xF7FD, 0, 1)
        raw.send(echo + b"\0" if is_new else echo)
        end = time.monotonic() + 1.5
        while select.select([raw], [], [], max(0, end - time.monotonic()))[0]:
            data = raw.recv(999)
            if data[0 if is_new else 20] == (129 if is_new else 0):
                return b"an echo"
    return b""


def vsock(cid: int) -> bytes:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
        client.settimeout(SECONDS)
        client.connect((cid, CANARY))
        return b"connected"


# Frames made by hand: no address, route or rule of the guest's kernel has a say.

OWN_MAC = bytes.fromhex(Path("/sys/class/net/eth0/address").read_text().strip().replace(":", ""))
GATEWAY_MAC = bytes.fromhex("5255c0a80502")  # libslirp's: 52:55 and its address
GATEWAY_MAC6 = bytes.fromhex("525600000002")


def checksum(data: bytes) -> int:
    total = sum(
        struct.unpack(f">{len(data) // 2 + len(data) % 2}H", data + b"\0" * (len(data) % 2))
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def segment(kind: int, source: str, target: str, payload: bytes = b"hello") -> bytes:
    """A SYN, or a datagram to the canary."""
    pseudo = packed(source) + packed(target)
    if kind == socket.IPPROTO_TCP:
        head, at, rest = struct.pack(">HHIIBBHHH", 40001, CANARY, 7, 0, 80, 2, 8192, 0, 0), 16, b""
    else:
        size = 8 + len(payload)
        head, at, rest = struct.pack(">HHHH", 40001, CANARY, size, 0), 6, payload
    size = len(head) + len(rest)
    pseudo += (
        struct.pack(">IHBB", size, 0, 0, kind)
        if ":" in source
        else struct.pack(">BBH", 0, kind, size)
    )
    sum_ = checksum(pseudo + head + rest)
    return head[:at] + struct.pack(">H", sum_) + head[at + 2 :] + rest


def packet(kind: int, source: str, target: str, body: bytes, fragment: int = 0) -> bytes:
    if ":" in source:
        return (
            struct.pack(">IHBB", 6 << 28, len(body), kind, 64)
            + packed(source)
            + packed(target)
            + body
        )
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 77, fragment, 64, kind, 0)
    head += packed(source) + packed(target)
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + body


def frames(*packets: bytes, to: bytes = GATEWAY_MAC, kind: int = 0x0800) -> bytes:
    """What comes when the frames are sent: CANARY, a SYN-ACK from its port, or an ARP answer."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as raw:
        raw.bind(("eth0", 0))
        for one in packets:
            raw.send(to + OWN_MAC + struct.pack(">H", kind) + one)
        end = time.monotonic() + 1.5
        while select.select([raw], [], [], max(0, end - time.monotonic()))[0]:
            data, about = raw.recvfrom(2000)
            if about[2] == 4:  # PACKET_OUTGOING
                continue
            if WORD in data:
                return data
            at = {0x0800: 34, 0x86DD: 54}.get(int.from_bytes(data[12:14], "big"), 0)
            is_tcp = at and data[23 if at == 34 else 20] == 6
            if (
                is_tcp
                and data[at : at + 2] == struct.pack(">H", CANARY)
                and data[at + 13] & 0x12 == 0x12
            ):
                return b"SYN-ACK"
            if kind == 0x0806 and data[12:14] == b"\x08\x06" and data[28:32] == packets[0][24:28]:
                return b"an ARP answer"
    return b""


def syn(source: str, target: str) -> bytes:
    six = ":" in source
    whole = packet(6, source, target, segment(6, source, target))
    return frames(whole, to=GATEWAY_MAC6 if six else GATEWAY_MAC, kind=0x86DD if six else 0x0800)


def datagram(source: str, target: str, to: bytes = b"") -> bytes:
    six = ":" in source
    whole = packet(17, source, target, segment(17, source, target))
    to = to or (GATEWAY_MAC6 if six else GATEWAY_MAC)
    return frames(whole, to=to, kind=0x86DD if six else 0x0800)


def fragments(source: str, target: str) -> bytes:
    body = segment(17, source, target, b"x" * 24)
    return frames(
        packet(17, source, target, body[:16], 0x2000), packet(17, source, target, body[16:], 2)
    )


def arp(target: str) -> bytes:
    ask = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + OWN_MAC + packed("192.168.5.15")
    return frames(ask + bytes(6) + packed(target), to=b"\xff" * 6, kind=0x0806)


def in_ip() -> bytes:
    inner = packet(17, "192.168.5.15", "127.0.0.1", segment(17, "192.168.5.15", "127.0.0.1"))
    return frames(packet(4, "192.168.5.15", "192.168.5.2", inner))


QUERY = b"\0\1\1\0\0\1\0\0\0\0\0\0\7example\3com\0\0\1\0\1"


def direct() -> dict[str, Attempt]:
    tries: dict[str, Attempt] = {}
    hosts = ["192.168.5.2", "10.0.2.2", "host.lima.internal", "fec0::2", LAN]
    for host in hosts + ([LAN6] if LAN6 else []):
        tries[f"TCP to the host, {host}"] = partial(tcp, host)
        tries[f"UDP to the host, {host}"] = partial(udp, host, CANARY)
    for host, port in (
        (OUTSIDE, 80), (OUTSIDE, 443), ("1.1.1.1", 443), ("8.8.8.8", 53), ("2606:4700:4700::1111", 443),
        ("192.168.5.3", 53), ("192.168.0.1", 80), ("192.168.1.1", 80), ("10.0.0.1", 80),
        ("172.17.0.1", 80), ("100.64.0.1", 80), ("169.254.169.254", 80), ("fd00:ec2::254", 80),
    ):  # fmt: skip
        tries[f"TCP to {host} port {port}"] = partial(tcp, host, port)
    for host in ("192.168.5.3", "192.168.5.2", "fec0::3", "8.8.8.8", "1.1.1.1", "224.0.0.251"):
        tries[f"UDP 53 to {host}"] = partial(udp, host, 53, QUERY)
    for host in ("192.168.5.2", OUTSIDE, "162.159.200.1"):
        tries[f"UDP 123 to {host}"] = partial(udp, host, 123, b"\x1b" + bytes(47))
    read = b"\0\1/etc/passwd\0octet\0"
    tries["TFTP of the gateway"] = partial(udp, "192.168.5.2", 69, read)
    tries["UDP 443 (QUIC) to 1.1.1.1"] = partial(udp, "1.1.1.1", 443, b"\xc0" + bytes(1199))
    tries["UDP broadcast"] = partial(udp, "255.255.255.255", CANARY)
    for host in (OUTSIDE, "1.1.1.1", LAN, "2606:4700:4700::1111"):
        tries[f"ICMP echo of {host}"] = partial(ping, host)
    for cid in (2, 0, 1):
        tries[f"vsock to {cid}"] = partial(vsock, cid)
    tries["TCP from a new address, 192.168.5.99"] = partial(
        tcp, "192.168.5.2", source="192.168.5.99"
    )
    tries["TCP from a new address, 10.0.2.15"] = partial(tcp, "10.0.2.2", source="10.0.2.15")
    own, six = "192.168.5.15", "fec0::5055:55ff:fe00:1"
    for source, target in (
        (own, "192.168.5.2"), ("8.8.8.8", "192.168.5.2"), ("127.0.0.1", "192.168.5.2"),
        ("192.168.5.2", "192.168.5.2"), ("192.168.5.3", "192.168.5.2"), (own, "127.0.0.1"),
        (own, LAN), (six, "fec0::2"), ("fe80::1", "fe80::2"), (six, "::1"),
    ):  # fmt: skip
        tries[f"a SYN made by hand, {source} to {target}"] = partial(syn, source, target)
        tries[f"a datagram made by hand, {source} to {target}"] = partial(datagram, source, target)
    tries["a datagram in an Ethernet broadcast"] = partial(
        datagram, own, "192.168.5.2", b"\xff" * 6
    )
    tries["a datagram in two fragments"] = partial(fragments, own, "192.168.5.2")
    tries["a datagram in IP in IP"] = in_ip
    for host in (LAN, "192.168.1.1", "10.0.0.1", "8.8.8.8"):
        tries[f"ARP for {host}"] = partial(arp, host)
    return tries


def prepare_direct() -> None:
    """What a guest's root can do to the guest: no redirect, no redsocks, more addresses, routes."""
    for command in (
        "nft flush ruleset", "pkill redsocks", "ip addr add 192.168.5.99/24 dev eth0",
        "ip addr add 10.0.2.15/32 dev eth0", "ip -6 addr add fec0::15/64 dev eth0 nodad",
        "ip route replace default via 192.168.5.2 dev eth0",
        "ip -6 route replace default via fe80::2 dev eth0",
        f"ip route add {LAN}/32 via 192.168.5.2 dev eth0",
    ):  # fmt: skip
        subprocess.run(command.split(), stderr=subprocess.DEVNULL, check=False)
    time.sleep(1)


# --- the way out ---

SPELLINGS = f"""
127.0.0.1 127.1 127.0.1 127.255.255.254 127.0.0.1. 127.000.000.001 2130706433 0x7f000001 0x7F.1
0x7f.0.0.1 0177.0.0.1 017700000001 0177.0.1 0 0.0.0.0 0x0 00000000000
localhost LOCALHOST localhost. a.localhost localhost.localdomain ip6-localhost {HOST} {HOST}.
[::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::127.0.0.1]
[64:ff9b::7f00:1] [2002:7f00:1::] [::1%lo] [::1%25lo] [fe80::1%eth0] [v1.127.0.0.1] ::1 [127.0.0.1]
user@127.0.0.1 {OUTSIDE}@127.0.0.1 127.0.0.1@{OUTSIDE} 127.0.0.1#@{OUTSIDE} 127.0.0.1\\@{OUTSIDE}
127.0.0.1%00.example.com 127.0.0.1%2eexample.com 127.0.0.1%20 127。0。0。1 １２７.0.0.1 ①②⑦.⓪.⓪.① ⓛocalhost
127.0.0.1.nip.io localtest.me 127-0-0-1.sslip.io 10.0.0.1.nip.io
192.168.5.2 192.168.5.3 10.0.2.2 {LAN} {LAN}. [::ffff:{LAN}] [64:ff9b::{LAN}] [fec0::2]
host.lima.internal HOST.LIMA.INTERNAL. a.host.lima.internal host.docker.internal
192.168.1.1 10.0.0.1 172.16.0.1 172.31.255.255 100.64.0.1 100.100.100.200 198.18.0.1 198.18.0.200
169.254.169.254 169.254.0.1 0xA9FEA9FE [::ffff:a9fe:a9fe] [fd00:ec2::254] [fe80::1] 168.63.129.16
metadata.google.internal 224.0.0.1 239.255.255.250 255.255.255.255 240.0.0.1 [ff02::1] [fd00::1]
""".split()
if LAN6:
    SPELLINGS.append(f"[{LAN6}]")


def ask(data: bytes, port: int = WAY_OUT, word: bool = False) -> bytes:
    """What a side says to it; `word`: only what the canary would have said."""
    with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
        client.settimeout(SECONDS)
        client.sendall(data)
        said = b""
        with contextlib.suppress(OSError):
            while len(said) < 65536:
                part = client.recv(4096)
                if not part:
                    break
                said += part
    if word:
        return said if WORD in said or said.count(b"HTTP/1.") > 1 else b""
    return b"" if is_refusal(said) else said


def spelling(target: str, form: str) -> bytes:
    place = f"{target}:{CANARY}"
    head = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n"
    if form == "http":
        head = f"GET http://{place}/ HTTP/1.1\r\nHost: {place}\r\n\r\n"
    return ask(head.encode())


def way_out() -> dict[str, Attempt]:
    tries: dict[str, Attempt] = {}
    for target in SPELLINGS:
        for form in ("CONNECT", "http"):
            tries[f"{form} {target}"] = partial(spelling, target, form)
    closed, canary = "closed.example", f"127.0.0.1:{CANARY}"
    opened, there = f"host.lima.internal:{OPEN}", f"host.lima.internal:{CANARY}"
    get = f"GET http://{opened}/ HTTP/1.1\r\nHost: {opened}\r\n"
    post, next_ = (
        get.replace("GET", "POST", 1),
        f"GET http://{there}/smuggled HTTP/1.1\r\nHost: {there}\r\n\r\n",
    )
    inner = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    chunks = f"0\r\n\r\n{inner}"
    # Refused as they stand.
    for what, head in {
        "mail: CONNECT to port 25": f"CONNECT {OUTSIDE}:25 HTTP/1.1\r\n\r\n",
        "mail: http to port 25": f"GET http://{OUTSIDE}:25/ HTTP/1.1\r\nHost: {OUTSIDE}:25\r\n\r\n",
        "CONNECT to port 0": f"CONNECT {OUTSIDE}:0 HTTP/1.1\r\n\r\n",
        "CONNECT to port 65536 and more": f"CONNECT {OUTSIDE}:{65536 + 80} HTTP/1.1\r\n\r\n",
        "CONNECT to a port with a sign": f"CONNECT {OUTSIDE}:+80 HTTP/1.1\r\n\r\n",
        "CONNECT without a port": f"CONNECT {OUTSIDE} HTTP/1.1\r\n\r\n",
        "CONNECT to a URL": f"CONNECT http://{canary}/ HTTP/1.1\r\n\r\n",
        "CONNECT to a socket's path": "CONNECT unix:/tmp/egress.sock HTTP/1.1\r\n\r\n",
        "CONNECT with a name after it": f"CONNECT {OUTSIDE}:80 {canary} HTTP/1.1\r\n\r\n",
        "CONNECT with a body": f"CONNECT {OUTSIDE}:80 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
        "another Host: the canary's": get.replace(f"Host: {opened}", f"Host: {canary}") + "\r\n",
        "another Host: the address is the canary's": f"GET http://{canary}/ HTTP/1.1\r\nHost: {opened}\r\n\r\n",
        "Host twice": f"{get}Host: {canary}\r\n\r\n",
        "no Host": f"GET http://{opened}/ HTTP/1.1\r\n\r\n",
        "a path and Host": f"GET / HTTP/1.1\r\nHost: {canary}\r\n\r\n",
        "a path that is a place": f"GET //{canary}/ HTTP/1.1\r\nHost: {canary}\r\n\r\n",
        "https in clear": f"GET https://{canary}/ HTTP/1.1\r\nHost: {canary}\r\n\r\n",
        "ftp": f"GET ftp://{canary}/ HTTP/1.1\r\nHost: {canary}\r\n\r\n",
        "file": "GET file:///etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        "user in a URL": f"GET http://{opened}@{canary}/ HTTP/1.1\r\nHost: {canary}\r\n\r\n",
        "a backslash in a URL": f"GET http://{canary}\\@{opened}/ HTTP/1.1\r\nHost: {opened}\r\n\r\n",
        "a tab in a URL": f"GET http://{canary}/\t{opened} HTTP/1.1\r\nHost: {opened}\r\n\r\n",
        "Content-Length twice": f"{post}Content-Length: 0\r\nContent-Length: {len(inner)}\r\n\r\n{inner}",
        "Content-Length in a list": f"{post}Content-Length: 0, {len(inner)}\r\n\r\n{inner}",
        "Content-Length with a sign": f"{post}Content-Length: +0\r\n\r\n{inner}",
        "Content-Length in hexadecimal": f"{post}Content-Length: 0x0\r\n\r\n{inner}",
        "chunks": f"{post}Transfer-Encoding: chunked\r\n\r\n{chunks}",
        "chunks and Content-Length": f"{post}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}",
        "chunks, misspelt": f"{post}Content-Length: 5\r\nTransfer-Encoding: xchunked\r\n\r\n{chunks}",
        "chunks, a space before the colon": f"{post}Content-Length: 5\r\nTransfer-Encoding : chunked\r\n\r\n{chunks}",
        "a header in two lines": f"{get}X: 1\r\n Host: {canary}\r\n\r\n",
        "a header after a bare LF": f"{get}X: 1\nHost: {canary}\r\n\r\n",
        "a header after a bare CR": f"{get}X: 1\rHost: {canary}\r\n\r\n",
        "a header with a NUL": f"{get}X: 1\0Host: {canary}\r\n\r\n",
        "lines that end in LF": f"{get}\r\n".replace("\r\n", "\n"),
        "CRLF in the target": f"GET http://{opened}/\r\nHost: {canary} HTTP/1.1\r\n\r\n",
        "HTTP/0.9": f"GET http://{canary}/\r\n\r\n",
        "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "a proxy's own line before": f"PROXY TCP4 127.0.0.1 127.0.0.1 1 {CANARY}\r\n{get}\r\n",
        "TRACE of the way out": f"TRACE http://{canary}/ HTTP/1.1\r\nHost: {canary}\r\n\r\n",
        "a name that no list has": f"CONNECT {closed}:443 HTTP/1.1\r\n\r\n",
    }.items():  # fmt: skip
        tries[what] = partial(ask, head.encode())
    if SETTINGS["listed"]:
        place = f"{SETTINGS['listed']}:22"
        tries["CONNECT to port 22 of a listed name"] = partial(
            ask, f"CONNECT {place} HTTP/1.1\r\n\r\n".encode()
        )
        tries["CONNECT to port 22, in its address"] = partial(
            ask, f"CONNECT {OUTSIDE}:22 HTTP/1.1\r\n\r\n".encode()
        )
    tries["SOCKS 4"] = partial(
        ask, b"\4\1" + struct.pack(">H", CANARY) + packed("127.0.0.1") + b"\0", word=True
    )
    tries["SOCKS 5"] = partial(
        ask, b"\5\1\0\5\1\0\1" + packed("127.0.0.1") + struct.pack(">H", CANARY), word=True
    )
    # The first of two requests on one connection may pass: the second must not.
    for what, data in {
        "a second request": f"{get}\r\n{next_}",
        "a second request, after keep-alive": f"{get}Connection: keep-alive\r\nProxy-Connection: keep-alive\r\n\r\n{next_}",
        "a second CONNECT after one refused": f"CONNECT {closed}:1 HTTP/1.1\r\n\r\nCONNECT {canary} HTTP/1.1\r\n\r\n",
        "a second request after a body": f"{post}Content-Length: 2\r\n\r\nhi{next_}",
        "a body that is longer than it says": f"{post}Content-Length: 2\r\n\r\nhi{inner}",
        "a header that says it is for one hop": f"{post}Connection: content-length, host\r\nContent-Length: 2\r\n\r\nhi{inner}",
        "Upgrade: to a tunnel": f"{get}Connection: upgrade\r\nUpgrade: websocket\r\n\r\n{inner}",
        "Expect: 100-continue": f"{post}Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhi{inner}",
    }.items():  # fmt: skip
        tries[f"two in one: {what}"] = partial(ask, data.encode(), word=True)
    return tries


def follow() -> bytes:
    """A server that is open sends its client to the canary: curl asks the way out again."""
    argv = [
        "curl",
        "-sSL",
        "-m",
        "5",
        "-x",
        f"http://127.0.0.1:{WAY_OUT}",
        f"http://host.lima.internal:{OPEN}/redirect",
    ]
    said = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    ).stdout
    return said if WORD in said else b""


def lookup(name: str, kind: int = 1) -> bytes:
    """What DNS, at its side, says of a name."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label)
    query = b"\0\1\1\0\0\1\0\0\0\0\0\0" + labels + b"\0" + struct.pack(">HH", kind, 1)
    with socket.create_connection(("127.0.0.1", DNS), SECONDS) as client:
        client.settimeout(15)
        client.sendall(struct.pack(">H", len(query)) + query)
        said = client.recv(4096)[2:]
    return said if len(said) > 7 and int.from_bytes(said[6:8], "big") else b""


def names() -> dict[str, Attempt]:
    asked = [("localhost", 1), ("localhost", 28), ("a.localhost", 1), (HOST, 1), (HOST, 28), ("127.0.0.1", 1),
             ("1.0.0.127.in-addr.arpa", 12), ("metadata.google.internal", 1), (SETTINGS["any"], 16),
             (SETTINGS["any"], 252), (SETTINGS["any"], 255), ("127.0.0.1.nip.io", 1)]  # fmt: skip
    asked += (
        [(f"{'s' * 60}.exfil.example.net", kind) for kind in (1, 16)] if SETTINGS["listed"] else []
    )
    return {f"DNS: {name} type {kind}": partial(lookup, name, kind) for name, kind in asked}


def led_tries() -> dict[str, Attempt]:
    tries: dict[str, Attempt] = {}
    for host in (
        "192.168.5.2",
        "10.0.2.2",
        "host.lima.internal",
        "fec0::2",
        LAN,
        "198.18.0.1",
        "100.64.0.1",
    ):
        tries[f"led to the way out: TCP to {host}"] = partial(led, host)
    tries["led to the way out: redirect of an open server"] = follow
    return tries


# --- the broker of the model's credential ---


def broker() -> dict[str, Attempt]:
    found = [Path(path).read_text() for path in glob.glob("/home/*/.agent-vm/credential")]
    match = re.search(r"sk-ant-[\w-]+", "".join(found))
    if not match:
        return {}
    own = f"x-api-key: {match[0]}\r\n"
    tries: dict[str, Attempt] = {}

    def add(
        what: str, head: str, credential: str = own, body: str = "{}", word: bool = False
    ) -> None:
        text = (
            f"{head} HTTP/1.1\r\nHost: a\r\n{credential}content-length: {len(body)}\r\n\r\n{body}"
        )
        tries[f"broker: {what}"] = partial(ask, text.encode(), BROKER, word)

    messages = "POST /v1/messages"
    for what, credential in {
        "no placeholder": "", "another one": "x-api-key: sk-ant-api03-another\r\n",
        "one that is too short": own[:-3] + "\r\n", "one that is too long": own[:-2] + "x\r\n",
        "an empty one": "x-api-key:\r\n", "it in Authorization": f"Authorization: Bearer {match[0]}\r\n",
        "it in a cookie": f"Cookie: x-api-key={match[0]}\r\n", "it twice": own + own,
        "it and another one": f"{own}x-api-key: other\r\n", "it in the proxy's header": f"Proxy-Authorization: Bearer {match[0]}\r\n",
        "it with a prefix": own.replace(": ", ": Bearer "), "it in capitals": own.upper(),
    }.items():  # fmt: skip
        add(what, messages, credential)
    for target in (
        "/v1/organizations", "/v1/api_keys", "/v1/oauth/token", "/", "/v1/complete", "/v1/messages/batches",
        "/v1/messages/../organizations", "/v1/./messages", "//v1/messages", "/v1//messages", "/v1/messages/",
        "/v1/%6dessages", "/v1/messages%2f..%2forganizations", "/v1/%2e%2e/organizations", "/v1/messages;x",
        "/v1/messages%00", "/v1/messages#x", "/v1/models/../organizations", "/v1/models/%2e%2e/organizations",
        "/v1/files/../organizations", "/v1\\messages", "/V1/MESSAGES", "/v1/messages?%0d%0ax: y\r\nz", "v1/messages",
        f"http://127.0.0.1:{CANARY}/v1/messages", f"//127.0.0.1:{CANARY}/v1/messages", f"@127.0.0.1:{CANARY}/v1/messages",
        "*", "/api/oauth/claude_cli/create_api_key",
    ):  # fmt: skip
        add(f"POST {target!r}", f"POST {target}")
    for first in ("GET /v1/messages", "PUT /v1/messages", "DELETE /v1/files/x", "OPTIONS /v1/messages", "TRACE /v1/messages",
                  "post /v1/messages", f"CONNECT 127.0.0.1:{CANARY}", "GET /v1/models/..", "GET /v1/files/../content",
                  "GET /v1/models/x/y", "GET /v1/models/%2e%2e%2forganizations", "HEAD /v1/organizations"):  # fmt: skip
        add(first, first)
    second = (
        f"POST /v1/organizations/smuggled HTTP/1.1\r\nHost: a\r\n{own}content-length: 2\r\n\r\n{{}}"
    )
    add("a second request after HEAD", "HEAD /api/hello", body=second, word=True)
    add("a second request after one refused", "GET /v1/none", body=second, word=True)
    add(
        "chunks",
        f"{messages}",
        own + "Transfer-Encoding: chunked\r\n",
        "0\r\n\r\n" + second,
        word=True,
    )
    add(
        "Content-Length twice",
        f"{messages}",
        own + f"Content-Length: {len(second)}\r\n",
        second,
        word=True,
    )
    return tries


# --- the folders, and ports that the host is told of ---


def another_tree(tag: str, name: str) -> bytes:
    """A 9p mount whose root is to be elsewhere."""
    Path("/mnt/x").mkdir(exist_ok=True)
    option = f"trans=virtio,version=9p2000.L,aname={name}"
    subprocess.run(
        ["mount", "-t", "9p", "-o", option, tag, "/mnt/x"], check=True, stderr=subprocess.DEVNULL
    )
    try:
        wanted = Path(SETTINGS["secret"])
        tried = [
            Path("/mnt/x", *parts)
            for parts in (
                [wanted.name],
                ["..", wanted.name],
                ["..", "..", wanted.name],
                [str(wanted)[1:]],
            )
        ]
        return b"".join(path.read_bytes() for path in tried if path.exists())
    finally:
        subprocess.run(["umount", "-l", "/mnt/x"], check=True)


def folders() -> dict[str, Attempt]:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    mine = [row for row in mounts if row[2] == "9p" and SETTINGS["other"] in row[1]]
    tries: dict[str, Attempt] = {}
    for row in mine[:1]:
        subprocess.run(["umount", row[1]], check=True)
        for name in ("/", "..", "../..", "/etc", str(Path(SETTINGS["secret"]).parent)):
            tries[f"9p: the root {name} of a folder that is mounted"] = partial(
                another_tree, row[0], name
            )
    return tries


def serve(port: int) -> None:
    """A port of the guest's, of which Lima tells the host."""
    with socket.create_server(("0.0.0.0", port)) as server:
        while True:
            client, _ = server.accept()
            client.sendall(b"FROM THE GUEST")
            client.close()


# --- the story ---


def judged(attempt: Attempt) -> str:
    try:
        came = attempt()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nothing: {type(error).__name__}"
    return f"REACHED: {came[:90]!r}" if came else "nothing: no answer, or a refusal"


def make(tries: dict[str, Attempt], at_once: int) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        for what, said in zip(tries, pool.map(judged, tries.values())):
            print(f"{what!a}: {said}", flush=True)


def main() -> None:
    if "direct" not in sys.argv[2:]:
        for tries in (led_tries(), way_out(), names(), broker()):
            make(tries, 16)
        make(folders(), 1)
        for port in SETTINGS["ports"]:
            threading.Thread(target=serve, args=(port,), daemon=True).start()
        Path(SETTINGS["ask"]).touch()  # the host looks for these ports
        while Path(SETTINGS["ask"]).exists():
            time.sleep(0.2)
    prepare_direct()
    make(direct(), 6)


if __name__ == "__main__":
    main()
