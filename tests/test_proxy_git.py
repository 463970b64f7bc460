"""git through the GitHub proxy: real git on both sides, `git http-backend` in GitHub's place."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading
import time
import unittest
from functools import partial
from pathlib import Path
from typing import Any

import github_mcp_proxy as proxy
from tests.fakes import mcp_upstream
from tests.fakes.git_server import GitServer
from tests.support import ROOT
from tests.support import wait_for
from tests.test_proxy_http import BARE
from tests.test_proxy_http import SECRET
from tests.test_proxy_http import TOKEN
from tests.test_proxy_http import Client
from tests.test_proxy_http import Proxy
from tests.test_proxy_http import call

SCOPE = proxy.Scope("good", "r")
POLICY = proxy.Policy(default_branch="main")
BOUNDS = proxy.Bounds(SCOPE, POLICY)
ZERO, ONE, TWO = "0" * 40, "1" * 40, "2" * 40


class PushTest(unittest.TestCase):
    """What a push says, without a socket."""

    def lines(self, *lines: str, caps: str = "report-status side-band-64k") -> bytes:
        first = lines[0].encode() + b"\0" + caps.encode()
        return b"".join(map(proxy.pkt, [first, *(line.encode() for line in lines[1:])])) + b"0000"

    def test_commands(self) -> None:
        data = self.lines(f"{ZERO} {ONE} refs/heads/a", f"{ONE} {TWO} refs/heads/b c")
        caps = "report-status side-band-64k"
        commands = (
            proxy.Command(ZERO, ONE, "refs/heads/a"),
            proxy.Command(ONE, TWO, "refs/heads/b c"),
        )
        whole = data + b"PACK...."
        self.assertEqual(
            proxy.parse_push(whole), proxy.Push(whole, commands, caps, pack=b"PACK....")
        )
        for at in range(len(data)):
            with self.subTest(at), self.assertRaises(proxy.Refusal):
                proxy.parse_push(data[:at])
        shallow = proxy.pkt(f"shallow {ONE}".encode()) + data
        line = proxy.pkt(f"shallow {ONE}".encode())
        self.assertEqual(proxy.parse_push(shallow), proxy.Push(shallow, commands, caps, line))
        self.assertEqual(proxy.parse_push(b"0000"), proxy.Push(b"0000"))

    def test_tags_alone_are_left_out(self) -> None:
        tag, fix = f"{ZERO} {ONE} refs/tags/v1", f"{ONE} {TWO} refs/heads/fix"
        line = proxy.pkt(f"shallow {ONE}".encode())
        refused = {"refs/tags/v1": "only branches"}
        for both in ((tag, fix), (fix, tag)):
            push = proxy.parse_push(line + self.lines(*both) + b"PACK....")
            left = proxy.without_tags(push, refused)
            self.assertEqual(left.begun, line + self.lines(fix) + b"PACK....")
            again = proxy.parse_push(left.begun)
            self.assertEqual(left, again._replace(left_out=refused))
        rows: list[tuple[tuple[str, ...], str, dict[str, str]]] = [
            ((tag, fix), "atomic report-status", refused),
            ((tag, fix), "report-status", {**refused, "refs/heads/fix": "no"}),
            ((fix,), "report-status", {"refs/heads/fix": "no"}),
            ((tag,), "report-status", refused),
            ((fix,), "report-status", {}),
        ]
        for lines, caps, no in rows:
            push = proxy.parse_push(self.lines(*lines, caps=caps))
            self.assertEqual(proxy.without_tags(push, no), push)

    def test_a_line_is_no_longer_than_its_length_can_say(self) -> None:
        with self.assertRaises(proxy.Refusal):
            proxy.pkt(b"x" * 65_517)

    def test_what_is_no_push(self) -> None:
        for data in (b"PACKxxxx", proxy.pkt(f"{ZERO} {ONE} refs/heads/".encode() + b"\xff"), b"0001", b"0004", b"00zz", proxy.pkt(b"push-cert\0caps"), proxy.pkt(b"x y"),
                     proxy.pkt(f"{ZERO} {ONE[1:]} refs/heads/a".encode()), proxy.pkt(f"{ZERO} {ONE}".encode())):  # fmt: skip
            with self.subTest(data), self.assertRaises(proxy.Refusal):
                proxy.parse_push(data)

    def test_what_may_be_pushed(self) -> None:
        agents = POLICY._replace(branches=("agent/*",))
        for policy, new, ref, why in (
            (POLICY, ONE, "refs/heads/fix", ""),
            (POLICY, ONE, "refs/heads/a/b", ""),
            (POLICY, ONE, "refs/heads/main", "default branch"),
            (POLICY, ONE, "refs/heads/MAIN", "default branch"),
            (POLICY, ONE, "refs/heads/learnt", "default branch"),
            (POLICY, ZERO, "refs/heads/fix", "not deleted"),
            (POLICY, ZERO, "refs/heads/mine", ""),
            (POLICY, ZERO, "refs/heads/main", "not deleted"),
            (POLICY, ONE, "refs/heads/v1", "v1 is a tag"),
            (POLICY, ONE, "refs/heads/v1.x", ""),
            (POLICY, ONE, "refs/tags/v1", "only branches"),
            (POLICY, ONE, "refs/pull/1/head", "only branches"),
            (POLICY, ONE, "HEAD", "only branches"),
            (POLICY, ONE, "main", "only branches"),
            (POLICY, ONE, "refs/heads/", "only branches"),
            (POLICY, ONE, "x/refs/heads/a", "only branches"),
            (POLICY, ONE, "refs/heads/refs/heads/main", "plain name"),
            (POLICY, ONE, "refs/heads/a..b", "as git allows"),
            (POLICY, ONE, "refs/heads/fix/#12-it's-(100%)&more", ""),
            (POLICY, ONE, "refs/heads/$(id)", "as git allows"),
            (POLICY, ONE, "refs/heads/a`id`", "as git allows"),
            (POLICY, ONE, "refs/heads/a\x00", "as git allows"),
            (agents, ONE, "refs/heads/fix", "matching agent/*"),
            (agents, ONE, "refs/heads/agent/x", ""),
            (POLICY._replace(allow=frozenset(["default-branch"])), ONE, "refs/heads/main", ""),
            (POLICY._replace(writes_per_hour=0), ONE, "refs/heads/fix", "too many writes"),
        ):
            with self.subTest(ref, policy=policy):
                bounds = proxy.Bounds(SCOPE, policy, defaults=frozenset(["learnt"]),
                                      tags=frozenset(["v1"]), made=frozenset(["refs/heads/mine"]))  # fmt: skip
                refused = proxy.judge_push(bounds, [proxy.Command(ZERO, new, ref)])
                self.assertEqual(list(refused), [ref] if why else [])
                self.assertIn(why, refused.get(ref, ""))
        unknown = proxy.Bounds(SCOPE, proxy.Policy())
        refused = proxy.judge_push(unknown, [proxy.Command(ZERO, ONE, "refs/heads/fix")])
        self.assertIn("did not tell", refused["refs/heads/fix"])

    def test_what_became_of_it(self) -> None:
        commands = (
            proxy.Command(ZERO, ONE, "refs/heads/fix"),
            proxy.Command(ZERO, ONE, "refs/heads/b"),
        )
        lines = (b"unpack ok\n", b"ok refs/heads/fix\n", b"ng refs/heads/b declined\n",
                 b"ok refs/heads/main\n", b"ng refs/heads/fix again\n")  # fmt: skip
        status = b"".join(map(proxy.pkt, lines)) + b"0000"
        expected = {"refs/heads/fix": "", "refs/heads/b": "declined"}
        plain, banded = (proxy.Push(b"", commands, caps) for caps in ("", "side-band-64k"))
        self.assertEqual(proxy.pushed_refs(status, plain), expected)
        forged = proxy.pkt(b"\x02a 0000ng refs/heads/fix no\n000eok refs/heads/b\n")
        parts = (proxy.pkt(b"\x01" + status[:20]), proxy.pkt(b"\x01" + status[20:]))
        answer = forged + parts[0] + forged + parts[1] + b"0000"
        self.assertEqual(proxy.pushed_refs(answer, banded), expected)
        for cut in range(len(answer)):
            found = proxy.pushed_refs(answer[:cut], banded)
            self.assertEqual(found, dict(list(expected.items())[: len(found)]))
        self.assertEqual(proxy.pushed_refs(b"<html>", banded), {})

    def test_what_is_asked_of_which_repository(self) -> None:
        good = "/git/good/r.git"
        for method, target in (
            ("GET", f"{good}/info/refs?service=git-upload-pack"), ("POST", f"{good}/git-upload-pack"),
            ("GET", "/git/GOOD/R/info/refs?service=git-receive-pack"), ("POST", f"{good}/git-receive-pack"),
        ):  # fmt: skip
            self.assertIn(
                proxy.git_service(BOUNDS, method, target), ("git-upload-pack", "git-receive-pack")
            )
        for method, target in (
            ("POST", f"{good}/info/refs?service=git-upload-pack"), ("GET", f"{good}/git-upload-pack"), ("GET", f"{good}/info/refs"),
            ("GET", f"{good}/info/refs?service=git-upload-archive"), ("GET", f"{good}/HEAD"), ("GET", f"{good}/objects/info/packs"),
            ("GET", f"{good}/info/refs?service=git-upload-pack&x=y"), ("GET", "/git/evil/secret.git/info/refs?service=git-upload-pack"),
            ("POST", "/git/evil/r.git/git-upload-pack"), ("POST", "/git/good/r2.git/git-upload-pack"), ("POST", "/git/good/r.wiki.git/git-upload-pack"),
            ("POST", f"{good}/info/lfs/objects/batch"), ("POST", "/git/good/r.git/../../evil/secret.git/git-upload-pack"),
            ("POST", "/git/good/%72.git/git-upload-pack"), ("POST", "/git/good/r.git//git-upload-pack"), ("POST", "/git/good/r.git.git/git-upload-pack"),
        ):  # fmt: skip
            with self.subTest(target), self.assertRaises(proxy.Refusal):
                proxy.git_service(BOUNDS, method, target)
        with self.assertRaises(proxy.Refusal):
            readonly = BOUNDS._replace(policy=POLICY._replace(readonly=True))
            proxy.git_service(readonly, "POST", f"{good}/git-receive-pack")
        with self.assertRaises(proxy.Refusal):
            moved = BOUNDS._replace(moved="it is elsewhere")
            proxy.git_service(moved, "POST", f"{good}/git-upload-pack")


class GitTest(unittest.TestCase):
    """Clones, fetches and pushes, with what git prints."""

    @classmethod
    def setUpClass(cls) -> None:
        if not shutil.which("git"):
            raise unittest.SkipTest("git is not on PATH")
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.home = Path(cls.folder.name)
        cls.env = {**BARE, "HOME": str(cls.home), "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0",
                   "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}  # fmt: skip
        cls.bare = cls.home / "served/good/r.git"
        cls.first = cls.home / "first"
        run = partial(subprocess.run, env=cls.env, check=True, capture_output=True)
        run(["git", "init", "-q", "-b", "main", str(cls.first)])
        (cls.first / "README").write_text("hello\n")
        run(["git", "-C", str(cls.first), "add", "README"])
        run(["git", "-C", str(cls.first), "commit", "-q", "-m", "first"])
        run(["git", "clone", "-q", "--bare", str(cls.first), str(cls.home / "template")])
        for name in ("uploadpack.allowFilter", "receive.advertisePushOptions"):
            run(["git", "-C", str(cls.home / "template"), "config", name, "true"])
        cls.server = GitServer(str(cls.home / "served"), TOKEN)
        cls.addClassCleanup(cls.server.__exit__)
        cls.upstream = mcp_upstream.Upstream()
        cls.upstream.__enter__()
        cls.addClassCleanup(cls.upstream.__exit__)
        cls.shared = cls.started()
        cls.addClassCleanup(cls.shared.stop)

    folder: tempfile.TemporaryDirectory[str]
    home: Path
    env: dict[str, str]
    bare: Path
    first: Path
    server: GitServer
    upstream: mcp_upstream.Upstream
    shared: Proxy

    @classmethod
    def started(cls, *argv: str, **more: Any) -> Proxy:
        audit = ("--audit", str(cls.home / "audit"))
        return Proxy(cls.upstream.url, "--git", cls.server.url, *audit, *argv, **more)

    def setUp(self) -> None:
        shutil.rmtree(self.bare, ignore_errors=True)
        shutil.copytree(self.home / "template", self.bare)
        self.server.reset()
        self.upstream.found = "always"
        self.work = self.home / "work"
        shutil.rmtree(self.work, ignore_errors=True)
        self.before = len(self.audit())
        self.use(self.shared)

    def use(self, running: Proxy) -> None:
        """From here on this is the proxy that git goes to."""
        self.running = running
        base = f"http://127.0.0.1:{running.port}"
        self.url = f"{base}/git/good/r.git"
        key = f"http.{base}/.extraHeader"
        self.git("config", "--global", key, f"Authorization: Bearer {SECRET}")

    def start(self, *argv: str, **more: Any) -> Proxy:
        """A proxy of the test's own, that is used from here on."""
        running = self.started(*argv, **more)
        self.addCleanup(running.stop)
        self.use(running)
        return running

    def audit(self) -> list[dict[str, Any]]:
        lines = (self.home / "audit").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def told(self) -> list[tuple[str, Any, str]]:
        """What the audit has of this test."""
        lines = self.audit()[self.before :]
        return [(line["verdict"], line["target"].get("ref"), line["reason"]) for line in lines]

    def git(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["git", *argv], env=self.env, capture_output=True, text=True, timeout=120
        )
        if check:
            self.assertEqual(done.returncode, 0, (argv, done.stderr))
        return done

    def commit(self, where: Path, name: str, text: str) -> None:
        (where / name).write_text(text)
        self.git("-C", str(where), "add", name)
        self.git("-C", str(where), "commit", "-q", "-m", name)

    def clone(self, *argv: str) -> Path:
        self.git("clone", "-q", *argv, self.url, str(self.work))
        return self.work

    def push(self, *refs: str) -> subprocess.CompletedProcess[str]:
        return self.git(
            "-C", str(self.work), "push", *(refs or ("origin", "HEAD:fix")), check=False
        )

    def branches(self) -> set[str]:
        return set(
            self.git("-C", str(self.bare), "for-each-ref", "--format=%(refname)").stdout.split()
        )

    def raw(self, request: bytes, path: str = "git-receive-pack") -> bytes:
        """What a request, of which this is the end of its head and its body, is answered."""
        head = (
            f"POST /git/good/r.git/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Authorization: Bearer {SECRET}\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.running.port), 20) as client:
            client.sendall(head.encode() + request)
            with client.makefile("rb") as file:
                return file.read()

    def test_a_push_in_the_smallest_chunks_holds_up_nobody(self) -> None:
        line = proxy.pkt(f"{ZERO} {ONE} refs/heads/a".encode())
        parts = [proxy.chunk_of(line * 2000 + b"ffff"), *[b"1\r\nx\r\n"] * 60_000]
        body = b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(parts) + proxy.LAST_CHUNK
        with contextlib.suppress(OSError):  # it closes before it has read all
            self.raw(body)
        other = Client(self.running.port)
        self.addCleanup(other.close)
        self.assertIn("result", other.ask({"jsonrpc": "2.0", "id": 1, "method": "ping"}))

    def test_a_request_without_a_body_is_not_waited_for(self) -> None:
        for service in ("git-upload-pack", "git-receive-pack"):
            self.assertIn(b"a POST has a body", self.raw(b"\r\n", service))
        self.assertEqual(self.server.seen, [])

    def test_a_connection_with_half_a_request_is_not_used_again(self) -> None:
        answer = (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-git-upload-pack-result\r\n"
            b"Content-Length: 4\r\n\r\n0000"
        )
        seen: list[tuple[Any, bytes]] = []  # on which connection, what

        class Early(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                while data := self.request.recv(65536):
                    seen.append((self.client_address, data))
                    if data.startswith((b"GET ", b"POST ")):
                        self.request.sendall(answer)

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Early) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}"
            running = Proxy(self.upstream.url, "--git", url, "--timeout", "5")
            self.addCleanup(running.stop)
            client = Client(running.port)
            self.addCleanup(client.close)
            head = client.head("POST", "/git/good/r.git/git-upload-pack", length=5000)
            client.socket.sendall(head + b"half")
            wait_for(lambda: any(data.endswith(b"half") for _, data in seen), "half is there")
            used = next(where for where, data in seen if data.endswith(b"half"))
            time.sleep(0.2)  # until the answer is at the proxy
            client.socket.sendall(b"x")
            self.assertEqual(client.read()[2], b"0000")
            refs = "/git/good/r.git/info/refs?service=git-upload-pack"
            other = Client(running.port)
            self.addCleanup(other.close)
            self.assertEqual(other.raw(other.head("GET", refs))[0], 200)
            self.assertNotEqual(seen[-1][0], used)
            running.stop()
            server.shutdown()

    def test_clone_fetch_and_push(self) -> None:
        work = self.clone()
        self.assertEqual((work / "README").read_text(), "hello\n")
        self.commit(work, "new", "x" * 100_000)
        done = self.push()
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("refs/heads/fix", self.branches())
        self.git("-C", str(work), "fetch", "-q")
        self.assertIn("origin/fix", self.git("-C", str(work), "branch", "-r").stdout)
        for seen in self.server.seen:
            self.assertNotIn(SECRET, str(seen.headers))
        self.assertIn("version=2", {seen.headers.get("git-protocol") for seen in self.server.seen})
        self.assertNotIn(TOKEN, self.running.stderr() + (self.home / "audit").read_text())
        self.assertIn("refs/heads/fix", (self.home / "audit").read_text())

    def test_other_ways_to_clone(self) -> None:
        for argv in (["--depth", "1"], ["--filter=blob:none"], ["-c", "protocol.version=0"], ["-c", "protocol.version=1"],
                     ["-c", "http.postBuffer=65536"]):  # fmt: skip
            with self.subTest(argv):
                work = self.clone(*argv)
                self.assertEqual((work / "README").read_text(), "hello\n")
                self.commit(work, "more", str(argv))
                self.assertEqual(self.push("origin", f"HEAD:b{len(self.branches())}").returncode, 0)
                shutil.rmtree(work)

    def test_a_tag_that_comes_along_is_refused_alone(self) -> None:
        self.start()
        work = self.clone()
        self.commit(work, "new", "x" * 100_000)
        self.git("-C", str(work), "tag", "-a", "-m", "one", "v9")
        for argv in (["-c", "push.followTags=true"], ["-c", "http.postBuffer=65536"]):
            branch = f"b{len(self.branches())}"
            push = ["push", "--follow-tags", "origin", f"HEAD:{branch}"]
            done = self.git("-C", str(work), *argv, *push, check=False)
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertIn(f"HEAD -> {branch}", done.stderr)
            self.assertIn("v9 -> v9 (refused: only branches are pushed here", done.stderr)
            self.assertIn(f"refs/heads/{branch}", self.branches())
        self.assertNotIn("refs/tags/v9", self.branches())
        told = [(verdict, ref) for verdict, ref, _ in self.told()]
        self.assertIn(("done", "refs/heads/b1"), told)
        self.assertIn("refuse", dict(told))
        atomic = self.push("--atomic", "--follow-tags", "origin", "HEAD:whole")
        self.assertIn("another ref of this push is refused", atomic.stderr)
        self.assertNotIn("refs/heads/whole", self.branches())

    def test_a_tag_along_does_not_get_a_branch_past_the_users_command(self) -> None:
        """The command is asked about what is left, whatever was left out."""
        policy, asked = self.home / "approve.ini", self.home / "asked"
        policy.write_text(f"[policy]\napprove = cat >> {asked}; echo no; exit 1\n")
        self.start("--policy", str(policy))
        work = self.clone()
        self.git("-C", str(work), "tag", "v9")
        done = self.push("origin", "HEAD:fix", "v9")
        self.assertEqual(done.returncode, 1)
        self.assertIn("HEAD -> fix (refused: no)", done.stderr)
        self.assertIn("v9 -> v9 (refused: only branches", done.stderr)
        self.assertNotIn("refs/heads/fix", self.branches())
        self.assertNotIn("refs/tags", asked.read_text())

    def test_a_probe_may_come_as_a_password_and_stays_one(self) -> None:
        running = self.start(GITHUB_MCP_PROBE_SECRET="probe-secret-0123456789")
        seen = len(self.server.seen)
        login = base64.b64encode(b"any:probe-secret-0123456789").decode()
        client = Client(running.port, "")
        self.addCleanup(client.close)
        head = client.head("GET", "/git/good/r.git/info/refs?service=git-upload-pack")
        head = head.replace(b"\r\n\r\n", f"\r\nAuthorization: Basic {login}\r\n\r\n".encode())
        status, _, body = client.raw(head)
        self.assertEqual((status, b"a probe is not passed on" in body), (403, True))
        self.assertEqual(len(self.server.seen), seen)

    def test_the_secret_is_a_password_too(self) -> None:
        self.git(
            "config",
            "--global",
            "--unset-all",
            f"http.http://127.0.0.1:{self.running.port}/.extraHeader",
        )
        for secret, status in ((SECRET, 0), ("wrong" + SECRET, 128), ("", 128)):
            url = self.url.replace("//", f"//any:{secret}@")
            done = self.git("ls-remote", url, check=False)
            self.assertEqual(done.returncode, status, done.stderr)
        self.assertNotIn(SECRET, self.running.stderr() + (self.home / "audit").read_text())

    def test_refused_pushes(self) -> None:
        self.git("-C", str(self.bare), "branch", "old", "main")
        self.git("-C", str(self.bare), "tag", "v1", "main")
        self.start()
        work = self.clone()
        self.push("origin", "HEAD:fix")
        before = self.branches()
        self.commit(work, "new", "y")
        for refs, words in (
            (
                ("origin", "HEAD:main"),
                "(refused: main is the default branch: write to a branch other than the default one",
            ),
            (("origin", ":old"), "branches are not deleted"),
            (("origin", "HEAD:refs/heads/v1"), "v1 is a tag"),
            (("origin", "HEAD:refs/tags/v2"), "only branches"),
            (("origin", "HEAD:one", "HEAD:main"), "another ref of this push"),
        ):
            with self.subTest(refs):
                done = self.push(*refs)
                self.assertEqual(done.returncode, 1, done.stderr)
                self.assertIn(words, done.stderr)
                self.assertIn("[remote rejected]", done.stderr)
        with self.subTest("a thousand refs"):
            for number in range(1000):
                self.git("-C", str(work), "update-ref", f"refs/heads/{'b' * 60}{number}", "HEAD")
            done = self.push("--all", "origin")
            self.assertEqual(done.stderr.count("[remote rejected]"), 1001, done.stderr[-300:])
        self.assertEqual(self.branches(), before)
        posts = [s for s in self.server.seen if s.method == "POST" and "receive-pack" in s.path]
        self.assertEqual(len(posts), 1, "only the first one")

    def test_what_was_created_here_may_be_deleted_here(self) -> None:
        self.start()
        self.clone()
        self.assertEqual(self.push("origin", "HEAD:mine").returncode, 0)
        self.assertEqual(self.push("origin", ":mine").returncode, 0)
        self.git("-C", str(self.bare), "branch", "theirs", "main")
        self.git("-C", str(self.bare), "branch", "taken", "main")
        client = Client(self.running.port)
        self.addCleanup(client.close)
        failed = {"content": [{"type": "text", "text": "it is there"}], "isError": True}
        self.addCleanup(self.upstream.handlers.clear)
        client.ask(call("", name="create_branch", branch="theirs"))
        self.upstream.on("create_branch", lambda x: x.answer(x.result(failed)))
        client.ask(call("", name="create_branch", branch="taken"))
        self.assertEqual(self.push("origin", ":theirs").returncode, 0, "as the tool has made it")
        self.assertIn("not deleted", self.push("origin", ":taken").stderr)

    def peak(self) -> int:
        """The most that the proxy ever had resident, in KiB; 0 where nothing tells."""
        status = Path(f"/proc/{self.running.process.pid}/status")
        if not status.exists():
            return 0
        return int(status.read_text().partition("VmHWM:")[2].split()[0])

    def test_a_large_push_that_is_refused_and_one_that_is_not(self) -> None:
        work = self.clone()
        before = self.peak()
        (work / "big").write_bytes(os.urandom(10_000_000))
        self.git("-C", str(work), "add", "big")
        self.git("-C", str(work), "commit", "-q", "-m", "big")
        done = self.push("origin", "HEAD:main")
        self.assertIn("default", done.stderr)
        done = self.push("origin", "HEAD:big")
        self.assertEqual(done.returncode, 0, done.stderr)
        shutil.rmtree(work)
        self.clone("-b", "big")
        self.assertEqual((work / "big").stat().st_size, 10_000_000)
        if before:
            self.assertLess(self.peak() - before, 5000)

    def test_who_waits_for_the_other_is_not_cut_off(self) -> None:
        """The limit is for a client that sends nothing; not while GitHub works on what it sent."""
        script = self.home / "quick.py"
        script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport github_mcp_proxy as p\n"
                          "p.STALL_SECONDS = 0.3\nsys.exit(p.main())\n")  # fmt: skip
        quick = self.start(script=script)
        self.commit(self.clone(), "new", os.urandom(100_000).hex())
        self.server.delay = 1.6
        done = self.push("origin", "HEAD:slow")
        self.assertEqual(done.returncode, 0, done.stderr)
        client = Client(quick.port)
        self.addCleanup(client.close)
        head = client.head("POST", "/git/good/r.git/git-receive-pack", length=1000)
        client.socket.sendall(head + b"00")
        self.assertTrue(client.is_closed())

    def test_clients_that_leave_in_the_middle_of_a_push(self) -> None:
        before = self.running.descriptors()
        command = proxy.pkt(f"{ZERO} {ONE} refs/heads/x\0report-status".encode()) + b"0000PACK"
        for _ in range(20):
            client = Client(self.running.port)
            head = client.head("POST", "/git/good/r.git/git-receive-pack", length=10_000_000)
            client.socket.sendall(head + command + b"x" * 500_000)
            client.close()
        deadline = time.monotonic() + 20
        while self.running.descriptors() > before + 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertLessEqual(self.running.descriptors(), before + 4)  # those that are kept
        self.assertNotIn("refs/heads/x", self.branches())
        self.assertNotIn("a fault of", self.running.stderr())
        self.clone()

    def test_the_default_branch_is_known_from_git_where_the_search_finds_nothing(self) -> None:
        self.upstream.found = "never"
        self.start()
        self.commit(self.clone(), "new", "z")
        done = self.push("origin", "HEAD:fix")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("other than the default one", self.push("origin", "HEAD:main").stderr)
        self.git("-C", str(self.bare), "symbolic-ref", "HEAD", "refs/heads/fix")
        self.start(GITHUB_MCP_UPSTREAM="http://127.0.0.1:9/")  # no MCP server at all
        self.commit(self.work, "newer", "z")
        self.assertIn("other than the default one", self.push(self.url, "HEAD:fix").stderr)
        self.assertEqual(self.push(self.url, "HEAD:main").returncode, 0)

    def test_the_audit_has_what_became_of_a_push(self) -> None:
        hook = self.bare / "hooks/update"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text('#!/bin/sh\ntest "$1" != refs/heads/protected\n')
        hook.chmod(0o755)
        self.commit(self.clone(), "new", "z")
        self.push("origin", "HEAD:fix", "HEAD:protected")
        self.assertEqual(
            self.told()[-4:],
            [
                ("forward", "refs/heads/fix", ""),
                ("forward", "refs/heads/protected", ""),
                ("done", "refs/heads/fix", ""),
                ("failed", "refs/heads/protected", "hook declined"),
            ],
        )

    def test_a_push_whose_answer_is_lost(self) -> None:
        self.commit(self.clone(), "new", "z")
        self.server.cut = True
        self.push("origin", "HEAD:fix")
        told = [(verdict, ref) for verdict, ref, _ in self.told()[-2:]]
        ref = "refs/heads/fix"
        self.assertEqual(told, [("forward", ref), ("unknown", ref)])

    def test_a_push_that_the_user_has_to_allow(self) -> None:
        asked, policy = self.home / "asked", self.home / "policy.ini"
        command = f"cat >> {asked}; test -e {self.home}/yes || {{ echo not now; exit 1; }}"
        policy.write_text(f"[policy]\napprove = {command}\n")
        self.start("--policy", str(policy))
        work = self.clone()
        (work / "large").write_bytes(os.urandom(2 << 20))
        self.git("-C", str(work), "add", "large")
        self.git("-C", str(work), "commit", "-q", "-m", "large")
        done = self.push()
        self.assertEqual(done.returncode, 1)
        self.assertIn("(refused: not now)", done.stderr)
        self.assertNotIn("refs/heads/fix", self.branches())
        question = json.loads(asked.read_text())
        new = self.git("-C", str(work), "rev-parse", "HEAD").stdout.strip()
        self.assertEqual((question["tool"], question["repository"]), ("git push", "good/r"))
        self.assertEqual(question["target"], {"ref": "refs/heads/fix"})
        self.assertEqual(question["refs"], [{"old": ZERO, "new": new, "ref": "refs/heads/fix"}])
        (self.home / "yes").touch()
        self.assertEqual(self.push().returncode, 0)
        self.assertIn("refs/heads/fix", self.branches())

    def test_a_compressed_request(self) -> None:
        """As git sends it when it has much to say of what it has."""
        asked = proxy.pkt(b"command=ls-refs\n") + b"00010000"
        body = gzip.compress(asked)
        client = Client(self.running.port)
        self.addCleanup(client.close)
        head = client.head(
            "POST", "/git/good/r.git/git-upload-pack", "Content-Encoding: gzip",
            "Git-Protocol: version=2", length=len(body),
        )  # fmt: skip
        head = head.replace(b"application/json", b"application/x-git-upload-pack-request")
        status, _, answer = client.raw(head + body)
        self.assertEqual(status, 200)
        self.assertIn(b"refs/heads/main", answer)
        sent = [seen.headers.get("content-encoding") for seen in self.server.seen]
        self.assertIn("gzip", sent)

    def test_what_git_does_not_send(self) -> None:
        self.clone()
        before = len(self.server.seen)
        hidden = b"POST /evil/secret.git/git-receive-pack HTTP/1.1\r\nHost: x\r\n\r\n"
        pull, push = (
            "/git/good/r.git/info/refs?service=git-upload-pack",
            "/git/good/r.git/git-receive-pack",
        )
        for head, body in (
            (("GET", pull, f"Content-Length: {len(hidden)}"), hidden),
            (("GET", pull, "Transfer-Encoding: chunked"), b"%x\r\n%b\r\n0\r\n\r\n" % (len(hidden), hidden)),
            (("POST", push), b"0000anything"), (("POST", push), b"00000000"),
        ):  # fmt: skip
            client = Client(self.running.port)
            self.addCleanup(client.close)
            status, _, _ = client.raw(client.head(*head, length=len(body)) + body)
            self.assertEqual(status, 403, head)
        self.assertEqual(len(self.server.seen), before)

    def test_a_redirect_is_not_followed(self) -> None:
        other = self.home / "served/evil/secret.git"
        self.addCleanup(shutil.rmtree, other)
        self.git("clone", "-q", "--bare", str(self.bare), str(other))
        self.server.redirect = f"{self.server.url}/evil/secret"
        for argv in (["clone", self.url, str(self.work)], ["push", self.url, "HEAD:fix"]):
            done = self.git("-C", str(self.first), *argv, check=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("redirects elsewhere", done.stderr)
        self.assertEqual([seen for seen in self.server.seen if "evil" in seen.path], [])

    def test_a_new_name_is_said(self) -> None:
        for target in ("info/refs?service=git-upload-pack", "git-receive-pack"):
            self.server.redirect = f"{self.server.url}/Good/new.name.git/{target}"
            for argv in (["clone", self.url, str(self.work)], ["push", self.url, "HEAD:fix"]):
                done = self.git("-C", str(self.first), *argv, check=False)
                self.assertNotEqual(done.returncode, 0)
                self.assertIn("calls this repository Good/new.name now", done.stderr)
        self.start()
        client = Client(self.running.port)
        self.addCleanup(client.close)
        for name, arguments in (("create_branch", {"branch": "b"}), ("list_tags", {})):
            said = json.dumps(client.ask(call("", name=name, **arguments)))
            self.assertIn("the host's user has to give --repo Good/new.name", said)

    def test_push_options(self) -> None:
        self.commit(self.clone(), "new", "z")
        self.assertEqual(self.push("-o", "ci.skip", "origin", "HEAD:opt").returncode, 0)

    def test_what_else_is_refused_says_why(self) -> None:
        base = f"http://127.0.0.1:{self.running.port}/git"
        for url, words in (
            (f"{base}/evil/secret.git", "refused: only good/r is served here"),
            (f"{base}/good/r.wiki.git", "refused: the wiki is not served here"),
        ):
            done = self.git("ls-remote", url, check=False)
            self.assertEqual(done.returncode, 128)
            self.assertIn(words, done.stderr)
        self.assertEqual(self.server.seen, [])
        self.clone()
        self.start(GITHUB_MCP_READONLY="1")
        self.commit(self.work, "n", "n")
        self.assertIn("read-only", self.push(self.url, "HEAD:x").stderr)
        without = Client(self.running.port, "")
        self.addCleanup(without.close)
        head = without.head("GET", "/git/good/r.git/info/refs?service=git-upload-pack")
        self.assertEqual(without.raw(head)[0], 401)  # so that git asks for a password

    def test_a_repository_that_is_not_there_and_a_dead_upstream(self) -> None:
        shutil.rmtree(self.bare)
        done = self.git("ls-remote", self.url, check=False)
        self.assertIn("404", done.stderr)
        self.server.token = "another-token-0123456789"
        self.assertIn("token", self.git("ls-remote", self.url, check=False).stderr)
        self.start("--git", "http://127.0.0.1:9")
        self.assertIn("cannot be reached", self.git("ls-remote", self.url, check=False).stderr)

    def test_the_receipt_has_what_became_of_a_push(self) -> None:
        running = self.start("--exit-with-stdin")
        self.commit(self.clone(), "new", "z")
        self.push("origin", "HEAD:fix")
        self.push("origin", "HEAD:main")
        assert running.process.stdin and running.process.stdout
        running.process.stdin.close()
        counts, *lines = map(json.loads, running.process.stdout)
        self.assertEqual((counts["writes"], counts["refused"]), (1, 1))
        self.assertGreaterEqual(counts["reads"], 2)
        told = [(line["verdict"], line["what"]) for line in lines]
        self.assertEqual(
            told,
            [("done", "git push ref=refs/heads/fix"), ("refused", "git push ref=refs/heads/main")],
        )
        self.assertIn("main is the default branch", lines[1]["reason"])

    def test_a_connection_that_github_has_closed_meanwhile(self) -> None:
        """What was kept open for the next request may be gone by then: that is asked anew."""
        for _ in range(3):
            self.git("ls-remote", self.url)
            self.server.drop_connections()
        self.clone()

    def test_a_probe_of_git_is_judged_and_not_passed_on(self) -> None:
        probe = "the-probe-of-this-run-0123456789"
        running = self.start("--exit-with-stdin", GITHUB_MCP_PROBE_SECRET=probe)
        before = len(self.audit())
        for target, words in (
            ("good/r.git/info/refs?service=git-upload-pack", b"a probe is not passed on"),
            ("evil/secret.git/info/refs?service=git-upload-pack", b"only good/r is served here"),
        ):
            client = Client(running.port, probe)
            self.addCleanup(client.close)
            status, _, said = client.raw(client.head("GET", f"/git/{target}"))
            self.assertEqual(status, 403)
            self.assertIn(words, said)
        self.assertEqual(len(self.audit()), before)
        self.assertEqual([seen for seen in self.server.seen if seen.method == "GET"], [])


if __name__ == "__main__":
    unittest.main()
