"""One driven run: the workflow's thread, the loop that turns calls into commits, its Ray tasks, and what is reused."""
