"""docs/controllers.md: its example is run as it stands."""

import json
import re
import sys
from pathlib import Path

import pytest

from longdream.agent.cli import main as cli

DOC = Path(__file__).resolve().parents[2] / "docs" / "controllers.md"


def test_the_example_of_one_file_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    code = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 1 and len([line for line in code[0].splitlines() if line.strip()]) <= 40
    (tmp_path / "my_controllers.py").write_text(code[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    short = ["--steps", "90", "--evaluate.every", "0", "--evaluate.final_episodes", "2"]
    kind = ["--controller.kind", "my_controllers:Rollouts"]
    assert cli.main(["train", "tiny", *kind, *short, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] > 5
    assert cli.main(["train", "tiny", *kind, *short, "--env", "Pendulum-v1"]) == 2
    assert "Rollouts needs one factor of discrete actions" in capsys.readouterr().err
    sys.modules.pop("my_controllers")


def test_the_page_names_every_kind() -> None:
    from longdream.agent.core.actor import CONTROLLERS

    text = DOC.read_text(encoding="utf-8")
    assert all(f"`{kind}`" in text for kind in CONTROLLERS)
