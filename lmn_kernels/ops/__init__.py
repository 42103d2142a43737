"""The operations: their public functions, checks, schemas, shape rules and gradients."""
