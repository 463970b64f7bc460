"""What the host holds of a VM's network and of the model's credential, in real VMs.

VM_TEST_REGISTRIES names the hosts of npm's registry, then of pip's: without it, what installs
packages from them is not tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.vm_case import TESTS
from tests.vm_case import TOKEN
from tests.vm_case import VMCase
from tests.vm_case import wait_for

ATTACKS = TESTS / "fakes/egress_attacks.py"
CLOSED_PORTS = (47107, 47109)  # of the guest's loopback: Lima does not forward them
REGISTRIES = os.environ.get("VM_TEST_REGISTRIES", "").split()

# As the agent, who is the guest's root when it likes. $1 and $2 are the two halves of the
# credential, or the search would find itself. That the search finds is seen by the placeholder.
WORK = r"""
exec 2>&1
step() {
  what=$1
  if "${@:2}" > ~/said 2>&1; then echo "works: $what"; else
    echo "fails: $what"
    tail -5 ~/said
  fi
}
unled() {  # what knows no proxy is led to the way out
  env -u http_proxy -u https_proxy -u HTTP_PROXY -u HTTPS_PROXY -u NODE_USE_ENV_PROXY "$@"
}
npm=${4-}
claude() { command claude --dangerously-skip-permissions "$@"; }
step claude grep -x 'all done' <(claude -p 'write a file')
step 'its tool' test -s agent.txt
step 'apt-get update' sudo apt-get update --error-on=any
step 'apt-get update, led' unled sudo apt-get -o Acquire::http::Proxy=false update --error-on=any
install='apt-get install -y --no-install-recommends'
step 'apt-get install' sudo $install nodejs python3-pip python3-venv
fetch="fetch('http://host.lima.internal:$3/').then(r => process.exit(r.ok ? 0 : 1))"
step 'a Node program' node -e "$fetch"
step 'a Node program, led' unled node -e "$fetch"
if [ -n "$npm" ]; then
  step 'npm comes' curl -fsS -o npm.tgz "https://$npm/npm/-/npm-10.9.2.tgz"
  tar -xzf npm.tgz -C ~
  export npm_config_registry=https://$npm/
  step 'npm install' node ~/package/bin/npm-cli.js install --prefix ~ is-odd
  step 'npm install, led' unled node ~/package/bin/npm-cli.js install --prefix ~ left-pad
  python3 -m venv ~/venv
  step 'pip install' ~/venv/bin/pip install --no-cache-dir colorama
  step 'pip install, led' unled ~/venv/bin/pip install --no-cache-dir idna
  step 'names' unled getent hosts "$npm"
fi
step 'plain TCP' unled python3 plain.py
step 'a port of the host' curl -fsS "http://host.lima.internal:$3/"
step 'a port of the host, led' unled curl -fsS "http://host.lima.internal:$3/"
step 'git clone' git clone -q https://github.com/good/r ~/r
step 'git push' git -C ~/r push -q origin HEAD:fix
echo "credential of the agent: $(grep -o 'sk-ant-[a-z0-9]*' ~/.agent-vm/credential)"
sync
holders() {  # of a word, which is in no argv here: that is looked at, too
  echo "$1" > /dev/shm/word
  sudo grep -rlaFf /dev/shm/word --exclude-dir=proc /etc /home /opt /root /run /tmp /usr /var
  for file in /proc/[0-9]*; do
    sudo cat "$file/environ" "$file/cmdline" 2> /dev/null | grep -qaFf /dev/shm/word && echo "$file"
  done
  sudo grep -qaFf /dev/shm/word /dev/vda && echo the disk
  sudo dmesg | grep -Ff /dev/shm/word
}
holders "$1$2" | sed 's/^/holds it: /'
holders "$ANTHROPIC_API_KEY" | sed 's/^/holds the placeholder: /'
exit 0
"""

# A program that knows no proxy, and waits for the other side to begin.
PLAIN = """
import socket
with socket.create_connection(("host.lima.internal", PORT), 10) as client:
    client.sendall(b"plain")
    assert client.recv(9) == b"plain", "no echo"
"""

# In an open VM: what is closed elsewhere answers.
LOOK_OPEN = r"""
exec 2>&1
sudo python3 egress_attacks.py settings.json direct
touch ask
while [ -e ask ]; do sleep 0.2; done
sudo python3 -IBSc '
import sys
sys.path.insert(0, ".")
import wake
found = wake.Probe(int(sys.argv[1])).found()
sys.exit(f"the network is not closed: {found}" if found else 0)' "$(cat port)"
echo "the probe: $?"
"""

LOOK_OFF = r"""
exec 2>&1
claude --dangerously-skip-permissions -p 'write a file'
start=$SECONDS
for url in http://$1/ http://host.lima.internal:$2/ http://example.com/; do
  curl -sS -m 30 "$url" && echo reached
