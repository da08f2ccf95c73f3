import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longdream.agent.run.checkpoint import DiskFull
from longdream.agent.run.logger import Logger, compact
from longdream.agent.run.metrics import RATES


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def quiet(folder) -> Logger:
    return Logger(folder, console=False, sinks=())


def test_a_line_is_exact_and_on_disk_at_once(tmp_path):
    third = np.float32(1 / 3)
    plain = {"loss": 0.1 + 0.2, "note": "λ", "none": None}
    with quiet(tmp_path) as logger:
        logger.write(7, {**plain, "small": third, "tensor": torch.tensor(2.5), "n": np.int64(2**60)}, phase="train")
        text = (tmp_path / "metrics.jsonl").read_text()  # the logger is still open
    assert text.endswith("\n") and text.count("\n") == 1
    line = json.loads(text)
    assert line == {**plain, "small": float(third), "tensor": 2.5, "n": 2**60, "step": 7, "phase": "train"}
    assert list(line) == sorted(line) and isinstance(line["n"], int)


def test_values_that_are_not_finite_become_null_and_are_counted(tmp_path, capsys):
    with Logger(tmp_path, sinks=()) as logger:
        logger.write(1, {"a": math.nan, "b": 1.0})
        logger.write(2, {"a": -math.inf, "b": np.float32("inf")})
        logger.write(3, {"a": 1.0})
    assert lines(tmp_path) == [
        {"a": None, "b": 1.0, "log/nonfinite": 1, "step": 1},
        {"a": None, "b": None, "log/nonfinite": 3, "step": 2},
        {"a": 1.0, "step": 3},
    ]
    assert "step 2: a is not finite (3 such values so far)" in capsys.readouterr().err


def test_a_resumed_record_equals_the_uninterrupted_one(tmp_path):
    def write(logger, begin, end):
        for step in range(begin, end):
            logger.write(step, {"loss": math.sin(step), "bad": math.nan if step % 3 == 0 else 0.0})

    with quiet(tmp_path / "whole") as logger:
        write(logger, 0, 10)
    with quiet(tmp_path / "run") as logger:
        write(logger, 0, 4)
        state = json.loads(json.dumps(logger.state()))
        write(logger, 4, 9)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"loss": 0.1')  # torn by a kill
    with quiet(tmp_path / "run") as logger:
        assert logger.restore(state) == []
        write(logger, 4, 10)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()

    with quiet(tmp_path / "run") as logger:  # killed before the first checkpoint: from the beginning
        assert logger.restore(None) == []
        write(logger, 0, 10)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_record_shorter_than_at_the_checkpoint_is_a_warning(tmp_path):
    with quiet(tmp_path) as logger:
        for step in range(5):
            logger.write(step, {"x": step})
        state = logger.state()
    os.truncate(tmp_path / "metrics.jsonl", state["bytes"] - 4)  # in the middle of the last line
    with quiet(tmp_path) as logger:
        (warning,) = logger.restore(state)
        assert "metrics.jsonl" in warning and "\n" not in warning
        logger.write(5, {"x": 5})
    assert [line["x"] for line in lines(tmp_path)] == [0, 1, 2, 3, 5]


def test_tensorboard_shows_the_record_and_a_resume_hides_what_was_given_up(tmp_path):
    def shown() -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert sorted(events.Tags()["scalars"]) == ["log/nonfinite", "loss"]
        return [(event.step, event.value) for event in events.Scalars("loss")]

    with Logger(tmp_path, console=False) as logger:
        logger.write(1, {"loss": 0.5, "text": "no number", "gone": math.nan})
        state = logger.state()
        logger.write(2, {"loss": 9.0})
        logger.write(3, {"loss": 9.0})
    assert shown() == [(1, 0.5), (2, 9.0), (3, 9.0)]
    with Logger(tmp_path, console=False) as logger:
        logger.restore(state)
        logger.write(2, {"loss": 0.25})
    assert shown() == [(1, 0.5), (2, 0.25)]


def test_disk_full_leaves_whole_lines(cramped):
    folder = cramped.folder / "run"
    with quiet(folder) as logger:
        logger.write(0, {"x": "." * 100})
        with cramped.room(20_000), pytest.raises(DiskFull, match="disk full") as error:
            for step in range(1, 10_000):
                logger.write(step, {"x": "." * 100})
        assert str(folder) in str(error.value)
        written = len(lines(folder))
        assert written > 50
        logger.write(99_999, {"x": 1})
    assert [line["step"] for line in lines(folder)] == [*range(written), 99_999]


