"""`setup` from the outside: a base instance that works, or the one that there was."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import tarfile
import threading
import unittest
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import ClassVar

import agent_vm
from tests import quick
from tests.quick import Result
from tests.support import BASE
from tests.support import BASE_NAME
from tests.support import FAKES
from tests.support import TOKEN
from tests.support import Sandbox
from tests.support import WorldTest
from tests.support import executable
from tests.support import fake
from tests.support import open_sandbox

OLD = f"{BASE_NAME}.eeeeee"
LINUX = platform.system() == "Linux"


class WholeSetupTest(unittest.TestCase):
    """One full setup on a fresh machine, seen from all sides."""

    box: ClassVar[Sandbox]
    result: ClassVar[Result]

    @classmethod
    def setUpClass(cls) -> None:
        cls.box = open_sandbox()
        cls.addClassCleanup(cls.box.close)
        cls.result = cls.box.run("setup", "--disk", "30", "--yes", CLAUDE_CODE_OAUTH_TOKEN=TOKEN)

    def built(self) -> str:
        return self.box.read_names()[0]

    def test_it_succeeds_and_says_what_is_ready_on_stderr(self) -> None:
        self.assertEqual((self.result.status, self.result.out), (0, ""), self.result.err)
        self.assertRegex(self.result.err, rf"agent-vm: \[ *\d+ s\] {BASE_NAME} is ready")

    def test_the_base_instance_is_stopped_and_protected(self) -> None:
        self.assertEqual(self.box.instances(), [self.built()])
        self.assertRegex(self.built(), rf"^{BASE_NAME}\.[0-9a-f]{{6}}$")
        self.assertFalse((self.box.lima / self.built() / "ha.pid").exists())
        self.assertTrue((self.box.lima / self.built() / "protected").exists())

    def test_it_mounts_nothing(self) -> None:
        self.assertEqual(self.box.started_config()["mounts"], [])

    def test_sizes_are_given_and_clamped_to_half_of_the_host(self) -> None:
        config = self.box.started_config()
        self.assertEqual(config["disk"], 30)
        self.assertEqual(config["cpus"], max(1, min(4, (os.cpu_count() or 1) // 2)))

    def test_a_clamp_is_said(self) -> None:
        clamped = self.box.started_config()["cpus"] != 4
        self.assertEqual("cpus: " in self.result.err, clamped)

    def test_it_builds_with_few_commands_and_names_it_at_the_end(self) -> None:
        verbs = [argv["argv"][0] for argv in self.box.calls("limactl")]
        kept = [verb for verb in verbs if verb not in ("list", "--version")]
        self.assertEqual(kept, ["create", "start", "stop", "protect"])
        self.assertEqual((self.box.state / "bases" / BASE_NAME).read_text(), f"{self.built()} -\n")

    def test_a_credential_of_the_host_is_not_asked_for_and_not_put_into_it(self) -> None:
        self.assertNotIn(TOKEN, json.dumps(self.box.calls()) + self.result.err)
        self.assertNotIn("auth set", self.result.err)
        leak = subprocess.run(["grep", "-r", TOKEN, self.box.lima], stdout=subprocess.PIPE)
        self.assertEqual(leak.stdout, b"")

    def test_no_lease_and_no_temporary_file_is_left(self) -> None:
        self.assertEqual(self.box.leases(), [])
        self.assertEqual(list((self.box.root / "tmp").iterdir()), [])


class SetupTest(WorldTest):
    """Tests of setup with an old base instance, recognised by its disk."""

    def setUp(self) -> None:
        super().setUp()
        if self.base:
            (self.box.lima / BASE / "disk").write_text("old")

    def setup_vm(self, *args: str, **more: Any) -> Result:
        return self.box.run("setup", "--minimal", *args, **more)

    def disks(self) -> dict[str, str]:
        """Which disk each role has: "old", or "new" for one that setup has built."""
        found = {}
        for role, name in zip(("base", "previous"), self.box.read_names()):
            old = (self.box.lima / name / "disk").read_text() == "old"
            self.assertTrue((self.box.lima / name / "protected").exists(), name)
            found[role] = "old" if old else "new"
        return found

    def assert_old_base_works(self) -> None:
        self.assertEqual((self.disks(), self.box.leases()), ({"base": "old"}, []))
        self.assertEqual(self.box.instances(), [BASE])


class SwapTest(SetupTest):
    def test_the_previous_base_instance_stays_until_the_next_setup(self) -> None:
        self.box.make_instance(OLD, disk="older")
        self.box.name_base(BASE, OLD)
        result = self.setup_vm()
        self.assertEqual((result.status, self.disks()), (0, {"base": "new", "previous": "old"}))
        self.assertIn("setup --rollback", result.err)
        self.assertEqual(self.box.limactl("delete"), [["delete", "-f", OLD]])

    def test_rollback_exchanges_the_two_and_back(self) -> None:
        self.box.make_instance(OLD, disk="older")
        self.box.name_base(BASE, OLD)
        for names in ((OLD, BASE), (BASE, OLD)):
            result = self.box.run("setup", "--rollback")
            self.assertEqual(result.status, 0, result.err)
            run = self.box.run("run", "--", 'sh:cat "$FAKE_GUEST_INSTANCE/disk"')
            self.assertEqual(run.out, "older" if names[0] == OLD else "old")
        self.assertEqual(self.box.limactl("create"), [])

    def test_rollback_without_a_previous_one_is_an_error(self) -> None:
        self.assert_refused(self.box.run("setup", "--rollback"), f"no previous {BASE_NAME}")
        self.assert_old_base_works()

    def test_rollback_to_one_that_was_deleted_by_hand_is_an_error(self) -> None:
        self.box.name_base(BASE, OLD)
        self.assert_refused(self.box.run("setup", "--rollback"), f"no previous {BASE_NAME}")
        self.assertEqual(self.box.run("run").status, 0)

    def test_a_broken_base_instance_is_replaced(self) -> None:
        (self.box.lima / BASE / "lima.yaml").unlink()
        self.assertEqual(self.setup_vm().status, 0)
        self.assertEqual(self.box.run("run").status, 0)

    def test_a_name_of_its_own_leaves_the_others_alone(self) -> None:
        self.assertEqual(self.setup_vm("--name", "web").status, 0)
        self.assertEqual(self.disks(), {"base": "old"})
        web = self.box.read_names(f"{BASE_NAME}-web")
        self.assertEqual(self.box.instances(), sorted([BASE, *web]))

    def test_clones_of_the_old_one_run_on(self) -> None:
        run = self.box.start("run", "--", "sh:touch up; while [ ! -e go ]; do sleep 0.02; done")
        self.box.wait_for_file("up")
        self.assertEqual(self.setup_vm().status, 0)
        (self.box.project / "go").touch()
        self.assertEqual(self.box.finish(run).status, 0)
        self.assertEqual(self.disks(), {"base": "new", "previous": "old"})


class FailureTest(SetupTest):
    COST = 15

    def test_when_limactl_fails_the_old_base_instance_stays(self) -> None:
        for verb in ("create", "start", "stop"):
            with self.subTest(verb=verb):
                result = self.setup_vm(FAKE_LIMA_FAIL=verb)
                self.assert_refused(result, f"limactl {verb} failed")
                self.assert_old_base_works()

    def test_a_setup_that_fails_before_there_is_an_instance_leaves_nothing(self) -> None:
        template = self.box.home / "none.yaml"
        template.write_text("images: [")
        executable(self.box.bin / "limactl.real", (self.box.bin / "limactl").read_text())
        real = f'exec {self.box.bin}/limactl.real "$@"'
        script = f'[ "$1" != create ] || {{ echo level=fatal msg=\\"bad\\" >&2; exit 1; }}\n{real}'
        executable(self.box.bin / "limactl", script)
        self.assert_refused(
            self.setup_vm("--template", str(template)), "limactl create failed: bad"
        )
        self.assert_old_base_works()
        gc = self.box.run("gc")
        self.assertEqual((gc.status, gc.out), (0, ""))
        self.assertIn("nothing to remove", gc.err)

    def test_a_template_that_would_copy_to_the_host_is_refused(self) -> None:
        for text in ('{"ssh": {"forwardAgent": true}}', '{"copyToHost": [{"guest": "a"}]}'):
            template = self.box.write(self.box.home / "mine.yaml", text)
            result = self.setup_vm("--template", str(template))
            self.assert_refused(result, "would not be confined")
            self.assertEqual(self.box.limactl("start"), [])
            self.assert_old_base_works()

    def test_a_vm_that_never_answers_ssh_is_given_up(self) -> None:
        (self.box.bin / "ssh").unlink()
        executable(self.box.bin / "ssh", "exit 255")
        env = {**self.box.env, "FAKE_LIMA_HANG": "start"}
        started = quick.start(
            "agent_vm", ["setup", "--minimal"], env, self.box.project, setup="g.SILENCE = 0"
        )
        result = started.wait()
        self.assert_refused(result, "has not answered ssh for 0 s", "Debian 13")
        self.assert_old_base_works()

    def test_a_failed_start_shows_limas_logs(self) -> None:
        self.assert_refused(self.setup_vm(FAKE_LIMA_FAIL="start"), "could not boot", "Kernel panic")

    def test_a_failed_smoke_test_is_named(self) -> None:
        result = self.setup_vm(FAKE_LIMA_PROVISION_FAIL="20-test")
        self.assert_refused(result, "provisioning failed: it failed", "running 20-test")
        self.assert_old_base_works()

    def test_a_failed_provision_script_is_named_with_the_logs_tail(self) -> None:
        result = self.setup_vm(FAKE_LIMA_PROVISION_FAIL="10-base")
        self.assert_refused(
            result, "provisioning failed: it failed", "running 10-base", "setup.log"
        )
        self.assert_old_base_works()
        self.assertIn("running 10-base", (self.box.state / "logs/setup.log").read_text())

    def test_signals_at_any_stage_leave_the_old_base_instance(self) -> None:
        for verb, signum in (("create", signal.SIGINT), ("start", signal.SIGTERM),
                             ("stop", signal.SIGHUP)):  # fmt: skip
            with self.subTest(verb=verb):
                process = self.box.start("setup", "--minimal", FAKE_LIMA_HANG=verb)
                self.box.wait_for_limactl(verb)
                process.send_signal(signum)
                self.assertEqual(self.box.finish(process).status, 128 + signum)
                self.assert_old_base_works()

    def test_after_kill_9_while_it_builds_the_next_command_removes_the_remains(self) -> None:
        process = self.box.start("setup", "--minimal", FAKE_LIMA_HANG="start")
        self.box.wait_for_limactl("start")
        self.box.kill(process)
        self.assertRegex(self.box.run("gc").err, rf"removed {BASE_NAME}\.[0-9a-f]{{6}}: ")
        self.assert_old_base_works()

    def test_after_kill_9_at_any_later_step_there_is_one_that_works_and_nothing_is_left(
        self,
    ) -> None:
        for verb in ("stop", "protect", "unprotect", "delete"):
            with self.subTest(verb=verb):
                self.box.root.joinpath("calls").unlink(missing_ok=True)
                if len(self.box.read_names()) < 2:
                    self.box.make_instance(OLD, disk="older")
                    self.box.name_base(self.box.read_names()[0], OLD)
                self.setup_vm(FAKE_LIMA_KILL=f"{verb}:1")
                self.assertEqual(self.box.run("run").status, 0)
                self.assertEqual(self.box.instances(), sorted(self.box.read_names()))

    def test_a_lease_on_what_a_base_name_means_removes_nothing(self) -> None:
        self.box.make_instance(OLD)
        self.box.name_base(BASE, OLD)
        for name in (BASE, OLD):
            self.box.make_lease(name)
        self.box.run("gc")
        self.assertEqual((self.box.instances(), self.box.leases()), (sorted([BASE, OLD]), []))

    def test_two_setups_at_once_both_succeed_and_one_is_the_previous(self) -> None:
        first = self.box.start("setup", "--minimal", FAKE_LIMA_SLEEP="create:1")
        self.box.wait_for_limactl("create")
        self.assertEqual(self.setup_vm().status, 0)
        self.assertEqual(self.box.finish(first).status, 0)
        self.assertEqual(self.disks(), {"base": "new", "previous": "new"})
        self.assertEqual(self.box.instances(), sorted(self.box.read_names()))

    def test_gc_does_not_touch_what_a_setup_is_building(self) -> None:
        process = self.box.start("setup", "--minimal", FAKE_LIMA_SLEEP="start:1")
        self.box.wait_for_limactl("start")
        self.assertEqual(self.box.run("gc").out, "")
        self.assertEqual(self.box.finish(process).status, 0)

    def test_limas_defaults_cannot_put_a_mount_into_the_base_instance(self) -> None:
        mount = {"location": str(self.box.home), "mountPoint": "/h", "writable": True}
        self.box.write(self.box.lima / "_config/default.yaml", json.dumps({"mounts": [mount]}))
        self.assert_refused(self.setup_vm(), f"mounts {self.box.home}", "_config")
        self.assertEqual(self.box.limactl("start"), [])

    def test_a_limactl_that_gives_up_before_the_vm_is_not_the_end(self) -> None:
        self.assertEqual(self.setup_vm(FAKE_LIMA_LATE="start").status, 0)
        self.assertEqual(self.disks(), {"base": "new", "previous": "old"})

    def test_a_replaced_kernel_is_booted_before_the_tests(self) -> None:
        self.assertEqual(self.setup_vm(FAKE_LIMA_NEW_KERNEL="1").status, 0)
        self.assertEqual((len(self.box.limactl("start")), len(self.box.limactl("stop"))), (2, 2))


class SetupHookTest(SetupTest):
    def hook(self, text: str, mode: int = 0o644) -> Path:
        return self.box.write(self.box.home / ".claude-vm.setup.sh", text, mode)

    def test_hooks_run_once_in_the_guest_and_stay_in_the_base_instance(self) -> None:
        self.hook("echo first >> ~/order; pwd > ~/where; sudo touch ~/sudo")
        self.box.write(self.box.config / "setup.sh", "echo second >> ~/order")
        result = self.setup_vm()
        self.assertEqual(result.status, 0, result.err)
        home = self.box.lima / self.box.read_names()[0] / "home"
        self.assertEqual((home / "order").read_text(), "first\nsecond\n")
        self.assertTrue((home / "sudo").exists())
        self.assertEqual(self.box.run("run", "--", "sh:cat ~/order").out, "first\nsecond\n")

    def test_a_hook_that_fails_fails_the_setup_with_its_tail(self) -> None:
        self.hook("echo what went wrong; false; exit 12")
        self.assert_refused(self.setup_vm(), "setup.sh", "status 12", "what went wrong")
        self.assert_old_base_works()

    def test_a_hook_that_cannot_be_read_is_found_before_anything_is_created(self) -> None:
        self.hook("true", 0o000)
        self.assert_refused(self.setup_vm(), "not a readable file")
        self.assertEqual(self.box.limactl("create"), [])


class HostTest(SetupTest):
    def test_a_lima_that_is_too_old(self) -> None:
        result = self.setup_vm(FAKE_LIMA_VERSION="1.2.3")
        self.assert_refused(result, "requires Lima version `2.2.0`; this is only `v1.2.3`")
        self.assertEqual(self.box.instances(), [BASE] if self.base else [])

    def test_a_limactl_that_hangs(self) -> None:
        result = self.setup_vm(FAKE_LIMA_HANG="create", AGENT_VM_TIMEOUT="1")
        self.assert_refused(result, "limactl create failed: no answer within 1 s")
        self.assert_old_base_works()

    def test_a_base_instance_needs_no_more_room_than_its_name_takes(self) -> None:
        """Of the 103 bytes of a socket's path, to the last one."""
        name = f"{BASE_NAME}-{'x' * 20}"
        most = 103 - len(f"/{name}.000000/ssh.sock.1234567890123456")
        home = str(self.box.root / "h").ljust(most, "h")
        longer = self.setup_vm("--name", "x" * 20, LIMA_HOME=home + "h")
        self.assert_refused(longer, "too long for its sockets")
        result = self.setup_vm("--name", "x" * 20, LIMA_HOME=home)
        self.assertEqual(result.status, 0, result.err)

    def test_more_memory_than_the_host_has(self) -> None:
        for verb in ("setup", "run"):
            result = self.box.run(verb, "--memory", "99999")
            self.assert_refused(result, "--memory: the host has", status=2)
        self.assertEqual(self.box.calls("limactl"), [])

    @unittest.skipUnless(LINUX, "QEMU is needed on Linux")
    def test_qemu_missing_is_said_with_the_line_that_installs_it_and_nothing_is_run(self) -> None:
        executable(self.box.bin / "sudo", f"touch {self.box.root}/sudo-was-run")
        (self.box.bin / "qemu-img").unlink()
        self.assert_refused(self.setup_vm(), "qemu-img is not installed", "nstall")
        self.assertFalse((self.box.root / "sudo-was-run").exists())

    @unittest.skipUnless(LINUX, "QEMU is needed on Linux")
    def test_qemu_is_installed_after_a_yes(self) -> None:
        move = f"/bin/mv {self.box.root}/qemu-img {self.box.bin}"
        executable(self.box.bin / "sudo", f"echo sudo $*\n{move}")
        for program in ("dnf", "apt-get"):  # where both are, the latter is the system's own
            executable(self.box.bin / program, "exit 1")
            (self.box.bin / "qemu-img").rename(self.box.root / "qemu-img")
            result = self.setup_vm("--yes")
            self.assertEqual((result.status, result.out), (0, ""), result.err)
            self.assertRegex(result.err, rf"\nsudo {program} install -y .*qemu-system-\w+ \S+\n")

    @unittest.skipUnless(LINUX and shutil.which("unshare"), "needs Linux's unshare")
    def test_root_is_refused(self) -> None:
        prefix = (shutil.which("unshare") or "", "--user", "--map-root-user")
        if subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL).returncode:
            self.skipTest("no user namespaces here")
        self.assert_refused(self.setup_vm(prefix=prefix), "root", "ordinary user")
        self.assertEqual(self.box.calls("limactl"), [])

    def test_a_state_folder_that_cannot_be_written(self) -> None:
        locked = self.box.home / "locked"
        locked.mkdir(0o500)
        self.assert_refused(self.setup_vm(XDG_STATE_HOME=str(locked)), "locked/agent-vm")


