#!/usr/bin/env python3
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
import concurrent.futures
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
from typing import Any
from typing import NamedTuple

STARTS: frozenset[str] = frozenset()
HOST_NAME = "host.lima.internal"  # the host's loopback, in the guest
WEB, SMTP, ANY_PORT = frozenset([80, 443]), 25, 0  # a name in DNS has no port yet
SECONDS = 15.0  # for a resolver's answer, a connection, a head
CREDENTIALS = frozenset(["authorization", "x-api-key", "cookie", "proxy-authorization"])
Addresses = tuple[str, ...]


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
    "private": networks("10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 fec0::/10"),
    "carrier-grade NAT": networks("100.64.0.0/10"),
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
            return ("127.0.0.1", "::1")
        return Refused(f"{place} is a port of the host that is not opened", f"--host-port {port}")
    if name == "localhost" or name.endswith(".localhost"):
        return Refused(f"{place} is loopback: ports of the host are at {HOST_NAME}")
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


def listen(where: str) -> socket.socket:
    host, _, rest = where.partition(":")
    server = socket.socket(socket.AF_UNIX if host == "unix" else socket.AF_INET)
    server.bind(rest if host == "unix" else (host, int(rest)))
    server.listen(512)
    server.setblocking(False)
    return server


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


async def resolve(name: str) -> Addresses:
    """The addresses that the host's resolver has for it now."""
    ask = functools.partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
    try:
        asking = asyncio.get_running_loop().run_in_executor(None, ask)
        found = await asyncio.wait_for(asking, SECONDS)
    except (OSError, UnicodeError, asyncio.TimeoutError) as error:
        late = not error.args or error.args[0] == socket.EAI_AGAIN
        raise Failure(f"the host knows no address of {name}", 504 if late else 502) from None
    return tuple(dict.fromkeys(str(row[4][0]) for row in found))[:32]


async def dial(addresses: Addresses, port: int) -> socket.socket:
    """A connection to the first address that takes it."""
    why = "no address"
    for address in addresses:
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            sock.setblocking(False)
            opening = asyncio.get_running_loop().sock_connect(sock, (address, port))
            await asyncio.wait_for(opening, SECONDS)
            return sock
        except (OSError, asyncio.TimeoutError) as error:
            why = getattr(error, "strerror", "") or "no answer"
    raise Failure(f"no connection to port {port}: {why}", 502)


async def secure(sock: socket.socket, context: ssl.SSLContext, name: str) -> Any:
    try:
        return await asyncio.open_connection(sock=sock, ssl=context, server_hostname=name)
    except OSError as error:
        raise Failure(f"no TLS with {name}: {error.strerror or error}", 502) from None


# --- the story: a request, after which its connection is over ---


async def judge(side: Side, scheme: str, name: str, port: int) -> tuple[str, Addresses | Refused]:
    """(the name that counts, verdict): an address that DNS gave out counts as the name it is of."""
    refusals = []
    for known in (*side.given.get(name, ()), name):
        verdict = decide(side.permissions, known, port, None)
        if verdict == () and (is_address(known) or not side.proxy_for(scheme, known, port)):
            found = (name,) if is_address(name) else await resolve(name)
            verdict = decide(side.permissions, known, port, found, tuple(filter(is_own, found)))
        if not isinstance(verdict, Refused):
            return known, verdict
        refusals.append((known, verdict))
    return refusals[0]


async def serve_guest(side: Side, client: Wire) -> None:
    request = await client.read_request()
    scheme = "http" if request.path else "https"
    name, verdict = await judge(side, scheme, request.name, request.port)
    if isinstance(verdict, Refused):
        side.audit.refuse(name, request.port, verdict)
        raise Failure("refused: " + "; ".join(filter(None, verdict)), 403)
    upstream = await side.connect(client, scheme, name, request.port, verdict)
    await client.lead(upstream, request, side.head_of(request, request.headers))


