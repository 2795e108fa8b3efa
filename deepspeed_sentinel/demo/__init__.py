"""The demo: a Llama learns real text over a mesh of processes, clean, attacked, and attacked but guarded."""
