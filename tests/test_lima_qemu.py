"""lima/qemu.py: which machines are started, and with which network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from lima import qemu

FAST = True
SCRIPT = Path(__file__).resolve().parent.parent / "lima/qemu.py"
NETDEV = "user,id=net0,net=192.168.5.0/24,dhcpstart=192.168.5.15,hostfwd=tcp:127.0.0.1:37447-:22"
# What Lima 2.2.0 gives to a VM of x86_64, shortened.
MACHINE = [
    "-m", "2048", "-cpu", "host", "-machine", "q35,accel=kvm", "-smp", "1,sockets=1",
    "-drive", "file=/l/agent-vm-net-nic-1/disk,if=none,discard=on,id=boot-disk",
    "-netdev", NETDEV, "-device", "virtio-net-pci,netdev=net0,mac=52:55:55:00:55:6c",
    "-chardev", "socket,id=char-serial,path=/l/agent-vm-net-nic-1/serial.sock,server=on,wait=off",
    "-virtfs", "local,mount_tag=lima-149e,path=/home/a/-netdev user,security_model=none",
    "-name", "lima-agent-vm-net-nic-1", "-pidfile", "/l/agent-vm-net-nic-1/qemu.pid",
]  # fmt: skip


class DecisionTest(unittest.TestCase):
    def test_one_word_is_added_and_nothing_else_changes(self) -> None:
        at = MACHINE.index(NETDEV)
        expected = [*MACHINE[:at], f"{NETDEV},restrict=on", *MACHINE[at + 1 :]]
        self.assertEqual(qemu.restricted(MACHINE), expected)
        twice = [word.replace("-netdev", "--netdev") if word == "-netdev" else word
                 for word in MACHINE]  # fmt: skip
        self.assertIn(f"{NETDEV},restrict=on", qemu.restricted(twice))

    def test_another_network_device_is_not_started(self) -> None:
        for value in (
            "", "user", "user,id=net0", NETDEV + ",restrict=off", NETDEV + ",restrict=on",
            NETDEV + ",guestfwd=tcp:10.0.2.100:1-cmd:sh", NETDEV + ",smb=/", NETDEV + ",tftp=/",
            NETDEV + ",hostfwd=tcp::80-:80", NETDEV + "\n", " " + NETDEV,
            NETDEV.replace("net0", "n1"), NETDEV.replace("user,", "user,,"),
            NETDEV.replace("127.0.0.1", "0.0.0.0"), NETDEV.replace("127.0.0.1", ""),
            NETDEV.replace("-:22", "-10.0.2.1:22"), NETDEV.replace("user", "tap"),
            NETDEV.replace(",hostfwd=tcp:127.0.0.1:37447-:22", ""),
            NETDEV.replace("dhcpstart=192.168.5.15", "dhcpstart=192.168.5.15,,restrict=off"),
            '{"type":"user","id":"net0"}', "socket,id=net0,fd=3", "stream,id=net0,server=off",
            "help", "vmnet-shared,id=net0", "-netdev",
        ):  # fmt: skip
            words = [value if word == NETDEV else word for word in MACHINE]
            with self.assertRaises(qemu.Refused, msg=value):
                qemu.restricted(words)

    def test_more_than_one_way_to_a_network_is_not_started(self) -> None:
        for more in (
            ["-netdev", NETDEV], ["--netdev", "user,id=net1"], ["-netdev"], ["-nic", "user"],
            ["--nic", "user"], ["-net", "nic"], ["-net", "user"], ["-readconfig", "/tmp/x"],
            ["-set", "netdev.net0.restrict=off"], ["--set", "x"],
        ):  # fmt: skip
            for words in ([*MACHINE, *more], [*more, *MACHINE]):
                with self.assertRaises(qemu.Refused, msg=str(more)):
                    qemu.restricted(words)
        without = [word for word in MACHINE if word not in ("-netdev", NETDEV)]
        with self.assertRaises(qemu.Refused):
            qemu.restricted(without)  # QEMU would add one of its own
        self.assertRaises(qemu.Refused, qemu.restricted, [])

    def test_folders_are_in_slots_and_their_commas_name_no_option(self) -> None:
        asked = {"mounts": [["/p", True], ["/a b,readonly=off", False]]}
        first = "local,mount_tag=agent-vm-0,path=/p,security_model=none"
        second = "local,mount_tag=agent-vm-1,path=/a b,,readonly=off,security_model=none"
        expected = ["-virtfs", first, "-virtfs", f"{second},readonly=on"]
        self.assertEqual(qemu.added(MACHINE, asked), expected)

    def test_the_memory_of_a_saved_machine_is_its_file_and_that_of_others_a_copy(self) -> None:
        for resume, share in ((False, "on"), (True, "off")):
            words = qemu.added(MACHINE, {"mounts": [], "saved": "/l/a,b", "resume": resume})
            memory = "memory-backend-file,id=mem,size=2048M,mem-path=/l/a,,b/memory"
            self.assertEqual(words[:2], ["-object", f"{memory},share={share}"])
            self.assertIn("vmgenid,guid=auto", words)
            self.assertEqual(words[-2:] == ["-incoming", "defer"], resume)

    def test_questions_about_features(self) -> None:
        for words in (
            ["-M", "none", "-accel", "help"], ["-M", "none", "-netdev", "help"], ["--version"],
            ["-machine", "help"], ["-cpu", "help", "-machine", "q35"],
        ):  # fmt: skip
            self.assertTrue(qemu.is_question(words), words)
        for words in (
            MACHINE, [], ["-version", "-nic", "user"], ["--version", "-netdev", NETDEV],
            [*MACHINE, "help"], ["-nic", "user"],
        ):  # fmt: skip
            self.assertFalse(qemu.is_question(words), words)


class ProcessTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.program = Path(folder.name, "qemu-system-x86_64")
        self.program.write_text('#!/bin/sh\necho "$AGENT_VM_QEMU"\nprintf "%s\\n" "$@"\nexit 7\n')
        self.program.chmod(0o755)

    def start(self, asked: str, *words: str) -> tuple[int, str, str]:
        environ = {**os.environ, "AGENT_VM_QEMU": asked}
        argv = [sys.executable, "-IS", str(SCRIPT), *words]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
        self.assertNotIn("Traceback", done.stderr)
        return done.returncode, done.stdout, done.stderr

    def asked(self, **more: object) -> str:
        plain = {"program": str(self.program), "restrict": True, "mounts": []}
        return json.dumps({**plain, **more})

    def test_qemu_takes_its_place(self) -> None:
        status, out, _ = self.start(self.asked(), *MACHINE)
        self.assertEqual(status, 7)
        self.assertEqual(out, "\n" + "\n".join(qemu.restricted(MACHINE)) + "\n")

    def test_a_question_is_passed_on(self) -> None:
        out = self.start(self.asked(), "-M", "none", "-netdev", "help")[1]
        self.assertEqual(out, "\n-M\nnone\n-netdev\nhelp\n")

    def test_without_restriction_all_is_passed_on(self) -> None:
        out = self.start(self.asked(restrict=False), "-nic", "user")[1]
        self.assertEqual(out, "\n-nic\nuser\n")

    def test_what_is_not_started_is_said_in_a_sentence(self) -> None:
        missing = self.asked(program="/nonexistent/qemu")
        for asked, words, said in (
            (self.asked(), [*MACHINE, "-nic", "user"], "-nic is not one of its options"),
            (self.asked(), [*MACHINE, "-netdev", NETDEV], "it has 2 network devices"),
            (self.asked(restrict="no"), ["-nic", "user"], "-nic is not one of its options"),
            (missing, MACHINE, "the VM is not started: [Errno 2] No such file"),
            ("", MACHINE, "AGENT_VM_QEMU"),
            ("[]", MACHINE, "AGENT_VM_QEMU"),
            ('{"program": "x"}', MACHINE, "AGENT_VM_QEMU"),
            ('{"program": "x", "restrict": true}', MACHINE, "AGENT_VM_QEMU"),
            (self.asked(mounts=[7]), MACHINE, "AGENT_VM_QEMU"),
            (self.asked(saved="/nonexistent", resume=True), MACHINE, "No such file"),
        ):
            status, out, err = self.start(asked, *words)
            self.assertEqual((status, out), (1, ""), asked)
            self.assertEqual(err.count("\n"), 1)
            self.assertIn(said, err)

    def test_a_machine_that_was_saved_is_resumed_only_as_it_was(self) -> None:
        folder = self.program.parent
        save, resume = ({"saved": str(folder), "resume": is_so} for is_so in (False, True))
        other = [word.replace("net-nic-1", "another").replace("37447", "4000")
                 .replace("00:55:6c", "01:02:03") for word in MACHINE]  # fmt: skip
        self.assertEqual(self.start(self.asked(**save), *MACHINE)[0], 7)
        status, out, err = self.start(self.asked(**resume), *other)
        self.assertEqual((status, err), (7, ""))
        self.assertTrue(out.endswith("\n-incoming\ndefer\n"), out)
        more = [word.replace("2048", "4096") for word in other]
        slot = self.asked(**resume, mounts=[["/", False]])
        for asked, words, said in (
            (self.asked(**resume), more, "what Lima gives to QEMU is not as it was saved"),
            (self.asked(**resume), [*other, "-device", "x"], "what Lima gives to QEMU"),
            (slot, other, "the number of folders is not as it was saved"),
        ):
            status, out, err = self.start(asked, *words)
            self.assertEqual((status, out), (1, ""))
            self.assertIn(said, err)
        os.utime(self.program, ns=(1, 1))
        status, out, err = self.start(self.asked(**resume), *other)
        self.assertEqual((status, out), (1, ""))
        self.assertIn("QEMU itself is not as it was saved", err)
        before = json.loads((folder / "machine.json").read_text())
        before["QEMU itself"][2] = 1
        before["the host's kernel or CPU"][0] = "5.0"
        (folder / "machine.json").write_text(json.dumps(before))
        self.assertIn("the host's kernel or CPU", self.start(self.asked(**resume), *other)[2])
        for damaged in ("", "[]", "7", "{}"):
            (folder / "machine.json").write_text(damaged)
            status, out, err = self.start(self.asked(**resume), *other)
            self.assertEqual((status, out), (1, ""), damaged)
