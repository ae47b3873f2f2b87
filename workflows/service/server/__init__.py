"""The HTTP service and the Ray actor that hosts it."""
