"""The command line: verb → config → command → exit code. The only place that prints an error.

Imports nothing heavy: help, completion and every configuration error answer without torch.
"""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli import __version__
from lora_cli.errors import ConfigError, LoraError, UserError, nearest, printable
from lora_cli.process import Terminated, outlive_readers, say_anything, signals_and_warnings
from lora_cli.spec import BASE_KEYS, VERBS, ResumeRun, SweepSpec, nested_specs
from lora_cli.words import is_sweep, sweep_folder, value_of

__all__ = ["main"]

_OUT_OF_MEMORY = "out of memory; a smaller train.batch_size or task.max_length needs less"
_RUN_VERBS = ("eval", "infer", "chat", "merge")
"""Verbs that take task and model from a saved run."""
_ANSWERING_VERBS = ("infer", "chat")
"""Verbs that have nothing left to do when nobody reads what they say."""
_SAVING_S = 5.0
"""How long jobs that were interrupted are waited for."""
_SWEEPS_OWN = ("hydra/launcher=", "hydra.launcher.", "hydra/sweeper=", "hydra.sweeper.")
"""Beginnings of words that mean nothing without -m."""
_WRITING_VERBS = ("train", "rerun", "compare", "bench", "eval")
"""Verbs whose files go to a folder that hydra.run.dir may choose."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lora` with these words (sys.argv's if None) and return its exit code.

    0 done · 1 our fault or the machine's · 2 the user's to mend · 130 interrupted · 143 terminated.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words and not words[0].startswith("-") else ""
    say_anything()
    # A training goes on when nobody reads its lines any more.
    outlive_readers("stderr", *(["stdout"] if verb not in _ANSWERING_VERBS else []))
    with signals_and_warnings(f"lora {verb}" if verb in VERBS else "lora"):
        return _answer(verb, words)


def _answer(verb: str, words: list[str]) -> int:
    try:
        return _dispatch(verb, words)
    except LoraError as error:
        _debug()
        return _complain(verb, str(error), 2 if isinstance(error, UserError) else 1)
    except Terminated as error:
        return _complain(verb, f"terminated; {error}".removesuffix("; "), 128 + signal.SIGTERM)
    except KeyboardInterrupt as error:
        return _complain(verb, f"interrupted; {error}".removesuffix("; "), 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is wrong, and Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        _debug()
        return _complain(verb, _OUT_OF_MEMORY, 1)
    except OSError as error:
        _debug()
        where = f"{error.filename}: " if error.filename else ""
        return _complain(verb, f"{where}{error.strerror or error}", 1)
    except Exception as error:
        _debug()
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            return _complain(verb, _OUT_OF_MEMORY, 1)
        text = f"internal error: {type(error).__name__}: {error} (LORA_DEBUG=1 shows the traceback)"
        return _complain(verb, text, 1)


def _dispatch(verb: str, words: list[str]) -> int:
    if words[:1] == ["-sc"] or words[:1] == ["--shell-completion"]:
        return _complete(words)
    if words[:1] in (["--version"], ["-V"]):
        print(f"lora {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        from lora_cli.help import print_overview

        print_overview()
        return 0
    if verb not in VERBS:
        near = nearest(words[0].lower(), list(VERBS)) or "lora --help"
        raise UserError(f"{words[0]}: no such verb. Did you mean {near}? There are: {', '.join(VERBS)}")
    if {"-h", "--help"} & set(words[1:]):
        from lora_cli.help import print_verb

        print_verb(verb, words[1:])
        return 0
    return _run(verb, words[1:])


def _run(verb: str, words: list[str]) -> int:
    from lora_cli import config

    if verb in ("runs", "doctor", "plan"):
        words = ["json=true" if word == "--json" else word for word in words]
    _check_folder(verb, words)
    if verb == "resume":
        _check_changes(words)
    if verb == "eval" and "," in (value_of("lora.r", words) or ""):
        # Several ranks are one question about one run, so they need no -m.
        words = ["-m", *words]
    _check_sweeping(words)
    if verb == "train" and is_sweep(words):
        _check_alone("a sweep; device.nproc=N gives each of its jobs N processes")
        return _sweep(words)
    if verb != "train":
        _check_alone(f"lora {verb}")
    failed: list[tuple[config.Job, LoraError]] = []
    outputs: set[str | None] = set()

    def run_job(job: config.Job) -> float | None:
        try:
            spec = job.spec()
            output = getattr(spec, "output", None)
            if output is not None and output in outputs:
                raise ConfigError("output", output, "an earlier job of this sweep has written there")
            outputs.add(output)
            command = importlib.import_module(f"lora_cli.commands.{verb}")
            result: float | None = command.run(spec, directory=job.directory, overrides=job.overrides)
            return result
        except LoraError as error:
            if job.sweep_number is None:
                raise
            # One job's failure costs the sweep that one job; it is told when it happens and again at the end.
            _debug()
            failed.append((job, error))
            _complain(verb, f"job {job.sweep_number} ({' '.join(job.overrides)}): {error}", 1)
            return None

    config.launch(verb, words, run_job, saved=_saved_groups(verb, words))
    if failed:
        print(f"lora {verb}: {len(failed)} jobs of the sweep failed", file=sys.stderr)
        for job, error in failed:
            print(f"  {job.sweep_number}  {' '.join(job.overrides)}  {error}", file=sys.stderr)
    return 1 if failed else 0


def _sweep(words: list[str]) -> int:
    """Many trainings: what becomes of each is noted in the sweep's folder, whichever launcher runs it."""
    from lora_cli import config
    from lora_cli.launchers import run_here
    from lora_cli.runs.sweep import check_folder, end_dead, leave, states
    from lora_cli.screen import Screen
    from lora_cli.sweep_view import conclude

    typed = shlex.join(["lora", "train", *words])
    folder, words = sweep_folder("train", words)
    assert folder is not None
    redo = SweepSpec(redo=value_of("sweep.redo", words) or "missing").redo
    check_folder(folder, anew=redo == "all", searching=value_of("hydra/sweeper", words) == "optuna")
    before = states(folder)
    if not any(word.startswith("hydra/launcher=") for word in words):
        words = ["hydra/launcher=isolated", *words]
    try:
        config.launch("train", words, run_here)
    except KeyboardInterrupt as error:
        # Other launchers leave their processes to themselves, which save and end, or go on on another machine.
        end_dead(folder, patience_s=_SAVING_S)
        conclude(folder, typed, Screen())
        raise type(error)("the same command does the rest") from error
    end_dead(folder)
    leave(folder, before)
    return 0 if conclude(folder, typed, Screen()) else 1


