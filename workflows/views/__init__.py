"""Runs as JSON for the service's page and for reports, read from the store; `page/` is the page itself."""
