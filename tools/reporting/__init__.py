"""Parts of tools/report.py: reading runs, pictures, the page."""
