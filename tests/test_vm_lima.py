"""lima/: real files that tools can read, the copy of them in the script, and what they do."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

import agent_vm
from tests.support import ROOT
from tests.support import TESTS
from tests.support import executable

LIMA = ROOT / "lima"
TEMPLATE = LIMA / "agent-vm.yaml"
PROVISION = sorted(LIMA.glob("provision/*"))


def own_part(script: Path) -> str:
    """A script without the copy of lima/ at its end."""
    return script.read_text().partition("# BEGIN GENERATED")[0]


class TemplateTest(unittest.TestCase):
    text = TEMPLATE.read_text()

    def test_the_copy_in_the_script_is_current(self) -> None:
        files = [path for path in LIMA.rglob("*") if path.suffix in (".yaml", ".sh", ".py", ".md")]
        copies = {str(path.relative_to(LIMA)): path.read_text() for path in files}
        self.assertEqual(agent_vm.EMBEDDED, copies)

    def test_the_tool_that_makes_the_copy_agrees(self) -> None:
        command = [sys.executable, str(TESTS / "tools/embed.py"), "--check"]
        self.assertEqual(subprocess.run(command, check=False).returncode, 0)

    def test_an_older_lima_fails_to_list_while_another_vm_is_cloned(self) -> None:
        self.assertIn("\nminimumLimaVersion: 2.2.0\n", self.text)

    def test_it_mounts_nothing_runs_no_containerd_and_takes_no_key(self) -> None:
        for line in ("mounts: []", "  system: false", "  user: false", "  forwardAgent: false",
                     "  loadDotSSHPubKeys: false"):  # fmt: skip
            self.assertIn(f"\n{line}\n", self.text)

    def test_it_runs_every_provision_script_as_root_in_order(self) -> None:
        runs = re.findall(r"^- mode: (\w+)\n  file: (\S+)$", self.text, re.MULTILINE)
        self.assertEqual(runs, [("system", f"provision/{path.name}") for path in PROVISION])

    def test_the_parameters_it_declares_are_those_that_are_read_and_set(self) -> None:
        block = self.text.partition("\nparam:\n")[2].partition("\n\n")[0]
        declared = set(re.findall(r"^  (\w+):", block, re.MULTILINE))
        scripts = "".join(path.read_text() for path in PROVISION)
        self.assertEqual(set(re.findall(r"PARAM_(\w+)", scripts)), declared)
        host = own_part(ROOT / "agent_vm.py")
        self.assertEqual({name for name in declared if f'"{name}"' in host}, declared)

    def test_the_first_line_says_how_to_try_it_alone(self) -> None:
        self.assertIn("limactl start", self.text.splitlines()[0])

    def test_the_real_limactl_accepts_it(self) -> None:
        limactl = shutil.which("limactl")
        if not limactl or os.geteuid() == 0:
            self.skipTest("no limactl on PATH" if not limactl else "limactl refuses root")
        with tempfile.TemporaryDirectory(prefix="avm-", dir="/var/tmp") as home:
            result = subprocess.run(
                [limactl, "validate", str(TEMPLATE)], env={**os.environ, "LIMA_HOME": home},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        self.assertEqual(result.returncode, 0, result.stderr)


class ProvisionTest(unittest.TestCase):
    def test_scripts_are_strict_executable_and_say_who_runs_them(self) -> None:
        for path in PROVISION:
            with self.subTest(path=path.name):
                lines = path.read_text().splitlines()
                self.assertEqual(lines[0], "#!/bin/bash")
                self.assertIn("Run by Lima", lines[1])
                self.assertIn("set -eux -o pipefail", lines)
                self.assertEqual(path.stat().st_mode & 0o111, 0o111)

    def test_shellcheck_has_nothing_to_say(self) -> None:
        if not shutil.which("shellcheck"):
            self.skipTest("no shellcheck on PATH")
        result = subprocess.run(
            ["shellcheck", *map(str, PROVISION)], capture_output=True, text=True, check=False
        )
        self.assertEqual(result.returncode, 0, result.stdout)

    def test_the_marker_and_the_log_that_setup_looks_for_are_theirs(self) -> None:
        host = own_part(ROOT / "agent_vm.py")
        last = PROVISION[-1].read_text()
        for path in (f"/var/lib/agent-vm/done/{PROVISION[-1].stem}",
                     "/var/log/agent-vm-provision.log"):  # fmt: skip
            self.assertTrue(path in host, f"agent_vm.py does not look for {path}")
            self.assertTrue(path in last, f"{PROVISION[-1].name} has no {path}")

    def test_only_vendors_are_named_in_the_sources(self) -> None:
        vendors = {"github.com", "lima-vm.io", "claude.ai"}
        vendors |= {"deb.nodesource.com", "download.docker.com"}
        vendors |= {"api.github.com", "api.githubcopilot.com", "api.anthropic.com"}
        for path in (TEMPLATE, *LIMA.rglob("*.sh"), *LIMA.glob("*.py"), *ROOT.glob("*.py")):
            hosts = set(re.findall(r"https?://([a-z0-9-]+(?:\.[a-z0-9-]+)+)", path.read_text()))
            self.assertEqual(
                hosts - vendors - {"127.0.0.1", "host.lima.internal"}, set(), path.name
            )


# A tool of the guest: it says that it was called, and fails when $FAIL is a pattern of the call.
TOOL = """
call="${0##*/} $*"
echo "$call" >> "$GUEST/calls"
if [ -n "$FAIL" ] && echo "$call" | grep -qE -- "$FAIL"; then echo "out of order"; exit 1; fi
case $call in
  "uname -r") echo 1.0-generic ;;
  systemd-detect-virt*) echo kvm ;;
  chromium*) echo smoke-test ;;
  runuser*) shift 3; exec "$@" ;;
  dpkg*) echo amd64 ;;
  "npm config get registry") echo http://npm.test/ ;;
  "node --version") echo v20.0.0 ;;
  curl*claude.ai*) echo 'mkdir -p ~/.local/bin; cp "$GUEST/bin/claude" ~/.local/bin/' > "$9" ;;
  curl*claude.tgz) cp "$GUEST/claude.tgz" "$9" ;;
  curl*http*) echo > "$9" ;;
  jq*tarball*) cat "$GUEST/dist" ;;
