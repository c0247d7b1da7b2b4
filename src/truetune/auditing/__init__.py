"""Other people's trainers, read in place and left as found."""
