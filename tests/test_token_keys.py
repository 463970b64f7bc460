"""The private key: where it comes from, what holds it, and where it must not be seen."""

from __future__ import annotations

import base64
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unittest
from collections.abc import Iterator
from pathlib import Path

import github_app_token as g
from tests.quick import BARE
from tests.support import Terminal
from tests.support import wait_for
from tests.token_case import SCRIPT
from tests.token_case import Case
from tests.token_case import key
from tests.token_case import openssl


def spki_of(pem: bytes) -> bytes:
    return openssl("rsa", "-pubout", "-outform", "DER", data=pem)


class KeyTest(Case):
    def status(self, key: str) -> str:
        """What `status` says of the key; GitHub is not asked when that is a fault."""
        return self.run_it("status", "--key", key, "--permissions", "dev").out

    def test_kinds_that_openssl_reads(self) -> None:
        pkcs8 = openssl("pkcs8", "-topk8", "-nocrypt", data=key())
        mended = ("\ufeff" + key().decode().replace("\n", "\\r\\n")).encode()
        shown = base64.b64encode(
            openssl("dgst", "-sha256", "-binary", data=spki_of(key()))
        ).decode()
        for name, data in (("PKCS#8", pkcs8), ("PKCS#1, mended", mended)):
            with self.subTest(name):
                said = self.status(str(self.write("k", data)))
                self.assertIn(f"ok   key: SHA256:{shown}\n", said)
                self.assertNotIn("FAIL", said)

    def test_what_is_no_key_of_an_app_is_named(self) -> None:
        def made(algorithm: str, option: str) -> bytes:
            return openssl("genpkey", "-algorithm", algorithm, "-pkeyopt", option)

        for word, data in (
            ("no RSA key", made("EC", "ec_paramgen_curve:P-256")),
            ("no RSA key", key().replace(b"MII", b"AAA")),
            ("no RSA key", openssl("rsa", "-pubout", data=key())),
            ("no PEM file", openssl("rsa", "-outform", "DER", data=key())),
            ("encrypted", openssl("rsa", "-aes128", "-passout", "pass:horse", data=key())),
        ):  # fmt: skip
            with self.subTest(word):
                self.fails(self.token(key=str(self.write("k", data))), g.MEND, word)
        self.assertEqual(self.github.seen, [])

    def test_sources(self) -> None:
        locked = openssl("rsa", "-aes128", "-passout", "pass:horse", data=key())
        self.write("locked.pem", locked)
        opened = "openssl rsa -in locked.pem -passin env:WORD"  # what is advised for such a key
        for source, data, env in (
            ("-", key(), {}),
            ("env:THE_KEY", b"", {"THE_KEY": key().decode()}),
            (f"command:cat {self.key} | cat", b"", {}),
            (f"command:{opened}", b"", {"WORD": "horse"}),
            ("~/app.pem", b"", {}),
        ):  # fmt: skip
            with self.subTest(source):
                shutil.rmtree(self.cache, ignore_errors=True)
                self.passes(self.token(key=source, data=data, **env))
        for status, word, source in (
            (g.MEND, "cannot read the file that it names", key().decode()),
            (g.MEND, "status 1", "command:false"),
            (g.MEND, "no PEM file", "command:true"),
            (g.MEND, "no PEM file", "env:NOTHING"),
            (g.MEND, "no PEM file", "-"),
        ):  # fmt: skip
            shutil.rmtree(self.cache, ignore_errors=True)
            self.fails(self.token(key=source), status, word)
        done = self.run_it("token", "--key", "", "--permissions", "dev")
        self.fails(done, g.USAGE, "the key is empty")

    def test_files_that_others_can_read(self) -> None:
        for mode in (0o640, 0o604):
            given = str(self.write("k", key(), mode))
            self.fails(self.token(key=given), g.MEND, "chmod go-rwx")
        os.mkfifo(self.home / "fifo")
        for source, word in (
            (str(self.home / "fifo"), "not a file"),
            (str(self.home), "Is a directory"),
            ("/nonexistent", "No such file"),
        ):  # fmt: skip
            self.fails(self.token(key=source), g.MEND, word)

    def test_a_key_in_the_wrong_place_is_not_shown(self) -> None:
        pasted = "LS0tLS1CRUdJTiBQUklWQVRF" * 40
        done = self.token(key=pasted)
        self.fails(done, g.MEND, "cannot read the file that it names")
        self.assertNotIn(pasted[:24], done.err)

    def test_a_command_can_ask_on_the_terminal_and_complain(self) -> None:
        """As `pass` and `op` do; {0} and the like are its own."""
        self.write("ask", b"printf 'pass' >/dev/tty; read word </dev/tty; test $word = horse\n")
        self.profile(key="command:sh ./ask && echo {0} >&2 && cat app.pem", permissions="dev")
        spawn = "import os, pty, sys; sys.exit(os.WEXITSTATUS(pty.spawn(sys.argv[1:])))"
        argv = [sys.executable, "-Ic", spawn, sys.executable, "-I", str(SCRIPT), "token"]
        done = subprocess.run(
            argv, env=self.env, cwd=self.home, input=b"horse\n", capture_output=True
        )
        self.assertEqual(done.returncode, 0, done)
        for word in (b"pass", b"{0}\r\n", b"expires in"):
            self.assertIn(word, done.stdout)

    def test_the_terminal_is_as_before_when_a_command_is_cut_off(self) -> None:
        """It had switched the echo off, to ask; whoever types next must see what they type."""
        self.profile(key="command:stty -echo < /dev/tty; exec sleep 50", permissions="dev")
        argv = [sys.executable, "-I", str(SCRIPT), "token"]
        terminal = Terminal(argv, self.env, self.home, None)
        self.addCleanup(terminal.close)
        before = terminal.mode()
        wait_for(lambda: terminal.mode() != before, "the echo is off")
        os.kill(terminal.process.pid, signal.SIGINT)
        self.assertEqual(terminal.process.wait(20), 130)
        self.assertEqual(terminal.mode(), before)

    def test_a_command_that_does_not_end(self) -> None:
        self.assertEqual(g.CHILD_SECONDS, 60)
        done = self.token(key="command:exec sleep 50", setup="g.CHILD_SECONDS = 0.2\n")
        self.fails(done, g.MEND, "sh did not end in 0.2 s")


