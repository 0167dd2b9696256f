"""The checks that every adapter makes of its host: a tried version, and settings that keep the GVPO update."""

import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple


class HostError(ImportError, RuntimeError):
    """The host is missing, or the adapter was not tried with its version."""


class Host(NamedTuple):
    """A host trainer and the releases that an adapter was tried with."""

    adapter: str  # import name, such as gvpo_trl
    extra: str  # of the package gvpo, such as trl
    distribution: str  # on the package index, such as trl
    low: str  # the first release that was tried
    high: str  # only releases below this one were tried
    why: str  # what another release may do differently

    def check(self, installed: str | None = None) -> None:
        """Checks that a release is among those that were tried.

        Args:
          installed: a version. Default: the installed one.

        Raises: HostError: not installed, or another release; the message says what to install.
        """
        if installed is None:
            try:
                installed = version(self.distribution)
            except PackageNotFoundError as error:
                raise self.missing(error) from error
        if not _release(self.low) <= _release(installed) < _release(self.high):
            window = f">={self.low},<{self.high}"
            raise HostError(
                f"{self.distribution} {installed} is installed; {self.adapter} was tried with {window}, and another"
                f' release may {self.why}: pip install "{self.distribution}{window}"'
            )

    def missing(self, error: Exception) -> HostError:
        """Returns the error for a host that is not installed or cannot be imported."""
        return HostError(f'{self.adapter} needs {self.distribution} ({error}): pip install "gvpo[{self.extra}]"')


def _release(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


class SettingsError(ValueError):
    """Settings of a host that would change the GVPO update; the message names each and what to set."""


class Rule(NamedTuple):
    """A required setting: its name, a check, the value to set, and the reason."""

    name: str
    fits: Callable[[Any], bool]
    wanted: str
    reason: str


def refused(rules: Iterable[Rule], value_of: Callable[[str], Any]) -> list[str]:
    """Returns one line for each setting that breaks its rule.

    Args:
      value_of: name of a setting -> its value.
    """
    return [
        f"{rule.name} is {value!r}; set it to {rule.wanted}: {rule.reason}"
        for rule in rules
        if not rule.fits(value := value_of(rule.name))
    ]


def equals(*values: Any) -> Callable[[Any], bool]:
    """Returns a check that a setting is one of `values`."""
    return lambda setting: any(setting == value for value in values)


def is_number(value: Any) -> bool:
    """Returns whether a value is a real number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_beta(value: Any) -> bool:
    """Returns whether a value is a KL coefficient: a finite number of at least 0, reward units per nat."""
    return is_number(value) and 0 <= value < float("inf")


def check_beta(beta: Any) -> None:
    """Checks a KL coefficient. Raises: SettingsError: not a finite number of at least 0."""
    if not is_beta(beta):
        raise SettingsError(f"beta is {beta!r}; expected a finite number of at least 0, reward units per nat")


def at_random(modules: Iterable[Any]) -> list[str]:
    """Lists what makes activations random in a torch model's training mode, such as "MixtralBlock.jitter_noise = 0.1".

    These are probabilities and noise levels above 0. They are found by the names of the modules' attributes.
    """
    words = ("drop", "jitter", "noise")
    active = {
        f"{type(module).__name__}.{name} = {value}"
        for module in modules
        for name, value in vars(module).items()
        if any(word in name or (name == "p" and word in type(module).__name__.lower()) for word in words)
        and isinstance(value, float)
        and value > 0
    }
    return sorted(active)
