"""What the package is compared with; nothing of it is a path of the package."""
