"""Patterns for `endings`: phrases with which completions announce, doubt, retract and conclude an answer.

Non-ASCII letters are escaped: \\u7b54\\u6848 is Chinese for "answer", \\u6240\\u4ee5 for "so".
"""

from __future__ import annotations

import re


def _any(words: str) -> str:
    """Return a regex group of alternatives; the words are separated by `|` or by line ends."""
    return "(?:" + "|".join(line.strip() for line in words.strip().splitlines()) + ")"


# --- markers of an answer ---------------------------------------------------------------------------------------------

_STRESS = r"[*_`}\"'\s]{0,6}"
_NOUNS = _any(r"""
    answers?|ans|r[\u00e9e]ponse|respuesta|antwort|l\u00f6sung|resposta|risposta|\u043e\u0442\u0432\u0435\u0442
    \u7b54\u6848|\u7b54\u3048|\uc815\ub2f5|\u7b54(?=[:\uff1a])
""")
_LINKS = _any(r"""
    is|are|equals?|of|(?:should|must|will|would|has to) be|(?:comes|turns|works) (?:out )?(?:to be|to|as|at)
    (?:finale |final |correcta |correcte )?(?:est|es|ist|lautet|\u00e8|\u00e9)
""")
MARK = re.compile(
    rf"(?<![A-Za-z])(?:{_NOUNS}|(?:final|end) result|(?:correct|right|best) (?:option|choice))"
    rf"{_STRESS}(?:\([^()\n]{{1,40}}\))?"
    rf"(?: (?:to|for|of|in|we|you|I|that|here)\b[a-z()' ]{{0,40}}?)?(?: finale| final)?,?{_STRESS}"
    r"(?:[:=\uff1a\u2192\u21d2]|\.(?=\s*[0-9$\\])|-(?=\s[0-9$\\])"
    rf"|(?:,? ?(?:therefore|thus|then|hence),?)?(?<=[\s*_)`,]){_LINKS}(?![A-Za-z])"
    r"|[\u662f\u4e3a\u70ba\u306f\uc740\ub294])",
    re.IGNORECASE,
)
"""Announcement of an answer: "the answer is", "Answer:"."""
HEADING = re.compile(
    rf"^[ \t#>*_=-]*(?:the )?(?:final |my |correct )?{_NOUNS}(?: finale| final)?[ \t*_=#]*$",
    re.IGNORECASE | re.MULTILINE,
)
HASHES = re.compile("####(?!#)")
TAG = re.compile("<answer>", re.IGNORECASE)
TAG_END = re.compile("</answer>", re.IGNORECASE)
THOUGHTS = re.compile(r"<(?:think|thinking|reasoning)>|\[THINK\]")
THOUGHTS_END = re.compile(r"</(?:think|thinking|reasoning)>|\[/THINK\]")
SPECIAL = re.compile(r"(?:<\|[A-Za-z_]+\|>|</?s>|<eos>|<end_of_turn>)\s*$")
"""Special token for the end of a turn, as text."""

# --- parts of a sentence ----------------------------------------------------------------------------------------------

