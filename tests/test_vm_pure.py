"""The pure core: tables of input and output."""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
import unittest
from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import agent_vm
from agent_vm import AgentVMError
from agent_vm import Credential
from agent_vm import Instance
from agent_vm import Lease
from agent_vm import Mount
from agent_vm import Place
from agent_vm import Plan
from agent_vm import Settings

GIB = 1 << 30
FAST = True
LEASE = Lease("agent-vm-p-0a1b2c", 7, "100", "boot", "/p", 1.0)


def mount(source: str, target: str, writable: bool = False) -> Mount:
    """A mount of folders that no file system knows."""
    return Mount(Place(source), target, writable)


class TableTest(unittest.TestCase):
    def check(self, function: Callable[..., Any], table: Iterable[tuple[Any, ...]]) -> None:
        """Each row: the arguments, then the expected result."""
        for *args, expected in table:
            with self.subTest(args=args):
                self.assertEqual(function(*args), expected)

    def refuse(
        self, function: Callable[[str], Any], values: Iterable[str], error: type[Exception]
    ) -> None:
        for value in values:
            with self.subTest(value=value), self.assertRaises(error):
                function(value)


class NameTest(TableTest):
    def test_clones_and_base_instances_are_told_apart_by_name(self) -> None:
        clones = ["agent-vm-p-0a1b2c", "agent-vm-my-project-abcdef", "agent-vm-base-012345"]
        bases = ["agent-vm-base.0a1b2c", "agent-vm-base-web.abcdef", "agent-vm-base-0.000000"]
        others = ["default", "agent-vm", "agent-vm-p", "agent-vm-P-0a1b2c", "x-agent-vm-p-0a1b2c",
                  "agent-vm-p-0a1b2c.x", "agent-vm-base/..", "agent-vm-p-0a1b2c\n", "agent-vm-base",
                  "agent-vm-base.new", "agent-vm-base.0A1B2C"]  # fmt: skip
        everything = clones + bases + others
        self.assertEqual([name for name in everything if agent_vm.is_clone(name)], clones)
        self.assertEqual([name for name in everything if agent_vm.is_base(name)], bases)

    def test_base_names_have_a_suffix_or_none(self) -> None:
        for name, expected in (("", "agent-vm-base"), ("web", "agent-vm-base-web")):
            settings = Settings({"name": name or None}, {}, {})
            self.assertEqual(agent_vm.base_name(settings), expected)

    def test_a_clone_is_called_after_its_directory(self) -> None:
        rows = [
            ("project", "agent-vm-project-0a1b2c"),
            ("My Project!", "agent-vm-my-project-0a1b2c"),
            ("..a..", "agent-vm-a-0a1b2c"),
            ("日本", "agent-vm-project-0a1b2c"),
            ("", "agent-vm-project-0a1b2c"),
            ("x" * 200, f"agent-vm-{'x' * 30}-0a1b2c"),
        ]
        self.check(lambda name: agent_vm.clone_name(name, "0a1b2c", "/l"), rows)

    def test_limas_socket_fits_whatever_the_length_of_its_home(self) -> None:
        for length in range(2, 60):
            home = "/" + "h" * (length - 1)
            with self.subTest(length=length):
                name = agent_vm.clone_name("a-b-" * 20, "0a1b2c", home)
                self.assertTrue(agent_vm.is_clone(name), name)
                self.assertLess(len(f"{home}/{name}/ssh.sock.1234567890123456"), 104)

    def test_a_lima_home_that_leaves_no_room_is_an_error(self) -> None:
        with self.assertRaisesRegex(AgentVMError, "too long"):
            agent_vm.clone_name("project", "0a1b2c", "/" + "h" * 80)

    def test_bytes_of_limas_home_are_counted_not_characters(self) -> None:
        name = agent_vm.clone_name("a" * 30, "0a1b2c", "/" + "ü" * 25)
        self.assertLess(len(os.fsencode(f"/{'ü' * 25}/{name}/ssh.sock.1234567890123456")), 104)

    def test_session_folders_are_readable_and_distinct(self) -> None:
        self.assertRegex(agent_vm.session_key("/a/My Project"), r"^my-project-[0-9a-f]{12}$")
        self.assertRegex(agent_vm.session_key("/"), r"^project-[0-9a-f]{12}$")
        paths = ["/a/p", "/b/p", "/a/p ", "/a/P", "/a/ü", "/a/\udce4"]
        self.assertEqual(len({agent_vm.session_key(path) for path in paths}), len(paths))

    def test_names_for_setup(self) -> None:
        good = ("a", "web", "py-3", "x1", "web-0a1b2c")
        self.check(agent_vm.base_suffix, [(name, name) for name in good])
        bad = ["", "-a", "a-", "A", "a.b", "a/b", "x" * 21, "new\n"]
        self.refuse(agent_vm.base_suffix, bad, argparse.ArgumentTypeError)


