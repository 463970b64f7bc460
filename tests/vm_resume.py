"""What is resumed is a machine of its own, in real VMs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.vm_case import SCRIPT
from tests.vm_case import VMCase
from tests.vm_case import processes_of
from tests.vm_case import wait_for

# One line each of what no two machines share; the first says when it is, in the guest.
LOOK_ALIKE = r"""
echo; read -r; echo "$EPOCHREALTIME"
exec 2>&1
head -c 32 /dev/urandom | base64 -w0; echo
ssh-keygen -q -t ed25519 -N '' -f ~/new && cut -d ' ' -f 2 ~/new.pub
cat /etc/machine-id
cat /proc/sys/kernel/random/boot_id
hostname
openssl s_client -connect 127.0.0.1:4433 -trace < /dev/null 2> /dev/null |
  sed -n '/ServerHello/,/session_id/s/ *random_bytes[^=]*= *//p' | head -1
journalctl -q -n 1 -o json | grep -o '"_BOOT_ID":"[^"]*"'
"""
LINES = ["clock", "random numbers", "a new key", "machine-id", "boot id", "host name",
         "a TLS server's random number", "the journal's boot id"]  # fmt: skip


class ResumeTests(VMCase):
    def resumed(self, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        result = self.agent_vm("shell", "--timing", *args, cwd=cwd)
        self.assertEqual(result.returncode, 0, result.stderr)
        timing = json.loads(result.stderr.partition("timing: ")[2].splitlines()[0])
        self.assertIn("resumed", timing, result.stderr)
        return result

    def test_no_two_machines_share_what_is_secret_or_a_name(self) -> None:
        project = self.project()
        command = ("shell", "--timing", "--", "bash", "-c", LOOK_ALIKE)
        seen = []
        for _ in range(2):
            with subprocess.Popen(
                [sys.executable, SCRIPT, *command], env=self.env, cwd=project, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ) as process:  # fmt: skip
                assert process.stdin and process.stdout
                process.stdout.readline()
                before = time.time()
                process.stdin.write("now?\n")
                process.stdin.flush()
                there, after = process.stdout.readline(), time.time()
                print(f"clock: {before - float(there):.3f} to {after - float(there):.3f} s late")
                self.assertLess(before - 0.1, float(there))
                self.assertLess(float(there), after + 0.1)
                out, err = process.communicate()
            self.assertIn('"resumed": ', err)
            seen.append([there.strip(), *out.splitlines()])
        for what, one, two in zip(LINES, *seen):
            self.assertTrue(one and two, what)
            self.assertNotEqual(one, two, what)
        self.assertEqual([len(lines) for lines in seen], [len(LINES)] * 2, seen)
        self.assert_nothing_left()

    def test_five_at_once_three_times(self) -> None:
        project = self.project()
        for _ in range(3):
            command = ("shell", "--timing", "--", "bash", "-c", "echo > $(hostname)")
            processes = [self.start(*command, cwd=project) for _ in range(5)]
            outputs = [process.communicate() for process in processes]
            self.assertEqual([process.returncode for process in processes], [0] * 5, outputs)
            self.assertEqual([err.count('"resumed"') for _, err in outputs], [1] * 5, outputs)
            self.assert_nothing_left()
        self.assertEqual(len(list(project.iterdir())), 15)

    def test_what_was_killed_at_each_step_of_a_start_is_cleaned_up(self) -> None:
        project = self.project()
        for delay in (0.0, 0.3, 0.6, 1.0, 1.5, 2.5, 4.0, 6.0):
            process = self.start("shell", "--", "sleep", "60", cwd=project)
            name = self.started_clone(process)
            time.sleep(delay)
            process.kill()
            process.wait()
            time.sleep(0.5)
            self.agent_vm("gc")
            self.assert_nothing_left()
            self.assert_processes_end(name)
        self.resumed("--", "true", cwd=project)

    def test_a_base_instance_that_was_started_is_booted(self) -> None:
        project = self.project()
        (base,) = (self.root / "l").glob("agent-vm-base.*")
        layer = base / "disk"
        before = layer.stat()
        layer.touch()  # as a start of it would
        result = self.agent_vm("shell", "-v", "--", "uptime", "-p", cwd=project)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("has been started, or changed, since it was saved", result.stderr)
        os.utime(layer, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.resumed("--", "true", cwd=project)

    def test_a_damaged_state_is_booted(self) -> None:
        project = self.project()
        (saved,) = (self.root / "l/_agent-vm").glob("*")
        state, marks = saved / "state", saved / "saved.json"
        whole, said = state.read_bytes(), json.loads(marks.read_text())

        def put(contents: bytes) -> None:
            """A state whose size and time are those that were written down."""
            state.write_bytes(contents)
            info = state.stat()
            marks.write_text(json.dumps({**said, "state": [info.st_size, info.st_mtime_ns]}))

        try:
            put(whole[: len(whole) // 2])
            result = self.agent_vm("shell", "-v", "--", "echo", "here", cwd=project)
            self.assertEqual((result.returncode, result.stdout), (0, "here\n"), result.stderr)
            self.assertIn("could not be resumed: ", result.stderr)
            self.assert_nothing_left()
        finally:
            put(whole)
        self.resumed("--", "true", cwd=project)

    def test_limactl_finds_it_ready_and_forwards_its_ports(self) -> None:
        project = self.project()
        serve = "import socket; s = socket.create_server(('127.0.0.1', 8123)); s.accept()"
        script = f'python3 -c "{serve}" & while [ -e up ]; do sleep 0.2; done'
        command = ("shell", "--timing", "--", "bash", "-c", script)
        (project / "up").touch()
        with self.start(*command, cwd=project) as process:
            name = self.started_clone(process)

            def is_forwarded() -> bool:
                with socket.socket() as client:
                    client.settimeout(1)
                    return client.connect_ex(("127.0.0.1", 8123)) == 0

            wait_for(is_forwarded, 60, "the guest's port on the host")
            wait_for(
                lambda: not [line for line in processes_of(name) if "limactl start" in line],
                30,
                "the end of limactl start",
            )
            (project / "up").unlink()
            _, err = process.communicate()
        self.assertEqual(process.returncode, 0, err)
        self.assertIn('"resumed": ', err)