class OpensslTest(Case):
    def fake(self, text: str) -> str:
        """A PATH on which openssl runs this Python, with `real` the real one's path."""
        folder = self.home / "bin"
        folder.mkdir(exist_ok=True)
        real = f"import os, sys\nreal = {shutil.which('openssl')!r}\n"
        self.write("fake.py", (real + text).encode())
        libraries = f"LD_LIBRARY_PATH={shlex.quote(BARE.get('LD_LIBRARY_PATH', ''))}"
        python = shutil.which("python3") or "python3"
        command = f'{libraries} exec {shlex.quote(python)} -IS {self.home}/fake.py "$@"'
        self.write("bin/openssl", f"#!/bin/sh\n{command}\n".encode(), 0o700)
        return f"{folder}:{self.env['PATH']}"

    def test_an_openssl_that_does_not_do_its_work(self) -> None:
        for word, text in (
            ("status 1", "sys.exit(1)"),
            ("did not end", "import time; time.sleep(60)"),
        ):  # fmt: skip
            with self.subTest(word):
                setup = "g.CHILD_SECONDS = 0.2\n" if word == "did not end" else ""
                done = self.token(setup=setup, PATH=self.fake(text))
                self.fails(done, g.MEND, word)
        (self.home / "empty").mkdir()
        self.fails(self.token(PATH=str(self.home / "empty")), g.MEND, "openssl is not on PATH")
        self.assertEqual(self.github.seen, [])

    def test_no_secret_is_in_argv_environment_or_files(self) -> None:
        if not Path("/proc/self/environ").exists():
            self.skipTest("no /proc")
        text = (
            "mine = [open(f'/proc/{pid}/{what}', 'rb').read()\n"
            "        for pid in (os.getpid(), os.getppid()) for what in ('cmdline', 'environ')]\n"
            f"open({str(self.home / 'seen')!r}, 'ab').write(b'\\n'.join(mine))\n"
            "def pipe(fd): return os.path.exists(fd) and os.readlink(fd).startswith('pipe:')\n"
            "pipes = [fd for fd in range(3, 40) if pipe(f'/proc/self/fd/{fd}')]\n"
            f"print(len(pipes), file=open({str(self.home / 'pipes')!r}, 'a'))\n"
            "os.execv(real, ['openssl', *sys.argv[1:]])\n"
        )
        argv = ("token", "--key", "app.pem", "--permissions", "dev")
        env = {
            **self.env,
            "PATH": self.fake(text),
            "OPENSSL_CONF": "/nonexistent",
            "LD_PRELOAD": "",
        }
        done = self.as_users_do(*argv, env=env, cwd=self.home)
        self.assertEqual(done.returncode, 0, done.stderr)
        seen = (self.home / "seen").read_bytes()
        jwt = self.github.seen[0].authorization.partition(" ")[2]
        secrets = [done.stdout.strip(), jwt, *key().decode().splitlines()[1:-1]]
        self.assertEqual(seen.count(b"dgst"), 1, "it signed")
        pipes = (self.home / "pipes").read_text().split()
        self.assertEqual(pipes, ["1", "1"], "the key, twice")
        for secret in secrets:
            self.assertNotIn(secret.encode(), seen)
        # Of the processes seen, only the script itself has it: openssl's was made from nothing.
        inherited = seen.partition(b"dgst")[2].partition(b"PATH")[0]
        self.assertNotIn(b"OPENSSL_CONF=", inherited)
        for path in self.cache.iterdir():
            for secret in secrets[1:]:
                self.assertNotIn(secret, path.read_text())