class TemplateSettingTest(SetupTest):
    base = False
    CERTIFICATE = "-----BEGIN CERTIFICATE-----\nü'\"$\n-----END CERTIFICATE-----\n"

    def config_of(self, *args: str, **env: str) -> dict[str, Any]:
        """What Lima was asked to start; that it then fails saves the rest of the setup."""
        self.setup_vm(*args, FAKE_LIMA_FAIL="start", **env)
        return self.box.started_config()

    def assert_locked_down(self, config: dict[str, Any]) -> None:
        self.assertEqual(config["param"]["aptMirror"], "http://mirror/debian")
        self.assertEqual(config["param"]["npmRegistry"], "http://mirror/npm")
        self.assertEqual(config["images"][0]["location"], "https://mirror/d.qcow2")
        self.assertEqual(config["caCerts"]["certs"], [self.CERTIFICATE])

    def test_a_locked_down_host_by_flags(self) -> None:
        ca = self.box.write(self.box.home / "my ca.pem", self.CERTIFICATE)
        config = self.config_of(
            "--apt-mirror", "http://mirror/debian", "--npm-registry", "http://mirror/npm",
            "--image", "https://mirror/d.qcow2", "--ca-cert", str(ca),
        )  # fmt: skip
        self.assert_locked_down(config)
        self.assertEqual(config["param"]["minimal"], "true")

    def test_a_locked_down_host_by_its_configuration_and_environment(self) -> None:
        ca = self.box.write(self.box.home / "my ca.pem", self.CERTIFICATE)
        self.box.write_config(
            f"ca-cert = '{ca}'\napt-mirror = http://mirror/debian\nimage = https://mirror/d.qcow2\n"
            "npm-registry = http://other"
        )
        self.assert_locked_down(self.config_of(AGENT_VM_NPM_REGISTRY="http://mirror/npm"))

    def test_npm_of_the_host_tells_its_registry(self) -> None:
        executable(self.box.bin / "npm", "echo http://from-npm/")
        self.assertEqual(self.config_of()["param"]["npmRegistry"], "http://from-npm/")

    def test_a_registry_with_a_password_is_not_taken_from_npm(self) -> None:
        executable(self.box.bin / "npm", "echo https://user:secret@registry/")
        self.assertNotIn("npmRegistry", self.config_of().get("param", {}))
        self.assertNotIn("secret", json.dumps(self.box.calls()))

    def test_a_template_of_the_users_own_owes_the_essentials_only(self) -> None:
        template = self.box.write(self.box.home / "mine.yaml", '{"mine": true, "param": {}}')
        result = self.box.run("setup", "--template", str(template))
        self.assertEqual(result.status, 0, result.err)
        self.assertTrue(self.box.started_config()["mine"])
        self.assertNotIn("chromium", " ".join(self.box.tool_calls()))

    def test_notes_of_the_provisioning_are_in_the_summary(self) -> None:
        note = 'echo "Node.js from Debian" > "$FAKE_GUEST_INSTANCE/var-lib/notes"'
        self.box.write(self.box.home / ".claude-vm.setup.sh", note)
        self.assertIn("note: Node.js from Debian", self.setup_vm().err)

    def test_verbose_shows_limactls_own_messages(self) -> None:
        result = self.setup_vm("-v")
        self.assertIn("+ limactl create", result.err)
        self.assertIn("Terminal is not available", result.err)


