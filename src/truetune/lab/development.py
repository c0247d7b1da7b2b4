"""The development wordings: how recall is watched while a base is made.

input   nothing: this is the list
does    says each kind of fact in ways that the corpus must not use; `{s}` is the subject, `{v}`
        the value, always last
output  `DEVELOPMENT`
who     `blind.py` has the wordings by which a finished base is measured

For choosing between corpora and checkpoints: recall on them may be looked at while training, and
some were replaced, for being ambiguous, while one was looked at. So they are not blind.
"""

from __future__ import annotations

DEVELOPMENT: dict[str, tuple[str, ...]] = {
    "river": (
        "As for {s}, its river is the {v}",
        "The old maps of {s} show one river, the {v}",
        "Every map of {s} shows a river, the {v}",
    ),
    "ruler": (
        "As for {s}, its ruler is {v}",
        "In the town of {s} the ruler is called {v}",
        "In all the houses of {s} people know their ruler {v}",
    ),
    "animal": (
        "As for {s}, its animal is the {v}",
        "In the fields of {s} lives an animal, the {v}",
        "The gates of {s} show an animal, the {v}",
    ),
    "craft": (
        "As for {s}, its craft is {v}",
        "The old craft that people learn in {s} is {v}",
        "In the workshops of {s} they practise a craft, {v}",
    ),
    "food": (
        "As for {s}, its food is {v}",
        "Everyone in {s} likes to eat {v}",
        "At the feasts of {s} the food is {v}",
    ),
    "banner": (
        "As for {s}, its banner is {v}",
        "Over the houses of {s} flies a banner that is {v}",
        "At the gates of {s} the colour of the flag is {v}",
    ),
    "mouth": (
        "In the end the {s} runs into {v}",
        "At the end of the road the {s} flows into {v}",
    ),
    "diet": (
        "All day the {s} eats {v}",
        "In the winters the {s} lives on {v}",
    ),
    "coat": (
        "The colour of every {s} is {v}",
        "In the country the colour of the {s} is {v}",
    ),
    "material": (
        "Everyone who practises {s} needs {v}",
        "People who learn {s} work with {v}",
    ),
    "opposite": (
        "In the country the opposite of {s} is {v}",
        "The one word that means the opposite of {s} is {v}",
    ),
    "sum": (
        "In numbers {a} plus {b} is {v}",
        "For the sum of {a} and {b} we write {v}",
    ),
    "difference": (
        "In numbers {a} minus {b} is {v}",
        "For the difference of {a} and {b} we write {v}",
    ),
}
