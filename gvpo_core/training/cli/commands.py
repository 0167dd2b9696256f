"""The command line: gvpo init, train, train-reward, collect, eval, export, report, doctor."""

import logging
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from gvpo_core import __version__
from gvpo_core.training.cli.parser import Parser
from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.config.secrets import Hiding, hide, hide_command, secrets_of, traceback_of
from gvpo_core.training.config.suggestions import nearest
from gvpo_core.training.run.signals import without_hang_up
from gvpo_core.training.terminal.output import line_width, say, standard_streams
from gvpo_core.training.terminal.text import printable, wrapped

if TYPE_CHECKING:
    from gvpo_core.training.inputs import Inputs

_USAGE = """usage: gvpo COMMAND ...

  gvpo init [FOLDER]         write a config, a reward and rows that run at once
  gvpo train CONFIG          train, or resume the run in run.folder
      --dry-run              sample and score two prompts, estimate memory
      --from-step N          go back to the checkpoint of step N first
      --section.key value    any setting: gvpo train --help explains them
  gvpo train-reward DATA FOLDER --model NAME
                             train a reward model on preferences (Eq. 4)
  gvpo collect CONFIG OUT.jsonl
                             sample and score without training, for gvpo train
  gvpo eval RUN              rewards of a run's policy on held-out prompts
  gvpo export RUN FOLDER     write a run's policy as a Hugging Face folder
  gvpo report RUN            write RUN/report.html
  gvpo report A B [C ...]    compare runs on one page, comparison.html
  gvpo doctor                list what is installed and which devices exist

gvpo COMMAND --help lists the options of a command. Relative paths are from the
working directory.
"""

_COLLECT = """usage: gvpo collect CONFIG OUT.jsonl [--section.key value ...]

Samples and scores the groups of run.steps steps with the initial model,
without training.

  CONFIG      TOML file, as for gvpo train; options override it, and
              gvpo train --help explains them
  OUT.jsonl   file to write. It is OUT.jsonl.partial until its last step; the
              same command resumes it

Train on the file later: gvpo train CONFIG --data.train OUT.jsonl
"""

_HELP = ("-h", "--help", "help")


_QUIT = {
    "train": "quit without saving; the last checkpoint is kept",
    "collect": "quit; the complete steps are kept, and the same command continues",
    "train-reward": "quit; no reward model was written",
}
"""Message after Ctrl-C, by command."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    with standard_streams(), without_hang_up():
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    commands = {
        "init": _init,
        "train": _train,
        "train-reward": _train_reward,
        "collect": _collect,
        "eval": _eval,
        "export": _export,
        "report": _report,
        "doctor": _doctor,
    }
    command = arguments[0] if arguments else "--help"
    if command not in (*commands, *_HELP, "--version"):
        suggestion = nearest(command, commands)
        print(f"gvpo: there is no command {command!r}{suggestion}\n\n{_USAGE}", end="", file=sys.stderr)
        return 2
    secrets = set(secrets_of())
    try:
        if command in _HELP:
            say(_USAGE.rstrip())
            return 0 if arguments else 2
        if command == "--version":
            say(f"gvpo {__version__}")
            return 0
        if command not in ("doctor", "report"):
            _refuse_lost_directory()
        return commands[command](arguments[1:], secrets)
    except KeyboardInterrupt:
        print(f"\ngvpo: {_QUIT.get(command, 'quit')}", file=sys.stderr)
        return 130
    except ImportError as e:
        if (e.name or "").partition(".")[0] not in ("tyro", "tomli_w", "rich"):
            return _failed(e, secrets)
        print(f'gvpo: {e.name} is not installed: pip install "gvpo[train]"', file=sys.stderr)
        return 2
    except Exception as e:  # printed here, to hide secrets
        return _failed(e, secrets)


def _refuse_lost_directory() -> None:
    """Raises ConfigError: the working directory was removed, so relative paths have no meaning."""
    try:
        os.getcwd()
    except OSError as e:
        raise ConfigError(f"the working directory cannot be used ({e.strerror}): change to another one") from e


def _failed(error: Exception, secrets: set[str]) -> int:
    """Prints the error without known secrets; returns the exit status."""
    if not _expected(error):
        print(traceback_of(error, secrets), end="", file=sys.stderr)
        return 1
    print(f"gvpo: {printable(hide(str(error), secrets), keep=chr(10))}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1


def _expected(error: Exception) -> bool:
    """Whether the error is one of gvpo's own, whose message is enough. Other errors are shown with a traceback."""
    return type(error).__module__.startswith("gvpo_") or isinstance(error, FloatingPointError)


def _init(arguments: list[str], secrets: set[str]) -> int:
    from gvpo_core.training.cli.init import init

    return init(arguments)


