"""A world for tests that boot VMs: a folder, a base instance in it, a model on the host.

Takes setup's options from AGENT_VM_* and keeps everything in a folder of its own, which it
deletes; VM_TEST_DIR=DIR keeps DIR instead, and uses the base instance that is in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path

from tests import quick
from tests.fakes import mcp_upstream
from tests.fakes.git_server import GitServer
from tests.test_proxy_real import real_server

quick.PATIENCE = 900
TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "agent_vm.py"
TOKEN = "sk-ant-api03-not-a-real-key-0123456789abcdef"
GITHUB_TOKEN = "github_pat_11NOTREAL0_abcdefghijklmnopqrstuvwxyz0123456789"


# In the base instance: a daemon that has made random numbers before it is saved.
DAEMON = """
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=d -keyout ~/d.pem -out ~/d.pem -days 9
sudo tee /etc/systemd/system/tls.service > /dev/null << END
[Service]
ExecStart=openssl s_server -quiet -accept 127.0.0.1:4433 -cert $HOME/d.pem -key $HOME/d.pem -www
[Install]
WantedBy=multi-user.target
END
sudo systemctl enable --now tls.service
sleep 1
openssl s_client -connect 127.0.0.1:4433 < /dev/null
"""


def processes_of(name: str) -> list[str]:
    """Command lines of host processes that belong to an instance."""
    listing = subprocess.run(
        ["ps", "axww", "-o", "command="], stdout=subprocess.PIPE, text=True
    ).stdout
    return [line for line in listing.splitlines() if name in line and "vm_test" not in line]


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.2)


class VMCase(unittest.TestCase):
    root: Path
    env: dict[str, str]

    @classmethod
    def setUpClass(cls) -> None:
        if not shutil.which("limactl"):
            raise unittest.SkipTest("no limactl on PATH")
        if os.geteuid() == 0:
            raise unittest.SkipTest("limactl refuses to run as root")
        # A shell that starts this in the background has Ctrl-C ignored, for children too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        kept = os.environ.get("VM_TEST_DIR")
        # Short, because Lima's sockets lie below it.
        cls.root = Path(kept or tempfile.mkdtemp(prefix="avm-", dir="/tmp")).resolve()
        if not kept:
            cls.addClassCleanup(shutil.rmtree, cls.root, ignore_errors=True)
        cls.env = {**os.environ, "LIMA_HOME": str(cls.root / "l")}
        for name in ("config", "state", "data"):
            cls.env[f"XDG_{name.upper()}_HOME"] = str(cls.root / name)
        home = cls.root / "home"
        home.mkdir(parents=True, exist_ok=True)
        # Lima's image cache stays where it is: an image of 300 MB is not fetched for a test.
        cls.env.setdefault("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        cls.env.update(HOME=str(home), ANTHROPIC_API_KEY=TOKEN, TZ="Europe/Berlin")
        (home / ".gitconfig").write_text("[user]\n name = Ada L.\n email = ada@example.org\n")
        hook = cls.root / "config/agent-vm/setup.sh"
        hook.parent.mkdir(parents=True, exist_ok=True)
        hook.write_text(DAEMON)
        cls.start_model()
        cls.addClassCleanup(cls.remove_base, bool(kept))
        if not (cls.root / "state/agent-vm/bases/agent-vm-base").exists():
            setup = cls.agent_vm("setup", "--minimal", "--memory", "2", "--yes", capture=False)
            assert setup.returncode == 0, "setup failed"

    @classmethod
    def start_model(cls) -> None:
        model = subprocess.Popen(
            [sys.executable, TESTS / "fakes/model_api.py", cls.root / "model.log"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert model.stdin and model.stdout
        cls.addClassCleanup(model.wait)
        cls.addClassCleanup(model.stdout.close)
        cls.addClassCleanup(model.stdin.close)
        port = model.stdout.readline().strip()
        cls.env["ANTHROPIC_BASE_URL"] = f"http://127.0.0.1:{port}"

    @classmethod
    def remove_base(cls, kept: bool) -> None:
        if not kept:
            for path in (cls.root / "l").glob("agent-vm-base.*"):
                cls.agent_vm("rm", "--force", path.name)

    @classmethod
    def start(
        cls, *args: str, cwd: Path | None = None, capture: bool = True
    ) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE if capture else None
        return subprocess.Popen(
            [sys.executable, SCRIPT, *args], env=cls.env, cwd=cwd or cls.root,
            stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True,
        )  # fmt: skip

    @classmethod
    def agent_vm(
        cls, *args: str, cwd: Path | None = None, capture: bool = True
    ) -> subprocess.CompletedProcess[str]:
        with cls.start(*args, cwd=cwd, capture=capture) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def project(self, name: str = "project") -> Path:
        path = self.root / "projects" / f"{self.id().rpartition('.')[2]}" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def clones(self) -> list[str]:
        return [path.name for path in (self.root / "l").glob("agent-vm-*-??????")]

    def assert_nothing_left(self) -> None:
        self.assertEqual(self.clones(), [])
        self.assertEqual(list((self.root / "state/agent-vm/leases").iterdir()), [])

    def assert_processes_end(self, name: str) -> None:
        wait_for(lambda: not processes_of(name), 20, "the VM's processes are gone")

    def started_clone(self, process: subprocess.Popen[str]) -> str:
        """The name of the only clone, once it exists."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: bool(self.clones()) or process.poll() is not None, 60, "a clone")
        return self.clones()[0]

    def wait_until_up(self, process: subprocess.Popen[str], project: Path) -> None:
        """Until the agent has made a file `up`; a run that ended before it shows why."""
        up = project / "up"
        wait_for(lambda: up.exists() or process.poll() is not None, 900, "the agent runs")
        if not up.exists():
            raise AssertionError(process.communicate()[1])

    def serve_github(self) -> Path:
        """GitHub's side of good/r and evil/secret on loopback; the bare repository of good/r."""
        if shutil.which("github-mcp-server"):
            url, _ = real_server(self)
        else:
            print("github-mcp-server is not on PATH: its fake takes its place", file=sys.stderr)
            fake = mcp_upstream.Upstream()
            fake.__enter__()
            self.addCleanup(fake.__exit__)
            url = fake.url
        served = self.root / "served"
        shutil.rmtree(served, ignore_errors=True)
        for name in ("good/r.git", "evil/secret.git"):
            bare = ("git", "init", "-q", "--bare", "-b", "main", str(served / name))
            subprocess.run(bare, check=True)
        first = self.project("first")
        for argv in (
            ("init", "-q", "-b", "main"), ("commit", "-q", "--allow-empty", "-m", "first"),
            ("push", "-q", str(served / "good/r.git"), "main"),
            ("push", "-q", str(served / "evil/secret.git"), "main"),
        ):  # fmt: skip
            subprocess.run(["git", "-C", first, *argv], env=self.env, check=True)
        server = GitServer(str(served), GITHUB_TOKEN)
        self.addCleanup(server.__exit__)
        more = {"GITHUB_MCP_UPSTREAM": url, "GITHUB_MCP_GIT": server.url}
        more["GITHUB_MCP_TOKEN"] = GITHUB_TOKEN
        self.addCleanup(lambda: [self.env.pop(name) for name in more])
        self.env.update(more)
        return served / "good/r.git"
