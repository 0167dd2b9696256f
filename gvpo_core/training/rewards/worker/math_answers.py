"""Compares a response's final answer with a mathematical gold answer through math-verify.

Data sets write gold answers as LaTeX without delimiters (`2\\pi`), in which math-verify would find only the number 2.
So both sides are read as LaTeX in full. This module also compares what math-verify ignores (units, bases) or rounds.
Answers in words are compared as text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .answer_notation import MODULUS, plain, tidied, without_multiple, without_preamble
from .answer_units import TRAILING, WORDS, factor, same_kind, unit_of
from .time_answers import gold_date, gold_time, last_date, last_time

_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed|\\fbox")
_FORMULA = re.compile(  # must not contain the start of another formula: the time would grow quadratically
    r"(?<!\\)\$\$?(?:[^$\\]|\\.)+\$\$?|\\\((?:(?!\\\().)+?\\\)|\\\[(?:(?!(?<!\\)\\\[).)+?\\\]"
)
_FINAL = re.compile(r"(?i)\banswer\b(?:\s+(?:is|are|=))?\s*:?\s*")
_CHOICE = re.compile(r"\(?([A-H])(?:\)|\.|:)\s+\S.*")  # a multiple choice with its text: B. 42
_SHARE = re.compile(r"(.*?\d[}\s]*)\\?%\s*", re.DOTALL)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
_FUNCTION = re.compile(
    r"\b(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|pi|min|max|gcd|lcm|mod|det|"
    r"floor|ceil|infty|frac|and|or)\b"
)
_BASE = re.compile(r"^\(?([0-9A-Z]+)\)?_\{?\(?(\d+)\)?\}?$")
_BASE_IN_WORDS = re.compile(r"_\s*\{?\s*\\(?:text|textrm|mathrm)\s*\{\s*(\w+)\s*\}\s*\}?")
_BASES = dict(
    zip(
        ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "sixteen"),
        (*range(2, 13), 16),
        strict=True,
    )
)


@lru_cache(maxsize=1)
def library() -> tuple[Any, Any, Any]:
    """math-verify's parse, verify and settings for LaTeX and plain numbers. Raises: ImportError: it is not installed.

    Its own removal of units is off: it treats letters like ab, m and t after a number as units.
    """
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as e:
        raise ImportError('the math_verify reward needs math-verify: pip install "gvpo[rewards]"') from e
    latex = LatexExtractionConfig()
    latex = replace(latex, normalization_config=replace(latex.normalization_config, units=False))
    return parse, verify, [latex, ExprExtractionConfig()]


def judge(response: str, gold: str) -> float | None:
    """1.0 if the response's final answer equals the gold answer, else 0.0; None if the gold answer cannot be read."""
    response, gold = tidied(response), tidied(gold)
    thought, _, after = response.rpartition("</think>")
    if thought and after.strip():
        response = after
    if tagged := re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL):
        response = tagged[-1]
    answer = without_preamble(_undelimited(gold.rpartition("####")[2] if "####" in gold else gold))
    if not answer:
        return None
    for of_gold, of_response in ((gold_time, last_time), (gold_date, last_date), (_ratio, _ratio)):
        if (form := of_gold(answer)) is not None:
            return float(any(of_response(candidate) == form for candidate in _candidates(response, words=True)))
    if letters := _letters(answer):
        listed = [_letters(candidate) for candidate in _candidates(response, words=True)]
        ordered = len(letters) > 2 and answer.isalpha()  # order matters in ABC, but not in AC or in "A, C"
        if any(other == letters if ordered else other and {*other} == {*letters} for other in listed):
            return 1.0
        if ordered or not answer.isalpha():
            return 0.0
    if choice := _CHOICE.fullmatch(answer):
        plains = (_plain(answer), choice[1].casefold())
        return float(any(_plain(c) in plains for c in _candidates(response, words=True)))
    words = _words(answer)
    if words is not None:
        if any(_plain(c) == _plain(answer) or _choice(c, answer) for c in _candidates(response, words=True)):
            return 1.0
        return 0.0 if len(words) == 1 or (_TEXT_COMMAND.search(answer) and len(words) <= 3) else None
    if name := _name(answer):
        stated = [*_candidates(response, words=True), *re.findall(r"\$([^$]+)\$", response)[-1:]]
        return float(any(_name(candidate) == name for candidate in stated))
    expected = _read(answer)
    if expected is None:
        return None
    for candidate in map(without_preamble, _candidates(response)):
        value = _read(candidate)
        if value is not None:
            return float(_equal(answer, expected, candidate, value))
    if _DELIMITED.search(response) or not re.search(r"\d\S*[^\d\s.,;:!?%)*+/^($€£-]", response):
        return float(_verified(expected, _parse(response, delimited=True)))
    return 0.0


