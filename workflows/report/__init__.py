"""A run's report: report.json and one self-contained HTML page."""
