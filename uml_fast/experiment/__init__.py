"""A run as a whole: its folder, its trials or heads, and what they show."""