class LimaTest(TableTest):
    def line(self, **fields: Any) -> str:
        return json.dumps({"name": "n", "status": "Stopped", "dir": "/l/n", **fields})

    def test_a_line_of_list_becomes_an_instance(self) -> None:
        mounts = [{"location": "/p", "writable": True}, {"location": "/q"}]
        config = {"mountType": "9p", "mounts": mounts, "ssh": {"forwardAgent": True}}
        text = self.line(
            hostname="lima-n", vmType="qemu", cpus=2, memory=4 << 30,
            config={**config, "user": {"name": "u", "home": "/home/u.guest"}},
        )  # fmt: skip
        expected = Instance(
            name="n", status="Stopped", dir=Path("/l/n"), hostname="lima-n", vm_type="qemu",
            sizes=("--cpus=2", "--memory=4"),
            mount_type="9p", mounts=(("/p", True), ("/q", False)),
            extras=("forwards the ssh agent, or X11",), home="/home/u.guest",
        )  # fmt: skip
        self.assertEqual(agent_vm.parse_instances(f"\n{text}\n\n"), [expected])

    def test_a_broken_instance_has_no_configuration(self) -> None:
        text = self.line(status="Broken", hostname="", vmType="", config=None)
        self.assertEqual(agent_vm.parse_instances(text)[0].status, "Broken")

    def test_what_would_write_to_the_host_is_noticed(self) -> None:
        rows = [
            ({"copyToHost": [{"guest": "/a", "host": "/b"}]}, True),
            ({"portForwards": [{"guestSocket": "/a", "hostSocket": "/b"}]}, True),
            ({"portForwards": [{"guestPort": 1, "reverse": True}]}, True),
            ({"portForwards": [{"guestPort": 1, "hostPort": 1}], "copyToHost": []}, False),
        ]
        for config, expected in rows:
            (instance,) = agent_vm.parse_instances(self.line(config=config))
            self.assertEqual(bool(instance.extras), expected, config)

    def test_no_instances_are_no_lines(self) -> None:
        self.assertEqual(agent_vm.parse_instances(""), [])

    def test_what_is_not_limas_json_is_an_error(self) -> None:
        bad = ["<html>", "{}", "[1]", "null", '"x"', '{"name": "n"}', "[" * 100_000,
               self.line(config={"mounts": [7]}), self.line(config={"mounts": [{}]})]  # fmt: skip
        self.refuse(agent_vm.parse_instances, bad, AgentVMError)

    def decoded(self, expression: str) -> Any:
        match = re.fullmatch(r'\("([\w+/=]+)" \| @base64d \| from_json\)', expression)
        assert match
        return json.loads(base64.b64decode(match[1]))

    def test_values_reach_yq_without_a_character_that_it_reads(self) -> None:
        for value in ("a\"b'c$d\\e", ["\n", {"k": "ü"}], "", True, '") | .x = ("'):
            with self.subTest(value=value):
                self.assertEqual(self.decoded(agent_vm.yq_value(value)), value)

    def test_a_clone_gets_its_mounts_and_a_mount_type(self) -> None:
        mounts = [{"location": "/p", "mountPoint": "/p", "writable": True}]
        forwarding = agent_vm.clone_expression(mounts, "9p", forward=True)
        self.assertIn('.mountType = "9p"', forwarding)
        self.assertIn(f".mounts = {agent_vm.yq_value(mounts)}", forwarding)
        self.assertNotIn("portForwards", forwarding)

    def test_no_forward_ignores_every_port(self) -> None:
        expression = agent_vm.clone_expression([], "9p", forward=False)
        (rule,) = self.decoded(expression.rpartition(".portForwards = ")[2])
        # Without the second, Lima would ignore only what listens on 0.0.0.0.
        self.assertEqual((rule["guestIP"], rule["guestIPMustBeZero"]), ("0.0.0.0", False))
        self.assertEqual((rule["proto"], rule["ignore"]), ("any", True))


