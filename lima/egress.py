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
HOST_NAME = "host.lima.internal"  # the host's loopback, in the guest
LOOPBACK = ("127.0.0.1", "::1")  # HOST_NAME here
WEB, SMTP, ANY_PORT = frozenset([80, 443]), 25, 0  # a name in DNS has no port yet
SECONDS = 15.0  # for a resolver's answer, a connection, a head
MAX_HEAD = 32 * 1024  # bytes
CREDENTIALS = frozenset(["authorization", "x-api-key", "cookie", "proxy-authorization"])
Addresses = tuple[str, ...]
Place = tuple[str, str, int]  # scheme, name, port
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
            return LOOPBACK
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


def host_proxy(scheme: str, name: str, port: int) -> str:
    """The URL of the host's own proxy; "" where it is not to be asked."""
    is_set = any(variable.lower().endswith("_proxy") for variable in os.environ)
    if not is_set or name in (HOST_NAME, "localhost", *LOOPBACK):
        return ""
    from urllib.request import getproxies_environment  # late, as it takes 50 ms
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    if proxy_bypass_environment(spelled(name, port)):
        return ""
    return getproxies_environment().get(scheme, "")


async def resolve(name: str) -> Addresses:
    """The addresses that the host's resolver has for it now."""
    asking = asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.wait_for(asking, SECONDS)
    except (OSError, UnicodeError, asyncio.TimeoutError) as error:
        late = not error.args or error.args[0] == socket.EAI_AGAIN
        raise Failure(f"the host knows no address of {name}", 504 if late else 502) from None
    return tuple(dict.fromkeys(str(row[4][0]) for row in found))[:32]


async def dial(addresses: Addresses, port: int) -> Streams:
    """A connection to the first address that takes it."""
    why = "no address"
    for address in addresses:
        try:
            opening = asyncio.open_connection(address, port, limit=MAX_HEAD)
            return await asyncio.wait_for(opening, SECONDS)
        except (OSError, asyncio.TimeoutError) as error:
            why = getattr(error, "strerror", "") or "no answer"
    raise Failure(f"no connection to port {port}: {why}", 502)


# --- the story: a request, after which its connection is over ---


async def permit(side: Side, scheme: str, name: str, port: int) -> Addresses:
    """The addresses that it may be reached at; none where the host's proxy is told the name."""
    verdict = decide(side.permissions, name, port, None)
    if verdict == () and (is_address(name) or not host_proxy(scheme, name, port)):
        found = (name,) if is_address(name) else await resolve(name)
        verdict = decide(side.permissions, name, port, found, tuple(filter(is_own, found)))
    if isinstance(verdict, Refused):
        side.refuse(name, port, verdict)
        raise Failure("refused: " + "; ".join(filter(None, verdict)), 403)
    return verdict


async def serve_guest(side: Side, request: Request, exchange: Exchange) -> None:
    scheme = "http" if request.path else "https"
    name = side.given.get(request.name, request.name)  # an address that DNS gave out is its name
    addresses = await permit(side, scheme, name, request.port)
    await exchange.lead(request, request.headers, (scheme, name, request.port), addresses)


async def serve_agent(side: Side, request: Request, exchange: Exchange) -> None:
    broker = side.broker  # of the credential for a model's API
    if not broker.passes(request):
        raise Failure(f"{request.method} {request.path} is not passed on", 404)
    headers = [row for row in request.headers if row[0] not in CREDENTIALS]
    if request.method != "HEAD":  # with that, Claude Code asks whether somebody is there
        given = dict(request.headers).get(broker.header, "")
        if not hmac.compare_digest(given.encode(), broker.placeholder):
            raise Failure("this is not the placeholder of the credential", 401)
        headers.append((broker.header, broker.credential))
    await exchange.lead(request, headers, broker.place, None)  # who started it is its judge


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
Headers = list[tuple[str, str]]
A, AAAA, SERVER_FAILED, NO_NAME, TTL = 1, 28, 2, 3, 60  # RFC 1035


class Request(NamedTuple):
    method: str
    name: str  # in its normal form; none where the request is for a broker
    port: int
    path: str  # none of CONNECT
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