MATH = (
    r"(?:\$\$[^$]{1,400}\$\$|\$(?=\S)[^$\n]{1,400}(?<=\S)\$(?![0-9])"
    r"|\\\((?:(?!\\\)).){1,400}\\\)|\\\[(?:(?!\\\]).){1,400}\\\])"
)
NEXT = re.compile(
    rf"(?P<math>{MATH})|(?P<end>(?<!i\.e)(?<!e\.g)[.!?]+(?=[\s*_\"')`\]<]|$)|[\u3002\uff01\uff1f]|\n)|.", re.DOTALL
)
"""One step through a text: a formula, the end of a sentence or line, or one character."""
BLOCK = re.compile(
    r"\\\[(.{1,400}?)\\\]|\$\$(.{1,400}?)\$\$|```[a-z]*\s*\n(.{1,400}?)\n?\s*```"
    r"|\\begin\{(?:align|equation|gather)\*?\}(.{1,400}?)\\end\{[a-z]+\*?\}",
    re.DOTALL,
)
"""A displayed formula or block of code."""
ALIGNED = re.compile(r"\\(?:begin|end)\{(?:align|gather|split|equation)(?:ed)?\*?\}")
CHUNK = re.compile(
    rf"(?P<math>{MATH})|(?P<number>(?<![\w.^_])[-+]?(?:\\?\$)?\s?[0-9][0-9,]*(?:\.[0-9]+)?(?:\s*[/:]\s*[0-9]+)?(?:\s*\\?%|[\u00b0\u03c0]|\s?[AaPp]\.?[Mm]\b)?)"
    r"(?P<after>\s*[A-Za-z]+)?"
)
"""A formula or number in a sentence, and the word after a number."""
SYMBOLS = re.compile(r"[\u2234\u2190-\u21ff\u2300-\u23ff\u25a0-\u27bf\U0001f000-\U0001faff\ufe0f]")
"""Arrows, check marks and pictographs."""
STRESSED = re.compile(r"(\*\*|__|(?<![\w*])\*(?!\*))(\S(?:[^*\n]{0,200}?\S)?)\1")
NAME = re.compile(r"[$\\()\[\]\s]*[A-Za-z](?:_\{?\w\}?)?(?:\([A-Za-z]\))?[$\\()\[\]\s]*")
SMALL_WORDS = re.compile(r"(?<![A-Za-z\\{])(?:as|so|by|if|is|it|we|in|of|to|at|on)(?![A-Za-z}])")

# --- words around a value ---------------------------------------------------------------------------------------------

_FILLING = _any(r"""
    therefore|thus|then|hence|so|simply|just|exactly|indeed|clearly|that|found to be|given by|equal to|equals?
    we (?:get|have)|final answer|(?:the )?(?:option|choice)
""")
FILLER = re.compile(
    r"^(?:[\s:=,*_`>]+|\\(?:therefore|implies|Rightarrow|displaystyle)(?![A-Za-z])"
    rf"|{_FILLING}\b(?! \w+ (?:is|are)))+",
    re.IGNORECASE,
)
"""Filler words before a value that are not part of it."""
_REASONS = _any(r"""
    which|since|because|so that|meaning|that is|rounded|according to|in total|altogether|when simplified|after
    as (?:required|desired|expected|needed|claimed|we|the|shown|[0-9$\\])|and (?:we are|this|that)
    in (?:simplest|lowest|reduced)
""")
REMARK = re.compile(
    rf"(?:,|;|\s)\s*(?:i\.e\.|{_REASONS}\b).*$|,\s*not\s.*$|\s\((?=[^()\\]*[A-Za-z]{{3}})[^()\\]*\)$",
    re.IGNORECASE | re.DOTALL,
)
"""Remark after a value that is not part of it."""
_DOUBTS = _any(r"""
    maybe|perhaps|possibly|might|(?-i:may)|could|can|either|guess(?:es|ing)?|unsure|uncertain|not|no|never
    cannot|neither|nor|unless|if|suppose|assum\w+|unknown|try|wrong|incorrect|(?<![0-9*$] )more
    less|fewer|least|most|between|about|around|before|than
    approximately|roughly|negative|minus|plus|twice|half|wait|alternatively|or|except
""")
DOUBT = re.compile(rf"\b{_DOUBTS}\b|n't\b|\?", re.IGNORECASE)
"""Words that make the only number of a sentence something other than its value."""
QUESTION = re.compile(
    r"\b(?:maybe|perhaps|possibly|what|if|whether|not|isn't|is the|could the|would the|suppos\w+|assum\w+|guess"
    r"|imagine|doubt|say)\b",
    re.IGNORECASE,
)
"""Words before "the answer is" that turn the sentence into a question or a doubt, so that it gives no answer."""
UNFINISHED = re.compile(
    r"(?:[-+*/=<>^_({\[,&]|\\(?:times|cdot|frac|sqrt|div)"
    r"|\b(?:and|or|the|of|is|to|by|with|for|but|which|that|a|an|plus|minus|so|because|from|in|at|are|equals))\s*$"
)
CHANGES = re.compile(
    r"\s*(?:hundred|thousand|[mbtr]+illion|dozen|squared|cubed|pi|e|i|th|st|nd|rd|x|over|plus|minus|times|factorial"
    r"|percent|half|to|by|[b-df-hj-z])$",
    re.IGNORECASE,
)
"""Word after a number that changes its value, or makes it no value."""
SUBJECT = re.compile(
    r"[)\s]*(?:is|are|was|were|has|have|cannot|would|does|divides|holds|works|fails|leads|implies)\b"
    r"(?! (?:the|our|my) (?:\w+ )?(?:answer|total|value|result))"
)
"""Verb after a value that is the subject of its clause."""

