"""A plan as text, JSON and picture."""