def parse_request(data: bytes, is_proxy: bool) -> Request:
    match = HEAD(data.decode("latin-1"))
    if not match:
        raise Failure("a malformed head", 400)
    method, target, version, block = match.groups()
    rows = [row.partition(":") for row in block.split("\r\n")[:-1]]
    headers = [(name.lower(), value.strip(" \t")) for name, _, value in rows]
    once, names = dict(headers), [name for name, _ in headers]
    for name in ("host", "content-length", *CREDENTIALS):
        if names.count(name) > 1:
            raise Failure(f"{name} is given twice", 400)
    size = once.get("content-length", "0")
    if "transfer-encoding" in once or not re.fullmatch("[0-9]{1,15}", size, re.ASCII):
        raise Failure("a body has to say its Content-Length", 411)
    if not is_proxy:
        return Request(method, "", 0, target, version, headers, int(size))
    if method == "CONNECT" and not int(size):
        name, port = host_and_port(target)
        return Request(method, name, port, "", version, headers, 0)
    url = URL(target)
    if not url or method == "CONNECT":
        raise Failure("this is a proxy: CONNECT HOST:PORT, or a method and http://HOST/…", 400)
    name, port = host_and_port(url[1], 80)
    host = once.get("host", url[1] if version == "HTTP/1.0" else None)
    if host is None or host_and_port(host, 80) != (name, port):
        raise Failure("Host is another one than that of the address", 400)
    path = url[2] if url[2].startswith("/") else f"/{url[2]}"
    return Request(method, name, port, path, version, headers, int(size))


def head_of(request: Request, headers: Headers, target: str, host: str, more: str = "") -> bytes:
    """The head of the request that is sent on: nothing in it is for one hop (RFC 9110, 7.6.1)."""
    named = ",".join(value.lower() for name, value in headers if name == "connection")
    gone = {*(word.strip() for word in named.split(","))} - {"content-length"}
    gone |= {*HOP_BY_HOP, "host", "proxy-authorization"}
    rows = [f"{name}: {value}\r\n" for name, value in headers if name not in gone]
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
    flags = bytes([0x80 | query[2] & 1, 0x80 | code])
    counts = struct.pack(">4H", 1, 1 if row else 0, 0, 0)
    packet = query[:2] + flags + counts + query[12:end] + row
    return struct.pack(">H", len(packet)) + packet


# --- plumbing: connections ---

BUFFER = memoryview(bytearray(512 * 1024))  # of all: it is empty before more is read
IDLE_SECONDS = 600.0  # when one way is left, and nothing comes on it; as long as Claude Code waits
LINGER_SECONDS = 5.0  # for a client to read what it was sent
MAX_CLIENTS, MAX_LOOKUPS = 1000, 32  # at once
MAX_REFUSALS, MAX_STAND_INS = 4096, 65534  # told apart; given out by DNS
STAND_INS = ipaddress.ip_network("198.18.0.0/16")
HOST_ADDRESS = "192.168.5.2"  # HOST_NAME in the guest
FIRST = asyncio.FIRST_COMPLETED


