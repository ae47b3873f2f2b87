"""Process groups that can be aborted and formed again, and how long ranks wait in them."""
