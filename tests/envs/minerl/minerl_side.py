"""Builds a virtual environment with the Python part of MineRL 0.4.4, without Minecraft.

    python tests/envs/minerl/minerl_side.py PYTHON FOLDER

The source distribution is unpacked, not installed, because its setup builds the game with Java. FOLDER then holds the
virtual environment, the package `minerl`, and `minerl_fake.py`, which makes MineRL's fake environment for any of its
tasks. Spaces, actions and observations therefore come from MineRL's own code.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSIONS = ("3.8", "3.9", "3.10")
SOURCE = "minerl==0.4.4"
TOOLS = ("setuptools<66", "wheel<0.40")  # gym 0.19 does not build with later ones
NEEDS = (
    *("gym==0.19.0", "numpy<1.24", "opencv-python-headless<4.8", "Pyro4", "coloredlogs", "daemoniker", "dill"),
    *("inflection", "jinja2", "lxml", "psutil", "requests", "tqdm", "xmltodict==0.12.0"),
)

FAKE = '''
"""MineRL's fake environment for any task: what a game of Navigate once sent, or what the spaces draw at random."""
import copy
import gym
from minerl.env._fake import _FakeSingleAgentEnv
from minerl.herobraine import envs
from minerl.herobraine.env_specs.basalt_specs import _basalt_gym_entrypoint

SPECS = {spec.name: spec for spec in envs.ENV_SPECS}


def _sent(self):  # theirs insists on Navigate; other tasks find what they look for in it, or take their defaults
    data = copy.deepcopy(self._fake_malmo_data)
    data["inventory"].append(dict(data["inventory"][0], type="snowball", quantity=1))  # BASALT's begin with one
    return data


_FakeSingleAgentEnv._get_fake_malmo_data = _sent


class Strict(gym.Wrapper):
    """Refuses actions that the task's own action space does not hold, and rewards attacking."""

    drawn = False

    def reset(self):
        obs = self.env.reset()
        return self.env.observation_space.sample() if self.drawn else obs

    def step(self, action):
        space = self.env.action_space
        if not space.contains(action):
            wrong = {key: value for key, value in action.items() if key not in space.spaces or value not in space[key]}
            raise ValueError("not in the action space: %r" % (wrong or sorted(set(space.spaces) ^ set(action))))
        obs, reward, done, info = self.env.step(action)
        obs = self.env.observation_space.sample() if self.drawn else obs
        told = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in action.items()}
        return obs, reward + float(action["attack"]), done, dict(info, action=told)


def make(task, drawn=False, steps=20):
    spec = SPECS["MineRL%s-v0" % task]
    basalt = task.startswith("Basalt")  # whose specs forget to hand on that it shall be fake
    strict = Strict(_basalt_gym_entrypoint(spec, fake=True) if basalt else spec.make(fake=True))
    strict.drawn = drawn
    return gym.wrappers.TimeLimit(strict, steps)
'''


def recipe(version: str) -> str:
    """A folder name that changes with everything that is built."""
    parts = repr((version, SOURCE, TOOLS, NEEDS, FAKE))
    return f"minerl-side-{version}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"


def build(python: str, folder: Path) -> Path:
    """Build it in a new folder with an interpreter of 3.8 to 3.10. Returns the virtual environment's interpreter."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = Path(work) / "side"
        run(python, "-m", "venv", str(made))
        side = str(made / "bin" / "python")
        run(side, "-m", "pip", "install", "-q", *TOOLS)
        run(side, "-m", "pip", "install", "-q", "--no-build-isolation", *NEEDS)
        whole = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation")
        run(side, "-m", "pip", "download", "-q", *whole, "-d", work, SOURCE)
        (archive,) = Path(work).glob("minerl-*.tar.gz")
        inside = f"{archive.name.removesuffix('.tar.gz')}/minerl/"
        with tarfile.open(archive) as packed:
            for member in packed.getmembers():
                name = member.name.removeprefix(inside)
                if member.name.startswith(inside) and name.split("/")[0] != "Malmo":
                    member.name = f"minerl/{name}"
                    packed.extract(member, made, filter="data")
        (made / "minerl_fake.py").write_text(FAKE)
        shutil.move(made, folder)  # atomic: the folder is complete or does not exist
    return interpreter(folder)


def interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(
            "usage: python tests/envs/minerl/minerl_side.py PYTHON FOLDER   (PYTHON: an interpreter of 3.8 to 3.10)"
        )
    print(build(sys.argv[1], Path(sys.argv[2])))
