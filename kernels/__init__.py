"""What is computed on a message. One operation a file; the torch reference is its definition."""
