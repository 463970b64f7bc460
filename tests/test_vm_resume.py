"""A base instance that setup saves as it runs, thin clones of its disk, and runs that resume it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.support import WorldTest
from tests.support import executable

QEMU_IMG = """\
case $1 in
info) echo '{"format": "qcow2"}' ;;
create) [ -z "$FAKE_IMG_FAIL" ] || { echo "no room" >&2; exit 1; }
  for word; do case $word in -b*) below=${word#-b} ;; esac; done
  echo "QFI over $below" > "$word" ;;
esac"""


class SavedTest(WorldTest):
    base = False
    COST = 6

    def setUp(self) -> None:
        super().setUp()
        executable(self.box.bin / "qemu-img", QEMU_IMG)

    def set_up(self, *options: str, **env: str) -> str:
        """Run setup; the instance that it has made."""
        result = self.box.run("setup", "--minimal", *options, **env)
        self.assertEqual(result.status, 0, result.err)
        self.said = result.err
        return self.box.read_names()[0]

    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.box.lima / "_agent-vm").glob("*"))

    def asked(self) -> list[dict[str, Any]]:
        """What lima/qemu.py was asked, of each start of a clone."""
        starts = [call for call in self.box.calls("limactl") if call["argv"][0] == "start"]
        clones = [call for call in starts if "-base." not in call["argv"][-1]]
        return [json.loads(call["env"]["AGENT_VM_QEMU"]) for call in clones]

    # Setup

    def test_setup_freezes_the_disk_and_saves_the_vm(self) -> None:
        base = self.set_up()
        folder = self.box.lima / "_agent-vm" / base
        files = sorted(path.name for path in folder.iterdir())
        self.assertEqual(files, ["disk", "machine.json", "memory", "saved.json", "state"])
        self.assertEqual((folder / "disk").read_text(), "disk of a new instance")
        self.assertEqual((folder / "disk").stat().st_mode & 0o777, 0o400)
        self.assertEqual(folder.stat().st_mode & 0o777, 0o700)
        layer = (self.box.lima / base / "disk").read_text()
        self.assertEqual(layer, f"QFI over ../_agent-vm/{base}/disk\n")
        self.assertNotIn("booted, not resumed", self.said)
        self.assertFalse((self.box.lima / base / "ha.pid").exists())

    def test_what_keeps_it_from_being_saved_is_said_and_the_clones_are_thin_all_the_same(
        self,
    ) -> None:
        for options, env, why in (
            (["--no-resume"], {}, "setup --no-resume"),
            ([], {"FAKE_QEMU_FAIL": "start"}, "limactl start failed: agent-vm: the VM is not "),
            ([], {"FAKE_QEMU_FAIL": "migrate"}, "QEMU could not save it (failed)"),
            ([], {"FAKE_GUEST_FAIL": "sudo"}, "it does not settle"),
        ):
            with self.subTest(why=why):
                base = self.set_up(*options, **env)
                self.assertIn(f"booted, not resumed: {why}", self.said)
                self.assertFalse((self.box.lima / "_agent-vm" / base / "saved.json").exists())
                self.assertIn("QFI over", (self.box.lima / base / "disk").read_text())
                self.assertEqual(self.box.run("run", "--", "sh:true").status, 0)
                self.assertNotIn("saved", self.asked()[-1])

    def test_a_layer_that_cannot_be_made_leaves_the_disk(self) -> None:
        base = self.set_up(FAKE_IMG_FAIL="1")
        self.assertIn("booted, not resumed: qemu-img create failed: no room", self.said)
        self.assertEqual((self.box.lima / base / "disk").read_text(), "disk of a new instance")

    def test_another_format_is_left_alone(self) -> None:
        executable(self.box.bin / "qemu-img", """echo '{"format": "raw"}'""")
        base = self.set_up()
        self.assertIn("booted, not resumed: qemu-img finds no disk in QEMU's format", self.said)
        self.assertEqual((self.box.lima / base / "disk").read_text(), "disk of a new instance")
        self.assertEqual(len(self.box.limactl("start")), 1)

    # What a frozen disk outlives

    def test_a_frozen_disk_goes_with_the_last_that_names_it(self) -> None:
        first = self.set_up()
        self.assertEqual(self.box.run("shell", "--keep", "--", "true").status, 0)
        (kept,) = self.box.clones()
        second, third = self.set_up(), self.set_up()
        self.box.run("gc")
        self.assertEqual(self.box.read_names(), [third, second])
        self.assertEqual(self.saved(), sorted([first, second, third]))  # a clone names the first
        self.box.run("rm", kept)
        self.box.run("gc")
        self.assertEqual(self.saved(), sorted([second, third]))
        self.box.run("rm", "--force", second)
        self.box.run("rm", "--force", third)
        self.box.run("gc")
        self.assertEqual(self.saved(), [])

    def test_what_a_setup_that_was_killed_left_is_removed(self) -> None:
        for verb in ("start:1", "start:2", "stop:2", "protect:1"):
            with self.subTest(killed_after=verb):
                before = self.saved()
                process = self.box.start("setup", "--minimal", FAKE_LIMA_KILL=verb)
                self.box.finish(process)
                self.assertEqual(process.returncode, -9)
                self.box.run("gc")
                names = self.box.read_names()
                self.assertEqual(self.box.instances(), sorted(names))
                self.assertEqual(self.saved(), before)

    def test_the_size_of_what_is_saved_is_listed_with_its_base(self) -> None:
        base = self.set_up()
        (self.box.lima / "_agent-vm" / base / "memory").write_bytes(bytes(5 << 20))
        row = json.loads(self.box.run("list", "--json").out)
        self.assertGreater(row["disk_bytes"], 5 << 20)

    # Runs

    def test_a_run_resumes_it(self) -> None:
        base = self.set_up()
        result = self.box.run("run", "--timing", "--", "sh:cat > /dev/null; pwd")
        self.assertEqual((result.status, result.out), (0, f"{self.box.project}\n"), result.err)
        (asked,) = self.asked()
        self.assertEqual(asked["saved"], str(self.box.lima / "_agent-vm" / base))
        self.assertIs(asked["resume"], True)
        self.assertEqual(len(asked["mounts"]), 8)
        timing = json.loads(result.err.partition("timing: ")[2])
        phases = ["cloned", "resumed", "ssh", "prepared", "ended", "deleted"]
        self.assertEqual(list(timing), phases)
        self.assertEqual(sorted(timing.values()), list(timing.values()))
        self.assertEqual((self.box.clones(), self.box.leases()), ([], []))

    def test_what_fits_no_more_is_booted(self) -> None:
        base = self.set_up()
        folder, disk = self.box.lima / "_agent-vm" / base, self.box.lima / base / "disk"
        more = [self.box.home / f"more{number}" for number in range(7)]
        for path in more:
            path.mkdir()
        for options, why in (
            (["--boot"], "--boot"),
            (["--memory", "1"], "--memory=1"),
            (["--cpus", "3"], "--cpus=3"),
            ([word for path in more for word in ("--mount", str(path))], "more folders"),
        ):
            result = self.box.run("run", "-v", *options, "--", "sh:true")
            self.assertEqual(result.status, 0, result.err)
            self.assertIn("it is not resumed: ", result.err)
            self.assertIn(why, result.err)
            self.assertNotIn("saved", self.asked()[-1])
        for path in (disk, folder / "memory", folder / "state"):
            before = path.stat()
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
            result = self.box.run("run", "-v", "--", "sh:true")
            self.assertIn(f"{base} has been started, or changed, since it was saved", result.err)
            self.assertNotIn("saved", self.asked()[-1], path)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            self.assertEqual(self.box.run("run", "--", "sh:true").status, 0)
            self.assertIn("saved", self.asked()[-1], path)
        for contents in ("", "[]", "{}"):
            (folder / "saved.json").write_text(contents)
            self.assertEqual(self.box.run("run", "--", "sh:true").status, 0)
            self.assertNotIn("saved", self.asked()[-1])

    def test_what_cannot_be_resumed_is_booted_once_and_said_only_when_asked(self) -> None:
        self.set_up()
        for failing in ("start", "migrate-incoming"):
            for options, said in ((["-v"], True), ([], False)):
                result = self.box.run("run", *options, "--", "sh:pwd", FAKE_QEMU_FAIL=failing)
                self.assertEqual((result.status, result.out), (0, f"{self.box.project}\n"))
                self.assertEqual("could not be resumed: " in result.err, said, result.err)
                self.assertEqual(["saved" in asked for asked in self.asked()[-2:]], [True, False])
                self.assertEqual((self.box.clones(), self.box.leases()), ([], []))

    def test_a_vm_that_does_not_boot_either_is_an_error(self) -> None:
        self.set_up()
        result = self.box.run("run", FAKE_LIMA_FAIL="start")
        self.assert_refused(result, "limactl start failed")
        self.assertEqual((self.box.clones(), self.box.leases()), ([], []))

    def test_sizes_of_the_base_instance_that_are_said_again_are_no_others(self) -> None:
        self.box.write_config("memory = 1\ncpus = 1")
        self.set_up()
        self.assertEqual(self.box.run("run", "--", "sh:true").status, 0)
        self.assertIn("saved", self.asked()[-1])

    def test_a_signal_while_it_is_booted_in_its_place_ends_the_run(self) -> None:
        self.set_up()
        agent = "sh:touch up; sleep 60"
        process = self.box.start("run", "--", agent, FAKE_QEMU_FAIL="migrate-incoming")
        self.box.wait_for_file("up")
        process.terminate()
        self.assertEqual(self.box.finish(process).status, 143)
        self.assertEqual((self.box.clones(), self.box.leases()), ([], []))

    def test_a_disk_that_cannot_be_read_keeps_what_may_lie_below_it(self) -> None:
        base = self.set_up()
        self.assertEqual(self.box.run("shell", "--keep", "--", "true").status, 0)
        (kept,) = self.box.clones()
        self.box.run("rm", "--force", base)
        (self.box.lima / kept / "disk").chmod(0)
        result = self.box.run("gc")
        self.assertIn(f"warning: {self.box.lima}/_agent-vm/{base} stays for now", result.err)
        self.assertEqual(self.saved(), [base])

    def test_rollback_goes_back_to_what_was_saved_with_it(self) -> None:
        first = self.set_up()
        self.set_up()
        self.assertEqual(self.box.run("setup", "--rollback").status, 0)
        self.assertEqual(self.box.run("run", "--", "sh:true").status, 0)
        self.assertEqual(Path(self.asked()[-1]["saved"]).name, first)

    def test_a_frozen_disk_of_another_home_is_not_touched(self) -> None:
        self.set_up()
        other = self.box.root / "other"
        shutil.copytree(self.box.lima / "_agent-vm", other / "_agent-vm")
        before = sorted(other.rglob("*"))
        self.box.run("gc")
        self.assertEqual(sorted(other.rglob("*")), before)
