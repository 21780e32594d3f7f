"""How much speculation brings: prompts answered with drafts and without, in turn, in a child process."""
