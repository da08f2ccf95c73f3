"""The pages themselves: their links lead somewhere, and they name no setting that does not exist."""

import functools
import re
import shlex
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from longdream.agent.cli import functions
from longdream.agent.cli.main import COMMANDS
from longdream.agent.config import flags, options
from longdream.controller.config import ControllerConfig
from longdream.envs.contract import UserError
from longdream.worldmodel.config import DynamicsConfig, ForcingConfig
from longdream.worldmodel.dream import Dream
from longdream.worldmodel.dynamics import Dynamics
from longdream.worldmodel.objectives import Flow

ROOT = Path(__file__).resolve().parents[2]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
TODAY = [page for page in PAGES if page.parent.name != "history" and page.name != "CHANGELOG.md"]
"""Those that have no business with old names."""
MAX_README_WORDS = 1_200
SUFFIXES = (".py", ".yaml", ".zip")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def gone() -> set[str]:
    """Settings of earlier versions that have another name now, or none: the left columns of the table of names."""
    settings = text(ROOT / "docs" / "history" / "names.md").partition("\n## Settings\n")[2].partition("\n## Flags\n")[0]
    columns = re.findall(r"^\| (`[^|]*) \|", settings, re.MULTILINE)
    names = {name.removesuffix(".*") for column in columns for name in re.findall(r"`([a-z_0-9.]+\*?)", column)}
    return {name for name in names if "." in name or name in ("bfloat16", "exact", "recorded")} - set(options.fields())


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    titles = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_images_lead_somewhere(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", target):  # an address elsewhere
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            missing.append(target)
    assert not missing


RUN = {"README", "index", "library", "comparing", "dream", "controllers", "extending", "objectives"}
"""Pages whose blocks of Python tests run, every one of them."""


@pytest.mark.parametrize("page", TODAY, ids=name)
def test_every_block_of_python_is_run_or_says_why_not(page: Path) -> None:
    parts = text(page).split("```python\n")
    unmarked = [part.partition("\n")[0] for before, part in pairwise(parts) if "<!-- not run: " not in before[-200:]]
    assert page.stem in RUN or len(unmarked) <= (page.name == "environments.md")  # whose first one a test runs


def read(command: str, arguments: list[str]) -> None:
    """Read the words and flags of a command as the command line does, and go no further."""
    arguments = [argument for argument in arguments if argument not in ("--json", "--trust")]
    if command == "train":
        own = ("name", "resume", "seeds", "jobs", "gpus")
        _, given = flags.split(arguments, lambda flag: str if flag in own else options.hint(flag))
        options.from_flags({flag: value for flag, value in (given or {}).items() if flag not in own})
    elif command != "bench":
        module, _, function = COMMANDS[command].partition(":")
        home = "longdream.agent" if module.startswith("..") else "longdream.agent.cli"
        real = getattr(import_module(f"{home}.{module.strip('.')}"), function)
        functions.call(f"longdream {command}", functools.wraps(real)(lambda **given: given), arguments)


@pytest.mark.parametrize("page", TODAY, ids=name)
def test_every_command_that_is_shown_can_be_read(page: Path) -> None:
    for block in re.findall(r"^```(?:bash)?\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE):
        for line in re.findall(r"^longdream [a-z-].*", block.replace("\\\n", " "), re.MULTILINE):
            _, command, *arguments = shlex.split(line, comments=True)
            read(command, arguments)


@pytest.mark.parametrize("line", ["train tiny --sed 3", "plot a --axis wall", "export", "evaluate a --episodes few"])
def test_a_command_that_cannot_be_read_is_seen(line: str) -> None:
    command, *arguments = line.split()
    with pytest.raises(UserError):
        read(command, arguments)


def test_the_readme_is_short() -> None:
    assert len(text(ROOT / "README.md").split()) <= MAX_README_WORDS


@pytest.mark.parametrize("page", TODAY, ids=name)
def test_every_dotted_flag_is_a_setting(page: Path) -> None:
    flags = set(re.findall(r"--([a-z_]\w*(?:\.\w+)+)", text(page)))
    assert not {flag for flag in flags - options.BARE.keys() if options.entry(flag)[0] not in options.fields()}


@pytest.mark.parametrize("page", TODAY, ids=name)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    groups = {field.partition(".")[0] for field in options.fields() if "." in field} - {"env"}  # env is a variable too
    named = set(re.findall(r"`([a-z]+\.[a-z_.]*[a-z_])(?=[ :`=])", without_code(page)))
    named = {name for name in named if name.partition(".")[0] in groups and Path(name).suffix not in SUFFIXES}
    assert not {name for name in named if options.entry(name)[0] not in options.fields()}


def test_old_names_are_known() -> None:
    assert {"learn.clip", "forcing.stream", "controller.planner", "encoder.latent", "exact"} <= gone()


@pytest.mark.parametrize("page", TODAY, ids=name)
def test_no_old_name_is_left(page: Path) -> None:
    said = text(page)
    dotted = [old for old in gone() if "." in old and re.search(rf"(?<![\w.]){re.escape(old)}(?![\w-])", said)]
    plain = [old for old in gone() if "." not in old and re.search(rf"--{old}\b|[\"']{old}[\"']:", said)]
    assert not dotted + plain


def test_the_parts_of_the_extending_page_are_parts() -> None:
    blocks = re.findall(r"```python\n(.*?)```", text(ROOT / "docs" / "extending.md"), re.DOTALL)
    here: dict = {"__name__": "my_parts"}
    for block in blocks:
        exec(block, here)
    controller = here["Reinforce"](ControllerConfig(hidden=8), 6, (3,), 3)
    dream = Dream(*(torch.rand(shape) for shape in ((4, 6, 6), (4, 5, 3), (4, 5), (4, 5), (4, 5, 1, 2), (4,))))
    loss, metrics = controller.loss(dream)
    assert loss.isfinite() and metrics["return"].isfinite()
    assert controller.act(torch.rand(4, 6), greedy=False).shape == (4, 3)
    here["test_a_clip_equals_its_frames"]()
    mixer = here["Fading"]
    assert mixer.local
    forward = mixer.forward
    mixer.forward = lambda self, h, first, *more: forward(self, h, torch.zeros_like(first), *more)
    with pytest.raises(AssertionError, match="not close"):  # one that remembers the episode before fails it
        here["test_a_clip_equals_its_frames"]()
    z, level = torch.rand(2, 5, 1, 4), torch.rand(2, 5)
    assert torch.allclose(here["Absolute"].error(None, z, z + 1, z, level), torch.ones(2, 5))


def test_the_clip_of_the_objectives_page_is_generated() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", text(ROOT / "docs" / "objectives.md"), re.DOTALL)
    dynamics = Dynamics(DynamicsConfig(layers=1, width=8, num_heads=2, state_size=4), grid=1, channels=4, actions=2)
    here = {"dynamics": dynamics, "objective": Flow(ForcingConfig(), dynamics), "z": torch.rand(2, 6, 1, 4)}
    here |= {"prev_action": torch.rand(2, 6, 2), "first": torch.zeros(2, 6).bool(), "action": torch.rand(2, 3, 2)}
    exec(block, here)
    assert here["piece"].z.shape == (2, 1, 1, 4)
