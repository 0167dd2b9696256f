"""Exact GVPO in Tunix: `GVPOConfig` and `GVPOLearner` in the places of GRPOConfig and GRPOLearner."""

from importlib.metadata import PackageNotFoundError, version

TRIED = ("0.1.7", "0.1.8")
"""Versions of google-tunix: from the first, below the second."""


def _check_host() -> None:
    try:
        found = version("google-tunix")
        import tunix  # noqa: F401
    except (ImportError, PackageNotFoundError) as error:
        raise ImportError(f'gvpo_tunix needs Tunix ({error}): pip install "gvpo[tunix]"') from error
    numbers = lambda text: tuple(int(n) for n in text.split(".")[:3] if n.isdigit())
    if not numbers(TRIED[0]) <= numbers(found) < numbers(TRIED[1]):
        raise ImportError(
            f"gvpo_tunix was tried with google-tunix >= {TRIED[0]}, < {TRIED[1]}, and {found} is installed: its learner"
            f' may batch, mask or score otherwise; pip install "google-tunix>={TRIED[0]},<{TRIED[1]}"'
        )


_check_host()

from gvpo_tunix.config import GVPOConfig, SettingsError  # noqa: E402
from gvpo_tunix.learner import GVPOLearner  # noqa: E402
from gvpo_tunix.rope import check_rope, mend_llama  # noqa: E402

__all__ = ["GVPOConfig", "GVPOLearner", "SettingsError", "check_rope", "mend_llama"]
