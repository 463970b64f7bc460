"""What the VM's way out lets pass: pure tables of cases. Each refused one states a word of why."""

from __future__ import annotations

import argparse
import os
import re
import struct
import unittest
from typing import Any
from unittest import mock

from lima import egress

FAST = True

PUBLIC, PUBLIC6 = "93.184.216.34", "2606:2800:220:1::1"
INTERNET = egress.Permissions(internet=True)


def allow(*words: str, internet: bool = False) -> egress.Permissions:
    rows = tuple(row for word in words for row in egress.allowed(word))
    return egress.Permissions(internet, rows)


class DecideTest(unittest.TestCase):
    def verdict(self, permissions: egress.Permissions, place: str, *found: str) -> Any:
        name, port = egress.host_and_port(place)
        return egress.decide(permissions, name, port, found or None)

    def test_what_passes(self) -> None:
        mirror = allow("mirror.corp", "*.example.org", "db.corp:5432", "10.1.2.3", "[fd00::7]:8080")
        for permissions, place, *found in (
            (INTERNET, "a.example:443", PUBLIC),
            (INTERNET, "a.example:22", PUBLIC),
            (INTERNET, "a.example:65535", PUBLIC6),
            (INTERNET, f"{PUBLIC}:443", PUBLIC),
            (INTERNET, f"[{PUBLIC6}]:443", PUBLIC6),
            (mirror, "mirror.corp:443", "10.9.9.9"),
            (mirror, "mirror.corp:80", "100.64.1.1"),
            (mirror, "MIRROR.corp.:80", "203.0.113.9"),
            (mirror, "a.example.org:443", PUBLIC),
            (mirror, "a.b.example.org:443", "fd12::1"),
            (mirror, "db.corp:5432", "192.168.1.1"),
            (mirror, "10.1.2.3:443", "10.1.2.3"),
            (mirror, "0x0a.1.2.3:443", "10.1.2.3"),
            (mirror, "[fd00:0::7]:8080", "fd00::7"),
            (allow("mail.corp:25", internet=True), "mail.corp:25", "10.0.0.9"),
            (allow("mirror.corp", internet=True), "mirror.corp:443", "10.0.0.9"),
            (allow("github"), "codeload.github.com:443", PUBLIC),
            (allow("docker"), "registry-1.docker.io:443", PUBLIC),
        ):
            with self.subTest(place, found=found):
                self.assertEqual(self.verdict(permissions, place, *found), tuple(found))

    def test_what_is_refused_by_its_name(self) -> None:
        listed = allow("example.org", "*.example.net", "db.corp:5432", "1.2.3.4")
        for permissions, place, word, flag in (
            (egress.Permissions(), "example.org:443", "not listed", "--allow example.org"),
            (egress.Permissions(), f"{PUBLIC}:443", "not listed", f"--allow {PUBLIC}"),
            (listed, "evil.example:443", "not listed", "--allow evil.example"),
            (listed, "example.org:22", "not listed", "--allow example.org:22"),
            (listed, "example.org:8080", "not listed", "--allow example.org:8080"),
            (listed, "www.example.org:443", "not listed", "--allow www.example.org"),
            (listed, "evilexample.org:443", "not listed", "--allow evilexample.org"),
            (listed, "example.org.evil.example:443", "not listed", "--allow example.org.evil"),
            (listed, "example.net:443", "not listed", "--allow example.net"),
            (listed, "evilexample.net:443", "not listed", "--allow evilexample.net"),
            (listed, "db.corp:443", "not listed", "--allow db.corp"),
            (listed, "[fd00::1]:8443", "not listed", "--allow [fd00::1]:8443"),
            (INTERNET, "mail.example:25", "mail", "--allow mail.example:25"),
            (INTERNET, f"{PUBLIC}:25", "mail", f"--allow {PUBLIC}:25"),
            (INTERNET, "localhost:80", "loopback", ""),
            (INTERNET, "a.localhost:80", "loopback", ""),
            (allow("localhost"), "LOCALHOST.:80", "loopback", ""),
            (INTERNET, "host.lima.internal:80", "not opened", "--host-port 80"),
            (allow("host.lima.internal"), "host.lima.internal:80", "not opened", "--host-port 80"),
        ):
            with self.subTest(place):
                for found in ((), (PUBLIC,)):
                    refused = self.verdict(permissions, place, *found)
                    self.assertIsInstance(refused, egress.Refused)
                    self.assertIn(word, refused.reason)
                    self.assertTrue(
                        refused.flag.startswith(flag) and bool(refused.flag) == bool(flag)
                    )

    def test_addresses_that_are_never_reached(self) -> None:
        """Whatever is listed: the name, and the address itself."""
        for address, word in (
            ("127.0.0.1", "loopback"), ("127.255.255.254", "loopback"), ("::1", "loopback"),
            ("::ffff:127.0.0.1", "loopback"), ("64:ff9b::127.0.0.1", "loopback"),
            ("::7f00:1", "loopback"), ("169.254.169.254", "link-local"), ("fe80::1", "link-local"),
            ("::ffff:169.254.169.254", "link-local"), ("fe80::1%eth0", "link-local"),
            ("224.0.0.1", "multicast"), ("239.255.255.250", "multicast"), ("ff02::1", "multicast"),
            ("0.0.0.0", "unspecified"), ("0.1.2.3", "unspecified"), ("::", "unspecified"),
            ("::ffff:0.0.0.0", "unspecified"), ("255.255.255.255", "reserved"),
            ("240.0.0.1", "reserved"), ("168.63.129.16", "cloud"), ("fd00:ec2::254", "cloud"),
        ):  # fmt: skip
            literal = f"[{address.partition('%')[0]}]:80" if ":" in address else f"{address}:80"
            literals = allow("a.example", literal, internet=True)
            for place in ("a.example:80", literal):
                with self.subTest(address, place=place):
                    refused = self.verdict(literals, place, address)
                    self.assertIsInstance(refused, egress.Refused)
                    self.assertIn(word, refused.reason)
                    self.assertEqual(refused.flag, "")

    def test_addresses_that_a_name_has_to_be_listed_for(self) -> None:
        for address, word in (
            ("10.0.0.1", "private"), ("172.16.0.1", "private"), ("172.31.255.255", "private"),
            ("192.168.5.2", "private"), ("fd00::1", "private"), ("fec0::1", "private"),
            ("100.64.0.1", "private"), ("100.127.255.255", "private"), ("198.18.0.1", "benchmark"),
            ("198.19.255.255", "benchmark"), ("2001:2::1", "benchmark"), ("192.0.2.1", "documentation"),
            ("198.51.100.1", "documentation"), ("203.0.113.7", "documentation"), ("2001:db8::1", "documentation"),
            ("::ffff:93.184.216.34", "IPv4 in IPv6"), ("64:ff9b::808:808", "IPv4 in IPv6"),
            ("::ffff:10.0.0.1", "private"), ("64:ff9b:1::1", "IPv4 in IPv6"),
            ("2002:5db8:d822::1", "IPv4 in IPv6"), ("2001:0:1::1", "IPv4 in IPv6"),
            ("192.0.0.8", "protocol"), ("192.88.99.1", "protocol"), ("3fff::1", "protocol"),
            ("100::1", "not assigned"), ("5f00::1", "not assigned"), ("4000::1", "not assigned"),
        ):  # fmt: skip
            with self.subTest(address):
                refused = self.verdict(INTERNET, "a.example:443", address)
                self.assertIn(word, refused.reason)
                self.assertIn(address, refused.reason)
                self.assertEqual(refused.flag, "--allow a.example")
                listed = allow("a.example", internet=True)
                self.assertEqual(self.verdict(listed, "a.example:443", address), (address,))

    def test_addresses_beside_those(self) -> None:
        for address in (
            "126.255.255.255", "128.0.0.1", "9.255.255.255", "11.0.0.1", "172.15.255.255",
            "172.32.0.1", "192.167.255.255", "192.169.0.1", "100.63.255.255", "100.128.0.1",
            "169.253.255.255", "169.255.0.1", "223.255.255.255", "1.0.0.1", "2a00::1", "2001:200::1",
        ):  # fmt: skip
            with self.subTest(address):
                found = self.verdict(INTERNET, "a.example:443", address)
                self.assertEqual(found, (address,))

    def test_of_several_addresses_those_that_are_refused_are_left_out(self) -> None:
        found = self.verdict(INTERNET, "a.example:443", "10.0.0.1", PUBLIC, "127.0.0.1", PUBLIC6)
        self.assertEqual(found, (PUBLIC, PUBLIC6))

    def test_the_hosts_own_addresses(self) -> None:
        for name in ("a.example", PUBLIC):
            permissions = allow("a.example", PUBLIC, internet=True)
            refused = egress.decide(permissions, name, 443, (PUBLIC,), (PUBLIC,))
            assert isinstance(refused, egress.Refused)
            self.assertIn("the host's own", refused.reason)
            self.assertEqual(refused.flag, "")

    def test_ports_of_the_host(self) -> None:
        opened = egress.Permissions(host_ports=frozenset([8080]))
        loopback = ("127.0.0.1", "::1")
        self.assertEqual(self.verdict(opened, "host.lima.internal:8080"), loopback)
        self.assertEqual(self.verdict(opened, "Host.Lima.Internal.:8080"), loopback)
        for place, word in (
            ("host.lima.internal:8081", "not opened"),
            ("127.0.0.1:8080", "loopback"),
            ("localhost:8080", "loopback"),
            ("x.host.lima.internal:8080", "not listed"),
            ("a.example:8080", "not listed"),
        ):
            self.assertIn(word, self.verdict(opened, place, "127.0.0.1").reason)

    def test_a_name_that_has_no_port_yet(self) -> None:
        """In DNS."""
        for permissions, name, passes in (
            (allow("a.example:5432"), "a.example", True), (allow("a.example"), "b.example", False),
            (INTERNET, "b.example", True), (egress.Permissions(), "host.lima.internal", False),
        ):  # fmt: skip
            verdict = egress.decide(permissions, name, egress.ANY_PORT, None)
            self.assertEqual(not isinstance(verdict, egress.Refused), passes)