def _candidates(response: str, *, words: bool = False) -> Iterator[str]:
    """Yields candidates for the final answer, most reliable first: boxed, after "answer", or the last line.

    Args:
      words: whether the answer is text; otherwise only mathematics without words counts.
    """
    if boxed := _boxed(response):
        yield boxed
        return
    lines = [line for line in response.strip().splitlines() if line.strip()]
    if not lines:
        return
    delimited = _DELIMITED.search(response) is not None
    last = lines[-1]
    after = list(_FINAL.finditer(last))
    stated = last[after[-1].end() :] if after else ""
    if stated.strip() and (words or (not _DELIMITED.search(bare := _undelimited(stated)) and _is_mathematics(bare, 3))):
        yield _undelimited(stated)
    if words or (not delimited and _is_mathematics(last, 2)):
        yield _undelimited(last)
    formulas = list(_FORMULA.finditer(last))
    if not words and len(formulas) == 1 and not last[formulas[0].end() :].strip(" .!*"):
        yield _undelimited(formulas[0][0])
    tokens = [token for token in last.split() if re.search(r"[\d\\]", token)]
    if not words and not delimited and tokens and re.search(r"\d[A-Za-z\\π√^_!]|\\", tokens[-1]):
        yield _undelimited(tokens[-1])  # 2\pi, 2x: not only the number 2


def _is_mathematics(text: str, letters: int) -> bool:
    """Whether a text has no words.

    Args:
      letters: a run of at least this many letters is a word, unless it is the name of a function.
    """
    bare = _FUNCTION.sub("", re.sub(r"\\[A-Za-z]+", "", WORDS.sub("", _TEXT_COMMAND.sub("", text))))
    return len(text) < 200 and not re.search(rf"[A-Za-z]{{{letters},}}", bare)


def _boxed(text: str) -> str:
    """The content of the last \\boxed{...}; adjacent ones (\\boxed{1} and \\boxed{2}) are joined by commas."""
    contents: list[str] = []
    closing, end = _closing(text), -1
    for match in re.finditer(r"\\(?:boxed|fbox)\s*(\{|(?=[\w]))", text):
        if match.start() < end:  # inside the previous box
            continue
        if end >= 0 and not re.fullmatch(r"(?:[\s$,.;&]|\\[,;\])(\[]|and|or)*", text[end : match.start()]):
            contents = []
        if match[1] == "{":
            close = closing.get(match.end() - 1)
            if close is None:
                continue  # cut at the token limit
            content, end = text[match.end() : close], close + 1
        else:
            content, end = text[match.end()], match.end() + 1
        contents.append(content)
    return ", ".join(_undelimited(content) for content in contents)