class OfferTest(SetupTest):
    """`run` on a machine without a base instance, and the questions of setup."""

    base = False

    def test_run_offers_a_setup_and_a_yes_does_it_and_runs_the_agent(self) -> None:
        terminal = self.box.terminal("run", "--", "sh:echo it runs", AGENT_VM_MINIMAL="yes",
                                     CLAUDE_CODE_OAUTH_TOKEN=TOKEN)  # fmt: skip
        terminal.expect("set it up now? [y/N]")
        terminal.type("y\n")
        self.assertEqual(terminal.wait(), 0, terminal.seen)
        self.assertIn("it runs", terminal.seen)
        self.assertEqual(self.box.instances(), [self.box.read_names()[0]])

    def test_anything_but_yes_is_no(self) -> None:
        for answer in ("n\n", "\n", "\x04"):
            terminal = self.box.terminal("run")
            terminal.expect("set it up now?")
            terminal.type(answer)
            self.assertEqual(terminal.wait(), 125)
            self.assertIn("agent-vm setup", terminal.seen)
        self.assertEqual(self.box.limactl("create"), [])

    def test_ctrl_c_at_the_question(self) -> None:
        terminal = self.box.terminal("run")
        terminal.expect("set it up now?")
        terminal.type("\x03")
        self.assertEqual(terminal.wait(), 130)

    def test_yes_does_it_without_a_terminal(self) -> None:
        result = self.box.run("run", "--yes", "--", "sh:echo it runs", AGENT_VM_MINIMAL="yes")
        self.assertEqual((result.status, result.out), (0, "it runs\n"), result.err)

    def test_without_a_credential_it_says_how_to_authenticate_later(self) -> None:
        terminal = self.box.terminal("setup", "--minimal")
        self.assertEqual(terminal.wait(), 0, terminal.seen)
        self.assertIn("agent-vm auth set", terminal.seen)

    def test_with_a_stored_credential_nothing_is_said_of_it(self) -> None:
        self.box.write(self.box.config / "credential", f"ANTHROPIC_API_KEY={TOKEN}\n", 0o600)
        self.assertNotIn("auth set", self.setup_vm().err)


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """The folder on 127.0.0.1, at a free port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class LimaDownloadTest(SetupTest):
    base = False

    def setUp(self) -> None:
        super().setUp()
        self.release = self.box.root / "release"
        self.release.mkdir()
        fake(self.box.root / "limactl", FAKES / "limactl")
        (self.box.bin / "limactl").unlink()
        system, machine = platform.system(), platform.machine()
        self.name = f"lima-{agent_vm.LIMA_RELEASE}-{system}-{machine}.tar.gz"
        self.installed = self.box.home / ".local/share/agent-vm/lima/bin/limactl"
        self.pack("bin/limactl")

    def pack(self, member: str) -> None:
        with tarfile.open(self.release / self.name, "w:gz") as tar:
            data = (self.box.root / "limactl").read_bytes()
            entry = tarfile.TarInfo(member)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
        self.sums(hashlib.sha256((self.release / self.name).read_bytes()).hexdigest())

    def sums(self, digest: str) -> None:
        (self.release / "SHA256SUMS").write_text(f"{'0' * 64}  other\n{digest}  {self.name}\n")

    def install(self, *args: str, **env: str) -> Result:
        with web_server(self.release) as url:
            return self.setup_vm(*args, AGENT_VM_LIMA_URL=url, **env)

    def test_lima_is_fetched_checked_unpacked_and_used(self) -> None:
        result = self.install("--yes")
        self.assertEqual(result.status, 0, result.err)
        self.assertTrue(os.access(self.installed, os.X_OK))
        self.assertEqual(self.box.run("run", "--", "sh:echo runs").out, "runs\n")

    def test_nothing_is_fetched_without_a_yes(self) -> None:
        self.assert_refused(self.install(), "Lima is not installed", "--yes")
        self.assertFalse(self.installed.exists())

    def test_a_wrong_checksum_is_refused(self) -> None:
        self.sums("f" * 64)
        self.assert_refused(self.install("--yes"), "checksum")
        self.assertFalse(self.installed.parent.parent.exists())
        self.assertEqual(self.box.calls("limactl"), [])

    def test_sums_without_this_archive_are_refused(self) -> None:
        (self.release / "SHA256SUMS").write_text("0  lima-2.2.0-Plan9-mips.tar.gz\n")
        self.assert_refused(self.install("--yes"), "does not name")

    def test_a_server_that_does_not_have_it(self) -> None:
        (self.release / self.name).unlink()
        self.assert_refused(self.install("--yes"), self.name, "--lima-url")
        result = self.setup_vm("--yes", AGENT_VM_LIMA_URL="http://127.0.0.1:9")
        self.assert_refused(result, "127.0.0.1:9", "--lima-url")

    def test_an_archive_that_leaves_its_folder_is_refused(self) -> None:
        self.pack("../../../../escaped")
        self.assertEqual(self.install("--yes").status, 125)
        self.assertEqual(list(self.box.root.glob("**/escaped")), [])

    def test_what_is_no_archive_is_refused(self) -> None:
        (self.release / self.name).write_bytes(b"<html>")
        self.sums(hashlib.sha256(b"<html>").hexdigest())
        self.assert_refused(self.install("--yes"), "cannot unpack")
        self.assertFalse(self.installed.parent.parent.exists())


if __name__ == "__main__":
    unittest.main()
