"""A whole mesh in one process: a real model, attacked at its stage boundaries, judged by the engine's own code."""