def test_elsewhere_than_on_a_terminal_lines_are_plain_and_few(tmp_path, capsys):
    with Logger(tmp_path / "a", total=2000, show=("return",), every=60, sinks=()) as logger:
        for step in range(1000):
            logger.write(step, {"return": 0.5 + step, "loss": 1.0})
    assert capsys.readouterr().err == "step 0/2,000  return 0.5\n"
    with Logger(tmp_path / "b", total=2000, show=("return",), every=0, sinks=()) as logger:
        logger.write(500, {"return": 0.123456})
        logger.write(1000, {"loss": 1.0})
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 500/2,000  return 0.123"
    assert second.startswith("step 1,000/2,000  ") and "/s  0:00:00 left  return 0.123" in second
    with Logger(tmp_path / "c", console=False, sinks=()) as logger:
        logger.write(1, {"loss": math.nan})
    assert capsys.readouterr().err == ""


def test_rates_are_short_and_stand_in_the_order_asked_for(tmp_path, capsys):
    rates = {"time/gpu": 0.971, "time/dreamt_steps_per_s": 189_123.4, "time/rows_per_s": 101_234.5}
    rates |= {"time/updates_per_s": 12.345}
    with Logger(tmp_path, show=("return", *RATES), every=0, sinks=()) as logger:
        logger.write(1, rates)
        logger.write(1, {"return": 2})
        state = json.loads(json.dumps(logger.state()))
    texts = capsys.readouterr().err.splitlines()
    assert texts[0] == "step 1  12.3 updates/s  101k rows/s  189k dreamt/s  gpu 97%"
    assert texts[1] == "step 1  return 2  12.3 updates/s  101k rows/s  189k dreamt/s  gpu 97%"
    # after a resume they are unknown until they are measured again
    with Logger(tmp_path, show=("return", *RATES), every=0, sinks=()) as logger:
        logger.restore(state)
        logger.write(1, {"loss": 1.0, "time/rows_per_s": math.nan})
    assert "step 1  return 2  time/rows_per_s None" in capsys.readouterr().err


def test_large_numbers_are_written_out(tmp_path, capsys):
    values = {"a": 1000.0, "b": -12345.6, "c": 999.4, "d": 0.1234, "e": 7, "f": 3e17}
    with Logger(tmp_path, show=tuple(values), every=0) as logger:
        logger.write(1, values)
    assert "a 1,000  b -12,346  c 999  d 0.123  e 7  f 3e+17" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.1234, "0.123"), (999.4, "999"), (999.6, "1k"), (101_234.5, "101k"), (2.5e6, "2.5M"), (7e9, "7G")],
)
def test_numbers_are_of_three_digits(value, text):
    assert compact(value) == text


def test_on_a_terminal_one_line_is_kept_up_to_date(tmp_path):
    script = """
import sys, time
from longdream.agent.run.logger import Logger
with Logger(sys.argv[1], total=100, show=("return",), sinks=()) as logger:
    for step in range(0, 101, 20):
        logger.write(step, {"return": step / 7})
        time.sleep(0.02)
    logger.note("a [word] to say")
"""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 65536):
                seen += chunk
        except OSError:  # the other side has closed: the end
            pass
        os.close(ours)
    assert process.returncode == 0
    text = seen.decode()
    assert "step 100/100" in text and "return 14.3" in text and "a [word] to say" in text
    assert "\x1b[2K" in text  # the line is rewritten in place
    assert text.rstrip().endswith("\x1b[?25h")  # and the cursor is given back


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_is_not_whole_is_no_part_of_the_next(tmp_path: Path, cut: int) -> None:
    with Logger(tmp_path, console=False, sinks=()) as logger:
        for step in range(3):
            logger.write(step, {"loss": 0.5})
        state = logger.state()
    path = tmp_path / "metrics.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-cut] + b" " * cut + b"more")  # as long as it was, and longer
    with Logger(tmp_path, console=False, sinks=()) as logger:
        (warning,) = logger.restore(state)
        assert "the metrics between are lost" in warning
        logger.write(3, {"loss": 0.5})
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == ([0, 3] if cut == 40 else [0, 1, 3])