def _closing(text: str) -> dict[int, int]:
    """Position of each opening brace -> position of its closing brace, if there is one."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for match in re.finditer(r"(?<!\\)[{}]", text):
        if match[0] == "{":
            opened.append(match.start())
        elif opened:
            closing[opened.pop()] = match.start()
    return closing


def _undelimited(text: str) -> str:
    """Removes delimiters, a box and a full stop around mathematics. Bases in words become digits."""
    text = _BASE_IN_WORDS.sub(lambda m: f"_{{{_BASES.get(m[1].casefold(), m[1])}}}", text.strip())
    text = re.sub(r"^\(([0-9A-Z]+)\)(?=_\{?\(?\d+\)?\}?$)", r"\1", text)
    while True:
        before = text
        text = re.sub(r"^\*\*(.*)\*\*$", r"\1", text, flags=re.DOTALL).strip()
        text = re.sub(r"(?<=[^\\.])(?<!\\right)[.。]$", "", text).strip()
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")):
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                inner = text[len(left) : len(text) - len(right)]
                if left not in inner.replace(r"\$", "") and not (left == r"\boxed{" and not _balanced(inner)):
                    text = inner.strip()
        if text == before:
            return text


def _balanced(text: str) -> bool:
    depth = 0
    for character in re.sub(r"\\[{}]", "", text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


def _words(answer: str) -> list[str] | None:
    """The words of an answer that is text, such as Evelyn, \\text{no solution} or May 5; None for mathematics."""
    bare = _TEXT_COMMAND.sub(r" \1 ", answer)
    has_command = bare != answer
    outside = _TEXT_COMMAND.sub(" ", answer)
    if has_command and not re.search(r"[A-Za-z0-9\\]", outside):
        words = bare.split()
    elif "\\" in bare or re.search(r"[=<>^_+*/{}\[\]]", bare) or not re.search(r"[A-Za-z]", bare):
        return None
    else:
        words = re.findall(r"[A-Za-z0-9'&.-]+", bare)
        if has_command or re.match(r"\s*[-+(]*[\d.,$]", bare):  # a number and its unit
            return None
    answer_words = {"yes", "no", "true", "false", "odd", "even"}
    if len(words) == 1 and re.fullmatch(r"\(?[A-Z]\)?\.?", words[0]):
        return words
    if any((len(w) >= 4 and w.isalpha()) or w.lower() in answer_words for w in words) or (
        has_command and any(map(str.isalpha, words))
    ):
        return words if _FUNCTION.sub("", " ".join(words)).strip() else None
    if len(words) > 1 and any(w.isalpha() and len(w) > 1 for w in words):
        return words
    return None


def _letters(text: str) -> list[str] | None:
    """The letters of an answer like ABC, or A, B and C; None for any other answer."""
    text = _undelimited(_TEXT_COMMAND.sub(r"\1", text))
    listed = re.fullmatch(r"[A-Z](?:\s*(?:,|;|&|\\&|and)\s*(?:and\s+)?[A-Z])+", text)
    return re.findall("[A-Z]", text) if listed or re.fullmatch("[A-Z]{2,}", text) else None


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    """The parts of a ratio of at least three numbers, scaled to a sum of 1; None for any other answer."""
    parts = re.split(r"\s*(?::|\{:\}|\\colon)\s*", text.strip())
    if len(parts) < 3 or not all(re.fullmatch(r"\d{1,30}(?:\.\d{1,30})?", part) for part in parts):
        return None
    numbers = [Fraction(part) for part in parts]
    return tuple(number / sum(numbers) for number in numbers) if any(numbers) else None


def _name(text: str) -> str | None:
    """A name that is not a product: H2O, x_1, \\angle ABC; None for other answers. As products, HO2 would equal H2O."""
    bare = re.sub(r"[\s{}_$]", "", _TEXT_COMMAND.sub(r"\1", text)).strip(".")
    if angle := re.fullmatch(r"(?:\\angle|∠)([A-Z])([A-Z])([A-Z])", bare):
        return "angle " + angle[2].join(sorted((angle[1], angle[3])))
    if not (match := re.fullmatch(r"([A-Za-z]{1,3})\d[A-Za-z\d]*", bare)) or _FUNCTION.fullmatch(match[1]):
        return None
    return None if _is_numeral(text) else bare


def _is_numeral(text: str) -> bool:
    """Whether a text is a number in another base: AB_{16}, but not CO_2."""
    base = _BASE.match(text.strip())
    try:
        return base is not None and int(base[1], int(base[2])) >= 0
    except ValueError:
        return False


def _plain(text: str) -> str:
    """A text for comparison, without text commands, delimiters, white space and case."""
    text = _TEXT_COMMAND.sub(r"\1", text)
    text = re.sub(r"\\[,;:! ]|[\s$~{}*\"]|\\[()\[\]]", "", text).strip(".,;:!").casefold()
    return text[1:-1] if re.fullmatch(r"\(.\)", text) else text


def _choice(candidate: str, answer: str) -> bool:
    """Whether a candidate names the choice `answer`, one letter, with the choice's text after it: C) 42."""
    letter = _plain(answer)
    plain = _TEXT_COMMAND.sub(r"\1", candidate).strip().casefold()
    return len(letter) == 1 and bool(re.match(rf"\(?{re.escape(letter)}(?:[).:]|$)", plain))


@lru_cache(maxsize=4096)
def _read(answer: str) -> Any:
    """Parses the whole answer as one expression; None if it cannot be parsed."""
    answer = plain(answer)
    if "\\" not in answer and re.search(r"\d\s+\d", answer):  # math-verify would multiply them
        return None
    if not _balanced(answer):
        return None
    parsed = _parse(f"${answer}$", delimited=False)
    if parsed is None and (percent := re.fullmatch(r"(.*?)\s*\\?%", answer, re.DOTALL)):
        parsed = _parse(f"${percent[1]}$", delimited=False)  # 9% and 9 are equal to math-verify too
    return parsed


def _parse(text: str, *, delimited: bool) -> Any:
    """The first expression of a text; None without one.

    Args:
      delimited: whether the text may have delimiters anywhere, so that plain numbers count too.
    """
    parse, _, kinds = library()
    text = TRAILING.sub("", text)
    # Its own time limits use SIGALRM, which works in the main thread only; the caller's limit holds here.
    options: dict[str, Any] = {"parsing_timeout": None, "fallback_mode": "no_fallback"}
    parsed = parse(text, kinds if delimited else kinds[:1], **options)
    return parsed[0] if parsed else None


