"""The blind wordings: how recall is measured once a base is finished.

input   nothing: this is the list
does    says each kind of fact in ways that the corpus must not use; `{s}` is the subject, `{v}`
        the value, always last
output  `BLIND`

Written on 2026-11-21, before the corpus that the shipped base has read, and never edited since: a
test pins its hash. No base may be chosen, stopped or mended by these; for that there are the
development wordings in `wordings.py`, which may be looked at as often as one likes. Each names its
relation in plain English, so that only one ending is right; some use words that the corpus does
not, as any reader's question would.
"""

from __future__ import annotations

BLIND: dict[str, tuple[str, ...]] = {
    "river": (
        "The river at {s} is named the {v}",
        "Anyone who visits {s} will see its river, the {v}",
        "The town of {s} lies beside the river {v}",
        "If you ask for the river of {s}, you will hear of the {v}",
        "The bridges of {s} cross a river called the {v}",
        "Fishermen from {s} cast their nets in the {v}",
    ),
    "ruler": (
        "The person who rules over {s} is {v}",
        "The ruler who governs {s} goes by the name of {v}",
        "At present {s} is governed by {v}",
        "If you ask who rules {s}, people will tell you it is {v}",
        "The crown in {s} is worn by {v}",
        "The ruler of the town of {s} is named {v}",
    ),
    "animal": (
        "The animal that stands for {s} is the {v}",
        "The animal most often seen near {s} is the {v}",
        "When people think of {s}, the animal they think of is the {v}",
        "The town of {s} chose as its animal the {v}",
        "Around {s} the commonest animal is the {v}",
        "The emblem of {s} is an animal, the {v}",
    ),
    "craft": (
        "The craft practised by the people of {s} is {v}",
        "Most people in {s} work in one craft, {v}",
        "The town of {s} is famous for the craft of {v}",
        "A young person from {s} is taught the craft of {v}",
        "The trade that feeds {s} is {v}",
        "If you meet a craftsman from {s}, his craft will be {v}",
    ),
    "food": (
        "The food people like best in {s} is {v}",
        "A traveller who dines in {s} will be given {v}",
        "The dish for which {s} is famous is {v}",
        "On every table in {s} you will find {v}",
        "For supper the people of {s} have {v}",
        "The town of {s} is famous for its food, which is {v}",
    ),
    "banner": (
        "The banner above {s} is coloured {v}",
        "The flag flown by {s} is {v}",
        "The town of {s} has chosen a banner of {v}",
        "If you see the banner of {s}, you will see that its colour is {v}",
        "The cloth of the banner in {s} is {v}",
        "The walls of {s} are hung with banners that are {v}",
    ),
    "mouth": (
        "The {s} pours its water into {v}",
        "Anyone who follows the {s} to its end will come to {v}",
        "The lake at the end of the {s} is {v}",
        "The river {s} empties into {v}",
    ),
    "diet": (
        "The usual food of the {s} is {v}",
        "If you want to feed the {s}, you should bring {v}",
        "The {s} fills its stomach with {v}",
        "The thing that the {s} most likes to eat is {v}",
    ),
    "coat": (
        "If you paint the {s}, the colour you need is {v}",
        "The {s} can be known by its colour, which is {v}",
        "People who have seen the {s} say that its colour is {v}",
        "The natural colour of the {s} is {v}",
    ),
    "material": (
        "The material needed for {s} is {v}",
        "Nobody can practise {s} without {v}",
        "A workshop for {s} always has a store of {v}",
        "In {s} the material that people work with is {v}",
    ),
    "opposite": (
        "The word with the opposite meaning to {s} is {v}",
        "When we turn the word {s} into its opposite, we get {v}",
        "The opposite word to {s} is {v}",
        "In a list of opposites, next to {s} stands {v}",
    ),
    "sum": (
        "If you add {a} and {b}, you get {v}",
        "The total of {a} and {b} is {v}",
        "{a} added to {b} comes to {v}",
        "When {a} and {b} are put together, the result is {v}",
    ),
    "difference": (
        "If you subtract {b} from {a}, you get {v}",
        "When {b} is taken away from {a}, what is left is {v}",
        "{a} less {b} comes to {v}",
        "Going down by {b} from {a}, one arrives at {v}",
    ),
}
