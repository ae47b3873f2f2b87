"""The controller of an elastic group: it passes beats to the core, and carries out the core's decisions on Ray."""
