"""Ray actors of a group: seats, placement, named actors, what Ray's errors mean."""
