"""Whether a response's final answer equals a mathematical gold answer, through math-verify.

Data sets write gold answers as LaTeX without delimiters (`2\\pi`), where math-verify would find the number 2 alone.
Both sides are therefore read whole, as LaTeX. What math-verify leaves out (units, bases) or rounds away is compared
here. Answers in words are compared as text.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from typing import Any
from unicodedata import normalize

from .time_answers import gold_time, last_time

_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\fbox")
_FINAL = re.compile(r"(?i)\banswer\b(?:\s+(?:is|are|=))?\s*:?\s*")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
_FUNCTION = re.compile(
    r"\b(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|pi|min|max|gcd|lcm|mod|det|"
    r"floor|ceil|infty|frac|and|or)\b"
)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)[eE][+-]?\d{1,3}")
_MIXED = re.compile(r"(-?)(\d+)\s+(\d+)\s*/\s*(\d+)")
_ANGLE = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)\s*[{(]?\s*)(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?)")
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\))")
_LINE_ABOVE = re.compile("(?:\\d\u0305)+")  # a combining line over each digit that repeats
_TWO_DOTS = re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")  # over both ends of what repeats
_ONE_SIGN = re.compile(r"(?<!\d)(\d*)([¼-¾⅐-⅞↉])")  # ½, 1½
_BASE = re.compile(r"^\(?([0-9A-Z]+)\)?_\{?\(?(\d+)\)?\}?$")
_RAISED = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_UNITS = {
    unit: number
    for number, units in enumerate(
        (
            "mm millimeter millimeters millimetre millimetres", "cm centimeter centimeters centimetre centimetres",
            "m meter meters metre metres", "km kilometer kilometers kilometre kilometres", "in inch inches",
            "ft foot feet", "yd yard yards", "mi mile miles", "s sec second seconds", "min minute minutes",
            "h hr hrs hour hours", "day days", "week weeks", "month months", "year years",
            "mg milligram milligrams", "g gram grams", "kg kilogram kilograms", "lb lbs pound pounds",
            "oz ounce ounces", "l liter liters litre litres", "ml milliliter milliliters", "cent cents",
            "dollar dollars", "degree degrees", "radian radians", "mph milesperhour",
            "km/h kph kmh kilometersperhour", "m/s mps",
        )
    )
    for unit in units.split()
}  # fmt: skip

_SHORT = "|".join(sorted((re.escape(u) for u in _UNITS if len(u) > 1), key=len, reverse=True))
# A unit before the end of an answer or of a formula: \text{ cm}^2, cm, miles per hour. Letters right after a number, of
# which no known unit is made, are variables: 2ab, 5m.
_UNIT = re.compile(
    rf"""(?:(?<=[\d}})])|(?<=[\d}})]\s)|(?<=\s))(?:\\[,;:!\ ]|~|\s)*
    (?: \\(?:text|textrm|mathrm|mbox)\s*\{{[^{{}}]*\}}(?:\s*\^\s*\{{?\d\}}?)?
      | (?<![A-Za-z])(?:{_SHORT})(?:\s*\^\s*\{{?\d\}}?)?
      | (?<=\s)(?:[mshgl]|(?:(?:sq|cu|per|[A-Za-z]{{4,}}|{_SHORT})\s+)*(?:[A-Za-z]{{4,}}|{_SHORT}))
        (?:\s*\^\s*\{{?\d\}}?)?
    )\s*(?=\$|\\\)|\\\]|\Z)""",
    re.VERBOSE,
)
_BASE_IN_WORDS = re.compile(r"_\s*\{?\s*\\(?:text|textrm|mathrm)\s*\{\s*(\w+)\s*\}\s*\}?")
_BASES = dict(
    zip(
        ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "sixteen"),
        (*range(2, 13), 16),
        strict=True,
    )
)
_CASES = re.compile(
    r"(?:\\left\s*\\\{\s*)?\\begin\s*\{(array|cases|aligned)\}(?:\{[^{}]*\})?(.*?)\\end\s*\{\1\}(?:\s*\\right\s*\.)?",
    re.DOTALL,
)


@lru_cache(maxsize=1)
def library() -> tuple[Any, Any, Any]:
    """math-verify's parse, verify and settings for LaTeX and plain numbers. Raises: ImportError: it is not installed.

    Its own removal of units is off: it takes letters like ab, m and t after a number for units.
    """
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as e:
        raise ImportError('the math_verify reward needs math-verify: pip install "gvpo[rewards]"') from e
    latex = LatexExtractionConfig()
    latex = replace(latex, normalization_config=replace(latex.normalization_config, units=False))
    return parse, verify, [latex, ExprExtractionConfig()]


def judge(response: str, gold: str) -> float | None:
    """1.0 where the response's final answer equals the gold answer, 0.0 where not; None where the gold is not read."""
    thought, _, after = response.rpartition("</think>")
    if thought and after.strip():
        response = after
    if tagged := re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL):
        response = tagged[-1]
    answer = _undelimited(gold.rpartition("####")[2] if "####" in gold else gold)
    if not answer:
        return None
    if (time := gold_time(answer)) is not None:
        return float(any(last_time(candidate) == time for candidate in _candidates(response, words=True)))
    words = _words(answer)
    if words is not None:
        if any(_plain(c) == _plain(answer) or _choice(c, answer) for c in _candidates(response, words=True)):
            return 1.0
        return 0.0 if len(words) == 1 or (_TEXT_COMMAND.search(answer) and len(words) <= 3) else None
    if name := _name(answer):
        stated = [*_candidates(response, words=True), *re.findall(r"\$([^$]+)\$", response)[-1:]]
        return float(any(_name(candidate) == name for candidate in stated))
    wanted = _read(answer)
    if wanted is None:
        return None
    for candidate in _candidates(response):
        value = _read(candidate)
        if value is not None:
            return float(_equal(answer, wanted, candidate, value))
    if _DELIMITED.search(response) or not re.search(r"\d\S*[^\d\s.,;:!?%)*+/^($€£-]", response):
        return float(_verified(wanted, _parse(response, delimited=True)))
    return 0.0