class AgentTest(Case):
    @contextlib.contextmanager
    def agent(self) -> Iterator[str]:
        sock = str(self.home / "agent")
        process = subprocess.Popen(["ssh-agent", "-D", "-a", sock], stdout=subprocess.DEVNULL)
        try:
            while not os.path.exists(sock):
                time.sleep(0.01)
            yield sock
        finally:
            process.kill()
            process.wait()

    def test_an_ssh_agent_signs(self) -> None:
        if not shutil.which("ssh-agent"):
            self.skipTest("ssh-agent is not on PATH")
        shown = base64.b64encode(
            openssl("dgst", "-sha256", "-binary", data=spki_of(key()))
        ).decode()
        with self.agent() as sock:
            self.fails(self.token(key="agent", SSH_AUTH_SOCK=sock), g.MEND, "0 such keys")
            env = {**self.env, "SSH_AUTH_SOCK": sock}
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.home / "ed")],
                check=True,
            )
            other = self.write("other", openssl("genrsa", "2048"))
            names = [str(self.key), str(other), str(self.home / "ed")]
            subprocess.run(
                ["ssh-add", "-q", *names], env=env, check=True, stderr=subprocess.DEVNULL
            )
            listed = subprocess.run(["ssh-add", "-l"], env=env, check=True, capture_output=True)
            by_ssh = listed.stdout.decode().split()[1]
            done = self.token(key="agent", SSH_AUTH_SOCK=sock)
            self.fails(done, g.MEND, "2 such keys", f"SHA256:{shown}")
            for name in (f"SHA256:{shown}", by_ssh):
                shutil.rmtree(self.cache, ignore_errors=True)
                empty = str(self.home / ".config")  # no openssl there
                self.passes(self.token(key=f"agent:{name}", SSH_AUTH_SOCK=sock, PATH=empty))
            done = self.token("--repo", "octo/other", key="agent:SHA256:none", SSH_AUTH_SOCK=sock)
            self.fails(done, g.MEND, "0 such keys")
        data, _, signature = self.github.seen[0].authorization.partition(" ")[2].rpartition(".")
        public = self.write("public", openssl("rsa", "-pubout", data=key()))
        signed = self.write("signature", base64.urlsafe_b64decode(signature + "=="))
        verify = ("-verify", str(public), "-signature", str(signed))
        self.assertIn(b"OK", openssl("dgst", "-sha256", *verify, data=data.encode()))

    def test_no_agent_answers(self) -> None:
        done = self.token(key="agent", SSH_AUTH_SOCK="/nonexistent")
        self.fails(done, g.MEND, "SSH_AUTH_SOCK")
        self.fails(self.token(key="agent"), g.MEND, "SSH_AUTH_SOCK")


if __name__ == "__main__":
    unittest.main()
