"""From evidence to a verdict: numpy on the host, pure given its state, unaware of any engine."""