class End(asyncio.BufferedProtocol):
    """One end of a connection: so many bytes of what comes here are written to the other end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer  # a writer that is forgotten closes
        self.transport: Any = writer.transport
        self.other, self.stays_open = self, True
        self.left, self.moved = 0, 0  # bytes that may still pass, and that did
        self.ended = asyncio.get_running_loop().create_future()  # nothing more comes
        self.lost = asyncio.get_running_loop().create_future()  # with an OSError, or None

    async def read_head(self, status: int, late: int) -> bytes:
        try:
            return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), SECONDS)
        except asyncio.TimeoutError:
            raise Failure("no head in time", late) from None
        except (EOFError, OSError, asyncio.LimitOverrunError):
            raise Failure("half a head, or one that is too long", status) from None

    async def take_over(self) -> bytes:
        """Get what comes once reading is resumed; returned is what has come before."""
        self.reader.feed_eof()
        early = await self.reader.read()
        self.transport.pause_reading()
        self.transport.set_protocol(self)
        return early

    def is_open(self) -> bool:
        return not self.lost.done() and not self.transport.is_closing()

    def pass_on(self, data: bytes) -> None:
        passing = data[: self.left]
        self.left -= len(passing)
        self.moved += len(passing)
        if passing and self.other.is_open():
            self.other.transport.write(passing)

    def get_buffer(self, sizehint: int) -> memoryview:
        return BUFFER

    def buffer_updated(self, size: int) -> None:
        self.pass_on(bytes(BUFFER[:size]))  # a copy: asyncio keeps what it cannot send at once

    def pause_writing(self) -> None:
        if self.other.is_open():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.is_open():
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        if not self.ended.done():
            self.ended.set_result(None)
        return self.stays_open

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
        self.eof_received()

    async def secure(self, context: ssl.SSLContext, name: str) -> None:
        self.stays_open = False  # TLS has no half that ends
        start = asyncio.get_running_loop().start_tls
        try:
            self.transport = await start(self.transport, self, context, server_hostname=name)
        except OSError as error:
            raise Failure(f"no TLS with {name}: {error.strerror or error}", 502) from None

    def write_eof(self) -> None:
        with contextlib.suppress(OSError):
            self.transport.write_eof()

    def break_off(self) -> None:
        """Close what is open yet; the other program is told that more should have come."""
        if not self.lost.done():
            with contextlib.suppress(OSError):
                sock = self.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            self.connection_lost(None)


class Exchange:
    """A client's connection, and the one that its request leads to."""

    def __init__(self, side: Side, client: End) -> None:
        self.side, self.client, self.ends = side, client, [client]

    async def lead(
        self, request: Request, headers: Headers, place: Place, to: Addresses | None
    ) -> None:
        """Connect to what was judged, or to the host's proxy, which is told the name."""
        (scheme, name, port), is_tunnel = place, not request.path
        self.side.record(name, port, "allowed")
        proxy = parse_proxy(host_proxy(scheme, name, port))
        if proxy or to is None:
            to = await resolve(proxy[0] if proxy else name)
        upstream = End(*await dial(to, proxy[1] if proxy else port))
        self.ends.append(upstream)
        if proxy and scheme == "https":
            asked = spelled(name, port)
            head = f"CONNECT {asked} HTTP/1.1\r\nhost: {asked}\r\n{proxy[2]}\r\n"
            upstream.transport.write(head.encode())
            status = (await upstream.read_head(502, 504)).decode("latin-1").split("\r\n")[0]
            if not re.match(r"HTTP/1\.[01] 2", status):
                raise Failure(f"the host's proxy says {status.partition(' ')[2]}", 502)
        early = await upstream.take_over()
        if scheme == "https" and not is_tunnel:
            if early:  # in clear text, it would be taken for what the API says
                raise Failure("the host's proxy says more than it was asked", 502)
            await upstream.secure(self.side.broker.context, name)
        self.client.other, upstream.other = upstream, self.client
        upstream.left = sys.maxsize
        if is_tunnel:
            self.client.left, early = sys.maxsize, b"HTTP/1.1 200 OK\r\n\r\n" + early
        else:
            self.client.left = request.length
            host = spelled(name, port, frozenset([443 if scheme == "https" else 80]))
            target, more = self.side.prefix + request.path, ""
            if proxy and scheme == "http":
                target, more = f"http://{host}{target}", proxy[2]
            upstream.transport.write(head_of(request, headers, target, host, more))
        upstream.pass_on(early)
        self.client.pass_on(await self.client.take_over())
        for end in self.ends:
            end.transport.resume_reading()
        try:
            await self.wait(self.client, upstream, is_tunnel)
        finally:
            size = self.client.moved + upstream.moved
            self.side.record(name, port, "closed", size=size)

    async def wait(self, client: End, upstream: End, is_tunnel: bool) -> None:
        """Until both ways of a tunnel have ended, or the answer to a request has."""
        moved = 0
        while not upstream.ended.done() or (is_tunnel and not client.ended.done()):
            waiting = [one for end in self.ends for one in (end.ended, end.lost) if not one.done()]
            seconds = None if is_tunnel and len(waiting) == 4 else IDLE_SECONDS
            done, _ = await asyncio.wait(waiting, timeout=seconds, return_when=FIRST)
            if not done and moved == client.moved + upstream.moved:
                raise Failure("nothing comes any more", 504)
            moved = client.moved + upstream.moved
            for end in self.ends:
                if end.lost.done() and end.lost.result():
                    raise Failure(f"the connection broke: {end.lost.result()}", 502)
                if end.ended.done() and is_tunnel:
                    end.other.write_eof()
            if not is_tunnel and client.ended.done() and (client.left or self.side.broker):
                raise Failure("the client has left", 400)
        if not upstream.moved:
            raise Failure("the server has ended without an answer", 502)


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


class Broker:
    """What a guest may ask of a model's API. It has the placeholder; this has the credential."""

    def __init__(self, line: bytes, provider: str, url: str) -> None:
        default, self.routes = PROVIDERS[provider]
        address = urllib.parse.urlsplit(url or default)
        name, port = host_and_port(address.netloc, 443 if address.scheme == "https" else 80)
        self.place, self.prefix = (address.scheme, name, port), address.path.rstrip("/")
        if address.scheme == "https":
            self.context = ssl.create_default_context()
            if os.environ.get("NODE_EXTRA_CA_CERTS"):  # as Claude Code does
                self.context.load_verify_locations(os.environ["NODE_EXTRA_CA_CERTS"])
        elif address.scheme != "http" or name not in ("localhost", *LOOPBACK):
            raise Failure("--upstream must be https: the credential would go in clear")
        try:
            given = json.loads(line)
            self.header = {name: name for name in ("authorization", "x-api-key")}[given["header"]]
            scheme = "Bearer " if self.header == "authorization" else ""
            for key in ("placeholder", "credential"):
                if not re.fullmatch("[!-~]{8,}", given[key]):
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


