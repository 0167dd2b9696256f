"""The cache argument of transformers' decoders under its old and new names, and caches of a class of their own."""

import functools

import pytest
import tiny_models
from required import require
from torch_policies import policy

require(subject="torch")

from gvpo_torch.cache import cache_argument

from gvpo_core.training.config import ConfigError
from gvpo_core.training.sampling import Sampling

PROMPTS, SEEDS = [(5, 6, 7), (8, 9, 10, 11, 12)], [[1, 2], [3, 4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def decoder(folder, monkeypatch):
    """The decoder class of the tiny model, whose `forward` a test may replace."""
    from transformers.models.llama.modeling_llama import LlamaModel

    return LlamaModel


def as_keyword(name: str, plain, *, told: bool):
    """A forward pass that takes the cache as `name` alone, with or without saying so in its signature."""

    def renamed(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        others = {"cache", "past_key_values", "cache_params"} - {name}
        kwargs = {key: value for key, value in kwargs.items() if key not in others}  # ignored, as `**kwargs` often is
        seen.append(kwargs.get(name))
        return plain(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{own: kwargs.get(name)},
        )

    import inspect

    seen: list[object] = []
    own = next(key for key in ("cache", "past_key_values") if key in inspect.signature(plain).parameters)
    if told:
        parameters = [p for p in inspect.signature(renamed).parameters.values() if p.kind is not p.VAR_KEYWORD]
        extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        renamed.__signature__ = inspect.Signature([*parameters, extra])
    renamed.seen = seen
    return renamed


@pytest.mark.parametrize("told", [True, False], ids=["in-signature", "behind-kwargs"])
@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_cache_is_passed_under_the_name_that_the_decoder_takes(name, told, folder, decoder, monkeypatch) -> None:
    expected = policy(folder).generate(PROMPTS, SEEDS, Sampling(max_tokens=6))
    renamed = as_keyword(name, decoder.forward, told=told)
    monkeypatch.setattr(decoder, "forward", renamed)
    of_policy = policy(folder)
    assert of_policy.scorer.cache_argument == name
    renamed.seen.clear()
    assert of_policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=6)) == expected
    assert renamed.seen and all(cache is not None for cache in renamed.seen)


def test_old_name_behind_a_decorator_is_read_through_it(folder, decoder, monkeypatch) -> None:
    plain = decoder.forward

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(decoder, "forward", forward)
    assert policy(folder).scorer.cache_argument in ("cache", "past_key_values")


def test_decoder_without_a_cache_is_refused(folder) -> None:
    import torch

    class Recomputing(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return input_ids

    with pytest.raises(ConfigError, match=r"Recomputing takes no cache \(cache, past_key_values, cache_params\)"):
        cache_argument(Recomputing(), None)
