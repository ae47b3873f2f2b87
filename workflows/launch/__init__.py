"""From a workflow file and a recipe to a run: arguments, plan, display, errors as single lines."""