def _check_folder(verb: str, words: Sequence[str]) -> None:
    """Refuse a folder for a run where none is made."""
    if folder := value_of("hydra.run.dir", words):
        if verb not in _WRITING_VERBS:
            raise ConfigError("hydra.run.dir", folder, f"lora {verb} makes no folder of a run; leave it out")
        if is_sweep(words):
            raise ConfigError("hydra.run.dir", folder, "is for one run; -m makes a folder of runs: hydra.sweep.dir=DIR")


def _check_sweeping(words: Sequence[str]) -> None:
    """Refuse words about the jobs of a sweep where there is none: Hydra would not say that it ignores them."""
    # Hydra shows a configuration of no sweep.
    if is_sweep(words) or any(word.startswith(("hydra.mode=", "--cfg", "--info")) or word == "-c" for word in words):
        return
    for word in words:
        if word.startswith(_SWEEPS_OWN):
            key, _, value = word.partition("=")
            raise ConfigError(key, value, "is for a sweep; add -m")


def _check_alone(what: str) -> None:
    """Refuse several processes of torchrun's for what is one process's work."""
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"WORLD_SIZE={size}: torchrun is for lora train, not for {what}")


def _check_changes(words: Sequence[str]) -> None:
    """Refuse to change of a run that goes on what would make another one of it."""
    allowed = [
        f"{name}.{key}" for name, specs in nested_specs(ResumeRun) for spec in specs for key, _ in nested_specs(spec)
    ]
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if not word.startswith("-") and key not in ("run", "tracker", *allowed) and not key.startswith("hydra."):
            raise ConfigError(printable(key), value, f"is the run's own; what may change is {', '.join(allowed)}")


def _saved_groups(verb: str, words: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """What the run named by run= contributes to the config of eval and infer."""
    from lora_cli.config import SAVED_GROUPS
    from lora_cli.runs.directory import read_saved_config
    from lora_cli.runs.registry import find_run

    named, folder = value_of("run", words), value_of("model.path", words)
    wanted: Sequence[str] = SAVED_GROUPS if verb in _RUN_VERBS else ()
    if verb == "export":
        wanted = BASE_KEYS.get(value_of("target", words) or "", ())
    if not wanted or not named:
        return {}
    if "," in named and {"-m", "--multirun"} & set(words) and not Path(named).exists():
        raise UserError(f"run={named}: one run at a time; -m sweeps over the other keys")
    saved = read_saved_config(find_run(named))
    if folder and not saved:
        saved = {"model": {"name": Path(folder).name}}  # a bare adapter's base model, by its folder
    return {group: saved[group] for group in SAVED_GROUPS if group in wanted and group in saved}


def _complete(words: list[str]) -> int:
    """TAB: verbs and run= from here, everything else from Hydra."""
    from lora_cli import config

    if not words[1:] or not words[1].startswith("query="):
        config.complete("train", words)
        return 0
    line = os.environ.get("COMP_LINE", "")
    *before, current = line.split(" ")
    if len(before) < 2:
        print("\n".join(verb for verb in VERBS if verb.startswith(current)))
        return 0
    verb = before[1]
    if verb not in VERBS:
        return 0
    if current.startswith("run=") and "run" in dict(nested_specs(VERBS[verb])):
        names = ["latest", *sorted(path.parent.name for path in Path("runs").glob("*/run.json"))]
        print("\n".join(f"run={name}" for name in dict.fromkeys(names) if f"run={name}".startswith(current)))
        return 0
    shortened = " ".join([before[0], *before[2:], current])
    point = int(os.environ.get("COMP_POINT", len(line)))
    os.environ["COMP_LINE"] = shortened
    os.environ["COMP_POINT"] = str(max(0, point - len(line) + len(shortened)))
    try:
        saved = _saved_groups(verb, before)
    except UserError:
        saved = {}
    config.complete(verb, words, saved)
    return 0


def _complain(verb: str, text: str, code: int) -> int:
    line = printable(text, 600 if text.startswith("internal") else 400)
    print(f"lora {verb}: {line}" if verb in VERBS else f"lora: {line}", file=sys.stderr)
    return code


def _debug() -> None:
    if os.environ.get("LORA_DEBUG") == "1":
        import traceback

        traceback.print_exc()