async def serve_agent(side: Side, client: Wire) -> None:  # to the model's API
    request = await client.read_request()
    if not side.passes(request):
        raise Failure(f"{request.method} {request.path} is not passed on", 404)
    headers = [row for row in request.headers if row[0] not in CREDENTIALS]
    if request.method != "HEAD":  # with that, Claude Code asks whether somebody is there
        given = dict(request.headers).get(side.header, "")
        if not hmac.compare_digest(given.encode(), side.placeholder):
            raise Failure("this is not the placeholder of the credential", 401)
        headers.append((side.header, side.credential))
    upstream = await side.connect(client, *side.upstream, None)
    await client.lead(upstream, request, side.head_of(request, headers))


# --- you may stop here: what follows only calls what is above ---


# --- pure: names, heads and DNS, strictly ---

NAME = re.compile(r"(?=.{1,253}\Z)(?:(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!\Z)|\Z))+").fullmatch
NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)", re.ASCII).fullmatch
PLACE = re.compile(r"(\[[^][]*\]|[^][:]*)(?::([1-9][0-9]{0,4}))?", re.ASCII).fullmatch
FIRST_LINE = re.compile(
    r"(?:([A-Z-]{1,30}) ([!-~]+) )?(HTTP/1\.[01])(?: ([1-5][0-9]{2}[\t -~\x80-\xff]*))?"
).fullmatch
ROWS = re.compile(r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*").fullmatch
URL = re.compile(r"(?i:http)://([^/?#@\\]+)((?:[/?][^#]*)?)").fullmatch
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade", "expect"}
Headers = list[tuple[str, str]]
TTL, EDNS = 60, b"\0\0\x29\x04\xd0\0\0\0\0\0\0"  # seconds; an OPT row (RFC 6891)


class Request(NamedTuple):
    method: str
    name: str  # in its normal form; none where the request is for a broker
    port: int
    path: str
    version: str
    headers: Headers
    length: int


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


def parse_head(data: bytes) -> tuple[Any, Headers]:
    """(the first line's match, headers); strict, as a lenient reader can be made to see another
    message than the next one (RFC 9112, 11.2)."""
    line, _, block = (data + b"\r\n").decode("latin-1").partition("\r\n")
    match, rows = FIRST_LINE(line), [row.partition(":") for row in block.split("\r\n")[:-1]]
    if not match or not ROWS(block):
        raise Failure("a malformed head", 400)
    return match, [(name.lower(), value.strip(" \t")) for name, _, value in rows]


def parse_request(data: bytes, is_proxy: bool) -> Request:
    match, headers = parse_head(data)
    once, names = dict(headers), [name for name, _ in headers]
    for name in ("host", "content-length", *CREDENTIALS):
        if names.count(name) > 1:
            raise Failure(f"{name} is given twice", 400)
    size = once.get("content-length", "0")
    if "transfer-encoding" in once or not re.fullmatch("[0-9]{1,15}", size, re.ASCII):
        raise Failure("a body has to say its Content-Length", 411)
    method, target, version, _ = match.groups()
    if not is_proxy and method:
        return Request(method, "", 0, target, version, headers, int(size))
    if method == "CONNECT" and not int(size):
        name, port = host_and_port(target)
        return Request(method, name, port, "", version, headers, 0)
    url = URL(target or "")
    if not url or method == "CONNECT":
        raise Failure("this is a proxy: CONNECT HOST:PORT, or a method and http://HOST/…", 400)
    name, port = host_and_port(url[1], 80)
    host = once.get("host", url[1] if version == "HTTP/1.0" else None)
    if host is None or host_and_port(host, 80) != (name, port):
        raise Failure("Host is another one than that of the address", 400)
    path = url[2] if url[2].startswith("/") else f"/{url[2]}"
    return Request(method, name, port, path, version, headers, int(size))


def end_to_end(headers: Headers, *dropped: str) -> str:
    """The rest of a head, without what is for one hop (RFC 9110, 7.6.1)."""
    named = ",".join(value.lower() for name, value in headers if name == "connection")
    gone = {*(word.strip() for word in named.split(","))} - {"content-length", "transfer-encoding"}
    gone |= {*HOP_BY_HOP, *dropped}
    rows = [f"{name}: {value}\r\n" for name, value in headers if name not in gone]
    return "".join([*rows, "connection: close\r\n\r\n"])


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


def answer_to(query: bytes, end: int, code: int, addresses: Addresses) -> bytes:
    rows = b""
    for address in addresses:
        value = ipaddress.ip_address(address).packed
        rows += b"\xc0\x0c" + query[end - 4 : end] + struct.pack(">IH", TTL, len(value)) + value
    head = query[:2] + bytes([0x80 | query[2] & 1, 0x80 | code])
    head += struct.pack(">4H", 1, len(addresses), 0, query[11])
    packet = head + query[12:end] + rows + EDNS * query[11]
    return struct.pack(">H", len(packet)) + packet


# --- plumbing: connections ---

CHUNK, MAX_HEAD = 256 * 1024, 32 * 1024  # bytes that one direction holds, or a head has, at most
ANSWER_SECONDS = 600.0  # for an answer to begin: as long as Claude Code waits
IDLE_SECONDS = 120.0  # for the next query
HALF_SECONDS = 600.0  # one way of a tunnel has ended, and nothing comes on the other
LINGER_SECONDS = 5.0  # for a client to read what it was sent
MAX_CLIENTS, MAX_KNOWN = 1000, 4096  # connections; addresses given out, and refusals told apart
MAX_LOOKUPS = 32  # at once; MAX_QUERIES of a connection wait for them
MAX_QUERIES = 64
FIRST = asyncio.FIRST_COMPLETED
A, AAAA, SERVER_FAILED, NO_NAME = 1, 28, 2, 3  # RFC 1035
HOST_ADDRESS = "192.168.5.2"  # HOST_NAME in the guest


class Wire:
    """A connection of either side, and what has come on it that nobody has read."""

    def __init__(self, side: Side, sock: socket.socket, status: int) -> None:
        self.side, self.sock, self.status = side, sock, status  # the status: of its failures
        self.tls: Any = None  # its two streams, once it is secured
        self.upstream: Wire | None = None
        self.buffer, self.sent, self.about = bytearray(), 0, ("", 0)
        with contextlib.suppress(OSError):  # a unix socket has none of this
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def recv(self) -> bytes:
        """Some bytes; none when the other end has finished."""
        if self.buffer:
            data, self.buffer = bytes(self.buffer), bytearray()
            return data
        try:
            if self.tls:
                return bytes(await self.tls[0].read(CHUNK))
            return await asyncio.get_running_loop().sock_recv(self.sock, CHUNK)
        except OSError as error:
            raise Failure(f"the connection broke: {error.strerror}", self.status) from None

    async def send(self, data: bytes) -> None:
        self.sent += len(data)
        try:
            if not self.tls:
                return await asyncio.get_running_loop().sock_sendall(self.sock, data)
            self.tls[1].write(data)
            await self.tls[1].drain()
        except OSError as error:
            raise Failure(f"the connection broke: {error.strerror}", self.status) from None

    async def until(self, end: bytes, limit: int) -> bytes:
        """What comes before `end`, which is taken off; with an empty one, `limit` bytes."""
        while (at := self.buffer.find(end, 0 if end else limit)) < 0:
            had, self.buffer = self.buffer, bytearray()
            data = await self.recv() if len(had) < limit else b""
            if not data:
                raise Failure("half a message, or one that is too long", self.status)
            self.buffer = had + data
        data = bytes(self.buffer[:at])
        del self.buffer[: at + len(end)]
        return data

    async def head(self, seconds: float) -> bytes:
        try:
            return await asyncio.wait_for(self.until(b"\r\n\r\n", MAX_HEAD), seconds)
        except asyncio.TimeoutError:
            raise Failure("no head in time", 408 if self.status == 400 else 504) from None

    async def read_status(self, seconds: float) -> tuple[str, Headers]:
        try:
            match, headers = parse_head(await self.head(seconds))
        except Failure as failure:
            raise Failure(f"the server: {failure.args[0]}", max(502, failure.args[1])) from None
        if match[1] or not match[4]:
            raise Failure("the server: no answer to a request", 502)
        return match[4], headers

    async def read_request(self) -> Request:
        return parse_request(await self.head(SECONDS), not self.side.routes)

    async def pass_on(self, to: Wire, left: int = sys.maxsize) -> None:
        """Pass on what comes, or so many bytes of it, and that it ends."""
        while left and (data := await self.recv()):
            await to.send(data[:left])
            left -= len(data[:left])
        with contextlib.suppress(OSError):
            to.sock.shutdown(socket.SHUT_WR)

    async def pass_body(self, to: Wire, left: int) -> None:
        """Pass on so many bytes; what follows them is no part of the request, and dropped."""
        while left:
            data = await self.recv()
            if not data:
                raise Failure("half a body", 400)
            with contextlib.suppress(Failure):  # an early answer is an answer
                await to.send(data[:left])
            left -= len(data[:left])
        await self.drain()
        if self.side.routes:  # an agent that was interrupted: what it asked for costs money
            raise Failure("it has left", 400)

    async def pass_answer(self, to: Wire, method: str) -> None:
        """Pass on an answer, event by event, under a head that is rebuilt."""
        status, headers = await self.read_status(ANSWER_SECONDS)
        while status.startswith("1"):  # RFC 9110, 15.2
            status, headers = await self.read_status(ANSWER_SECONDS)
        dropped = ["set-cookie"] if self.side.routes else []
        await to.send(f"HTTP/1.1 {status}\r\n{end_to_end(headers, *dropped)}".encode("latin-1"))
        size = dict(headers).get("content-length", "")  # not all servers end a connection there
        if method == "HEAD" or status[:3] in ("204", "304"):
            size = "0"
        await self.pass_on(to, int(size) if re.fullmatch("[0-9]{1,15}", size) else sys.maxsize)

    async def lead(self, to: Wire, request: Request, head: bytes) -> None:
        """Both ways of a connection, until they are over, or the answer is, or one fails."""
        if request.path:
            await to.send(head)
            ways = [to.pass_answer(self, request.method), self.pass_body(to, request.length)]
        else:
            await self.send(b"HTTP/1.1 200 OK\r\n\r\n")
            ways = [to.pass_on(self), self.pass_on(to)]
        tasks = [asyncio.ensure_future(way) for way in ways]
        last = tasks[:1] if request.path else tasks
        try:
            waiting, moved = set(tasks), -1
            while waiting.intersection(last):
                half = HALF_SECONDS if len(waiting) < len(last) else None
                done, waiting = await asyncio.wait(waiting, timeout=half, return_when=FIRST)
                for task in done:
                    task.result()
                if not done and moved == self.sent + to.sent:
                    raise Failure("half of it has ended, and nothing comes on the other", 504)
                moved = self.sent + to.sent
        finally:
            for task in tasks:
                task.cancel()
            # A socket that is closed while the loop still watches it would spoil the next one.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self) -> None:
        while await self.recv():
            pass

    def close(self, is_whole: bool = True) -> None:
        """Close it; where more should have come, so that the other end is told."""
        if self.tls:
            self.tls[1].transport.abort()
        elif not is_whole:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


# --- plumbing: what the connections share ---

# What Claude Code 2.1.332 asks ANTHROPIC_BASE_URL for; * is one part of a path.
PROVIDERS = {
    "anthropic": (
        "https://api.anthropic.com",
        ("HEAD /api/hello", "POST /v1/messages", "POST /v1/messages/count_tokens",
         "GET /v1/models", "GET /v1/models/*", "POST /v1/files", "GET /v1/files",
         "GET /v1/files/*", "GET /v1/files/*/content"),
    )
}  # fmt: skip
ERRORS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
          408: "invalid_request_error", 411: "invalid_request_error"}  # fmt: skip