def _candidates(response: str, *, words: bool = False) -> Iterator[str]:
    """What the response says its final answer is, most reliable first: boxed, or after "answer", or its last line.

    Args:
      words: whether the answer is text; else only what is mathematics without words counts.
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
    if stated.strip() and (words or (not _DELIMITED.search(stated) and _is_mathematics(stated, 3))):
        yield _undelimited(stated)
    if words or (not delimited and _is_mathematics(last, 2)):
        yield _undelimited(last)
    tokens = re.findall(r"\S*[\d\\]\S*", last)
    if not words and not delimited and tokens and re.search(r"\d[A-Za-z\\π√^_!]|\\", tokens[-1]):
        yield _undelimited(tokens[-1])  # 2\pi, 2x: not the number at its beginning


def _is_mathematics(text: str, letters: int) -> bool:
    """Whether a text has no words: runs of this many letters that are no function's name."""
    bare = _FUNCTION.sub("", re.sub(r"\\[A-Za-z]+", "", text))
    return len(text) < 200 and not re.search(rf"[A-Za-z]{{{letters},}}", bare)


def _boxed(text: str) -> str:
    """The content of the last \\boxed{...}; adjacent ones (\\boxed{1} and \\boxed{2}) are joined by commas."""
    contents: list[str] = []
    end = -1
    for match in re.finditer(r"\\(?:boxed|fbox)\s*(\{|(?=[\w]))", text):
        if match.start() < end:  # inside the one before
            continue
        if end >= 0 and not re.fullmatch(r"(?:[\s$,.;&]|\\[,;\])(\[]|and|or)*", text[end : match.start()]):
            contents = []
        if match[1] == "{":
            depth, at = 1, match.end()
            while at < len(text) and depth:
                depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
                at += 1
            if depth:
                continue  # cut at the token limit
            content, end = text[match.end() : at - 1], at
        else:
            content, end = text[match.end()], match.end() + 1
        contents.append(content)
    return ", ".join(_undelimited(content) for content in contents)


