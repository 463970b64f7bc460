"""The VM's way out as a process: an attack list, DNS, faults. Everything is on loopback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any

from lima import egress
from tests.egress_world import BARE
from tests.egress_world import SCRIPT
from tests.egress_world import TIMEOUT
from tests.egress_world import Egress
from tests.egress_world import Server
from tests.egress_world import echo
from tests.egress_world import read_all
from tests.egress_world import web
from tests.support import wait_for
from tests.test_egress_decide import query

PUBLIC, OTHER, MIRROR = "93.184.216.34", "93.184.216.35", "10.1.2.3"
NAMES = {
    "good.example": [PUBLIC],
    "other.example": [OTHER],
    "mirror.corp": [MIRROR],
    "sneaky.example": [MIRROR],
    "local.example": ["127.0.0.1 ::1"],
    "meta.example": ["169.254.169.254"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "rebind.example": [PUBLIC, "127.0.0.1"],
    "rebind-lan.example": [PUBLIC, MIRROR],
    "mixed.example": [f"10.0.0.1 {PUBLIC}"],
    "six.example": [f"2606:2800:220:1::1 {PUBLIC}"],
    "mail.example": [PUBLIC],
}


class WorldTest(unittest.TestCase):
    """One egress and two servers for the whole class; nothing is dialled that is not named."""

    argv: tuple[str, ...] = ()
    egress: Egress
    server: Server
    lan: Server

    @classmethod
    def setUpClass(cls) -> None:
        cls.server, cls.lan = Server(web), Server(web)
        ports = {PUBLIC: cls.server.port, OTHER: cls.server.port, MIRROR: cls.lan.port}
        ports["2606:2800:220:1::1"] = cls.server.port
        cls.egress = Egress(*cls.argv, names=NAMES, ports=ports, dns=True)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.egress.stop()
        cls.server.close()
        cls.lan.close()

    def setUp(self) -> None:
        self.server.heads.clear()
        self.lan.heads.clear()

    def renew(self) -> None:
        """An egress that has given out no address yet."""
        ports = {PUBLIC: self.server.port, OTHER: self.server.port, MIRROR: self.lan.port}
        self.egress = Egress(*self.argv, names=NAMES, ports=ports, dns=True)
        self.addCleanup(self.egress.stop)

    def connect(self, place: str) -> str:
        return self.egress.head(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n")

    def look_up(self, *queries: bytes) -> list[tuple[int, list[str]]]:
        """(code, addresses) of the answers, in the order of their ids' coming."""
        found = []
        with self.egress.connect(self.egress.dns) as client:
            client.sendall(b"".join(struct.pack(">H", len(data)) + data for data in queries))
            file = client.makefile("rb")
            for _ in queries:
                data = file.read(struct.unpack(">H", file.read(2))[0])
                found.append(self.parse(data))
        return found

    def parse(self, data: bytes) -> tuple[int, list[str]]:
        rows = data[data.index(b"\xc0\x0c") :] if b"\xc0\x0c" in data else b""
        addresses = []
        while rows[:2] == b"\xc0\x0c":
            kind, size = struct.unpack(">H6xH", rows[2:12])
            family = socket.AF_INET if kind == 1 else socket.AF_INET6
            addresses.append(socket.inet_ntop(family, rows[12 : 12 + size]))
            rows = rows[12 + size :]
        return data[3] & 15, addresses


