"""What agent_vm.py starts, writes and reads while it works is what its docstring says."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import agent_vm
from tests.quick import Result
from tests.support import BASE
from tests.support import FAKES
from tests.support import SCRIPT
from tests.support import TOKEN
from tests.support import WorldTest

# What every Python program reads, and what the kernel or the system tells.
SYSTEM = (
    "/proc/", "/dev/", "/sys/", "/usr/", "/lib", "/etc/", sys.prefix, sys.base_prefix,
    sys.pycache_prefix or sys.prefix,
)  # fmt: skip


class TouchTest(WorldTest):
    def setUp(self) -> None:
        super().setUp()
        self.log = self.box.root / "touched"

    def watched(self, *args: str, **env: str) -> Result:
        argv = (str(self.log), str(SCRIPT), *args)
        return self.box.run(*argv, script=FAKES / "watched.py", **env)

    def touched(self, kind: str) -> set[str]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return {line["what"] for line in lines if line["kind"] == kind}

    def said(self, heading: str) -> list[str]:
        """The paths of a paragraph of the docstring, in this test's world."""
        text = re.search(rf"^{heading}:(.*?)(?=^\w+:|\Z)", agent_vm.__doc__ or "", re.M | re.S)
        assert text
        words = re.findall(r"~/[\w./-]*\w", text[1])
        paths = [word.replace("~", str(self.box.home), 1) for word in words]
        return [path.replace(f"{self.box.home}/.lima", str(self.box.lima)) for path in paths]

    def outside(self, paths: set[str], allowed: list[str]) -> list[str]:
        prefixes = (*allowed, str(self.box.root / "tmp"), *SYSTEM, str(SCRIPT.parent))
        return sorted(path for path in paths if not path.startswith(prefixes))

    def test_a_life_of_commands_touches_what_the_docstring_says(self) -> None:
        self.box.write(self.box.config / "config.ini", "[agent-vm]\nmemory = 2\n")
        self.box.write(self.box.home / ".claude-vm.setup.sh", "true")
        self.box.write(self.box.project / ".git/config", '[remote "origin"]\nurl = x\n')
        commands = (
            ("setup", "--minimal"), ("run", "--", "sh:true"), ("shell", "--keep", "--", "true"),
            ("list",), ("gc",), ("doctor", "-v"), ("auth", "status"), ("rm", "--force", BASE),
            ("setup", "--rollback"), ("run", "--github"), ("completion",), ("shell-init",),
        )  # fmt: skip
        for argv in commands:
            result = self.watched(*argv, ANTHROPIC_API_KEY=TOKEN)
            self.assertNotIn("Traceback", result.err, argv)
        self.assertEqual(self.outside(self.touched("write"), self.said("Writes")), [])
        reads = [*self.said("Reads"), *self.said("Writes"), f"{self.box.project}/.git"]
        self.assertEqual(self.outside(self.touched("read"), reads), [])
        started = {os.path.basename(path) for path in self.touched("start")}
        self.assertEqual(started - agent_vm.STARTS, set())
        self.assertEqual(started, {"limactl", "ssh", "git", "qemu-img", "npm"})
        sockets = {os.path.basename(path) for path in self.touched("connect")}
        self.assertEqual(sockets, {"qmp.sock", "wake.sock"})
        touched_project = [path for path in self.touched("write") if str(self.box.project) in path]
        self.assertEqual(touched_project, [])

    def test_the_watch_sees_what_is_done(self) -> None:
        script = self.box.root / "script.py"
        script.write_text(
            "import os, subprocess\nopen('new', 'w').close()\nos.rename('new', 'newer')\n"
            "subprocess.run(['true'])\nopen('newer').close()\n"
        )
        self.box.run(str(self.log), str(script), script=FAKES / "watched.py", PATH="/usr/bin:/bin")
        new, newer = (str(self.box.project / name) for name in ("new", "newer"))
        self.assertLessEqual({new, newer}, self.touched("write"))
        self.assertIn(newer, self.touched("read"))
        self.assertEqual({Path(path).name for path in self.touched("start")}, {"true"})
