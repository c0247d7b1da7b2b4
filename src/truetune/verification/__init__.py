"""A fresh process opens what was saved, and says whether it is what was trained."""
