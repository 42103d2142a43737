"""The modules that users build networks of."""
