"""How a model behaves: plain numbers of its steps, replies and losses, and what they say."""
