"""What layers remember between calls, in memory and in files."""
