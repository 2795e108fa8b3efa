"""Statistics of the messages of a step, computed where they pass and gathered once a step."""