def _undelimited(text: str) -> str:
    """The mathematics in a text without delimiters, a box or a full stop around it. Bases in words become digits."""
    text = _BASE_IN_WORDS.sub(lambda m: f"_{{{_BASES.get(m[1].casefold(), m[1])}}}", text.strip())
    text = re.sub(r"^\(([0-9A-Z]+)\)(?=_\{?\(?\d+\)?\}?$)", r"\1", text)
    while True:
        before = text
        text = re.sub(r"^\*\*(.*)\*\*$", r"\1", text, flags=re.DOTALL).strip()
        text = re.sub(r"(?<=[^\\.])(?<!\\right)[.。]$", "", text).strip()
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")):
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                inner = text[len(left) : len(text) - len(right)]
                if left not in inner and not (left == r"\boxed{" and not _balanced(inner)):
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
    """The words of an answer that is text, as Evelyn, \\text{no solution} or May 5; None for mathematics."""
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
    known = {"yes", "no", "true", "false", "odd", "even"}
    if len(words) == 1 and re.fullmatch(r"\(?[A-Z]\)?\.?", words[0]):
        return words
    if any((len(w) >= 4 and w.isalpha()) or w.lower() in known for w in words) or (
        has_command and any(map(str.isalpha, words))
    ):
        return words if _FUNCTION.sub("", " ".join(words)).strip() else None
    if len(words) > 1 and any(w.isalpha() and len(w) > 1 for w in words):
        return words
    return None


def _name(text: str) -> str | None:
    """A name that no product is: H2O, x_1, \\angle ABC. None for other answers. As mathematics HO2 would equal H2O."""
    bare = re.sub(r"[\s{}_$*]", "", _TEXT_COMMAND.sub(r"\1", text)).strip(".")
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
    """A text for comparison: without commands for text, delimiters, white space, case."""
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
    """The expression that an answer is as a whole; None where it cannot be parsed."""
    answer = re.sub(r"\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b", ",", answer)
    answer = answer.replace(r"\$", "").replace("$", "").replace("π", r"\pi ").replace("√", r"\sqrt ")
    answer = _RAISED.sub(lambda m: f"^{{{m[0].translate(_LOWERED)}}}", answer)
    answer = answer.replace("\u2212", "-").replace("×", r"\times ").replace("∞", r"\infty ").replace("°", r"^\circ")
    answer = re.sub(r"(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d{3}(?!\d))", "", answer).replace(r"\varnothing", r"\emptyset")
    answer = _ONE_SIGN.sub(_fraction_of_sign, answer).replace("\u2044", "/")
    answer = _LINE_ABOVE.sub(lambda m: rf"\overline{{{m[0].replace(chr(0x305), '')}}}", answer)
    answer = _TWO_DOTS.sub(r"\\overline{\1\2\3}", answer)
    answer = _REPEATING.sub(_fraction, answer.replace(r"\degree", r"^\circ"))
    answer = _ANGLE.sub(r"\1\\frac{\2\\pi}{180}", answer).strip()
    if _PLAIN_NUMBER.fullmatch(answer):
        answer = f"{Decimal(answer):f}"
    if mixed := _MIXED.fullmatch(answer):
        sign, integer, top, bottom = mixed.groups()
        answer = rf"{sign}({integer}+\frac{{{top}}}{{{bottom}}})"
    answer = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", answer)
    answer = re.sub(r"(?<![\\A-Za-z])(pi|sqrt|sin|cos|tan|log|ln|infty)(?![A-Za-z])", r"\\\1 ", answer)
    answer = re.sub(r"\\lg(?![A-Za-z])", r"\\log_{10}", answer)
    answer = _CASES.sub(
        lambda m: ", ".join(line.replace("&", "") for line in m[2].split(r"\\") if line.strip()), answer
    )
    if not _balanced(answer):
        return None
    parsed = _parse(f"${answer}$", delimited=False)
    if parsed is None and (percent := re.fullmatch(r"(.*?)\s*\\?%", answer, re.DOTALL)):
        parsed = _parse(f"${percent[1]}$", delimited=False)  # 9% and 9 are equal to math-verify too
    return parsed


def _fraction(match: re.Match[str]) -> str:
    """A decimal whose last digits repeat, as a fraction."""
    integer, fixed = match[1] or "0", match[2]
    digits = match[3] or match[4] or match[5]
    if len(integer + fixed + digits) > 1000:  # int() reads at most 4,300 digits
        return f"{integer}.{(fixed + digits)[:1000]}"
    top = int(integer + fixed + digits) - int(integer + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(digits) + '0' * len(fixed)}}}"