class Side:
    """One side of a run: what it may do, and what its connections share."""

    broker: Any = None
    prefix = ""  # of an API's paths

    def __init__(self, permissions: Permissions, audit: int) -> None:
        self.permissions, self.audit = permissions, audit
        self.refused: dict[tuple[str, int, Refused], int] = {}
        self.stand_ins: dict[str, str] = {HOST_NAME: HOST_ADDRESS}  # what DNS says of a name
        # How the guest's /etc/hosts spells HOST_NAME, when it does not ask DNS.
        self.given = {HOST_ADDRESS: HOST_NAME} if permissions.host_ports else {}
        self.clients: set[Any] = set()
        self.lookups: set[Any] = set()

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
        """The address that is the name, here and from now on."""
        if name not in self.stand_ins:
            if len(self.given) >= MAX_STAND_INS:
                raise Failure("all addresses are given out", 503)
            self.stand_ins[name] = str(STAND_INS[len(self.given) + 1])
            self.given[self.stand_ins[name]] = name
        return self.stand_ins[name]

    def told(self, reason: str, status: int) -> bytes:
        """Why a request is not served: in the status line, which most programs show, and whole."""
        kind, body = "text/plain", f"agent-vm: {reason}\n"
        if self.broker:
            error = {"type": ERRORS.get(status, "api_error"), "message": f"agent-vm: {reason}"}
            kind, body = "application/json", json.dumps({"type": "error", "error": error}) + "\n"
        size = f"content-type: {kind}\r\ncontent-length: {len(body.encode())}\r\n"
        head = f"HTTP/1.1 {status} {ascii(reason)[1:-1]}\r\n{size}connection: close\r\n\r\n"
        return (head + body).encode()


async def serve_request(side: Side, *streams: Any) -> None:
    client = End(*streams)
    exchange = Exchange(side, client)
    try:
        try:
            request = parse_request(await client.read_head(400, 408), not side.broker)
            await (serve_agent if side.broker else serve_guest)(side, request, exchange)
        except Failure as failure:
            for upstream in exchange.ends[1:]:
                upstream.break_off()
                if upstream.moved:
                    raise  # a part of an answer, or of a tunnel
            client.transport.write(side.told(*failure.args))
        # Bytes that nobody has read would reset the client's connection.
        client.left = 0
        await client.take_over()
        client.write_eof()
        client.transport.resume_reading()
        await asyncio.wait([client.ended], timeout=LINGER_SECONDS)
        for end in exchange.ends:
            end.transport.close()
        await asyncio.wait([end.lost for end in exchange.ends], timeout=IDLE_SECONDS)
    finally:
        for end in exchange.ends:
            end.break_off()


async def serve_names(side: Side, reader: asyncio.StreamReader, writer: Any) -> None:
    """DNS over TCP (RFC 7766): a query is answered when it can be, whatever came before it."""

    async def answer(query: bytes, text: str, kind: int, end: int) -> None:
        code, address = 0, ""
        try:
            if kind in (A, AAAA):
                name = normal_host(text)
                await permit(side, "https", name, ANY_PORT)
                address = side.stand_in(name)
        except Failure as failure:
            code = SERVER_FAILED if failure.args[1] in (503, 504) else NO_NAME
        writer.write(answer_to(query, end, code, address if kind == A else ""))

    while True:
        size = await asyncio.wait_for(reader.readexactly(2), IDLE_SECONDS)
        asked = reader.readexactly(int.from_bytes(size, "big"))
        query = await asyncio.wait_for(asked, SECONDS)
        if len(side.lookups) >= MAX_LOOKUPS:
            await asyncio.wait(side.lookups, return_when=FIRST)
        task = asyncio.ensure_future(answer(query, *parse_query(query)))
        side.lookups.add(task)
        task.add_done_callback(side.lookups.discard)
        await writer.drain()


async def attend(side: Side, story: Any, reader: asyncio.StreamReader, writer: Any) -> None:
    """A client, to its end."""
    task = asyncio.current_task()
    side.clients.add(task)
    try:
        if len(side.clients) <= MAX_CLIENTS:
            await story(side, reader, writer)
    # It has been told, or has left; of a cancelled task Python 3.11 and 3.12 would complain.
    except (Failure, EOFError, OSError, asyncio.TimeoutError, asyncio.CancelledError):
        pass
    finally:
        writer.transport.abort()
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
    address = urllib.parse.urlsplit(url if "//" in url else f"//{url}", "http")
    if address.scheme != "http" or not address.hostname:
        raise Failure("a proxy of the environment is not http://[USER:PASSWORD@]HOST:PORT", 502)
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
    side = Side(permissions, open_audit(options.audit) if options.audit else -1)
    if options.broker:
        side.broker = Broker(sys.stdin.buffer.readline(), options.broker, options.upstream)
        side.prefix = side.broker.prefix
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
