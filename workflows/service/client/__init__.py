"""The service from outside: submit, watch, start it, take it down."""