class Audit:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.refused: dict[tuple[str, int, Refused], int] = {}

    def record(self, host: str, port: int, verdict: str, reason: str = "", size: int = 0) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row = {"time": now, "host": host, "port": port, "verdict": verdict, "reason": reason}
        try:
            if self.fd >= 0:
                os.write(self.fd, json.dumps({**row, "bytes": size}).encode() + b"\n")
        except OSError as error:
            raise Failure(f"the audit cannot be written: {error.strerror}", 503) from None

    def refuse(self, host: str, port: int, refused: Refused) -> None:
        key = (host, port, refused)
        if key not in self.refused and len(self.refused) >= MAX_KNOWN:
            key = ("", 0, Refused("others"))
        self.refused[key] = self.refused.get(key, 0) + 1
        self.record(host, port, "refused", refused.reason)


class Side:
    """One side of a run: what it may do, and what its connections share."""

    routes: tuple[str, ...] = ()  # of a broker
    prefix = ""

    def __init__(self, permissions: Permissions, audit: Audit) -> None:
        self.permissions, self.audit = permissions, audit
        self.given: dict[str, tuple[str, ...]] = {}  # address: the names it was given out for
        self.stand_ins: dict[str, str] = {}
        self.clients: set[Any] = set()
        self.proxies: dict[str, Any] = {}
        env = {name.lower(): value for name, value in os.environ.items()}
        self.no_proxy = env.get("no_proxy", "").lower().replace(",", " ").split()
        for scheme in ("http", "https"):
            if env.get(f"{scheme}_proxy"):
                self.proxies[scheme] = parse_proxy(env[f"{scheme}_proxy"])

    def proxy_for(self, scheme: str, name: str, port: int) -> Any:
        """(host, port, header) of the host's own proxy; None where it is not to be asked."""
        local = name in (HOST_NAME, "localhost") or (is_address(name) and kind_of(name, CLOSED))
        entries = [entry.replace(f":{port}", "").lstrip("*.") for entry in self.no_proxy]
        if local or "*" in self.no_proxy or any(f".{name}".endswith(f".{one}") for one in entries):
            return None
        return self.proxies.get(scheme)

    def take_credential(self, line: bytes, provider: str, url: str) -> None:
        """Become a broker. The guest has the placeholder; the credential stays in this process."""
        default, self.routes = PROVIDERS[provider]
        address = urllib.parse.urlsplit(url or default)
        name, port = host_and_port(address.netloc, 443 if address.scheme == "https" else 80)
        self.upstream, self.prefix = (address.scheme, name, port), address.path.rstrip("/")
        if address.scheme == "https":
            self.context = ssl.create_default_context()
            if os.environ.get("NODE_EXTRA_CA_CERTS"):  # as Claude Code does
                self.context.load_verify_locations(os.environ["NODE_EXTRA_CA_CERTS"])
        elif address.scheme != "http" or name not in ("localhost", "127.0.0.1", "::1"):
            raise Failure("--upstream must be https: the credential would go in clear")
        try:
            given = json.loads(line)
            self.header = {name: name for name in ("authorization", "x-api-key")}[given["header"]]
            scheme = "Bearer " if self.header == "authorization" else ""
            if not all(
                re.fullmatch("[!-~]{8,}", given[key]) for key in ("placeholder", "credential")
            ):
                raise ValueError
            self.placeholder = (scheme + given["placeholder"]).encode()
            self.credential = scheme + given["credential"]
        except (ValueError, KeyError, TypeError):
            raise Failure("stdin holds no placeholder, credential and header") from None

    def passes(self, request: Request) -> bool:
        path, _, query = request.path.partition("?")
        asked, part = f"{request.method} {path}", "[A-Za-z0-9_][A-Za-z0-9._:-]*"
        known = any(re.fullmatch(route.replace("*", part), asked) for route in self.routes)
        return known and re.fullmatch("[A-Za-z0-9_.~%&=,:-]*", query) is not None

    def head_of(self, request: Request, headers: Headers) -> bytes:
        """The head of the request that is sent on: nothing in it is for one hop."""
        scheme, name, port = self.upstream if self.routes else ("http", *request[1:3])
        host = spelled(name, port, frozenset([443 if scheme == "https" else 80]))
        target, more, proxy = self.prefix + request.path, "", self.proxy_for(scheme, name, port)
        if proxy and scheme == "http":
            target, more = f"http://{host}{target}", proxy[2]
        end = end_to_end(headers, "host", "proxy-authorization")
        head = f"{request.method} {target} {request.version}\r\nhost: {host}\r\n{more}{end}"
        return head.encode("latin-1")

    async def connect(self, client: Wire, scheme: str, name: str, port: int, to: Any) -> Wire:
        """A connection to what was judged, or to the host's proxy, which is told the name."""
        self.audit.record(name, port, "allowed")
        client.about = (name, port)
        proxy = self.proxy_for(scheme, name, port)
        if proxy or to is None:  # the judge of a broker is who started it
            to = await resolve(proxy[0] if proxy else name)
        upstream = Wire(self, await dial(to, proxy[1] if proxy else port), 502)
        client.upstream = upstream
        if proxy and scheme == "https":
            place = spelled(name, port)
            ask = f"CONNECT {place} HTTP/1.1\r\nhost: {place}\r\n{proxy[2]}\r\n"
            await upstream.send(ask.encode())
            status, _ = await upstream.read_status(2 * SECONDS)
            if not status.startswith("2"):
                raise Failure(f"the host's proxy says {status}", 502)
        if self.routes and scheme == "https":
            if upstream.buffer:  # in clear text, it would be taken for what the API says
                raise Failure("the host's proxy says more than it was asked", 502)
            upstream.tls = await secure(upstream.sock, self.context, name)
        return upstream

    async def addresses_of(self, name: str) -> Addresses:
        """What DNS tells the guest; from then on each of them counts as the name."""
        name = normal_host(name)
        _, verdict = await judge(self, "https", name, ANY_PORT)
        if isinstance(verdict, Refused):
            self.audit.refuse(name, ANY_PORT, verdict)
            return ()
        addresses = (HOST_ADDRESS,) if name == HOST_NAME else verdict[:16]
        if not addresses:
            # The host's proxy will resolve it: until then, an address that is nobody's.
            if len(self.stand_ins) > MAX_KNOWN:
                self.stand_ins.clear()
            stand_in = ipaddress.IPv4Address("198.18.0.1") + len(self.stand_ins)
            addresses = (self.stand_ins.setdefault(name, str(stand_in)),)
        for address in addresses:
            names = (name, *self.given.pop(address, ()))
            self.given[address] = tuple(dict.fromkeys(names))[:8]
            if len(self.given) > MAX_KNOWN:
                del self.given[next(iter(self.given))]
        return addresses

    def told(self, reason: str, status: int) -> bytes:
        """Why a request is not served: in the status line, which most programs show, and whole."""
        kind, body = "text/plain", f"agent-vm: {reason}\n"
        if self.routes:
            error = {"type": ERRORS.get(status, "api_error"), "message": f"agent-vm: {reason}"}
            kind, body = "application/json", json.dumps({"type": "error", "error": error}) + "\n"
        size = f"content-type: {kind}\r\ncontent-length: {len(body.encode())}\r\n"
        head = f"HTTP/1.1 {status} {ascii(reason)[1:-1]}\r\n{size}connection: close\r\n\r\n"
        return (head + body).encode()


