"""Settings of a run, and what they are made from."""

from truetune.recipe.settings import Origin, Recipe, setting_names, setting_types, settings
from truetune.recipe.sources import make_recipe, read_recipe, recorded_recipe

__all__ = [
    "Origin",
    "Recipe",
    "make_recipe",
    "read_recipe",
    "recorded_recipe",
    "setting_names",
    "setting_types",
    "settings",
]
