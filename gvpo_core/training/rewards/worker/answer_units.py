"""Units and currencies of answers: 5 cm is not 5 m, and 100 cm are 1 m. Imports nothing of gvpo."""

import re
from fractions import Fraction

Unit = tuple[str, int, Fraction]  # dimension, power, size

_LISTED = """
length: 1/1000 mm millimeter millimeters millimetre millimetres; 1/100 cm centimeter centimeters centimetre centimetres;
  1 m meter meters metre metres; 1000 km kilometer kilometers kilometre kilometres; 254/10000 in inch inches;
  3048/10000 ft foot feet; 9144/10000 yd yard yards; 1609344/1000 mi mile miles
time: 1 s sec secs second seconds; 60 min mins minute minutes; 3600 h hr hrs hour hours; 86400 day days;
  604800 week weeks
months: 1 month months
years: 1 year years
mass: 1/1000 mg milligram milligrams; 1 g gram grams; 1000 kg kilogram kilograms; 45359237/100000 lb lbs pound pounds;
  45359237/1600000 oz ounce ounces
volume: 1 l liter liters litre litres; 1/1000 ml milliliter milliliters
dollars: 1 dollar dollars usd $; 1/100 cent cents ¢
euros: 1 euro euros eur €
sterling: 1 gbp £
yen: 1 yen jpy ¥
rupees: 1 rupee rupees inr ₹
degrees: 1 degree degrees
radians: 1 radian radians
celsius: 1 °c
fahrenheit: 1 °f
speed: 1609344/3600000 mph milesperhour; 1000/3600 km/h kph kmh kilometersperhour; 1 m/s mps
"""
_UNITS: dict[str, tuple[str, Fraction]] = {}
for _line in _LISTED.replace(";\n ", ";").strip().splitlines():
    _dimension, _, _sizes = _line.partition(":")
    for _part in _sizes.split(";"):
        _size, *_names = _part.split()
        _UNITS |= {_name: (_dimension, Fraction(_size)) for _name in _names}

_LETTERS = "|".join(sorted((re.escape(u) for u in _UNITS if len(u) > 1 and u[0].isalpha()), key=len, reverse=True))
WORDS = re.compile(
    rf"(?<=[\d}}\s])(?:{_LETTERS}|per|square|sq|cubic|cu|hundred|thousand|million|billion|trillion|dozen)(?![A-Za-z])"
    r"|\b(?:USD|EUR|GBP|JPY|INR|CNY|CAD|AUD|CHF|inf|infinity)\b"
)
"""Words next to a number that do not make the answer a text."""
# A unit at the end of an answer or of a formula: \text{ cm}^2, cm, miles per hour. Letters directly after a number that
# are not a known unit are variables: 2ab, 5m.
TRAILING = re.compile(
    rf"""(?:(?<=[\d}})])|(?<=[\d}})]\s)|(?<=\s))(?:\\[,;:!\ ]|~|\s)*
    (?: \\(?:text|textrm|mathrm|mbox)\s*\{{[^{{}}]*\}}(?:\s*\^\s*\{{?\d\}}?)?
      | (?<![A-Za-z])(?:{_LETTERS})(?:\s*\^\s*\{{?\d\}}?)?
      | (?<=\s)(?:[mshgl]|(?:(?:sq|cu|per|[A-Za-z]{{4,}}|{_LETTERS})\s+)*(?:[A-Za-z]{{4,}}|{_LETTERS}))
        (?:\s*\^\s*\{{?\d\}}?)?
    )\s*(?=\$|\\\)|\\\]|\Z)""",
    re.VERBOSE,
)
_BEFORE = re.compile(r"\s*-?\s*\\?([$€£¥₹])")
_AFTER = re.compile(
    r"\s*[$€£¥₹-]?[\d.,\\{}/\s-]*?\d[}\s]*(?:\\[,;! ]|~)*\s*"
    r"(?:\\(?:text|mathrm)\s*\{([^{}]*)\}|([A-Za-z/ ²³]+|[€£¥₹¢]|°\s?[CF]\b))\s*(?:\^\s*\{?([23])\}?)?"
)
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def unit_of(text: str) -> Unit | None:
    """The unit or currency of an answer; None if there is none, or if it is unknown."""
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm)\s*\{\s*([CF])\s*\}|([CF])\b)", r"°\1\2", text)
    if before := _BEFORE.match(text):
        dimension, size = _UNITS[before[1]]
        return dimension, 1, size
    if not (match := _AFTER.match(text)):
        return None
    name, power = (match[1] or match[2]).casefold().strip(" ."), int(match[3] or 1)
    first, _, rest = name.partition(" ")
    if first in _POWERS and rest:
        name, power = rest, _POWERS[first]
    if raised := re.search(r"(?:\^\s*\{?([23])\}?|([²³]))$", name):
        name, power = name[: raised.start()], int(raised[1] or "23"["²³".index(raised[2])])
    unit = _UNITS.get(re.sub(r"\s", "", name))
    return unit and (unit[0], power, unit[1] ** power)


def same_kind(a: Unit, b: Unit) -> bool:
    """Whether two units measure the same quantity. Pounds may be a mass or a currency."""
    return a[:2] == b[:2] or {a[0], b[0]} == {"mass", "sterling"}


def factor(a: Unit, b: Unit) -> Fraction:
    """The factor that converts a number in unit `b` to unit `a` of the same kind."""
    return b[2] / a[2] if a[0] == b[0] else Fraction(1)