class IsolationTest(TableTest):
    PLAN = ({"location": "/p", "mountPoint": "/p", "writable": True},)

    def faults(self, **fields: Any) -> list[str]:
        clone: dict[str, Any] = {"vm_type": "qemu", "mount_type": "9p", "mounts": (("/p", True),)}
        clone.update(fields)
        instance = Instance("n", "Stopped", Path("/l/n"), **clone)
        return agent_vm.isolation_faults(instance, self.PLAN)

    def test_a_clone_as_planned_has_no_fault(self) -> None:
        self.assertEqual(self.faults(), [])
        self.assertEqual(self.faults(vm_type="vz", mount_type="virtiofs"), [])

    def test_every_deviation_is_named(self) -> None:
        rows: list[tuple[dict[str, Any], str]] = [
            ({"mounts": (("/p", True), ("/home", False))}, "mounts /home read-only"),
            ({"mounts": (("/p", True), ("/home", True))}, "mounts /home read-write"),
            ({"mounts": ()}, "does not mount /p"),
            ({"mounts": (("/p", False),)}, "does not mount /p"),
            ({"mount_type": "reverse-sshfs"}, "uses the mount type reverse-sshfs"),
            ({"mount_type": ""}, "uses the mount type unknown"),
            ({"mount_type": "virtiofs"}, "uses the mount type virtiofs"),  # under QEMU
            ({"extras": ("copies files to the host",)}, "copies files to the host"),
        ]
        for fields, fault in rows:
            with self.subTest(fault=fault):
                self.assertIn(fault, self.faults(**fields))

    def test_what_of_limas_configuration_counts(self) -> None:
        configs: list[dict[str, Any]] = [
            {"ssh": {"forwardAgent": True}}, {"ssh": {"forwardX11": True}}, {"copyToHost": [{}]},
            {"portForwards": [{"hostSocket": "/s"}]}, {"portForwards": [{"reverse": True}]},
            {"portForwards": [{"hostIP": "0.0.0.0"}]}, {"additionalDisks": [{"name": "d"}]},
            {"audio": {"device": "default"}},
        ]  # fmt: skip
        for config in configs:
            fields = {"name": "n", "status": "Stopped", "dir": "/l/n", "config": config}
            instance = agent_vm.instance_from(fields)
            self.assertEqual(len(instance.extras), 1, config)


