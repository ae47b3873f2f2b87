"""The controller's core: a pure state machine of messages, ranks and spares. No Ray, no clock."""
