"""GVPO on offline groups through mlx-lm's own trainer: `mlx_lm.lora` for responses that somebody scored.

`python -m gvpo_mlx_lm --config lora.yaml --beta 0.1` takes mlx-lm's settings; in Python there are `load`, `load_groups`
and `train`.
"""

from importlib.metadata import PackageNotFoundError, version

TRIED = ("0.32.0", "0.33")
"""Versions of mlx-lm: from the first, below the second."""


def _check_host() -> None:
    try:
        found = version("mlx-lm")
        import mlx.core  # noqa: F401
        import mlx_lm  # noqa: F401
    except (ImportError, PackageNotFoundError) as error:
        raise ImportError(f'gvpo_mlx_lm needs MLX and mlx-lm ({error}): pip install "gvpo[mlx-lm]"') from error
    numbers = lambda text: tuple(int(n) for n in text.split(".")[:3] if n.isdigit())
    if not numbers(TRIED[0]) <= numbers(found) < numbers(TRIED[1]):
        raise ImportError(
            f"gvpo_mlx_lm was tried with mlx-lm >= {TRIED[0]}, < {TRIED[1]}, and {found} is installed: its trainer may"
            f' average micro-batches otherwise; pip install "mlx-lm>={TRIED[0]},<{TRIED[1]}"'
        )


_check_host()

from gvpo_mlx_lm.groups import Group, load_groups  # noqa: E402
from gvpo_mlx_lm.models import ModelError, check_rope, load  # noqa: E402
from gvpo_mlx_lm.training import GVPO, SettingsError, response_logprobs, train  # noqa: E402

__all__ = [
    "GVPO",
    "Group",
    "ModelError",
    "SettingsError",
    "check_rope",
    "load",
    "load_groups",
    "response_logprobs",
    "train",
]
