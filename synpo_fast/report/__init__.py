"""The report: one HTML page about one run or several, with charts, captions and numbers."""