class MountTest(TableTest):
    def test_overlapping_paths(self) -> None:
        rows = [("/a", "/a", True), ("/a", "/a/b", True), ("/a/b", "/a", True), ("/", "/a", True),
                ("/a", "/ab", False), ("/a/b", "/a/c", False)]  # fmt: skip
        self.check(lambda a, b: agent_vm.overlaps(Place(a), Place(b)), rows)

    def test_a_folder_under_another_name_is_still_inside(self) -> None:
        home, disk = Place("/home/u", (1, 7), frozenset({(1, 2), (1, 7)})), (9, 1)
        below = Place("/HOME/U/p", (1, 8), frozenset({(1, 2), (1, 7), (1, 8)}))
        self.assertTrue(agent_vm.inside(below, home))
        self.assertFalse(agent_vm.inside(home, below))
        self.assertFalse(agent_vm.inside(Place("/q", disk, frozenset({disk})), home))
        self.assertFalse(agent_vm.inside(below, Place("/nowhere")))

    def test_what_is_refused_as_a_mount(self) -> None:
        private = {"your ssh keys": Place("/home/u/.ssh"), "Lima's home": Place("/lima")}
        rows = [
            ("/", "it holds the home directory"), ("/home", "home directory /home/u"),
            ("/home/u", "home directory /home/u"), ("/home/u/.ssh", "your ssh keys"),
            ("/home/u/.ssh/x", "your ssh keys"), ("/lima/vm", "Lima's home"), ("/lima", "Lima"),
        ]  # fmt: skip
        for path, words in rows:
            with self.subTest(path=path):
                refusal = agent_vm.mount_refusal(Place(path), Place("/home/u"), private)
                self.assertIn(words, refusal)
        for path in ("/home/u/project", "/home/u/.sshx", "/home/uu", "/srv", "/lim"):
            with self.subTest(path=path):
                refusal = agent_vm.mount_refusal(Place(path), Place("/home/u"), private)
                self.assertEqual(refusal, "")

    def test_paths_that_no_guest_can_have(self) -> None:
        for path in (
            "/etc",
            "/usr",
            "/dev",
            "/proc/1/root",
            "/sys/x",
            "/a\nb",
            "/a\x7f",
            "/a\udce4",
        ):
            with self.subTest(path=path):
                self.assertTrue(agent_vm.unusable_path(path))
        usable = ["/tmp/x", "/a b", "/it's", "/$x", "/a,b:c", "/日本", "/" + "x" * 200]
        self.check(agent_vm.unusable_path, [(path, "") for path in usable])

    def test_the_grammar_of_mount(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            source = os.path.realpath(name)
            for folder in ("a", "b:c", "d:ro", "s p"):
                Path(source, folder).mkdir()
            a = f"{source}/a"
            rows = [
                (a, (a, a, False)),
                (f"{a}/", (a, a, False)),
                (f"{a}:ro", (a, a, False)),
                (f"{a}:rw", (a, a, True)),
                (f"{a}:/data", (a, "/data", False)),
                (f"{a}:rw:/data/../x", (a, "/x", True)),
                (f"{source}/b:c:rw", (f"{source}/b:c", f"{source}/b:c", True)),
                (f"{source}/d:ro:rw", (f"{source}/d:ro", f"{source}/d:ro", True)),
                (f"{source}/s p", (f"{source}/s p", f"{source}/s p", False)),
            ]
            for spec, expected in rows:
                with self.subTest(spec=spec):
                    found = agent_vm.mount_option(spec)
                    self.assertEqual((found.source.path, found.target, found.writable), expected)
            Path(source, "link").symlink_to(a)
            link = agent_vm.mount_option(f"{source}/link")
            typed = [place.path for place in link.as_typed]
            self.assertEqual((link.source.path, typed), (a, [f"{source}/link", a]))
            bad = ["", ":rw", f"{source}/none", f"{a}:xx", f"{a}:rw:relative", f"{a}:wr:/x"]
            self.refuse(agent_vm.mount_option, bad, argparse.ArgumentTypeError)

    def test_mounts_that_contradict_each_other(self) -> None:
        project = mount("/p", "/p", True)
        rows = [
            ([project, mount("/q", "/q")], ""),
            ([project, mount("/q", "/p")], "twice"),
            ([project, mount("/p/sub", "/x")], "read-only, but /p is writable"),
            ([project, mount("/p/sub", "/x", True)], ""),
        ]
        for mounts, problem in rows:
            with self.subTest(mounts=mounts):
                found = agent_vm.mounts_problem(mounts)
                self.assertIn(problem, found)
                self.assertEqual(bool(found), bool(problem))

    def test_no_program_of_the_project_is_run_on_the_host(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            p = os.path.realpath(folder)
            for name in ("project/.venv/bin", "project2/bin"):
                os.makedirs(f"{p}/{name}")
            os.symlink(f"{p}/project/.venv/bin", f"{p}/link")
            venv, other, project = f"{p}/project/.venv/bin", f"{p}/project2/bin", f"{p}/project"
            rows = [
                ("/usr/bin:/bin", project, "/usr/bin:/bin"),
                (f"{venv}:/usr/bin:{project}:{p}/link", project, "/usr/bin"),
                (".:bin::/usr/bin:", project, "/usr/bin"),
                (other, project, other),
                (venv, "/", venv),  # no run would mount this directory
            ]
            here, state = os.getcwd(), Path(p, "state")
            for path, folder, expected in rows:
                with self.subTest(path=path):
                    os.chdir(folder)
                    self.addCleanup(os.chdir, here)
                    self.assertEqual(agent_vm.safe_search_path(path, state), expected)
            os.chdir("/")
            ran_before = state / "sessions" / agent_vm.session_key(project)
            ran_before.mkdir(parents=True)
            Path(ran_before, "bin").mkdir()
            os.symlink(f"{ran_before}/bin", f"{other}/link")
            for path in (venv, f"{other}/link", f"{ran_before}/bin"):
                self.assertEqual(agent_vm.safe_search_path(path, state), "", path)
            self.assertEqual(agent_vm.safe_search_path(other, state), other)
            os.chdir(here)

    def test_lima_mounts_each_folder_at_the_number_of_its_slot(self) -> None:
        mounts = [mount("/p", "/p", True), mount("/a, b", "/data")]
        expected = [
            {"location": "/p", "mountPoint": "/mnt/agent-vm/0", "writable": True},
            {"location": "/a, b", "mountPoint": "/mnt/agent-vm/1", "writable": False},
        ]
        self.assertEqual(agent_vm.lima_mounts(mounts), expected)


class LeaseTest(TableTest):
    def test_a_lease_lives_with_its_very_process(self) -> None:
        rows = [("boot", "100", True), ("boot", "101", False), ("boot", "", False),
                ("other", "100", False), ("", "", True)]  # fmt: skip
        self.check(lambda boot, start: agent_vm.lease_is_live(LEASE, boot, start), rows)

    def test_a_lease_without_a_start_time_is_dead(self) -> None:
        lease = LEASE._replace(start="")
        self.assertFalse(agent_vm.lease_is_live(lease, "boot", ""))

    def test_leases_are_read_back(self) -> None:
        lease = LEASE._replace(folders=["/p"])
        self.assertEqual(agent_vm.lease_from(json.dumps(lease._asdict())), lease)

    def test_a_lease_on_an_instance_that_is_not_ours_is_refused(self) -> None:
        for name in ("default", "../../etc", "agent-vm-base", "agent-vm-base.old", "", "x/y", None):
            text = json.dumps({**LEASE._asdict(), "name": name})
            with self.subTest(name=name), self.assertRaises((ValueError, TypeError)):
                agent_vm.lease_from(text)

    def test_processes_have_a_start_time_while_they_live(self) -> None:
        child = subprocess.Popen(["sleep", "60"])
        first = agent_vm.process_start(child.pid)
        self.assertTrue(first)
        self.assertEqual(agent_vm.process_start(child.pid), first)
        child.kill()
        child.wait()
        self.assertEqual(agent_vm.process_start(child.pid), "")

    def test_the_boot_has_an_id(self) -> None:
        self.assertTrue(agent_vm.boot_id())
        self.assertEqual(agent_vm.boot_id(), agent_vm.boot_id())


class GuestTest(TableTest):
    def plan(self, **fields: Any) -> Plan:
        mounts = [mount("/p q", "/p q", True), mount("/main/.git", "/main/.git", True)]
        return Plan(project="/p q", argv=["claude"], mounts=mounts, **fields)

    def test_the_main_checkout_of_a_worktree_is_trusted(self) -> None:
        projects = agent_vm.claude_config(self.plan())["projects"]
        for folder in ("/p q", "/main", "/"):
            self.assertIs(projects[folder]["hasTrustDialogAccepted"], True, folder)

    def test_claude_asks_nothing(self) -> None:
        config = agent_vm.claude_config(self.plan())
        self.assertIs(config["hasCompletedOnboarding"], True)
        self.assertIs(config["projects"]["/"]["hasTrustDialogAccepted"], True)
        self.assertNotIn("customApiKeyResponses", config)

    def test_an_api_key_is_approved_by_its_end(self) -> None:
        key = Credential("ANTHROPIC_API_KEY", "sk-ant-api03-" + "x" * 30 + "y" * 20, "test")
        config = agent_vm.claude_config(self.plan(credential=key))
        self.assertEqual(config["customApiKeyResponses"]["approved"], ["y" * 20])

    def test_a_credential_does_not_show_itself(self) -> None:
        self.assertNotIn("secret", repr(Credential("ANTHROPIC_API_KEY", "secret", "test")))


class SettingTest(TableTest):
    def test_whole_numbers(self) -> None:
        self.check(agent_vm.whole_number, [("1", 1), ("64", 64), ("999999", 999999)])
        bad = ["0", "-1", "", "abc", "1.5", "1e3", " 1", "01", "9999999", "٣", "8GiB"]
        self.refuse(agent_vm.whole_number, bad, argparse.ArgumentTypeError)

    def test_web_addresses(self) -> None:
        good = ["http://h", "https://h:8/p/?q=%20"]
        self.check(agent_vm.web_address, [(url, url) for url in good])
        bad = ["", "h", "ftp://h", "file:///etc/passwd", "https://u:p@h", "http://a b", "http://'"]
        self.refuse(agent_vm.web_address, bad, argparse.ArgumentTypeError)

    def test_what_may_be_a_secret_is_not_in_the_error(self) -> None:
        for parse, word in (
            (agent_vm.web_address, "https://u:s3cret@h"), (agent_vm.variable, "MY-TOKEN=s3cret"),
            (agent_vm.image_location, "https://u:s3cret@h/i"),
        ):  # fmt: skip
            with self.assertRaises(argparse.ArgumentTypeError) as caught:
                parse(word)
            self.assertNotIn("s3cret", str(caught.exception))

    def test_files_exist(self) -> None:
        self.assertEqual(agent_vm.existing_file(__file__), os.path.abspath(__file__))
        self.assertEqual(agent_vm.image_location("https://h/i"), "https://h/i")
        bad = ["/nowhere", os.path.dirname(__file__), ""]
        self.refuse(agent_vm.existing_file, bad, argparse.ArgumentTypeError)
        self.refuse(agent_vm.image_location, ["/nowhere", "ftp://h/i"], argparse.ArgumentTypeError)

    def test_variables(self) -> None:
        good = ["A", "_a1", "A=", "A=b=c", "A=x\ny"]
        self.check(agent_vm.variable, [(text, text) for text in good])
        self.refuse(agent_vm.variable, ["", "1A", "A-B", "=x", "A B=1", "A\n=1"],
                    argparse.ArgumentTypeError)  # fmt: skip

    def test_yes_and_no(self) -> None:
        rows = [("yes", True), ("TRUE", True), ("1", True), ("on", True), ("no", False),
                ("False", False), ("0", False)]  # fmt: skip
        self.check(agent_vm.yes_or_no, rows)
        self.refuse(agent_vm.yes_or_no, ["", "y", "maybe"], argparse.ArgumentTypeError)

    def resolve(self, flag: Any, environ: str, config: str) -> tuple[Any, str]:
        env = {"AGENT_VM_MEMORY": environ} if environ else {}
        section = {"memory": config} if config else {}
        return Settings({"memory": flag}, env, section).find("memory")

    def test_flag_before_environment_before_config_before_default(self) -> None:
        rows = [
            (3, "5", "7", (3, "flag")),
            (None, "5", "7", (5, "environment")),
            (None, "", "7", (7, "config")),
            (None, "", "", (8, "default")),
        ]
        self.check(self.resolve, rows)

    def test_a_bad_value_says_where_it_stands(self) -> None:
        with self.assertRaisesRegex(AgentVMError, "AGENT_VM_MEMORY.*'0'"):
            self.resolve(None, "0", "")
        with self.assertRaisesRegex(AgentVMError, r"config\.ini.*memory.*'much'"):
            self.resolve(None, "", "much")

    def test_lists_are_words_as_in_a_shell(self) -> None:
        env = {"AGENT_VM_ENV": "A=1 'B=two words'"}
        resolved = Settings({}, env, {}).find("env")
        self.assertEqual(resolved, (("A=1", "B=two words"), "environment"))
        with self.assertRaises(AgentVMError):
            Settings({}, {"AGENT_VM_ENV": "A='open"}, {}).find("env")

    def test_credentials_are_recognised_in_what_people_paste(self) -> None:
        token, key = "sk-ant-oat01-" + "x" * 95, "sk-ant-api03-" + "y_-x" * 24
        oauth = ("CLAUDE_CODE_OAUTH_TOKEN", token)
        rows = [
            (token, oauth),
            (f"export CLAUDE_CODE_OAUTH_TOKEN={token}\n", oauth),
            (f"Your token:\n\n  {token}\n\nStore it. {token}\n", oauth),
            (f'"{key}"', ("ANTHROPIC_API_KEY", key)),
            (f"{token[:20]}\n{token[20:32]}\r\n  {token[32:]}\n", oauth),  # wrapped by a terminal
            (f"{token}\nStore it\n", oauth),
            # Item 15: each way in which a terminal, or a person, breaks one.
            *((f"{token[:width]}\n{token[width:]}\n", oauth) for width in (50, 79, 100, 105, 107)),
            (f"{token}\nSecurely\n--------\n", oauth),
            (f'export A="{token[:79]}\n{token[79:]}"\n', oauth),
            (f"│ {token[:70]} │\n│ {token[70:]} │\n", oauth),
            (f"\x1b[200~\x1b[1m{token[:70]}\x1b[0m\n\n{token[70:]}\x1b[201~", oauth),
        ]
        self.check(agent_vm.recognised_credential, rows)
        bad = [
            "",
            "password",
            "sk-ant-oat01-",
            f"{token} {key}",
            f"{token}\n{key}",
            "sk-ant-xyz01-" + "x" * 95,
            token[:79],
            token[:50],
            f"{token[:50]} is cut off\n{token[50:]}",
        ]
        self.refuse(agent_vm.recognised_credential, bad, AgentVMError)


class OutputTest(TableTest):
    def test_nothing_in_a_name_moves_the_cursor(self) -> None:
        self.check(agent_vm.printable, [("a\x1b[2Jb\n", "a?[2Jb?"), ("ünï", "ünï")])

    def test_the_tail_of_a_log_is_fit_for_a_terminal(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            log = Path(name, "serial.log")
            log.write_bytes(b"old\n" * 50 + b"\x1b[31mred\x1b[0m\x1b]0;t\x07\xff\r\nlast\n")
            self.assertEqual(agent_vm.tail(log, 2).split("\n")[1], "last")
            self.assertNotIn("\x1b[31m", agent_vm.tail(log))
            self.assertEqual(len(agent_vm.tail(log).split("\n")), 10)
            self.assertEqual(agent_vm.tail(Path(name, "none")), "")


class ParserTest(TableTest):
    def command(self, *argv: str) -> list[str]:
        return list(agent_vm.parse_args(argv).command)

    def test_everything_after_the_dashes_is_the_agents(self) -> None:
        rows = [
            ((), []),
            (("--",), []),
            (("--", "-p", "x"), ["-p", "x"]),
            (("--", "--", "--keep"), ["--", "--keep"]),
            (("--keep", "--", "--memory"), ["--memory"]),
            (("word", "--keep", "--", "x"), ["word", "--keep", "--", "x"]),
            (("--", "", "a\nb"), ["", "a\nb"]),
        ]
        for words, expected in rows:
            with self.subTest(words=words):
                self.assertEqual(self.command("run", *words), expected)
                self.assertEqual(self.command("shell", *words), expected)

    def test_what_is_wrong_on_the_command_line_is_a_usage_error(self) -> None:
        rows = [
            ("run", "--bogus"), ("run", "--memory", "0"), ("run", "--cpus", "-1"), ("frobnicate",),
            ("run", "--env", "A B=1"), ("run", "--name", "UPPER"), ("setup", "--disk", "abc"),
            ("run", "--mem", "4"), ("list", "--", "x"), (), ("rm",), ("shell-init", "tcsh"),
            ("run", "--mount", "/no/such/folder"), ("run", "--repo", "no-slash"),
            ("run", "--github=o/r"),
            ("setup", "--ca-cert", "/no/such/file"), ("setup", "--template", "/no/such/file"),
        ]  # fmt: skip
        for argv in rows:
            stderr = io.StringIO()
            with self.subTest(argv=argv), contextlib.redirect_stderr(stderr):
                with self.assertRaises(SystemExit) as caught:
                    agent_vm.parse_args(argv)
                self.assertEqual(caught.exception.code, 2)
                self.assertIn("usage: ", stderr.getvalue())

    def test_every_setting_has_a_flag(self) -> None:
        flags = {*agent_vm.SETUP_SETTINGS, *agent_vm.RUN_SETTINGS}
        self.assertEqual(set(agent_vm.SETTINGS), flags)

    def test_a_default_is_written_once_and_shown_in_the_help(self) -> None:
        parser = agent_vm.build_parser()
        verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        text = verbs.choices["setup"].format_help()
        for words in ("(default 20)", "(default 8)", "(default 600)"):
            self.assertIn(words, text)


if __name__ == "__main__":
    unittest.main()
