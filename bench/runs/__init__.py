"""The runs of ``python -m bench``, a module each."""