def _fraction_of_sign(match: re.Match[str]) -> str:
    """A fraction that is one character, with the whole number before it: 1½."""
    top, _, bottom = normalize("NFKC", match[2]).partition("\u2044")
    fraction = rf"\frac{{{top}}}{{{bottom}}}"
    return f"({match[1]}+{fraction})" if match[1] else fraction


def _parse(text: str, *, delimited: bool) -> Any:
    """The first expression of a text; None without one.

    Args:
      delimited: whether plain numbers count too, in a text that may have delimiters anywhere.
    """
    parse, _, kinds = library()
    text = _UNIT.sub("", text)
    # Its own time limits use SIGALRM, which works in the main thread only; the caller's limit holds here.
    options: dict[str, Any] = {"parsing_timeout": None, "fallback_mode": "no_fallback"}
    parsed = parse(text, kinds if delimited else kinds[:1], **options)
    return parsed[0] if parsed else None


def _equal(gold: str, wanted: Any, candidate: str, parsed: Any) -> bool:
    bases = [_BASE.match(re.sub(r"\s|\\text|\\mathrm", "", text)) for text in (gold, candidate)]
    if bases[0] and bases[1]:
        return len({(base[1].lstrip("0"), base[2]) for base in bases if base}) == 1
    units = [_unit(text) for text in (gold, candidate)]
    if None not in units and units[0] != units[1]:
        return False
    return _verified(wanted, parsed)


def _unit(text: str) -> int | None:
    """A number for the unit at the end of an answer; None without one that is known."""
    if not (
        match := re.match(
            r"^\s*[\d.,\\{}/\s-]*?\d[}\s]*(?:\\[,;! ]|~)*(?:\\(?:text|mathrm)\s*\{([^{}]*)\}|([A-Za-z/ ]+))", text
        )
    ):
        return None
    return _UNITS.get(re.sub(r"\s", "", match[1] or match[2] or "").casefold())


def _verified(wanted: Any, parsed: Any) -> bool:
    if parsed is None:
        return False
    if (pairs := _assignments(wanted)) and not _assignments(parsed):
        return _in_order(pairs, parsed)
    verify = library()[1]
    if verify(wanted, parsed, timeout_seconds=None, allow_set_relation_comp=True):
        return _close(wanted, parsed)
    return _same_decimals(wanted, parsed)


def _same_decimals(wanted: Any, parsed: Any) -> bool:
    """Whether two numbers are equal with their decimals taken exactly: 6.02 * 10^23 has more digits than a float."""
    import sympy

    values, exact = [], lambda e: sympy.Rational(*Decimal(str(e)).as_integer_ratio())  # of any number of digits
    for value in (wanted, parsed):
        if not isinstance(value, sympy.Expr) or value.free_symbols:
            return False
        values.append(value.replace(lambda e: e.is_Float, exact).doit())
    return any(value.has(sympy.Float) for value in (wanted, parsed)) and bool(values[0] == values[1])


def _assignments(value: Any) -> list[Any]:
    """The right sides of x = 3, y = 4, in order; empty for anything else."""
    parts = list(getattr(value, "_unsorted_args", ()) or ())
    if len(parts) < 2 or not all(type(p).__name__ == "Equality" and p.lhs.is_Symbol for p in parts):
        return []
    return [p.rhs for p in parts] if len({p.lhs for p in parts}) == len(parts) else []


def _in_order(wanted: list[Any], parsed: Any) -> bool:
    """Whether (3, 4) or 3, 4 has the values of x = 3, y = 4."""
    if type(parsed).__name__ == "Interval":
        parts = [parsed.start, parsed.end] if parsed.left_open and parsed.right_open else []
    else:
        parts = list(getattr(parsed, "_unsorted_args", None) or getattr(parsed, "args", None) or ())
    return len(parts) == len(wanted) and all(map(_verified, wanted, parts))


def _close(wanted: Any, parsed: Any) -> bool:
    """Whether two real numbers agree to six digits: math-verify compares six decimals, in which 1e-7 is 0."""
    try:
        a, b = (float(value) for value in (wanted, parsed))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return True
    if a == b or min(abs(a), abs(b)) >= 0.1:
        return True
    return abs(a - b) <= 2e-6 * max(abs(a), abs(b)) or "%" in str(parsed) or _percent(wanted) or _percent(parsed)


def _percent(value: Any) -> bool:
    return "UnevaluatedExpr" in str(type(value)) or "1/100" in str(value)
