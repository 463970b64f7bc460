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
