"""The time in which built-in rewards read a response: it grows as the response does, whatever it repeats.

A policy that has collapsed repeats one token until the limit. Measured in CPU seconds of a separate process: a pattern
that takes the square of the length exceeds its limit.
"""

import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.core
LENGTH, SECONDS = 20_000, 20
PARTS = (
    "x", "-", "{", "}", "(", "$", "=", "3", "1,", "**", " ", "\n", "\\", "[", "]1,", "1 ", "A. ", "and ", "abc=",
    "5 % ", "0.12", "1e5", "2^", "\u221a", "5 cm ", "3 p.m. ", "May 5, ", "answer: ", "1 1/2 ", "[[1,", "1_", "1/",
    "3-", "+", "\\boxed{", "\\boxed{5} ", "\\frac{1}", "\\text{", "\\( ", "\\begin{array}", "^\\circ ",
)  # fmt: skip
SCRIPT = """
import resource, sys
from gvpo_core.training.rewards.builtin import exact_match, regex_match
from gvpo_core.training.rewards.worker.answer_notation import tidied
from gvpo_core.training.rewards.worker.answer_units import unit_of
from gvpo_core.training.rewards.worker.math_answers import _candidates, _ratio, _words
from gvpo_core.training.rewards.worker.time_answers import last_date, last_time

resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
READ = {{
    "exact_match": lambda text: exact_match([text], answer=["5"]),
    "regex_match": lambda text: regex_match([text], answer=["5"]),
    "math_verify": lambda text: [
        f(candidate)
        for words in (False, True)
        for candidate in _candidates(tidied(text), words=words)
        for f in (last_time, last_date, _ratio, _words, unit_of)
    ],
}}
for part in {parts!r}:
    text = part * ({length} // len(part))
    for given in (text, "5" + text + "!", "see " + text + " so 5"):
        print({name!r}, repr(part), flush=True)
        READ[{name!r}](given)
print("done")
"""


@pytest.mark.slow_on("math_verify")
@pytest.mark.parametrize("name", ["exact_match", "regex_match", "math_verify"])
def test_reading_takes_time_in_proportion_to_the_length(name):
    script = SCRIPT.format(seconds=SECONDS, parts=PARTS, length=LENGTH, name=name)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), (done.stdout.splitlines()[-1:], done.stderr[-300:])


def test_a_pattern_that_takes_the_square_of_the_length_is_seen():
    script = "import re, resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\n"
    script += f"re.findall(r'\\S*\\d\\S*', 'x' * {2 * LENGTH})"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode < 0
    assert resource.getrlimit(resource.RLIMIT_CPU)[0] != 1, "the limit is that of the separate process"