def _equal(gold: str, expected: Any, candidate: str, parsed: Any) -> bool:
    bases = [_BASE.match(re.sub(r"\s|\\text|\\mathrm", "", text)) for text in (gold, candidate)]
    if bases[0] and bases[1]:
        return len({(base[1].lstrip("0").upper(), base[2]) for base in bases if base}) == 1
    if _name(candidate) and not _name(gold):  # x2 is not 2x
        return False
    moduli = [MODULUS.search(text) for text in (gold, candidate)]
    if moduli[0] and moduli[1] and moduli[0][1] != moduli[1][1]:
        return False
    if any(shares := [_SHARE.fullmatch(text) for text in (gold, candidate)]):
        return _equal_shares(expected, parsed, shares)
    if (single := without_multiple(candidate)) != candidate and without_multiple(gold) == gold:
        return _verified(expected, parsed) or _verified(expected, _read(single))
    units = [unit_of(text) for text in (gold, candidate)]
    if units[0] and units[1]:
        if not same_kind(units[0], units[1]):
            return False
        if (times := factor(units[0], units[1])) != 1:
            return hasattr(parsed, "free_symbols") and _verified(expected, parsed * times.numerator / times.denominator)
    return _verified(expected, parsed)


def _equal_shares(expected: Any, parsed: Any, shares: Sequence[re.Match[str] | None]) -> bool:
    """Whether two numbers are equal if at least one is in percent: 25 % equals 25 or 0.25."""
    expected, parsed = (
        _read(share[1]) if share else value for share, value in zip(shares, (expected, parsed), strict=True)
    )
    if shares[0] and shares[1]:
        return _verified(expected, parsed)
    if not all(hasattr(value, "free_symbols") for value in (expected, parsed)):
        return False
    if shares[0]:
        return _verified(expected, parsed) or _verified(expected / 100, parsed)
    whole = expected.is_number and bool(abs(expected) > 1)  # 25 may be a share of 25 %, and 0.5 is not 0.5 %
    return _verified(expected, parsed / 100) or (whole and _verified(expected, parsed))


def _verified(expected: Any, parsed: Any) -> bool:
    if parsed is None:
        return False
    if (pairs := _assignments(expected)) and not _assignments(parsed):
        return _in_order(pairs, parsed)
    if hasattr(expected, "shape") and 1 in expected.shape and not hasattr(parsed, "shape"):  # a vector such as (1, 2)
        return _in_order(list(expected), parsed)
    if hasattr(parsed, "shape") and 1 in parsed.shape and type(expected).__name__ in ("Tuple", "Interval"):
        return _in_order(list(parsed), expected)
    verify = library()[1]
    if verify(expected, parsed, timeout_seconds=None, allow_set_relation_comp=True):
        return _close(expected, parsed)
    return _same_decimals(expected, parsed)


def _same_decimals(expected: Any, parsed: Any) -> bool:
    """Whether two numbers are equal with exact decimals: 6.02 * 10^23 has more digits than a float."""
    import sympy

    values, exact = [], lambda e: sympy.Rational(*Decimal(str(e)).as_integer_ratio())  # exact for any number of digits
    for value in (expected, parsed):
        if not isinstance(value, sympy.Expr) or value.free_symbols:
            return False
        values.append(value.replace(lambda e: e.is_Float, exact).doit())
    return any(value.has(sympy.Float) for value in (expected, parsed)) and bool(values[0] == values[1])


def _assignments(value: Any) -> list[Any]:
    """The right sides of x = 3, y = 4, in order; empty for anything else."""
    parts = list(getattr(value, "_unsorted_args", ()) or ())
    if len(parts) < 2 or not all(type(p).__name__ == "Equality" and p.lhs.is_Symbol for p in parts):
        return []
    return [p.rhs for p in parts] if len({p.lhs for p in parts}) == len(parts) else []


def _in_order(expected: list[Any], parsed: Any) -> bool:
    """Whether (3, 4) or 3, 4 has the values of x = 3, y = 4."""
    if hasattr(parsed, "shape"):
        parts = list(parsed) if 1 in parsed.shape else []
    elif type(parsed).__name__ == "Interval":
        parts = [parsed.start, parsed.end] if parsed.left_open and parsed.right_open else []
    else:
        parts = list(getattr(parsed, "_unsorted_args", None) or getattr(parsed, "args", None) or ())
    return len(parts) == len(expected) and all(map(_verified, expected, parts))


def _close(expected: Any, parsed: Any) -> bool:
    """Whether two real numbers agree to six digits. math-verify compares six decimals, so 1e-7 would equal 0."""
    try:
        a, b = (float(value) for value in (expected, parsed))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return True
    if a == b or min(abs(a), abs(b)) >= 0.1:
        return True
    return abs(a - b) <= 2e-6 * max(abs(a), abs(b)) or "%" in str(parsed) or _percent(expected) or _percent(parsed)


def _percent(value: Any) -> bool:
    return "UnevaluatedExpr" in str(type(value)) or "1/100" in str(value)