async def serve_names(side: Side, client: Wire) -> None:
    """DNS over TCP (RFC 7766): a query is answered when it can be, whatever came before it."""
    lock = asyncio.Lock()

    async def answer(query: bytes, name: str, kind: int, end: int) -> None:
        code, found = 0, Addresses()
        try:
            found = await side.addresses_of(name) if kind in (A, AAAA) else ()
            code = 0 if found or kind not in (A, AAAA) else NO_NAME
        except Failure as failure:
            code = SERVER_FAILED if failure.args[1] == 504 else NO_NAME
        wanted = tuple(address for address in found if (":" in address) == (kind == AAAA))
        async with lock:
            await client.send(answer_to(query, end, code, wanted))

    pending: set[Any] = set()
    try:
        while True:
            size = await asyncio.wait_for(client.until(b"", 2), IDLE_SECONDS)
            query = client.until(b"", int.from_bytes(size, "big"))
            data = await asyncio.wait_for(query, SECONDS)
            if len(pending) >= MAX_QUERIES:
                await asyncio.wait(pending, return_when=FIRST)
            task = asyncio.ensure_future(answer(data, *parse_query(data)))
            pending.add(task)
            task.add_done_callback(pending.discard)
    except asyncio.TimeoutError:
        raise Failure("no query in time", 408) from None
    finally:
        for task in pending:
            task.cancel()


