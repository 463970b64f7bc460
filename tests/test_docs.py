"""README.md, docs/ and the parsers say the same; what they show exists."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import agent_vm
import github_app_token
import github_mcp_proxy
from tests.support import ROOT

STOP = "# --- you may stop here"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def parser_words(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """verb -> its options."""
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    return {
        verb: [option for action in sub._actions for option in action.option_strings]
        for verb, sub in verbs.items()
    }


WORDS = parser_words(agent_vm.build_parser())


class ReadmeTest(unittest.TestCase):
    text: str

    @classmethod
    def setUpClass(cls) -> None:
        cls.text = (ROOT / "README.md").read_text()

    def test_every_verb_stands_in_it(self) -> None:
        missing = [verb for verb in WORDS if not re.search(rf"`{verb}\b", self.text)]
        self.assertEqual(missing, [])

    def test_what_must_be_known_first_stands_in_its_first_sixty_lines(self) -> None:
        first = "\n".join(self.text.splitlines()[:60])
        for words in ("The agent cannot", "**Runs on**", "**Untested**", "**Needs**", "## Install",
                      "**Log in**", "Must read", "nobody yet"):  # fmt: skip
            self.assertIn(words, first)

    def test_the_lines_that_it_counts_are_there(self) -> None:
        for script in ("agent_vm", "github_mcp_proxy", "github_app_token"):
            row = re.search(rf"`{script}\.py` \| ([\d,]+) of ([\d,]+)", self.text)
            assert row, script
            must_read, whole = (int(number.replace(",", "")) for number in row.groups())
            source = (ROOT / f"{script}.py").read_text().partition("# BEGIN GENERATED")[0]
            self.assertAlmostEqual(source.count("\n"), whole, delta=30)
            self.assertAlmostEqual(source.partition(STOP)[0].count("\n"), must_read, delta=30)
        claimed = re.search(r"you have to read ([\d,]+) lines", self.text)
        row = re.search(r"`agent_vm\.py` \| ([\d,]+)", self.text)
        assert claimed and row
        self.assertEqual(claimed[1], row[1])

    def test_it_names_the_claude_and_lima_that_were_tried(self) -> None:
        self.assertIn(f"Lima {agent_vm.LIMA_RELEASE}", self.text)


class PagesTest(unittest.TestCase):
    """The README and everything in docs/."""

    def test_every_option_of_a_command_that_they_show_exists(self) -> None:
        known = {word for words in WORDS.values() for word in words} | {"--version", "--help"}
        for page in PAGES:
            text = page.read_text()
            commands = re.findall(r"(?:agent-vm|agent_vm\.py) ([a-z-]+)([^`\n|│#]*)", text)
            for verb, rest in commands:
                if verb in WORDS:
                    ours = set(re.findall(r"--[a-z][a-z-]*", rest.partition(" -- ")[0]))
                    self.assertEqual(ours - known, set(), (page.name, verb))

    def test_every_path_of_the_repository_that_they_name_exists(self) -> None:
        for page in PAGES:
            text = page.read_text()
            names = set(re.findall(r"`((?:lima|docs|tests)/[\w./-]*|[a-z_]+\.py)`", text))
            self.assertEqual([name for name in names if not (ROOT / name).exists()], [], page.name)
            for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
                self.assertTrue((page.parent / link).exists(), (page.name, link))

    def test_every_anchor_of_a_page_that_they_link_to_is_a_heading(self) -> None:
        for page in PAGES:
            text = page.read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            self.assertEqual(set(re.findall(r"\]\(#([^)]+)\)", text)) - slugs, set(), page.name)

    def test_every_make_target_that_they_name_exists(self) -> None:
        makefile = (ROOT / "Makefile").read_text()
        targets = re.findall(r"^([a-z][a-z -]*?)(?: \$\S+)?:", makefile, re.MULTILINE)
        known = {target for line in targets for target in line.split()}
        for page in PAGES:
            found = set(re.findall(r"`make ([a-z-]+)", page.read_text()))
            self.assertEqual(found - known, set(), page.name)

    def test_the_page_of_options_is_what_the_parsers_say(self) -> None:
        tool = [sys.executable, str(ROOT / "tests/tools/options.py"), "--check"]
        check = subprocess.run(tool, stderr=subprocess.PIPE, text=True)
        self.assertEqual((check.returncode, check.stderr), (0, ""))

    def test_the_proxys_variables_and_the_words_of_its_policy_stand_in_its_page(self) -> None:
        text = (ROOT / "docs/github.md").read_text()
        words = set(re.findall(r"GITHUB_MCP_[A-Z_]+", github_mcp_proxy.EPILOG))
        words |= {
            f"`{word}`" for word in (*github_mcp_proxy.ALLOW, *github_mcp_proxy.Policy._fields)
        }
        self.assertEqual({word for word in words if word not in text}, set())

    def test_the_policy_that_it_shows_is_one(self) -> None:
        block = re.search(
            r"```ini\n(\[policy\].*?)```", (ROOT / "docs/github.md").read_text(), re.S
        )
        assert block
        with tempfile.NamedTemporaryFile("w", suffix=".ini") as file:
            file.write(block[1])
            file.flush()
            policy = github_mcp_proxy.read_policy(file.name)
        self.assertEqual(policy.branches[:1], ("agent/*",))

    def test_the_token_scripts_verbs_and_profile_stand_in_its_page(self) -> None:
        text = (ROOT / "docs/tokens.md").read_text()
        verbs = {f"`{verb}`" for verb in parser_words(github_app_token.build_parser())}
        self.assertEqual({verb for verb in verbs if verb not in text}, set())
        block = re.search(r"\[widgets\]\n(.*?)```", text, re.DOTALL)
        assert block
        keys = {line.split("=")[0].strip() for line in block[1].splitlines() if "=" in line}
        self.assertLessEqual(keys, set(github_app_token.SETTINGS))

    def test_no_line_of_prose_is_too_long_to_read(self) -> None:
        for page in PAGES:
            block = False
            for line in page.read_text().splitlines():
                block ^= line.lstrip().startswith("```")
                if not block and not line.lstrip().startswith("|"):
                    self.assertLessEqual(len(line), 120, (page.name, line))


class HelpTest(unittest.TestCase):
    def test_every_option_is_explained(self) -> None:
        for script in (agent_vm, github_app_token):
            actions = script.build_parser()._actions
            verbs = next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices
            for verb, parser in verbs.items():
                for action in parser._actions:
                    if action.option_strings:
                        self.assertTrue(action.help, (verb, action.option_strings))

    def test_the_manual_names_every_folder_and_credential(self) -> None:
        text = agent_vm.build_parser().format_help()
        for word in (*agent_vm.CREDENTIALS, "LIMA_HOME", "XDG_STATE_HOME", "config.ini",
                     "runtime.sh", ".claude-vm.setup.sh", "125", "130"):  # fmt: skip
            self.assertIn(word, text)

    def test_the_changelog_knows_the_version(self) -> None:
        self.assertIn(agent_vm.__version__, (ROOT / "CHANGELOG.md").read_text())


class AloneTest(unittest.TestCase):
    def test_each_script_runs_copied_alone(self) -> None:
        for script in ("agent_vm", "github_mcp_proxy", "github_app_token"):
            with self.subTest(script=script), tempfile.TemporaryDirectory() as folder:
                copied = shutil.copy(ROOT / f"{script}.py", folder)
                argv = [sys.executable, "-I", copied, "--help"]
                result = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
                self.assertEqual((result.returncode, result.stderr), (0, ""))
                self.assertIn("Starts:", result.stdout)
                left = [path.name for path in Path(folder).iterdir()]
                self.assertEqual(left, [f"{script}.py"])


if __name__ == "__main__":
    unittest.main()
