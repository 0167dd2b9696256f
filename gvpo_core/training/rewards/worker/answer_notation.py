"""Converts the many notations of answers into one. Imports nothing of gvpo."""

import re
from decimal import Decimal
from unicodedata import normalize

_MARKUP = re.compile(r"(?<![\w)\]}])\*\*|\*\*(?![\w(\[{\\-])")  # bold text, but not 2**10
_SPACES = re.compile("[\xa0\u2000-\u200a\u202f\u3000]")
_GAP = re.compile(r"\s{2,}")  # long gaps slow the patterns down quadratically
_MINUS = re.compile(
    "[\u2212\ufe63\uff0d]|(?<![\\w)\\]}])[\u2010-\u2013](?=[\\d.\\\\(a-z])"
)  # a dash after a digit is a range
_IN_WORDS = re.compile(r"(?<![\w)])(?:minus|negative)\s+(?=[\d.\\])", re.IGNORECASE)
_PER_CENT = re.compile(r"(?<=[\d}])\s*(?:\\[,;!: ])?(?:\\(?:text|mathrm)\s*\{\s*per\s?cent\s*\}|per\s?cent\b)")
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-zπ]))")
_ROOTS = {"√": "", "∛": "[3]", "∜": "[4]"}

_MULTIPLE = re.compile(
    r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?|\.\d+)\s*(?:\\[,;: ])?"
    r"(?:\\(?:text|mathrm)\s*\{\s*)?(hundred|thousand|million|billion|trillion|dozen)\b\s*\}?",
    re.IGNORECASE,
)
_MULTIPLES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_CODES = "USD|EUR|GBP|JPY|INR|CNY|CAD|AUD|CHF"
_CURRENCY = re.compile(rf"[€£¥₹¢]|\\(?:euro|pounds|texteuro|yen)(?![A-Za-z])|(?<=\d)\s*(?:{_CODES})\b")
_LABEL = re.compile(r"^(?:\\(?:text|mathrm)\s*\{)?\b(?!(?:sin|cos|tan|log|min|max|gcd|lcm|det|mod|exp|lim)\b)"
                    r"[A-Za-z]{3,}(?:\s+[A-Za-z]+)*\}?\s*=\s*(?=[^=])")  # fmt: skip
_ABOUT = re.compile(r"^(?:\\approx|≈|\\sim|~|(?:approximately|approx\.?|about|roughly)\s)\s*", re.IGNORECASE)
MODULUS = re.compile(r"\\?\s*\(?\s*(?:\\[pb]?mod|\bmod)\s*\{?\s*(\d+)\s*\}?\s*\)?\s*$")

_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d])")
_OF_EUROPE = re.compile(r"-?\d{1,3}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,}|(?: \d{3})+,\d+)")
_IN_ROW = re.compile(r"-?\d+(?:\.\d+)?(?:\s+-?\d+(?:\.\d+)?)+")  # 1 2 3: a list, not a product or one number
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)[eE][+-]?\d{1,3}")
_LITERAL = re.compile(r"0(?:[xX][0-9A-Fa-f]+|[bB][01]+|[oO][0-7]+)")
_MIXED = re.compile(r"(-?)(\d+)\s+(\d+)\s*/\s*(\d+)")
_ANGLE = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)\s*[{(]?\s*)(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?)")
_TEMPERATURE = re.compile(r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\[,; ])?(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF]\b)")

_DOTS = r"(?:\.\.\.|…|\\l?dots)"
_ELLIPSIS = re.compile(rf"(?<!\d)(\d*)\.(\d{{0,40}}?)(\d{{1,20}}?)\3{{2,}}{_DOTS}")  # 0.333...: at least three times
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\))")
_LINE_ABOVE = re.compile("(?:\\d\u0305)+")  # a combining overline on each repeating digit
_TWO_DOTS = re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")  # dots over the first and the last repeating digit
_ONE_SIGN = re.compile(r"(?<!\d)(\d*)\s*([¼-¾⅐-⅞↉])")  # ½, 1½
_RAISED = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_POWER = re.compile(r"\s*\*\*\s*(?:\((-?[\w/.]+)\)|(-?\w+))")

