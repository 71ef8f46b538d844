"""What is measured about a method beside its accuracy."""