class AttackTest(WorldTest):
    """Under --internet, from a guest that is root."""

    argv = ("--internet", "--allow", "mirror.corp")

    def test_places_that_are_refused(self) -> None:
        self.renew()
        own = "the host's own"
        for place, word in (
            ("127.0.0.1:22", "loopback"), ("127.1:22", "loopback"), ("2130706433:22", "loopback"),
            ("0x7f.0.0.1:22", "loopback"), ("0177.0.0.1:22", "loopback"), ("0:22", "unspecified"),
            ("0x7f000001:22", "loopback"), ("017700000001:22", "loopback"), ("[::1]:22", "loopback"),
            ("[::ffff:127.0.0.1]:22", "loopback"), ("[::]:22", "unspecified"),
            ("[0:0:0:0:0:ffff:7f00:1]:22", "loopback"), ("127.0.0.1.:22", "loopback"),
            ("localhost:22", "loopback"), ("LOCALHOST.:22", "loopback"), ("x.localhost:1", "loopback"),
            ("local.example:443", "loopback"), ("meta.example:80", "link-local"),
            ("mapped.example:443", "loopback"), ("sneaky.example:443", "private"),
            ("169.254.169.254:80", "link-local"), ("[fe80::1]:80", "link-local"),
            ("[fe80::1%25lo]:80", "no name"), ("224.0.0.251:5353", "multicast"),
            ("255.255.255.255:9", "reserved"), ("10.1.2.3:443", "private"), ("0xa.1.515:443", "private"),
            ("192.168.5.2:443", "--host-port 443"), ("172.17.0.1:2375", "private"), ("100.64.0.1:1", "private"),
            ("198.18.0.1:1", "benchmark"), ("203.0.113.1:1", "documentation"), ("192.0.2.200:1", "documentation"),
            ("[64:ff9b::7f00:1]:1", "loopback"), ("[2002:7f00:1::]:1", "IPv4 in IPv6"),
            ("[fd00::1]:1", "private"), ("168.63.129.16:80", "cloud"), ("host.lima.internal:22", "--host-port 22"),
            ("mail.example:25", "mail"), (f"{PUBLIC}:25", "mail"), ("mirror.corp:22", "private"),
            ("user@good.example:443", "no name"), ("good.example:443@local.example:443", "HOST:PORT"),
            ("good..example:443", "no name"), (".good.example:443", "no name"), ("good.example:0", "HOST:PORT"),
            ("good.example:99999", "HOST:PORT"), ("good.example", "HOST:PORT"), (":443", "no name"),
            ("good.example:443/x", "HOST:PORT"), ("good.example%00.evil:443", "no name"),
            ("none.example:443", "knows no address"),
        ):  # fmt: skip
            with self.subTest(place):
                self.assertIn(word, self.connect(place))
        self.assertEqual(
            (self.egress.dialled(), own in self.connect(f"{own_address()}:22")), ([], True)
        )

    def test_a_refusal_says_the_rule_the_name_and_the_flag(self) -> None:
        answer = self.egress.ask(b"CONNECT sneaky.example:8443 HTTP/1.0\r\n\r\n").decode()
        head, _, body = answer.partition("\r\n\r\n")
        self.assertTrue(head.startswith("HTTP/1.1 403 refused: sneaky.example:8443 is 10.1.2.3"))
        for word in ("sneaky.example:8443", "private", "--allow sneaky.example:8443"):
            self.assertIn(word, body)

    def test_a_name_that_is_resolved_to_another_address_the_second_time(self) -> None:
        for name, word in (("rebind.example", "loopback"), ("rebind-lan.example", "private")):
            self.egress.tunnel(f"{name}:443").close()
            self.assertIn(word, self.connect(f"{name}:443"))
            self.assertIn(
                word, self.egress.head(f"GET http://{name}/ HTTP/1.1\r\nHost: {name}\r\n\r\n")
            )

    def test_it_connects_to_the_address_that_was_judged(self) -> None:
        self.egress.tunnel("mixed.example:443").close()
        self.assertEqual(self.egress.dialled()[-1], f"{PUBLIC} 443")
        self.egress.tunnel("mirror.corp:80").close()
        self.assertEqual(self.egress.dialled()[-1], f"{MIRROR} 80")

    def test_a_second_request_reaches_nobody(self) -> None:
        """Neither behind a request without a body, nor behind one whose end is counted."""
        evil = b"GET http://mirror.corp/evil HTTP/1.1\r\nHost: mirror.corp\r\n\r\n"
        for head in (
            b"GET http://good.example/one HTTP/1.1\r\nHost: good.example\r\n\r\n",
            b"POST http://good.example/one HTTP/1.1\r\nHost: good.example\r\n"
            b"Content-Length: 4\r\nConnection: content-length, keep-alive\r\n\r\nbody",
        ):
            answer = self.egress.ask(head + evil)
            self.assertEqual(answer.count(b"HTTP/1.1 200 OK"), 1)
            self.assertNotIn(b"evil", answer)
        self.assertEqual(len(self.server.heads), 2)
        self.assertNotIn(b"evil", b"".join(self.server.heads))
        self.assertEqual(self.lan.heads, [])

    def test_requests_that_are_malformed(self) -> None:
        get = "GET http://good.example/ HTTP/1.1\r\n"
        host = get + "Host: good.example\r\n"
        for text, status in (
            (get + "Host: mirror.corp\r\n\r\n", 400), (get + "\r\n", 400),
            (host + "Host: mirror.corp\r\n\r\n", 400), (get + "Host: good.example:81\r\n\r\n", 400),
            (host + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
            (host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
            (host + "Transfer-Encoding: xchunked\r\n\r\n", 411),
            (host + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
            (host + "Content-Length: -1\r\n\r\n", 411), (host + "X: a\n\nGET http://mirror.corp/", 400),
            (host + "X:\ra\r\n\r\n", 400), (host + " X: a\r\n\r\n", 400), (host + "X : a\r\n\r\n", 400),
            (host + "X\0: a\r\n\r\n", 400), (host + "X" * 40_000, 400),
            ("GET http://good.example/ HTTP/1.1 HTTP/1.1\r\n\r\n", 400),
            ("GET http://good.example\\@mirror.corp/ HTTP/1.1\r\nHost: mirror.corp\r\n\r\n", 400),
            ("GET http://good.example@mirror.corp/ HTTP/1.1\r\nHost: mirror.corp\r\n\r\n", 400),
            ("GET ftp://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", 400),
            ("GET https://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: good.example\r\n\r\n", 400), ("\r\n\r\n", 400),
            ("CONNECT good.example:443 HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 400),
            ("CONNECT good.example:443 HTTP/1.1\r\nX: a\nHost: b\r\n\r\n", 400),
            ("\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400),
        ):  # fmt: skip
            with self.subTest(text[:120]):
                self.assertIn(f"HTTP/1.1 {status} ", self.egress.head(text + "\r\n\r\n"))
        self.assertEqual((self.server.heads, self.lan.heads), ([], []))

    def test_a_request_is_rebuilt(self) -> None:
        answer = self.egress.ask(
            b"POST http://Good.Example:80/a?b=http://mirror.corp/ HTTP/1.1\r\nHOST: GOOD.example\r\n"
            b"Proxy-Authorization: Basic eA==\r\nProxy-Connection: Keep-Alive\r\nUpgrade: h2c\r\n"
            b"Connection: X-Drop, upgrade\r\nX-Drop: 1\r\nCookie: c=1\r\nContent-Length: 2\r\n\r\nhi"
        )
        self.assertEqual(
            self.server.heads[0].partition(b"\r\n\r\n")[0].decode().splitlines(),
            ["POST /a?b=http://mirror.corp/ HTTP/1.1", "host: good.example", "cookie: c=1",
             "content-length: 2", "connection: close"],
        )  # fmt: skip
        size = b"Content-Length: %d\r\n" % len(self.server.heads[0])
        cookie, hop = (
            b"Set-Cookie: a=1\r\nKeep-Alive: timeout=9\r\n",
            b"Connection: Keep-Alive, X-Hop\r\n",
        )
        raw = b"HTTP/1.1 200 OK\r\n" + size + cookie + hop + b"X-Hop: 1\r\n\r\n"
        self.assertEqual(answer, raw + self.server.heads[0])

    def test_names(self) -> None:
        """A name that may pass has an address of its own, whatever the host's resolver says."""
        self.renew()
        asked = [query("good.example"), query("six.example", 28), query("good.example", 28)]
        self.assertEqual(sorted(self.look_up(*asked)), [(0, []), (0, []), (0, ["198.18.0.1"])])
        for name, found in (
            ("local.example", (3, [])), ("sneaky.example", (3, [])), ("none.example", (3, [])),
            ("mapped.example", (3, [])), ("mixed.example", (0, ["198.18.0.2"])), ("localhost", (3, [])),
            ("GoOd.ExAmPlE", (0, ["198.18.0.1"])), ("mirror.corp", (0, ["198.18.0.3"])), ("a b", (3, [])),
            ("host.lima.internal", (3, [])),
        ):  # fmt: skip
            with self.subTest(name):
                self.assertEqual(self.look_up(query(name)), [found])
        for kind in (12, 15, 16, 33, 65, 255):
            self.assertEqual(self.look_up(query("good.example", kind)), [(0, [])])

    def test_packets_that_are_no_queries_close_the_connection(self) -> None:
        good = query("good.example")
        for data in (
            b"\0\0", b"\0\5hello", struct.pack(">H", len(good)) + good[:-1] + b"\2",
            struct.pack(">H", len(good)) + b"\0\1\x81\x80" + good[4:],
            b"\0\x20" + good[:12] + b"\xc0\x0c\0\1\0\1" + b"\0" * 14, b"GET / HTTP/1.1\r\n\r\n" * 2000,
        ):  # fmt: skip
            with self.subTest(data[:40]), self.egress.connect(self.egress.dns) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(client), b"")

    def test_an_address_that_was_given_out_counts_as_its_name(self) -> None:
        """As a transparent redirect asks for it; the name is judged and resolved then, anew."""
        self.renew()
        self.assertEqual(self.look_up(query("sneaky.example")), [(3, [])])
        self.assertIn("198.18.0.1:443 is not public", self.connect("198.18.0.1:443"))
        self.assertEqual(self.look_up(query("mirror.corp")), [(0, ["198.18.0.1"])])
        self.egress.tunnel("198.18.0.1:443").close()
        self.assertIn("mirror.corp:22 is 10.1.2.3", self.connect("198.18.0.1:22"))
        self.assertIn("private", self.connect(f"{MIRROR}:443"))
        self.assertIn("198.18.0.2:443 is not public", self.connect("198.18.0.2:443"))
        self.assertEqual(self.look_up(query("rebind.example")), [(0, ["198.18.0.2"])])
        self.assertIn("rebind.example:443 is 127.0.0.1", self.connect("198.18.0.2:443"))
        self.assertEqual(self.egress.dialled(), [f"{MIRROR} 443"])


def own_address() -> str:
    """One that this host has, besides loopback; 127.0.0.1 if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.77", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


class AllowTest(WorldTest):
    """Under --allow, and nothing else."""

    argv = ("--allow", "good.example", "--allow", "*.sub.example", "--allow", "mirror.corp:8443")

    def test_only_what_is_listed(self) -> None:
        self.renew()
        self.egress.tunnel("good.example:443").close()
        self.egress.tunnel("good.example:80").close()
        self.egress.tunnel("mirror.corp:8443").close()
        for place, word in (
            ("good.example:22", "--allow good.example:22"), ("other.example:443", "--allow other.example"),
            (f"{PUBLIC}:443", "not listed"), ("mirror.corp:443", "--allow mirror.corp"),
            ("sub.example:443", "not listed"), ("1.1.1.1:853", "not listed"), ("good.example:25", "listed"),
            ("good.example.evil.example:443", "not listed"), ("127.0.0.1:80", "not public: loopback"),
        ):  # fmt: skip
            with self.subTest(place):
                self.assertIn(word, self.connect(place))

    def test_dns_knows_only_what_is_listed(self) -> None:
        """A name that is not listed is not looked up: that would carry data out."""
        for name, found in (
            ("good.example", (0, ["198.18.0.1"])), ("mirror.corp", (0, ["198.18.0.2"])),
            ("other.example", (3, [])), ("secret-data.evil.example", (3, [])),
        ):  # fmt: skip
            self.assertEqual(self.look_up(query(name)), [found])
        self.egress.tunnel("198.18.0.1:443").close()
        self.assertIn("good.example:22", self.connect("198.18.0.1:22"))
        for address in (PUBLIC, OTHER, "198.18.0.3"):
            self.assertIn("not listed", self.connect(f"{address}:443"))

    def test_what_was_refused_is_said_at_the_end(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            audit = Path(folder, "audit.jsonl")
            argv = (*self.argv, "--audit", str(audit))
            with Egress(*argv, names=NAMES, ports={PUBLIC: self.server.port}, dns=True) as running:
                for _ in range(3):
                    running.head("CONNECT evil.example:443 HTTP/1.1\r\n\r\n")
                self.assertEqual(
                    running.ask(b"CONNECT good.example:443 HTTP/1.1\r\n\r\n" + b"x")[:12],
                    b"HTTP/1.1 200",
                )
                rows = running.end()
            self.assertEqual(
                rows,
                [{"host": "evil.example", "port": 443, "reason": "evil.example:443 is not listed",
                  "flag": "--allow evil.example", "count": 3}],
            )  # fmt: skip
            self.assertEqual(running.status, 0)
            self.assertEqual(stat.S_IMODE(audit.stat().st_mode), 0o600)
            lines = [json.loads(line) for line in audit.read_text().splitlines()]
        self.assertEqual(
            [line["verdict"] for line in lines], ["refused"] * 3 + ["allowed", "closed"]
        )
        self.assertEqual(set(lines[0]), {"time", "host", "port", "verdict", "reason", "bytes"})
        self.assertGreater(lines[-1]["bytes"], 1)

    def test_its_memory_is_bounded(self) -> None:
        with Egress("--allow", "good.example", names=NAMES, MAX_REFUSALS=5) as running:
            for number in range(20):
                running.head(f"CONNECT x{number}.example:443 HTTP/1.1\r\n\r\n")
            rows = running.end()
        self.assertEqual(len(rows), 6)
        self.assertEqual((rows[-1]["host"], rows[-1]["count"]), ("", 15))

    def test_addresses_to_give_out_are_bounded(self) -> None:
        self.egress = Egress("--internet", names=NAMES, dns=True, MAX_STAND_INS=2)
        self.addCleanup(self.egress.stop)
        for name, found in (
            ("good.example", (0, ["198.18.0.1"])), ("mail.example", (0, ["198.18.0.2"])),
            ("six.example", (2, [])), ("good.example", (0, ["198.18.0.1"])),
        ):  # fmt: skip
            self.assertEqual(self.look_up(query(name)), [found])


class NothingTest(unittest.TestCase):
    """The real process without a world: everything is refused, but for a port of the host."""

    def test_by_default_nothing_passes(self) -> None:
        with Egress(real=True, dns=True) as running:
            for place in (
                "good.example:443",
                "1.1.1.1:443",
                "127.0.0.1:80",
                "host.lima.internal:80",
            ):
                self.assertIn(" 403 ", running.head(f"CONNECT {place} HTTP/1.1\r\n\r\n"))
            self.assertEqual(len(running.end()), 4)

    def test_a_port_of_the_host(self) -> None:
        server = Server(echo)
        self.addCleanup(server.close)
        with Egress("--host-port", str(server.port), "--internet", real=True, dns=True) as running:
            for name in ("host.lima.internal", "192.168.5.2"):  # the second: Lima's /etc/hosts
                with running.tunnel(f"{name}:{server.port}") as client:
                    client.sendall(b"hello")
                    self.assertEqual(client.recv(9), b"hello")
            for place in (f"127.0.0.1:{server.port}", f"localhost:{server.port}", f"0:{server.port}",
                          f"[::ffff:127.0.0.1]:{server.port}", "host.lima.internal:1"):  # fmt: skip
                self.assertIn(" 403 ", running.head(f"CONNECT {place} HTTP/1.1\r\n\r\n"))
            data = query("host.lima.internal")
            with running.connect(running.dns) as client:
                client.sendall(struct.pack(">H", len(data)) + data)
                self.assertIn(bytes([192, 168, 5, 2]), client.recv(999))

    def test_a_unix_socket_is_this_users_alone(self) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            path = f"{folder}/s"
            argv = [
                sys.executable,
                str(SCRIPT),
                "--listen",
                f"unix:{path}",
                "--dns",
                f"unix:{path}d",
            ]
            with subprocess.Popen(argv, stdin=-1, stdout=-1, env=BARE, text=True) as process:
                assert process.stdout and process.stdin
                said = [process.stdout.readline().strip() for _ in range(2)]
                self.assertEqual(said, [path, f"{path}d"])
                self.assertEqual(stat.S_IMODE(os.stat(path).st_mode) & 0o077, 0)
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(path)
                    client.sendall(b"CONNECT a.example:1 HTTP/1.0\r\n\r\n")
                    self.assertIn(b" 403 ", read_all(client))
                process.stdin.close()
                self.assertIn("a.example:1", process.stdout.read())

    def test_command_line(self) -> None:
        here = ["--listen", "127.0.0.1:0"]
        for word, argv in (
            ("--listen", []), ("unix:PATH", ["--listen", "0.0.0.0:80"]), ("HOST", [*here, "--allow", "a/b"]),
            ("invalid choice", [*here, "--broker", "x"]), ("invalid int", [*here, "--host-port", "x"]),
        ):  # fmt: skip
            said = io.StringIO()
            with contextlib.redirect_stderr(said), self.assertRaises(SystemExit) as caught:
                egress.build_parser().parse_args(argv)
            self.assertEqual(caught.exception.code, 2)
            self.assertIn(word, said.getvalue())
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "link")
            link.symlink_to(Path(folder, "target"))
            done = subprocess.run([sys.executable, str(SCRIPT), *here, "--audit", str(link)], env=BARE,
                                  text=True, capture_output=True, input="", timeout=TIMEOUT)  # fmt: skip
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertIn("egress: error: ", done.stderr)
            self.assertEqual(os.listdir(folder), ["link"])


class CompanyTest(unittest.TestCase):
    """Behind the host's own proxy, which resolves the names."""

    def test_the_hosts_proxy_is_asked(self) -> None:
        def company(client: socket.socket, first: bytes) -> None:
            if b"good.example" in first:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                echo(client, client.recv(65536))
            else:
                client.sendall(b"HTTP/1.1 407 Authenticate\r\nContent-Length: 0\r\n\r\n")

        proxy, direct = Server(company), Server(web)
        self.addCleanup(proxy.close)
        self.addCleanup(direct.close)
        url = f"http://user:p%40ss@127.0.0.1:{proxy.port}"
        env = {"HTTPS_PROXY": url, "http_proxy": url, "NO_PROXY": ".corp"}
        argv = ("--internet", "--allow", "mirror.corp")
        with Egress(*argv, names=NAMES, ports={MIRROR: direct.port}, env=env, dns=True) as running:
            with running.tunnel("good.example:443") as client:
                client.sendall(b"hello")
                self.assertEqual(client.recv(9), b"hello")
            self.assertIn(
                "502 the host's proxy says 407",
                running.head("CONNECT x.example:443 HTTP/1.1\r\n\r\n"),
            )
            for place in (
                "127.0.0.1:1",
                "10.1.2.3:443",
                "localhost:1",
                "host.lima.internal:1",
                "x.example:25",
            ):
                self.assertIn(" 403 ", running.head(f"CONNECT {place} HTTP/1.1\r\n\r\n"))
            running.tunnel("mirror.corp:443").close()
            running.head("GET http://web.example/x HTTP/1.1\r\nHost: web.example\r\n\r\n")
            # A name that only the proxy resolves, as a transparent redirect asks for it.
            data = query("only.good.example")
            with running.connect(running.dns) as client:
                client.sendall(struct.pack(">H", len(data)) + data)
                self.assertIn(bytes([198, 18, 0, 1]), client.recv(999))
            running.tunnel("198.18.0.1:443").close()
        self.assertIn(b"CONNECT good.example:443 HTTP/1.1", proxy.heads[0])
        self.assertIn(b"proxy-authorization: Basic dXNlcjpwQHNz\r\n", proxy.heads[0])
        self.assertEqual(proxy.heads[-2].split(b"\r\n")[0], b"GET http://web.example/x HTTP/1.1")
        self.assertIn(b"proxy-authorization: Basic", proxy.heads[-2])
        self.assertIn(b"CONNECT only.good.example:443 HTTP/1.1", proxy.heads[-1])

    def test_a_proxy_on_this_host_is_not_led_to_its_loopback(self) -> None:
        """It resolves a name itself; so do we, where we can."""
        proxy = Server(echo)
        self.addCleanup(proxy.close)
        env = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}"}
        with Egress("--internet", names=NAMES, env=env) as running:
            for name, word in (
                ("local.example", "loopback"), ("meta.example", "link-local"),
                ("sneaky.example", "private"), ("mapped.example", "loopback"),
            ):  # fmt: skip
                self.assertIn(word, running.head(f"CONNECT {name}:443 HTTP/1.1\r\n\r\n"))
            self.assertEqual(proxy.heads, [])
            running.head("CONNECT unknown.example:443 HTTP/1.1\r\n\r\n")
            self.assertIn(b"CONNECT unknown.example:443", proxy.heads[0])

    def test_a_wrong_proxy_is_said_at_the_start(self) -> None:
        for url in ("http://proxy:port", "socks5://127.0.0.1:1", "https://p.corp", "http://[::1"):
            with Egress("--internet", env={"HTTPS_PROXY": url}) as running:
                self.assertEqual((running.port, running.process.wait(TIMEOUT)), (0, 1), url)
                self.assertIn("HTTPS_PROXY is not http://", running.stderr())

    def test_a_proxy_for_https_alone(self) -> None:
        direct = Server(web)
        self.addCleanup(direct.close)
        env = {"HTTPS_PROXY": "http://127.0.0.1:9"}
        with Egress("--internet", names=NAMES, ports={PUBLIC: direct.port}, env=env) as running:
            get = "GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n"
            self.assertIn(" 200 OK", running.head(get))
            self.assertIn(" 502 ", running.head("CONNECT good.example:443 HTTP/1.1\r\n\r\n"))


class FaultTest(unittest.TestCase):
    """Each ends in a clear answer or a closed socket."""

    def start(self, story: Any, **constants: Any) -> Egress:
        self.server = Server(story)
        self.addCleanup(self.server.close)
        running = Egress("--internet", names=NAMES, ports={PUBLIC: self.server.port}, **constants)
        self.addCleanup(running.stop)
        return running

    def test_a_half_of_a_tunnel_is_closed(self) -> None:
        """Each way: the other half goes on."""

        def count(client: socket.socket, first: bytes) -> None:
            client.sendall(b"%d" % len(first + read_all(client)))

        running = self.start(count)
        with running.tunnel("good.example:443") as client:
            client.sendall(b"x" * 1_000_000)
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(client), b"1000000")

        got: list[bytes] = []

        def finish(client: socket.socket, first: bytes) -> None:
            client.shutdown(socket.SHUT_WR)
            got.append(first + read_all(client))

        self.server.story = finish
        with running.tunnel("good.example:443") as client:
            client.sendall(b"a")
            self.assertEqual(read_all(client), b"")
            client.sendall(b"b" * 500_000)
            client.shutdown(socket.SHUT_WR)
            wait_for(lambda: got, "the server has all")
        self.assertEqual(got[0], b"a" + b"b" * 500_000)

    def test_a_half_that_is_forgotten(self) -> None:
        """The client has gone for good, and the server neither sends nor ends."""

        def dribble(client: socket.socket, first: bytes) -> None:
            for _ in range(8):
                time.sleep(0.1)
                client.sendall(b"x")
            client.recv(99)
            time.sleep(5)

        running = self.start(dribble, IDLE_SECONDS=0.3)
        before = running.descriptors()
        with running.tunnel("good.example:443") as client:
            client.sendall(b"x")
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(client), b"x" * 8)
        wait_for(lambda: running.descriptors() <= before, "the tunnel has ended")

    def test_clients_that_do_not_read_cost_little(self) -> None:
        def flood(client: socket.socket, first: bytes) -> None:
            with contextlib.suppress(OSError):
                while True:
                    client.sendall(bytes(65536))

        running = self.start(flood)
        before = running.memory()
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(running.tunnel("good.example:443")).sendall(b"x")
            time.sleep(1)
            self.assertLess(running.memory() - before, 40)

    def test_data_that_comes_with_the_request(self) -> None:
        running = self.start(echo)
        with running.connect() as client:
            client.sendall(b"CONNECT good.example:1 HTTP/1.1\r\n\r\nearly")
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(client), b"HTTP/1.1 200 OK\r\n\r\nearly")

    def test_a_big_download_and_a_slow_reader(self) -> None:
        size = 30_000_000

        def download(client: socket.socket, first: bytes) -> None:
            client.sendall(b"z" * size)

        running = self.start(download)
        with running.tunnel("good.example:443") as client:
            client.sendall(b"go")
            time.sleep(0.2)
            self.assertEqual(len(read_all(client)), size)

    def test_an_upstream_that_resets(self) -> None:
        def reset(client: socket.socket, first: bytes) -> None:
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\nhalf" if b"GET" in first else b"half")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        running = self.start(reset)
        with running.tunnel("good.example:443") as client:
            client.sendall(b"x")
            with self.assertRaises(ConnectionResetError):
                while client.recv(99):
                    pass
        self.server.story = lambda client, first: None
        get = "GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n"
        self.assertIn("HTTP/1.1 502 ", running.head(get))
        running.tunnel("good.example:443").close()

    def test_an_upstream_that_stalls(self) -> None:
        """Before it has answered that is said; in the middle of an answer it is broken off."""

        def stall(client: socket.socket, first: bytes) -> None:
            client.sendall(self.answer)
            time.sleep(2)

        get = "GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n"
        running = self.start(stall, IDLE_SECONDS=0.3)
        self.assertIn("HTTP/1.1 504 ", running.head(get))
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
        with running.connect() as client:
            client.sendall(get.encode())
            with self.assertRaises(ConnectionResetError):
                while client.recv(99):
                    pass

    def test_an_answer_passes_byte_for_byte(self) -> None:
        """Whatever it is, to the end of the connection."""
        get = b"GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n"
        running = self.start(lambda client, first: client.sendall(self.answer))
        for answer in (
            b"SSH-2.0-x\r\n",
            b"HTTP/1.1 103 E\r\n\r\nHTTP/1.1 204 No\r\n\r\n",
            b"x" * 500_000,
        ):
            self.answer = answer
            self.assertEqual(running.ask(get), answer)

    def test_an_upstream_that_dribbles(self) -> None:
        def dribble(client: socket.socket, first: bytes) -> None:
            for byte in b"HTTP/1.1 200 OK\r\n\r\nslow":
                client.sendall(bytes([byte]))
                time.sleep(0.02)

        running = self.start(dribble, IDLE_SECONDS=0.3)
        get = b"GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n"
        self.assertEqual(running.ask(get), b"HTTP/1.1 200 OK\r\n\r\nslow")

    def test_a_client_that_has_ended_its_way(self) -> None:
        """It has its answer; half a body has none."""
        running = self.start(web)
        post = (
            b"POST http://good.example/ HTTP/1.1\r\nHost: good.example\r\nContent-Length: 4\r\n\r\n"
        )
        for body, status in ((b"body", b" 200 "), (b"bo", b" 400 ")):
            with running.connect() as client:
                client.sendall(post + body)
                client.shutdown(socket.SHUT_WR)
                self.assertIn(status, read_all(client))

    def test_a_refusal_can_be_read_behind_a_big_body(self) -> None:
        running = self.start(web)
        with running.connect() as client:
            client.sendall(
                b"POST http://local.example/ HTTP/1.1\r\nHost: local.example\r\n"
                b"Content-Length: 9000000\r\n\r\n" + bytes(9_000_000)
            )
            client.shutdown(socket.SHUT_WR)
            self.assertIn(b"HTTP/1.1 403 refused", read_all(client))

    answer = b""

    def test_slow_loris(self) -> None:
        running = self.start(echo, SECONDS=0.3)
        with running.connect() as silent, running.connect() as slow:
            for byte in b"CONNECT good.example:443":
                slow.sendall(bytes([byte]))
                time.sleep(0.01)
            self.assertIn(b" 408 ", read_all(slow))
            self.assertIn(b" 408 ", read_all(silent))

    def test_connections_are_bounded(self) -> None:
        running = self.start(echo, MAX_CLIENTS=3)
        tunnels = [running.tunnel("good.example:443") for _ in range(3)]
        with running.connect() as client:
            self.assertEqual(read_all(client), b"")
        for tunnel in tunnels:
            tunnel.close()
        self.wait_until_free(running)
        running.tunnel("good.example:443").close()

    def wait_until_free(self, running: Egress) -> None:
        """No more descriptors than at the start: two of epoll, and so on."""
        wait_for(lambda: running.descriptors() <= 12, "no connection is left")

    def test_stdin_closes_in_the_middle_of_a_tunnel(self) -> None:
        for end in ("stdin", signal.SIGTERM, signal.SIGINT):
            running = self.start(echo)
            with running.tunnel("good.example:443") as client:
                client.sendall(b"x")
                self.assertEqual(client.recv(1), b"x")
                if isinstance(end, signal.Signals):
                    running.process.send_signal(end)
                began = time.monotonic()
                self.assertEqual(running.end(), [])
                self.assertEqual(read_all(client), b"")
            self.assertEqual(running.status, 0)
            self.assertLess(time.monotonic() - began, 3)
            with self.assertRaises(ConnectionRefusedError):
                running.connect()

    def test_nothing_is_left_of_many_connections(self) -> None:
        """Of each kind: served, refused, broken off by the client at any point."""
        running = self.start(
            lambda client, first: (web if b"GET" in first else echo)(client, first)
        )
        before = running.descriptors()

        failed: list[BaseException] = []

        def work(number: int) -> None:
            try:
                some(number)
            except BaseException as error:
                failed.append(error)

        def some(number: int) -> None:
            for turn in range(60):
                kind = (turn + number) % 5
                if kind == 0:
                    with running.tunnel("good.example:443") as client:
                        client.sendall(b"x" * 1000)
                        client.recv(1)
                elif kind == 1:
                    running.head("CONNECT local.example:443 HTTP/1.1\r\n\r\n")
                elif kind == 2:
                    running.head("GET http://good.example/ HTTP/1.0\r\n\r\n")
                else:
                    with running.connect() as client:
                        client.sendall(b"CONNECT good.example:443 HTTP/1.1\r\n\r\n"[: kind * 12])

        threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failed, [])
        wait_for(lambda: running.descriptors() <= before, "no connection is left")


if __name__ == "__main__":
    unittest.main()
