"""Held-out wordings that may be looked at: plain ones, and those of a worn blind set.

input   nothing: this is the list
does    says each kind of fact in ways that the corpus must not use; `{s}` is the subject, `{v}`
        the value, always last
output  `PLAIN`, `DEVELOPMENT`
"""

from __future__ import annotations

PLAIN: dict[str, tuple[str, ...]] = {
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
"""Short sentences of the corpus's kind, which name the relation by its own word. Written before the
first base; some were replaced, for being ambiguous, while that base was looked at."""

DEVELOPMENT: dict[str, tuple[str, ...]] = {
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
        "If you ask who rules {s}, people will tell you it is {v}",
        "The crown in {s} is worn by {v}",
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
        "The river {s} empties into {v}",
    ),
    "diet": (
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
"""Blind until one base had been measured by them; the corpus was then mended by what failed in
them. They were 64; the corpus came to say four. Some use words that the corpus does not."""