class SpellingTest(unittest.TestCase):
    def test_one_normal_form(self) -> None:
        for text, normal in (
            ("Example.ORG", "example.org"), ("example.org.", "example.org"), ("a_b.c", "a_b.c"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"), ("127.1", "127.0.0.1"),
            ("2130706433", "127.0.0.1"), ("0x7f000001", "127.0.0.1"), ("0X7F.1", "127.0.0.1"),
            ("0177.0.0.1", "127.0.0.1"), ("017700000001", "127.0.0.1"), ("127.0.0.1.", "127.0.0.1"),
            ("0", "0.0.0.0"), ("10.65793", "10.1.1.1"), ("[::1]", "::1"), ("[0:0::0:1]", "::1"),
            ("[FE80::A]", "fe80::a"), ("[2606:2800:0220::1]", "2606:2800:220::1"),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(egress.normal_host(text), normal)

    def test_what_has_none(self) -> None:
        for text in (
            "", ".", "..", "a..b", ".a", "a.b..", "-a.b", "a-.b", "a b", "a/b", "a@b", "a%b", "a\\b",
            "a\n", "a\0b", "bücher.example", "１２７.0.0.1", "a" * 64, "a." * 127 + "aa", "1.2.3.4.5",
            "256.1.1.1", "1.2.3.4x.0x", "0x", "a.1", "08.1.1.1", "4294967296", "1.2.3.-4",
            "[fe80::1%eth0]", "[fe80::1%25eth0]", "[::1", "::1]", "::1", "[]", "[127.0.0.1]",
            "[::1]]", "[::ffff:127.0.0.01x]", "*.a", "*",
        ):  # fmt: skip
            with self.subTest(text), self.assertRaises(egress.Failure):
                egress.normal_host(text)

    def test_host_and_port(self) -> None:
        self.assertEqual(egress.host_and_port("[::1]:80"), ("::1", 80))
        self.assertEqual(egress.host_and_port("a:65535"), ("a", 65535))
        self.assertEqual(egress.host_and_port("a", 80), ("a", 80))
        for text in (
            "a", "a:", "a:0", "a:65536", "a:080", "a:+80", "a:８０", "a:80:80", ":80", "::1:80", "a:8 0",
            "[::1]80", "a:80\n", "u@a:80", "a,b:80",
        ):  # fmt: skip
            with self.subTest(text), self.assertRaises(egress.Failure):
                egress.host_and_port(text)

    def test_the_flag_allow(self) -> None:
        self.assertEqual(egress.allowed("bücher.example")[0][0], "xn--bcher-kva.example")
        self.assertEqual(egress.allowed("*.A.b:8080"), [("*.a.b", frozenset([8080]))])
        for name, words in egress.PRESETS.items():
            self.assertEqual([row[0] for row in egress.allowed(name)], words.split())
        for value in ("", "*", "*.", "a/b", "http://a", "*.1.2.3.4", "a:0", "a.*", "a:x", "[::1"):
            with self.subTest(value), self.assertRaises(argparse.ArgumentTypeError):
                egress.allowed(value)


class HeadTest(unittest.TestCase):
    def test_requests(self) -> None:
        for text, wanted in (
            ("CONNECT A.example:443 HTTP/1.0", ("CONNECT", "a.example", 443, "")),
            ("CONNECT [::1]:443 HTTP/1.1\r\nHost: x", ("CONNECT", "::1", 443, "")),
            ("GET http://a.example HTTP/1.1\r\nHost: a.example", ("GET", "a.example", 80, "/")),
            (
                "GET HTTP://a.example?x HTTP/1.1\r\nHost: A.example:80",
                ("GET", "a.example", 80, "/?x"),
            ),
            ("GET http://a:81/x//y HTTP/1.1\r\nhost:\ta:81 ", ("GET", "a", 81, "/x//y")),
            ("GET http://0x7f.1/ HTTP/1.1\r\nHost: 127.0.0.1", ("GET", "127.0.0.1", 80, "/")),
            ("GET http://a/ HTTP/1.0", ("GET", "a", 80, "/")),
        ):
            with self.subTest(text):
                data = text.encode() + b"\r\n\r\n"
                self.assertEqual(egress.parse_request(data, True)[:4], wanted)

    def test_requests_that_two_readers_could_read_in_two_ways(self) -> None:
        get = "GET http://a/ HTTP/1.1\r\nHost: a\r\n"
        for text, word in (
            (get + "Host: b", "host is given twice"), (get + "Content-Length: 1\r\nContent-Length: 1",
            "twice"), (get + "Content-Length: 1\r\nTransfer-Encoding: chunked", "Content-Length"),
            (get + "Transfer-Encoding: gzip, chunked", "Content-Length"),
            (get + "Transfer-Encoding : chunked", "malformed"), (get + "Content-Length: +1", "Content-L"),
            (get + "Content-Length: 1, 1", "Content-L"), (get + "Content-Length: 0x1", "Content-L"),
            (get + "Content-Length: \xb2", "Content-L"), (get + "X: a\r\n folded", "malformed"),
            (get + "X: a\nY: b", "malformed"), (get + "X: a\rY: b", "malformed"),
            (get + "X: \0", "malformed"), (get + "no colon", "malformed"), (get + ": x", "malformed"),
            ("GET http://a/ HTTP/1.1\r\nHost: b", "Host"), ("GET http://a/ HTTP/1.1", "Host"),
            ("GET http://a:81/ HTTP/1.1\r\nHost: a", "Host"), ("GET / HTTP/1.1\r\nHost: a", "proxy"),
            ("GET http://u@a/ HTTP/1.1\r\nHost: a", "proxy"), ("GET https://a/ HTTP/1.1\r\nHost: a",
            "proxy"), ("GET http://a#b/ HTTP/1.1\r\nHost: a", "proxy"),
            ("GET http://a\\@b/ HTTP/1.1\r\nHost: a", "proxy"), ("GET http:///x HTTP/1.1\r\nHost: a",
            "proxy"), ("GET  http://a/ HTTP/1.1\r\nHost: a", "malformed"),
            ("GET http://a/ HTTP/2.0\r\nHost: a", "malformed"), ("get http://a/ HTTP/1.1", "malformed"),
            ("GET http://a/ x HTTP/1.1\r\nHost: a", "malformed"), ("HTTP/1.1 200 OK", "malformed"),
            ("GET http://a/\x01 HTTP/1.1", "malformed"), ("CONNECT a HTTP/1.1", "HOST:PORT"),
            ("CONNECT http://a:80/ HTTP/1.1", "HOST:PORT"), ("CONNECT u@a:80 HTTP/1.1", "name"),
            ("CONNECT a:80 HTTP/1.1\r\nContent-Length: 4", "proxy"), ("", "malformed"),
            ("CONNECT a:80 HTTP/1.1\r\nTransfer-Encoding: chunked", "Content-Length"),
        ):  # fmt: skip
            with self.subTest(text), self.assertRaisesRegex(egress.Failure, re.escape(word)):
                egress.parse_request(text.encode("latin-1") + b"\r\n\r\n", True)

    def test_what_is_for_one_hop_is_dropped(self) -> None:
        headers = [("connection", "X-A, close"), ("x-a", "1"), ("te", "x"), ("upgrade", "h2c"),
                   ("keep-alive", "1"), ("set-cookie", "a"), ("set-cookie", "b"),
                   ("proxy-connection", "close"), ("content-length", "1")]  # fmt: skip
        request = egress.parse_request(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", True)
        kept = b"set-cookie: a\r\nset-cookie: b\r\ncontent-length: 1\r\nconnection: close\r\n\r\n"
        first = b"GET /x HTTP/1.1\r\nhost: a\r\n"
        sent = request._replace(headers=headers)
        self.assertEqual(egress.head_of(sent, "/x", "a"), first + kept)
        named = [("connection", "content-length"), ("content-length", "1"), ("host", "b")]
        kept = b"more: 1\r\ncontent-length: 1\r\nconnection: close\r\n\r\n"
        sent = request._replace(headers=named)
        self.assertEqual(egress.head_of(sent, "/x", "a", "more: 1\r\n"), first + kept)


def query(name: str, kind: int = 1, tail: bytes = b"", **fields: Any) -> bytes:
    head = {"flags": 0x0100, "questions": 1, "answers": 0, "authorities": 0, "more": 0, **fields}
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".") if part)
    packed = struct.pack(">6H", 7, *head.values())
    return packed + labels + struct.pack(">BHH", 0, kind, fields.get("class_", 1)) + tail


class QueryTest(unittest.TestCase):
    def test_queries(self) -> None:
        self.assertEqual(egress.parse_query(query("a.Example", 28)), ("a.Example", 28, 27))
        self.assertEqual(egress.parse_query(query(""))[0], "")
        opt = b"\0\0\x29\x10\0\0\0\0\0\0\0"
        self.assertEqual(egress.parse_query(query("a", tail=opt, more=1))[0], "a")

    def test_what_is_no_query(self) -> None:
        good = query("a.example")
        for data in (
            b"", good[:11], good[:12], good[:-1], good[:-5], query("a", flags=0x8100),
            query("a", flags=0x2800), query("a", questions=0), query("a", questions=2),
            query("a", answers=1), query("a", authorities=1), query("a", more=2),
            good[:12] + b"\xc0\x0c" + good[-4:], good[:12] + b"\x03a.b\0" + good[-4:],
            good[:-2] + b"\0\3", good[:12] + b"\x3fabc",
        ):  # fmt: skip
            with self.subTest(data), self.assertRaises(egress.Failure):
                egress.parse_query(data)

    def test_answers(self) -> None:
        asked = query("a", 1, tail=b"\0\0\x29\x10\0\0\0\0\0\0\0", more=1)
        answer = egress.answer_to(asked, egress.parse_query(asked)[2], 0, PUBLIC)
        self.assertEqual(struct.unpack(">H", answer[:2])[0], len(answer) - 2)
        self.assertEqual(answer[2:14], b"\0\7\x81\x80\0\1\0\1\0\0\0\0")
        self.assertIn(b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\x5d\xb8\xd8\x22", answer)
        self.assertEqual(egress.answer_to(asked, 19, 0, "")[4:14], b"\x81\x80\0\1\0\0\0\0\0\0")
        refused = egress.answer_to(asked, 19, 3, "")
        self.assertEqual(refused[4:6], b"\x81\x83")


class ProxyTest(unittest.TestCase):
    def test_the_hosts_proxy(self) -> None:
        for url, found in (
            ("http://p.corp:3128", ("p.corp", 3128, "")),
            ("p.corp", ("p.corp", 80, "")),
            ("", None),
            ("http://u:p%40@p.corp:1/", ("p.corp", 1, "proxy-authorization: Basic dTpwQA==\r\n")),
        ):
            self.assertEqual(egress.parse_proxy(url), found)
        for url in ("socks5://p:1", "https://p.corp", "http://"):
            with self.assertRaises(egress.Failure):
                egress.parse_proxy(url)

    def test_what_is_reached_without_it(self) -> None:
        """The rules are urllib's, as those of the other scripts are."""
        direct = ".corp, a.example,b.example:8443,10.1.1.1"
        env = {"HTTPS_PROXY": "http://p.corp:1", "NO_PROXY": direct}
        for name, port, url in (
            ("x.corp", 443, ""), ("corp", 443, ""), ("xcorp", 443, "http://p.corp:1"),
            ("a.example", 1, ""), ("x.a.example", 1, ""), ("b.example", 8443, ""),
            ("b.example", 443, "http://p.corp:1"), ("10.1.1.1", 443, ""), ("::1", 443, ""),
            ("10.1.1.2", 443, "http://p.corp:1"), ("host.lima.internal", 443, ""),
            ("127.0.0.1", 80, ""), ("localhost", 80, ""), ("2606::1", 443, "http://p.corp:1"),
        ):  # fmt: skip
            with self.subTest(name, port=port), mock.patch.dict(os.environ, env, clear=True):
                side = egress.Side(INTERNET, -1, None)
                wanted = ("p.corp", 1, "") if url else None
                self.assertEqual(side.proxy_for("https", name, port), wanted)
                self.assertIsNone(side.proxy_for("http", name, port))
        for env in ({}, {"NO_PROXY": "*", "HTTPS_PROXY": "http://p"}, {"HTTPS_PROXY": ""}):
            with mock.patch.dict(os.environ, env, clear=True):
                side = egress.Side(INTERNET, -1, None)
                self.assertIsNone(side.proxy_for("https", "a.example", 443))


if __name__ == "__main__":
    unittest.main()