async def attend(side: Side, story: Any, sock: socket.socket) -> None:
    """A client, to its end: what is refused can be read before the connection is closed."""
    client, is_whole = Wire(side, sock, 400), False
    try:
        await story(side, client)
        is_whole = True
    except Failure as failure:
        is_whole = not client.sent  # else half of an answer, or of a tunnel
        with contextlib.suppress(Failure):
            if is_whole and story is not serve_names:
                await client.send(side.told(*failure.args))
    finally:
        with contextlib.suppress(OSError, Failure, asyncio.TimeoutError):
            if client.upstream:
                client.upstream.close(is_whole)
                side.audit.record(*client.about, "closed", size=client.sent + client.upstream.sent)
            if is_whole:
                sock.shutdown(socket.SHUT_WR)
                await asyncio.wait_for(client.drain(), LINGER_SECONDS)
        client.close(is_whole)


async def accept(side: Side, story: Any, server: socket.socket) -> None:
    while True:
        try:
            sock, _ = await asyncio.get_running_loop().sock_accept(server)
        except OSError:  # too many open files, or a client that has left
            await asyncio.sleep(0.05)
            continue
        if len(side.clients) >= MAX_CLIENTS:
            sock.close()
            continue
        task = asyncio.ensure_future(attend(side, story, sock))
        side.clients.add(task)
        task.add_done_callback(side.clients.discard)


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


