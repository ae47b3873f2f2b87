"""What a run came to: report.json and one self-contained HTML page."""