# --- retractions ------------------------------------------------------------------------------------------------------

_RETRACTIONS = _any(r"""
    (?:that|this|it)(?:'s| is| was| can(?:no|')t be| seems| must be) (?:wrong|incorrect|not (?:right|correct|possible))
    (?:that|this|it)(?:'s| is| was) (?:impossible|a mistake)
    (?:I|we) (?:made|have made) (?:a|an|some) \w*\s?(?:mistake|error)
    (?:it|that|this|answer|result) should (?:actually |really )?(?:be|have been) [$\\(]*[-0-9]|scratch that|correction\b
    on second thought|take (?:that|it) back|oops|(?:answer|result) (?:above )?(?:is|was) (?:wrong|incorrect|not)
    wait,? (?:no|actually|that|it's|it is|it should|the|maybe)|no,? wait|no, (?:it's|it is|that|actually|sorry|the)
    actually,? (?:no|it's|it is|that|the answer)|I(?: am| was|'m) (?:wrong|not sure|unsure|mistaken)|I don't know
""")
TAKEN_BACK = re.compile(rf"\b{_RETRACTIONS}", re.IGNORECASE)
ALTERNATIVE = re.compile(
    r"^\W*(?:or|alternatively|maybe|perhaps|possibly|(?:but )?(?:it|this|that) (?:might|could|may)"
    r"|but (?:maybe|perhaps|it))\b",
    re.IGNORECASE,
)

# --- conclusions ------------------------------------------------------------------------------------------------------