esac
"""
TOOLS = """
    apt-get chromium claude curl docker dpkg fd fstrim gcc gh git jq locale-gen modinfo modprobe
    node npm python3 rg runuser sg systemctl systemd-detect-virt uname usermod
""".split()
SYSTEM_PATH = re.compile(r"(?<![\w.}/-])/(?=(?:etc|var|usr/local|usr/share|lib/modules|boot)/)")


class ScriptTest(unittest.TestCase):
    """The scripts are run, in a folder instead of a guest, with tools that only take notes."""

    COST = 5.0

    def setUp(self) -> None:
        if sys.platform != "linux":
            self.skipTest("the guest's tools are GNU's")
        self.guest = Path(tempfile.mkdtemp(prefix="avm-", dir="/var/tmp")).resolve()
        self.addCleanup(shutil.rmtree, self.guest)
        self.home = self.guest / "home"
        for folder in ("bin", "home", "boot", "lib/modules/1.0-generic/kernel", "var/tmp",
                       "var/log", "var/lib/agent-vm/done", "etc/apt/apt.conf.d",
                       "etc/apt/keyrings", "etc/apt/sources.list.d", "etc/dpkg/dpkg.cfg.d",
                       "usr/local/bin", "usr/share/i18n"):  # fmt: skip
            (self.guest / folder).mkdir(parents=True)
        for name in TOOLS:
            executable(self.guest / "bin" / name, TOOL)
        self.path = f"{self.guest}/bin:{os.environ['PATH']}"
        (self.home / ".bash_profile").write_text(f"PATH={self.path}\n")  # a login has its own
        (self.guest / "boot/vmlinuz-1.0-generic").touch()
        (self.guest / "etc/os-release").write_text("VERSION_CODENAME=trixie\n")
        self.sources = self.guest / "etc/apt/sources.list.d/debian.sources"
        self.sources.write_text(
            "URIs: mirror+file:/etc/apt/mirrors/debian.list\n"
            "URIs: https://old.test/debian-security\n"
        )
        (self.guest / "usr/share/i18n/SUPPORTED").write_text("de_DE.UTF-8 UTF-8\n")

    def run_script(self, name: str, fail: str = "", **param: str) -> int:
        text = (LIMA / "provision" / name).read_text()
        text = SYSTEM_PATH.sub(f"{self.guest}/", text).replace("/sbin/modinfo", "modinfo")
        text = text.replace("{{.User}}", "agent").replace("{{.Home}}", str(self.home))
        env = {"PATH": self.path, "GUEST": str(self.guest), "FAIL": fail}
        env.update({f"PARAM_{key}": value for key, value in param.items()})
        result = subprocess.run(
            ["bash", "-c", text], env=env, cwd=self.guest, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        self.output = result.stdout
        return result.returncode

    def read(self, path: str) -> str:
        file = self.guest / path
        return file.read_text() if file.exists() else ""

    def log(self) -> list[str]:
        lines = self.read("var/log/agent-vm-provision.log").splitlines()
        return [line[10:] for line in lines if line.startswith("agent-vm: ")]

    def calls(self, tool: str) -> list[str]:
        return [call for call in self.read("calls").splitlines() if call.startswith(f"{tool} ")]

    def done(self) -> list[str]:
        return sorted(path.name for path in (self.guest / "var/lib/agent-vm/done").iterdir())

    def test_all_is_installed_once(self) -> None:
        self.assertEqual(self.run_script("10-base.sh", locale="de_DE.UTF-8"), 0, self.output)
        self.assertEqual(self.done(), ["10-base"])
        self.assertEqual(
            self.log(),
            ["setting up apt", "installing packages", "installing Node.js", "installing Docker",
             "installing Claude Code", "installing the Chrome DevTools MCP server", "cleaning up"],
        )  # fmt: skip
        self.assertEqual(self.read("var/lib/agent-vm/notes"), "")
        self.assertEqual(self.read("etc/locale.gen"), "de_DE.UTF-8 UTF-8\n")
        self.assertEqual(
            self.read("etc/systemd/system/docker.service.d/environment.conf"),
            "[Service]\nEnvironmentFile=-/etc/environment\n",
        )
        self.assertIn("download.docker.com", self.read("etc/apt/sources.list.d/docker.list"))
        self.assertEqual(list((self.guest / "var/tmp").iterdir()), [])
        calls = self.read("calls")
        self.assertEqual(self.run_script("10-base.sh"), 0)
        self.assertEqual(self.read("calls"), calls)

    def test_minimal_is_little(self) -> None:
        self.assertEqual(self.run_script("10-base.sh", minimal="true"), 0, self.output)
        installs = [call for call in self.calls("apt-get") if " install " in call]
        self.assertEqual(
            installs,
            ["apt-get install -y --no-install-recommends ca-certificates curl git jq"
             " nftables python3-minimal redsocks"],
        )  # fmt: skip
        self.assertEqual(self.calls("npm") + self.calls("docker") + self.calls("locale-gen"), [])

    def test_a_mirror_takes_the_images_place(self) -> None:
        self.run_script("10-base.sh", minimal="true", aptMirror="http://apt.test/x/debian/")
        self.assertEqual(
            self.sources.read_text(),
            "URIs: http://apt.test/x/debian\nURIs: http://apt.test/x/debian-security\n",
        )

    def test_a_mirror_without_security_updates_is_noted_and_not_asked_for_them(self) -> None:
        mirror = "http://apt.test/debian"
        self.run_script("10-base.sh", "curl .*InRelease", minimal="true", aptMirror=mirror)
        self.assertEqual(
            self.sources.read_text(),
            "URIs: http://apt.test/debian\nURIs: https://old.test/debian-security\n",
        )
        self.assertIn("Security updates from the image's", self.read("var/lib/agent-vm/notes"))

    def test_a_mirror_that_replaces_nothing_is_an_error(self) -> None:
        self.sources.write_text("URIs: http://other.test/ubuntu\n")
        self.assertEqual(self.run_script("10-base.sh", aptMirror="http://apt.test/debian"), 1)
        self.assertIn("error: no Debian mirror to replace", self.log()[-1])

    def test_missing_package_lists_are_noted(self) -> None:
        self.assertEqual(self.run_script("10-base.sh", "apt-get update --error", minimal="true"), 0)
        self.assertIn("Some package lists are missing", self.read("var/lib/agent-vm/notes"))

    def test_debians_packages_are_taken_when_a_vendor_cannot_be_reached(self) -> None:
        for fail in ("curl .*(nodesource|docker.com)", "install .*(nodejs=22|docker-ce)"):
            with self.subTest(fail=fail):
                for name in ("calls", "var/lib/agent-vm/notes", "var/lib/agent-vm/done/10-base"):
                    (self.guest / name).unlink(missing_ok=True)
                self.assertEqual(self.run_script("10-base.sh", fail), 0, self.output)
                installs = "\n".join(self.calls("apt-get"))
                self.assertIn("recommends nodejs npm", installs)
                self.assertIn("docker.io docker-cli docker-buildx docker-compose", installs)
                notes = self.read("var/lib/agent-vm/notes").splitlines()
                self.assertEqual(len(notes), 2, notes)
                self.assertIn("Node.js v20.0.0 from Debian", notes[0])
                left = [path.name for path in (self.guest / "etc/apt").rglob("*.*")]
                self.assertEqual({"nodesource.list", "docker.asc"} & set(left), set())

    def test_the_first_failure_is_the_error_and_nothing_follows(self) -> None:
        for fail, step in (
            ("install .*build-essential", "installing packages"),
            ("install .*(nodejs|npm)", "installing Node.js"),
            ("systemctl enable", "installing Docker"),
        ):
            with self.subTest(fail=fail):
                (self.guest / "var/log/agent-vm-provision.log").unlink(missing_ok=True)
                self.assertEqual(self.run_script("10-base.sh", fail), 1)
                self.assertEqual(self.log()[-2:], [step, f"error: {step} failed"])
                self.assertEqual(self.done(), [])
                self.assertEqual(self.run_script("20-test.sh"), 1)
                self.assertEqual(len([line for line in self.log() if "error" in line]), 1)

    def make_npm_package(self) -> None:
        (self.guest / "package").mkdir()
        executable(self.guest / "package/claude", TOOL)
        with tarfile.open(self.guest / "claude.tgz", "w:gz") as tar:
            tar.add(self.guest / "package", "package")
        digest = hashlib.sha512((self.guest / "claude.tgz").read_bytes()).digest()
        integrity = f"sha512-{base64.b64encode(digest).decode()}"
        (self.guest / "dist").write_text(f"http://npm.test/claude.tgz {integrity}\n")

    def test_claude_code_from_npm(self) -> None:
        self.make_npm_package()
        status = self.run_script("10-base.sh", "curl .*claude.ai", minimal="true")
        self.assertEqual(status, 0, self.output)
        self.assertIn("http://npm.test/@anthropic-ai%2fclaude-code-linux-x64", self.read("calls"))
        self.assertIn("Claude Code from npm", self.read("var/lib/agent-vm/notes"))
        self.assertTrue((self.guest / "usr/local/bin/claude").exists())

    def test_claude_code_from_npm_that_is_not_to_be_had_or_not_genuine(self) -> None:
        self.make_npm_package()
        for fail, dist, error in (
            ("npm config get", "", "no npm registry is known"),
            ("npm.test/@", "", "the npm registry gives no claude-code-linux-x64"),
            ("claude.tgz$", "", "gives no tarball of"),
            ("-", "sha512-AAAA", "is not what the npm registry promised"),
            ("-", "sha1-2jmj7l5rSw0yVb/vlWAYkK/YBwk=", "is not what the npm registry promised"),
            ("-", "null", "is not what the npm registry promised"),
        ):
            with self.subTest(error=error, dist=dist):
                if dist:
                    (self.guest / "dist").write_text(f"http://npm.test/claude.tgz {dist}\n")
                fail = f"claude.ai|{fail}" if fail != "-" else "claude.ai"
                self.assertEqual(self.run_script("10-base.sh", fail, minimal="true"), 1)
                self.assertIn(error, self.log()[-1])
                self.assertEqual(list((self.guest / "usr/local/bin").iterdir()), [])

    def test_a_kernel_without_9p_is_replaced_under_qemu(self) -> None:
        self.run_script("10-base.sh", "modprobe -n -q 9p", minimal="true")
        self.assertIn("linux-image-amd64", "\n".join(self.calls("apt-get")))
        (self.guest / "lib/modules/1.0-generic/kernel").rmdir()
        self.assertEqual(self.run_script("20-test.sh"), 0)  # that kernel runs from the next boot on
        self.assertEqual(self.done(), ["10-base"])
        (self.guest / "lib/modules/1.0-generic/kernel").mkdir()
        self.assertEqual(self.run_script("20-test.sh", minimal="true"), 0, self.output)
        self.assertEqual(self.done(), ["10-base", "20-test"])

    def test_what_a_run_needs_is_tried_as_the_user(self) -> None:
        (self.guest / "var/lib/agent-vm/done/10-base").touch()
        self.assertEqual(self.run_script("20-test.sh"), 0, self.output)
        self.assertEqual(self.log(), ["testing it", "the base instance is complete"])
        asked = self.calls("runuser")
        self.assertTrue(all(call.startswith("runuser -u agent -- ") for call in asked))
        for words in ("claude --version", "git --version", "gh --version", "docker buildx version",
                      "sg docker -c 'docker version'", "chromium --headless"):  # fmt: skip
            self.assertIn(words, "\n".join(asked))
        self.assertEqual(self.calls("modinfo"), ["modinfo -k 1.0-generic 9p"])

    def test_a_failed_check_is_named_with_the_end_of_its_output(self) -> None:
        (self.guest / "var/lib/agent-vm/done/10-base").touch()
        for fail, check in (
            ("gcc", "gcc --version"),
            ("modinfo", "for k in"),
            ("chromium", "chromium --headless"),
            ("sg docker", "sg docker"),
        ):
            with self.subTest(check=check):
                self.assertEqual(self.run_script("20-test.sh", fail), 1)
                self.assertIn(f"error: smoke test failed: {check}", self.log()[-1])
                self.assertIn("out of order", self.output)
                self.assertEqual(self.done(), ["10-base"])


if __name__ == "__main__":
    unittest.main()
