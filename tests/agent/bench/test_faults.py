"""`longdream bench faults` goes through faults for real, and its oracles see what must not happen."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from longdream.agent.bench.faults import faults, inputs, kinds, mutations, situations
from longdream.agent.bench.faults.processes import environment
from longdream.envs.contract import UserError

WATCHED = """
import os, pickle, shutil, subprocess, sys
from pathlib import Path
from longdream.agent.bench.faults.watch import Watch
folder = Path.cwd()
(folder / "in").mkdir()
watch = Watch([folder / "in"], "/bin/true")
def seen(call):
    with watch.on() as notes:
        call()
    return notes
os.symlink(folder / "notes", folder / "in" / "link")
(folder / "in" / "sub").mkdir()
assert seen(lambda: open(folder / "in" / "a", "w").close()) == []
assert seen(lambda: open("/dev/null", "w").close()) == []
assert seen(lambda: open(__file__ if "__file__" in globals() else "/etc/hostname").close()) == []
assert seen(lambda: shutil.rmtree(folder / "in" / "sub")) == []
assert seen(lambda: subprocess.run(["/bin/true"])) == []
for call, what in [
    (lambda: open(folder / "b", "w").close(), "wrote"),
    (lambda: open(folder / "in" / "link", "a").close(), "wrote"),
    (lambda: os.close(os.open("b", os.O_RDWR)), "wrote"),
    (lambda: os.truncate("b", 0), "os.truncate"),
    (lambda: os.rename("b", "in/b"), "os.rename"),
    (lambda: os.mkdir("c"), "os.mkdir"),
    (lambda: os.rmdir("c"), "os.rmdir"),
    (lambda: pickle.loads(b"cos\\ngetcwd\\n."), "unpickled os.getcwd"),
    (lambda: subprocess.run(["/bin/echo"], stdout=subprocess.DEVNULL), "started /bin/echo"),
    (lambda: os.system(":"), "started"),
]:
    assert any(note.startswith(what) for note in seen(call)), what
"""


def test_what_must_not_happen_is_seen(tmp_path: Path) -> None:
    """In a process of its own: what watches it stays until its end."""
    subprocess.run([sys.executable, "-c", WATCHED], cwd=tmp_path, env=environment(), check=True)


def test_kills_and_inputs_are_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = faults.measure(kills=1, inputs=20, situations="trian", workers=2, seed=3, out=tmp_path / "out")
    assert json.loads(json.dumps(result)) == result
    assert result["failures"] == [] and result["ok"]
    assert result["kills"]["survived"] == 1 and result["lost"] == {"rows": 0, "runs": 0, "checkpoints": 0}
    assert result["inputs"]["tried"] == 20 and set(result["inputs"]["kinds"]) == set(kinds.KINDS)
    assert result["tried"] == result["survived"] == 22
    told = capsys.readouterr()
    assert "lost         rows 0, runs 0, checkpoints 0" in told.out and "situations" in told.err


def test_inputs_that_hang_or_end_the_process_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that meets one is followed by another, which goes on with the next input."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, os, time, threading\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'longdream.agent.bench.faults.watch':\n"
        "            from longdream.agent.bench.faults import kinds\n"
        "            kinds.KINDS['config'] = (lambda box, rng: lambda: time.sleep(99), 5)\n"
        "            kinds.KINDS['flags'] = (lambda box, rng: lambda: os._exit(5), 3)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(inputs, "INPUT_S", 2.0)
    inputs.make_base(tmp_path / "base")
    told: list[dict] = []
    inputs._work(tmp_path / "base", tmp_path / "home", 0, 4, 10, 2, told.append)
    assert [each["kind"] for each in told] == ["config", "flags", "npz"]
    assert "it took more than 2 s" in told[0]["why"]
    assert "it ended the process (exit code 5" in told[1]["why"]
    assert told[2]["ended"] in ("accepted", "refused")


def test_inputs_depend_on_their_seed_alone() -> None:
    data = bytes(range(200))
    for change, value in ((mutations.bytes_of, data), (mutations.tree_of, {"a": [1, {"b": 2.0}], "c": "x"})):
        outcomes = [[repr(change(random.Random(seed), value)) for seed in range(40)] for _ in range(2)]
        assert outcomes[0] == outcomes[1] and len(set(outcomes[0])) > 20


def test_what_is_not_survived_is_said(tmp_path: Path) -> None:
    with pytest.raises(situations.Failed, match="expected exit code 2"):
        situations._mistake("version", tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    with pytest.raises(UserError, match="holds something else"):
        faults.measure(kills=0, inputs=0, out=tmp_path)
    assert (tmp_path / "inputs").exists()
