"""lima/guest/wake.py by itself: what it makes of files, of Lima's boot, and of a run that asks."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import tempfile
import threading
import types
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

SOURCE = Path(__file__).resolve().parents[1] / "lima" / "guest" / "wake.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("wake", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class WakeTest(unittest.TestCase):
    def setUp(self) -> None:
        self.wake = load()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_json_is_merged_to_the_bottom(self) -> None:
        path = self.folder / "settings.json"
        for old, new, whole in (
            (None, {"a": 1}, {"a": 1}),
            ("", {"a": 1}, {"a": 1}),
            ({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2]},
             {"a": {"b": 3, "c": 2}, "d": [2]}),
            ({"a": 1}, {"a": {"b": 2}}, {"a": {"b": 2}}),
            ({"a": "ü"}, {}, {"a": "ü"}),
        ):  # fmt: skip
            path.unlink(missing_ok=True)
            if old is not None:
                path.write_text(json.dumps(old) if old else "")
            self.wake.merge(str(path), new)
            self.assertEqual(json.loads(path.read_text()), whole)
            self.assertEqual(path.stat().st_mode & 0o777, 0o600)

    def test_a_locale_that_is_missing_is_replaced(self) -> None:
        for given, left in (
            ({"A": "1"}, {"A": "1"}),
            ({"LANG": "C", "A": "1"}, {"LANG": "C", "A": "1"}),
            ({"LANG": ""}, {"LANG": ""}),
            ({"LANG": "xx_XX.none", "A": "1"}, {"LC_ALL": "C.UTF-8", "A": "1"}),
            ({"LANG": "C", "LC_TIME": "xx_XX.none"}, {"LC_ALL": "C.UTF-8"}),
            (
                {"re": "1", "str": "2"},
                {"re": "1", "str": "2"},
            ),  # names that Python's module has, too
            ({"LANG": "C", "LC_TERMINAL": "iTerm2"}, {"LANG": "C", "LC_TERMINAL": "iTerm2"}),
            ({"LC_ALL": "C", "LC_CTYPE": "UTF-8"}, {"LC_ALL": "C", "LC_CTYPE": "UTF-8"}),
        ):
            self.assertEqual(self.wake.known_locale(given), left)

    def test_scripts_of_the_users_own_are_waited_for(self) -> None:
        cidata, run = self.folder / "cidata", self.folder / "run"
        for path in (cidata / "provision.system", cidata / "provision.data", run):
            path.mkdir(parents=True)
        (cidata / "meta-data").write_text("instance-id: iid-2\nlocal-hostname: x\n")
        (cidata / "provision.system/0").write_text("marker=/var/lib/agent-vm/done/10-base\n")
        self.wake.CIDATA, read = str(cidata), self.wake.read
        self.wake.read = lambda path: read(str(path).replace("/run/", f"{run}/"))
        self.wake.wait_for_scripts()
        (cidata / "provision.data/0").write_bytes(b"\xff\0of the user's")
        waiting = threading.Thread(target=self.wake.wait_for_scripts, daemon=True)
        waiting.start()
        for text in ("", "iid-1\n"):  # of another boot
            (run / "lima-boot-done").write_text(text)
            waiting.join(0.3)
            self.assertTrue(waiting.is_alive())
        (run / "lima-boot-done").write_text("iid-2\n")
        waiting.join(5)
        self.assertFalse(waiting.is_alive())

    def test_variables_and_secrets_are_written_byte_for_byte(self) -> None:
        values = {"A": "it's\n$x `id` \\ ü", "B": ""}
        text = self.wake.exports(values) + 'printf "%s|" "$A" "$B"'
        result = subprocess.run(["bash", "-c", text], stdout=subprocess.PIPE, check=True)
        self.assertEqual(result.stdout.decode(), "it's\n$x `id` \\ ü||")

    def test_a_folder_is_mounted_before_those_in_it(self) -> None:
        at = str(self.folder)
        rows = [(0, f"{at}/a/b c", True), (1, f"{at}/a", False), (2, f"{at}/a/b c/$d", False)]
        with mock.patch.object(self.wake, "mount") as mount:
            self.wake.mount_folders(rows)
        places = [call.args[:4] for call in mount.call_args_list]
        read_only = self.wake.RDONLY
        self.assertEqual(places, [
            ("agent-vm-1", f"{at}/a", "9p", read_only),
            ("agent-vm-0", f"{at}/a/b c", "9p", 0),
            ("agent-vm-2", f"{at}/a/b c/$d", "9p", read_only),
        ])  # fmt: skip

    def answer(self, asked: bytes, wake: Any) -> bytes:
        """What a run hears that sends this."""
        ours, guests = socket.socketpair()
        user = types.SimpleNamespace(pw_dir=str(self.folder), pw_uid=0, pw_gid=0)
        with (
            ours,
            mock.patch.object(self.wake, "wake", wake),
            mock.patch.object(self.wake, "set_clock"),
        ):
            ours.sendall(asked)
            ours.shutdown(socket.SHUT_WR)
            with guests:
                self.wake.serve(guests, user)
                guests.shutdown(socket.SHUT_RDWR)  # what was raised holds its file
            return b"".join(iter(lambda: ours.recv(1000), b""))

    def test_a_run_hears_what_became_of_it(self) -> None:
        asked = b'{"now": 1}\n'
        self.assertEqual(self.answer(asked, lambda *_: None), b"ready\ndone\n")
        is_open = mock.Mock(side_effect=self.wake.Open("1.1.1.1 port 443\nanswers"))
        said = b"ready\nis not confined: 1.1.1.1 port 443 answers\n"
        self.assertEqual(self.answer(asked, is_open), said)
        broken = mock.Mock(side_effect=OSError(19, "No such device", "/p"))
        said = b"ready\ncould not be prepared: OSError: [Errno 19] No such device: '/p'\n"
        self.assertEqual(self.answer(asked, broken), said)

    def test_a_run_that_leaves_before_it_asks_is_not_waited_for(self) -> None:
        never = mock.Mock()
        for asked in (b'{"now": 1', b""):
            self.assertIn(b"could not be prepared: JSONDecodeError", self.answer(asked, never))
        never.assert_not_called()
