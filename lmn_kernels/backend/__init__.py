"""Which implementation serves a call, what is installed, and the only reader of the environment."""
