"""The controller of an elastic group: it hears beats, tells the core, and carries out on Ray what the core decides."""