done
sudo nft flush ruleset
curl -sS -m 30 http://$1/ && echo reached
echo "seconds: $((SECONDS - start))"
"""

LOSE_THE_WAY_OUT = r"""
exec 2>&1
curl -sS -m 20 http://127.0.0.1:47101/ | grep -o agent-vm
touch up
while [ -e up ]; do sleep 0.2; done
curl -sS -m 20 http://127.0.0.1:47101/ && echo still there
env -u http_proxy curl -sS -m 20 "http://192.168.5.2:$1/" && echo open
sudo nft flush ruleset
env -u http_proxy curl -sS -m 20 "http://192.168.5.2:$1/" && echo open
claude --dangerously-skip-permissions -p 'write a file'
exit 7
"""


class Canary:
    """Answers CANARY at a port of all the host's addresses, TCP and UDP, and keeps who came."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.socks = []
        tcp = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self.port = tcp.getsockname()[1]
        udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        udp.bind(("::", self.port))
        self.socks = [tcp, udp]
        for one, target in ((tcp, self.serve), (udp, self.answer)):
            threading.Thread(target=target, args=(one,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, peer = sock.accept()
                self.came.append(f"TCP {peer}")
                with client, contextlib.suppress(OSError):
                    client.sendall(b"CANARY\n")

    def answer(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, peer = sock.recvfrom(2000)
                if not peer:
                    return  # closed
                self.came.append(f"UDP {peer} {data[:20]!r}")
                sock.sendto(b"CANARY\n", peer)

    def close(self) -> None:
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class OpenServer:
    """A port of the host's loopback that a run opens: what came there is kept."""

    def __init__(self, elsewhere: int) -> None:
        self.heard = b""
        self.elsewhere = elsewhere
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.sock.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(5)
            first = client.recv(65536)
            self.heard += first
            if b" HTTP/1." not in first:
                client.sendall(first)
                return
            status, more = "200 OK", ""
            if b"/redirect " in first:
                status, more = "302 Found", f"Location: http://127.0.0.1:{self.elsewhere}/\r\n"
            client.sendall(f"HTTP/1.1 {status}\r\n{more}Content-Length: 5\r\n\r\nopen\n".encode())
            while True:  # as if the connection were kept: what comes after the request
                data = client.recv(65536)
                if not data:
                    return
                self.heard += data

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def own_address(family: int, towards: str) -> str:
    """This host's address on the way to another one; "" when it has none."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((towards, 9))
        return str(sock.getsockname()[0])
    return ""


def says(port: int) -> bytes:
    """What a port of the host's loopback says first."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as client:
        client.settimeout(5)
        return client.recv(99)
    return b""


class NetworkTests(VMCase):
    def registries(self) -> list[str]:
        """Those of the base instance, and those that a test needs besides."""
        (known,) = (self.root / "l").glob("agent-vm-base.*/agent-vm-registries")
        return [*known.read_text().split(), *REGISTRIES]

    def allowed(self) -> list[str]:
        return [word for name in self.registries() for word in ("--allow", name)]

    @contextlib.contextmanager
    def servers(self) -> Iterator[tuple[Canary, OpenServer]]:
        canary = Canary()
        server = OpenServer(canary.port)
        try:
            yield canary, server
        finally:
            canary.close()
            server.close()

    def settings(self, project: Path, canary: Canary, **more: Any) -> dict[str, Any]:
        """What egress_attacks.py is told, in the project of its VM."""
        lan = own_address(socket.AF_INET, "192.0.2.254") or "192.168.1.1"
        settings = {
            "canary": canary.port, "open": 9, "lan": lan, "hostname": socket.gethostname(),
            "lan6": own_address(socket.AF_INET6, "2001:db8::1"), "listed": "", "other": "",
            "outside": socket.gethostbyname(self.registries()[0]), "any": self.registries()[0],
            "ports": [], "ask": str(project / "ask"), "secret": "", **more,
        }  # fmt: skip
        (project / "settings.json").write_text(json.dumps(settings))
        shutil.copy(ATTACKS, project)
        return settings

    def audit(self, name: str) -> list[dict[str, Any]]:
        path = self.root / "state/agent-vm/audit" / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def model_paths(self) -> list[str]:
        log = self.root / "model.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [json.loads(line)["path"] for line in lines]

    def attack(self, mode: str, listed: str = "") -> None:
        """Every attempt of egress_attacks.py, in a VM: the host sees that none reached anything.

        `listed`: a name that its list has; else a port of the host is open.
        """
        project, other = self.project(), self.project("other")
        secret = self.project("secret") / "secret"
        secret.write_text("CANARY\n")
        with self.servers() as (canary, server), socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
            free.close()
            settings = self.settings(
                project, canary, open=server.port, ports=[*CLOSED_PORTS, port, canary.port],
                other=str(other), secret=str(secret), listed=listed,
            )  # fmt: skip
            place = f"{settings['hostname']}:{canary.port}"  # of loopback, often: a name that is
            argv = ["--network", mode, "--allow", place, "--mount", str(other), *self.allowed()]
            argv += [] if listed else ["--host-port", str(server.port)]
            before = len(self.model_paths())
            script = "sudo python3 egress_attacks.py settings.json"
            with self.start("shell", *argv, "--", "bash", "-c", script, cwd=project) as process:
                name = self.started_clone(process)
                asked = project / "ask"
                wait_for(lambda: asked.exists() or process.poll() is not None, 900, "the sides")
                try:
                    if process.poll() is None:
                        self.look_at_ports(port)
                        self.look_at_sides(name)
                finally:
                    asked.unlink(missing_ok=True)
                out, err = process.communicate()
        lines = out.splitlines()
        print(f"{self.id()}: {len(lines)} attempts", flush=True)
        (self.root / f"{mode}.attempts").write_text(out)
        self.assertEqual(process.returncode, 0, err + out)
        self.assertEqual([line for line in lines if ": nothing: " not in line], [])
        self.assertGreater(len(lines), 300)
        self.assertEqual(canary.came, [])
        self.assertNotIn(b"smuggled", server.heard)
        # What the attempts asked the sides for, and was not refused:
        passed = {
            (row["host"], row["port"]) for row in self.audit(name) if row["verdict"] != "refused"
        }
        model = int(self.env["ANTHROPIC_BASE_URL"].rpartition(":")[2])  # asked whether it is there
        served = {("host.lima.internal", server.port), ("127.0.0.1", model)}
        self.assertLessEqual(passed, served)
        self.assertEqual(self.model_paths()[before:], [])
        self.assert_nothing_left()

    def look_at_ports(self, port: int) -> None:
        """Of the ports that the guest has opened, one is forwarded to the host's loopback."""
        wait_for(lambda: says(port) == b"FROM THE GUEST", 60, "a port that is forwarded")
        for closed in range(47101, 47110):
            self.assertEqual(says(closed), b"", closed)

    def look_at_sides(self, name: str) -> None:
        """Their sockets are files that nobody else may open: no other VM has a way to them."""
        for side in ("egress", "dns", "broker"):
            path = self.root / "l" / name / f"{side}.sock"
            self.assertTrue(path.is_socket(), path)
            self.assertEqual(path.stat().st_mode & 0o077, 0, path)
        for line in self.sides(name).values():
            self.assertIn(" --listen unix:/", line)

    def test_root_of_a_vm_with_the_internet_reaches_nothing_else(self) -> None:
        self.attack("internet")

    def test_root_of_a_vm_with_a_list_reaches_nothing_else(self) -> None:
        self.attack("allow", listed=self.registries()[0])

    def test_the_same_attempts_succeed_where_the_network_is_open(self) -> None:
        """Else the others would prove nothing."""
        project = self.project()
        with self.servers() as (canary, _):
            settings = self.settings(project, canary)
            shutil.copy(TESTS.parent / "lima/guest/wake.py", project)
            argv = ("--network", "open", "--", "bash", "-c", LOOK_OPEN)
            with self.start("shell", *argv, cwd=project) as process:
                name = self.started_clone(process)
                asked = project / "ask"
                wait_for(lambda: asked.exists() or process.poll() is not None, 900, "attempts")
                config = (self.root / "l" / name / "ssh.config").read_text()
                ssh_port = re.findall(r"^ *Port (\d+)$", config, re.M)[0]
                (project / "port").write_text(ssh_port)
                asked.unlink(missing_ok=True)
                out, err = process.communicate()
        reached = [line.split(": REACHED")[0] for line in out.splitlines() if "REACHED" in line]
        print(f"{self.id()}: reached: {'; '.join(reached)}", flush=True)
        for what in ("TCP to the host, 192.168.5.2", "UDP to the host, 192.168.5.2",
                     "TCP to the host, host.lima.internal", f"TCP to the host, {settings['lan']}",
                     f"TCP to {settings['outside']} port 80",
                     "a SYN made by hand, 192.168.5.15 to 192.168.5.2"):  # fmt: skip
            self.assertIn(f"'{what}'", reached, out + err)
        self.assertGreater(len(canary.came), 5)
        found = f"the network is not closed: .*192.168.5.2 port {ssh_port} answers"
        self.assertRegex(out, found)
        self.assertIn("the probe: 1", out)
        self.assert_nothing_left()

    def work(self, *network: str) -> None:
        bare, project = self.serve_github(), self.project()
        with self.servers() as (_, server):
            (project / "plain.py").write_text(PLAIN.replace("PORT", str(server.port)))
            middle = len(TOKEN) // 2
            argv = [
                "shell",
                *network,
                "--host-port",
                str(server.port),
                *self.allowed(),
                "--repo",
                "good/r",
            ]
            words = (TOKEN[:middle], TOKEN[middle:], str(server.port), *REGISTRIES[:1])
            result = self.agent_vm(*argv, "--", "bash", "-c", WORK, "work", *words, cwd=project)
        said = result.stdout + result.stderr
        works = re.findall("^works: (.*)", said, re.M)
        print(f"{self.id()}: {'; '.join(works)}", flush=True)
        self.assertEqual((result.returncode, re.findall("^fails: .*", said, re.M)), (0, []), said)
        steps = WORK if REGISTRIES else WORK.partition("if [ -n")[0] + WORK.partition("\nfi\n")[2]
        self.assertEqual(len(works), len(re.findall("^ *step ", steps, re.M)), said)
        self.assertIn("credential of the agent: sk-ant-api03", said)
        self.assertNotIn("holds it", said)
        for place in ("/home/.*/credential", "/proc/[0-9]+", "the disk"):
            self.assertRegex(said, f"holds the placeholder: {place}")
        branches = subprocess.run(
            ["git", "-C", bare, "for-each-ref", "--format=%(refname)"],
            stdout=subprocess.PIPE, text=True, check=True,
        ).stdout.split()  # fmt: skip
        self.assertEqual(branches, ["refs/heads/fix", "refs/heads/main"])
        with open(self.root / "model.log") as log:
            self.assertEqual(json.loads(log.readlines()[-1])["x-api-key"], TOKEN)
        self.assert_nothing_left()

    def test_work_goes_on_with_the_internet(self) -> None:
        self.work("--network", "internet")

    def test_work_goes_on_with_a_list(self) -> None:
        self.work("--network", "allow")

    def test_without_a_network_the_agent_has_its_model(self) -> None:
        with self.servers() as (canary, _):
            outside = socket.gethostbyname(self.registries()[0])
            words = ("off", outside, str(canary.port))
            argv = ("--network", "off", "--", "bash", "-c", LOOK_OFF, *words)
            result = self.agent_vm("shell", *argv, cwd=self.project())
        print(f"{self.id()}: {result.stdout}", flush=True)
        self.assertIn("all done", result.stdout, result.stderr)
        self.assertNotIn("reached", result.stdout.split())
        self.assertEqual(canary.came, [])
        self.assert_nothing_left()

    def test_a_run_goes_on_when_the_way_out_has_ended(self) -> None:
        project = self.project()
        with self.servers() as (canary, _):
            argv = ("shell", "--", "bash", "-c", LOSE_THE_WAY_OUT, "lose", str(canary.port))
            with self.start(*argv, cwd=project) as process:
                name = self.started_clone(process)
                self.wait_until_up(process, project)
                pids = [pid for pid, line in self.sides(name).items() if " --dns " in line]
                os.kill(pids[0], signal.SIGKILL)
                time.sleep(5)  # it is said within two seconds
                (project / "up").unlink()
                out, err = process.communicate()
        self.assertEqual(process.returncode, 7, err)
        self.assertIn("the way out has ended; the VM goes on without it", err)
        self.assertIn("agent-vm", out)
        self.assertIn("all done", out)
        self.assertNotIn("still there", out)
        self.assertNotIn("open", out.split())
        self.assertEqual(canary.came, [])
        self.assert_nothing_left()

    def sides(self, name: str) -> dict[int, str]:
        """Command lines of the sides of a run that lima/egress.py is, by their pids."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = entry.read_bytes().decode(errors="replace").split("\0")
                if name in " ".join(words) and any(word.endswith("/egress.py") for word in words):
                    found[int(entry.parent.name)] = " ".join(words)
        return found
