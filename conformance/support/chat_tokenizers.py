"""Tiny tokenizers with chat templates in the styles of released models, made offline."""

from dataclasses import dataclass
from typing import Any

_GENERATION = "{% if add_generation_prompt %}"


@dataclass(frozen=True)
class Style:
    """How a family writes a chat, and what its tokenizer adds to text."""

    template: str
    special: tuple[str, ...]
    eos: str
    closes: str  # the token that closes an assistant's turn
    bos: str | None = None
    pad: str | None = None
    sentencepiece: bool = False  # a space before the first word, as Metaspace puts it


STYLES = {
    "llama3": Style(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + _GENERATION
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|end_of_text|>",
        closes="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "qwen3": Style(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last and "
        "'<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        + _GENERATION
        + "<|im_start|>assistant\n{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        eos="<|endoftext|>",
        closes="<|im_end|>",
        pad="<|endoftext|>",
    ),
    "mistral": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        eos="</s>",
        closes="</s>",
        bos="<s>",
        sentencepiece=True,
    ),
    "gemma": Style(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + _GENERATION + "<start_of_turn>model\n{% endif %}",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        closes="<end_of_turn>",
        bos="<bos>",
        pad="<pad>",
    ),
    "deepseek": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}" + _GENERATION + "<｜Assistant｜>{% endif %}",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        eos="<｜end▁of▁sentence｜>",
        closes="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "glm": Style(
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        + _GENERATION
        + "<|assistant|>\n{% endif %}",
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
        eos="<|endoftext|>",
        closes="",
    ),
}
"""Simplified, with what matters here: which special tokens stand where."""


def make(style: Style, *, first: tuple[str, ...] | None = None, last: tuple[str, ...] = ()) -> Any:
    """A tokenizer of one token a byte.

    Args:
      first, last: special tokens that it adds around a text; first: BOS, where the style has one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    first = ((style.bos,) if style.bos else ()) if first is None else first
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*style.special, "▁", *alphabet])}
    if style.sentencepiece:
        ids |= {f"<0x{byte:02X}>": len(ids) + byte for byte in range(256)}
        tokenizer = Tokenizer(models.BPE(ids, [], unk_token=style.special[0], byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer = Tokenizer(models.BPE(ids, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*first, "$A", *last]), special_tokens=[(t, ids[t]) for t in {*first, *last}]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=style.eos, bos_token=style.bos, pad_token=style.pad
    )
    fast.add_special_tokens({"additional_special_tokens": list(style.special)})
    fast.chat_template = style.template
    return fast
