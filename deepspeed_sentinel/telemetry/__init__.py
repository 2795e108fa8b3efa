"""What a run tells its users."""
