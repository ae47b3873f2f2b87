"""Ray actors of a group: seats, placement, named actors, Ray's errors."""
