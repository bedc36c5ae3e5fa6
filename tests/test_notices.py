"""What ranks log and print: all of it in files of their own, and warnings, never too many, in the controller."""

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
from talking import FLOOD

from modelpar.errors import ConfigError
from modelpar.run.notices import Limit, Notices, log_warning, say
from modelpar.run.workers import Workers

TALKING = Path(__file__).with_name("talking.py")


# --- what passes ----------------------------------------------------------------------------------------------------


def test_a_text_passes_once():
    limit = Limit()
    assert [limit.passes(text, now) for now, text in enumerate("aabab")] == [True, False, True, False, False]
    assert limit.passes("a", 1e6) is False


def test_ten_texts_pass_in_ten_seconds():
    limit = Limit()
    assert sum(limit.passes(f"text {i}", 0.0) for i in range(50)) == 10
    assert not limit.passes("another", 9.9)
    assert limit.passes("another", 10.0)


def test_what_was_held_back_is_said_less_and_less_often():
    limit, said = Limit(), []
    for now in range(200):
        limit.passes("again", float(now))
        if count := limit.held_back(float(now)):
            said.append((now, count))
    assert said == [(11, 11), (32, 21), (73, 41), (154, 81)]
    assert limit.held_back(float("inf")) == 45
    assert limit.held_back(float("inf")) == 0


def record(text, *arguments, level=logging.WARNING):
    return logging.LogRecord("mine", level, "", 0, text, arguments, None)


def test_a_rank_sends_warnings_and_how_many_more_there_were(capsys):
    sent = []
    notices = Notices(lambda level, text: sent.append((level, text)) or Finished(), "logs/rank1.log")
    for _ in range(3):
        notices.handle(record("text %d", 7))
    notices.handle(record("broken", level=logging.ERROR))
    notices.handle(record("x" * 5000))
    notices.handle(record("%d arguments"))
    notices.handle(record("%d arguments", "no number"))  # logging reports this on the rank's standard error
    assert "no number" in capsys.readouterr().err
    notices.count(0.0)
    texts = [(30, "text 7"), (40, "broken"), (30, "x" * 2000 + " …"), (30, "%d arguments")]
    assert sent == texts
    notices.finish()
    assert sent == [*texts, (30, "2 more warnings are not shown; they are in logs/rank1.log")]


class Finished:
    """A future of torch's that is done."""

    waited = 0

    def wait(self):
        raise RuntimeError("the controller is gone")


def test_what_sending_logs_is_not_sent():
    sent = []

    def send(level, text):
        sent.append(text)
        notices.handle(record("sending"))

    notices = Notices(send, None)
    notices.handle(record("first"))
    assert sent == ["first"]


def test_the_controller_says_which_rank(caplog):
    say(("notice", 3), (logging.WARNING, "100 % text"))
    assert caplog.messages == ["rank 3: 100 % text"]


def test_a_warning_is_a_line(caplog, tmp_path):
    log_warning(UserWarning("careful"), UserWarning, "model.py", 7)
    assert caplog.messages == ["UserWarning: careful (model.py:7)"]
    with open(tmp_path / "file", "w") as file:
        log_warning(UserWarning("careful"), UserWarning, "model.py", 7, file)
    assert (tmp_path / "file").read_text() == warnings.formatwarning(UserWarning("careful"), UserWarning, "model.py", 7)
    assert len(caplog.messages) == 1


def test_a_folder_for_logs_that_cannot_be_made_is_refused(tmp_path, shared_workers):
    shared_workers["rpc"].close()  # one group at a time
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"logs is '.*/file/logs'; the folder cannot be made: Not a directory"),
        Workers(1, logs=tmp_path / "file" / "logs"),
    ):
        pass


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talked(start_script, tmp_path_factory):
    """Returns the folder with the logs, what was printed, and what the controller said in each run."""
    folder = tmp_path_factory.mktemp("talking")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALKING_LOGS", str(folder))
        process = start_script(TALKING.read_text())
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    parts = re.split(r"^--- (.*)\n", err, flags=re.MULTILINE)
    return folder, out.splitlines(), dict(zip(parts[1::2], map(str.splitlines, parts[2::2]), strict=True))


WARNED = [
    r"rank 1: %d arguments are missing",
    r"rank 1: UserWarning: a layer warns \(.*script\d\.py:\d+\)",
    r"rank 1: a layer logs 7",
]


@pytest.mark.parametrize("run", ["without files", "talk"])
def test_warnings_of_a_rank_are_said_once_with_its_name(talked, run):
    *lines, more = talked[2][run]
    assert len(lines) == len(WARNED)
    assert all(re.fullmatch(expected, line) for expected, line in zip(WARNED, sorted(lines), strict=True)), lines
    where = f"; they are in {talked[0]}/talk/rank1.log" if run == "talk" else ""
    assert more == f"rank 1: 2 more warnings are not shown{where}"


def test_without_files_prints_go_where_they_went(talked):
    lines = talked[1]
    end = lines.index(json.dumps({"name": "without files", "error": None}))
    assert sorted(lines[:end]) == ["a layer prints", "native code prints"]
    assert sum("prints" in line for line in lines) == 2


def test_all_that_a_rank_says_is_in_its_file(talked):
    folder = talked[0] / "talk"
    assert sorted(path.name for path in folder.iterdir()) == ["rank0.log", "rank1.log"]
    text = (folder / "rank1.log").read_text()
    lines = text.splitlines()
    assert {"a layer prints", "native code prints"} <= set(lines)
    assert text.count("WARNING mine: a layer logs 7") == 3
    assert text.count("WARNING py.warnings: UserWarning: a layer warns") == 1
    assert "nobody asked for this" not in text
    assert any(line.endswith("DEBUG modelpar.run.worker: is told to load") for line in lines)
    assert any("INFO modelpar.run.worker: has stage 1, 1 … 2, on cpu" in line for line in lines)
    assert "a layer" not in (folder / "rank0.log").read_text()


def test_a_rank_that_says_too_much_does_not_flood_the_controller(talked):
    lines = talked[2]["flood"]
    texts = [int(line.split()[3]) for line in lines if line.startswith("rank 1: text ")]
    assert sorted(texts)[:10] == list(range(10))
    assert 10 <= len(texts) < 100  # ten in ten seconds
    rest = [line for line in lines if not line.startswith("rank 1: text ")]
    held = [int(re.fullmatch(r"rank 1: (\d+) more warnings are not shown; they are in .*", line)[1]) for line in rest]
    assert len(texts) + sum(held) == FLOOD
    assert (talked[0] / "flood" / "rank1.log").read_text().count("WARNING mine: text ") == FLOOD


def test_a_killed_rank_leaves_its_file_and_the_error_names_it(talked):
    log = talked[0] / "killed" / "rank1.log"
    assert log.read_text() == "last words\n"  # modelpar logs only warnings unless it was told otherwise
    [line] = [json.loads(line) for line in talked[1] if '"killed"' in line]
    assert line["error"].startswith("WorkerLost: the process of rank 1 was ended by SIGKILL; it last said that it ")
    assert line["error"].endswith(f"; its log is {log}")
    assert talked[2]["killed"] == []
