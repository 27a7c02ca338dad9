"""lora chat: a conversation in a pipe and on a terminal, what the model gets to read of it, and what is refused."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands.conftest import Finished
from lora_cli.commands.chat import Conversation
from lora_cli.errors import DataError
from lora_cli.saved import Saved, open_saved
from lora_cli.spec import ChatRun
from lora_cli.tasks import Query
from lora_cli.terminal import Streamer

SHORT = ("task.decode.max_new_tokens=8", "device.threads=1")
DRAWN = ("task.decode.sample=true", "task.decode.temperature=4.0")
"""Nearly any token is as likely as any other: answers that are long, and not the same."""
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m.content + eos_token }}{% endfor %}"
)


@pytest.fixture
def said(call, monkeypatch: pytest.MonkeyPatch, talking: Finished) -> Callable[..., list[str]]:
    """The lines that a conversation in a pipe gives: said("hi\\nbye\\n", "seed=1")."""

    def run(text: str, *words: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        answer = call("chat", f"run={talking.path}", *SHORT, *words)
        assert answer.code == 0, answer.err
        return answer.out.splitlines()

    return run


@pytest.fixture
def saved(talking: Finished, call) -> Saved:
    return open_saved(spec_of(talking))


def spec_of(talking: Finished, **keys: int) -> ChatRun:
    """The config of a chat with the run, with some keys of its task changed."""
    from lora_cli.runs.directory import read_saved_config
    from lora_cli.spec import ChatSpec, DecodeSpec, ModelSpec

    config = read_saved_config(talking.path)
    task = {name: value for name, value in config["task"].items() if name not in ("data", "decode")} | keys
    decode = DecodeSpec(max_new_tokens=8)
    return ChatRun(run=str(talking.path), task=ChatSpec(**task, decode=decode), model=ModelSpec(**config["model"]))


def conversation(saved: Saved, system: str | None = None) -> tuple[Conversation, list[str]]:
    warnings: list[str] = []
    return Conversation(saved, system, warn=warnings.append), warnings


def test_a_conversation_in_a_pipe_is_one_answer_a_line_and_nothing_else(talking: Finished, forked) -> None:
    answer = forked("chat", "run=latest", *SHORT, "task.decode.sample=true", cwd=talking.home, stdin="hi\n\nbye\n")
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    assert len(answer.stdout.split("\n")) >= 3
    assert "you>" not in answer.stdout


def test_drawn_answers_depend_on_the_seed_alone(said) -> None:
    first = said("hi\nbye\n", *DRAWN, "seed=5")
    assert said("hi\nbye\n", *DRAWN, "seed=5") == first
    assert said("hi\nbye\n", *DRAWN, "seed=6") != first


def test_reset_starts_anew_and_exit_ends(said) -> None:
    lines = said("hi\n/reset\nhi\n/exit\nbye\n")
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :] != []
    assert said(" \n") == []


def test_beams_answer_at_once(said) -> None:
    assert said("hi\n", "task.decode.num_beams=2")


def test_a_command_that_does_not_exist_is_told(call, monkeypatch, talking: Finished) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/rset\n")))
    answer = call("chat", f"run={talking.path}", *SHORT)
    assert (answer.code, answer.out) == (0, "")
    assert "no command /rset. Did you mean /reset?" in answer.err


def test_the_model_reads_all_that_was_said_in_the_runs_template(saved: Saved) -> None:
    talk, warnings = conversation(saved, "Be brief.")
    talk.ask("hi")
    talk.answered("hello")
    query = talk.ask("bye")
    turns = [("system", "Be brief."), ("user", "hi"), ("assistant", "hello"), ("user", "bye")]
    places = [query.text.index(f"<|im_start|>{role}\n{text}") for role, text in turns]
    assert places == sorted(places)
    assert query.text.endswith("<|im_start|>assistant\n")
    assert warnings == []
    talk.reset()
    assert "hello" not in talk.ask("hi").text


def test_the_oldest_turns_are_forgotten_whole_and_what_the_assistant_was_told_stays(talking: Finished, call) -> None:
    talk, warnings = conversation(open_saved(spec_of(talking, max_length=160)), "Be brief.")
    for number in range(6):
        query = talk.ask(f"question {number}")
        talk.answered("yes")
    assert query.num_tokens <= 160
    assert query.text.startswith("<|im_start|>system\nBe brief.")
    assert "question 0" not in query.text
    assert query.text.count("<|im_start|>user") == query.text.count("yes") + 1
    assert warnings == ["the model reads 160 tokens; what was said before them is forgotten"]


def test_a_text_longer_than_the_model_reads_loses_its_beginning(talking: Finished, call) -> None:
    talk, warnings = conversation(open_saved(spec_of(talking, max_length=64)))
    query = talk.ask("x" * 500 + "end")
    assert query.num_tokens == 64
    assert len(warnings) == 1


def test_a_template_that_refuses_the_system_says_so_before_anybody_asks(saved: Saved, monkeypatch) -> None:
    import dataclasses

    from lora_cli.tasks import build_task

    monkeypatch.setattr(saved.tokenizer, "chat_template", REFUSES_SYSTEM, raising=False)
    task = build_task(dataclasses.replace(saved.task.spec, template="tokenizer"))
    own = dataclasses.replace(saved, task=task)
    conversation(own)
    with pytest.raises(DataError, match="no system here"):
        conversation(own, "Be brief.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run=latest"], "no finished run"),
        ([], "run=FOLDER, or run=latest"),
        (["run=copy", "sytem=a"], "Did you mean system?"),
        (["run=copy", "hydra.run.dir=a"], "makes no folder"),
        (["run=copy", "task=sst2"], "run=copy: its task sst2 (classification) is no conversation; see lora infer"),
        (["run=copy", "task.template=tokenizer"], "this model's tokenizer has none: chatml or plain"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_chat_is_refused(words: list[str], says: str, talking: Finished, scratch: Path, refused) -> None:
    (scratch / "copy").symlink_to(talking.path)
    assert says in refused("chat", *words)


class Terminal:
    """`lora chat` on a pseudo-terminal."""

    def __init__(self, *words: str, cwd: Path) -> None:
        import pty

        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "lora_cli", "chat", *words]
        env = {**os.environ, "TERM": "dumb", "COLUMNS": "120"}
        self.process = subprocess.Popen(command, cwd=cwd, env=env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, end: str, *, interrupting: bool = False) -> str:
        """What appears up to and with `end`, with Ctrl-C until it does.

        Once is not enough: Python's input() overlooks a signal that comes just before it waits for a key.
        """
        found, deadline = b"", time.monotonic() + 120
        while not found.decode(errors="replace").endswith(end):
            ready, _, _ = select.select([self._master], [], [], 0 if interrupting else 1)
            if interrupting and not ready:
                self.process.send_signal(signal.SIGINT)
                ready, _, _ = select.select([self._master], [], [], 2)
            assert time.monotonic() < deadline, found
            found += os.read(self._master, 1) if ready else b""
        return found.decode(errors="replace").replace("\r", "")

    def exit(self) -> int:
        """The exit code of a conversation that is left.

        Ctrl-U first: a signal that is sent leaves in the terminal's own buffer what its Ctrl-C would have thrown away.
        Typed until it ends: a late signal takes the line it meets with it.
        """
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            self.type("\x15/exit\n")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=5)
        raise AssertionError("it goes on")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(talking: Finished) -> Iterator[Terminal]:
    long = ["task.decode.max_new_tokens=440", "device.threads=1", *DRAWN]
    found = Terminal("run=latest", *long, cwd=talking.home)
    yield found
    found.close()


def test_ctrl_c_stops_the_answer_and_then_the_line_but_not_the_conversation(terminal: Terminal) -> None:
    header = terminal.read_until("you> ")
    assert "/exit or Ctrl-D ends" in header
    terminal.type("hi\n")
    terminal.read_until("hi\r\n")
    terminal.read_until("e")
    terminal.process.send_signal(signal.SIGINT)
    answer = terminal.read_until("\r\n\r\nyou> ")
    assert len(answer) < 300
    terminal.type("unfinished")
    terminal.read_until("you> ", interrupting=True)
    assert terminal.exit() == 0


def test_in_a_pipe_ctrl_c_ends_it(call, monkeypatch: pytest.MonkeyPatch, talking: Finished) -> None:
    from lora_cli.commands import chat

    def interrupted(saved: Saved, query: Query, *, streamer: Streamer, seed: int) -> None:
        streamer.write("I was")
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "write_answer", interrupted)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\nbye\n")))
    answer = call("chat", f"run={talking.path}")
    assert (answer.code, answer.out, answer.err) == (130, "I was\n", "lora chat: interrupted\n")


def test_a_reader_that_goes_away_ends_it_quietly(talking: Finished) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lora_cli", "chat", "run=latest", *SHORT, *DRAWN]
    try:
        answer = subprocess.run(
            command, cwd=talking.home, input=b"hi\n" * 3, stdout=write, stderr=subprocess.PIPE, timeout=120, check=False
        )
    finally:
        os.close(write)
    assert (answer.returncode, answer.stderr) == (0, b"")