_CASES = re.compile(
    r"(?:\\left\s*\\\{\s*)?\\begin\s*\{(array|cases|aligned)\}(?:\{[^{}]*\})?(.*?)\\end\s*\{\1\}(?:\s*\\right\s*\.)?",
    re.DOTALL,
)
_MATRIX = re.compile(
    r"(?:\\left\s*)?[\[(]\s*\\begin\s*\{array\}(?:\s*\{[^{}]*\})?(.*?)\\end\s*\{array\}\s*(?:\\right\s*)?[\])]",
    re.DOTALL,
)
_ROWS = re.compile(r"\[\s*\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])+\s*\]")  # as in code: [[1, 0], [0, 1]]
_OUTSIDE = re.compile(r"([\[\]])([^\[\]()]*)([\[\]])")  # ]1, 2]: an open end, as in France


def tidied(text: str) -> str:
    """Removes bold markup; rewrites Unicode minus signs, spaces and roots, and words like "minus" and "percent"."""
    text = re.sub(r"(?<=[\w)])\s+\*\*\s+(?=[\w(])", "**", text)
    text = _MINUS.sub("-", _GAP.sub(_one_space, _SPACES.sub(" ", _MARKUP.sub("", text))))
    text = _PER_CENT.sub(r"\\%", _IN_WORDS.sub("-", text))
    return _ROOT.sub(lambda m: rf"\sqrt{_ROOTS[m[1]]}{{{m[2] or m[3]}}}", text)


def _one_space(gap: re.Match[str]) -> str:
    return "\n" if "\n" in gap[0] else " "


def without_multiple(text: str) -> str:
    """Removes words that multiply numbers: a question may ask for millions and expect 5 for 5 million."""
    return _MULTIPLE.sub(r"\1", text)


def without_preamble(answer: str) -> str:
    """Removes "about" from an answer, and moves a currency code behind the number."""
    return re.sub(rf"^({_CODES})\s*(?=[\d.])(.*)$", r"\2 \1", _ABOUT.sub("", answer))


def plain(answer: str) -> str:
    """The answer in the form that math-verify reads: LaTeX, with one notation of numbers, lists and matrices."""
    answer = re.sub(r"\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b", ",", without_preamble(answer.strip()))
    answer = MODULUS.sub("", _LABEL.sub("", answer)).replace(r"\equiv", "=").strip()
    answer = _MULTIPLE.sub(_multiplied, answer)
    answer = _numbers(_CURRENCY.sub("", answer.replace(r"\$", "").replace("$", "")).strip())
    answer = answer.replace("π", r"\pi ").replace("√", r"\sqrt ")
    answer = _RAISED.sub(lambda m: f"^{{{m[0].translate(_LOWERED)}}}", answer)
    answer = _POWER.sub(lambda m: f"^{{{m[1] or m[2]}}}", answer)
    answer = answer.replace("×", r"\times ").replace("∞", r"\infty ").replace("°", r"^\circ")
    answer = answer.replace(r"\varnothing", r"\emptyset").replace(r"\degree", r"^\circ")
    answer = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times ", answer)
    answer = re.sub(r"\\mathrm\s*\{([ie])\}", r"\1", answer)
    answer = re.sub(r"\b[cC]\(\s*(\d+)\s*,\s*(\d+)\s*\)|\b(\d+)\s+choose\s+(\d+)\b", _binomial, answer)
    answer = _ONE_SIGN.sub(_fraction_of_sign, answer).replace("\u2044", "/")
    answer = _LINE_ABOVE.sub(lambda m: rf"\overline{{{m[0].replace(chr(0x305), '')}}}", answer)
    answer = _ELLIPSIS.sub(r"\1.\2\\overline{\3}", _TWO_DOTS.sub(r"\\overline{\1\2\3}", answer))
    answer = _REPEATING.sub(_fraction, answer)
    answer = re.sub(r"\\overline\s*\{\s*([A-Z]{2})\s*\}", r"\1", answer)  # a segment
    answer = _TEMPERATURE.sub("", _ANGLE.sub(r"\1\\frac{\2\\pi}{180}", answer)).strip()
    if _PLAIN_NUMBER.fullmatch(answer):
        answer = f"{Decimal(answer):f}"
    if mixed := _MIXED.fullmatch(answer):
        sign, integer, top, bottom = mixed.groups()
        answer = rf"{sign}({integer}+\frac{{{top}}}{{{bottom}}})"
    if _IN_ROW.fullmatch(answer):
        answer = ", ".join(answer.split())
    answer = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", answer)
    answer = re.sub(r"(?<![\\A-Za-z])inf(?:inity)?(?![A-Za-z])", r"\\infty ", answer)
    answer = re.sub(r"(?<![\\A-Za-z])(pi|sqrt|sin|cos|tan|log|ln|infty)(?![A-Za-z])", r"\\\1 ", answer)
    return _lists(re.sub(r"\\lg(?![A-Za-z])", r"\\log_{10}", answer))