def parse_proxy(url: str) -> tuple[str, int, str]:
    """(host, port, the header with its credentials) of the host's own proxy."""
    address = urllib.parse.urlsplit(url if "//" in url else f"//{url}", "http")
    if address.scheme != "http" or not address.hostname:
        raise Failure("a proxy of the environment is not http://[USER:PASSWORD@]HOST:PORT")
    if address.username is None:
        return address.hostname, address.port or 80, ""
    user = f"{address.username}:{address.password or ''}"
    token = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
    return address.hostname, address.port or 80, f"proxy-authorization: Basic {token}\r\n"


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
    parser.formatter_class = functools.partial(argparse.RawDescriptionHelpFormatter, width=100)
    add = parser.add_argument
    add(
        "--listen",
        required=True,
        metavar="PLACE",
        type=listen_place,
        help="unix:PATH or 127.0.0.1:PORT",
    )
    add("--dns", metavar="PLACE", type=listen_place, help="answer DNS over TCP there")
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
    loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(MAX_LOOKUPS))
    rows = tuple(row for rows in options.allow for row in rows)
    permissions = Permissions(options.internet, rows, frozenset(options.host_port))
    side = Side(permissions, Audit(open_audit(options.audit) if options.audit else -1))
    if options.host_port:  # how the guest's /etc/hosts spells it, when it does not ask DNS
        side.given[HOST_ADDRESS] = (HOST_NAME,)
    if options.broker:
        side.take_credential(sys.stdin.buffer.readline(), options.broker, options.upstream)
    stories = [(options.listen, serve_agent if options.broker else serve_guest)]
    if options.dns:
        stories.append((options.dns, serve_names))
    tasks = set()
    for where, story in stories:
        server = listen(where)
        name = server.getsockname()
        os.write(1, f"{name if isinstance(name, str) else name[1]}\n".encode())
        tasks.add(asyncio.ensure_future(accept(side, story, server)))
    end = loop.run_in_executor(None, sys.stdin.buffer.read)
    loop.add_signal_handler(signal.SIGTERM, end.cancel)
    loop.add_signal_handler(signal.SIGINT, end.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await end
    tasks |= side.clients
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=1)
    for (host, port, refused), count in side.audit.refused.items():
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