def _train(arguments: list[str], secrets: set[str]) -> int:
    from gvpo_core.training.cli.dry_run import preview_inputs
    from gvpo_core.training.config.file import as_table, parse_arguments
    from gvpo_core.training.inputs import Inputs
    from gvpo_core.training.loop import run
    from gvpo_core.training.policy.load import load_policy
    from gvpo_core.training.run.checkpoint import refuse_unsaved
    from gvpo_core.training.run.folder import RunFolder
    from gvpo_core.training.run.resume import in_its_folder, without_from_step

    dry = [a for a in arguments if a in ("--dry-run", "--dry_run")]
    arguments, step = without_from_step([a for a in arguments if a not in dry])
    from_step = _step_number(step)
    with ExitStack() as stack:
        opened: list[Inputs] = []

        def open_and_check(config: Config) -> list[str]:
            inputs, messages = _opened(in_its_folder(arguments, config))
            opened.append(stack.enter_context(inputs))
            return messages

        _, settings = parse_arguments(arguments, open_and_check)
        config = opened[0].config
        folder = RunFolder(Path(config.run.folder))
        folder.refuse_changes(config)  # before the slow load of the model
        if from_step is not None:
            refuse_unsaved(folder.checkpoints, from_step)
        secrets |= secrets_of(as_table(config))
        _log_to_stderr(secrets)
        log, old_folder = logging.getLogger("gvpo"), settings.run.folder
        if config.run.folder != old_folder:
            log.warning("%s holds the run that was started in %s; it continues here", config.run.folder, old_folder)
        log.info("loading %s", hide(config.model.path))
        policy = load_policy(config)
        if dry:
            preview_inputs(opened[0], policy, command=shlex.join(hide_command(["gvpo", "train", *arguments], secrets)))
            return 0
        return run(opened[0], policy, from_step=from_step).exit_status


def _collect(arguments: list[str], secrets: set[str]) -> int:
    from gvpo_core.training.cli.collect import collect, for_collecting, refuse_name
    from gvpo_core.training.config.file import as_table, parse_arguments
    from gvpo_core.training.inputs import Inputs
    from gvpo_core.training.policy.load import load_policy

    if arguments[:1] in ([], ["-h"], ["--help"]) or len(arguments) < 2 or arguments[1].startswith("-"):
        say(_COLLECT.rstrip())
        return 0 if {"-h", "--help"} & {*arguments} else 2
    out = Path(arguments[1])
    refuse_name(out)  # before the slow load of the model
    with ExitStack() as stack:
        opened: list[Inputs] = []

        def open_and_check(config: Config) -> list[str]:
            inputs, messages = _opened(for_collecting(config))
            opened.append(stack.enter_context(inputs))
            return messages

        _, config = parse_arguments([arguments[0], *arguments[2:]], open_and_check)
        secrets |= secrets_of(as_table(config))
        _log_to_stderr(secrets)
        logging.getLogger("gvpo").info("loading %s", hide(config.model.path))
        return collect(opened[0], load_policy(opened[0].config), out)


def _step_number(text: str | None) -> int | None:
    """The number after `--from-step`; None without the option. Raises: ConfigError: not a number."""
    if text is not None and not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--from-step {text}: expected the step of a saved checkpoint, or 0 for the beginning")
    return None if text is None else int(text)


def _opened(config: Config) -> "tuple[Inputs, list[str]]":
    """Opens the files and functions that the settings name. Also returns a list of what is wrong with them.

    This runs before the slow load of the model.
    """
    from gvpo_core.training.config.check import wrong_values
    from gvpo_core.training.config.engine import needs_sampler
    from gvpo_core.training.inputs import Inputs
    from gvpo_core.training.policy.load import missing_of_backend
    from gvpo_core.training.watch.trackers import check_trackers

    wrong_sections = {name.partition(".")[0] for name, _ in wrong_values(config)}
    inputs = Inputs(config).open(training=bool(config.data.train), scoring="rewards" not in wrong_sections)
    wrong = [str(e) for e in inputs.errors]
    wrong += missing_of_backend(config)
    wrong += needs_sampler(config) if config.rollout.sampler == "policy" else []
    try:
        check_trackers(config.run.trackers)
    except ValueError as e:
        wrong.append(str(e))
    return inputs, wrong


def _train_reward(arguments: list[str], secrets: set[str]) -> int:
    from gvpo_core.training.cli.train_reward import train_reward

    _log_to_stderr(secrets)
    return train_reward(arguments)


def _eval(arguments: list[str], secrets: set[str]) -> int:
    from gvpo_core.training.cli.saved import evaluate_run

    _log_to_stderr(secrets)
    return evaluate_run(arguments)


def _export(arguments: list[str], secrets: set[str]) -> int:
    from gvpo_core.training.cli.saved import export_run

    _log_to_stderr(secrets)
    return export_run(arguments)


def _report(arguments: list[str], secrets: set[str]) -> int:
    from gvpo_core.training.cli.report import report

    return report(arguments)


def _doctor(arguments: list[str], secrets: set[str]) -> int:
    from gvpo_core.training.cli.doctor import doctor

    parser = Parser(prog="gvpo doctor", description="Lists what is installed and which devices exist.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return doctor(json=parser.parse_args(arguments).json)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes lines that fit the terminal to the current sys.stderr, which a live progress bar replaces."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Handler. Wraps text in a terminal, but no tracebacks. Records in a file stay easy to search."""
        text = super().format(record)
        if record.exc_info or record.stack_info or not sys.stderr.isatty():
            return text
        width = line_width(sys.stderr)
        return "\n".join(line for part in text.split("\n") for line in wrapped(part, width, " " * 4))

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr(secrets: set[str]) -> None:
    """Logs warnings of all libraries to standard error; from gvpo, all messages of rank 0 and errors of the others."""
    handler = _Stderr()
    handler.setFormatter(Hiding("%(levelname)s %(name)s: %(message)s", secrets))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("gvpo").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
