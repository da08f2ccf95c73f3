"""Error messages and clean-up when an environment in another interpreter does not start, dies, hangs or raises."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from longdream.envs.contract import EnvError, UserError
from longdream.envs.remote import RemoteEnv

RESTARTS = 20  # each costs the start of two interpreters, one of them with numpy
pytestmark = pytest.mark.usefixtures("far_folder")


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_gone(processes: list[int], within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while any(alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(alive(process) for process in processes)


@pytest.mark.parametrize(
    ("python", "env", "message"),
    [
        ("/no/such/python", "old_world:Old", "there is no interpreter '/no/such/python'"),
        (
            "/bin/false",
            "old_world:Old",
            r"/bin/false cannot serve old_world:Old: it ended at its start \(exit code 1\)",
        ),
        (sys.executable, "nowhere:Old", "ModuleNotFoundError: No module named 'nowhere'"),
        (sys.executable, "broken", "no environment broken is registered there"),
        (sys.executable, "broken:Old", r"IndexError: list index out of range; it said: .*cogs\[3\]"),
        (sys.executable, "leaves:Old", r"died in make \(exit code 3\).*it said: .*not today"),
        (sys.executable, "CartPol-v1", "did you mean CartPole-v1"),
        (sys.executable, "old_world:Young", "old_world has no callable Young and no environment Young is registered"),
    ],
)
def test_a_failed_start_is_explained(tmp_path, python, env, message):
    (tmp_path / "broken.py").write_text("import engine\n")
    (tmp_path / "engine.py").write_text("cogs = []\ncogs[3]\n")
    (tmp_path / "leaves.py").write_text("import os\nprint('not today')\nos._exit(3)\n")
    before = descriptors()
    with pytest.raises(UserError, match=message) as error:
        RemoteEnv(python, env)
    assert "\n" not in str(error.value) and descriptors() == before
    if env == "broken:Old":
        assert {"    import engine", "    cogs[3]"} < set(error.value.__notes__)


@pytest.mark.parametrize("kwargs", [{"timeout_s": 0.0}, {"reset_timeout_s": -1.0}, {"restarts": -1}], ids=str)
def test_arguments_out_of_range_are_refused(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs))):
        RemoteEnv(sys.executable, "old_world:Old", **kwargs)


def test_wrong_arguments_of_the_environment_are_reported():
    with pytest.raises(UserError, match="unexpected keyword argument 'wheels'"):
        RemoteEnv(sys.executable, "old_world:Old", kwargs={"wheels": 3})


def test_a_start_that_takes_too_long(tmp_path):
    (tmp_path / "asleep.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(UserError, match=r"gave no answer to make within 4 s") as error:
        RemoteEnv(sys.executable, "asleep:Old", reset_timeout_s=4.0)
    assert 'asleep.py", line 2' in "\n".join(error.value.__notes__)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (3, r"died in step \(exit code 7\)"),
        (4, r"died in step \(ended by SIGSEGV\)"),
        (5, "raised in step: ValueError: no such wheel"),
        (6, "gave no answer to step within 2 s"),
    ],
)
def test_a_fault_truncates_the_episode_and_reset_starts_a_process(remote, action, message):
    env = remote(timeout_s=2.0, restarts=1, kwargs={"print_lines": 9})
    env.reset(seed=0)
    obs, *_, info = env.step(0)
    with pytest.warns(UserWarning, match=message):
        row = env.step(action)
    np.testing.assert_array_equal(row[0], obs)
    assert row[0] is not obs and row[1:4] == (0.0, False, True)
    assert row[4]["remote_faults"] == env.faults == 1 and row[4]["remote_fault"].startswith(message[:8])
    assert all_gone([info["pid"], info["supervisor"]])
    with pytest.raises(RuntimeError, match="reset comes first"):
        env.step(0)
    again, info = env.reset()
    assert env.observation_space.contains(again) and "remote_faults" not in info
    env.step(1)  # an episode played to its end resets the count of consecutive faults
    env.reset()
    with pytest.warns(UserWarning, match="fault 2"):
        env.step(action)
    env.reset()
    with pytest.raises(EnvError, match="fault 2 without an episode played to its end, and restarts=1") as error:
        env.step(action)
    assert env.faults == 3
    output = error.value.trace
    assert {3: "the wheel came off", 4: "Segmentation fault", 5: "no such wheel", 6: "stuck_here"}[action] in output


def test_a_fault_in_render_ends_the_episode_at_the_next_step(remote):
    env = remote(render_mode="rgb_array")
    first, _ = env.reset(seed=0)
    os.kill(int(Path(f"/proc/{env._server.process.pid}/task/{env._server.process.pid}/children").read_text()), 9)
    with pytest.warns(UserWarning, match=r"died in render \(ended by SIGKILL\)"):
        assert env.render() is None
    obs, *rest, info = env.step(0)
    np.testing.assert_array_equal(obs, first)
    assert rest == [0.0, False, True] and info["remote_faults"] == 1
    with pytest.raises(RuntimeError, match="reset comes first"):
        env.step(0)


def test_what_follows_a_fault_is_reproducible(remote):
    seen = []
    for _ in range(2):
        env = remote()
        env.reset(seed=8)
        with pytest.warns(UserWarning, match="fault 1"):
            env.step(3)
        seen.append([env.reset()[0], env.step(0)[0], env.reset()[0]])
    np.testing.assert_array_equal(*seen)


def test_a_fault_in_reset_is_tried_again(remote):
    env = remote(kwargs={"marks": "dies-once"})
    with pytest.warns(UserWarning, match=r"died in reset \(exit code 9\)"):
        obs, info = env.reset(seed=3)
    assert env.observation_space.contains(obs) and info["remote_faults"] == 1
    with pytest.raises(EnvError, match="died in reset"):
        remote(kwargs={"marks": "dies-at-once"}, restarts=0).reset()


def test_close_ends_every_process(remote, tmp_path, monkeypatch):
    env = remote()
    env.reset()
    processes = [env.step(0)[4][key] for key in ("pid", "supervisor")]
    assert os.getsid(processes[0]) != os.getsid(0)  # so that Ctrl-C reaches only this process
    env.close()
    env.close()
    assert (tmp_path / "closed").exists() and all_gone(processes, 0.0)
    monkeypatch.setattr("longdream.envs.remote.CLOSE_S", 1.0)
    env = remote(kwargs={"stubborn": True})
    env.reset()
    processes = [env.step(0)[4][key] for key in ("pid", "supervisor")]
    env.close()
    assert all_gone(processes, 0.0)


OURS = """
import sys
import gymnasium as gym
env = gym.make("longdream:longdream/Remote-v0", python=sys.executable, env="old_world:Old").unwrapped
env.reset()
env.step(7)
"""


def test_no_process_survives_when_this_one_is_killed(tmp_path):
    ours = subprocess.Popen([sys.executable, "-c", OURS])
    try:
        while len(words := (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []) < 3:
            assert ours.poll() is None
            time.sleep(0.05)
        processes = [int(word) for word in words]
        assert all(alive(process) for process in processes)
    finally:
        ours.send_signal(signal.SIGKILL)
        ours.wait()
    assert all_gone(processes)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_many_restarts_leave_nothing_behind(remote):
    def held() -> list[int]:
        """Descriptors, mapped memory, child processes, and folders of this process."""
        maps = Path("/proc/self/maps").read_text().count("longdream-")
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        folders = [
            *Path("/dev/shm").glob(f"longdream-{os.getpid()}-*"),
            *Path("/tmp").glob(f"longdream-{os.getpid()}-*"),
        ]
        return [descriptors(), maps, len(children), len(folders)]

    env = remote(restarts=1000)
    env.reset()
    env.step(0)
    before = held()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(RESTARTS):
            env.step(3)
            env.reset()
    env.step(0)
    assert env.faults == RESTARTS and held() == before
