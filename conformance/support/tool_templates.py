"""Chat templates with tools in the styles of released models, in words of our own, over tokenizers with merges."""

from typing import Any

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "Functions:{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
_RESULT = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
# Thoughts before the last question of the user's are dropped; those since then stay, so that tools may follow them.
_QWEN3 = (
    _TOOLS + "{% set ns = namespace(asked=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}" + _RESULT + "{% elif m.role == 'assistant' %}"
    "<|im_start|>assistant\n{% if loop.index0 < ns.asked and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% elif m.role == 'user' or not loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}" + _OPEN
)
_SMOLLM2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + _OPEN
)
_LLAMA31 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson }}<|eot_id|>{% elif m.role != 'system' %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if tools and loop.index0 == 0 %}Functions:{% for t in tools %} {{ t | tojson }}{% endfor %}\n{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_DROPS = (  # every turn's thoughts, also the last one's
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + _OPEN
)
TEMPLATES = {
    "qwen3": (_QWEN3, _CHATML, "<|im_end|>"),
    "smollm2": (_SMOLLM2, _CHATML, "<|im_end|>"),
    "llama31": (_LLAMA31, _LLAMA, "<|eot_id|>"),
    "drops": (_DROPS, _CHATML, "<|im_end|>"),
}
"""Name -> template, special tokens (the first is EOS or BOS), the token that closes a turn."""
MERGES = (("1", "2"), ("12", "3"), ("a", "b"), ("l", "l"), ("ll", "o"), ("Ġ", "a"))


def make(name: str) -> Any:
    """A byte-level tokenizer that merges some pairs, so that a text has more than one tokenization."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template, special, closes = TEMPLATES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*special, *alphabet, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(ids, list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = special[0] if name == "llama31" else None
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=closes, bos_token=bos)
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.chat_template = template
    return fast
