"""How a model behaves: numbers about its steps, replies and losses, and how they are judged."""
