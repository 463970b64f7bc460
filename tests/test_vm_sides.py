"""What a run starts beside its VM: the way out, the credential's broker, and QEMU's stand-in."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from tests.support import BASE
from tests.support import ROOT
from tests.support import TOKEN
from tests.support import WorldTest
from tests.support import wait_for

NEEDED = {"AGENT_VM_NETWORK", "AGENT_VM_CREDENTIAL"}  # that tests of other things set

LIBRARIES = shlex.quote(os.environ.get("LD_LIBRARY_PATH", ""))  # of this Python
# In the guest: asks the way out for each place, by the host's end of the side.
ASK = f"""
ask() {{ LD_LIBRARY_PATH={LIBRARIES} {shlex.quote(sys.executable)} -IS -c '
import socket, sys
with open(sys.argv[1]) as file:
    ends = dict(line.split() for line in file)
for place in sys.argv[2:]:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(ends["47101"])
        client.sendall(f"CONNECT {{place}} HTTP/1.0\\r\\n\\r\\n".encode())
        print(client.makefile().readline().strip())
' "$FAKE_GUEST_INSTANCE/sides" "$@"; }}
"""


class Api(http.server.BaseHTTPRequestHandler):
    """The model's API: it keeps what it was sent, and answers."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, dict[str, str]]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        body = b'{"type": "message"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class SidesTest(WorldTest):
    COST = 8

    def setUp(self) -> None:
        super().setUp()
        for name in NEEDED:
            del self.box.env[name]

    def start_call(self) -> dict[str, Any]:
        calls = [call for call in self.box.calls("limactl") if call["argv"][0] == "start"]
        return dict(calls[-1])

    def is_closed(self) -> object:
        """The network of the VM that was started last; None of one that is not QEMU's."""
        return json.loads(self.start_call()["env"].get("AGENT_VM_QEMU", "{}")).get("restrict")

    def processes(self) -> list[int]:
        """Those of this test's world that are sides."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if b"egress.py" in words and str(self.box.root).encode() in words:
                    found.append(int(entry.name))
        return found

    def agent_env(self) -> dict[str, str]:
        return dict(self.box.agent_calls()[-1]["env"])

    # The network

    def test_by_default_the_network_is_held_by_the_host(self) -> None:
        result = self.box.run("run", "--", "sh:cat ~/.claude/CLAUDE.md; env; cat ~/.agent-vm/*")
        self.assertEqual((result.status, result.err), (0, ""))
        with self.subTest("QEMU is started by a file that restricts it, of the state folder"):
            environ = self.start_call()["env"]
            asked = json.loads(environ["AGENT_VM_QEMU"])
            self.assertIs(asked["restrict"], True)
            self.assertEqual(os.path.dirname(asked["program"]), str(self.box.bin))
            (script,) = [environ[name] for name in environ if name.startswith("QEMU_SYSTEM_")]
            self.assertEqual(script, str(self.box.state / "qemu"))
            own = (ROOT / "lima/qemu.py").read_text().partition("\n")[2]
            first, _, rest = Path(script).read_text().partition("\n")
            self.assertEqual(rest, own)
            self.assertRegex(first, r"^#!\S*python3[0-9.]* -IS$")
            self.assertEqual(os.stat(script).st_mode & 0o777, 0o700)
        with self.subTest("the guest looks for holes, and is led to the way out"):
            calls = [call for call in self.box.tool_calls() if "wake.py" in call]
            self.assertEqual(calls, ["wake.py 60022 internet"])
            self.assertIn("http_proxy=http://127.0.0.1:47101", result.out)
            self.assertIn("no_proxy=localhost,127.0.0.1\n", result.out)
        with self.subTest("the agent knows what it reaches"):
            self.assertIn("any public address", result.out)
            self.assertNotIn("host.lima.internal", result.out.partition("look for no way round")[0])
        with self.subTest("nothing is left"):
            self.assertEqual(self.processes(), [])
            self.assert_nothing_left()

    def test_what_is_refused_is_said_at_the_end_and_in_the_log(self) -> None:
        script = f"{ASK} ask 10.1.2.3:443 10.1.2.3:443 127.0.0.1:22 host.lima.internal:8080"
        result = self.box.run("run", "--", f"sh:{script}")
        self.assertEqual(result.status, 0, result.err)
        lines = result.out.splitlines()
        self.assertEqual([line.split()[1] for line in lines], ["403"] * 4, result.out)
        self.assertIn("refused: 10.1.2.3:443 (2 times); --allow 10.1.2.3\n", result.err)
        self.assertIn("refused: 127.0.0.1:22: ", result.err)
        self.assertIn("refused: host.lima.internal:8080; --host-port 8080\n", result.err)
        rows = [json.loads(line) for line in self.box.run("log").out.splitlines()]
        self.assertEqual([row["verdict"] for row in rows], ["refused"] * 4)

    def test_a_port_of_the_host_and_what_is_listed(self) -> None:
        with http.server.HTTPServer(("127.0.0.1", 0), Api) as server:
            port = server.server_address[1]
            script = f"{ASK} ask host.lima.internal:{port} 127.0.0.1:{port} other.example:443"
            options = ("--network", "allow", "--host-port", str(port), "--allow", "10.9.9.9:1")
            result = self.box.run("run", *options, "--", f"sh:{script}")
        self.assertEqual(
            [line.split()[1] for line in result.out.splitlines()], ["200", "403", "403"]
        )
        self.assertIn("refused: other.example:443; --allow other.example\n", result.err)

    def test_allow_lets_the_registries_through_that_setup_has_found(self) -> None:
        (self.box.lima / BASE / "agent-vm-registries").write_text("10.7.7.7:1 registry.example ")
        script = f"{ASK} ask registry.example:99; sleep 30"
        process = self.box.start("run", "--network", "allow", "--", f"sh:touch up; {script}")
        self.box.wait_for_file("up")
        (pid,) = self.processes()
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        self.box.kill(process)
        for host in ("10.7.7.7:1", "registry.example"):
            self.assertEqual(words[words.index(host) - 1], "--allow")
        self.assertNotIn("--internet", words)
        wait_for(lambda: not self.processes(), "the sides end with a run that was killed")

    def test_off(self) -> None:
        result = self.box.run("run", "--network", "off", "--", "sh:cat ~/.claude/CLAUDE.md")
        self.assertEqual(result.status, 0, result.err)
        self.assertIn("You reach no network", result.out)
        self.assertIn("wake.py 60022 off", self.box.tool_calls())
        self.assertNotIn("http_proxy", self.agent_env())
        self.assertEqual(self.agent_env()["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"], "1")
        self.assertFalse([call for call in self.box.calls("ssh") if "-R" in str(call["argv"])])

    def test_open_is_as_lima_has_it(self) -> None:
        self.assertEqual(self.box.run("run", "--network", "open").status, 0)
        self.assertIs(self.is_closed(), False)
        self.assertIn("wake.py 60022 open", self.box.tool_calls())
        self.assertIn("host.lima.internal", self.agent_env()["no_proxy"])

    def test_a_hole_ends_the_run_before_the_agent_starts(self) -> None:
        result = self.box.run("run", FAKE_GUEST_FAIL="network")
        self.assert_refused(result, "the VM is not confined", "192.168.5.2 port 4711")
        self.assertEqual(self.box.agent_calls(), [])
        self.assert_nothing_left()

    def test_a_way_out_that_ends_is_said_at_once_and_the_run_goes_on(self) -> None:
        script = "touch up; while [ ! -e go ]; do sleep 0.05; done; exit 5"
        process = self.box.start("run", "--", f"sh:{script}")
        self.box.wait_for_file("up")
        (pid,) = self.processes()
        os.kill(pid, signal.SIGKILL)
        assert process.stderr
        said = process.stderr.readline()
        self.assertIn("the way out has ended; the VM goes on without it", said)
        (self.box.project / "go").touch()
        self.assertEqual(self.box.finish(process).status, 5)
        self.assert_nothing_left()

    def test_words_of_the_users_stay_where_lima_sees_them(self) -> None:
        name = f"QEMU_SYSTEM_{os.uname().machine.upper()}"
        program = f"qemu-system-{os.uname().machine}"
        result = self.box.run("run", **{name: f"{program} -machine q35,accel=tcg"})
        self.assertEqual(result.status, 0, result.err)
        environ = self.start_call()["env"]
        self.assertEqual(environ[name], f"{self.box.state}/qemu -machine q35,accel=tcg")
        missing = self.box.run("run", **{name: "no-such-qemu"})
        self.assert_refused(missing, "no-such-qemu is not installed")

    def test_another_vm_type_has_no_network_that_could_be_held(self) -> None:
        path = self.box.lima / BASE / "lima.yaml"
        path.write_text(json.dumps({**json.loads(path.read_text()), "vmType": "vz"}))
        result = self.box.run("run", AGENT_VM_MOUNT="")
        self.assertIn("network is open", result.err)
        self.assertIsNone(self.is_closed())
        mounts, clone = self.box.started_config()["mounts"], self.box.limactl("start")[0][-1]
        points = [(mount["mountPoint"], mount["writable"]) for mount in mounts]
        self.assertEqual(points, [("/mnt/agent-vm/0", True), ("/mnt/agent-vm/1", True)])
        bound = f"mount rw - {self.box.lima}/{clone}/mnt/0 {self.box.project}"
        self.assertIn(bound, self.box.tool_calls())
        for mode in ("internet", "allow", "off"):
            refused = self.box.run("run", "--network", mode)
            self.assert_refused(refused, "no VM of QEMU's", "setup --vm-type qemu")

    def test_a_projects_own_section_of_the_configuration(self) -> None:
        self.box.write_config(f"network = open\n[{self.box.project}]\nnetwork = off\n[/else]\n")
        self.assertEqual(self.box.run("run").status, 0)
        self.assertIs(self.is_closed(), True)
        elsewhere = self.box.home / "elsewhere"
        elsewhere.mkdir()
        self.assertEqual(self.box.run("run", cwd=elsewhere).status, 0)
        self.assertIs(self.is_closed(), False)
        link = self.box.home / "link"
        link.symlink_to(self.box.project)
        below = self.box.project / "src/deep"
        below.mkdir(parents=True)
        for section, cwd in (
            (f"{self.box.project}/", self.box.project), ("~/project", self.box.project),
            (str(link), self.box.project), (str(self.box.project), below),
        ):  # fmt: skip
            self.box.write_config(f"network = open\n[{section}]\nnetwork = off")
            self.assertEqual(self.box.run("run", cwd=cwd).status, 0)
            self.assertIs(self.is_closed(), True, section)
        near, far = "[~/project]\nnetwork = off", f"[{self.box.home}]\nnetwork = open"
        for sections in (f"{near}\n{far}", f"{far}\n{near}"):  # the nearest, not the longest word
            self.box.write_config(sections)
            self.assertEqual(self.box.run("run").status, 0)
            self.assertIs(self.is_closed(), True, sections)
        self.box.write_config("[relative]\nnetwork = off")
        self.assert_refused(self.box.run("run"), "[relative]")
        self.box.write_config("[/elsewhere]\nnetwrok = off")
        self.assert_refused(self.box.run("run"), "unknown key 'netwrok'")

    def test_a_kept_vm_is_started_with_its_network_closed(self) -> None:
        self.assertIn("agent-vm start", self.box.run("run", "--keep").err)
        (name,) = self.box.clones()
        self.box.run("stop", name)
        result = self.box.run("start", name)
        self.assertEqual(result.status, 0, result.err)
        self.assertIn("it has no network", result.err)
        self.assertIs(self.is_closed(), True)

    def test_a_kept_vm_that_runs_already_is_not_called_closed(self) -> None:
        self.box.run("run", "--keep")
        (name,) = self.box.clones()
        result = self.box.run("start", name)
        self.assert_refused(result, f"{name} is running", f"agent-vm stop {name}", status=1)

    def test_another_architecture_is_none_that_could_be_closed(self) -> None:
        path = self.box.lima / BASE / "lima.yaml"
        path.write_text(json.dumps({**json.loads(path.read_text()), "arch": "riscv64"}))
        self.assert_refused(self.box.run("run"), "a network that only QEMU closes")
        self.assertEqual(self.box.limactl("start"), [])
        self.assert_nothing_left()

    def test_values_that_are_none(self) -> None:
        for option, value in (
            ("--allow", "localhost:11434"), ("--allow", "127.0.0.1"), ("--allow", "[::1]:80"),
            ("--allow", "a..b"), ("--allow", "a.example:99999"), ("--allow", "github,"),
            ("--network", "lan"), ("--allow", "http://x"), ("--allow", "a b"), ("--allow", "*"),
            ("--host-port", "0"), ("--host-port", "65536"), ("--credential", "host"),
        ):  # fmt: skip
            self.assert_refused(self.box.run("run", option, value), option, status=2)

    def test_copied_alone_it_carries_its_sides(self) -> None:
        alone = self.box.home / "alone/agent_vm.py"
        self.box.write(alone, (ROOT / "agent_vm.py").read_text())
        result = self.box.run("run", "--", f"sh:{ASK} ask 10.0.0.1:80", script=alone)
        self.assertEqual((result.status, result.out[:12]), (0, "HTTP/1.1 403"), result.err)

    # The credential

    def test_the_credential_stays_on_the_host(self) -> None:
        Api.requests.clear()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        gateway = f"http://127.0.0.1:{server.server_address[1]}/gateway"
        other = '-H "Authorization: Bearer $CLAUDE_CODE_OAUTH_TOKEN"'
        script = f'curl -s {other} -d "{{}}" "$ANTHROPIC_BASE_URL/v1/messages"; env > env'
        script += "; cat ~/.agent-vm/* ~/.claude.json > files"
        for mode in ("internet", "off", "open"):
            result = self.box.run(
                "run", "--network", mode, "--", f"sh:{script}",
                CLAUDE_CODE_OAUTH_TOKEN=TOKEN, ANTHROPIC_BASE_URL=gateway,
            )  # fmt: skip
            self.assertEqual((result.status, result.out), (0, '{"type": "message"}'), result.err)
            path, headers = Api.requests[-1]
            self.assertEqual(path, "/gateway/v1/messages")
            self.assertEqual(headers["authorization"], f"Bearer {TOKEN}")
            env = self.agent_env()
            self.assertEqual(env["ANTHROPIC_BASE_URL"], "http://127.0.0.1:47103")
            placeholder = env["CLAUDE_CODE_OAUTH_TOKEN"]
            self.assertRegex(placeholder, r"^sk-ant-oat01-[\w-]{95}$")
            self.assertNotEqual(placeholder, TOKEN)
            for name in ("env", "files"):
                self.assertNotIn(TOKEN, (self.box.project / name).read_text())
            self.assertNotIn(TOKEN, json.dumps(self.box.calls()) + result.err)
            found = [path for path in self.box.state.rglob("*")
                     if path.is_file() and TOKEN in path.read_text(errors="replace")]  # fmt: skip
            self.assertEqual(found, [])

    def test_an_api_key_has_a_placeholder_of_its_own_form(self) -> None:
        key = "sk-ant-api03-not-a-real-key-" + "x" * 60
        result = self.box.run("run", "--", "sh:cat ~/.claude.json", ANTHROPIC_API_KEY=key)
        self.assertEqual(result.status, 0, result.err)
        placeholder = self.agent_env()["ANTHROPIC_API_KEY"]
        self.assertRegex(placeholder, r"^sk-ant-api03-[\w-]{95}$")
        approved = json.loads(result.out)["customApiKeyResponses"]["approved"]
        self.assertEqual(approved, [placeholder[-20:]])

    def test_a_broker_that_takes_anything_ends_the_run(self) -> None:
        (self.box.guest_bin / "curl").unlink()
        self.box.write(self.box.guest_bin / "curl", "#!/bin/sh\necho '{}'\n", 0o755)
        result = self.box.run("run", CLAUDE_CODE_OAUTH_TOKEN=TOKEN)
        self.assert_refused(result, "not confined", "a wrong placeholder is not refused")
        self.assertEqual(self.box.agent_calls(), [])

    def test_the_way_back(self) -> None:
        options = ("--credential", "guest", "--network", "off")
        self.assertEqual(self.box.run("run", *options, CLAUDE_CODE_OAUTH_TOKEN=TOKEN).status, 0)
        self.assertEqual(self.agent_env()["CLAUDE_CODE_OAUTH_TOKEN"], TOKEN)
        self.assertNotIn("ANTHROPIC_BASE_URL", self.agent_env())

    def test_an_upstream_with_a_password_is_not_shown(self) -> None:
        url = "https://user:s3cret@gw.example/"
        for options, more in (
            ((), {"ANTHROPIC_BASE_URL": url}), (("--env", f"ANTHROPIC_BASE_URL={url}"), {}),
        ):  # fmt: skip
            result = self.box.run("run", *options, CLAUDE_CODE_OAUTH_TOKEN=TOKEN, **more)
            self.assert_refused(result, "ANTHROPIC_BASE_URL holds a password")
            calls = json.dumps([call["argv"] for call in self.box.calls()])
            self.assertNotIn("s3cret", result.err + calls)

    def test_an_upstream_in_clear_is_refused(self) -> None:
        url = "http://gateway.example:4000"
        result = self.box.run("run", CLAUDE_CODE_OAUTH_TOKEN=TOKEN, ANTHROPIC_BASE_URL=url)
        self.assert_refused(result, "the credential broker did not start", "must be https")
        self.assert_nothing_left()

    def test_ssh_that_cannot_bring_the_sides(self) -> None:
        real = self.box.bin / "ssh"
        real.rename(self.box.bin / "real-ssh")
        text = (
            f'#!/bin/sh\ncase "$*" in *-R127*) exit 255;; esac\nexec {self.box.bin}/real-ssh "$@"\n'
        )
        self.box.write(real, text, 0o755)
        result = self.box.run("run")
        self.assert_refused(result, "ssh cannot bring the sides")
        self.assertEqual(self.box.agent_calls(), [])
        self.assert_nothing_left()