def _numbers(answer: str) -> str:
    """Removes thousands separators, and converts literals such as 0xff to decimal."""
    if _LITERAL.fullmatch(answer):
        return str(int(answer, 0))
    answer = re.sub(r"(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d{3}(?!\d))", "", answer)
    answer = re.sub(r"(?<=\d)\{,\}(?=\d)", ".", answer)  # a decimal comma
    answer = re.sub(r"(?<=\d)[_'\u2019](?=\d{3}(?!\d))", "", answer)
    if _OF_EUROPE.fullmatch(answer):
        answer = re.sub("[. ]", "", answer).replace(",", ".")
    answer = _GROUPED.sub(lambda m: m[0].replace(" ", ""), answer)
    return re.sub(r"^(\d+)\s+to\s+(\d+)$", r"\1:\2", answer)


def _lists(answer: str) -> str:
    """Converts systems to lists, arrays and nested lists to matrices, and intervals to one notation."""
    answer = _MATRIX.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", answer)
    if _ROWS.fullmatch(answer):
        rows = re.findall(r"\[([^\[\]]*)\]", answer)
        answer = r"\begin{pmatrix}" + r"\\".join(row.replace(",", "&") for row in rows) + r"\end{pmatrix}"
    answer = _CASES.sub(
        lambda m: ", ".join(line.replace("&", "") for line in m[2].split(r"\\") if line.strip()), answer
    )
    answer = re.sub(r"(?<!\\);", ",", re.sub(r"\\langle\b", "(", re.sub(r"\\rangle\b", ")", answer)))
    ends = _OUTSIDE.fullmatch(answer)
    if ends and ends[1] + ends[3] != "[]" and "," in (inside := ends[2].strip())[1:-1]:
        answer = f"{'[' if ends[1] == '[' else '('}{inside}{']' if ends[3] == ']' else ')'}"
    return answer


def _multiplied(match: re.Match[str]) -> str:
    return f"{Decimal(match[1].replace(',', '')) * _MULTIPLES[match[2].casefold()]:f}"


def _binomial(match: re.Match[str]) -> str:
    return rf"\binom{{{match[1] or match[3]}}}{{{match[2] or match[4]}}}"


def _fraction(match: re.Match[str]) -> str:
    """Converts a repeating decimal to a fraction."""
    integer, fixed = match[1] or "0", match[2]
    digits = match[3] or match[4] or match[5]
    if len(integer + fixed + digits) > 1000:  # int() reads at most 4,300 digits
        return f"{integer}.{(fixed + digits)[:1000]}"
    top = int(integer + fixed + digits) - int(integer + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(digits) + '0' * len(fixed)}}}"


def _fraction_of_sign(match: re.Match[str]) -> str:
    """Converts a one-character fraction, with the whole number before it: 1½."""
    top, _, bottom = normalize("NFKC", match[2]).partition("\u2044")
    fraction = rf"\frac{{{top}}}{{{bottom}}}"
    return f"({match[1]}+{fraction})" if match[1] else fraction
