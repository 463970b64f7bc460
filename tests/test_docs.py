"""README.md and the parser say the same."""

from __future__ import annotations

import argparse
import re
import tempfile
import unittest

import agent_vm
import github_app_token
import github_mcp_proxy
from tests.support import ROOT


def parser_words(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """verb -> its options; "" -> the verbs."""
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    words = {
        verb: [o for a in sub._actions for o in a.option_strings] for verb, sub in verbs.items()
    }
    return {"": [*verbs], **words}


WORDS = parser_words(agent_vm.build_parser())


class ReadmeTest(unittest.TestCase):
    text: str

    @classmethod
    def setUpClass(cls) -> None:
        cls.text = (ROOT / "README.md").read_text()

    def test_every_verb_stands_in_it(self) -> None:
        missing = [verb for verb in WORDS[""] if not re.search(rf"`{verb}\b", self.text)]
        self.assertEqual(missing, [])

    def test_every_long_option_stands_in_it(self) -> None:
        options = {word for words in WORDS.values() for word in words if word.startswith("--")}
        found = set(re.findall(r"--[a-z][a-z-]*", self.text))
        self.assertEqual(options - found, set())

    def test_the_proxys_options_variables_and_words_stand_in_it(self) -> None:
        words = set(re.findall(r"GITHUB_MCP_[A-Z_]+", github_mcp_proxy.EPILOG))
        for action in github_mcp_proxy.build_parser()._actions:
            words |= {option for option in action.option_strings if option.startswith("--")}
        words |= {
            f"`{word}`" for word in (*github_mcp_proxy.ALLOW, *github_mcp_proxy.Policy._fields)
        }
        self.assertEqual({word for word in words if word not in self.text}, set())

    def test_every_option_of_a_command_that_it_shows_exists(self) -> None:
        known = {word for words in WORDS.values() for word in words} | {"--version"}
        commands = re.findall(r"(?:agent-vm|agent_vm\.py) ([a-z-]+)([^`\n|│#]*)", self.text)
        for verb, rest in commands:
            if verb in WORDS:
                ours = rest.partition(" -- ")[0]
                self.assertEqual(set(re.findall(r"--[a-z][a-z-]*", ours)) - known, set(), verb)

    def test_every_path_of_the_repository_that_it_names_exists(self) -> None:
        names = set(re.findall(r"`((?:lima|docs|tests)/[\w./-]*|[a-z_]+\.py)`", self.text))
        self.assertEqual([name for name in names if not (ROOT / name).exists()], [])

    def test_every_make_target_that_it_names_exists(self) -> None:
        makefile = (ROOT / "Makefile").read_text()
        targets = re.findall(r"^([a-z][a-z -]*?)(?: \$\S+)?:", makefile, re.MULTILINE)
        known = {target for line in targets for target in line.split()}
        self.assertEqual(set(re.findall(r"`make ([a-z-]+)", self.text)) - known, set())

    def test_the_embedded_copy_is_not_counted_as_code(self) -> None:
        row = re.search(r"`agent_vm\.py` \| ([\d,]+) and the copy", self.text)
        assert row
        source = (ROOT / "agent_vm.py").read_text()
        lines = source.partition("# BEGIN GENERATED")[0].count("\n")
        self.assertAlmostEqual(int(row[1].replace(",", "")), lines, delta=150)

    def test_the_policy_that_it_shows_is_one(self) -> None:
        block = re.search(r"```ini\n(\[policy\].*?)```", self.text, re.DOTALL)
        assert block
        with tempfile.NamedTemporaryFile("w", suffix=".ini") as file:
            file.write(block[1])
            file.flush()
            policy = github_mcp_proxy.read_policy(file.name)
        self.assertEqual(policy.branches, ("agent/*", "fix/**"))
        self.assertEqual(policy.default_branch, "main")

    def test_lines_are_counted(self) -> None:
        for name in ("github_mcp_proxy", "github_app_token"):
            row = re.search(rf"`{name}\.py` \| ([\d,]+)", self.text)
            assert row
            lines = (ROOT / f"{name}.py").read_text().count("\n")
            self.assertAlmostEqual(int(row[1].replace(",", "")), lines, delta=60)

    def test_the_token_scripts_verbs_options_and_profile_stand_in_it(self) -> None:
        parser = github_app_token.build_parser()
        verbs = next(
            a for a in parser._actions if isinstance(a, argparse._SubParsersAction)
        ).choices
        words = {f"`{verb}`" for verb in verbs}
        for verb in verbs.values():
            options = [o for action in verb._actions for o in action.option_strings]
            words |= {option for option in options if option.startswith("--")}
        self.assertEqual({word for word in words if word not in self.text}, set())
        block = re.search(r"\[widgets\]\n(.*?)```", self.text, re.DOTALL)
        assert block
        keys = {line.split("=")[0].strip() for line in block[1].splitlines() if "=" in line}
        self.assertLess(keys, set(github_app_token.SETTINGS))


class HelpTest(unittest.TestCase):
    def test_every_option_is_explained(self) -> None:
        actions = agent_vm.build_parser()._actions
        verbs = next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices
        for verb, parser in verbs.items():
            for action in parser._actions:
                if action.option_strings:
                    self.assertTrue(action.help, (verb, action.option_strings))

    def test_the_manual_names_every_folder_and_credential(self) -> None:
        text = agent_vm.build_parser().format_help()
        for word in (*agent_vm.CREDENTIALS, "LIMA_HOME", "XDG_STATE_HOME", "config.ini",
                     agent_vm.PROJECT_HOOK, ".claude-vm.setup.sh", "125", "130"):  # fmt: skip
            self.assertIn(word, text)

    def test_the_changelog_knows_the_version(self) -> None:
        self.assertIn(agent_vm.__version__, (ROOT / "CHANGELOG.md").read_text())


if __name__ == "__main__":
    unittest.main()
