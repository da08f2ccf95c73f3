"""`make pictures` knows every picture of the pages, and makes them."""

import importlib.util
import re
from pathlib import Path

import imageio.v3 as iio
import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
assert SPEC is not None and SPEC.loader is not None
pictures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pictures)
MOST_BYTES = 200_000


def test_every_picture_of_the_pages_has_a_recipe() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"images/([\w.-]+\.png)", page.read_text(encoding="utf-8"))}
    made = {name for _, names in pictures.RECIPES.values() for name in names}
    assert shown <= made and {"play.png", "watch.png", "dream.png"} <= shown
    assert all((ROOT / "docs" / "images" / name).is_file() for name in made)


@pytest.mark.parametrize("name", ["play.png", "play-phone.png", "play-maze.png", "watch.png", "memory-maze-path.png"])
def test_pictures_are_small(name: str) -> None:
    assert (ROOT / "docs" / "images" / name).stat().st_size < MOST_BYTES


def test_a_picture_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    monkeypatch.setattr(pictures, "WORK", tmp_path / "work")
    assert pictures.main(["path"]) == 0
    made = iio.imread(tmp_path / "memory-maze-path.png")
    assert (made == iio.imread(ROOT / "docs" / "images" / "memory-maze-path.png")).mean() > 0.99
    assert pictures.main(["nothing"]) == 2 and "there are play, watch" in capsys.readouterr().err


def test_what_a_machine_cannot_make_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pictures, "WORK", tmp_path)
    monkeypatch.setattr(pictures, "CHROMIUM", None)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "summary.json").write_text("{}")
    assert pictures.main(["play"]) == 0
    assert "play.png, play-phone.png: not made: " in capsys.readouterr().err
