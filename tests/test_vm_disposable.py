"""Whatever happens to a run, its clone goes: signals, kill -9, closed terminals, leases."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import unittest
from typing import Any

import agent_vm
from tests.support import BASE
from tests.support import WorldTest
from tests.support import live
from tests.support import wait_for

# The agent notes that it is up, then works until its VM is gone.
WORK = 'sh:touch up; while [ -e "$FAKE_GUEST_INSTANCE/disk" ]; do sleep 0.02; done'
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class SignalTest(WorldTest):
    def interrupt_during(self, verb: str, signum: signal.Signals) -> None:
        count = len(self.box.limactl(verb)) + 1
        process = self.box.start("run", FAKE_LIMA_HANG=verb)
        self.box.wait_for_limactl(verb, count)
        process.send_signal(signum)
        result = self.box.finish(process)
        self.assertEqual(result.status, STATUS[signum], result.err)
        self.assertNotIn("Traceback", result.err)
        self.assert_nothing_left()

    def test_during_the_clone(self) -> None:
        self.interrupt_during("clone", signal.SIGTERM)

    def test_during_the_start(self) -> None:
        for signum in STATUS:
            with self.subTest(signum=signum):
                self.interrupt_during("start", signum)

    def test_while_limactl_lists(self) -> None:
        self.interrupt_during("list", signal.SIGINT)

    def test_while_the_agent_works(self) -> None:
        for signum in STATUS:
            with self.subTest(signum=signum):
                process = self.box.start("run", "--", WORK)
                up = self.box.wait_for_file("up")
                process.send_signal(signum)
                result = self.box.finish(process)
                self.assertEqual(result.status, STATUS[signum], result.err)
                self.assert_nothing_left()
                up.unlink()

    def test_what_the_agent_wrote_is_synced_when_a_signal_ends_it(self) -> None:
        process = self.box.start("run", "--", WORK)
        self.box.wait_for_file("up")
        before = self.box.tool_calls().count("sync ")
        process.terminate()
        self.box.finish(process)
        deleted = [call["argv"][0] for call in self.box.calls()].index("delete")
        self.assertEqual(self.box.calls()[deleted - 1]["argv"][-1], "sync")
        self.assertEqual(self.box.tool_calls().count("sync "), before + 1)

    def test_several_signals_at_once(self) -> None:
        process = self.box.start("run", FAKE_LIMA_HANG="start")
        self.box.wait_for_limactl("start")
        for signum in STATUS:
            process.send_signal(signum)
        self.assertIn(self.box.finish(process).status, STATUS.values())
        self.assert_nothing_left()

    def test_while_a_hook_runs(self) -> None:
        self.box.write(self.box.project / ".claude-vm.runtime.sh", WORK[3:])
        process = self.box.start("run")
        self.box.wait_for_file("up")
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.box.finish(process).status, 130)
        self.assertEqual(self.box.agent_calls(), [])
        self.assert_nothing_left()

    def test_more_signals_do_not_stop_the_deletion(self) -> None:
        process = self.box.start("run", "--", WORK, FAKE_LIMA_SLEEP="delete:0.4")
        self.box.wait_for_file("up")
        process.send_signal(signal.SIGINT)
        self.box.wait_for_limactl("delete")
        for signum in STATUS:
            process.send_signal(signum)
        self.assertEqual(self.box.finish(process).status, 130)
        self.assert_nothing_left()

    def test_a_clean_up_that_finds_no_temporary_folder_keeps_the_agents_status(self) -> None:
        tmp = self.box.root / "tmp"
        script = f"sh:rm -r {tmp}; exit 7"
        result = self.box.run("run", "--", script)
        tmp.mkdir(exist_ok=True)
        self.assertEqual(result.status, 7, result.err)
        self.box.run("gc")
        self.assert_nothing_left()

    def test_a_signal_right_after_the_agent_has_ended(self) -> None:
        process = self.box.start("run", "--", "sh:exit 6", FAKE_LIMA_SLEEP="delete:0.3")
        self.box.wait_for_limactl("delete")
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.box.finish(process).status, 6)
        self.assert_nothing_left()

    def test_a_process_group_is_interrupted_as_by_ctrl_c(self) -> None:
        process = self.box.start("run", new_session=True, FAKE_LIMA_HANG="start")
        self.box.wait_for_limactl("start")
        os.killpg(process.pid, signal.SIGINT)
        self.assertEqual(self.box.finish(process).status, 130)
        self.assert_nothing_left()

    def test_signals_that_the_caller_ignores_stay_ignored(self) -> None:
        prefix = ("bash", "-c", 'trap \'\' HUP; exec "$0" "$@"')
        work = "sh:touch up; while [ ! -e go ]; do sleep 0.02; done; exit 8"
        process = self.box.start("run", "--", work, prefix=prefix)
        self.box.wait_for_file("up")
        process.send_signal(signal.SIGHUP)
        (self.box.project / "go").touch()
        self.assertEqual(self.box.finish(process).status, 8)
        self.assert_nothing_left()

    def test_a_signal_before_anything_was_started(self) -> None:
        # At whatever moment of Python's start it comes: never a clone without a lease.
        process = self.box.start("run", "--", WORK)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        self.box.finish(process)
        self.assert_nothing_left()


class TerminalTest(WorldTest):
    def test_with_a_terminal_the_agent_has_one(self) -> None:
        terminal = self.box.terminal("run", "--", "sh:echo hello; exit 3")
        self.assertEqual(terminal.wait(), 3)
        self.assertIn("hello\r\n", terminal.seen)
        call = self.box.agent_calls()[0]
        self.assertEqual((call["tty"], call["env"]["TERM"]), ([True, True, True], "xterm"))
        self.assert_nothing_left()

    def test_ctrl_c_belongs_to_the_agent(self) -> None:
        terminal = self.box.terminal(
            "run", "--", "sh:trap 'echo interrupted; exit 5' INT; touch up; read -r line"
        )
        self.box.wait_for_file("up")
        time.sleep(0.2)  # the terminals between are set up a moment later
        terminal.type("\x03")
        self.assertEqual(terminal.wait(), 5)
        self.assertIn("interrupted", terminal.seen)
        self.assert_nothing_left()

    def test_ctrl_z_does_not_leave_the_agent_stopped(self) -> None:
        script = "sh:touch up; read -r line; echo got $line; exit 4"
        terminal = self.box.terminal("run", "--", script)
        self.box.wait_for_file("up")
        self.assertEqual(terminal.stop_then_answer(pause=0.3), 4)
        self.assert_nothing_left()

    def test_the_last_line_says_how_to_resume_in_a_vm(self) -> None:
        session = "01234567-89ab-cdef-0123-456789abcdef"
        write = f"sh:mkdir -p ~/.claude/projects/x; touch ~/.claude/projects/x/{session}.jsonl"
        terminal = self.box.terminal("run", "--", write)
        self.assertEqual(terminal.wait(), 0)
        last = terminal.seen.splitlines()[-1]
        self.assertEqual(last, f"agent-vm: resume this session: claude-vm --resume {session}")
        terminal = self.box.terminal("shell", "--", "true")
        terminal.wait()
        self.assertNotIn("resume", terminal.seen)

    def test_ctrl_c_typed_while_the_vm_starts(self) -> None:
        terminal = self.box.terminal("run", FAKE_LIMA_HANG="start")
        self.box.wait_for_limactl("start")
        terminal.type("\x03")
        self.assertEqual(terminal.wait(), 130)
        self.assert_nothing_left()

    def test_the_terminal_is_closed_while_the_agent_works(self) -> None:
        terminal = self.box.terminal("run", "--", WORK)
        self.box.wait_for_file("up")
        terminal.close()
        terminal.wait()
        self.assert_nothing_left()

    def test_the_terminal_is_closed_while_the_vm_starts(self) -> None:
        terminal = self.box.terminal("run", FAKE_LIMA_HANG="start")
        self.box.wait_for_limactl("start")
        terminal.close()
        terminal.wait()
        self.assert_nothing_left()

    def test_output_to_a_file_is_clean_and_the_agent_does_not_wait_for_the_terminal(self) -> None:
        with open(self.box.root / "out", "w") as file:
            terminal = self.box.terminal("run", "--", "sh:echo answer; cat", stdout=file)
            self.assertEqual(terminal.wait(), 0)
        self.assertEqual((self.box.root / "out").read_text(), "answer\n")

    def test_progress_is_shown_on_a_terminal_and_silenced_by_quiet(self) -> None:
        terminal = self.box.terminal("run")
        terminal.wait()
        self.assertIn("booting agent-vm-project-", terminal.seen)
        quiet = self.box.terminal("run", "-q")
        quiet.wait()
        self.assertNotIn("agent-vm:", quiet.seen)

    def test_an_unreadable_terminal_type_is_replaced(self) -> None:
        if not shutil.which("infocmp", path="/usr/bin:/bin"):
            self.skipTest("infocmp is not installed")
        terminal = self.box.terminal("run", TERM="xterm-from-the-future")
        terminal.wait()
        self.assertEqual(self.box.agent_calls()[0]["env"]["TERM"], "xterm-256color")


class OrphanTest(WorldTest):
    COST = 11

    def orphan(self, name: str = "agent-vm-p-0a1b2c", **lease: Any) -> str:
        self.box.make_instance(name, running=True)
        self.box.make_lease(name, **lease)
        return name

    def test_the_orphans_of_another_lima_home_are_left_to_it(self) -> None:
        name = self.orphan(lima_home=str(self.box.root / "other"))
        self.assertEqual(self.box.run("gc").out, "")
        self.assertEqual((self.box.clones(), self.box.leases()), ([name], [name]))
        self.box.make_lease(name, lima_home=str(self.box.lima))
        self.assertEqual(self.box.run("gc").out, f"{name}\n")
        self.assert_nothing_left()

    def test_a_lease_of_a_later_version_is_one(self) -> None:
        """What is not known in it must not make a running VM an orphan."""
        name = self.orphan(**live(), new_field=1)
        self.assertEqual(self.box.run("gc").out, "")
        self.assertEqual(self.box.clones(), [name])

    def test_after_kill_9_the_next_command_cleans_up_and_says_so(self) -> None:
        for verb in ("start", "clone"):
            with self.subTest(verb=verb):
                process = self.box.start("run", FAKE_LIMA_HANG=verb)
                self.box.wait_for_limactl(verb)
                wait_for(self.box.clones, "a clone")
                self.box.kill(process)
                (clone,) = self.box.clones()
                result = self.box.run("run", "--", "sh:echo next")
                self.assertEqual((result.status, result.out), (0, "next\n"))
                self.assertIn(f"removed {clone}", result.err)
                self.assert_nothing_left()

    def test_a_clone_that_appears_after_kill_9_is_not_forgotten(self) -> None:
        process = self.box.start("run", FAKE_LIMA_SLEEP="clone:1.5")
        self.box.wait_for_limactl("clone")
        self.box.kill(process)
        self.assertEqual(self.box.run("gc").out, "")
        wait_for(self.box.clones, "the limactl that outlived its caller makes the clone")
        self.assertIn("removed", self.box.run("gc").err)
        self.assert_nothing_left()

    def test_after_kill_9_during_the_agents_work_gc_removes_the_vm(self) -> None:
        process = self.box.start("run", "--", WORK)
        self.box.wait_for_file("up")
        self.box.kill(process)
        (clone,) = self.box.clones()
        result = self.box.run("gc")
        self.assertEqual(result.out.split()[0], clone)
        self.assert_nothing_left()

    def test_a_dead_process_makes_an_orphan(self) -> None:
        for lease in (
            {},
            {**live(), "start": "1"},  # the pid was given to another process
            {**live(), "boot_id": "before the crash"},
        ):
            with self.subTest(lease=lease):
                name = self.orphan(**lease)
                result = self.box.run("gc")
                self.assertIn(f"removed {name}", result.err)
                self.assert_nothing_left()

    def test_a_lease_whose_process_lives_is_never_touched(self) -> None:
        name = self.orphan(**live())
        for verb in ("gc", "list"):
            self.box.run(verb)
            self.assertEqual((self.box.clones(), self.box.leases()), ([name], [name]))
        self.assertEqual(self.box.run("rm", name).status, 1)
        self.assertEqual(self.box.clones(), [name])

    def test_a_kept_vm_is_no_orphan(self) -> None:
        name = self.orphan(keep=True)
        self.assertEqual(self.box.run("gc").out, "")
        self.assertEqual(self.box.clones(), [name])

    def test_a_half_made_clone_is_removed(self) -> None:
        name = "agent-vm-p-0a1b2c"
        self.box.write(self.box.lima / name / "disk", "half")
        self.box.make_lease(name)
        self.assertIn(f"removed {name}", self.box.run("gc").err)
        self.assert_nothing_left()

    def test_a_lease_without_a_clone_is_dropped_silently(self) -> None:
        self.box.make_lease("agent-vm-p-0a1b2c", created=time.time() - 300)
        result = self.box.run("run")
        self.assertEqual((result.status, result.err), (0, ""))
        self.assert_nothing_left()

    def test_the_links_of_an_orphan_go_with_it_and_what_they_point_to_stays(self) -> None:
        name = self.orphan()
        link = self.box.state / "links" / name / "0"
        link.parent.mkdir(parents=True)
        link.symlink_to(self.box.project)
        precious = self.box.write(self.box.project / "precious", "work")
        self.box.run("gc")
        self.assertTrue(precious.exists())
        self.assert_nothing_left()

    def test_a_kept_vm_that_limactl_deleted_is_forgotten(self) -> None:
        self.assertEqual(self.box.run("shell", "--keep", "--", "true").status, 0)
        (name,) = self.box.clones()
        shutil.rmtree(self.box.lima / name, ignore_errors=True)  # a session may be ending there
        lease = self.box.state / "leases" / f"{name}.json"
        fields = json.loads(lease.read_text())
        lease.write_text(json.dumps({**fields, "created": 1.0}))
        self.assertEqual(self.box.run("run").status, 0)
        self.assert_nothing_left()

    def test_half_written_files_of_a_killed_command_are_removed_after_a_day(self) -> None:
        old = self.box.write(self.box.state / "leases/.x.json.123", "{")
        new = self.box.write(self.box.state / "leases/.y.json.123", "{")
        os.utime(old, (1, 1))
        self.box.run("gc")
        self.assertEqual((old.exists(), new.exists()), (False, True))

    def test_gc_says_why_it_waits(self) -> None:
        self.box.make_lease("agent-vm-p-0a1b2c")
        result = self.box.run("gc")
        self.assertEqual(result.status, 1)
        self.assertIn("agent-vm-p-0a1b2c", result.err)

    def test_a_file_that_is_no_lease_harms_nothing(self) -> None:
        self.box.make_lease("default")
        other = self.box.make_instance("default")
        self.box.write(self.box.state / "leases/broken.json", "{")
        self.box.write(self.box.state / "leases/list.json", "[1, 2]")
        result = self.box.run("run")
        self.assertEqual(result.status, 0, result.err)
        self.assertTrue(other.exists())

    def test_a_lease_that_a_power_cut_left_empty_makes_an_orphan(self) -> None:
        name = self.orphan()
        (self.box.state / "leases" / f"{name}.json").write_text("")
        self.assertIn(f"removed {name}", self.box.run("list").err)
        self.assert_nothing_left()

    def test_a_lease_on_a_base_instance_is_not_obeyed(self) -> None:
        self.box.make_lease(BASE)
        self.box.run("gc")
        self.assertEqual(self.box.instances(), [BASE])

    def test_dry_run_removes_nothing(self) -> None:
        name = self.orphan()
        result = self.box.run("gc", "--dry-run")
        self.assertEqual((result.status, result.out), (0, f"{name}\n"))
        self.assertEqual((self.box.clones(), self.box.leases()), ([name], [name]))

    def test_an_orphan_that_cannot_be_deleted_is_kept_for_the_next_time(self) -> None:
        name = self.orphan()
        result = self.box.run("gc", FAKE_LIMA_FAIL="delete")
        self.assertEqual((result.status, self.box.leases()), (1, [name]))

    def test_an_orphan_that_cannot_be_deleted_does_not_stop_a_run(self) -> None:
        self.orphan()
        result = self.box.run("run", "--", "sh:echo fine", FAKE_LIMA_FAIL="delete:1")
        self.assertEqual((result.status, result.out), (0, "fine\n"), result.err)

    def test_an_interrupted_gc_finishes_the_clone_it_is_at(self) -> None:
        self.orphan()
        process = self.box.start("gc", FAKE_LIMA_SLEEP="delete:0.3")
        self.box.wait_for_limactl("delete")
        process.send_signal(signal.SIGINT)
        self.box.finish(process)
        self.assert_nothing_left()

    def test_two_gcs_at_once(self) -> None:
        self.orphan()
        processes = [self.box.start("gc", FAKE_LIMA_SLEEP="delete:0.2") for _ in range(2)]
        results = [self.box.finish(process) for process in processes]
        self.assertEqual([result.status for result in results], [0, 0], results)
        self.assert_nothing_left()

    def test_a_lease_says_who_and_for_what(self) -> None:
        process = self.box.start("run", "--", WORK)
        self.box.wait_for_file("up")
        (name,) = self.box.leases()
        lease = json.loads((self.box.state / "leases" / f"{name}.json").read_text())
        self.assertEqual((lease["pid"], lease["name"]), (process.pid, name))
        self.assertEqual(lease["project"], str(self.box.project))
        self.assertEqual(lease["start"], agent_vm.process_start(process.pid))
        process.terminate()
        self.box.finish(process)

    def test_the_lease_is_taken_before_the_clone_is_made(self) -> None:
        process = self.box.start("run", FAKE_LIMA_SLEEP="clone:0.3")
        self.box.wait_for_limactl("clone")
        self.assertEqual(len(self.box.leases()), 1)
        self.box.finish(process)
        self.assert_nothing_left()


class ChildTest(WorldTest):
    def test_no_process_of_ours_outlives_a_run_that_was_interrupted(self) -> None:
        process = self.box.start("run", FAKE_LIMA_HANG="start")
        self.box.wait_for_limactl("start")
        process.send_signal(signal.SIGTERM)
        self.box.finish(process)
        listing = subprocess.run(["ps", "axww", "-o", "command="], stdout=subprocess.PIPE)
        clone = self.box.limactl("start")[0][-1]
        self.assertNotIn(clone, listing.stdout.decode(errors="replace"))


if __name__ == "__main__":
    unittest.main()
