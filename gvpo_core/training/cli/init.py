"""gvpo init: writes a config, a reward and rows for a first run."""

import json
import os
import re
import shlex
from pathlib import Path

from gvpo_core.training.cli.parser import Parser
from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.config.backends import install_line
from gvpo_core.training.files.disk import refuse_special
from gvpo_core.training.policy.load import backend_of
from gvpo_core.training.terminal.output import say

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""A model that is small enough for a CPU, and that solves some of the sums at the start but never all."""
TRAIN = ((23, 19), (8, 27), (14, 12), (29, 6), (17, 25), (3, 18), (21, 30), (11, 16), (26, 9), (5, 22))
HELD_OUT = ((12, 24), (28, 7), (15, 13), (19, 20), (4, 29), (16, 10), (27, 18), (9, 14), (22, 21), (6, 25))

CONFIG = """\
# Train:    gvpo train config.toml             a killed run resumes with the same command
# Try it:   gvpo train config.toml --dry-run   samples and scores two prompts, estimates memory
# Settings: gvpo train --help
# Paths are from the folder in which the command runs.

[run]
folder = "runs/first"
steps = 30
checkpoint_every = 0         # the last step always has a checkpoint
backend = "{backend}"

[model]
path = {model}  # a folder, or a name on the hub

[data]
train = "train.jsonl"        # one row a line: a prompt, and the columns that the reward takes
evaluation = "held_out.jsonl"

[rollout]
prompts = 4                  # a step: 4 prompts x 8 responses
responses = 8
max_tokens = 12              # of a response

[objective]
beta = 0.05                  # strength of the pull to the initial model, reward units per nat

[optimizer]
learning_rate = 1.2e-5       # for 135 million parameters; a larger model takes a smaller one
schedule = "linear"

[rewards.right]
function = "reward.py:reward"
"""

REWARD = '''\
"""The reward of this run: 1 for a right answer, 0 for a wrong one."""

import re


def reward(completions, answer):
    """Scores responses: whether the last number of each is its row's answer.

    completions: strings, or lists of chat messages if the prompts are chat messages.
    answer: the column "answer" of train.jsonl, one value for each completion. Every column can be an argument.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    numbers = [re.findall(r"-?\\d+", text) for text in texts]
    return [float(found[-1:] == [right]) for found, right in zip(numbers, answer)]
'''


def init(arguments: list[str]) -> int:
    """Writes the files and prints the next command; returns the exit status."""
    parser = Parser(
        prog="gvpo init",
        description="Writes config.toml, reward.py, train.jsonl and held_out.jsonl, ready for gvpo train.",
    )
    parser.add_argument("folder", nargs="?", default=".", help="folder for the files. Default: the working directory")
    parser.add_argument("--model", default=MODEL, help=f"folder or hub name of a language model. Default: {MODEL}")
    options = parser.parse_args(arguments)
    folder = Path(options.folder)
    for path in write_files(folder, options.model):
        say(f"wrote {path}")
    if _backend() == "auto":
        say(f"\nNo backend is installed yet. Install one of them:\n  {install_line()}")
    change_folder = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))}\n  "
    say(f"\nNext:\n  {change_folder}gvpo train config.toml")
    return 0


def write_files(folder: Path, model: str) -> list[Path]:
    """Writes the files of a first run and returns their paths.

    Args:
      model: folder or hub name of the model. The prompts are chat messages unless it is a folder without a chat
        template.
    Raises: ConfigError: a file already exists, the folder cannot be written, or `model` does not name a model.
    """
    name = _model(model)
    chat = not Path(name).is_dir() or _has_chat_template(Path(name))
    files = {
        "config.toml": CONFIG.format(backend=_backend(), model=json.dumps(name)),
        "reward.py": REWARD,
        "train.jsonl": _rows(TRAIN, chat),
        "held_out.jsonl": _rows(HELD_OUT, chat),
    }
    paths = [folder / name for name in files]
    existing = [str(path) for path in paths if os.path.lexists(path)]
    if existing:
        raise ConfigError(f"{', '.join(existing)}: already exists, and gvpo init replaces no file; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, files.values(), strict=True):
            with path.open("x", encoding="utf-8") as f:
                f.write(text)
    except OSError as e:
        raise ConfigError(f"cannot write to {folder}: {e.strerror or e}") from e
    return paths


def _model(name: str) -> str:
    """The value of model.path in the config. A folder becomes an absolute path: the config may be elsewhere.

    Raises: ConfigError: the folder does not exist or has no config.json, or the name is not a valid hub name.
    """
    folder = Path(name).expanduser()
    if not name.isprintable() or not name:
        raise ConfigError(f"--model {name!r}: expected a folder or the hub name of a model")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model {name}: the folder has no config.json, so it holds no model")
        return str(folder.resolve())
    page = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", name)
    if page:
        raise ConfigError(f"--model {name}: a model of the hub is given by its name, {page[1]!r}")
    if folder.exists() or not re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", name):
        raise ConfigError(f"--model {name}: there is no such folder, and a hub name is NAME or OWNER/NAME")
    return name


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    try:
        refuse_special(settings)
        return bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _backend() -> str:
    """The installed backend that "auto" would choose; "auto" if none is installed."""
    try:
        return backend_of(Config())
    except ConfigError:
        return "auto"


def _rows(sums: tuple[tuple[int, int], ...], chat: bool) -> str:
    lines = []
    for a, b in sums:
        question = f"What is {a} + {b}? Answer with the number only."
        prompt = [{"role": "user", "content": question}] if chat else question
        lines.append(json.dumps({"prompt": prompt, "answer": str(a + b)}) + "\n")
    return "".join(lines)
