"""lima/: real files that tools can read, and the copy of them inside the script."""

from __future__ import annotations

import re
import shutil
import subprocess
import unittest

import agent_vm
from tests.support import ROOT
from tests.support import TESTS

LIMA = ROOT / "lima"
TEMPLATE = LIMA / "agent-vm.yaml"
PROVISION = sorted(LIMA.glob("provision/*"))


class TemplateTest(unittest.TestCase):
    text = TEMPLATE.read_text()

    def test_the_copy_in_the_script_is_current(self) -> None:
        files = [path for path in LIMA.rglob("*") if path.is_file()]
        copies = {str(path.relative_to(LIMA)): path.read_text() for path in files}
        self.assertEqual(agent_vm.EMBEDDED, copies)

    def test_the_tool_that_makes_the_copy_agrees(self) -> None:
        command = [shutil.which("python3") or "python3", str(TESTS / "tools/embed.py"), "--check"]
        self.assertEqual(subprocess.run(command).returncode, 0)

    def test_it_needs_the_lima_that_the_script_asks_for(self) -> None:
        version = ".".join(map(str, agent_vm.MIN_LIMA))
        self.assertIn(f"\nminimumLimaVersion: {version}.0\n", self.text)

    def test_it_mounts_nothing_runs_no_containerd_and_takes_no_key(self) -> None:
        for line in ("mounts: []", "  system: false", "  user: false", "  forwardAgent: false",
                     "  loadDotSSHPubKeys: false"):  # fmt: skip
            self.assertIn(f"\n{line}\n", self.text)

    def test_it_runs_every_provision_script_once_and_in_order(self) -> None:
        lines = [line.strip() for line in self.text.splitlines() if "file: provision/" in line]
        self.assertEqual(lines, [f"file: provision/{path.name}" for path in PROVISION])

    def test_the_first_line_says_how_to_try_it_alone(self) -> None:
        self.assertIn("limactl start", self.text.splitlines()[0])


class ProvisionTest(unittest.TestCase):
    def test_scripts_are_strict_executable_and_say_who_runs_them(self) -> None:
        for path in PROVISION:
            with self.subTest(path=path.name):
                lines = path.read_text().splitlines()
                self.assertEqual(lines[0], "#!/bin/bash")
                self.assertIn("Run by Lima", lines[1])
                self.assertIn("set -eux -o pipefail", lines)
                self.assertEqual(path.stat().st_mode & 0o111, 0o111)

    def test_scripts_are_bash(self) -> None:
        for path in PROVISION:
            subprocess.run(["bash", "-n", str(path)], check=True)

    def test_scripts_do_their_work_once(self) -> None:
        for path in PROVISION:
            text = path.read_text()
            self.assertIn(f"marker=/var/lib/agent-vm/done/{path.stem}\n", text)
            self.assertTrue(text.endswith('touch "$marker"\n'), path.name)

    def test_the_marker_that_setup_looks_for_is_the_last_ones(self) -> None:
        self.assertTrue(agent_vm.PROVISION_DONE.endswith(f"/{PROVISION[-1].stem}"))

    def test_only_vendors_are_named_in_the_sources(self) -> None:
        vendors = {"github.com", "lima-vm.io", "claude.ai"}
        vendors |= {"deb.nodesource.com", "download.docker.com"}
        vendors |= {"api.github.com", "api.githubcopilot.com"}
        for path in (TEMPLATE, *PROVISION, *ROOT.glob("*.py")):
            hosts = set(re.findall(r"https?://([a-z0-9-]+(?:\.[a-z0-9-]+)+)", path.read_text()))
            self.assertEqual(
                hosts - vendors - {"127.0.0.1", "host.lima.internal"}, set(), path.name
            )


if __name__ == "__main__":
    unittest.main()
