"""What follows from a verdict."""
