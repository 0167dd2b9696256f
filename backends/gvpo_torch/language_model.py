"""The type of a transformers language model, plain or wrapped by peft, with the members that the backend uses.

transformers declares a model's parts as modules or tensors of any kind; here they have their real types.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:

    class LanguageModel(nn.Module):
        """For the type checker only: at run time a model is an object of transformers or peft."""

        config: Any
        generation_config: Any
        peft_config: dict[str, Any]  # only if wrapped by peft, like the methods of adapters
        _no_split_modules: Sequence[str] | None
        _keys_to_ignore_on_load_unexpected: Sequence[str] | None

        def get_base_model(self) -> "LanguageModel": ...
        def disable_adapter(self) -> AbstractContextManager[None]: ...
        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear: ...
        def get_decoder(self) -> nn.Module: ...
        def can_generate(self) -> bool: ...
        def set_attn_implementation(self, name: str) -> None: ...
        def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None: ...
        def save_pretrained(self, folder: Any, **options: Any) -> None: ...

else:
    LanguageModel = nn.Module