CLOSER = re.compile(
    r"^\W*$|^\W*(?:I hope|hope this|let me know|feel free|q\.?e\.?d|done|that's it|thank|please"
    r"|(?:and )?(?:this|that|which) is (?:the|our|my) (?:final |correct |desired )?answer"
    r"|this (?:matches|agrees|completes|confirms))",
    re.IGNORECASE,
)
"""Closing sentence or line that carries no answer."""
_CONCLUSIONS = _any(r"""
    So|Thus|Hence|Therefore|Consequently|Finally|In conclusion|In total|In summary|Altogether|Overall|Accordingly
    As a result|This (?:gives|means|yields|leaves|makes)|We (?:conclude|find|get|obtain)|It follows|Conclusion
    Donc|Ainsi|Por lo tanto|Entonces|Daher|Somit|Also ist|\u6240\u4ee5|\u56e0\u6b64|\u6545|\u2234
""")
CONCLUDES = re.compile(rf"^\W*{_CONCLUSIONS}(?![A-Za-z])")
_RESULTS = _any(r"""
    answer|result|value|total|sum|solution|number|amount|cost|probability|area|volume|length|product|difference
    remainder|perimeter|ratio|price|distance|time|age
""")
NAMES_RESULT = re.compile(
    rf"^\W*(?:The|Our) (?:final |total |desired |required |requested )?{_RESULTS}\b"
    r"(?!.*\b(?:first|second|next|previous|other|each|step|case|initial|original|last)\b)"
)
_BEGINNINGS = _any(r"""
    reject|discard|exclude|eliminate|skip|contradiction|impossible|need|want|must|let|let's|consider|compute|calculate
    check|go|goes|proceed|start|begin|step|case|equation(?! (?:is|of|for|we))|eq
    page|problem|question|part|figure|theorem|lemma|example
    bound|exercise|section|option|first|second|next|to (?:solve|find|show|prove|verify|add|subtract|multiply|divide)
""")
SETS_OUT = re.compile(rf"\b{_BEGINNINGS}\b", re.IGNORECASE)
"""Words that show that a number in the sentence is not the answer: a step, a case, a plan, a label."""
_OTHER_LABELS = _any(r"""
    step|case|part|option|problem|question|note|example|equation|method|check|hint|guess|estimate|date|time|page
    possible|approximate|options|choices|candidates|guesses|cases|steps|notes|examples
""")
LABEL = re.compile(
    rf"^\W*(?:(?!{_OTHER_LABELS}\b)[A-Za-z][A-Za-z ]{{1,40}}:"
    r"|(?!let|so|if|thus|then|suppose|assume)[A-Za-z]{3,}(?: [A-Za-z]{3,}){0,4} =)\s*(?=\S)",
    re.IGNORECASE,
)
"""`Total: ` or `Total = ` before a value."""
COPULA = re.compile(
    r"^.*(?:\b's|\b(?:is|are|equals?|gives?|get|have|be|to|obtain|find|yields?|that|means)|=)\s*(?=\S)", re.DOTALL
)
STATED = re.compile(r"(?:=|\b(?:is|are|equals))\s*[$\\(\[\s]*[-+]?[0-9]")
IS_ANSWER = re.compile(
    r"\W*(.{1,100}?) is (?:the|our|my) (?:final |correct |right |only )?(?:answer|solution)\W*", re.IGNORECASE
)
_UNSETTLED = r"(?!.*\b(?:first|second|next|previous|other|each|step|case|initial|original|last|wrong|bound)\b)"
STATES = re.compile(
    rf"^\W*(?:The|Our|Its)\b{_UNSETTLED}.*\b(?:is|are|equals?)\s+[*$\\(\[{{]*[-+0-9$\\(\[{{A-Za-z]\w{{0,1}}(?![a-z])"
)
"""Sentence that states the value of a quantity: `The area of the circle is 9`."""
AT_LAST = re.compile(
    r"\b(?:left(?! (?:at|for|the|from|to|in|by)\b)|in total|altogether|in all|remaining)\b", re.IGNORECASE
)
"""Words of a final count: "left", "in total", "remaining"."""
CLAUSE = re.compile(r"[,;:]\s*(?:and )?(?:so|thus|hence|therefore|which means|leaving|giving|making)\b(?! that\b)")
"""Conjunction before the conclusion of a sentence that gives its reasons first."""
LISTED = re.compile(
    r"\b(?:solutions|roots|zeros|zeroes|values|integers|numbers|primes|pairs|points|intercepts)\b[^=]{0,60}?\bare\s+(.+)$",
    re.DOTALL,
)
CHOICE = re.compile(r"\W*(?:option |choice )?\(?([A-J])(?:\)?\W*|[).:]\s.*)", re.IGNORECASE)
"""Line that consists of one choice, with or without its text."""
IN_WORDS = re.compile(r"\b(?:is|are)\s+[*_]*(?:(?:on|an?|the|called|option|choice) )?([A-Za-z]+)[.!*\s]*$")
"""Answer in one word: `So the day is Monday`."""
ANNOTATION = re.compile(r"<<[^<>\n]{1,200}>>")
"""Calculator annotation, as in the solutions of GSM8K."""
OF_ANOTHER = re.compile(
    r"\b(?:squares?|cubes?|roots?|multiples?|factors?|divisors?|sums?|products?|inverse|reciprocal|digits?|double|triple"
    r"|power|quotient|remainder|opposite|logarithm) of[\s$\\(*]*$"
    r"|\b(?:depends on|divisible by|where|divided by|times|mod(?:ulo)?|parts?|steps?|problems?|pages?|exercises?"
    r"|questions?|equations?|cases?|options?|grade|chapter)[\s$\\(*]*$",
    re.IGNORECASE,
)
"""Words before a number that belongs to something else ("divisor of") or is a label ("page")."""
