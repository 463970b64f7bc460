"""One list of limactl commands, run against the fake and, where there is one, the real limactl."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path
from typing import Any

import agent_vm
from tests.support import FAKES
from tests.support import quick_python

MOUNT = {"location": "/usr", "mountPoint": "/mnt/agent-vm/0", "writable": False}
# Command, status, and a part of the last message ("" when limactl need not say anything).
COMMANDS: list[tuple[list[str], int, str]] = [
    (["create", "--tty=false", "--name=ct-a", "--cpus=1", "--memory=2", "--disk=1",
      "--set", ".mountTypesUnsupported = []", "TEMPLATE"], 0, ""),
    (["create", "--tty=false", "--name=ct-a", "TEMPLATE"], 1, "instance `ct-a` already exists"),
    (["create", "--tty=false", "--name=ct-x", "/no/such.yaml"], 1, "no such file or directory"),
    (["clone", "--tty=false", "ct-a", "ct-b", "--memory=1", "--set",
      agent_vm.clone_expression([MOUNT], "9p", forward=False)], 0, ""),
    (["clone", "--tty=false", "ct-a", "ct-b"], 1, "instance `ct-b` already exists"),
    (["clone", "--tty=false", "ct-none", "ct-c"], 1, "instance `ct-none` not found"),
    (["clone", "--tty=false", "ct-half", "ct-c"], 1, "instance `ct-half` not found"),
    (["clone", "--tty=false", "ct-b", "ct-half"], 1, "instance `ct-half` already exists"),
    (["list", "--format", "json"], 0, ""),
    (["list", "--format", "json", "ct-none"], 1, "unmatched instances"),
    (["protect", "ct-a"], 0, "Protected `ct-a`"),
    (["protect", "ct-none"], 1, "failed to inspect instance `ct-none`"),
    (["delete", "-f", "ct-a"], 1, "instance is protected to prohibit accidental removal"),
    (["clone", "--tty=false", "ct-a", "ct.c0ffee"], 0, ""),
    (["delete", "-f", "ct.c0ffee"], 0, "Deleted `ct.c0ffee`"),
    (["unprotect", "ct-a"], 0, "Unprotected `ct-a`"),
    (["unprotect", "ct-a"], 0, "Instance `ct-a` isn't protected. Skipping."),
    (["unprotect", "ct-none"], 1, "failed to inspect instance `ct-none`"),
    (["stop", "ct-a"], 1, "expected status `Running`, got `Stopped`"),
    (["stop", "ct-none"], 1, "no such file or directory"),
    (["delete", "-f", "ct-none"], 0, "Ignoring non-existent instance `ct-none`"),
    (["delete", "-f", "ct-half"], 1, "exists but its `lima.yaml` could not be read"),
    (["clone", "--tty=false", "ct-b", "ct-d", "--set", ".a bad expression"], 1, "invalid input"),
    (["start", "--tty=false", "--no-such-flag", "ct-b"], 1, "unknown flag: --no-such-flag"),
    (["frobnicate"], 1, 'unknown command \\"frobnicate\\"'),
    (["delete", "-f", "ct-a"], 0, "Deleted `ct-a`"),
]  # fmt: skip


class FakeTest(unittest.TestCase):
    limactl: list[str]

    def setUp(self) -> None:
        # Short, because of Lima's sockets.
        self.root = Path(tempfile.mkdtemp(prefix="ct-", dir="/tmp")).resolve()
        self.addCleanup(shutil.rmtree, self.root, ignore_errors=True)
        self.limactl = self.find_limactl()
        home = self.root / "l"
        (home / "ct-half").mkdir(parents=True)
        self.env = {**os.environ, "LIMA_HOME": str(home), "HOME": str(self.root)}
        self.env["FAKE_LIMA_CALLS"] = str(self.root / "calls")
        disk = self.root / "disk.raw"
        disk.touch()
        os.truncate(disk, 1 << 20)
        arch = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine(), platform.machine())
        self.template = self.root / "template.yaml"
        self.template.write_text(json.dumps({
            "images": [{"location": str(disk), "arch": arch}], "mounts": [],
            "containerd": {"system": False, "user": False},
        }))  # fmt: skip

    def find_limactl(self) -> list[str]:
        return [quick_python(), "-IS", str(FAKES / "limactl")]

    def run_limactl(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.limactl, *args], env=self.env, stdin=subprocess.DEVNULL, text=True,
            capture_output=True, timeout=60,
        )  # fmt: skip

    def instances(self) -> dict[str, dict[str, Any]]:
        lines = self.run_limactl("list", "--format", "json").stdout.splitlines()
        return {fields["name"]: fields for fields in map(json.loads, lines)}

    def test_statuses_and_messages(self) -> None:
        for command, status, message in COMMANDS:
            with self.subTest(command=command):
                argv = [str(self.template) if word == "TEMPLATE" else word for word in command]
                result = self.run_limactl(*argv)
                self.assertEqual(result.returncode, status, result.stderr)
                self.assertIn(message, result.stderr)
                if status:
                    self.assertIn("level=fatal msg=", result.stderr.splitlines()[-1])

    def test_the_fields_that_are_read(self) -> None:
        for command, _, _ in COMMANDS[:4]:
            self.run_limactl(*(str(self.template) if w == "TEMPLATE" else w for w in command))
        self.run_limactl("clone", "--tty=false", "ct-a", "ct.c0ffee")
        self.run_limactl("protect", "ct-a")
        text = self.run_limactl("list", "--format", "json").stdout
        found = {instance.name: instance for instance in agent_vm.parse_instances(text)}
        self.assertEqual(sorted(found), ["ct-a", "ct-b", "ct-half", "ct.c0ffee"])
        clone = found["ct-b"]
        self.assertEqual((clone.status, clone.mounts), ("Stopped", (("/usr", False),)))
        self.assertEqual(clone.mount_type, "9p")
        self.assertEqual((clone.extras, clone.hostname), ((), "lima-ct-b"))
        self.assertTrue(clone.home.startswith("/"))
        self.assertTrue((clone.dir / "lima.yaml").is_file())
        self.assertEqual(found["ct.c0ffee"].hostname, "lima-ct-c0ffee")
        self.assertEqual(found["ct-half"].status, "Broken")

    def test_the_defaults_of_limas_home_add_mounts_to_every_instance(self) -> None:
        self.run_limactl("create", "--tty=false", "--name=ct-a", str(self.template))
        config = self.root / "l/_config"
        config.mkdir(exist_ok=True)
        (config / "default.yaml").write_text(json.dumps({"mounts": [MOUNT]}))
        mounts = self.instances()["ct-a"]["config"]["mounts"]
        self.assertEqual([mount["location"] for mount in mounts], ["/usr"])

    def test_the_version(self) -> None:
        printed = self.run_limactl("--version").stdout
        self.assertRegex(printed, r"^limactl version \d+\.\d+")


class RealTest(FakeTest):
    """The same tests; what they find here is what the fake must do."""

    def find_limactl(self) -> list[str]:
        real = shutil.which("limactl")
        if not real:
            self.skipTest("no limactl on PATH")
        if os.geteuid() == 0:
            self.skipTest("limactl refuses root")
        return [real]


if __name__ == "__main__":
    unittest.main()
