"""The recipes' settings and steps; `workflows/llama3_*.py` puts them together as graphs."""
