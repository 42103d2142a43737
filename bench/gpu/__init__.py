"""What is special to a GPU: isolation of stages, their budget, offline compilation."""
